r"""The gated sum of the branches, in one pass over memory.

.. math::
    o_{t,h} = \sum_{c} g^c_{t,h}\; o^c_{t,h}, \qquad
    do^c_{t,h} = g^c_{t,h}\, do_{t,h}, \qquad
    dg^c_{t,h} = \sum_v do_{t,h,v}\; o^c_{t,h,v}

with c in compression, selection, window (Yuan et al. 2025, equation 5).  A gate is one number per
query and head; nothing is done to it here, so a sigmoid belongs before.

The sum costs as many bytes as it reads and writes: three outputs in, one out.  Written as
``g1 * o1 + g2 * o2 + g3 * o3`` it would write and read two more products and a sum, each as large
as an output.  The backward pass reads dO and the three outputs once and leaves three dO and three
columns of dg.  A row belongs to one program, so a gate's gradient is added in one order: the same
bits each time.

The mistake it guards against: a product of half-precision numbers that is rounded before it is
added.  Everything is float32 until the one rounding at the end.

Taught in chapter 13 (the kernels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from labkit.flash.launch import Launcher, _On
from labkit.flash.ops import DoubleBackwardError
from labkit.flash.tuning import Config
from labkit.kernels.runtime import check_can_launch
from labkit.nsa import ops

__all__ = ["combine", "combine_backward", "launch_combine"]

#: elements of one output that a program holds: 16 numbers a thread with four warps
_TILE = 2048


@triton.jit
def _rows(x, batch, t, head, stride_b, stride_t, stride_h):
    """Where each row of a ``[B, M, HQ, …]`` tensor starts; 64-bit."""
    return x + batch * stride_b + t * stride_t + head * stride_h


@triton.jit
def _load(x, batch, t, head, stride_b, stride_t, stride_h, stride_v, column, inside):
    """A tile of rows, float32: ``[ROWS, BLOCK_V]``."""
    at = _rows(x, batch, t, head, stride_b, stride_t, stride_h)[:, None]
    return tl.load(at + column[None, :] * stride_v, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row_of(rows, M, HQ, ROWS: tl.constexpr):
    """Which rows a program owns: number, batch element, query, head; and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, query = row % HQ, row // HQ
    return row, query // M, query % M, head, row < rows


