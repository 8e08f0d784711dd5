r"""The backward kernels: dQ, dK and dV without P in memory.

The forward pass kept one number per row, LSE.  With it any tile of P can be made again from the
tile of scores at the same place (chapter 09 derives all of this):

.. math::
    P  &= e^{\,\mathrm{scale}\, QK^\top - \mathrm{LSE}}             \\
    \delta_i &= \textstyle\sum_a dO_{ia} O_{ia} - d\mathrm{LSE}_i   \\
    dV &= P^\top dO, \qquad dP = dO\, V^\top                        \\
    dS &= P \odot (dP - \delta)                                     \\
    dK &= \mathrm{scale}\; dS^\top Q, \qquad dQ = \mathrm{scale}\; dS\, K

dK and dV are sums over queries, dQ is a sum over keys.  One pass cannot own both: here a program
of :func:`dkdv_kernel` owns a tile of keys and walks along the queries, and a program of
:func:`dq_kernel` owns a tile of queries and walks along the keys.  Each sum is made by one program
in a fixed order, so the gradients are the same to the bit each time, and nothing is added
atomically.  The price is that S and dP are computed twice: seven products instead of five.

:func:`dkdv_kernel` works on Sᵀ = K Qᵀ, keys as rows.  Pᵀ and dSᵀ are then the left factors of
dV and dK as they stand in registers; S would have to be transposed through shared memory.

A KV head collects the gradients of its group: the program loops over the group's query heads.

Taught in chapter 09 (the backward kernels).
"""

from __future__ import annotations

import triton
import triton.language as tl

from labkit.flash.forward import which_tile
from labkit.flash.masking import hide, key_bounds, query_bounds
from labkit.flash.tiles import head_offset, load_tile, row_vector, store_tile

__all__ = ["delta_kernel", "dkdv_kernel", "dq_kernel"]


@triton.jit
def _row_lse(lse, EXACT: tl.constexpr):
    """LSE as :func:`_probabilities` wants it; a row that saw nothing has −∞.

    With +∞ in its place, P of that row is 0.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    base = lse if EXACT else lse * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), base)


@triton.jit
def _probabilities(s, lse, c, scale, EXACT: tl.constexpr):
    """P from raw scores and LSE, which broadcast.

    In half precision the constant is folded, as in the forward kernel, and LSE is in base 2.  In
    float32 the rounding of c·S would be the largest error of all: there the difference is taken
    first, and only what is left, a small number, is multiplied.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    return tl.exp2((s * scale - lse) * LOG2E if EXACT else s * c - lse)


@triton.jit
def delta_kernel(
    o, dout, lse, dlse, delta, cu_q,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_eb, stride_eh, stride_en, stride_lb, stride_lh,
    heads, Nq, tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    VARLEN: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    r"""δ = rowsum(dO ∘ O) − dLSE, one float32 per row: what dS needs of a whole row.

    :math:`\sum_j dP_{ij} P_{ij} = \sum_a dO_{ia} \sum_j P_{ij} V_{ja} = \sum_a dO_{ia} O_{ia}`,
    and :math:`\partial \mathrm{LSE}_i / \partial S_{ij} = P_{ij}` puts a gradient that reaches
    LSE itself into the same place with the opposite sign.
    """
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head, start = bh // heads, bh % heads, 0
    if VARLEN:
        start = tl.load(cu_q + batch)
        Nq = tl.load(cu_q + batch + 1) - start
        batch = 0
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_DV)
    inside = (row < Nq)[:, None] & (column < DV)[None, :]
    wide, across = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    at = head_offset(batch, head, start, stride_ob, stride_oh, stride_on)
    O = tl.load(o + at + wide * stride_on + across, inside, 0.0)
    at = head_offset(batch, head, start, stride_gb, stride_gh, stride_gn)
    dO = tl.load(dout + at + wide * stride_gn + across * stride_gd, inside, 0.0)
    out = tl.sum(O.to(tl.float32) * dO.to(tl.float32), 1)
    l_at = head_offset(batch, head, start, stride_lb, stride_lh, 1)
    if HAS_DLSE:
        at = head_offset(batch, head, start, stride_eb, stride_eh, stride_en)
        extra = tl.load(dlse + at + row.to(tl.int64) * stride_en, row < Nq, 0.0)
        # A row that saw nothing has no scores; whatever arrives at its LSE of −∞ stops here.
        saw = tl.load(lse + l_at + row, row < Nq, float("-inf")) != float("-inf")
        out -= tl.where(saw, extra, 0.0)
    tl.store(delta + l_at + row, out, mask=row < Nq)


