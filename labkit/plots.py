"""Figures: one style, in light and dark, with alt text.

A figure function draws on Axes and is wrapped by ``figure``.  Calling it
draws nothing yet; it returns a ``Drawing``, which is drawn twice, once per
theme, when it is shown::

    plots.show(plots.memory_bars(table), alt="Bars: bytes of each tensor …")

What a notebook stores is the light PNG, with the dark one and the alt text in its
metadata: the book shows the one that fits the reader's theme, print takes the
light one.  Alt text is required, and holds no measured figure: it says which axes
there are and what to see.

House rules: units on each axis, sizes on axes of powers of two, labels beside the
lines instead of a legend, colours that stay apart for colour-blind readers
(after Okabe and Ito) and that never carry a meaning alone.

Loads matplotlib on use, neither torch nor Triton.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError, check_choice
from labkit.units import format_bytes, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "LIGHT",
    "Drawing",
    "Shown",
    "Theme",
    "access_order",
    "bytes_axis",
    "bytes_in_flight",
    "data_flow",
    "dram_ledger",
    "draw",
    "end_labels",
    "figure",
    "growth",
    "here_beside_recorded",
    "hierarchy_bandwidth",
    "hierarchy_latency",
    "intensity_limits",
    "launch_overhead",
    "longest_lengths",
    "memory_bars",
    "reuse",
    "roofline",
    "saved_bars",
    "scaling_fit",
    "show",
    "size_axis",
    "stack_peaks",
    "theme",
    "time_bounds",
    "timeline",
    "use_style",
]

# -- style -----------------------------------------------------------------------


@dataclass(frozen=True)
class Theme:
    """Colours of one of the two styles; ``tensors`` gives each tensor its own throughout.

    The series colours have a contrast of at least 4.5 : 1 against ``paper``, so that
    a label may be written in the colour of its line.
    """

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    blue: str
    vermilion: str
    green: str
    purple: str
    orange: str
    sky: str
    panel: str

    @property
    def cycle(self) -> tuple[str, ...]:
        """Series colours in the order in which to use them."""
        return (self.blue, self.vermilion, self.green, self.purple, self.orange, self.sky)

    @property
    def tensors(self) -> dict[str, str]:
        """The colour of each tensor of attention."""
        return {
            "Q": self.blue,
            "K": self.blue,
            "V": self.blue,
            "S": self.vermilion,
            "P": self.orange,
            "O": self.green,
            "LSE": self.purple,
            "dQ": self.sky,
            "dK": self.sky,
            "dV": self.sky,
            "dO": self.green,
            "dS": self.vermilion,
            "dP": self.orange,
        }

    def tensor(self, name: str) -> str:
        """The colour of a tensor by name; ``muted`` for anything else (mask, scratch)."""
        return self.tensors.get(name, self.muted)


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1c2024",
    muted="#5f6872",
    grid="#e3e6e9",
    blue="#0067a6",
    vermilion="#c2410c",
    green="#00755a",
    purple="#a03c7c",
    orange="#8f6100",
    sky="#0b7285",
    panel="#f4f6f8",
)
DARK = Theme(
    name="dark",
    paper="#14181e",
    ink="#e8eaed",
    muted="#a2abb5",
    grid="#2c333c",
    blue="#5fb4f0",
    vermilion="#ff8f5c",
    green="#3fcf9f",
    purple="#e79bcb",
    orange="#e6b340",
    sky="#66d0dd",
    panel="#1d232b",
)
_THEMES = {"light": LIGHT, "dark": DARK}
_current = LIGHT

#: CSS pixels per inch of figure, and PNG pixels per CSS pixel (sharp on dense screens)
_CSS_DPI, _DENSITY = 100, 2


def theme() -> Theme:
    """The theme that is being drawn now; ask it for colours inside a figure function."""
    return _current


def _rc(t: Theme) -> dict[str, Any]:
    from cycler import cycler

    return {
        "figure.facecolor": t.paper,
        "figure.dpi": _CSS_DPI,
        "savefig.facecolor": t.paper,
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same everywhere
        "font.size": 10,
        "axes.facecolor": t.paper,
        "axes.edgecolor": t.muted,
        "axes.labelcolor": t.ink,
        "axes.titlecolor": t.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=t.cycle),
        "grid.color": t.grid,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "lines.solid_capstyle": "round",
        "text.color": t.ink,
        "xtick.color": t.muted,
        "ytick.color": t.muted,
        "xtick.labelcolor": t.ink,
        "ytick.labelcolor": t.ink,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "xtick.minor.visible": False,
        "ytick.minor.visible": False,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
        "mathtext.fontset": "dejavusans",
        "axes.unicode_minus": True,
    }


def use_style(name: str = "light") -> None:
    """Set the style for figures that you draw yourself with pyplot.

    Raises
    ------
    ArgumentError
        if ``name`` is neither ``"light"`` nor ``"dark"``.
    """
    import matplotlib

    global _current
    _current = _THEMES[check_choice("name", name, _THEMES)]
    matplotlib.rcParams.update(_rc(_current))


@contextmanager
def _drawn_in(t: Theme) -> Iterator[None]:
    import matplotlib

    global _current
    before, _current = _current, t
    try:
        with matplotlib.rc_context({**_rc(t), "interactive": False}):
            yield
    finally:
        _current = before


# -- from drawing to output --------------------------------------------------------


@dataclass
class Drawing:
    """A figure that is not drawn yet: what to draw, at which size.

    Attributes
    ----------
    function : draws on the Axes it gets first; may return an alt text.
    args, kwargs : its other arguments.
    width, height : inches; one inch is 100 CSS pixels.
    rows, cols : panels; with more than one the function gets a NumPy array of Axes.
    grid : further arguments of ``Figure.subplots``.
    """

    function: Callable[..., str | None]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    width: float = 7.2
    height: float = 3.8
    rows: int = 1
    cols: int = 1
    grid: dict[str, Any] = field(default_factory=dict)

    def figure(self, theme_name: str = "light") -> tuple[Figure, str | None]:
        """Draw it in one theme: the matplotlib Figure, and the alt text if it has one."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with _drawn_in(_THEMES[check_choice("theme_name", theme_name, _THEMES)]):
            # A Figure of its own, outside pyplot: nothing is shown twice or left open.
            fig = Figure(figsize=(self.width, self.height), layout="constrained")
            FigureCanvasAgg(fig)
            axes = fig.subplots(self.rows, self.cols, **self.grid)
            alt = self.function(axes, *self.args, **self.kwargs)
            return fig, alt if isinstance(alt, str) else None

    def png(self, theme_name: str = "light") -> bytes:
        """The PNG in one theme; the same bytes for the same input and matplotlib."""
        fig, _ = self.figure(theme_name)
        with _drawn_in(_THEMES[theme_name]):
            return _png(fig)

    def _repr_mimebundle_(self, include=None, exclude=None):
        return show(self)._repr_mimebundle_(include, exclude)


