r"""Where neighbours agree and where they do not: a choice cut in two.

Along the union of neighbouring queries (``hopper.py``) a block is brought in once, and its rows of
the queries that did not choose it are multiplied in vain.  By keys (``by_keys.py``) no row is in
vain, and every choice leaves a partial result.  What a warpgroup of q queries pays for a block is
about the same whoever chose it, what the parts cost grows with the number n of those who did:

.. math::
    n \cdot \text{(a part)} \;\ge\; \text{(64 rows along the union)}
    \quad\Longleftrightarrow\quad n \ge \text{least} .

:func:`agreed` decides that for each block and warpgroup.  What at least ``least`` queries of a
warpgroup chose goes along the union, in the format of ``lists.unions_by_group``; the rest stays a
choice, and goes by keys.  No choice is in both.  The first blocks and a query's last ones are
everybody's, so even neighbours that share nothing else agree on something.

To count every block that anybody named would take a sort of all choices, or a walk through all
blocks, which is quadratic in seq_len.  But what many chose, a few of them chose: only the choices
of :data:`SAMPLES` queries of each warpgroup are counted.  A block that they missed goes by keys,
which is slower and not wrong.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from labkit.flash.launch import Launcher
from labkit.flash.tuning import Config
from labkit.kernels.runtime import backend
from labkit.nsa.call import Call
from labkit.nsa.lists import either, launchers, place_of, plan_key, remember

__all__ = ["SAMPLES", "agreed", "fits"]

#: queries of a warpgroup whose choices are candidates: two, because a warpgroup of 64 queries may
#: lie over two neighbourhoods
SAMPLES = 2
#: choices of a tile that a program has registers for
_MOST = 2**13


@triton.jit
def _ones(x):
    """How many bits of each number are set: sums of pairs, of fours, of bytes."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def agreed_kernel(
    chosen, blocks, members, counts, rest, table, cu,
    stride_cb, stride_cm, stride_ch, stride_cs,
    heads, Nq, tokens, offset, per_sequence, least, cap,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    S: tl.constexpr, SLOTS: tl.constexpr, SAMPLES: tl.constexpr, LOG: tl.constexpr,
    VARLEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What ``GROUPS`` times ``QUERIES`` queries agree on, and what is left to each of them.

    ``table`` is room for 2 · 2^LOG numbers of each program: the candidates in order, which its
    threads search, and which groups agreed on each.
    """
    BITS: tl.constexpr = min(QUERIES, 32)
    WORDS: tl.constexpr = QUERIES // BITS  # of a group
    WIDTH: tl.constexpr = 2**LOG
    WANTED: tl.constexpr = GROUPS * SAMPLES * S
    UNUSED: tl.constexpr = 2 ** (31 - LOG) - 1  # beyond all blocks
    x = tl.program_id(0)  # [batch, head, tile]
    batch, head, tile, start, end = place_of(
        x, per_sequence, heads, Nq, cu, GROUPS * QUERIES, VARLEN
    )
    begin = tile * (GROUPS * QUERIES)
    if VARLEN and begin >= end:  # a tile that only longer sequences have
        tl.store(counts + x, 0)
        tl.store(blocks + x.to(tl.int64) * cap, 0)
        return
    chosen += batch * stride_cb + head * stride_ch + start * stride_cm

    # -- all choices: asked for before they are needed ---------------------------------------------
    row, slot = tl.arange(0, ROWS), tl.arange(0, SLOTS)
    i = begin + row
    there = (row < GROUPS * QUERIES) & (i < end)
    inside = there[:, None] & (slot < S)[None, :]
    at = (i.to(tl.int64) * stride_cm)[:, None] + (slot * stride_cs)[None, :]
    block = tl.load(chosen + at, inside, -1).to(tl.int32)
    block = tl.where((block >= 0) & (block <= ((i + offset) // BLOCK)[:, None]), block, -1)

    # -- candidates: what the samples chose, in order --------------------------------------------
    e = tl.arange(0, WIDTH)
    sample = e // S
    # The last query stands for those that are not there.
    query = tl.minimum(begin + (2 * sample + 1) * QUERIES // (2 * SAMPLES), end - 1)
    at = query.to(tl.int64) * stride_cm + (e % S) * stride_cs
    candidate = tl.load(chosen + at, (e < WANTED) & (begin < end), -1).to(tl.int32)
    fine = (candidate >= 0) & (candidate <= (query + offset) // BLOCK)
    # All different, so that each has a place: the number of those before it.
    key = tl.where(fine, candidate, UNUSED) * WIDTH + e
    table += x.to(tl.int64) * (2 * WIDTH)
    tl.store(table + WIDTH + e, key)
    tl.debug_barrier()
    before = tl.zeros([32, WIDTH], tl.int32)
    for first in range(0, WANTED, 32):
        other = tl.load(table + WIDTH + first + tl.arange(0, 32))
        before += (other[:, None] < key[None, :]).to(tl.int32)
    before = tl.where(e < WANTED, tl.sum(before, 0), e)
    tl.store(table + before, key // WIDTH)
    tl.debug_barrier()

    # -- each choice looks for itself among them, by halving -------------------------------------
    place = tl.where(tl.load(table + (WIDTH // 2 - 1)) < block, WIDTH // 2, 0)
    for level in tl.static_range(1, LOG):
        step = 2 ** (LOG - 1 - level)
        place += tl.where(tl.load(table + place + (step - 1)) < block, step, 0)
    place = tl.where(tl.load(table + place) == block, place, -1)  # the first of its equals

    # -- 32 candidates at a time: each query makes a bit for each, then each a bit for each query --
    c, part = tl.arange(0, 32), tl.arange(0, WIDTH // 32)
    one = 1 << tl.arange(0, BITS)
    member = tl.zeros([ROWS // BITS, WIDTH // 32, 32], tl.int32)
    for n in range(tl.cdiv(WANTED, 32)):
        if INTERPRETED:  # which walks a reduction of one's offset one element at a time
            bits = tl.zeros([ROWS], tl.int32)
            for s in range(S):
                here = tl.sum(tl.where((slot == s)[None, :], place, 0), 1)
                bits |= tl.where(here >> 5 == n, 1 << (here & 31), 0)
        else:
            bits = tl.reduce(tl.where(place >> 5 == n, 1 << (place & 31), 0), 1, either)
        bits = tl.trans(tl.reshape(bits, [ROWS // BITS, BITS]))
        bit = tl.where((bits[:, :, None] & (1 << c)[None, None, :]) != 0, one[:, None, None], 0)
        # Of each query another bit: their sum is what all of them chose.
        bit = tl.sum(bit, 0)
        member = tl.where((part == n)[None, :, None], bit[:, None, :], member)

    # -- what they agree on ------------------------------------------------------------------------
    member = tl.reshape(member, [ROWS // QUERIES, WORDS, WIDTH])
    yes = tl.sum(_ones(member), 1) >= least
    group, word = tl.arange(0, ROWS // QUERIES), tl.arange(0, WORDS)
    who = tl.sum(yes.to(tl.int32) << group[:, None], 0)
    some = (who != 0).to(tl.int32)
    at = x.to(tl.int64) * cap
    to = at + tl.cumsum(some, 0) - 1
    tl.store(blocks + to, (who << 24) | tl.load(table + e), mask=who != 0)
    words = (group[:, None] * WORDS + word[None, :])[:, :, None]
    tl.store(members + to[None, None, :] * (GROUPS * WORDS) + words,
             tl.where(yes[:, None, :], member, 0),
             mask=(who != 0)[None, None, :] & (words < GROUPS * WORDS))  # fmt: skip
    count = tl.sum(some, 0)
    tl.store(counts + x, count)
    tl.store(blocks + at, 0, mask=count == 0)  # who walks along it reads the first before it counts
    tl.store(table + WIDTH + e, who)

    # -- what is left ------------------------------------------------------------------------------
    tl.debug_barrier()
    who = tl.load(table + WIDTH + tl.maximum(place, 0))
    gone = (place >= 0) & (((who >> (row // QUERIES)[:, None]) & 1) != 0)
    left = (block >= 0) & ~gone
    at = (((batch * tokens + start + i) * heads + head) * S)[:, None]
    # Side by side at the front: who sums over the slots ends with the last that is left.
    to, count = tl.cumsum(left.to(tl.int32), 1) - 1, tl.sum(left.to(tl.int32), 1)
    tl.store(rest + at + to, block, mask=inside & left)
    tl.store(rest + at + slot[None, :], tl.full([ROWS, SLOTS], -1, tl.int32),
             mask=inside & (slot[None, :] >= count[:, None]))  # fmt: skip


# -- launching -------------------------------------------------------------------------------------


def _rows(queries: int, groups: int) -> int:
    return queries * triton.next_power_of_2(groups)


def fits(slots: int, queries: int, groups: int) -> bool:
    """Whether a program has room for the choices of a tile."""
    width = triton.next_power_of_2(slots)
    return groups <= 7 and width <= 64 and _rows(queries, groups) * width <= _MOST


def agreed(
    block_indices: torch.Tensor, queries: int, groups: int, least: int, call: Call
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The blocks on which ``least`` queries of a group agree, and what is left of the choice.

    Time and memory grow with the choice: a tile has ``groups · SAMPLES · S`` candidates at most.
    A ragged batch has as many tiles for each sequence as the longest one has.

    Parameters
    ----------
    block_indices : ``[B, M, H, S]`` int32 or int64, −1 for an unused slot.
    queries : of a group: a power of two, at most 64.
    groups : that share a tile; :func:`fits` says what is possible.
    least : queries of a group that must have chosen a block, at least 1.

    Returns
    -------
    tuple
        ``(blocks, members, counts)`` as from ``lists.unions_by_group``, of a shape with
        cap = min(candidates, blocks of the longest sequence): the bit of a group is set where it
        agreed, and other groups' words are 0, whoever of them chose the block.  Where nothing is
        agreed on, place 0 of ``blocks`` holds a 0.
    rest : ``[B, M, H, S]`` int32, contiguous: the choices that count and are not agreed on, in
        their order, then −1.  A block that a query named twice is still named twice.
    """
    b, m, h, s = block_indices.shape
    assert least >= 1 and fits(s, queries, groups)
    each = -(-call.max_q // (groups * queries))
    tiles, candidates = each * (call.sequences or 1), groups * SAMPLES * s
    cap = max(1, min(candidates, call.blocks))
    new = block_indices.new_empty
    blocks = new((b, h, tiles, cap), dtype=torch.int32)
    members = new((b, h, tiles, cap, groups * -(-queries // 32)), dtype=torch.int32)
    counts = new((b, h, tiles), dtype=torch.int32)
    rest = new((b, m, h, s), dtype=torch.int32)
    if not counts.numel() or not s:
        return (blocks.zero_(), members, counts.zero_()), rest
    log = max(5, (candidates - 1).bit_length())
    assert call.blocks < 2 ** (31 - log) - 1
    table = new((counts.numel(), 2 * 2**log), dtype=torch.int32)
    key = ("agreed", queries, groups, least, *plan_key(call, block_indices))
    launch = launchers.get(key)
    if launch is None:
        rows, wide = _rows(queries, groups), triton.next_power_of_2(s)
        launch = Launcher(
            agreed_kernel,
            (counts.numel(),),
            (*block_indices.stride(), h, call.max_q, m, call.offset, tiles, least, cap),
            dict(BLOCK=call.block_size, QUERIES=queries, GROUPS=groups, ROWS=rows, S=s, SLOTS=wide,
                 SAMPLES=SAMPLES, LOG=log, VARLEN=call.cu is not None,
                 INTERPRETED=backend() == "interpreter"),
            Config(queries * groups, 0, min(16, max(1, rows * wide // 512)), 1),
        )  # fmt: skip
        remember(key, launch)
    launch(block_indices, blocks, members, counts, rest, table, call.cu)
    return (blocks, members, counts), rest
