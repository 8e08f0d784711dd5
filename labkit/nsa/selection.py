r"""Attention to chosen blocks: the forward pass, and which road it takes.

Query i of head h reads the tokens of the blocks that it (with the rest of its group) chose:

.. math::
    S_{ij} = q_i \cdot k_j, \qquad
    j \in \bigcup_{c \in \text{chosen}(i)} [\,c\,l',\ (c + 1)\,l'\,), \quad j \le i,

and from there on it is the online softmax of chapter 07.  Taken query by query, K and V of every
choice travel from L2 to a multiprocessor once per query: that is what stops such a kernel, long
before its products do.  These roads read less:

by queries (this file)
    a program owns neighbouring queries with all heads of their group, and walks along the *union*
    of their blocks (``lists.unions``).  Each block is brought in once for all of them; rows of
    queries that did not choose it are masked.  What neighbours share is saved, what they do not
    share is multiplied in vain.
by keys (``by_keys.py``)
    a program owns a block and gathers the rows that chose it.  No row is in vain and the group
    may be 1, but every (query, choice) leaves a partial result in memory.
by hand (``hopper.py``)
    the union road in Gluon: more queries to a program, one warp that loads for all of them.
both (``agreed.py``)
    what enough of a tile's queries chose goes by hand, and the rest of each query's choice by keys.

By hand is first where Hopper and the tensors allow it.  A group of fewer than 8 heads needs many
queries for a tile, whose union may be all blocks: it goes by hand up to ``_BLOCKS_PER_SLOT`` blocks
for each slot, and both ways beyond that; by keys where it cannot.  Where queries are few, groups of
1 and 2 go by queries and groups of 4 by hand.  Larger groups go by queries where they cannot go by
hand.

The mask is one comparison per score: a row's limit is its own position inside the block, or −1 if
its query did not choose the block.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from labkit.flash.launch import Launcher, _On, card
from labkit.flash.softmax import finish, rescale_and_exponentiate
from labkit.flash.tuning import Config
from labkit.kernels.runtime import check_can_launch
from labkit.nsa import lists
from labkit.nsa.call import Call

__all__ = ["by_queries", "by_queries_kernel", "forward", "forward_sum"]

LOG2E = math.log2(math.e)
#: groups from this size on fill the rows of a tile with few queries, which share blocks
_BY_QUERIES_FROM = 8
#: below this many queries a launch more costs more than rows in vain
_FEW = 1024
#: a smaller group, by hand alone: up to so many blocks for each slot even neighbours that share
#: nothing, which read them all, should be no slower than by keys (the record ``nsa_speed`` has the
#: roads of small groups at 8,192 and 32,768 tokens; where they cross is between)
_BLOCKS_PER_SLOT = 9
#: both ways: a block that so many of a warpgroup's 64 rows (queries × group) chose goes along the
#: union, since their parts by keys should take as long as all 64 there (a setting: tried on an H200
#: with half and with twice as many while this was written, and no record has others)
_ROWS_AGREE = 16


# -- tiles that several kernels of this package share --------------------------------------------


@triton.jit
def gather(x, row, head_dim, stride, there, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Rows at 64-bit offsets ``row`` of ``x``: ``[rows, BLOCK_D]``, zeros where not ``there``."""
    column = tl.arange(0, BLOCK_D)
    inside = there[:, None]
    if D != BLOCK_D:
        inside = inside & (column < head_dim)[None, :]
    return tl.load(x + row[:, None] + (column * stride)[None, :], inside, 0.0)


