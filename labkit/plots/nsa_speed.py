"""The speed of sparse attention: shared blocks, crossover, branches, bytes, groups (chapter 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels, seconds_axis, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme
from labkit.units import format_bytes, format_seconds, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "nsa_branches",
    "nsa_bytes",
    "nsa_choices",
    "nsa_crossover",
    "nsa_groups",
    "nsa_topk",
    "nsa_unions",
]

_PASSES = ("forward", "backward")
_ORDER = ("pooling", "compression", "top-k", "selection", "window", "gates")


def _none(what: str) -> ArgumentError:
    return ArgumentError("result", what, "has no such figures.", "Pass a GPU's.")


def _series(result: Any, prefix: str) -> tuple[list[int], list[float]]:
    from labkit.experiments.nsa_speed import series

    pairs = series(result, prefix)
    return [n for n, _ in pairs], [value for _, value in pairs]


def _factor(value: float, _: Any = None) -> str:
    return f"{significant(value, 2)}×"


@figure(width=7.6, height=3.7, cols=2, sharey=True)
def nsa_choices(axes: Any, choices: Any, *, start: int, queries: int, block_size: int) -> str:
    """Which blocks neighbouring queries chose, and the union of them below.

    Parameters
    ----------
    choices : pattern → ``[1, T, H, S]`` of block numbers; the first KV head is shown.
    start, queries : the neighbours.
    """
    t = theme()
    for ax, (pattern, blocks) in zip(axes, choices.items(), strict=True):
        rows = blocks[0, start : start + queries, 0].tolist()
        last = (start + queries - 1) // block_size
        union = sorted({c for row in rows for c in row if c >= 0})
        everyone = {c for c in union if all(c in row for row in rows)}
        for y, row in enumerate(rows):
            for c in row:
                if c >= 0:
                    colour = t.vermilion if c in everyone else t.blue
                    ax.add_patch(_cell(c, y, colour))
        for c in union:
            ax.add_patch(_cell(c, queries + 1, t.vermilion if c in everyone else t.green))
        chosen = sum(c >= 0 for row in rows for c in row)
        ax.set_title(f"{pattern}: {chosen} choices, {len(union)} blocks")
        ax.set_xlim(-0.5, last + 1.5)
        ax.set_ylim(queries + 2.2, -0.6)
        ax.set_xlabel("block of keys")
        ax.grid(visible=False)
    axes[0].set_yticks(
        [0.5, queries / 2, queries - 0.5, queries + 1.5],
        ["0", "query", str(queries - 1), "union"],
    )
    axes[0].tick_params(axis="y", length=0)
    return (
        f"Two grids, {' and '.join(choices)}: rows are {queries} neighbouring queries, columns "
        "blocks of keys, and a cell is filled where the query chose the block. The last row is the "
        "union. Blocks that every query chose have a colour of their own."
    )


def _cell(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 0.86, 0.82, facecolor=colour, linewidth=0)


@figure(width=7.6, height=3.6, cols=2)
def nsa_unions(axes: Any, *, seq_len: int = 32768, counted: Any = None) -> str:
    """What a tile of queries loads for each query, and what it multiplies in vain, by the model.

    Parameters
    ----------
    counted : a result with counted unions, to be drawn as rings.
    """
    from labkit.nsa import model

    t = theme()
    shape = model.Shape(seq_len=seq_len)
    tiles = [1, 2, 4, 8, 16, 32]
    left, right = axes
    loads: list[tuple[float, float, str, str]] = []
    waste: list[tuple[float, float, str, str]] = []
    for pattern, colour in zip(model.PATTERNS, (t.vermilion, t.blue), strict=True):
        blocks = [model.union_blocks(shape, m, pattern) / seq_len for m in tiles]
        left.plot(tiles, blocks, "o-", color=colour)
        loads.append((tiles[-1], blocks[-1], pattern, colour))
        factor = [model.executed_over_useful(shape, m, pattern) for m in tiles]
        right.plot(tiles, factor, "o-", color=colour)
        waste.append((tiles[-1], factor[-1], pattern, colour))
        for row in counted.select(part="patterns", seq_len=seq_len, pattern=pattern) if (
            counted is not None
        ) else ():
            left.plot(row["tile"], row["counted"] / row["tile"], "o", color=colour,
                      markersize=11, fillstyle="none")  # fmt: skip
    for ax, labels, text in (
        (left, loads, "blocks loaded per query"), (right, waste, "scores computed per useful one")
    ):  # fmt: skip
        size_axis(ax, "x", label="queries that share a tile", every=1)
        size_axis(ax, "y", label="", every=1)
        end_labels(ax, labels, room=0.35)
        ax.set_title(text)
    return (
        f"Two panels against the number of queries that share a tile, at {seq_len:,} tokens: "
        "blocks loaded per query fall, slowly for a random choice and almost in proportion for a "
        "local one; scores computed for each useful one rise steeply for a random choice."
    )


@figure(width=7.6, height=4.0, cols=2, sharey=True)
def nsa_crossover(axes: Any, result: Any, *, pattern: str = "random") -> str:
    """How many times faster than dense attention, against seq_len.

    Parameters
    ----------
    result : of the experiment ``nsa_speed``, or its record.
    pattern : ``"random"`` or ``"local"``.
    """
    t = theme()
    lines = {
        f"selection.speedup.{pattern}": ("selection", t.blue),
        f"whole.speedup.{pattern}": ("all branches", t.vermilion),
    }
    for ax, what in zip(axes, _PASSES, strict=True):
        labels = []
        for prefix, (label, colour) in lines.items():
            x, y = _series(result, f"{prefix}.{what}")
            if not x:
                raise _none(f"{prefix}.{what}")
            ax.plot(x, y, "o-", color=colour)
            labels.append((x[-1], y[-1], label, colour))
        fla_n, fla = _series(result, f"selection.fla.{pattern}.{what}")
        dense = dict(zip(*_series(result, f"dense.{what}"), strict=True))
        if fla_n:
            y = [dense[n] / s for n, s in zip(fla_n, fla, strict=True)]
            ax.plot(fla_n, y, "o--", color=t.muted)
            labels.append((fla_n[-1], y[-1], "fla selection", t.muted))
        size_axis(ax, "x", label="seq_len (tokens)", every=2)
        size_axis(ax, "y", label="", every=1)
        ax.yaxis.set_major_formatter(_factor)
        ax.axhline(1, color=t.ink, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0.6)
        end_labels(ax, labels, room=0.5)
        ax.annotate("dense", (ax.get_xlim()[1], 1), xytext=(-4, 4), fontsize=8.5, ha="right",
                    textcoords="offset points", color=t.ink)  # fmt: skip
        ax.set_title(what)
    axes[0].set_ylabel("times faster than dense")
    return (
        f"Two panels, forward and backward, for the {pattern} pattern: how many times faster than "
        "dense attention our selection, the sum of all branches and fla's selection (dashed, grey) "
        "are, against seq_len. A dashed line at one: below it, sparse attention loses. The curves "
        "rise with the length, and selection alone is above the sum."
    )


@figure(width=7.6, height=3.8, cols=2, sharey=True)
def nsa_branches(axes: Any, result: Any) -> str:
    """What share of the time each branch takes, by length: stacked bars, their sum beside."""
    t = theme()
    colours = dict(
        zip(_ORDER, (t.sky, t.green, t.orange, t.blue, t.purple, t.muted), strict=True)
    )
    lengths = [n for n, _ in zip(*_series(result, "branch.sum.forward"), strict=True)]
    if not lengths:
        raise _none("branch.sum.forward")
    for ax, what in zip(axes, _PASSES, strict=True):
        for place, n in enumerate(lengths):
            start = 0.0
            for name in _ORDER:
                key = f"branch.{name}.share.{what}.n{n}"
                if key not in result:
                    continue
                share = result.value(key)
                ax.barh(place, share, left=start, color=colours[name], height=0.7,
                        edgecolor=t.paper, linewidth=0.8)  # fmt: skip
                if share > 0.075:
                    ax.annotate(f"{share * 100:.0f}", (start + share / 2, place), ha="center",
                                va="center", fontsize=8, color=t.paper)  # fmt: skip
                start += share
            if f"branch.sum.{what}.n{n}" in result:
                total = format_seconds(result.value(f"branch.sum.{what}.n{n}"))
                ax.annotate(total, (1.02, place), va="center", fontsize=8.5, color=t.ink)
        ax.set_title(what, pad=22)
        ax.set_xlim(0, 1.3)
        ax.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        ax.set_xlabel("share of the branches' time")
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    for i, name in enumerate(_ORDER):
        called = axes[0].annotate(
            name, (0.0, 1.0), xytext=(i * 74, 6), fontsize=8.5, color=colours[name],
            xycoords="axes fraction", textcoords="offset points", annotation_clip=False,
        )  # fmt: skip
        called.set_in_layout(False)  # it reaches over both panels
    axes[0].set_yticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes[0].invert_yaxis()
    axes[0].set_ylabel("seq_len (tokens)")
    return (
        "Two panels of stacked horizontal bars, forward and backward, one per seq_len: the share "
        f"of {', '.join(_ORDER)} in the sum of their times. With the length the shares of "
        "compression and top-k grow. The sum stands beside each bar."
    )


@figure(width=7.4, height=4.0)
def nsa_bytes(ax: Axes, result: Any) -> str:
    """Bytes through L2 of each road, measured beside the model: bars and marks."""
    t = theme()
    rows = []
    for step in ("fla", "queries", "hopper", "keys"):
        for pattern in ("random", "local"):
            if f"l2.{step}.{pattern}.kernel" in result:
                rows.append((step, pattern))
    if not rows:
        raise _none("l2.*")
    called = {"fla": "fla, query by query", "queries": "unions of 4", "hopper": "unions, by hand",
              "keys": "by keys, parts"}  # fmt: skip
    for place, (step, pattern) in enumerate(rows):
        measured = result.value(f"l2.{step}.{pattern}.kernel")
        colour = t.vermilion if pattern == "random" else t.blue
        ax.barh(place, measured, color=colour, height=0.62)
        ax.annotate(format_bytes(measured), (measured, place), xytext=(5, 0), fontsize=8.5,
                    textcoords="offset points", va="center", color=colour)  # fmt: skip
        if f"model.{step}.{pattern}" in result:
            ax.plot([result.value(f"model.{step}.{pattern}")] * 2, [place - 0.42, place + 0.42],
                    color=t.ink, lw=2.2)  # fmt: skip
    ax.set_yticks(range(len(rows)), [f"{called[s]}, {p}" for s, p in rows])
    ax.invert_yaxis()
    from matplotlib.ticker import FuncFormatter

    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_bytes(v)))
    ax.xaxis.set_major_locator(_gib_locator(ax))
    ax.set_xlabel("through L2 (mark: the model)")
    ax.set_xlim(right=ax.get_xlim()[1] * 1.12)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    return (
        "Horizontal bars: bytes through L2 of the selection kernel by each road, for a random and "
        "a local choice, with a mark where the traffic model puts them."
    )


def _gib_locator(ax: Axes) -> Any:
    from matplotlib.ticker import MultipleLocator

    step = 2**30
    while ax.get_xlim()[1] / step > 6:
        step *= 2
    return MultipleLocator(step)


@figure(width=7.6, height=3.6, cols=2, sharey=True)
def nsa_groups(axes: Any, result: Any) -> str:
    """Time of selection against the size of the group, over that of groups of 16."""
    t = theme()
    found = False
    for ax, what in zip(axes, _PASSES, strict=True):
        labels = []
        for pattern, colour in (("random", t.vermilion), ("local", t.blue)):
            prefix = f"group.labkit.{pattern}.{what}.g"
            pairs = sorted(
                (int(key.removeprefix(prefix)), result.value(key))
                for key in result.results
                if key.startswith(prefix) and key.removeprefix(prefix).isdigit()  # one length
            )
            base = dict(pairs).get(16)
            if not base:
                continue
            found = True
            x, y = [g for g, _ in pairs], [s / base for _, s in pairs]
            ax.plot(x, y, "o-", color=colour)
            labels.append((x[-1], y[-1], pattern, colour))
        if labels:
            size_axis(ax, "x", label="group G (query heads per KV head)", every=1)
            end_labels(ax, labels, room=0.25)
        ax.axhline(2, color=t.ink, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0.6)
        ax.set_ylim(bottom=0)
        ax.set_title(what)
    if not found:
        raise _none("group.labkit.*")
    axes[0].set_ylabel("time over that of G = 16")
    return (
        "Two panels, forward and backward: time of the selection over that of groups of 16, "
        "against the size of the group, for the same useful operations. A dashed line at two."
    )


@figure(width=7.2, height=3.8)
def nsa_topk(ax: Axes, result: Any) -> str:
    """Choosing the blocks: torch.topk over stored scores, and the kernel that stores none."""
    t = theme()
    labels = []
    names = (
        ("fused", "ours, scores included", t.blue),
        ("fla", "fla, scores included", t.muted),
        ("torch", "torch.topk alone", t.vermilion),
        ("scores", "storing the scores", t.orange),
    )
    for name, label, colour in names:
        x, y = _series(result, f"topk.{name}")
        if x:
            ax.plot(x, y, "o-", color=colour)
            labels.append((x[-1], y[-1], label, colour))
    if not labels:
        raise _none("topk.*")
    size_axis(ax, "x", label="seq_len (tokens)", every=1)
    seconds_axis(ax, "y", label="time")
    end_labels(ax, labels, room=0.4)
    return (
        "Time against seq_len, both axes logarithmic: choosing blocks by our fused kernel and by "
        "fla's, torch.topk over scores that are stored already, and storing them."
    )
