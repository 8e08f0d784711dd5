"""What training keeps, and the longest sequence that fits (chapter 05)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from labkit.errors import ArgumentError
from labkit.plots.axes import bytes_axis, end_labels, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme
from labkit.units import significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["longest_lengths", "saved_bars", "stack_peaks"]


@figure(height=2.9)
def saved_bars(ax: Axes, saved: Mapping[str, float]) -> str:
    """What each form of attention keeps for its backward pass, as bars.

    Parameters
    ----------
    saved : form to bytes kept beyond the inputs, in units of the bytes of S.
    """
    t = theme()
    if not saved:
        raise ArgumentError("saved", saved, "is empty.", "Pass one value per form.")
    biggest = max(saved.values()) or 1.0
    for place, value in enumerate(saved.values()):
        ax.barh(place, value, color=t.orange if value > 0.3 else t.green, height=0.68)
        ax.annotate(
            f"{significant(value)} × S" if value else "nothing",
            (value, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    ax.set_yticks(range(len(saved)), [name.replace("_", " ") for name in saved])
    ax.set_xlim(0, biggest * 1.15)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("kept beyond the inputs, in units of the bytes of S")
    values = ", ".join(f"{n.replace('_', ' ')} {significant(v)}" for n, v in saved.items())
    return f"Horizontal bars: bytes kept for the backward pass, in units of S: {values}."


@figure(height=3.6)
def stack_peaks(ax: Axes, series: Mapping[str, Mapping[int, float]]) -> str:
    """Peak of forward and backward against the number of layers, one line per form.

    Parameters
    ----------
    series : form to {layers: peak in units of the bytes of S}.
    """
    t = theme()
    labels = []
    for (name, points), colour in zip(series.items(), t.cycle, strict=False):
        layers = sorted(points)
        peaks = [points[n] for n in layers]
        ax.plot(layers, peaks, "o-", color=colour)
        labels.append((layers[-1], peaks[-1], name.replace("_", " "), colour))
    every = sorted({n for points in series.values() for n in points})
    ax.set_xticks(every, [str(n) for n in every])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("layers")
    ax.set_ylabel("peak, in units of the bytes of S")
    end_labels(ax, labels, room=0.24)
    names = ", ".join(name.replace("_", " ") for name in series)
    return (
        f"Peak of a forward and backward pass against the number of layers, lines for {names}. "
        "From two layers on the lines are straight; a form's slope is what one layer keeps."
    )


@figure(height=4.0)
def longest_lengths(
    ax: Axes,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    points: Sequence[tuple[float, float]] = (),
) -> str:
    """The longest sequence against memory: predicted lines, bisected points.

    Parameters
    ----------
    lines : label to ``(bytes, tokens)`` in order of bytes.
    points : ``(bytes, tokens)`` found by bisection.
    """
    t = theme()
    labels = []
    for (name, line), colour in zip(lines.items(), t.cycle, strict=False):
        x, y = zip(*line, strict=True)
        ax.plot(x, y, color=colour)
        labels.append((x[-1], y[-1], name.replace("_", " "), colour))
    if points:
        x, y = zip(*points, strict=True)
        ax.plot(x, y, "o", color=t.ink, markersize=5, fillstyle="none")
    bytes_axis(ax, "x", label="memory", every=1)
    size_axis(ax, "y", label="longest sequence (tokens)")
    end_labels(ax, labels, room=0.26)
    names = ", ".join(name.replace("_", " ") for name in lines)
    circles = " Circles: lengths found by bisection, on their lines." if points else ""
    return (
        f"Longest sequence that fits against memory, both axes logarithmic, lines for {names}. "
        "A form that stores N × N tensors has slope one half, the fused one slope one." + circles
    )
