"""Axes with units, and labels beside the lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labkit.errors import check_choice
from labkit.units import format_bytes, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bytes_axis", "end_labels", "size_axis"]


def _size_text(value: float, _position: int | None = None) -> str:
    """A size on an axis: 512, 8,192, ½."""
    if value >= 1:
        return f"{value:,.0f}" if float(value).is_integer() else significant(value)
    return significant(value)


def size_axis(ax: Axes, which: str = "x", *, label: str, every: int | None = None) -> None:
    """Make ``which`` ("x" or "y") an axis of powers of two with plain numbers.

    Call it after plotting: ``every`` (a tick per that many doublings) is chosen from the
    range of the data unless given.
    """
    import math

    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = {"x": ax.xaxis, "y": ax.yaxis}[check_choice("which", which, ("x", "y"))]
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=2)
    if every is None:
        low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
        every = max(1, math.ceil(math.log2(high / low) / 9))
    axis.set_major_locator(LogLocator(base=2**every, numticks=40))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_size_text))
    axis.set_label_text(label)


def bytes_axis(ax: Axes, which: str = "y", *, label: str, every: int | None = None) -> None:
    """Make ``which`` a logarithmic axis of bytes, written in binary units; see size_axis."""
    from matplotlib.ticker import FuncFormatter

    size_axis(ax, which, label=label, every=every)
    axis = {"x": ax.xaxis, "y": ax.yaxis}[which]
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def seconds_axis(ax: Axes, which: str = "y", *, label: str = "time") -> None:
    """Make ``which`` a decimal logarithmic axis of durations, written in s, ms, µs, ns."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from labkit.units import format_seconds

    axis = {"x": ax.xaxis, "y": ax.yaxis}[check_choice("which", which, ("x", "y"))]
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=10)
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
    axis.set_label_text(label)


def end_labels(
    ax: Axes,
    labels: Sequence[tuple[float, float, str, str]],
    *,
    room: float = 0.2,
    size: float = 9,
) -> None:
    """Write labels to the right of points, in their colours, moved apart where they would touch.

    Parameters
    ----------
    labels : ``(x, y, text, colour)`` in data coordinates, usually the ends of lines.
    room : share of the width of the axes to leave free for them on the right.
    """
    if not labels:
        return
    low, high = ax.get_xlim()
    forward, backward = ax.xaxis.get_transform(), ax.xaxis.get_transform().inverted()
    a, b = forward.transform([low, high])
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    ax.set_xlim(low, backward.transform([a + (b - a) / (1 - room)])[0])
    ax.xaxis.set_ticks(ticks)  # none under the labels; keeps the formatter
    ax.spines["bottom"].set_bounds(low, high)
    fig = ax.figure
    if engine := fig.get_layout_engine():
        engine.execute(fig)  # where the axes will be; the rest of drawing tells nothing more
    else:
        fig.draw_without_rendering()
    to_points = 72 / fig.dpi
    placed = sorted(labels, key=lambda item: item[1])
    heights = [ax.transData.transform((x, y))[1] * to_points for x, y, _, _ in placed]
    lines = [text.count("\n") + 1 for _, _, text, _ in placed]
    wanted = list(heights)
    for _ in range(200):  # push neighbours apart until none overlap
        moved = False
        for i in range(len(placed) - 1):
            gap = size * 0.62 * (lines[i] + lines[i + 1])
            lack = gap - (heights[i + 1] - heights[i])
            if lack > 0.01:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    for (x, y, text, colour), height, want in zip(placed, heights, wanted, strict=True):
        ax.annotate(
            text,
            (x, y),
            xytext=(6, height - want),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
        )
