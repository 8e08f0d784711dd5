r"""The forward kernel: O and LSE of one tile of queries, with S and P in registers only.

.. math::
    S = Q K^\top, \qquad P = 2^{\,cS - cm}, \qquad O = \frac{PV}{l}, \qquad
    \mathrm{LSE} = \ln \sum_j e^{\mathrm{scale}\, S_j}

A program owns ``BLOCK_M`` queries of one head.  It loads them once, walks along the keys in tiles
of ``BLOCK_N``, and keeps (m, l, O) of each row (``softmax.py``).  What it writes is O and one LSE
per row.  Per pass of the keys it reads K and V once, so for one head without a mask, with
T = Nq / BLOCK_M tiles of queries

.. math:: \text{bytes} = N_q (d + d_v)\,e + 4 N_q + T\, N_k (d + d_v)\, e ,

which chapter 06 counts.  Dao et al. 2022 (algorithm 1), Dao 2023 (the loop order used here).

The mask is evaluated only in tiles that it cuts (``masking.py``).  ``SPLITS`` programs can share
one tile of queries, each with a part of the keys; they write partial states in float32, and
:func:`merge_kernel` joins them with chapter 07's merge.  ``PACK``: the rows of a tile are the G
query heads of a KV head, position by position, so that a single query still fills a tile.

Taught in chapter 08 (the forward kernel).
"""

from __future__ import annotations

import triton
import triton.language as tl

from labkit.flash.masking import hide, key_bounds
from labkit.flash.softmax import finish, rescale_and_exponentiate
from labkit.flash.tiles import head_offset, load_tile, store_tile

__all__ = ["forward_kernel", "merge_kernel"]


@triton.jit
def which_tile(program, tiles, heads, section, DESCENDING: tl.constexpr):
    """(tile, head) of a program: ``section`` heads at a time, so that their K and V stay in L2.

    Under a causal mask the last tile is the longest: it starts first, and the short ones fill
    the gaps at the end.
    """
    group = program // (tiles * section)
    within = program - group * (tiles * section)
    here = min(section, heads - group * section)
    head = group * section + within % here
    tile = within // here
    if DESCENDING:
        tile = tiles - 1 - tile
    return tile, head


