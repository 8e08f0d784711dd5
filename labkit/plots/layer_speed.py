"""A layer forward: time against length, what launching costs, and the product of speed-ups
(chapter 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import end_labels, seconds_axis, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme
from labkit.units import format_seconds, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["layer_gaps", "layer_launch", "layer_speedups", "layer_times", "speedup_product"]

#: configuration → (label, colour, marker, dashes)
_LOOKS = {
    "original": ("original", "vermilion", "o", "-"),
    "original_tf32": ("original, TF32", "vermilion", "v", ":"),
    "original_half": ("original, half", "orange", "^", "-"),
    "sdpa": ("SDPA", "blue", "s", "-"),
    "sdpa_tf32": ("SDPA, TF32", "blue", "v", ":"),
    "sdpa_half": ("SDPA, half", "green", "D", "-"),
    "sdpa_autocast": ("SDPA, autocast", "purple", "P", "--"),
    "flash": ("labkit.flash", "sky", "s", "--"),
    "flash_half": ("labkit.flash, half", "sky", "D", "-"),
}


def _series(result: Any, prefix: str) -> tuple[list[int], list[float]]:
    from labkit.experiments.layer_forward import series

    return series(result, prefix)


def _nothing(what: str, experiment: str = "layer_forward") -> ArgumentError:
    return ArgumentError(
        "result", what, "has nothing to draw.", f"Run the experiment {experiment} on a GPU."
    )


def _lines(ax: Axes, result: Any, prefix: str, names: Sequence[str]) -> list[tuple]:
    """One line for each configuration that there is; their end labels."""
    t, labels = theme(), []
    for name in names:
        x, y = _series(result, f"{prefix}.{name}")
        if not x:
            continue
        label, colour, marker, dash = _LOOKS[name]
        colour = getattr(t, colour)
        ax.plot(x, y, color=colour, marker=marker, ls=dash, markerfacecolor=t.paper)
        labels.append((x[-1], y[-1], label, colour))
    if not labels:
        raise _nothing(f"no keys {prefix}.*")
    return labels


@figure(width=7.2, height=4.4)
def layer_times(
    ax: Axes,
    result: Any,
    *,
    size: str = "report",
    configs: Sequence[str] = ("original", "original_half", "sdpa", "sdpa_half", "flash_half"),
    claimed: bool = True,
    where: str = "",
) -> str:
    """Time of one call against seq_len, one line for each configuration.

    Parameters
    ----------
    result : of the experiment ``layer_forward``, or its record.
    size : one of its ``SIZES``.
    configs : some of its ``CONFIGS``.
    claimed : also draw what source 001 states for another card, grey (only at the report's size).
    where : name of the machine, for the title.
    """
    from labkit.experiments.layer_forward import CLAIMED

    t = theme()
    labels = _lines(ax, result, f"time.{size}", configs)
    if claimed and size == "report":
        for which, text, marker in ((0, "its original", "o"), (1, "its flash", "s")):
            x, y = list(CLAIMED), [row[which] for row in CLAIMED.values()]
            ax.plot(x, y, color=t.muted, marker=marker, ls=(0, (2, 2)), lw=1.2, zorder=1)
            ax.annotate(text, (x[-1], y[-1]), xytext=(0, 8), textcoords="offset points", size=8.5,
                        ha="center", color=t.muted)  # fmt: skip
    size_axis(ax, "x", label="seq_len (tokens)", every=1)
    seconds_axis(ax, "y", label="time of one call")
    end_labels(ax, labels, room=0.28)
    if where:
        ax.set_title(where)
    also = " Grey, dashed: what the report states for an RTX 3060." if claimed else ""
    return (
        "Time of one call against seq_len, both axes logarithmic: "
        f"{', '.join(text for *_, text, _ in labels)}. All are level on the left and fan out on "
        f"the right, where the time of each grows two- to four-fold with each doubling.{also}"
    )


@figure(width=7.6, height=3.9, cols=2, sharey=True)
def layer_launch(
    axes: Any,
    result: Any,
    *,
    size: str = "report",
    configs: tuple[str, str] = ("original", "sdpa_half"),
) -> str:
    """Where launching is what takes the time: the call, its graph, the GPU's and the host's part.

    Parameters
    ----------
    result, size : as for :func:`layer_times`.
    configs : one for each panel.
    """
    t = theme()
    ways = (
        ("time", "one call", t.vermilion, "o", "-"),
        ("host", "host, to queue it", t.muted, "", (0, (1, 1.5))),
        ("graph", "as a CUDA graph", t.blue, "s", "-"),
        ("gpu", "GPU alone", t.green, "D", (0, (4, 3))),
    )
    found = []
    for ax, name in zip(axes, configs, strict=True):
        labels = []
        for key, text, colour, marker, dash in ways:
            x, y = _series(result, f"{key}.{size}.{name}")
            if not x:
                continue
            ax.plot(x, y, color=colour, marker=marker, ls=dash, markerfacecolor=t.paper)
            labels.append((text, colour, x[0], y[0]))
        if len(labels) < 2:
            raise _nothing(f"{size}.{name}")
        found.append(labels)
        size_axis(ax, "x", label="seq_len (tokens)", every=2)
        if f"ends.{size}.{name}" in result:
            left = ax.get_xlim()[0]
            ax.axvspan(left, result.value(f"ends.{size}.{name}"), color=t.panel, zorder=0)
            ax.set_xlim(left=left)
        seconds_axis(ax, "y", label="")
        label, *_ = _LOOKS[name]
        ax.set_title(label)
    axes[0].set_ylabel("time")
    for place, (text, colour, _, _) in enumerate(found[0]):
        axes[0].annotate(text, (0.04, 0.95 - 0.075 * place), xycoords="axes fraction", size=9,
                         color=colour, va="top")  # fmt: skip
    return (
        "Two panels, time against seq_len on logarithmic axes: one call on an idle GPU, what the "
        "host needs to queue it, a CUDA graph of the same kernels, and the GPU alone. In the "
        "shaded part on the left the first two are nearly level and close to each other, and the "
        "other two lie below; on the right the call, the graph and the GPU alone become one line."
    )


@figure(width=7.4, height=3.4)
def layer_gaps(
    ax: Axes,
    result: Any,
    *,
    size: str = "report",
    configs: Sequence[str] = ("original", "sdpa_half"),
    lengths: Sequence[int] = (128, 2048),
) -> str:
    """Kernels of one call as the profiler saw them: a bar for each, nothing where none runs.

    Parameters
    ----------
    result, size : as for :func:`layer_times`.
    configs, lengths : one strip for each pair that the profile was kept for.
    """
    t = theme()
    strips = [
        (name, n, row["timeline"])
        for n in lengths
        for name in configs
        for row in result.select(part="launch", size=size, name=name, seq_len=n)
        if row.get("timeline")
    ]
    if not strips:
        raise _nothing("no timeline")
    longest = max(start + span for *_, line in strips for start, span in line)
    for place, (name, _, line) in enumerate(strips):
        _, colour, *_ = _LOOKS[name]
        end = max(start + span for start, span in line)
        ax.plot([0, end], [place, place], color=t.grid, lw=1, zorder=1)
        # a kernel of a microsecond on a strip of hundreds is still a line to see
        spans = [(start, max(span, longest / 500)) for start, span in line]
        ax.broken_barh(spans, (place - 0.3, 0.6), facecolors=getattr(t, colour), linewidth=0)
        busy = sum(span for _, span in line) / end
        ax.annotate(f"{busy * 100:.0f} % busy", (end, place), xytext=(6, 0), va="center",
                    textcoords="offset points", size=9)  # fmt: skip
    ax.set_yticks(range(len(strips)), [f"{_LOOKS[name][0]}, N = {n:,}" for name, n, _ in strips])
    ax.invert_yaxis()
    ax.set_xlim(0, longest * 1.16)
    from matplotlib.ticker import FuncFormatter

    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_seconds(v * 1e-6) if v else "0"))
    ax.set_xlabel("since the first kernel of the call")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    return (
        "Strips, one for each configuration and length, with a bar for each kernel of one call "
        "against time. Short sequences: thin bars with wide gaps. Longer ones: wider bars and "
        "fewer gaps."
    )


@figure(width=7.2, height=4.0)
def layer_speedups(
    ax: Axes,
    result: Any,
    *,
    size: str = "report",
    configs: Sequence[str] = ("sdpa", "sdpa_half", "flash", "flash_half"),
    gpu: bool = False,
    where: str = "",
) -> str:
    """How many times faster than the original, against seq_len; the report's figures beside.

    Parameters
    ----------
    result, size, configs, where : as for :func:`layer_times`.
    gpu : the GPU's own time instead of that of a call.
    """
    from labkit.experiments.layer_forward import CLAIMED

    t = theme()
    labels = _lines(ax, result, f"{'speedup_gpu' if gpu else 'speedup'}.{size}", configs)
    if size == "report":
        x, y = list(CLAIMED), [a / b for a, b in CLAIMED.values()]
        ax.plot(x, y, color=t.ink, marker="X", ls="none", zorder=3)
        ax.annotate("the report", (x[2], y[2]), xytext=(0, 8), textcoords="offset points",
                    ha="center", size=9, color=t.ink)  # fmt: skip
    size_axis(ax, "x", label="seq_len (tokens)", every=1)
    size_axis(ax, "y", label="times faster than the original", every=1)
    ax.yaxis.set_major_formatter(lambda v, _: f"{significant(v, 2)}×")
    ax.axhline(1, color=t.muted, lw=1, zorder=0.6)
    end_labels(ax, labels, room=0.28)
    if where:
        ax.set_title(where)
    return (
        "Times faster than the original against seq_len, both axes logarithmic: "
        f"{', '.join(text for *_, text, _ in labels)}; crosses mark what the report states for an "
        "RTX 3060. A line at one: below it, slower. On the left all are nearly level; those in "
        "half precision rise on the right."
    )


@figure(width=7.6, height=3.9, cols=2)
def speedup_product(
    axes: Any, result: Any, *, size: str = "report", kind: str = "sdpa", gpu: bool = False
) -> str:
    """The two speed-ups, their product, and both at once; and what the product is off by.

    Parameters
    ----------
    result : of the experiment ``products``, or its record.
    size : of the stack.
    kind : ``"sdpa"`` or ``"flash"``: whose flash.
    gpu : the GPU's own time instead of that of a call.
    """
    t = theme()
    left, right = axes
    # only the GPU's own time is a sum of parts, and so only it can be taken apart
    apart = bool(_series(result, f"mixing_gpu.{size}.{kind}")[0])
    lines = (
        ("a", "a: flash", t.blue, "s", "-"), ("b", "b: half", t.orange, "^", "-"),
        ("product", "a · b", t.vermilion, "o", "--"),
        ("direct", "both, measured", t.green, "D", "-"),
    )  # fmt: skip
    off = (
        ("product_over_direct", "a · b / both", t.vermilion, "o", "-"),
        ("mixing", "Amdahl’s part", t.purple, "s", "--"),
        ("inside", "inside attention", t.sky, "D", "--"),
    )
    for ax, group, of_gpu in ((left, lines, gpu), (right, off, apart)):
        labels = []
        for key, text, colour, marker, dash in group:
            behind = "_gpu" if of_gpu else ""
            x, y = _series(result, f"{key}{behind}.{size}.{kind}")
            if x:
                ax.plot(x, y, color=colour, marker=marker, ls=dash, markerfacecolor=t.paper)
                labels.append((x[-1], y[-1], text, colour))
        if not labels:
            raise _nothing(f"{size}.{kind}", "products")
        size_axis(ax, "x", label="seq_len (tokens)", every=2)
        size_axis(ax, "y", label="", every=1)
        ax.yaxis.set_major_formatter(lambda v, _: f"{significant(v, 2)}×")
        ax.axhline(1, color=t.muted, lw=1, zorder=0.6)
        end_labels(ax, labels, room=0.45)
    left.set_title("speed-up over the original")
    right.set_title("product over measured")
    return (
        "Two panels against seq_len, all axes logarithmic. Left: the speed-up by flash, by half "
        "precision, their product, and both measured together. Right: the product over the "
        "measured one, and its two factors, Amdahl's law and what happens inside attention. Where "
        "speed-ups multiplied, the right panel would be level at one."
    )
