"""What autograd keeps for the backward pass, by saved-tensor hooks.

Every operator that will need a tensor in its backward pass hands it to autograd when it
runs; a hook sees each of them.  The same storage saved by two operators is kept once, so
bytes are counted by storage, and a storage that belongs to an input would be alive anyway.

Loads torch.  Taught in chapter 05 (what the backward pass keeps).
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from labkit.errors import ArgumentError, LabError
from labkit.memory.tracing import fakes_of
from labkit.units import format_bytes

__all__ = ["SavedReport", "SavedTensor", "saved_for_backward"]


@dataclass(frozen=True)
class SavedTensor:
    """One storage that autograd keeps."""

    shape: tuple[int, ...]
    dtype: str
    #: bytes of the whole storage (a saved view keeps all of it)
    bytes: int
    is_input: bool
    #: which backward nodes keep it, e.g. ``("SoftmaxBackward0.result", "BmmBackward0.self")``
    by: tuple[str, ...]

    @property
    def kept_by(self) -> str:
        """``by`` in one line, without the noise of PyTorch's naming."""
        return ", ".join(name.replace("Backward0", "") for name in self.by) or "?"


@dataclass(frozen=True)
class SavedReport:
    """Everything that one call keeps for its backward pass."""

    tensors: tuple[SavedTensor, ...]

    @property
    def total(self) -> int:
        """Bytes kept, the inputs among them."""
        return sum(t.bytes for t in self.tensors)

    @property
    def beyond_inputs(self) -> int:
        """Bytes that live only because the backward pass will come."""
        return sum(t.bytes for t in self.tensors if not t.is_input)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict per storage, for export."""
        return [{**vars(t), "shape": list(t.shape), "by": list(t.by)} for t in self.tensors]

    def _cells(self) -> list[list[str]]:
        return [
            [
                str(list(t.shape)),
                t.dtype,
                format_bytes(t.bytes),
                "input" if t.is_input else "kept",
                t.kept_by,
            ]
            for t in self.tensors
        ]

    def _last(self) -> str:
        return (
            f"kept beyond the inputs: {format_bytes(self.beyond_inputs)} "
            f"(with them {format_bytes(self.total)}; binary units)"
        )

    def __str__(self) -> str:
        rows = [["shape", "dtype", "bytes", "", "by"], *self._cells()]
        wide = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = [
            f"{r[0]:<{wide[0]}}  {r[1]:<{wide[1]}}  {r[2]:>{wide[2]}}  {r[3]:<{wide[3]}}  {r[4]}"
            for r in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), self._last()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        heads = "".join(
            f'<th scope="col">{h}</th>' for h in ("shape", "dtype", "bytes", "whose", "kept by")
        )
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
            for row in self._cells()
        )
        return (
            '<table class="labkit-memory"><caption>Saved for the backward pass</caption>'
            f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
            f'<tfoot><tr><td colspan="5">{html.escape(self._last())}</td></tr></tfoot></table>'
        )


class _Packed:
    """What autograd holds in place of a saved tensor while we look."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def saved_for_backward(fn: Callable, *args: Any, **kwargs: Any) -> SavedReport:
    """Run ``fn`` forward and list what autograd keeps for its backward pass.

    Parameters
    ----------
    fn : callable
        returns a tensor, or containers of tensors, that depend on ``args``.
    args, kwargs
        with tensors on the ``meta`` device, ``fn`` runs on FakeTensors and nothing is
        allocated.

    Returns
    -------
    SavedReport
        storages in the order in which they were saved; numbers are no tensors.  Inside
        ``torch.utils.checkpoint`` nothing is saved, so nothing is listed but what the
        caller keeps: the inputs, which live anyway.

    Raises
    ------
    ArgumentError
        if ``fn`` is not callable, or no tensor argument requires a gradient.
    LabError
        if the result of ``fn`` does not depend on them: autograd was off inside.
    """
    if not callable(fn):
        raise ArgumentError("fn", fn, "is not callable.", "Pass the forward function.")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if not any(t.requires_grad for t in tensors):
        raise ArgumentError(
            "args",
            f"{len(tensors)} tensors",
            "hold nothing that requires a gradient, so nothing would be saved.",
            "Call .requires_grad_() on the inputs.",
        )
    if any(t.device.type == "meta" for t in tensors):
        with fakes_of(args, kwargs) as (call_args, call_kwargs, inputs):
            return _look(fn, call_args, call_kwargs, inputs)
    return _look(fn, args, kwargs, tensors)


def _look(fn: Callable, args: tuple, kwargs: dict, inputs: list[torch.Tensor]) -> SavedReport:
    kept: dict[int, torch.Tensor] = {}
    own = {_key(t) for t in inputs}

    def pack(tensor: torch.Tensor) -> _Packed:
        # Detached: an operator's own output is saved too, and a node that holds its output
        # through Python would hold itself, out of the garbage collector's sight.
        tensor = tensor.detach()
        kept.setdefault(_key(tensor), tensor)
        return _Packed(tensor)

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda packed: packed.tensor):
        out = fn(*args, **kwargs)
    outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    if not outs:
        raise LabError(
            "the result does not depend on an input that requires a gradient. Does the function "
            "run under torch.no_grad(), or detach?"
        )
    names = _names(outs)
    return SavedReport(
        tuple(
            SavedTensor(
                tuple(t.shape),
                str(t.dtype).removeprefix("torch."),
                t.untyped_storage().nbytes(),
                key in own,
                tuple(names.get(key, ())),
            )
            for key, t in kept.items()
        )
    )


def _names(outs: list[torch.Tensor]) -> dict[int, list[str]]:
    """Which backward nodes hold each storage, found by walking the graph."""
    names: dict[int, list[str]] = {}
    todo, seen = [t.grad_fn for t in outs], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
        for attribute in sorted(dir(node)):
            if not attribute.startswith("_raw_saved_"):
                continue
            # `.data` is the packed object itself; unpacking would run checkpoint's hooks.
            packed = getattr(getattr(node, attribute), "data", None)
            if isinstance(packed, _Packed):
                name = f"{node.name()}.{attribute.removeprefix('_raw_saved_')}"
                names.setdefault(_key(packed.tensor), []).append(name)
    return names
