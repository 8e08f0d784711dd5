"""Figures of chapters 14 and 15: what they draw of what they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result


def drawn(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 40
    fig.draw_without_rendering()
    return fig.axes, alt


def test_patterns_have_a_panel_for_each_branch():
    weights = {"compression": torch.eye(6), "total": torch.full((6, 6), -0.25)}
    axes, alt = drawn(plots.attention_patterns(weights, block_size=2))
    shown = [ax for ax in axes if ax.get_visible() and ax.get_images()]
    assert [ax.get_title(loc="left") for ax in shown] == ["compression", "gated total"]
    first, second = (ax.get_images()[0].get_array() for ax in shown)
    assert first[2, 2] == 1 and first[2, 3] == pytest.approx(1e-3)
    assert (second == 0.25).all()  # gates may be negative: the size is drawn
    assert sorted(line.get_xdata()[0] for line in shown[0].lines) == [1.5, 3.5]
    assert "compression, gated total" in alt
    with pytest.raises(ArgumentError, match="one head"):
        plots.attention_patterns({"total": torch.zeros(1, 2, 2)}).figure()
    with pytest.raises(ArgumentError, match="no branch"):
        plots.attention_patterns({"window": torch.zeros(2, 2)}).figure()


def test_blocks_are_first_local_or_chosen():
    chosen = torch.tensor([[0, -1, -1]] * 2 + [[0, 1, -1]] * 2 + [[0, 1, 2]] * 2 + [[0, 1, 3]] * 2)
    (ax,), _ = drawn(plots.selected_blocks(chosen, block_size=2))
    grid = np.asarray(ax.get_images()[0].get_array())
    assert grid.tolist() == [[2, 0, 0, 0]] * 2 + [[2, 2, 0, 0]] * 2 + [[1, 2, 2, 0]] * 2 + (
        [[1, 3, 0, 2]] * 2
    )
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "first", "own and previous", "by its score",
    ]  # fmt: skip
    (ax,), _ = drawn(plots.selected_blocks(chosen, block_size=2, forced=(0, 1)))
    assert np.asarray(ax.get_images()[0].get_array())[7].tolist() == [3, 3, 0, 2]


def test_gates_are_shares_of_their_own_number():
    gates = {"g_cmp": torch.tensor([0.0, 0.0, 0.9, 1.0]), "g_slc": None, "g_swa": torch.ones(7)}
    (ax,), alt = drawn(plots.gate_histogram(gates, bins=2))
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.5, 0.5, 0.5], [0, 1, 1]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "compression (mean 0.47)", "window (mean 1.00)",
    ]  # fmt: skip
    assert "selection" not in alt
    with pytest.raises(ArgumentError, match="none of them"):
        plots.gate_histogram({}).figure()


@pytest.fixture
def result() -> Result:
    made = Result()
    add = made.rows.append
    add({"part": "naive", "mode": "source", "without": 1.0, "with": 0.1})
    add({"part": "naive", "mode": "turned", "without": 0.1, "with": 1.0})
    for what, ms in (("without", 2.0), ("with", 2.2)):
        add({"part": "well", "shape": "source", "clock": "gpu", "what": what, "median_ms": ms})
    for form, full, half in (("loop", 4.0, 2.0), ("compression", 1.0, 1.25)):
        for passes in ("forward", "training"):
            row = {"form": form, "passes": passes}
            add({"part": "time", **row, "rate": "full", "median_ms": full})
            add({"part": "time", **row, "rate": "half", "median_ms": half})
            add({"part": "memory", **row, "rate": "full", "measured": 100})
            add({"part": "memory", **row, "rate": "half", "measured": 75})
    for rho, odd in ((1.0, 0.1), (0.0, 1.2)):
        add({"part": "error", "rho": rho, "odd": odd, "all": odd / 2, "expected": odd - 0.1})
    return made


def test_each_way_of_timing_has_its_answer(result):
    (ax,), alt = drawn(plots.timing_answers(result, where="a card"))
    points = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
    assert points == [0.1, 10.0, pytest.approx(1.1)]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["as the notes do", "the other one first", "in turns, GPU, median"]
    assert ax.get_title(loc="left") == "a card" and "warm-up" in alt


def test_savings_are_ratios_of_time_and_shares_of_the_peak(result):
    (time, memory), alt = drawn(plots.half_rate_savings(result))
    assert [p.get_width() for p in time.patches] == [2.0, 2.0, 0.8, 0.8]
    assert [p.get_width() for p in memory.patches] == [25.0] * 4
    assert [t.get_text() for t in time.get_yticklabels()] == ["loop", "compression"]
    stated = [line.get_xdata()[0] for line in time.lines if line.get_marker() == "D" and
              len(line.get_xdata())]  # fmt: skip
    assert stated == [pytest.approx(1.85)] and "Diamonds" in alt


def test_error_grows_with_the_difference_of_neighbours(result):
    (ax,), _ = drawn(plots.half_rate_error(result))
    odd, every, expected = (line for line in ax.lines)
    assert list(odd.get_xdata()) == [0.0, 1.0] and list(odd.get_ydata()) == [0.1, 1.2]
    assert list(every.get_ydata()) == [0.05, 0.6]
    assert list(expected.get_ydata()) == [0.0, pytest.approx(1.1)]


@pytest.mark.parametrize(
    ("name", "experiment"),
    [("timing_answers", "nsa_weights"), ("half_rate_savings", "half_rate"),
     ("half_rate_error", "half_rate")],
)  # fmt: skip
def test_without_rows_the_figure_says_what_to_run(name, experiment):
    with pytest.raises(ArgumentError, match=experiment):
        getattr(plots, name)(Result()).figure()
