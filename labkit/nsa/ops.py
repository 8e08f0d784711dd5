"""Native Sparse Attention as torch operators, so that torch's own tools see it as they see theirs.

Five operators, each with a fake implementation (FakeTensor, ``torch.compile``, tracing without
data), FLOP formulas where there are FLOPs, and an autograd rule where there is a gradient:

``labkit::nsa_selection``, ``labkit::nsa_selection_backward``
    attention to the chosen blocks.  Autograd keeps q, k, v, o, LSE and block_indices.
``labkit::nsa_compression``, ``labkit::nsa_compression_backward``
    attention to compressed keys.  Autograd keeps q, k_cmp, v_cmp, o and LSE.
``labkit::nsa_select_blocks``
    which blocks to read: integers, which have no gradient.

The window is ``labkit::flash_forward``, and the gated sum has its operators in ``gates.py``.

As in ``labkit.flash.ops``, the kernels are launched directly when nothing but autograd listens:
the dispatcher takes the host about as long as a short sequence takes the GPU.

Taught in chapter 13 (the kernels).
"""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from labkit.flash.ops import (
    DoubleBackwardError,
    check_not_forward_mode,
    nobody_listens,
)
from labkit.nsa import compression, selection, selection_backward, topk
from labkit.nsa.call import Call

__all__ = [
    "Attend", "add_selected", "attend_compressed", "attend_selected", "nobody_listens", "select",
]  # fmt: skip

#: the fields of ``Call`` in order, as an operator takes them
_FIELDS = tuple(field.name for field in fields(Call))
_TYPES = {"scale": "float", "precision": "str"} | dict.fromkeys(
    ("cu", "cu_cmp", "cu_blocks"), "Tensor?"
)
_CALL = ", ".join(f"{_TYPES.get(name, 'SymInt')} {name}" for name in _FIELDS)
INSTEAD = "labkit.nsa.naive_nsa_with_compression (plain PyTorch)"


def _flat(call: Call) -> tuple[Any, ...]:
    return tuple(getattr(call, name) for name in _FIELDS)


def _call(flat: tuple[Any, ...]) -> Call:
    return Call(**dict(zip(_FIELDS, flat, strict=True)))


def _operator(name: str, tensors: str, returns: str):
    """A decorator that makes ``labkit::name`` of a function of tensors and the fields of Call."""
    schema = f"({tensors}, {_CALL}) -> {returns}"
    return torch.library.custom_op(f"labkit::{name}", mutates_args=(), schema=schema)


# -- operators -------------------------------------------------------------------------------------


@_operator("nsa_selection", "Tensor q, Tensor k, Tensor v, Tensor blocks", "(Tensor, Tensor)")
def nsa_selection(q, k, v, blocks, *flat):
    """O ``[B, M, HQ, V]`` and LSE ``[B, HQ, M]``; see ``labkit.nsa.selection.forward``."""
    return selection.forward(q, k, v, blocks, _call(flat))


@_operator("nsa_compression", "Tensor q, Tensor k, Tensor v", "(Tensor, Tensor)")
def nsa_compression(q, k, v, *flat):
    """O and LSE; see ``labkit.nsa.compression.forward``."""
    return compression.forward(q, k, v, _call(flat))


def _fake_forward(q, k, v, *rest):
    b, m, hq, _ = q.shape
    return (
        q.new_empty((b, m, hq, v.shape[3])),
        q.new_empty((b, hq, m), dtype=torch.float32),
    )


_GIVEN = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse"


@_operator("nsa_selection_backward", f"{_GIVEN}, Tensor blocks", "(Tensor, Tensor, Tensor)")
def nsa_selection_backward(dout, dlse, q, k, v, o, lse, blocks, *flat):
    """dQ, dK and dV; see ``labkit.nsa.selection_backward.backward``."""
    return selection_backward.backward(dout, dlse, q, k, v, o, lse, blocks, _call(flat))


@_operator("nsa_compression_backward", _GIVEN, "(Tensor, Tensor, Tensor)")
def nsa_compression_backward(dout, dlse, q, k, v, o, lse, *flat):
    """dQ and the gradients of the compressed keys and values."""
    return compression.backward(dout, dlse, q, k, v, o, lse, _call(flat))


