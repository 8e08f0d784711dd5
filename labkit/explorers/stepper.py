"""Explorer of chapter 07: attention by tiles, one tile at a time.

Every number that it shows was computed by ``labkit.online_softmax.attention_tiles`` when the
figure was made: the scores of the tile, m, ℓ and O of its queries before and after, the
factor α between them.  The page holds these states as text, for each choice of tile, mask and
order; its script (``stepper.js``) only picks one and draws it.

Loads torch when a figure is made, not before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.explorers import scene
from labkit.explorers.core import Explorer, check, choice

__all__ = ["LAYOUTS", "ORDERS", "TILES", "Stepper", "problem", "tile_stepper"]

#: the small problem that is stepped through: one head, as many keys as queries
N, D, DV = 12, 4, 2
#: block_m × block_n; the last does not divide N
TILES = {"4x4": (4, 4), "2x6": (2, 6), "4x2": (4, 2), "5x5": (5, 5)}
#: in which order a block of queries meets the blocks of keys
ORDERS = {"up": "first to last", "down": "last to first"}
#: entries of O from here on have the deepest tint
_DEEP = 2.0

#: Geometry of the two layouts.  ``map``: S as a whole, square cells; ``tile`` and ``state``:
#: numbers, cells w × h; all in units of the view box, origin of the first cell.
LAYOUTS: dict[str, dict[str, Any]] = {
    "wide": {
        "w": 720, "h": 360, "font": 14, "strip": 14, "gap": 6,
        "map": {"x": 36, "y": 58, "cell": 18},
        "legend": {"x": 36, "y": 316, "dx": 122, "dy": 22, "columns": 2},
        "tile": {"x": 330, "y": 44, "w": 50, "h": 22},
        "state": {"x": 330, "y": 224, "w": 43, "h": 22},
    },
    "narrow": {
        "w": 360, "h": 566, "font": 12.5, "strip": 12, "gap": 5,
        "map": {"x": 28, "y": 44, "cell": 15},
        "legend": {"x": 252, "y": 60, "dx": 0, "dy": 24, "columns": 1},
        "tile": {"x": 18, "y": 284, "w": 50, "h": 22},
        "state": {"x": 18, "y": 454, "w": 38, "h": 22},
    },
}  # fmt: skip


# -- the problem, and what the algorithm does with it --------------------------------------
@cache
def problem() -> tuple[Any, Any, Any]:
    """q, k ``[1, 1, 12, 4]`` and v ``[1, 1, 12, 2]``, float64, the same on every machine."""
    import torch

    draw = random.Random(193)

    def numbers(columns: int, size: float) -> Any:
        rows = [[draw.randint(-12, 12) * size for _ in range(columns)] for _ in range(N)]
        return torch.tensor(rows, dtype=torch.float64)[None, None]

    return numbers(D, 1 / 4), numbers(D, 1 / 8), numbers(DV, 1 / 8)


def text(value: float) -> str:
    """A number as the figure writes it: two decimals, a true minus sign, −∞."""
    if value == -math.inf:
        return "−∞"
    shown = f"{value:.2f}"
    return ("0.00" if shown == "-0.00" else shown).replace("-", "−")


def _tinted(value: float, largest: float) -> str:
    # "0" … "6" from the most negative to the most positive, "x" for −∞; then the number
    level = "x" if value == -math.inf else str(3 + max(-3, min(3, round(3 * value / largest))))
    return level + text(value)


def _range(block: slice, one: str, many: str) -> str:
    last = block.stop - 1
    return f"{one} {last}" if block.start == last else f"{many} {block.start}–{last}"


def _list(rows: list[int]) -> str:
    *some, last = map(str, rows)
    return f"{', '.join(some)} and {last}" if some else last


def _say_tile(step: Any) -> str:
    """What happened in a tile, in a sentence or three."""
    import torch

    first = step.rows.start
    blind = torch.isneginf(step.S).all(-1)[0, 0].tolist()
    before, alpha = step.before.m[0, 0].tolist(), step.alpha[0, 0].tolist()
    rows = range(len(blind))
    hidden = [first + r for r in rows if blind[r]]
    new = [first + r for r in rows if not blind[r] and before[r] == -math.inf]
    grown = [first + r for r in rows if not blind[r] and before[r] > -math.inf and alpha[r] < 1]
    same = [first + r for r in rows if not blind[r] and alpha[r] == 1]
    met = f"{_range(step.rows, 'Query', 'Queries')} meet{'s' if len(rows) == 1 else ''} "
    parts = [met + _range(step.keys, "key", "keys") + "."]
    if len(new) == len(rows):
        parts.append("The first they see: α = 0 takes the empty state away.")
    elif new:
        parts.append(f"It is the first that {_list(new)} see{'s' if len(new) == 1 else ''}: α = 0.")
    if grown:
        one = len(grown) == 1
        parts.append(
            f"{'Query' if one else 'Queries'} {_list(grown)} find{'s' if one else ''} a larger "
            f"score: what {'it has' if one else 'they have'} in ℓ and O shrinks by α first."
        )
    elif same:
        parts.append("No score is larger than m: α = 1, nothing is rescaled.")
    empty = [i for i in hidden if before[i - first] == -math.inf]
    if hidden:
        one = len(hidden) == 1
        parts.append(
            f"{'Query' if one else 'Queries'} {_list(hidden)} see{'s' if one else ''} none of "
            + ("these keys: m stays −∞." if empty == hidden else "these keys: nothing changes.")
        )
    return " ".join(parts)


def _state_rows(state: Any, grown: list[bool]) -> str:
    m, total, out = state.m[0, 0].tolist(), state.l[0, 0].tolist(), state.O[0, 0].tolist()
    return ";".join(
        " ".join([("*" if new else "") + text(a), text(b), *(_tinted(o, _DEEP) for o in row)])
        for a, b, row, new in zip(m, total, out, grown, strict=True)
    )


@cache
def _variant(tile: str, causal: bool, order: str) -> dict[str, Any]:
    """Every step of one way through the problem, as the page holds it.

    A frame has ``t`` (the tile, or the block of queries that finishes), ``r`` (first query and
    how many), ``k`` (first key), ``title``, ``S``, ``a`` (state after), ``f`` (factors),
    ``say``, ``io`` (numbers read, written, held).  The state before it is that after the frame
    before, or ``empty`` for the first of a block of queries.
    """
    from labkit.online_softmax import FinishStep, attention_tiles

    block_m, block_n = TILES[tile]
    q, k, v = problem()
    blocks = list(range(-(-N // block_n)))
    steps = list(
        attention_tiles(
            q, k, v, block_m=block_m, block_n=block_n, causal=causal,
            order=blocks if order == "up" else blocks[::-1],
        )
    )  # fmt: skip
    scores = (q @ k.mT / D**0.5).abs().max().item()
    frames: list[dict[str, Any]] = []
    read = written = held = 0
    for step in steps:
        rows = step.rows.stop - step.rows.start
        state = rows * (DV + 2)
        frame: dict[str, Any] = {"r": [step.rows.start, rows]}
        if isinstance(step, FinishStep):
            written += rows * (DV + 1)  # O and LSE
            one = rows == 1
            shown = zip(step.LSE[0, 0].tolist(), step.O[0, 0].tolist(), strict=True)
            frame |= {
                "t": [step.i],
                "title": f"{_range(step.rows, 'query', 'queries')}: the last key is in",
                "a": ";".join(
                    " ".join([text(lse), "", *(_tinted(o, _DEEP) for o in out)])
                    for lse, out in shown
                ),
                "f": " ".join(["÷ℓ"] * rows),
                "say": f"{_range(step.rows, 'Query', 'Queries')} "
                f"{'has' if one else 'have'} met the last key. O is divided by ℓ and written, "
                "with LSE = m + log ℓ. The state is dropped.",
            }
            now = state
        else:
            keys = step.keys.stop - step.keys.start
            if not frames or frames[-1]["r"] != frame["r"]:
                read += rows * D  # this block of Q, once
            read += keys * (D + DV)  # this block of K and V
            now = state + rows * keys
            grown = (step.after.m > step.before.m)[0, 0].tolist()
            frame |= {
                "t": [step.i, step.j],
                "k": step.keys.start,
                "title": f"S of {_range(step.rows, 'query', 'queries')}, "
                + _range(step.keys, "key", "keys"),
                "S": ";".join(
                    " ".join(_tinted(s, scores) for s in row) for row in step.S[0, 0].tolist()
                ),
                "a": _state_rows(step.after, grown),
                "f": " ".join(text(a) for a in step.alpha[0, 0].tolist()),
                "say": _say_tile(step),
            }
        held = max(held, now)
        frame["io"] = [read, written, now]
        frames.append(frame)
    return {"tile": [block_m, block_n], "frames": frames, "all": [read, written, held]}


# -- drawing: stepper.js does the same -------------------------------------------------------
def _before(frames: list[dict[str, Any]], at: int) -> str:
    frame = frames[at]
    if at and frames[at - 1]["r"] == frame["r"]:
        return frames[at - 1]["a"].replace("*", "")
    return ";".join([" ".join(["−∞", "0.00", *["30.00"] * DV])] * frame["r"][1])


def _shapes(spec: dict[str, Any], variant: dict[str, Any], at: int, layout: str) -> list[tuple]:
    box, frames = spec["layouts"][layout], variant["frames"]
    frame, font = frames[at], box["font"]
    shapes: list[tuple] = []

    def write(x: float, y: float, what: str, style: str = "num", anchor: str = "middle") -> None:
        shapes.append(("text", x, y, what, style, anchor))

    def cell(x: float, y: float, w: float, h: float, tinted: str, style: str) -> None:
        level = tinted[0]
        if level != "x":
            n = int(level) - 3
            shapes.append(("rect", x, y, w, h, f"heat {'b' if n < 0 else 'a'} h{abs(n)}"))
        if style:
            write(x + w / 2, y + h / 2 + font * 0.36, tinted[1:], style)

    # the map: what of S exists
    m, s, gap, n = box["map"], box["strip"], box["gap"], spec["n"]
    x0, y0, c = m["x"], m["y"], m["cell"]
    end = n * c
    bm, bn = variant["tile"]
    write(x0 - gap - s / 2, y0 - 6, "Q", "name")
    write(x0 + end + gap + s / 2, y0 - 6, "O", "name")
    write(x0 + end / 2, y0 - gap - s - 6, "K and V", "name")
    for i in range(-(-n // bm)):
        y, h = y0 + i * bm * c, (min(n, i * bm + bm) - i * bm) * c
        now = frame["t"][0] == i
        done = next(at for at, f in enumerate(frames) if f["t"] == [i]) <= at
        shapes.append(("rect", x0 - gap - s, y, s, h, "solid a" if now else "box"))
        shapes.append(("rect", x0 + end + gap, y, s, h, "solid c" if done else "box"))
        for j in range(-(-n // bn)):
            x, w = x0 + j * bn * c, (min(n, j * bn + bn) - j * bn) * c
            visit = next((at for at, f in enumerate(frames) if f["t"] == [i, j]), -1)
            if visit == at:
                for r, row in enumerate(frame["S"].split(";")):
                    for k, value in enumerate(row.split(" ")):
                        cell(x + k * c, y + r * c, c, c, value, "")
            shapes.append(("rect", x, y, w, h, "box gone" if 0 <= visit < at else "box"))
            if visit < 0:
                shapes += _cross(x + w / 2, y + h / 2, c / 2)
    tiled = len(frame["t"]) == 2
    for j in range(-(-n // bn)):
        x, w = x0 + j * bn * c, (min(n, j * bn + bn) - j * bn) * c
        now = tiled and frame["t"][1] == j
        shapes.append(("rect", x, y0 - gap - s, w, s, "solid a" if now else "box"))
    if tiled:
        i, j = frame["t"]
        h, w = (min(n, i * bm + bm) - i * bm) * c, (min(n, j * bn + bn) - j * bn) * c
        shapes.append(("rect", x0 + j * bn * c, y0 + i * bm * c, w, h, "box a"))

    # legend
    g = box["legend"]
    for index, (style, what) in enumerate(spec["legend"]):
        x = g["x"] + index % g["columns"] * g["dx"]
        y = g["y"] + index // g["columns"] * g["dy"]
        shapes.append(("rect", x, y - 11, 14, 14, style))
        if style == "box skipped":
            shapes += _cross(x + 7, y - 4, 4)
        write(x + 20, y, what, "tick", "start")

    # the tile in numbers
    t = box["tile"]
    write(t["x"] - 18, t["y"] - 27, frame["title"], "name", "start")
    if tiled:
        rows = [row.split(" ") for row in frame["S"].split(";")]
        for k in range(len(rows[0])):
            write(t["x"] + (k + 0.5) * t["w"], t["y"] - 6, str(frame["k"] + k), "tick")
        for r, row in enumerate(rows):
            y = t["y"] + r * t["h"]
            write(t["x"] - 5, y + t["h"] / 2 + font * 0.36, str(frame["r"][0] + r), "tick", "end")
            for k, value in enumerate(row):
                cell(t["x"] + k * t["w"], y, t["w"], t["h"], value, "num")
        height, width = len(rows) * t["h"], len(rows[0]) * t["w"]
        shapes.append(("rect", t["x"], t["y"], width, height, "box a"))
    else:
        write(t["x"], t["y"] + 16, "no tile on chip", "tick", "start")

    # the state: before, factor, after
    z = box["state"]
    w, h = z["w"], z["h"]
    heads = ["m", "ℓ", "O"], (["m", "ℓ", "O"] if tiled else ["LSE", "", "O ÷ ℓ"])
    factor = z["x"] + (2.5 + spec["dv"]) * w
    right = z["x"] + (3 + spec["dv"]) * w
    for x, head, names in ((z["x"], "before", heads[0]), (right, "after", heads[1])):
        write(x, z["y"] - 24, head, "name", "start")
        for k, name in enumerate(names):
            write(x + (k + 0.5 if k < 2 else 2 + spec["dv"] / 2) * w, z["y"] - 6, name, "tick")
    write(factor, z["y"] - 6, "α" if tiled else "", "tick")
    factors = frame["f"].split(" ")
    sides = (z["x"], _before(frames, at).split(";")), (right, frame["a"].split(";"))
    for r, value in enumerate(factors):
        y = z["y"] + r * h
        base = y + h / 2 + font * 0.36
        write(z["x"] - 5, base, str(frame["r"][0] + r), "tick", "end")
        write(factor, base, value, "num" if value == "1.00" else "value")
        for x, rows_of in sides:
            a, b, *out = rows_of[r].split(" ")
            grown = a.startswith("*")
            write(x + w / 2, base, a[1:] if grown else a, "value" if grown else "num")
            write(x + 1.5 * w, base, b)
            for k, value_of in enumerate(out):
                cell(x + (2 + k) * w, y, w, h, value_of, "num")
    for x, _ in sides:
        shapes.append(("rect", x, z["y"], (2 + spec["dv"]) * w, len(factors) * h, "box"))
    return shapes


def _cross(x: float, y: float, r: float) -> list[tuple]:
    f = scene.number
    return [("path", f"M{f(x - r)} {f(y + a)}L{f(x + r)} {f(y - a)}", "skip") for a in (-r, r)]


# -- the object --------------------------------------------------------------------------------
class Stepper(Explorer):
    """The explorer of attention by tiles; made by :func:`tile_stepper`."""

    script = "stepper.js"
    styles = ("style.css", "stepper.css")

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__({"forms": {}, **spec})
        self.spec["layouts"] = {name: dict(box) for name, box in LAYOUTS.items()}

    def _at(self, changes: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """The variant and the index of the frame at the initial state with ``changes``."""
        state = self.state
        for name, value in changes.items():
            check_choice("control", name, state)
            state[name] = value
        tile, order = (
            check_choice(name, state[name], known)
            for name, known in (("tile", TILES), ("order", ORDERS))
        )
        variant = self.spec["variants"][f"{tile},{int(state['causal'])},{order}"]
        step = check_positive_int("step", state["step"])
        return variant, min(step, len(variant["frames"])) - 1

    def steps(self, **changes: Any) -> int:
        """How many steps there are with these controls."""
        return len(self._at(changes)[0]["frames"])

    def values(self, **changes: Any) -> dict[str, Any]:
        """The embedded frame: what the page knows at this step."""
        variant, at = self._at(changes)
        return variant["frames"][at] | {"before": _before(variant["frames"], at)}

    def summary(self, **changes: Any) -> str:
        """The sentence below the figure."""
        variant, at = self._at(changes)
        frames = variant["frames"]
        return f"Step {at + 1} of {len(frames)}. {frames[at]['say']}"

    def table(self, **changes: Any) -> list[list[str]]:
        """Numbers moved and held, header first."""
        variant, at = self._at(changes)
        so_far, everything = variant["frames"][at]["io"], variant["all"]
        rows = [
            [name, str(a), str(b), three]
            for (name, three), a, b in zip(
                self.spec["table"]["rows"], so_far, everything, strict=True
            )
        ]
        return [self.spec["table"]["head"], *rows]

    def svg(self, layout: str = "wide", **changes: Any) -> str:
        """The figure as the inside of an ``<svg>``; ``layout`` is ``"wide"`` or ``"narrow"``."""
        check_choice("layout", layout, LAYOUTS)
        return scene.svg(_shapes(self.spec, *self._at(changes), layout))

    def png(self, layout: str = "wide") -> bytes:
        """The figure at its initial state as a PNG, two pixels per unit."""
        box = self.spec["layouts"][layout]
        return scene.png(_shapes(self.spec, *self._at({}), layout), box["w"], box["h"])

    def label(self, **changes: Any) -> str:
        """The drawing in words: the state of each query before and after."""
        variant, at = self._at(changes)
        frames = variant["frames"]
        frame, words = frames[at], [f"{self.spec['title']} {frames[at]['title']}."]
        after = "m, ℓ, O" if len(frame["t"]) == 2 else "LSE, O"
        pairs = zip(
            _before(frames, at).split(";"), frame["f"].split(" "), frame["a"].split(";"),
            strict=True,
        )  # fmt: skip
        for r, (old, factor, new) in enumerate(pairs):
            words.append(
                f"Query {frame['r'][0] + r}: m, ℓ, O from {_plain(old)}; factor {factor}; "
                f"{after} now {_plain(new)}."
            )
        return " ".join(words)

    def _label(self) -> str:
        return self.label()

    def _control_html(self, control: dict[str, Any]) -> str:
        if control["kind"] != "step":
            return super()._control_html(control)
        value, last = control["value"], self.steps()
        return (
            '<div class="lkx-control lkx-step" data-control="step"><label><span>step</span>'
            f'<input type="number" inputmode="numeric" autocomplete="off" min="1" max="{last}" '
            f'step="1" value="{value}"></label><span class="lkx-of">of {last}</span>'
            '<button type="button" class="lkx-back">← Back</button>'
            '<input type="range" autocomplete="off" aria-label="step, slider" min="1" '
            f'max="{last}" step="1" value="{value}">'
            '<button type="button" class="lkx-next">Next →</button></div>'
        )

    def __str__(self) -> str:
        rows = self.label().removeprefix(self.spec["title"] + " ").replace(". Query", ".\nQuery")
        return f"{super().__str__()}\n\n{rows}"

    __repr__ = __str__


def _plain(row: str) -> str:
    m, total, *out = row.replace("*", "").split(" ")
    return ", ".join(part for part in (m, total, f"({', '.join(o[1:] for o in out)})") if part)


def tile_stepper(
    *, tile: str = "4x4", causal: bool = False, order: str = "up", step: int = 1
) -> Stepper:
    """Attention by tiles, step by step: the tile, the state of its queries, the numbers moved.

    Parameters
    ----------
    tile : ``"4x4"``, ``"2x6"``, ``"4x2"`` or ``"5x5"``: queries × keys.
    causal : whether query i sees keys up to i only; tiles without visible scores are skipped.
    order : ``"up"`` or ``"down"``: blocks of keys from first to last or from last to first.
    step : where it starts.

    Raises
    ------
    ArgumentError
        for an unknown tile or order, or a step beyond the last.
    """
    check_choice("tile", tile, TILES)
    check_choice("order", order, ORDERS)
    variants = {
        f"{t},{int(c)},{o}": _variant(t, c, o) for t in TILES for c in (False, True) for o in ORDERS
    }
    step = check_positive_int("step", step)
    controls = [
        choice(
            "tile", "queries × keys", tile,
            [(key, f"{m} × {n}" + (", ragged" if N % m or N % n else ""), {})
             for key, (m, n) in TILES.items()],
        ),
        choice("order", "blocks of keys", order, [(key, what, {}) for key, what in ORDERS.items()]),
        check("causal", "causal", causal),
        {"kind": "step", "name": "step", "label": "step", "value": step},
    ]  # fmt: skip
    last = len(variants[f"{tile},{int(causal)},{order}"]["frames"])
    if step > last:
        raise ArgumentError("step", step, "is beyond the last.", f"Pass at most {last}.")
    moved_q, moved_s, moved_o = N * D, N * N, N * DV
    return Stepper(
        {
            "title": "Attention, one tile at a time.",
            "about": f"{N} queries, {N} keys, one head. The map shows which scores exist: those "
            "of one tile. The numbers are that tile and what is kept of each of its queries. "
            "Blue is positive, orange negative.",
            "controls": controls,
            "n": N,
            "dv": DV,
            "legend": [
                ["box a", "this tile"],
                ["box gone", "used, gone"],
                ["box", "to come"],
                ["box skipped", "skipped"],
            ],
            "figure": {"kind": "tiles"},
            "variants": variants,
            "table": {
                "head": ["numbers", "so far", "by tiles, in all", "in three steps"],
                "rows": [
                    # Q, K and V, and S and P once each
                    ["read from HBM", str(2 * moved_q + moved_o + 2 * moved_s)],
                    ["written to HBM", str(2 * moved_s + moved_o)],
                    ["scores and state held", str(2 * moved_s)],
                ],
            },
        }
    )
