r"""How many bytes each tensor of attention has, as closed forms.

Symbols: B batch, H query heads, Hkv key-value heads, Nq and Nk sequence lengths of queries
and keys, d head_dim, dv head_dim of V, e bytes per element.  The scores are the only
tensors with two sequence lengths in them:

.. math:: |S| = |P| = B\,H\,N_q\,N_k\,e, \qquad |Q| = B\,H\,N_q\,d\,e .

Imports: closed_form, dtypes, errors.  No torch.  Taught in chapter 01.
"""

from __future__ import annotations

from typing import Any

from labkit.closed_form import Form, symbols
from labkit.dtypes import itemsize
from labkit.errors import ArgumentError, check_positive_int

__all__ = ["SHAPES", "attention_forms", "problem_sizes", "visible_pairs"]

B, H, Hkv, Nq, Nk, d, dv, e = symbols("B H Hkv Nq Nk d dv e")

#: shape of each tensor, in symbols, and its bytes per element (a Form)
SHAPES: dict[str, tuple[tuple[str, ...], Form]] = {
    "Q": (("B", "H", "Nq", "d"), e),
    "K": (("B", "Hkv", "Nk", "d"), e),
    "V": (("B", "Hkv", "Nk", "dv"), e),
    "S": (("B", "H", "Nq", "Nk"), e),
    "P": (("B", "H", "Nq", "Nk"), e),
    "O": (("B", "H", "Nq", "dv"), e),
    # The log-sum-exp of each row stays in float32 whatever the dtype of Q.
    "LSE": (("B", "H", "Nq"), Form(4)),
    # One bool for each pair of positions, shared by every head and batch element.
    "mask": (("Nq", "Nk"), Form(1)),
    "dO": (("B", "H", "Nq", "dv"), e),
    "dV": (("B", "Hkv", "Nk", "dv"), e),
    "dP": (("B", "H", "Nq", "Nk"), e),
    "dS": (("B", "H", "Nq", "Nk"), e),
    "dQ": (("B", "H", "Nq", "d"), e),
    "dK": (("B", "Hkv", "Nk", "d"), e),
    # rowsum(dO ⊙ O), float32: what a fused backward keeps instead of P (chapter 09)
    "delta": (("B", "H", "Nq"), Form(4)),
}


def _bytes(name: str) -> Form:
    shape, form = SHAPES[name]
    for size in shape:
        (factor,) = symbols(size)
        form = form * factor
    return form


def attention_forms() -> dict[str, Form]:
    """Bytes of every tensor of attention, forward and backward, by name.

    >>> attention_forms()["S"](B=1, H=12, Nq=2048, Nk=2048, e=2)
    100663296
    """
    return {name: _bytes(name) for name in SHAPES}


def visible_pairs(seq_len_q: int, seq_len_k: int) -> int:
    """Pairs (i, j) with j ≤ i + Nk − Nq: what a causal mask leaves of the Nq × Nk scores.

    >>> visible_pairs(4, 4), visible_pairs(1, 239), visible_pairs(239, 1)
    (10, 239, 1)
    """
    rows = min(seq_len_q, seq_len_k)  # the first Nq − Nk rows see nothing
    return rows * seq_len_k - rows * (rows - 1) // 2


def problem_sizes(
    *,
    seq_len: int,
    heads: int = 1,
    batch: int = 1,
    head_dim: int = 64,
    dtype: Any = "float16",
    kv_heads: int | None = None,
    seq_len_k: int | None = None,
    head_dim_v: int | None = None,
) -> dict[str, int]:
    """Checked sizes of one problem under the symbols of the forms.

    Raises
    ------
    ArgumentError
        if a size is not a positive integer, the dtype is unknown, or ``kv_heads`` does not
        divide ``heads``.
    """
    out = {
        "B": check_positive_int("batch", batch),
        "H": check_positive_int("heads", heads),
        "Nq": check_positive_int("seq_len", seq_len),
        "d": check_positive_int("head_dim", head_dim),
        "e": itemsize(dtype),
    }
    out["Hkv"] = out["H"] if kv_heads is None else check_positive_int("kv_heads", kv_heads)
    out["Nk"] = out["Nq"] if seq_len_k is None else check_positive_int("seq_len_k", seq_len_k)
    out["dv"] = out["d"] if head_dim_v is None else check_positive_int("head_dim_v", head_dim_v)
    if out["H"] % out["Hkv"]:
        raise ArgumentError(
            "kv_heads",
            out["Hkv"],
            f"does not divide heads = {out['H']}.",
            "Use a divisor of heads: each KV head serves heads / kv_heads query heads.",
        )
    return out
