"""What the branches of Native Sparse Attention looked at (chapter 14)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["attention_patterns", "gate_histogram", "selected_blocks", "timing_answers"]

_TITLES = {
    "compression": "compression",
    "selection": "selection",
    "sliding_window": "window",
    "total": "gated total",
}
_GATES = {"g_cmp": "compression", "g_slc": "selection", "g_swa": "window"}


def _matrix(name: str, x: Any) -> Any:
    """``x`` as a NumPy matrix of float64, from a tensor or an array."""
    import numpy as np

    x = x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x, float)
    if x.ndim != 2:
        raise ArgumentError(
            name, x.shape, "is not one head's weights.", "Pass weights[batch, head], [M, N]."
        )
    return x


def _shades() -> Any:
    """From the paper of the theme to its ink, through its blue."""
    from matplotlib.colors import LinearSegmentedColormap

    t = theme()
    return LinearSegmentedColormap.from_list("weights", [t.paper, t.blue, t.ink])


@figure(width=6.4, height=6.0, rows=2, cols=2, sharex=True, sharey=True)
def attention_patterns(
    axes: Any, weights: Mapping[str, Any], *, block_size: int | None = None, floor: float = 1e-3
) -> str:
    """Weights of one head by branch: a row for each query, a column for each key.

    Parameters
    ----------
    weights : name to ``[M, N]``, up to four of ``"compression"``, ``"selection"``,
        ``"sliding_window"`` and ``"total"``.
    block_size : draws the borders of blocks.
    floor : weights below it have the colour of none; the scale is logarithmic up to 1.
    """
    from matplotlib.colors import LogNorm

    t = theme()
    shown = {name: _matrix(f"weights[{name!r}]", weights[name]) for name in _TITLES
             if name in weights}  # fmt: skip
    if not shown:
        raise ArgumentError(
            "weights", sorted(weights), "has no branch.", f"Use the names {', '.join(_TITLES)}."
        )
    panels = list(axes.flat)
    for ax, (name, w) in zip(panels, shown.items(), strict=False):
        image = ax.imshow(
            abs(w).clip(floor), cmap=_shades(), norm=LogNorm(floor, 1), interpolation="nearest",
            aspect="equal",
        )  # fmt: skip
        ax.set_title(_TITLES[name])
        ax.grid(visible=False)
        if block_size:
            for edge in range(block_size, w.shape[1], block_size):
                ax.axvline(edge - 0.5, color=t.grid, lw=0.5)
        for side in ("top", "right"):
            ax.spines[side].set_visible(True)
    for ax in panels[len(shown) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("key")
    for ax in axes[:, 0]:
        ax.set_ylabel("query")
    bar = axes.flat[0].figure.colorbar(image, ax=list(axes.flat), shrink=0.6, aspect=30)
    bar.set_label("weight")
    names = ", ".join(_TITLES[name] for name in shown)
    return (
        f"Weights of one head as images, queries down and keys across, in panels: {names}. "
        "Nothing lies above the diagonal. Compression is even within each block and leaves out "
        "the block that is not complete, selection is dark in a few blocks, the window is a band "
        "along the diagonal."
    )


@figure(width=6.0, height=4.4)
def selected_blocks(
    ax: Axes, block_indices: Any, *, block_size: int, forced: Sequence[int] = (1, 2)
) -> str:
    """Which blocks each query chose, for one KV head.

    Parameters
    ----------
    block_indices : ``[M, S]`` integers, −1 for an unused slot.
    block_size : tokens of a block.
    forced : ``(initial, local)`` blocks that every query reads.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap

    t = theme()
    chosen = _matrix("block_indices", block_indices).astype(int)
    queries = len(chosen)
    blocks = int(max(chosen.max(), (queries - 1) // block_size)) + 1
    grid = np.zeros((queries, blocks))
    own = np.arange(queries) // block_size
    for i, row in enumerate(chosen):
        for block in row[row >= 0]:
            local = 0 <= own[i] - block < forced[1]
            grid[i, block] = 2 if local else 1 if block < forced[0] else 3
    ax.imshow(
        grid, cmap=ListedColormap([t.paper, t.orange, t.green, t.blue]), vmin=0, vmax=3,
        interpolation="nearest", aspect="auto",
    )  # fmt: skip
    ax.grid(visible=False)
    for edge in range(1, blocks):
        ax.axvline(edge - 0.5, color=t.grid, lw=0.6)
    kinds = (("first", t.orange, 1), ("own and previous", t.green, 2), ("by its score", t.blue, 3))
    there = [(name, colour) for name, colour, kind in kinds if (grid == kind).any()]
    from matplotlib.patches import Patch

    ax.legend(
        handles=[Patch(color=colour, label=name) for name, colour in there], loc="lower left",
        bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, fontsize=9, handlelength=1,
    )  # fmt: skip
    ax.set_xticks(range(0, blocks, max(1, blocks // 8)))
    ax.set_xlabel(f"block of {block_size} keys")
    ax.set_ylabel("query")
    return (
        "Which blocks each query reads, queries down and blocks across: the first block in every "
        "row, the own and the previous block as steps along the diagonal, and between them the "
        "blocks that were chosen by their score."
    )


@figure(width=6.0, height=3.4)
def gate_histogram(ax: Axes, gates: Mapping[str, Any], *, bins: int = 30) -> str:
    """How the gates of the three branches are distributed over queries and heads.

    Parameters
    ----------
    gates : ``g_cmp``, ``g_slc`` and ``g_swa``, tensors of any shape; None for one that is off.
    bins : bars between the smallest and the largest gate.
    """
    import numpy as np

    t = theme()
    values = {name: gates[name] for name in _GATES if gates.get(name) is not None}
    if not values:
        raise ArgumentError("gates", sorted(gates), "has none of them.", f"Pass {tuple(_GATES)}.")
    flat = {
        name: np.asarray(x.detach().cpu().double() if hasattr(x, "detach") else x).ravel()
        for name, x in values.items()
    }
    low, high = min(x.min() for x in flat.values()), max(x.max() for x in flat.values())
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for (name, x), colour, dash in zip(flat.items(), t.cycle, ("-", "--", ":"), strict=False):
        count, _ = np.histogram(x, edges)
        share = np.append(count, count[-1]) / len(x)
        ax.step(edges, share, where="post", color=colour, ls=dash,
                label=f"{_GATES[name]} (mean {x.mean():.2f})")  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_xlabel("gate")
    ax.set_ylabel("share of queries and heads")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8.5, borderaxespad=0.2,
              handlelength=1.6, columnspacing=1)  # fmt: skip
    return (
        "Histogram of the gates, one outline for each of "
        f"{', '.join(_GATES[name] for name in flat)}, share of queries and heads against the gate."
    )


@figure(width=6.4, height=3.8)
def timing_answers(ax: Axes, result: Any, *, where: str = "") -> str:
    """What each way of timing says the weights cost: time with them over time without.

    Parameters
    ----------
    result : a result or record of the experiment ``nsa_weights``.
    where : name of the machine, for the title.
    """
    t = theme()
    texts = {
        "cold": "as the notes do, nothing compiled yet",
        "source": "as the notes do",
        "turned": "the other one first",
        "warm": "after a warm-up",
    }
    rows = [
        (text, row["with"] / row["without"], t.vermilion, "o")
        for mode, text in texts.items()
        for row in result.select(part="naive", mode=mode)
    ]
    for clock, text in (("host", "in turns, idle GPU, median"), ("gpu", "in turns, GPU, median")):
        times = {
            row["what"]: row["median_ms"]
            for row in result.select(part="well", shape="source", clock=clock)
        }
        if times:
            rows.append((text, times["with"] / times["without"], t.blue, "s"))
    if not rows:
        raise ArgumentError(
            "result", "no rows of the parts naive and well", "has nothing to draw.",
            "Run the experiment nsa_weights on a GPU.",
        )  # fmt: skip
    for place, (_, ratio, colour, marker) in enumerate(rows):
        ax.plot([1, ratio], [place, place], color=colour, lw=1.2)
        ax.plot(ratio, place, marker, color=colour, markersize=7)
    ax.axvline(1, color=t.muted, lw=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_yticks(range(len(rows)), [text for text, *_ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("time with the weights / time without")
    if where:
        ax.set_title(where)
    return (
        "Time with the weights over time without, on a logarithmic axis, by way of timing. The "
        "ways without a warm-up lie far from 1, on different sides depending on the order; the "
        "medians in turns lie at 1."
    )
