"""Draws an explorer's figure: a flat list of shapes, written as SVG or as PNG.

``draw(model, layout)`` turns the description of a figure into shapes; ``svg``
and ``png`` write them.  The page holds the figure twice, in a wide and in a
narrow layout, and its style sheet shows the one that fits: text stays readable
on a phone even when scripts are off.

``runtime.js`` draws the same shapes from the same description; the tests
compare the two SVG strings character by character in a real browser.  Change
both together.

Shapes: ``("path", d, style)``, ``("rect", x, y, w, h, style)``,
``("circle", x, y, r, style)`` and ``("text", x, y, string, style, anchor)``,
in the units of the layout's view box.
"""

from __future__ import annotations

import io
import math
import re
from html import escape
from itertools import pairwise
from typing import Any

from labkit.explorers.model import Model

__all__ = ["LAYOUTS", "draw", "png", "svg"]

#: view box, margins (left, right, top, bottom) and font size of each layout
LAYOUTS: dict[str, dict[str, float]] = {
    "wide": {"w": 720, "h": 420, "l": 74, "r": 20, "t": 34, "b": 54, "font": 14},
    "narrow": {"w": 360, "h": 400, "l": 56, "r": 12, "t": 30, "b": 50, "font": 12.5},
}


def number(value: float) -> str:
    """A coordinate with at most one decimal, as short as it can be."""
    text = f"{value:.1f}"
    text = text.removesuffix(".0")
    return "0" if text == "-0" else text


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


