r"""One query for three branches, and its gradient added up in one pass.

.. math:: dQ = dQ^{\mathrm{cmp}} + dQ^{\mathrm{slc}} + dQ^{\mathrm{swa}}

Autograd adds gradients two at a time, as they come: each addition reads two tensors, writes a
third, and rounds.  For three branches that is six times dQ through memory and two roundings.
:func:`share` hands out q once for each branch and waits for all gradients: four times dQ, added in
float32 and rounded once.  Keys and values have fewer heads and are left to autograd.

Taught in chapter 13 (the kernels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from labkit.flash.launch import _On
from labkit.nsa import ops

__all__ = ["share"]

_BLOCK = 4096


@triton.jit
def sum_kernel(a, b, c, out, total, N: tl.constexpr, BLOCK: tl.constexpr):
    """``out = a + b (+ c)`` over ``total`` numbers that lie alike in memory; float32 inside."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    x = tl.load(a + at, inside).to(tl.float32) + tl.load(b + at, inside).to(tl.float32)
    if N > 2:
        x += tl.load(c + at, inside).to(tl.float32)
    tl.store(out + at, x.to(out.dtype.element_ty), inside)


def _alike(tensors: list[torch.Tensor]) -> bool:
    """Whether element n of each lies at offset n of one dense block of memory, in one order."""
    first = tensors[0]
    dense = first.numel() == 1 + sum(
        (n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True)
    )
    return dense and all(x.stride() == first.stride() and x.dtype == first.dtype for x in tensors)


def add(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of two or three tensors of one shape."""
    if not (2 <= len(tensors) <= 3 and tensors[0].numel() and _alike(tensors)):
        return sum(tensors[1:], tensors[0])
    out = torch.empty_like(tensors[0])
    with _On(out):
        sum_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            *tensors, *tensors[:1] * (3 - len(tensors)), out, out.numel(),
            N=len(tensors), BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return out


class Share(torch.autograd.Function):
    """``n`` times the same tensor; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, n: int):
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(n))

    @staticmethod
    def backward(ctx, *gradients):
        there = [g for g in gradients if g is not None]
        if not there:
            return None, None
        if len(there) == 1:
            return there[0], None
        if torch.is_grad_enabled() or not ops.nobody_listens(*there):
            return sum(there[1:], there[0]), None  # what somebody may differentiate or record
        return add(there), None


def share(x: torch.Tensor, n: int) -> tuple[torch.Tensor, ...]:
    """``x`` for each of ``n`` uses, whose gradients are added in one pass; any shape, any dtype."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    if n > 1 and wanted and ops.nobody_listens(x):
        return Share.apply(x, n)
    return (x,) * n