@triton.jit
def combine_kernel(
    o1, o2, o3, g1, g2, g3, out,
    b1, t1, h1, v1, b2, t2, h2, v2, b3, t3, h3, v3,
    gb1, gt1, gh1, gb2, gt2, gh2, gb3, gt3, gh3,
    rows, M, HQ,
    N: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``out[row] = Σ g[row] · o[row]``; ``out`` is contiguous, ``N`` branches are summed."""
    row, batch, t, head, there = _row_of(rows, M, HQ, ROWS)
    column = tl.arange(0, BLOCK_V)
    inside = there[:, None] & (column < V)[None, :]

    g = tl.load(_rows(g1, batch, t, head, gb1, gt1, gh1), mask=there, other=0.0).to(tl.float32)
    total = g[:, None] * _load(o1, batch, t, head, b1, t1, h1, v1, column, inside)
    if N > 1:
        g = tl.load(_rows(g2, batch, t, head, gb2, gt2, gh2), mask=there, other=0.0).to(tl.float32)
        total += g[:, None] * _load(o2, batch, t, head, b2, t2, h2, v2, column, inside)
    if N > 2:
        g = tl.load(_rows(g3, batch, t, head, gb3, gt3, gh3), mask=there, other=0.0).to(tl.float32)
        total += g[:, None] * _load(o3, batch, t, head, b3, t3, h3, v3, column, inside)
    tl.store(out + row[:, None] * V + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _one_branch(
    o, g, do, dg, d, row, batch, t, head, there, column, inside,
    b, th, h, v, gb, gt, gh, V: tl.constexpr,
):  # fmt: skip
    """do and dg of one branch; ``do`` and ``dg`` are contiguous."""
    weight = tl.load(_rows(g, batch, t, head, gb, gt, gh), mask=there, other=0.0).to(tl.float32)
    at = do + row[:, None] * V + column[None, :]
    tl.store(at, (weight[:, None] * d).to(do.dtype.element_ty), mask=inside)
    along = tl.sum(d * _load(o, batch, t, head, b, th, h, v, column, inside), 1)
    tl.store(dg + row, along.to(dg.dtype.element_ty), mask=there)


@triton.jit
def combine_backward_kernel(
    dout, o1, o2, o3, g1, g2, g3, do1, do2, do3, dg1, dg2, dg3,
    db, dt, dh, dv, b1, t1, h1, v1, b2, t2, h2, v2, b3, t3, h3, v3,
    gb1, gt1, gh1, gb2, gt2, gh2, gb3, gt3, gh3,
    rows, M, HQ,
    N: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of :func:`combine_kernel`: dO is read once for all branches."""
    row, batch, t, head, there = _row_of(rows, M, HQ, ROWS)
    column = tl.arange(0, BLOCK_V)
    inside = there[:, None] & (column < V)[None, :]
    d = _load(dout, batch, t, head, db, dt, dh, dv, column, inside)
    _one_branch(
        o1, g1, do1, dg1, d, row, batch, t, head, there, column, inside,
        b1, t1, h1, v1, gb1, gt1, gh1, V,
    )  # fmt: skip
    if N > 1:
        _one_branch(
            o2, g2, do2, dg2, d, row, batch, t, head, there, column, inside,
            b2, t2, h2, v2, gb2, gt2, gh2, V,
        )  # fmt: skip
    if N > 2:
        _one_branch(
            o3, g3, do3, dg3, d, row, batch, t, head, there, column, inside,
            b3, t3, h3, v3, gb3, gt3, gh3, V,
        )  # fmt: skip


# -- launching -------------------------------------------------------------------------------------

_plans: dict[tuple, Launcher] = {}


def _three(tensors: Sequence[Any]) -> list[Any]:
    """The kernels take three; branches that are off repeat the first, and are not read."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _plan(kernel, strided: Sequence[torch.Tensor], gates: Sequence[torch.Tensor], count: int):
    b, m, hq, v = strided[-1].shape
    block_v = triton.next_power_of_2(v)
    block = max(1, _TILE // block_v) if strided[0].is_cuda else 64
    numbers = [s for x in strided for s in x.stride()] + [s for g in gates for s in g.stride()]
    rows = b * m * hq
    return Launcher(
        kernel, (triton.cdiv(rows, block),), (*numbers, rows, m, hq),
        dict(N=count, V=v, BLOCK_V=block_v, ROWS=block), Config(block, 0, 4, 1),
    )  # fmt: skip


def _launch(kernel, strided: list, gates: list, dense: list, count: int) -> None:
    """Launch on tensors with strides, gates, and tensors that are written in order."""
    faces = (
        (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)
        for x in (*strided, *gates, *dense)
    )
    key = (kernel is combine_kernel, count, *faces)
    plan = _plans.get(key)
    if plan is None:
        check_can_launch("labkit.nsa", *strided)
        if len(_plans) > 500:  # lengths that never come back
            _plans.clear()
        plan = _plans[key] = _plan(kernel, strided, gates, count)
    with _On(strided[0]):
        plan(*strided, *gates, *dense)


def launch_combine(branches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ gate · branch; branches ``[B, M, HQ, V]``, gates ``[B, M, HQ]``, any strides."""
    out = torch.empty(branches[0].shape, dtype=branches[0].dtype, device=branches[0].device)
    _launch(combine_kernel, _three(branches), _three(gates), [out], len(branches))
    return out


def combine_backward(
    dout: torch.Tensor, branches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """dO of each branch ``[B, M, HQ, V]`` in its dtype, and dg of each gate, contiguous."""
    shape, device = dout.shape, dout.device
    outs = [torch.empty(shape, dtype=o.dtype, device=device) for o in branches]
    gs = [torch.empty(shape[:3], dtype=g.dtype, device=device) for g in gates]
    _launch(
        combine_backward_kernel, [dout, *_three(branches)], _three(gates),
        [*_three(outs), *_three(gs)], len(branches),
    )  # fmt: skip
    return outs, gs


# -- torch operators and autograd ------------------------------------------------------------------


@torch.library.custom_op("labkit::nsa_combine", mutates_args=())
def combine_op(branches: list[torch.Tensor], gates: list[torch.Tensor]) -> torch.Tensor:
    """See :func:`launch_combine`."""
    return launch_combine(branches, gates)


@combine_op.register_fake
def _(branches, gates):
    return branches[0].new_empty(branches[0].shape)


@torch.library.custom_op("labkit::nsa_combine_backward", mutates_args=())
def combine_backward_op(
    dout: torch.Tensor, branches: list[torch.Tensor], gates: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The branches' gradients, then the gates'; see :func:`combine_backward`."""
    outs, gs = combine_backward(dout, branches, gates)
    return [*outs, *gs]


@combine_backward_op.register_fake
def _(dout, branches, gates):
    outs = [dout.new_empty(dout.shape, dtype=o.dtype) for o in branches]
    return [*outs, *(dout.new_empty(dout.shape[:3], dtype=g.dtype) for g in gates)]


def _keep(ctx, inputs, output) -> None:
    branches, gates = inputs
    ctx.count = len(branches)
    ctx.save_for_backward(*branches, *gates)


def _op_backward(ctx, dout):
    saved = list(ctx.saved_tensors)
    n = ctx.count
    grads = torch.ops.labkit.nsa_combine_backward(dout, saved[:n], saved[n:])
    return grads[:n], grads[n:]


def _no_second_derivative(ctx, *gradients):
    raise DoubleBackwardError("labkit.nsa", ops.INSTEAD)


combine_op.register_autograd(_op_backward, setup_context=_keep)
combine_backward_op.register_autograd(_no_second_derivative)


class Combine(torch.autograd.Function):
    """The same rule without the dispatcher; branches first, then as many gates."""

    @staticmethod
    def forward(ctx, *tensors):
        n = len(tensors) // 2
        _keep(ctx, (tensors[:n], tensors[n:]), None)
        return launch_combine(tensors[:n], tensors[n:])

    @staticmethod
    def backward(ctx, dout):
        n, saved = ctx.count, ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody may differentiate what comes out
            return tuple(
                torch.ops.labkit.nsa_combine_backward(dout, list(saved[:n]), list(saved[n:]))
            )
        outs, gs = combine_backward(dout, saved[:n], saved[n:])
        return *outs, *gs


def combine(branches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ gate · branch, differentiable in both.

    Parameters
    ----------
    branches : sequence of torch.Tensor
        one to three outputs ``[B, M, HQ, V]`` of one shape and dtype; any strides.
    gates : sequence of torch.Tensor
        as many, ``[B, M, HQ]``, in the dtype of the branches or float32; any strides.

    Returns
    -------
    torch.Tensor
        ``[B, M, HQ, V]`` in the branches' dtype, contiguous.
    """
    branches, gates = list(branches), list(gates)
    if not torch.compiler.is_compiling():
        ops.check_not_forward_mode(*branches, *gates, what="labkit.nsa", instead=ops.INSTEAD)
    if not ops.nobody_listens(*branches, *gates):
        return torch.ops.labkit.nsa_combine(branches, gates)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*branches, *gates)):
        return Combine.apply(*branches, *gates)
    return launch_combine(branches, gates)
