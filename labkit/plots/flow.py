"""The data flow of attention: what is read and written, and where (chapter 01)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.plots.drawing import figure
from labkit.plots.style import Theme, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["data_flow"]


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
