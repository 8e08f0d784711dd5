"""One honest timer.

A GPU works through a queue: a call returns when its work is *queued*, not when it
is done.  Whoever reads a clock around the call times the queueing.  Here instead:

On CUDA, two events are recorded on the current stream around each call and read
after both have passed.  Before each call a buffer larger than L2 is overwritten, so
that no run finds its data in the cache because the run before left it there, and the
GPU is then kept spinning for as long as the host needs to queue the call: the time
between the events is the GPU's, and the cost of launching is hidden.  The spin ends
after 5 ms: of a function that takes longer to queue, such as one of thousands of short
kernels, the launches that come later are hidden only as far as the GPU is busy with
those before.
``launch="included"`` waits for the GPU to be idle instead, so that the gaps between
launches count too: that is what a short function costs a program that is not queueing
ahead.

On a CPU, ``time.perf_counter_ns``, several calls per sample when one is too short.

A function is refused, not mistimed, when its work cannot be seen to finish: see
``UnsynchronisedError``.

Why not ``triton.testing.do_bench`` or ``torch.utils.benchmark.Timer``?  The events and
the flush are those of ``do_bench``, but it needs Triton, cannot interleave several
implementations (the card's clock drifts while one after the other is timed), takes a
single sample of a slow function, and times whatever it is given, finished or not.
``Timer`` reports means of blocks and sets the number of threads to one.

Taught in chapter 02 (what grows) and in "How to measure".
Imports: labkit.errors; torch on use, and only for CUDA or if it is loaded already.
"""

from __future__ import annotations

import gc
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from labkit.errors import (
    ArgumentError,
    LabError,
    MissingDependencyError,
    NoGpuError,
    check_choice,
    check_positive_int,
    check_positive_number,
)

__all__ = ["Comparison", "Timing", "UnsynchronisedError", "time_fn", "time_many"]


class UnsynchronisedError(LabError, RuntimeError):
    """The function's work does not finish where the timer can see it.

    Raised for a function that

    - returns a coroutine, a generator, an iterator or a future: calling it did no work yet;
    - leaves nothing on the timed CUDA stream (it works on the CPU, or elsewhere);
    - leaves work on another stream that the current stream does not wait for;
    - is timed with the CPU's clock and returns while the GPU is still working.
    """


def quantile(values: list[float], q: float) -> float:
    """The ``q``-quantile (0 … 1) of ``values``, linear between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Timing:
    """Samples of one function's time, in milliseconds, in the order they were taken.

    ``method`` says in words what was timed; ``device`` is ``"cuda"`` or ``"cpu"``.
    """

    samples_ms: list[float] = field(repr=False)
    method: str
    device: str

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Half of the samples are shorter."""
        return median(self.samples_ms)

    @property
    def p20(self) -> float:
        """One in five samples is shorter (ms)."""
        return quantile(self.samples_ms, 0.2)

    @property
    def p80(self) -> float:
        """One in five samples is longer (ms)."""
        return quantile(self.samples_ms, 0.8)

    @property
    def spread(self) -> float:
        """(p80 − p20) / median: a difference smaller than this is noise."""
        return (self.p80 - self.p20) / self.median_ms if self.median_ms else 0.0

    @property
    def seconds(self) -> float:
        """The median in seconds."""
        return self.median_ms / 1e3

    def rate(self, amount: float) -> float:
        """``amount`` (bytes, FLOPs, …) per second at the median."""
        return amount / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """What a record's row holds: ``samples_ms``, ``median_ms``, ``method``."""
        return {
            "samples_ms": list(self.samples_ms),
            "median_ms": self.median_ms,
            "method": self.method,
        }

    def __str__(self) -> str:
        return f"{self.median_ms:.4g} ms (p20 {self.p20:.4g}, p80 {self.p80:.4g}, n = {self.n})"