def _png(fig: Figure) -> bytes:
    from PIL import Image

    raw = io.BytesIO()
    fig.savefig(raw, format="png", dpi=_CSS_DPI * _DENSITY, metadata={"Software": None})
    # 256 colours are plenty for lines and text, and make the notebooks a third of the size.
    image = Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return small.getvalue()


@dataclass(frozen=True)
class Shown:
    """A figure ready for a notebook: light and dark PNG, alt text, width in CSS pixels."""

    light: bytes
    dark: bytes
    alt: str
    width: int

    def _repr_mimebundle_(self, include=None, exclude=None):
        data = {
            "image/png": base64.b64encode(self.light).decode(),
            "text/plain": f"Figure: {self.alt}",
        }
        dark = base64.b64encode(self.dark).decode()
        return data, {"image/png": {"alt": self.alt, "dark": dark, "width": self.width}}

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"


def show(drawing: Drawing, alt: str | None = None) -> Shown:
    """Draw a figure in both themes; make it the last expression of a cell.

    Parameters
    ----------
    drawing : what a figure function returned, or ``draw`` made.
    alt : what a reader who does not see it needs to know: the axes and the message.
        No measured figure, so that it is the same on every machine.  May be left
        out where the figure function brings its own.

    Raises
    ------
    ArgumentError
        if there is no alt text, or ``drawing`` is a finished matplotlib figure, which
        could be shown in one theme only.
    """
    if not isinstance(drawing, Drawing):
        raise ArgumentError(
            "drawing",
            type(drawing).__name__,
            "is not a Drawing, and a finished figure cannot change its theme.",
            "Pass what a figure function of labkit.plots returns, or plots.draw(your_function).",
        )
    fig, own = drawing.figure("light")
    alt = " ".join((alt or own or "").split())
    if len(alt) < 20:
        raise ArgumentError(
            "alt",
            alt,
            "is missing or too short to stand in for the figure.",
            "Say in a sentence which axes there are and what is to be seen.",
        )
    with _drawn_in(LIGHT):
        light = _png(fig)
    return Shown(light, drawing.png("dark"), alt, round(drawing.width * _CSS_DPI))


