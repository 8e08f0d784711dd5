"""FlashAttention as torch operators, so that torch's own tools see it as they see theirs.

``labkit::flash_forward`` and ``labkit::flash_backward`` have fake implementations (FakeTensor,
``torch.compile``, tracing without data), FLOP formulas (``FlopCounterMode``) and an autograd
rule.  What autograd saves is q, k, v, o and one LSE tensor.

Going through the dispatcher takes the host about as long as a short sequence takes the GPU.  When
nobody listens (:func:`nobody_listens`), ``Flash`` launches directly.

Taught in chapter 09 (the backward kernels).
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from labkit.errors import LabError
from labkit.flash import launch
from labkit.flash.launch import Call
from labkit.flash.masking import visible_pairs

__all__ = [
    "DoubleBackwardError",
    "Flash",
    "ForwardModeError",
    "check_not_forward_mode",
    "nobody_listens",
]


#: which function holds S and P, for those who need what the kernels do not have
_INSTEAD = "labkit.naive.naive_attention (it holds S and P)"


class DoubleBackwardError(LabError, RuntimeError):
    """A gradient of a gradient was asked for; there is no kernel for it."""

    def __init__(self, what: str = "flash_attention", instead: str = _INSTEAD) -> None:
        super().__init__(
            f"{what} has no second derivative: its backward kernels make P again from the "
            f"scores and keep nothing to differentiate. Use {instead} where you need one, for "
            "gradient penalties or Hessians."
        )


class ForwardModeError(LabError, RuntimeError):
    """A derivative in forward mode was asked for; without this it would silently be 0."""

    def __init__(self, what: str = "flash_attention", instead: str = _INSTEAD) -> None:
        super().__init__(
            f"{what} has no forward-mode derivative (jvp, dual tensors): there is no "
            f"kernel that carries a tangent along. Use reverse mode, or {instead}, which has both."
        )


def check_not_forward_mode(*tensors: torch.Tensor, **names: str) -> None:
    """Raise :class:`ForwardModeError` if a tensor carries a tangent; ``names`` are its own."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise ForwardModeError(**names)


@torch.library.custom_op("labkit::flash_forward", mutates_args=())
def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    window: int | None,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE; see ``labkit.flash.launch.forward``."""
    return launch.forward(
        q, k, v, Call(causal, scale, window, precision, max_q, max_k, cu_q, cu_k)
    )


@flash_forward.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window, precision):
    return launch.like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("labkit::flash_backward", mutates_args=())
def flash_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    window: int | None,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV; see ``labkit.flash.launch.backward``."""
    call = Call(causal, scale, window, precision, max_q, max_k, cu_q, cu_k)
    return launch.backward(dout, dlse, q, k, v, o, lse, call)


@flash_backward.register_fake
def _(dout, dlse, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, causal, scale, window, precision):
    return tuple(launch.like(x, x.shape[3]) for x in (q, k, v))


# -- autograd --------------------------------------------------------------------------------------


def _keep(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, *(x for x in (cu_q, cu_k) if x is not None))
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse, run):
    q, k, v, o, lse, *cu = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None
    if dout is None:
        dout = torch.zeros_like(o)
    return run(dout, dlse, q, k, v, o, lse, *(cu or (None, None)), *ctx.how)


def _op_backward(ctx, dout, dlse):
    return *_gradients(ctx, dout, dlse, torch.ops.labkit.flash_backward), *[None] * 8


flash_forward.register_autograd(_op_backward, setup_context=_keep)


def _no_second_derivative(ctx, *gradients):
    raise DoubleBackwardError


flash_backward.register_autograd(_no_second_derivative)


class Flash(torch.autograd.Function):
    """The same rule without the dispatcher: what runs when nothing but autograd is listening."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window, precision):
        output = launch.forward(
            q, k, v, Call(causal, scale, window, precision, max_q, max_k, cu_q, cu_k)
        )
        how = (max_q, max_k, causal, scale, window, precision)
        _keep(ctx, (q, k, v, cu_q, cu_k, *how), output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        # With create_graph=True somebody may differentiate what comes out; the operator says no.
        run = torch.ops.labkit.flash_backward if torch.is_grad_enabled() else _launch_backward
        return *_gradients(ctx, dout, dlse, run), *[None] * 8


def _launch_backward(dout, dlse, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, causal, scale, window,
                     precision):  # fmt: skip
    call = Call(causal, scale, window, precision, max_q, max_k, cu_q, cu_k)
    return launch.backward(dout, dlse, q, k, v, o, lse, call)


def nobody_listens(*tensors: torch.Tensor) -> bool:
    """Whether a direct launch is as good as the operator: plain tensors, no mode, no compiler."""
    return (
        all(type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta for x in tensors)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


# -- FLOPs -----------------------------------------------------------------------------------------


def _pairs(max_q, max_k, causal, window) -> int:
    return visible_pairs(max_q, max_k, causal, window)


@register_flop_formula(torch.ops.labkit.flash_forward)
def _forward_flops(
    q_shape, k_shape, v_shape, cu_q, cu_k, max_q, max_k, causal, scale, window, precision,
    *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """Two products over the visible pairs.  A varlen batch counts as its longest sequence."""
    batch = q_shape[0] if cu_q is None else cu_q[0] - 1
    return 2 * batch * q_shape[1] * (q_shape[3] + v_shape[3]) * _pairs(max_q, max_k, causal, window)


@register_flop_formula(torch.ops.labkit.flash_backward)
def _backward_flops(
    g_shape, e_shape, q_shape, k_shape, v_shape, o_shape, l_shape, cu_q, cu_k, max_q, max_k,
    causal, scale, window, precision, *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """Five products over the visible pairs, as torch counts its own; the kernels do seven."""
    batch = q_shape[0] if cu_q is None else cu_q[0] - 1
    each = 3 * q_shape[3] + 2 * v_shape[3]
    return 2 * batch * q_shape[1] * each * _pairs(max_q, max_k, causal, window)
