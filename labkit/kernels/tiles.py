r"""Attention by tiles, in three orders of the loops: the same O, different bytes.

S and P are never written.  A program holds block_m rows of Q and makes one block_m × block_n
tile of S after another.  What differs is what stays in fast memory while the rest goes by:

``two_pass``
    Rows of Q stay.  The keys go by twice: once for the largest score of each row, once for the
    exponentials, their sum and O.  No rescaling, an ordinary safe softmax.
``q_outer``
    Rows of Q stay, and the keys go by once: the maximum so far is corrected as it grows, and
    with it the sum and O (the online softmax of chapter 07).  The loop order of FlashAttention-2.
``kv_outer``
    Rows of K and V stay, and the queries go by; O, the maximum and the sum of every row are
    read, corrected and written back each time.  The loop order of FlashAttention's paper.

These kernels are for counting and for reading: one tile size for everything, no mask, no
pipelining.  ``labkit.flash`` is the one to use.

In ``kv_outer`` a program reads what it wrote to global memory one iteration before.  Threads of
a program are only ordered by a barrier, hence ``tl.debug_barrier``; forgetting it is a race
that the interpreter, which has no threads, never shows.

Shapes ``[batch, heads, seq_len, head_dim]``; float16, bfloat16 (GPU only) or float32.
Taught in chapter 06 (how few bytes could it take?).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from labkit.errors import check_choice
from labkit.kernels.naive_steps import _block_d, check_teaching_case
from labkit.kernels.runtime import check_can_launch

__all__ = ["TILED_ORDERS", "tiled_attention"]

TILED_ORDERS = ("two_pass", "q_outer", "kv_outer")


# Each kernel spells its loads out, mask by mask: they are what chapter 06 counts.  A query row
# is inside when m < n_q, a key when n < n_k, a column when c < D (BLOCK_D rounds D up).


@triton.jit
def two_pass_kernel(
    q,
    k,
    v,
    o,
    lse,
    scale,
    n_q,
    n_k,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # block_m rows of Q stay for the whole program.  Tensors are contiguous.
    head = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_tile = q + head * n_q * D + m[:, None] * D + c[None, :]
    Q = tl.load(q_tile, mask=(m[:, None] < n_q) & (c[None, :] < D), other=0.0)
    k += head * n_k * D
    v += head * n_k * DV

    # First pass: the largest score of each row.  V is not needed.
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, n_k, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_tile = k + n[None, :] * D + c[:, None]  # read as Kᵀ
        K = tl.load(k_tile, mask=(n[None, :] < n_k) & (c[:, None] < D), other=0.0)
        S = tl.dot(Q, K, input_precision="ieee") * scale
        S = tl.where(n[None, :] < n_k, S, float("-inf"))
        largest = tl.maximum(largest, tl.max(S, 1))

    # Second pass: the same scores again, now with a known maximum.
    total = tl.zeros([BLOCK_M], tl.float32)
    O = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # noqa: E741
    for start in range(0, n_k, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_tile = k + n[None, :] * D + c[:, None]
        K = tl.load(k_tile, mask=(n[None, :] < n_k) & (c[:, None] < D), other=0.0)
        S = tl.dot(Q, K, input_precision="ieee") * scale
        S = tl.where(n[None, :] < n_k, S, float("-inf"))
        P = tl.exp(S - largest[:, None])
        total += tl.sum(P, 1)
        v_tile = v + n[:, None] * DV + cv[None, :]
        V = tl.load(v_tile, mask=(n[:, None] < n_k) & (cv[None, :] < DV), other=0.0)
        O = tl.dot(P.to(V.dtype), V, O, input_precision="ieee")  # noqa: E741

    O = (O / total[:, None]).to(o.dtype.element_ty)  # noqa: E741
    o_tile = o + head * n_q * DV + m[:, None] * DV + cv[None, :]
    tl.store(o_tile, O, mask=(m[:, None] < n_q) & (cv[None, :] < DV))
    tl.store(lse + head * n_q + m, largest + tl.log(total), mask=m < n_q)


@triton.jit
def q_outer_kernel(
    q,
    k,
    v,
    o,
    lse,
    scale,
    n_q,
    n_k,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_tile = q + head * n_q * D + m[:, None] * D + c[None, :]
    Q = tl.load(q_tile, mask=(m[:, None] < n_q) & (c[None, :] < D), other=0.0)
    k += head * n_k * D
    v += head * n_k * DV

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    O = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # noqa: E741
    for start in range(0, n_k, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_tile = k + n[None, :] * D + c[:, None]
        K = tl.load(k_tile, mask=(n[None, :] < n_k) & (c[:, None] < D), other=0.0)
        S = tl.dot(Q, K, input_precision="ieee") * scale
        S = tl.where(n[None, :] < n_k, S, float("-inf"))
        larger = tl.maximum(largest, tl.max(S, 1))
        P = tl.exp(S - larger[:, None])
        # This factor turns what was summed against the old maximum into a sum against the new one.
        correction = tl.exp(largest - larger)
        total = total * correction + tl.sum(P, 1)
        v_tile = v + n[:, None] * DV + cv[None, :]
        V = tl.load(v_tile, mask=(n[:, None] < n_k) & (cv[None, :] < DV), other=0.0)
        O = tl.dot(P.to(V.dtype), V, O * correction[:, None], input_precision="ieee")  # noqa: E741
        largest = larger

    O = (O / total[:, None]).to(o.dtype.element_ty)  # noqa: E741
    o_tile = o + head * n_q * DV + m[:, None] * DV + cv[None, :]
    tl.store(o_tile, O, mask=(m[:, None] < n_q) & (cv[None, :] < DV))
    tl.store(lse + head * n_q + m, largest + tl.log(total), mask=m < n_q)


@triton.jit
def kv_outer_kernel(
    q,
    k,
    v,
    o,
    largest,
    total,
    scale,
    n_q,
    n_k,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # One program per head: the tiles of keys must come one after the other.
    head = tl.program_id(0).to(tl.int64)
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for key in range(0, n_k, BLOCK_N):
        n = key + tl.arange(0, BLOCK_N)
        k_tile = k + head * n_k * D + n[None, :] * D + c[:, None]
        v_tile = v + head * n_k * DV + n[:, None] * DV + cv[None, :]
        K = tl.load(k_tile, mask=(n[None, :] < n_k) & (c[:, None] < D), other=0.0)
        V = tl.load(v_tile, mask=(n[:, None] < n_k) & (cv[None, :] < DV), other=0.0)
        for query in range(0, n_q, BLOCK_M):
            m = query + tl.arange(0, BLOCK_M)
            row = head * n_q + m
            q_tile = q + row[:, None] * D + c[None, :]
            o_tile = o + row[:, None] * DV + cv[None, :]
            inside = (m[:, None] < n_q) & (cv[None, :] < DV)
            Q = tl.load(q_tile, mask=(m[:, None] < n_q) & (c[None, :] < D), other=0.0)
            # O is kept divided by the sum so far, in q's dtype: it lives in slow memory.
            O = tl.load(o_tile, mask=inside, other=0.0).to(tl.float32)  # noqa: E741
            before = tl.load(largest + row, mask=m < n_q, other=0.0)
            sum_before = tl.load(total + row, mask=m < n_q, other=1.0)

            S = tl.dot(Q, K, input_precision="ieee") * scale
            S = tl.where(n[None, :] < n_k, S, float("-inf"))
            after = tl.maximum(before, tl.max(S, 1))
            P = tl.exp(S - after[:, None])
            kept = sum_before * tl.exp(before - after)
            sum_after = kept + tl.sum(P, 1)
            O = tl.dot(P.to(V.dtype), V, O * kept[:, None], input_precision="ieee")  # noqa: E741

            O = (O / sum_after[:, None]).to(o.dtype.element_ty)  # noqa: E741
            tl.store(o_tile, O, mask=inside)
            tl.store(largest + row, after, mask=m < n_q)
            tl.store(total + row, sum_after, mask=m < n_q)
        tl.debug_barrier()  # the next tile of keys reads what other threads wrote


@torch.library.custom_op("labkit::tiled_attention", mutates_args=())
def _tiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: str,
    scale: float,
    block_m: int,
    block_n: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_can_launch("q", q, k, v)
    (batch, heads, n_q, d), (n_k, dv) = q.shape, v.shape[2:]
    o = q.new_empty(batch, heads, n_q, dv)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    tiles = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": _block_d(d),
        "BLOCK_DV": _block_d(dv),
        "num_warps": 4 if block_m <= 64 else 8,
        "num_stages": 2,
    }
    if order == "kv_outer":
        o.zero_()
        largest = torch.full_like(lse, float("-inf"))
        total = torch.zeros_like(lse)
        args = (q, k, v, o, largest, total, scale, n_q, n_k)
        kv_outer_kernel[(batch * heads,)](*args, D=d, DV=dv, **tiles)
        return o, largest + total.log()
    kernel = {"two_pass": two_pass_kernel, "q_outer": q_outer_kernel}[order]
    grid = (triton.cdiv(n_q, block_m), batch * heads)
    kernel[grid](q, k, v, o, lse, scale, n_q, n_k, D=d, DV=dv, **tiles)
    return o, lse


@_tiled.register_fake
def _(q, k, v, order, scale, block_m, block_n):
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
    )


@register_flop_formula(torch.ops.labkit.tiled_attention)
def _tiled_flops(q_shape, k_shape, v_shape, order, *args, out_shape=None, **kwargs) -> int:
    batch, heads, n_q, d = q_shape
    n_k, dv = v_shape[2:]
    products = (2 if order == "two_pass" else 1) * d + dv  # two passes compute S twice
    return 2 * batch * heads * n_q * n_k * products


def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    order: str = "q_outer",
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    return_lse: bool = False,
):
    """softmax(scale · QKᵀ) V without writing S or P.

    Parameters
    ----------
    q, k, v : ``[batch, heads, seq_len_q or seq_len_k, head_dim]``, one KV head per query head;
        v's head_dim may differ.  Copied if not contiguous.
    order : ``"two_pass"``, ``"q_outer"`` or ``"kv_outer"``; see the module.
    scale : multiplies QKᵀ; default 1/√head_dim.
    block_m, block_n : rows of Q and rows of K in one tile, powers of two of at least 16.
    return_lse : also return the log-sum-exp of each row, ``[batch, heads, seq_len_q]`` float32.

    Returns
    -------
    torch.Tensor or tuple
        O ``[batch, heads, seq_len_q, head_dim_v]`` in q's dtype, or ``(O, LSE)``; no gradient.

    Raises
    ------
    ArgumentError
        if shapes, dtypes, devices, tiles or the order do not fit.
    NoGpuError
        if nothing on this machine can run the kernels.
    """
    check_choice("order", order, TILED_ORDERS)
    _, scale = check_teaching_case(q, k, v, scale, block_m, block_n)
    q, k, v = (t.contiguous() for t in (q, k, v))
    O, LSE = torch.ops.labkit.tiled_attention(q, k, v, order, scale, block_m, block_n)  # noqa: E741
    return (O, LSE) if return_lse else O
