"""The running state of a softmax, and what low precision does to it (chapter 07)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["error_by_length", "order_spread", "running_state"]


@figure(height=4.6, rows=2, sharex=True)
def running_state(
    axes: Any, scores: Sequence[float], m: Sequence[float], total: Sequence[float]
) -> str:
    """A row of scores read from left to right, with m and ℓ after each.

    Parameters
    ----------
    scores : the row.
    m, total : largest score and sum of exp(score − m) after each of them, same length.
    """
    t = theme()
    if not len(scores) == len(m) == len(total) > 0:
        raise ArgumentError(
            "m", len(m), f"values, for {len(scores)} scores.", "Pass m and ℓ after each score."
        )
    top, bottom = axes
    place = list(range(1, len(scores) + 1))
    records = [n for n in place if n == 1 or m[n - 1] > m[n - 2]]
    for ax in axes:
        for n in records:
            ax.axvline(n, color=t.grid, linewidth=1.4, zorder=0)
        ax.grid(axis="x", visible=False)
    top.plot(place, scores, "o", color=t.vermilion, markersize=4)
    top.step(place, m, where="post", color=t.blue)
    top.set_ylabel("score")
    bottom.plot(place, total, color=t.green, marker="o", markersize=3)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("ℓ, sum of exp(score − m)")
    bottom.set_xlabel("scores read")
    last = len(scores)
    end_labels(bottom, [(last, total[-1], "ℓ", t.green)], room=0.1)
    top.annotate(
        "m", (last, m[-1]), xytext=(6, 0), textcoords="offset points", va="center", color=t.blue
    )
    return (
        "Two panels over the number of scores read. Above: scores as points, and their running "
        "maximum m as a staircase. Below: ℓ, which climbs with each score under the "
        "staircase; where the staircase has a high step it falls. Vertical lines mark the "
        f"{len(records)} steps."
    )


@figure(height=4.2)
def error_by_length(
    ax: Axes, series: Mapping[str, Mapping[int, float]], *, y: str = "relative error"
) -> str:
    """Errors against the number of keys, one line per way of computing, both axes logarithmic.

    Parameters
    ----------
    series : label to {seq_len: error}.
    y : label of the vertical axis.
    """
    t = theme()
    if not series or not all(series.values()):
        raise ArgumentError(
            "series", dict(series), "has an empty line.", "Pass {label: {keys: error}}."
        )
    labels = []
    markers = "osD^vP"
    for index, (name, points) in enumerate(series.items()):
        colour = t.cycle[index % len(t.cycle)]
        xs = sorted(points)
        ys = [points[n] for n in xs]
        ax.plot(xs, ys, color=colour, marker=markers[index % len(markers)],
                markerfacecolor=t.paper, markeredgewidth=1.4)  # fmt: skip
        labels.append((xs[-1], ys[-1], name, colour))
    ax.set_yscale("log")
    every = sorted({n for points in series.values() for n in points})
    size_axis(ax, "x", label="keys", every=2 if len(every) < 8 else None)
    ax.set_ylabel(y)
    # a line that ends early is named at its end, inside the axes
    early = [item for item in labels if item[0] < every[-1]]
    for x, y_end, name, colour in early:
        ax.annotate(
            name, (x, y_end), xytext=(8, 0), textcoords="offset points",
            va="center", color=colour, fontsize=9,
        )  # fmt: skip
    end_labels(ax, [item for item in labels if item[0] == every[-1]], room=0.34)
    names = "; ".join(name.replace("\n", " ") for name in series)
    return (
        f"Error against the number of keys, both axes logarithmic, a line for each of: {names}. "
        "The lines of a float16 state climb; those of a float32 state stay flat, far below."
    )


@figure(height=2.9)
def order_spread(ax: Axes, errors: Mapping[str, Sequence[float]]) -> str:
    """Errors of one result computed in many orders: a strip of points for each label.

    Parameters
    ----------
    errors : label to the error of each order in units of the dtype's ε, ascending order first.
    """
    t = theme()
    if not errors or not all(errors.values()):
        raise ArgumentError("errors", dict(errors), "is empty.", "Pass {label: [error, …]}.")
    for place, (name, values) in enumerate(errors.items()):
        colour = t.cycle[place % len(t.cycle)]
        first, *others = values
        # spread them a little, the same way every time, so that points that meet can be seen
        shift = [0.12 * ((7 * n) % 5 - 2) for n in range(len(others))]
        ax.plot(others, [place + s for s in shift], "o", color=colour, alpha=0.6, markersize=5)
        ax.plot([first], [place], "D", color=t.ink, markersize=7, fillstyle="none", zorder=4)
        ax.annotate(
            name, (max(values), place), xytext=(12, 0), textcoords="offset points",
            va="center", color=colour, fontsize=9.5,
        )  # fmt: skip
    ax.set_xlim(0, 1.45 * max(max(values) for values in errors.values()))
    ax.set_yticks([])
    ax.set_ylim(len(errors) - 0.5, -0.5)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("relative error against float64, in units of the dtype's ε")
    names = ", ".join(errors)
    return (
        f"Strips of points on one axis of errors, in units of the dtype's ε, for {names}. Each "
        "point is the same attention with its blocks of keys in another order; a diamond marks "
        "ascending order. Each strip is narrow against its distance from zero."
    )