@dataclass(frozen=True)
class Comparison(Mapping):
    """Timings of several functions taken in turns, so that drift hits all of them alike.

    A mapping from name to ``Timing``.
    """

    timings: dict[str, Timing]

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.timings)

    def __len__(self) -> int:
        return len(self.timings)

    def ratios(self, baseline: str) -> dict[str, float]:
        """How many times faster than ``baseline`` each is.

        The median over rounds of (baseline's time / its time in the same round): a drift
        of the clock cancels within a round.

        Raises
        ------
        ArgumentError
            if ``baseline`` is none of the names.
        """
        check_choice("baseline", baseline, self.timings)
        base = self.timings[baseline].samples_ms
        return {
            name: median(b / s for b, s in zip(base, timing.samples_ms, strict=True))
            for name, timing in self.timings.items()
        }

    def __str__(self) -> str:
        width = max(len(name) for name in self.timings)
        return "\n".join(f"{name:<{width}}  {timing}" for name, timing in self.timings.items())


# -- refusing -------------------------------------------------------------------------------


def _refuse_deferred(name: str, result: Any) -> None:
    """A call that returned a promise of work has not done the work."""

    def has(*methods: str) -> bool:
        return all(callable(getattr(result, method, None)) for method in methods)

    deferred = (
        inspect.isawaitable(result)
        or inspect.isgenerator(result)
        or inspect.isasyncgen(result)
        or (isinstance(result, Iterator) and not hasattr(result, "shape"))
        or has("done", "result")  # concurrent.futures
        or has("done", "wait")  # torch.futures
        or has("is_completed", "wait")  # torch.distributed
    )
    if deferred:
        kind = type(result).__name__
        if inspect.iscoroutine(result):
            result.close()
        raise UnsynchronisedError(
            f"{name} returned a {kind}: its work is still to be done, so timing the call would "
            "time a promise. Time a function that consumes it, for example lambda: list(fn()) or "
            "lambda: fn().result()."
        )


