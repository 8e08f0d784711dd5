r"""Read a buffer again and again: the bandwidth of the cache that holds it.

.. math:: s = R \sum_i x_i \pmod{2^{32}}, \qquad \text{bytes read} = R \cdot 4n

Nothing is written but one number per program, so the time is the reading.
The sum wraps in 32 bits like the hardware's adder and is exact, whatever the order of
addition: one wrong byte shows.  That no load is saved (a compiler could read once and
multiply by R) the sum cannot show; the cache modifier and the machine code do.

Which level answers is chosen by *who reads what in the next round*:

- ``level="l2"``: program :math:`p` reads chunk :math:`(p + r \cdot \text{step}) \bmod P` in
  round :math:`r`, and loads with ``.cg`` (cache in L2, not in L1).  What one
  multiprocessor read in the last round another reads in this one.
- ``level="l1"``: program :math:`p` reads its own chunk every round, with ``.ca``
  (cache at all levels).  After the first round the chunk is in its multiprocessor's L1.

A buffer larger than L2, read with ``level="l2"``, measures device memory, read only.
Divided into ``blocks`` that fit in L2, each read R times before the next, it measures what
reuse is worth: the first reading comes from memory, the others from L2.

Taught in chapter 03 (the memory hierarchy).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.kernels.runtime import check_can_launch, check_contiguous, check_tensor, sm_count

__all__ = ["read_sum"]

BLOCK = 2048  # int32 elements per load: 8 KiB per program, 64 bytes per thread
NUM_WARPS = 4
# As many programs as run at once: compiled for compute capability 9.0 the kernel takes 56
# registers per thread, so that 9 programs fit on a multiprocessor.  With more, some wait for
# others to end, and the last wave leaves most of the chip idle.
PROGRAMS_PER_SM = 8


@triton.jit
def read_kernel(
    x,
    partial,
    n,
    chunk,
    blocks,
    rounds,
    step,
    CACHE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    turn = program
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(blocks):
        for _ in range(rounds):
            first = turn.to(tl.int64) * chunk
            for offset in range(0, chunk, BLOCK):
                i = offset + tl.arange(0, BLOCK)
                if EVEN:
                    total += tl.load(x + first + i, cache_modifier=CACHE)
                else:
                    inside = i < n - first
                    total += tl.load(x + first + i, mask=inside, other=0, cache_modifier=CACHE)
            turn += step
            turn = tl.where(turn < tl.num_programs(0), turn, turn - tl.num_programs(0))
        x += n
    tl.store(partial + program, tl.sum(total.to(tl.int64)))


def _plan(n: int, programs: int) -> tuple[int, int]:
    """(programs, elements per program) for n elements: whole loads, as even as they go."""
    loads = triton.cdiv(n, BLOCK)
    chunk = triton.cdiv(loads, min(programs, loads)) * BLOCK
    return triton.cdiv(n, chunk), chunk


def _stride(programs: int) -> int:
    """About a third of the grid and coprime to it.

    The next reader of a chunk then sits elsewhere on the chip, and every program reads every
    chunk in its turn: no part of a divided L2 gets to serve always the same readers.
    """
    step = max(1, programs // 3)
    while math.gcd(step, programs) != 1:
        step += 1
    return step


@torch.library.custom_op("labkit::read_sum", mutates_args=())
def _read_sum(
    x: torch.Tensor, repeats: int, level: str, programs: int, blocks: int
) -> torch.Tensor:
    check_can_launch("x", x)
    n = x.numel() // blocks
    programs, chunk = _plan(n, programs or PROGRAMS_PER_SM * sm_count(x))
    partial = torch.empty(programs, dtype=torch.int64, device=x.device)
    step, cache = (_stride(programs), ".cg") if level == "l2" else (0, ".ca")
    read_kernel[(programs,)](
        x,
        partial,
        n,
        chunk,
        blocks,
        repeats,
        step,
        CACHE=cache,
        EVEN=n == programs * chunk,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return partial.sum() & 0xFFFFFFFF


@_read_sum.register_fake
def _(x, repeats, level, programs, blocks):
    return x.new_empty((), dtype=torch.int64)


@register_flop_formula(torch.ops.labkit.read_sum)
def _read_sum_flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    return 0  # the additions are integer: no floating-point operation


def read_sum(
    x: torch.Tensor,
    repeats: int = 1,
    *,
    level: str = "l2",
    programs: int | None = None,
    blocks: int = 1,
) -> torch.Tensor:
    """Sum of ``x`` over ``repeats`` readings, modulo 2³²; every reading reads all of ``x``.

    Parameters
    ----------
    x : int32, contiguous, any shape.  For full speed a multiple of 8 KiB that the programs
        share evenly; a ragged end costs a mask on every load.
    repeats : number of readings, R.
    level : ``"l2"`` or ``"l1"``: which cache shall answer after the first reading.
    programs : how many programs share the buffer (default: 8 per multiprocessor,
        which all run at once).
    blocks : how many equal parts ``x`` has; each part is read ``repeats`` times before the next.

    Returns
    -------
    torch.Tensor
        int64, shape ``()``: R · sum(x) modulo 2³².  Reads ``repeats * x.nbytes`` bytes.

    Raises
    ------
    ArgumentError
        if an argument cannot be used.
    NoGpuError
        if nothing on this machine can run the kernel.
    """
    check_tensor("x", x, (torch.int32,))
    check_contiguous("x", x)
    repeats = check_positive_int("repeats", repeats)
    check_choice("level", level, ("l2", "l1"))
    programs = 0 if programs is None else check_positive_int("programs", programs)
    blocks = check_positive_int("blocks", blocks)
    if x.numel() % blocks:
        raise ArgumentError(
            "blocks", blocks, f"does not divide the {x.numel()} elements of x.", "Pass a divisor."
        )
    return torch.ops.labkit.read_sum(x, repeats, level, programs, blocks)
