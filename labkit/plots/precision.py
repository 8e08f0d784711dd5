"""What number formats cost: roundings, errors, limits, loss scales, training (chapter 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError, check_choice
from labkit.plots.axes import end_labels, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "loss_scales",
    "overflow_limits",
    "precision_errors",
    "rounding_places",
    "training_loss",
    "training_parts",
]

_PLACES = {
    "inputs": "Q, K, V", "scores": "S", "probabilities": "P", "output": "O", "sums": "sums",
    "all": "all",
}  # fmt: skip
_NUMBERS = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "tf32x3": "tf32x3", "tf32": "TF32"
}  # fmt: skip
_OPTIONS = {
    "softmax32": "softmax fp32", "scale_first": "scale first", "no_maximum": "no maximum",
    "sum16": "sums fp16",
}  # fmt: skip
_PRECISIONS = {
    "fp32": "fp32", "tf32": "TF32", "autocast_fp16": "autocast fp16",
    "autocast_bf16": "autocast bf16", "fp16": "pure fp16", "bf16": "pure bf16",
}  # fmt: skip


def _number(way: str) -> str:
    return way.split(".")[1]


def _label(way: str) -> str:
    """``naive.float16.softmax32`` as people say it."""
    family, number, *option = way.split(".")
    return ", ".join([f"{family} {_NUMBERS[number]}", *(_OPTIONS[o] for o in option)])


def _colour(way: str) -> str:
    t = theme()
    of = {"float32": t.blue, "tf32": t.purple, "tf32x3": t.sky, "float16": t.vermilion,
          "bfloat16": t.green}  # fmt: skip
    return of[_number(way)]


def _rows(result: Any, part: str) -> list[Mapping[str, Any]]:
    rows = result.select(part=part)
    if not rows:
        raise ArgumentError(
            "result", f"part {part!r}", "was not measured.", "Run precision with that part."
        )
    return rows


def _error_axis(ax: Axes, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def text(value: float, _position: int | None = None) -> str:
        import math

        power = round(math.log10(value))
        return "1" if power == 0 else "10" + str(power).translate(superscript)

    ax.yaxis.set_major_formatter(FuncFormatter(text))
    ax.set_ylabel(label)


def _powers_of_two(ax: Axes, most: int) -> None:
    """Ticks 1, 2⁸, 2¹⁶ … on an axis of sizes."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    digits = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    ax.xaxis.set_major_locator(FixedLocator([2.0**p for p in range(0, most + 1, 8)]))
    ax.xaxis.set_major_formatter(
        FuncFormatter(
            lambda v, _: f"2{str(round(v).bit_length() - 1).translate(digits)}" if v > 1 else "1"
        )
    )


@figure(width=7.6, height=3.9, cols=2, sharey=True)
def rounding_places(
    axes: Any, result: Any, *, formats: Sequence[str] = ("float16", "bfloat16")
) -> str:
    """The error of O when one place alone is rounded, against the size of the scores.

    Parameters
    ----------
    result : of the experiment ``precision``, or its record.
    formats : two of its formats, a panel for each.
    """
    t = theme()
    rows = _rows(result, "rounding")
    colours = {"inputs": t.blue, "scores": t.vermilion, "probabilities": t.orange,
               "sums": t.purple, "output": t.green, "all": t.ink}  # fmt: skip
    for ax, name in zip(axes, formats, strict=True):
        labels = []
        for place, colour in colours.items():
            points = sorted(
                (r["sigma"], r["relative"]) for r in rows
                if r["format"] == name and r["place"] == place and r["relative"] is not None
            )  # fmt: skip
            if not points:
                continue
            x, y = zip(*points, strict=True)
            dashes = {"linestyle": (0, (4, 3))} if place == "all" else {}
            ax.plot(x, y, marker="o", markersize=4, color=colour, **dashes)
            labels.append((x[-1], y[-1], _PLACES[place], colour))
        _error_axis(ax, "relative error of O" if ax is axes[0] else "")
        size_axis(ax, "x", label="standard deviation of the scores")
        ax.set_title(_NUMBERS[name])
        end_labels(ax, labels, room=0.24)
    return (
        f"Two panels, {' and '.join(_NUMBERS[f] for f in formats)}: the error of O against the "
        "standard deviation of the scores, both axes logarithmic, with one line for each place "
        "that is rounded alone: Q, K, V; S; P; the sums of products; O; and a dashed line for all "
        "of them. The line of the scores climbs, those of P and O do not."
    )


#: drawn by ``precision_errors`` unless told otherwise
_SHOWN = (
    "naive.float32", "labkit.tf32x3", "naive.tf32", "naive.float16", "labkit.float16",
    "naive.bfloat16", "labkit.bfloat16",
)  # fmt: skip