def _fake_backward(dout, dlse, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@_operator("nsa_select_blocks", "Tensor q, Tensor k_cmp, Tensor lse", "Tensor")
def nsa_select_blocks(q, k_cmp, lse, *flat):
    """``[B, M, H, count]`` int32; see ``labkit.nsa.topk.select``."""
    return topk.select(q, k_cmp, lse, _call(flat))


@nsa_select_blocks.register_fake
def _(q, k_cmp, lse, *flat):
    shape = (*q.shape[:2], k_cmp.shape[2], flat[_FIELDS.index("count")])
    return q.new_empty(shape, dtype=torch.int32)


# -- autograd --------------------------------------------------------------------------------------
#
# Selection and compression have one rule: what differs is that selection reads ``blocks``, which
# have no gradient.  ``extra`` holds them, or nothing.


def _keep(ctx, tensors, extra, call: Call, output) -> None:
    ctx.save_for_backward(*tensors, *output, *extra)
    ctx.call, ctx.extras = call, len(extra)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse, run):
    q, k, v, o, lse, *extra = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None
    if dout is None:
        dout = torch.zeros_like(o)
    return run(dout, dlse, q, k, v, o, lse, *extra, *_flat(ctx.call))


def _rule(forward, backward, extras: int) -> None:
    """Give the operator ``forward`` fakes and an autograd rule that calls ``backward``."""

    def setup(ctx, inputs, output):
        _keep(ctx, inputs[:3], inputs[3 : 3 + extras], _call(inputs[3 + extras :]), output)

    def derive(ctx, dout, dlse):
        run = getattr(torch.ops.labkit, backward._name.split("::")[-1])
        return *_gradients(ctx, dout, dlse, run), *[None] * (extras + len(_FIELDS))

    def refuse(ctx, *gradients):
        raise DoubleBackwardError("labkit.nsa", INSTEAD)

    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(derive, setup_context=setup)
    backward.register_autograd(refuse)


_rule(nsa_selection, nsa_selection_backward, 1)
_rule(nsa_compression, nsa_compression_backward, 0)


