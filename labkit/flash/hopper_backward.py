"""draft"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

WG_ROWS = gl.constexpr(64)


@gluon.jit
def _tile4(smem, ROWS: gl.constexpr, D: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    return smem._reinterpret(smem.dtype, [1, 1, ROWS, D], layout)


@gluon.jit
def _visible(q_index, k_index, off, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Whether query q sees key k, with q already shifted by off = Nk - Nq."""
    distance = q_index + off - k_index
    if CAUSAL:
        seen = distance >= 0
        if WINDOW:
            seen = seen & (distance < window)
    else:
        seen = (distance < window) & (distance > -window)
    return seen


@gluon.jit
def _edge(q0, Q_ROWS: gl.constexpr, k0, K_ROWS: gl.constexpr, off, window,
          CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Whether some pair of the tile is hidden: only such a tile pays for the mask."""
    smallest = q0 + off - (k0 + K_ROWS - 1)
    largest = q0 + Q_ROWS - 1 + off - k0
    cut = largest < smallest
    if CAUSAL:
        cut = cut | (smallest < 0)
    if WINDOW:
        cut = cut | (largest >= window)
        if not CAUSAL:
            cut = cut | (smallest <= -window)
    return cut


@gluon.jit
def _probabilities_t(s, lse, slope, q0, k0, off, window,
                     BM: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
                     layout: gl.constexpr):
    p = gl.exp2(s * slope - lse[None, :])
    if CAUSAL or WINDOW:
        if _edge(q0, BM, k0, WG_ROWS, off, window, CAUSAL, WINDOW):
            k_index = k0 + gl.arange(0, WG_ROWS, gl.SliceLayout(1, layout))
            q_index = q0 + gl.arange(0, BM, gl.SliceLayout(0, layout))
            seen = _visible(q_index[None, :], k_index[:, None], off, window, CAUSAL, WINDOW)
            p = gl.where(seen, p, 0.0)
    return p


@gluon.jit
def _row_stat(smem, stage, BM: gl.constexpr, layout: gl.constexpr):
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return smem.index(stage)._reinterpret(gl.float32, [BM], flat).load(gl.SliceLayout(0, layout))


@gluon.jit
def _dkdv_consumer(WG: gl.constexpr, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem,
                   kv_full, q_full, q_empty, do_full, do_empty, dk_desc, dv_desc,
                   batch, kv_head, k0, first_m, count_m, tiles, slope, scale, off, window,
                   D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
                   CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    grad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, grad, 2)
    dtype: gl.constexpr = k_smem.dtype
    nothing = gl.zeros([WG_ROWS, BM], gl.float32, score)
    dk = warpgroup_mma_init(gl.zeros([WG_ROWS, D], gl.float32, grad))
    dv = warpgroup_mma_init(gl.zeros([WG_ROWS, D], gl.float32, grad))
    k_tile = k_smem.index(WG)
    v_tile = v_smem.index(WG)
    k_row = k0 + WG * WG_ROWS

    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0)
    s = warpgroup_mma(k_tile, q_smem.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(0), 0)
    dp = warpgroup_mma(v_tile, do_smem.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_init(warpgroup_mma_wait(1, [s]))

    stage = 0
    phase = 0
    m = first_m
    for it in range(tiles - 1):
        last = gl.where(stage == 0, STAGES - 1, stage - 1)
        after = gl.where(stage == STAGES - 1, 0, stage + 1)
        after_phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
        scores = warpgroup_mma_wait(2, [s])
        mbarrier.arrive(do_empty.index(last), count=1, pred=it > 0)
        lse = _row_stat(lse_smem, stage, BM, score)
        p = _probabilities_t(scores, lse, slope, m * BM, k_row, off, window, BM, CAUSAL, WINDOW, score)
        p_left = gl.convert_layout(p.to(dtype), left, assert_trivial=True)
        dv = warpgroup_mma(p_left, do_smem.index(stage), dv, is_async=True)
        dprob = warpgroup_mma_wait(1, [dp])
        mbarrier.arrive(q_empty.index(last), count=1, pred=it > 0)
        delta = _row_stat(delta_smem, stage, BM, score)
        ds = p * (dprob - delta[None, :])
        ds_left = gl.convert_layout(ds.to(dtype), left, assert_trivial=True)
        mbarrier.wait(q_full.index(after), after_phase)
        s = warpgroup_mma(k_tile, q_smem.index(after).permute((1, 0)), nothing, use_acc=False, is_async=True)
        dk = warpgroup_mma(ds_left, q_smem.index(stage), dk, is_async=True)
        mbarrier.wait(do_full.index(after), after_phase)
        dp = warpgroup_mma(v_tile, do_smem.index(after).permute((1, 0)), nothing, use_acc=False, is_async=True)
        stage = after
        phase = after_phase
        m = gl.where(m + 1 == first_m + count_m, first_m, m + 1)

    scores = warpgroup_mma_wait(2, [s])
    lse = _row_stat(lse_smem, stage, BM, score)
    p = _probabilities_t(scores, lse, slope, m * BM, k_row, off, window, BM, CAUSAL, WINDOW, score)
    p_left = gl.convert_layout(p.to(dtype), left, assert_trivial=True)
    dv = warpgroup_mma(p_left, do_smem.index(stage), dv, is_async=True)
    dprob = warpgroup_mma_wait(1, [dp])
    delta = _row_stat(delta_smem, stage, BM, score)
    ds = p * (dprob - delta[None, :])
    ds_left = gl.convert_layout(ds.to(dtype), left, assert_trivial=True)
    dk = warpgroup_mma(ds_left, q_smem.index(stage), dk, is_async=True)
    dv = warpgroup_mma_wait(1, [dv])
    v_tile.store(dv.to(dtype))
    dk = warpgroup_mma_wait(0, [dk])
    k_tile.store((dk * scale).to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv_desc, [batch, kv_head, k_row, 0], _tile4(v_tile, WG_ROWS, D))
    tma.async_copy_shared_to_global(dk_desc, [batch, kv_head, k_row, 0], _tile4(k_tile, WG_ROWS, D))
    tma.store_wait(0)


@gluon.jit
def _dkdv_producer(k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem,
                   kv_full, q_full, q_empty, do_full, do_empty,
                   q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc,
                   batch, heads, kv_head, group, k0, first_m, count_m, tiles,
                   D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, WGS: gl.constexpr):
    mbarrier.expect(kv_full, 2 * WGS * WG_ROWS * D * 2)
    for w in gl.static_range(WGS):
        at = [batch, kv_head, k0 + w * WG_ROWS, 0]
        tma.async_copy_global_to_shared(k_desc, at, kv_full, _tile4(k_smem.index(w), WG_ROWS, D))
        tma.async_copy_global_to_shared(v_desc, at, kv_full, _tile4(v_smem.index(w), WG_ROWS, D))
    stage = 0
    phase = 0
    m = first_m
    head = kv_head * group
    for _ in range(tiles):
        at = [batch, head, m * BM, 0]
        row = [batch * heads + head, m * BM]
        full = q_full.index(stage)
        mbarrier.wait(q_empty.index(stage), phase ^ 1)
        mbarrier.expect(full, BM * D * 2 + BM * 4)
        tma.async_copy_global_to_shared(q_desc, at, full, _tile4(q_smem.index(stage), BM, D))
        tma.async_copy_global_to_shared(lse_desc, row, full, lse_smem.index(stage))
        full = do_full.index(stage)
        mbarrier.wait(do_empty.index(stage), phase ^ 1)
        mbarrier.expect(full, BM * D * 2 + BM * 4)
        tma.async_copy_global_to_shared(do_desc, at, full, _tile4(do_smem.index(stage), BM, D))
        tma.async_copy_global_to_shared(delta_desc, row, full, delta_smem.index(stage))
        wrap = m + 1 == first_m + count_m
        head = gl.where(wrap, head + 1, head)
        m = gl.where(wrap, first_m, m + 1)
        phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _dkdv_kernel(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_desc, dv_desc,
                 heads, group, nq, nk, blocks, slope, scale, window,
                 D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, WGS: gl.constexpr,
                 CAUSAL: gl.constexpr, WINDOW: gl.constexpr, REGS: gl.constexpr):
    BN: gl.constexpr = WGS * WG_ROWS
    dtype: gl.constexpr = k_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    stat: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    pid = gl.program_id(0)
    k0 = (pid % blocks) * BN
    kv_heads = heads // group
    batch = pid // blocks // kv_heads
    kv_head = pid // blocks % kv_heads
    off = nk - nq
    total_m = gl.cdiv(nq, BM)
    first_m = 0
    end_m = total_m
    if CAUSAL:
        first_m = gl.maximum(k0 - off, 0) // BM
    if WINDOW:
        end_m = gl.minimum(end_m, gl.cdiv(gl.maximum(k0 + BN - 1 + window - off, 0), BM))
        if not CAUSAL:
            first_m = gl.maximum(k0 - off - window + 1, 0) // BM
    first_m = gl.minimum(first_m, total_m - 1)
    count_m = gl.maximum(end_m - first_m, 1)
    tiles = count_m * group

    k_smem = gl.allocate_shared_memory(dtype, [WGS, WG_ROWS, D], tile)
    v_smem = gl.allocate_shared_memory(dtype, [WGS, WG_ROWS, D], tile)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, BM, D], tile)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, BM, D], tile)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], stat)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], stat)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=WGS)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=WGS)
    fence_async_shared()

    smem = (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem)
    bars = (kv_full, q_full, q_empty, do_full, do_empty)
    if WGS == 2:
        gl.warp_specialize([
            (_dkdv_consumer, (0, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem,
                   kv_full, q_full, q_empty, do_full, do_empty, dk_desc, dv_desc,
                   batch, kv_head, k0, first_m, count_m, tiles, slope, scale, off, window,
                   D, BM, STAGES, CAUSAL, WINDOW)),
            (_dkdv_consumer, (1, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem,
                   kv_full, q_full, q_empty, do_full, do_empty, dk_desc, dv_desc,
                   batch, kv_head, k0, first_m, count_m, tiles, slope, scale, off, window,
                   D, BM, STAGES, CAUSAL, WINDOW)),
            (_dkdv_producer, (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem,
                   kv_full, q_full, q_empty, do_full, do_empty,
                   q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc,
                   batch, heads, kv_head, group, k0, first_m, count_m, tiles,
                   D, BM, STAGES, WGS)),
        ], [4, 1], [REGS, 24])
