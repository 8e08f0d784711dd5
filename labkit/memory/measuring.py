"""What a call really allocates on this machine, beside what was predicted and traced.

CUDA: torch's caching allocator keeps the exact bytes asked for (``requested_bytes``), the
bytes handed out (``allocated_bytes``, rounded up to blocks of 512) and the bytes taken from
the driver (``reserved_bytes``, whole segments).  The first is what a model can predict.
The call runs once before, so that cuBLAS's workspace, autotuning and lazily loaded
modules are not counted, and the device is synchronised around the measured call.

CPU: torch has no such statistics there (``torch.cuda.max_memory_allocated`` answers 0
without a GPU).  The profiler notes every allocation and freeing of torch's CPU allocator;
their running sum has a peak.  Libraries that call ``malloc`` themselves are not seen.

A number that could not be measured is None, and the report says why; it is never 0.

Loads torch.  Taught in chapter 01 (what attention writes).
"""

from __future__ import annotations

import gc
import html
import json
import os
import re
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from labkit.errors import ArgumentError, LabError
from labkit.memory.tracing import Trace, trace
from labkit.units import format_bytes

__all__ = ["CPU_METHOD", "CUDA_METHOD", "MemoryReport", "measure", "settle_cublas"]

CUDA_METHOD = "CUDA allocator requested_bytes peak"
CPU_METHOD = "profiler memory events (CPU)"


@dataclass(frozen=True)
class MemoryReport:
    """Peak bytes of one call above what was alive before: outputs count, inputs do not.

    Each column is None where there is no figure; ``why_not`` says why, by column.
    """

    predicted: int | None
    traced: int | None
    measured: int | None
    method: str
    device: str
    #: peak of the bytes handed out, in blocks (CUDA; None on a CPU)
    allocated: int | None = None
    #: growth of the bytes taken from the driver, from an emptied cache (CUDA; None on a CPU)
    reserved: int | None = None
    #: one sentence for each difference between the columns
    gaps: tuple[str, ...] = ()
    why_not: dict[str, str] = field(default_factory=dict)
    #: the trace that the second column comes from
    trace: Trace | None = field(default=None, repr=False, compare=False)

    @property
    def agree(self) -> bool:
        """Whether every column that has a figure has the same one."""
        return len({n for n in (self.predicted, self.traced, self.measured) if n is not None}) == 1

    def to_dict(self) -> dict[str, Any]:
        """The figures in bytes, for export."""
        names = ("predicted", "traced", "measured", "allocated", "reserved", "method", "device")
        return {name: getattr(self, name) for name in names} | {"gaps": list(self.gaps)}

    def _cells(self) -> list[tuple[str, str]]:
        names = ["predicted", "traced", "measured"]
        names += [n for n in ("allocated", "reserved") if getattr(self, n) is not None]
        out = []
        for name in names:
            value = getattr(self, name)
            if value is None:
                text = f"not {name}: {self.why_not.get(name, 'not asked for')}"
            else:
                text = f"{format_bytes(value)} ({value:,} bytes)"
            out.append((name, text))
        return out

    def _notes(self) -> list[str]:
        return [f"measured by: {self.method}", *self.gaps]

    def __str__(self) -> str:
        lines = [f"{name:<10} {text}" for name, text in self._cells()]
        notes = [textwrap.fill(note, 72, subsequent_indent="  ") for note in self._notes()]
        return "\n".join([*lines, *notes])

    def _repr_html_(self) -> str:
        body = "".join(
            f'<tr><th scope="row">{name}</th><td style="text-align:right">{html.escape(text)}</td>'
            "</tr>"
            for name, text in self._cells()
        )
        foot = "".join(
            f'<tr><td colspan="2" style="text-align:left">{html.escape(n)}</td></tr>'
            for n in self._notes()
        )
        return (
            '<table class="labkit-memory"><caption>Peak memory above what was alive before'
            f"</caption><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"
        )


