"""What every attention function of labkit checks before it allocates or launches anything.

Layout, everywhere: ``q`` is ``[batch, heads, seq_len_q, head_dim]``, ``k`` is
``[batch, kv_heads, seq_len_k, head_dim]`` and ``v`` is
``[batch, kv_heads, seq_len_k, head_dim_v]``.  ``heads`` is a multiple of ``kv_heads``;
query head ``h`` reads KV head ``h // (heads // kv_heads)`` (grouped-query attention,
Ainslie et al. 2023; ``kv_heads = 1`` is multi-query attention).

Imports: labkit.errors and labkit.dtypes only; the tensors are looked at through their
``shape``, ``dtype`` and ``device``, so that torch need not be loaded here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from labkit.errors import ArgumentError, check_positive_number

__all__ = ["FLOATS", "Sizes", "check_qkv", "check_same_shape", "check_scale"]

#: the element types in which attention is computed
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one attention problem, read off its tensors."""

    batch: int
    heads: int
    kv_heads: int
    seq_len_q: int
    seq_len_k: int
    head_dim: int
    head_dim_v: int
    dtype: str

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def unseeing(self) -> int:
        """Rows that see no key under the causal mask: the first Nq − Nk queries, if Nq > Nk.

        The causal mask is aligned to the bottom right corner: the last query sees every
        key, query ``i`` sees key ``j`` when ``j ≤ i + Nk − Nq``.
        """
        return max(0, self.seq_len_q - self.seq_len_k)

    @property
    def symbols(self) -> dict[str, int]:
        """The sizes under the names that the closed forms use (without ``e``)."""
        return {
            "B": self.batch,
            "H": self.heads,
            "Hkv": self.kv_heads,
            "Nq": self.seq_len_q,
            "Nk": self.seq_len_k,
            "d": self.head_dim,
            "dv": self.head_dim_v,
        }


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(argument: str, tensor: Any) -> None:
    if not all(hasattr(tensor, a) for a in ("shape", "dtype", "device", "dim")):
        kind = type(tensor).__name__
        raise ArgumentError(argument, kind, "is not a torch tensor.", "Pass a torch.Tensor.")
    shape = tuple(tensor.shape)
    if len(shape) != 4:
        raise ArgumentError(
            f"{argument}.shape",
            shape,
            f"has {len(shape)} dimensions, attention takes 4.",
            "Use [batch, heads, seq_len, head_dim]; a single head is x[None, None].",
        )
    if 0 in shape:
        raise ArgumentError(
            f"{argument}.shape",
            shape,
            "has a size of 0.",
            "Every one of batch, heads, seq_len, head_dim must be at least 1.",
        )


def check_qkv(q: Any, k: Any, v: Any, *, dtypes: tuple[str, ...] = FLOATS) -> Sizes:
    """Check the three inputs of attention against each other and return their sizes.

    Parameters
    ----------
    q, k, v : torch.Tensor
        ``[batch, heads, seq_len_q, head_dim]``, ``[batch, kv_heads, seq_len_k, head_dim]``
        and ``[batch, kv_heads, seq_len_k, head_dim_v]``.
    dtypes : tuple of str
        the dtypes that the caller's kernel takes.

    Raises
    ------
    ArgumentError
        naming the argument, when a shape, dtype or device does not fit the others or when
        ``heads`` is not a multiple of ``kv_heads``.
    """
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(argument, tensor)
    if _name(q.dtype) not in dtypes:
        raise ArgumentError(
            "q.dtype", _name(q.dtype), "cannot be used here.", f"Use one of {', '.join(dtypes)}."
        )
    for argument, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ArgumentError(
                f"{argument}.dtype",
                _name(tensor.dtype),
                f"differs from q's {_name(q.dtype)}.",
                f"Convert it: {argument}.to(q.dtype).",
            )
        if tensor.device != q.device:
            raise ArgumentError(
                f"{argument}.device",
                str(tensor.device),
                f"differs from q's {q.device}.",
                f"Move it: {argument}.to(q.device).",
            )
    (batch, heads, seq_len_q, head_dim), (_, kv_heads, seq_len_k, _) = q.shape, k.shape
    for argument, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch:
            raise ArgumentError(
                f"{argument}.shape",
                tuple(tensor.shape),
                f"has batch {tensor.shape[0]}, q has {batch}.",
                "Pass the same batch for all three.",
            )
    if k.shape[3] != head_dim:
        raise ArgumentError(
            "k.shape",
            tuple(k.shape),
            f"has head_dim {k.shape[3]}, q has {head_dim}: their dot product is not defined.",
            "Pass q and k of the same head_dim (only v's may differ).",
        )
    if v.shape[1] != kv_heads or v.shape[2] != seq_len_k:
        raise ArgumentError(
            "v.shape",
            tuple(v.shape),
            f"does not go with k's {kv_heads} heads of {seq_len_k} keys.",
            "Pass one value per key: v.shape[:3] must equal k.shape[:3].",
        )
    if heads % kv_heads:
        raise ArgumentError(
            "k.shape",
            tuple(k.shape),
            f"has {kv_heads} heads, which do not divide q's {heads}.",
            "Use a number of KV heads that divides the number of query heads.",
        )
    return Sizes(
        int(batch), int(heads), int(kv_heads), int(seq_len_q), int(seq_len_k),
        int(head_dim), int(v.shape[3]), _name(q.dtype),
    )  # fmt: skip


def check_same_shape(argument: str, tensor: Any, shape: tuple[int, ...], like: Any) -> None:
    """Check that ``tensor`` has ``shape`` and the dtype and device of ``like``.

    Raises
    ------
    ArgumentError
        naming ``argument`` and what differs.
    """
    _check_tensor(argument, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(
            f"{argument}.shape", tuple(tensor.shape), "does not fit.", f"Pass {tuple(shape)}."
        )
    for what in ("dtype", "device"):
        if getattr(tensor, what) != getattr(like, what):
            raise ArgumentError(
                f"{argument}.{what}",
                _name(getattr(tensor, what)),
                f"differs from q's {_name(getattr(like, what))}.",
                f"Convert it: {argument}.to(q.{what}).",
            )


def check_scale(scale: float | None, head_dim: int) -> float:
    """``scale`` as a float; ``None`` means 1/√head_dim.

    Raises
    ------
    ArgumentError
        if it is not a positive finite number.
    """
    return 1.0 / math.sqrt(head_dim) if scale is None else check_positive_number("scale", scale)
