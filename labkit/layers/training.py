r"""One training step in each precision, and what it says when numbers end.

====================  ==============  ==============  ==============  =======================
precision             weights         products        optimiser       the loss is scaled
====================  ==============  ==============  ==============  =======================
``"fp32"``            float32         float32         float32         no
``"tf32"``            float32         10 bits, sums   float32         no
                                      in float32
``"autocast_fp16"``   float32         float16         float32         yes, by a GradScaler
``"autocast_bf16"``   float32         bfloat16        float32         no
``"fp16"``            float16         float16         float16         by a constant, if asked
``"bf16"``            bfloat16        bfloat16        bfloat16        no
====================  ==============  ==============  ==============  =======================

Autocast keeps the weights in float32 and casts a copy for each product (Micikevicius et al.
2018).  A gradient below :math:`6 \cdot 10^{-8}` is 0 in float16, so the loss is multiplied by a
scale s before the backward pass and every gradient divided by it after:

.. math:: g = \tfrac{1}{s}\, \nabla (s \cdot \text{loss})

If a gradient then overflows, the step is left out and s is halved; after many good steps it is
doubled.  What overflows in the forward pass does so before any scale, and no scaler helps.

With weights in float16 the division by s puts small gradients back below what float16 holds: a
constant scale then saves what is added up on the way, and not what arrives.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from labkit.errors import ArgumentError, check_choice, check_positive_number
from labkit.layers.layer import AttentionLayer
from labkit.layers.overflow import Overflow, PrecisionOverflowError, find_overflow, unwrapped

__all__ = ["PRECISIONS", "StepResult", "TrainingStep", "matmul_in", "why_not"]

#: name → (dtype of the weights, dtype of autocast or None)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "tf32": (torch.float32, None),
    "autocast_fp16": (torch.float32, torch.float16),
    "autocast_bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
}
# Adam divides by √v + ε, and v takes a thousandth of the squared gradient at each step: kept in
# float16, it forgets every gradient below 0.005, and ε = 1e-8 is 0 there as well.
_EPS = {"fp16": 1e-4}


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes
    ----------
    loss : not scaled.
    scale : what the loss was multiplied by.
    skipped : whether the weights were left as they were, because a gradient was no number.
    grad_norm : 2-norm of all gradients, divided by the scale; inf or NaN if one holds that.
    overflow : where it began, if anything was no number.
    """

    loss: float
    scale: float
    skipped: bool
    grad_norm: float
    overflow: Overflow | None = None


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in float32: in float16 a difference of 256 squared is inf."""
    return nn.functional.mse_loss(output.float(), target.float())


class TrainingStep:
    """Forward, backward and update of a model, in one precision.

    Parameters
    ----------
    model : torch.nn.Module
        any that takes ``x`` and returns a tensor; ``torch.compile``'s too.  ``"fp16"`` and
        ``"bf16"`` convert its weights, in place.
    precision : str
        one of :data:`PRECISIONS`.
    optimizer : str or collections.abc.Callable
        ``"adamw"`` or ``"sgd"``, fused on a GPU: no temporary tensors, and the GradScaler need
        not wait for the device.  Or a function from the parameters to an optimiser.
    lr : float
        learning rate.
    loss_scale : float
        ``"autocast_fp16"``: where the GradScaler starts, 65536 unless given.  ``"fp16"``: a
        constant, 1 unless given.
    loss : collections.abc.Callable
        (output, target) → scalar; mean squared error in float32 unless given.
    eps : float
        ε of Adam; 1e-8 unless given, and 1e-4 for ``"fp16"``, where 1e-8 is 0.
    on_overflow : str
        ``"raise"``: raise what a smaller scale does not cure.  ``"skip"``: leave the step out
        and say so in the result.

    Raises
    ------
    ArgumentError
        if an option is not known, or the precision does not exist on the model's device.

    Examples
    --------
    >>> from labkit.layers import TransformerModel
    >>> model = TransformerModel(32, 2, 1, backend="sdpa")
    >>> step = TrainingStep(model, precision="autocast_bf16", lr=1e-3)
    >>> x = torch.randn(2, 16, 32)
    >>> step.step(x, torch.zeros_like(x)).skipped
    False
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: str = "fp32",
        optimizer: str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = "adamw",
        lr: float = 1e-3,
        loss_scale: float | None = None,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = squared_error,
        eps: float | None = None,
        on_overflow: str = "raise",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                "model", type(model).__name__, "is no torch.nn.Module.", "Pass one."
            )  # fmt: skip
        self.precision = check_choice("precision", precision, PRECISIONS)
        self.on_overflow = check_choice("on_overflow", on_overflow, ("raise", "skip"))
        self.dtype, self.autocast_dtype = PRECISIONS[precision]
        if not callable(loss):
            raise ArgumentError(
                "loss", loss, f"is a {type(loss).__name__}, not a function.",
                "Pass (output, target) → scalar.",
            )  # fmt: skip
        self.model, self.loss = model, loss
        self._layers = [m for m in unwrapped(model).modules() if isinstance(m, AttentionLayer)]
        self.device = _device_of(model)
        why = why_not(precision, self.device)
        if why is not None:
            nearest = "fp32" if precision == "tf32" else precision.replace("bf16", "fp16")
            raise ArgumentError(
                "precision", precision, f"does not exist here: {why}.",
                f"The nearest that does is {nearest!r}.",
            )  # fmt: skip
        self._check_scale_fits(loss_scale)
        self._prepare_weights()
        self.scaler = None
        self.loss_scale = 1.0 if loss_scale is None else check_positive_number(
            "loss_scale", loss_scale
        )  # fmt: skip
        if precision == "autocast_fp16":
            start = 65536.0 if loss_scale is None else self.loss_scale
            self.scaler = torch.amp.GradScaler(self.device.type, init_scale=start)
        self.optimizer = self._make_optimizer(optimizer, lr, eps)

    # -- the parts, as they are timed and weighed --------------------------------------------------

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss, not scaled.  Without autocast, an x of floats is converted if it is not yet.

        Raises
        ------
        ArgumentError
            if x is no tensor, or does not fit the model.
        """
        if not isinstance(x, torch.Tensor):
            raise ArgumentError("x", type(x).__name__, "is not a torch tensor.", "Pass a tensor.")
        x = self._converted(x)
        with self.arithmetic(), self.autocast():
            return self.loss(self.model(x), target)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the scaled loss, into ``.grad``."""
        with self.arithmetic():
            if self.scaler is not None:
                self.scaler.scale(loss).backward()
            else:
                (loss if self.loss_scale == 1 else loss * self.loss_scale).backward()

    def update(self) -> None:
        """Divide by the scale, and let the optimiser step (or not: the GradScaler's choice)."""
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        self._unscale()
        self.optimizer.step()

    def launch(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Forward, backward and update without a look at the result: what is timed.

        Returns the loss as a tensor.  Nothing here makes the host wait for the device, save the
        GradScaler if the optimiser cannot judge the gradients itself.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(x, target)
        self.backward(loss)
        self.update()
        return loss.detach()

    # -- one step, looked at -----------------------------------------------------------------------

    def step(self, x: torch.Tensor, target: torch.Tensor) -> StepResult:
        """Forward, backward and update; reads the loss and the gradients' norm.

        Raises
        ------
        ArgumentError
            as :meth:`forward`.
        PrecisionOverflowError
            naming the first tensor that held inf or NaN, if ``on_overflow`` is ``"raise"`` and a
            smaller loss scale, which a GradScaler chooses itself, is not the cure.  The weights
            are as before the step, unless it says that the weights themselves overflowed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(x, target)
        self.backward(loss)
        scale = self.scale
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        else:
            self._unscale()
        norm = self._grad_norm()
        value, norm = torch.stack((loss.detach().float(), norm)).tolist()  # the host waits once
        if _finite(value) and _finite(norm):
            self._step_optimizer()
            result = StepResult(value, scale, False, norm)
            return self._after_update(result) if self.dtype == torch.float16 else result

        self.optimizer.zero_grad(set_to_none=True)  # of no use, and the next pass needs the room
        overflow = self._name(x, target, scale)
        curable = overflow.where == "backward" and self.scaler is not None and scale > 1
        if self.scaler is not None:
            # A scale that is not the cause stays as it is.
            self.scaler.update(None if curable else scale)
        if not curable and self.on_overflow == "raise":
            raise PrecisionOverflowError(overflow)
        return StepResult(value, scale, True, norm, overflow)

    @property
    def scale(self) -> float:
        """What the next loss is multiplied by."""
        return self.loss_scale if self.scaler is None else self.scaler.get_scale()

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """How float32 is multiplied in this precision, inside the ``with`` only."""
        if self.dtype != torch.float32 or self.autocast_dtype is not None:
            yield
            return
        if self.precision == "fp32":
            with matmul_in("fp32"):
                yield
            return
        before = [layer.precision for layer in self._layers]
        with matmul_in("tf32"):
            try:
                for layer in self._layers:
                    layer.precision = "tf32"
                yield
            finally:
                for layer, precision in zip(self._layers, before, strict=True):
                    layer.precision = precision

    def autocast(self):
        """The autocast of this precision, or a context that does nothing."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    # -- parts -------------------------------------------------------------------------------------

    def _check_scale_fits(self, loss_scale: float | None) -> None:
        if loss_scale is not None and self.precision not in ("autocast_fp16", "fp16"):
            raise ArgumentError(
                "loss_scale", loss_scale, f"was given for {self.precision}, whose gradients do not "
                "underflow.", 'Leave it out; it is for "autocast_fp16" and "fp16".',
            )  # fmt: skip

    def _prepare_weights(self) -> None:
        if self.dtype != torch.float32:
            if any(p.dtype != self.dtype for p in self.model.parameters()):
                self.model.to(self.dtype)
            return
        for name, p in self.model.named_parameters():
            if p.dtype != torch.float32:
                raise ArgumentError(
                    "model", f"{name} is {p.dtype}", f"where {self.precision} has float32 weights.",
                    'Pass model.float(), or precision="fp16" or "bf16" for weights in half.',
                )  # fmt: skip

    def _make_optimizer(self, optimizer, lr: float, eps: float | None) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ArgumentError(
                "model", type(self.model).__name__, "has no parameter that asks for a gradient.",
                "Switch some on with .requires_grad_().",
            )  # fmt: skip
        if callable(optimizer):
            return optimizer(parameters)
        check_choice("optimizer", optimizer, ("adamw", "sgd"))
        lr = check_positive_number("lr", lr)
        cuda = self.device.type == "cuda"
        if optimizer == "sgd":
            # On a CPU the fused one leaves half precision weights as they are (torch 2.13).
            return torch.optim.SGD(parameters, lr=lr, fused=cuda)
        eps = _EPS.get(self.precision, 1e-8) if eps is None else check_positive_number("eps", eps)
        return torch.optim.AdamW(
            parameters, lr=lr, eps=eps, fused=cuda or self.device.type == "cpu"
        )

    def _gradients(self) -> list[torch.Tensor]:
        groups = self.optimizer.param_groups
        return [p.grad for g in groups for p in g["params"] if p.grad is not None]

    def _unscale(self) -> None:
        if self.loss_scale != 1 and (gradients := self._gradients()):
            torch._foreach_mul_(gradients, 1 / self.loss_scale)

    def _grad_norm(self) -> torch.Tensor:
        # Summed in float32: the norm of a float16 tensor of moderate numbers can be above 65504.
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in self._gradients()]
        if not norms:
            return torch.zeros((), device=self.device)
        return torch.linalg.vector_norm(torch.stack(norms))

    def _step_optimizer(self) -> None:
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _name(self, x: torch.Tensor, target: torch.Tensor, scale: float) -> Overflow:
        found = self._of_data(x, target)
        if found is not None:
            return replace(found, remedies=remedies(found, self.precision, scale))
        x = self._converted(x)
        with self.arithmetic(), self.autocast():
            found = find_overflow(self.model, x, lambda out: self.loss(out, target), scale=scale)
        if found is None:  # the pass that looked was finite: nothing to name but the sum
            found = Overflow("backward", "the sum of squared gradients", "", "float32")
        name = found.tensor.rpartition(" of ")[2] if " of " in found.tensor else ""
        layer = dict(unwrapped(self.model).named_modules()).get(name)
        return replace(found, remedies=remedies(found, self.precision, scale, layer))

    def _converted(self, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype of the weights; numbers of tokens stay what they are."""
        if self.autocast_dtype is not None or not x.is_floating_point():
            return x
        return x.to(self.dtype)

    def _of_data(self, x: torch.Tensor, target: torch.Tensor) -> Overflow | None:
        """What was no number before the model saw it."""
        for what, given in (("x", x), ("target", target)):
            if isinstance(given, torch.Tensor) and not torch.isfinite(given).all():
                holds = "nan" if given.isnan().any() else "inf"
                dtype = str(given.dtype).removeprefix("torch.")
                return Overflow("input", f"the {'input x' if what == 'x' else what}", "", dtype,
                                holds)  # fmt: skip
        if torch.isfinite(self._converted(x)).all():
            return None
        dtype = str(self.dtype).removeprefix("torch.")
        return Overflow("input", f"the input x in {dtype}", "to", dtype, "inf",
                        x.detach().abs().max().item())  # fmt: skip

    def _after_update(self, result: StepResult) -> StepResult:
        """Whether the weights are still numbers; float16 is where they may not be."""
        parameters = dict(unwrapped(self.model).named_parameters())
        sums = torch.stack([p.detach().float().sum() for p in parameters.values()])
        if torch.isfinite(sums).all():
            return result
        name, p = next(
            (name, p) for name, p in parameters.items() if not torch.isfinite(p).all()
        )  # fmt: skip
        holds = "nan" if p.isnan().any() else "inf"
        found = Overflow("weights", f"{name} after the update", "", "float16", holds)
        found = replace(found, remedies=remedies(found, self.precision, result.scale))
        if self.on_overflow == "raise":
            raise PrecisionOverflowError(found)
        return replace(result, overflow=found)


def remedies(
    overflow: Overflow, precision: str, scale: float, layer: nn.Module | None = None
) -> tuple[str, ...]:
    """What would do against an overflow, each a sentence; ``layer`` is the part it began in."""
    half = overflow.dtype == "float16"
    wider = f"{'autocast_bf16' if 'autocast' in precision else 'bf16'}"
    bf16 = f'precision="{wider}" reaches as far as float32, with 8 bits where float16 has 11.'
    if overflow.where == "input":
        if overflow.operation:  # it was finite before it was converted
            return ("Scale the data down.", bf16)
        return ("Look at the data: the step was given it so.",)
    if overflow.where == "weights":
        if not half:
            return ("Lower the learning rate.",)
        return (
            'precision="autocast_fp16" keeps weights and optimiser in float32.',
            "A larger eps or a lower learning rate keeps the update small.",
            "These weights are spoilt: load them again.",
        )
    if overflow.where == "backward":
        said = []
        if scale > 1 and precision == "autocast_fp16":
            said.append(f"The GradScaler halves its scale, {scale:g}, and tries again.")
        elif scale > 1:
            said.append(f"Use a smaller loss_scale than {scale:g}, or let a GradScaler choose: "
                        'precision="autocast_fp16".')  # fmt: skip
        return (*said, bf16) if half else (*said, "Clip the gradients, or lower the learning rate.")
    if not half:
        return ("Look at the learning rate and at the scale of the weights.",)
    said = ["A GradScaler does not help: it scales the loss, which comes later."]
    if overflow.where == "loss":
        said.append("Compute the loss in float32.")
    elif overflow.tensor.startswith("S"):
        said.append(_with_wide_scores(layer))
        said.append("Or divide by √d before the product, or normalise Q and K.")
    return (*said, bf16)


def _with_wide_scores(layer: nn.Module | None) -> str:
    """Who computes what this layer does without scores in half precision."""
    if getattr(layer, "backend", None) == "nsa":
        return (
            'nsa={"implementation": "kernels"} computes the same and keeps S in float32; the '
            "other backends compute another function."
        )
    others = [b for b in ("flash", "sdpa", "tiled") if b != getattr(layer, "backend", None)]
    return f'backend="{others[0]}" and "{others[1]}" keep S in float32 and never write it.'


def why_not(precision: str, device: torch.device | str) -> str | None:
    """Why a precision does not exist on a device, or None."""
    check_choice("precision", precision, PRECISIONS)
    device = torch.device(device)
    if device.type != "cuda":
        if precision == "tf32":
            return f"TF32 is a format of NVIDIA's tensor cores, and the model is on {device}"
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 and (precision == "tf32" or "bf16" in precision):
        what = "TF32" if precision == "tf32" else "bfloat16 on tensor cores"
        return f"{what} came with compute capability 8.0, and this GPU has {major}.{minor}"
    return None


@contextmanager
def matmul_in(what: str) -> Iterator[None]:
    """torch multiplies float32 in ``"tf32"`` or ``"fp32"`` inside, and as before outside.

    >>> with matmul_in("tf32"):
    ...     torch.get_float32_matmul_precision()
    'high'
    """
    check_choice("what", what, ("fp32", "tf32"))
    matmul = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody has used torch's newer switch: so do we
        before, matmul.fp32_precision = (
            matmul.fp32_precision, "ieee" if what == "fp32" else "tf32"
        )  # fmt: skip
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    torch.set_float32_matmul_precision("high" if what == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _device_of(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise ArgumentError(
            "model", sorted(map(str, devices)), "is where its parameters are.",
            "Pass a model with parameters, all on one device.",
        )  # fmt: skip
    return devices.pop()


def _finite(x: float) -> bool:
    return x - x == 0
