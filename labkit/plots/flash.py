"""The forward kernel: its steps and rate, what a score costs, what a program takes (chapter 08)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels, size_axis
from labkit.plots.drawing import figure
from labkit.plots.growth import rate_text
from labkit.plots.memory import linear_bytes
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["flash_rates", "flash_resources", "flash_steps", "score_clocks"]

_OTHERS = {"flash": "torch flash", "cudnn": "cuDNN"}


def _ceilings(result: Any) -> dict[str, float]:
    """Rates of torch's matrix product after a rest and after seconds of work, where measured."""
    rows = {r.get("load"): r["rate"] for r in result.select(part="ceiling")}
    return {f"matmul, {load}": rows[load] for load in ("burst", "sustained") if load in rows}


def _rate_axis(ax: Axes, which: str, label: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_formatter(FuncFormatter(lambda v, _: rate_text(v) if v else "0"))
    axis.set_label_text(label)


@figure(width=7.6, height=3.9, cols=2, sharey=True)
def flash_steps(axes: Any, result: Any, *, seq_len: int, causal: bool = False) -> str:
    """The rate of each step at one length, by head_dim, as bars.

    Parameters
    ----------
    result : of the experiment ``flash_forward``, or its record.
    seq_len, causal : which rows.
    """
    t = theme()
    names: list[str] = []
    for ax, d in zip(axes, (64, 128), strict=True):
        rows = {
            r["name"]: r["rate"]
            for r in result.select(part="steps", seq_len=seq_len, causal=causal, head_dim=d)
            if "rate" in r
        }
        steps = [name for name in rows if name.startswith("v")]
        if not steps:
            raise ArgumentError(
                "result", f"d = {d}, N = {seq_len}", "has no steps.", "Pass a GPU's."
            )
        names = max(names, steps, key=len)
        for place, name in enumerate(steps):
            ax.barh(place, rows[name], color=t.blue, height=0.66)
            ax.annotate(
                rate_text(rows[name]).replace(" T", ""), (rows[name], place), xytext=(-5, 0),
                textcoords="offset points", va="center", ha="right", fontsize=9, color=t.paper,
            )  # fmt: skip
        lines = {_OTHERS[name]: rows[name] for name in _OTHERS if name in rows}
        if burst := _ceilings(result).get("matmul, burst"):
            lines["matmul"] = burst  # as the kernels were timed: with rests in between
        for (label, value), colour in zip(
            lines.items(), (t.vermilion, t.green, t.ink), strict=False
        ):
            ax.axvline(value, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0.6)
            ax.annotate(
                label, (value, len(steps) - 0.45), xytext=(-3, 0), textcoords="offset points",
                rotation=90, va="top", ha="right", fontsize=8.5, color=colour,
            )  # fmt: skip
        ax.set_xlim(left=0)
        ax.set_title(f"d = {d}")
        _rate_axis(ax, "x", "rate (FLOP/s)")
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    from labkit.flash.steps import STEPS

    called = {step.key: f"{step.number} {step.name}" for step in STEPS}
    axes[0].set_yticks(range(len(names)), [called.get(name, name) for name in names])
    axes[0].set_ylim(len(names) + 1.5, -0.6)
    return (
        f"Two panels of horizontal bars, head_dim 64 and 128 at {seq_len:,} tokens: the rate of "
        "each step of the kernel. Dashed lines: torch's flash and cuDNN backends and a large "
        "matrix product."
    )


@figure(width=7.6, height=3.8, cols=2, sharey=True)
def flash_rates(axes: Any, result: Any, *, causal: bool = False) -> str:
    """Rate against seq_len, by head_dim, beside the rate of a large matrix product.

    Parameters
    ----------
    result : of the experiment ``flash_forward``, or its record.
    causal : which rows.
    """
    t = theme()
    series = {"ours": ("labkit", t.blue), "flash": (_OTHERS["flash"], t.vermilion)}
    series |= {"cudnn": (_OTHERS["cudnn"], t.green), "naive": ("naive", t.muted)}
    ceilings = _ceilings(result)
    # One height for both panels, before the labels are placed in it.
    shown = [r for r in result.select(part="steps", causal=causal) if r["name"] in series]
    top = max([0.0, *(r.get("rate", 0.0) for r in shown), *ceilings.values()])
    for ax, d in zip(axes, (64, 128), strict=True):
        ax.set_ylim(0, 1.08 * top or 1)
        labels = []
        for name, (label, colour) in series.items():
            rows = [
                r
                for r in result.select(part="steps", name=name, head_dim=d, causal=causal)
                if "rate" in r
            ]
            if not rows:
                continue
            rows.sort(key=lambda r: r["seq_len"])
            x, y = [r["seq_len"] for r in rows], [r["rate"] for r in rows]
            ax.plot(x, y, "o-", color=colour)
            labels.append((x[-1], y[-1], label, colour))
        if not labels:
            raise ArgumentError("result", f"d = {d}", "has no rates.", "Pass a GPU's.")
        size_axis(ax, "x", label="seq_len (tokens)", every=2)
        first, last = ax.lines[0].get_xdata()[0], max(x for x, *_ in labels)
        for label, rate in ceilings.items():
            dashes = {"color": t.ink, "linewidth": 1.2, "linestyle": (0, (4, 3))}
            ax.plot([first, last], [rate] * 2, **dashes)
            labels.append((last, rate, label, t.ink))
        end_labels(ax, labels, room=0.4)
        ax.set_title(f"d = {d}")
    _rate_axis(axes[0], "y", "rate (FLOP/s)")
    return (
        "Rate against seq_len in two panels, head_dim 64 and 128: labkit's kernel, torch's flash "
        "and cuDNN backends, naive attention, and dashed lines for a large matrix product, in a "
        "burst and sustained."
    )


@figure(width=7.2, height=4.2)
def score_clocks(ax: Axes, clocks: Mapping[str, Mapping[str, float]], *, title: str = "") -> str:
    """What one score takes of each unit of an SM, in clocks: grouped bars, the longest marked.

    Parameters
    ----------
    clocks : name of a kernel to ``Resources.clocks_per_score()``.
    """
    if not clocks:
        raise ArgumentError("clocks", clocks, "is empty.", "Pass at least one kernel.")
    t = theme()
    units = list(dict.fromkeys(unit for of in clocks.values() for unit in of))
    colours = dict(zip(units, (t.blue, t.orange, t.vermilion, t.purple), strict=False))
    height = 0.8 / len(units)
    for place, of in enumerate(clocks.values()):
        longest = max(of, key=of.__getitem__)
        for i, unit in enumerate(units):
            if unit not in of:
                continue
            y = place + (i - (len(units) - 1) / 2) * height
            ax.barh(y, of[unit], height=height * 0.92, color=t.paper)  # hides the grid
            ax.barh(y, of[unit], height=height * 0.92, color=colours[unit],
                    alpha=1.0 if unit == longest else 0.5)  # fmt: skip
            if place == 0 or unit == longest:
                ax.annotate(
                    unit, (of[unit], y), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize=8.5, color=colours[unit],
                )  # fmt: skip
    ax.set_yticks(range(len(clocks)), list(clocks))
    ax.invert_yaxis()
    ax.set_xlim(0, max(v for of in clocks.values() for v in of.values()) * 1.22)
    ax.set_xlabel("clocks of one SM per score")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    if title:
        ax.set_title(title)
    return (
        f"Grouped horizontal bars for {', '.join(clocks)}: clocks of one SM per score for "
        f"{', '.join(units)}. The longest of each group is a lower bound on its time."
    )


@figure(width=7.6, height=3.9, cols=2, sharey=True)
def flash_resources(axes: Any, rows: Sequence[Any]) -> str:
    """Shared memory and registers of kernels, against the limits of each architecture.

    Parameters
    ----------
    rows : ``labkit.flash.resources.Resources``; what did not compile is left out.
    """
    from labkit.flash.resources import REGISTERS_PER_THREAD

    t = theme()
    rows = [r for r in rows if hasattr(r, "registers")]
    if not rows:
        raise ArgumentError("rows", rows, "is empty.", "Pass resources that compiled.")
    names = [f"{r.kernel}, {r.arch}" for r in rows]
    for place, r in enumerate(rows):
        shared, registers = axes
        shared.barh(place, r.shared_bytes, color=t.blue, height=0.66)
        shared.plot([r.shared_limit] * 2, [place - 0.42, place + 0.42], color=t.vermilion, lw=2.2)
        registers.barh(place, r.registers, color=t.green if not r.spill_bytes else t.orange,
                       height=0.66)  # fmt: skip
        if r.spill_bytes:
            registers.annotate(
                f"spills {r.spill_bytes} B", (r.registers, place), xytext=(-4, 0), fontsize=8,
                textcoords="offset points", va="center", ha="right", color=t.paper,
            )  # fmt: skip
    axes[1].axvline(REGISTERS_PER_THREAD, color=t.vermilion, lw=2.2)
    for ax in axes:
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    most = max(max(r.shared_bytes, r.shared_limit) for r in rows)
    linear_bytes(axes[0], "x", most, "shared memory of a program")
    axes[1].set_xlabel("registers per thread")
    axes[1].set_xlim(0, 270)
    return (
        f"Two panels of horizontal bars for {', '.join(names)}: shared memory of a program with "
        "the architecture's limit as a mark, and registers per thread with the limit of 255 as a "
        "line; bars of kernels that spill are labelled."
    )
