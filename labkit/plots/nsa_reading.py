"""What the branches of Native Sparse Attention read (chapter 12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["branch_reads", "keys_by_position", "needle_found"]

#: colour of each line, the same in every figure of these chapters
_COLOURS = {
    "dense": "muted",
    "compression": "green",
    "selection": "blue",
    "window": "purple",
    "together": "vermilion",
}


@figure(width=7.6, height=3.1, cols=3)
def branch_reads(axes: Any, masks: Mapping[str, Any], *, block_size: int) -> str:
    """Which tokens each query reads, one square per branch: queries downwards, keys to the right.

    Parameters
    ----------
    masks : three of {branch: ``[N, N]`` of 0 … 1}; what is between 0 and 1 is drawn paler.
    block_size : where to draw the lines between blocks.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    t = theme()
    if len(masks) != len(axes):
        raise ArgumentError("masks", list(masks), "are not three.", "Pass three branches.")
    for ax, (name, mask) in zip(axes, masks.items(), strict=True):
        seen = np.asarray(mask, dtype=float)
        n = seen.shape[0]
        ink = getattr(t, _COLOURS.get(name, "blue"))
        shades = LinearSegmentedColormap.from_list(name, [t.panel, ink])
        ax.imshow(seen, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
        for edge in range(block_size, n, block_size):
            ax.axvline(edge - 0.5, color=t.paper, linewidth=0.8)
            ax.axhline(edge - 0.5, color=t.paper, linewidth=0.8)
        ax.plot([-0.5, n - 0.5], [-0.5, n - 0.5], color=t.ink, linewidth=0.8)
        ax.set_title(name)
        ax.set_xticks([0, n - 1])
        ax.set_yticks([0, n - 1])
        ax.grid(visible=False)
        ax.set_xlabel("key")
    axes[0].set_ylabel("query")
    return (
        "Three squares, queries downwards and keys to the right, cut into blocks: "
        f"{', '.join(masks)}. Compression fills a staircase of whole blocks below the diagonal, "
        "and no part of a block that is not complete. Selection fills a few blocks of each row, "
        "among them the first, the one before and the one on the diagonal, up to the diagonal. "
        "The window fills a band along the diagonal."
    )


@figure(height=4.2)
def keys_by_position(ax: Axes, keys: Mapping[str, Mapping[int, int]]) -> str:
    """How many keys a query reads against where it stands, a line per branch, both axes log.

    Parameters
    ----------
    keys : {branch: {keys before and with the query: keys read}}; zeros are left out.
    """
    t = theme()
    if not keys or not all(keys.values()):
        raise ArgumentError("keys", dict(keys), "has an empty line.", "Pass {branch: {n: keys}}.")
    labels = []
    for name, points in keys.items():
        xs = [x for x in sorted(points) if points[x] > 0]
        ys = [points[x] for x in xs]
        colour = getattr(t, _COLOURS.get(name, "blue"))
        wide = {"together": 2.4, "dense": 1.6}.get(name, 1.6)
        ax.plot(xs, ys, color=colour, linewidth=wide, linestyle="--" if name == "dense" else "-")
        labels.append((xs[-1], ys[-1], name, colour))
    size_axis(ax, "x", label="keys up to the query's own", every=2)
    size_axis(ax, "y", label="keys that it reads", every=2)
    end_labels(ax, labels, room=0.18)
    return (
        "Keys read against the position of the query, both axes logarithmic. Dense climbs along "
        "the diagonal. Selection follows it and then stays flat, and so does the window below. "
        "Compression is a line parallel to dense, far below. Together they lie above dense near "
        "the start, cross it, stay almost flat, and climb again where compression takes over."
    )


@figure(height=3.8)
def needle_found(
    ax: Axes, found: Mapping[str, Mapping[float, float]], weight: Mapping[float, float]
) -> str:
    """How often the block of one strong key is chosen, and that key's weight in dense attention.

    Parameters
    ----------
    found : {"16 of 64": {score of the key: share of trials in which its block is chosen}}.
    weight : {score: share of the dense probabilities that the key has}, drawn dashed.
    """
    t = theme()
    if not found or not weight or not all(found.values()):
        raise ArgumentError("found", dict(found), "has an empty line.", "Pass {label: {s: share}}.")
    labels = []
    for (name, points), colour in zip(found.items(), t.cycle, strict=False):
        xs = sorted(points)
        ax.plot(xs, [points[x] for x in xs], color=colour, marker="o", markersize=4)
        labels.append((xs[-1], points[xs[-1]], name, colour))
    xs = sorted(weight)
    ax.plot(xs, [weight[x] for x in xs], color=t.muted, linestyle="--")
    labels.append((xs[-1], weight[xs[-1]], "weight in\ndense attention", t.muted))
    ax.set_ylim(0, 1.04)
    ax.set_xlabel("score of the key; all others are normal, with standard deviation 1")
    ax.set_ylabel("share")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    end_labels(ax, labels, room=0.24)
    return (
        "Shares against the score of one key. Solid lines, one for each block size: how often the "
        "block of that key is chosen; the smaller the blocks, the earlier the line climbs. Dashed: "
        "the key's weight in dense attention, which is nearly 1 where the lines of large blocks "
        "are still climbing."
    )