@figure(width=7.6, height=4.6, cols=2, sharey=True)
def precision_errors(
    axes: Any,
    result: Any,
    *,
    tensor: str = "o",
    against: str = "relative",
    ways: Sequence[str] = _SHOWN,
) -> str:
    """Error against float64 by way of computing, over the length and over the size of the scores.

    Parameters
    ----------
    result : of the experiment ``precision``, or its record.
    tensor : ``"o"``, ``"dq"``, ``"dk"`` or ``"dv"``.
    against : ``"relative"``: float64 on the rounded inputs; ``"whole"``: on the inputs as drawn.
    ways : names of its ways; those that were not measured are left out.
    """
    t = theme()
    check_choice("tensor", tensor, ("o", "dq", "dk", "dv"))
    check_choice("against", against, ("relative", "whole"))
    rows = [r for r in _rows(result, "error") if r[tensor][against] is not None]
    fixed = max((r["seq_len"] for r in rows if r["sigma"] != 1), default=None)
    panels = (
        ("seq_len", "seq_len (tokens)", [r for r in rows if r["sigma"] == 1]),
        ("sigma", "standard deviation of the scores", [r for r in rows if r["seq_len"] == fixed]),
    )
    for ax, (key, label, chosen) in zip(axes, panels, strict=True):
        labels = []
        for way in ways:
            points = sorted((r[key], r[tensor][against]) for r in chosen if r["way"] == way)
            if not points:
                continue
            x, y = zip(*points, strict=True)
            ours = way.startswith("labkit")
            ax.plot(x, y, "o-" if ours else "s--", color=_colour(way), markersize=4,
                    markerfacecolor=_colour(way) if ours else t.paper)  # fmt: skip
            labels.append((x[-1], y[-1], _label(way), _colour(way)))
        if not labels:
            raise ArgumentError(
                "ways", list(ways), "were not measured.", "Pass names of the result's rows."
            )
        _error_axis(ax, f"relative error of {_tensor(tensor)}" if ax is axes[0] else "")
        size_axis(ax, "x", label=label, every=2 if key == "seq_len" else None)
        if ax is axes[1]:
            end_labels(ax, labels, room=0.42)
    axes[0].set_title("scores of std 1")
    axes[1].set_title(f"N = {fixed:,}" if fixed else "")
    return (
        f"Two panels: the relative error of {_tensor(tensor)} against seq_len, and against the "
        "standard deviation of the scores, all axes logarithmic, a line for each way of computing. "
        "Over seq_len the lines of half precision are flat; over the scores those of naive "
        "attention climb. float32 lies lowest, bfloat16 highest, float16 and TF32 between them."
    )


def _tensor(name: str) -> str:
    return {"o": "O", "dq": "dQ", "dk": "dK", "dv": "dV"}[name]