class _LogAxis:
    """Maps a value to a coordinate, by its logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end
        self.origin = math.log2(low)
        self.scale = (end - start) / (math.log2(high) - self.origin)

    def __call__(self, value: float) -> float:
        return self.start + (math.log2(value) - self.origin) * self.scale

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def _clip(points: list[tuple[float, float]], y: _LogAxis) -> list[tuple[float, float]]:
    # ``points`` rise from left to right, in coordinates (so y falls); cut at both ends.
    bottom, top = y.start, y.end
    out: list[tuple[float, float]] = []
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 < top or y1 > bottom:
            continue
        if y0 > bottom:
            x0, y0 = x0 + (x1 - x0) * (bottom - y0) / (y1 - y0), bottom
        if y1 < top:
            x1, y1 = x0 + (x1 - x0) * (top - y0) / (y1 - y0), top
        if not out:
            out.append((x0, y0))
        out.append((x1, y1))
    return out


def _draw_loglog(model: Model, figure: dict[str, Any], layout: str) -> list[tuple]:
    box = LAYOUTS[layout]
    left, right, top, bottom = box["l"], box["w"] - box["r"], box["t"], box["h"] - box["b"]
    font = box["font"]
    x = _LogAxis(figure["x"]["low"], figure["x"]["high"], left, right)
    y = _LogAxis(figure["y"]["low"], figure["y"]["high"], bottom, top)
    shapes: list[tuple] = []
    for value, label, wide_only in figure["x"]["ticks"]:
        if wide_only and layout == "narrow":
            continue
        shapes.append(("path", _path([(x(value), top), (x(value), bottom)]), "grid"))
        shapes.append(("text", x(value), bottom + font * 1.4, label, "tick", "middle"))
    for value, label, wide_only in figure["y"]["ticks"]:
        if wide_only and layout == "narrow":
            continue
        shapes.append(("path", _path([(left, y(value)), (right, y(value))]), "grid"))
        shapes.append(("text", left - 8, y(value) + font * 0.35, label, "tick", "end"))
    shapes.append(("path", _path([(left, top), (left, bottom), (right, bottom)]), "axis"))
    shapes.append(("text", 2, font * 1.1, model.text(figure["y"]["label"]), "label", "start"))
    shapes.append(
        ("text", right, box["h"] - font * 0.5, model.text(figure["x"]["label"]), "label", "end")
    )
    marks: list[tuple] = []
    for mark in figure["marks"]:
        if "if" in mark and not model(mark["if"]):
            continue
        marks += _MARKS[mark["mark"]](model, mark, x, y, font)
    # lines below, names and points above: no line strikes a name through
    return shapes + sorted(marks, key=lambda shape: shape[0] != "path")


def _curve(model, mark, x, y, font) -> list[tuple]:
    points = []
    low, high = math.log2(x.low), math.log2(x.high)
    for k in range(int(low * 2), int(high * 2) + 1):
        size = math.floor(2 ** (k / 2))
        value = model.with_size(mark["over"], size)(mark["value"])
        if value > 0:
            points.append((x(size), y(value)))
    points = _clip(points, y)
    if len(points) < 2:
        return []
    shapes: list[tuple] = [("path", _path(points), "line " + mark["style"])]
    if "label" in mark:
        label = model.text(mark["label"])
        if mark["side"] == "above":
            px, py = points[-1]
            shapes.append(("text", px - 2.6 * font, py + font, label, "name", "end"))
        else:
            # a third of the way up, to the right of the line, if there is room for it there
            px, py = points[len(points) // 3]
            shapes.append(("text", px + 10, py + font * 0.9, label, "name", "start"))
    return shapes


def _level(model, mark, x, y, font) -> list[tuple]:
    value = model(mark["value"])
    if not y.holds(value):
        return []
    py = y(value)
    dy = -0.4 * font if mark["side"] == "above" else 1.05 * font
    place = (x.start + 6 if mark["align"] == "start" else x.end - 6, py + dy)
    return [
        ("path", _path([(x.start, py), (x.end, py)]), "level"),
        ("text", *place, model.text(mark["label"]), "level-name", mark["align"]),
    ]


def _point(model, mark, x, y, font) -> list[tuple]:
    px, py = model(mark["x"]), model(mark["y"])
    if px <= 0 or not x.holds(px) or not y.holds(py):
        return []
    return [("circle", x(px), y(py), mark["r"], mark["style"])]


def _cursor(model, mark, x, y, font) -> list[tuple]:
    size, value = model(mark["x"]), model(mark["y"])
    px = x(min(max(size, x.low), x.high))
    py = y(min(max(value, y.low), y.high))
    shapes: list[tuple] = [
        ("path", _path([(px, y.end), (px, y.start)]), "cursor"),
        ("circle", px, py, 6, "dot a"),
    ]
    room = px < x.start + (x.end - x.start) * 0.66
    dx, anchor = (12, "start") if room else (-12, "end")
    # right of the line: below the curve; left of it: above the curve
    dy = font * 1.3 if room else -font * 0.6
    if py + dy > y.start - 4:
        dy = -font * 0.6
    if py + dy < y.end + font:
        dy = font * 1.3
    shapes.append(("text", px + dx, py + dy, model.text(mark["label"]), "value", anchor))
    return shapes


def _polyline(model, mark, x, y, font) -> list[tuple]:
    points = []
    for a, b in mark["points"]:
        points.append(
            (
                x(min(max(model(a), x.low), x.high)),
                y(min(max(model(b), y.low), y.high)),
            )
        )
    return [("path", _path(points), "line " + mark["style"])]


def _note(model, mark, x, y, font) -> list[tuple]:
    px = x(min(max(model(mark["x"]), x.low), x.high)) + mark["dx"] * font
    py = y(min(max(model(mark["y"]), y.low), y.high)) + mark["dy"] * font
    return [("text", px, py, model.text(mark["label"]), mark["style"], mark["anchor"])]


def _drop(model, mark, x, y, font) -> list[tuple]:
    # A point, a line down from it, and its name on a lane of its own near the axis.
    a = model(mark["x"])
    b = min(max(model(mark["y"]), y.low), y.high)
    px = x(min(max(a, x.low), x.high))
    py = y(b)
    lane = y.start - font * (0.6 + 1.35 * mark["lane"])
    left = px > x.start + (x.end - x.start) * 0.75
    dx, anchor = (-6, "end") if left else (6, "start")
    return [
        ("path", _path([(px, py), (px, y.start)]), "drop " + mark["style"]),
        ("text", px + dx, lane, model.text(mark["label"]), "name", anchor),
        ("circle", px, py, mark["r"], mark["dot"]),
    ]


_MARKS = {
    "curve": _curve,
    "level": _level,
    "point": _point,
    "cursor": _cursor,
    "polyline": _polyline,
    "note": _note,
    "drop": _drop,
}


def _draw_doubling(model: Model, figure: dict[str, Any], layout: str) -> list[tuple]:
    """Small multiples: one row per knob, one bar per quantity, ×1 and ×factor."""
    box, columns = LAYOUTS[layout], figure["columns"]
    font = box["font"]
    wide = layout == "wide"
    shapes: list[tuple] = []
    left = 112 if wide else 4
    step = (box["w"] - left) / len(columns) if wide else box["w"] - 8
    unit = (step - 22) / 4  # a bar of four units is the widest there is: twice the square
    y = font * 1.2
    if wide:
        for c, column in enumerate(columns):
            shapes.append(
                ("text", left + c * step, y, model.text(column["label"]), "name", "start")
            )
        y += font * 0.9
    for row in figure["rows"]:
        if wide:
            shapes.append(("path", _path([(0, y), (box["w"], y)]), "grid"))
            shapes.append(("text", 0, y + font * 1.9, model.text(row["label"]), "name", "start"))
            shapes.append(("text", 0, y + font * 3.2, model.text(row["note"]), "tick", "start"))
        else:
            title = model.text(row["label"]) + ": " + model.text(row["note"])
            shapes.append(("text", left, y, title, "name", "start"))
            y += font * 0.5
        for c, cell in enumerate(row["cells"]):
            x0 = left + c * step if wide else left
            y0 = y + font * 1.0 if wide else y + font * 1.15
            if not wide:
                title = model.text(columns[c]["label"])
                shapes.append(("text", x0, y0, title, "tick", "start"))
                shapes.append(("text", x0 + step, y0, model.text(cell["text"]), "tick", "end"))
                y0 += font * 0.4
            factor = model(cell["factor"])
            height = font * (1.25 if wide else 1.05)
            grown = unit * min(factor, 4)
            style = columns[c]["style"]
            shapes.append(("rect", x0, y0, grown, height, "grown " + style))
            shapes.append(("rect", x0, y0, unit, height, "bar " + style))
            shapes.append(
                (
                    "text",
                    x0 + grown + 5,
                    y0 + height * 0.78,
                    model.text(cell["times"]),
                    "value",
                    "start",
                )
                if factor < 3.2
                else (
                    "text",
                    x0 + grown - 5,
                    y0 + height * 0.78,
                    model.text(cell["times"]),
                    "value",
                    "end",
                )
            )
            if wide:
                shapes.append(
                    (
                        "text",
                        x0,
                        y0 + height + font * 1.15,
                        model.text(cell["text"]),
                        "tick",
                        "start",
                    )
                )
            else:
                y = y0 + height + font * 0.25
        y += font * (5.0 if wide else 2.1)
    return shapes


def _draw_reads(model: Model, figure: dict[str, Any], layout: str) -> list[tuple]:
    # A sequence from left to right, once per lane: what each lane's method reads of it.
    box = LAYOUTS[layout]
    font, left, right = box["font"], 2, box["w"] - 2
    unit = (right - left) / model(figure["keys"])
    tall = font * 1.5
    y = font * 1.5
    position = left + (model(figure["query"]) + 0.5) * unit
    early = position < left + (right - left) * 0.6
    shapes: list[tuple] = [
        (
            "text",
            position + (6 if early else -6),
            font * 1.1,
            model.text(figure["label"]),
            "value",
            "start" if early else "end",
        )
    ]
    for lane in figure["lanes"]:
        shapes.append(("text", left, y + font * 1.3, model.text(lane["label"]), "name", "start"))
        shapes.append(("text", right, y + font * 1.3, model.text(lane["note"]), "tick", "end"))
        y += font * 1.7
        for bar in lane["bars"]:
            for start, width in _SPANS[bar["bar"]](model, bar, unit):
                shapes.append(
                    ("rect", left + start * unit, y, max(width, 1.5), tall, "bar " + bar["style"])
                )
        # beside the bar only: no line strikes a name through
        shapes.append(("path", _path([(position, y - 3), (position, y + tall)]), "cursor"))
        y += tall
        shapes.append(("path", _path([(left, y), (right, y)]), "axis"))
        y += font * 0.4
    shapes.append(("path", _path([(position, font * 0.2), (position, font * 1.5)]), "cursor"))
    for name, share, anchor in figure["ticks"]:
        if anchor == "middle" and layout == "narrow" and share != 0.5:
            continue
        x = left + share * (right - left)
        shapes.append(("text", x, y + font * 1.1, model.text(name), "tick", anchor))
    return shapes


def _comb(model: Model, bar: dict[str, Any], unit: float) -> list[tuple[float, float]]:
    # blocks side by side, parted where there is room for a gap; the last one may be cut
    start, step, end = (model(bar[name]) for name in ("start", "step", "end"))
    if end <= start:
        return []
    if step * unit < 4:
        return [(start, (end - start) * unit)]
    spans = []
    while start < end:
        spans.append((start, (min(step, end - start)) * unit - 1))
        start += step
    return spans


def _scatter(model: Model, bar: dict[str, Any], unit: float) -> list[tuple[float, float]]:
    # ``chosen`` different ones of ``candidates`` blocks: steps of the golden ratio, which meet
    # no block twice because the step has no divisor in common with the number of blocks
    names = ("first", "candidates", "chosen", "step", "seed")
    first, candidates, chosen, step, seed = (int(model(bar[name])) for name in names)
    if candidates < 1:
        return []
    stride = max(1, math.floor(0.618 * candidates))
    while math.gcd(stride, candidates) != 1:
        stride += 1
    gap = 1 if step * unit >= 4 else 0
    return [
        ((first + (i * stride + seed) % candidates) * step, step * unit - gap)
        for i in range(chosen)
    ]


_SPANS = {"comb": _comb, "scatter": _scatter}


def draw(model: Model, layout: str) -> list[tuple]:
    """The shapes of the figure of ``model.spec`` in ``layout`` (``"wide"`` or ``"narrow"``)."""
    figure = model.spec["figure"]
    kinds = {"loglog": _draw_loglog, "doubling": _draw_doubling, "reads": _draw_reads}
    return kinds[figure["kind"]](model, figure, layout)


def height(spec: dict[str, Any], layout: str) -> float:
    """Height of the view box: the layout's own, unless the figure states another."""
    return spec["figure"].get("height", {}).get(layout, LAYOUTS[layout]["h"])


