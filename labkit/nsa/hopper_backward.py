r"""The backward pass of selection by hand on Hopper: blocks stay, the rows that chose them come.

What is computed is stated in ``selection_backward.py``.  With slope = scale · log₂e and
LSE₂ = LSE · log₂e, and for 64 gathered rows of Q and dO (64 / G queries × G heads) at a time:

.. math::
    P^\top  &= 2^{\,\mathrm{slope}\, K Q^\top - \mathrm{LSE}_2}, &
    dV &\mathrel{+}= P^\top dO                                      \\
    dS^\top &= P^\top \circ (V dO^\top - \delta), &
    dK &\mathrel{+}= dS^\top Q, \quad dQ_{\text{slot}} = \mathrm{scale}\; dS\, K

Five products, none of them in vain.  A block's share of dQ is written once per (query, slot), and
``shares_kernel`` sums it in the order of the slots.

Three kinds of warps share a program, which owns one piece of one block's list:

- Two **producer** warps walk the list and ask the copy engine (TMA) for rows, one for those of Q
  and one for those of dO.  The G heads of a query lie in one piece of memory: a box
  ``[1, 1, G, 64]`` of ``[B, M, HQ, D]``.  Boxes of several queries, side by side in shared memory,
  are one tile ``[64, D]`` for the product.  Products want 8 rows swizzled together, so a group
  below 8 fills no box: there the warp itself copies, asynchronously too, 16 bytes for each lane.
- Two **consumer** warpgroups take steps in turn: one the even, one the odd.  Each has its own dK
  and dV of the block.  They share K and V, and otherwise never meet: while one is in its
  exponentials the other has the tensor cores.
- A **storer** warp sends dQ away, query by query, as a consumer leaves it in shared memory: by
  boxes again, or row by row.

Only rows whose own block this is need the triangular mask.  The list is ascending, so they stand
at its beginning; how many steps need it is counted once.  The first step may lack rows: the first
query comes again in their place, and P is set to 0.

At the end the consumers exchange halves through the ring, and each adds up one gradient of the
piece.  A piece that is all of its block's list writes the gradient itself; the others
``sums_kernel`` adds in order, in float32.  Nothing is added atomically: the gradients are the same
to the bit each time.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

from math import e
from math import log2 as _log2

import torch
import triton
import triton.language as tl

from labkit.flash.gluon import (
    async_copy,
    describe,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    off_hopper,
    tma,
    unreadable,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from labkit.nsa import lists
from labkit.nsa.by_keys import MOST, Turned, find_piece
from labkit.nsa.call import Call
from labkit.nsa.lists import find_sequence

__all__ = ["backward", "supports", "why_not"]

# One compilation for all sizes: nothing here gets faster by knowing that one of them is 1.
_kernel = jit(
    do_not_specialize=(
        "low", "heads", "chunks", "pieces", "each", "slots", "Nk", "nq", "tiles", "cap", "own",
        "stride_qb", "stride_qn", "stride_qh", "stride_gb", "stride_gn", "stride_gh",
    )
)  # fmt: skip

LOG2E = _log2(e)
#: bytes for the shares of dQ and the partial sums of one group of lists
WORKSPACE = 12 * 2**28
#: slots of the ring of Q and dO
STAGES = 4


# -- before: pieces and rows -----------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "low", "chunks", "heads", "pieces", "rows", "total", "size", "each", "slots",
    ]
)  # fmt: skip
def items_kernel(
    starts, owner, first, cu, cu_blocks, order, items,
    low, chunks, heads, pieces, rows, Nk, offset, size, each, slots, total,
    BLOCK: tl.constexpr, VARLEN: tl.constexpr, HALVINGS: tl.constexpr, SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """``items [pieces, 4]``: entries lo … hi, row of the block's first key, and how many entries at
    the beginning are queries of that very block, which do not see all of it; 2¹⁶ more if the piece
    is all that there is of the block's list.

    What :func:`labkit.nsa.by_keys.find_piece` finds, looked up once for all the warps.
    """
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which, _, _, _, block, _, _, lo, hi, start, own, _ = find_piece(
        starts, owner, first, cu, cu_blocks, tl.minimum(x, total - 1), low, chunks, heads, pieces,
        rows, Nk, offset, size, 1, VARLEN, HALVINGS, SEQUENCES,
    )  # fmt: skip
    exists = lo < hi  # else the numbers may point anywhere
    lo, hi = tl.where(exists, lo, 0), tl.where(exists, hi, 0)
    e = tl.arange(0, BLOCK)
    at = (which * each + lo)[:, None] + e[None, :]
    there = e[None, :] < (hi - lo)[:, None]
    query = tl.load(order + at, there, 0) // slots
    last = block * BLOCK + (BLOCK - 1) - own  # the first query to see all of the block
    own = tl.sum((there & (query < last[:, None])).to(tl.int32), 1)
    if not VARLEN:  # where a row of the table is a block, and all of it has room in dK
        table = first + which * (rows + 1) + block
        alone = exists & (tl.load(table + 1, exists, 0) - tl.load(table, exists, 0) == 1)
        own += (alone & (chunks == 1)).to(tl.int32) << 16
    tl.store(items + x * 4, lo, mask=x < total)
    tl.store(items + x * 4 + 1, hi, mask=x < total)
    tl.store(items + x * 4 + 2, (start + block * BLOCK).to(tl.int32), mask=x < total)
    tl.store(items + x * 4 + 3, own, mask=x < total)


@triton.jit(do_not_specialize=["low", "chunks", "heads", "each", "slots", "Nq", "offset"])
def lines_kernel(
    lse, delta, order, lines, low, chunks, heads, each, slots, Nq, offset,
    GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """LSE₂, the query's key and δ in the order of the list, ``lines [lists, 3, entries · G]``.

    The query's own key is a row of k; a float32 counts to 2²⁴.
    A query that saw no key has LSE = −∞ and gets +∞ here: its P = 2^(s − ∞) is 0.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    near = tl.program_id(1).to(tl.int64)
    which = low + near
    bh = which // chunks
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry, g = x // GROUP, x % GROUP
    there = entry < each
    chosen = tl.load(order + which * each + entry, there, -1)
    used = chosen >= 0
    query = tl.maximum(chosen, 0) // slots
    row = bh // heads * Nq + query.to(tl.int64)
    row = row * (heads * GROUP) + bh % heads * GROUP + g
    one = tl.load(lse + row * 2, used, float("-inf"))
    one = tl.where(one == float("-inf"), float("inf"), one * LOG2E)
    to = lines + near * 3 * each * GROUP + x
    tl.store(to, one, mask=there)
    tl.store(to + each * GROUP, (query + offset).to(tl.float32), mask=there)
    tl.store(to + 2 * each * GROUP, tl.load(delta + row * 2, used, 0.0), mask=there)