def figure(
    *, width: float = 7.2, height: float = 3.8, rows: int = 1, cols: int = 1, **grid: Any
) -> Callable[[Callable[..., str | None]], Callable[..., Any]]:
    """Make a figure function of one that draws on Axes.

    The wrapped function loses its first parameter and returns a ``Drawing``.
    Given ``ax=`` it draws there at once and returns that Axes; given ``size=`` (inches)
    it takes that size.
    """

    def wrap(function: Callable[..., str | None]) -> Callable[..., Any]:
        @functools.wraps(function)
        def make(
            *args: Any, ax: Axes | None = None, size: tuple[float, float] | None = None, **kw: Any
        ) -> Any:
            if ax is not None:
                function(ax, *args, **kw)
                return ax
            wide, high = size or (width, height)
            return Drawing(function, args, kw, wide, high, rows, cols, grid)

        return make

    return wrap


def draw(
    function: Callable[[Any], Any],
    *,
    size: tuple[float, float] = (7.2, 3.8),
    rows: int = 1,
    cols: int = 1,
) -> Drawing:
    """A ``Drawing`` of your own function of the Axes: ``plots.draw(lambda ax: …)``."""
    if not callable(function):
        raise ArgumentError(
            "function", type(function).__name__, "is not callable.", "Pass a function of Axes."
        )
    return Drawing(function, width=size[0], height=size[1], rows=rows, cols=cols)


# -- axes and labels ---------------------------------------------------------------


def _size_text(value: float, _position: int | None = None) -> str:
    """A size on an axis: 512, 8,192, ½."""
    if value >= 1:
        return f"{value:,.0f}" if float(value).is_integer() else significant(value)
    return significant(value)


def size_axis(ax: Axes, which: str = "x", *, label: str, every: int | None = None) -> None:
    """Make ``which`` ("x" or "y") an axis of powers of two with plain numbers.

    Call it after plotting: ``every`` (a tick per that many doublings) is chosen from the
    range of the data unless given.
    """
    import math

    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = {"x": ax.xaxis, "y": ax.yaxis}[check_choice("which", which, ("x", "y"))]
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=2)
    if every is None:
        low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
        every = max(1, math.ceil(math.log2(high / low) / 9))
    axis.set_major_locator(LogLocator(base=2**every, numticks=40))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_size_text))
    axis.set_label_text(label)


