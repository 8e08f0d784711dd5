"""Launching: from checked tensors to a grid of programs.

Everything that is decided once per call and not in a kernel: which configuration, how many
programs in which order, whether the copy engine can be used, whether the keys are split, what is
allocated.  Shapes and dtypes were checked by ``api.py``.

Taught in chapter 08 (the forward kernel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton

from labkit.flash import tuning
from labkit.flash.backward import delta_kernel, dkdv_kernel, dq_kernel
from labkit.flash.forward import forward_kernel, merge_kernel
from labkit.flash.masking import visible_pairs
from labkit.flash.tuning import Config, Problem
from labkit.kernels.runtime import check_can_launch

__all__ = ["Call", "backward", "forward", "like"]

LOG2E = math.log2(math.e)
#: a stride of 0 would divide nothing; the copy engine wants multiples of this many bytes
_TMA_ALIGN = 16


@dataclass(frozen=True)
class Call:
    """What a call asks for beside its tensors.

    Attributes
    ----------
    causal, window, scale, precision : as in ``flash_attention``; window None means none.
    cu_q, cu_k : ``[sequences + 1]`` int32 offsets for varlen, else None.
    max_q, max_k : longest sequence; seq_len itself without varlen.
    """

    causal: bool
    scale: float
    window: int | None
    precision: str
    max_q: int
    max_k: int
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None

    @property
    def sequences(self) -> int | None:
        """How many sequences lie one after another; None without varlen."""
        return None if self.cu_q is None else self.cu_q.shape[0] - 1


@cache
def _card(index: int) -> tuple[int, int, int, int]:
    """(compute capability × 10, shared memory per block, multiprocessors, L2 bytes)."""
    p = torch.cuda.get_device_properties(index)
    return (
        10 * p.major + p.minor,
        p.shared_memory_per_block_optin,
        p.multi_processor_count,
        p.L2_cache_size,
    )


def card(x: torch.Tensor) -> tuple[int, int, int, int]:
    """The card that ``x`` lies on; a stand-in of capability 0 for the interpreter."""
    return _card(x.device.index or 0) if x.is_cuda else (0, 2**30, 4, 2**20)


def like(x: torch.Tensor, width: int) -> torch.Tensor:
    """An empty ``[batch, heads, seq_len, width]`` that lies in memory in the order that x does.

    A model's q is often a view of ``[batch, seq_len, heads, head_dim]``; an output in the same
    order can be viewed back without a copy.
    """
    b, h, n, _ = x.shape
    if h > 1 and n > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((b, n, h, width)).transpose(1, 2)
    return x.new_empty((b, h, n, width))


def _describable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can read these: aligned, last dimension dense, no stride of 0."""
    for x in tensors:
        align = _TMA_ALIGN // x.element_size()
        if x.stride(3) != 1 or x.data_ptr() % _TMA_ALIGN or x.shape[3] % align:
            return False
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
            if size > 1 and (stride % align or stride <= 0):
                return False
    return True


