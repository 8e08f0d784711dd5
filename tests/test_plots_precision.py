"""Figures of chapter 10 on number formats: what they draw of the rows that they are given."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result


@pytest.fixture
def result() -> Result:
    """A result with the shape of a GPU's; the figures in it are made up."""
    made = Result()
    add = made.rows.append
    for name in ("float16", "bfloat16"):
        for sigma in (1, 4):
            for i, place in enumerate(
                ("inputs", "scores", "probabilities", "sums", "output", "all")
            ):
                add({"part": "rounding", "format": name, "place": place, "sigma": sigma,
                     "relative": 1e-3 * (i + 1) * sigma})  # fmt: skip
    for i, way in enumerate(("naive.float16", "naive.float16.scale_first", "naive.bfloat16")):
        add({"part": "overflow", "way": way, "most": 40, "o": 2.0 ** (10 + 15 * i), "grad": 2.0**9})
    for way in ("naive.float16", "labkit.float16", "naive.bfloat16"):
        for power in (0, 16, 40):
            value = None if power == 40 and "bfloat" not in way else 10.0 ** -(1 + power / 16)
            cell = {"relative": value, "zeros": 0.0}
            add(
                {
                    "part": "underflow",
                    "way": way,
                    "power": power,
                    "dq": cell,
                    "dk": cell,
                    "dv": cell,
                }
            )
    for i, way in enumerate(("naive.float32", "labkit.tf32x3", "naive.tf32", "labkit.bfloat16")):
        for n, sigma in ((128, 1), (2048, 1), (2048, 8)):
            cell = {"relative": 10.0 ** (i - 7) * sigma, "whole": 10.0 ** (i - 6)}
            add({"part": "error", "way": way, "seq_len": n, "sigma": sigma, "o": cell, "dq": cell})
    for precision, losses in (("fp32", [3.0, 2.0, 1.0]), ("fp16", [3.0, None, None])):
        add({"part": "training", "precision": precision, "steps": 3, "losses": losses})
    return made


def drawn(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 40
    fig.draw_without_rendering()
    return fig.axes, alt


def test_places_get_a_line_each_in_a_panel_for_each_format(result):
    (left, right), _ = drawn(plots.rounding_places(result))
    assert left.get_title(loc="left") == "fp16" and right.get_title(loc="left") == "bf16"
    assert len(left.lines) == len(right.lines) == 6
    assert [t.get_text() for t in left.texts if t.get_text()] == [
        "Q, K, V", "S", "P", "sums", "O", "all"
    ]  # fmt: skip


def test_errors_have_length_on_the_left_and_scores_on_the_right(result):
    (left, right), alt = drawn(plots.precision_errors(result, tensor="dq"))
    assert "dQ" in alt and right.get_title(loc="left") == "N = 2,048"
    assert list(left.lines[0].get_xdata()) == [128, 2048]
    assert list(right.lines[0].get_xdata()) == [1, 8]
    solid = {line.get_linestyle() for line in left.lines}
    assert solid == {"-", "--"}  # ours and plain
    (left, _), _ = drawn(plots.precision_errors(result, against="whole"))
    assert left.lines[0].get_ydata()[0] == 1e-6
    with pytest.raises(ArgumentError, match="ways"):
        plots.precision_errors(result, ways=("sdpa.float16",)).figure()


def test_limits_are_ordered_and_the_ones_never_met_say_so(result):
    (ax,), _ = drawn(plots.overflow_limits(result))
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "naive fp16", "naive fp16, scale first", "naive bf16"
    ]  # fmt: skip
    assert [t.get_text() for t in ax.texts] == ["and on", "65,504"]
    assert ax.patches[0].get_width() == 2**10 - 1


def test_what_is_not_finite_is_a_cross(result):
    (ax,), _ = drawn(plots.loss_scales(result))
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[2.0**40], [2.0**40], []]
    (ax,), _ = drawn(plots.training_loss(result))
    assert [line.get_marker() for line in ax.lines] == ["None", "None", "x"]


def test_missing_parts_are_named(result):
    with pytest.raises(ArgumentError, match="'overflow'"):
        plots.overflow_limits(Result()).figure()
    with pytest.raises(ArgumentError, match="tensor"):
        plots.loss_scales(result, tensor="o").figure()


def test_parts_of_a_step_are_stacked_measured_above_predicted():
    from labkit.layers.budget import PARTS

    made = Result()
    row = {"part": "step", "size": "report", "backend": "sdpa", "precision": "fp32"}
    row |= {"seq_len": 64, **dict.fromkeys(PARTS, 2**20)}
    made.rows.append(row | {f"predicted_{part}": 2**19 for part in PARTS})
    (ax,), alt = drawn(plots.training_parts(made, configs=("sdpa.fp32",), seq_len=64))
    assert "sdpa, fp32" in alt and len(ax.get_legend().get_texts()) == len(PARTS)
    ends = [p.get_x() + p.get_width() for p in ax.patches[: 2 * len(PARTS)]]
    assert ends[len(PARTS) - 1] == len(PARTS) * 2**20 and ends[-1] == len(PARTS) * 2**19
    with pytest.raises(ArgumentError, match="weighed"):
        plots.training_parts(made, configs=("naive.fp32",), seq_len=64).figure()
