r"""The forward kernel by hand on Hopper: one warp loads, two or three warpgroups multiply.

The mathematics is that of :mod:`labkit.flash.forward`.  With :math:`c = \text{scale}\cdot\log_2 e`
and the tiles of keys taken from the right end,

.. math::
    S_j = Q K_j^\top, \quad m_j = \max(m_{j+1}, \mathrm{rowmax}\, S_j), \quad
    P_j = 2^{\,c S_j - c m_j}, \quad \alpha_j = 2^{\,c m_{j+1} - c m_j}

.. math::
    l_j = \alpha_j l_{j+1} + \mathrm{rowsum}\, P_j, \qquad O_j = \alpha_j O_{j+1} + P_j V_j .

What changes is *who does it and when*.  Triton decides that itself; Gluon
(``triton.experimental.gluon``), the language below it, leaves it to us.  Four decisions:

1. **A warp that only loads.**  It asks the copy engine (TMA) for the tiles of Q, K and V and does
   nothing else.  That takes few registers, and ``setmaxnreg`` gives what it leaves to the others.
2. **Warpgroups that only compute**, each with 64 rows of the tile of queries.  The four warps of a
   group issue one ``wgmma``: a product of 64 rows whose left factor lies in registers or in shared
   memory and whose right factor lies in shared memory.  The groups do not wait for each other:
   while one is at its softmax, the products of another keep the tensor cores busy.
3. **Two products in flight** (``OVERLAP``).  ``wgmma`` is asynchronous.  A group issues the scores
   of the next tile before the product with V of this one, waits for the older of the two, and
   takes its softmax while the younger runs::

       tensor cores  | S_j | P_j+1 V_j+1            |     | S_j-1 | P_j V_j ...
       this group    |     | max, exp, sum of S_j   | α O |       | max, exp, sum of S_j-1

4. **P stays in registers.**  The accumulator of one ``wgmma`` has the layout that the next wants
   of a left factor: the rounding to 16 bits is all that is left to do.

**Near windows** need one decision more.  A row then sees a few tiles of keys, and a program that
does one tile of queries spends a good part of its life waiting: for its first keys at the start,
for its output to leave at the end.  There each multiprocessor gets one program, which takes its
tiles of queries in ``TURNS``: the loader brings the next Q while this one is worked on.

At head_dim 128 a group needs the registers of decision 3 (S, P and O of 64 rows, at once), and two
groups of 240 registers a thread fill the multiprocessor.  At head_dim 64 the exponentials take
as long as the products, and it pays more to have a third group: three of 160 registers, which
leave no room for a second tile of scores.  They overlap each other instead of themselves.

Tiles travel through rings of ``STAGES`` slots in shared memory.  A slot has two barriers
(``mbarrier``): *full*, completed by the copy engine when the bytes have landed, and *empty*,
completed when the last consumer has read the slot.  A barrier counts phases, and a wait names one
by its parity: use number u of a slot waits for parity u mod 2 of *full*; the loader, one lap
ahead, for the other parity of *empty*, which a fresh barrier lets through.

What was tried and gave nothing or less on an H200 (chapter 08 quotes what was kept):

- turns, so that the groups strictly alternate between products and softmax: no gain.  Waiting for
  the tensor cores seems to make them alternate anyway;
- one program per multiprocessor that takes its tiles in a fixed order: no gain without a mask and
  a loss with one, where tiles differ in length.  The hardware hands out the next tile when a
  multiprocessor is free, and no fixed order knows when that is.  Under a near window nearly all
  tiles of queries are equally long, and there it stayed;
- one or two of four exponentials as a polynomial on the multiply-add units: no gain, and a loss;
- one group of eight warps for 128 rows instead of two of four: a clear loss.  They wait for each
  other at every barrier;
- tiles of 64 keys where no window is near: a loss.  Each tile brings its rescaling of O and its
  barriers.

The design follows FlashAttention-3 (Shah et al. 2024).

Taught in chapter 08 (the forward kernel).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from labkit.flash.forward import which_tile
from labkit.flash.gluon import (
    Described,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    off_hopper,
    tma,
    unreadable,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from labkit.flash.masking import key_bounds
from labkit.flash.tuning import NEAR, Config, Problem

__all__ = ["CONFIGS", "candidates", "forward", "plan", "supports"]

# One compilation for all sizes: nothing here gets faster by knowing that one of them is 1.
_kernel = jit(
    do_not_specialize=(
        "heads", "all_heads", "share", "Nq", "Nk", "tiles", "section", "window",
    )
)  # fmt: skip

#: by head_dim rounded up: "overlap" is decision 3 with two groups, "three" three groups without
CONFIGS = {
    64: [
        Config(192, 128, 4, 3, True, "three"),
        Config(128, 128, 4, 3, True, "overlap"),
    ],
    128: [Config(128, 128, 4, 2, True, "overlap")],
}
#: the same where a window is near (``tuning.NEAR``): fewer scores of narrow tiles are masked
_NEAR = {
    64: [
        Config(192, 64, 4, 4, True, "three"),
        Config(128, 64, 4, 4, True, "overlap"),
        *CONFIGS[64],
    ],
    128: [
        Config(128, 64, 4, 4, True, "overlap"),
        Config(192, 64, 4, 3, True, "three"),
        *CONFIGS[128],
    ],
}

#: groups that compute, registers per thread of theirs, and of the loader.  A multiprocessor has
#: 65,536 and hands them out to whole groups of 128 threads, the loader's included:
#: 128 · (2 · 240 + 24) = 64,512 and 128 · (3 · 160 + 32) = 65,536.
_GROUPS = {"overlap": (2, 240, 24), "three": (3, 160, 32)}


# -- which keys ------------------------------------------------------------------------------------


@jit
def _key_tiles(
    first, rows, Nq, Nk, window,
    BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """``begin, full_begin, full_end, end``: ``masking.key_bounds`` counted in tiles.

    At least one tile, even if nothing in it is seen, and the last tile always counts as one that
    needs the mask: the pipeline starts with it.
    """
    lo, full_lo, full_hi, hi = key_bounds(
        first, first + rows, Nq, Nk, window, BLOCK_N, CAUSAL, WINDOW
    )
    end = max((hi + BLOCK_N - 1) // BLOCK_N, 1)
    begin = min(lo // BLOCK_N, end - 1)
    full_end = min(max(full_hi // BLOCK_N, begin), end - 1)
    full_begin = min(max(full_lo // BLOCK_N, begin), full_end)
    return begin, full_begin, full_end, end


@jit
def _hide(
    s, row, key, Nq, Nk, window,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """``masking.hide`` with one comparison per score: a row sees the keys below its limit."""
    at = row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, S)) + (Nk - Nq)
    j = key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S))
    if CAUSAL:
        seen = j[None, :] < gl.minimum(at + 1, Nk)[:, None]
    elif WINDOW:
        seen = j[None, :] < gl.minimum(at + window, Nk)[:, None]
    else:
        seen, s = gl.broadcast((j < Nk)[None, :], s)
    if WINDOW:
        seen = seen & (j[None, :] > (at - window)[:, None])
    return gl.where(seen, s, float("-inf"))


@jit
def _place(at, order, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr):
    """Batch element, head, KV head, first element of LSE and first row of a tile of queries."""
    tiles, heads, all_heads, share, section, Nq = order
    # Under a causal mask the longest tiles start first, `section` heads at a time.
    tile, bh = which_tile(at, tiles, all_heads, section, CAUSAL)
    head = bh % heads
    return bh // heads, head, head // share, bh.to(gl.int64) * Nq, tile * BLOCK_M


# -- the loader ------------------------------------------------------------------------------------


@jit
def _fetch(described, batch, head, row, n, tiles, full, empty, STAGES: gl.constexpr):
    """Copy rows ``row …`` of a head into the ring, as its tile number ``n``."""
    slot = n % STAGES
    mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), described.block_type.nbytes)
    _copy(described, batch, head, row, full.index(slot), tiles.index(slot))


@jit
def _copy(described, batch, head, row, full, tile):
    # A descriptor of [batch, heads, seq_len, d] gives zeros beyond the sequence's end, not the
    # next head's rows.  Its tiles are [1, 1, rows, d]: the same bytes as [rows, d].
    into = tile._reinterpret(described.dtype, described.block_shape, described.layout)
    tma.async_copy_global_to_shared(described, [batch, head, row, 0], full, into)


@jit
def _load(
    args,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One warp: all that the tiles of queries of this program need, in their order."""
    n, turn, order = 0, 0, args[6]
    if TURNS > 1:
        for at in range(gl.program_id(0), order[0] * order[2], gl.num_programs(0)):
            n = _load_tile(
                args, at, turn, n,
                BLOCK_M, BLOCK_N, STAGES, GROUPS, CAUSAL, WINDOW, TURNS,
            )  # fmt: skip
            turn += 1
    else:
        _load_tile(
            args, gl.program_id(0), turn, n,
            BLOCK_M, BLOCK_N, STAGES, GROUPS, CAUSAL, WINDOW, TURNS,
        )  # fmt: skip


