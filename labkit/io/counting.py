"""The bytes that each load and store of a kernel asks for, counted while it runs.

Triton's interpreter runs a kernel program by program, and each ``tl.load``, ``tl.store`` and
atomic hands it the address of every lane and a mask.  That is all one needs to count::

    with io.count() as traffic:
        labkit.kernels.matmul(a, b)
    print(traffic)

What is counted is what the two-level model of chapter 06 calls traffic: a lane that its mask
lets through moves one element between the kernel's own fast memory and everything outside.  No
cache is modelled: an element that is loaded twice counts twice.  Lanes that the mask holds back
move nothing and are reported apart.

Each access is attributed by its *address*: the interpreter knows the memory of every tensor
that the kernel was given, so a lane that lies in none of them is an access out of bounds,
reported as ``outside``.  Arguments whose memory overlaps share one line: an address alone
cannot tell them apart.

An atomic counts once, with the bytes of its operands; the memory reads and writes each.

Works with Triton 3.6 and 3.7: pointer loads, block pointers and tensor descriptors (those of
the host and those made in the kernel) all end in four methods of the interpreter's builder,
and these are what is wrapped, for as long as a ``with`` lasts.

Imports: errors, units, kernels.runtime; Triton and NumPy on use.
Taught in chapter 06 (how few bytes could it take?).
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

from labkit.errors import ArgumentError, LabError
from labkit.kernels.runtime import _interpreter_on, backend, require_triton
from labkit.units import format_bytes, significant

__all__ = ["OUTSIDE", "Access", "Traffic", "count"]

#: the tensor of an access that lies in none of the kernel's tensors
OUTSIDE = "outside"

_KINDS = ("load", "store", "atomic")


@dataclass(frozen=True)
class Access:
    """Loads, stores or atomics of one kernel on one tensor, added up.

    Attributes
    ----------
    kernel : name of the kernel's function; ``"*"`` in a sum over several.
    tensor : name of the argument, or the name given to ``count``; ``"*"`` in a sum.
    kind : ``"load"``, ``"store"``, ``"atomic"``; ``"*"`` in a sum.
    calls : how often the operation was executed, over all programs.
    elements : lanes that moved an element.
    masked : lanes that the mask held back.
    bytes : bytes that those elements have.
    size : bytes of the tensor, to see how often it was moved; None where unknown.
    """

    kernel: str
    tensor: str
    kind: str
    calls: int = 0
    elements: int = 0
    masked: int = 0
    bytes: int = 0
    size: int | None = None

    @property
    def times(self) -> float | None:
        """How often the whole tensor was moved: ``bytes / size``."""
        return self.bytes / self.size if self.size else None

    def __add__(self, other: Access) -> Access:
        def same(a: Any, b: Any, else_: Any) -> Any:
            return a if a == b else else_

        return Access(
            same(self.kernel, other.kernel, "*"),
            same(self.tensor, other.tensor, "*"),
            same(self.kind, other.kind, "*"),
            self.calls + other.calls,
            self.elements + other.elements,
            self.masked + other.masked,
            self.bytes + other.bytes,
            self.size if self.tensor == other.tensor and self.size == other.size else None,
        )


@dataclass
class Traffic:
    """What was counted.

    Attributes
    ----------
    accesses : one :class:`Access` per kernel, tensor and kind, in the order of first use.
    launches : ``(kernel, grid)`` per launch, in order.
    """

    accesses: list[Access] = field(default_factory=list)
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def total(
        self, *, kernel: str | None = None, tensor: str | None = None, kind: str | None = None
    ) -> Access:
        """The sum of all accesses that match.

        Raises
        ------
        ArgumentError
            if a kernel or tensor of that name was never seen, or ``kind`` is unknown: a sum of
            nothing would pass for a measurement.
        """
        wanted = {"kernel": kernel, "tensor": tensor, "kind": kind}
        seen = {
            "kernel": {name for name, _ in self.launches},
            "tensor": {a.tensor for a in self.accesses} | {OUTSIDE},
            "kind": set(_KINDS),
        }
        for name, value in wanted.items():
            if value is not None and value not in seen[name]:
                known = ", ".join(sorted(seen[name])) or "none"
                raise ArgumentError(name, value, "was not counted.", f"Counted: {known}.")
        found = [
            a for a in self.accesses if all(v in (None, getattr(a, n)) for n, v in wanted.items())
        ]
        empty = Access(*(value or "*" for value in wanted.values()))
        return sum(found[1:], found[0]) if found else empty

    @property
    def loaded(self) -> int:
        """Bytes of all loads."""
        return self.total(kind="load").bytes

    @property
    def stored(self) -> int:
        """Bytes of all stores."""
        return self.total(kind="store").bytes

    @property
    def bytes(self) -> int:
        """Bytes of all loads, stores and atomics."""
        return self.total().bytes

    @property
    def outside(self) -> Access:
        """Accesses to memory of no tensor: there should be none."""
        return self.total(tensor=OUTSIDE)

    def by_tensor(self) -> dict[tuple[str, str], int]:
        """Bytes per ``(tensor, kind)``, kernels added up."""
        out: dict[tuple[str, str], int] = {}
        for a in self.accesses:
            out[a.tensor, a.kind] = out.get((a.tensor, a.kind), 0) + a.bytes
        return out

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [("kernel", "tensor", "", "elements", "bytes", "× its size", "masked lanes")]
        for a in self.accesses:
            times = "" if a.times is None else significant(a.times)
            moved = (f"{a.elements:,}", format_bytes(a.bytes), times, f"{a.masked:,}")
            rows.append((a.kernel, a.tensor, a.kind, *moved))
        for what, size in (("loads", self.loaded), ("stores", self.stored)):
            rows.append(("all", what, "", "", format_bytes(size), "", ""))
        return rows

    def __str__(self) -> str:
        rows = self._cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            left = [cell.ljust(w) for cell, w in zip(row[:3], widths[:3], strict=True)]
            right = [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)]
            lines.append("  ".join(left + right).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            sides = ("left",) * 3 + ("right",) * 4
            scope = ' scope="col"' if tag == "th" else ""
            return "<tr>" + "".join(
                f'<{tag}{scope} style="text-align:{side}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            ) + "</tr>"

        head, *body = self._cells()
        return (
            '<table class="labkit-memory"><caption>Bytes moved</caption>'
            f"<thead>{row(head, 'th')}</thead>"
            f"<tbody>{''.join(row(cells, 'td') for cells in body[:-2])}</tbody>"
            f"<tfoot>{''.join(row(cells, 'td') for cells in body[-2:])}</tfoot></table>"
        )

    def __repr__(self) -> str:
        return str(self)


@contextmanager
def count(**names: Any) -> Iterator[Traffic]:
    """Count the bytes of every kernel that runs inside.

    Parameters
    ----------
    names : tensors to be called by a name of yours, ``Q=q``, whatever the kernels call their
        arguments.  Others go by the name of the argument.

    Yields
    ------
    Traffic
        filled while the kernels run; it keeps what it has when the block ends.

    Raises
    ------
    LabError
        if kernels are compiled for a GPU here: nobody sees their addresses then.
    ArgumentError
        if something named is not a tensor.

    Notes
    -----
    A kernel that Triton's autotuner tries out is counted with every trial.  Counts may be
    nested; each sees all that runs inside of it.  Not for several threads.
    """
    require_triton("labkit.io.count")
    if not _interpreter_on():
        raise LabError(
            "labkit.io.count watches Triton's interpreter, and here kernels are compiled for the "
            "GPU, where no Python sees an address. To count, start Python with TRITON_INTERPRET=1 "
            "(tensors may stay on the GPU, the kernels run on the CPU), or run "
            "labkit.experiments.run('io_law'), which starts such a process by itself. "
            "labkit.io.attention_traffic gives the same bytes as closed forms, and Nsight Compute "
            "counts what the compiled kernel moves (chapter 04)."
        )
    for name, tensor in names.items():
        if not hasattr(tensor, "data_ptr"):
            kind = type(tensor).__name__
            raise ArgumentError(name, kind, "is not a tensor.", "Name tensors: count(Q=q, K=k).")
    backend()  # prepares the interpreter
    counter = _Counter(names)
    _install()
    _ACTIVE.append(counter)
    try:
        yield counter.traffic
    finally:
        _ACTIVE.remove(counter)
        if not _ACTIVE:
            _uninstall()


# -- where an address belongs ------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """Memory of one or more tensors: bytes ``[start, stop)``."""

    start: int
    stop: int
    name: str
    size: int


def _extent(tensor: Any) -> tuple[int, int]:
    """First address of a strided tensor and the one after its last byte."""
    spans = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((n - 1) * stride for n, stride in spans if n > 0)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _merge(regions: list[_Region]) -> list[_Region]:
    """Regions in order of address; those that overlap become one with both names."""
    out: list[_Region] = []
    for region in sorted(regions, key=lambda r: (r.start, r.stop)):
        if out and region.start < out[-1].stop:
            before = out.pop()
            names = list(dict.fromkeys([*before.name.split(", "), region.name]))
            stop = max(before.stop, region.stop)
            # the same memory twice is one tensor; two that interleave have both their sizes
            same = (before.start, before.stop) == (region.start, region.stop)
            size = max(before.size, region.size) if same else before.size + region.size
            region = _Region(before.start, stop, ", ".join(names), size)
        out.append(region)
    return out


class _Counter:
    """One ``with count()``: the kernel that runs, its memory, and the sums so far."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names
        self.traffic = Traffic()
        self.kernel = ""
        self.regions: list[_Region] = []
        self.starts: Any = None
        self.index: dict[tuple[str, str, str], int] = {}

    def launch(self, kernel: str, tensors: list[tuple[str, Any, Any]]) -> None:
        """A kernel starts; ``tensors`` are (argument, as passed, as the interpreter sees it)."""
        import numpy as np

        self.kernel = kernel
        self.traffic.launches.append((kernel, ()))
        own = {(t.data_ptr(), t.numel()): name for name, t in self.names.items()}
        regions = []
        for argument, passed, seen in tensors:
            if seen.numel() == 0:
                continue
            name = own.get((passed.data_ptr(), passed.numel()), argument)
            size = seen.numel() * seen.element_size()
            regions.append(_Region(*_extent(seen), name, size))
        self.regions = _merge(regions)
        self.starts = np.array([r.start for r in self.regions], dtype=np.uint64)
        self.stops = np.array([r.stop for r in self.regions], dtype=np.uint64)

    def access(self, kind: str, addresses: Any, mask: Any, width: int) -> None:
        """One execution of a load, store or atomic: ``width`` bytes for each unmasked lane."""
        import numpy as np

        mask = np.broadcast_to(mask, addresses.shape)
        lanes = int(np.count_nonzero(mask))
        masked = addresses.size - lanes
        if not lanes:
            # nothing moves, and the addresses may be anywhere; the masked lanes go to the
            # tensor that the first of them is nearest to
            self._add(kind, self._nearest(int(addresses.flat[0])), 0, masked, width)
            return
        used = addresses if not masked else addresses[mask]
        low, high = int(used.min()), int(used.max())
        first = self._region(low)
        if first is not None and first is self._region(high):
            self._add(kind, first, lanes, masked, width)
            return
        where = np.searchsorted(self.starts, used.ravel(), side="right").astype(np.int64) - 1
        inside = (where >= 0) & (used.ravel() < self.stops[np.maximum(where, 0)])
        for number in np.unique(np.where(inside, where, -1)):
            hit = int(np.count_nonzero(np.where(inside, where, -1) == number))
            region = self.regions[number] if number >= 0 else None
            self._add(kind, region, hit, masked, width)
            masked = 0  # counted once, with the first

    def _region(self, address: int) -> _Region | None:
        for region in self.regions:
            if region.start <= address < region.stop:
                return region
        return None

    def _nearest(self, address: int) -> _Region | None:
        def distance(region: _Region) -> int:
            return max(region.start - address, address - region.stop + 1, 0)

        return min(self.regions, key=distance, default=None)

    def _add(self, kind: str, region: _Region | None, lanes: int, masked: int, width: int) -> None:
        name, size = (region.name, region.size) if region else (OUTSIDE, None)
        key = (self.kernel, name, kind)
        rows = self.traffic.accesses
        if key not in self.index:
            self.index[key] = len(rows)
            rows.append(Access(*key, size=size))
        at = self.index[key]
        one = rows[at]
        rows[at] = replace(
            one,
            calls=one.calls + 1,
            elements=one.elements + lanes,
            masked=one.masked + masked,
            bytes=one.bytes + lanes * width,
        )


