"""What is held: bytes of each tensor, and what is alive when (chapters 01 and 05)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.drawing import figure
from labkit.plots.style import Theme, theme
from labkit.units import format_bytes, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["linear_bytes", "memory_bars", "timeline"]


@figure(height=3.2)
def memory_bars(ax: Axes, table: Any) -> str:
    """Bytes of each tensor of a ``labkit.memory.MemoryTable``, as bars.

    Parameters
    ----------
    table : anything with ``rows``, each with ``name``, ``bytes`` and ``shape``.
    """
    t = theme()
    rows = list(table.rows)
    if not rows:
        raise ArgumentError("table", "no rows", "is empty.", "Pass a table with tensors.")
    biggest = max(row.bytes for row in rows)
    total = sum(row.bytes for row in rows)
    for place, row in enumerate(rows):
        colour = t.tensor(row.name)
        ax.barh(place, row.bytes, color=colour, height=0.68)
        share = 100 * row.bytes / total
        text = f"{format_bytes(row.bytes)}  ·  {significant(share, 2)} %"
        inside = row.bytes > 0.7 * biggest
        ax.annotate(
            text,
            (row.bytes, place),
            xytext=(-6 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=9,
            color=t.paper if inside else t.ink,
        )
    ax.set_yticks(range(len(rows)), [f"{r.name}  {_shape(r.shape)}" for r in rows])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    linear_bytes(ax, "x", biggest, "bytes")
    names = ", ".join(row.name for row in rows)
    largest = max(rows, key=lambda row: row.bytes)
    return (
        f"Horizontal bars: bytes of {names}. The largest is {largest.name} with "
        f"{format_bytes(largest.bytes)} of {format_bytes(total)} in all."
    )


def _shape(shape: Any) -> str:
    return shape if isinstance(shape, str) else "[" + ", ".join(map(str, shape)) + "]"


def linear_bytes(ax: Axes, which: str, biggest: float, label: str) -> None:
    """Ticks at round binary sizes on a linear axis."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    step = 1.0
    while biggest / step > 6:
        step *= 2
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(FuncFormatter(lambda v, _: format_bytes(v) if v else "0"))
    axis.set_label_text(label)


@dataclass(frozen=True)
class _Life:
    """One tensor in a timeline: when it is created and freed, in steps, and its size."""

    name: str
    bytes: int
    start: int
    end: int


def _lives(events: Sequence[tuple[str, str, int, Any]]) -> tuple[list[_Life], list[str]]:
    """Lives and labels of the columns, from (step, name, ±bytes, id).

    A column holds what is alive together: a step gets a second one when it creates
    something after it has freed something.
    """
    open_at: dict[Any, tuple[str, int, int]] = {}
    lives: list[_Life] = []
    labels: list[str] = []
    freed = False
    for step, name, change, key in events:
        if change > 0:
            if not labels or freed or step != labels[-1]:
                labels.append(step)
                freed = False
            open_at[key] = (name, change, len(labels) - 1)
        elif key in open_at:
            name, size, start = open_at.pop(key)
            # freed while the step ran: still there in its column
            lives.append(_Life(name, size, start, len(labels)))
            freed = True
    lives += [_Life(n, b, s, len(labels)) for n, b, s in open_at.values()]
    return sorted(lives, key=lambda life: life.start), labels


def _events(source: Any, sizes: Mapping[str, int]) -> list[tuple[str, str, int, Any]]:
    """``(step, tensor, ±bytes, id)`` of a Trace, or of a Schedule at the given sizes."""
    if hasattr(source, "timeline"):  # labkit.memory.Schedule
        moments = source.timeline(**sizes)
        return [(m["step"], m["name"], m["bytes"], m["name"]) for m in moments]
    if hasattr(source, "events"):  # labkit.memory.Trace
        return [(e.op, f"{e.op} {_shape(e.shape)}", e.bytes, e.storage) for e in source.events]
    return list(source)


