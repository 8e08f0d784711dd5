"""The backward pass: which program owns what, what it holds, how long it takes (chapter 09)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import bytes_axis, end_labels, seconds_axis, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "backward_passes",
    "backward_rates",
    "gradient_errors",
    "kernel_split",
    "ways_memory",
    "ways_time",
]

#: the ways of ``labkit.experiments.flash_backward`` and what a figure calls them
_WAYS = {
    "saved": "saved (naive)",
    "checkpointed": "checkpointed",
    "recomputed": "recomputed (labkit.flash)",
    "sdpa": "torch's flash",
}
_MARKERS = dict(zip(_WAYS, "os^D", strict=True))
_WHO = {
    "labkit": "labkit.flash",
    "triton": "plain Triton",
    "flash": "torch, flash",
    "cudnn": "torch, cuDNN",
    "naive": "plain attention",
    "efficient": "torch, efficient",
    "sdpa": "torch, fused",
}


def _band(samples: Sequence[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0]
    cuts = quantiles(samples, n=5, method="inclusive")
    return cuts[0], cuts[-1]


def _rows(result: Any, **where: Any) -> list[dict]:
    rows = result.select(**where)
    if not rows:
        raise ArgumentError(
            "result", f"no rows with {where}", "has nothing to draw.",
            "Run the experiment flash_backward.",
        )  # fmt: skip
    return rows


@figure(width=7.4, height=4.2, cols=2)
def backward_passes(axes: Any, blocks: Sequence[tuple[int, int, str]], *, owner: int = 2) -> str:
    """Which blocks of scores one program of each kernel computes, and in which order.

    Parameters
    ----------
    blocks : ``(query block, key block, "all" or "some")`` of the blocks that are visited, as
        ``labkit.flash.recompute.visible_blocks`` gives them.
    owner : the key block and the query block whose programs are drawn.
    """
    t = theme()
    if not blocks:
        raise ArgumentError("blocks", blocks, "is empty.", "Pass the blocks that are visited.")
    rows, cols = max(i for i, _, _ in blocks) + 1, max(j for _, j, _ in blocks) + 1
    panels = (
        ("a program of dK, dV: one key block", t.vermilion, lambda i, j: j == owner),
        ("a program of dQ: one query block", t.blue, lambda i, j: i == owner),
    )
    for ax, (title, colour, owns) in zip(axes, panels, strict=True):
        mine = []
        for i, j, how in blocks:
            if owns(i, j):
                mine.append((i, j))
            ax.add_patch(
                _square(j, i, colour if owns(i, j) else t.panel, t.grid, how == "some", t.muted)
            )
        for step, (i, j) in enumerate(mine, 1):
            ax.annotate(
                str(step), (j + 0.5, i + 0.5), ha="center", va="center", color=t.paper,
                fontsize=10, weight="bold",
            )  # fmt: skip
        ax.set_xlim(-0.05, cols + 0.05)
        ax.set_ylim(rows + 0.05, -0.05)
        ax.set_aspect("equal")
        ax.set_xticks([j + 0.5 for j in range(cols)], [str(j) for j in range(cols)])
        ax.set_yticks([i + 0.5 for i in range(rows)], [str(i) for i in range(rows)])
        ax.tick_params(length=0)
        ax.grid(visible=False)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.set_xlabel("key block j")
        ax.set_ylabel("query block i")
        ax.set_title(title)
    hatched = " Hatched blocks need the mask." if any(h == "some" for *_, h in blocks) else ""
    return (
        f"Two grids of {rows} query blocks by {cols} key blocks; blocks that are not visited are "
        f"left out. Left, the program that owns key block {owner} takes the blocks of its column "
        f"in order; right, the program that owns query block {owner} takes those of its "
        f"row.{hatched}"
    )


def _square(x: float, y: float, face: str, edge: str, hatched: bool, ink: str) -> Any:
    from matplotlib.patches import Rectangle

    hatch = "////" if hatched else None
    return Rectangle(
        (x + 0.03, y + 0.03), 0.94, 0.94, facecolor=face, edgecolor=ink if hatched else edge,
        hatch=hatch, linewidth=0.6,
    )  # fmt: skip


@figure(height=4.0)
def ways_memory(ax: Axes, result: Any, *, where: str = "") -> str:
    """Peak of forward and backward against N: predicted as lines, measured as points.

    Parameters
    ----------
    result : a result or record of the experiment ``flash_backward``.
    where : name of the machine, for the title.
    """
    t = theme()
    rows = _rows(result, part="ways", what="peak")
    labels = []
    for (way, name), colour in zip(_WAYS.items(), t.cycle, strict=False):
        mine = sorted((r for r in rows if r["way"] == way), key=lambda r: r["seq_len"])
        if not mine:
            continue
        x = [r["seq_len"] for r in mine]
        y = [r["predicted"] for r in mine]
        dash = "--" if way in ("checkpointed", "sdpa") else "-"
        ax.plot(x, y, color=colour, ls=dash)
        seen = [(r["seq_len"], r["measured"]) for r in mine if r["measured"] is not None]
        if seen:
            ax.plot(
                *zip(*seen, strict=True), _MARKERS[way], color=colour, zorder=3,
                markerfacecolor=t.paper, markersize=8 if way in ("saved", "recomputed") else 5,
            )  # fmt: skip
        labels.append((x[-1], y[-1], name, colour))
    size_axis(ax, "x", label="seq_len (tokens)")
    bytes_axis(ax, "y", label="peak beyond the inputs")
    if where:
        ax.set_title(where)
    end_labels(ax, labels, room=0.3)
    names = ", ".join(_WAYS[w] for w in _WAYS if any(r["way"] == w for r in rows))
    return (
        "Peak memory of forward and backward against seq_len on logarithmic axes, predicted lines "
        f"and measured points for {names}. Saved and checkpointed lie on one line of slope two, "
        "the other two on lines of slope one."
    )


@figure(width=7.6, height=3.9, cols=2)
def ways_time(axes: Any, result: Any, *, where: str = "") -> str:
    """Time of forward and of backward against N: medians, with bars from p20 to p80.

    Parameters
    ----------
    result, where : as for :func:`ways_memory`.
    """
    t = theme()
    low, high = float("inf"), 0.0
    for ax, what in zip(axes, ("forward", "backward"), strict=True):
        rows = _rows(result, part="ways", what=what)
        labels = []
        for (way, name), colour in zip(_WAYS.items(), t.cycle, strict=False):
            mine = sorted((r for r in rows if r["way"] == way), key=lambda r: r["seq_len"])
            if not mine:
                continue
            x = [r["seq_len"] for r in mine]
            y = [r["median_ms"] / 1e3 for r in mine]
            bands = [_band(r["samples_ms"]) for r in mine]
            down = [max(0.0, v - a / 1e3) for v, (a, _) in zip(y, bands, strict=True)]
            up = [max(0.0, b / 1e3 - v) for v, (_, b) in zip(y, bands, strict=True)]
            ax.errorbar(
                x, y, yerr=[down, up], color=colour, marker=_MARKERS[way], capsize=2,
                markerfacecolor=t.paper, ls="--" if way == "checkpointed" else "-",
            )  # fmt: skip
            labels.append((x[-1], y[-1], name.replace(" (", "\n("), colour))
            low, high = min(low, *y), max(high, *y)
        size_axis(ax, "x", label="seq_len (tokens)", every=2)
        seconds_axis(ax, "y", label="time")
        ax.set_title(what + (f", {where}" if where else ""))
        end_labels(ax, labels, room=0.4, size=8.5)
    for ax in axes:
        ax.set_ylim(low / 1.6, high * 1.6)
        seconds_axis(ax, "y", label="time")
    return (
        "Two panels, time of the forward and of the backward pass against seq_len on logarithmic "
        "axes, a line for each way to come by P: saved, checkpointed, recomputed, torch's flash. "
        "Bars span the 20th to the 80th percentile."
    )


@figure(width=7.6, height=4.2)
def backward_rates(ax: Axes, result: Any, *, ceiling: float | None = None, where: str = "") -> str:
    """Rate of the backward pass, five products over its time, by implementation and problem.

    Parameters
    ----------
    result, where : as for :func:`ways_memory`; rows of part ``"sweep"``.
    ceiling : FLOP/s of a large matrix product on this card, drawn as a line.
    """
    t = theme()
    rows = _rows(result, part="sweep")
    cases = sorted({(r["head_dim"], r["causal"], r["seq_len"]) for r in rows})
    colours = dict(zip(("labkit", "triton", "flash", "cudnn"), t.cycle, strict=False))
    markers = dict(zip(colours, "o^sD", strict=True))
    names = []
    for shift, (who, colour) in enumerate(colours.items()):
        points = []
        for place, case in enumerate(cases):
            for r in rows:
                if r["who"] == who and (r["head_dim"], r["causal"], r["seq_len"]) == case:
                    flops = r["flops"] / 1e12
                    fast, slow = _band(r["samples_ms"])
                    points.append((place, flops / (r["median_ms"] / 1e3), flops / (slow / 1e3),
                                   flops / (fast / 1e3)))  # fmt: skip
        if not points:
            continue
        x = [p[0] + (shift - 1.5) * 0.14 for p in points]
        y = [p[1] for p in points]
        down = [max(0.0, p[1] - p[2]) for p in points]
        up = [max(0.0, p[3] - p[1]) for p in points]
        ax.errorbar(
            x, y, yerr=[down, up], ls="none", marker=markers[who], color=colour, capsize=2,
            markersize=6, label=_WHO[who], markerfacecolor=colour if who == "labkit" else t.paper,
        )  # fmt: skip
        names.append(_WHO[who])
    if ceiling:
        ax.axhline(ceiling / 1e12, color=t.muted, lw=1, ls=(0, (4, 3)))
        ax.annotate(
            "matrix product", (len(cases) - 0.55, ceiling / 1e12), xytext=(0, 3), ha="right",
            textcoords="offset points", color=t.muted, fontsize=8.5,
        )  # fmt: skip
    for place in range(1, len(cases)):
        if cases[place][:2] != cases[place - 1][:2]:
            ax.axvline(place - 0.5, color=t.grid, lw=1)
    ax.set_xticks(range(len(cases)), [f"{n // 1024}k" for _, _, n in cases])
    groups = sorted({c[:2] for c in cases})
    for d, causal in groups:
        places = [i for i, c in enumerate(cases) if c[:2] == (d, causal)]
        ax.annotate(
            f"d = {d}\n{'causal' if causal else 'full'}", (sum(places) / len(places), 0),
            xycoords=("data", "axes fraction"), xytext=(0, -22), textcoords="offset points",
            ha="center", va="top", fontsize=9,
        )  # fmt: skip
    ax.set_xlim(-0.55, len(cases) - 0.45)
    ax.set_ylim(bottom=0)
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("backward, TFLOP/s (5 products)")
    if where:
        ax.set_title(where, pad=26)
    ax.legend(loc="lower left", ncols=4, fontsize=8.5, bbox_to_anchor=(0, 1), borderaxespad=0.2,
              handletextpad=0.3, columnspacing=1.2)  # fmt: skip
    ax.set_xlabel(" \n ")  # room for the names of the groups
    return (
        "Rate of the backward pass in TFLOP/s for groups of head_dim and mask, within each at "
        f"growing seq_len; markers for {', '.join(names)}, bars from p20 to p80"
        + (", and the rate of a large matrix product as a line." if ceiling else ".")
    )


@figure(height=3.6)
def kernel_split(ax: Axes, result: Any, *, where: str = "") -> str:
    """The time of each kernel of one backward pass, stacked, by implementation and problem.

    Parameters
    ----------
    result, where : as for :func:`ways_memory`; rows of part ``"split"``, the longest seq_len.
    """
    t = theme()
    rows = _rows(result, part="split")
    longest = max(r["seq_len"] for r in rows)
    rows = [r for r in rows if r["seq_len"] == longest and r["who"] != "cudnn"]
    colours = {"delta": t.purple, "dkdv": t.vermilion, "dq": t.blue, "whole": t.muted}
    texts = {"delta": "δ", "dkdv": "dK, dV", "dq": "dQ", "whole": "one kernel"}
    bars = sorted({(r["head_dim"], r["causal"], r["who"]) for r in rows},
                  key=lambda b: (b[0], b[1], list(_WHO).index(b[2])))  # fmt: skip
    ends, widest, drawn = [], 0.0, set()
    for place, bar in enumerate(bars):
        left = 0.0
        mine = [r for r in rows if (r["head_dim"], r["causal"], r["who"]) == bar]
        for role in (*colours, None):
            picked = [r for r in mine if (r["role"] if r["role"] in colours else None) == role]
            ms = sum(r["median_ms"] for r in picked)
            if not ms:
                continue
            ax.barh(place, ms, left=left, height=0.68, edgecolor=t.paper, linewidth=0.8,
                    color=colours.get(role, t.grid))  # fmt: skip
            drawn.add(role)
            if role in texts:
                ends.append((place, left + ms / 2, ms, texts[role]))
            left += ms
        widest = max(widest, left)
    for place, middle, ms, text in ends:
        if ms > 0.09 * widest:
            ax.annotate(text, (middle, place), ha="center", va="center", color=t.paper, fontsize=9)
    ax.set_yticks(
        range(len(bars)),
        [f"{_WHO[who]}, d = {d}{', causal' if causal else ''}" for d, causal, who in bars],
    )
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("time of the kernels (ms)")
    ax.set_title(f"N = {longest:,}" + (f", {where}" if where else ""))
    kinds = ", ".join(texts[r] for r in colours if r in drawn)
    return (
        "Stacked horizontal bars: time of each kernel of one backward pass, by implementation, "
        f"head_dim and mask. Kinds of kernels: {kinds}; what is not coloured is the rest."
    )


@figure(height=3.9)
def gradient_errors(ax: Axes, result: Any, *, logits: int = 1, where: str = "") -> str:
    """Relative error of the gradients against float64, by dtype and implementation.

    Each point is the error of dK; its bar spans the errors of dQ, dK and dV.

    Parameters
    ----------
    result, where : as for :func:`ways_memory`; rows of part ``"error"``.
    logits : the factor on the logits whose rows are drawn.
    """
    t = theme()
    rows = _rows(result, part="error", logits=logits)
    order = ("bfloat16", "float16", "tf32", "tf32x3", "float32")
    dtypes = [d for d in order if any(r["dtype"] == d for r in rows)]
    people = [w for w in _WHO if any(r["who"] == w for r in rows)]
    colours = dict(zip(people, (t.blue, t.vermilion, t.green, t.purple, t.orange), strict=False))
    markers = dict(zip(people, "osD^v", strict=False))
    seen = set()
    for place, dtype in enumerate(dtypes):
        here = [r for r in rows if r["dtype"] == dtype]
        here.sort(key=lambda r: people.index(r["who"]))
        for index, row in enumerate(here):
            values = [row[name]["relative"] for name in ("dq", "dk", "dv")]
            y = place + (index - (len(here) - 1) / 2) * 0.18
            who = row["who"]
            ax.plot([min(values), max(values)], [y, y], color=colours[who], lw=2.2)
            ax.plot(
                row["dk"]["relative"], y, markers[who], color=colours[who],
                markerfacecolor=colours[who] if who == "labkit" else t.paper,
                label=None if who in seen else _WHO[who],
            )  # fmt: skip
            seen.add(who)
    ax.set_xscale("log")
    texts = {"tf32": "float32, TF32", "tf32x3": "float32, 3 × TF32"}
    ax.set_yticks(range(len(dtypes)), [texts.get(d, d) for d in dtypes])
    ax.set_ylim(len(dtypes) - 0.45, -0.55)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("‖gradient − float64‖ / ‖float64‖")
    if where:
        ax.set_title(where, pad=26)
    ax.legend(loc="lower left", ncols=5, fontsize=8.5, bbox_to_anchor=(0, 1), borderaxespad=0.2,
              handletextpad=0.2, columnspacing=1.1)  # fmt: skip
    names = ", ".join(_WHO[w] for w in people)
    return (
        "Relative error of the gradients against float64 on a logarithmic axis, grouped by dtype "
        f"({', '.join(dtypes)}), markers for {names}; bars span dQ, dK and dV."
    )
