r"""Who chose what: unions of neighbours, and the lists turned around.

Each query names the blocks it reads.  A kernel wants one of two other views of the same choice:

:func:`unions`
    the blocks that any of a few neighbouring queries chose, and which of them did.  A program that
    owns these queries brings each block in once for all of them.
:func:`unions_by_group`
    the same for more queries than a word has bits, with words for each group of them.
:func:`by_block`
    for each block the queries that chose it, in order.  A program that owns a block gathers their
    rows.  A block may be everybody's choice (the first one is), so its list is cut into parts of
    equal size (:func:`parts`), a number that is bounded before anything has run.

A choice counts when its block exists and does not begin after the query's own position; −1, a
block that is out of range, and a block that the query already named do not.  Everything is made
on the device, by sorting, counting or going through all blocks, without atomics and without
waiting for the host: the lists are the same each time, and what is made from them in their order
is too.

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

__all__ = [
    "block_rows", "by_block", "by_slot", "find_sequence", "parts", "unions", "unions_by_group",
]  # fmt: skip

_UNUSED = tl.constexpr(2**31 - 1)


def block_rows(call: Call, n_k: int) -> int:
    """Rows of a table with one row per block: blocks of a sequence, or of all with varlen.

    How many blocks the sequences have together is known on the device only; the host takes the
    most that ``n_k`` keys can have.
    """
    return call.blocks if call.cu is None else n_k // call.block_size + call.sequences


# -- which sequence ----------------------------------------------------------------------------


@triton.jit
def find_sequence(cu, x, sequences, STEPS: tl.constexpr):
    """The sequence that element ``x`` lies in, by halving; empty sequences hold none.

    ``cu`` is ``[sequences + 1]``, ascending from 0; 2^STEPS ≥ sequences.
    """
    lo, hi = x * 0, x * 0 + sequences  # cu[lo] ≤ x < cu[hi]
    for _ in tl.static_range(STEPS):
        middle = (lo + hi) // 2
        right = tl.load(cu + middle) <= x
        lo, hi = tl.where(right, middle, lo), tl.where(right, hi, middle)
    return lo


def steps_for(call: Call) -> int:
    """How often :func:`find_sequence` halves."""
    return 0 if call.cu is None else max(1, (call.sequences - 1).bit_length())


def plan_key(call: Call, *tensors: torch.Tensor) -> tuple:
    """What a launch depends on: all but the numbers in the tensors."""
    parts = [call.scale, call.precision, call.block_size, call.max_q, call.max_k, call.sequences]
    for x in tensors:
        # Triton compiles for the alignment of each pointer.
        parts += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)
    return tuple(parts)


# -- unions of neighbours ------------------------------------------------------------------------

launchers: dict[tuple, Launcher] = {}


def remember(key: tuple, launch: Launcher) -> None:
    """Keep what a launch needs; ``key`` is all that it depends on."""
    if len(launchers) > 2000:  # shapes that never come back
        launchers.clear()
    launchers[key] = launch


@triton.jit
def _meet(
    x, at, LOG: tl.constexpr, level: tl.constexpr, bit: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Of two elements whose numbers differ in ``bit``, one keeps the smaller, the other the larger.

    Which one is turned around from one run of 2^level elements to the next.
    """
    other = tl.gather(x, at ^ 2**bit, 1) if INTERPRETED else x ^ tl.xor_sum(x, LOG - bit, True)
    larger = ((at >> bit) ^ (at >> level)) & 1
    return tl.where(larger == 0, tl.minimum(x, other), tl.maximum(x, other))


@triton.jit
def _ascending(x, at, LOG: tl.constexpr, INTERPRETED: tl.constexpr):
    """Each row of ``x`` sorted (Batcher's bitonic network); ``at`` numbers its columns.

    ``tl.sort`` is the same network, but asks whether elements change places, where a minimum is
    one instruction.  A dimension for each bit lets an element meet its partner by a shuffle.  The
    interpreter walks reductions one element at a time; there it gathers.
    """
    shape: tl.constexpr = x.shape
    if not INTERPRETED:
        x = tl.reshape(x, [shape[0]] + [2] * LOG)
        at = tl.reshape(at, [shape[0]] + [2] * LOG)
    for level in tl.static_range(1, LOG + 1):
        for step in tl.static_range(level):
            x = _meet(x, at, LOG, level, level - 1 - step, INTERPRETED)
    return tl.reshape(x, shape)


