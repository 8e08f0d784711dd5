r"""The backward kernels by hand, for Hopper: every wait, copy and register is in the program.

:mod:`labkit.flash.backward` says what to compute and leaves the schedule to Triton.  These two
kernels compute the same, in the same order, and *are* the schedule.  They are written in Gluon,
Triton's lower layer: a tensor has the layout that the code gives it, a product is issued in one
place and waited for in another.

.. math::
    P^\top  &= 2^{\,\mathrm{slope}\, K Q^\top - \mathrm{LSE}_2}, &
    dV &= P^\top dO                                                 \\
    dS^\top &= P^\top \circ (V dO^\top - \delta), &
    dK &= \mathrm{scale}\; dS^\top Q                                \\
    dS &= P \circ (dO\, V^\top - \delta), &
    dQ &= \mathrm{scale}\; dS\, K

with slope = scale · log₂e and LSE₂ = LSE · log₂e, so that the exponential is the one the hardware
has.  Three kinds of warps share a block:

- One **producer** warp asks the copy engine (TMA) for tiles and does nothing else.  It may have
  24 registers; what it gives up goes to the others.
- Two **consumer** warpgroups of four warps, 240 registers each.  Each owns 64 rows of the tile
  that stays.  They meet nowhere but in the ring of buffers, whose tiles are replaced when both
  are done: while one is in its exponentials the other can have the tensor cores.

They speak through *barriers* in shared memory.  A ``full`` barrier flips when the bytes of a tile
have landed, an ``empty`` one when both consumers are done with it.  A barrier has one bit, its
phase; whoever waits names the phase that is to end.

Inside a consumer a product runs while the arithmetic before the next one is done
(``warpgroup_mma_wait(n)``: until at most n of my products are still running).  For dK and dV:

==============================  ================================================
on the CUDA cores               meanwhile on the tensor cores
==============================  ================================================
wait for the scores             Sᵀ = K Qᵀ, and dK += dSᵀ Q of the tile before
Pᵀ = 2^(…)                      dPᵀ = V dOᵀ
dSᵀ = Pᵀ ∘ (dPᵀ − δ)            dV += Pᵀ dO
==============================  ================================================

Two rules of the assembler decide where a wait may stand; break one, and it makes every product
wait for itself, and says so only in its log:

- In a warpgroup other than the first, no product may be in flight where the loop closes.  So the
  loop ends with a wait for dV.
- The registers of products in flight are counted together.  dK and dV of 64 × 128 take 128, Sᵀ
  and dPᵀ of 64 × 64 take 32 each, their rounded copies 16 each: of 240 there is hardly one left
  for an address.  So there are two orders.  ``early`` issues Sᵀ, dK and dPᵀ at once.  ``late``
  waits for dK before dPᵀ, which can then have the registers of dSᵀ.

What was tried: one consumer of eight warps, whose warps meet at every barrier (dK and dV no slower,
dQ much slower).  About as fast, and left out: three consumers of 160 registers for dQ at head_dim
64; blocks of 64 keys, two to a multiprocessor, at head_dim 64; a third stage at head_dim 128.

Each sum is made by one warpgroup in a fixed order: the gradients are the same to the bit each time.

Taught in chapter 09 (the backward kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from math import e, log2
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from labkit.flash.gluon import (
    Described,
    TensorDescriptor,
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
from labkit.flash.tuning import Config, Problem

__all__ = ["backward", "candidates", "plan_dkdv", "plan_dq", "supports"]

#: rows of one consumer: the height of a warpgroup's product
ROWS = 64
#: numbers that would compile a kernel anew when they are 1 or a multiple of 16
_NUMBERS = ["heads", "group", "nq", "nk", "tiles", "window"]


# -- shared by both kernels ------------------------------------------------------------------------


@jit
def _box(smem, R: gl.constexpr, D: gl.constexpr):
    """A tile [R, D] as the box [1, 1, R, D] of a tensor [batch, heads, rows, D]: the same bytes."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    return smem._reinterpret(smem.dtype, [1, 1, R, D], layout)


@jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The buffer after this one; the phase flips when the ring of buffers starts again."""
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@jit
def _cut(q0, Q_ROWS: gl.constexpr, k0, K_ROWS: gl.constexpr, off, nk, window,
         CAUSAL: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """Whether some pair of the tile is hidden: only such a tile pays for its mask."""
    nearest = q0 + off - (k0 + K_ROWS - 1)
    farthest = q0 + (Q_ROWS - 1) + off - k0
    cut = k0 + K_ROWS > nk
    if CAUSAL:
        cut = cut | (nearest < 0)
    if WINDOW:
        cut = cut | (farthest >= window)
        if not CAUSAL:
            cut = cut | (nearest <= -window)
    return cut


@jit
def _seen(q, k, off, nk, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Whether query q sees key k; off = Nk − Nq puts the last query on the last key."""
    distance = q + off - k
    seen = k < nk
    if CAUSAL:
        seen = seen & (distance >= 0)
    if WINDOW:
        seen = seen & (distance < window)
        if not CAUSAL:
            seen = seen & (distance > -window)
    return seen


# -- dK and dV: 128 keys stay, queries stream past -------------------------------------------------


@triton.jit(do_not_specialize=["nq", "padded"])
def rows_kernel(lse, delta, out, stride_b, stride_h, heads, nq, padded, BLOCK: tl.constexpr):
    """LSE₂ and δ, ``out[2, batch · heads, padded]``: aligned for the copy engine, and never ragged.

    A query that saw no key has LSE = −∞; a query past the end has none at all.  Both get +∞, so
    that their P = 2^(s − ∞) is 0 and nothing after it needs to know.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = head // heads * stride_b + head % heads * stride_h + row
    one = tl.load(lse + at, mask=row < nq, other=float("-inf"))
    two = tl.load(delta + at, mask=row < nq, other=0.0)
    one = tl.where(one == float("-inf"), float("inf"), one * LOG2E)
    to = out + head * padded + row
    tl.store(to, one, mask=row < padded)
    tl.store(to + tl.num_programs(0).to(tl.int64) * padded, two, mask=row < padded)


@jit
def _row(smem, stage, layout: gl.constexpr):
    """One number per query, as the columns of a transposed tile want them."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = smem.index(stage)._reinterpret(gl.float32, [smem.shape[2]], flat)
    return row.load(gl.SliceLayout(0, layout))[None, :]


