"""Explorer of chapter 01: the bytes of the scores buffer against seq_len.

S and P hold ``B·H·N²`` elements each.  The figure draws that square on two
logarithmic axes, where it is a straight line of slope two, and asks of four
cards at which length they are full.
"""

from __future__ import annotations

from typing import Any

from labkit.closed_form import Form, symbols
from labkit.dtypes import ITEMSIZE, dtype_name
from labkit.errors import check_choice
from labkit.explorers.core import Explorer, check, choice, size
from labkit.hardware import card
from labkit.memory import attention_forms
from labkit.roofline import steps
from labkit.units import format_bytes

__all__ = ["CARD_LINES", "scores_buffer"]

#: card whose memory is drawn: key, name in the figure, name in the table, place of the name
CARD_LINES = (
    ("rtx3060", "RTX 3060, 12 GB", "12 GB: RTX 3060", "below", "start"),
    ("rtx4090", "RTX 4090, 24 GB", "24 GB: RTX 3090, RTX 4090", "above", "start"),
    ("h100-sxm", "H100, 80 GB", "80 GB: A100, H100", "below", "end"),
    ("h200", "H200, 141 GB", "141 GB: H200", "above", "end"),
)

#: which N × N buffers are alive at the same time
HOLDS = {
    "S": ("S", "S, overwritten by P", ("S",)),
    "S+P": ("S and P", "S and P: forward", ("S", "P")),
    "training": ("P, dP and dS", "P, dP, dS: training", ("P", "dP", "dS")),
}
_DTYPES = ("float16", "bfloat16", "float32")


def square(form: Form) -> Form:
    """``form`` for plain self-attention: as many keys as queries, one head dimension."""
    n, d, h = symbols("N d H")
    return form.substitute(Nq=n, Nk=n, dv=d, Hkv=h)


def powers(low: int, high: int, step: int, wide_only: int) -> list[list]:
    """Ticks at 2**low, 2**(low+step) …; every other one only where there is room."""
    return [
        [2**k, f"{2**k:,}", (i % wide_only) != 0] for i, k in enumerate(range(low, high + 1, step))
    ]


def dtype_choice(dtype: Any, names: tuple[str, ...] = _DTYPES) -> dict[str, Any]:
    """A select of element types that sets ``e``, the bytes per element."""
    name = check_choice("dtype", dtype_name(dtype), names)
    return choice(
        "dtype", "dtype", name, [(n, n, {"e": ITEMSIZE[n], "dtype_name": n}) for n in names]
    )


def scores_buffer(
    *,
    seq_len: int = 8192,
    batch: int = 1,
    heads: int = 12,
    dtype: Any = "float16",
    holds: str = "S+P",
    causal: bool = False,
) -> Explorer:
    """Bytes of the N × N buffers of attention against ``seq_len``, with the lines of four cards.

    Parameters
    ----------
    seq_len, batch, heads, dtype, causal : where the controls start.
    holds : which buffers are alive together: ``"S"`` (P overwrites S), ``"S+P"`` (forward, out
        of place) or ``"training"`` (P, dP and dS in the backward pass).

    Returns
    -------
    Explorer
        quantities ``scores`` and ``useful`` (bytes), and ``full_<card>``, the longest ``seq_len``
        whose buffers alone fit into that card.

    Raises
    ------
    ArgumentError
        for a size out of range, or an unknown dtype or ``holds``.
    """
    forms = {name: square(form) for name, form in attention_forms().items()}
    # What a causal mask leaves: the pairs that a causal kernel visits, in elements.
    visible = square(steps("fused", causal=True)[0].exps) * symbols("e")[0]
    described = {}
    for key, (_, _, buffers) in HOLDS.items():
        described[key] = sum((forms[b] for b in buffers), Form(0))
        described["useful_" + key] = visible * len(buffers)
    cards = [(card(key), *rest) for key, *rest in CARD_LINES]
    which = ["case", "holds", {key: key for key in HOLDS}]
    useful = ["case", "holds", {key: "useful_" + key for key in HOLDS}]
    quantities: dict[str, Any] = {"scores": ["form", which], "useful": ["form", useful]}
    for c, *_ in cards:
        name = c.key.replace("-", "_")
        quantities["mem_" + name] = c.memory_bytes
        quantities["full_" + name] = ["longest", which, "N", "mem_" + name]
        quantities["share_" + name] = ["/", "scores", "mem_" + name]
    held = ["case", "holds", {key: short for key, (short, _, _) in HOLDS.items()}]
    marks: list[dict[str, Any]] = []
    rows = []
    for c, label, long, side, align in cards:
        name = c.key.replace("-", "_")
        marks.append(
            {
                "mark": "level",
                "value": "mem_" + name,
                "label": label,
                "side": side,
                "align": align,
            }
        )
        rows.append(
            [
                long,
                f"{{full_{name}:int}}",
                [
                    "if",
                    ["<=", "scores", "mem_" + name],
                    f"{{share_{name}:percent}}",
                    f"{{share_{name}:percent}}, too large",
                ],
            ]
        )
    marks.append(
        {
            "mark": "curve",
            "if": "causal",
            "over": "N",
            "value": "useful",
            "style": "b dashed",
            "label": "useful",
            "side": "below",
        }
    )
    marks.append(
        {
            "mark": "curve",
            "over": "N",
            "value": "scores",
            "style": "a",
            "label": held,
            "side": "above",
        }
    )
    for c, *_ in cards:
        name = c.key.replace("-", "_")
        marks.append(
            {
                "mark": "point",
                "x": "full_" + name,
                "y": "mem_" + name,
                "r": 4.5,
                "style": "ring a",
            }
        )
    marks.append({"mark": "cursor", "x": "N", "y": "scores", "label": "{scores:bytes}"})
    first, last = cards[0][0].key.replace("-", "_"), cards[-1][0].key.replace("-", "_")
    return Explorer(
        {
            "title": "How many bytes do the scores take?",
            "about": "The N × N buffers of attention against seq_len, both axes logarithmic. "
            "Dashed: the memory of real cards. Rings: the length at which each is full.",
            "controls": [
                size("N", "seq_len", seq_len),
                size("B", "batch", batch),
                size("H", "heads", heads),
                dtype_choice(dtype),
                choice(
                    "holds",
                    "buffers alive",
                    holds,
                    [(key, long, {}) for key, (_, long, _) in HOLDS.items()],
                ),
                check("causal", "causal: useful half", causal),
            ],
            "forms": described,
            "quantities": quantities,
            "figure": {
                "kind": "loglog",
                "x": {
                    "low": 2**7,
                    "high": 2**20,
                    "label": "seq_len (tokens)",
                    "ticks": powers(7, 19, 2, 3),
                },
                "y": {
                    "low": 2**20,
                    "high": 2**42,
                    "label": ["cat", "bytes of ", held],
                    "ticks": [
                        [2**k, format_bytes(2**k), i % 2 == 1]
                        for i, k in enumerate(range(20, 43, 4))
                    ],
                },
                "marks": marks,
            },
            "summary": [
                "cat",
                "At seq_len {N:int}, ",
                held,
                " take {scores:bytes}. They alone fill ",
                f"12 GB at {{full_{first}:int}} tokens and 141 GB at {{full_{last}:int}}.",
                [
                    "if",
                    "causal",
                    " A causal mask needs {useful:bytes} of them; the buffer stays whole.",
                    "",
                ],
            ],
            "table": {
                "head": ["card", "full at seq_len", "filled at seq_len {N:int}"],
                "rows": rows,
            },
        }
    )