def svg(shapes: list[tuple]) -> str:
    """The inside of an ``<svg>`` element."""
    out = []
    for kind, *rest in shapes:
        if kind == "path":
            out.append(f'<path class="{_classes(rest[1])}" d="{rest[0]}"/>')
        elif kind == "rect":
            a, b, c, d = map(number, rest[:4])
            out.append(
                f'<rect class="{_classes(rest[4])}" x="{a}" y="{b}" width="{c}" height="{d}"/>'
            )
        elif kind == "circle":
            a, b, r = map(number, rest[:3])
            out.append(f'<circle class="{_classes(rest[3])}" cx="{a}" cy="{b}" r="{r}"/>')
        else:
            a, b = map(number, rest[:2])
            out.append(
                f'<text class="{_classes(rest[3])}" x="{a}" y="{b}" text-anchor="{rest[4]}">'
                f"{escape(rest[2], quote=False)}</text>"
            )
    return "".join(out)


def _classes(style: str) -> str:
    return " ".join("lkx-" + name for name in style.split())


# -- PNG: what prints, and what a viewer without HTML shows -------------------------
_INK, _SOFT, _GRID = "#1b1f24", "#57606a", "#d8dee4"
_SERIES = {"a": "#0072b2", "b": "#d55e00", "c": "#00785a", "d": "#9a4d7c", "e": "#57606a"}
_ALPHA = {"grown": 0.35, "h0": 0.0, "h1": 0.14, "h2": 0.27, "h3": 0.4}
_INKED = ("cursor", "roof")
_DASH = {"dashed": (0, (5, 3)), "drop": (0, (2, 3)), "cursor": (0, (3, 3)), "level": (0, (6, 3))}