@triton.jit
def block_rows(
    x, base, first, N, stride_n, stride_d,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows ``first … first + ROWS`` of one head, ``[ROWS, BLOCK_D]``; zeros from row N on."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    start = x + base + tl.cast(first, tl.int64) * stride_n
    at = start + (row[:, None] * stride_n + column[None, :] * stride_d)
    if TAIL:
        inside = (first + row < N)[:, None]
        if D != BLOCK_D:
            inside = inside & (column < D)[None, :]
        tile = tl.load(at, inside, 0.0)
    elif D != BLOCK_D:
        inside = tl.broadcast_to((column < D)[None, :], ROWS, BLOCK_D)
        tile = tl.load(at, inside, 0.0)
    else:
        tile = tl.load(at)
    return tile


# -- by queries ----------------------------------------------------------------------------------


@triton.jit
def chosen_block(blocks, n, j, count, BLOCK: tl.constexpr, PER: tl.constexpr, STEPS: tl.constexpr):
    """The block of step ``n``, or of each of its keys ``j`` where a step takes several."""
    e = n // STEPS
    if PER > 1:
        e = n * PER + j // BLOCK
    return tl.load(blocks + e, e < count, 0)


@triton.jit
def by_queries_kernel(
    q, k, v, o, lse, blocks, members, counts, cu,
    stride_qb, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd,
    stride_ob, stride_on, stride_oh, stride_lb, stride_lh,
    heads, Nq, Nk, tiles, each, offset, cap, c, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PER: tl.constexpr, STEPS: tl.constexpr,
    VARLEN: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and LSE of ``QUERIES`` queries, all heads of one group: along the union of their blocks.

    A step takes ``BLOCK_N`` keys: one of the ``STEPS`` parts of a block, or ``PER`` blocks.
    """
    ROWS: tl.constexpr = QUERIES * PADDED
    # Tiles of one head run together, so that its K and V stay in L2.
    x = tl.program_id(0)  # [batch, head, tile]
    tile, bh = x % tiles, x // tiles
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    start = tl.cast(0, tl.int64)
    if VARLEN:
        sequence, tile = tile // each, tile % each
        start = tl.load(cu + sequence).to(tl.int64)
        Nk = (tl.load(cu + sequence + 1) - start).to(tl.int32)
        Nq = Nk
        if tile * QUERIES >= Nq:
            return

    # -- Q: once -----------------------------------------------------------------------------------
    row = tl.arange(0, ROWS)
    which, g = row // PADDED, row % PADDED
    i = tile * QUERIES + which
    there = (i < Nq) & (g < GROUP)
    token, head_q = start + i, head * GROUP + g
    at = batch * stride_qb + token * stride_qn + head_q * stride_qh
    Q = gather(q, at, D, stride_qd, there, BLOCK_D, D)
    position = i + offset

    # -- K and V: once for all of them -----------------------------------------------------------
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    k_base = batch * stride_kb + start * stride_kn + head * stride_kh
    v_base = batch * stride_vb + start * stride_vn + head * stride_vh
    union = x.to(tl.int64) * cap
    count = tl.load(counts + x)
    j = tl.arange(0, BLOCK_N)
    blocks += union
    members += union
    block = chosen_block(blocks, 0, j, count, BLOCK, PER, STEPS)
    for n in tl.range(0, tl.cdiv(count, PER) * STEPS):
        if PER > 1:
            e = n * PER + j // BLOCK
            member = tl.load(members + e, e < count, 0)
            key = block * BLOCK + j % BLOCK
            seen = ((member[None, :] >> which[:, None]) & 1) != 0
            seen = seen & (key[None, :] <= position[:, None])
            exists = (key < Nk) & (e < count)
            K = gather(k, k_base + key.to(tl.int64) * stride_kn, D, stride_kd, exists, BLOCK_D, D)
        else:
            member = tl.load(members + n // STEPS)
            first = block * BLOCK + n % STEPS * BLOCK_N
            limit = tl.where(((member >> which) & 1) != 0, position - first, -1)
            seen = j[None, :] <= limit[:, None]
            if BLOCK % BLOCK_N != 0:
                seen = seen & (j < BLOCK - n % STEPS * BLOCK_N)[None, :]
            K = block_rows(k, k_base, first, Nk, stride_kn, stride_kd,
                           BLOCK_N, D, BLOCK_D, TAIL, WIDE)  # fmt: skip
        s = tl.dot(Q, K.T, input_precision=PRECISION)
        s = tl.where(seen, s, float("-inf"))
        p, m, l, acc = rescale_and_exponentiate(s, m, l, acc, c, True)
        if PER > 1:
            V = gather(v, v_base + key.to(tl.int64) * stride_vn, DV, stride_vd, exists,
                       BLOCK_DV, DV)  # fmt: skip
        else:
            V = block_rows(v, v_base, first, Nk, stride_vn, stride_vd,
                           BLOCK_N, DV, BLOCK_DV, TAIL, WIDE)  # fmt: skip
        acc = tl.dot(p.to(V.dtype), V, acc, input_precision=PRECISION)
        # One turn before its address is needed: a copy that waits for a number waits long.
        block = chosen_block(blocks, n + 1, j, count, BLOCK, PER, STEPS)

    # -- O and LSE: once ---------------------------------------------------------------------------
    out, lse_row = finish(m, l, acc, scale)
    column = tl.arange(0, BLOCK_DV)
    at = batch * stride_ob + token * stride_on + head_q * stride_oh
    tl.store(o + at[:, None] + column[None, :], out.to(o.dtype.element_ty),
             mask=there[:, None] & (column < DV)[None, :])  # fmt: skip
    tl.store(lse + batch * stride_lb + head_q * stride_lh + token, lse_row, mask=there)


# -- launching -------------------------------------------------------------------------------------

_plans: dict[tuple, Any] = {}


def remembered(key: tuple, configs: Sequence[Config], make: Callable[[Config], Any], *arguments):
    """Run the plan of ``key``, made with the first of ``configs`` that the card has room for.

    All that is decided depends on shapes, strides, dtypes and options, and on nothing in the
    tensors: deciding again would cost a short sequence more than its kernel.
    """
    plan = _plans.get(key)
    if plan is not None:
        return plan(*arguments)
    for config in configs:
        plan = make(config)
        try:
            result = plan(*arguments)
        except OutOfResources:
            if config is configs[-1]:
                raise
        else:
            if len(_plans) > 2000:  # shapes that never come back, as of ragged batches
                _plans.clear()
            _plans[key] = plan
            return result
    raise AssertionError("no configuration")


def width(x: torch.Tensor) -> int:
    """Columns of a tile: head_dim rounded up to a power of two.

    At least 64 in 16 bits: see ``labkit.flash.launch`` about narrow right factors on Hopper.
    """
    return max(16 if x.element_size() == 4 else 64, triton.next_power_of_2(x.shape[3]))


def padded(group: int) -> int:
    """Rows of a query in a tile: its group, rounded up to a power of two."""
    return triton.next_power_of_2(group)


def queries_per_tile(group: int, rows: int) -> int:
    """How many queries share a tile of ``rows`` rows; at most 32, one bit each."""
    return max(1, min(32, rows // padded(group)))


def is_wide(rows: int, *tensors: torch.Tensor) -> bool:
    """Whether an offset inside a tile of ``rows`` tokens can exceed 32 bits."""
    return any(rows * abs(x.stride(1)) + x.shape[3] * abs(x.stride(3)) >= 2**31 for x in tensors)


def has_tail(call: Call) -> bool:
    """Whether a block can reach beyond the end of its sequence."""
    return call.cu is not None or call.max_k % call.block_size != 0


def _configs(q, v) -> list[Config]:
    """Rows, keys, warps and stages to try, the largest first."""
    wide = max(width(q), width(v))
    if card(q)[0] == 0:  # the interpreter: each operation costs the same, however large
        return [Config(64, 64, 4, 1)]
    if q.element_size() == 4:
        return [Config(32, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
    # 32 keys only where shared memory is short: Triton 3.6 multiplies some right factors that
    # narrow wrongly on Hopper, which has enough for the first of each list.
    if wide > 128:
        return [Config(64, 64, 8, 2), Config(64, 64, 8, 1), Config(64, 32, 8, 1)]
    return [Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 32, 4, 2)]


class _ByQueries:
    """The kernel with one configuration."""

    def __init__(self, q, k, v, block_indices, call: Call, c: Config) -> None:
        b, _, hq, d = q.shape
        heads, dv = k.shape[2], v.shape[3]
        group = hq // heads
        self.queries = queries_per_tile(group, c.block_m)
        rows = max(16, self.queries * padded(group))
        rounded = rows // self.queries  # at least 16 rows: the smallest product
        each = triton.cdiv(call.max_q, self.queries)
        tiles = each * (call.sequences or 1)
        cap = max(1, min(self.queries * block_indices.shape[3], call.blocks))
        keys = _keys_per_step(call.block_size, c.block_n)
        o, lse = self.outputs(q, v)
        self.launch = Launcher(
            by_queries_kernel,
            (tiles * b * heads,),
            (*q.stride(), *k.stride(), *v.stride(), *o.stride()[:3], *lse.stride()[:2],
             heads, call.max_q, call.max_k, tiles, each, call.offset, cap,
             call.scale * LOG2E, call.scale),
            dict(GROUP=group, PADDED=rounded, QUERIES=self.queries, D=d, DV=dv, BLOCK_D=width(q),
                 BLOCK_DV=width(v), BLOCK=call.block_size,
                 BLOCK_N=keys, PER=max(1, keys // call.block_size),
                 STEPS=triton.cdiv(call.block_size, keys),
                 VARLEN=call.cu is not None, TAIL=has_tail(call),
                 WIDE=is_wide(c.block_n, k, v), PRECISION=call.precision),
            c,
        )  # fmt: skip

    @staticmethod
    def outputs(q, v) -> tuple[torch.Tensor, torch.Tensor]:
        b, m, hq, _ = q.shape
        return q.new_empty((b, m, hq, v.shape[3])), q.new_empty((b, hq, m), dtype=torch.float32)

    def __call__(self, q, k, v, block_indices, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = self.outputs(q, v)
        union = lists.unions(block_indices, self.queries, call, k.shape[1])
        self.launch(q, k, v, o, lse, *union, call.cu)
        return o, lse


def _keys_per_step(block: int, most: int) -> int:
    """Keys of one step: ``most``, unless blocks that are no power of two fit once only."""
    if block >= most or block & (block - 1) == 0:
        return most
    return max(16, triton.next_power_of_2(block))


def by_queries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE along the unions of neighbouring queries; arguments as for :func:`forward`."""
    check_can_launch("nsa_selected_attention", q, k, v, block_indices)
    key = ("by_queries", *lists.plan_key(call, q, k, v), block_indices.shape[3])
    return remembered(
        key, _configs(q, v), lambda c: _ByQueries(q, k, v, block_indices, call, c),
        q, k, v, block_indices, call,
    )  # fmt: skip


# -- the road --------------------------------------------------------------------------------------


def hopper(module: str):
    """The module written by hand for Hopper; None where it is not there or its language is not."""
    from importlib import import_module

    try:
        return import_module(f"labkit.nsa.{module}")
    except ImportError:
        return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    call: Call,
    *,
    road: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query to its blocks.

    Parameters
    ----------
    q : ``[B, M, HQ, D]``.
    k, v : ``[B, N, H, D]`` and ``[B, N, H, V]``.
    block_indices : ``[B, M, H, S]`` int32 or int64, −1 for an unused slot.
    road : ``"queries"``, ``"keys"``, ``"hopper"`` or ``"both"`` (groups below 8) overrules the
        choice; tests and experiments use it.

    Returns
    -------
    o : ``[B, M, HQ, V]`` in q's dtype; 0 for a query that chose nothing.
    lse : ``[B, HQ, M]`` float32, natural logarithm; −∞ for such a query.

    Notes
    -----
    NaN and infinities in a block may reach neighbours that did not choose it, since 0 · NaN is NaN:
    queries of one tile along unions, and of one warpgroup where it agreed on the block.  By keys
    they reach nobody else.
    """
    with _On(q):
        if 0 in (call.max_q, call.max_k, block_indices.shape[3], q.numel(), v.shape[3]):
            o, lse = _ByQueries.outputs(q, v)
            return o.zero_(), lse.fill_(float("-inf"))
        if road is None:
            road = _choose(q, k, v, block_indices.shape[3], call)
        if road == "hopper":
            return hopper("hopper").forward(q, k, v, block_indices, call)
        if road in ("keys", "both"):
            from labkit.nsa import by_keys

            base = None
            if road == "both":
                base, block_indices = _along_what_is_agreed(q, k, v, block_indices, call)
            return by_keys.forward(q, k, v, block_indices, call, base=base)
        return by_queries(q, k, v, block_indices, call)


def _along_what_is_agreed(q, k, v, block_indices, call: Call):
    """O and LSE over the blocks that enough neighbours chose, and the rest of the choice."""
    from labkit.nsa import agreed

    assert can_agree(q, k, block_indices.shape[3])
    module, group = hopper("hopper"), q.shape[2] // k.shape[2]
    config = module.CONFIGS[q.shape[3]][0]
    least = max(1, _ROWS_AGREE // group)
    union, rest = agreed.agreed(block_indices, 64 // group, module.groups_of(config), least, call)
    return module.forward(q, k, v, block_indices, call, config=config, union=union), rest


def forward_sum(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    call: Call,
    others: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The gated sum of this branch and ``others``, and this branch's LSE, in one kernel.

    Parameters
    ----------
    q, k, v, block_indices : as for :func:`forward`.
    others : outputs of other branches, ``[B, M, HQ, V]``.
    gates : ``[B, M, HQ]`` each, any strides; this branch's first, then those of ``others``.

    Returns
    -------
    ``(out, lse)``, or None where the sum has to be a kernel of its own (``gates.py``): only the
    kernel by hand has room for it.
    """
    with _On(q):
        if 0 in (call.max_q, call.max_k, block_indices.shape[3], q.numel(), v.shape[3]):
            return None
        road = _choose(q, k, v, block_indices.shape[3], call)
        module = hopper("hopper") if road == "hopper" else None
        if module is None or not module.can_add(q, others, call):
            return None
        if any(g.dtype != gates[0].dtype for g in gates):
            gates = [g.float() for g in gates]
        more = (tuple(others), torch.stack(list(gates)))
        return module.forward(q, k, v, block_indices, call, more=more)


def _choose(q, k, v, slots: int, call: Call) -> str:
    """The road for these tensors, by their shapes only: whether neighbours share is not known."""
    group, few = q.shape[2] // k.shape[2], q.shape[1] < _FEW
    small = group < _BY_QUERIES_FROM
    # Few queries of a small group would leave a tile by hand empty.
    if card(q)[0] == 90 and not (few and group < 4):
        module = hopper("hopper")
        if module is not None and module.supports(q, k, v, call):
            if few or not small or call.blocks <= _BLOCKS_PER_SLOT * slots:
                return "hopper"
            # A ragged batch has as many tiles for each sequence as for the longest: mostly empty.
            if call.cu is None and can_agree(q, k, slots):
                return "both"
    return "keys" if small and not few else "queries"


def can_agree(q: torch.Tensor, k: torch.Tensor, slots: int) -> bool:
    """Whether a choice of ``slots`` blocks can be cut in two for the kernel by hand, if that can
    run on such tensors at all."""
    from labkit.nsa import agreed

    module, group = hopper("hopper"), q.shape[2] // k.shape[2]
    # Larger groups have tiles of another format.
    return group < _BY_QUERIES_FROM and agreed.fits(
        slots, 64 // group, module.groups_of(module.CONFIGS[q.shape[3]][0])
    )
