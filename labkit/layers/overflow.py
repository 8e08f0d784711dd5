r"""Which tensor was the first that held no number.

When a step in float16 goes wrong, what one sees is a loss of NaN, or gradients of inf in every
parameter: NaN and inf spread.  Where they began is found by doing the pass again and looking at
each operation as it runs: the first whose inputs were numbers and whose output is not.

.. math:: \max |x| : \qquad \text{float16 } 65\,504, \qquad
          \text{bfloat16, float32 } \approx 3.4 \cdot 10^{38}

A score of −∞ is no overflow where a mask wrote it.

The pass costs a look at every tensor, and the device waits for each: it is done once something
was found, and never before.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from labkit.errors import ArgumentError, LabError
from labkit.layers.layer import AttentionLayer

__all__ = ["Overflow", "PrecisionOverflowError", "find_overflow", "unwrapped"]

#: operations that write −∞ on purpose
_MASKS = {"masked_fill", "masked_fill_", "where", "fill_", "log", "index_put", "index_put_"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul"}
_SOFTMAX = {"_softmax", "_safe_softmax", "exp", "exp_", "softmax"}


@dataclass(frozen=True)
class Overflow:
    """The first tensor of a step that held inf or NaN, and what would do.

    Attributes
    ----------
    where : "input", "forward", "loss", "backward" or "weights".
    tensor : what it is, such as ``"S = QKᵀ of layers.0"`` or ``"gradient of norm.weight"``.
    operation : the ATen operator that made the first such tensor, ``""`` if it was given.  On the
        way back that may be one that no parameter has: the gradient named is the next one.
    dtype : of that tensor.
    holds : ``"inf"`` or ``"nan"``.
    largest : its largest magnitude if it had been computed in float32, or None if that is not
        known.
    others : further parameters whose gradients hold no numbers, the last of the model first.
    remedies : what would do, each a sentence.
    """

    where: str
    tensor: str
    operation: str = ""
    dtype: str = ""
    holds: str = "inf"
    largest: float | None = None
    others: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    def __str__(self) -> str:
        made = ", ".join(part for part in (self.operation, self.dtype) if part)
        text = f"{self.tensor}{f' ({made})' if made else ''} holds {self.holds}"
        if self.largest is not None:
            ends = torch.finfo(getattr(torch, self.dtype)).max
            text += f": in float32 it would reach {self.largest:.4g}, and {self.dtype} ends at "
            text += f"{ends:.5g}"
        if self.others:
            text += f"; so do the gradients of {len(self.others)} other parameters"
        return f"{text}. " + " ".join(self.remedies)


class PrecisionOverflowError(LabError, ArithmeticError):
    """A training step that cannot go on in its precision; ``overflow`` says where it began."""

    def __init__(self, overflow: Overflow) -> None:
        self.overflow = overflow
        super().__init__(str(overflow))


def find_overflow(
    model: nn.Module,
    x: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    scale: float = 1.0,
) -> Overflow | None:
    """Run ``model(x)``, its loss and its backward pass again, and find where numbers end.

    Call it under the autocast that the step ran under.  Afterwards gradients and buffers are as
    they were before, and so is the model.

    Parameters
    ----------
    model : torch.nn.Module
        any; the names of its parts are used for naming.
    x : torch.Tensor
        its input.
    loss : collections.abc.Callable
        output → a scalar; None looks at the forward pass only.
    scale : float
        what the loss is multiplied by before the backward pass.

    Returns
    -------
    Overflow or None
        without ``remedies``; None if everything is finite.

    Raises
    ------
    ArgumentError
        if ``model`` is no module, or ``x`` no tensor.
    """
    for name, given, kind in (("model", model, nn.Module), ("x", x, torch.Tensor)):
        if not isinstance(given, kind):
            raise ArgumentError(
                name, type(given).__name__, f"is no torch {kind.__name__}.", "Pass one."
            )  # fmt: skip
    model = unwrapped(model)
    if (holds := _holds(x)) is not None:
        return Overflow("input", "the input x", dtype=_name(x.dtype), holds=holds)
    for name, p in model.named_parameters():
        if (holds := _holds(p)) is not None:
            return Overflow("weights", name, dtype=_name(p.dtype), holds=holds)
    with _state_kept(model):
        try:
            return _watched(model, x, loss, scale)
        except (NotImplementedError, RuntimeError):
            # An operator that no dispatch mode may look into, such as FlexAttention.  What is
            # wrong for another reason is wrong again here, and then raised.
            model.zero_grad(set_to_none=True)
            return _unwatched(model, x, loss, scale)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)


# -- watching --------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Looks at what each operator takes and gives, and keeps the first that made no number."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[tuple[str, nn.Module]] = []
        self.found: tuple[str, Any, torch.Tensor, str, float | None] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.found is not None:
            return func(*args, **kwargs)
        took = [_holds(x) for x in _floats((args, kwargs))]
        spoilt, minus = any(h in ("inf", "nan") for h in took), "-inf" in took
        # an operator in place overwrites what it took
        given = _copies((args, kwargs)) if func._schema.is_mutable else (args, kwargs)
        out = func(*args, **kwargs)
        op = func.overloadpacket.__name__
        if spoilt or op in _MASKS or not took:
            return out
        for x in _floats(out):
            holds = _holds(x)
            if holds is None or (holds == "-inf" and minus):
                continue
            place = self.inside[-1] if self.inside else None
            largest = _in_float32(func, *given) if op in (*_PRODUCTS, "add", "mul") else None
            if op == "_to_copy":
                largest = max(_largest(y) for y in _floats(given))
            self.found = op, place, x.detach(), holds.removeprefix("-"), largest
            break
        return out


@contextmanager
def _followed(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """The watch knows in which part of the model it is."""

    def enter(name):
        return lambda module, args: watch.inside.append((name, module))

    def leave(module, args, output):
        watch.inside.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def _watched(model, x, loss, scale) -> Overflow | None:
    watch = _Watch()
    # Eager: what is compiled hides its operations from the watch.
    with torch.compiler.set_stance("force_eager"), watch, _followed(model, watch):
        out = model(x)
        in_model = watch.found is not None
        value = None if loss is None else loss(out)
        if watch.found is not None:
            op, place, tensor, holds, largest = watch.found
            what = _part(op, place, tensor, x) if in_model else "the loss"
            where = "forward" if in_model else "loss"
            return Overflow(where, what, op, _name(tensor.dtype), holds, largest)
        if value is None:
            return None
        if (holds := _holds(value)) is not None:  # it was given one: a target, a weight of a class
            return _of_loss(value, holds)
        (value * scale).backward()
    bad = _bad_gradients(model)
    if not bad:
        return None
    if watch.found is None:
        return _of_gradients(model, bad)
    op, _, tensor, holds, largest = watch.found
    what, others = f"gradient of {bad[0]}", tuple(bad[1:])
    return Overflow("backward", what, op, _name(tensor.dtype), holds, largest, others)


def _unwatched(model, x, loss, scale) -> Overflow | None:
    """The same from outside: the first part whose output holds no number, or the gradients."""
    first: list[Overflow] = []

    def look(name):
        def hook(module, args, output):
            for y in _floats(output):
                if not first and (holds := _holds(y)) is not None:
                    first.append(Overflow("forward", f"output of {name or 'the model'}", "",
                                          _name(y.dtype), holds.removeprefix("-")))  # fmt: skip

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(look(name)).remove)
        out = model(x)
    if first or loss is None:
        return first[0] if first else None
    value = loss(out)
    if (holds := _holds(value)) is not None:
        return _of_loss(value, holds)
    (value * scale).backward()
    bad = _bad_gradients(model)
    return _of_gradients(model, bad) if bad else None


def _of_loss(value: torch.Tensor, holds: str) -> Overflow:
    return Overflow("loss", "the loss", "", _name(value.dtype), holds.removeprefix("-"))


def _of_gradients(model: nn.Module, bad: list[str]) -> Overflow:
    gradient = model.get_parameter(bad[0]).grad
    holds = _holds(gradient).removeprefix("-")
    return Overflow("backward", f"gradient of {bad[0]}", "", _name(gradient.dtype), holds,
                    others=tuple(bad[1:]))  # fmt: skip


def _part(op: str, place: tuple[str, nn.Module] | None, tensor: torch.Tensor, x) -> str:
    """What the tensor is called, from the operator, the part of the model, and its shape."""
    if place is None:
        return "a tensor between the parts of the model"
    name, module = place
    of = f" of {name}" if name else ""
    if op == "_to_copy":
        return f"what is cast to {_name(tensor.dtype)} in {name or 'the model'}"
    if not isinstance(module, AttentionLayer):
        return f"output{of}" if name else "output of the model"
    if op == "add":
        return f"the residual sum{of}"
    # Scores are as wide as keys are looked at together, outputs as wide as a head.
    scores = tensor.shape[-1] != module.head_dim or tensor.shape[-1] == x.shape[1]
    if op in _PRODUCTS:
        return f"S = QKᵀ{of}" if scores else f"O = PV{of}"
    if op in _SOFTMAX:
        return f"P = softmax(S){of}"
    return f"S{of}" if scores else f"O{of}"


# -- looking ---------------------------------------------------------------------------------------


def _floats(tree: Any) -> list[torch.Tensor]:
    """Tensors that are computed in: those of 8 bits are for storage."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return [x for x in tensors if x.is_floating_point() and x.element_size() > 1]


