"""Explorer of chapter 04: the steps of attention under a card's roof.

Each point stands at its step's intensity (FLOP per byte) and at the rate that the
data sheet's ceilings allow it: operations over the longest of the times for its
bytes, its matrix products, its other arithmetic and its exponentials, as
``labkit.roofline.Roofline.time_of`` computes it.
"""

from __future__ import annotations

from typing import Any

from labkit.closed_form import Form
from labkit.errors import check_choice
from labkit.explorers.core import Explorer, check, choice, size
from labkit.explorers.scores import dtype_choice, square
from labkit.hardware import card as find_card
from labkit.roofline import special_rate, steps

__all__ = ["ROOFLINE_CARDS", "roofline"]

#: keys of the cards to choose from
ROOFLINE_CARDS = (
    *("v100-sxm2-32", "t4", "a100-sxm-80", "l4", "h100-sxm", "h200", "b200"),
    *("rtx3060", "rtx3090", "rtx4090", "rtx5090"),
)
_LOW_X, _HIGH_X = 0.25, 2**15
_LOW_Y, _HIGH_Y = 1e11, 4e15
_TICKS_Y = [
    [1e11, "100 G", False],
    [1e12, "1 T", False],
    [1e13, "10 T", False],
    [1e14, "100 T", False],
    [1e15, "1 P", False],
]
#: point: key of the step (or total), name in the figure, series, lane of the name
_POINTS = (
    ("softmax", "softmax", "d", 0),
    ("naive", "naive", "e", 1),
    ("scores", "S = QKᵀ", "a", 2),
    ("output", "O = PV", "c", 3),
    ("fused", "fused", "b", 4),
)
_LIMITS = ("memory", "tensor", "vector", "special")
_WORDS = {
    "memory": "memory",
    "tensor": "products",
    "vector": "arithmetic",
    "special": "exponentials",
}


def _parts(step: str) -> dict[str, list]:
    """Seconds that each resource needs for a step (the parts of ``Roofline.time``)."""

    def form(kind: str) -> list:
        return ["form", ["case", "causal", {c: f"{step}_{kind}_{c}" for c in ("False", "True")}]]

    return {
        "memory": ["/", form("bytes"), "bandwidth"],
        "tensor": ["/", form("matmul"), "peak"],
        "vector": ["/", ["-", form("vector"), form("exps")], "vector_peak"],
        "special": ["/", form("exps"), "special"],
    }


def _first_largest(prefix: str, texts: dict[str, str]) -> Any:
    # which resource takes longest, the earlier one on a tie, as Roofline's limited_by
    out: Any = texts[_LIMITS[-1]]
    for name in reversed(_LIMITS[:-1]):
        out = ["if", ["<=", f"{prefix}_seconds", f"{prefix}_{name}"], texts[name], out]
    return out


