"""A figure's style: the two themes, and the one that is being drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from labkit.errors import check_choice

__all__ = ["DARK", "LIGHT", "THEMES", "Theme", "drawn_in", "theme", "use_style"]


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
THEMES = {"light": LIGHT, "dark": DARK}
_current = LIGHT

#: CSS pixels per inch of figure, and PNG pixels per CSS pixel (sharp on dense screens)
CSS_DPI, DENSITY = 100, 2


def theme() -> Theme:
    """The theme that is being drawn now; ask it for colours inside a figure function."""
    return _current


def _rc(t: Theme) -> dict[str, Any]:
    from cycler import cycler

    return {
        "figure.facecolor": t.paper,
        "figure.dpi": CSS_DPI,
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
    _current = THEMES[check_choice("name", name, THEMES)]
    matplotlib.rcParams.update(_rc(_current))


@contextmanager
def drawn_in(t: Theme) -> Iterator[None]:
    import matplotlib

    global _current
    before, _current = _current, t
    try:
        with matplotlib.rc_context({**_rc(t), "interactive": False}):
            yield
    finally:
        _current = before
