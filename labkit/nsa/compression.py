r"""Attention to compressed keys: a causal attention whose mask is a staircase.

Compressed key c stands for the tokens c·d … c·d + l − 1 and is visible once the last of them is,
so a query at position t sees the first

.. math:: n(t) = \max\left(0,\ \left\lfloor \tfrac{t + 1 + d - l}{d} \right\rfloor\right)

compressed keys and no other.  With l = d = 64 that is T/64 keys for T queries: the mask hardly
changes from one query to the next, and one KV head of them fits in L2 many times over.  Two
things follow, and make these kernels differ from those of ``labkit.flash``.

**Rows.**  A tile holds a few neighbouring tokens with all query heads of their group (``rows`` =
tokens × heads).  They lie side by side in memory, they read the same keys, and their masks differ
by a key or two: a tile has one masked step at most where a tile of 64 tokens of one head does
not have fewer.  One token in decoding fills a tile as well.  The kernel that chooses the blocks
(``topk.py``) adds up the heads of a group, which it can only do where they share a tile.

**Split queries.**  dK and dV of few keys are long sums: T/64 keys give no more than a few dozen
tiles.  The queries are cut into parts, each part gives partial sums in float32, and
:func:`reduce_kernel` adds them in order of the parts.  The number of parts depends on the shape
alone, so the gradients are the same to the bit each time.

Scores, probabilities and gradients are those of chapters 08 and 09; the formulas stand in
``labkit/flash/forward.py`` and ``labkit/flash/backward.py``.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from labkit.flash import launch, tuning
from labkit.flash.backward import _probabilities, _row_lse
from labkit.flash.launch import LOG2E, Described, Launcher, _On
from labkit.flash.softmax import finish, rescale_and_exponentiate
from labkit.flash.tiles import load_tile
from labkit.flash.tuning import Config
from labkit.kernels.runtime import check_can_launch
from labkit.nsa.call import Call

__all__ = ["backward", "forward"]


# -- rows: tokens × heads of a group -----------------------------------------------------------


@triton.jit
def visible(t, C, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """How many compressed keys a query at position ``t`` sees: n(t), of C."""
    return tl.minimum(tl.maximum(t + (STRIDE - LENGTH + 1), 0) // STRIDE, C)


@triton.jit
def sequence_of(bh, heads, Nq, C, cu, cu_cmp, VARLEN: tl.constexpr):
    """Batch entry, KV head, first row of q and of the compressed keys, and how many of each."""
    batch, head = bh // heads, bh % heads
    start, start_c = 0, 0
    if VARLEN:  # sequences lie one after another in a tensor without a batch dimension
        start, start_c = tl.load(cu + batch).to(tl.int64), tl.load(cu_cmp + batch).to(tl.int64)
        Nq = (tl.load(cu + batch + 1) - start).to(tl.int32)
        C = (tl.load(cu_cmp + batch + 1) - start_c).to(tl.int32)
        batch = batch * 0
    return batch, head, start, start_c, Nq, C


@triton.jit
def rows_of(first, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Token and head within the group of each row of a tile that starts at token ``first``."""
    row = tl.arange(0, ROWS)
    return first + row // HEADS, row % HEADS