# -- hooks in the interpreter ------------------------------------------------------------------

_ACTIVE: list[_Counter] = []
_SAVED: dict[tuple[type, str], Any] = {}


def _width(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _install() -> None:
    """Wrap the interpreter's memory operations and its launch, once."""
    if _SAVED:
        return
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
    from triton.tools.tensor_descriptor import TensorDescriptor

    def see(kind: str, pointers: Any, mask: Any) -> None:
        allowed = np.ones((), dtype=bool) if mask is None else np.asarray(mask.data, dtype=bool)
        for counter in _ACTIVE:
            counter.access(kind, np.atleast_1d(pointers.data), allowed, _width(pointers))

    # The mask is the second argument of a load and the third of a store; other versions may
    # pass either by name.
    def of_load(self, ptrs, mask, *args, **kwargs):
        see("load", ptrs, mask)
        return saved_load(self, ptrs, mask, *args, **kwargs)

    def of_store(self, ptrs, value, mask, *args, **kwargs):
        see("store", ptrs, mask)
        return saved_store(self, ptrs, value, mask, *args, **kwargs)

    def of_rmw(self, op, ptr, val, mask, *args, **kwargs):
        see("atomic", ptr, mask)
        return saved_rmw(self, op, ptr, val, mask, *args, **kwargs)

    def of_cas(self, ptr, *args, **kwargs):
        see("atomic", ptr, None)
        return saved_cas(self, ptr, *args, **kwargs)

    def tensors_of(names: list[str], passed: Any, seen: Any) -> Iterator[tuple[str, Any, Any]]:
        for name, a, b in zip(names, passed, seen, strict=True):
            if isinstance(b, TensorDescriptor):
                yield name, a.base, b.base
            elif isinstance(b, tuple):
                yield from tensors_of([f"{name}[{i}]" for i in range(len(b))], a, b)
            elif hasattr(b, "data_ptr"):
                # reinterpreted pointers wrap the tensor they came from
                yield name, getattr(a, "base", a), getattr(b, "base", b)

    def of_arguments(self, args_dev, kwargs):
        args_hst, kwargs_hst = saved_arguments(self, args_dev, kwargs)
        names = inspect.getfullargspec(self.fn).args[: len(args_dev)]
        tensors = [*tensors_of(names, args_dev, args_hst)]
        tensors += tensors_of(list(kwargs), kwargs.values(), (kwargs_hst[k] for k in kwargs))
        for counter in _ACTIVE:
            counter.launch(self.fn.__name__, tensors)
        return args_hst, kwargs_hst

    def of_grid(self, *grid):
        # A grid may be a function of the arguments: here it is known.
        for counter in _ACTIVE:
            counter.traffic.launches[-1] = (counter.kernel, grid)
        return saved_grid(self, *grid)

    saved_load = _wrap(InterpreterBuilder, "create_masked_load", of_load)
    saved_store = _wrap(InterpreterBuilder, "create_masked_store", of_store)
    saved_rmw = _wrap(InterpreterBuilder, "create_atomic_rmw", of_rmw)
    saved_cas = _wrap(InterpreterBuilder, "create_atomic_cas", of_cas)
    saved_grid = _wrap(InterpreterBuilder, "set_grid_dim", of_grid)
    saved_arguments = _wrap(GridExecutor, "_init_args_hst", of_arguments)


def _wrap(owner: type, name: str, new: Any) -> Any:
    """Put ``new`` in the place of a method and return the method."""
    if (old := owner.__dict__.get(name)) is None:
        _uninstall()
        import triton

        raise LabError(
            f"Triton {triton.__version__} has no {owner.__name__}.{name}: labkit.io.count knows "
            "the interpreters of Triton 3.6 and 3.7. labkit.io.attention_traffic needs none."
        )
    _SAVED[owner, name] = old
    setattr(owner, name, wraps(old)(new))
    return old


def _uninstall() -> None:
    for (owner, name), old in _SAVED.items():
        setattr(owner, name, old)
    _SAVED.clear()
