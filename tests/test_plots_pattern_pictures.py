"""Figures of patterns in chapter 11: what they draw of what they are given."""

from __future__ import annotations

import numpy as np
import pytest

from labkit import plots
from labkit.errors import ArgumentError


def axes_of(drawing, theme="light"):
    fig, alt = drawing.figure(theme)
    return fig.axes, alt


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pattern_masks_tints_the_tiles_that_hold_a_score(theme):
    dot = np.zeros((10, 10), bool)
    dot[5, 2] = True  # in the tile of rows 4–7 and columns 0–3
    axes, alt = axes_of(plots.pattern_masks({"one": dot, "all": ~dot | dot}, block=4), theme)
    drawn = axes[0].images[0].get_array()
    assert drawn[5, 2] == 2 and (drawn == 1).sum() == 15
    assert (drawn[4:8, :4] > 0).all() and drawn.sum() == 17
    assert (axes[1].images[0].get_array() == 2).all()
    assert axes[0].get_xlabel() == "scores 1%, tiles 11%"
    assert axes[0].get_title(loc="left") == "one" and "one, all" in alt
    assert not axes[2].get_visible()


def test_shares_are_those_of_a_causal_mask_where_one_is_meant():
    low = np.tril(np.ones((8, 8), bool))
    axes, _ = axes_of(plots.pattern_masks({"all": low, "own": np.eye(8) > 0}, block=4, causal=True))
    assert axes[0].get_xlabel() == "scores 100%, tiles 100%"
    assert axes[1].get_xlabel() == "scores 22%, tiles 67%"


def test_tiles_by_size_draws_the_lines_and_the_law():
    lines = {"local": {1: 0.05, 16: 0.1}, "random": {1: 0.05, 16: 1.0}}
    (ax,), alt = axes_of(plots.tiles_by_size(lines, density=0.05))
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in ax.lines if line not in dashed] == [
        [0.05, 0.1], [0.05, 1.0],
    ]  # fmt: skip
    x, y = (np.asarray(part) for part in dashed[0].get_data())
    assert np.allclose(y, 1 - 0.95 ** (x * x), atol=1e-9) and x[-1] == 16
    assert {"local", "random"} <= {text.get_text() for text in ax.texts}
    assert "Dashed" in alt and "local, random" in alt
    (ax,), alt = axes_of(plots.tiles_by_size(lines))
    assert len(ax.lines) == 2 and "Dashed" not in alt


def test_what_is_empty_or_too_much_is_refused():
    with pytest.raises(ArgumentError, match="empty"):
        plots.tiles_by_size({"local": {}}).figure()
    with pytest.raises(ArgumentError, match="one to six"):
        plots.pattern_masks({str(k): np.eye(4) for k in range(7)}, block=2).figure()