# -- after: the shares of dQ -----------------------------------------------------------------------


@triton.jit(do_not_specialize=["low", "chunks", "heads", "each", "slots", "chunk", "Nq"])
def shares_kernel(
    shares, used, split, dq, stride_qb, stride_qn, stride_qh,
    low, chunks, heads, each, slots, chunk, Nq,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dQ of ``ROWS`` rows (query, head of the group): their shares, in the order of the slots."""
    if tl.load(split) != 0:
        return
    near = tl.program_id(1).to(tl.int64)
    which = low + near
    bh, first = which // chunks, which % chunks * chunk
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i, g = row // GROUP, row % GROUP
    token = first + i
    there = (i < chunk) & (token < Nq)
    column = tl.arange(0, D)
    slot = near * each + i * slots
    acc = tl.zeros([ROWS, D], tl.float32)
    for s in tl.range(0, slots):
        counts = tl.load(used + which * each + i * slots + s, there, 0) != 0
        at = (((slot + s) * GROUP + g) * D)[:, None] + column[None, :]
        acc += tl.load(shares + at, counts[:, None], 0.0).to(tl.float32)
    at = bh // heads * stride_qb + token * stride_qn + (bh % heads * GROUP + g) * stride_qh
    tl.store(dq + at[:, None] + column[None, :], acc.to(dq.dtype.element_ty), mask=there[:, None])


# -- after: the partial sums of dK and dV ----------------------------------------------------------


@triton.jit
def _sum_pieces(
    parts, sums, out, at_out, near, begin, end, pieces, row, j, there, stride, scale,
    D: tl.constexpr, TOGETHER: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)
    inside = there[:, None] & (column < D)[None, :]
    kept = (row.to(tl.int64) * 64 + j)[:, None] * D + column[None, :]
    acc = tl.zeros([j.shape[0], D], tl.float32)
    if BEFORE:
        acc = tl.load(sums + kept, inside, 0.0)
    for piece in tl.range(begin, end, TOGETHER):
        n = piece + tl.arange(0, TOGETHER)
        at = ((near * pieces + n)[:, None] * 64 + j[None, :]) * D
        some = (n < end)[:, None, None] & inside[None, :, :]
        acc += tl.sum(tl.load(parts + at[:, :, None] + column[None, None, :], some, 0.0), 0)
    if AFTER:
        tl.store(sums + kept, acc, mask=inside)
    else:
        to = at_out + (j * stride)[:, None] + column[None, :]
        tl.store(out + to, (acc * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["low", "chunks", "heads", "pieces", "rows"])
def sums_kernel(
    dk_parts, dv_parts, dk_sums, dv_sums, dk, dv, first, cu, cu_blocks,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    low, chunks, heads, pieces, rows, Nk, scale,
    D: tl.constexpr, TALL: tl.constexpr, TOGETHER: tl.constexpr,
    VARLEN: tl.constexpr, HALVINGS: tl.constexpr, SEQUENCES: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """dK and dV of ``TALL`` tokens: the partial sums of the pieces of their block's list.

    ``TOGETHER`` at a time, always the same ones in the same way: everybody's block has many, and
    one after the other they would be waited for.  ``BEFORE``, ``AFTER``: see
    ``selection_backward.sum_kernel``.  A piece that is alone has no partial sum.
    """
    SLICES: tl.constexpr = 64 // TALL
    x = tl.program_id(0)
    inner, x = x % SLICES, x // SLICES
    row, near = x % rows, (x // rows).to(tl.int64)
    which = low + near
    bh = which // chunks
    batch, head = bh // heads, bh % heads
    begin = tl.load(first + which * (rows + 1) + row)
    end = tl.load(first + which * (rows + 1) + row + 1)
    if not (VARLEN or BEFORE or AFTER):  # noqa: SIM102 — the first is known when it is compiled
        if end - begin == 1:
            return
    block, start = row, tl.cast(0, tl.int64)
    if VARLEN:
        if row >= tl.load(cu_blocks + SEQUENCES):
            return
        sequence = find_sequence(cu_blocks, row, SEQUENCES, HALVINGS)
        block -= tl.load(cu_blocks + sequence).to(tl.int32)
        start = tl.load(cu + sequence).to(tl.int64)
        Nk = (tl.load(cu + sequence + 1) - start).to(tl.int32)
    j = inner * TALL + tl.arange(0, TALL)
    there = block * 64 + j < Nk
    token = start + block * 64
    if tl.program_id(1) == 0:
        at = batch * stride_kb + token * stride_kn + head * stride_kh
        _sum_pieces(dk_parts, dk_sums, dk, at, near, begin, end, pieces, row, j, there, stride_kn,
                    scale, D, TOGETHER, BEFORE, AFTER)  # fmt: skip
    else:
        at = batch * stride_vb + token * stride_vn + head * stride_vh
        _sum_pieces(dv_parts, dv_sums, dv, at, near, begin, end, pieces, row, j, there, stride_vn,
                    1.0, D, TOGETHER, BEFORE, AFTER)  # fmt: skip


# -- the producer ----------------------------------------------------------------------------------


@jit
def _entries(order, e, lo, N: gl.constexpr):
    """Entries e … e + N of the list; the first one again for those before it."""
    found = ()
    for j in gl.static_range(N):
        found = found + (gl.load(order + gl.maximum(e + j, lo)),)  # noqa: RUF005
    return found


@jit
def _gather(described, batch, head, chosen, slots, full, boxes, D: gl.constexpr, G: gl.constexpr):
    """64 / G queries, side by side: [D / 64][64 rows][64 columns], as the product wants them."""
    N: gl.constexpr = 64 // G
    for j in gl.static_range(N):
        query = chosen[j] // slots
        for half in gl.static_range(D // 64):
            tma.async_copy_global_to_shared(
                described, [batch, query, head * G, half * 64], full, boxes.index(half * N + j)
            )


@jit
def _boxes(tile, D: gl.constexpr, G: gl.constexpr):
    """The boxes [1, 1, G, 64] that a tile [64, D] consists of: the same bytes."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    return tile._reinterpret(tile.dtype, [64 // G * (D // 64), 1, 1, G, 64], layout)


@jit
def _atoms(tile, D: gl.constexpr):
    """The atoms [8, 64] of the swizzle that a tile [64, D] consists of: the same bytes."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    return tile._reinterpret(tile.dtype, [8 * (D // 64), 8, 64], layout)


@jit
def _row_entries(order, e, lo, layout: gl.constexpr, G: gl.constexpr):
    """The entry of each of 64 rows; the first one again for those before it."""
    return gl.load(order + gl.maximum(e + gl.arange(0, 64, layout) // G, lo))


@jit
def _copy(rows, strides, chosen, slots, asked, tile, flat: gl.constexpr, layout: gl.constexpr,
          D: gl.constexpr, G: gl.constexpr):  # fmt: skip
    """:func:`_gather` without the copy engine: 16 bytes for each lane of the warp at a time.

    The queries wait in shared memory: 16 addresses at once are more than a lane has registers for.
    """
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    asked._reinterpret(gl.int32, [64], line).store(chosen // slots)
    # Strides come in units of 16 bytes: so the compiler knows that they are multiples of it.
    of_query, of_head = strides
    r = gl.arange(0, 8, gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, gl.SliceLayout(0, layout))
    atoms = _atoms(tile, D)
    for j in gl.static_range(8):
        query = asked.index(j).load(gl.SliceLayout(1, layout))
        at = query.to(gl.int64) * of_query + ((8 * j + r) % G).to(gl.int64) * of_head
        pointer = rows + (at * 8)[:, None] + column[None, :]
        for half in gl.static_range(D // 64):
            async_copy.async_copy_global_to_shared(atoms.index(half * 8 + j), pointer + half * 64)
    async_copy.commit_group()


@jit
def _copy_line(lines, at, lo, smem, slot, flat: gl.constexpr, G: gl.constexpr):
    """A number for each of 64 rows, ``at`` numbers after the line's beginning; rows before the list
    get that of its first one.

    Not by the copy engine: a box begins at multiples of 16 bytes, and these lists end anywhere.
    """
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    into = smem.index(slot)._reinterpret(gl.float32, [64], line)
    row = gl.maximum(at + gl.arange(0, 64, flat), lo * G)
    async_copy.async_copy_global_to_shared(into, lines + row)


@jit
def _landed(full, LEFT: gl.constexpr, exists):
    """Say that the rows of the last step but ``LEFT`` are there, if there was such a step.

    These copies write as a thread does, and products read as the copy engine does (another proxy).
    Every lane waits for its own copies and puts the fence between the two; one arrives for all.
    """
    async_copy.wait_group(LEFT)
    fence_async_shared()
    mbarrier.arrive(full, count=1, pred=exists)


@jit
def _load_block(k_desc, v_desc, at, full, k_smem, v_smem, D: gl.constexpr):
    """K and V of the block: once for the piece."""
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    mbarrier.expect(full, 2 * 64 * D * 2)
    into = k_smem._reinterpret(k_smem.dtype, [1, 64, 1, D], box)
    tma.async_copy_global_to_shared(k_desc, at, full, into)
    into = v_smem._reinterpret(v_smem.dtype, [1, 64, 1, D], box)
    tma.async_copy_global_to_shared(v_desc, at, full, into)


@jit
def _produce(args, DOUT: gl.constexpr, D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """Step after step 64 / G queries: rows of dO and δ for one warp, the rest for another."""
    smem, bars, descs, numbers = args
    k_smem, v_smem, q_smem, do_smem, lse_smem, at_smem, delta_smem = smem
    kv_full, q_full, do_full, q_empty, do_empty = bars
    q_desc, do_desc, k_desc, v_desc, lines_desc, _, _ = descs
    order, batch, head, near, lo, base, steps, key, slots = numbers
    N: gl.constexpr = 64 // G
    line = near * 3
    chosen = _entries(order, base, lo, N)
    if DOUT:
        for n in range(steps):
            slot, parity = n % STAGES, (n // STAGES) & 1
            e = base + n * N
            # Asked for before they are needed; beyond the end, those of the last step again.
            ahead = _entries(order, gl.minimum(e + N, base + (steps - 1) * N), lo, N)
            # A barrier nobody has used counts as one whose phase before the first has ended.
            mbarrier.wait(do_empty.index(slot), parity ^ 1)
            full = do_full.index(slot)
            mbarrier.expect(full, 64 * D * 2 + 64 * 4)
            at = [line + 2, e * G]
            tma.async_copy_global_to_shared(lines_desc, at, full, delta_smem.index(slot))
            boxes = _boxes(do_smem.index(slot), D, G)
            _gather(do_desc, batch, head, chosen, slots, full, boxes, D, G)
            chosen = ahead
    else:
        if steps > 0:
            _load_block(k_desc, v_desc, [batch, key, head, 0], kv_full, k_smem, v_smem, D)
        for n in range(steps):
            slot, parity = n % STAGES, (n // STAGES) & 1
            e = base + n * N
            ahead = _entries(order, gl.minimum(e + N, base + (steps - 1) * N), lo, N)
            mbarrier.wait(q_empty.index(slot), parity ^ 1)
            full = q_full.index(slot)
            mbarrier.expect(full, 64 * D * 2 + 2 * 64 * 4)
            at = [line, e * G]
            tma.async_copy_global_to_shared(lines_desc, at, full, lse_smem.index(slot))
            at = [line + 1, e * G]
            tma.async_copy_global_to_shared(lines_desc, at, full, at_smem.index(slot))
            boxes = _boxes(q_smem.index(slot), D, G)
            _gather(q_desc, batch, head, chosen, slots, full, boxes, D, G)
            chosen = ahead


@jit
def _produce_small(args, DOUT: gl.constexpr, D: gl.constexpr, G: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """As :func:`_produce`, for groups below 8: their rows do not fill an atom of the swizzle."""
    smem, bars, sources, numbers = args
    k_smem, v_smem, q_smem, do_smem, lse_smem, at_smem, delta_smem = smem
    kv_full, q_full, do_full, q_empty, do_empty = bars
    q_rows, do_rows, k_desc, v_desc, lines, strides, asked = sources
    order, batch, head, near, lo, base, steps, key, slots = numbers
    N: gl.constexpr = 64 // G
    # Entries are read and divided once for each row; then 8 lanes share a row.
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    lines, pitch = lines
    lines += near.to(gl.int64) * 3 * pitch
    if DOUT:
        rows, of, tiles, fulls, empties = do_rows, strides[1], do_smem, do_full, do_empty
    else:
        rows, of, tiles, fulls, empties = q_rows, strides[0], q_smem, q_full, q_empty
        if steps > 0:
            _load_block(k_desc, v_desc, [batch, key, head, 0], kv_full, k_smem, v_smem, D)
    chosen = _row_entries(order, base, lo, flat, G)
    for n in range(steps):
        slot, parity = n % STAGES, (n // STAGES) & 1
        e = base + n * N
        mbarrier.wait(empties.index(slot), parity ^ 1)
        if DOUT:
            _copy_line(lines + 2 * pitch, e * G, lo, delta_smem, slot, flat, G)
        else:
            _copy_line(lines, e * G, lo, lse_smem, slot, flat, G)
            _copy_line(lines + pitch, e * G, lo, at_smem, slot, flat, G)
        _copy(rows, of, chosen, slots, asked[DOUT], tiles.index(slot), flat, layout, D, G)
        chosen = _row_entries(order, gl.minimum(e + N, base + (steps - 1) * N), lo, flat, G)
        # Rows of the step before have had the time of a step to arrive.
        _landed(fulls.index((n + STAGES - 1) % STAGES), 1, n > 0)
    _landed(fulls.index((steps + STAGES - 1) % STAGES), 0, steps > 0)


@jit
def _send_small(args, D: gl.constexpr, G: gl.constexpr):
    """As :func:`_send`, for groups below 8: 16 bytes for each lane at a time."""
    dq_smem, places, dq_full, dq_empty, shares, order, first, lo, base, steps = args
    N: gl.constexpr = 64 // G
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    r = gl.arange(0, 8, gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, gl.SliceLayout(0, layout))
    chosen = _row_entries(order, base, lo, flat, G)
    for n in range(steps):
        e = base + n * N
        who = n % 2
        # Rows before the list go nowhere.  An entry that waits in shared memory can be read ahead
        # of the store before it; one in global memory could be what that store writes.
        place = gl.where(e + gl.arange(0, 64, flat) // G >= lo, first + chosen, -1)
        places._reinterpret(gl.int32, [64], line).store(place)
        chosen = _row_entries(order, gl.minimum(e + N, base + (steps - 1) * N), lo, flat, G)
        mbarrier.wait(dq_full.index(who), (n // 2) & 1)
        atoms = _atoms(dq_smem.index(who), D)
        for j in gl.static_range(8):
            place = places.index(j).load(gl.SliceLayout(1, layout))
            to = (place.to(gl.int64) * G + (8 * j + r) % G) * D
            pointer = shares + to[:, None] + column[None, :]
            for half in gl.static_range(D // 64):
                share = atoms.index(half * 8 + j).load(layout)
                gl.store(pointer + half * 64, share, mask=(place >= 0)[:, None])
        mbarrier.arrive(dq_empty.index(who), count=1)


@jit
def _send(args, D: gl.constexpr, G: gl.constexpr):
    """dQ of each step to its places (query, slot)."""
    dq_smem, _, dq_full, dq_empty, dq_desc, order, first, lo, base, steps = args
    N: gl.constexpr = 64 // G
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    chosen = _entries(order, base, lo, N)
    for n in range(steps):
        e = base + n * N
        who = n % 2
        ahead = _entries(order, gl.minimum(e + N, base + (steps - 1) * N), lo, N)
        mbarrier.wait(dq_full.index(who), (n // 2) & 1)
        tile = dq_smem.index(who)
        boxes = tile._reinterpret(tile.dtype, [N * (D // 64), 1, G, 64], layout)
        for j in gl.static_range(N):
            if e + j >= lo:
                for half in gl.static_range(D // 64):
                    tma.async_copy_shared_to_global(
                        dq_desc, [first + chosen[j], 0, half * 64], boxes.index(half * N + j)
                    )
        tma.store_wait(0)
        mbarrier.arrive(dq_empty.index(who), count=1)
        chosen = ahead


# -- the consumers ---------------------------------------------------------------------------------


@jit
def _row(smem, slot, layout: gl.constexpr):
    """One number per gathered row, as the columns of a transposed tile want them."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = smem.index(slot)._reinterpret(gl.float32, [64], flat)
    return row.load(gl.SliceLayout(0, layout))[None, :]


@jit
def _hide(p, at, e, lo, key, G: gl.constexpr):
    """0 for keys after the query's position ``at``, and for rows before the list's beginning."""
    layout: gl.constexpr = p.type.layout
    there = e + gl.arange(0, 64, gl.SliceLayout(0, layout)) // G >= lo
    key = key + gl.arange(0, 64, gl.SliceLayout(1, layout))
    return gl.where((key.to(gl.float32)[:, None] <= at) & there[None, :], p, 0.0)


@jit
def _walk(args, dk, dv, WHO: gl.constexpr, D: gl.constexpr, G: gl.constexpr,
          STAGES: gl.constexpr, FUSED: gl.constexpr):  # fmt: skip
    """Every other step; ``FUSED``: with its share of dQ."""
    smem, bars, _, numbers = args
    k_tile, v_tile, q_smem, do_smem, lse_smem, at_smem, delta_smem, ds_smem, dq_smem = smem
    _, q_full, do_full, q_empty, do_empty, dq_full, dq_empty, _ = bars
    lo, base, steps, masked, key, _, slope, scale = numbers
    N: gl.constexpr = 64 // G
    # A product of a warpgroup leaves 16 rows to each of its warps.
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    # The result of one product as the left factor of the next: each thread has its own values.
    left: gl.constexpr = gl.DotOperandLayout(0, grad, 2)
    dtype: gl.constexpr = k_tile.dtype
    none = gl.zeros([64, 64], gl.float32, tile)
    nothing = gl.zeros([64, D], gl.float32, grad)
    for n in range(WHO, steps, 2):
        slot, parity = n % STAGES, (n // STAGES) & 1
        q_t = q_smem.index(slot).permute((1, 0))
        do_t = do_smem.index(slot).permute((1, 0))
        mbarrier.wait(q_full.index(slot), parity)
        s = warpgroup_mma(k_tile, q_t, none, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(slot), parity)
        dp = warpgroup_mma(v_tile, do_t, none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        # While dP runs:
        p = gl.exp2(s * slope - _row(lse_smem, slot, tile))
        if n < masked:
            p = _hide(p, _row(at_smem, slot, tile), base + n * N, lo, key, G)
        p_left = gl.convert_layout(p.to(dtype), left, assert_trivial=True)
        dv = warpgroup_mma(p_left, do_smem.index(slot), dv, is_async=True)
        dp = warpgroup_mma_wait(1, [dp])
        # While dV runs:
        ds = (p * (dp - _row(delta_smem, slot, tile))).to(dtype)
        ds_left = gl.convert_layout(ds, left, assert_trivial=True)
        if FUSED:
            ds_smem.index(WHO).store(ds)
            fence_async_shared()
        dk = warpgroup_mma(ds_left, q_smem.index(slot), dk, is_async=True)
        dv = warpgroup_mma_wait(1, [dv])
        mbarrier.arrive(do_empty.index(slot), count=1)
        if FUSED:
            ds_t = ds_smem.index(WHO).permute((1, 0))
            dq = warpgroup_mma(ds_t, k_tile, nothing, use_acc=False, is_async=True)
            dk = warpgroup_mma_wait(1, [dk])
            mbarrier.arrive(q_empty.index(slot), count=1)
            dq = warpgroup_mma_wait(0, [dq])
            mbarrier.wait(dq_empty.index(WHO), ((n // 2) & 1) ^ 1)
            dq_smem.index(WHO).store((dq * scale).to(dtype))
            fence_async_shared()
            mbarrier.arrive(dq_full.index(WHO), count=1)
        else:
            dk = warpgroup_mma_wait(0, [dk])
            mbarrier.arrive(q_empty.index(slot), count=1)
    return dk, dv


@jit
def _joined(own, given, give, take, bars, WHO: gl.constexpr, D: gl.constexpr, S: gl.constexpr):
    """``own`` and what the other consumer has of it, for ``given``; through the ring, now idle."""
    done, there = bars
    # Half a warp writes 8 numbers of each of 4 rows at a time: permuted, they lie side by side.
    flat: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)  # the other one may be at its last step
    give._reinterpret(gl.float32, [S // 2, 64, D], flat).index(0).store(given)
    mbarrier.arrive(there.index(WHO), count=1)
    mbarrier.wait(there.index(1 - WHO), 0)
    return own + take._reinterpret(gl.float32, [S // 2, 64, D], flat).index(0).load(own.type.layout)


@jit
def _consume(args, WHO: gl.constexpr, D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """dK and dV of the block over every other step; then one of the two over all."""
    smem, bars, out, numbers = args
    _, _, q_smem, do_smem, _, _, _, _, _ = smem
    dk_parts, dv_parts, dk, dv, alone, at, left, step = out
    _, _, steps, _, _, split, _, scale = numbers
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    if steps > 0:
        dk_sum = gl.zeros([64, D], gl.float32, grad)
        dv_sum = gl.zeros([64, D], gl.float32, grad)
        mbarrier.wait(bars[0], 0)
        if split != 0:
            dk_sum, dv_sum = _walk(args, dk_sum, dv_sum, WHO, D, G, STAGES, False)
        else:
            dk_sum, dv_sum = _walk(args, dk_sum, dv_sum, WHO, D, G, STAGES, True)
        if WHO == 0:
            total = _joined(dk_sum, dv_sum, do_smem, q_smem, bars[7], WHO, D, STAGES)
            _write(total, scale, dk_parts, dk, alone, at, left, step, D)
        else:
            total = _joined(dv_sum, dk_sum, q_smem, do_smem, bars[7], WHO, D, STAGES)
            _write(total, 1.0, dv_parts, dv, alone, at, left, step, D)


@jit
def _write(total, scale, parts, out, alone, at, left, step, D: gl.constexpr):
    """The piece's part of a gradient; the gradient itself if the block has no other piece."""
    grad: gl.constexpr = total.type.layout
    j = gl.arange(0, 64, gl.SliceLayout(1, grad))
    column = gl.arange(0, D, gl.SliceLayout(0, grad))
    if alone != 0:
        to = out + at + (j * step)[:, None] + column[None, :]
        gl.store(to, (total * scale).to(out.dtype.element_ty), mask=(j < left)[:, None])
    else:
        gl.store(parts + (j * D)[:, None] + column[None, :], total)


# -- the program -----------------------------------------------------------------------------------


@_kernel
def dkdv_kernel(
    q, dout, k, v, lines, dq, order, items, split, dk_parts, dv_parts, dk, dv,
    stride_qb, stride_qn, stride_qh, stride_gb, stride_gn, stride_gh,
    low, heads, chunks, pieces, each, slots, Nk, slope, scale,
    D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One piece of one block's list: its sums for dK and dV, or these themselves if there is no
    other piece; shares of dQ if not split.

    ``q``, ``dout`` and ``dq`` are what the copy engine sees, and the tensors for groups below 8.
    """
    N: gl.constexpr = 64 // G
    SMALL: gl.constexpr = G < 8
    dtype: gl.constexpr = k.dtype
    # 128-byte rows, their 16-byte pieces permuted: what TMA writes and wgmma reads unconflicted.
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    line: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    x = gl.program_id(0)
    near = x // pieces
    which = low + near
    bh = which // chunks
    batch = bh // heads
    head = bh % heads
    lo = gl.load(items + x * 4)
    hi = gl.load(items + x * 4 + 1)
    if lo >= hi:
        return
    key = gl.load(items + x * 4 + 2)
    own = gl.load(items + x * 4 + 3)  # queries of its block, at the beginning of the list
    alone, own = own >> 16, own & 0xFFFF
    split = gl.load(split)
    steps = gl.cdiv(gl.maximum(hi - lo, 0), N)
    base = hi - gl.maximum(steps, 1) * N  # the first step may lack rows
    masked = gl.cdiv(lo + own - base, N)
    order = order + which.to(gl.int64) * each
    out = x.to(gl.int64) * (64 * D)
    at = ((batch.to(gl.int64) * Nk + key) * heads + head) * D  # of dK and dV, which are contiguous

    k_smem = gl.allocate_shared_memory(dtype, [64, D], tile)
    v_smem = gl.allocate_shared_memory(dtype, [64, D], tile)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], tile)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], tile)
    ds_smem = gl.allocate_shared_memory(dtype, [2, 64, 64], tile)
    dq_smem = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], line)
    at_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], line)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    places = gl.allocate_shared_memory(gl.int32, [8, 8], flat)
    asked_q = gl.allocate_shared_memory(gl.int32, [8, 8], flat)
    asked_do = gl.allocate_shared_memory(gl.int32, [8, 8], flat)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    done = gl.allocate_shared_memory(gl.int64, [1], bar)
    there = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(done, count=2)
    for i in gl.static_range(STAGES):
        # The copy engine or, where the group is small, the warp that copies.
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
        mbarrier.init(there.index(i), count=1)
    fence_async_shared()  # the copy engine must see the barriers before it completes them

    if SMALL:
        q += (batch.to(gl.int64) * stride_qb + (head * G).to(gl.int64) * stride_qh) * 8
        dout += (batch.to(gl.int64) * stride_gb + (head * G).to(gl.int64) * stride_gh) * 8
    strides = ((stride_qn, stride_qh), (stride_gn, stride_gh))
    loads = (
        (k_smem, v_smem, q_smem, do_smem, lse_smem, at_smem, delta_smem),
        (kv_full, q_full, do_full, q_empty, do_empty),
        (q, dout, k, v, (lines, each * G) if SMALL else lines, strides,
         (asked_q, asked_do)),
        (order, batch, head, near, lo, base, steps, key, slots),
    )  # fmt: skip
    work = (
        (k_smem, v_smem, q_smem, do_smem, lse_smem, at_smem, delta_smem, ds_smem, dq_smem),
        (kv_full, q_full, do_full, q_empty, do_empty, dq_full, dq_empty, (done, there)),
        (dk_parts + out, dv_parts + out, dk, dv, alone, at, Nk - key, heads * D),
        (lo, base, steps, masked, key, split, slope, scale),
    )  # fmt: skip
    # Entries count from the first query of the head; shares of dQ from that of the range.
    sends = (dq_smem, places, dq_full, dq_empty, dq, order, (near - which % chunks) * each, lo,
             base, gl.where(split != 0, 0, steps))  # fmt: skip
    # With fewer than 240 registers the consumers' products would wait for each other.  The others
    # keep some numbers on the stack, and have the time.
    gl.warp_specialize([
        (_consume, (work, 0, D, G, STAGES)),
        (_consume, (work, 1, D, G, STAGES)),
        (_produce_small if SMALL else _produce, (loads, False, D, G, STAGES)),
        (_produce_small if SMALL else _produce, (loads, True, D, G, STAGES)),
        (_send_small if SMALL else _send, (sends, D, G)),
    ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip


# -- dQ by queries ---------------------------------------------------------------------------------


@jit
def _p(s, lse, chose, bit, block, i, own, G: gl.constexpr, slope):
    """P = 2^(slope · S − LSE₂); 0 where a query did not choose the block or stands before a key."""
    layout: gl.constexpr = s.type.layout
    at = gl.arange(0, 64, gl.SliceLayout(1, layout)) // G
    active = ((chose >> (bit + at)) & 1) != 0
    p = gl.exp2(s * slope - gl.where(active, lse, float("inf"))[:, None])
    if block * 64 + 63 > i + own:
        key = block * 64 + gl.arange(0, 64, gl.SliceLayout(0, layout))
        p = gl.where(key[None, :] <= (i + own + at)[:, None], p, 0.0)
    return p


@jit
def _dq_consume(args, WHO: gl.constexpr, D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """64 rows: their Q and dO stay in shared memory, their dQ in registers."""
    smem, bars, dq_desc, rows, union, numbers = args
    q_smem, do_smem, k_smem, v_smem = smem
    q_full, k_full, v_full, empty = bars
    lse_rows, delta_rows = rows
    blocks, members, steps = union
    batch, head, first, nq, own, heads, slope, scale = numbers
    N: gl.constexpr = 64 // G
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, grad, 2)
    dtype: gl.constexpr = k_smem.dtype
    q_tile = q_smem.index(WHO)
    do_tile = do_smem.index(WHO)
    i = first + WHO * N
    bit = WHO * N
    if steps > 0:
        none = gl.zeros([64, 64], gl.float32, tile)
        # A query that saw no key, and a row past the end: LSE₂ = +∞ makes their P 0.
        row = gl.arange(0, 64, gl.SliceLayout(1, tile))
        query = i + row // G
        at = ((query.to(gl.int64) * heads + head) * G + row % G) * 2
        lse = gl.load(lse_rows + at, mask=query < nq, other=float("-inf"))
        lse = gl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        delta = gl.load(delta_rows + at, mask=query < nq, other=0.0)[:, None]
        block = gl.load(blocks)
        chose = gl.load(members)

        mbarrier.wait(q_full, 0)
        mbarrier.wait(k_full.index(0), 0)
        k_t = k_smem.index(0).permute((1, 0))
        s = warpgroup_mma(q_tile, k_t, none, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(0), 0)
        v_t = v_smem.index(0).permute((1, 0))
        dp = warpgroup_mma(do_tile, v_t, none, use_acc=False, is_async=True)
        s, dp = warpgroup_mma_wait(0, [s, dp])
        ds = _p(s, lse, chose, bit, block, i, own, G, slope) * (dp - delta)
        ds_left = gl.convert_layout(ds.to(dtype), left, assert_trivial=True)
        dq = warpgroup_mma_init(gl.zeros([64, D], gl.float32, grad))
        last = 0
        for x in range(1, steps):
            block = gl.load(blocks + x)
            chose = gl.load(members + x)
            slot, parity = x % STAGES, (x // STAGES) & 1
            k_t = k_smem.index(slot).permute((1, 0))
            v_t = v_smem.index(slot).permute((1, 0))
            mbarrier.wait(k_full.index(slot), parity)
            s = warpgroup_mma(q_tile, k_t, none, use_acc=False, is_async=True)
            dq = warpgroup_mma(ds_left, k_smem.index(last), dq, is_async=True)  # of the one before
            mbarrier.wait(v_full.index(slot), parity)
            dp = warpgroup_mma(do_tile, v_t, none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(2, [s])
            # While dQ and dP run:
            p = _p(s, lse, chose, bit, block, i, own, G, slope)
            dp, dq = warpgroup_mma_wait(0, [dp, dq])
            dq = warpgroup_mma_init(dq)
            mbarrier.arrive(empty.index(last), count=1)
            ds = p * (dp - delta)
            ds_left = gl.convert_layout(ds.to(dtype), left, assert_trivial=True)
            last = slot
        dq = warpgroup_mma(ds_left, k_smem.index(last), dq, is_async=True)
        dq = warpgroup_mma_wait(0, [dq])
        q_tile.store((dq * scale).to(dtype))
        fence_async_shared()
        box: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
        out = q_tile._reinterpret(dtype, [1, N, G, D], box)
        tma.async_copy_shared_to_global(dq_desc, [batch, i, head * G, 0], out)
        tma.store_wait(0)


@jit
def _dq_produce(args, D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """Q and dO once; then K and V of each block of the union."""
    smem, bars, descs, blocks, numbers = args
    q_desc, do_desc, k_desc, v_desc = descs
    batch, head, first, steps = numbers
    q_smem, do_smem, k_smem, v_smem = smem
    q_full, k_full, v_full, empty = bars
    N: gl.constexpr = 64 // G
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    dtype: gl.constexpr = k_smem.dtype
    if steps > 0:
        mbarrier.expect(q_full, 2 * 2 * 64 * D * 2)
        for who in gl.static_range(2):
            at = [batch, first + who * N, head * G, 0]
            into = q_smem.index(who)._reinterpret(dtype, [1, N, G, D], box)
            tma.async_copy_global_to_shared(q_desc, at, q_full, into)
            into = do_smem.index(who)._reinterpret(dtype, [1, N, G, D], box)
            tma.async_copy_global_to_shared(do_desc, at, q_full, into)
    for x in range(steps):
        slot, parity = x % STAGES, (x // STAGES) & 1
        at = [batch, gl.load(blocks + x) * 64, head, 0]
        mbarrier.wait(empty.index(slot), parity ^ 1)
        full = k_full.index(slot)
        mbarrier.expect(full, 64 * D * 2)
        into = k_smem.index(slot)._reinterpret(dtype, [1, 64, 1, D], box)
        tma.async_copy_global_to_shared(k_desc, at, full, into)
        full = v_full.index(slot)
        mbarrier.expect(full, 64 * D * 2)
        into = v_smem.index(slot)._reinterpret(dtype, [1, 64, 1, D], box)
        tma.async_copy_global_to_shared(v_desc, at, full, into)


@_kernel
def dq_kernel(
    q, dout, k, v, dq, lse, delta, blocks, members, counts, split,
    heads, nq, tiles, cap, own, slope, scale,
    D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of 128 rows, summed over the union of their blocks; nothing unless ``split``."""
    dtype: gl.constexpr = k.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    x = gl.program_id(0)
    bh = x // tiles
    batch = bh // heads
    head = bh % heads
    first = (tiles - 1 - x % tiles) * (128 // G)
    union = bh.to(gl.int64) * tiles + (tiles - 1 - x % tiles)
    # Where nobody chose anything, the first block is −1, outside of K, and its members are 0.
    steps = gl.where(gl.load(split) != 0, gl.maximum(gl.load(counts + union), 1), 0)
    blocks = blocks + union * cap
    members = members + union * cap
    rows = batch.to(gl.int64) * nq * heads * (2 * G)

    q_smem = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    do_smem = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], tile)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], tile)
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    smem = (q_smem, do_smem, k_smem, v_smem)
    bars = (q_full, k_full, v_full, empty)
    work = (smem, bars, dq, (lse + rows, delta + rows), (blocks, members, steps),
            (batch, head, first, nq, own, heads, slope, scale))  # fmt: skip
    loads = (smem, bars, (q, dout, k, v), blocks, (batch, head, first, steps))
    gl.warp_specialize([
        (_dq_consume, (work, 0, D, G, STAGES)),
        (_dq_consume, (work, 1, D, G, STAGES)),
        (_dq_produce, (loads, D, G, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


# -- launching -------------------------------------------------------------------------------------


#: gathered rows of one piece: what one program has to do
PIECE = 16384
#: and entries, which matters to small groups: the last program should not be alone for long
ENTRIES = 2048
#: how dQ is made: "fused" or "split"; None: as the choice of the blocks suggests
ROAD = None
#: how often a row may be multiplied, for one time that is asked for, before the shares are better
AGREE = 2


def _turn(block_indices, call: Call, n_k: int, group: int, d: int, workspace: int, piece: int):
    """``by_keys.turn`` for these pieces."""
    b, m, h, s = block_indices.shape
    size, rows = max(1, min(ENTRIES, piece // group)), lists.block_rows(call, n_k)

    def needs(queries: int) -> int:
        shares = queries * s * group * (2 * d + 12)
        return shares + (queries * s // size + rows) * 2 * 64 * d * 4

    chunk = m
    while chunk > 64 and needs(chunk) > workspace:
        chunk = -(-chunk // 2)
    order, starts, used = lists.by_slot(block_indices, call, n_k, chunk)
    owner, first = lists.parts(starts, size, chunk * s)
    chunks = starts.shape[2]
    # As many groups as there must be, of about the same size: each ends with an idle card.
    fit = min(MOST, max(1, int(workspace // needs(chunk))))
    groups = 1 if chunks > 1 else -(-b * h // fit)
    return Turned(
        order, starts, used, owner, first, lists=b * h * chunks, chunks=chunks, chunk=chunk,
        rows=rows, steps=1, keys=64, size=size, pieces=owner.shape[-1], each=chunk * s,
        together=1 if chunks > 1 else -(-b * h // groups),
    )  # fmt: skip


def _split(block_indices, turned: Turned, call: Call, n_k: int, group: int, road: str | None):
    """The unions of 128 rows, and whether to take dQ along them: a number on the device.

    Along unions dQ costs two products more, and rows in vain: it pays when neighbours agree.
    """
    road = road or ROAD
    if road == "fused" or call.cu is not None or 128 // group > 32:  # members are bits of an int32
        return None, turned.starts.new_zeros(1)
    union = lists.unions(block_indices, 128 // group, call, n_k)
    if road == "split":
        return union, turned.starts.new_ones(1)
    wanted, walked = turned.starts[..., -1].sum(), union[2].sum()
    return union, (walked * 128 < wanted * (AGREE * group)).to(torch.int32).view(1)


def backward(
    dout, dlse, q, k, v, o, lse, block_indices, call: Call, *,
    road: str | None = None, workspace: int = WORKSPACE, piece: int = PIECE,
):  # fmt: skip
    """dQ, dK and dV; parameters and results as for ``selection_backward.backward``.

    Parameters
    ----------
    road : ``"fused"`` or ``"split"`` overrules how dQ is made.
    workspace : bytes for the shares of dQ and the partial sums of one group of lists.
    piece : gathered rows that one program takes, at most.
    """
    from labkit.nsa import selection_backward as stock

    (b, m, hq, d), (n, heads) = q.shape, k.shape[1:3]
    group, slots = hq // heads, block_indices.shape[3]
    if any(s % 8 for s in dout.stride()[:3]) or dout.stride(3) != 1 or dout.data_ptr() % 16:
        # a copy, for .contiguous() would leave what is dense and begins between two 16 bytes
        dout = dout.clone(memory_format=torch.contiguous_format)
    new = q.new_empty
    dq, dk, dvalues = new(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    # Side by side: who gathers one of them has the other in the same 32 bytes.
    lse_rows, delta = new((b, m, hq, 2), dtype=torch.float32).unbind(-1)
    extra = lse if dlse is None else dlse
    tall = 4096 // d
    stock.rows_kernel[(triton.cdiv(b * m * hq, tall),)](
        o, dout, lse, extra, delta, lse_rows, *o.stride()[:3], *dout.stride(), *lse.stride(),
        *extra.stride(), hq, m, b * m * hq,
        DV=d, BLOCK_DV=d, ROWS=tall, HAS_DLSE=dlse is not None, STEP=2, num_warps=4,
    )  # fmt: skip

    turned = _turn(block_indices, call, n, group, d, workspace, piece)
    union, split = _split(block_indices, turned, call, n, group, road)
    keys = [describe(x, [1, 64, 1, d]) for x in (k, v)]
    if union is not None:
        box = [1, 64 // group, group, d]
        tiles = union[2].shape[2]
        dq_kernel[(b * heads * tiles,)](
            describe(q, box), describe(dout, box), *keys, describe(dq, box),
            lse_rows, delta, *union, split, heads, m, tiles, union[0].shape[3], call.offset,
            call.scale * LOG2E, call.scale, D=d, G=group, STAGES=STAGES, num_warps=4,
        )  # fmt: skip
    shares = new((turned.together * turned.each, group, d))
    sums = turned.together * turned.pieces * 64
    dk_parts, dv_parts = new((2, sums, d), dtype=torch.float32)
    sums = turned.rows * 64 if turned.chunks > 1 else 0
    dk_sums, dv_sums = new((2, sums, d), dtype=torch.float32)
    lines = new((turned.together * 3, turned.each * group), dtype=torch.float32)
    items = new((turned.together * turned.pieces, 4), dtype=torch.int32)
    if group < 8:
        described = q, dout, *keys, lines, shares
    else:
        box = [1, 1, group, 64]
        described = (
            describe(q, box), describe(dout, box), *keys, describe(lines, [1, 64], 32, 0),
            describe(shares, [1, group, 64]),
        )  # fmt: skip
    strides = [s // 8 for x in (q, dout) for s in x.stride()[:3]]
    shared = dict(VARLEN=call.cu is not None, HALVINGS=lists.steps_for(call),
                  SEQUENCES=call.sequences or 1)  # fmt: skip
    queries = max(1, 2048 // d)
    tokens, pieces = (16, 1) if group < 8 else (4, 8)  # a small group's list is mostly one piece
    for low, number in turned.groups():
        total = number * turned.pieces
        items_kernel[(triton.cdiv(total, 16),)](
            turned.starts, turned.owner, turned.first, call.cu, call.cu_blocks, turned.order, items,
            low, turned.chunks, heads, turned.pieces, turned.rows, call.max_k, call.offset,
            turned.size, turned.each, slots, total, BLOCK=64, **shared, ROWS=16,
        )  # fmt: skip
        lines_kernel[(triton.cdiv(turned.each * group, 1024), number)](
            lse_rows, delta, turned.order, lines, low, turned.chunks, heads, turned.each, slots, m,
            call.offset, GROUP=group, ROWS=1024,
        )  # fmt: skip
        dkdv_kernel[(total,)](
            *described, turned.order, items, split, dk_parts, dv_parts, dk, dvalues, *strides, low,
            heads, turned.chunks, turned.pieces, turned.each, slots, call.max_k,
            call.scale * LOG2E, call.scale, D=d, G=group, STAGES=STAGES, num_warps=4,
        )  # fmt: skip
        range_ = low % turned.chunks
        sums_kernel[(number * turned.rows * (64 // tokens), 2)](
            dk_parts, dv_parts, dk_sums, dv_sums, dk, dvalues, turned.first, call.cu,
            call.cu_blocks, *dk.stride()[:3], *dvalues.stride()[:3],
            low, turned.chunks, heads, turned.pieces, turned.rows, call.max_k, call.scale,
            D=d, TALL=tokens, TOGETHER=pieces, **shared,
            BEFORE=range_ > 0, AFTER=range_ < turned.chunks - 1, num_warps=4,
        )  # fmt: skip
        shares_kernel[(triton.cdiv(turned.chunk * group, queries), number)](
            shares, turned.used, split, dq, *dq.stride()[:3], low, turned.chunks, heads,
            turned.each, slots, turned.chunk, m, GROUP=group, D=d, ROWS=queries, num_warps=4,
        )  # fmt: skip
    return dq, dk, dvalues


def supports(q, k, v, call: Call) -> bool:
    """Whether these kernels can run on such tensors; never raises.  :func:`why_not` says why."""
    return why_not(q, k, v, call) is None


def why_not(q, k, v, call: Call) -> str | None:
    """None if these kernels can run on such tensors, else the reason; never raises.

    They need a Hopper GPU, float16 or bfloat16, head_dim and head_dim_v equal and 64 or 128, blocks
    of 64 keys, a group of 1, 2, 4, 8, 16, 32 or 64 query heads per KV head, and tensors that the
    copy engine can read: last dimension dense, other strides and the start multiples of 16 bytes.
    """
    try:
        if why := off_hopper(q, k, v):
            return why
        if not isinstance(lines_kernel, triton.JITFunction):
            return "Triton's interpreter is on"
        if q.shape[3] not in (64, 128) or v.shape[3] != q.shape[3]:
            return "a head_dim other than 64 or 128"
        if k.shape[1] >= 2**24:
            return "more keys than a float32 counts"
        if call.block_size != 64:
            return "a block_size other than 64"
        if q.shape[2] // k.shape[2] not in (1, 2, 4, 8, 16, 32, 64):
            return "a group of query heads that is not 1, 2, 4, 8, 16, 32 or 64"
        return unreadable(q, k, v)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