def roofline(
    *,
    card: str = "h200",
    seq_len: int = 4096,
    head_dim: int = 64,
    heads: int = 16,
    batch: int = 1,
    dtype: Any = "float16",
    causal: bool = False,
) -> Explorer:
    """The steps of attention under the data sheet's roof of a card.

    Parameters
    ----------
    card : key of the card to start with, one of ``ROOFLINE_CARDS``.
    seq_len, head_dim, dtype, causal : where the controls start.
    heads, batch : fixed; bytes and times are theirs.

    Returns
    -------
    Explorer
        for each of ``scores softmax output naive fused``: quantities ``<step>_intensity``
        (FLOP/byte), ``<step>_rate`` (FLOP/s) and ``<step>_seconds`` (the lower bound); and
        ``ridge``, ``peak``, ``bandwidth``.

    Raises
    ------
    ArgumentError
        for an unknown card or dtype, or a size out of range.
    """
    found = {key: find_card(key) for key in ROOFLINE_CARDS}
    check_choice("card", card, found)
    forms: dict[str, Form] = {}
    names: dict[str, list[str]] = {}
    for causal_word, flag in (("False", False), ("True", True)):
        kernels = {s.key: s for s in [*steps("naive", flag), *steps("fused", flag)]}
        for key, step in kernels.items():
            for kind in ("bytes", "matmul", "vector", "exps"):
                forms[f"{key}_{kind}_{causal_word}"] = square(getattr(step, kind))
        names[causal_word] = [s.key for s in steps("naive", flag)]
        for kind in ("bytes", "matmul"):
            forms[f"naive_{kind}_{causal_word}"] = sum(
                (forms[f"{k}_{kind}_{causal_word}"] for k in names[causal_word]), Form(0)
            )
    for key in names["True"]:  # the mask is a kernel of causal attention alone
        for kind in ("bytes", "matmul", "vector", "exps"):
            forms.setdefault(f"{key}_{kind}_False", Form(0))

    quantities: dict[str, Any] = {
        "peak": ["case", "dtype", {"float16": "peak_float16", "float32": "peak_float32"}],
        "ridge": ["/", "peak", "bandwidth"],
        "ridge_vector": ["/", "vector_peak", "bandwidth"],
    }
    for key in [*names["True"], "fused"]:
        parts = _parts(key)
        for name, expression in parts.items():
            quantities[f"{key}_{name}"] = expression
        quantities[f"{key}_seconds"] = ["max", *(f"{key}_{name}" for name in parts)]
    quantities["naive_seconds"] = ["+", *(f"{key}_seconds" for key in names["True"])]
    for key, *_ in _POINTS:
        kind = "vector" if key == "softmax" else "matmul"
        which = ["case", "causal", {c: f"{key}_{kind}_{c}" for c in ("False", "True")}]
        moved = ["case", "causal", {c: f"{key}_bytes_{c}" for c in ("False", "True")}]
        quantities[f"{key}_flops"] = ["form", which]
        quantities[f"{key}_bytes"] = ["form", moved]
        quantities[f"{key}_intensity"] = ["/", f"{key}_flops", f"{key}_bytes"]
        quantities[f"{key}_rate"] = ["/", f"{key}_flops", f"{key}_seconds"]

    start = ["max", _LOW_X, ["/", _LOW_Y, "bandwidth"]]
    marks: list[dict[str, Any]] = [
        {
            "mark": "polyline",
            "style": "e dashed",
            "points": [["ridge_vector", "vector_peak"], [_HIGH_X, "vector_peak"]],
        },
        {
            "mark": "polyline",
            "style": "roof",
            "points": [
                [start, ["*", start, "bandwidth"]],
                ["ridge", "peak"],
                [_HIGH_X, "peak"],
            ],
        },
        {
            "mark": "note",
            "x": _HIGH_X,
            "y": "peak",
            "dx": 0,
            "dy": -0.9,
            "anchor": "end",
            "style": "name",
            "label": "{peak:flops}",
        },
        {
            "mark": "note",
            "if": ["<", "vector_peak", "peak"],
            "x": _HIGH_X,
            "y": "vector_peak",
            "dx": 0,
            "dy": -0.5,
            "anchor": "end",
            "style": "level-name",
            "label": "CUDA cores {vector_peak:flops}",
        },
        {
            "mark": "note",
            "x": "ridge",
            "y": "peak",
            "dx": -0.6,
            "dy": -0.5,
            "anchor": "end",
            "style": "level-name",
            "label": "ridge {ridge:sig}",
        },
    ]
    rows = []
    for key, label, series, lane in _POINTS:
        marks.append(
            {
                "mark": "drop",
                "x": f"{key}_intensity",
                "y": f"{key}_rate",
                "lane": lane,
                "style": series,
                "dot": "halo c" if key == "output" else "dot " + series,
                # QKᵀ and PV stand at the same place: a dot in a ring
                "r": 10 if key == "output" else 6,
                "label": label,
            }
        )
        limit = "sum of kernels" if key == "naive" else _first_largest(key, _WORDS)
        rows.append(
            [
                label,
                f"{{{key}_intensity:sig}}",
                f"{{{key}_rate:flops}}",
                f"{{{key}_seconds:seconds}}",
                limit,
            ]
        )
    verdict = _first_largest(
        "fused",
        {
            "memory": "its bytes still take longest",
            "tensor": "its matrix products take longest: it has left the slope",
            "vector": "the arithmetic around its products takes longest",
            "special": "its exponentials take longest: the special-function units are the wall",
        },
    )
    return Explorer(
        {
            "title": "Is it the arithmetic or the bytes?",
            "about": "Ceilings from the data sheet; each point is the most that they allow the "
            f"step. batch {batch:,}, heads {heads:,}.",
            "controls": [
                choice(
                    "card",
                    "card",
                    card,
                    [
                        (
                            key,
                            c.name,
                            {
                                "card_name": c.name,
                                "peak_float16": c.peak["float16"],
                                "peak_float32": c.peak["float32"],
                                "vector_peak": c.peak["float32"],
                                "bandwidth": c.memory_bandwidth,
                                "special": special_rate(c.sm_count, c.tensor_clock_hz),
                            },
                        )
                        for key, c in found.items()
                    ],
                ),
                dtype_choice(dtype, ("float16", "float32")),
                size("N", "seq_len", seq_len),
                size("d", "head_dim", head_dim),
                check("causal", "causal mask", causal),
            ],
            "constants": {
                "B": size("B", "batch", batch)["value"],
                "H": size("H", "heads", heads)["value"],
            },
            "forms": forms,
            "quantities": quantities,
            "figure": {
                "kind": "loglog",
                "x": {
                    "low": _LOW_X,
                    "high": _HIGH_X,
                    "label": "intensity (FLOP per byte)",
                    "ticks": [
                        [4**k, "¼" if k < 0 else f"{4**k:,}", k % 2 == 0] for k in range(-1, 8)
                    ],
                },
                "y": {
                    "low": _LOW_Y,
                    "high": _HIGH_Y,
                    "label": "attainable FLOP/s",
                    "ticks": _TICKS_Y,
                },
                "marks": marks,
            },
            "summary": [
                "cat",
                "{card_name}, {dtype_name}: the roof bends at {ridge:sig} FLOP/byte. "
                "Naive attention does {naive_intensity:sig} per byte and takes at least "
                "{naive_seconds:seconds}. Fused attention does {fused_intensity:sig} per byte and "
                "takes at least {fused_seconds:seconds}; ",
                verdict,
                ".",
            ],
            "table": {
                "head": ["step", "FLOP/byte", "at most", "at least", "limited by"],
                "rows": rows,
            },
        }
    )