class _Cuda:
    """Events, flush and the checks of one CUDA device."""

    #: twice the largest L2 so far (B200: 126 MB); overwriting it evicts everything else
    MIN_FLUSH = 256 * 2**20

    def __init__(self, flush: bool, launch_included: bool, wall_clock: bool = False) -> None:
        import torch

        self.torch = torch
        self.launch_included = launch_included
        self.flush_buffer = None
        if not wall_clock:  # the refusal test queues behind it even when no flush is asked for
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            size = max(self.MIN_FLUSH, 4 * properties.L2_cache_size)
            self.flush_buffer = torch.empty(size, dtype=torch.int8, device="cuda")
        self.flush = flush
        self.spin_cycles: dict[int, int] = {}

    def event_pair(self):
        event = self.torch.cuda.Event
        return event(enable_timing=True), event(enable_timing=True)

    def _host_time(self, fn: Callable[[], Any]) -> float:
        """Seconds that the host needs to queue ``fn``; all of its time, if it waits or computes."""
        seconds = math.inf
        for _ in range(3):
            self.torch.cuda.synchronize()
            begin = time.perf_counter()
            fn()
            seconds = min(seconds, time.perf_counter() - begin)
        return seconds

    def _cycles(self, seconds: float) -> int:
        """Argument of a spin of about that length."""
        start, end = self.event_pair()
        self.torch.cuda.synchronize()
        start.record()
        self.torch.cuda._sleep(1_000_000)
        end.record()
        end.synchronize()
        return int(seconds * 1e6 / (start.elapsed_time(end) / 1e3))

    def learn_host_time(self, fn: Callable[[], Any]) -> None:
        """How long to spin so that ``fn`` is queued in full before its first kernel starts."""
        # A function that waits for the GPU itself takes long to queue and gains nothing: 5 ms do.
        self.spin_cycles[id(fn)] = self._cycles(min(2 * self._host_time(fn) + 20e-6, 5e-3))

    def record(self, fn: Callable[[], Any], before: Callable[[], Any] | None):
        """Queue one timed call; returns its two events."""
        start, end = self.event_pair()
        if self.flush:
            self.flush_buffer.zero_()
        if before is not None:
            before()
        if self.launch_included:
            self.torch.cuda.synchronize()
        else:
            # One thread counts cycles and touches no memory, so L2 stays as it is.  The name
            # has an underscore, but PyTorch's own tests of streams rest on it.
            self.torch.cuda._sleep(self.spin_cycles[id(fn)])
        start.record()
        fn()
        end.record()
        return start, end

    def _added_ms(self, fn: Callable[[], Any], spin_cycles: int) -> float:
        """Time between the events when all of fn's host work is done before the first passes."""
        start, end = self.event_pair()
        self.torch.cuda._sleep(spin_cycles)
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _left_over_s(self, fn: Callable[[], Any]) -> float:
        """Time from the end of the current stream's work until the whole GPU is idle."""
        self.torch.cuda.synchronize()
        end = self.torch.cuda.Event()
        fn()
        end.record()
        end.synchronize()
        seen = time.perf_counter()
        self.torch.cuda.synchronize()
        return time.perf_counter() - seen

    @staticmethod
    def _least(probe: Callable[[Callable], float], fn: Callable[[], Any]) -> float:
        """Smallest of up to five: another process may delay one probe, stray work delays each."""
        values: list[float] = []
        begin = time.perf_counter()
        while len(values) < 5 and (len(values) < 2 or time.perf_counter() - begin < 0.2):
            values.append(probe(fn))
        return min(values)

    def refuse_unseen(self, name: str, fn: Callable[[], Any]) -> None:
        """Raise unless the current stream carries fn's work, and all of it."""

        def nothing() -> None:
            pass

        # Behind a spin that outlasts the host's part, a function that computes on the CPU
        # leaves nothing between the events, however long it takes.
        spin = self._cycles(min(2 * self._host_time(fn) + 100e-6, 1.0))
        with_fn = self._least(lambda f: self._added_ms(f, spin), fn)
        added_ms = with_fn - self._least(lambda f: self._added_ms(f, spin), nothing)
        idle_s = self._least(self._left_over_s, nothing)
        least_s = self._least(self._left_over_s, fn)
        allowed_s = max(20e-6, 0.05 * added_ms * 1e-3)
        for _ in range(4):  # a busy host delays a few probes in a row; stray work delays them all
            if least_s - idle_s <= allowed_s:
                break
            least_s = min(least_s, self._least(self._left_over_s, fn))
        left_over_s = least_s - idle_s
        if left_over_s > allowed_s:
            raise UnsynchronisedError(
                f"{name} leaves work on another CUDA stream: the GPU was still busy "
                f"{left_over_s * 1e6:.0f} µs after the current stream had finished. Let the "
                "current stream wait for it (torch.cuda.current_stream().wait_stream(other)) in "
                "the timed function, or run it under torch.cuda.stream(other) as a whole."
            )
        if added_ms < 0.5e-3:
            raise UnsynchronisedError(
                f"{name} put no work on the current CUDA stream, so CUDA events cannot time it. "
                "If it works on the CPU, pass device='cpu'; if it replays work elsewhere, make the "
                "current stream wait for it."
            )

    def refuse_unfinished(self, name: str, fn: Callable[[], Any]) -> None:
        """For the CPU's clock: raise if fn returns while the GPU still works."""
        cuda = self.torch.cuda
        for _ in range(3):
            cuda.synchronize()
            fn()
            busy = not cuda.current_stream().query()
            seen = time.perf_counter()
            cuda.synchronize()
            if busy or time.perf_counter() - seen > 50e-6:
                raise UnsynchronisedError(
                    f"{name} returns while the GPU is still working, so a CPU clock would time the "
                    "queueing of its kernels. Pass device='cuda', or end the function with "
                    "torch.cuda.synchronize()."
                )


# -- timing ---------------------------------------------------------------------------------


