"""The roofline, what lies under it, and bytes by four witnesses (chapter 04)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels, seconds_axis, size_axis
from labkit.plots.drawing import figure
from labkit.plots.growth import rate_text
from labkit.plots.memory import linear_bytes
from labkit.plots.style import theme
from labkit.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["dram_ledger", "intensity_limits", "roofline", "time_bounds"]


def _roof_axis(ax: Axes, which: str, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=10)
    axis.set_major_locator(LogLocator(base=10, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: rate_text(v)))
    axis.set_label_text(label)


@figure(width=7.6, height=4.6)
def roofline(
    ax: Axes, rooflines: Sequence[Any], points: Sequence[Any] = (), *, title: str = ""
) -> str:
    """Rooflines and measured points, rate against intensity, both logarithmic.

    Parameters
    ----------
    rooflines : ``labkit.roofline.Roofline`` objects; one from a data sheet is drawn dashed.
    points : ``labkit.roofline.Point`` objects.  Points of one name are one series, joined in
        the order given; from each a thin line rises to the first roof: the residual.
    title : of the figure.
    """
    if not rooflines:
        raise ArgumentError("rooflines", rooflines, "is empty.", "Pass at least one Roofline.")
    t = theme()
    reach = [r.ridge for r in rooflines] + [p.intensity for p in points]
    low, high = min(reach) / 4, max(reach) * 4
    series: dict[str, list[Any]] = {}
    for point in points:
        series.setdefault(point.name, []).append(point)
    labels = []
    for roof in rooflines:
        style = "--" if roof.source == "spec" else "-"
        xs = [low, roof.ridge, high]
        ax.plot(xs, [roof.attainable(x) for x in xs], color=t.ink, linestyle=style, zorder=2)
        ax.plot([roof.ridge], [roof.peak_flops], "|", color=t.ink, markersize=9, zorder=2)
        text = (roof.label or roof.source).replace(", ", "\n", 1)
        labels.append((high, roof.peak_flops, text, t.ink))
    main = rooflines[0]
    for index, (name, members) in enumerate(series.items()):
        colour = t.cycle[index % len(t.cycle)]
        xs, ys = [p.intensity for p in members], [p.rate for p in members]
        tops = [main.attainable(x) for x in xs]
        ax.vlines(xs, ys, tops, color=colour, linewidth=0.7, alpha=0.7)
        ax.plot(xs, ys, color=colour, linewidth=1, marker="osD^vPX"[index % 7], zorder=3)
        last = max(members, key=lambda p: p.intensity)
        labels.append((last.intensity, last.rate, name, colour))
    _roof_axis(ax, "x", "arithmetic intensity (FLOP/byte)")
    _roof_axis(ax, "y", "rate (FLOP/s)")
    ax.set_xlim(low, high)
    end_labels(ax, labels, room=0.26, size=8.5)
    if title:
        ax.set_title(title)
    roofs = "; ".join(r.label or r.source for r in rooflines)
    drawn = f" Points: {', '.join(series)}." if series else ""
    return (
        "Rate against arithmetic intensity, both logarithmic. Each roof rises with the bandwidth "
        f"and turns flat at the peak: {roofs}.{drawn} A thin line joins each point to the roof "
        "above it."
    )


@figure(height=3.6)
def intensity_limits(
    ax: Axes,
    curves: Sequence[tuple[str, Sequence[tuple[int, float]], float]],
    *,
    ridges: Mapping[str, float] | None = None,
) -> str:
    """Intensity against seq_len, with the limit of each curve and the ridges of some machines.

    Parameters
    ----------
    curves : ``(label, [(seq_len, FLOP/byte), …], limit)``; an infinite limit is not drawn.
    ridges : name of a machine → its ridge, FLOP/byte.
    """
    import math

    t = theme()
    labels = []
    for index, (label, pairs, limit) in enumerate(curves):
        colour = t.cycle[index % len(t.cycle)]
        xs, ys = zip(*pairs, strict=True)
        ax.plot(xs, ys, color=colour, zorder=3)
        labels.append((xs[-1], ys[-1], label, colour))
        if math.isfinite(limit) and limit != ys[0]:
            ax.plot([xs[0], xs[-1]], [limit] * 2, color=colour, lw=1, linestyle=(0, (2, 2)))
    ends = [x for _, pairs, _ in curves for x, _ in pairs]
    by_height = sorted((ridges or {}).items(), key=lambda item: item[1])
    for index, (name, ridge) in enumerate(by_height):
        ax.plot([min(ends), max(ends)], [ridge] * 2, color=t.muted, lw=1, linestyle=(0, (6, 3)))
        top = index == len(by_height) - 1
        ax.annotate(
            f"ridge, {name}",
            (min(ends), ridge),
            xytext=(2, 3 if top else -3),
            textcoords="offset points",
            va="bottom" if top else "top",
            fontsize=8.5,
            color=t.muted,
        )
    size_axis(ax, "x", label="seq_len")
    _roof_axis(ax, "y", "intensity (FLOP/byte)")
    end_labels(ax, labels, room=0.22)
    names = ", ".join(label for label, _, _ in curves)
    against = f" Horizontal lines: the ridges of {', '.join(ridges)}." if ridges else ""
    return (
        f"Arithmetic intensity against seq_len, both logarithmic: {names}. Dotted lines are the "
        f"limits.{against}"
    )


@figure(height=3.4)
def time_bounds(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> str:
    """For each kernel the bounds on its time as a bar and the measured time as a dot.

    Parameters
    ----------
    rows : dicts with ``label``, ``lower`` and ``upper`` (seconds: everything overlaps, nothing
        overlaps), ``measured`` (seconds) and optionally ``limited_by``.
    """
    if not rows:
        raise ArgumentError("rows", rows, "is empty.", "Pass at least one kernel.")
    t = theme()
    for place, row in enumerate(rows):
        ax.plot([row["lower"], row["upper"]], [place] * 2, color=t.sky, lw=9, solid_capstyle="butt")
        ax.plot([row["lower"]] * 2, [place - 0.28, place + 0.28], color=t.blue, zorder=3)
        ax.plot(
            [row["measured"]], [place], "o", color=t.vermilion, markeredgecolor=t.paper, zorder=4
        )
        ax.annotate(
            f"{row['measured'] / row['lower']:.1f}×",
            (max(row["measured"], row["upper"]), place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    names = [row["label"] for row in rows]
    limits = [f"\n{row['limited_by']}" if row.get("limited_by") else "" for row in rows]
    ax.set_yticks(range(len(rows)), [n + x for n, x in zip(names, limits, strict=True)])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    seconds_axis(ax, "x", label="time")
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * (high / low) ** 0.12)
    return (
        f"For each kernel ({', '.join(names)}) a bar from the time if all resources overlap to the "
        "time if none do, on a logarithmic time axis, the measured time as a dot, and how many "
        "times the lower bound it is."
    )


@figure(width=7.6, height=4.2)
def dram_ledger(ax: Axes, rows: Sequence[Mapping[str, Any]], *, l2_bytes: int | None = None) -> str:
    """Bytes of each step: by formula, and through DRAM with cold and with warm caches.

    Parameters
    ----------
    rows : dicts with ``label`` and bytes under ``formula``, ``cold`` and ``warm``; a missing or
        None count leaves its place empty.
    l2_bytes : size of the L2 cache, drawn as a line.
    """
    if not rows:
        raise ArgumentError("rows", rows, "is empty.", "Pass at least one step.")
    t = theme()
    kinds = (
        ("formula", t.muted, "formula: each tensor once"),
        ("cold", t.blue, "DRAM, cold cache"),
        ("warm", t.vermilion, "DRAM, warm cache"),
    )
    biggest = max(row.get(key) or 0 for row in rows for key, _, _ in kinds)
    for place, row in enumerate(rows):
        for offset, (key, colour, name) in zip((-0.27, 0, 0.27), kinds, strict=True):
            if row.get(key) is None:
                continue
            ax.barh(place + offset, row[key], height=0.25, color=colour)
            text = format_bytes(row[key]) + (f"  {name}" if place == 0 else "")
            ax.annotate(
                text,
                (row[key], place + offset),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=colour,
            )
    if l2_bytes is not None:
        ax.axvline(l2_bytes, color=t.ink, linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate(
            "L2",
            (l2_bytes, len(rows) - 0.55),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
            va="bottom",
        )
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    linear_bytes(ax, "x", max(biggest, l2_bytes or 0), "bytes read and written")
    ax.set_xlim(0, max(biggest, l2_bytes or 0) * 1.32)
    names = ", ".join(row["label"] for row in rows)
    return (
        f"Horizontal bars for {names}: bytes by the formula, bytes through DRAM with the caches "
        "emptied before each kernel, and with the caches as the kernel before left them."
    )