def bytes_axis(ax: Axes, which: str = "y", *, label: str, every: int | None = None) -> None:
    """Make ``which`` a logarithmic axis of bytes, written in binary units; see size_axis."""
    from matplotlib.ticker import FuncFormatter

    size_axis(ax, which, label=label, every=every)
    axis = {"x": ax.xaxis, "y": ax.yaxis}[which]
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def seconds_axis(ax: Axes, which: str = "y", *, label: str = "time") -> None:
    """Make ``which`` a decimal logarithmic axis of durations, written in s, ms, µs, ns."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from labkit.units import format_seconds

    axis = {"x": ax.xaxis, "y": ax.yaxis}[check_choice("which", which, ("x", "y"))]
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=10)
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
    axis.set_label_text(label)


def end_labels(
    ax: Axes,
    labels: Sequence[tuple[float, float, str, str]],
    *,
    room: float = 0.2,
    size: float = 9,
) -> None:
    """Write labels to the right of points, in their colours, moved apart where they would touch.

    Parameters
    ----------
    labels : ``(x, y, text, colour)`` in data coordinates, usually the ends of lines.
    room : share of the width of the axes to leave free for them on the right.
    """
    if not labels:
        return
    low, high = ax.get_xlim()
    forward, backward = ax.xaxis.get_transform(), ax.xaxis.get_transform().inverted()
    a, b = forward.transform([low, high])
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    ax.set_xlim(low, backward.transform([a + (b - a) / (1 - room)])[0])
    ax.xaxis.set_ticks(ticks)  # none under the labels; keeps the formatter
    ax.spines["bottom"].set_bounds(low, high)
    fig = ax.figure
    fig.draw_without_rendering()
    to_points = 72 / fig.dpi
    placed = sorted(labels, key=lambda item: item[1])
    heights = [ax.transData.transform((x, y))[1] * to_points for x, y, _, _ in placed]
    lines = [text.count("\n") + 1 for _, _, text, _ in placed]
    wanted = list(heights)
    for _ in range(200):  # push neighbours apart until none overlap
        moved = False
        for i in range(len(placed) - 1):
            gap = size * 0.62 * (lines[i] + lines[i + 1])
            lack = gap - (heights[i + 1] - heights[i])
            if lack > 0.01:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    for (x, y, text, colour), height, want in zip(placed, heights, wanted, strict=True):
        ax.annotate(
            text,
            (x, y),
            xytext=(6, height - want),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
        )


# -- memory ------------------------------------------------------------------------


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
    _linear_bytes(ax, "x", biggest, "bytes")
    names = ", ".join(row.name for row in rows)
    largest = max(rows, key=lambda row: row.bytes)
    return (
        f"Horizontal bars: bytes of {names}. The largest is {largest.name} with "
        f"{format_bytes(largest.bytes)} of {format_bytes(total)} in all."
    )


def _shape(shape: Any) -> str:
    return shape if isinstance(shape, str) else "[" + ", ".join(map(str, shape)) + "]"


def _linear_bytes(ax: Axes, which: str, biggest: float, label: str) -> None:
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
    _linear_bytes(ax, "y", max(peak, capacity or 0), "bytes alive beside the inputs")
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


# -- scaling -----------------------------------------------------------------------


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
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _rate_text(v)))
        ax.set_ylabel(y)
    end_labels(ax, labels, room=0.27)
    both = f"{recorded_label} as a line, {here_label} as points" if here else recorded_label
    return f"{y} against {x}, both logarithmic: {both}."


def _rate_text(value: float) -> str:
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


# -- the data flow of standard attention ---------------------------------------------


@figure(width=7.6, height=4.6)
def data_flow(ax: Axes, *, fused: bool = False) -> str:
    """Where the tensors of attention live and which way they move.

    Below, off-chip memory (HBM); above, the chip, where the three steps run.  Areas are drawn
    so that S and P, N × N, tower over Q, K, V and O, N × d.  ``fused=True`` draws the
    way of the fused kernel: S and P stay on the chip, a tile at a time.
    """
    t = theme()
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 60)
    ax.axis("off")
    _band(ax, 0, 30, "off chip\nHBM", t)
    _band(ax, 37, 60, "on chip\nregisters, SRAM", t)
    (_fused_flow if fused else _three_steps)(ax, t)
    if fused:
        return (
            "Data flow of fused attention between off-chip memory below and the chip above: Q, K "
            "and V are read, tiles of S and P live on the chip only, O and the log-sum-exp are "
            "written."
        )
    return (
        "Data flow of standard attention between off-chip memory below and the chip above. Step 1 "
        "reads Q and K and writes S; step 2 reads S and writes P; step 3 reads P and V and writes "
        "O. S and P are N by N squares, the others are thin N by d strips: four passes over an N "
        "by N matrix."
    )


def _band(ax: Axes, low: float, high: float, text: str, t: Theme) -> None:
    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch(
        (0.8, low + 0.6),
        98.4,
        high - low - 1.2,
        boxstyle="round,pad=0,rounding_size=1.6",
        facecolor=t.panel,
        edgecolor=t.grid,
    )
    ax.add_patch(box)
    ax.text(
        3.6,
        (low + high) / 2,
        text,
        fontsize=8.5,
        color=t.muted,
        rotation=90,
        va="center",
        ha="center",
        linespacing=1.3,
    )


def _tensor(
    ax: Axes,
    name: str,
    x: float,
    y: float,
    w: float,
    h: float,
    t: Theme,
    shape: str,
    tiles: int = 0,
) -> None:
    """A matrix as a rectangle with its lower left corner at (x, y), its name and shape."""
    from matplotlib.patches import Rectangle

    colour = t.tensor(name)
    ax.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor=t.paper, linewidth=1))
    for i in range(1, tiles):
        ax.plot([x + w * i / tiles] * 2, [y, y + h], color=t.paper, linewidth=0.5)
        ax.plot([x, x + w], [y + h * i / tiles] * 2, color=t.paper, linewidth=0.5)
    outside = w < 2
    ax.text(
        x + w + 0.8 if outside else x + w / 2,
        y + h / 2,
        name,
        color=colour if outside else t.paper,
        weight="bold",
        ha="left" if outside else "center",
        va="center",
        fontsize=13 if w >= 6 else 8.5,
    )
    ax.text(x + w / 2, y - 1, shape, color=t.muted, ha="center", va="top", fontsize=8)


def _kernel(ax: Axes, x: float, w: float, step: str, formula: str, t: Theme) -> None:
    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch(
        (x, 41.5),
        w,
        11.5,
        boxstyle="round,pad=0,rounding_size=1.4",
        facecolor=t.paper,
        edgecolor=t.ink,
        linewidth=1.1,
    )
    ax.add_patch(box)
    ax.text(x + w / 2, 50, step, ha="center", va="center", fontsize=8.5, color=t.muted)
    ax.text(x + w / 2, 45.4, formula, ha="center", va="center", fontsize=11)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, heavy: bool
) -> None:
    from matplotlib.patches import FancyArrowPatch

    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=15 if heavy else 10,
            color=colour,
            linewidth=3.4 if heavy else 1.4,
            shrinkA=0,
            shrinkB=0,
            zorder=4,
        )
    )


def _three_steps(ax: Axes, t: Theme) -> None:
    top, base, strip, square = 21.5, 5.5, 3.2, 16.0
    for name, x in (("Q", 7), ("K", 12)):
        _tensor(ax, name, x, base, strip, square, t, "N×d")
    _tensor(ax, "S", 25, base, square, square, t, "N×N")
    _tensor(ax, "P", 52, base, square, square, t, "N×N")
    _tensor(ax, "V", 77, base, strip, square, t, "N×d")
    _tensor(ax, "O", 92, base, strip, square, t, "N×d")
    _kernel(ax, 8, 22, "step 1", r"$S = QK^{\mathsf{T}}/\sqrt{d}$", t)
    _kernel(ax, 37.5, 20, "step 2", r"$P = \mathrm{softmax}(S)$", t)
    _kernel(ax, 69, 22, "step 3", r"$O = PV$", t)
    thin = dict(heavy=False)
    _arrow(ax, (8.6, top + 0.6), (11.5, 41), t.tensor("Q"), **thin)
    _arrow(ax, (13.6, top + 0.6), (14.5, 41), t.tensor("K"), **thin)
    _arrow(ax, (26.5, 41), (30.5, top + 0.8), t.tensor("S"), heavy=True)
    _arrow(ax, (37, top + 0.8), (41.5, 41), t.tensor("S"), heavy=True)
    _arrow(ax, (53.5, 41), (57.5, top + 0.8), t.tensor("P"), heavy=True)
    _arrow(ax, (64, top + 0.8), (72.5, 41), t.tensor("P"), heavy=True)
    _arrow(ax, (78.6, top + 0.6), (80, 41), t.tensor("V"), **thin)
    _arrow(ax, (88, 41), (93.4, top + 0.6), t.tensor("O"), **thin)
    for x, text, name in (
        (26.8, "write", "S"),
        (41.4, "read", "S"),
        (53.6, "write", "P"),
        (71.6, "read", "P"),
    ):
        right = text == "write"
        ax.text(
            x,
            33.6,
            f"{text}\n$N^2$",
            color=t.tensor(name),
            fontsize=8.5,
            va="center",
            ha="right" if right else "left",
            linespacing=1.1,
            weight="bold",
        )
    nd = "{}\n$N d$"
    for x, side, text, name in (
        (8.4, "right", "read", "Q"),
        (14.8, "left", "read", "K"),
        (80.4, "left", "read", "V"),
        (92.6, "left", "write", "O"),
    ):
        ax.text(
            x,
            33.6,
            nd.format(text),
            color=t.tensor(name),
            fontsize=8,
            va="center",
            ha=side,
            linespacing=1.1,
        )


def _fused_flow(ax: Axes, t: Theme) -> None:
    top, base, strip, square = 21.5, 5.5, 3.2, 16.0
    for name, x in (("Q", 22), ("K", 31), ("V", 40)):
        _tensor(ax, name, x, base, strip, square, t, "N×d")
    _tensor(ax, "O", 64, base, strip, square, t, "N×d")
    _tensor(ax, "LSE", 73, base, 1.4, square, t, "N")
    _kernel(ax, 22, 50, "one kernel, tile by tile", "", t)
    for x, name in ((32, "S"), (44, "P")):
        _tensor(ax, name, x, 43, 6, 6, t, "")
    ax.text(41, 46, "→", ha="center", va="center", color=t.ink)
    ax.text(52.5, 46, "rescale and add to O", fontsize=8.5, va="center", color=t.ink)
    for name, x, end in (("Q", 23.6, 29), ("K", 32.6, 36), ("V", 41.6, 43)):
        _arrow(ax, (x, top + 0.6), (end, 41), t.tensor(name), heavy=False)
    _arrow(ax, (61, 41), (65.6, top + 0.6), t.tensor("O"), heavy=False)
    _arrow(ax, (68, 41), (73.7, top + 0.6), t.tensor("LSE"), heavy=False)


# -- the roofline (chapter 04) ---------------------------------------------------------


def _roof_axis(ax: Axes, which: str, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=10)
    axis.set_major_locator(LogLocator(base=10, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: _rate_text(v)))
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
    _linear_bytes(ax, "x", max(biggest, l2_bytes or 0), "bytes read and written")
    ax.set_xlim(0, max(biggest, l2_bytes or 0) * 1.32)
    names = ", ".join(row["label"] for row in rows)
    return (
        f"Horizontal bars for {names}: bytes by the formula, bytes through DRAM with the caches "
        "emptied before each kernel, and with the caches as the kernel before left them."
    )


# -- chapter 03: the memory hierarchy ----------------------------------------------


def _rate_axis(ax: Axes, which: str = "y", *, label: str) -> None:
    """Make ``which`` a logarithmic axis of bytes per second, decimal prefixes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from labkit.units import format_rate

    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=10)
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_rate(value, "B/s")))
    axis.set_label_text(label)


