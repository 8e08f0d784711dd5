"""Figures of chapter 12: what they draw of what they are given."""

from __future__ import annotations

import numpy as np
import pytest

from labkit import plots
from labkit.errors import ArgumentError


def axes_of(drawing, theme="light"):
    fig, alt = drawing.figure(theme)
    return fig.axes, alt


def masks(n=8):
    low = np.tril(np.ones((n, n)))
    return {"compression": low * 0.5, "selection": low, "window": np.eye(n)}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_branch_reads_draws_the_masks_as_they_are(theme):
    axes, alt = axes_of(plots.branch_reads(masks(), block_size=4), theme)
    assert [ax.get_title(loc="left") for ax in axes] == ["compression", "selection", "window"]
    for ax, mask in zip(axes, masks().values(), strict=True):
        assert np.array_equal(ax.images[0].get_array(), mask)
        assert [line.get_xdata()[0] for line in ax.lines].count(3.5) == 1  # between two blocks
    assert "compression, selection, window" in alt


def test_branch_reads_wants_three():
    with pytest.raises(ArgumentError, match="are not three"):
        plots.branch_reads({"window": np.eye(4)}, block_size=2).figure()


def test_keys_by_position_draws_every_line_without_its_zeros():
    keys = {"dense": {64: 64, 4096: 4096}, "compression": {32: 0, 64: 1, 4096: 64}}
    (ax,), _ = axes_of(plots.keys_by_position(keys))
    ends = sorted(tuple(line.get_ydata()) for line in ax.lines)
    assert ends == [(1, 64), (64, 4096)]
    assert {"dense", "compression"} <= {text.get_text() for text in ax.texts}
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_needle_found_draws_shares_and_the_dense_weight():
    found = {"4 of 16": {0.0: 0.25, 8.0: 0.9}, "16 of 64": {0.0: 0.25, 8.0: 0.6}}
    weight = {0.0: 0.01, 8.0: 0.5}
    (ax,), alt = axes_of(plots.needle_found(found, weight))
    drawn = sorted(tuple(line.get_ydata()) for line in ax.lines)
    assert drawn == [(0.01, 0.5), (0.25, 0.6), (0.25, 0.9)]
    assert {"4 of 16", "16 of 64"} <= {text.get_text() for text in ax.texts}
    assert "Dashed" in alt


def test_empty_input_is_refused():
    for drawing in (
        plots.keys_by_position({}),
        plots.keys_by_position({"dense": {}}),
        plots.needle_found({}, {0.0: 1.0}),
        plots.needle_found({"a": {1.0: 1.0}}, {}),
    ):
        with pytest.raises(ArgumentError, match="empty"):
            drawing.figure()