@triton.jit
def _attend(
    q, m, l, o, k, v, batch, kv_head, k_offset, v_offset, i, Nq, Nk, window, c, lo, hi,
    stride_kn, stride_kd, stride_vn, stride_vd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys ``lo … hi`` into the state (m, l, O) of the rows ``i``."""
    for first in tl.range(lo, hi, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        K = load_tile(
            k, batch, kv_head, first, Nk, k_offset, stride_kn, stride_kd,
            BLOCK_N, D, BLOCK_D, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        s = tl.dot(q, K.T, input_precision=PRECISION)
        if MASKED:
            j = first + tl.arange(0, BLOCK_N)
            s = hide(s, i[:, None], j[None, :], Nq, Nk, window, CAUSAL, WINDOW)
        p, m, l, o = rescale_and_exponentiate(s, m, l, o, c, MASKED)
        V = load_tile(
            v, batch, kv_head, first, Nk, v_offset, stride_vn, stride_vd,
            BLOCK_N, DV, BLOCK_DV, DESCRIPTOR, MASKED, WIDE,
        )  # fmt: skip
        o = tl.dot(p.to(V.dtype), V, o, input_precision=PRECISION)
    return m, l, o


@triton.jit
def forward_kernel(
    q, k, v, o, lse, cu_q, cu_k,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_os, stride_ob, stride_oh, stride_on,
    stride_ls, stride_lb, stride_lh,
    heads, all_heads, Nq, Nk, tiles, section, window, c, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr,
    PACK: tl.constexpr, SPLITS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # -- which queries, which keys --------------------------------------------------------
    tile, bh = which_tile(tl.program_id(0), tiles, all_heads, section, CAUSAL)
    batch, head = bh // heads, bh % heads  # with PACK, heads counts KV heads
    kv_head = head if PACK else head // GROUP
    start_q, start_k, place = 0, 0, batch
    if VARLEN:  # sequences lie one after another in a tensor without a batch dimension
        start_q, start_k = tl.load(cu_q + batch), tl.load(cu_k + batch)
        Nq, Nk = tl.load(cu_q + batch + 1) - start_q, tl.load(cu_k + batch + 1) - start_k
        place = 0
        if tile * BLOCK_M >= Nq * (GROUP if PACK else 1):
            return
    q_offset = head_offset(place, head * GROUP if PACK else head, start_q,
                           stride_qb, stride_qh, stride_qn)  # fmt: skip
    k_offset = head_offset(place, kv_head, start_k, stride_kb, stride_kh, stride_kn)
    v_offset = head_offset(place, kv_head, start_k, stride_vb, stride_vh, stride_vn)
    first = tile * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    i = row // GROUP if PACK else row  # position of each row

    # -- Q: once ----------------------------------------------------------------------------
    if PACK:
        at = i.to(tl.int64) * stride_qn + (row % GROUP).to(tl.int64) * stride_qh
        column = tl.arange(0, BLOCK_D).to(tl.int64)
        inside = (i < Nq)[:, None] & (column < D)[None, :]
        Q = tl.load(q + q_offset + at[:, None] + column[None, :] * stride_qd, inside, 0.0)
    else:
        Q = load_tile(
            q, place, head, first, Nq, q_offset, stride_qn, stride_qd,
            BLOCK_M, D, BLOCK_D, DESCRIPTOR, not EVEN, WIDE,
        )  # fmt: skip

    # -- K and V: once for this tile of queries ----------------------------------------------
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first_i = first // GROUP if PACK else first
    last_i = min(Nq, (first + BLOCK_M - 1) // GROUP + 1 if PACK else first + BLOCK_M)
    lo, full_lo, full_hi, hi = key_bounds(
        first_i, last_i, Nq, Nk, window, BLOCK_N, CAUSAL, WINDOW
    )
    if SPLITS > 1:  # this program's share of the tiles, the same number for each but the last
        split = tl.program_id(1)
        share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), SPLITS) * BLOCK_N
        lo, hi = lo + split * share, min(hi, lo + (split + 1) * share)
        full_lo = min(max(full_lo, lo), max(hi, lo))
        full_hi = max(min(full_hi, hi // BLOCK_N * BLOCK_N), full_lo)

    if WINDOW or SPLITS > 1:  # without a window every row sees the first key it could see
        m, l, acc = _attend(
            Q, m, l, acc, k, v, place, kv_head, k_offset, v_offset, i, Nq, Nk, window, c,
            lo, min(full_lo, hi), stride_kn, stride_kd, stride_vn, stride_vd,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW,
            DESCRIPTOR, WIDE, PRECISION, True,
        )  # fmt: skip
    m, l, acc = _attend(
        Q, m, l, acc, k, v, place, kv_head, k_offset, v_offset, i, Nq, Nk, window, c,
        full_lo, full_hi, stride_kn, stride_kd, stride_vn, stride_vd,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW,
        DESCRIPTOR, WIDE, PRECISION, False,
    )  # fmt: skip
    if CAUSAL or WINDOW or not EVEN:
        m, l, acc = _attend(
            Q, m, l, acc, k, v, place, kv_head, k_offset, v_offset, i, Nq, Nk, window, c,
            full_hi, hi, stride_kn, stride_kd, stride_vn, stride_vd,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW,
            DESCRIPTOR, WIDE, PRECISION, True,
        )  # fmt: skip

    # -- O and LSE: once -----------------------------------------------------------------------
    out, lse_i = finish(m, l, acc, scale)
    o_offset = head_offset(place, head * GROUP if PACK else head, start_q,
                           stride_ob, stride_oh, stride_on)  # fmt: skip
    l_offset = head_offset(place, head * GROUP if PACK else head, start_q, stride_lb, stride_lh, 1)
    if SPLITS > 1:
        o_offset += tl.program_id(1).to(tl.int64) * stride_os
        l_offset += tl.program_id(1).to(tl.int64) * stride_ls
    if PACK:
        g = (row % GROUP).to(tl.int64)
        column = tl.arange(0, BLOCK_DV)
        inside = (i < Nq)[:, None] & (column < DV)[None, :]
        at = o + o_offset + (i.to(tl.int64) * stride_on + g * stride_oh)[:, None] + column[None, :]
        tl.store(at, out.to(o.dtype.element_ty), mask=inside)
        tl.store(lse + l_offset + g * stride_lh + i, lse_i, mask=i < Nq)
    else:
        store_tile(o, out, first, Nq, o_offset, stride_on, BLOCK_M, DV, BLOCK_DV, WIDE)
        tl.store(lse + l_offset + row, lse_i, mask=row < Nq)


@triton.jit
def merge_kernel(
    o_parts, lse_parts, o, lse, rows, stride_o_parts, stride_lse_parts,
    heads, Nq, stride_ob, stride_oh, stride_on, stride_lb, stride_lh,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    r"""Join the parts that several programs made of the same rows.

    .. math::
        \mathrm{LSE} = \ln \sum_s e^{\mathrm{LSE}_s}, \qquad
        O = \sum_s e^{\mathrm{LSE}_s - \mathrm{LSE}}\, O_s

    in a fixed order, so the result is the same each time.  ``o_parts`` is
    ``[SPLITS, batch, heads, Nq, dv]`` float32, contiguous.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_DV)
    there = row < rows
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in tl.static_range(SPLITS):
        part_lse = tl.load(lse_parts + part * stride_lse_parts + row, there, float("-inf"))
        top = tl.maximum(top, part_lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    inside = there[:, None] & (column < DV)[None, :]
    for part in tl.static_range(SPLITS):
        part_lse = tl.load(lse_parts + part * stride_lse_parts + row, there, float("-inf"))
        weight = tl.exp(part_lse - safe)
        at = o_parts + part * stride_o_parts + row[:, None] * DV + column[None, :]
        acc += weight[:, None] * tl.load(at, inside, 0.0)
        total += weight
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out = acc / total[:, None]
    bh, i = row // Nq, row % Nq
    b, h = bh // heads, bh % heads
    at = o + (b * stride_ob + h * stride_oh + i * stride_on)[:, None] + column[None, :]
    tl.store(at, out.to(o.dtype.element_ty), mask=inside)
    lse_row = tl.where(nothing, float("-inf"), safe + tl.log(total))
    tl.store(lse + b * stride_lb + h * stride_lh + i, lse_row, mask=there)