def _descriptor(x: torch.Tensor, rows: int, block_d: int):
    """x as the copy engine sees it: tiles of ``rows`` × ``block_d`` of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    align = _TMA_ALIGN // x.element_size()
    # The stride of a dimension of size 1 is never used, and may be anything.
    strides = [s if n > 1 else max(align, s - s % align) for n, s in zip(x.shape, x.stride(), strict=True)]  # noqa: E501
    strides[3] = 1
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, block_d])


def _wide(rows: int, *tensors: torch.Tensor) -> bool:
    """Whether an offset inside a tile can exceed 32 bits."""
    return any(
        rows * abs(x.stride(2)) + x.shape[3] * abs(x.stride(3)) >= 2**31 for x in tensors
    )


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _section(call: Call, x: torch.Tensor, y: torch.Tensor, share: int = 1) -> int:
    """Heads whose tiles run together: as many as have their streamed tensors in half of L2."""
    if not call.causal:
        return 1
    each = max(call.max_k, call.max_q) * (x.shape[3] + y.shape[3]) * x.element_size()
    return max(1, int(card(x)[3] // 2 // max(1, each))) * share


def _flops(call: Call, heads: int, width: int) -> int:
    window = None if call.window is None or call.window >= call.max_k + call.max_q else call.window
    return 2 * heads * width * visible_pairs(call.max_q, call.max_k, call.causal, window)


def _problem(kind: str, call: Call, q, k, v, heads: int, describable: bool, by_hand) -> Problem:
    arch, shared, sms, _ = card(q)
    return Problem(
        kind=kind, dtype=str(q.dtype).removeprefix("torch."), precision=call.precision,
        head_dim=q.shape[3], head_dim_v=v.shape[3], rows=call.max_q, cols=call.max_k,
        heads=heads, causal=call.causal, windowed=call.window is not None,
        descriptors=describable and arch >= 90 and call.cu_q is None, by_hand=by_hand,
        arch=arch, shared_limit=shared, sms=sms,
    )  # fmt: skip


def _splits(call: Call, q, k, tiles: int, heads: int, block_n: int) -> int:
    """Programs that share one tile of queries: 1 unless the card would be mostly idle."""
    arch, _, sms, _ = card(q)
    busy = tiles * heads
    span = call.max_k if call.window is None else min(call.max_k, 2 * call.window + call.max_q)
    steps = -(-span // block_n)
    if arch == 0:  # the interpreter: split where a GPU of four multiprocessors would
        return max(1, min(4 // max(1, busy), steps))
    if busy * 2 > sms or steps < 4:
        return 1
    # Two programs fit on a multiprocessor; a part shorter than two tiles is all overhead.
    return max(1, min(2 * sms // busy, steps // 2, 64))


# -- forward -------------------------------------------------------------------------------------


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE; q ``[B, H, Nq, d]``, k ``[B, Hkv, Nk, d]``, v ``[B, Hkv, Nk, dv]``.

    For varlen B is 1 and the sequences lie one after another along N.  ``config`` and ``splits``
    overrule what would be chosen: experiments and tests use them.
    """
    check_can_launch("flash_attention", q, k, v)
    batch = call.sequences or q.shape[0]
    heads, kv_heads, group = q.shape[1], k.shape[1], q.shape[1] // k.shape[1]
    o = like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if call.max_q == 0:
        return o, lse

    # A few queries of many heads: the rows of a tile are the heads of a group.
    pack = group > 1 and call.max_q * group <= 128 and group <= 64
    describable = not pack and _describable(q, k, v)
    by_hand = "packed" if pack else _forward_by_hand(q, k, v, call)
    width = q.shape[3] + v.shape[3]
    if pack:
        rows, all_heads = call.max_q * group, batch * kv_heads
        problem = _problem("forward", call, q, k, v, all_heads, False, by_hand)
        chosen = config or _packed_config(problem, rows)
    else:
        rows, all_heads = call.max_q, batch * heads
        problem = _problem("forward", call, q, k, v, all_heads, describable, by_hand)
        chosen = config or tuning.choose(
            problem, _flops(call, all_heads, width),
            lambda c: _forward(q, k, v, o, lse, call, c, rows, all_heads, False, 1),
        )  # fmt: skip
    if splits is None and not chosen.by_hand:
        tiles = -(-rows // chosen.block_m)
        splits = _splits(call, q, k, tiles, all_heads, chosen.block_n)
    _forward(q, k, v, o, lse, call, chosen, rows, all_heads, pack, splits or 1)
    return o, lse


def _forward_by_hand(q, k, v, call: Call) -> str | None:
    """Why the hand-written Hopper forward cannot run; None when it can."""
    if call.cu_q is not None:
        return "varlen"
    if card(q)[0] != 90:
        return "not a Hopper card"
    return "not wired yet"


def _packed_config(problem: Problem, rows: int) -> Config:
    fitted = tuning.default(problem)
    if problem.arch == 0:
        return fitted
    # One warp per 16 rows; more keys per tile, since the rows are few.
    few = 16 if rows <= 16 else 32 if rows <= 32 else 64
    n = 64 if problem.itemsize * (problem.head_dim + problem.head_dim_v) <= 512 else 32
    return Config(few, n, 4, 3 if problem.shared_limit > 160 * 1024 else 2)


def _forward(q, k, v, o, lse, call: Call, c: Config, rows, all_heads, pack, splits) -> None:
    """One launch with one configuration."""
    if c.by_hand:
        from labkit.flash import hopper

        hopper.forward(q, k, v, o, lse, scale=call.scale, causal=call.causal,
                       window=call.window, config=c)  # fmt: skip
        return
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    d, dv = q.shape[3], v.shape[3]
    block_d, block_dv = _block(d), _block(dv)
    tiles = triton.cdiv(rows, c.block_m)
    even = call.cu_q is None and call.max_q % c.block_m == 0 and call.max_k % c.block_n == 0
    args = (q, k, v)
    if c.descriptors:
        args = (
            _descriptor(q, c.block_m, block_d),
            _descriptor(k, c.block_n, block_d),
            _descriptor(v, c.block_n, block_dv),
        )
    out, out_lse, part_strides = o, lse, (0, 0)
    if splits > 1:
        shape = (splits, *o.shape)
        out = o.new_empty(shape, dtype=torch.float32)
        out_lse = lse.new_empty((splits, *lse.shape))
        part_strides = (out.stride(0), out_lse.stride(0))
    o_strides, l_strides = out.stride()[-4:-1], out_lse.stride()[-3:-1]
    forward_kernel[(tiles * all_heads, splits)](
        *args, out, out_lse, call.cu_q, call.cu_k,
        *q.stride(), *k.stride(), *v.stride(), part_strides[0], *o_strides,
        part_strides[1], *l_strides,
        kv_heads if pack else heads, all_heads, call.max_q, call.max_k, tiles,
        min(all_heads, _section(call, k, v, 1 if pack else group)),
        call.window or 0, call.scale * LOG2E,
        GROUP=group, D=d, DV=dv, BLOCK_D=block_d, BLOCK_DV=block_dv,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        CAUSAL=call.causal, WINDOW=call.window is not None, VARLEN=call.cu_q is not None,
        EVEN=even, PACK=pack, SPLITS=splits, DESCRIPTOR=c.descriptors,
        WIDE=_wide(max(c.block_m, c.block_n), q, k, v, o), PRECISION=call.precision,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if splits > 1:
        total = o.shape[0] * heads * o.shape[2]
        block_m = 4 if block_dv >= 128 else 8
        merge_kernel[(triton.cdiv(total, block_m),)](
            out, out_lse, o, lse, total, part_strides[0], part_strides[1],
            heads, o.shape[2], *o.stride()[:3], *lse.stride()[:2],
            DV=dv, BLOCK_DV=block_dv, BLOCK_M=block_m, SPLITS=splits, num_warps=4,
        )  # fmt: skip


# -- backward ------------------------------------------------------------------------------------


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    *,
    dkdv_config: Config | None = None,
    dq_config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV, shaped and laid out as q, k, v; ``dlse`` may be None (LSE was not used)."""
    check_can_launch("flash_attention", q, k, v, dout)
    if dout.stride(3) != 1 or 0 in dout.stride():
        dout = dout.contiguous()  # the gradient of .sum() is one number with strides of 0
    dq, dk, dv = like(q, q.shape[3]), like(k, k.shape[3]), like(v, v.shape[3])
    if call.max_q == 0 or call.max_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    _delta(o, dout, lse, dlse, delta, call)

    batch = call.sequences or q.shape[0]
    describable = _describable(q, k, v, dout)
    width = q.shape[3] + v.shape[3]
    by_hand = _backward_by_hand(q, k, v, dout, call)
    if by_hand is None:
        from labkit.flash import hopper_backward

        problem = _problem("dkdv", call, q, k, v, batch * k.shape[1], describable, None)
        whole = hopper_backward.candidates(problem)
    else:
        whole = []
    if whole and dkdv_config is None and dq_config is None:
        hopper_backward.backward(
            q, k, v, dout, lse, delta, dq, dk, dv,
            scale=call.scale, causal=call.causal, window=call.window,
        )  # fmt: skip
        return dq, dk, dv

    problem = _problem("dkdv", call, q, k, v, batch * k.shape[1], describable, "stock Triton")
    run = lambda c: _dkdv(q, k, v, dout, lse, delta, dk, dv, call, c)  # noqa: E731
    flops = 2 * _flops(call, batch * q.shape[1], width)
    run(dkdv_config or tuning.choose(problem, flops, run))
    problem = _problem("dq", call, q, k, v, batch * q.shape[1], describable, "stock Triton")
    run = lambda c: _dq(q, k, v, dout, lse, delta, dq, call, c)  # noqa: E731
    run(dq_config or tuning.choose(problem, flops, run))
    return dq, dk, dv


def _backward_by_hand(q, k, v, dout, call: Call) -> str | None:
    """Why the hand-written Hopper backward cannot run; None when it can."""
    if call.cu_q is not None:
        return "varlen"
    if card(q)[0] != 90:
        return "not a Hopper card"
    return "not wired yet"


def _delta(o, dout, lse, dlse, delta, call: Call) -> None:
    dv = o.shape[3]
    block_m = 32
    tiles = triton.cdiv(call.max_q, block_m)
    batch = call.sequences or o.shape[0]
    extra = lse if dlse is None else dlse
    delta_kernel[(tiles * batch * o.shape[1],)](
        o, dout, lse, extra, delta, call.cu_q,
        *o.stride()[:3], *dout.stride(), *extra.stride(), *lse.stride()[:2],
        o.shape[1], call.max_q, tiles,
        DV=dv, BLOCK_DV=_block(dv), BLOCK_M=block_m,
        VARLEN=call.cu_q is not None, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip


def _constants(call: Call, c: Config, q, v, tensors) -> dict:
    d, dv = q.shape[3], v.shape[3]
    even = call.cu_q is None and call.max_q % c.block_m == 0 and call.max_k % c.block_n == 0
    return dict(
        D=d, DV=dv, BLOCK_D=_block(d), BLOCK_DV=_block(dv), BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        CAUSAL=call.causal, WINDOW=call.window is not None, VARLEN=call.cu_q is not None,
        EVEN=even, DESCRIPTOR=c.descriptors, WIDE=_wide(max(c.block_m, c.block_n), *tensors),
        PRECISION=call.precision, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def _tiles_of(c: Config, q, k, v, dout):
    """The four inputs as a kernel wants them: described to the copy engine, or as they are."""
    if not c.descriptors:
        return q, k, v, dout
    block_d, block_dv = _block(q.shape[3]), _block(v.shape[3])
    return (
        _descriptor(q, c.block_m, block_d), _descriptor(k, c.block_n, block_d),
        _descriptor(v, c.block_n, block_dv), _descriptor(dout, c.block_m, block_dv),
    )  # fmt: skip


def _dkdv(q, k, v, dout, lse, delta, dk, dv, call: Call, c: Config) -> None:
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    every = (call.sequences or q.shape[0]) * kv_heads
    tiles = triton.cdiv(call.max_k, c.block_n)
    dkdv_kernel[(tiles * every,)](
        *_tiles_of(c, q, k, v, dout), lse, delta, dk, dv, call.cu_q, call.cu_k,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *lse.stride()[:2],
        *dk.stride()[:3], *dv.stride()[:3],
        kv_heads, every, call.max_q, call.max_k, tiles, min(every, _section(call, q, dout)),
        call.window or 0, call.scale * LOG2E, call.scale,
        GROUP=group, **_constants(call, c, q, v, (q, k, v, dout, dk, dv)),
    )  # fmt: skip


def _dq(q, k, v, dout, lse, delta, dq, call: Call, c: Config) -> None:
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    every = (call.sequences or q.shape[0]) * heads
    tiles = triton.cdiv(call.max_q, c.block_m)
    dq_kernel[(tiles * every,)](
        *_tiles_of(c, q, k, v, dout), lse, delta, dq, call.cu_q, call.cu_k,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *lse.stride()[:2],
        *dq.stride()[:3],
        heads, every, call.max_q, call.max_k, tiles, min(every, _section(call, k, v, group)),
        call.window or 0, call.scale * LOG2E, call.scale,
        GROUP=group, **_constants(call, c, q, v, (q, k, v, dout, dq)),
    )  # fmt: skip
