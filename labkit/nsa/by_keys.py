r"""Selection turned around: a program owns a block and gathers the rows that chose it.

A query sees its blocks one by one and can be put together from parts, as in chapter 07: with
:math:`O_s` and :math:`\mathrm{LSE}_s` of the block in slot s alone,

.. math::
    \mathrm{LSE} = \ln \sum_s e^{\mathrm{LSE}_s}, \qquad
    O = \sum_s e^{\mathrm{LSE}_s - \mathrm{LSE}}\, O_s .

:func:`part_kernel` makes the parts of one block for the queries on its list
(``lists.by_slot``), 64 rows at a time, K and V in its hands throughout; :func:`merge_kernel` sums
each query's parts in the order of its slots.  No row is multiplied in vain, whatever the size of
the group and however little neighbours share.  The price is memory traffic: a query's row is read
once, and a part written and read once, for each of its choices.

A list as long as the sequence (everybody's block) is cut into pieces of equal size, so that no
program works long after the others.  Parts of all queries at once would fill the card's memory:
the batch is taken in groups of lists whose parts fit into :data:`WORKSPACE` bytes; a list that is
too long for that is made for ranges of queries.  No sum crosses a group.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from labkit.flash import tuning
from labkit.flash.launch import card
from labkit.flash.tuning import Config
from labkit.kernels.runtime import backend, check_can_launch
from labkit.nsa import lists
from labkit.nsa.call import Call
from labkit.nsa.lists import find_sequence
from labkit.nsa.selection import block_rows, gather, is_wide, padded, width

__all__ = ["WORKSPACE", "forward", "merge_kernel", "part_kernel"]

LOG2E = math.log2(math.e)
#: bytes that the parts of one group of lists may take, if that is no more than
WORKSPACE = 9 * 2**28
#: this share of the card's memory
_SHARE = 16
#: rows (queries × padded group) of one piece of a block's list: some sixty tiles
PIECE = 4096
#: the same in float32, whose error is that of long sums: 4096 rows added one after the other cost
#: dV several times the error of a product that adds them in short runs
PIECE_FLOAT32 = 256
#: queries of a range, at least: what is shorter would not fill the card
RANGE = 256
#: lists of one group: the second dimension of a launch can hold no more
MOST = 65535


# -- one block, or a part of it, and one piece of its list -----------------------------------------


@triton.jit
def find_piece(
    starts, owner, first, cu, cu_blocks, x, low, chunks, heads, pieces, rows, Nk, offset, size,
    STEPS: tl.constexpr, VARLEN: tl.constexpr, HALVINGS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """What program ``x`` works on.

    Returns list, batch, head, block of its sequence, part of the block, number of the piece,
    entries ``lo … hi`` of the list, first token of the sequence, position of the token in row 0
    of q, and keys of the sequence.  ``lo ≥ hi`` where there is no such piece.
    """
    part, x = x % STEPS, x // STEPS
    piece, near = x % pieces, x // pieces  # the list within its group of lists
    which = (low + near).to(tl.int64)
    bh = which // chunks
    batch, head = bh // heads, bh % heads
    row = tl.load(owner + which * pieces + piece)
    exists = row < rows
    row = tl.where(exists, row, 0)
    table = which * (rows + 1) + row
    begin, end = tl.load(starts + table), tl.load(starts + table + 1)
    lo = begin + (piece - tl.load(first + table)) * size
    hi = tl.where(exists, tl.minimum(lo + size, end), lo)
    start = tl.cast(0, tl.int64)
    if VARLEN:
        sequence = find_sequence(cu_blocks, row, SEQUENCES, HALVINGS)
        row -= tl.load(cu_blocks + sequence).to(tl.int32)
        start = tl.load(cu + sequence).to(tl.int64)
        Nk = (tl.load(cu + sequence + 1) - start).to(tl.int32)
        offset = -start.to(tl.int32)
    return which, near, batch, head, row, part, piece, lo, hi, start, offset, Nk


@triton.jit
def entries(order, e, hi, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Entries of the list, from number ``e`` on, one for each row of a tile; 0 beyond ``hi``."""
    at = e + tl.arange(0, ROWS) // PADDED
    return tl.load(order + at, at < hi, 0)


