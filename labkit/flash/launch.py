"""Launching: from checked tensors to a grid of programs.

Everything that is decided outside a kernel: which configuration, how many programs in which
order, whether the copy engine can be used, whether the keys are split, what is allocated.
Shapes and dtypes were checked by ``api.py``.

All of it depends on shapes, strides, dtypes and options, and on nothing in the tensors.  So it is
decided once (a *plan*) and remembered: deciding again, and Triton's own look at some sixty
arguments, would cost a short sequence several times what its kernel takes.

Taught in chapter 08 (the forward kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

from labkit.errors import ArgumentError
from labkit.flash import tuning
from labkit.flash.backward import delta_kernel, dkdv_kernel, dq_kernel
from labkit.flash.forward import forward_kernel, merge_kernel
from labkit.flash.masking import visible_pairs
from labkit.flash.tuning import Config, Problem
from labkit.kernels.runtime import check_can_launch

__all__ = ["Call", "backward", "forward", "like"]

LOG2E = math.log2(math.e)
#: making descriptors takes the host longer than a problem of fewer FLOPs takes the GPU
_WORTH_A_DESCRIPTOR = 4e9
#: the copy engine wants addresses and strides in multiples of this many bytes
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


def strides_of(x: torch.Tensor) -> list[int]:
    """Strides that the copy engine takes: that of a dimension of size 1 may be anything in x."""
    align = _TMA_ALIGN // x.element_size()
    return [
        *(
            s if n > 1 else max(align, s - s % align)
            for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        ),
        1,
    ]


class Described:
    """How the copy engine sees a tensor: tiles of ``rows`` × ``block_d`` of one head.

    Made once per plan; a call gives it the tensor.
    """

    def __init__(self, x: torch.Tensor, rows: int, block_d: int) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.form = TensorDescriptor(x, list(x.shape), strides_of(x), [1, 1, rows, block_d])
        self.form.base = None  # a plan outlives its first tensors and must not keep them

    def __call__(self, x: torch.Tensor):
        """The descriptor of ``x``."""
        described = copy(self.form)
        described.base = x
        return described


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


class Launcher:
    """A kernel and all of its launch but the tensors.

    The first call goes through Triton's front door, which finds or makes the compiled kernel; the
    others go to that directly.  Right only while shapes, strides, dtypes and alignment are those
    of the first call: a plan's key holds them.
    """

    def __init__(self, kernel, grid: tuple, numbers: tuple, constants: dict, c: Config) -> None:
        self.kernel, self.grid, self.numbers = kernel, (*grid, 1, 1)[:3], numbers
        self.constants, self.values = constants, tuple(constants.values())
        self.options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
        self.compiled: Callable[..., Any] | None = None
        # The compiled kernel takes its arguments by position.
        assert [*constants] == kernel.arg_names[-len(constants) :], "constants out of order"

    def __call__(self, *tensors) -> None:
        """Launch."""
        if self.compiled is not None:
            self.compiled(*tensors, *self.numbers, *self.values)
            return
        made = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        if isinstance(made, CompiledKernel):  # the interpreter returns nothing to keep
            self.compiled = made[self.grid]


def _wide(rows: int, *tensors: torch.Tensor) -> bool:
    """Whether an offset inside a tile can exceed 32 bits."""
    return any(
        rows * abs(x.stride(2)) + x.shape[3] * abs(x.stride(3)) >= 2**31 for x in tensors
    )


def _block(*tensors: torch.Tensor) -> int:
    """Columns of a tile: head_dim rounded up to a power of two, of the tensors that share it.

    64 at least for narrow 16-bit heads on Hopper that do not lie in 16-byte steps.  Triton 3.6
    cannot copy such tiles asynchronously, and the product that it makes of a 64 × 16 or 64 × 32
    right factor which came through registers is wrong (``tests/test_flash_forward.py`` found it).
    """
    x = tensors[0]
    block = max(16, triton.next_power_of_2(x.shape[3]))
    if block >= 64 or x.element_size() != 2 or card(x)[0] != 90:
        return block
    return block if all(_in_steps(x) for x in tensors) else 64


def _in_steps(x: torch.Tensor) -> bool:
    """Whether Triton can know that every row of a head starts at a multiple of 16 bytes."""
    strides = (s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in strides)


def _fitted(make: Callable[[Config], Any], config: Config, *arguments):
    """What ``make`` makes of the configuration, run once; of a smaller one if it does not fit.

    The estimate of ``tuning.shared_bytes`` rules out what cannot fit.  Should a compiler need more
    than that, it says so before anything is launched.
    """
    from triton.runtime.errors import OutOfResources

    while True:
        plan = make(config)
        try:
            plan(*arguments)
            return plan
        except OutOfResources:
            smaller = tuning.smaller(config)
            if smaller is None:
                raise
            config = smaller


def _section(call: Call, x: torch.Tensor, y: torch.Tensor, share: int = 1) -> int:
    """Heads whose tiles run together: 1, or under a causal mask what half of L2 has room for.

    ``x`` and ``y`` are what a program streams; ``share`` heads read the same.
    """
    if not call.causal:
        return 1
    each = max(call.max_k, call.max_q) * (x.shape[3] + y.shape[3]) * x.element_size()
    return max(1, int(card(x)[3] // 2 // max(1, each))) * share


def _flops(call: Call, heads: int, width: int) -> int:
    window = None if call.window is None or call.window >= call.max_k + call.max_q else call.window
    return 2 * heads * width * visible_pairs(call.max_q, call.max_k, call.causal, window)


def _problem(kind, call: Call, q, k, v, heads: int, flops, describable: bool, by_hand) -> Problem:
    arch, shared, sms, _ = card(q)
    return Problem(
        kind=kind, dtype=str(q.dtype).removeprefix("torch."), precision=call.precision,
        head_dim=q.shape[3], head_dim_v=v.shape[3], rows=call.max_q, cols=call.max_k,
        heads=heads, causal=call.causal, windowed=call.window is not None,
        descriptors=(
            describable and arch >= 90 and call.cu_q is None and flops >= _WORTH_A_DESCRIPTOR
        ),
        by_hand=by_hand, arch=arch, shared_limit=shared, sms=sms,
        near=call.window is not None and call.window <= tuning.NEAR,
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


# -- plans -----------------------------------------------------------------------------------------

_plans: dict[tuple, Any] = {}


def forget_plans() -> None:
    """Decide everything again, as after a change of what ``tuning`` knows."""
    _plans.clear()


def _remember(key: tuple, plan):
    if len(_plans) > 2000:  # shapes that never come back, as of ragged batches
        _plans.clear()
    _plans[key] = plan
    return plan


def _key(call: Call, *tensors: torch.Tensor) -> tuple:
    """What a plan depends on."""
    parts = [call.causal, call.scale, call.window, call.precision, call.max_q, call.max_k]
    parts.append(call.sequences)
    for x in tensors:
        # Triton compiles for the alignment of each pointer.
        parts += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % _TMA_ALIGN == 0)
    return tuple(parts)


class _On:
    """Make the tensor's GPU the current one if it is not: Triton launches on the current one."""

    def __init__(self, x: torch.Tensor) -> None:
        elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
        self.guard = torch.cuda.device(x.device) if elsewhere else None

    def __enter__(self) -> None:
        if self.guard is not None:
            self.guard.__enter__()

    def __exit__(self, *error) -> None:
        if self.guard is not None:
            self.guard.__exit__(*error)