def measure(fn: Callable, *args: Any, predicted: int | None = None, **kwargs: Any) -> MemoryReport:
    """The peak memory of ``fn(*args, **kwargs)``: predicted, traced and measured.

    Parameters
    ----------
    fn : callable
        forward, or forward and backward.  It runs twice (the first run warms up), and once
        more on FakeTensors; it should not depend on the run before.  Gradients that it
        leaves in ``.grad`` of its arguments are dropped.
    args, kwargs
        its arguments.  If one of them is a tensor on a GPU, the GPU is measured.
    predicted : int
        the peak in bytes by a formula or a schedule, for the first column.

    Returns
    -------
    MemoryReport

    Raises
    ------
    ArgumentError
        if ``fn`` is not callable, no argument is a tensor, or the tensors are on several
        devices.

    Notes
    -----
    Whatever ``fn`` itself raises, out of memory included, reaches the caller.
    """
    if not callable(fn):
        raise ArgumentError("fn", fn, "is not callable.", "Pass the function to measure.")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    tensors = [t for t in tensors if t.dim() or t.device.type != "cpu"]
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) != 1:
        raise ArgumentError(
            "args",
            f"tensors on {devices or 'no device'}",
            "do not say which memory to measure.",
            "Pass at least one tensor, and all of them on one device.",
        )
    device = torch.device(devices[0])
    why_not: dict[str, str] = {}
    traced = None
    try:
        traced = trace(fn, *args, **kwargs)
    except LabError as error:
        why_not["traced"] = str(error)
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        # an operator without a fake implementation; the real run below will tell a real fault
        why_not["traced"] = f"no FakeTensor run ({type(error).__name__}: {_first_line(error)})"

    def call():
        return fn(*args, **kwargs)

    _drop_grads(tensors)
    figures: dict[str, int | None] = {"measured": None, "allocated": None, "reserved": None}
    alive: Counter | None = None
    method = CUDA_METHOD if device.type == "cuda" else CPU_METHOD
    if device.type == "cuda":
        figures = _measure_cuda(call, device, tensors)
    elif device.type == "cpu":
        figures["measured"], alive, reason = _measure_cpu(call, tensors)
        if reason:
            why_not["measured"] = reason
    else:
        method = "none"
        why_not["measured"] = f"labkit knows no allocator statistics for {device.type!r}"
    _drop_grads(tensors)
    traced_peak = None if traced is None else traced.peak
    gaps = _gaps(predicted, traced, figures["measured"], device, alive)
    return MemoryReport(
        predicted, traced_peak, figures["measured"], method, str(device),
        figures["allocated"], figures["reserved"], gaps, why_not, traced,
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def _drop_grads(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_leaf and tensor.requires_grad:
            tensor.grad = None


# -- CUDA ----------------------------------------------------------------------


def _measure_cuda(
    call: Callable, device: torch.device, tensors: list[torch.Tensor]
) -> dict[str, int | None]:
    settle_cublas(device)
    out = call()
    del out
    _drop_grads(tensors)
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()  # so that what is reserved afterwards is this call's own
    before = torch.cuda.memory_stats(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = call()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_stats(device)
    del out
    names = {"measured": "requested", "allocated": "allocated", "reserved": "reserved"}
    return {
        column: after[f"{stat}_bytes.all.peak"] - before[f"{stat}_bytes.all.current"]
        for column, stat in names.items()
    }


def settle_cublas(device: torch.device | str) -> None:
    """Give cuBLAS its workspaces in segments of their own, one per thread that multiplies.

    cuBLAS's workspace comes from torch's allocator at the first product of a thread, and
    autograd has a thread of its own.  Allocated late, it may be cut out of a freed buffer of
    gigabytes, which can then never be given back.
    """
    torch.cuda.synchronize(device)
    gc.collect()
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    with warnings.catch_warnings():
        # The first product of a fresh thread makes the context current itself, and says so.
        warnings.filterwarnings("ignore", message=".*no current CUDA context")
        with torch.enable_grad():
            x = torch.ones(1, 16, 16, device=device, requires_grad=True)
            torch.bmm(x, x).sum().backward()
    del x
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


# -- CPU -----------------------------------------------------------------------

# What Kineto and the allocator's own profiling print while they work.
_NOISE = re.compile(rb"^USDT:|CPUAllocator|profiler_(start|stop)|kineto|Kineto")


@contextmanager
def _without_profiler_noise() -> Iterator[None]:
    """Keep the profiler's chatter on file descriptor 2 out of the reader's notebook.

    Lines that are not known noise are passed on.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as buffer:
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            buffer.seek(0)
            rest = [line for line in buffer.read().splitlines(True) if not _NOISE.search(line)]
            if rest:
                os.write(2, b"".join(rest))


def _measure_cpu(
    call: Callable, tensors: list[torch.Tensor]
) -> tuple[int | None, Counter | None, str | None]:
    """Peak, the sizes alive at it by operator, and why not if there is none."""
    from torch.profiler import ProfilerActivity, profile

    options = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    out = call()
    del out
    _drop_grads(tensors)
    gc.collect()
    with tempfile.TemporaryDirectory() as folder, _without_profiler_noise():
        with profile(**options) as profiler:
            out = call()
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del out
    changes = [e for e in events if e.get("name") == "[memory]" and "Bytes" in e.get("args", {})]
    changes = [e for e in changes if e["args"].get("Device Type", 0) == 0]
    if not changes:
        return None, None, "the profiler saw no memory events (was this torch built with Kineto?)"
    changes.sort(key=lambda e: e["ts"])
    live = peak = 0
    holding: dict[Any, dict] = {}
    alive: list[dict] = []
    for event in changes:
        size, address = event["args"]["Bytes"], event["args"].get("Addr")
        if size > 0:
            holding[address] = event
        elif holding.pop(address, None) is None:
            continue  # it was alive before and never counted
        live += size
        if live > peak:
            peak, alive = live, list(holding.values())
    spans = [e for e in events if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
    return peak, Counter((e["args"]["Bytes"], _operator(e, spans)) for e in alive), None


_ALLOCATING = re.compile(r"empty|resize_|zeros|new_|clone|contiguous|_to_copy|aten::to$|copy_")


def _operator(event: dict, spans: list[dict]) -> str:
    """The ATen operator that was running when a memory event happened.

    The innermost one that is not itself a way of allocating; "" outside any operator.
    """
    around = [s for s in spans if s["ts"] <= event["ts"] <= s["ts"] + s["dur"]]
    around = [s for s in around if s["name"].startswith("aten::")]
    around.sort(key=lambda s: s["dur"])
    working = [s for s in around if not _ALLOCATING.search(s["name"])]
    return (working or around)[0]["name"].removeprefix("aten::") if around else ""


# -- gaps ----------------------------------------------------------------------


def _gaps(
    predicted: int | None,
    traced: Trace | None,
    measured: int | None,
    device: torch.device,
    alive: Counter | None,
) -> tuple[str, ...]:
    out = []
    if predicted is not None and predicted == measured and traced and traced.peak < measured:
        return (
            f"traced − predicted = {_signed(traced.peak - predicted)}: an operator's own scratch, "
            "which the schedule knows of and a trace of operators does not see.",
        )
    if predicted is not None and traced is not None and predicted != traced.peak:
        out.append(
            f"traced − predicted = {_signed(traced.peak - predicted)}: the formula leaves out or "
            f"adds tensors; alive at the traced peak: {_alive_text(traced)}."
        )
    if traced is None or measured is None or measured == traced.peak:
        return tuple(out)
    difference = f"measured − traced = {_signed(measured - traced.peak)}: "
    if device.type == "cuda":
        out.append(
            difference
            + "memory that kernels ask for while they run (cuBLAS's workspace, the scratch of a "
            "fused kernel's backward), which an operator-level trace does not see."
        )
        return tuple(out)
    extra = Counter(alive or {})
    for event in traced.alive_at_peak():
        match = next((key for key in extra if key[0] == event.bytes and extra[key] > 0), None)
        if match is not None:
            extra[match] -= 1
    unexplained = [(size, op, n) for (size, op), n in extra.items() if n > 0]
    numbers = sum(size * n for size, _, n in unexplained if size <= 8)
    scratch: dict[str, list[str]] = {}
    for size, op, count in sorted(unexplained, reverse=True):
        if size > 8:
            times = f"{count} × " if count > 1 else ""
            scratch.setdefault(op or "a library call", []).append(times + format_bytes(size))
    texts = [f"{' and '.join(s)} inside {op} while it runs" for op, s in scratch.items()]
    if numbers:
        texts.append(f"{numbers} bytes for Python numbers, which torch wraps as tensors")
    why = "; ".join(texts) if texts else "the two peak at different operations"
    if measured < traced.peak and any(e.op == "add" for e in traced.alive_at_peak()):
        why = (
            "where gradients meet, autograd adds them into one of the two; on FakeTensors it "
            "makes a third"
        )
    out.append(f"{difference}{why}.")
    return tuple(out)


def _alive_text(traced: Trace) -> str:
    events = traced.alive_at_peak()
    parts = [f"{e.op} {list(e.shape)} {format_bytes(e.bytes)}" for e in events]
    return ", ".join(parts)


def _signed(count: int) -> str:
    return ("+" if count > 0 else "") + format_bytes(count)
