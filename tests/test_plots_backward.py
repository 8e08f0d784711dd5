"""Figures of chapter 09: what they draw of the rows that they are given."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result

WAYS = ("saved", "checkpointed", "recomputed", "sdpa")


def samples(ms):
    return {"samples_ms": [ms * f for f in (0.9, 1.0, 1.0, 1.2, 1.0)], "median_ms": ms}


@pytest.fixture
def result() -> Result:
    """A result with the shape of a GPU's; the figures in it are made up."""
    made = Result()
    add = made.rows.append
    for n in (1024, 2048, 4096):
        for index, way in enumerate(WAYS, 1):
            row = {"part": "ways", "way": way, "seq_len": n}
            add({**row, "what": "peak", "predicted": index * n, "measured": index * n + 1})
            for what in ("forward", "backward"):
                add({**row, "what": what, **samples(index * n / 1e3)})
    for who, ms in (("labkit", 2.0), ("flash", 4.0), ("cudnn", 1.6)):
        for d in (64, 128):
            row = {"who": who, "seq_len": 4096, "head_dim": d, "causal": False}
            add({**row, "part": "sweep", "flops": 1e12, **samples(ms)})
    for who, role, ms in (("labkit", "dkdv", 2.0), ("labkit", "dq", 1.0), ("flash", "whole", 5.0),
                          ("labkit", "delta", 0.1), ("flash", "odd", 0.5)):  # fmt: skip
        row = {"part": "split", "who": who, "role": role, "seq_len": 4096, "head_dim": 64}
        add({**row, "causal": False, **samples(ms)})
    for who, error in (("labkit", 1e-3), ("naive", 2e-3)):
        for dtype in ("float16", "tf32"):
            row = {"part": "error", "who": who, "dtype": dtype, "logits": 1}
            add(row | {g: {"relative": error * f} for g, f in (("dq", 1), ("dk", 2), ("dv", 0.5))})
    return made


def drawn(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 40
    fig.draw_without_rendering()
    return fig.axes, alt


def test_passes_number_the_blocks_of_one_column_and_one_row():
    blocks = [(i, j, "some" if i == j else "all") for i in range(4) for j in range(i + 1)]
    (left, right), alt = drawn(plots.backward_passes(blocks, owner=1))
    assert "4 query blocks by 4 key blocks" in alt and "Hatched" in alt
    assert [t.get_text() for t in left.texts] == ["1", "2", "3"]  # rows 1, 2, 3 of column 1
    assert [t.get_position() for t in left.texts] == [(1.5, 1.5), (1.5, 2.5), (1.5, 3.5)]
    assert [t.get_position() for t in right.texts] == [(0.5, 1.5), (1.5, 1.5)]
    assert len(left.patches) == 10 and sum(p.get_hatch() is not None for p in left.patches) == 4
    with pytest.raises(ArgumentError, match="empty"):
        plots.backward_passes([]).figure()


def test_memory_has_predicted_lines_and_measured_points(result):
    (ax,), alt = drawn(plots.ways_memory(result, where="a card"))
    ys = [list(line.get_ydata()) for line in ax.lines]
    assert [1024, 2048, 4096] in ys and [1025, 2049, 4097] in ys
    assert [4 * n for n in (1024, 2048, 4096)] in ys
    assert {"saved (naive)", "torch's flash"} <= {t.get_text() for t in ax.texts}
    assert ax.get_title(loc="left") == "a card" and "slope two" in alt


def test_a_peak_that_was_not_measured_has_no_point(result):
    for row in result.rows:
        if row["part"] == "ways" and row["what"] == "peak" and row["way"] == "sdpa":
            row["measured"] = None
    (ax,), _ = drawn(plots.ways_memory(result))
    assert len(ax.lines) == 7


def test_time_has_medians_and_bars(result):
    axes, alt = drawn(plots.ways_time(result))
    for ax in axes:
        assert [round(v, 6) for v in ax.lines[0].get_ydata()] == [0.001024, 0.002048, 0.004096]
        assert len(ax.collections) == 4  # one set of bars for each way
        low, high = ax.collections[0].get_segments()[0][:, 1]
        assert low < 0.001024 <= high or low <= 0.001024 < high
    assert axes[0].get_ylim() == axes[1].get_ylim() and "20th" in alt


def test_rates_are_flops_over_median_time(result):
    (ax,), alt = drawn(plots.backward_rates(result, ceiling=700e12))
    lines = [list(line.get_ydata()) for line in ax.lines]
    assert [500, 500] in lines and [250, 250] in lines and [625, 625] in lines
    assert [700, 700] in lines and "matrix product" in alt
    assert "plain Triton" not in alt  # nothing of it was measured


def test_split_stacks_the_kernels_of_each_implementation(result):
    (ax,), alt = drawn(plots.kernel_split(result))
    ours = [(p.get_x(), p.get_width()) for p in ax.patches if abs(p.get_y() + 0.34) < 1e-6]
    assert ours == [(0.0, 0.1), (0.1, 2.0), (pytest.approx(2.1), 1.0)]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["labkit.flash, d = 64", "torch, flash, d = 64"]
    assert "one kernel" in alt and "the rest" in alt


def test_errors_span_three_gradients(result):
    (ax,), alt = drawn(plots.gradient_errors(result))
    spans = [sorted(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert [5e-4, 2e-3] in spans and [1e-3, 4e-3] in spans
    assert [t.get_text() for t in ax.get_yticklabels()] == ["float16", "float32, TF32"]
    assert "float16, tf32" in alt


@pytest.mark.parametrize("name", ["ways_memory", "ways_time", "backward_rates", "kernel_split",
                                  "gradient_errors"])  # fmt: skip
def test_without_rows_the_figure_says_what_to_run(name):
    with pytest.raises(ArgumentError, match="flash_backward"):
        getattr(plots, name)(Result()).figure()
