"""The forward kernel by hand for Hopper (draft)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    _jit = gluon.jit
except ImportError as missing:  # Triton before 3.4 has no Gluon
    gluon = gl = None
    _MISSING = str(missing)

    def _jit(function):
        return function


@dataclass(frozen=True)
class Config:
    block_m: int = 128
    block_n: int = 128
    stages: int = 2
    consumers: int = 2
    warps: int = 4
    overlap: bool = True
    pingpong: bool = False
    persistent: bool = False
    poly: int = 0


@_jit
def _tile(t, tiles_m, heads, group, LONGEST_FIRST: gl.constexpr):
    if LONGEST_FIRST:
        g = t // (group * tiles_m)
        within = t - g * (group * tiles_m)
        size = min(heads - g * group, group)
        head = g * group + within % size
        m = tiles_m - 1 - within // size
    else:
        head = t // tiles_m
        m = t % tiles_m
    return head, m


@_jit
def _span(m0, Nq, Nk, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    end = Nk
    begin = 0
    if CAUSAL:
        end = min(end, m0 + BLOCK_M + Nk - Nq)
    elif WINDOW:
        end = min(end, m0 + BLOCK_M - 1 + Nk - Nq + window)
    end = max(1, (end + BLOCK_N - 1) // BLOCK_N)
    if WINDOW:
        begin = min(max(0, m0 + Nk - Nq - window + 1) // BLOCK_N, end - 1)
    return begin, end


@_jit
def _produce(
    args,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PERSISTENT: gl.constexpr,
):
    q_desc, k_desc, v_desc, smem, bars, work = args
    q_smem, k_smem, v_smem, o_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    rounds, tiles_m, heads_q, group, H, H_GROUP, Nq, Nk, window = work
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    c = 0
    for r in range(rounds):
        t = _ordinal(r, PERSISTENT)
        head, tile_m = _tile(t, tiles_m, heads_q, group, CAUSAL)
        b = head // H
        h = head % H
        hk = h // H_GROUP
        m0 = tile_m * BLOCK_M
        begin, end = _span(m0, Nq, Nk, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)

        if PERSISTENT:
            mbarrier.wait(q_empty, (r & 1) ^ 1)
        mbarrier.expect(q_full, BLOCK_M * D * 2)
        for w in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(q_desc, [b, h, m0 + w * ROWS, 0], q_full, q_smem.index(w)._reinterpret(q_desc.dtype, [1, 1, ROWS, D], q_desc.layout))
        for i in range(end - begin):
            j = end - 1 - i
            stage = c % STAGES
            phase = ((c // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), BLOCK_N * D * 2)
            tma.async_copy_global_to_shared(k_desc, [b, hk, j * BLOCK_N, 0], k_full.index(stage), k_smem.index(stage)._reinterpret(k_desc.dtype, [1, 1, BLOCK_N, D], k_desc.layout))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BLOCK_N * D * 2)
            tma.async_copy_global_to_shared(v_desc, [b, hk, j * BLOCK_N, 0], v_full.index(stage), v_smem.index(stage)._reinterpret(v_desc.dtype, [1, 1, BLOCK_N, D], v_desc.layout))
            c += 1


@_jit
def _ordinal(r, PERSISTENT: gl.constexpr):
    pid = gl.program_id(0)
    t = pid
    if PERSISTENT:
        n = gl.num_programs(0)
        t = r * n + gl.where(r % 2 == 0, pid, n - 1 - pid)
    return t


@_jit
def _visible(s, row0, col0, Nq, Nk, window, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, S: gl.constexpr):
    i = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S)) + (Nk - Nq)
    j = col0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
    if CAUSAL:
        end = gl.minimum(i + 1, Nk)
        ok = j[None, :] < end[:, None]
    elif WINDOW:
        end = gl.minimum(i + window, Nk)
        ok = j[None, :] < end[:, None]
    else:
        ok = (j < Nk)[None, :]
        ok, s = gl.broadcast(ok, s)
    if WINDOW:
        ok = ok & (j[None, :] > (i - window)[:, None])
    return gl.where(ok, s, float("-inf"))


@_jit
def _exp2(x, POLY: gl.constexpr):
    return gl.exp2(x)


@_jit
def _softmax(s, m, l, scale, POLY: gl.constexpr):
    m_new = gl.maximum(m, gl.max(s, 1))
    finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2((m - finite) * scale)
    p = _exp2(s * scale - (finite * scale)[:, None], POLY)
    l = l * alpha + gl.sum(p, 1)
    return p, m_new, l, alpha


@_jit
def _steps(
    first, count, row0, c, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, weights, o, m, l,
    scale, Nq, Nk, window,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PINGPONG: gl.constexpr, POLY: gl.constexpr,
    WHO: gl.constexpr, S: gl.constexpr, O: gl.constexpr, P: gl.constexpr,
):
    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
    for n in range(count):
        stage = c % STAGES
        last = (c - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (c // STAGES) & 1)
        if PINGPONG:
            mbarrier.wait(turn.index(WHO), (c & 1) ^ (1 - WHO))
        s = warpgroup_mma(q, k_smem.index(stage).permute([1, 0]), blank, use_acc=False, is_async=True)
        p = gl.convert_layout(weights.to(v_smem.dtype), P)
        o = warpgroup_mma(p, v_smem.index(last), o, is_async=True)
        if PINGPONG:
            mbarrier.arrive(turn.index(1 - WHO), count=1)
        s = warpgroup_mma_wait(1, [s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if MASKED:
            s = _visible(s, row0, (first - n) * BLOCK_N, Nq, Nk, window, ROWS, BLOCK_N, CAUSAL, WINDOW, S)
        weights, m, l, alpha = _softmax(s, m, l, scale, 0 if MASKED else POLY)
        mbarrier.wait(v_full.index(stage), (c // STAGES) & 1)
        o = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_empty.index(last), count=1)
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
        c += 1
    return weights, o, m, l, c


@_jit
def _consume(
    args,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PERSISTENT: gl.constexpr,
    OVERLAP: gl.constexpr, PINGPONG: gl.constexpr, POLY: gl.constexpr, WHO: gl.constexpr,
):
    o_desc, lse_ptr, scale, smem, bars, work = args
    q_smem, k_smem, v_smem, o_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    rounds, tiles_m, heads_q, group, H, H_GROUP, Nq, Nk, window = work
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    WARPS: gl.constexpr = gl.num_warps()
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    LOG2E: gl.constexpr = 1.4426950408889634
    dtype: gl.constexpr = o_desc.dtype
    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)

    c = 0
    for r in range(rounds):
        t = _ordinal(r, PERSISTENT)
        head, tile_m = _tile(t, tiles_m, heads_q, group, CAUSAL)
        m0 = tile_m * BLOCK_M
        begin, end = _span(m0, Nq, Nk, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        row0 = m0 + WHO * ROWS
        full_end = Nk
        if CAUSAL:
            full_end = min(full_end, row0 + 1 + Nk - Nq)
        elif WINDOW:
            full_end = min(full_end, row0 + window + Nk - Nq)
        full_end = min(max(full_end // BLOCK_N, begin), end - 1)
        if WINDOW:
            full_begin = max(0, row0 + ROWS + Nk - Nq - window)
            full_begin = min(max((full_begin + BLOCK_N - 1) // BLOCK_N, begin), full_end)
        else:
            full_begin = begin

        q = q_smem.index(WHO)
        mbarrier.wait(q_full, r & 1)

        stage = c % STAGES
        mbarrier.wait(k_full.index(stage), (c // STAGES) & 1)
        s = warpgroup_mma(q, k_smem.index(stage).permute([1, 0]), blank, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        s = _visible(s, row0, (end - 1) * BLOCK_N, Nq, Nk, window, ROWS, BLOCK_N, CAUSAL, WINDOW, S)
        m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
        l = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S))
        weights, m, l, alpha = _softmax(s, m, l, scale * LOG2E, 0)
        o = gl.zeros([ROWS, D], gl.float32, layout=O)
        mbarrier.wait(v_full.index(stage), (c // STAGES) & 1)
        c += 1

        weights, o, m, l, c = _steps(
            end - 2, end - 1 - full_end, row0, c, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, weights, o, m, l,
            scale * LOG2E, Nq, Nk, window, ROWS, BLOCK_N, STAGES, True, CAUSAL, WINDOW, PINGPONG, POLY, WHO, S, O, P)
        weights, o, m, l, c = _steps(
            full_end - 1, full_end - full_begin, row0, c, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, weights, o, m, l,
            scale * LOG2E, Nq, Nk, window, ROWS, BLOCK_N, STAGES, False, CAUSAL, WINDOW, PINGPONG, POLY, WHO, S, O, P)
        if WINDOW:
            weights, o, m, l, c = _steps(
                full_begin - 1, full_begin - begin, row0, c, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, weights, o, m, l,
                scale * LOG2E, Nq, Nk, window, ROWS, BLOCK_N, STAGES, True, CAUSAL, WINDOW, PINGPONG, POLY, WHO, S, O, P)
        if PERSISTENT:
            mbarrier.arrive(q_empty, count=1)
        last = (c - 1) % STAGES
        p = gl.convert_layout(weights.to(dtype), P)
        o = warpgroup_mma(p, v_smem.index(last), o, is_async=True)
        o = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_empty.index(last), count=1)

        rows = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        gl.store(lse_ptr + head.to(gl.int64) * Nq + rows, m * scale + gl.log(l), mask=rows < Nq)
        weight = 1.0 / gl.where(l == 0.0, 1.0, l)
        o = o * gl.convert_layout(weight, gl.SliceLayout(1, O))[:, None]
        if PERSISTENT:
            tma.store_wait(0)
        out = o_smem.index(WHO)
        out.store(o.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [head // H, head % H, row0, 0], out._reinterpret(dtype, [1, 1, ROWS, D], o_desc.layout))
    tma.store_wait(0)


@_jit
def _forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, scale, H, H_GROUP, Nq, Nk, window, tiles_m, heads_q, group,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PERSISTENT: gl.constexpr,
    OVERLAP: gl.constexpr, PINGPONG: gl.constexpr, POLY: gl.constexpr,
):
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], TILE)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], TILE)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], TILE)
    if PERSISTENT:
        o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], TILE)
    else:
        o_smem = q_smem

    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()

    rounds = 1
    if PERSISTENT:
        n = gl.num_programs(0)
        pid = gl.program_id(0)
        rounds = (tiles_m * heads_q) // n
        rest = tiles_m * heads_q - rounds * n
        rounds += (gl.where(rounds % 2 == 0, pid, n - 1 - pid) < rest).to(gl.int32)

    smem = (q_smem, k_smem, v_smem, o_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    work = (rounds, tiles_m, heads_q, group, H, H_GROUP, Nq, Nk, window)
    producer = (q_desc, k_desc, v_desc, smem, bars, work)
    consumer = (o_desc, lse_ptr, scale, smem, bars, work)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [(_consume, (consumer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT, OVERLAP, PINGPONG, POLY, 0)),
             (_produce, (producer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT))], [1], [PRODUCER_REGS])
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [(_consume, (consumer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT, OVERLAP, PINGPONG, POLY, 0)),
             (_consume, (consumer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT, OVERLAP, PINGPONG, POLY, 1)),
             (_produce, (producer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT))],
            [WARPS, 1], [CONSUMER_REGS, PRODUCER_REGS])
    else:
        gl.warp_specialize(
            [(_consume, (consumer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT, OVERLAP, PINGPONG, POLY, 0)),
             (_consume, (consumer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT, OVERLAP, PINGPONG, POLY, 1)),
             (_consume, (consumer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT, OVERLAP, PINGPONG, POLY, 2)),
             (_produce, (producer, BLOCK_M, BLOCK_N, D, STAGES, CONSUMERS, CAUSAL, WINDOW, PERSISTENT))],
            [WARPS, WARPS, 1], [CONSUMER_REGS, CONSUMER_REGS, PRODUCER_REGS])
