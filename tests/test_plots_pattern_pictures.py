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


def test_block_densities_draws_the_law_and_the_marks():
    points = [("local", 0.05, 0.1), ("random", 0.05, 1.0), ("local", 0.1, 0.2)]
    (ax,), alt = axes_of(plots.block_densities(points, blocks=(2, 16)))
    curves = [line for line in ax.lines if line.get_linestyle() != "None"]
    assert len(curves) == 2
    for line, b in zip(curves, (2, 16), strict=True):
        x, y = (np.asarray(part) for part in line.get_data())
        assert np.allclose(y[:-1], 1 - (1 - x[:-1]) ** (b * b), atol=1e-9)
    marks = [line.get_data() for line in ax.lines if line.get_linestyle() == "None"]
    assert [len(x) for x, _ in marks] == [2, 1]
    assert {"local", "random", "2 × 2"} <= {text.get_text() for text in ax.texts}
    assert "2 × 2, 16 × 16" in alt


def test_what_is_no_share_or_too_much_is_refused():
    with pytest.raises(ArgumentError, match="not shares"):
        plots.block_densities([("a", 5.0, 1.0)], blocks=(2,)).figure()
    with pytest.raises(ArgumentError, match="one to six"):
        plots.pattern_masks({str(k): np.eye(4) for k in range(7)}, block=2).figure()
