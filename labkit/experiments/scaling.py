r"""What grows: time and peak memory of standard attention as one size at a time is doubled.

Four sizes are varied alone: seq_len, batch, heads, head_dim.  A quantity that
grows as a power law, :math:`y = c\,x^{\alpha}`, is a straight line of slope
:math:`\alpha` on logarithmic axes; ``fit_power`` finds it by least squares
over the largest points, where the law has had room to win over constant costs.

The second part looks at the small end with one batch element and one head.
There a GPU's time does not depend on seq_len: what takes time is launching
kernels.  Three measurements say so: the number of kernels (it is constant), the
time the GPU needs for them when they are queued ahead, and the time when one CUDA graph
launches all of them at once.

Taught in chapter 02 (what grows).  Claims C12, C13, C14.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.experiments import Progress, Result, has_gpu, steps

__all__ = [
    "CHAPTERS",
    "KNOBS",
    "NEEDS_GPU",
    "TITLE",
    "PowerFit",
    "doublings",
    "fit_power",
    "flat_until",
    "kernels",
    "run",
    "three_lines",
]

TITLE = "What grows: time and memory of attention, one size at a time"
CHAPTERS = ("02",)
NEEDS_GPU = False

KNOBS = ("seq_len", "batch", "heads", "head_dim")

# -- fitting -----------------------------------------------------------------------


@dataclass(frozen=True)
class PowerFit:
    """A fitted power law y = coefficient · x^exponent.

    Attributes
    ----------
    exponent, coefficient : of the least-squares line through (log x, log y).
    low, high : smallest and largest exponent between neighbouring points: the spread.
    range : (smallest, largest) x that was fitted.
    n : number of points.
    """

    exponent: float
    coefficient: float
    low: float
    high: float
    range: tuple[float, float]
    n: int

    def __call__(self, x: float) -> float:
        """The law at ``x``."""
        return self.coefficient * x**self.exponent

    def __str__(self) -> str:
        return f"{self.exponent:.2f} (between {self.low:.2f} and {self.high:.2f}, n = {self.n})"


def doublings(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """The exponent between each point and the next: log(y₂/y₁) / log(x₂/x₁).

    For a doubling of x this is how many doublings of y it costs.

    Raises
    ------
    ArgumentError
        if there are fewer than two points, x does not rise, or a value is not positive.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ArgumentError("x", f"{len(x)} points", "are too few.", "Pass two or more of each.")
    if any(b <= a for a, b in itertools.pairwise(x)):
        raise ArgumentError("x", list(x), "does not rise.", "Sort the points by x.")
    if min(*x, *y) <= 0:
        raise ArgumentError("y", list(y), "has no logarithm.", "Pass values above 0.")
    return [math.log(y[i + 1] / y[i]) / math.log(x[i + 1] / x[i]) for i in range(len(x) - 1)]


def fit_power(x: Sequence[float], y: Sequence[float], *, last: int = 4) -> PowerFit:
    r"""Least squares on logarithms over the ``last`` largest points.

    With :math:`u=\log x` and :math:`w=\log y`,

    .. math:: \alpha = \frac{\sum (u-\bar u)(w-\bar w)}{\sum (u-\bar u)^2},
              \qquad \log c = \bar w - \alpha \bar u .

    Parameters
    ----------
    x, y : points in order of rising x, all positive.
    last : how many of them to use, from the largest down (at least 2).

    Raises
    ------
    ArgumentError
        see ``doublings``; also if ``last`` is below 2.
    """
    if check_positive_int("last", last) < 2:
        raise ArgumentError("last", last, "leaves no slope.", "Pass 2 or more.")
    local = doublings(x, y)
    x, y, local = list(x)[-last:], list(y)[-last:], local[-(last - 1) :]
    u, w = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_u, mean_w = sum(u) / len(u), sum(w) / len(w)
    exponent = sum((a - mean_u) * (b - mean_w) for a, b in zip(u, w, strict=True)) / sum(
        (a - mean_u) ** 2 for a in u
    )
    coefficient = math.exp(mean_w - exponent * mean_u)
    return PowerFit(exponent, coefficient, min(local), max(local), (x[0], x[-1]), len(x))