class Attend(torch.autograd.Function):
    """The same rule without the dispatcher: what runs when nothing but autograd is listening."""

    @staticmethod
    def forward(ctx, q, k, v, blocks, call: Call):
        extra = () if blocks is None else (blocks,)
        ctx.module = compression if blocks is None else selection
        output = ctx.module.forward(q, k, v, *extra, call)
        _keep(ctx, (q, k, v), extra, call, output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        selected = ctx.extras == 1
        if torch.is_grad_enabled():  # somebody may differentiate what comes out: the operator
            name = "nsa_selection_backward" if selected else "nsa_compression_backward"
            run = getattr(torch.ops.labkit, name)
        else:
            run = _direct(selection_backward if selected else compression)
        return *_gradients(ctx, dout, dlse, run), None, None


def _direct(module: ModuleType):
    count = len(_FIELDS)
    return lambda *arguments: module.backward(*arguments[:-count], _call(arguments[-count:]))


# -- what api.py calls -----------------------------------------------------------------------------


def _wants_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attend(operator, q, k, v, blocks, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.compiler.is_compiling():
        check_not_forward_mode(q, k, v, what="labkit.nsa", instead=INSTEAD)
    extra = () if blocks is None else (blocks,)
    if not nobody_listens(q, k, v):
        return operator(q, k, v, *extra, *_flat(call))
    if _wants_gradient(q, k, v):
        return Attend.apply(q, k, v, blocks, call)
    return (compression if blocks is None else selection).forward(q, k, v, *extra, call)


def attend_selected(q, k, v, blocks, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE over the chosen blocks ``[B, M, H, S]`` int32, differentiable."""
    return _attend(torch.ops.labkit.nsa_selection, q, k, v, blocks, call)


def add_selected(q, k, v, blocks, call: Call, others, gates):
    """Σ gate · branch and the selection's LSE, where one kernel can do both; None elsewhere.

    ``others`` and ``gates`` as for ``selection.forward_sum``.  Not where a gradient is wanted: a
    gate's gradient is made of its branch's output, which is then needed by itself.
    """
    tensors = (q, k, v, *others, *gates)
    if not nobody_listens(*tensors, blocks) or _wants_gradient(*tensors):
        return None
    check_not_forward_mode(*tensors, what="labkit.nsa", instead=INSTEAD)
    return selection.forward_sum(q, k, v, blocks, call, others, gates)


def attend_compressed(q, k_cmp, v_cmp, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE over compressed keys and values ``[B, C, H, ·]``, differentiable."""
    return _attend(torch.ops.labkit.nsa_compression, q, k_cmp, v_cmp, None, call)


def select(q, k_cmp, lse, call: Call) -> torch.Tensor:
    """The chosen blocks ``[B, M, H, count]`` int32; no gradient."""
    q, k_cmp, lse = q.detach(), k_cmp.detach(), lse.detach()
    if not nobody_listens(q, k_cmp, lse):
        return torch.ops.labkit.nsa_select_blocks(q, k_cmp, lse, *_flat(call))
    return topk.select(q, k_cmp, lse, call)


# -- FLOPs -----------------------------------------------------------------------------------------


def compressed_pairs(max_q: int, max_k: int, length: int, stride: int) -> int:
    """(query, compressed key) pairs of a sequence: a key counts once its last token is there."""
    seen = 0
    count = max(0, (max_k - length) // stride + 1)
    for c in range(count):
        first = c * stride + length - 1 - (max_k - max_q)
        seen += max_q - max(0, first)
    return seen


def selected_pairs(max_q: int, max_k: int, slots: int, block_size: int) -> int:
    """(query, key) pairs when every slot holds another block: min(t + 1, slots · block_size).

    Shapes do not tell how many of the slots are used, so this is the most that a causal query can
    read, and what a call with full slots reads but for the rest of its own block.
    """
    offset, most = max_k - max_q, slots * block_size
    ramp = max(0, min(max_q, most - offset))  # queries that see fewer keys than their slots hold
    return ramp * (offset + 1 + offset + ramp) // 2 + (max_q - ramp) * most


def _named(flat) -> dict[str, Any]:
    return dict(zip(_FIELDS, flat, strict=False))


def _sequences(q_shape, how) -> int:
    # A formula is given shapes: a varlen batch counts as its longest sequence, each time.
    return q_shape[0] if how["cu"] is None else how["cu"][0] - 1


def _pairs_selected(q_shape, blocks_shape, flat) -> int:
    how = _named(flat)
    pairs = selected_pairs(how["max_q"], how["max_k"], blocks_shape[3], how["block_size"])
    return _sequences(q_shape, how) * q_shape[2] * pairs


def _pairs_compressed(q_shape, flat) -> int:
    how = _named(flat)
    pairs = compressed_pairs(how["max_q"], how["max_k"], how["length"], how["stride"])
    return _sequences(q_shape, how) * q_shape[2] * pairs


@register_flop_formula(torch.ops.labkit.nsa_selection)
def _(q_shape, k_shape, v_shape, blocks_shape, *flat, out_shape=None, **kwargs) -> int:
    """Two products over the pairs."""
    return 2 * (q_shape[3] + v_shape[3]) * _pairs_selected(q_shape, blocks_shape, flat)


@register_flop_formula(torch.ops.labkit.nsa_compression)
def _(q_shape, k_shape, v_shape, *flat, out_shape=None, **kwargs) -> int:
    """Two products over the pairs."""
    return 2 * (q_shape[3] + v_shape[3]) * _pairs_compressed(q_shape, flat)


@register_flop_formula(torch.ops.labkit.nsa_select_blocks)
def _(q_shape, k_shape, l_shape, *flat, out_shape=None, **kwargs) -> int:
    """The scores once more."""
    return 2 * q_shape[3] * _pairs_compressed(q_shape, flat)


@register_flop_formula(torch.ops.labkit.nsa_selection_backward)
def _(
    g_shape, e_shape, q_shape, k_shape, v_shape, o_shape, l_shape, blocks_shape, *flat,
    out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """Five products over the pairs, as torch counts its own."""
    each = 3 * q_shape[3] + 2 * v_shape[3]
    return 2 * each * _pairs_selected(q_shape, blocks_shape, flat)


@register_flop_formula(torch.ops.labkit.nsa_compression_backward)
def _(
    g_shape, e_shape, q_shape, k_shape, v_shape, o_shape, l_shape, *flat,
    out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """Five products over the pairs."""
    each = 3 * q_shape[3] + 2 * v_shape[3]
    return 2 * each * _pairs_compressed(q_shape, flat)
