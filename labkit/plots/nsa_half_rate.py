"""What computing every other row saves, and what it changes (chapter 15)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["half_rate_error", "half_rate_savings"]

_FORMS = {
    "loop": "loop",
    "compression": "compression",
    "whole": "loop and compression",
    "reference": "large steps",
}
#: what source 000 states: speed-up from and to, share of the peak that is saved
_STATED = {
    ("loop", "forward"): ((1.8, 1.9), 0.40),
    ("whole", "forward"): ((1.8, 1.9), 0.35),
    ("whole", "training"): ((1.7, 1.8), 0.30),
}


def _rows(result: Any, **where: Any) -> list[dict]:
    rows = result.select(**where)
    if not rows:
        raise ArgumentError(
            "result", f"no rows with {where}", "has nothing to draw.",
            "Run the experiment half_rate.",
        )  # fmt: skip
    return rows


@figure(width=6.6, height=5.4, rows=2, sharex=False)
def half_rate_savings(axes: Any, result: Any, *, where: str = "") -> str:
    """Speed-up and saved share of the peak, forward and training, beside what the notes state.

    Parameters
    ----------
    result : a result or record of the experiment ``half_rate``.
    where : name of the machine, for the title.
    """
    t = theme()
    colours = {"forward": t.blue, "training": t.vermilion}
    for ax, part, column in ((axes[0], "time", "median_ms"), (axes[1], "memory", "measured")):
        rows = _rows(result, part=part)
        found = {(r["form"], r["passes"], r["rate"]): r[column] for r in rows}
        forms = [f for f in _FORMS if any(key[0] == f for key in found)]
        for place, form in enumerate(forms):
            for shift, passes in ((-0.19, "forward"), (0.19, "training")):
                full, half = (found.get((form, passes, rate)) for rate in ("full", "half"))
                if full is None or half is None:
                    continue
                value = full / half if part == "time" else 100 * (1 - half / full)
                ax.barh(place + shift, value, height=0.34, color=colours[passes],
                        label=passes if not place else None)  # fmt: skip
                stated = _STATED.get((form, passes))
                if stated:
                    at = sum(stated[0]) / 2 if part == "time" else 100 * stated[1]
                    ax.plot(at, place + shift, "D", color=t.ink, markerfacecolor=t.paper,
                            zorder=3, markersize=6)  # fmt: skip
        ax.set_yticks(range(len(forms)), [_FORMS[f] for f in forms])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    axes[0].axvline(1, color=t.muted, lw=1)
    axes[0].set_xlabel("times faster at half rate")
    axes[1].set_xlabel("share of the peak memory that is saved (%)")
    axes[0].plot([], [], "D", color=t.ink, markerfacecolor=t.paper, ls="none", label="the notes")
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9,
                   borderaxespad=0.2)  # fmt: skip
    if where:
        axes[0].set_title(where, pad=26)
    return (
        "Two panels of bars, forward and training, for the loop, the compression stage, both "
        "together, and large steps: times faster at half rate, and the share of the peak that is "
        "saved. Diamonds mark what the notes state. The loop's forward peak is not reduced."
    )


@figure(width=6.0, height=3.8)
def half_rate_error(ax: Axes, result: Any, *, where: str = "") -> str:
    """Relative error of odd rows against the correlation of neighbouring queries.

    Parameters
    ----------
    result, where : as for :func:`half_rate_savings`; rows of part ``"error"``.
    """
    t = theme()
    rows = sorted(_rows(result, part="error"), key=lambda r: r["rho"])
    rows = rows[::-1]
    x = [1 - r["rho"] for r in rows]
    lines = (("odd", "odd rows", t.vermilion, "o", "-"), ("all", "all rows", t.blue, "s", "-"),
             ("expected", "odd rows, predicted", t.muted, "", "--"))  # fmt: skip
    labels = []
    for column, text, colour, marker, dash in lines:
        y = [r[column] for r in rows]
        ax.plot(x, y, marker=marker, ls=dash, color=colour, markerfacecolor=t.paper)
        labels.append((x[-1], y[-1], text, colour))
    ax.set_ylim(bottom=0)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel("1 − ρ: how different neighbouring queries are")
    ax.set_ylabel("‖half − full‖ / ‖full‖")
    if where:
        ax.set_title(where)
    end_labels(ax, labels, room=0.3)
    return (
        "Relative error of the output at half rate against one minus the correlation of "
        "neighbouring queries: it grows steeply from a small value to more than 1 for the odd "
        "rows, along the predicted curve; over all rows it is smaller by the root of two."
    )