def flat_until(x: Sequence[float], y: Sequence[float], tolerance: float = 1.5) -> float:
    """The largest x up to which y stays within ``tolerance`` times its smallest value so far."""
    flat, least = x[0], y[0]
    for here, value in zip(x, y, strict=True):
        least = min(least, value)
        if value > tolerance * least:
            break
        flat = here
    return flat


# -- what is measured ----------------------------------------------------------------


def three_lines(q, k, v):
    """Attention as chapter 01 writes it, without the checks of ``labkit.naive``.

    Used where microseconds of Python would be counted.  Shapes
    ``[batch, heads, seq_len, head_dim]``.
    """
    S = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    P = S.softmax(dim=-1)
    return P @ v


def _plan(device: str, quick: bool) -> dict[str, Any]:
    """Sizes for this kind of device: base values and the values of each knob."""
    if device == "cuda":
        top, many = (13, 6) if not quick else (12, 4)
        return {
            "dtype": "float16",
            "base": {
                "seq_len": {"batch": 4, "heads": 16, "head_dim": 64},
                "batch": {"heads": 16, "seq_len": 1024, "head_dim": 64},
                "heads": {"batch": 4, "seq_len": 1024, "head_dim": 64},
                "head_dim": {"batch": 4, "heads": 16, "seq_len": 2048},
            },
            "values": {
                "seq_len": [2**i for i in range(6, top + 1)],
                "batch": [2**i for i in range(many + 1)],
                "heads": [2**i for i in range(many + 3)],
                "head_dim": [16, 32, 64, 128, 256],
            },
            "one_head": [2**i for i in range(5, 15 if not quick else 13)],
            "full": None if quick else {"batch": 16, "heads": 32},
        }
    top = 11 if not quick else 10
    return {
        "dtype": "float32",
        "base": {
            "seq_len": {"batch": 1, "heads": 4, "head_dim": 64},
            "batch": {"heads": 2, "seq_len": 512, "head_dim": 64},
            "heads": {"batch": 1, "seq_len": 512, "head_dim": 64},
            "head_dim": {"batch": 1, "heads": 4, "seq_len": 512},
        },
        "values": {
            "seq_len": [2**i for i in range(7, top + 1)],
            "batch": [1, 2, 4, 8],
            "heads": [1, 2, 4, 8],
            "head_dim": [16, 32, 64, 128],
        },
        "one_head": [2**i for i in range(4, top + 1)],
        "full": None,
    }


def _inputs(sizes: Mapping[str, int], dtype: str, device: str):
    import torch

    from labkit.dtypes import torch_dtype

    generator = torch.Generator(device).manual_seed(sizes["seq_len"])
    shape = [sizes[n] for n in ("batch", "heads", "seq_len", "head_dim")]
    return [
        torch.randn(shape, generator=generator, dtype=torch_dtype(dtype), device=device)
        for _ in range(3)
    ]


def _fits(sizes: Mapping[str, int], dtype: str, device: str) -> bool:
    """Whether the point takes less than two thirds of the GPU's free memory."""
    if device != "cuda":
        return True
    import torch

    from labkit.memory import attention_peak

    free, _ = torch.cuda.mem_get_info()
    peak = attention_peak(**sizes, dtype=dtype, device=device, with_inputs=True)
    return 1.5 * peak < free


def _error(fn: Callable, q, k, v) -> dict[str, Any] | None:
    """Largest error against float64, where float64 is cheap; None where it is not."""
    if q[..., 0].numel() * q.shape[-2] > 2**22:
        return None
    oracle = three_lines(q.double(), k.double(), v.double())
    error = (fn(q, k, v).double() - oracle).abs().max().item()
    return {"max_abs": error, "against": "float64"}


def kernels(fn: Callable[[], Any], device: str) -> list[str]:
    """Names of the kernels that one call launches (CUDA), or of its ATen operators (CPU).

    On CUDA as ``torch.profiler`` saw them; empty if it saw none.  On a CPU views are left
    out: they do no work.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    fn()
    if device == "cuda":
        torch.cuda.synchronize()
        both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=both, acc_events=True) as seen:
            fn()
            torch.cuda.synchronize()
        kind = torch.autograd.DeviceType.CUDA
        names = [e.name for e in seen.events() if e.device_type == kind]
        return [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # A view makes no work: it changes how memory is read. _unsafe_view is one, too; it
            # only promises autograd that nobody else looks at the memory.
            name = func._schema.name
            if name != "aten::_unsafe_view" and not any(r.alias_info for r in func._schema.returns):
                found.append(name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    found: list[str] = []
    with torch.no_grad(), Names():
        fn()
    return found


def _graph(fn: Callable[[], Any]) -> Callable[[], None]:
    """``fn`` captured as a CUDA graph; the returned function replays it."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up outside of the capture
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