def _rows_of(source: Any, kind: str, **columns: Any) -> list[dict[str, Any]]:
    """Rows of one kind of the hierarchy experiment, by growing working set."""
    found = [
        row
        for row in source.rows
        if row["kind"] == kind and all(row.get(k) == v for k, v in columns.items())
    ]
    return sorted(found, key=lambda row: row["bytes"])


def _size_line(ax: Axes, size: int | None, text: str) -> None:
    """A vertical line at the size of a cache, named at the top."""
    if size is None:
        return
    ax.axvline(size, color=theme().ink, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        text,
        (size, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        fontsize=9,
        va="top",
    )


@figure(height=4.2)
def hierarchy_bandwidth(ax: Axes, source: Any, *, l2_bytes: int | None = None) -> str:
    """Bandwidth against working set: copies, reads past L1, L1 and shared memory.

    Parameters
    ----------
    source : a Result or Record of the experiment ``hierarchy``.
    l2_bytes : size of the L2 cache, drawn as a line.
    """
    t = theme()
    copies = _rows_of(source, "copy", by="torch")
    lines = [
        (copies, "copy\n(reads + writes)", t.blue),
        (_rows_of(source, "read"), "read\npast L1", t.vermilion),
        (_rows_of(source, "read_l1"), "read\nthrough L1", t.green),
    ]
    labels = []
    for rows, text, colour in lines:
        if not rows:
            continue
        x, y = [r["bytes"] for r in rows], [r["bandwidth"] for r in rows]
        ax.plot(x, y, "o-", color=colour, markersize=3.5)
        labels.append((x[-1], y[-1], text, colour))
    shared = _rows_of(source, "shared", ways=1)
    if shared:
        row = shared[0]
        ax.plot([row["bytes"]], [row["bandwidth"]], "D", color=t.purple, markersize=7)
        ax.annotate(
            "shared memory",
            (row["bytes"], row["bandwidth"]),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=t.purple,
            fontsize=9,
        )
    bytes_axis(ax, "x", label="working set (bytes touched again and again)")
    _rate_axis(ax, "y", label="bandwidth")
    _size_line(ax, l2_bytes, "L2")
    end_labels(ax, [label for label in labels if label[2] != lines[2][1]], room=0.2)
    through = [label for label in labels if label[2] == lines[2][1]]
    for x, y, text, colour in through:
        ax.annotate(
            text.replace("\n", " "),
            (x, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )
    if shared or through:
        return (
            "Bandwidth against working set, both logarithmic. Reads through L1 and shared memory "
            "lie highest. Reads past L1 run level while the buffer fits in L2, fall where it no "
            "longer does, and level off at the bandwidth of memory. Copies rise while they are too "
            "short to fill the machine and end on the same level."
        )
    return (
        "Copy bandwidth against working set, both logarithmic: it rises while a call costs more "
        "than the copy, stays high while the buffers fit in the caches and falls to the level of "
        "memory where they do not."
    )


@figure(height=4.0)
def hierarchy_latency(ax: Axes, source: Any, *, l2_bytes: int | None = None) -> str:
    """Cycles per dependent load against working set, through L1 and past it.

    Parameters
    ----------
    source : a Record or Result of the experiment ``hierarchy`` made on a GPU.
    l2_bytes : size of the L2 cache, drawn as a line.
    """
    t = theme()
    labels = []
    for level, text, colour in (
        ("l2", "loads past L1\n(ld.global.cg)", t.vermilion),
        ("l1", "loads through L1\n(ld.global.ca)", t.green),
    ):
        rows = _rows_of(source, "latency", level=level)
        if not rows:
            raise ArgumentError(
                "source",
                "no latency rows",
                "holds no pointer chase.",
                "Pass a record made on a GPU, for example labkit.records.load('hierarchy').",
            )
        x, y = [r["bytes"] for r in rows], [r["cycles"] for r in rows]
        ax.plot(x, y, "o-", color=colour, markersize=3.5)
        if level == "l2":
            labels.append((x[-1], y[-1], text, colour))
        else:
            ax.annotate(
                text,
                (x[-1], y[-1]),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=9,
            )
    bytes_axis(ax, "x", label="working set (one line of 128 bytes per step)")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("cycles per load")
    _size_line(ax, l2_bytes, "L2")
    end_labels(ax, labels, room=0.2)
    return (
        "Cycles per dependent load against working set. Through L1 a load is several times "
        "cheaper, until the set no longer fits in one multiprocessor's L1. Past L1 the curve is "
        "level while the set fits in L2, then climbs to the latency of memory."
    )


@figure(height=3.4)
def access_order(ax: Axes, source: Any) -> str:
    """Time per gathered line of 64 bytes on a CPU, in order and at random.

    Parameters
    ----------
    source : a Result of the experiment ``hierarchy`` made on a CPU.
    """
    t = theme()
    labels = []
    for order, colour in (("at random", t.vermilion), ("in order", t.blue)):
        rows = _rows_of(source, "order", order=order)
        x, y = [r["bytes"] for r in rows], [r["seconds"] for r in rows]
        ax.plot(x, y, "o-", color=colour, markersize=4)
        labels.append((x[-1], y[-1], order, colour))
    bytes_axis(ax, "x", label="buffer that the lines come from")
    seconds_axis(ax, "y", label="time per line of 64 bytes")
    end_labels(ax, labels, room=0.14)
    return (
        "Time per gathered line against the size of the buffer, both logarithmic, for lines taken "
        "in order and at random. The two are close while the buffer fits in the caches; beyond "
        "them random lines cost several times more."
    )


@figure(height=4.0)
def bytes_in_flight(ax: Axes, source: Any, *, latency: float, peak: float) -> str:
    """Read bandwidth against the bytes that all programs together keep in flight.

    Parameters
    ----------
    source : a Record or Result of the experiment ``hierarchy`` made on a GPU.
    latency : seconds per load from memory: bytes in flight / latency is Little's line.
    peak : B/s that memory gives at best.
    """
    t = theme()
    rows = sorted(
        (r for r in source.rows if r["kind"] == "parallelism"), key=lambda r: r["programs"]
    )
    x = [r["programs"] * r["bytes_per_program"] for r in rows]
    ax.plot(x, [r["bandwidth"] for r in rows], "o", color=t.blue, label="measured")
    little = [x[0], peak * latency, x[-1]]
    ax.plot(little[:2], [v / latency for v in little[:2]], color=t.vermilion, linewidth=1.4)
    ax.plot(little[1:], [peak, peak], color=t.vermilion, linewidth=1.4)
    bytes_axis(ax, "x", label="bytes asked for at a time by all programs together")
    _rate_axis(ax, "y", label="read bandwidth")
    ax.annotate(
        "bytes in flight / latency",
        (x[4], x[4] / latency),
        xytext=(10, -8),
        textcoords="offset points",
        va="top",
        color=t.vermilion,
        fontsize=9,
    )
    ax.annotate(
        "what memory can give",
        (little[2], peak),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        color=t.vermilion,
        fontsize=9,
    )
    return (
        "Read bandwidth against bytes asked for at a time, both logarithmic. The points climb in "
        "proportion along the line bytes in flight over latency, bend where it meets the ceiling "
        "and stay below the ceiling from there on."
    )


@figure(height=3.8)
def reuse(ax: Axes, source: Any) -> str:
    """Speed-up of blocks that stay in cache, measured, against r / (1 + (r − 1) / ρ).

    Where the source has it (a GPU), also that of blocks with a kernel for each pass.

    Parameters
    ----------
    source : a Record or Result of the experiment ``hierarchy``.
    """
    t = theme()
    ratio = source.value("reuse_ratio")
    passes = sorted({r["passes"] for r in source.rows if r["kind"] == "reuse" and "error" in r})
    measured = [source.value(f"reuse_{p}") for p in passes]
    curve = [1 + i * (passes[-1] - 1) / 200 for i in range(201)]
    ax.plot(curve, [r / (1 + (r - 1) / ratio) for r in curve], color=t.vermilion, linewidth=1.4)
    ax.axhline(ratio, color=t.ink, linewidth=1, linestyle=(0, (4, 3)))
    ax.plot(passes, measured, "o", color=t.blue, markersize=6)
    split = [
        source.value(f"reuse_kernels_{p}") for p in passes if _rows_of(source, "reuse_kernels")
    ]
    if split:
        ax.plot(passes, split, "s", color=t.purple, markersize=5)
        ax.annotate(
            "a kernel for each pass over a block",
            (passes[-1], split[-1]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            color=t.purple,
            fontsize=9,
        )
    ax.annotate(
        "ratio of the bandwidths, ρ",
        (passes[-1], ratio),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    ax.annotate(
        "r / (1 + (r − 1) / ρ)",
        (curve[16], curve[16] / (1 + (curve[16] - 1) / ratio)),
        xytext=(-6, 8),
        textcoords="offset points",
        ha="right",
        color=t.vermilion,
        fontsize=9,
    )
    ax.annotate(
        "measured, in one kernel" if split else "measured",
        (passes[0], measured[0]),
        xytext=(10, -10),
        textcoords="offset points",
        va="center",
        color=t.blue,
        fontsize=9,
    )
    size_axis(ax, "x", label="passes over each block, r", every=1)
    ax.set_ylim(0, max(ratio, *measured) * 1.15)
    ax.set_ylabel("times faster than whole passes")
    more = " Squares, a kernel for each pass over a block, stay far below." if split else ""
    return (
        "Speed-up of finishing each block while it is in cache, against the number of passes. The "
        "formula starts at 1 for one pass and nears the ratio of the bandwidths, drawn as a dashed "
        "line, only after many; measured points follow it." + more
    )


# -- training memory (chapter 05) ----------------------------------------------------


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
