r"""Pointer chase: how long one access takes when nothing hides it.

.. math:: i_{t+1} = \text{next}[i_t], \qquad \text{latency} = \frac{T}{\text{steps}}

Each load's address is the value of the load before, so no two can be in flight
together.  The chain is one cycle through all nodes in random order: no prefetcher
can guess the next node, and no node is met again before all others were.  One node
per cache line (128 bytes), so every step touches a new line.

The kernel reads two counters around the loop on a GPU: the cycles of its
multiprocessor (``%clock64``) and nanoseconds (``%globaltimer``).  The first gives
latency in cycles without having to know the clock; their quotient *is* the clock
under this load.

Taught in chapter 03 (the memory hierarchy).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.kernels.runtime import check_can_launch, check_contiguous, check_tensor

__all__ = ["clocked_chase", "make_chain", "pointer_chase"]

#: what each choice of ``level`` compiles to
CACHE_MODIFIERS = {"l1": ".ca", "l2": ".cg"}


@triton.jit
def _counter(ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def chase_kernel(next_index, out, start, steps, CACHE: tl.constexpr, COUNTERS: tl.constexpr):
    index = start
    if COUNTERS:
        nanoseconds = _counter("mov.u64 $0, %globaltimer;")
        cycles = _counter("mov.u64 $0, %clock64;")
    for _ in range(steps):
        index = tl.load(next_index + index, cache_modifier=CACHE)
    if COUNTERS:
        # The stores below depend on index, so the second reading could move ahead of the
        # last load, but not ahead of the loop: an error of one step in `steps`.
        cycles = _counter("mov.u64 $0, %clock64;") - cycles
        nanoseconds = _counter("mov.u64 $0, %globaltimer;") - nanoseconds
        tl.store(out + 1, cycles)
        tl.store(out + 2, nanoseconds)
    tl.store(out, index.to(tl.int64))


@torch.library.custom_op("labkit::pointer_chase", mutates_args=())
def _pointer_chase(
    next_index: torch.Tensor, steps: int, start: int, level: str, check: bool
) -> torch.Tensor:
    how = check_can_launch("next_index", next_index)
    if check:
        low, high = next_index.aminmax()
        if low < 0 or high >= next_index.numel():
            raise ArgumentError(
                "next_index",
                f"values from {int(low)} to {int(high)}",
                f"points outside its {next_index.numel()} elements.",
                "Pass values in 0 … numel − 1, for example make_chain(...).",
            )
    out = torch.full((3,), -1, dtype=torch.int64, device=next_index.device)
    # One warp, one program: all 32 threads load the same address, which is one request.
    chase_kernel[(1,)](
        next_index,
        out,
        start,
        steps,
        CACHE=CACHE_MODIFIERS[level],
        COUNTERS=how == "gpu",
        num_warps=1,
        num_stages=1,
    )
    return out


@_pointer_chase.register_fake
def _(next_index, steps, start, level, check):
    return next_index.new_empty((3,), dtype=torch.int64)


@register_flop_formula(torch.ops.labkit.pointer_chase)
def _pointer_chase_flops(next_shape, *args, out_shape=None, **kwargs) -> int:
    return 0


def clocked_chase(
    next_index: torch.Tensor,
    steps: int,
    *,
    start: int = 0,
    level: str = "l2",
    check: bool = True,
) -> torch.Tensor:
    """Follow the chain and read the multiprocessor's counters around the loop.

    Parameters
    ----------
    next_index : int32 [n], contiguous: ``next_index[i]`` is the index to visit after ``i``.
    steps : number of dependent loads.
    start : index of the first load.
    level : ``"l2"`` loads with ``.cg`` (past L1), ``"l1"`` with ``.ca`` (through L1).
    check : read the whole buffer first and refuse an index outside it.  Costs a pass and a
        synchronisation: switch it off for a chain from ``make_chain`` when timing.

    Returns
    -------
    torch.Tensor
        int64 [3]: the index after ``steps`` loads, cycles of the multiprocessor, and
        nanoseconds.  The two counters are −1 in the interpreter, which has none.

    Raises
    ------
    ArgumentError
        if an argument cannot be used or the chain leaves the buffer.
    NoGpuError
        if nothing on this machine can run the kernel.
    """
    check_tensor("next_index", next_index, (torch.int32,), dims=1)
    check_contiguous("next_index", next_index)
    steps = check_positive_int("steps", steps)
    check_choice("level", level, CACHE_MODIFIERS)
    nodes = next_index.shape[0]
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < nodes:
        raise ArgumentError("start", start, "is no index of next_index.", f"Pass 0 … {nodes - 1}.")
    return torch.ops.labkit.pointer_chase(next_index, steps, start, level, check)


def pointer_chase(
    next_index: torch.Tensor,
    steps: int,
    *,
    start: int = 0,
    level: str = "l2",
    check: bool = True,
) -> torch.Tensor:
    """The index reached after ``steps`` dependent loads (int64, shape ``()``).

    Parameters, errors: as ``clocked_chase``.  Time it and divide by ``steps``.
    """
    return clocked_chase(next_index, steps, start=start, level=level, check=check)[0]


def make_chain(
    size_bytes: int, *, line_bytes: int = 128, device: str | None = None, seed: int = 0
) -> torch.Tensor:
    """A single random cycle through a buffer, one node per line.

    Following a random permutation :math:`\\pi` of the nodes,
    next[π(k)] = π(k + 1 mod n), gives every cyclic order with the same probability,
    as Sattolo's algorithm does, but in parallel.

    Parameters
    ----------
    size_bytes : size of the buffer, a multiple of ``line_bytes``.
    line_bytes : distance between nodes; 128 is a cache line of an NVIDIA GPU.
    device : where the chain lies (default: the GPU if there is one).
    seed : of the permutation; the same seed gives the same chain on one kind of device.

    Returns
    -------
    torch.Tensor
        int32 [size_bytes / 4].  Elements between the nodes are 0 and never visited.

    Raises
    ------
    ArgumentError
        if a size is not positive, not a multiple, or needs more than int32 can index.
    """
    size_bytes = check_positive_int("size_bytes", size_bytes)
    line_bytes = check_positive_int("line_bytes", line_bytes)
    if line_bytes % 4:
        raise ArgumentError("line_bytes", line_bytes, "is not a multiple of 4.", "Try 128.")
    if size_bytes % line_bytes:
        raise ArgumentError(
            "size_bytes", size_bytes, f"is not a multiple of {line_bytes}.", "Round it."
        )
    if size_bytes // 4 > 2**31:
        raise ArgumentError(
            "size_bytes", size_bytes, "needs indices beyond int32.", "Pass at most 8 GiB."
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stride, nodes = line_bytes // 4, size_bytes // line_bytes
    generator = torch.Generator(device=device).manual_seed(seed)
    order = torch.randperm(nodes, generator=generator, device=device)
    chain = torch.zeros(size_bytes // 4, dtype=torch.int32, device=device)
    chain[order * stride] = (order.roll(-1) * stride).to(torch.int32)
    return chain
