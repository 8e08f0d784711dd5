"""Sparse patterns as pictures, and the blocks that they touch (chapter 11)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["block_densities", "pattern_masks"]


@figure(width=7.6, height=5.6, rows=2, cols=3)
def pattern_masks(axes: Any, masks: Mapping[str, Any], *, block: int) -> str:
    """Which scores each pattern leaves, and which tiles of ``block`` × ``block`` those touch.

    Parameters
    ----------
    masks : up to six of {title: ``[N, N]`` bool}, True where a query (downwards) sees a key.
    block : rows and columns of a tile.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap

    t = theme()
    panels = list(axes.flat)
    if not 1 <= len(masks) <= len(panels):
        raise ArgumentError("masks", list(masks), "are not one to six.", "Pass at most six.")
    # the tint of a tile lies between the paper and the colour of its scores
    shades = ListedColormap([t.paper, _between(t.paper, t.vermilion, 0.35), t.blue])
    for ax, (name, mask) in zip(panels, masks.items(), strict=False):
        seen = np.asarray(mask, dtype=bool)
        rows, cols = (-(-size // block) for size in seen.shape)
        padded = np.zeros((rows * block, cols * block), bool)
        padded[: seen.shape[0], : seen.shape[1]] = seen
        touched = padded.reshape(rows, block, cols, block).any((1, 3))
        tinted = touched.repeat(block, 0).repeat(block, 1)[: seen.shape[0], : seen.shape[1]]
        ax.imshow(
            np.where(seen, 2, tinted), cmap=shades, vmin=0, vmax=2, interpolation="nearest"
        )  # fmt: skip
        for edge in range(block, seen.shape[1], block):
            ax.axvline(edge - 0.5, color=t.grid, linewidth=0.4)
        for edge in range(block, seen.shape[0], block):
            ax.axhline(edge - 0.5, color=t.grid, linewidth=0.4)
        ax.set_title(name)
        ax.grid(visible=False)
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ("top", "right"):
            ax.spines[side].set_visible(True)
        ax.set_xlabel(f"scores {seen.mean():.0%}, tiles {touched.mean():.0%}", color=t.ink)
    for ax in panels[len(masks) :]:
        ax.set_visible(False)
    return (
        "Squares, queries downwards and keys to the right, cut into tiles. Scores that count are "
        f"dark, and a tile that holds one is tinted. From the top left: {', '.join(masks)}. Below "
        "each square stand the share of the scores and the share of the tiles."
    )


@figure(width=7.2, height=4.0)
def block_densities(
    ax: Axes, points: Sequence[tuple[str, float, float]], *, blocks: Sequence[int]
) -> str:
    """The share of tiles that are touched against the share of scores that count.

    Parameters
    ----------
    points : (name, density of scores, density of tiles), drawn as marks with their names; points
        of one name share a mark.
    blocks : sizes of tiles for which to draw 1 − (1 − ρ)^(b²), the expectation for scores that are
        drawn one by one.
    """
    t = theme()
    if not all(0 < x <= 1 and 0 <= y <= 1 for _, x, y in points):
        raise ArgumentError("points", points, "are not shares.", "Pass (name, x, y), 0 < x ≤ 1.")
    low = 1e-6
    grid = [low ** (1 - k / 240) for k in range(241)]
    for block in blocks:
        curve = [-math.expm1(block * block * math.log1p(-min(x, 1 - 1e-12))) for x in grid]
        ax.plot(grid, curve, color=t.muted, linewidth=1.3)
        half = -math.expm1(math.log(0.5) / (block * block))  # where half of the tiles are touched
        ax.annotate(
            f"{block} × {block}", (half, 0.5), xytext=(-3, 0), textcoords="offset points",
            ha="right", va="center", color=t.muted, fontsize=9,
        )  # fmt: skip
    marks = ("o", "s", "^", "D", "v", "P", "X")
    names = list(dict.fromkeys(name for name, *_ in points))
    ends = []
    for name, mark, colour in zip(names, marks, [*t.cycle, t.ink, t.ink], strict=False):
        mine = [(x, y) for other, x, y in points if other == name]
        ax.plot(*zip(*mine, strict=True), mark, color=colour, markersize=7, linestyle="none")
        ends.append((*max(mine), name, colour))
    ax.set_xscale("log")
    ax.set_xlim(low, 1)
    ax.set_ylim(-0.03, 1.05)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value * 100:g} %")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("scores that count")
    ax.set_ylabel("tiles that are touched")
    end_labels(ax, ends, room=0.26)
    return (
        "Share of tiles touched against the share of scores that count, the latter on a "
        "logarithmic axis. Curves for tiles of "
        f"{', '.join(f'{b} × {b}' for b in blocks)}: each climbs from none to all within two "
        "decades, and the larger the tile, the earlier. Marks for the patterns: "
        f"{', '.join(names)}; some lie on the curve of their tile, and some far below."
    )


def _between(a: str, b: str, share: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(x + share * (y - x) for x, y in zip(to_rgb(a), to_rgb(b), strict=True))