@triton.jit
def _gather_dkdv(
    dk, dv, K, V, q, dout, lse, delta, batch, head, q_offset, g_offset, l_offset,
    j, Nq, Nk, window, c, scale, lo, hi, stride_qn, stride_qd, stride_gn, stride_gd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries ``lo … hi`` contribute to dK and dV of the keys ``j``."""
    for first in tl.range(lo, hi, BLOCK_M):
        first = tl.multiple_of(first, BLOCK_M)
        Q = load_tile(
            q, batch, head, first, Nq, q_offset, stride_qn, stride_qd,
            BLOCK_M, D, BLOCK_D, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        st = tl.dot(K, Q.T, input_precision=PRECISION)  # Sᵀ
        if MASKED:
            i = first + tl.arange(0, BLOCK_M)
            st = hide(st, i[None, :], j[:, None], Nq, Nk, window, CAUSAL, WINDOW)
        EXACT: tl.constexpr = K.dtype == tl.float32
        lse_i = row_vector(lse, l_offset, first, Nq, BLOCK_M, float("-inf"), MASKED)
        lse_i = _row_lse(lse_i, EXACT)
        pt = _probabilities(st, lse_i[None, :], c, scale, EXACT)  # Pᵀ
        dO = load_tile(
            dout, batch, head, first, Nq, g_offset, stride_gn, stride_gd,
            BLOCK_M, DV, BLOCK_DV, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        dv = tl.dot(pt.to(dO.dtype), dO, dv, input_precision=PRECISION)
        dpt = tl.dot(V, dO.T, input_precision=PRECISION)  # dPᵀ
        delta_i = row_vector(delta, l_offset, first, Nq, BLOCK_M, 0.0, MASKED)
        dst = pt * (dpt - delta_i[None, :])  # dSᵀ
        dk = tl.dot(dst.to(Q.dtype), Q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_lb, stride_lh,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    kv_heads, all_kv_heads, Nq, Nk, tiles, section, window, c, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: the program walks along the queries that see them."""
    # The first tile of keys is seen by the most queries: it starts first as it is.
    tile, bh = which_tile(tl.program_id(0), tiles, all_kv_heads, section, False)
    batch, kv_head = bh // kv_heads, bh % kv_heads
    start_q, start_k, place = 0, 0, batch
    if VARLEN:
        start_q, start_k = tl.load(cu_q + batch), tl.load(cu_k + batch)
        Nq, Nk = tl.load(cu_q + batch + 1) - start_q, tl.load(cu_k + batch + 1) - start_k
        place = 0
        if tile * BLOCK_N >= Nk:
            return
    k_offset = head_offset(place, kv_head, start_k, stride_kb, stride_kh, stride_kn)
    v_offset = head_offset(place, kv_head, start_k, stride_vb, stride_vh, stride_vn)
    first = tile * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)

    # -- K and V: once -------------------------------------------------------------------------
    K = load_tile(
        k, place, kv_head, first, Nk, k_offset, stride_kn, stride_kd,
        BLOCK_N, D, BLOCK_D, DESCRIPTOR, not EVEN, WIDE,
    )  # fmt: skip
    V = load_tile(
        v, place, kv_head, first, Nk, v_offset, stride_vn, stride_vd,
        BLOCK_N, DV, BLOCK_DV, DESCRIPTOR, not EVEN, WIDE,
    )  # fmt: skip
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    lo, full_lo, full_hi, hi = query_bounds(
        first, min(first + BLOCK_N, Nk), Nq, Nk, window, BLOCK_M, CAUSAL, WINDOW
    )

    # -- Q, dO, LSE and δ: once for this tile of keys, of each head of the group -----------------
    for g in range(GROUP):
        head = kv_head * GROUP + g
        q_offset = head_offset(place, head, start_q, stride_qb, stride_qh, stride_qn)
        g_offset = head_offset(place, head, start_q, stride_gb, stride_gh, stride_gn)
        l_offset = head_offset(place, head, start_q, stride_lb, stride_lh, 1)
        if CAUSAL or WINDOW:
            dk_acc, dv_acc = _gather_dkdv(
                dk_acc, dv_acc, K, V, q, dout, lse, delta, place, head,
                q_offset, g_offset, l_offset, j, Nq, Nk, window, c, scale, lo, min(full_lo, hi),
                stride_qn, stride_qd, stride_gn, stride_gd, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, CAUSAL, WINDOW, DESCRIPTOR, WIDE, PRECISION, True,
            )  # fmt: skip
        dk_acc, dv_acc = _gather_dkdv(
            dk_acc, dv_acc, K, V, q, dout, lse, delta, place, head,
            q_offset, g_offset, l_offset, j, Nq, Nk, window, c, scale, full_lo, full_hi,
            stride_qn, stride_qd, stride_gn, stride_gd, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_M, CAUSAL, WINDOW, DESCRIPTOR, WIDE, PRECISION, False,
        )  # fmt: skip
        if WINDOW or not EVEN:
            dk_acc, dv_acc = _gather_dkdv(
                dk_acc, dv_acc, K, V, q, dout, lse, delta, place, head,
                q_offset, g_offset, l_offset, j, Nq, Nk, window, c, scale, full_hi, hi,
                stride_qn, stride_qd, stride_gn, stride_gd, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, CAUSAL, WINDOW, DESCRIPTOR, WIDE, PRECISION, True,
            )  # fmt: skip

    at = head_offset(place, kv_head, start_k, stride_dkb, stride_dkh, stride_dkn)
    store_tile(dk, dk_acc * scale, first, Nk, at, stride_dkn, BLOCK_N, D, BLOCK_D, WIDE)
    at = head_offset(place, kv_head, start_k, stride_dvb, stride_dvh, stride_dvn)
    store_tile(dv, dv_acc, first, Nk, at, stride_dvn, BLOCK_N, DV, BLOCK_DV, WIDE)