def _resolve_device(device: str | None) -> str:
    if device is not None:
        device = check_choice("device", str(device), ("cuda", "cpu"))
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is None:
        try:
            import torch
        except ImportError:
            raise MissingDependencyError(
                "device='cuda' needs torch: pip install torch. Without it, time with device='cpu'."
            ) from None
    gpu = torch is not None and torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise NoGpuError("device='cuda': torch sees no GPU here. Pass device='cpu' or None.")
    return device or ("cuda" if gpu else "cpu")


def _calls_per_sample(fn: Callable[[], Any]) -> int:
    """So many that a sample lasts 20 µs at least: the clock's own cost is 0.1 µs."""
    calls = 1
    while True:
        start = time.perf_counter_ns()
        for _ in range(calls):
            fn()
        if time.perf_counter_ns() - start >= 20_000:
            return calls
        calls *= 2


def _rounds(estimate_ms: float, rep_ms: float, min_samples: int, max_samples: int) -> int:
    wanted = rep_ms / estimate_ms if estimate_ms > 0 else max_samples
    return max(min_samples, min(max_samples, round(wanted)))


def time_many(
    functions: Mapping[str, Callable[[], Any]],
    *,
    warmup_ms: float = 50.0,
    rep_ms: float = 200.0,
    min_samples: int = 5,
    max_samples: int = 1000,
    device: str | None = None,
    flush_l2: bool = True,
    launch: str = "hidden",
    before: Callable[[], Any] | None = None,
) -> Comparison:
    """Time several functions in turns: one sample of each per round, every other round backwards.

    Parameters
    ----------
    functions : name to function; each is called without arguments.
    warmup_ms : at least this long each function runs before the first sample (ms).
    rep_ms : about this long each function is sampled (ms).
    min_samples, max_samples : bounds on the number of rounds, whatever ``rep_ms`` gives.
    device : ``"cuda"``, ``"cpu"`` or None: CUDA if torch is loaded and sees a GPU.
    flush_l2 : on CUDA, overwrite L2 before each sample.
    launch : on CUDA, ``"hidden"`` queues each call behind a GPU that spins, for 5 ms at most, and
        times the GPU alone (a call that takes longer to queue is hidden only in part);
        ``"included"`` starts each on an idle GPU, so that launch gaps count.
    before : called before each sample, outside of the timed interval (after the flush).

    Returns
    -------
    Comparison
        one ``Timing`` per name, with as many samples each.

    Raises
    ------
    UnsynchronisedError
        if a function's work cannot be seen to finish.
    ArgumentError
        if an argument cannot be used.
    NoGpuError
        if ``device="cuda"`` and there is none.
    """
    if not isinstance(functions, Mapping) or not functions:
        raise ArgumentError("functions", functions, "is no mapping.", "Pass {'name': function}.")
    for name, fn in functions.items():
        if not callable(fn):
            kind = type(fn).__name__
            raise ArgumentError(
                str(name), kind, "is not a function.", "Pass a function, for example lambda: f(x)."
            )
    warmup_ms = check_positive_number("warmup_ms", warmup_ms)
    rep_ms = check_positive_number("rep_ms", rep_ms)
    min_samples = check_positive_int("min_samples", min_samples)
    max_samples = check_positive_int("max_samples", max_samples)
    if max_samples < min_samples:
        raise ArgumentError("max_samples", max_samples, "is below min_samples.", "Raise it.")
    check_choice("launch", launch, ("hidden", "included"))
    device = _resolve_device(device)
    for name, fn in functions.items():
        _refuse_deferred(name, fn())  # first call: compiles, allocates, fills caches
    time_them = _time_cuda if device == "cuda" else _time_cpu
    return time_them(
        dict(functions), warmup_ms, rep_ms, min_samples, max_samples, flush_l2, launch, before
    )


