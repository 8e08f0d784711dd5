"""Explorer of chapter 02: what doubling each size does.

Four knobs (seq_len, batch, heads, head_dim), three quantities.  The exponents in
the table are the degrees of the closed forms; the bars are the forms' exact values
after and before the doubling.
"""

from __future__ import annotations

from typing import Any

from labkit.closed_form import Form
from labkit.explorers.core import Explorer, size
from labkit.explorers.scores import dtype_choice, square
from labkit.memory import attention_forms
from labkit.roofline import steps

__all__ = ["what_grows"]

_KNOBS = (("N", "seq_len"), ("B", "batch"), ("H", "heads"), ("d", "head_dim"))
_POWER = {0: "2⁰", 1: "2¹", 2: "2²"}


def what_grows(
    *,
    seq_len: int = 2048,
    batch: int = 1,
    heads: int = 12,
    head_dim: int = 64,
    dtype: Any = "float16",
) -> Explorer:
    """What doubling seq_len, batch, heads or head_dim does to bytes and operations.

    Parameters
    ----------
    seq_len, batch, heads, head_dim, dtype : where the controls start.

    Returns
    -------
    Explorer
        quantities ``io`` (bytes of Q, K, V and O), ``scores`` (bytes of S and P), ``flops`` (matrix
        products and softmax, as ``labkit.roofline`` counts them), and ``<quantity>_<size>``, the
        factor by which it grows when that size doubles.

    Raises
    ------
    ArgumentError
        for a size out of range or an unknown dtype.
    """
    tensors = {name: square(form) for name, form in attention_forms().items()}
    forms = {
        "io": sum((tensors[t] for t in "QKVO"), Form(0)),
        "scores": tensors["S"] + tensors["P"],
        "flops": sum((square(s.matmul + s.vector) for s in steps("naive")), Form(0)),
    }
    columns = [
        {"label": "Q, K, V and O", "style": "c"},
        {"label": "S and P", "style": "b"},
        {"label": "operations", "style": "a"},
    ]
    shown = {"io": "bytes", "scores": "bytes", "flops": "flop"}
    quantities: dict[str, Any] = {name: ["form", name] for name in forms}
    rows, table = [], []
    for symbol, argument in _KNOBS:
        doubled = {symbol: ["*", 2, symbol]}
        quantities["twice_" + symbol] = doubled[symbol]
        cells = []
        for name, form in forms.items():
            after, factor = f"after_{name}_{symbol}", f"{name}_{symbol}"
            quantities[after] = ["form", name, doubled]
            quantities[factor] = ["/", after, name]
            text = f"{{{name}:{shown[name]}}} → {{{after}:{shown[name]}}}"
            if form.degree(symbol) == 0:
                text = f"{{{name}:{shown[name]}}}, unchanged"
            cells.append({"factor": factor, "times": f"×{{{factor}:sig}}", "text": text})
        rows.append(
            {
                "label": argument,
                "note": f"{{{symbol}:int}} → {{twice_{symbol}:int}}",
                "cells": cells,
            }
        )
        table.append(
            [f"{argument} × 2"]
            + [
                f"×{{{name}_{symbol}:sig}} ({_POWER[form.degree(symbol)]})"
                for name, form in forms.items()
            ]
        )
    return Explorer(
        {
            "title": "Which knob hurts?",
            "about": "Each row doubles one size and leaves the others. "
            "Solid: before; faint: after. In brackets: two to the degree of the closed form.",
            "controls": [
                size("N", "seq_len", seq_len),
                size("B", "batch", batch),
                size("H", "heads", heads),
                size("d", "head_dim", head_dim),
                dtype_choice(dtype),
            ],
            "forms": forms,
            "quantities": quantities,
            "figure": {
                "kind": "doubling",
                "columns": columns,
                "rows": rows,
                "height": {"wide": 312, "narrow": 572},
            },
            "summary": "Doubling seq_len turns {scores:bytes} of S and P into "
            "{after_scores_N:bytes} (×{scores_N:sig}), while Q, K, V and O grow ×{io_N:sig}. "
            "Doubling head_dim leaves S and P as they are.",
            "table": {
                "head": ["doubling", "Q, K, V and O", "S and P", "operations"],
                "rows": table,
            },
        }
    )