# -- the experiment --------------------------------------------------------------------


def run(*, quick: bool, device: str | None = None, progress: Progress | None = None) -> Result:
    """Measure all sweeps.

    Parameters
    ----------
    quick : fewer and smaller points, shorter samples.
    device : "cuda" or "cpu"; the GPU if there is one by default.
    progress : called with (done, total, what).

    Returns
    -------
    Result
        Rows have ``sweep`` (a knob, ``"one_head"`` or ``"full"``), the four sizes, ``dtype``,
        and ``samples_ms``; sweeps of a knob also ``predicted_bytes``, ``traced_bytes`` and
        ``measured_bytes`` (peak beyond the inputs); ``one_head`` rows also ``how``: "eager" (each
        call on an idle GPU), "queued" (launches hidden) or "graph".
    """
    import torch

    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    plan = _plan(device, quick)
    result = Result()
    points = [
        (knob, {**plan["base"][knob], knob: value}, plan["dtype"])
        for knob in KNOBS
        for value in plan["values"][knob]
    ]
    one = {"batch": 1, "heads": 1, "head_dim": 64}
    points += [("one_head", {**one, "seq_len": n}, "float32") for n in plan["one_head"]]
    if plan["full"]:
        points += [
            ("full", {**plan["full"], "head_dim": 64, "seq_len": n}, "float32")
            for n in (256, 512, 1024, 2048)
        ]
    with torch.no_grad(), _one_thread(device):
        for sweep, sizes, dtype in steps(points, progress, lambda p: f"{p[0]}, {p[1]}"):
            if not _fits(sizes, dtype, device):
                result.notes.append(f"{sweep} at {sizes}: left out, too large for this GPU")
            elif sweep == "one_head":
                result.rows += _one_head(sizes, dtype, device, quick)
            else:
                result.rows.append(_point(sweep, sizes, dtype, device, quick))
    _summarise(result, device)
    return result


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """On a CPU, one thread: whether an operator is worth splitting depends on its size, and a
    change of the number of threads along a sweep would be read as a change of slope."""
    import torch

    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(fn: Callable[[], Any], device: str, quick: bool, launch: str) -> dict[str, Any]:
    """At most 100 samples of ``fn``, to the nanosecond, and their median."""
    from labkit.timing import time_fn

    if device == "cuda":
        how = {"warmup_ms": 5 if quick else 25, "rep_ms": 20 if quick else 150, "min_samples": 7}
    else:
        how = {"warmup_ms": 10, "rep_ms": 30 if quick else 300, "min_samples": 5}
    timing = time_fn(fn, device=device, launch=launch, max_samples=100, **how)
    samples = [round(ms, 6) for ms in timing.samples_ms]
    return {"samples_ms": samples, "median_ms": median(samples), "method": timing.method}


def _point(sweep: str, sizes: dict[str, int], dtype: str, device: str, quick: bool) -> dict:
    from labkit.memory import attention_peak, measure
    from labkit.naive import naive_attention

    q, k, v = _inputs(sizes, dtype, device)
    # The same operators as naive_attention, without its question how much memory is free: on
    # CUDA the answer takes the driver a quarter of a millisecond.
    timing = _timed(lambda: three_lines(q, k, v), device, quick, "included")
    row = {"sweep": sweep, **sizes, "dtype": dtype, **timing}
    if sweep in KNOBS:
        predicted = attention_peak(**sizes, dtype=dtype, device=device)
        report = measure(naive_attention, q, k, v, predicted=predicted)
        row["predicted_bytes"] = predicted
        row["traced_bytes"] = report.traced
        row["measured_bytes"] = report.measured
        row["memory_method"] = report.method
    if error := _error(three_lines, q, k, v):
        row["error"] = error
    return row