@jit
def _load_tile(
    args, at, turn, n,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Q once, then K and V of each tile of keys, as the slots become empty."""
    q, k, v, Q, ring, queue, order, sizes = args
    K, V, k_full, k_empty, v_full, v_empty = ring
    q_full, q_empty = queue
    batch, head, kv_head, _, first = _place(at, order, BLOCK_M, CAUSAL)
    Nq, Nk, window = sizes
    begin, _, _, end = _key_tiles(first, BLOCK_M, Nq, Nk, window, BLOCK_N, CAUSAL, WINDOW)

    slot = turn % TURNS
    if TURNS > 1:
        mbarrier.wait(q_empty.index(slot), ((turn // TURNS) & 1) ^ 1)
    mbarrier.expect(q_full.index(slot), GROUPS * q.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        row = first + group * (BLOCK_M // GROUPS)
        _copy(q, batch, head, row, q_full.index(slot), Q.index(slot * GROUPS + group))
    for i in range(end - begin):
        key = (end - 1 - i) * BLOCK_N
        _fetch(k, batch, kv_head, key, n + i, K, k_full, k_empty, STAGES)
        _fetch(v, batch, kv_head, key, n + i, V, v_full, v_empty, STAGES)
    return n + (end - begin)


# -- the consumers ---------------------------------------------------------------------------------


@jit
def _softmax(s, m, l, c):
    """``P, m', l', α`` of a tile of scores.

    A row may have no visible key so far.  Then m' is −∞ and −∞ − (−∞) would be NaN; with 0 in its
    place P and α come out as 0.
    """
    m_new = gl.maximum(m, gl.max(s, 1))
    finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2((m - finite) * c)
    p = gl.exp2(s * c - (finite * c)[:, None])
    return p, m_new, l * alpha + gl.sum(p, 1), alpha


@jit
def _scores(q, n, ring, S: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Issue QKᵀ for tile number ``n`` of the ring, once it is there."""
    K, _, k_full, _, _, _ = ring
    mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
    K_T = K.index(n % STAGES).permute([1, 0])
    return warpgroup_mma(q, K_T, nothing, use_acc=False, is_async=True)


@jit
def _overlapped(
    last, count, row, n, q, ring, p, m, l, o, c, sizes,
    S: gl.constexpr, O: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Take ``count`` tiles of keys, from ``last`` downwards; two products in flight.

    ``n`` is the number of tiles that came through the ring before.  ``p`` is P of the tile before
    in float32; its product with V is still to do.
    """
    _, V, _, k_empty, v_full, v_empty = ring
    Nq, Nk, window = sizes
    for i in range(count):
        now, before = n % STAGES, (n - 1) % STAGES
        s = _scores(q, n, ring, S, ROWS, BLOCK_N, STAGES)
        # Rounded here and not when it was made: 16-bit values that live through a loop take a
        # register each, and packing two into one would cost an instruction more.
        P = gl.convert_layout(p.to(V.dtype), gl.DotOperandLayout(0, O, 2))
        o = warpgroup_mma(P, V.index(before), o, is_async=True)

        s = warpgroup_mma_wait(1, [s])  # all but the youngest: S is there, PV runs on
        mbarrier.arrive(k_empty.index(now), count=1)
        if MASKED:
            s = _hide(s, row, (last - i) * BLOCK_N, Nq, Nk, window, CAUSAL, WINDOW, S)
        p, m, l, alpha = _softmax(s, m, l, c)

        # The assembler moves arithmetic across wgmma's own wait, exponentials to behind it too,
        # and then nothing overlaps.  It does not move them across the loop of a barrier's wait:
        # asking for the V that is needed next, here, keeps them where they are.
        mbarrier.wait(v_full.index(now), (n // STAGES) & 1)
        o = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_empty.index(before), count=1)
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
        n += 1
    return p, m, l, o, n


@jit
def _in_turn(
    last, count, row, n, q, ring, m, l, o, c, sizes,
    S: gl.constexpr, O: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The same with one product at a time: what overlaps is the work of the other groups."""
    _, V, _, k_empty, v_full, v_empty = ring
    Nq, Nk, window = sizes
    for i in range(count):
        slot = n % STAGES
        s = _scores(q, n, ring, S, ROWS, BLOCK_N, STAGES)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(slot), count=1)
        if MASKED:
            s = _hide(s, row, (last - i) * BLOCK_N, Nq, Nk, window, CAUSAL, WINDOW, S)
        p, m, l, alpha = _softmax(s, m, l, c)
        P = gl.convert_layout(p.to(V.dtype), gl.DotOperandLayout(0, O, 2))
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
        mbarrier.wait(v_full.index(slot), (n // STAGES) & 1)
        o = warpgroup_mma(P, V.index(slot), o, is_async=True)
        o = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_empty.index(slot), count=1)
        n += 1
    return m, l, o, n


@jit
def _pass_over(count, n, ring, STAGES: gl.constexpr):
    """Give back tiles of which no row of this group sees a key; the other groups need them."""
    _, _, k_full, k_empty, v_full, v_empty = ring
    for _i in range(count):
        slot, parity = n % STAGES, (n // STAGES) & 1
        mbarrier.wait(k_full.index(slot), parity)
        mbarrier.arrive(k_empty.index(slot), count=1)
        mbarrier.wait(v_full.index(slot), parity)
        mbarrier.arrive(v_empty.index(slot), count=1)
        n += 1
    return n


@jit
def _attend(
    args,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TURNS: gl.constexpr,
    OVERLAP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup: its rows of each tile of queries of this program."""
    n, turn, order = 0, 0, args[6]
    if TURNS > 1:
        for at in range(gl.program_id(0), order[0] * order[2], gl.num_programs(0)):
            n = _attend_tile(
                args, at, turn, n,
                BLOCK_M, BLOCK_N, D, STAGES, GROUPS, CAUSAL, WINDOW, TURNS, OVERLAP, GROUP,
            )  # fmt: skip
            turn += 1
    else:
        _attend_tile(
            args, gl.program_id(0), turn, n,
            BLOCK_M, BLOCK_N, D, STAGES, GROUPS, CAUSAL, WINDOW, TURNS, OVERLAP, GROUP,
        )  # fmt: skip
    tma.store_wait(0)


@jit
def _attend_tile(
    args, at, turn, n,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TURNS: gl.constexpr,
    OVERLAP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """(m, l, O) of 64 rows over all tiles of keys, then O / l and LSE."""
    out, lse, scale, Q, ring, queue, order, sizes = args
    _, V, _, k_empty, v_full, v_empty = ring
    q_full, q_empty = queue
    batch, head, _, lse_row, first = _place(at, order, BLOCK_M, CAUSAL)
    Nq, Nk, window = sizes
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    WARPS: gl.constexpr = gl.num_warps()
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    c = scale * 1.4426950408889634  # log2(e)

    row = first + GROUP * ROWS
    begin, full_begin, full_end, end = _key_tiles(
        row, ROWS, Nq, Nk, window, BLOCK_N, CAUSAL, WINDOW
    )
    tile_begin, _, _, tile_end = _key_tiles(first, BLOCK_M, Nq, Nk, window, BLOCK_N, CAUSAL, WINDOW)
    if CAUSAL or WINDOW:
        n = _pass_over(tile_end - end, n, ring, STAGES)

    m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    l = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S))
    o = gl.zeros([ROWS, D], gl.float32, layout=O)
    if TURNS > 1:  # noqa: SIM102 (one is known when compiling, the other is not)
        if turn > 0:
            # The output of the tile before has left by now: its place may hold the Q after next.
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index((turn - 1) % TURNS), count=1)
    q = Q.index(turn % TURNS * GROUPS + GROUP)
    mbarrier.wait(q_full.index(turn % TURNS), (turn // TURNS) & 1)
    if OVERLAP:
        # The first tile has no product before it.
        slot = n % STAGES
        s = warpgroup_mma_wait(0, [_scores(q, n, ring, S, ROWS, BLOCK_N, STAGES)])
        mbarrier.arrive(k_empty.index(slot), count=1)
        s = _hide(s, row, (end - 1) * BLOCK_N, Nq, Nk, window, CAUSAL, WINDOW, S)
        p, m, l, _ = _softmax(s, m, l, c)
        mbarrier.wait(v_full.index(slot), (n // STAGES) & 1)
        n += 1
        p, m, l, o, n = _overlapped(
            end - 2, end - 1 - full_end, row, n, q, ring, p, m, l, o, c, sizes,
            S, O, ROWS, BLOCK_N, STAGES, CAUSAL, WINDOW, True,
        )  # fmt: skip
        p, m, l, o, n = _overlapped(
            full_end - 1, full_end - full_begin, row, n, q, ring, p, m, l, o, c, sizes,
            S, O, ROWS, BLOCK_N, STAGES, CAUSAL, WINDOW, False,
        )  # fmt: skip
        if WINDOW:
            p, m, l, o, n = _overlapped(
                full_begin - 1, full_begin - begin, row, n, q, ring, p, m, l, o, c, sizes,
                S, O, ROWS, BLOCK_N, STAGES, CAUSAL, WINDOW, True,
            )  # fmt: skip
        # And the last product has no scores to run with.
        slot = (n - 1) % STAGES
        P = gl.convert_layout(p.to(V.dtype), gl.DotOperandLayout(0, O, 2))
        o = warpgroup_mma(P, V.index(slot), o, is_async=True)
        o = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_empty.index(slot), count=1)
    else:
        m, l, o, n = _in_turn(
            end - 1, end - full_end, row, n, q, ring, m, l, o, c, sizes,
            S, O, ROWS, BLOCK_N, STAGES, CAUSAL, WINDOW, True,
        )  # fmt: skip
        m, l, o, n = _in_turn(
            full_end - 1, full_end - full_begin, row, n, q, ring, m, l, o, c, sizes,
            S, O, ROWS, BLOCK_N, STAGES, CAUSAL, WINDOW, False,
        )  # fmt: skip
        if WINDOW:
            m, l, o, n = _in_turn(
                full_begin - 1, full_begin - begin, row, n, q, ring, m, l, o, c, sizes,
                S, O, ROWS, BLOCK_N, STAGES, CAUSAL, WINDOW, True,
            )  # fmt: skip
    if WINDOW:
        n = _pass_over(begin - tile_begin, n, ring, STAGES)

    # A row that saw no key has l = 0 and O = 0: its output is 0 and its LSE −∞.
    i = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    gl.store(lse + lse_row + i, m * scale + gl.log(l), mask=i < Nq)
    weight = gl.convert_layout(1.0 / gl.where(l == 0.0, 1.0, l), gl.SliceLayout(1, O))
    # Nobody reads this group's part of Q any more: O leaves through it, and the copy engine
    # leaves out the rows beyond Nq.
    q.store((o * weight[:, None]).to(V.dtype))
    fence_async_shared()
    tile = q._reinterpret(V.dtype, out.block_shape, out.layout)
    tma.async_copy_shared_to_global(out, [batch, head, row, 0], tile)
    return n


# -- the program -----------------------------------------------------------------------------------


@_kernel
def forward_kernel(
    q, k, v, o, lse,
    scale, heads, all_heads, share, Nq, Nk, tiles, section, window,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TURNS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers and places, then each warp goes to its own work."""
    WARPS: gl.constexpr = gl.num_warps()
    # 128-byte rows, their 16-byte pieces permuted: what TMA writes and wgmma reads unconflicted.
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    Q = gl.allocate_shared_memory(q.dtype, [TURNS * GROUPS, BLOCK_M // GROUPS, D], TILE)
    K = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_N, D], TILE)
    V = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_N, D], TILE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [TURNS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [TURNS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for slot in gl.static_range(TURNS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=GROUPS)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=GROUPS)
        mbarrier.init(v_empty.index(slot), count=GROUPS)
    fence_async_shared()  # the copy engine must see the barriers before it completes them

    ring, sizes = (K, V, k_full, k_empty, v_full, v_empty), (Nq, Nk, window)
    queue, order = (q_full, q_empty), (tiles, heads, all_heads, share, section, Nq)
    loads = (q, k, v, Q, ring, queue, order, sizes)
    work = (o, lse, scale, Q, ring, queue, order, sizes)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _attend,
                    (work, BLOCK_M, BLOCK_N, D, STAGES, GROUPS, CAUSAL, WINDOW, TURNS, OVERLAP, 0),
                ),
                (
                    _attend,
                    (work, BLOCK_M, BLOCK_N, D, STAGES, GROUPS, CAUSAL, WINDOW, TURNS, OVERLAP, 1),
                ),
                (_load, (loads, BLOCK_M, BLOCK_N, STAGES, GROUPS, CAUSAL, WINDOW, TURNS)),
            ],
            [WARPS, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _attend,
                    (work, BLOCK_M, BLOCK_N, D, STAGES, GROUPS, CAUSAL, WINDOW, TURNS, OVERLAP, 0),
                ),
                (
                    _attend,
                    (work, BLOCK_M, BLOCK_N, D, STAGES, GROUPS, CAUSAL, WINDOW, TURNS, OVERLAP, 1),
                ),
                (
                    _attend,
                    (work, BLOCK_M, BLOCK_N, D, STAGES, GROUPS, CAUSAL, WINDOW, TURNS, OVERLAP, 2),
                ),
                (_load, (loads, BLOCK_M, BLOCK_N, STAGES, GROUPS, CAUSAL, WINDOW, TURNS)),
            ],
            [WARPS, WARPS, 1],
            [REGISTERS, REGISTERS, LOADER_REGISTERS],
        )