@jit
def _p_transposed(s, lse, q0, k0, mask, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Pᵀ = 2^(slope · Sᵀ − LSE₂), and exactly 0 where the mask hides.

    Keys past the end need no mask here: they only reach their own rows of dK and dV, which are
    not written.
    """
    slope, off, nk, window = mask
    layout: gl.constexpr = s.type.layout
    K_ROWS: gl.constexpr = s.shape[0]
    Q_ROWS: gl.constexpr = s.shape[1]
    p = gl.exp2(s * slope - lse)
    if CAUSAL or WINDOW:  # noqa: SIM102 (known when the kernel is compiled; the next is not)
        if _cut(q0, Q_ROWS, k0, K_ROWS, off, nk, window, CAUSAL, WINDOW):
            k = k0 + gl.arange(0, K_ROWS, gl.SliceLayout(1, layout))[:, None]
            q = q0 + gl.arange(0, Q_ROWS, gl.SliceLayout(0, layout))[None, :]
            p = gl.where(_seen(q, k, off, nk, window, CAUSAL, WINDOW), p, 0.0)
    return p


@jit
def _dkdv_consumer(args, WHO: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
                   STAGES: gl.constexpr, EARLY: gl.constexpr, CAUSAL: gl.constexpr,
                   WINDOW: gl.constexpr):  # fmt: skip
    """64 of the keys: their K and V stay in shared memory, their dK and dV in registers."""
    smem, bars, descs, numbers = args
    dk_desc, dv_desc = descs
    batch, kv_head, k0, first_m, count_m, steps, scale, mask = numbers
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem = smem
    kv_full, q_full, do_full, empty = bars
    ROWS: gl.constexpr = 64
    # A product of a warpgroup leaves 16 rows to each of its warps.
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    # The result of one product as the left factor of the next: each thread has its own values.
    left: gl.constexpr = gl.DotOperandLayout(0, grad, 2)
    dtype: gl.constexpr = k_smem.dtype
    k_tile = k_smem.index(WHO)
    v_tile = v_smem.index(WHO)
    k0 = k0 + WHO * ROWS
    none = gl.zeros([ROWS, BLOCK_M], gl.float32, tile)

    # The first tile of queries, with nothing yet to overlap.
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0)
    q_t = q_smem.index(0).permute((1, 0))
    s = warpgroup_mma(k_tile, q_t, none, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(0), 0)
    do_t = do_smem.index(0).permute((1, 0))
    dp = warpgroup_mma(v_tile, do_t, none, use_acc=False, is_async=True)
    s, dp = warpgroup_mma_wait(0, [s, dp])
    lse = _row(lse_smem, 0, tile)
    p = _p_transposed(s, lse, first_m * BLOCK_M, k0, mask, CAUSAL, WINDOW)
    p_left = gl.convert_layout(p.to(dtype), left, assert_trivial=True)
    ds = p * (dp - _row(delta_smem, 0, tile))
    ds_left = gl.convert_layout(ds.to(dtype), left, assert_trivial=True)
    dk = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, grad))
    dv = gl.zeros([ROWS, D], gl.float32, grad)
    dv = warpgroup_mma(p_left, do_smem.index(0), dv, is_async=True)
    dv = warpgroup_mma_init(warpgroup_mma_wait(0, [dv]))

    last = 0
    phase = 0
    m = first_m
    for _ in range(steps - 1):
        stage, phase = _next(last, phase, STAGES)
        m = gl.where(m + 1 == first_m + count_m, first_m, m + 1)  # on to the next head of the group
        q_t = q_smem.index(stage).permute((1, 0))
        do_t = do_smem.index(stage).permute((1, 0))
        if EARLY:  # in flight at once: S, dK of the tile before, dP
            mbarrier.wait(q_full.index(stage), phase)
            s = warpgroup_mma(k_tile, q_t, none, use_acc=False, is_async=True)
            dk = warpgroup_mma(ds_left, q_smem.index(last), dk, is_async=True)
            mbarrier.wait(do_full.index(stage), phase)
            dp = warpgroup_mma(v_tile, do_t, none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(2, [s])
        else:  # dP takes the registers that dS had as dK's left factor
            dk = warpgroup_mma(ds_left, q_smem.index(last), dk, is_async=True)
            mbarrier.wait(q_full.index(stage), phase)
            s = warpgroup_mma(k_tile, q_t, none, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(stage), phase)
            dk = warpgroup_mma_init(warpgroup_mma_wait(1, [dk]))
            mbarrier.arrive(empty.index(last), count=1)
            dp = warpgroup_mma(v_tile, do_t, none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, [s])
        # While dP runs:
        lse = _row(lse_smem, stage, tile)
        p = _p_transposed(s, lse, m * BLOCK_M, k0, mask, CAUSAL, WINDOW)
        p_left = gl.convert_layout(p.to(dtype), left, assert_trivial=True)
        dv = warpgroup_mma(p_left, do_smem.index(stage), dv, is_async=True)
        dp = warpgroup_mma_wait(1, [dp])
        if EARLY:
            mbarrier.arrive(empty.index(last), count=1)
        # While dV runs:
        ds = p * (dp - _row(delta_smem, stage, tile))
        ds_left = gl.convert_layout(ds.to(dtype), left, assert_trivial=True)
        dv = warpgroup_mma_init(warpgroup_mma_wait(0, [dv]))
        last = stage

    dk = warpgroup_mma(ds_left, q_smem.index(last), dk, is_async=True)
    # This warpgroup is the only reader of its rows of K and V: they hold dK and dV on the way out.
    v_tile.store(warpgroup_mma_wait(1, [dv]).to(dtype))
    dk = warpgroup_mma_wait(0, [dk])
    k_tile.store((dk * scale).to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv_desc, [batch, kv_head, k0, 0], _box(v_tile, ROWS, D))
    tma.async_copy_shared_to_global(dk_desc, [batch, kv_head, k0, 0], _box(k_tile, ROWS, D))
    tma.store_wait(0)


@jit
def _dkdv_producer(args, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr):
    """Brings K and V once; then tile after tile Q, dO and what belongs to their rows."""
    smem, bars, descs, numbers = args
    batch, heads, kv_head, group, k0, first_m, count_m, steps = numbers
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem = smem
    kv_full, q_full, do_full, empty = bars
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc = descs
    ROWS: gl.constexpr = 64
    mbarrier.expect(kv_full, 2 * 2 * ROWS * D * 2)
    for who in gl.static_range(2):
        at = [batch, kv_head, k0 + who * ROWS, 0]
        tma.async_copy_global_to_shared(k_desc, at, kv_full, _box(k_smem.index(who), ROWS, D))
        tma.async_copy_global_to_shared(v_desc, at, kv_full, _box(v_smem.index(who), ROWS, D))
    stage = 0
    phase = 0
    m = first_m
    head = kv_head * group
    for _ in range(steps):
        at = [batch, head, m * BLOCK_M, 0]
        row = [batch * heads + head, m * BLOCK_M]
        # A barrier nobody has used counts as one whose phase before the first has ended.
        mbarrier.wait(empty.index(stage), phase ^ 1)
        full = q_full.index(stage)
        mbarrier.expect(full, BLOCK_M * D * 2 + BLOCK_M * 4)
        tma.async_copy_global_to_shared(q_desc, at, full, _box(q_smem.index(stage), BLOCK_M, D))
        tma.async_copy_global_to_shared(lse_desc, row, full, lse_smem.index(stage))
        full = do_full.index(stage)
        mbarrier.expect(full, BLOCK_M * D * 2 + BLOCK_M * 4)
        tma.async_copy_global_to_shared(do_desc, at, full, _box(do_smem.index(stage), BLOCK_M, D))
        tma.async_copy_global_to_shared(delta_desc, row, full, delta_smem.index(stage))
        end = m + 1 == first_m + count_m
        head = gl.where(end, head + 1, head)
        m = gl.where(end, first_m, m + 1)
        stage, phase = _next(stage, phase, STAGES)


@jit
def _queries(k0, K_ROWS: gl.constexpr, total, off, window, BLOCK_M: gl.constexpr,
             CAUSAL: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """First tile of queries that sees one of these keys, and how many do; one at the least."""
    first = 0
    end = total
    if CAUSAL:
        first = gl.maximum(k0 - off, 0) // BLOCK_M
    if WINDOW:
        end = gl.minimum(end, gl.cdiv(gl.maximum(k0 + K_ROWS - 1 + window - off, 0), BLOCK_M))
        if not CAUSAL:
            first = gl.maximum(k0 - off - window + 1, 0) // BLOCK_M
    first = gl.minimum(first, total - 1)
    return first, gl.maximum(end - first, 1)


@jit(do_not_specialize=_NUMBERS)
def dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_desc, dv_desc,
    heads, group, nq, nk, tiles, window, slope, scale,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys of one KV head, summed over the queries of the heads of its group."""
    ROWS: gl.constexpr = 64
    dtype: gl.constexpr = k_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    line: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    # Neighbours in time share a head, and its Q and dO in L2.  Under the causal mask early keys
    # have the longest loops: they start first.
    pid = gl.program_id(0)
    kv_heads = heads // group
    k0 = pid % tiles * (2 * ROWS)
    batch = pid // tiles // kv_heads
    kv_head = pid // tiles % kv_heads
    off = nk - nq
    first_m, count_m = _queries(
        k0, 2 * ROWS, gl.cdiv(nq, BLOCK_M), off, window, BLOCK_M, CAUSAL, WINDOW
    )
    steps = count_m * group

    k_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile)
    v_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], tile)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], tile)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], line)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()  # the copy engine must see the barriers as they are now

    smem = (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem)
    bars = (kv_full, q_full, do_full, empty)
    mask = (slope, off, nk, window)
    consumer = (smem, bars, (dk_desc, dv_desc),
                (batch, kv_head, k0, first_m, count_m, steps, scale, mask))  # fmt: skip
    producer = (smem, bars, (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc),
                (batch, heads, kv_head, group, k0, first_m, count_m, steps))  # fmt: skip
    gl.warp_specialize([
        (_dkdv_consumer, (consumer, 0, D, BLOCK_M, STAGES, EARLY, CAUSAL, WINDOW)),
        (_dkdv_consumer, (consumer, 1, D, BLOCK_M, STAGES, EARLY, CAUSAL, WINDOW)),
        (_dkdv_producer, (producer, D, BLOCK_M, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


# -- dQ: 128 queries stay, keys stream past --------------------------------------------------------


@jit
def _p(s, lse, q0, k0, mask, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """P = 2^(slope · S − LSE₂), and exactly 0 where the mask hides and past the last key."""
    slope, off, nk, window = mask
    layout: gl.constexpr = s.type.layout
    Q_ROWS: gl.constexpr = s.shape[0]
    K_ROWS: gl.constexpr = s.shape[1]
    p = gl.exp2(s * slope - lse)
    if _cut(q0, Q_ROWS, k0, K_ROWS, off, nk, window, CAUSAL, WINDOW):
        q = q0 + gl.arange(0, Q_ROWS, gl.SliceLayout(1, layout))[:, None]
        k = k0 + gl.arange(0, K_ROWS, gl.SliceLayout(0, layout))[None, :]
        p = gl.where(_seen(q, k, off, nk, window, CAUSAL, WINDOW), p, 0.0)
    return p


@jit
def _dq_consumer(args, WHO: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
                 STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """64 of the queries: their Q and dO stay in shared memory, their dQ in registers."""
    smem, bars, dq_desc, lse, delta, numbers = args
    batch, head, q0, nq, first_n, steps, scale, mask = numbers
    q_smem, do_smem, k_smem, v_smem = smem
    q_full, k_full, v_full, empty = bars
    ROWS: gl.constexpr = 64
    LOG2E: gl.constexpr = 1.4426950408889634
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, grad, 2)
    dtype: gl.constexpr = k_smem.dtype
    q_tile = q_smem.index(WHO)
    do_tile = do_smem.index(WHO)
    q0 = q0 + WHO * ROWS
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, tile)

    # Rows that saw no key, and rows past the end: LSE₂ = +∞ makes their P 0.
    row = q0 + gl.arange(0, ROWS, gl.SliceLayout(1, tile))
    lse = gl.load(lse + row, mask=row < nq, other=float("-inf"))
    lse = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)[:, None]
    delta = gl.load(delta + row, mask=row < nq, other=0.0)[:, None]

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    k_t = k_smem.index(0).permute((1, 0))
    s = warpgroup_mma(q_tile, k_t, none, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(0), 0)
    v_t = v_smem.index(0).permute((1, 0))
    dp = warpgroup_mma(do_tile, v_t, none, use_acc=False, is_async=True)
    s, dp = warpgroup_mma_wait(0, [s, dp])
    ds = _p(s, lse, q0, first_n * BLOCK_N, mask, CAUSAL, WINDOW) * (dp - delta)
    ds_left = gl.convert_layout(ds.to(dtype), left, assert_trivial=True)
    dq = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, grad))

    last = 0
    phase = 0
    for i in range(1, steps):
        stage, phase = _next(last, phase, STAGES)
        k_t = k_smem.index(stage).permute((1, 0))
        v_t = v_smem.index(stage).permute((1, 0))
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q_tile, k_t, none, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds_left, k_smem.index(last), dq, is_async=True)  # of the tile before
        mbarrier.wait(v_full.index(stage), phase)
        dp = warpgroup_mma(do_tile, v_t, none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(2, [s])
        # While dQ and dP run:
        p = _p(s, lse, q0, (first_n + i) * BLOCK_N, mask, CAUSAL, WINDOW)
        dp, dq = warpgroup_mma_wait(0, [dp, dq])
        dq = warpgroup_mma_init(dq)
        mbarrier.arrive(empty.index(last), count=1)
        ds = p * (dp - delta)
        ds_left = gl.convert_layout(ds.to(dtype), left, assert_trivial=True)
        last = stage

    dq = warpgroup_mma(ds_left, k_smem.index(last), dq, is_async=True)
    dq = warpgroup_mma_wait(0, [dq])
    q_tile.store((dq * scale).to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_desc, [batch, head, q0, 0], _box(q_tile, ROWS, D))
    tma.store_wait(0)


@jit
def _dq_producer(args, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Brings Q and dO once; then K and V, tile after tile."""
    smem, bars, descs, numbers = args
    q_desc, do_desc, k_desc, v_desc = descs
    batch, head, kv_head, q0, first_n, steps = numbers
    q_smem, do_smem, k_smem, v_smem = smem
    q_full, k_full, v_full, empty = bars
    ROWS: gl.constexpr = 64
    mbarrier.expect(q_full, 2 * 2 * ROWS * D * 2)
    for who in gl.static_range(2):
        at = [batch, head, q0 + who * ROWS, 0]
        tma.async_copy_global_to_shared(q_desc, at, q_full, _box(q_smem.index(who), ROWS, D))
        tma.async_copy_global_to_shared(do_desc, at, q_full, _box(do_smem.index(who), ROWS, D))
    stage = 0
    phase = 0
    for i in range(steps):
        at = [batch, kv_head, (first_n + i) * BLOCK_N, 0]
        mbarrier.wait(empty.index(stage), phase ^ 1)
        full = k_full.index(stage)
        mbarrier.expect(full, BLOCK_N * D * 2)
        tma.async_copy_global_to_shared(k_desc, at, full, _box(k_smem.index(stage), BLOCK_N, D))
        full = v_full.index(stage)
        mbarrier.expect(full, BLOCK_N * D * 2)
        tma.async_copy_global_to_shared(v_desc, at, full, _box(v_smem.index(stage), BLOCK_N, D))
        stage, phase = _next(stage, phase, STAGES)


@jit(do_not_specialize=_NUMBERS)
def dq_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, lse, delta,
    stride_b, stride_h, heads, group, nq, nk, tiles, window, slope, scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """dQ of 128 queries of one head, summed over the keys that they see."""
    ROWS: gl.constexpr = 64
    dtype: gl.constexpr = k_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    # Under the causal mask late queries have the longest loops: they start first.
    pid = gl.program_id(0)
    q0 = (tiles - 1 - pid % tiles) * (2 * ROWS)
    batch = pid // tiles // heads
    head = pid // tiles % heads
    off = nk - nq
    total = gl.cdiv(nk, BLOCK_N)
    first_n = 0
    end_n = total
    if CAUSAL:
        end_n = gl.minimum(total, gl.cdiv(gl.maximum(q0 + 2 * ROWS + off, 0), BLOCK_N))
    if WINDOW:
        first_n = gl.maximum(q0 + off - window + 1, 0) // BLOCK_N
        if not CAUSAL:
            end = q0 + 2 * ROWS - 1 + off + window
            end_n = gl.minimum(total, gl.cdiv(gl.maximum(end, 0), BLOCK_N))
    first_n = gl.minimum(first_n, total - 1)
    steps = gl.maximum(end_n - first_n, 1)
    at = batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h

    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile)
    do_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], tile)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], tile)
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
    mask = (slope, off, nk, window)
    consumer = (smem, bars, dq_desc, lse + at, delta + at,
                (batch, head, q0, nq, first_n, steps, scale, mask))  # fmt: skip
    producer = (smem, bars, (q_desc, do_desc, k_desc, v_desc),
                (batch, head, head // group, q0, first_n, steps))  # fmt: skip
    gl.warp_specialize([
        (_dq_consumer, (consumer, 0, D, BLOCK_N, STAGES, CAUSAL, WINDOW)),
        (_dq_consumer, (consumer, 1, D, BLOCK_N, STAGES, CAUSAL, WINDOW)),
        (_dq_producer, (producer, D, BLOCK_N, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


# -- the host side ---------------------------------------------------------------------------------

#: (block_m, block_n, stages, order of the products) worth timing, a good guess first
_SPACE = {
    "dkdv": {
        64: [(64, 128, 3, "early")],
        128: [(64, 128, 2, "late")],  # "early" spills here
    },
    "dq": {
        64: [(128, 128, 3, "early"), (128, 64, 4, "early")],
        128: [(128, 64, 4, "early")],
    },
}


def candidates(problem: Problem) -> list[Config]:
    """The configurations of these kernels for a problem of kind ``"dkdv"`` or ``"dq"``."""
    same = problem.head_dim == problem.head_dim_v and problem.itemsize == 2
    return _configs(problem.kind, problem.head_dim) if same else []


def _configs(kind: str, d: int) -> list[Config]:
    return [
        Config(m, n, num_warps=4, num_stages=stages, descriptors=True, by_hand=order)
        for m, n, stages, order in _SPACE.get(kind, {}).get(d, [])
    ]


def _described(x: torch.Tensor, rows: int) -> Described:
    """Boxes of ``rows`` rows of one head."""
    return Described(x, [1, 1, rows, x.shape[3]])


def _window(call, nq: int, nk: int) -> int:
    """The window as a number that no index can overflow: beyond Nq + Nk nothing changes."""
    return min(call.window or 0, nq + nk)


class _Lines:
    """LSE₂ and δ as the copy engine sees them: lines of ``block_m`` queries of one head."""

    def __init__(self, lse: torch.Tensor, block_m: int) -> None:
        from labkit.flash.launch import Launcher

        batch, heads, nq = lse.shape
        # A row of the tensor must be a multiple of 16 bytes, and the last box must lie inside.
        self.shape = (2, batch * heads, triton.cdiv(nq, 128) * 128)
        block = 1024
        self.pad = Launcher(
            rows_kernel,
            (batch * heads, triton.cdiv(self.shape[2], block)),
            (*lse.stride()[:2], heads, nq, self.shape[2]),
            dict(BLOCK=block),
            Config(block, 0, 4, 1),
        )
        self.box = [1, block_m]
        self.layout = gl.NVMMASharedLayout(0, 32, rank=2)

    def __call__(self, lse: torch.Tensor, delta: torch.Tensor) -> list:
        """Descriptors of the two."""
        out = lse.new_empty(self.shape)
        self.pad(lse, delta, out)
        shape, strides = list(self.shape[1:]), [self.shape[2], 1]
        return [TensorDescriptor(x, shape, strides, self.box, self.layout) for x in out]


class _Dkdv:
    """:func:`dkdv_kernel` with one configuration."""

    def __init__(self, q, k, v, dout, lse, delta, dq, dk, dv, call, c: Config) -> None:
        from labkit.flash.launch import Launcher

        (batch, kv_heads, nk, d), nq = k.shape, q.shape[2]
        tiles = triton.cdiv(nk, 2 * ROWS)
        self.roads = [_described(x, c.block_m) for x in (q, dout)]
        self.roads += [_described(x, ROWS) for x in (k, v, dk, dv)]
        self.lines = _Lines(lse, c.block_m)
        self.launch = Launcher(
            dkdv_kernel,
            (tiles * kv_heads * batch,),
            (q.shape[1], q.shape[1] // kv_heads, nq, nk, tiles, _window(call, nq, nk),
             call.scale * log2(e), call.scale),
            dict(D=d, BLOCK_M=c.block_m, STAGES=c.num_stages, EARLY=c.by_hand == "early",
                 CAUSAL=call.causal, WINDOW=call.window is not None),
            c,
        )  # fmt: skip

    def __call__(self, q, k, v, dout, lse, delta, dq, dk, dv, call) -> None:
        q, dout, k, v, dk, dv = (
            road(x) for road, x in zip(self.roads, (q, dout, k, v, dk, dv), strict=True)
        )
        self.launch(q, k, v, dout, *self.lines(lse, delta), dk, dv)


class _Dq:
    """:func:`dq_kernel` with one configuration."""

    def __init__(self, q, k, v, dout, lse, delta, dq, dk, dv, call, c: Config) -> None:
        from labkit.flash.launch import Launcher

        (batch, heads, nq, d), nk = q.shape, k.shape[2]
        tiles = triton.cdiv(nq, 2 * ROWS)
        self.roads = [_described(x, ROWS) for x in (q, dout, dq)]
        self.roads += [_described(x, c.block_n) for x in (k, v)]
        self.launch = Launcher(
            dq_kernel,
            (tiles * heads * batch,),
            (*lse.stride()[:2], heads, heads // k.shape[1], nq, nk, tiles,
             _window(call, nq, nk), call.scale * log2(e), call.scale),
            dict(D=d, BLOCK_N=c.block_n, STAGES=c.num_stages, CAUSAL=call.causal,
                 WINDOW=call.window is not None),
            c,
        )  # fmt: skip

    def __call__(self, q, k, v, dout, lse, delta, dq, dk, dv, call) -> None:
        q, dout, dq, k, v = (
            road(x) for road, x in zip(self.roads, (q, dout, dq, k, v), strict=True)
        )
        self.launch(q, dout, k, v, dq, lse, delta)


def plan_dkdv(q, k, v, dout, lse, delta, dq, dk, dv, call, config: Config) -> Callable[..., None]:
    """Decide all of a launch but the tensors; the result takes the same nine, and ``call``.

    Parameters
    ----------
    q, dout, dq : ``[B, H, Nq, d]`` float16 or bfloat16, as :func:`supports` asks.
    k, v, dk, dv : ``[B, Hkv, Nk, d]``.
    lse, delta : ``[B, H, Nq]`` float32, natural logarithm; strides of both as those of lse.
    call : a ``labkit.flash.launch.Call``.
    config : one of :func:`candidates`.
    """
    return _Dkdv(q, k, v, dout, lse, delta, dq, dk, dv, call, config)


def plan_dq(q, k, v, dout, lse, delta, dq, dk, dv, call, config: Config) -> Callable[..., None]:
    """As :func:`plan_dkdv`, for dQ."""
    return _Dq(q, k, v, dout, lse, delta, dq, dk, dv, call, config)


def backward(
    q, k, v, dout, lse, delta, dq, dk, dv, *, scale, causal, window=None,
    dkdv_config: Config | None = None, dq_config: Config | None = None,
) -> None:  # fmt: skip
    """Write dQ, dK and dV; both kernels, without tuning and without a plan kept.

    Parameters
    ----------
    q, k, v, dout, lse, delta, dq, dk, dv : as in :func:`plan_dkdv`.
    scale, causal, window : as in ``flash_attention``.
    dkdv_config, dq_config : of :func:`candidates`; None for the first of them.
    """
    call = SimpleNamespace(scale=scale, causal=causal, window=window)
    tensors = (q, k, v, dout, lse, delta, dq, dk, dv)
    d = q.shape[3]
    plan_dkdv(*tensors, call, dkdv_config or _configs("dkdv", d)[0])(*tensors, call)
    plan_dq(*tensors, call, dq_config or _configs("dq", d)[0])(*tensors, call)


def supports(q, k, v, *, causal: bool, window: int | None) -> str | None:
    """None if these kernels can run on such tensors, else why not; never raises.

    They need a Hopper GPU, float16 or bfloat16, head_dim = head_dim_v of 64 or 128, and tensors
    that the copy engine can read: last dimension dense, other strides and the start multiples of
    16 bytes.  Any mask, window, seq_len and grouping of heads will do.  dout and the gradients
    must be such tensors too.
    """
    try:
        if why := off_hopper(q, k, v):
            return why
        if not isinstance(rows_kernel, triton.JITFunction):
            return "Triton's interpreter is on"
        if q.shape[3] not in _SPACE["dq"] or v.shape[3] != q.shape[3]:
            return "head_dim is not 64 or 128 for q, k and v alike"
        return unreadable(q, k, v)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
