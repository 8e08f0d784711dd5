"""Figures of chapter 08's forward kernel: what they draw of the rows that they are given."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result
from labkit.flash.resources import CompileError, Resources


@pytest.fixture
def gpu() -> Result:
    """A result with the shape of a GPU's; the rates in it are made up."""
    result = Result()
    for d in (64, 128):
        for n in (1024, 4096):
            for place, name in enumerate(("v1", "v2", "ours", "flash", "cudnn", "naive")):
                row = {"part": "steps", "name": name, "head_dim": d, "seq_len": n}
                result.rows.append(row | {"causal": False, "rate": (place + 1) * 1e14 + d + n})
    result.rows.append({"part": "ceiling", "load": "sustained", "rate": 7e14})
    result.rows.append({"part": "ceiling", "load": "burst", "rate": 8e14})
    return result


def axes_of(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 60
    fig.draw_without_rendering()
    return fig.axes


def made(**changes) -> Resources:
    values = {
        "kernel": "forward", "arch": "sm_90", "dtype": "bfloat16", "head_dim": 128, "causal": False,
        "tiles": {"block_m": 128, "block_n": 64, "num_warps": 4, "num_stages": 2},
        "registers": 200, "spill_bytes": 0, "shared_bytes": 96 * 1024, "estimate": None,
        "counts": {}, "ptx_counts": {}, "loop": {"FFMA": 64}, "ptx": "", "sass": "",
    }  # fmt: skip
    return Resources(**{**values, **changes})


def test_steps_are_bars_and_others_are_lines(gpu):
    left, right = axes_of(plots.flash_steps(gpu, seq_len=4096))
    for ax, d in ((left, 64), (right, 128)):
        assert [bar.get_width() for bar in ax.patches] == [1e14 + d + 4096, 2e14 + d + 4096]
        lines = [line.get_xdata()[0] for line in ax.lines]
        assert lines == [4e14 + d + 4096, 5e14 + d + 4096, 8e14]
    assert [label.get_text() for label in left.get_yticklabels()] == ["1 correct", "2 exp2"]


def test_rates_join_the_lengths_of_each_implementation(gpu):
    left, right = axes_of(plots.flash_rates(gpu))
    assert len(left.lines) == 6 and len(right.lines) == 6  # four implementations, two ceilings
    ours = left.lines[0]
    assert list(ours.get_xdata()) == [1024, 4096]
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[1] > 8e14


@pytest.mark.parametrize("draw", [lambda r: plots.flash_steps(r, seq_len=77), plots.flash_rates])
def test_a_result_without_rates_is_refused(draw):
    with pytest.raises(ArgumentError, match="GPU"):
        draw(Result()).figure()


def test_clocks_name_the_longest_of_each_kernel():
    clocks = {"a": {"product": 0.1, "exp": 0.06}, "b": {"product": 0.1, "exp": 0.2}}
    (ax,) = axes_of(plots.score_clocks(clocks))
    assert [text.get_text() for text in ax.texts] == ["product", "exp", "exp"]
    with pytest.raises(ArgumentError, match="empty"):
        plots.score_clocks({}).figure()


def test_resources_show_limits_and_say_what_spills():
    rows = [made(), made(arch="sm_120", spill_bytes=64, registers=255)]
    rows.append(CompileError("no such instruction", "v4", "sm_80"))
    shared, registers = axes_of(plots.flash_resources(rows))
    assert [bar.get_width() for bar in shared.patches] == [96 * 1024] * 2
    assert [line.get_xdata()[0] for line in shared.lines] == [227 * 1024, 99 * 1024]
    assert [bar.get_width() for bar in registers.patches] == [200, 255]
    assert [text.get_text() for text in registers.texts] == ["spills 64 B"]
    with pytest.raises(ArgumentError, match="empty"):
        plots.flash_resources([]).figure()
