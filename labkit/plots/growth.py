"""What grows: power laws, this machine beside the record, launch overhead (chapter 02)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError, check_choice
from labkit.plots.axes import bytes_axis, end_labels, seconds_axis, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme
from labkit.units import significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["growth", "here_beside_recorded", "launch_overhead", "rate_text", "scaling_fit"]


@figure(height=3.9)
def scaling_fit(
    ax: Axes,
    series: Sequence[Mapping[str, Any]],
    *,
    x: str,
    y: str,
    kind: str = "bytes",
    title: str = "",
) -> str:
    """Measured points on two logarithmic axes, with the fitted power laws.

    Parameters
    ----------
    series : dicts with ``label``, ``x`` and ``y`` (sequences), and optionally ``fit``, an
        object with ``exponent``, ``coefficient`` and ``range`` (what
        ``labkit.experiments.scaling.fit_power`` gives), ``low`` and ``high`` (spread of each
        y), ``muted`` (drawn as background), ``dashed``.
    x, y : axis labels, with units.
    kind : "bytes" or "seconds": the unit of y.
    """
    t = theme()
    check_choice("kind", kind, ("bytes", "seconds"))
    markers = "osD^vP"
    labels = []
    for index, one in enumerate(series):
        colour = t.muted if one.get("muted") else t.cycle[index % len(t.cycle)]
        marker = markers[index % len(markers)]
        style = "--" if one.get("dashed") else "-"
        xs, ys = list(one["x"]), list(one["y"])
        if "low" in one:
            ax.fill_between(xs, one["low"], one["high"], color=colour, alpha=0.18, linewidth=0)
        fit = one.get("fit")
        ax.plot(
            xs,
            ys,
            color=colour,
            marker=marker,
            linestyle="none" if fit else style,
            markerfacecolor=t.paper,
            markeredgewidth=1.4,
            zorder=3,
        )
        text = one["label"]
        if fit is not None:
            first, last = fit.range
            line = [first, last]
            ax.plot(line, [fit(v) for v in line], color=colour, linestyle=style)
            text += f"\nexponent {fit.exponent:.2f}"
        labels.append((xs[-1], ys[-1], text, colour))
    size_axis(ax, "x", label=x)
    if kind == "bytes":
        bytes_axis(ax, "y", label=y)
    else:
        seconds_axis(ax, "y", label=y)
    end_labels(ax, labels, room=0.27)
    if title:
        ax.set_title(title)
    names = "; ".join(one["label"] for one in series)
    return f"Points and fitted lines on two logarithmic axes, {y} against {x}: {names}."


@figure(height=3.9)
def here_beside_recorded(
    ax: Axes,
    here: Sequence[tuple[float, float]] | None,
    recorded: Sequence[tuple[float, float]],
    *,
    x: str,
    y: str,
    kind: str = "seconds",
    here_label: str = "this machine",
    recorded_label: str = "NVIDIA H200, recorded",
) -> str:
    """The machine at hand (points) beside the recorded one (line).

    Parameters
    ----------
    here, recorded : ``(x, y)`` pairs, x a size; ``here`` may be None.
    x, y : axis labels, with units.
    kind : "bytes", "seconds" or "rate" (B/s or FLOP/s, decimal prefixes).
    """
    from matplotlib.ticker import FuncFormatter

    t = theme()
    check_choice("kind", kind, ("bytes", "seconds", "rate"))
    labels = []
    for pairs, label, colour, style in (
        (recorded, recorded_label, t.muted, "-"),
        (here, here_label, t.blue, "none"),
    ):
        if not pairs:
            continue
        xs, ys = zip(*sorted(pairs), strict=True)
        ax.plot(
            xs, ys, color=colour, linestyle=style, marker="o", markerfacecolor=t.paper, zorder=3
        )
        labels.append((xs[-1], ys[-1], label, colour))
    size_axis(ax, "x", label=x)
    if kind == "bytes":
        bytes_axis(ax, "y", label=y)
    elif kind == "seconds":
        seconds_axis(ax, "y", label=y)
    else:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: rate_text(v)))
        ax.set_ylabel(y)
    end_labels(ax, labels, room=0.27)
    both = f"{recorded_label} as a line, {here_label} as points" if here else recorded_label
    return f"{y} against {x}, both logarithmic: {both}."


def rate_text(value: float) -> str:
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{significant(value / scale)} {prefix}"
    return significant(value)


# -- what grows (chapter 02) ------------------------------------------------------------


@figure(width=7.6, height=3.7, cols=2)
def growth(axes: Any, result: Any, *, where: str = "") -> str:
    """Peak memory and time as one size at a time grows, each divided by where it starts.

    Parameters
    ----------
    result : a result or record of the experiment ``scaling``.
    where : name of the machine, for the title of the panel of times.
    """
    from labkit.experiments import scaling

    t = theme()
    panels = (("measured_bytes", "peak memory"), ("seconds", f"time, {where}" if where else "time"))
    for ax, (y, title) in zip(axes, panels, strict=True):
        labels = []
        for index, knob in enumerate(scaling.KNOBS):
            x, values = scaling.series(result, knob, y)
            fit = scaling.fit_power(x, values)
            start = x.index(fit.range[0])
            base = fit(x[start])
            xs = [v / x[start] for v in x[start:]]
            ax.plot(
                xs,
                [v / base for v in values[start:]],
                color=t.cycle[index],
                marker="osD^"[index],
                markerfacecolor=t.paper if knob != "heads" else t.cycle[index],
                markersize=7 if knob == "batch" else 4.5,
                linestyle="none",
                zorder=3,
            )
            line = [xs[0], xs[-1]]
            dash = (0, (4, 3)) if knob == "heads" else "-"
            ax.plot(line, [fit(v * x[start]) / base for v in line], color=t.cycle[index], ls=dash)
            text = f"{knob}  {fit.exponent:.2f}".replace("-", "−")
            labels.append((xs[-1], fit(x[-1]) / base, text, t.cycle[index]))
        size_axis(ax, "x", label="size, × its smallest")
        size_axis(ax, "y", label="× the smallest", every=1)
        ax.set_title(title)
        end_labels(ax, labels, room=0.42)
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
    return (
        "Two panels on logarithmic axes, peak memory and time against the factor by which seq_len, "
        "batch, heads or head_dim grows. In memory, seq_len rises with slope two, batch and heads "
        "with slope one, head_dim stays level. The fitted exponent stands beside each line."
    )


@figure(height=4.0)
def launch_overhead(ax: Axes, result: Any, *, label: str = "") -> str:
    """Time of attention with one head against seq_len: flat while launching is what takes time.

    Parameters
    ----------
    result : a result or record of the experiment ``scaling``.
    label : name of the machine, for the title.
    """
    from labkit.experiments import scaling

    t = theme()
    ways = (
        ("eager", "one call after another, from Python", t.vermilion, "o", "-"),
        ("graph", "the same kernels as one CUDA graph", t.blue, "s", "-"),
        ("queued", "what the GPU needs once they are queued", t.green, "D", (0, (4, 3))),
    )
    found, times = [], []
    for how, text, colour, marker, dash in ways:
        x, y = scaling.series(result, "one_head", how=how)
        if not x:
            continue
        ax.plot(x, y, color=colour, ls=dash, marker=marker, markerfacecolor=t.paper, zorder=3)
        flat = scaling.flat_until(x, y)
        level = [v for n, v in zip(x, y, strict=True) if n <= flat]
        below = how == "queued"  # the graph's curve runs just above it
        found.append((text, colour, x[0], min(level) if below else max(level), below))
        if how == "eager":
            ax.plot(x, [y[-1] * (v / x[-1]) ** 2 for v in x], color=t.muted, lw=1.2, ls=(0, (1, 2)))
            ax.axvspan(x[0] / 1.2, flat, color=t.panel, zorder=0)
            ax.set_xlim(x[0] / 1.2, x[-1] * 1.3)
        times += y
    if not found:
        raise ArgumentError(
            "result", "no rows of 'one_head'", "has nothing to draw.", "Run the experiment scaling."
        )
    ax.set_ylim(min(times) / 2.2, max(times) * 2)
    size_axis(ax, "x", label="seq_len (tokens), one batch element, one head")
    seconds_axis(ax, "y", label="time of one call")
    for text, colour, x, y, below in found:
        short = text if len(found) > 1 else "one call"
        place = {"xytext": (2, -9), "va": "top"} if below else {"xytext": (2, 7)}
        ax.annotate(short, (x, y), textcoords="offset points", color=colour, size=9, **place)
    if label:
        ax.set_title(label)
    curves = "; ".join(text for text, *_ in found)
    return (
        "Time against seq_len on logarithmic axes, one batch element and one head, with a dotted "
        f"line of slope two. Curves: {curves}. On the left the first is level, on the right all "
        "approach the dotted line."
    )