@triton.jit
def unions_kernel(
    chosen, blocks, members, counts, cu,
    stride_cb, stride_cm, stride_ch, stride_cs,
    heads, Nq, offset, per_sequence, total, slots, cap,
    BLOCK: tl.constexpr, TILE: tl.constexpr, LOG: tl.constexpr, TILES: tl.constexpr,
    VARLEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Unions of ``TILES`` tiles of ``TILE`` queries each.

    A key is block · TILE + (query within the tile): sorted, the choices of a block stand together.
    """
    WIDTH: tl.constexpr = 2**LOG
    x = tl.program_id(0) * TILES + tl.arange(0, TILES)  # [batch, head, tile], flat
    there = x < total
    head = x // per_sequence % heads  # varlen: [head, sequence × tile]; else [batch, head, tile]
    tile = x % per_sequence
    batch = (x // (per_sequence * heads)).to(tl.int64)
    n, start, own = tl.full([TILES], Nq, tl.int32), tl.zeros([TILES], tl.int64), offset
    if VARLEN:
        each = tl.cdiv(Nq, TILE)  # Nq: of the longest sequence
        sequence, tile = tile // each, tile % each
        start = tl.load(cu + sequence, there, 0).to(tl.int64)
        n = (tl.load(cu + sequence + 1, there, 0) - start).to(tl.int32)

    # -- keys ------------------------------------------------------------------------------------
    e = tl.arange(0, WIDTH)
    which, slot = e // slots, e % slots
    i = tile[:, None] * TILE + which[None, :]  # query of its sequence
    there = there[:, None] & (which < TILE)[None, :] & (i < n[:, None])
    at = batch * stride_cb + start * stride_cm + head.to(tl.int64) * stride_ch
    at = at[:, None] + i.to(tl.int64) * stride_cm + (slot * stride_cs)[None, :]
    block = tl.load(chosen + at, there, -1).to(tl.int32)
    counts_here = (block >= 0) & (block <= (i + own) // BLOCK)
    key = tl.where(counts_here, block * TILE + which[None, :], _UNUSED)
    at = tl.broadcast_to(e[None, :], TILES, WIDTH)
    key = _ascending(key, at, LOG, INTERPRETED)

    # -- the last choice of each block collects the members --------------------------------------
    block = tl.where(key == _UNUSED, _UNUSED, key // TILE)
    bits = tl.where(key == _UNUSED, 0, 1 << (key % TILE))
    for level in tl.static_range(LOG):
        before = tl.maximum(at - 2**level, 0)
        same = tl.gather(block, before, 1) == block  # ascending: so are all between
        bits |= tl.where(same, tl.gather(bits, before, 1), 0)
    following = tl.gather(block, tl.minimum(at + 1, WIDTH - 1), 1)
    last = (block != _UNUSED) & ((block != following) | (at == WIDTH - 1))
    place = tl.cumsum(last.to(tl.int32), 1) - 1
    count = tl.sum(last.to(tl.int32), 1)

    x = tl.program_id(0) * TILES + tl.arange(0, TILES)
    row = x.to(tl.int64)[:, None] * cap
    inside = (x < total)[:, None]
    tl.store(blocks + row + place, block, mask=inside & last)
    tl.store(members + row + place, bits, mask=inside & last)
    rest = inside & (at >= count[:, None]) & (at < cap)
    tl.store(blocks + row + at, tl.full([TILES, WIDTH], -1, tl.int32), mask=rest)
    tl.store(members + row + at, tl.zeros([TILES, WIDTH], tl.int32), mask=rest)
    tl.store(counts + x, count, mask=x < total)


def unions(
    block_indices: torch.Tensor, tile: int, call: Call, n_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What any of ``tile`` neighbouring queries chose.

    Parameters
    ----------
    block_indices : ``[B, M, H, S]`` int32 or int64, −1 for an unused slot.
    tile : queries that share a program: a power of two, at most 32.
    n_k : keys in all.

    Returns
    -------
    tuple
        ``blocks`` ``[B, H, tiles, cap]`` int32, ascending, the rest −1; cap = min(tile · S, blocks
        of the longest sequence).  ``members``, of the same shape and type: bit i is set when query
        tile · x + i chose the block.  ``counts`` ``[B, H, tiles]`` int32.

    Notes
    -----
    With varlen a tile never holds queries of two sequences: tiles are ``[sequence, tile]``, as
    many for each sequence as the longest has.
    """
    b, _, h, s = block_indices.shape
    each = -(-call.max_q // tile)
    tiles = each * (call.sequences or 1)
    cap = max(1, min(tile * s, call.blocks))
    shape = (b, h, tiles)
    new = block_indices.new_empty
    blocks, members = (new((*shape, cap), dtype=torch.int32) for _ in range(2))
    counts = new(shape, dtype=torch.int32)
    total = counts.numel()
    if total == 0 or s == 0:
        return blocks.fill_(-1), members.zero_(), counts.zero_()
    key = (tile, *plan_key(call, block_indices))
    launch = launchers.get(key)
    if launch is None:
        log = max(1, (tile * s - 1).bit_length())
        interpreted = backend() == "interpreter"
        together = 32 if interpreted else 1
        launch = Launcher(
            unions_kernel,
            (triton.cdiv(total, together),),
            (*block_indices.stride(), h, call.max_q, call.offset, tiles, total, s, cap),
            dict(BLOCK=call.block_size, TILE=tile, LOG=log, TILES=together,
                 VARLEN=call.cu is not None, INTERPRETED=interpreted),
            Config(tile, 0, min(8, max(1, 2**log // 256)), 1),
        )  # fmt: skip
        remember(key, launch)
    launch(block_indices, blocks, members, counts, call.cu)
    return blocks, members, counts


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def place_of(x, per_sequence, heads, Nq, cu, QUERIES: tl.constexpr, VARLEN: tl.constexpr):
    """Where tile ``x`` of ``QUERIES`` queries lies.

    Batch, head, its number within its sequence, and that one's first token and number of tokens.
    """
    head, tile = (x // per_sequence % heads).to(tl.int64), x % per_sequence
    batch = (x // (per_sequence * heads)).to(tl.int64)
    end, start = Nq, tl.cast(0, tl.int64)
    if VARLEN:
        each = tl.cdiv(Nq, QUERIES)  # Nq: of the longest sequence
        sequence, tile = tile // each, tile % each
        start = tl.load(cu + sequence).to(tl.int64)
        end = (tl.load(cu + sequence + 1) - start).to(tl.int32)
    return batch, head, tile, start, end


@triton.jit
def unions_by_group_kernel(
    chosen, blocks, members, counts, cu,
    stride_cb, stride_cm, stride_ch, stride_cs,
    heads, Nq, offset, per_sequence, slots, cap,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, VARLEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The union of ``GROUPS`` times ``QUERIES`` queries, 32 blocks at a time.

    Each query makes a bit for each block, then each block a bit for each query.
    """
    BITS: tl.constexpr = min(QUERIES, 32)
    WORDS: tl.constexpr = QUERIES // BITS  # of a group
    x = tl.program_id(0)
    batch, head, tile, start, end = place_of(
        x, per_sequence, heads, Nq, cu, GROUPS * QUERIES, VARLEN
    )
    row = tl.arange(0, ROWS)
    i = tile * (GROUPS * QUERIES) + row
    there = (row < GROUPS * QUERIES) & (i < end)
    at = batch * stride_cb + (start + i) * stride_cm + head * stride_ch
    last = (i + offset) // BLOCK
    group, word = tl.arange(0, ROWS // QUERIES), tl.arange(0, ROWS // BITS)
    c = tl.arange(0, 32)
    count = 0
    to = x.to(tl.int64) * cap
    # No query sees a block after that of the tile's last query.
    seen = (tl.minimum((tile + 1) * (GROUPS * QUERIES), end) - 1 + offset) // BLOCK + 1
    for n in range(tl.cdiv(tl.minimum(seen, cap), 32)):
        bits = tl.zeros([ROWS], tl.int32)
        if INTERPRETED:  # which walks a reduction of one's offset one element at a time
            for slot in range(slots):
                block = tl.load(chosen + at + slot * stride_cs, there, -1).to(tl.int32)
                here = (block >> 5 == n) & (block <= last)
                bits |= tl.where(here, 1 << (block & 31), 0)
        else:
            # The slots of a query lie together, those of its neighbour are far away.
            for first in range(0, slots, SLOTS):
                slot = first + tl.arange(0, SLOTS)
                inside = there[:, None] & (slot < slots)[None, :]
                block = tl.load(chosen + at[:, None] + (slot * stride_cs)[None, :], inside, -1)
                block = block.to(tl.int32)
                here = (block >> 5 == n) & (block <= last[:, None])
                bits |= tl.reduce(tl.where(here, 1 << (block & 31), 0), 1, either)
        bit = ((bits[:, None] >> c[None, :]) & 1) << (row % BITS)[:, None]
        # Of each query another bit: their sum is what all of them chose.
        member = tl.sum(tl.reshape(bit, [ROWS // BITS, BITS, 32]), 1)
        has = tl.max(tl.reshape((member != 0).to(tl.int32), [ROWS // QUERIES, WORDS, 32]), 1)
        who = tl.sum(has << group[:, None], 0)
        some = (who != 0).to(tl.int32)
        place = to + count + tl.cumsum(some, 0) - 1
        tl.store(blocks + place, (who << 24) | (n * 32 + c), mask=who != 0)
        at_word = place[None, :] * (GROUPS * WORDS) + word[:, None]
        inside = (who != 0)[None, :] & (word < GROUPS * WORDS)[:, None]
        tl.store(members + at_word, member, mask=inside)
        count += tl.sum(some, 0)
    tl.store(counts + x, count)


def unions_by_group(
    block_indices: torch.Tensor, queries: int, groups: int, call: Call
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What any of ``groups · queries`` neighbouring queries chose, with words for each group.

    For tiles with more than 32 queries.  Nothing is sorted: a program goes through all blocks that
    its queries see, and has room for as many.  Time and memory grow with the square of seq_len
    (4 · (words + 1) bytes for each tile and block), so this is for sequences of few blocks.

    Parameters
    ----------
    block_indices : ``[B, M, H, S]`` int32 or int64, −1 for an unused slot.
    queries : of a group: a power of two, at most 64.
    groups : that share a tile, at most 7.

    Returns
    -------
    tuple
        ``blocks`` ``[B, H, tiles, cap]`` int32, the first ``counts`` of them ascending, the rest
        undefined: the block in the lower 24 bits, and bit 24 + g is set when a query of group g
        chose it.  cap = blocks of the longest sequence.
        ``members`` ``[B, H, tiles, cap, words]`` int32: query i of the tile has bit i % 32 of word
        i // 32 or, where a group has fewer than 32 queries, bit i % queries of word i // queries.
        ``counts`` ``[B, H, tiles]`` int32.  Tiles as in :func:`unions`.
    """
    b, _, h, s = block_indices.shape
    each = -(-call.max_q // (groups * queries))
    tiles, cap = each * (call.sequences or 1), max(1, call.blocks)
    new = block_indices.new_empty
    blocks = new((b, h, tiles, cap), dtype=torch.int32)
    members = new((b, h, tiles, cap, groups * -(-queries // 32)), dtype=torch.int32)
    counts = new((b, h, tiles), dtype=torch.int32)
    if not counts.numel():
        return blocks, members, counts
    key = (queries, groups, *plan_key(call, block_indices))
    launch = launchers.get(key)
    if launch is None:
        launch = Launcher(
            unions_by_group_kernel,
            (counts.numel(),),
            (*block_indices.stride(), h, call.max_q, call.offset, tiles, s, cap),
            dict(BLOCK=call.block_size, QUERIES=queries, GROUPS=groups,
                 ROWS=queries * triton.next_power_of_2(groups),
                 SLOTS=min(16, triton.next_power_of_2(s)), VARLEN=call.cu is not None,
                 INTERPRETED=backend() == "interpreter"),
            Config(queries * groups, 0, 4, 1),
        )  # fmt: skip
        remember(key, launch)
    launch(block_indices, blocks, members, counts, call.cu)
    return blocks, members, counts


# -- the lists turned around -----------------------------------------------------------------------


@triton.jit
def keys_kernel(
    chosen, keys, used, cu, cu_blocks, stride_cb, stride_cm, stride_ch, stride_cs,
    heads, Nq, offset, slots, chunk, chunks, rows, shift, total,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    VARLEN: tl.constexpr, STEPS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """(list · (rows + 1) + block) of each choice; row ``rows`` takes those that do not count.

    ``used`` says of each choice whether it counts.
    """
    # Numbers of 64 bits only where they are needed: dividing them takes several times as long.
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [batch, head, chunk, query]
    if WIDE:
        x = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i, bh = (x % (chunk * chunks)).to(tl.int32), (x // (chunk * chunks)).to(tl.int64)
    there = (x < total) & (i < Nq)
    slot = tl.arange(0, SLOTS)
    at = bh // heads * stride_cb + bh % heads * stride_ch + i.to(tl.int64) * stride_cm
    at = at[:, None] + (slot * stride_cs)[None, :]
    inside = there[:, None] & (slot < slots)[None, :]
    block = tl.load(chosen + at, inside, -1).to(tl.int32)
    position, first = i + offset, tl.zeros([ROWS], tl.int32)
    if VARLEN:
        sequence = find_sequence(cu, i, SEQUENCES, STEPS)
        position = i - tl.load(cu + sequence).to(tl.int32)
        first = tl.load(cu_blocks + sequence).to(tl.int32)
    fine = inside & (block >= 0) & (block <= (position // BLOCK)[:, None])
    for other in range(slots):  # named before, in a slot further to the left
        named = tl.sum(tl.where((slot == other)[None, :], block, 0), 1)
        fine &= (slot <= other)[None, :] | (block != named[:, None])
    list_ = (x // chunk).to(tl.int64)
    key = list_[:, None] * (rows + 1) + tl.where(fine, block + first[:, None], rows)
    to, inside = x[:, None] * slots + slot[None, :], (x < total)[:, None] & (slot < slots)[None, :]
    tl.store(keys + to, key - shift, mask=inside)
    tl.store(used + to, fine.to(tl.int8), mask=inside)


@triton.jit
def order_kernel(
    keys, places, order, slots, each, rows, shift, total, chunks,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, WIDE_KEY: tl.constexpr,
):  # fmt: skip
    """From places in the sorted list to queries (or slots): −1 for choices that do not count."""
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = x < total
    key = tl.load(keys + x, there, 0)
    key = key.to(tl.int64 if WIDE_KEY else tl.int32) + shift
    place = tl.load(places + x, there, 0)
    if not WIDE:
        place = place.to(tl.int32)
    chosen = place % each + (place // each % chunks) * each  # query · S + slot, of its sequence
    out = chosen // slots if QUERIES else chosen
    tl.store(order + x, tl.where(key % (rows + 1) == rows, -1, out).to(tl.int32), mask=there)


# The sort takes seconds to compile: once for all lengths.
@triton.jit(do_not_specialize=["heads", "Nq", "offset", "chunk", "chunks", "rows", "tiles"])
def tile_kernel(
    chosen, keys, ends, used, stride_cb, stride_cm, stride_ch, stride_cs,
    heads, Nq, offset, chunk, chunks, rows, tiles,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, LOG: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The choices of a tile of neighbouring queries, sorted by block, then as they were.

    A key is block · 2^LOG + (slot of the tile); block ``rows`` takes the choices that do not count.
    ``ends`` are two int16 for each block that was chosen: its first place, and one past its last.
    """
    WIDTH: tl.constexpr = 2**LOG
    QUERIES: tl.constexpr = WIDTH // SLOTS
    x = tl.program_id(0)  # [batch, head, chunk, tile]
    list_, tile = x // tiles, x % tiles
    bh, range_ = list_ // chunks, list_ % chunks
    e = tl.arange(0, WIDTH)[None, :]
    of_range = tile * QUERIES + e // SLOTS
    i = range_ * chunk + of_range
    there = (e < QUERIES * SLOTS) & (of_range < chunk)
    at = (bh // heads).to(tl.int64) * stride_cb + (bh % heads).to(tl.int64) * stride_ch
    at = at + i.to(tl.int64) * stride_cm + (e % SLOTS) * stride_cs
    block = tl.load(chosen + at, there & (i < Nq), -1).to(tl.int32)
    fine = (block >= 0) & (block <= (i + offset) // BLOCK)
    used += (list_.to(tl.int64) * chunk + tile * QUERIES) * SLOTS
    tl.store(used + e, fine.to(tl.int8), mask=there)
    key = tl.where(there, (tl.where(fine, block, rows) << LOG) + e, _UNUSED)

    # -- sort; once more without the choices that were named before, if there were any -----------
    keys += x.to(tl.int64) * WIDTH
    again = 1
    while again > 0:
        key = _ascending(key, e, LOG, INTERPRETED)
        tl.debug_barrier()  # nobody reads the keys of the round before any longer
        tl.store(keys + e, key)
        tl.debug_barrier()  # a neighbour's key may be another thread's
        before = tl.load(keys + e - 1, e > 0, _UNUSED)
        row, slot, slot_before = key >> LOG, key & (WIDTH - 1), before & (WIDTH - 1)
        named = (row == before >> LOG) & (slot // SLOTS == slot_before // SLOTS) & (row < rows)
        again = tl.max(tl.max(named.to(tl.int32), 1), 0)
        if again > 0:
            tl.store(used + slot, tl.zeros([1, WIDTH], tl.int8), mask=named)
            key = tl.where(named, (rows << LOG) + slot, key)

    # -- where each block stands -----------------------------------------------------------------
    row = key >> LOG
    before = tl.load(keys + e - 1, e > 0, _UNUSED)
    after = tl.load(keys + e + 1, e < WIDTH - 1, _UNUSED)
    ends += x.to(tl.int64) * (rows + 1) * 2
    tl.store(ends + 2 * row, e.to(tl.int16), mask=(row <= rows) & (row != before >> LOG))
    last = (row != after >> LOG) | (e == WIDTH - 1)
    tl.store(ends + 2 * row + 1, (e + 1).to(tl.int16), mask=(row <= rows) & last)


@triton.jit(do_not_specialize=["rows", "tiles"])
def shift_kernel(ends, counts, rows, tiles, TILES: tl.constexpr, ROWS: tl.constexpr):
    """From the place in a sorted tile to the place in a block's list, for each tile and block.

    Both count upwards within a block, so what leads from one to the other is a number.  It takes
    the place of the two ends, here one int32.
    """
    list_ = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    count = tl.zeros([ROWS], tl.int32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (row <= rows)[None, :]
        at = (list_.to(tl.int64) * tiles + tile)[:, None] * (rows + 1) + row[None, :]
        both = tl.load(ends + at, inside, 0)
        begin = both & 0xFFFF
        here = (both >> 16) - begin
        earlier = count[None, :] + tl.cumsum(here, 0) - here
        tl.store(ends + at, earlier - begin, mask=inside)
        count += tl.sum(here, 0)
    # One further: a running sum makes the beginnings of them.
    tl.store(counts + list_.to(tl.int64) * (rows + 1) + row + 1, count, mask=row < rows)


@triton.jit(do_not_specialize=["chunk", "chunks", "rows", "tiles"])
def place_kernel(
    keys, shifts, starts, order, chunk, chunks, rows, tiles,
    SLOTS: tl.constexpr, LOG: tl.constexpr, QUERIES_ONLY: tl.constexpr,
):  # fmt: skip
    """Each choice of a sorted tile goes to its place."""
    WIDTH: tl.constexpr = 2**LOG
    x = tl.program_id(0)
    list_, tile = x // tiles, x % tiles
    e = tl.arange(0, WIDTH)
    key = tl.load(keys + x.to(tl.int64) * WIDTH + e)
    row, slot = key >> LOG, key & (WIDTH - 1)
    inside = row <= rows
    place = tl.load(starts + list_.to(tl.int64) * (rows + 1) + row, inside, 0) + e
    place += tl.load(shifts + x.to(tl.int64) * (rows + 1) + row, inside, 0)
    query = list_ % chunks * chunk + tile * (WIDTH // SLOTS)
    out = query + slot // SLOTS if QUERIES_ONLY else query * SLOTS + slot
    order += list_.to(tl.int64) * chunk * SLOTS
    tl.store(order + place, tl.where(row == rows, -1, out), mask=inside)


def by_block(
    block_indices: torch.Tensor, call: Call, n_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block the queries that chose it, ascending.

    Parameters
    ----------
    block_indices : ``[B, M, H, S]`` int32 or int64, −1 for an unused slot.
    n_k : keys in all.

    Returns
    -------
    tuple
        ``order`` ``[B, H, M · S]`` int32, list after list; the tail of unused slots holds −1.
        ``starts`` ``[B, H, blocks + 1]`` int32: block c's list is
        ``order[starts[c]:starts[c + 1]]``.  With varlen block c of sequence s stands in row
        ``cu_blocks[s] + c``.
    """
    order, starts, _ = _turned(block_indices, call, n_k, block_indices.shape[1], queries=True)
    return order[:, :, 0], starts[:, :, 0]


def by_slot(
    block_indices: torch.Tensor, call: Call, n_k: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for ranges of ``chunk`` queries, naming the slot as well.

    Returns
    -------
    tuple
        ``order`` ``[B, H, chunks, chunk · S]`` int32: query · S + slot, list after list, then −1.
        ``starts`` ``[B, H, chunks, blocks + 1]`` int32.  ``used``
        ``[B, H, chunks, chunk · S]`` int8: 1 where the slot of the query holds a choice that
        counts.
    """
    return _turned(block_indices, call, n_k, chunk, queries=False)


#: how lists are turned: True counts, False sorts; None: as :func:`_counts` says
COUNTING = None
#: choices of a tile that is sorted at once: the fewest, the most, and how many for each row
_LEAST, _MOST, _PER_ROW = 2**9, 2**10, 2
#: choices that a warp sorts
_OF_WARP = 2**9
#: with more rows the counts would take more than 8 bytes for each choice, which has 4
_ROWS = 2048


def _counts(rows: int, slots: int, call: Call) -> bool:
    """Whether lists are turned by counting: less memory and work, but for few enough rows."""
    if call.cu is not None or rows > _ROWS or slots > _MOST:
        return False
    # The interpreter takes a program at a time, and the sort has a single one.
    return backend() != "interpreter" if COUNTING is None else COUNTING


def _log_width(rows: int, slots: int) -> int:
    """log₂ of the choices of a tile."""
    return (max(slots, min(_MOST, max(_LEAST, _PER_ROW * rows))) - 1).bit_length()


def _turned(block_indices, call: Call, n_k: int, chunk: int, *, queries: bool):
    """``order`` ``[B, H, chunks, chunk · S]``, ``starts`` and ``used``; see :func:`by_slot`.

    ``queries``: ``order`` names queries; else query · S + slot.
    """
    b, m, h, s = block_indices.shape
    rows = block_rows(call, n_k)
    chunks = max(1, -(-m // max(1, chunk)))
    new = block_indices.new_empty
    order = new((b, h, chunks, chunk * s), dtype=torch.int32)
    used = new((b, h, chunks, chunk * s), dtype=torch.int8)
    if order.numel() == 0:
        return order, new((b, h, chunks, rows + 1), dtype=torch.int32).zero_(), used
    turn = _by_counting if _counts(rows, s, call) else _by_sorting
    starts = turn(block_indices, order, used, call, rows, chunk, queries)
    return order, starts.view(b, h, chunks, rows + 1), used


def _by_counting(block_indices, order, used, call: Call, rows: int, chunk: int, queries: bool):
    """A counting sort, a tile of neighbouring queries at a time.

    Tiles are sorted within; what the tiles before hold of each block says where a tile's choices
    of it go.  Memory beside the results: 4 bytes for each place of a tile, and 4 for each block of
    each tile, which are 4 · rows / 2^log for each place.
    """
    _, m, h, s = block_indices.shape
    chunks, each = order.shape[2:]
    lists = order.numel() // each
    log = _log_width(rows, s)
    tiles = triton.cdiv(chunk, 2**log // s)
    keys = order.new_empty((lists * tiles, 2**log))
    ends = order.new_zeros((lists * tiles, rows + 1))
    tile_kernel[(lists * tiles,)](
        block_indices, keys, ends.view(torch.int16), used, *block_indices.stride(),
        h, m, call.offset, chunk, chunks, rows, tiles,
        BLOCK=call.block_size, SLOTS=s, LOG=log, INTERPRETED=backend() == "interpreter",
        num_warps=max(1, 2**log // _OF_WARP),
    )  # fmt: skip
    counts = order.new_zeros((lists, rows + 1))
    shift_kernel[(lists, triton.cdiv(rows + 1, 32))](
        ends, counts, rows, tiles, TILES=64, ROWS=32, num_warps=4,
    )  # fmt: skip
    starts = torch.cumsum(counts, -1, dtype=torch.int32)
    place_kernel[(lists * tiles,)](
        keys, ends, starts, order, chunk, chunks, rows, tiles,
        SLOTS=s, LOG=log, QUERIES_ONLY=queries, num_warps=max(1, 2**log // 512),
    )  # fmt: skip
    return starts


def _by_sorting(block_indices, order, used, call: Call, rows: int, chunk: int, queries: bool):
    """A stable sort by block leaves the queries of one block in order.

    Keys that fit are kept in 16 bits: a radix sort passes over them half as often.
    """
    _, m, h, s = block_indices.shape
    chunks, each = order.shape[2:]
    total, device = order.numel(), order.device
    lists = total // each
    highest = lists * (rows + 1)
    dtype, shift = torch.int64, 0
    if highest <= 2**16:
        dtype, shift = torch.int16, 2**15
    elif highest < 2**31:
        dtype = torch.int32
    keys = order.new_empty((total,), dtype=dtype)
    wide = triton.next_power_of_2(s)
    tall = max(1, (2**14 if backend() == "interpreter" else 1024) // wide)
    keys_kernel[(triton.cdiv(total // s, tall),)](
        block_indices, keys, used, call.cu, call.cu_blocks, *block_indices.stride(),
        h, m, 0 if call.cu is not None else call.offset, s, chunk, chunks, rows, shift,
        total // s, BLOCK=call.block_size, SLOTS=wide, ROWS=tall, WIDE=total >= 2**30,
        VARLEN=call.cu is not None, STEPS=steps_for(call), SEQUENCES=call.sequences or 1,
        num_warps=4,
    )  # fmt: skip
    keys, places = torch.sort(keys, stable=True)
    order_kernel[(triton.cdiv(total, 1024),)](
        keys, places, order, s, each, rows, shift, total, chunks,
        QUERIES=queries, BLOCK=1024, WIDE=total >= 2**30, WIDE_KEY=highest >= 2**30,
        num_warps=4,
    )  # fmt: skip
    first = torch.arange(lists, device=device, dtype=torch.int64)[:, None] * (rows + 1)
    wanted = first + torch.arange(rows + 1, device=device) - shift
    starts = torch.searchsorted(keys, wanted.to(dtype), out_int32=True)
    begin = torch.arange(lists, device=device, dtype=torch.int32)[:, None] * each
    return starts - begin


def parts(starts: torch.Tensor, size: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut every list into parts of at most ``size``; which block each part belongs to.

    Parameters
    ----------
    starts : ``[…, blocks + 1]`` int32, from :func:`by_block`.
    size : entries of a part.
    most : entries of all lists together, at most.

    Returns
    -------
    tuple
        ``owner`` ``[…, most // size + blocks]`` int32: the block of each part; ``blocks`` where
        there is no such part.  ``first`` ``[…, blocks + 1]`` int32: the number of a block's first
        part.
    """
    rows = starts.shape[-1] - 1
    first = torch.zeros_like(starts)
    torch.cumsum((starts.diff(dim=-1) + (size - 1)) // size, -1, out=first[..., 1:])
    numbers = torch.arange(most // size + rows, device=starts.device, dtype=torch.int32)
    numbers = numbers.expand(*starts.shape[:-1], -1).contiguous()
    owner = torch.searchsorted(first[..., 1:].contiguous(), numbers, right=True, out_int32=True)
    return owner, first
