"""Sparse patterns as pictures, and the blocks that they touch (chapter 11)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["pattern_masks", "tiles_by_size"]


@figure(width=7.6, height=6.0, rows=2, cols=3)
def pattern_masks(axes: Any, masks: Mapping[str, Any], *, block: int, causal: bool = False) -> str:
    """Which scores each pattern leaves, and which tiles of ``block`` × ``block`` those touch.

    Parameters
    ----------
    masks : up to six of {title: ``[N, N]`` bool}, True where a query (downwards) sees a key.
    block : rows and columns of a tile.
    causal : give the shares of what a causal mask leaves, and not of the square.
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
        scores, tiles = (
            x.sum() / (np.tril(np.ones(x.shape)).sum() if causal else x.size)
            for x in (seen, touched)
        )
        ax.set_xlabel(f"scores {scores:.0%}, tiles {tiles:.0%}", color=t.ink)
    for ax in panels[len(masks) :]:
        ax.set_visible(False)
    return (
        "Squares, queries downwards and keys to the right, cut into tiles. Scores that count are "
        f"dark, and a tile that holds one is tinted. From the top left: {', '.join(masks)}. Below "
        "each square stand the share of the scores and the share of the tiles."
    )


@figure(width=7.2, height=4.0)
def tiles_by_size(
    ax: Axes, lines: Mapping[str, Mapping[int, float]], *, density: float | None = None
) -> str:
    """The share of tiles that a pattern touches against the size of a tile, a line per pattern.

    Parameters
    ----------
    lines : {name: {rows of a square tile: share of the tiles}}.
    density : draw also 1 − (1 − ρ)^(b²), dashed: what to expect of scores drawn one by one.
    """
    t = theme()
    if not lines or not all(lines.values()):
        raise ArgumentError("lines", dict(lines), "has an empty line.", "Pass {name: {b: share}}.")
    marks, colours = ("o", "s", "^", "D", "v", "P", "X"), [*t.cycle, t.ink, t.muted]
    ends = []
    for (name, points), mark, colour in zip(lines.items(), marks, colours, strict=False):
        xs = sorted(points)
        ys = [points[x] for x in xs]
        ax.plot(xs, ys, color=colour, marker=mark, markersize=5, linewidth=1.5)
        ends.append((xs[-1], ys[-1], name, colour))
    if density is not None:
        low, high = (f(x for points in lines.values() for x in points) for f in (min, max))
        grid = [low * (high / low) ** (k / 120) for k in range(121)]
        law = [-math.expm1(b * b * math.log1p(-density)) for b in grid]
        ax.plot(grid, law, color=t.ink, linestyle="--", linewidth=1.2)
    ax.set_ylim(0, 1.06)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_ylabel("tiles touched, of those of a causal kernel")
    size_axis(ax, "x", label="rows and columns of a tile")
    end_labels(ax, ends, room=0.24)
    dashed = ""
    if density is not None:
        dashed = " Dashed: the law for scores drawn one by one, which those lines follow."
    return (
        "Share of the tiles touched against the size of a tile, on a logarithmic axis, a line for "
        f"each of {', '.join(lines)}. All begin at the share of the scores. Patterns whose scores "
        "are scattered climb to all tiles at small sizes; a window, blocks and sorted clusters "
        "stay low." + dashed
    )


def _between(a: str, b: str, share: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(x + share * (y - x) for x, y in zip(to_rgb(a), to_rgb(b), strict=True))
