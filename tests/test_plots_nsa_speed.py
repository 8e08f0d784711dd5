"""Figures of chapter 13: what they draw of the figures that they are given."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result, nsa_speed
from labkit.nsa.model import BRANCHES, PATTERNS, Shape

LENGTHS = (2048, 8192, 32768, 131072)


def gpu() -> Result:
    """A result with the shape of a GPU's; the times in it are made up."""
    result = Result()
    for n in LENGTHS:
        for what, factor in (("forward", 1.0), ("backward", 3.0)):
            dense = factor * 2e-3 * (n / 8192) ** 2
            result.add(f"dense.{what}.n{n}", dense, "s", "made up")
            times = {"dense": dense}
            for pattern, share in (("random", 0.8e-3), ("local", 0.3e-3)):
                for who, much in (("labkit", 1), ("fla", 3)):
                    seconds = factor * share * much * n / 8192
                    times[f"selection.{who}.{pattern}"] = seconds
                    result.add(f"selection.{who}.{pattern}.{what}.n{n}", seconds, "s", "made up")
                times[f"whole.labkit.{pattern}"] = factor * 3 * share * n / 8192
            nsa_speed._ratios(result, times, what, n, "made up")
            names = ["pooling", *BRANCHES]
            shares = [0.02, 0.2, 0.18, 0.4, 0.15, 0.05]
            for name, share in zip(names, shares, strict=True):
                result.add(f"branch.{name}.share.{what}.n{n}", share, "1", "made up")
            result.add(f"branch.sum.{what}.n{n}", factor * n * 3e-7, "s", "made up")
        for name, power in (("fused", 1.2), ("torch", 2), ("scores", 2), ("fla", 1.3)):
            result.add(f"topk.{name}.n{n}", 1e-4 * (n / 2048) ** power, "s", "made up")
    for group in (1, 16, 64):
        for what in nsa_speed.PASSES:
            for pattern in PATTERNS:
                key = f"group.labkit.{pattern}.{what}.g{group}"
                result.add(key, 1e-3 * (2 if group == 1 else 1), "s", "made up")
    for step in ("fla", "queries", "hopper", "keys"):
        for pattern, size in (("random", 4e10), ("local", 1e10)):
            result.add(f"l2.{step}.{pattern}.kernel", size, "bytes", "made up")
            result.add(f"model.{step}.{pattern}", 0.9 * size, "bytes", "made up")
    return result


def axes_of(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 60
    fig.draw_without_rendering()
    return fig.axes


def test_choices_fill_a_cell_for_each_choice_and_one_for_each_block_of_the_union():
    shape = Shape(seq_len=1024, kv_heads=1, block_size=32, count=6)
    chosen = {p: nsa_speed.choices(shape, p) for p in PATTERNS}
    for ax, pattern in zip(
        axes_of(plots.nsa_choices(chosen, start=960, queries=16, block_size=32)), PATTERNS,
        strict=True,
    ):  # fmt: skip
        rows = chosen[pattern][0, 960:976, 0].tolist()
        union = {c for row in rows for c in row}
        assert len(ax.patches) == 16 * 6 + len(union)
        assert f"{len(union)} blocks" in ax.get_title(loc="left")


def test_unions_fall_and_waste_rises_and_counted_ones_are_rings():
    counted = nsa_speed.run(quick=True, device="cpu", parts=["patterns"])
    left, right = axes_of(plots.nsa_unions(seq_len=2048, counted=counted))
    for line in left.lines[:1]:
        assert list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True)
    assert list(right.lines[0].get_ydata()) == sorted(right.lines[0].get_ydata())
    assert len(left.lines) == 2 + 4


def test_crossover_is_a_line_at_one():
    for ax in axes_of(plots.nsa_crossover(gpu(), pattern="local")):
        assert len(ax.lines) == 4
        ours = ax.lines[0].get_ydata()
        assert ours[0] == pytest.approx(2e-3 / 4 / 0.3e-3)
        assert [y for line in ax.lines for y in line.get_ydata()[:1]].count(1) == 1


def test_branches_stack_to_the_whole():
    for ax in axes_of(plots.nsa_branches(gpu())):
        widths = [bar.get_width() for bar in ax.patches]
        assert len(widths) == 6 * len(LENGTHS) and sum(widths) == pytest.approx(len(LENGTHS))


def test_bytes_have_a_mark_of_the_model_each():
    (ax,) = axes_of(plots.nsa_bytes(gpu()))
    assert len(ax.patches) == len(ax.lines) == 8
    assert ax.lines[0].get_xdata()[0] == pytest.approx(0.9 * ax.patches[0].get_width())


def test_groups_are_over_groups_of_16():
    for ax in axes_of(plots.nsa_groups(gpu())):
        assert list(ax.lines[0].get_ydata()) == [2, 1, 1]


def test_topk_has_a_line_for_each_way():
    (ax,) = axes_of(plots.nsa_topk(gpu()))
    assert len(ax.lines) == 4


@pytest.mark.parametrize(
    "draw",
    [plots.nsa_crossover, plots.nsa_branches, plots.nsa_bytes, plots.nsa_groups, plots.nsa_topk],
)
def test_a_result_of_a_cpu_is_refused(draw):
    with pytest.raises(ArgumentError, match="GPU"):
        draw(Result()).figure()