def _tile_constants(call: Call, c: Config, q, k, v, *dout) -> dict:
    """Sizes, tiles and mask: constants that the forward, dK/dV and dQ kernels share."""
    d, dv = q.shape[3], v.shape[3]
    even = call.cu_q is None and call.max_q % c.block_m == 0 and call.max_k % c.block_n == 0
    return dict(
        D=d, DV=dv, BLOCK_D=_block(q, k), BLOCK_DV=_block(v, *dout),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        CAUSAL=call.causal, WINDOW=call.window is not None, VARLEN=call.cu_q is not None, EVEN=even,
    )  # fmt: skip


def _road_constants(call: Call, c: Config, *tensors) -> dict:
    """How tiles are brought in and multiplied: the last constants of those kernels."""
    wide = _wide(max(c.block_m, c.block_n), *tensors)
    return dict(DESCRIPTOR=c.descriptors, WIDE=wide, PRECISION=call.precision)


# -- forward ---------------------------------------------------------------------------------------


def check_runs(q: torch.Tensor, *others: torch.Tensor) -> None:
    """Refuse tensors that no kernel can run on here: the last check, compiled calls' only one."""
    how = check_can_launch("flash_attention", q, *others)
    if how == "interpreter" and q.dtype == torch.bfloat16:
        raise ArgumentError(
            "q.dtype", "bfloat16", "is multiplied as raw bits by Triton's interpreter.",
            "Use float16 or float32 on the CPU.",
        )  # fmt: skip


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
    key = ("forward", config, splits, *_key(call, q, k, v))
    plan = _plans.get(key)
    with _On(q):
        o, lse = like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
        if call.max_q == 0:
            return o, lse
        if plan is None:
            check_runs(q, k, v)
            plan = _plan_forward(q, k, v, o, lse, call, config, splits)
            _remember(key, plan)
        else:
            plan(q, k, v, o, lse, call)
    return o, lse