def _holds(x: torch.Tensor) -> str | None:
    """ "nan", "inf", "-inf" (and no other), or None if all are numbers."""
    if x.numel() == 0 or x.is_meta:
        return None
    low, high = torch.aminmax(x.detach())
    low, high = low.item(), high.item()
    if math.isnan(low) or math.isnan(high):
        return "nan"
    if high == math.inf:
        return "inf"
    return "-inf" if low == -math.inf else None


def _largest(x: torch.Tensor) -> float:
    return x.detach().abs().max().float().item() if x.numel() else 0.0


def _copies(tree: Any) -> Any:
    """The arguments as they are now."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def _in_float32(func, args, kwargs) -> float | None:
    """The largest magnitude of the result, had it been computed in float32."""
    half = (torch.float16, torch.bfloat16)

    def widen(x):
        return x.float() if isinstance(x, torch.Tensor) and x.dtype in half else x

    try:
        out = func(*tree_map(widen, args), **tree_map(widen, kwargs))
    except (RuntimeError, TypeError):
        return None
    largest = _largest(out)
    return largest if math.isfinite(largest) else None


def _bad_gradients(model: nn.Module) -> list[str]:
    """Parameters whose gradient holds no number; the last of the model first."""
    return [
        name for name, p in reversed(list(model.named_parameters()))
        if p.grad is not None and _holds(p.grad) is not None
    ]  # fmt: skip


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Gradients made inside are dropped; those from before, and buffers, are there again."""
    before = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]  # such as the running means of BatchNorm
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
