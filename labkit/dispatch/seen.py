"""Which backend did run: proof by profile.

What :func:`labkit.dispatch.sdpa.explain` says is what torch intends.  :func:`ran` watches a call
with ``torch.profiler`` and tells the backend from the operators that torch dispatched and from the
names of the kernels that the GPU executed.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from labkit.dispatch.sdpa import ASKS
from labkit.errors import ArgumentError
from labkit.memory.measuring import _without_profiler_noise

__all__ = ["Ran", "backend_of_kernel", "ran"]

#: operator to backend; the order matters where one name begins like another
_OPERATORS = (
    (r"aten::_scaled_dot_product_flash_attention_for_cpu", "flash_cpu"),
    (r"aten::_(scaled_dot_product_)?flash_attention", "flash"),
    (r"aten::_(scaled_dot_product_)?efficient_attention", "efficient"),
    (r"aten::_(scaled_dot_product_)?cudnn_attention", "cudnn"),
    (r"aten::_scaled_dot_product_attention_math", "math"),
    (r"labkit::flash_", "ours"),
    (r"(higher_order::)?flex_attention", "flex"),
)
#: kernel to backend, where no operator tells: a replayed CUDA graph has kernels only
_KERNELS = (
    (r"pytorch_flash::|flash_(fwd|bwd)_|flash::flash_|FlashAttn", "flash"),
    (r"PyTorchMemEffAttention|fmha_cutlass", "efficient"),
    (r"cudnn.*(sdpa|flash|mha)", "cudnn"),
    (r"^(forward|one_pass|dkdv|dq|merge)_kernel$", "ours"),
    (r"flex_attention|flex_decoding", "flex"),
)
_PRODUCT = r"aten::(bmm|baddbmm|mm)$"


@dataclass(frozen=True)
class Ran:
    """What a call executed.

    Attributes
    ----------
    backend : ``"flash"``, ``"cudnn"``, ``"efficient"``, ``"math"``, ``"flash_cpu"``; ``"ours"``
        (labkit.flash), ``"flex"``; ``"unfused"`` for products and a softmax called one by one;
        None if there was no attention.  The first, where a call ran several.
    backends : all of them, in order of appearance.
    kernels : name to how often, of what the GPU executed, copies and fills included; empty on a
        CPU.
    operators : name to how often, of what torch dispatched.
    device : ``"cuda"`` or ``"cpu"``.
    """

    backend: str | None
    backends: tuple[str, ...]
    kernels: dict[str, int] = field(repr=False)
    operators: dict[str, int] = field(repr=False)
    device: str

    @property
    def launches(self) -> int:
        """How many kernels the GPU executed."""
        return sum(self.kernels.values())

    @property
    def attention_kernels(self) -> tuple[str, ...]:
        """The kernels that belong to one of the backends, in order."""
        return tuple(name for name in self.kernels if backend_of_kernel(name))

    def __str__(self) -> str:
        lines = [f"{', '.join(self.backends) or 'no attention'} ran on {self.device}:"]
        told = {name: n for name, n in self.operators.items() if _backend(name, _OPERATORS)}
        shown = self.kernels or told or self.operators
        lines += [f"  {count} × {name[:100]}" for name, count in shown.items()]
        return "\n".join(lines)


def ran(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Ran:
    """Call ``fn`` under ``torch.profiler`` and tell which attention backend it ran.

    ``fn(*args, **kwargs)`` is called two or three times: once or twice to warm up, since what is
    set up at a first call is not what one asks about, and then watched.

    Returns
    -------
    Ran

    Raises
    ------
    ArgumentError
        if ``fn`` is not a function.
    """
    if not callable(fn):
        raise ArgumentError(
            "fn", type(fn).__name__, "is not a function.",
            "Pass a function and its arguments: ran(f, q, k, v, is_causal=True).",
        )  # fmt: skip
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    fn(*args, **kwargs)

    def watch() -> Any:
        with profile(activities=activities, acc_events=True) as seen:
            fn(*args, **kwargs)
            if gpu:
                torch.cuda.synchronize()
        return seen

    with _without_profiler_noise():
        if gpu and not _warm:  # the first profile of a process misses what it starts with
            watch()
            _warm.append(True)
        events = [e for e in watch().events() if not _asks(e)]
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = Counter(e.name for e in events if e.device_type == on_gpu and not _is_mark(e))
    operators = Counter(e.name for e in events if e.device_type != on_gpu and "::" in e.name)
    found = _backends(operators, kernels)
    if not found and not kernels:
        operators = _dispatched(fn, args, kwargs)  # a kernel in Triton's interpreter leaves no mark
        found = _backends(operators, kernels)
    device = "cuda" if kernels else "cpu"
    return Ran(found[0] if found else None, found, dict(kernels), dict(operators), device)


_warm: list[bool] = []


def backend_of_kernel(name: str) -> str | None:
    """The backend that a kernel belongs to, by its name; None if it is not attention's."""
    return _backend(name, _KERNELS)


def _is_mark(event: Any) -> bool:
    """A range that the profiler draws on the GPU's lane for an operator; not a kernel."""
    return event.name.startswith(("aten::", "ProfilerStep", "## "))


def _asks(event: Any) -> bool:
    """Whether ``explain`` tried the call without data here: what it dispatched did not run."""
    while event is not None:
        if event.name == ASKS:
            return True
        event = event.cpu_parent
    return False


def _backend(name: str, known: Iterable[tuple[str, str]]) -> str | None:
    return next((backend for pattern, backend in known if re.search(pattern, name)), None)


def _backends(operators: Counter, kernels: Iterable[str]) -> tuple[str, ...]:
    """The backends in order of appearance: by operator, then what only kernels tell."""
    found = dict.fromkeys(b for name in operators if (b := _backend(name, _OPERATORS)))
    for name in kernels:
        if backend := _backend(name, _KERNELS):
            found[backend] = None
    if not found and any(re.search(r"aten::_?softmax$", name) for name in operators):
        # QKᵀ and PV: two products of which no linear layer is one (a classifier has a softmax too)
        products = sum(n for name, n in operators.items() if re.search(_PRODUCT, name))
        layers = operators["aten::linear"] - operators["aten::addmm"]
        if products - max(0, layers) >= 2:
            return ("unfused",)
    return tuple(found)


def _dispatched(fn: Callable, args: tuple, kwargs: dict) -> Counter:
    """The operators that a call dispatches; labkit's own are seen only while somebody listens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names: Counter = Counter()

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
                names[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    with Listen():
        fn(*args, **kwargs)
    return names