def _plan_forward(q, k, v, o, lse, call: Call, config: Config | None, splits: int | None):
    """Decide how these tensors are attended to, and do it; then it can be done to others."""
    batch = call.sequences or q.shape[0]
    heads, kv_heads, group = q.shape[1], k.shape[1], q.shape[1] // k.shape[1]
    # A few queries of many heads: the rows of a tile are the heads of a group.
    pack = group > 1 and call.max_q * group <= 128 and group <= 64
    rows, tiled = (call.max_q * group, kv_heads) if pack else (call.max_q, heads)
    flops = _flops(call, batch * heads, q.shape[3] + v.shape[3])
    problem = _problem(
        "forward", call, q, k, v, batch * tiled, flops,
        not pack and _describable(q, k, v),
        "packed" if pack else _by_hand("hopper", call, flops, q, k, v),
    )  # fmt: skip

    def make(c: Config, splits: int = 1):
        if c.by_hand:
            from labkit.flash import hopper

            return hopper.plan(q, k, v, o, lse, call, c)
        return _Forward(q, k, v, o, lse, call, c, rows, batch * tiled, pack, splits)

    if config is None:
        config = _packed_config(problem, rows) if pack else tuning.choose(
            problem, flops, lambda c: _ready(make(c), q, k, v, o, lse, call)
        )  # fmt: skip

    if pack:  # whoever asked for another road: the rows of a group are not one box of memory
        config = replace(config, descriptors=False, by_hand="")

    def split(c: Config):
        if c.by_hand:
            return make(c)
        tiles = -(-rows // c.block_m)
        return make(c, splits or _splits(call, q, k, tiles, batch * tiled, c.block_n))

    return _fitted(split, config, q, k, v, o, lse, call)


def _ready(plan, *arguments) -> Callable[[], None]:
    return lambda: plan(*arguments)


def _by_hand(module: str, call: Call, flops: float, q, k, v, *dout) -> str | None:
    """Why the kernel written by hand for Hopper cannot or should not run; None when it can."""
    if call.cu_q is not None:
        return "varlen"
    if card(q)[0] != 90:
        return "not a Hopper card"
    if flops < _WORTH_A_DESCRIPTOR:
        return "too small to be worth its descriptors"
    if not _describable(q, k, v, *dout):
        return "not laid out for the copy engine"
    kernels = import_module(f"labkit.flash.{module}")
    return kernels.supports(q, k, v, causal=call.causal, window=call.window)


def _packed_config(problem: Problem, rows: int) -> Config:
    """For the rows of a group: one row tile, and more keys in flight, since the rows are few."""
    if problem.arch == 0:
        return tuning.default(problem)
    few = 16 if rows <= 16 else 32 if rows <= 32 else 64
    n = 64 if problem.itemsize * (problem.head_dim + problem.head_dim_v) <= 512 else 32
    return Config(few, n, 4, 3 if problem.shared_limit > 160 * 1024 else 2)


class _Forward:
    """The forward kernel with one configuration, and the merge if the keys are split."""

    def __init__(self, q, k, v, o, lse, call: Call, c: Config, rows, all_heads, pack, splits):
        heads, kv_heads = q.shape[1], k.shape[1]
        group, dv = heads // kv_heads, v.shape[3]
        tiles = triton.cdiv(rows, c.block_m)
        constants = _tile_constants(call, c, q, k, v)
        width = constants["BLOCK_D"], constants["BLOCK_DV"]
        self.roads = (
            (Described(q, c.block_m, width[0]), Described(k, c.block_n, width[0]),
             Described(v, c.block_n, width[1]))
            if c.descriptors else (_as_it_is,) * 3
        )  # fmt: skip
        self.splits, part_strides = splits, (0, 0)
        if splits > 1:
            o, lse, merged = *self._parts(o, lse), (o, lse)
            part_strides = (o.stride(0), lse.stride(0))
            block_m, total = (4 if width[1] >= 128 else 8), merged[1].numel()
            self.merge = Launcher(
                merge_kernel,
                (triton.cdiv(total, block_m),),
                (total, *part_strides, heads, merged[1].shape[2],
                 *merged[0].stride()[:3], *merged[1].stride()[:2]),
                dict(DV=dv, BLOCK_DV=width[1], BLOCK_M=block_m, SPLITS=splits),
                Config(block_m, 0, 4, 1),
            )  # fmt: skip
        self.attend = Launcher(
            forward_kernel,
            (tiles * all_heads, splits),
            (*q.stride(), *k.stride(), *v.stride(), part_strides[0], *o.stride()[-4:-1],
             part_strides[1], *lse.stride()[-3:-1], kv_heads if pack else heads, all_heads,
             call.max_q, call.max_k, tiles,
             min(all_heads, _section(call, k, v, 1 if pack else group)),
             call.window or 0, call.scale * LOG2E, call.scale),
            dict(GROUP=group, **constants, PACK=pack, SPLITS=splits,
                 **_road_constants(call, c, q, k, v, o)),
            c,
        )  # fmt: skip

    def _parts(self, o, lse):
        """Where the programs that share a tile leave their states: O in float32, and LSE."""
        out = o.new_empty((self.splits, *o.shape), dtype=torch.float32)
        return out, lse.new_empty((self.splits, *lse.shape))

    def __call__(self, q, k, v, o, lse, call: Call) -> None:
        describe_q, describe_k, describe_v = self.roads
        q, k, v = describe_q(q), describe_k(k), describe_v(v)
        if self.splits == 1:
            self.attend(q, k, v, o, lse, call.cu_q, call.cu_k)
            return
        parts = self._parts(o, lse)
        self.attend(q, k, v, *parts, call.cu_q, call.cu_k)
        self.merge(*parts, o, lse)


# -- backward --------------------------------------------------------------------------------------


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
    """dQ, dK, dV, laid out as q, k, v; ``dlse`` is None if LSE was not used."""
    if dout.stride(3) != 1 or 0 in dout.stride():
        dout = dout.contiguous()  # the gradient of .sum() is one number, with strides of 0
    used = () if dlse is None else (dlse,)
    key = ("backward", dkdv_config, dq_config, *_key(call, q, k, v, dout, o, *used))
    plan = _plans.get(key)
    with _On(q):
        grads = like(q, q.shape[3]), like(k, k.shape[3]), like(v, v.shape[3])
        if call.max_q == 0 or call.max_k == 0:
            return tuple(x.zero_() for x in grads)
        delta = torch.empty_like(lse)
        tensors = (dout, dlse, q, k, v, o, lse, delta, *grads)
        if plan is None:
            check_runs(q, k, v, dout)
            plan = _Backward(*tensors, call, dkdv_config, dq_config)
            _remember(key, plan)
        else:
            plan(*tensors, call)
    return grads


class _Backward:
    """δ, then dK and dV, then dQ: three kernels and their configurations.

    Choosing configurations runs the kernels, so making one of these computes the gradients too.
    """

    def __init__(self, dout, dlse, q, k, v, o, lse, delta, dq, dk, dv, call: Call, c_kv, c_q):
        batch = call.sequences or q.shape[0]
        heads, kv_heads = q.shape[1], k.shape[1]
        flops = _flops(call, batch * heads, q.shape[3] + v.shape[3])
        extra = lse if dlse is None else dlse
        block_m = 32
        tiles = triton.cdiv(call.max_q, block_m)
        self.delta = Launcher(
            delta_kernel,
            (tiles * batch * heads,),
            (*o.stride()[:3], *dout.stride(), *extra.stride(), *lse.stride()[:2],
             heads, call.max_q, tiles),
            dict(DV=v.shape[3], BLOCK_DV=_block(v), BLOCK_M=block_m,
                 VARLEN=call.cu_q is not None, HAS_DLSE=dlse is not None),
            Config(block_m, 0, 4, 1),
        )  # fmt: skip
        describable = _describable(q, k, v, dout)
        by_hand = _by_hand("hopper_backward", call, flops, q, k, v, dout)
        tensors = (q, k, v, dout, lse, delta, dq, dk, dv)

        def fit(kind: str, triton_plan, config: Config | None, tiled: int, product: float):
            def make(c: Config):
                if not c.by_hand:
                    return triton_plan(*tensors, call, c)
                kernels = import_module("labkit.flash.hopper_backward")
                return getattr(kernels, f"plan_{kind}")(*tensors, call, c)

            work = product * flops
            problem = _problem(kind, call, q, k, v, batch * tiled, work, describable, by_hand)
            chosen = config or tuning.choose(
                problem, work, lambda c: _ready(make(c), *tensors, call)
            )  # fmt: skip
            return _fitted(make, chosen, *tensors, call)

        self.delta(o, dout, lse, extra, delta, call.cu_q)
        self.dkdv = fit("dkdv", _Dkdv, c_kv, kv_heads, 2)
        self.dq = fit("dq", _Dq, c_q, heads, 1.5)

    def __call__(self, dout, dlse, q, k, v, o, lse, delta, dq, dk, dv, call: Call) -> None:
        self.delta(o, dout, lse, lse if dlse is None else dlse, delta, call.cu_q)
        tensors = (q, k, v, dout, lse, delta, dq, dk, dv)
        self.dkdv(*tensors, call)
        self.dq(*tensors, call)


def _roads(c: Config, q, k, v, dout) -> tuple:
    """How the four inputs reach a kernel: described to the copy engine, or as they are."""
    if not c.descriptors:
        return (_as_it_is,) * 4
    block_d, block_dv = _block(q, k), _block(v, dout)
    return (
        Described(q, c.block_m, block_d), Described(k, c.block_n, block_d),
        Described(v, c.block_n, block_dv), Described(dout, c.block_m, block_dv),
    )  # fmt: skip


class _Dkdv:
    """The kernel of dK and dV with one configuration."""

    def __init__(self, q, k, v, dout, lse, delta, dq, dk, dv, call: Call, c: Config) -> None:
        kv_heads = k.shape[1]
        every = (call.sequences or q.shape[0]) * kv_heads
        tiles = triton.cdiv(call.max_k, c.block_n)
        self.roads = _roads(c, q, k, v, dout)
        self.launch = Launcher(
            dkdv_kernel,
            (tiles * every,),
            (*q.stride(), *k.stride(), *v.stride(), *dout.stride(), *lse.stride()[:2],
             *dk.stride()[:3], *dv.stride()[:3], kv_heads, every, call.max_q, call.max_k, tiles,
             min(every, _section(call, q, dout)), call.window or 0, call.scale * LOG2E, call.scale),
            dict(GROUP=q.shape[1] // kv_heads, **_tile_constants(call, c, q, k, v, dout),
                 **_road_constants(call, c, q, k, v, dout, dk, dv)),
            c,
        )  # fmt: skip

    def __call__(self, q, k, v, dout, lse, delta, dq, dk, dv, call: Call) -> None:
        inputs = (road(x) for road, x in zip(self.roads, (q, k, v, dout), strict=True))
        self.launch(*inputs, lse, delta, dk, dv, call.cu_q, call.cu_k)


class _Dq:
    """The kernel of dQ with one configuration."""

    def __init__(self, q, k, v, dout, lse, delta, dq, dk, dv, call: Call, c: Config) -> None:
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        every = (call.sequences or q.shape[0]) * heads
        tiles = triton.cdiv(call.max_q, c.block_m)
        self.roads = _roads(c, q, k, v, dout)
        self.launch = Launcher(
            dq_kernel,
            (tiles * every,),
            (*q.stride(), *k.stride(), *v.stride(), *dout.stride(), *lse.stride()[:2],
             *dq.stride()[:3], heads, every, call.max_q, call.max_k, tiles,
             min(every, _section(call, k, v, group)), call.window or 0, call.scale * LOG2E,
             call.scale),
            dict(GROUP=group, **_tile_constants(call, c, q, k, v, dout),
                 **_road_constants(call, c, q, k, v, dout, dq)),
            c,
        )  # fmt: skip

    def __call__(self, q, k, v, dout, lse, delta, dq, dk, dv, call: Call) -> None:
        inputs = (road(x) for road, x in zip(self.roads, (q, k, v, dout), strict=True))
        self.launch(*inputs, lse, delta, dq, call.cu_q, call.cu_k)