def _time_cuda(
    functions, warmup_ms, rep_ms, min_samples, max_samples, flush_l2, launch, before
) -> Comparison:
    cuda = _Cuda(flush_l2, launch == "included")
    estimate_ms = 0.0
    for name, fn in functions.items():
        cuda.refuse_unseen(name, fn)
        start, end = cuda.event_pair()
        start.record()
        fn()
        end.record()
        end.synchronize()
        once = max(start.elapsed_time(end), 1e-3)
        for _ in range(min(1000, math.ceil(warmup_ms / once))):
            fn()
        cuda.torch.cuda.synchronize()
        cuda.learn_host_time(fn)
        estimate_ms = max(estimate_ms, once)
    events: dict[str, list] = {name: [] for name in functions}
    for turn in range(_rounds(estimate_ms, rep_ms, min_samples, max_samples)):
        names = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in names:
            events[name].append(cuda.record(functions[name], before))
    cuda.torch.cuda.synchronize()
    flushed = "L2 overwritten before each" if flush_l2 else "L2 left warm"
    hidden = "queued ahead, launches hidden" if launch == "hidden" else "launches included"
    method = f"CUDA events on the current stream, {flushed}, {hidden}"
    if len(functions) > 1:
        method += ", implementations in turns"
    return Comparison(
        {
            name: Timing([s.elapsed_time(e) for s, e in pairs], method, "cuda")
            for name, pairs in events.items()
        }
    )


def _time_cpu(
    functions, warmup_ms, rep_ms, min_samples, max_samples, flush_l2, launch, before
) -> Comparison:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = _Cuda(flush=False, launch_included=True, wall_clock=True)
        for name, fn in functions.items():
            cuda.refuse_unfinished(name, fn)
    calls, estimate_ms = {}, 0.0
    for name, fn in functions.items():
        calls[name] = 1 if before is not None else _calls_per_sample(fn)
        begin = time.perf_counter()
        runs = 0
        while (elapsed_ms := (time.perf_counter() - begin) * 1e3) < warmup_ms or runs == 0:
            for _ in range(calls[name]):
                fn()
            runs += 1
        estimate_ms = max(estimate_ms, elapsed_ms / runs)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a sample is nobody's time
    try:
        for turn in range(_rounds(estimate_ms, rep_ms, min_samples, max_samples)):
            names = list(functions) if turn % 2 == 0 else list(reversed(functions))
            for name in names:
                fn, repeat = functions[name], calls[name]
                if before is not None:
                    before()
                begin = time.perf_counter_ns()
                for _ in range(repeat):
                    fn()
                samples[name].append((time.perf_counter_ns() - begin) / repeat / 1e6)
    finally:
        if collecting:
            gc.enable()
    return Comparison(
        {
            name: Timing(
                values,
                f"time.perf_counter_ns, {calls[name]} call{'s' * (calls[name] > 1)} per sample"
                + (", implementations in turns" if len(functions) > 1 else ""),
                "cpu",
            )
            for name, values in samples.items()
        }
    )


def time_fn(
    fn: Callable[[], Any],
    *,
    warmup_ms: float = 50.0,
    rep_ms: float = 200.0,
    min_samples: int = 5,
    max_samples: int = 1000,
    device: str | None = None,
    flush_l2: bool = True,
    launch: str = "hidden",
    before: Callable[[], Any] | None = None,
) -> Timing:
    """Time one function.

    Parameters, errors: as ``time_many``, for a single ``fn``.

    Returns
    -------
    Timing
        the samples in ms, with median, p20, p80 and spread.
    """
    if not callable(fn):
        kind = type(fn).__name__
        raise ArgumentError(
            "fn", kind, "is not a function.", "Pass a function, for example lambda: f(x)."
        )
    name = getattr(fn, "__name__", type(fn).__name__)
    return time_many(
        {name: fn},
        warmup_ms=warmup_ms,
        rep_ms=rep_ms,
        min_samples=min_samples,
        max_samples=max_samples,
        device=device,
        flush_l2=flush_l2,
        launch=launch,
        before=before,
    )[name]
