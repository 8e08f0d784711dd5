"""Bytes between two memories: loop orders, traffic, the fitted law, tiles (chapter 06)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.axes import bytes_axis, end_labels, size_axis
from labkit.plots.drawing import figure
from labkit.plots.style import theme
from labkit.units import format_bytes, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["loop_orders", "order_bars", "tile_traffic", "traffic", "traffic_law"]

_ORDER_NAMES = {
    "naive": "naive",
    "two_pass": "two passes",
    "kv_outer": "K, V outside",
    "q_outer": "Q outside",
}


@figure(width=7.6, height=3.3, cols=3)
def loop_orders(axes: Any) -> str:
    """S as a grid of tiles, and the order in which each algorithm makes them."""
    from matplotlib.patches import Rectangle

    t = theme()
    n = 4
    panels = (
        ("naive: all of S", "written, read again", None),
        ("Q outside", "a row of tiles at a time", "rows"),
        ("K, V outside", "a column of tiles at a time", "columns"),
    )
    for ax, (title, words, how) in zip(axes, panels, strict=True):
        ax.set_xlim(-1.55, n + 0.1)
        ax.set_ylim(n + 0.75, -1.45)
        ax.set_aspect("equal")
        ax.axis("off")
        ax.set_title(title)
        for row in range(n):
            for column in range(n):
                if how is None:
                    colour, alpha = t.vermilion, 0.75
                else:
                    major, minor = (row, column) if how == "rows" else (column, row)
                    now = (major, minor) == (1, 2)
                    done = major < 1 or (major == 1 and minor < 2)
                    colour, alpha = t.vermilion, 0.9 if now else (0.22 if done else 0.0)
                ax.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, alpha=alpha, lw=0))
                ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=t.muted, lw=0.8))
        for place in range(n):
            stays = {"rows": "Q", "columns": "K"}.get(how or "", "")
            for name, x, y, wide, high in (
                ("Q", -0.95, place, 0.55, 1),
                ("K", place, -0.95, 1, 0.55),
            ):
                held = name == stays and place == 1
                passing = stays and name != stays and place == 2
                face = t.blue if held else (t.sky if passing else t.panel)
                ax.add_patch(
                    Rectangle((x, y), wide, high, facecolor=face, edgecolor=t.muted, lw=0.8)
                )
        ax.text(-0.67, n + 0.12, "Q", ha="center", va="top", color=t.blue, size=9)
        ax.text(n + 0.02, -1.05, "K, V", ha="right", va="bottom", color=t.blue, size=9)
        ax.text(n / 2, n + 0.25, words, ha="center", va="top", size=9)
        if how == "rows":
            arrow = ((0.3, 1.5), (1.9, 1.5))
        elif how == "columns":
            arrow = ((1.5, 0.3), (1.5, 1.9))
        else:
            continue
        ax.annotate("", arrow[1], arrow[0], arrowprops={"arrowstyle": "->", "color": t.ink})
    return (
        "Three grids of four by four tiles, each the matrix S with blocks of Q on its left and of "
        "K and V above. Naive: every tile is filled. Q outside: one block of Q is held and the "
        "tiles of its row are made from left to right while the blocks of K go by. K, V outside: "
        "one block of K is held and the tiles of its column are made from top to bottom while the "
        "blocks of Q go by."
    )


@figure(height=3.3)
def order_bars(ax: Axes, moved: Mapping[str, Mapping[tuple[str, str], int]], least: int) -> str:
    """Counted bytes of each order, by tensor, as stacked bars.

    Parameters
    ----------
    moved : order to ``{(tensor, "load" or "store"): bytes}``, as ``Traffic.by_tensor`` gives it
        with the names of the closed forms.
    least : bytes of the compulsory traffic, drawn as a line.
    """
    import math

    from matplotlib.ticker import MultipleLocator

    t = theme()
    if not moved:
        raise ArgumentError("moved", moved, "is empty.", "Pass one mapping per order.")
    widest = max(sum(parts.values()) for parts in moved.values())
    for place, (order, parts) in enumerate(moved.items()):
        left = 0
        tensors: dict[str, int] = {}
        for (tensor, _), size in parts.items():
            tensors[tensor] = tensors.get(tensor, 0) + size
        for tensor, size in tensors.items():
            ax.barh(
                place, size, left=left, height=0.66, color=t.tensor(tensor), edgecolor=t.paper,
                linewidth=1.2,
            )  # fmt: skip
            if size > 0.045 * widest:
                ax.text(
                    left + size / 2, place, tensor, ha="center", va="center", color=t.paper,
                    size=9, weight="bold",
                )  # fmt: skip
            left += size
        ax.annotate(
            format_bytes(left), (left, place), xytext=(6, 0), textcoords="offset points",
            va="center", size=9,
        )  # fmt: skip
        name = _ORDER_NAMES.get(order, order)
        ax.text(-0.012 * widest, place, name, ha="right", va="center", size=9.5)
    ax.axvline(least, color=t.ink, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        "each of Q, K, V, O once", (least, -0.5), xytext=(4, 2), textcoords="offset points", size=9,
        va="bottom",
    )  # fmt: skip
    ax.set_yticks([])
    ax.set_ylim(len(moved) - 0.5, -0.85)
    ax.set_xlim(0, widest * 1.17)
    ax.xaxis.set_major_locator(MultipleLocator(2 ** round(math.log2(widest / 6))))
    ax.xaxis.set_major_formatter(lambda value, _: format_bytes(value) if value else "0")
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("bytes loaded and stored")
    sums = ", ".join(
        f"{_ORDER_NAMES.get(o, o)} {format_bytes(sum(p.values()))}" for o, p in moved.items()
    )
    return (
        f"Stacked bars: bytes moved by each order, by tensor: {sums}. In the naive bar S and P "
        "take the largest part; the others have neither. A line marks the compulsory traffic."
    )


@figure(width=7.8, height=3.4, cols=3)
def traffic_law(axes: Any, result: Any) -> str:
    """Counted traffic against length, head_dim and fast memory, with the fitted exponents.

    Parameters
    ----------
    result : a result or record of the experiment ``io_law``.
    """
    from labkit.experiments import io_law

    t = theme()
    panels = (
        ("seq_len", "N"),
        ("head_dim", "d"),
        ("fast", "fast memory (elements)"),
    )
    lines = (
        ("naive", "bytes", "naive", t.vermilion, "s", "none"),
        ("q_outer", "bytes", "Q outside", t.blue, "o", "none"),
        ("q_outer", "rereads", "its K, V", t.green, "D", "-"),
    )
    for index, (ax, (knob, label)) in enumerate(zip(axes, panels, strict=True)):
        labels = []
        for order, y, name, colour, marker, style in lines:
            xs, ys = io_law.series(result, order, knob, y)
            if not xs:
                continue
            ax.plot(
                xs, ys, color=colour, marker=marker, markerfacecolor=t.paper, ls=style or "none",
                markersize=5,
            )  # fmt: skip
            key = f"exponent.{'rereads' if y == 'rereads' else order}.{knob}"
            text = name
            if key in result:
                text += f"\n{result.value(key):.2f}".replace("-", "−")
            labels.append((xs[-1], ys[-1], text, colour))
        size_axis(ax, "x", label=label, every=2 if knob == "fast" else 1)
        bytes_axis(ax, "y", label="bytes moved" if index == 0 else "", every=2)
        end_labels(ax, labels, room=0.46, size=8.5)
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
    return (
        "Three panels with logarithmic axes: counted bytes against sequence length, head_dim and "
        "fast memory. The loads of K and V rise with slope two in length and in head_dim and fall "
        "with slope minus one in fast memory. All bytes of the fused kernel are a little flatter; "
        "naive rises with slope two in length and less than one in head_dim. The fitted exponent "
        "stands beside each series."
    )


@figure(height=4.3)
def traffic(
    ax: Axes,
    lines: Mapping[str, Sequence[tuple[int, float]]],
    points: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    *,
    title: str = "",
) -> str:
    """Bytes of naive and fused attention against the sequence length.

    Parameters
    ----------
    lines : closed forms: label to ``(N, bytes)``.
    points : measured: label to ``(N, bytes)``, drawn in the colour of the line of that place.
    title : where the points were measured.
    """
    t = theme()
    if not lines:
        raise ArgumentError("lines", lines, "is empty.", "Pass one or more lines.")
    colours = (t.vermilion, t.blue, t.muted, t.purple)
    markers = "osD^"
    labels = []
    for (name, pairs), colour in zip(lines.items(), colours, strict=False):
        x, y = zip(*pairs, strict=True)
        ax.plot(x, y, color=colour)
        labels.append((x[-1], y[-1], name, colour))
    found = []
    for index, (name, pairs) in enumerate((points or {}).items()):
        if not pairs:
            continue
        x, y = zip(*pairs, strict=True)
        colour = (t.vermilion, t.green, t.blue)[index % 3]
        ax.plot(x, y, markers[index % 4], color=colour, markerfacecolor=t.paper, markersize=7,
                markeredgewidth=1.6, zorder=4, label=name)  # fmt: skip
        found.append(name)
    size_axis(ax, "x", label="N (tokens)")
    bytes_axis(ax, "y", label="bytes moved", every=2)
    end_labels(ax, labels, room=0.27)
    if found:
        ax.legend(loc="upper left", fontsize=9)
    if title:
        ax.set_title(title)
    measured = f" Points, measured: {'; '.join(found)}." if found else ""
    return (
        f"Bytes moved against sequence length, both axes logarithmic. Lines: {'; '.join(lines)}. "
        "The last one has slope one, the others slope two."
    ).replace("\n", " ") + measured


@figure(height=3.6)
def tile_traffic(
    ax: Axes,
    model: Sequence[tuple[int, float]],
    measured: Sequence[tuple[int, float]] = (),
    *,
    least: float | None = None,
    title: str = "",
) -> str:
    """Bytes of the fused kernel against the rows of its tile.

    Parameters
    ----------
    model, measured : ``(block_m, bytes)``: the closed form, and what a profiler read.
    least : bytes of the compulsory traffic, drawn as a line.
    """
    t = theme()
    x, y = zip(*model, strict=True)
    ax.plot(x, y, color=t.blue)
    labels = [(x[-1], y[-1], "closed form", t.blue)]
    if measured:
        xs, ys = zip(*sorted(measured), strict=True)
        ax.plot(xs, ys, "s", color=t.blue, markerfacecolor=t.paper, markeredgewidth=1.6,
                markersize=7)  # fmt: skip
        ax.annotate("through L2, measured", (xs[0], ys[0]), xytext=(10, 4), size=9,
                    textcoords="offset points", color=t.blue)  # fmt: skip
    if least is not None:
        ends = [x[0], x[-1]]
        ax.plot(ends, [least, least], color=t.ink, linewidth=1, linestyle=(0, (4, 3)))
        labels.append((x[-1], least, "each tensor once", t.ink))
    size_axis(ax, "x", label="rows of Q in a tile", every=1)
    bytes_axis(ax, "y", label="bytes moved", every=1)
    end_labels(ax, labels, room=0.25)
    if title:
        ax.set_title(title)
    falls = significant(max(y) / min(y), 2)
    return (
        "Bytes of the fused kernel against the rows of its tile, both axes logarithmic: the closed "
        f"form falls by a factor of {falls} over the range, towards the line of the compulsory "
        "traffic." + (" Squares: measured, falling as the line does." if measured else "")
    )