@figure(width=7.4, height=4.4)
def overflow_limits(ax: Axes, result: Any, *, what: str = "o") -> str:
    """The largest product q·k, before the scale, with which the result is still finite.

    Parameters
    ----------
    result : of the experiment ``precision``, or its record.
    what : ``"o"``, or ``"grad"`` for the gradients.
    """
    t = theme()
    check_choice("what", what, ("o", "grad"))
    rows = [r for r in _rows(result, "overflow") if r[what] > 0]
    rows.sort(key=lambda r: r[what])
    most = 2.0 ** max(r["most"] for r in rows)
    for place, r in enumerate(rows):
        ax.barh(place, r[what] - 1, left=1, color=_colour(r["way"]), height=0.66)
        if r[what] >= most:
            ax.annotate(
                "and on", (r[what], place), xytext=(-5, 0), textcoords="offset points", va="center",
                ha="right", fontsize=8.5, color=t.paper,
            )  # fmt: skip
    ax.axvline(65504, color=t.ink, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.annotate(
        "65,504", (65504, -0.55), xytext=(4, 0), textcoords="offset points", va="top",
        fontsize=9, color=t.ink,
    )  # fmt: skip
    ax.set_yticks(range(len(rows)), [_label(r["way"]) for r in rows])
    ax.set_ylim(len(rows) - 0.4, -0.7)
    size_axis(ax, "x", label="largest |q·k| that leaves a finite result")
    ax.set_xlim(1, most * 2)
    _powers_of_two(ax, max(r["most"] for r in rows))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    return (
        "Horizontal bars on an axis of powers of two: the largest product of a query and a key, "
        "before the scale, with which the result is finite, for each way of computing. A dashed "
        "line marks 65,504, the largest number of float16, above which a score that is stored in "
        "float16 is infinite."
    )


@figure(width=7.4, height=4.2)
def loss_scales(ax: Axes, result: Any, *, tensor: str = "dq") -> str:
    """The error of a gradient against the factor on the loss; where it is not finite, a cross.

    Parameters
    ----------
    result : of the experiment ``precision``, or its record.
    tensor : ``"dq"``, ``"dk"`` or ``"dv"``.
    """
    t = theme()
    check_choice("tensor", tensor, ("dq", "dk", "dv"))
    rows = _rows(result, "underflow")
    labels = []
    for way in dict.fromkeys(r["way"] for r in rows):
        mine = sorted((r["power"], r[tensor]["relative"]) for r in rows if r["way"] == way)
        points = [(2.0**p, e) for p, e in mine if e is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        style = {"labkit": "o-", "naive": "s--"}.get(way.partition(".")[0], "^:")
        ax.plot(x, y, style, color=_colour(way), markersize=4.5,
                markerfacecolor=_colour(way) if style == "o-" else t.paper)  # fmt: skip
        broken = [2.0**p for p, e in mine if e is None]
        ax.plot(broken, [1.0] * len(broken), "x", color=_colour(way), markersize=7)
        labels.append((x[-1], y[-1], _label(way), _colour(way)))
    _error_axis(ax, f"relative error of {_tensor(tensor)}")
    size_axis(ax, "x", label="factor on the loss")
    _powers_of_two(ax, max(r["power"] for r in rows))
    ax.axvline(65536, color=t.ink, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.annotate(
        "where GradScaler starts", (65536, ax.get_ylim()[1]), xytext=(5, -6),
        textcoords="offset points", va="top", fontsize=9, color=t.ink,
    )  # fmt: skip
    end_labels(ax, labels, room=0.26)
    return (
        f"The relative error of {_tensor(tensor)} against the factor on the loss, both axes "
        "logarithmic. The lines of float16 fall from 1, where all is flushed to zero, to a flat "
        "bottom, and end in crosses where they overflow; those of bfloat16 are flat throughout, "
        "higher than the bottom of float16. A dashed line marks the factor that GradScaler starts "
        "with."
    )


@figure(width=7.4, height=3.8)
def training_loss(ax: Axes, result: Any) -> str:
    """The loss of a small model by step, one line for each precision of its training.

    Parameters
    ----------
    result : of the experiment ``precision``, or its record.
    """
    t = theme()
    rows = _rows(result, "training")
    colours = {"fp32": t.blue, "tf32": t.purple, "autocast_fp16": t.vermilion,
               "autocast_bf16": t.green, "fp16": t.orange, "bf16": t.sky}  # fmt: skip
    labels = []
    for r in rows:
        points = [(i, loss) for i, loss in enumerate(r["losses"], 1) if loss is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        pure = r["precision"] in ("fp16", "bf16")
        colour = colours[r["precision"]]
        ax.plot(x, y, "--" if pure else "-", color=colour)
        if len(points) < r["steps"]:
            ax.plot(x[-1:], y[-1:], "x", color=colour, markersize=8)
        labels.append((x[-1], y[-1], _PRECISIONS[r["precision"]], colour))
    ax.set_xlabel("step")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("loss")
    end_labels(ax, labels, room=0.24)
    return (
        "Loss against step, one line for each precision of training: "
        f"{', '.join(_PRECISIONS[r['precision']] for r in rows)}. Pure half precision is dashed; a "
        "cross ends a line whose loss is no number from there on."
    )


@figure(width=7.6, height=4.4)
def training_parts(
    ax: Axes, result: Any, *, configs: Sequence[str], seq_len: int, size: str = "report"
) -> str:
    """Bytes at the peak of a training step, part by part: measured, and below it predicted.

    Parameters
    ----------
    result : of the experiment ``training_step``, or its record.
    configs : of its ``CONFIGS``: ``backend.precision``.
    seq_len, size : which of its rows.
    """
    from labkit.layers.budget import PARTS
    from labkit.plots.memory import linear_bytes

    t = theme()
    colours = dict(zip(PARTS, (t.blue, t.sky, t.purple, t.green, t.vermilion, t.muted),
                       strict=True))  # fmt: skip
    longest, parts_seen = 0.0, dict.fromkeys(PARTS, 0.0)
    for place, config in enumerate(configs):
        backend, precision = config.split(".")
        rows = result.select(
            part="step", size=size, backend=backend, precision=precision, seq_len=seq_len
        )
        if not rows or f"predicted_{PARTS[0]}" not in rows[0]:
            raise ArgumentError(
                "configs", config, f"was not weighed at {size}, {seq_len} tokens.",
                "Pass some of the result's rows.",
            )  # fmt: skip
        for prefix, height, shift in (("", 0.46, -0.14), ("predicted_", 0.2, 0.24)):
            left = 0.0
            for part in PARTS:
                width = rows[0].get(prefix + part, 0)
                ax.barh(place + shift, width, left=left, height=height, color=colours[part],
                        alpha=1.0 if not prefix else 0.5)  # fmt: skip
                left += width
                parts_seen[part] = max(parts_seen[part], width)
            longest = max(longest, left)
    ax.set_yticks(range(len(configs)), [_config(c) for c in configs])
    ax.set_ylim(len(configs) - 0.4, -0.6)
    linear_bytes(ax, "x", longest, "bytes at the peak")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    shown = [part for part in PARTS if parts_seen[part] > 0.01 * longest]
    handles = [ax.barh(-9, 0, color=colours[part], label=part) for part in shown]
    ax.legend(handles=handles, loc="lower right", fontsize=9)
    return (
        f"Horizontal bars of bytes at the peak of a training step at {seq_len:,} tokens, cut into "
        f"{', '.join(PARTS)}, for {', '.join(_config(c) for c in configs)}: thick what was "
        "measured, thin and paler below it what was predicted. Each pair is equally long."
    )


def _config(name: str) -> str:
    backend, precision = name.split(".")
    return f"{backend}, {_PRECISIONS[precision]}"