@figure(height=3.6)
def timeline(ax: Axes, source: Any, *, capacity: int | None = None, **sizes: int) -> str:
    """What is alive when: one block per tensor, stacked as memory is, step by step.

    Parameters
    ----------
    source : a ``labkit.memory.Trace``, a ``labkit.memory.Schedule`` (with its sizes as
        keywords), or a list of ``(step, tensor, ±bytes, id)``.
    capacity : bytes of a limit to draw as a line.
    """
    t = theme()
    events = _events(source, sizes)
    lives, labels = _lives(events)
    if not lives:
        raise ArgumentError(
            "source", "no events", "allocates nothing.", "Trace a function that does."
        )
    steps = len(labels)
    peak = max(_alive(lives, steps))
    for life, bottoms in zip(lives, _places(lives, steps, peak), strict=True):
        colour = _colour_of(life.name, t)
        for start, end, bottom in _runs(life.start, bottoms):
            ax.fill_between(
                [start, end], bottom, bottom + life.bytes, color=colour, edgecolor=t.paper, lw=1.2
            )
        start, end, bottom = max(_runs(life.start, bottoms), key=lambda r: r[1] - r[0])
        if life.bytes > 0.08 * peak:
            ax.text(
                (start + end) / 2,
                bottom + life.bytes / 2,
                life.name,
                ha="center",
                va="center",
                fontsize=8.5,
                color=t.paper,
                clip_on=True,
            )
    ax.axhline(peak, color=t.ink, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        f"peak {format_bytes(peak)}",
        (0, peak),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=9,
        va="bottom",
    )
    if capacity is not None:
        ax.axhline(capacity, color=t.vermilion, linewidth=1.2)
        ax.annotate(
            f"limit {format_bytes(capacity)}",
            (0, capacity),
            xytext=(4, 4),
            textcoords="offset points",
            color=t.vermilion,
            fontsize=9,
        )
    ax.set_xlim(0, steps)
    ax.set_ylim(0, max(peak, capacity or 0) * 1.14)
    starts = [i for i in range(steps) if i == 0 or labels[i] != labels[i - 1]]
    ends = [*starts[1:], steps]
    middles = [(a + b) / 2 for a, b in zip(starts, ends, strict=True)]
    ax.set_xticks(middles, [labels[i] for i in starts])
    if len(starts) > 7:
        ax.tick_params(axis="x", rotation=35)
        for label in ax.get_xticklabels():
            label.set_horizontalalignment("right")
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("operation, in order")
    linear_bytes(ax, "y", max(peak, capacity or 0), "bytes alive beside the inputs")
    return (
        f"Stacked blocks: bytes alive in each of {len(starts)} operations, in order: "
        f"{', '.join(labels[i] for i in starts)}; "
        f"the peak is {format_bytes(peak)}."
    )


def _alive(lives: Sequence[_Life], steps: int) -> list[int]:
    """Bytes alive during each step."""
    return [sum(one.bytes for one in lives if one.start <= i < one.end) for i in range(steps)]


def _places(lives: Sequence[_Life], steps: int, peak: int) -> list[list[float]]:
    """The lower edge of each block in each step that it lives through.

    First fit, as an allocator would place it, so that blocks are rectangles.  Where that
    leaves holes at the peak, the blocks are stacked anew in each step instead: the height
    of the figure is always the bytes alive.
    """
    placed: list[tuple[_Life, float]] = []
    for life in lives:
        near = sorted((b, b + o.bytes) for o, b in placed if o.end > life.start)
        bottom = 0.0
        for low, high in near:
            if low - bottom >= life.bytes:
                break
            bottom = max(bottom, high)
        placed.append((life, bottom))
    if max(bottom + life.bytes for life, bottom in placed) <= peak:
        return [[b] * (min(life.end, steps) - life.start) for life, b in placed]
    floor = [0.0] * steps
    out = []
    for life in lives:
        span = range(life.start, min(life.end, steps))
        out.append([floor[i] for i in span])
        for i in span:
            floor[i] += life.bytes
    return out


def _runs(start: int, bottoms: Sequence[float]) -> list[tuple[int, int, float]]:
    """Stretches of steps over which a block stays at one height: (start, end, bottom)."""
    runs: list[tuple[int, int, float]] = []
    for i, bottom in enumerate(bottoms, start):
        if runs and runs[-1][2] == bottom:
            runs[-1] = (runs[-1][0], i + 1, bottom)
        else:
            runs.append((i, i + 1, bottom))
    return runs


def _colour_of(name: str, t: Theme) -> str:
    """A tensor's own colour if its name starts with a known one; a trace knows operators only."""
    head = name.split()[0] if name.split() else name
    if head in t.tensors:
        return t.tensors[head]
    # what the operators of attention make: products and what is done to them, then P
    likely = dict.fromkeys(("QKᵀ", "bmm", "mul", "masked_fill", "div"), t.tensors["S"])
    likely["_softmax"] = t.tensors["P"]
    return likely.get(head, t.purple)
