r"""Gather from a table in shared memory: the bandwidth of the memory inside a multiprocessor.

.. math:: i^{(t+1)}_e = \text{table}\!\left[\, i^{(t)}_e \,\right], \qquad e = 0 \dots L-1

The table spans several warps, so no warp holds it in registers and Triton must go
through shared memory.  What one step of one program moves, read off the compiled
kernel (``tests/test_kernels.py`` counts the instructions):

- it stores the table again, :math:`4T` bytes (``STS.128``),
- waits for all warps, and loads one word per lane, :math:`4L` bytes (``LDS``).

So :math:`4(T + L)` bytes per step and program; with :math:`L = 8T` nine tenths of them are loads.

Shared memory has 32 banks of 4 bytes: a warp's 32 loads are one access when they
fall in 32 different banks, and *k* accesses when *k* of them share a bank.
``conflict_start`` lays the first indices so, from 1 way (no conflict) to 32 ways, and the
table i → i + 1 keeps them so.

Taught in chapter 03 (the memory hierarchy).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from labkit.errors import ArgumentError, check_positive_int
from labkit.kernels.runtime import (
    check_can_launch,
    check_contiguous,
    check_same_device,
    check_tensor,
)

__all__ = ["conflict_start", "rotation_table", "shared_gather", "shared_gather_bytes"]

NUM_WARPS = 8


@triton.jit
def gather_kernel(table, start, out, steps, TABLE: tl.constexpr, LANES: tl.constexpr):
    entry = tl.load(table + tl.arange(0, TABLE))
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    index = tl.load(start + lane)
    for _ in range(steps):
        index = tl.gather(entry, index, 0)
    tl.store(out + lane, index)


@torch.library.custom_op("labkit::shared_gather", mutates_args=())
def _shared_gather(
    table: torch.Tensor, start: torch.Tensor, steps: int, check: bool
) -> torch.Tensor:
    check_can_launch("table", table, start)
    if check:
        for name, values in (("table", table), ("start", start)):
            low, high = values.aminmax()
            if low < 0 or high >= table.numel():
                raise ArgumentError(
                    name,
                    f"values from {int(low)} to {int(high)}",
                    f"points outside the table's {table.numel()} entries.",
                    "Pass values in 0 … len(table) − 1.",
                )
    out = torch.empty_like(start)
    gather_kernel[(start.shape[0],)](
        table, start, out, steps, TABLE=table.numel(), LANES=start.shape[1], num_warps=NUM_WARPS
    )
    return out


@_shared_gather.register_fake
def _(table, start, steps, check):
    return torch.empty_like(start)


@register_flop_formula(torch.ops.labkit.shared_gather)
def _shared_gather_flops(table_shape, start_shape, *args, out_shape=None, **kwargs) -> int:
    return 0


def shared_gather_bytes(table_size: int, lanes: int, programs: int, steps: int) -> int:
    """Bytes that ``shared_gather`` moves through shared memory: 4 (T + L) per step and program."""
    return 4 * (table_size + lanes) * programs * steps


def rotation_table(entries: int, device: str = "cpu") -> torch.Tensor:
    """int32 [entries], i → i + 1 modulo ``entries``: lanes in different banks stay so."""
    entries = check_positive_int("entries", entries)
    return torch.arange(1, entries + 1, dtype=torch.int32, device=device) % entries


def conflict_start(
    programs: int, lanes: int, entries: int, *, ways: int = 1, device: str = "cpu"
) -> torch.Tensor:
    """First indices that make a warp's 32 loads meet ``ways`` at a time in one bank.

    Triton gives each thread 4 neighbouring lanes (a 16-byte load of ``start``), so one
    load instruction of a warp takes lanes 4t + k of its threads t = 0 … 31.  Their
    indices here are ways · t: different words, 32 / ways different banks.

    Parameters
    ----------
    programs, lanes : shape of the result.
    entries : size of the table, at least 1024 so that all 32 words differ.
    ways : 1 (no conflict), 2, 4, 8, 16 or 32 (every load in the same bank).
    device : where the result lies.

    Returns
    -------
    torch.Tensor
        int32 [programs, lanes].

    Raises
    ------
    ArgumentError
        if an argument cannot be used.
    """
    programs, lanes = check_positive_int("programs", programs), check_positive_int("lanes", lanes)
    entries = check_positive_int("entries", entries)
    if ways not in (1, 2, 4, 8, 16, 32):
        raise ArgumentError("ways", ways, "is no power of two from 1 to 32.", "Pass such a number.")
    thread = torch.arange(lanes, dtype=torch.int32, device=device) // 4
    return (thread * ways % entries).repeat(programs, 1)


def shared_gather(
    table: torch.Tensor, start: torch.Tensor, steps: int, *, check: bool = True
) -> torch.Tensor:
    """Look every lane's index up in ``table``, ``steps`` times over.

    Parameters
    ----------
    table : int32 [T], T a power of two of at least 1024 (so that no warp holds it alone).
    start : int32 [programs, L], L a power of two, at least T: first index of each lane.
    steps : number of lookups.
    check : refuse indices outside the table first; costs a pass and a synchronisation.

    Returns
    -------
    torch.Tensor
        int32 [programs, L]: ``table[table[… start …]]``.

    Raises
    ------
    ArgumentError
        if an argument cannot be used or an index leaves the table.
    NoGpuError
        if nothing on this machine can run the kernel.
    """
    check_tensor("table", table, (torch.int32,), dims=1)
    check_tensor("start", start, (torch.int32,), dims=2)
    check_contiguous("table", table)
    check_contiguous("start", start)
    check_same_device("table", table, "start", start)
    steps = check_positive_int("steps", steps)
    entries, lanes = table.shape[0], start.shape[1]
    if entries < 1024 or entries & (entries - 1) or entries > 16384:
        raise ArgumentError(
            "table",
            f"{entries} entries",
            "is not a power of two from 1024 to 16384.",
            "Smaller tables fit in one warp's registers, larger ones not in shared memory.",
        )
    if lanes < entries or lanes & (lanes - 1) or lanes > 32768:
        raise ArgumentError(
            "start",
            f"{lanes} lanes",
            f"is not a power of two from {entries} (the table) to 32768.",
            "Pass start with such a second dimension, for example 8 × len(table).",
        )
    return torch.ops.labkit.shared_gather(table, start, steps, check)
