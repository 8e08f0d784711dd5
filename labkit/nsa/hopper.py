r"""Attention to chosen blocks, by hand on Hopper: one warp loads for 192 or 256 rows.

The mathematics is that of ``selection.py``.  Query i of KV head h reads the blocks
:math:`\mathcal{B}_i`, and its G query heads share them.  With :math:`c = \text{scale}\cdot\log_2 e`
and over the chosen blocks j in ascending order

.. math::
    S_j = Q K_j^\top, \quad m_j = \max(m_{j-1}, \mathrm{rowmax}\, S_j), \quad
    P_j = 2^{\,c S_j - c m_j}, \quad \alpha_j = 2^{\,c m_{j-1} - c m_j}

.. math::
    l_j = \alpha_j l_{j-1} + \mathrm{rowsum}\, P_j, \qquad O_j = \alpha_j O_{j-1} + P_j V_j .

A query that reads its blocks alone brings K and V of each through L2 for 16 rows only, and L2 is
what such a kernel waits for.  Here a program owns several *neighbouring* queries and walks the
**union** of what they chose (:func:`labkit.nsa.lists.unions`): a block that several of them read
comes once.  Neighbours agree on the first block and on the last ones at least.

Who does what follows :mod:`labkit.flash.hopper`: a warp that only loads, warpgroups that only
compute, rings of slots with a *full* and an *empty* barrier between them.  What differs:

- A warpgroup's 64 rows are ``64 / G`` queries × G heads.  ``[queries, heads, d]`` of neighbouring
  heads and queries is one tile for the copy engine, and its bytes are those of ``[64, d]``.
- **Whether a block is read is decided per warpgroup.**  One that none of its queries chose is
  given back as soon as it has landed.  A tile of at most 32 queries has one word for each block,
  with a bit for each query.  A group of fewer than 8 heads makes more queries to a tile: then each
  warpgroup has words of its own (``WORDS`` for all), and the number of the block carries a bit for
  each warpgroup (``lists.unions_by_group``).  The groups are independent: they drift apart by as
  many blocks as the ring holds, and the products of one run beside the softmax of another.
- **Whether it counts is decided per row.**  A row of a query that did not choose the block keeps
  its m; with +∞ in place of c m its P is 0.  That costs two instructions per row; a mask over the
  scores would cost one per score.
- Only blocks that reach beyond the group's first query need the triangular mask.
- **The gated sum may be its last step.**  Where nobody will ask for a gradient, the outputs of the
  other branches come in through the place of Q, which has moved into registers, and leave it
  added up (``MORE``).  That saves writing this branch's output and reading it back, and no sum is
  rounded before it is complete.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

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
from labkit.flash.tuning import Config
from labkit.nsa import lists
from labkit.nsa.call import Call

__all__ = ["CONFIGS", "config_for", "forward", "supports", "unions"]

# One compilation for all sizes: nothing here gets faster by knowing that one of them is 1.
_kernel = jit(
    do_not_specialize=(
        "heads", "share", "Nq", "Nk", "tiles", "all_heads", "section", "each", "cap", "gate_step",
    )
)  # fmt: skip

#: by head_dim: rows of a tile, keys of a slot, warps of a group, slots of the ring.  The first
#: whose tile has at most 32 queries serves, one bit each; for small groups and many queries the
#: first.
CONFIGS = {
    64: [Config(256, 64, 4, 6, True, "four"), Config(128, 64, 4, 6, True, "two")],
    128: [Config(192, 64, 4, 5, True, "three"), Config(128, 64, 4, 5, True, "two")],
}

#: groups that compute, registers per thread of theirs, and of the loader.  All start with the same
#: number, and what the loader gives back the groups share: with four there are 112 for each, too
#: few for S and O of 64 rows at head_dim 128.
_GROUPS = {"four": (4, 112, 24), "three": (3, 160, 32), "two": (2, 240, 24)}


# -- which blocks ----------------------------------------------------------------------------------


@jit
def _place(program, tiles, all_heads, section):
    """(tile, head) of a program: ``section`` heads at a time, so that their K and V stay in L2.

    The last tiles first: the first queries have fewer blocks to choose from.
    """
    group = program // (tiles * section)
    within = program - group * (tiles * section)
    here = min(section, all_heads - group * section)
    return tiles - 1 - within // here, group * section + within % here


# -- the loader ------------------------------------------------------------------------------------


@jit
def _copy(described, batch, row, head, full, tile):
    # A descriptor of [batch, seq_len, heads, d] gives zeros beyond the end, not the next batch's
    # rows.  Its tiles are [1, rows, heads, d]: the same bytes as [rows · heads, d].
    into = tile._reinterpret(described.dtype, described.block_shape, described.layout)
    tma.async_copy_global_to_shared(described, [batch, row, head, 0], full, into)


@jit
def _fetch(described, batch, head, row, n, tiles, full, empty, STAGES: gl.constexpr):
    """Copy rows ``row …`` of a head into the ring, as its tile number ``n``."""
    slot = n % STAGES
    mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), described.block_type.nbytes)
    _copy(described, batch, row, head, full.index(slot), tiles.index(slot))


@jit
def _load(
    args, QUERIES: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """One warp: Q once, then K and V of each block of the union, as the slots become empty."""
    q, k, v, Q, ring, q_full, place, union = args
    K, V, k_full, k_empty, v_full, v_empty = ring
    batch, head, first, heads_first, start = place
    blocks, _, count = union
    PARTS: gl.constexpr = BLOCK // BLOCK_N

    mbarrier.expect(q_full, GROUPS * q.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        _copy(q, batch, start + first + group * QUERIES, heads_first, q_full, Q.index(group))
    block = gl.load(blocks)
    for x in range(count):
        if WORDS > 0:
            block = block & 0xFFFFFF
        following = gl.load(blocks + min(x + 1, count - 1))  # asked for before it is needed
        for part in gl.static_range(PARTS):
            key = start + block * BLOCK + part * BLOCK_N
            n = x * PARTS + part
            _fetch(k, batch, head, key, n, K, k_full, k_empty, STAGES)
            _fetch(v, batch, head, key, n, V, v_full, v_empty, STAGES)
        block = following


# -- the consumers ---------------------------------------------------------------------------------


@jit
def _softmax(s, m, l, c, active):
    """``P, m', l', α`` of a block's scores; rows that are not ``active`` stay as they are.

    A row may have seen no key so far.  Then m' is −∞ and −∞ − (−∞) would be NaN; with 0 in its
    place P and α come out as 0.
    """
    m_new = gl.where(active, gl.maximum(m, gl.max(s, 1)), m)
    finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2((m - finite) * c)
    p = gl.exp2(s * c - gl.where(active, finite * c, float("inf"))[:, None])
    return p, m_new, l * alpha + gl.sum(p, 1), alpha


@jit
def _attend(
    args, QUERIES: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, VARLEN: gl.constexpr, MORE: gl.constexpr,
    WORDS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup: (m, l, O) of its queries over the blocks they chose, then O / l and LSE."""
    out, lse, scale, Q, ring, q_full, place, union, more = args
    K, V, k_full, k_empty, v_full, v_empty = ring
    batch, head, first, end, start, offset, lse_row, lse_step = place
    blocks, members, count = union
    SHARE: gl.constexpr = 64 // QUERIES
    OWN: gl.constexpr = 2 if QUERIES > 32 else 1  # words of a group
    PARTS: gl.constexpr = BLOCK // BLOCK_N
    WARPS: gl.constexpr = gl.num_warps()
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    c = scale * 1.4426950408889634  # log2(e)

    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    query = row // SHARE
    i = first + GROUP * QUERIES
    m = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    l = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S))
    o = gl.zeros([64, D], gl.float32, layout=O)
    q = Q.index(GROUP)
    mbarrier.wait(q_full, 0)
    left = q
    if D > 64 and not VARLEN:
        # Into registers once, not from shared memory with every block.  With the addresses of
        # varlen there are two registers too few.
        left = q.load(gl.DotOperandLayout(0, S, 2))
    if MORE:
        o1, o2, gates, gate_step, heads, more_full = more
        _bring(o1, batch, i, head * SHARE, more_full.index(GROUP), q)

    block, chose = gl.load(blocks), 0
    if WORDS == 0:
        chose = gl.load(members)
    for x in range(count):
        ahead = min(x + 1, count - 1)
        block_ahead, chose_ahead = gl.load(blocks + ahead), 0
        if WORDS == 0:
            chose_ahead = gl.load(members + ahead)
            mine = (chose >> (GROUP * QUERIES)) & ((1 << QUERIES) - 1)
        else:
            mine = (block >> (24 + GROUP)) & 1
            block = block & 0xFFFFFF
        for part in gl.static_range(PARTS):
            n = x * PARTS + part
            slot, parity = n % STAGES, (n // STAGES) & 1
            mbarrier.wait(k_full.index(slot), parity)
            if mine != 0:
                nothing = gl.zeros([64, BLOCK_N], gl.float32, layout=S)
                s = warpgroup_mma(
                    left, K.index(slot).permute([1, 0]), nothing, use_acc=False, is_async=True
                )
                word = mine
                if WORDS > 0:  # while the product runs
                    word = gl.load(members + (x * WORDS + GROUP * OWN + query // 32))
                s = warpgroup_mma_wait(0, [s])
                mbarrier.arrive(k_empty.index(slot), count=1)
                key = block * BLOCK + part * BLOCK_N
                if key + (BLOCK_N - 1) > i + offset:
                    j = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
                    seen = j[None, :] <= (i + offset + query)[:, None]
                    s = gl.where(seen, s, float("-inf"))
                p, m, l, alpha = _softmax(s, m, l, c, ((word >> (query % 32)) & 1) != 0)
                P = gl.convert_layout(p.to(V.dtype), gl.DotOperandLayout(0, O, 2))
                o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
                mbarrier.wait(v_full.index(slot), parity)
                o = warpgroup_mma(P, V.index(slot), o, is_async=True)
                o = warpgroup_mma_wait(0, [o])
                mbarrier.arrive(v_empty.index(slot), count=1)
            else:
                # Nobody here chose it.  Not before it has landed: a barrier tells a lap from the
                # one before it, and not from the one before that.
                mbarrier.arrive(k_empty.index(slot), count=1)
                mbarrier.wait(v_full.index(slot), parity)
                mbarrier.arrive(v_empty.index(slot), count=1)
        block, chose = block_ahead, chose_ahead

    # A query that chose nothing has l = 0 and O = 0: its output is 0 and its LSE −∞.
    at = lse_row + (row % SHARE).to(gl.int64) * lse_step + (i + query)
    gl.store(lse + at, m * scale + gl.log(l), mask=i + query < end)
    weight = gl.convert_layout(1.0 / gl.where(l == 0.0, 1.0, l), gl.SliceLayout(1, O))
    o = o * weight[:, None]
    if MORE:
        at = (batch.to(gl.int64) * lse_step + i + query) * heads + head
        at = gates + (at * SHARE + row % SHARE)
        o = o * _gate(at, i + query < end, O)
        mbarrier.wait(more_full.index(GROUP), 0)
        o += _gate(at + gate_step, i + query < end, O) * q.load(O).to(gl.float32)
        if MORE == 2:
            _bring(o2, batch, i, head * SHARE, more_full.index(GROUP), q)
            g = _gate(at + 2 * gate_step, i + query < end, O)
            mbarrier.wait(more_full.index(GROUP), 1)
            o += g * q.load(O).to(gl.float32)
    # Nobody reads this group's part of Q any more: O leaves through it.
    q.store(o.to(V.dtype))
    if VARLEN:
        # The copy engine would write into the next sequence.
        pointer, stride_m, stride_h = out
        B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
        r = gl.arange(0, 64, layout=gl.SliceLayout(1, B))
        column = gl.arange(0, D, layout=gl.SliceLayout(0, B))
        at = (start + i + r // SHARE).to(gl.int64) * stride_m
        at += (head * SHARE + r % SHARE).to(gl.int64) * stride_h
        gl.store(pointer + at[:, None] + column[None, :], q.load(B),
                 mask=(i + r // SHARE < end)[:, None])  # fmt: skip
    else:
        # The copy engine leaves out the queries beyond the last.
        fence_async_shared()
        tile = q._reinterpret(V.dtype, out.block_shape, out.layout)
        tma.async_copy_shared_to_global(out, [batch, i, head * SHARE, 0], tile)
        tma.store_wait(0)


@jit
def _bring(described, batch, row, head, full, tile):
    """Ask for another branch's output of these rows, in the place of Q."""
    mbarrier.expect(full, described.block_type.nbytes)
    _copy(described, batch, row, head, full, tile)


@jit
def _gate(at, there, O: gl.constexpr):
    """A gate for each row, ``[64, 1]``."""
    g = gl.load(at, mask=there, other=0.0).to(gl.float32)
    return gl.convert_layout(g, gl.SliceLayout(1, O))[:, None]


# -- the program -----------------------------------------------------------------------------------


@_kernel
def forward_kernel(
    q, k, v, o, o1, o2, lse, gates, blocks, members, counts, cu,
    scale, heads, share, Nq, Nk, tiles, all_heads, section, each, cap, gate_step,
    stride_om, stride_oh,
    QUERIES: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, VARLEN: gl.constexpr, MORE: gl.constexpr,
    WORDS: gl.constexpr, REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers and places, then each warp goes to its own work."""
    WARPS: gl.constexpr = gl.num_warps()
    # 128-byte rows, their 16-byte pieces permuted: what TMA writes and wgmma reads unconflicted.
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    Q = gl.allocate_shared_memory(k.dtype, [GROUPS, 64, D], TILE)
    K = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, D], TILE)
    V = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, D], TILE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=GROUPS)
        mbarrier.init(v_empty.index(slot), count=GROUPS)
    more = ()
    if MORE:
        more_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
        for group in gl.static_range(GROUPS):
            mbarrier.init(more_full.index(group), count=1)
        more = (o1, o2, gates, gate_step, heads, more_full)
    fence_async_shared()  # the copy engine must see the barriers before it completes them

    tile, bh = _place(gl.program_id(0), tiles, all_heads, section)
    batch, head = bh // heads, bh % heads
    union = bh.to(gl.int64) * tiles + tile
    start, end, offset = 0, Nq, Nk - Nq
    if VARLEN:
        sequence, tile = tile // each, tile % each
        start = gl.load(cu + sequence).to(gl.int32)
        end, offset = gl.load(cu + sequence + 1).to(gl.int32) - start, 0
    first = tile * (GROUPS * QUERIES)
    SHARE: gl.constexpr = 64 // QUERIES
    lse_row = (batch * heads + head).to(gl.int64) * SHARE * Nq + start
    counted = gl.load(counts + union)
    union = (blocks + union * cap, members + union * cap * max(1, WORDS), counted)
    out = o
    if VARLEN:
        out = (o, stride_om, stride_oh)
    ring = (K, V, k_full, k_empty, v_full, v_empty)
    loads = (q, k, v, Q, ring, q_full, (batch, head, first, head * SHARE, start), union)
    work = (
        out, lse, scale, Q, ring, q_full,
        (batch, head, first, end, start, offset, lse_row, Nq), union, more,
    )  # fmt: skip
    if GROUPS == 4:
        gl.warp_specialize(
            [
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 0)),
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 1)),
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 2)),
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 3)),
                (_load, (loads, QUERIES, GROUPS, STAGES, BLOCK, BLOCK_N, WORDS)),
            ],
            [WARPS, WARPS, WARPS, 1],
            [REGISTERS, REGISTERS, REGISTERS, LOADER_REGISTERS],
        )
    elif GROUPS == 3:
        gl.warp_specialize(
            [
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 0)),
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 1)),
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 2)),
                (_load, (loads, QUERIES, GROUPS, STAGES, BLOCK, BLOCK_N, WORDS)),
            ],
            [WARPS, WARPS, 1],
            [REGISTERS, REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 0)),
                (_attend, (work, QUERIES, STAGES, D, BLOCK, BLOCK_N, VARLEN, MORE, WORDS, 1)),
                (_load, (loads, QUERIES, GROUPS, STAGES, BLOCK, BLOCK_N, WORDS)),
            ],
            [WARPS, 1],
            [REGISTERS, LOADER_REGISTERS],
        )


# -- launching -------------------------------------------------------------------------------------


class _Plan:
    """All of a launch but the tensors."""

    def __init__(self, q, k, v, o, call: Call, cap: int, config: Config, more: int) -> None:
        from labkit.flash.launch import Launcher, card

        (batch, n_q, all_q, d), (n_k, heads) = q.shape, k.shape[1:3]
        share = all_q // heads
        queries = 64 // share
        groups, registers, loader_registers = _GROUPS[config.by_hand]
        varlen = call.cu is not None
        each = triton.cdiv(call.max_q, groups * queries)
        tiles, all_heads = each * (call.sequences or 1), batch * heads
        self.tile = groups * queries
        # As many heads as have their K and V in half of L2.
        section = max(1, card(q)[3] // 2 // (n_k * 4 * d))
        # [queries, heads, d] of q: the same bytes as [64, d]
        rows, keys = [1, queries, share, d], [1, config.block_n, 1, d]
        self.described = [Described(x, y) for x, y in ((q, rows), (k, keys), (v, keys))]
        self.out = None if varlen else Described(o, rows)
        # softmax(cS) with c < 0 is softmax(|c| (−Q) Kᵀ): the kernel takes the maximum of S.  And
        # with c = 0 a hidden score would be 0 · −∞.
        self.negative, scale = call.scale < 0, max(abs(call.scale), 1e-30)
        self.launch = Launcher(
            forward_kernel,
            (tiles * all_heads,),
            (scale, heads, share, n_q, n_k, tiles, all_heads, min(section, all_heads), each, cap,
             q.shape[:3].numel(), o.stride(1), o.stride(2)),
            dict(QUERIES=queries, GROUPS=groups, STAGES=config.num_stages, D=d,
                 BLOCK=call.block_size, BLOCK_N=config.block_n, VARLEN=varlen, MORE=more,
                 WORDS=_words(share, config),
                 REGISTERS=registers, LOADER_REGISTERS=loader_registers),
            config,
        )  # fmt: skip

    def __call__(self, q, k, v, o, others, gates, lse, union, call: Call) -> None:
        """Launch; ``others`` are two tensors like o, read if there is something to add."""
        tensors = (-q if self.negative else q, k, v)
        described = [see(x) for see, x in zip(self.described, tensors, strict=True)]
        cu = call.cu if call.cu is not None else union[2]
        outs = [self.out(x) if self.out else x for x in (o, *others)]
        self.launch(*described, *outs, lse, gates, *union, cu)


#: from so many queries on, smaller groups than this take the largest tile
_MANY, _SMALL = 1024, 8


def tile_of(share: int, config: Config) -> int:
    """Queries of a program."""
    return config.block_m // share


def _words(share: int, config: Config) -> int:
    """Words of ``members`` for a block; 0: one for all warpgroups, a bit for each query."""
    if tile_of(share, config) <= 32:
        return 0
    return groups_of(config) * triton.cdiv(64 // share, 32)


def groups_of(config: Config) -> int:
    """Warpgroups that compute."""
    return _GROUPS[config.by_hand][0]


def config_for(q: torch.Tensor, k: torch.Tensor, call: Call) -> Config | None:
    """The configuration for such tensors; None if there is none."""
    share, known = q.shape[2] // k.shape[2], CONFIGS.get(q.shape[3], [])
    one_word = [config for config in known if not _words(share, config)]
    if share < _SMALL and known and (q.shape[1] >= _MANY or not one_word):
        return known[0]
    return one_word[0] if one_word else None


def unions(block_indices, share: int, config: Config, call: Call, n_k: int):
    """What the queries of each program chose, as :func:`forward` wants it."""
    if _words(share, config):
        return lists.unions_by_group(block_indices, 64 // share, groups_of(config), call)
    return lists.unions(block_indices, tile_of(share, config), call, n_k)


def forward(q, k, v, block_indices, call: Call, *, config=None, union=None, more=None):
    """O and LSE of attention to chosen blocks, or its gated sum with other branches.

    Parameters
    ----------
    q : ``[B, M, HQ, D]`` float16 or bfloat16, as :func:`supports` asks.
    k, v : ``[B, N, H, D]``, M ≤ N.
    block_indices : ``[B, M, H, S]`` int32 or int64, −1 for an unused slot.
    config : one of :data:`CONFIGS`; None: the first that serves.
    union : what :func:`unions` gave, if it is known; or what ``agreed.agreed`` gave for
        ``config``, for attention to what is in it.  ``block_indices`` is not read then.
    more : ``(others, gates)``: the outputs of one or two other branches, ``[B, M, HQ, D]`` in q's
        dtype, readable by the copy engine, and ``[1 + others, B, M, HQ]`` contiguous gates, that
        of this branch first.  Only where :func:`can_add` says so.

    Returns
    -------
    o : ``[B, M, HQ, D]`` of q's dtype: this branch, or with ``more`` the gated sum.
    lse : ``[B, HQ, M]`` float32, natural logarithm.
    """
    config = config or config_for(q, k, call)
    (batch, n_q, all_q, d), (n_k, heads) = q.shape, k.shape[1:3]
    o = q.new_empty((batch, n_q, all_q, d))
    lse = q.new_empty((batch, all_q, n_q), dtype=torch.float32)
    if union is None:
        union = unions(block_indices, all_q // heads, config, call, n_k)
    others, gates = more or ((), lse)
    key = (
        config, call.scale, call.block_size, call.max_q, call.sequences, union[0].shape[-1],
        len(others), gates.dtype, gates.data_ptr() % 16, *(x.stride() for x in others),
        q.dtype, q.device, *(x.shape + x.stride() for x in (q, k, v)),
        call.cu is not None and call.cu.dtype,
        # what Triton compiles differently for: the start of a tensor on 16 bytes or not
        *(x.data_ptr() % 16 for x in union), call.cu is not None and call.cu.data_ptr() % 16,
    )  # fmt: skip
    with torch.cuda.device(q.device):
        plan = _plans.get(key)
        if plan is None:
            if len(_plans) >= 256:
                _plans.clear()
            cap = union[0].shape[-1]
            plan = _plans[key] = _Plan(q, k, v, o, call, cap, config, len(others))
        plan(q, k, v, o, (*others, o, o)[:2], gates, lse, union, call)
    return o, lse


_plans: dict[tuple, _Plan] = {}


def can_add(q: torch.Tensor, others: Sequence[torch.Tensor], call: Call) -> bool:
    """Whether the sum with ``others`` can be the last step of :func:`forward`.

    The place of Q has to be free, which is so where Q fits into registers, and the copy engine has
    to find the others where it finds O: nothing of varlen, and head_dim 128.
    """
    return (
        call.cu is None
        and q.shape[3] > 64
        and 1 <= len(others) <= 2
        and all(x.dtype == q.dtype and x.shape == q.shape for x in others)
        and all(x.is_contiguous() for x in others)
        and unreadable(*others) is None
    )


def supports(q, k, v, call: Call) -> bool:
    """Whether this kernel can run on such tensors; never raises.  :func:`why_not` says why not."""
    return why_not(q, k, v, call) is None


def why_not(q, k, v, call: Call) -> str | None:
    """None if this kernel can run on such tensors, else the reason; never raises.

    It needs a Hopper GPU, float16 or bfloat16, head_dim and head_dim_v equal and 64 or 128, blocks
    of 64 keys or a multiple, a group of 1 to 64 query heads per KV head that is a power of two,
    and tensors that the copy engine can read: last dimension dense, other strides and the start
    multiples of 16 bytes.
    """
    try:
        if why := off_hopper(q, k, v):
            return why
        if q.shape[3] not in CONFIGS or v.shape[3] != q.shape[3]:
            return "a head_dim other than 64 or 128"
        if call.block_size % 64:
            return "a block_size that is no multiple of 64"
        share = q.shape[2] // k.shape[2]
        if share & (share - 1) or share > 64 or config_for(q, k, call) is None:
            return "a group of query heads that is not 1, 2, 4, 8, 16, 32 or 64"
        return unreadable(q, k, v)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
