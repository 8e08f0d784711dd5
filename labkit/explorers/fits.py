"""Explorer of chapter 10: what fits in this card.

A model of labkit.layers, a sequence and a card: how many bytes are alive at the worst moment of a
forward pass or of a training step, part by part, and the longest sequence that fits.  The bytes
are those of ``labkit.layers.budget``, written as closed forms.  Which moment is the worst depends
on the sizes; the figure takes the largest of those that can be (:data:`WORST`).  One size is no
polynomial, the partial sums of a bias's gradient: here it is that of many tokens, and the bytes
are up to 140 MB less than the budget's (``labkit.layers.budget``).

``fits.js`` is the twin of the drawing here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from labkit.closed_form import Form, symbols
from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.explorers import scene
from labkit.explorers.core import Explorer, choice
from labkit.explorers.core import size as core_size
from labkit.hardware import card
from labkit.layers.budget import PARTS, Case, form_of, places

__all__ = ["CARDS", "MODES", "REGIMES", "WAYS", "fits"]

#: cards whose memory is drawn, and what the figure calls them
CARDS = {
    "rtx3060": "RTX 3060, 12 GB",
    "rtx4090": "RTX 4090, 24 GB",
    "h100-sxm": "H100, 80 GB",
    "h200": "H200, 141 GB",
}
#: how attention is computed: key → (words, backend of the budget)
WAYS = {
    "naive": ("naive: S and P written", "naive"),
    "fused": ("fused: flash or SDPA", "flash"),
}
#: key → (words, precision of the budget, bytes of an element, of a weight)
REGIMES = {
    "float32": ("float32 or TF32", "fp32", 4, 4),
    "autocast": ("autocast to float16", "autocast_fp16", 2, 4),
    "half": ("half: weights too", "fp16", 2, 2),
}
MODES = {
    "inference": "forward pass only",
    "training": "training step, AdamW",
    "checkpointed": "training, checkpointed",
}
#: batch sizes on offer: with one sequence, naive attention copies nothing
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)

#: mode → the moments of which one is the worst: (phase, layer, what has just been made)
WORST: dict[str, tuple[tuple[str, str, str], ...]] = {
    "inference": (
        ("forward", "last", "S"),
        ("forward", "last", "O by heads"),
        ("forward", "last", "GELU"),
        ("forward", "last", "ff.2"),
    ),
    "training": (
        ("backward", "last", "dP ⊙ P"),
        ("backward", "last", "sums for db ff.2"),
        ("backward", "", "d loss"),
        ("backward", "first", "sums for db ff.0"),
        ("backward", "last", "d W ff.0, half"),
        ("backward", "first", "d W ff.0, half"),
        ("backward", "first", "sums for db q_proj"),
        ("backward", "first", "d W q_proj, half"),
    ),
    "checkpointed": (
        ("backward", "last", "dP ⊙ P"),
        ("backward", "first", "dP ⊙ P"),
        ("backward", "last", "d GELU"),
        ("backward", "first", "d GELU"),
        ("backward", "last", "dW ff.2, half"),
        ("backward", "first", "dW ff.2, half"),
        ("forward", "last", "GELU"),
        ("forward", "last", "O by heads"),
        ("backward", "first", "dW ff.0"),
        ("backward", "first", "d W ff.0, half"),
        ("backward", "first", "dW q_proj"),
        ("backward", "first", "d W q_proj, half"),
    ),
}
#: part → (what the figure calls it, style)
_SHOWN = {
    "weights": ("weights", "bar c"),
    "gradients": ("gradients", "grown c"),
    "optimizer": ("optimizer", "bar e"),
    "activations": ("activations kept", "bar a"),
    "scores": ("S and P", "bar b"),
    "workspace": ("in passing", "bar d"),
}
_STOPS = {
    "L": [2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128],
    "taken": [0, 256, 512, 768, 1024, 2048, 3072, 4096, 8192],
}
_LIMITS = {"L": (2, 1024), "taken": (0, 8192)}


# -- the forms -----------------------------------------------------------------------------
@cache
def _form(size: str) -> Form:
    """A size of the budget, for as many KV heads as heads and ff_mult 4, in L layers."""
    h, layers, d = symbols("H L d")
    return form_of(size).substitute(M=layers - 1, G=h, F=Form(4), D=d)


def _alive(case: Case, where: tuple[str, str, str]) -> dict[tuple[str, str], int] | None:
    """Buffers by part and size when that has just been made, or None if it never is."""
    phase, layer, name = where
    for (p, at, _), moment in reversed(places(case).items()):
        if (p, at, moment.name) == (phase, layer, name):
            return moment.alive
    return None


@cache
def _forms(way: str, regime: str, mode: str, causal: bool) -> tuple[dict[str, Form], ...]:
    """The worst moments of one case, part by part, in B, N, H, d, L, e, w and two switches.

    ``c`` is 1 if there are several sequences, and ``h`` if elements are narrower than float32.
    """
    autocast = regime == "autocast"
    halves = (True,) if autocast else (False, True)
    cases = {
        (copies, half): Case(
            backend=WAYS[way][1], autocast=autocast, mode=mode, causal=causal, gather_q=copies,
            gather_kv=copies, half=half, inside=autocast, scaled=autocast and mode != "inference",
        )
        for copies in (False, True)
        for half in halves
    }  # fmt: skip
    one, c, h = Form(1), *symbols("c h")
    out = []
    for where in WORST[mode]:
        alive = {key: _alive(case, where) for key, case in cases.items()}
        if None in alive.values():
            continue
        parts = {part: Form(0) for part in PARTS}
        for part, size in dict.fromkeys(key for found in alive.values() for key in found):
            n = {key: found.get((part, size), 0) for key, found in alive.items()}
            plain = n[False, halves[0]]
            copied = n[True, halves[0]] - plain
            count = one * plain + c * copied
            if len(halves) == 2:
                narrow = n[False, True] - plain
                count = count + h * narrow + c * h * (n[True, True] - plain - copied - narrow)
            if count != 0:
                parts[part] = parts[part] + count * _form(size)
        out.append(parts)
    return tuple(out)


# -- the drawing ---------------------------------------------------------------------------
def _draw(model: Any, layout: str) -> list[tuple]:
    """Names and bytes of the parts, then a bar for each card: its memory, and what fills it."""
    figure, box = model.spec["figure"], model.spec["layouts"][layout]
    font, left, right = box["font"], 2, box["w"] - 2
    columns = 3 if layout == "wide" else 2
    step = (right - left) / columns
    shapes: list[tuple] = []
    y = font * 0.4
    for i, part in enumerate(figure["parts"]):
        x = left + (i % columns) * step
        shapes.append(("rect", x, y, font, font, part["style"]))
        text = model.text(part["label"])
        shapes.append(("text", x + font * 1.4, y + font * 0.85, text, "tick", "start"))
        if i % columns == columns - 1:
            y += font * 1.6
    y += font * 0.6
    # the card ends before the figure does, so that what is too much can be seen
    full = (right - left) * 0.86
    tall = font * 1.5
    for lane in figure["cards"]:
        y += font * 1.3
        shapes.append(("text", left, y, model.text(lane["label"]), "name", "start"))
        shapes.append(("text", right, y, model.text(lane["note"]), "tick", "end"))
        y += font * 0.5
        memory, start = model(lane["memory"]), 0.0
        for part in figure["parts"]:
            value = model(part["value"])
            x0 = min(start * full / memory, right - left)
            x1 = min((start + value) * full / memory, right - left)
            start += value
            if x1 - x0 >= 0.05:
                shapes.append(("rect", left + x0, y, x1 - x0, tall, part["style"]))
        corners = [(0, 0), (full, 0), (full, tall), (0, tall), (0, 0)]
        edge = "L".join(f"{scene.number(left + a)} {scene.number(y + b)}" for a, b in corners)
        shapes.append(("path", "M" + edge, "axis"))
        y += tall + font * 0.4
    return shapes


class _Fits(Explorer):
    """The core, with one more kind of figure."""

    parts = ("fits.js",)
    draw = staticmethod(_draw)


# -- the figure ----------------------------------------------------------------------------
def _whole(name: str, argument: str, value: int) -> dict[str, Any]:
    low, high = _LIMITS[name]
    if not (low == 0 and value == 0 and value is not False):
        check_positive_int(argument, value)
    if not low <= value <= high:
        raise ArgumentError(
            argument, value, "is beyond the explorer.", f"Pass {low} to {high}."
        )  # fmt: skip
    return {
        "kind": "size", "name": name, "label": argument, "value": int(value), "min": low,
        "max": high, "stops": _STOPS[name],
    }  # fmt: skip


def _several_heads(value: int) -> dict[str, Any]:
    """Heads from two on: one head is laid out otherwise, and nobody has one."""
    control = core_size("H", "heads", value)
    if value < 2:
        raise ArgumentError("heads", value, "is beyond the explorer.", "Pass 2 to 1024.")
    return control | {"min": 2, "stops": [n for n in control["stops"] if n > 1]}


def fits(
    *,
    heads: int = 16,
    head_dim: int = 64,
    layers: int = 24,
    seq_len: int = 4096,
    batch: int = 1,
    precision: str = "autocast",
    attention: str = "naive",
    mode: str = "training",
    taken_mib: int = 768,
    causal: bool = False,
) -> Explorer:
    """Bytes of a model and its step, part by part, in four cards, and the longest that fits.

    Parameters
    ----------
    heads, head_dim, layers, seq_len : where the controls start; dim is heads · head_dim.
    batch : one of ``BATCHES``.
    precision, attention, mode : of ``REGIMES``, ``WAYS`` and ``MODES``.
    taken_mib : MiB of the card that others have: the CUDA context, a desktop.
    causal : fixed; naive attention also writes its mask down.

    Returns
    -------
    Explorer
        quantities ``peak`` and one for each part of ``labkit.layers.budget.PARTS`` (bytes);
        ``dim``; ``memory_<card>`` (bytes that are left), ``share_<card>``, and ``full_<card>``,
        the longest seq_len that fits.

    Raises
    ------
    ArgumentError
        for a size out of range, or an unknown choice.
    """
    check_choice("precision", precision, REGIMES)
    check_choice("attention", attention, WAYS)
    check_choice("mode", mode, MODES)
    if batch not in BATCHES:
        known = ", ".join(map(str, BATCHES))
        raise ArgumentError("batch", batch, "is not on offer.", f"Use one of {known}.")
    if not isinstance(causal, bool):
        raise ArgumentError("causal", causal, "is not a bool.", "Pass True or False.")

    forms: dict[str, Form] = {}
    names: dict[Form, str] = {}

    def name_of(form: Form) -> str:
        if form not in names:
            names[form] = f"f{len(names)}"
            forms[names[form]] = form
        return names[form]

    cases = {
        (way, regime, kind): _forms(way, "half" if regime == "float32" else regime, kind, causal)
        for way in WAYS
        for regime in REGIMES
        for kind in MODES
    }

    def total(moment: dict[str, Form]) -> str:
        return name_of(sum(moment.values(), Form(0)))

    def by_case(make: Callable[[tuple[dict[str, Form], ...]], Any]) -> Any:
        """What ``make`` gives for the moments of each case, chosen by the controls."""
        return ["case", "attention", {
            way: ["case", "precision", {
                regime: ["case", "mode", {kind: make(cases[way, regime, kind]) for kind in MODES}]
                for regime in REGIMES
            }]
            for way in WAYS
        }]  # fmt: skip

    def at_peak(part: str) -> Callable[[tuple[dict[str, Form], ...]], Any]:
        def make(found: tuple[dict[str, Form], ...]) -> Any:
            *others, last = found
            value: Any = ["form", name_of(last[part])]
            for moment in reversed(others):
                here = ["==", ["form", total(moment)], "peak"]
                value = ["if", here, ["form", name_of(moment[part])], value]
            return value

        return make

    quantities: dict[str, Any] = {
        "peak": by_case(lambda found: ["max", *(["form", total(m)] for m in found)])
    }
    for part in PARTS:
        quantities[part] = by_case(at_peak(part))
    quantities["dim"] = ["*", "H", "d"]
    lanes, rows = [], []
    for key, label in CARDS.items():
        c, name = card(key), key.replace("-", "_")
        memory = c.usable_bytes or c.memory_bytes
        quantities[f"memory_{name}"] = ["-", memory, ["*", "taken", 2**20]]
        quantities[f"share_{name}"] = ["/", "peak", f"memory_{name}"]
        quantities[f"full_{name}"] = by_case(
            lambda found, left=f"memory_{name}": [
                "min", *(["longest", total(m), "N", left] for m in found)
            ]
        )  # fmt: skip
        note = ["if", ["<=", "peak", f"memory_{name}"], f"{{share_{name}:percent}} full",
                f"{{share_{name}:percent}}: too much"]  # fmt: skip
        lanes.append({"label": label, "note": note, "memory": f"memory_{name}"})
        rows.append([label, f"{{memory_{name}:bytes}}", note, f"{{full_{name}:int}}"])
    first, last = (key.replace("-", "_") for key in (next(iter(CARDS)), [*CARDS][-1]))
    return _Fits(
        {
            "title": "What fits in this card?",
            "about": "A stack of transformer layers at the worst moment of a forward pass or of a "
            "training step. Frames: the memory of real cards, less what is taken already.",
            "controls": [
                _several_heads(heads),
                core_size("d", "head_dim", head_dim),
                _whole("L", "layers", layers),
                core_size("N", "seq_len", seq_len),
                choice("batch", "batch", str(batch),
                       [(str(b), str(b), {"B": b, "c": int(b > 1)}) for b in BATCHES]),
                choice("precision", "precision", precision,
                       [(key, words, {"e": e, "w": w, "h": int(e == 2)})
                        for key, (words, _, e, w) in REGIMES.items()]),
                choice("attention", "attention", attention,
                       [(key, words, {}) for key, (words, _) in WAYS.items()]),
                choice("mode", "what runs", mode,
                       [(key, words, {}) for key, words in MODES.items()]),
                _whole("taken", "taken, MiB", taken_mib),
            ],
            "forms": forms,
            "quantities": quantities,
            "figure": {
                "kind": "fits",
                "parts": [
                    {"label": f"{label}: {{{part}:bytes}}", "value": part, "style": style}
                    for part, (label, style) in _SHOWN.items()
                ],
                "cards": lanes,
                "height": {"wide": 268, "narrow": 262},
            },
            "summary": [
                "cat",
                "dim {dim:int}, {L:int} layers: {peak:bytes} at the worst moment. In 12 GB "
                f"{{full_{first}:int}} tokens fit, in 141 GB {{full_{last}:int}}",
                ["case", "attention", {
                    "naive": ["if", ["==", "scores", 0],
                              "; S and P are small here, and grow with the square of seq_len.",
                              "; S and P take {scores:bytes}, and grow with the square of "
                              "seq_len."],
                    "fused": "; one more token costs the same, however long the sequence is.",
                }],
            ],
            "table": {
                "head": ["card", "memory left", "filled", "longest seq_len"],
                "rows": rows,
            },
        }
    )  # fmt: skip