@triton.jit
def _gather_dq(
    dq, Q, dO, lse_i, delta_i, k, v, batch, kv_head, k_offset, v_offset,
    i, Nq, Nk, window, c, scale, lo, hi, stride_kn, stride_kd, stride_vn, stride_vd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys ``lo … hi`` contribute to dQ of the queries ``i``."""
    for first in tl.range(lo, hi, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        K = load_tile(
            k, batch, kv_head, first, Nk, k_offset, stride_kn, stride_kd,
            BLOCK_N, D, BLOCK_D, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        V = load_tile(
            v, batch, kv_head, first, Nk, v_offset, stride_vn, stride_vd,
            BLOCK_N, DV, BLOCK_DV, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        s = tl.dot(Q, K.T, input_precision=PRECISION)
        dp = tl.dot(dO, V.T, input_precision=PRECISION)
        if MASKED:
            j = first + tl.arange(0, BLOCK_N)
            s = hide(s, i[:, None], j[None, :], Nq, Nk, window, CAUSAL, WINDOW)
        p = _probabilities(s, lse_i[:, None], c, scale, Q.dtype == tl.float32)
        ds = p * (dp - delta_i[:, None])
        dq = tl.dot(ds.to(K.dtype), K, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, dq, cu_q, cu_k,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_lb, stride_lh, stride_dqb, stride_dqh, stride_dqn,
    heads, all_heads, Nq, Nk, tiles, section, window, c, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries: the program walks along the keys, as the forward kernel does."""
    tile, bh = which_tile(tl.program_id(0), tiles, all_heads, section, CAUSAL)
    batch, head = bh // heads, bh % heads
    kv_head = head // GROUP
    start_q, start_k, place = 0, 0, batch
    if VARLEN:
        start_q, start_k = tl.load(cu_q + batch), tl.load(cu_k + batch)
        Nq, Nk = tl.load(cu_q + batch + 1) - start_q, tl.load(cu_k + batch + 1) - start_k
        place = 0
        if tile * BLOCK_M >= Nq:
            return
    q_offset = head_offset(place, head, start_q, stride_qb, stride_qh, stride_qn)
    g_offset = head_offset(place, head, start_q, stride_gb, stride_gh, stride_gn)
    l_offset = head_offset(place, head, start_q, stride_lb, stride_lh, 1)
    k_offset = head_offset(place, kv_head, start_k, stride_kb, stride_kh, stride_kn)
    v_offset = head_offset(place, kv_head, start_k, stride_vb, stride_vh, stride_vn)
    first = tile * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)

    # -- Q, dO, LSE and δ: once ------------------------------------------------------------------
    Q = load_tile(
        q, place, head, first, Nq, q_offset, stride_qn, stride_qd,
        BLOCK_M, D, BLOCK_D, DESCRIPTOR, not EVEN, WIDE,
    )  # fmt: skip
    dO = load_tile(
        dout, place, head, first, Nq, g_offset, stride_gn, stride_gd,
        BLOCK_M, DV, BLOCK_DV, DESCRIPTOR, not EVEN, WIDE,
    )  # fmt: skip
    lse_i = row_vector(lse, l_offset, first, Nq, BLOCK_M, float("-inf"), not EVEN)
    lse_i = _row_lse(lse_i, Q.dtype == tl.float32)
    delta_i = row_vector(delta, l_offset, first, Nq, BLOCK_M, 0.0, not EVEN)

    # -- K and V: once for this tile of queries ---------------------------------------------------
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lo, full_lo, full_hi, hi = key_bounds(
        first, min(first + BLOCK_M, Nq), Nq, Nk, window, BLOCK_N, CAUSAL, WINDOW
    )
    if WINDOW:
        acc = _gather_dq(
            acc, Q, dO, lse_i, delta_i, k, v, place, kv_head, k_offset, v_offset,
            i, Nq, Nk, window, c, scale, lo, min(full_lo, hi),
            stride_kn, stride_kd, stride_vn, stride_vd,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, DESCRIPTOR, WIDE, PRECISION, True,
        )  # fmt: skip
    acc = _gather_dq(
        acc, Q, dO, lse_i, delta_i, k, v, place, kv_head, k_offset, v_offset,
        i, Nq, Nk, window, c, scale, full_lo, full_hi, stride_kn, stride_kd, stride_vn, stride_vd,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, DESCRIPTOR, WIDE, PRECISION, False,
    )  # fmt: skip
    if CAUSAL or WINDOW or not EVEN:
        acc = _gather_dq(
            acc, Q, dO, lse_i, delta_i, k, v, place, kv_head, k_offset, v_offset,
            i, Nq, Nk, window, c, scale, full_hi, hi, stride_kn, stride_kd, stride_vn, stride_vd,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, DESCRIPTOR, WIDE, PRECISION, True,
        )  # fmt: skip
    at = head_offset(place, head, start_q, stride_dqb, stride_dqh, stride_dqn)
    store_tile(dq, acc * scale, first, Nq, at, stride_dqn, BLOCK_M, D, BLOCK_D, WIDE)
