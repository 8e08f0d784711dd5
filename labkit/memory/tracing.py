"""What a function would allocate, found without allocating it.

The function runs on FakeTensors: tensors with shape, dtype, device and storage, but no
bytes behind it.  A dispatch mode sees every ATen operator below autograd, notes each new
storage and is told when that storage dies.  What results is the exact order in which
tensors are created and freed, forward and backward.

Two things differ from a real run.  What a kernel allocates for itself is not seen: the
operator is one event here, and :func:`labkit.memory.measure` shows the rest.  And where two
gradients of one tensor meet, autograd adds in place if it may, which on FakeTensors it may
not: such an addition makes a third tensor here.

Loads torch.  Taught in chapter 01 (what attention writes).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from labkit.errors import ArgumentError, LabError
from labkit.units import format_bytes

__all__ = ["Trace", "TraceEvent", "fakes_of", "trace"]


@dataclass(frozen=True)
class TraceEvent:
    """One storage created (``bytes`` > 0) or freed (``bytes`` < 0)."""

    op: str  #: the ATen operator that created it, e.g. "bmm"
    bytes: int  #: change of the live bytes
    live: int  #: bytes alive after it
    shape: tuple[int, ...]
    dtype: str
    storage: int  #: the same number for the creation and the freeing of a storage


@dataclass
class Trace:
    """The life of every tensor that a function creates.

    ``peak`` counts bytes above what was alive before (outputs count, inputs do not);
    ``left`` is what is alive when the function has returned: its outputs.
    """

    events: list[TraceEvent] = field(default_factory=list)
    peak: int = 0
    left: int = 0

    @property
    def allocations(self) -> list[tuple[str, int, int]]:
        """``(op, bytes, live bytes after)`` of each creation, in order."""
        return [(e.op, e.bytes, e.live) for e in self.events if e.bytes > 0]

    def alive_at_peak(self) -> list[TraceEvent]:
        """The creations that are alive at the (first) peak, oldest first."""
        alive: dict[int, TraceEvent] = {}
        for event in self.events:
            if event.bytes > 0:
                alive[event.storage] = event
            else:
                alive.pop(event.storage, None)
            if event.live == self.peak:
                break
        return list(alive.values())

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict per event, for export."""
        return [{**vars(e), "shape": list(e.shape)} for e in self.events]

    def plot(self, ax=None):
        """Live bytes event by event (``labkit.plots.timeline``)."""
        from labkit import plots

        return plots.timeline(self, ax=ax)

    def __str__(self) -> str:
        wide = max([len(e.op) for e in self.events] + [4])
        lines = [f"{'op':<{wide}}  {'change':>10}  {'alive':>10}  shape"]
        for e in self.events:
            change = ("+" if e.bytes > 0 else "") + format_bytes(e.bytes)
            shape = list(e.shape) if e.bytes > 0 else "freed"
            lines.append(f"{e.op:<{wide}}  {change:>10}  {format_bytes(e.live):>10}  {shape}")
        return "\n".join([*lines, f"peak {format_bytes(self.peak)}"])


class _Follow(TorchDispatchMode):
    """Notes every storage that an operator returns for the first time, and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.live = 0
        self.on = True
        self.known: weakref.WeakSet = weakref.WeakSet()

    def know(self, tensor: torch.Tensor) -> None:
        self.known.add(tensor.untyped_storage())

    def _note(self, op: str, change: int, shape, dtype: str, number: int) -> None:
        if not self.on:
            return
        self.live += change
        self.trace.events.append(TraceEvent(op, change, self.live, shape, dtype, number))
        self.trace.peak = max(self.trace.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        outs = out if isinstance(out, (tuple, list)) else (out,)
        for position, value in enumerate(outs):
            # A view or an in-place result owns no new memory.
            if position < len(returns) and returns[position].alias_info is not None:
                continue
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    self._new(func, tensor)
        return out

    def _new(self, func, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:  # reshape may return its input
            return
        self.known.add(storage)
        nbytes = storage.nbytes()
        if not nbytes:
            return
        op = func._schema.name.removeprefix("aten::")
        dtype = str(tensor.dtype).removeprefix("torch.")
        number, shape = len(self.trace.events), tuple(tensor.shape)
        self._note(op, nbytes, shape, dtype, number)
        # The Python object of a storage lives as long as the storage, so this is its end.
        weakref.finalize(storage, self._note, op, -nbytes, shape, dtype, number).atexit = False


def trace(fn: Callable, *args: Any, **kwargs: Any) -> Trace:
    """Run ``fn`` on FakeTensors and follow every storage it creates.

    Parameters
    ----------
    fn : callable
        takes ``*args, **kwargs``; may run a backward pass.
    args, kwargs
        tensors (real or on the ``meta`` device; meta tensors are traced as CPU tensors,
        so that nothing at all needs to exist), containers of them, anything else as it is.

    Returns
    -------
    Trace

    Raises
    ------
    LabError
        if ``fn`` needs values, which fake tensors do not have (``.item()``, an ``if`` on a
        tensor).
    """
    if not callable(fn):
        raise ArgumentError("fn", fn, "is not callable.", "Pass the function to trace.")
    with fakes_of(args, kwargs) as (call_args, call_kwargs, inputs):
        follow = _Follow()
        for tensor in inputs:
            follow.know(tensor)
        try:
            with follow:
                out = fn(*call_args, **call_kwargs)
            follow.trace.left = follow.live
        except _NEEDS_VALUES as error:
            raise LabError(
                f"cannot trace {getattr(fn, '__name__', fn)!r}: {error} needs values, and a "
                "trace has none. Measure it instead."
            ) from error
        follow.on = False  # what dies from here on is the result in our own hands
        del out
    return follow.trace


_NEEDS_VALUES = (
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
)


@contextmanager
def fakes_of(args: tuple, kwargs: dict):
    """Stand-ins for the tensors in ``args`` and ``kwargs``: shape, dtype and device, no bytes.

    Yields the arguments with their tensors replaced, and the list of the replacements.  A
    tensor on the ``meta`` device is replaced by one that claims to be on the CPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made: dict[int, torch.Tensor] = {}

        def to_fake(x):
            if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
                return x
            if id(x) not in made:
                if x.device.type == "meta":
                    fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
                else:
                    fake = mode.from_tensor(x.detach())
                made[id(x)] = fake.requires_grad_(x.requires_grad)
            return made[id(x)]

        call_args, call_kwargs = tree_map(to_fake, (args, kwargs))
        yield call_args, call_kwargs, list(made.values())
