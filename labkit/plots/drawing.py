"""From a function that draws on Axes to what a notebook stores: both themes, with alt text."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError, check_choice
from labkit.plots.style import CSS_DPI, DENSITY, LIGHT, THEMES, drawn_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawing", "Shown", "draw", "figure", "show"]


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

        with drawn_in(THEMES[check_choice("theme_name", theme_name, THEMES)]):
            # A Figure of its own, outside pyplot: nothing is shown twice or left open.
            fig = Figure(figsize=(self.width, self.height), layout="constrained")
            FigureCanvasAgg(fig)
            axes = fig.subplots(self.rows, self.cols, **self.grid)
            alt = self.function(axes, *self.args, **self.kwargs)
            return fig, alt if isinstance(alt, str) else None

    def png(self, theme_name: str = "light") -> bytes:
        """The PNG in one theme; the same bytes for the same input and matplotlib."""
        fig, _ = self.figure(theme_name)
        with drawn_in(THEMES[theme_name]):
            return _png(fig)

    def _repr_mimebundle_(self, include=None, exclude=None):
        return show(self)._repr_mimebundle_(include, exclude)


def _png(fig: Figure) -> bytes:
    import numpy as np
    from PIL import Image

    # Drawn once: savefig would draw it a first time only to lay it out, and write a PNG to read.
    fig.dpi = CSS_DPI * DENSITY
    fig.canvas.draw()
    pixels = Image.fromarray(np.asarray(fig.canvas.buffer_rgba()))
    # 256 colours are plenty for lines and text, and make the notebooks a third of the size.
    image = pixels.convert("RGB").quantize(256, dither=Image.Dither.NONE)
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
    with drawn_in(LIGHT):
        light = _png(fig)
    return Shown(light, drawing.png("dark"), alt, round(drawing.width * CSS_DPI))


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