@triton.jit
def load_rows(
    x, batch, start, head, first, Nq, stride_b, stride_n, stride_h, stride_d,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``[ROWS, BLOCK_D]`` of ``[B, M, HQ, D]``: tokens from ``first``, heads of group ``head``.

    ``HEADS`` is GROUP rounded up to a power of two; what does not exist is 0.  ``TAIL``: tokens
    may end inside the tile.
    """
    if DESCRIPTOR:
        at = [batch, (start + first).to(tl.int32), head * GROUP, 0]
        tile = tl.reshape(x.load(at), [ROWS, BLOCK_D])
    else:
        token, g = rows_of(0, ROWS, HEADS)
        column = tl.arange(0, BLOCK_D)
        if WIDE:
            token, column = token.to(tl.int64), column.to(tl.int64)
            g = g.to(tl.int64)
        base = x + tl.cast(batch, tl.int64) * stride_b
        base += (tl.cast(start, tl.int64) + first) * stride_n
        base += tl.cast(head, tl.int64) * GROUP * stride_h
        at = base + ((token * stride_n + g * stride_h)[:, None] + column[None, :] * stride_d)
        if TAIL or HEADS != GROUP or D != BLOCK_D:
            inside = (first + token < Nq) & (g < GROUP)
            tile = tl.load(at, inside[:, None] & (column < D)[None, :], 0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def store_rows(
    x, value, batch, start, head, first, Nq, stride_b, stride_n, stride_h,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The way back of :func:`load_rows`; what does not exist is left alone."""
    token, g = rows_of(first, ROWS, HEADS)
    column = tl.arange(0, BLOCK_D)
    base = x + tl.cast(batch, tl.int64) * stride_b + tl.cast(start, tl.int64) * stride_n
    base += tl.cast(head, tl.int64) * GROUP * stride_h
    at = base + (token.to(tl.int64) * stride_n + g * stride_h)[:, None] + column[None, :]
    inside = ((token < Nq) & (g < GROUP))[:, None] & (column < D)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_numbers(
    x, place, start, head, first, Nq, M, heads, OTHER: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One number per row from ``[B, M, HQ]``; ``OTHER`` where there is no row."""
    token, g = rows_of(0, ROWS, HEADS)
    row = tl.cast(place, tl.int64) * M + start + first
    at = x + (row * heads + head) * GROUP + (token * heads * GROUP + g)
    if TAIL or HEADS != GROUP:
        return tl.load(at, (first + token < Nq) & (g < GROUP), OTHER)
    return tl.load(at)


# -- forward ------------------------------------------------------------------------------------


@triton.jit
def _attend(
    Q, m, l, o, k, v, batch, head, start_c, k_offset, v_offset, sees, C, c, lo, hi,
    stride_kn, stride_kd, stride_vn, stride_vd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the compressed keys ``lo … hi`` into the state (m, l, O) of the rows."""
    for first in tl.range(lo, hi, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        K = load_tile(
            k, batch, head, (start_c + first).to(tl.int32) if DESCRIPTOR else first, C,
            k_offset, stride_kn, stride_kd, BLOCK_N, D, BLOCK_D, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        s = tl.dot(Q, K.T, input_precision=PRECISION)
        if MASKED:
            j = first + tl.arange(0, BLOCK_N)
            s = tl.where(j[None, :] < sees[:, None], s, float("-inf"))
        p, m, l, o = rescale_and_exponentiate(s, m, l, o, c, MASKED)
        V = load_tile(
            v, batch, head, (start_c + first).to(tl.int32) if DESCRIPTOR else first, C,
            v_offset, stride_vn, stride_vd, BLOCK_N, DV, BLOCK_DV, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        o = tl.dot(p.to(V.dtype), V, o, input_precision=PRECISION)
    return m, l, o


@triton.jit
def forward_kernel(
    q, k, v, o, lse, cu, cu_cmp,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_ob, stride_on, stride_oh, stride_lb, stride_lh,
    heads, all_heads, Nq, C, offset, tiles, c, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    VARLEN: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and LSE of ``BLOCK_M / HEADS`` tokens of one group of heads."""
    # The last tokens see the most keys: they start first.
    pid = tl.program_id(0)
    tile, bh = tiles - 1 - pid // all_heads, pid % all_heads
    place, head, start, start_c, Nq, C = sequence_of(bh, heads, Nq, C, cu, cu_cmp, VARLEN)
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    first = tile * TOKENS
    if VARLEN:
        beyond = first >= Nq  # there are tiles for the longest sequence
        if beyond:
            return

    # -- Q: once ---------------------------------------------------------------------------------
    Q = load_rows(
        q, place, start, head, first, Nq, stride_qb, stride_qn, stride_qh, stride_qd,
        BLOCK_M, HEADS, GROUP, D, BLOCK_D, False, True, True,
    )  # fmt: skip
    token, g = rows_of(first, BLOCK_M, HEADS)
    sees = visible(token + offset, C, LENGTH, STRIDE)
    full = visible(first + offset, C, LENGTH, STRIDE) // BLOCK_N * BLOCK_N
    hi = visible(tl.minimum(first + TOKENS, Nq) - 1 + offset, C, LENGTH, STRIDE)

    # -- compressed keys and values: once for this tile ------------------------------------------
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_offset = tl.cast(place, tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    k_offset += tl.cast(start_c, tl.int64) * stride_kn
    v_offset = tl.cast(place, tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    v_offset += tl.cast(start_c, tl.int64) * stride_vn
    m, l, acc = _attend(
        Q, m, l, acc, k, v, place, head, start_c, k_offset, v_offset, sees, C, c, 0, full,
        stride_kn, stride_kd, stride_vn, stride_vd, D, DV, BLOCK_D, BLOCK_DV,
        BLOCK_N, DESCRIPTOR, WIDE, PRECISION, False,
    )  # fmt: skip
    m, l, acc = _attend(
        Q, m, l, acc, k, v, place, head, start_c, k_offset, v_offset, sees, C, c, full, hi,
        stride_kn, stride_kd, stride_vn, stride_vd, D, DV, BLOCK_D, BLOCK_DV,
        BLOCK_N, DESCRIPTOR, WIDE, PRECISION, True,
    )  # fmt: skip

    # -- O and LSE: once -------------------------------------------------------------------------
    out, lse_i = finish(m, l, acc, scale)
    store_rows(
        o, out, place, start, head, first, Nq, stride_ob, stride_on, stride_oh,
        BLOCK_M, HEADS, GROUP, DV, BLOCK_DV,
    )  # fmt: skip
    at = lse + tl.cast(place, tl.int64) * stride_lb + (head * GROUP + g).to(tl.int64) * stride_lh
    tl.store(at + start + token, lse_i, mask=(token < Nq) & (g < GROUP))


# -- backward -----------------------------------------------------------------------------------


@triton.jit
def delta_kernel(
    o, dout, lse, dlse, base, delta,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh, stride_gd,
    stride_lb, stride_lh, stride_eb, stride_eh, stride_en, heads, M, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """δ = rowsum(dO ∘ O) − dLSE, and LSE as the gradients want it, both ``[B, M, HQ]``.

    In that order the numbers of a tile's rows lie side by side.  LSE comes in base 2 (except in
    float32, ``labkit/flash/backward.py`` says why), with +∞ for rows that saw nothing: their
    probabilities are then 0.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < rows
    h, i, b = row % heads, row // heads % M, row // heads // M
    column = tl.arange(0, BLOCK_DV)
    inside = there[:, None] & (column < DV)[None, :]
    at = (b * stride_ob + i * stride_on + h * stride_oh)[:, None] + column[None, :]
    O = tl.load(o + at, inside, 0.0)
    at = (b * stride_gb + i * stride_gn + h * stride_gh)[:, None]
    dO = tl.load(dout + at + column.to(tl.int64)[None, :] * stride_gd, inside, 0.0)
    out = tl.sum(O.to(tl.float32) * dO.to(tl.float32), 1)
    natural = tl.load(lse + b * stride_lb + h * stride_lh + i, there, float("-inf"))
    saw = natural != float("-inf")
    if HAS_DLSE:
        extra = tl.load(dlse + b * stride_eb + h * stride_eh + i * stride_en, there & saw, 0.0)
        out -= extra
    tl.store(delta + row, out, mask=there)
    tl.store(base + row, _row_lse(natural, EXACT), mask=there)


@triton.jit
def _gather_dq(
    dq, Q, dO, base, delta, k, v, batch, head, start_c, k_offset, v_offset,
    sees, C, c, scale, lo, hi, stride_kn, stride_kd, stride_vn, stride_vd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the compressed keys ``lo … hi`` contribute to dQ of the rows."""
    for first in tl.range(lo, hi, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        K = load_tile(
            k, batch, head, (start_c + first).to(tl.int32) if DESCRIPTOR else first, C,
            k_offset, stride_kn, stride_kd, BLOCK_N, D, BLOCK_D, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        V = load_tile(
            v, batch, head, (start_c + first).to(tl.int32) if DESCRIPTOR else first, C,
            v_offset, stride_vn, stride_vd, BLOCK_N, DV, BLOCK_DV, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        s = tl.dot(Q, K.T, input_precision=PRECISION)
        dp = tl.dot(dO, V.T, input_precision=PRECISION)
        if MASKED:
            j = first + tl.arange(0, BLOCK_N)
            s = tl.where(j[None, :] < sees[:, None], s, float("-inf"))
        p = _probabilities(s, base[:, None], c, scale, Q.dtype == tl.float32)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(K.dtype), K, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, dout, base, delta, dq, cu, cu_cmp,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gn, stride_gh, stride_gd, stride_dqb, stride_dqn, stride_dqh,
    heads, all_heads, M, Nq, C, offset, tiles, c, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    VARLEN: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a few tokens of one group: the program walks along the keys, as forward does."""
    pid = tl.program_id(0)
    tile, bh = tiles - 1 - pid // all_heads, pid % all_heads
    place, head, start, start_c, Nq, C = sequence_of(bh, heads, Nq, C, cu, cu_cmp, VARLEN)
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    first = tile * TOKENS
    if VARLEN:
        beyond = first >= Nq  # there are tiles for the longest sequence
        if beyond:
            return
    Q = load_rows(
        q, place, start, head, first, Nq, stride_qb, stride_qn, stride_qh, stride_qd,
        BLOCK_M, HEADS, GROUP, D, BLOCK_D, False, True, True,
    )  # fmt: skip
    dO = load_rows(
        dout, place, start, head, first, Nq, stride_gb, stride_gn, stride_gh, stride_gd,
        BLOCK_M, HEADS, GROUP, DV, BLOCK_DV, False, True, True,
    )  # fmt: skip
    base_i = load_numbers(
        base, place, start, head, first, Nq, M, heads, float("inf"), BLOCK_M, HEADS, GROUP, True
    )
    delta_i = load_numbers(
        delta, place, start, head, first, Nq, M, heads, 0.0, BLOCK_M, HEADS, GROUP, True
    )
    token, _ = rows_of(first, BLOCK_M, HEADS)
    sees = visible(token + offset, C, LENGTH, STRIDE)
    full = visible(first + offset, C, LENGTH, STRIDE) // BLOCK_N * BLOCK_N
    hi = visible(tl.minimum(first + TOKENS, Nq) - 1 + offset, C, LENGTH, STRIDE)
    k_offset = tl.cast(place, tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    k_offset += tl.cast(start_c, tl.int64) * stride_kn
    v_offset = tl.cast(place, tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    v_offset += tl.cast(start_c, tl.int64) * stride_vn
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _gather_dq(
        acc, Q, dO, base_i, delta_i, k, v, place, head, start_c, k_offset, v_offset,
        sees, C, c, scale, 0, full, stride_kn, stride_kd, stride_vn, stride_vd,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, DESCRIPTOR, WIDE, PRECISION, False,
    )  # fmt: skip
    acc = _gather_dq(
        acc, Q, dO, base_i, delta_i, k, v, place, head, start_c, k_offset, v_offset,
        sees, C, c, scale, full, hi, stride_kn, stride_kd, stride_vn, stride_vd,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, DESCRIPTOR, WIDE, PRECISION, True,
    )  # fmt: skip
    store_rows(
        dq, acc * scale, place, start, head, first, Nq, stride_dqb, stride_dqn, stride_dqh,
        BLOCK_M, HEADS, GROUP, D, BLOCK_D,
    )  # fmt: skip


@triton.jit
def first_token(key, offset, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """The first query that sees compressed key ``key``."""
    return tl.maximum(key * STRIDE + (LENGTH - 1) - offset, 0)


@triton.jit
def _gather_run(
    dk, dv, K, V, lo, hi, given, strides, GROUP: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries ``lo … hi`` contribute to dK and dV of the compressed keys ``j``."""
    q, dout, base, delta, place, start, head, j, Nq, M, C, heads, offset, c, scale = given
    stride_qb, stride_qn, stride_qh, stride_qd, stride_gb, stride_gn, stride_gh, stride_gd = strides
    EXACT: tl.constexpr = K.dtype == tl.float32
    for first in tl.range(lo, hi, BLOCK_M // HEADS):
        Q = load_rows(
            q, place, start, head, first, Nq, stride_qb, stride_qn, stride_qh, stride_qd,
            BLOCK_M, HEADS, GROUP, D, BLOCK_D, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        st = tl.dot(K, Q.T, input_precision=PRECISION)  # Sᵀ
        if MASKED:
            token, _ = rows_of(first, BLOCK_M, HEADS)
            sees = visible(token + offset, C, LENGTH, STRIDE)
            st = tl.where(j[:, None] < sees[None, :], st, float("-inf"))
        base_i = load_numbers(
            base, place, start, head, first, Nq, M, heads, float("inf"),
            BLOCK_M, HEADS, GROUP, MASKED,
        )  # fmt: skip
        pt = _probabilities(st, base_i[None, :], c, scale, EXACT)  # Pᵀ
        dO = load_rows(
            dout, place, start, head, first, Nq, stride_gb, stride_gn, stride_gh, stride_gd,
            BLOCK_M, HEADS, GROUP, DV, BLOCK_DV, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        dv = tl.dot(pt.to(dO.dtype), dO, dv, input_precision=PRECISION)
        dpt = tl.dot(V, dO.T, input_precision=PRECISION)  # dPᵀ
        delta_i = load_numbers(
            delta, place, start, head, first, Nq, M, heads, 0.0, BLOCK_M, HEADS, GROUP, MASKED
        )
        dst = pt * (dpt - delta_i[None, :])  # dSᵀ
        dk = tl.dot(dst.to(Q.dtype), Q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _gather_dkdv(
    dk, dv, K, V, lo, hi, given, strides, GROUP: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """:func:`_gather_run`; in float32 in runs of 256 rows, each summed for itself.

    Thousands of products one after the other would cost float32 several times the error of a
    product that adds them in short runs.
    """
    if K.dtype == tl.float32:
        RUN: tl.constexpr = max(256, BLOCK_M) // HEADS
        for first in tl.range(lo, hi, RUN):
            dk_run, dv_run = _gather_run(
                tl.zeros_like(dk), tl.zeros_like(dv), K, V, first, tl.minimum(first + RUN, hi),
                given, strides, GROUP, HEADS, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, LENGTH, STRIDE, DESCRIPTOR, WIDE, PRECISION, MASKED,
            )  # fmt: skip
            dk += dk_run
            dv += dv_run
    else:
        dk, dv = _gather_run(
            dk, dv, K, V, lo, hi, given, strides, GROUP, HEADS, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_M, LENGTH, STRIDE, DESCRIPTOR, WIDE, PRECISION, MASKED,
        )  # fmt: skip
    return dk, dv


@triton.jit
def dkdv_kernel(
    q, k, v, dout, base, delta, dk, dv, cu, cu_cmp,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gn, stride_gh, stride_gd,
    stride_dks, stride_dkb, stride_dkn, stride_dkh,
    stride_dvs, stride_dvb, stride_dvn, stride_dvh,
    heads, all_heads, M, Nq, C, offset, tiles, part, c, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    VARLEN: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of ``BLOCK_N`` compressed keys from ``part`` queries: one partial sum."""
    # Programs of one part run together, and find each other's Q and dO in L2.
    pid, together = tl.program_id(0), tiles * all_heads
    which, tile, bh = pid // together, pid % together // all_heads, pid % all_heads
    place, head, start, start_c, Nq, C = sequence_of(bh, heads, Nq, C, cu, cu_cmp, VARLEN)
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    key = tile * BLOCK_N
    begin, end = which * part, tl.minimum((which + 1) * part, Nq)
    see_one = first_token(key, offset, LENGTH, STRIDE)
    if (key >= C) | (see_one >= end) | (begin >= end):
        return  # reduce_kernel asks the same, and does not read what was not written
    see_all = first_token(tl.minimum(key + BLOCK_N, C) - 1, offset, LENGTH, STRIDE)
    lo = tl.maximum(see_one // TOKENS * TOKENS, begin)
    full_lo = tl.minimum(tl.maximum(tl.cdiv(see_all, TOKENS) * TOKENS, lo), end)
    full_hi = tl.maximum(end // TOKENS * TOKENS, full_lo)

    # -- K and V: once ---------------------------------------------------------------------------
    j = key + tl.arange(0, BLOCK_N)
    at = tl.cast(place, tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    at += tl.cast(start_c, tl.int64) * stride_kn
    K = load_tile(
        k, place, head, key, C, at, stride_kn, stride_kd, BLOCK_N, D, BLOCK_D, False, True, True
    )
    at = tl.cast(place, tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    at += tl.cast(start_c, tl.int64) * stride_vn
    V = load_tile(
        v, place, head, key, C, at, stride_vn, stride_vd, BLOCK_N, DV, BLOCK_DV, False, True, True
    )
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # -- Q, dO, LSE and δ of this part's queries: once for this tile of keys ----------------------
    given = (q, dout, base, delta, place, start, head, j, Nq, M, C, heads, offset, c, scale)
    strides = (stride_qb, stride_qn, stride_qh, stride_qd,
               stride_gb, stride_gn, stride_gh, stride_gd)  # fmt: skip
    dk_acc, dv_acc = _gather_dkdv(
        dk_acc, dv_acc, K, V, lo, full_lo, given, strides, GROUP, HEADS, D, DV, BLOCK_D, BLOCK_DV,
        BLOCK_M, LENGTH, STRIDE, DESCRIPTOR, WIDE, PRECISION, True,
    )  # fmt: skip
    dk_acc, dv_acc = _gather_dkdv(
        dk_acc, dv_acc, K, V, full_lo, full_hi, given, strides, GROUP, HEADS, D, DV, BLOCK_D,
        BLOCK_DV, BLOCK_M, LENGTH, STRIDE, DESCRIPTOR, WIDE, PRECISION, False,
    )  # fmt: skip
    dk_acc, dv_acc = _gather_dkdv(
        dk_acc, dv_acc, K, V, full_hi, end, given, strides, GROUP, HEADS, D, DV, BLOCK_D, BLOCK_DV,
        BLOCK_M, LENGTH, STRIDE, DESCRIPTOR, WIDE, PRECISION, True,
    )  # fmt: skip

    row = start_c + j
    wide, wide_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = which.to(tl.int64) * stride_dks + tl.cast(place, tl.int64) * stride_dkb
    at += head.to(tl.int64) * stride_dkh
    at = dk + at + row.to(tl.int64)[:, None] * stride_dkn + wide[None, :]
    tl.store(at, dk_acc * scale, mask=(j < C)[:, None] & (wide < D)[None, :])
    at = which.to(tl.int64) * stride_dvs + tl.cast(place, tl.int64) * stride_dvb
    at += head.to(tl.int64) * stride_dvh
    at = dv + at + row.to(tl.int64)[:, None] * stride_dvn + wide_v[None, :]
    tl.store(at, dv_acc, mask=(j < C)[:, None] & (wide_v < DV)[None, :])


@triton.jit
def reduce_kernel(
    parts, out, cu, cu_cmp, stride_ps, stride_pb, stride_pn, stride_ph,
    stride_ob, stride_on, stride_oh, heads, all_heads, Nq, C, offset, part,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Add up the parts of ``ROWS`` compressed keys, from the first that sees them, in order."""
    tile, bh = tl.program_id(0) // all_heads, tl.program_id(0) % all_heads
    place, head, _, start_c, Nq, C = sequence_of(bh, heads, Nq, C, cu, cu_cmp, VARLEN)
    j, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (j < C)[:, None] & (column < D)[None, :]
    row = (start_c + j).to(tl.int64)
    at = tl.cast(place, tl.int64) * stride_pb + head.to(tl.int64) * stride_ph
    at = parts + at + row[:, None] * stride_pn + column[None, :]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    seen = first_token(tile * ROWS // BLOCK_N * BLOCK_N, offset, LENGTH, STRIDE)
    for which in range(seen // part, tl.cdiv(Nq, part)):
        acc += tl.load(at + tl.cast(which, tl.int64) * stride_ps, inside, 0.0)
    at = tl.cast(place, tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    at = out + at + row[:, None] * stride_on + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


# -- launching ----------------------------------------------------------------------------------

#: per kernel, by the widest head_dim: rows, keys, warps, stages, and whether the copy engine
#: brings what is streamed; measured on an H200
_HALF = {
    "forward": {128: (64, 64, 4, 1, True), 256: (64, 32, 4, 2)},
    "dq": {128: (64, 64, 4, 2, True), 256: (32, 32, 4, 2)},
    "dkdv": {128: (64, 64, 4, 2, True), 256: (32, 32, 4, 2)},
    "topk": {128: (64, 64, 4, 2, True), 256: (64, 32, 4, 2)},
}
_FLOAT = {
    "forward": {64: (64, 32, 8, 2), 128: (64, 16, 8, 2), 256: (16, 32, 4, 1)},
    "dq": {128: (64, 32, 8, 2), 256: (16, 16, 4, 1)},
    "dkdv": {128: (32, 32, 8, 2), 256: (16, 16, 4, 1)},
    "topk": {128: (32, 32, 4, 2), 256: (32, 16, 4, 1)},
}
#: making descriptors takes the host longer than fewer scores take the GPU
_WORTH_A_DESCRIPTOR = 2**24


def config_for(
    kind: str, q: torch.Tensor, width: int, call: Call, group: int, *streamed: torch.Tensor
) -> Config:
    """Tile sizes of a kernel: from a table, with fewer rows where a call has few.

    ``kind`` is ``"forward"``, ``"dq"``, ``"dkdv"`` or ``"topk"``; ``width`` the widest head_dim;
    ``streamed`` what the kernel walks along.
    """
    card = launch.card(q)[0]
    if card == 0:  # the interpreter: few programs, and tiles small enough that some are full
        chosen = Config(64, 16, 4, 1)
    else:
        table = (_HALF if q.element_size() == 2 else _FLOAT)[kind]
        fitting = [w for w in table if w >= width]
        chosen = Config(*table[min(fitting) if fitting else max(table)])
        if q.element_size() == 4 and call.precision != "ieee" and chosen.num_warps > 4:
            # On tensor cores eight warps are two warpgroups, which share a product of 64 rows by
            # its columns.  Of 16 keys each gets 8, and Triton 3.6 lets it read 16: past the end.
            chosen = replace(chosen, num_warps=4)
    heads = triton.next_power_of_2(group)
    copied = (
        chosen.descriptors
        and card >= 90
        and call.cu is None  # a tile may end in the next sequence, which must not be read
        and call.max_q * call.compressed * q.shape[2] >= _WORTH_A_DESCRIPTOR
        and (kind != "dkdv" or heads == group)
        and launch._describable(*streamed)
    )
    rows = min(chosen.block_m, max(16, triton.next_power_of_2(call.max_q * heads)))
    return replace(chosen, block_m=max(heads, rows), descriptors=copied)


def block_of(x: torch.Tensor) -> int:
    """Columns of a tile for the last axis of ``x``.

    At least 64 in half precision on a GPU: ``labkit.flash.launch`` says what goes wrong below.
    """
    least = 64 if launch.card(x)[0] and x.element_size() == 2 else 16
    return max(least, triton.next_power_of_2(x.shape[-1]))


def tile_constants(call: Call, c: Config, q: torch.Tensor, k: torch.Tensor, *v) -> dict[str, Any]:
    """Constants that the kernels of compression share, in their order."""
    group = q.shape[2] // k.shape[2]
    widths = {"D": q.shape[3]}
    blocks = {"BLOCK_D": block_of(q)}
    if v:
        widths["DV"], blocks["BLOCK_DV"] = v[0].shape[3], block_of(v[0])
    return dict(
        GROUP=group, HEADS=triton.next_power_of_2(group), **widths, **blocks,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, LENGTH=call.length, STRIDE=call.stride,
    )  # fmt: skip


def is_wide(c: Config, *tensors: torch.Tensor) -> bool:
    """Whether an offset inside a tile can exceed 32 bits."""
    rows = max(c.block_m, c.block_n)
    return any(
        rows * abs(x.stride(1)) + x.shape[2] * abs(x.stride(2)) + x.shape[3] * abs(x.stride(3))
        >= 2**31
        for x in tensors
    )


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself: what a kernel gets that computes addresses."""
    return x


def by_keys(c: Config, x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """How ``[B, C, H, D]`` reaches a kernel that streams it: to the copy engine, or as it is."""
    if not c.descriptors:
        return as_it_is
    described = Described(x.transpose(1, 2), c.block_n, block_of(x))
    return lambda x: described(x.transpose(1, 2))


def by_rows(c: Config, x: torch.Tensor, group: int) -> Callable[[torch.Tensor], Any]:
    """The same for ``[B, M, HQ, D]``, in tiles of tokens × heads."""
    if not c.descriptors:
        return as_it_is
    described = Described(x, c.block_m, block_of(x))
    described.form.block_shape = [1, c.block_m // group, group, block_of(x)]
    return described


_plans: dict[tuple, Any] = {}
_MOST_PLANS = 2000


def plan_key(call: Call, *tensors: torch.Tensor) -> tuple:
    """What every decision about a launch depends on."""
    parts: list[Any] = [
        call.scale, call.precision, call.block_size, call.length, call.stride, call.count,
        call.initial, call.local, call.max_q, call.max_k, call.sequences,
    ]  # fmt: skip
    parts += [call.cu is not None and (call.cu.dtype, call.cu_cmp.dtype)]
    for x in tensors:
        # Triton compiles for the alignment of each pointer.
        parts += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)
    return tuple(parts)


def run(key: tuple, make: Callable[[Config], Any], config: Config, *arguments) -> None:
    """Launch the plan of this key; made by ``make`` on first use, smaller if it does not fit."""
    from triton.runtime.errors import OutOfResources

    plan = _plans.get(key)
    if plan is not None:
        plan(*arguments)
        return
    if len(_plans) > _MOST_PLANS:
        _plans.clear()
    check_can_launch("labkit.nsa", *(x for x in arguments if isinstance(x, torch.Tensor)))
    while True:
        plan = make(config)
        try:
            plan(*arguments)
            break
        except OutOfResources:
            smaller = tuning.smaller(config)
            if smaller is None:
                raise
            config = smaller
    _plans[key] = plan


def _keys_per_sequence(call: Call, k: torch.Tensor) -> int:
    """Compressed keys of the (longest) sequence."""
    return min(call.compressed, k.shape[1])


def forward(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    call: Call,
    *,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O ``[B, M, HQ, V]`` and LSE ``[B, HQ, M]`` of attention to the compressed keys.

    Parameters
    ----------
    q : ``[B, M, HQ, D]``, float16, bfloat16 or float32, any strides.
    k_cmp, v_cmp : ``[B, C, H, D]`` and ``[B, C, H, V]``; with varlen ``[1, ΣC, H, …]``, sequence
        after sequence as ``call.cu_cmp`` says.
    config : overrules the tile sizes; experiments use it.

    Returns
    -------
    o : in the dtype of q, contiguous; 0 for a query that sees no compressed key.
    lse : float32, natural logarithm; −∞ for such a query.
    """
    b, m, hq, _ = q.shape
    group = hq // k_cmp.shape[2]
    o = q.new_empty((b, m, hq, v_cmp.shape[3]))
    lse = q.new_empty((b, hq, m), dtype=torch.float32)
    if q.numel() == 0 or call.max_q == 0:
        return o, lse
    if k_cmp.shape[1] == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    c = config or config_for(
        "forward", q, max(q.shape[3], v_cmp.shape[3]), call, group, k_cmp, v_cmp
    )

    def make(c: Config):
        return _Forward(q, k_cmp, v_cmp, o, lse, call, c)

    with _On(q):
        key = ("forward", config, *plan_key(call, q, k_cmp, v_cmp))
        run(key, make, c, q, k_cmp, v_cmp, o, lse, call.cu, call.cu_cmp)
    return o, lse


class _Forward:
    """The forward kernel with one configuration."""

    def __init__(self, q, k, v, o, lse, call: Call, c: Config) -> None:
        heads, all_heads = k.shape[2], (call.sequences or q.shape[0]) * k.shape[2]
        constants = tile_constants(call, c, q, k, v)
        tiles = triton.cdiv(call.max_q, c.block_m // constants["HEADS"])
        self.keys, self.values = by_keys(c, k), by_keys(c, v)
        self.launch = Launcher(
            forward_kernel, (tiles * all_heads,),
            (*q.stride(), *k.stride(), *v.stride(), *o.stride()[:3], *lse.stride()[:2],
             heads, all_heads, call.max_q, _keys_per_sequence(call, k),
             0 if call.cu is not None else call.offset, tiles, call.scale * LOG2E, call.scale),
            dict(**constants, VARLEN=call.cu is not None, DESCRIPTOR=c.descriptors,
                 WIDE=is_wide(c, k, v), PRECISION=call.precision),
            c,
        )  # fmt: skip

    def __call__(self, q, k, v, o, lse, cu, cu_cmp) -> None:
        self.launch(q, self.keys(k), self.values(v), o, lse, cu, cu_cmp)


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    *,
    dq_config: Config | None = None,
    dkdv_config: Config | None = None,
    parts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK_cmp and dV_cmp, contiguous, in the dtypes of q, k_cmp and v_cmp.

    ``dlse`` ``[B, HQ, M]`` float32 is the gradient that reaches LSE, None if LSE was not used.
    ``parts`` overrules into how many parts the queries are cut.  No atomics: bit-equal each time.
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k_cmp.shape, dtype=k_cmp.dtype, device=q.device)
    dv = torch.empty(v_cmp.shape, dtype=v_cmp.dtype, device=q.device)
    if k_cmp.shape[1] == 0 or q.numel() == 0 or call.max_q == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    group, width = q.shape[2] // k_cmp.shape[2], max(q.shape[3], v_cmp.shape[3])
    base = q.new_empty(q.shape[:3], dtype=torch.float32)
    delta = torch.empty_like(base)
    key = (dq_config, dkdv_config, parts, *plan_key(call, q, k_cmp, v_cmp, dout, o))
    if dlse is not None:
        key += (dlse.stride(), dlse.dtype, dlse.data_ptr() % 16 == 0)
    rows = Config(16, 0, 4, 1)
    with _On(q):
        run(("delta", *key), lambda c: _delta(o, dout, lse, dlse, q, c), rows,
            o, dout, lse, lse if dlse is None else dlse, base, delta)  # fmt: skip
        inputs = (q, k_cmp, v_cmp, dout, base, delta)
        c = dkdv_config or config_for("dkdv", q, width, call, group, q, dout)
        run(("dkdv", *key), lambda c: _Dkdv(*inputs, dk, dv, call, c, parts), c,
            *inputs, dk, dv, call.cu, call.cu_cmp)  # fmt: skip
        c = dq_config or config_for("dq", q, width, call, group, k_cmp, v_cmp)
        run(("dq", *key), lambda c: _Dq(*inputs, dq, call, c), c,
            *inputs, dq, call.cu, call.cu_cmp)  # fmt: skip
    return dq, dk, dv


def _delta(o, dout, lse, dlse, q, c: Config) -> Launcher:
    """The launch of :func:`delta_kernel`."""
    b, m, hq, dv = o.shape
    extra = lse if dlse is None else dlse
    return Launcher(
        delta_kernel, (triton.cdiv(b * m * hq, c.block_m),),
        (*o.stride()[:3], *dout.stride(), *lse.stride()[:2], *extra.stride(), hq, m, b * m * hq),
        dict(DV=dv, BLOCK_DV=triton.next_power_of_2(dv), BLOCK_M=c.block_m,
             HAS_DLSE=dlse is not None, EXACT=q.dtype == torch.float32),
        c,
    )  # fmt: skip


class _Dq:
    """The dQ kernel with one configuration."""

    def __init__(self, q, k, v, dout, base, delta, dq, call: Call, c: Config) -> None:
        heads, all_heads = k.shape[2], (call.sequences or q.shape[0]) * k.shape[2]
        constants = tile_constants(call, c, q, k, v)
        tiles = triton.cdiv(call.max_q, c.block_m // constants["HEADS"])
        self.keys, self.values = by_keys(c, k), by_keys(c, v)
        self.launch = Launcher(
            dq_kernel, (tiles * all_heads,),
            (*q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dq.stride()[:3],
             heads, all_heads, q.shape[1], call.max_q, _keys_per_sequence(call, k),
             0 if call.cu is not None else call.offset, tiles, call.scale * LOG2E, call.scale),
            dict(**constants, VARLEN=call.cu is not None, DESCRIPTOR=c.descriptors,
                 WIDE=is_wide(c, k, v), PRECISION=call.precision),
            c,
        )  # fmt: skip

    def __call__(self, q, k, v, dout, base, delta, dq, cu, cu_cmp) -> None:
        self.launch(q, self.keys(k), self.values(v), dout, base, delta, dq, cu, cu_cmp)


class _Dkdv:
    """The dK/dV kernel with one configuration, and the sums over its parts."""

    def __init__(self, q, k, v, dout, base, delta, dk, dv, call: Call, c: Config, parts) -> None:
        heads, all_heads = k.shape[2], (call.sequences or q.shape[0]) * k.shape[2]
        group, keys = q.shape[2] // heads, _keys_per_sequence(call, k)
        constants = tile_constants(call, c, q, k, v)
        tokens = c.block_m // constants["HEADS"]
        tiles = triton.cdiv(keys, c.block_n)
        if parts is None:
            # Half of the (tile, part) pairs lie above the staircase: eight programs for each of
            # the two places of a multiprocessor leave an uneven end of a few per cent.
            parts = triton.cdiv(32 * launch.card(q)[2], tiles * all_heads)
            parts = min(parts, triton.cdiv(call.max_q, 8 * tokens))
        steps = triton.cdiv(call.max_q, tokens)
        self.part = triton.cdiv(steps, max(1, parts)) * tokens
        self.parts = triton.cdiv(call.max_q, self.part)
        offset, varlen = 0 if call.cu is not None else call.offset, call.cu is not None
        self.q, self.dout = by_rows(c, q, group), by_rows(c, dout, group)
        strides = [self._strides(x) for x in (dk, dv)]
        self.launch = Launcher(
            dkdv_kernel, (self.parts * tiles * all_heads,),
            (*q.stride(), *k.stride(), *v.stride(), *dout.stride(), *strides[0], *strides[1],
             heads, all_heads, q.shape[1], call.max_q, keys, offset, tiles, self.part,
             call.scale * LOG2E, call.scale),
            dict(**constants, VARLEN=varlen, DESCRIPTOR=c.descriptors,
                 WIDE=is_wide(c, q, dout), PRECISION=call.precision),
            c,
        )  # fmt: skip
        rows = min(8, c.block_n)
        self.reduce = [
            Launcher(
                reduce_kernel, (triton.cdiv(keys, rows) * all_heads,),
                (*stride, *x.stride()[:3], heads, all_heads, call.max_q, keys, offset, self.part),
                dict(D=x.shape[3], BLOCK_D=triton.next_power_of_2(x.shape[3]), ROWS=rows,
                     BLOCK_N=c.block_n, LENGTH=call.length, STRIDE=call.stride, VARLEN=varlen),
                Config(rows, 0, 4, 1),
            )
            for stride, x in zip(strides, (dk, dv), strict=True)
        ]  # fmt: skip

    @staticmethod
    def _strides(x: torch.Tensor) -> tuple[int, ...]:
        return (x.numel(), *x.stride()[:3])

    def __call__(self, q, k, v, dout, base, delta, dk, dv, cu, cu_cmp) -> None:
        sums = [x.new_empty((self.parts, *x.shape), dtype=torch.float32) for x in (dk, dv)]
        self.launch(self.q(q), k, v, self.dout(dout), base, delta, *sums, cu, cu_cmp)
        for add, x, out in zip(self.reduce, sums, (dk, dv), strict=True):
            add(x, out, cu, cu_cmp)