@triton.jit
def part_kernel(
    q, k, v, parts, lse_parts, order, starts, owner, first, cu, cu_blocks,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    low, chunks, heads, pieces, rows, each, Nk, offset, size, c, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
    VARLEN: tl.constexpr, HALVINGS: tl.constexpr, SEQUENCES: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and LSE of one block alone, for the queries of one piece of its list."""
    which, near, batch, head, block, part, _, lo, hi, start, own, Nk = find_piece(
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
    column = tl.arange(0, BLOCK_DV)

    # -- the rows that chose it: each entry is loaded one turn before its row of Q -----------------
    r = tl.arange(0, ROWS)
    g = r % PADDED
    order += which * each
    to = near.to(tl.int64) * each - which % chunks * each  # where slot 0 of query 0 would lie
    entry = entries(order, lo, hi, PADDED, ROWS)
    for e in tl.range(lo, hi, ROWS // PADDED):
        query, there = entry // SLOTS, (e + r // PADDED < hi) & (g < GROUP)
        at = batch * stride_qb + query.to(tl.int64) * stride_qn + (head * GROUP + g) * stride_qh
        Q = gather(q, at, D, stride_qd, there, BLOCK_D, D)
        s = tl.dot(Q, K.T, input_precision=PRECISION)
        limit = tl.minimum(query + own, last - 1) - key
        s = tl.where(j[None, :] <= limit[:, None], s, float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp2((s - tl.where(m == float("-inf"), 0.0, m)[:, None]) * c)
        l = tl.sum(p, 1)
        out = tl.dot(p.to(V.dtype), V, input_precision=PRECISION)
        # One division a row: the loop is short, and one for each element a large part of it.
        nothing = l == 0.0
        l = tl.where(nothing, 1.0, l)
        lse = tl.where(nothing, float("-inf"), m * scale + tl.log(l))
        out = out * (1.0 / l)[:, None]
        place = ((to + entry) * STEPS + part) * GROUP + g
        tl.store(parts + (place * DV)[:, None] + column[None, :], out.to(parts.dtype.element_ty),
                 mask=there[:, None] & (column < DV)[None, :])  # fmt: skip
        tl.store(lse_parts + place, lse, mask=there)
        entry = entries(order, e + ROWS // PADDED, hi, PADDED, ROWS)


@triton.jit
def merge_kernel(
    parts, lse_parts, used, o, lse, stride_ob, stride_on, stride_oh, stride_lb, stride_lh,
    low, chunks, heads, each, slots, chunk, Nq,
    GROUP: tl.constexpr, STEPS: tl.constexpr, SLOTS: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Join the parts of ``ROWS`` rows (query, head of the group), in the order of their slots.

    ``BASE``: what ``o`` and ``lse`` hold is one more part, the first.
    """
    near = tl.program_id(1)
    which = (low + near).to(tl.int64)
    bh, first = which // chunks, which % chunks * chunk
    batch, head = bh // heads, bh % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i, g = row // GROUP, row % GROUP
    token = first + i
    there = (i < chunk) & (token < Nq)

    # -- the largest LSE ---------------------------------------------------------------------------
    n = tl.arange(0, SLOTS)
    slot, use = near.to(tl.int64) * each + i * slots, used + which * each + i * slots
    all_ = there[:, None] & (n < slots * STEPS)[None, :]
    all_ = all_ & (tl.load(use[:, None] + n // STEPS, all_, 0) != 0)
    last = tl.max(tl.max(tl.where(all_, n[None, :] + 1, 0), 1), 0)
    if BASE and last == 0:
        return
    places = ((slot * STEPS)[:, None] + n[None, :]) * GROUP + g[:, None]
    lse_n = tl.load(lse_parts + places, all_, float("-inf"))
    top = tl.max(lse_n, 1)
    head_q = head * GROUP + g
    lse += batch * stride_lb + head_q * stride_lh + token
    if BASE:
        first_lse = tl.load(lse, there, float("-inf"))
        top = tl.maximum(top, first_lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse_n - safe[:, None]), 1)

    # -- the sum: what stands behind the last part of these rows costs no turn ---------------------
    column = tl.arange(0, BLOCK_DV)
    inside = there[:, None] & (column < DV)[None, :]
    o += (batch * stride_ob + token * stride_on + head_q * stride_oh)[:, None] + column[None, :]
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    if BASE:
        weight = tl.exp(first_lse - safe)
        total += weight
        acc = weight[:, None] * tl.load(o, inside, 0.0).to(tl.float32)
        tl.debug_barrier()  # other threads may read what one is about to replace
    for s in tl.range(0, last):
        counts = tl.load(use + s // STEPS, there, 0) != 0
        place = (slot * STEPS + s) * GROUP + g
        weight = tl.exp(tl.load(lse_parts + place, counts, float("-inf")) - safe)
        chosen = counts[:, None] & (column < DV)[None, :]
        part = tl.load(parts + (place * DV)[:, None] + column[None, :], chosen, 0.0)
        acc += weight[:, None] * part.to(tl.float32)
    nothing = total == 0.0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(o, out.to(o.dtype.element_ty), mask=inside)
    lse_row = tl.where(nothing, float("-inf"), safe + tl.log(tl.where(nothing, 1.0, total)))
    tl.store(lse, lse_row, mask=there)


# -- launching -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turned:
    """The choice turned around and cut: what both passes by keys are launched with.

    Attributes
    ----------
    lists, chunks, chunk : lists in all, ranges of queries of each head, queries of a range.
    rows : blocks of a list.
    steps, keys : parts of a block, each for a program of its own, and keys of a part.
    size : entries of a piece.
    pieces : pieces of a list, at most.
    each : entries of a list, at most.
    together : lists whose parts fit into the workspace.
    """

    order: torch.Tensor
    starts: torch.Tensor
    used: torch.Tensor
    owner: torch.Tensor
    first: torch.Tensor
    lists: int
    chunks: int
    chunk: int
    rows: int
    steps: int
    keys: int
    size: int
    pieces: int
    each: int
    together: int

    def groups(self) -> Iterator[tuple[int, int]]:
        """``(first list, number of lists)`` of each group."""
        for low in range(0, self.lists, self.together):
            yield low, min(self.together, self.lists - low)

    def programs(self, number: int) -> int:
        """Programs for that many lists."""
        return number * self.pieces * self.steps


def turn(
    block_indices: torch.Tensor, call: Call, n_k: int, group: int, c: Config,
    bytes_of_row: float, bytes_of_part: float, workspace: int, short: bool = False,
) -> Turned:  # fmt: skip
    """Lists and their cuts.

    Parameters
    ----------
    bytes_of_row : workspace for one row (query and head) of one choice.
    bytes_of_part : workspace for one piece of one part of a block.
    workspace : bytes for a group of lists.
    short : keep pieces short, for sums in float32.
    """
    b, m, h, s = block_indices.shape
    steps = triton.cdiv(call.block_size, c.block_n)
    size = max(1, (min(PIECE, PIECE_FLOAT32) if short else PIECE) // padded(group))
    rows = lists.block_rows(call, n_k)

    def needs(queries: int) -> float:
        pieces = queries * s // size + rows
        return steps * (queries * s * group * bytes_of_row + pieces * bytes_of_part)

    chunk = m
    while chunk > RANGE and needs(chunk) > workspace:
        chunk = -(-chunk // 2)
    order, starts, used = lists.by_slot(block_indices, call, n_k, chunk)
    owner, first = lists.parts(starts, size, chunk * s)
    chunks = starts.shape[2]
    return Turned(
        order, starts, used, owner, first, lists=b * h * chunks, chunks=chunks, chunk=chunk,
        rows=rows, steps=steps, keys=c.block_n, size=size, pieces=owner.shape[-1], each=chunk * s,
        together=1 if chunks > 1 else max(1, min(b * h, MOST, int(workspace // needs(chunk)))),
    )  # fmt: skip


@cache
def _memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory


def workspace_for(x: torch.Tensor) -> int:
    """Bytes of workspace on the card that ``x`` lies on."""
    return min(WORKSPACE, _memory(x.device.index or 0) // _SHARE) if x.is_cuda else WORKSPACE


_chosen: dict[tuple, Config] = {}


def best(
    key: tuple,
    configs: list[Config],
    flops: float,
    run: Callable[[Config], object],
    trial: Callable[[Config], object] | None = None,
) -> None:
    """``run`` with the fastest configuration, or the first that the card has room for.

    Where the work is worth it they are timed on the real inputs, once for each ``key`` in a
    process; what is small, CUDA graph capture and ``LABKIT_TUNE=0`` take the first.  ``trial`` is
    what is timed, if ``run`` must not run twice.
    """
    if key in _chosen:
        return run(_chosen[key])
    if (
        len(configs) > 1
        and flops >= tuning.WORTH_TUNING
        and os.environ.get("LABKIT_TUNE", "1") != "0"
        and backend() == "gpu"
        and not torch.cuda.is_current_stream_capturing()
    ):
        config, _ = tuning.fastest(configs, lambda c: partial(trial or run, c))
        if config is not None:
            _chosen[key] = config
            return run(config)
    for config in configs:
        try:
            run(config)
        except OutOfResources:
            if config is configs[-1]:
                raise
        else:
            # Small work does not decide for large.
            if flops >= tuning.WORTH_TUNING:
                _chosen[key] = config
            return None


def flops_of(q, block_indices, call: Call, widths: int) -> float:
    """Multiply-adds twice, if every choice is a full block; ``widths``: heads' of the products."""
    choices = block_indices.shape[0] * block_indices.shape[1] * block_indices.shape[3]
    return 2.0 * choices * q.shape[2] * call.block_size * widths


def narrow(q: torch.Tensor, *configs: Config) -> tuple[Config, ...]:
    """Configurations with 32 keys, for cards with little shared memory; none on Hopper.

    It has enough, and Triton 3.6 multiplies some narrow right factors wrongly there.
    """
    return () if card(q)[0] == 90 else configs


def _configs(q, v) -> list[Config]:
    """Rows, keys, warps and stages to try."""
    wide = max(width(q), width(v))
    if q.element_size() == 4:
        return [Config(32, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
    if card(q)[0] == 0:
        return [Config(64, 64, 4, 1)]
    if wide > 128:
        return [Config(64, 64, 8, 2), Config(64, 64, 8, 1), *narrow(q, Config(64, 32, 8, 1))]
    return [Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(128, 64, 8, 2),
            *narrow(q, Config(64, 32, 4, 1))]  # fmt: skip


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    call: Call,
    *,
    workspace: int | None = None,
    base: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE block by block; arguments and results as for ``selection.forward``.

    ``base`` is (O, LSE) of other keys, ``[B, M, HQ, V]`` in q's dtype and ``[B, HQ, M]`` float32,
    rows dense: the result is that of both together, and lies where ``base`` lay.
    """
    check_can_launch("nsa_selected_attention", q, k, v, block_indices)
    workspace = workspace or workspace_for(q)
    b, m, hq, d = q.shape
    heads, dv = k.shape[2], v.shape[3]
    group = hq // heads

    def new() -> tuple[torch.Tensor, torch.Tensor]:
        return q.new_empty((b, m, hq, dv)), q.new_empty((b, hq, m), dtype=torch.float32)

    o, lse = base or new()

    def run(c: Config, o=o, lse=lse, first=base is not None) -> None:
        rows = max(c.block_m, padded(group))
        turned = turn(block_indices, call, k.shape[1], group, c,
                      dv * q.element_size() + 4, 0, workspace)  # fmt: skip
        most = turned.together * turned.each * turned.steps * group
        parts, lse_parts = q.new_empty((most, dv)), lse.new_empty(most)
        tall = max(1, 2048 // width(v))
        for low, number in turned.groups():
            part_kernel[(turned.programs(number),)](
                q, k, v, parts, lse_parts, turned.order, turned.starts, turned.owner, turned.first,
                call.cu, call.cu_blocks, *q.stride(), *k.stride(), *v.stride(),
                low, turned.chunks, heads, turned.pieces, turned.rows, turned.each,
                call.max_k, call.offset, turned.size, call.scale * LOG2E, call.scale,
                GROUP=group, PADDED=padded(group), ROWS=rows, SLOTS=block_indices.shape[3],
                D=d, DV=dv,
                BLOCK_D=width(q), BLOCK_DV=width(v), BLOCK=call.block_size,
                BLOCK_N=c.block_n, STEPS=turned.steps, VARLEN=call.cu is not None,
                HALVINGS=lists.steps_for(call), SEQUENCES=call.sequences or 1,
                WIDE=is_wide(c.block_n, k, v), PRECISION=call.precision,
                num_warps=c.num_warps, num_stages=c.num_stages,
            )  # fmt: skip
            slots = block_indices.shape[3] * turned.steps
            merge_kernel[(triton.cdiv(turned.chunk * group, tall), number)](
                parts, lse_parts, turned.used, o, lse, *o.stride()[:3], *lse.stride()[:2],
                low, turned.chunks, heads, turned.each, block_indices.shape[3], turned.chunk, m,
                GROUP=group, STEPS=turned.steps, SLOTS=triton.next_power_of_2(slots), DV=dv,
                BLOCK_DV=width(v), ROWS=tall, BASE=first, num_warps=4,
            )  # fmt: skip

    key = ("forward", q.dtype, d, dv, call.block_size, call.precision, q.device)
    trial = None if base is None else lambda c: run(c, *new(), first=False)
    best(key, _configs(q, v), flops_of(q, block_indices, call, d + dv), run, trial)
    return o, lse
