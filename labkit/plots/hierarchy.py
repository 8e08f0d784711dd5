"""The memory hierarchy: bandwidth, latency, bytes in flight, reuse (chapter 03)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import bytes_axis, end_labels, seconds_axis, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["access_order", "bytes_in_flight", "hierarchy_bandwidth", "hierarchy_latency", "reuse"]


def _rate_axis(ax: Axes, which: str = "y", *, label: str) -> None:
    """Make ``which`` a logarithmic axis of bytes per second, decimal prefixes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from labkit.units import format_rate

    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=10)
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_rate(value, "B/s")))
    axis.set_label_text(label)


def _rows_of(source: Any, kind: str, **columns: Any) -> list[dict[str, Any]]:
    """Rows of one kind of the hierarchy experiment, by growing working set."""
    found = [
        row
        for row in source.rows
        if row["kind"] == kind and all(row.get(k) == v for k, v in columns.items())
    ]
    return sorted(found, key=lambda row: row["bytes"])


def _size_line(ax: Axes, size: int | None, text: str) -> None:
    """A vertical line at the size of a cache, named at the top."""
    if size is None:
        return
    ax.axvline(size, color=theme().ink, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        text,
        (size, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        fontsize=9,
        va="top",
    )


@figure(height=4.2)
def hierarchy_bandwidth(ax: Axes, source: Any, *, l2_bytes: int | None = None) -> str:
    """Bandwidth against working set: copies, reads past L1, L1 and shared memory.

    Parameters
    ----------
    source : a Result or Record of the experiment ``hierarchy``.
    l2_bytes : size of the L2 cache, drawn as a line.
    """
    t = theme()
    copies = _rows_of(source, "copy", by="torch")
    lines = [
        (copies, "copy\n(reads + writes)", t.blue),
        (_rows_of(source, "read"), "read\npast L1", t.vermilion),
        (_rows_of(source, "read_l1"), "read\nthrough L1", t.green),
    ]
    labels = []
    for rows, text, colour in lines:
        if not rows:
            continue
        x, y = [r["bytes"] for r in rows], [r["bandwidth"] for r in rows]
        ax.plot(x, y, "o-", color=colour, markersize=3.5)
        labels.append((x[-1], y[-1], text, colour))
    shared = _rows_of(source, "shared", ways=1)
    if shared:
        row = shared[0]
        ax.plot([row["bytes"]], [row["bandwidth"]], "D", color=t.purple, markersize=7)
        ax.annotate(
            "shared memory",
            (row["bytes"], row["bandwidth"]),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=t.purple,
            fontsize=9,
        )
    bytes_axis(ax, "x", label="working set (bytes touched again and again)")
    _rate_axis(ax, "y", label="bandwidth")
    _size_line(ax, l2_bytes, "L2")
    end_labels(ax, [label for label in labels if label[2] != lines[2][1]], room=0.2)
    through = [label for label in labels if label[2] == lines[2][1]]
    for x, y, text, colour in through:
        ax.annotate(
            text.replace("\n", " "),
            (x, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )
    if shared or through:
        return (
            "Bandwidth against working set, both logarithmic. Reads through L1 and shared memory "
            "lie highest. Reads past L1 run level while the buffer fits in L2, fall where it no "
            "longer does, and level off at the bandwidth of memory. Copies rise while they are too "
            "short to fill the machine and end on the same level."
        )
    return (
        "Copy bandwidth against working set, both logarithmic: it rises while a call costs more "
        "than the copy, stays high while the buffers fit in the caches and falls to the level of "
        "memory where they do not."
    )


@figure(height=4.0)
def hierarchy_latency(ax: Axes, source: Any, *, l2_bytes: int | None = None) -> str:
    """Cycles per dependent load against working set, through L1 and past it.

    Parameters
    ----------
    source : a Record or Result of the experiment ``hierarchy`` made on a GPU.
    l2_bytes : size of the L2 cache, drawn as a line.
    """
    t = theme()
    labels = []
    for level, text, colour in (
        ("l2", "loads past L1\n(ld.global.cg)", t.vermilion),
        ("l1", "loads through L1\n(ld.global.ca)", t.green),
    ):
        rows = _rows_of(source, "latency", level=level)
        if not rows:
            raise ArgumentError(
                "source",
                "no latency rows",
                "holds no pointer chase.",
                "Pass a record made on a GPU, for example labkit.records.load('hierarchy').",
            )
        x, y = [r["bytes"] for r in rows], [r["cycles"] for r in rows]
        ax.plot(x, y, "o-", color=colour, markersize=3.5)
        if level == "l2":
            labels.append((x[-1], y[-1], text, colour))
        else:
            ax.annotate(
                text,
                (x[-1], y[-1]),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=9,
            )
    bytes_axis(ax, "x", label="working set (one line of 128 bytes per step)")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("cycles per load")
    _size_line(ax, l2_bytes, "L2")
    end_labels(ax, labels, room=0.2)
    return (
        "Cycles per dependent load against working set. Through L1 a load is several times "
        "cheaper; the sets stop before they outgrow one multiprocessor's L1. Past L1 the curve is "
        "level over small sets, begins to climb well before the dashed line that marks the size "
        "of L2, and beyond it bends over towards the latency of memory."
    )


@figure(height=3.4)
def access_order(ax: Axes, source: Any) -> str:
    """Time per gathered line of 64 bytes on a CPU, in order and at random.

    Parameters
    ----------
    source : a Result of the experiment ``hierarchy`` made on a CPU.
    """
    t = theme()
    labels = []
    for order, colour in (("at random", t.vermilion), ("in order", t.blue)):
        rows = _rows_of(source, "order", order=order)
        x, y = [r["bytes"] for r in rows], [r["seconds"] for r in rows]
        ax.plot(x, y, "o-", color=colour, markersize=4)
        labels.append((x[-1], y[-1], order, colour))
    bytes_axis(ax, "x", label="buffer that the lines come from")
    seconds_axis(ax, "y", label="time per line of 64 bytes")
    end_labels(ax, labels, room=0.14)
    return (
        "Time per gathered line against the size of the buffer, both logarithmic, for lines taken "
        "in order and at random. The two are close while the buffer fits in the caches; beyond "
        "them random lines cost several times more."
    )


@figure(height=4.0)
def bytes_in_flight(ax: Axes, source: Any, *, latency: float, peak: float) -> str:
    """Read bandwidth against the bytes that all programs together keep in flight.

    Parameters
    ----------
    source : a Record or Result of the experiment ``hierarchy`` made on a GPU.
    latency : seconds per load from memory: bytes in flight / latency is Little's line.
    peak : B/s that memory gives at best.
    """
    t = theme()
    rows = sorted(
        (r for r in source.rows if r["kind"] == "parallelism"), key=lambda r: r["programs"]
    )
    x = [r["programs"] * r["bytes_per_program"] for r in rows]
    ax.plot(x, [r["bandwidth"] for r in rows], "o", color=t.blue, label="measured")
    little = [x[0], peak * latency, x[-1]]
    ax.plot(little[:2], [v / latency for v in little[:2]], color=t.vermilion, linewidth=1.4)
    ax.plot(little[1:], [peak, peak], color=t.vermilion, linewidth=1.4)
    bytes_axis(ax, "x", label="bytes asked for at a time by all programs together")
    _rate_axis(ax, "y", label="read bandwidth")
    ax.annotate(
        "bytes in flight / latency",
        (x[4], x[4] / latency),
        xytext=(10, -8),
        textcoords="offset points",
        va="top",
        color=t.vermilion,
        fontsize=9,
    )
    ax.annotate(
        "what memory can give",
        (little[2], peak),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        color=t.vermilion,
        fontsize=9,
    )
    return (
        "Read bandwidth against bytes asked for at a time, both logarithmic. The points climb in "
        "proportion along the line bytes in flight over latency, bend where it meets the ceiling "
        "and stay below the ceiling from there on."
    )


@figure(height=3.8)
def reuse(ax: Axes, source: Any) -> str:
    """Speed-up of blocks that stay in cache, measured, against r / (1 + (r − 1) / ρ).

    Where the source has it (a GPU), also that of blocks with a kernel for each pass.

    Parameters
    ----------
    source : a Record or Result of the experiment ``hierarchy``.
    """
    t = theme()
    ratio = source.value("reuse_ratio")
    passes = sorted(
        {r["passes"] for r in source.rows if r["kind"] == "reuse" and r["how"] == "blocks"}
    )
    measured = [source.value(f"reuse_{p}") for p in passes]
    curve = [1 + i * (passes[-1] - 1) / 200 for i in range(201)]
    ax.plot(curve, [r / (1 + (r - 1) / ratio) for r in curve], color=t.vermilion, linewidth=1.4)
    ax.axhline(ratio, color=t.ink, linewidth=1, linestyle=(0, (4, 3)))
    ax.plot(passes, measured, "o", color=t.blue, markersize=6)
    split = [
        source.value(f"reuse_kernels_{p}") for p in passes if _rows_of(source, "reuse_kernels")
    ]
    if split:
        ax.plot(passes, split, "s", color=t.purple, markersize=5)
        ax.annotate(
            "a kernel for each pass over a block",
            (passes[-1], split[-1]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            color=t.purple,
            fontsize=9,
        )
    ax.annotate(
        "ratio of the bandwidths, ρ",
        (passes[-1], ratio),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    ax.annotate(
        "r / (1 + (r − 1) / ρ)",
        (curve[16], curve[16] / (1 + (curve[16] - 1) / ratio)),
        xytext=(-6, 8),
        textcoords="offset points",
        ha="right",
        color=t.vermilion,
        fontsize=9,
    )
    ax.annotate(
        "measured, in one kernel" if split else "measured",
        (passes[1], measured[1]) if split else (passes[0], measured[0]),
        xytext=(10, -10),
        textcoords="offset points",
        va="center",
        color=t.blue,
        fontsize=9,
    )
    size_axis(ax, "x", label="passes over each block, r", every=1)
    ax.set_ylim(0, max(ratio, *measured) * 1.15)
    ax.set_ylabel("times faster than whole passes")
    more = " Squares, a kernel for each pass over a block, stay far below." if split else ""
    return (
        "Speed-up of finishing each block while it is in cache, against the number of passes. The "
        "formula starts at 1 for one pass and nears the ratio of the bandwidths, drawn as a dashed "
        "line, only after many. Measured points start near 1 and stay at or below the dashed "
        "line." + more
    )
