"""Explorer of chapter 11: which tiles a mask touches.

A causal mask over 96 tokens, small enough to see each score.  The masks are those of
``labkit.patterns``, packed when the figure is made; the page holds them as text and draws what a
tile size makes of them.  Every pattern is set so that a query sees about as many keys.

Loads torch when a figure is made, not before.  ``tiles.js`` is the twin of the drawing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from labkit.errors import ArgumentError, check_choice
from labkit.explorers import scene
from labkit.explorers.core import Explorer, choice

__all__ = ["KEYS", "SHOWN", "TILES", "pattern_tiles"]

N, D = 96, 64
#: keys that a query sees, about
KEYS = (2, 4, 8, 16, 32)
#: rows and columns of a tile; all divide N
TILES = (1, 2, 4, 8, 16, 32)
#: name → what the control calls it
SHOWN = {
    "local": "local: a window",
    "strided": "strided",
    "random": "random",
    "blocks": "random blocks of 4",
    "clustered": "clustered",
    "sorted": "clustered, sorted",
    "hierarchical": "hierarchical",
}
_LEVELS = {2: (1, 2), 4: (1, 6), 8: (2, 5), 16: (5, 4), 32: (12, 3)}
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
#: corner and cell of the matrix, place and width of the bars, in units of the view box
_PLACE = {
    "wide": {"x": 2, "y": 22, "cell": 4, "bars": {"x": 416, "y": 60, "w": 302}},
    "narrow": {"x": 2, "y": 22, "cell": 3.7, "bars": {"x": 2, "y": 388, "w": 356}},
}


# -- the masks -----------------------------------------------------------------------------
def seen(shown: str, keys: int) -> list[list[bool]]:
    """``[N][N]``: whether a query, downwards, sees a key, to the right."""
    from labkit import patterns

    which = {
        "local": lambda: patterns.Local(keys),
        "strided": lambda: patterns.Strided(round(N / (2 * keys))),
        "random": lambda: patterns.Random(2 * keys),
        "blocks": lambda: patterns.Random(max(1, (keys - 2) // 2)).in_blocks(4),
        "clustered": lambda: patterns.Clustered(round(N / (2 * keys))),
        "hierarchical": lambda: patterns.Hierarchical(*_LEVELS[keys]),
    }["clustered" if shown == "sorted" else shown]()
    mask = which.dense_mask(N, causal=True)
    if shown == "sorted":
        order = list(which.order(N))
        mask = mask[order][:, order]  # still causal: a cluster keeps the order of its tokens
    return mask.tolist()


def pack(mask: list[list[bool]]) -> str:
    """The lower triangle, row by row, six scores to a character."""
    out = []
    for i, row in enumerate(mask):
        for start in range(0, i + 1, 6):
            out.append(_DIGITS[sum(row[j] << (j - start) for j in range(start, min(start + 6, N)))])
    return "".join(out)


def unpack(text: str) -> list[list[bool]]:
    """The inverse of ``pack``; what lies above the diagonal is hidden."""
    mask, at = [], 0
    for i in range(N):
        wide = i // 6 + 1
        digits = [_DIGITS.index(c) for c in text[at : at + wide]]
        mask.append([j <= i and digits[j // 6] >> j % 6 & 1 == 1 for j in range(N)])
        at += wide
    return mask


def tiles(mask: list[list[bool]], block: int) -> list[list[int]]:
    """How many scores are visible in each tile of ``block`` × ``block``."""
    out = []
    for top in range(0, N, block):
        rows = mask[top : top + block]
        columns = [sum(column) for column in zip(*rows, strict=True)]
        out.append([sum(columns[left : left + block]) for left in range(0, N, block)])
    return out


# -- the drawing ---------------------------------------------------------------------------
def _runs(length: int, test: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
    start = None
    for j in range(length + 1):
        if j < length and test(j):
            start = j if start is None else start
        elif start is not None:
            yield start, j
            start = None


def _line(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{scene.number(a)} {scene.number(b)}" for a, b in points)


def _draw(model: Any, layout: str) -> list[tuple]:
    figure, box = model.spec["figure"], model.spec["layouts"][layout]
    font, at = box["font"], figure["at"][layout]
    x, y, c = at["x"], at["y"], at["cell"]
    mask, block = unpack(figure["masks"][int(model("p"))][int(model("k"))]), int(model("b"))
    touched = tiles(mask, block)

    def square(left: int, right: int, top: int, bottom: int) -> str:
        wide, tall = scene.number((right - left) * c), scene.number((bottom - top) * c)
        corner = f"{scene.number(x + left * c)} {scene.number(y + top * c)}"
        return f"M{corner}h{wide}v{tall}h-{wide}z"

    cells = "".join(
        square(start, stop, i, i + 1)
        for i, row in enumerate(mask)
        for start, stop in _runs(N, row.__getitem__)
    )
    orange = "".join(
        square(start * block, stop * block, r * block, (r + 1) * block)
        for r, row in enumerate(touched)
        for start, stop in _runs(len(row), lambda k, row=row: row[k] > 0)
    )
    end = N * c
    edges = range(block, N, block) if block >= 4 else ()
    rules = "".join(
        _line([(x + k * c, y), (x + k * c, y + end)])
        + _line([(x, y + k * c), (x + end, y + k * c)])
        for k in edges
    )
    corners = [(x, y), (x + end, y), (x + end, y + end), (x, y + end), (x, y)]
    shapes: list[tuple] = [
        ("text", x, y - 6, model.text(figure["across"]), "tick", "start"),
        ("text", x + end, y - 6, model.text(figure["down"]), "tick", "end"),
        ("path", orange, "cells b"),
        ("path", cells, "cells a"),
    ]
    if rules:
        shapes.append(("path", rules, "rule"))
    shapes.append(("path", _line(corners), "axis"))
    left, line, wide = (at["bars"][name] for name in "xyw")
    for bar in figure["bars"]:
        shapes.append(("text", left, line + font, model.text(bar["label"]), "name", "start"))
        shapes.append(("text", left + wide, line + font, model.text(bar["note"]), "tick", "end"))
        line += font * 1.4
        long = max(model(bar["share"]) * wide, 1)
        shapes.append(("rect", left, line, wide, font * 1.1, "box"))
        shapes.append(("rect", left, line, long, font * 1.1, bar["style"]))
        line += font * 1.8
    return shapes


class _Tiles(Explorer):
    """The core, with one more kind of figure."""

    parts = ("tiles.js",)
    styles = ("style.css", "tiles.css")
    draw = staticmethod(_draw)


# -- the figure ----------------------------------------------------------------------------
def pattern_tiles(*, pattern: str = "random", keys: int = 4, tile: int = 8) -> Explorer:
    """A mask over 96 tokens, the tiles that it touches, and what each way computes.

    Parameters
    ----------
    pattern : where the control starts, one of ``SHOWN``.
    keys : keys that a query sees, about; one of ``KEYS``.
    tile : rows and columns of a tile, one of ``TILES``.

    Returns
    -------
    Explorer
        quantities ``seen`` (visible scores) and ``causal`` (those up to the diagonal), ``touched``,
        ``full`` and ``tiles`` (tiles: in which something, or all, is visible; up to the diagonal),
        ``computed`` and ``triangle`` (scores of the tiles touched and of those up to the diagonal).

    Raises
    ------
    ArgumentError
        for a pattern, a number of keys or a tile that is not among them.
    """
    check_choice("pattern", pattern, SHOWN)
    for name, value, known in (("keys", keys, KEYS), ("tile", tile, TILES)):
        if isinstance(value, bool) or value not in known:
            raise ArgumentError(
                name, value, "is not on the control.", f"Pass one of {', '.join(map(str, known))}."
            )
    masks = {name: {k: seen(name, k) for k in KEYS} for name in SHOWN}

    found = {
        (name, k, b): [x for row in tiles(mask, b) for x in row]
        for name, by_keys in masks.items()
        for k, mask in by_keys.items()
        for b in TILES
    }

    def counted(count: Callable[[list[int], int], int]) -> list[Any]:
        by_pattern = {
            name: ["case", "keys", {
                str(k): ["case", "tile", {str(b): count(found[name, k, b], b) for b in TILES}]
                for k in KEYS
            }]
            for name in SHOWN
        }  # fmt: skip
        return ["case", "pattern", by_pattern]

    def total(name: str) -> dict[str, Any]:
        return {
            f"{name}_share": ["/", name, "matrix"],
            f"{name}_times": ["/", name, "seen"],
            f"{name}_flops": ["*", 4, "D", name],
        }

    quantities: dict[str, Any] = {
        "matrix": ["*", "N", "N"],
        "rows": ["//", "N", "b"],
        "causal": ["/", ["*", "N", ["+", "N", 1]], 2],
        "tiles": ["/", ["*", "rows", ["+", "rows", 1]], 2],
        "seen": ["case", "pattern", {
            name: ["case", "keys", {str(k): sum(map(sum, m)) for k, m in by_keys.items()}]
            for name, by_keys in masks.items()
        }],
        "touched": counted(lambda all_of_them, b: sum(x > 0 for x in all_of_them)),
        "full": counted(lambda all_of_them, b: all_of_them.count(b * b)),
        "computed": ["*", "touched", "b", "b"],
        "triangle": ["*", "tiles", "b", "b"],
        "mean": ["/", "seen", "N"],
        "density": ["/", "seen", "causal"],
        "touched_share": ["/", "touched", "tiles"],
        "list": ["*", 4, ["+", "touched", "rows"]],
    }  # fmt: skip
    for name in ("seen", "computed", "triangle", "matrix"):
        quantities |= total(name)

    def row(label: str, name: str, held: str) -> list[str]:
        return [label, f"{{{name}:int}}", f"{{{name}_times:sig}}", f"{{{name}_flops:flop}}", held]

    def bar(label: str, name: str, style: str) -> dict[str, str]:
        return {
            "label": label, "share": f"{name}_share", "style": style,
            "note": f"{{{name}:int}}, {{{name}_share:percent}}",
        }  # fmt: skip

    return _Tiles(
        {
            "title": "Which tiles does a mask touch?",
            "about": f"{N} tokens, one head of {D}, causal. Blue: scores that count. Orange: "
            "tiles that hold one of them, which a kernel has to compute whole.",
            "controls": [
                choice(
                    "pattern", "pattern", pattern,
                    [(name, SHOWN[name], {"p": at}) for at, name in enumerate(SHOWN)],
                ),
                choice(
                    "keys", "keys per query", str(keys),
                    [(str(k), f"about {k}", {"k": at}) for at, k in enumerate(KEYS)],
                ),
                choice(
                    "tile", "tile", str(tile),
                    [(str(b), f"{b} × {b}", {"b": b}) for b in TILES],
                ),
            ],
            "constants": {"N": N, "D": D},
            "forms": {},
            "quantities": quantities,
            "figure": {
                "kind": "tiles",
                "n": N,
                "masks": [[pack(m) for m in by_keys.values()] for by_keys in masks.values()],
                "at": _PLACE,
                "across": "keys →",
                "down": "queries ↓",
                "bars": [
                    bar("visible scores", "seen", "bar a"),
                    bar("tiles that it touches", "computed", "bar b"),
                    bar("tiles of a causal kernel", "triangle", "bar e"),
                    bar("under a dense mask", "matrix", "bar e"),
                ],
                "height": {"wide": 412, "narrow": 556},
            },
            "summary": [
                "cat",
                "A query sees {mean:sig} keys on average: {density:percent} of the scores up to "
                "the diagonal. They touch {touched:int} of the {tiles:int} tiles there, "
                "{touched_share:percent}; {full:int} of those hold nothing else. ",
                [
                    "if",
                    ["==", "b", 1],
                    "Tiles of one score skip all that is hidden; no tensor core has them.",
                    [
                        "if",
                        ["<", "computed", "triangle"],
                        "For each score that counts, a kernel computes {computed_times:sig}, and "
                        "under a dense mask {matrix_times:sig}.",
                        "No tile up to the diagonal can be skipped: for each score that counts, a "
                        "kernel computes {computed_times:sig}.",
                    ],
                ],
            ],
            "table": {
                "head": ["way", "scores computed", "per visible", "operations", "mask or list"],
                "rows": [
                    row("dense mask", "matrix", "{matrix:bytes}"),
                    row("causal kernel", "triangle", "none"),
                    row("tiles touched", "computed", "{list:bytes}"),
                    row("visible scores", "seen", "none"),
                ],
            },
        }
    )  # fmt: skip
