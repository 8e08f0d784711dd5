"""Sparse patterns by time and by bytes: what a mask costs and what blocks save (chapter 11)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import bytes_axis, end_labels, seconds_axis, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["blocks_and_time", "window_lengths"]

#: name of a row → how a page calls it
_CALLED = {
    "naive": "mask, naive",
    "sdpa": "mask, SDPA",
    "flex": "blocks, FlexAttention",
    "blocks": "blocks, PyTorch",
    "window": "window kernel",
    "dense": "dense causal",
}


def _rows(result: Any, **wanted: Any) -> list[Any]:
    rows = [row for row in result.select(**wanted) if row.get("median_ms")]
    if not rows:
        raise ArgumentError(
            "result", wanted, "was not measured there.", 'Pass run("masks") or its record.'
        )
    return rows


@figure(width=7.4, height=5.6)
def blocks_and_time(ax: Axes, result: Any) -> str:
    """Of each pattern the share of scores, the share of blocks, and the time, over dense attention.

    Parameters
    ----------
    result : of the experiment ``masks``, or its record.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    t = theme()
    rows = _rows(result, part="density", **{"pass": "forward"})
    of_dense = [row for row in rows if row["pattern"] == "dense"]
    dense = min(of_dense, key=lambda row: row["name"] != "flash")["median_ms"]
    lines = [
        (_name(row), row["density"], row["block_density"], row["median_ms"] / dense)
        for row in rows if row["name"] in ("flex", "blocks", "window")
    ]  # fmt: skip
    lines.sort(key=lambda line: line[3])
    for name in ("sdpa", "naive"):
        masked = [row for row in rows if row["name"] == name and row["pattern"] != "dense"]
        if masked:  # the middle one: they differ by noise
            row = sorted(masked, key=lambda row: row["median_ms"])[len(masked) // 2]
            lines.append((f"any, {_CALLED[name]}", row["density"], None, row["median_ms"] / dense))
    for place, (_, scores, blocks, time) in enumerate(lines):
        ends = [x for x in (scores, blocks, time) if x]
        ax.plot([min(ends), max(ends)], [place, place], color=t.grid, linewidth=2, zorder=0.5)
        ax.plot(scores, place, "|", color=t.muted, markersize=13, markeredgewidth=2.4)
        if blocks:
            ax.plot(blocks, place, "s", color=t.blue, markersize=8, fillstyle="none",
                    markeredgewidth=1.8)  # fmt: skip
        ax.plot(time, place, "o", color=t.vermilion, markersize=6.5)
    ax.axvline(1, color=t.ink, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0.6)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(base=4, numticks=20))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:g}×" if v >= 1 else f"1/{1 / v:g}")
    )
    ax.set_yticks(range(len(lines)), [name for name, *_ in lines])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("over dense causal attention")
    heads = (("|", "scores seen", t.muted), ("s", "blocks touched", t.blue),
             ("o", "time", t.vermilion))  # fmt: skip
    for mark, text, colour in heads:
        ax.plot([], [], mark, color=colour, label=text, markersize=8, markeredgewidth=1.8,
                fillstyle="none" if mark == "s" else "full")  # fmt: skip
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, fontsize=9,
              handlelength=1)  # fmt: skip
    return (
        "For each pattern, a line with three marks on a logarithmic axis, all over dense causal "
        "attention: the share of scores that it sees, the share of blocks that these touch, and "
        "the time. The scores are about the same for all; compare the places of blocks and "
        "times. A dashed line at one is dense attention. The last rows are masked dense work. "
        f"Rows: {'; '.join(name for name, *_ in lines)}."
    )


def _name(row: Any) -> str:
    text = row["pattern"].replace("_blocks", ", in blocks").replace("_sorted", ", sorted")
    return f"{text}, window kernel" if row["name"] == "window" else text


@figure(width=7.6, height=4.0, cols=2)
def window_lengths(axes: Any, result: Any, *, what: str = "forward") -> str:
    """Time and memory of a local window by each way, against N.

    Parameters
    ----------
    result : of the experiment ``masks``, or its record.
    what : ``"forward"`` or ``"both"``, forward and backward together.
    """
    t = theme()
    rows = _rows(result, part="lengths", **{"pass": what})
    colours = {"naive": t.ink, "sdpa": t.purple, "flex": t.vermilion, "blocks": t.vermilion,
               "window": t.green, "dense": t.blue}  # fmt: skip
    measured = any(row.get("peak") for row in rows)
    lengths = {row["seq_len"] for row in rows}
    for ax, kind in zip(axes, ("median_ms", "peak"), strict=True):
        labels = []
        for name, colour in colours.items():
            points = [
                (row["seq_len"], row["median_ms"] / 1e3 if kind == "median_ms" else
                 (row["peak"] if measured else row["held"]))
                for row in rows if row["name"] == name
            ]  # fmt: skip
            points = sorted((n, y) for n, y in points if y)
            if not points:
                continue
            x, y = zip(*points, strict=True)
            ax.plot(x, y, "o-", color=colour)
            called = _CALLED[name]
            if kind == "peak" and not measured and name == "blocks":
                called = "blocks, a kernel"  # the model is of a kernel
            labels.append((x[-1], y[-1], called.replace(", ", ",\n"), colour))
        size_axis(ax, "x", label="seq_len (tokens)", every=2 if len(lengths) > 3 else 1)
        if kind == "median_ms":
            seconds_axis(ax, "y", label="")
            ax.set_title("time")
        else:
            bytes_axis(ax, "y", label="")
            ax.set_title("held beyond the inputs" + ("" if measured else ", by the model"))
        end_labels(ax, labels, room=0.42, size=8.5)
    return (
        "Two panels against seq_len, all axes logarithmic: time, and bytes held beyond the inputs, "
        "of attention to a window of fixed width. With a mask both grow with the square of the "
        "length, whatever the window; where blocks are left out both grow in proportion to it."
    )
