r"""The backward pass of selection: dQ, dK and dV of the chosen blocks, by keys.

Chapter 09's formulas hold for each query and each token that it chose:

.. math::
    P = e^{\,\mathrm{scale}\, QK^\top - \mathrm{LSE}}, \qquad
    dS = P \odot (dO\, V^\top - \delta), \qquad
    dV = P^\top dO, \quad dK = \mathrm{scale}\, dS^\top Q, \quad dQ = \mathrm{scale}\, dS\, K .

:func:`dkdv_kernel` owns a block, as ``by_keys.py`` does, and gathers the rows of Q and dO on its
list, 64 at a time.  Rows are the columns of Sᵀ = K Qᵀ, so the group may be of any size, and Pᵀ and
dSᵀ are the left factors of dV and dK as they stand in registers.  With dS at hand the block's share
of dQ costs one product more: five in all, where a pass of its own along the queries would cost
two again, and rows in vain.  That share is written once per (query, choice) and
:func:`dq_kernel` sums it in the order of the slots.

A block that every query chose has a list as long as the sequence: one program would work on it
long after all others.  Lists are cut into pieces; each piece leaves its sums in float32, and
:func:`sum_kernel` adds the pieces of a block in order.  Nothing is added atomically, so the
gradients are the same to the bit each time.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from labkit.flash.backward import _probabilities, _row_lse
from labkit.flash.launch import _On, card
from labkit.flash.tuning import Config
from labkit.kernels.runtime import check_can_launch
from labkit.nsa import lists
from labkit.nsa.by_keys import (
    best,
    entries,
    find_piece,
    flops_of,
    narrow,
    turn,
    workspace_for,
)
from labkit.nsa.call import Call
from labkit.nsa.lists import find_sequence
from labkit.nsa.selection import block_rows, gather, hopper, is_wide, padded, width

__all__ = ["backward", "by_keys", "dkdv_kernel", "dq_kernel", "rows_kernel", "sum_kernel"]

LOG2E = math.log2(math.e)


@triton.jit
def rows_kernel(
    o, dout, lse, dlse, delta, lse_rows,
    stride_ob, stride_on, stride_oh, stride_gb, stride_gn, stride_gh, stride_gd,
    stride_lb, stride_lh, stride_ln, stride_eb, stride_eh, stride_en,
    heads, Nq, total,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, HAS_DLSE: tl.constexpr,
    STEP: tl.constexpr = 1,
):  # fmt: skip
    r"""δ = rowsum(dO ∘ O) − dLSE and LSE, both ``[B, M, HQ]`` float32, ``STEP`` numbers apart.

    In this order the heads of a group lie together, as their rows of Q and dO do: the kernel that
    gathers reads all of a query's in one piece.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    head, token, batch = row % heads, row // heads % Nq, row // heads // Nq
    column = tl.arange(0, BLOCK_DV)
    inside = there[:, None] & (column < DV)[None, :]
    at = batch * stride_ob + token * stride_on + head * stride_oh
    O = tl.load(o + at[:, None] + column[None, :], inside, 0.0)
    at = batch * stride_gb + token * stride_gn + head * stride_gh
    dO = tl.load(dout + at[:, None] + (column * stride_gd)[None, :], inside, 0.0)
    out = tl.sum(O.to(tl.float32) * dO.to(tl.float32), 1)
    at = batch * stride_lb + head * stride_lh + token * stride_ln
    lse_row = tl.load(lse + at, there, 0.0)
    if HAS_DLSE:
        at = batch * stride_eb + head * stride_eh + token * stride_en
        # A row that saw nothing has no scores; whatever arrives at its LSE of −∞ stops here.
        saw = lse_row != float("-inf")
        out -= tl.where(saw, tl.load(dlse + at, there, 0.0), 0.0)
    tl.store(delta + row * STEP, out, mask=there)
    tl.store(lse_rows + row * STEP, lse_row, mask=there)


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse, delta, dq_parts, dk_parts, dv_parts,
    order, starts, owner, first, cu, cu_blocks,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gn, stride_gh, stride_gd,
    low, chunks, heads, pieces, rows, each, Nq, Nk, offset, size, c, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
    VARLEN: tl.constexpr, HALVINGS: tl.constexpr, SEQUENCES: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of one block's list: its sums for dK and dV, and its shares of dQ."""
    which, near, batch, head, block, part, piece, lo, hi, start, own, Nk = find_piece(
        starts, owner, first, cu, cu_blocks, tl.program_id(0), low, chunks, heads, pieces, rows,
        Nk, offset, size, STEPS, VARLEN, HALVINGS, SEQUENCES,
    )  # fmt: skip
    if lo >= hi:
        return

    # -- K and V: once for the piece ---------------------------------------------------------------
    key = block * BLOCK + part * BLOCK_N
    last = tl.minimum(Nk, (block + 1) * BLOCK)
    k_base = batch * stride_kb + start * stride_kn + head * stride_kh
    v_base = batch * stride_vb + start * stride_vn + head * stride_vh
    K = block_rows(k, k_base, key, last, stride_kn, stride_kd, BLOCK_N, D, BLOCK_D, True, WIDE)
    V = block_rows(v, v_base, key, last, stride_vn, stride_vd, BLOCK_N, DV, BLOCK_DV, True, WIDE)
    j = tl.arange(0, BLOCK_N)
    column, column_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    EXACT: tl.constexpr = K.dtype == tl.float32

    # -- Q, dO, LSE and δ: once for each choice; its entry is loaded one turn before ---------------
    r = tl.arange(0, ROWS)
    g = r % PADDED
    order += which * each
    shares = near.to(tl.int64) * each - which % chunks * each  # slot 0 of query 0 would lie here
    entry = entries(order, lo, hi, PADDED, ROWS)
    for e in tl.range(lo, hi, ROWS // PADDED):
        query, there = entry // SLOTS, (e + r // PADDED < hi) & (g < GROUP)
        token, head_q = query.to(tl.int64), head * GROUP + g
        at = batch * stride_qb + token * stride_qn + head_q * stride_qh
        Q = gather(q, at, D, stride_qd, there, BLOCK_D, D)
        s = tl.dot(Q, K.T, input_precision=PRECISION)
        limit = tl.minimum(query + own, last - 1) - key
        s = tl.where(j[None, :] <= limit[:, None], s, float("-inf"))
        row = (batch * Nq + token) * (heads * GROUP) + head_q
        lse_row = _row_lse(tl.load(lse + row, there, float("-inf")), EXACT)
        p = _probabilities(s, lse_row[:, None], c, scale, EXACT)
        at = batch * stride_gb + token * stride_gn + head_q * stride_gh
        dO = gather(dout, at, DV, stride_gd, there, BLOCK_DV, DV)
        dv = tl.dot(tl.trans(p.to(dO.dtype)), dO, dv, input_precision=PRECISION)
        dp = tl.dot(dO, V.T, input_precision=PRECISION)
        ds = p * (dp - tl.load(delta + row, there, 0.0)[:, None])
        ds = ds.to(Q.dtype)
        dk = tl.dot(tl.trans(ds), Q, dk, input_precision=PRECISION)
        share = tl.dot(ds, K, input_precision=PRECISION).to(dq_parts.dtype.element_ty)
        to = ((shares + entry) * STEPS + part) * GROUP + g
        tl.store(dq_parts + (to * D)[:, None] + column[None, :], share,
                 mask=there[:, None] & (column < D)[None, :])  # fmt: skip
        entry = entries(order, e + ROWS // PADDED, hi, PADDED, ROWS)

    at = ((near.to(tl.int64) * pieces + piece) * STEPS + part) * BLOCK_N + j
    tl.store(dk_parts + (at * D)[:, None] + column[None, :], dk,
             mask=(column < D)[None, :] & (j < BLOCK_N)[:, None])  # fmt: skip
    tl.store(dv_parts + (at * DV)[:, None] + column_v[None, :], dv,
             mask=(column_v < DV)[None, :] & (j < BLOCK_N)[:, None])  # fmt: skip


@triton.jit
def sum_kernel(
    dk_parts, dv_parts, dk_sums, dv_sums, dk, dv, first, cu, cu_blocks,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    low, chunks, heads, pieces, rows, Nk, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, TALL: tl.constexpr,
    VARLEN: tl.constexpr, HALVINGS: tl.constexpr, SEQUENCES: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """dK and dV of ``TALL`` tokens of a block: the pieces of its list, in order.

    ``BEFORE``: queries of an earlier range have left their sums; ``AFTER``: later ones will add.
    """
    SLICES: tl.constexpr = BLOCK_N // TALL
    x = tl.program_id(0)
    inner, x = x % SLICES, x // SLICES
    part, x = x % STEPS, x // STEPS
    row, near = x % rows, x // rows
    which = (low + near).to(tl.int64)
    bh = which // chunks
    batch, head = bh // heads, bh % heads
    begin = tl.load(first + which * (rows + 1) + row)
    end = tl.load(first + which * (rows + 1) + row + 1)
    block, start = row, tl.cast(0, tl.int64)
    if VARLEN:
        if row >= tl.load(cu_blocks + SEQUENCES):
            return
        sequence = find_sequence(cu_blocks, row, SEQUENCES, HALVINGS)
        block -= tl.load(cu_blocks + sequence).to(tl.int32)
        start = tl.load(cu + sequence).to(tl.int64)
        Nk = (tl.load(cu + sequence + 1) - start).to(tl.int32)
    j = inner * TALL + tl.arange(0, TALL)
    key = block * BLOCK + part * BLOCK_N + j
    there = key < tl.minimum(Nk, (block + 1) * BLOCK)
    column, column_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dk_sum = tl.zeros([TALL, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([TALL, BLOCK_DV], tl.float32)
    token = start + key
    inside = there[:, None] & (column < D)[None, :]
    inside_v = there[:, None] & (column_v < DV)[None, :]
    sums = (row * STEPS + part).to(tl.int64) * BLOCK_N + j
    if BEFORE:
        dk_sum = tl.load(dk_sums + (sums * D)[:, None] + column[None, :], inside, 0.0)
        dv_sum = tl.load(dv_sums + (sums * DV)[:, None] + column_v[None, :], inside_v, 0.0)
    for piece in tl.range(begin, end):
        at = ((near.to(tl.int64) * pieces + piece) * STEPS + part) * BLOCK_N + j
        dk_sum += tl.load(dk_parts + (at * D)[:, None] + column[None, :], inside, 0.0)
        dv_sum += tl.load(dv_parts + (at * DV)[:, None] + column_v[None, :], inside_v, 0.0)
    if AFTER:
        tl.store(dk_sums + (sums * D)[:, None] + column[None, :], dk_sum, mask=inside)
        tl.store(dv_sums + (sums * DV)[:, None] + column_v[None, :], dv_sum, mask=inside_v)
    else:
        at = batch * stride_kb + token * stride_kn + head * stride_kh
        tl.store(dk + at[:, None] + column[None, :], (dk_sum * scale).to(dk.dtype.element_ty),
                 mask=inside)  # fmt: skip
        at = batch * stride_vb + token * stride_vn + head * stride_vh
        tl.store(dv + at[:, None] + column_v[None, :], dv_sum.to(dv.dtype.element_ty),
                 mask=inside_v)  # fmt: skip


@triton.jit
def dq_kernel(
    parts, used, dq, stride_qb, stride_qn, stride_qh,
    low, chunks, heads, each, slots, chunk, Nq, scale,
    GROUP: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dQ of ``ROWS`` rows: the shares of their blocks, in the order of the slots."""
    near = tl.program_id(1)
    which = (low + near).to(tl.int64)
    bh, first = which // chunks, which % chunks * chunk
    batch, head = bh // heads, bh % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i, g = row // GROUP, row % GROUP
    token = first + i
    there = (i < chunk) & (token < Nq)
    column = tl.arange(0, BLOCK_D)
    slot = near.to(tl.int64) * each + i * slots
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for s in tl.range(0, slots * STEPS):
        counts = tl.load(used + which * each + i * slots + s // STEPS, there, 0) != 0
        inside = counts[:, None] & (column < D)[None, :]
        at = (((slot * STEPS + s) * GROUP + g) * D)[:, None] + column[None, :]
        acc += tl.load(parts + at, inside, 0.0).to(tl.float32)
    at = batch * stride_qb + token * stride_qn + (head * GROUP + g) * stride_qh
    tl.store(dq + at[:, None] + column[None, :], (acc * scale).to(dq.dtype.element_ty),
             mask=there[:, None] & (column < D)[None, :])  # fmt: skip


# -- launching -------------------------------------------------------------------------------------


def _configs(q, v) -> list[Config]:
    """Rows, keys, warps and stages to try."""
    wide = max(width(q), width(v))
    if q.element_size() == 4:
        return [Config(32, 32, 8, 1), Config(16, 16, 4, 1)]
    if card(q)[0] == 0:
        return [Config(64, 64, 8, 1)]
    if wide > 128:
        return [Config(64, 64, 8, 1), *narrow(q, Config(32, 32, 8, 1))]
    return [Config(64, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 4, 2),
            *narrow(q, Config(64, 64, 8, 1), Config(32, 32, 4, 1))]  # fmt: skip


def by_keys(
    dout, dlse, q, k, v, o, lse, block_indices, call: Call, *, workspace: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV in Triton; arguments as for :func:`backward`."""
    workspace = workspace or workspace_for(q)
    b, m, hq, d = q.shape
    n, heads, dv = k.shape[1], k.shape[2], v.shape[3]
    group = hq // heads
    new, dq, dk = q.new_empty, q.new_empty(q.shape), k.new_empty(k.shape)
    dvalues = v.new_empty(v.shape)
    delta = new((2, b, m, hq), dtype=torch.float32)
    delta, lse_rows = delta[0], delta[1]
    extra = lse if dlse is None else dlse
    tall = max(1, 4096 // width(v))
    rows_kernel[(triton.cdiv(b * m * hq, tall),)](
        o, dout, lse, extra, delta, lse_rows, *o.stride()[:3], *dout.stride(), *lse.stride(),
        *extra.stride(), hq, m, b * m * hq,
        DV=dv, BLOCK_DV=width(v), ROWS=tall, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip

    def run(c: Config) -> None:
        rows = max(c.block_m, padded(group))
        turned = turn(block_indices, call, n, group, c, d * q.element_size(),
                      4 * c.block_n * (d + dv), workspace, q.element_size() == 4)  # fmt: skip
        slots, steps = block_indices.shape[3], turned.steps
        dq_parts = new((turned.together * turned.each * steps * group, d))
        sums = turned.together * turned.pieces * steps * c.block_n
        dk_parts, dv_parts = (new((sums, x), dtype=torch.float32) for x in (d, dv))
        sums = turned.rows * steps * c.block_n if turned.chunks > 1 else 0
        dk_sums, dv_sums = (new((sums, x), dtype=torch.float32) for x in (d, dv))
        shared = dict(D=d, BLOCK_D=width(q), STEPS=steps)
        blocks = dict(
            **shared, DV=dv, BLOCK_DV=width(v), BLOCK=call.block_size, BLOCK_N=c.block_n,
            VARLEN=call.cu is not None, HALVINGS=lists.steps_for(call),
            SEQUENCES=call.sequences or 1,
        )  # fmt: skip
        tall = min(16, c.block_n)
        queries = max(1, 2048 // width(q))
        for low, number in turned.groups():
            dkdv_kernel[(turned.programs(number),)](
                q, k, v, dout, lse_rows, delta, dq_parts, dk_parts, dv_parts,
                turned.order, turned.starts, turned.owner, turned.first, call.cu, call.cu_blocks,
                *q.stride(), *k.stride(), *v.stride(), *dout.stride(),
                low, turned.chunks, heads, turned.pieces, turned.rows, turned.each,
                m, call.max_k, call.offset, turned.size, call.scale * LOG2E, call.scale,
                GROUP=group, PADDED=padded(group), ROWS=rows, SLOTS=slots, **blocks,
                WIDE=is_wide(c.block_n, k, v), PRECISION=call.precision,
                num_warps=c.num_warps, num_stages=c.num_stages,
            )  # fmt: skip
            range_ = low % turned.chunks
            sum_kernel[(number * turned.rows * steps * (c.block_n // tall),)](
                dk_parts, dv_parts, dk_sums, dv_sums, dk, dvalues, turned.first,
                call.cu, call.cu_blocks, *dk.stride()[:3], *dvalues.stride()[:3],
                low, turned.chunks, heads, turned.pieces, turned.rows, call.max_k, call.scale,
                **blocks, TALL=tall, BEFORE=range_ > 0, AFTER=range_ < turned.chunks - 1,
                num_warps=4,
            )  # fmt: skip
            dq_kernel[(triton.cdiv(turned.chunk * group, queries), number)](
                dq_parts, turned.used, dq, *dq.stride()[:3], low, turned.chunks, heads,
                turned.each, slots, turned.chunk, m, call.scale,
                GROUP=group, **shared, ROWS=queries, num_warps=4,
            )  # fmt: skip

    key = ("backward", q.dtype, d, dv, call.block_size, call.precision, q.device)
    best(key, _configs(q, v), flops_of(q, block_indices, call, 3 * d + 2 * dv), run)
    return dq, dk, dvalues


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor,
    call: Call,
    *,
    road: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of selection.

    Parameters
    ----------
    dout : gradient of o, ``[B, M, HQ, V]``, any strides.
    dlse : gradient of LSE ``[B, HQ, M]`` float32; None if LSE was not used.
    q, k, v, block_indices : as ``selection.forward`` was given them.
    o, lse : what it returned.
    road : ``"keys"`` or ``"hopper"`` overrules the choice; tests and experiments use it.

    Returns
    -------
    dq, dk, dv : as q, k, v, contiguous.
    """
    if dout.stride(3) != 1 or 0 in dout.stride():
        dout = dout.contiguous()  # the gradient of .sum() is one number, with strides of 0
    with _On(q):
        if 0 in (call.max_q, call.max_k, block_indices.shape[3], q.numel(), v.shape[3]):
            return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format)
                         for x in (q, k, v))  # fmt: skip
        check_can_launch("nsa_selected_attention", q, k, v, dout, block_indices)
        tensors = (dout, dlse, q, k, v, o, lse, block_indices, call)
        module = hopper("hopper_backward") if card(q)[0] == 90 and road != "keys" else None
        if module is not None and (road == "hopper" or module.supports(q, k, v, call)):
            return module.backward(*tensors)
        return by_keys(*tensors)