# -- launching -------------------------------------------------------------------------------------


def _width(d: int, dv: int) -> int:
    """Columns of a tile: the copy engine fills with zeros what the heads do not have."""
    return max(64, triton.next_power_of_2(max(d, dv)))


def candidates(problem: Problem) -> list[Config]:
    """The configurations worth timing for ``problem``; none if the heads are too wide.

    A tile of 192 queries needs that many.
    """
    known = _NEAR if problem.near else CONFIGS
    found = known.get(_width(problem.head_dim, problem.head_dim_v), [])
    return [c for c in found if c.block_m <= max(128, problem.rows)]


class _Plan:
    """All of a launch but the tensors; see :func:`plan`."""

    def __init__(self, q, k, v, o, lse, call, config: Config) -> None:
        from labkit.flash.launch import Launcher, card

        (batch, heads, n_q, d), (kv_heads, n_k) = q.shape, k.shape[1:3]
        groups, registers, loader_registers = _GROUPS[config.by_hand]
        width, share = _width(d, v.shape[3]), heads // kv_heads
        tiles, all_heads = triton.cdiv(n_q, config.block_m), batch * heads
        # As many heads as have their K and V in half of L2.
        section = max(1, card(q)[3] // 2 // (n_k * 4 * width)) * share if call.causal else 1
        turns = 2 if call.window is not None and call.window <= NEAR else 1
        programs = card(q)[2] if turns > 1 else tiles * all_heads
        rows, keys = [1, 1, config.block_m // groups, width], [1, 1, config.block_n, width]
        self.described = [Described(x, y) for x, y in ((q, rows), (k, keys), (v, keys), (o, rows))]
        # softmax(cS) with c < 0 is softmax(|c| (−Q) Kᵀ): the kernel takes the maximum of S.  And
        # with c = 0 a hidden score would be 0 · −∞.
        self.negative, scale = call.scale < 0, max(abs(call.scale), 1e-30)
        self.launch = Launcher(
            forward_kernel,
            (min(programs, tiles * all_heads),),
            # A window beyond all keys is none, and must not make the numbers of slots 64 bits wide.
            (scale, heads, all_heads, share, n_q, n_k, tiles, min(section, all_heads),
             min(call.window or 0, n_q + n_k)),
            dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, D=width,
                 STAGES=config.num_stages, GROUPS=groups, REGISTERS=registers,
                 LOADER_REGISTERS=loader_registers, CAUSAL=call.causal,
                 WINDOW=call.window is not None, TURNS=turns, OVERLAP=config.by_hand == "overlap"),
            config,
        )  # fmt: skip

    def __call__(self, q, k, v, o, lse, call) -> None:
        """Launch."""
        tensors = (-q if self.negative else q, k, v, o)
        described = [see(x) for see, x in zip(self.described, tensors, strict=True)]
        self.launch(*described, lse)


def plan(q, k, v, o, lse, call, config: Config) -> Callable[..., None]:
    """Decide all of a launch but the tensors; the result takes ``(q, k, v, o, lse, call)``.

    Parameters
    ----------
    q : ``[B, H, Nq, d]`` float16 or bfloat16, as :func:`supports` asks.
    k, v : ``[B, Hkv, Nk, d]`` and ``[B, Hkv, Nk, dv]``.
    o : ``[B, H, Nq, dv]``, written; strides as :func:`supports` asks.
    lse : ``[B, H, Nq]`` float32, contiguous, written: natural logarithm.
    call : a ``labkit.flash.launch.Call``.
    config : one of :func:`candidates`.
    """
    return _Plan(q, k, v, o, lse, call, config)


def forward(q, k, v, o, lse, *, scale, causal, window=None, config=None) -> None:
    """Write O and LSE: :func:`plan` without tuning and without keeping it."""
    from labkit.flash.launch import Call

    call = Call(bool(causal), scale, window, "ieee", q.shape[2], k.shape[2])
    known = CONFIGS if window is None or window > NEAR else _NEAR
    config = config or known[_width(q.shape[3], v.shape[3])][0]
    with torch.cuda.device(q.device):
        plan(q, k, v, o, lse, call, config)(q, k, v, o, lse, call)


def supports(q, k, v, *, causal: bool, window: int | None) -> str | None:
    """None if this kernel can run on such tensors, else why not; never raises.

    It needs a Hopper GPU, float16 or bfloat16, head_dim and head_dim_v up to 128 in steps of 8,
    and tensors that the copy engine can read: last dimension dense, other strides and the start
    multiples of 16 bytes.  Any mask, window, seq_len and grouping of heads will do.
    """
    try:
        if why := off_hopper(q, k, v):
            return why
        if _width(q.shape[3], v.shape[3]) not in CONFIGS:
            return "a head_dim above 128"
        return unreadable(q, k, v)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