def _one_head(sizes: dict[str, int], dtype: str, device: str, quick: bool) -> list[dict]:
    q, k, v = _inputs(sizes, dtype, device)

    def eager():
        return three_lines(q, k, v)

    rows = []
    ways = {"eager": (eager, "included")}
    if device == "cuda":
        ways["queued"] = (eager, "hidden")
        ways["graph"] = (_graph(eager), "included")
    for how, (fn, launch) in ways.items():
        timing = _timed(fn, device, quick, launch)
        row = {"sweep": "one_head", "how": how, **sizes, "dtype": dtype, **timing}
        if how == "eager":
            row["kernels"] = [name[:120] for name in kernels(eager, device)]
            if error := _error(three_lines, q, k, v):
                row["error"] = error
        rows.append(row)
    return rows


def series(
    result: Any, sweep: str, y: str = "seconds", **where: Any
) -> tuple[list[int], list[float]]:
    """x and y of one sweep of a result or record, in order of x.

    Parameters
    ----------
    sweep : a knob, "one_head" or "full".
    y : "seconds" (median time) or a field of the rows, e.g. "measured_bytes".
    where : further fields that the rows must have, e.g. ``how="eager"``.
    """
    knob = sweep if sweep in KNOBS else "seq_len"
    rows = sorted(result.select(sweep=sweep, **where), key=lambda row: row[knob])
    values = [row["median_ms"] / 1e3 if y == "seconds" else row[y] for row in rows]
    kept = [(row[knob], value) for row, value in zip(rows, values, strict=True) if value]
    return [x for x, _ in kept], [value for _, value in kept]


def _summarise(result: Result, device: str) -> None:
    """The figures that pages quote, from the rows."""
    for knob in KNOBS:
        for y, name in (("seconds", "time"), ("measured_bytes", "memory")):
            x, values = series(result, knob, y)
            if len(x) < 3:
                continue
            fit = fit_power(x, values)
            over = f"{knob} = {fit.range[0]} … {fit.range[1]}"
            quantity = "median time" if name == "time" else "measured peak beyond the inputs"
            how = f"{quantity} over {over}: least squares on logs, {fit.n} points"
            result.add(f"{name}_exponent.{knob}", fit.exponent, "1", how)
            result.add(f"{name}_exponent.{knob}.low", fit.low, "1", f"smallest doubling, {over}")
            result.add(f"{name}_exponent.{knob}.high", fit.high, "1", f"largest doubling, {over}")
    for sweep, where in (("one_head", {"how": "eager"}), ("full", {})):
        times = dict(zip(*series(result, sweep, **where), strict=True))
        if 256 in times:
            for n in (512, 1024, 2048):
                if n in times:
                    how = f"time at N = {n} over time at N = 256, float32, {sweep}"
                    result.add(f"ratio.{sweep}.{n}", times[n] / times[256], "1", how)
    x, eager = series(result, "one_head", how="eager")
    # On a GPU the notes' shortest length, which is deep in the flat part; elsewhere the shortest.
    n = 256 if device == "cuda" else x[0]
    one = f"one batch element, one head, float32, N = {n}"
    call = eager[x.index(n)]
    result.add("launch.eager", call, "s", f"median time of one call on an idle device, {one}")
    result.add(
        "launch.flat_until",
        flat_until(x, eager),
        "tokens",
        "largest N of the sweep up to which that time stays within 1.5 times its smallest",
    )
    counts = {r["seq_len"]: len(r["kernels"]) for r in result.select(sweep="one_head", how="eager")}
    if all(counts.values()):
        what = "kernels launched" if device == "cuda" else "operators that do work"
        for key, count, where in (
            ("launch.kernels", counts[n], f"N = {n}"),
            ("launch.kernels.least", min(counts.values()), "the N with the fewest"),
            ("launch.kernels.most", max(counts.values()), "the N with the most"),
        ):
            result.add(key, count, "kernels", f"{what} by one call at {where}, torch.profiler")
    for how, text in (
        ("queued", "median time of the GPU when launches are queued ahead"),
        ("graph", "median time of one call as a CUDA graph on an idle GPU"),
    ):
        xs, times = series(result, "one_head", how=how)
        if xs:
            time = times[xs.index(n)]
            result.add(f"launch.{how}", time, "s", f"{text}, {one}")
            result.add(f"launch.eager_over_{how}", call / time, "1", f"ratio of medians, {one}")
