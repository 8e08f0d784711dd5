"""Figures of chapter 07: what they draw of what they are given."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.errors import ArgumentError


def axes_of(drawing):
    fig, alt = drawing.figure("light")
    return fig.axes, alt


def test_running_state_marks_every_step_of_the_maximum():
    scores, m = [1.0, 0.0, 2.0, 1.5, 3.0], [1.0, 1.0, 2.0, 2.0, 3.0]
    total = [1.0, 1.4, 1.5, 2.1, 1.8]
    (top, bottom), alt = axes_of(plots.running_state(scores, m, total))
    assert "the 3 steps" in alt
    drawn = [list(line.get_ydata()) for line in top.lines]
    assert scores in drawn and m in drawn
    assert total in [list(line.get_ydata()) for line in bottom.lines]
    marks = {line.get_xdata()[0] for line in bottom.lines if len(set(line.get_xdata())) == 1}
    assert marks == {1, 3, 5}


def test_running_state_wants_one_state_per_score():
    with pytest.raises(ArgumentError, match="for 2 scores"):
        plots.running_state([1, 2], [1], [1]).figure()


def test_error_by_length_draws_each_line_and_names_it():
    series = {"narrow": {256: 1e-3, 1024: 1e-2}, "wide": {256: 1e-7, 1024: 1e-7, 4096: 2e-7}}
    (ax,), alt = axes_of(plots.error_by_length(series))
    drawn = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in ax.lines}
    assert drawn[256, 1024] == (1e-3, 1e-2)
    assert drawn[256, 1024, 4096] == (1e-7, 1e-7, 2e-7)
    assert {"narrow", "wide"} <= {text.get_text() for text in ax.texts}
    assert ax.get_yscale() == "log" and "narrow; wide" in alt


def test_order_spread_marks_the_ascending_order_and_draws_all_others():
    (ax,), alt = axes_of(plots.order_spread({"a": [1.0, 1.1, 0.9], "b": [3.0, 3.2]}))
    drawn = [sorted(line.get_xdata()) for line in ax.lines]
    assert [1.0] in drawn and [3.0] in drawn and [0.9, 1.1] in drawn and [3.2] in drawn
    low, high = ax.get_xlim()
    assert low == 0 and high > 3.2
    assert {"a", "b"} == {text.get_text() for text in ax.texts}
    assert "a, b" in alt


@pytest.mark.parametrize("figure", [plots.error_by_length, plots.order_spread])
def test_empty_input_is_refused(figure):
    for empty in ({}, {"a": {}}):
        with pytest.raises(ArgumentError, match="empty"):
            figure(empty).figure()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_bytes_are_the_same_twice(theme):
    drawing = plots.order_spread({"a": [1.0, 1.1, 0.9]})
    assert drawing.png(theme) == drawing.png(theme)