def png(shapes: list[tuple], width: float, tall: float, *, scale: float = 2.0) -> bytes:
    """The same shapes as a PNG on white, ``scale`` pixels per unit (loads matplotlib)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Rectangle

    figure = Figure(figsize=(width / 72, tall / 72), dpi=72 * scale, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, width)
    ax.set_ylim(tall, 0)
    ax.axis("off")
    for kind, *rest in shapes:
        style = rest[3] if kind in ("circle", "text") else rest[-1]
        names = style.split()
        series = next((_SERIES[n] for n in names if n in _SERIES), None)
        if kind == "path" and names[0] == "cells":  # many rectangles, filled
            corners = []
            for match in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", rest[0]):
                x, y, w, h = map(float, match)
                corners.append([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])
            alpha = 1.0 if "a" in names else 0.38
            ax.add_collection(PolyCollection(corners, facecolor=series, alpha=alpha, linewidth=0))
        elif kind == "path" and names[0] == "rule":  # many lines
            for line in rest[0].split("M")[1:]:
                points = [tuple(map(float, p.split())) for p in line.split("L")]
                ax.plot(*zip(*points, strict=True), color=_GRID, linewidth=0.6)
        elif kind == "path":
            points = [tuple(map(float, p.split())) for p in re.split("[ML]", rest[0])[1:]]
            colour = series or (
                _INK if names[-1] in _INKED else _GRID if names[0] == "grid" else _SOFT
            )
            dash = next((_DASH[n] for n in names if n in _DASH), "solid")
            ax.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=dash,
                linewidth=2.4 if names[0] == "line" else 0.9,
                solid_capstyle="round",
            )
        elif kind == "rect":
            x, y, w, h = rest[:4]
            alpha = next((_ALPHA[n] for n in names if n in _ALPHA), 1.0)
            if "box" in names:  # an outline, over whatever it frames
                edge, wide = (series or _SOFT), (2.0 if series else 0.7)
                face = _GRID if "gone" in names else "none"
                ax.add_patch(
                    Rectangle((x, y), w, h, facecolor=face, edgecolor=edge, linewidth=wide)
                )
                continue
            face = series or "none"
            ax.add_patch(Rectangle((x, y), w, h, facecolor=face, alpha=alpha, linewidth=0))
        elif kind == "circle":
            x, y, r = rest[:3]
            face = "white" if "ring" in names else "none" if "halo" in names else series
            ax.add_patch(
                Circle((x, y), r, facecolor=face, edgecolor=series or _INK, linewidth=1.6, zorder=5)
            )
        else:
            x, y, string, _, anchor = rest
            ax.text(
                x,
                y,
                string,
                fontsize=11.5 if names[0] == "tick" else 12.5,
                ha={"start": "left", "middle": "center", "end": "right"}[anchor],
                va="baseline",
                weight="bold" if names[0] == "value" else "normal",
                color=_SOFT if names[0] in ("tick", "level-name") else _INK,
                zorder=6,
            )
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
