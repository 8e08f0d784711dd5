r"""A layer forward: what takes the time of a short call, and what of a long one.

Two stacks of two layers (:data:`SIZES`), in the configurations of :data:`CONFIGS`, from 128 to
16k tokens.  Attention is the same problem in both, 16 heads of 64 over the batch; they differ in
the width of what surrounds it.  Nothing is causal: every configuration computes the same sums.

Parts, each of which may be missing from a result with the reason among its notes:

``forward``
    the time of one call on an idle GPU, launches included, and the GPU's alone, launches hidden;
    how far the output is from float64; bytes at the peak of a call.
``launch``
    where launching is what takes the time, shown four ways: the time does not depend on N; the
    profile has gaps between kernels; a CUDA graph of the same kernels is faster; and the host
    needs just as long to queue the call, whatever N is.
``compile``
    what ``torch.compile`` makes of it: kernels, time, and how long it takes itself.

A length is *launch-bound* by each of three ways up to the last N of the sweep at which the time
is at most :data:`SLACK` times its smallest; at which it is more than :data:`SLACK` times the
GPU's own; at which it is more than that times a graph's.  The end between two lengths is where
the GPU's own time reaches that of the shortest call.

labkit.flash runs with its default configurations, untuned.
float32 means IEEE float32, torch's own default; configurations whose names end in ``_tf32`` let
torch's matrix products round their factors to TF32.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).  Claims C18, C20, C22, C24.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from labkit.errors import check_choice
from labkit.experiments import Progress, Result, has_gpu
from labkit.experiments import steps as each
from labkit.experiments._jobs import first_line
from labkit.experiments.flash_forward import _exact, _timed
from labkit.experiments.scaling import _graph, _one_thread, flat_until, kernels

__all__ = [
    "CHAPTERS",
    "CLAIMED",
    "CONFIGS",
    "NEEDS_GPU",
    "PARTS",
    "SIZES",
    "SLACK",
    "TITLE",
    "Config",
    "attention_kernel",
    "call",
    "crossing",
    "gaps",
    "network",
    "oracle",
    "pays_from",
    "run",
    "series",
    "sorted_out",
    "timed_or_noted",
    "within_budget",
]

TITLE = "A layer forward: original, flash, half; where launching is all that takes time"
CHAPTERS = ("10",)
NEEDS_GPU = False

PARTS = ("forward", "launch", "compile")
#: the stacks: batch × heads is 16 and the width of a head 64 in both
SIZES: dict[str, dict[str, int]] = {
    "report": {"dim": 256, "heads": 4, "layers": 2, "batch": 4},
    "realistic": {"dim": 1024, "heads": 16, "layers": 2, "batch": 1},
}
#: seq_len → what source 001 states for an RTX 3060: (original, flash) in seconds
CLAIMED = {
    128: (7.73e-3, 2.60e-3),
    256: (11.63e-3, 2.62e-3),
    512: (11.60e-3, 2.59e-3),
    1024: (16.23e-3, 6.01e-3),
    2048: (43.73e-3, 15.04e-3),
}
#: how much more counts as more: noise of a short call is less
SLACK = 1.25
#: at most so many samples of a row are kept
_SAMPLES = 25
#: nothing is begun after so many seconds
_BUDGET_S = 95
#: rows of the last layer that are compared with float64
_ROWS = 64


@dataclass(frozen=True)
class Config:
    """One way to compute the same function.

    Attributes
    ----------
    backend : of ``labkit.layers``.
    dtype : of weights and activations.
    tf32 : whether float32 matrix products may use TF32.
    autocast : float32 weights, cast to float16 on the way into every product.
    precision : how the kernels of labkit.flash multiply float32; None is IEEE float32.
    text : in words.
    """

    backend: str
    dtype: str = "float32"
    tf32: bool = False
    autocast: bool = False
    precision: str | None = None
    text: str = ""


CONFIGS: dict[str, Config] = {
    "original": Config("naive", text="S and P written, float32"),
    "original_tf32": Config("naive", tf32=True, text="S and P written, TF32"),
    "original_half": Config("naive", "float16", text="S and P written, float16"),
    "sdpa": Config("sdpa", text="torch's SDPA, float32"),
    "sdpa_tf32": Config("sdpa", tf32=True, text="torch's SDPA, TF32"),
    "sdpa_half": Config("sdpa", "float16", text="torch's SDPA, float16"),
    "sdpa_autocast": Config("sdpa", autocast=True, text="torch's SDPA, autocast to float16"),
    "flash": Config("flash", text="labkit.flash, float32"),
    "flash_tf32x3": Config(
        "flash", precision="tf32x3", text="labkit.flash, float32 as sums of two TF32"
    ),
    "flash_half": Config("flash", "float16", text="labkit.flash, float16"),
}


# -- the plan --------------------------------------------------------------------------------------


def _plan(quick: bool, device: str) -> dict[str, Any]:
    if device == "cpu":
        return {
            "work": [("forward", ("report", n)) for n in (64, 128, 256)],
            "configs": ("original", "sdpa"),
            "batch": 1, "launch_configs": (), "launch_to": 0, "hidden_to": 0,
            "rep_ms": 10, "min_samples": 3, "oracle_to": 256,
        }  # fmt: skip
    if quick:
        return {
            "work": [("forward", ("report", n)) for n in (128, 512, 2048)],
            # without the kernels of labkit.flash: compiling them takes longer than the rest
            "configs": ("original", "sdpa", "sdpa_half"),
            "launch_configs": ("original", "sdpa_half"), "launch_to": 2048, "hidden_to": 2048,
            "rep_ms": 12, "oracle_to": 2048,
        }  # fmt: skip
    lengths = [2**k for k in range(7, 14)]
    # what the claims are about first, and what the chapter can do without last
    work = [("forward", ("report", n)) for n in lengths]
    work += [("compile", ("sdpa_half", 512, mode)) for mode in (None, "reduce-overhead")]
    work += [("forward", ("report", 16384))]
    work += [("forward", ("realistic", n)) for n in lengths if n != 256]
    work += [("forward", ("realistic", 16384)), ("compile", ("original", 512, None))]
    work += [("compile", (name, 4096, None)) for name in ("sdpa_half", "original")]
    return {
        "work": work,
        "configs": tuple(CONFIGS),
        "launch_configs": ("original", "sdpa", "sdpa_half", "sdpa_autocast", "flash_half"),
        # beyond 8k the GPU's part is all of a call
        "launch_to": 4096, "hidden_to": 8192, "rep_ms": 20, "oracle_to": 16384,
        # what is a remark beside the rest is measured where it can be seen
        "seldom": ("original_tf32", "flash", "flash_tf32x3"),
        "seldom_at": {("report", 512), ("report", 2048), ("report", 8192), ("realistic", 4096)},
        "long": ("original", "original_half", "sdpa", "sdpa_half", "flash_half"),
    }  # fmt: skip


def run(
    *,
    quick: bool,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Sequence[str] | None = None,
) -> Result:
    """Measure the parts that this device can.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    parts : some of :data:`PARTS`; by default all.  ``launch`` rides on ``forward``.

    Returns
    -------
    Result
        Keys end in ``.<size>.<config>.n<N>``.  ``time`` (s, one call on an idle device), ``gpu``
        (s, launches hidden), ``host`` (s, to queue it), ``graph`` (s, replayed), ``kernels``,
        ``busy`` (share of the profile's span in which a kernel runs), ``speedup`` and
        ``speedup_gpu`` (of ``original`` over it), ``graph_gain``, ``error`` (relative, to
        float64), ``memory`` (bytes at the peak of one call, weights and x included).
        Without N: ``ends`` and ``ends_<flat|busy|graph>`` (tokens), ``growth`` (last doubling),
        ``switches`` (attention backends that ran), ``per_kernel`` (s of the host for each kernel,
        the shortest N).  ``pays.<size>.<config>_over_<other>`` (tokens).
        ``compile.<what>.<config>.<mode>.n<N>``.
        ``rows``: one per measured function, ``part`` as in the list above.
    """
    import torch

    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    plan = _plan(quick, device)
    for part in parts or ():
        check_choice("part", part, PARTS)
    wanted = PARTS if parts is None else tuple(parts)
    if "launch" not in wanted:
        plan["launch_to"] = 0
    parts_of = {"forward": ("forward", "launch"), "compile": ("compile",)}
    work = [w for w in plan["work"] if set(parts_of[w[0]]) & set(wanted)]
    result = Result()
    do = {
        "forward": functools.partial(_forward, result, plan, device),
        "compile": functools.partial(_compiled, result, plan, device),
    }
    with torch.no_grad(), _one_thread(device), _untuned():
        within_budget(result, work, do, _BUDGET_S, progress)
    _summarise(result)
    return result


@contextlib.contextmanager
def _untuned() -> Iterator[None]:
    """labkit.flash with its default configurations: trying them all takes longer than the rest."""
    before = os.environ.get("LABKIT_TUNE")
    os.environ["LABKIT_TUNE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LABKIT_TUNE"]
        else:
            os.environ["LABKIT_TUNE"] = before


def within_budget(
    result: Result,
    work: Sequence[tuple[str, tuple]],
    do: Mapping[str, Callable[..., None]],
    seconds: float,
    progress: Progress | None,
) -> None:
    """Do ``do[part](*item)`` for each ``(part, item)``; begin nothing after so many seconds.

    What fails or is left out becomes a note, and each item a row of part ``"clock"``.
    """
    import torch

    begin = time.monotonic()
    for part, item in each(work, progress, lambda w: f"{w[0]} {w[1]}"):
        spent = time.monotonic() - begin
        if spent > seconds:
            result.notes.append(f"{part} {item}: left out after {spent:.0f} s.")
            continue
        try:
            do[part](*item)
        except Exception as error:  # one point fewer, not one record fewer
            result.notes.append(f"{part} {item}: {first_line(error)}")
        took = round(time.monotonic() - begin - spent, 2)
        result.rows.append({"part": "clock", "item": f"{part} {item}", "seconds": took})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- what is run -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Matrix products may round float32 factors to TF32; as before at the end."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def network(
    size: Mapping[str, int], config: Config, device: str, state: Mapping[str, Any] | None = None
) -> Any:
    """The stack of that size in that configuration, in evaluation mode.

    Parameters
    ----------
    size : ``dim``, ``heads``, ``layers`` (one of :data:`SIZES`).
    state : weights to load, of any backend; drawn if None.
    """

    from labkit.dtypes import torch_dtype
    from labkit.layers import TransformerModel

    model = TransformerModel(
        size["dim"], size["heads"], size["layers"], backend=config.backend, causal=False,
        precision=config.precision, device=device,
    )  # fmt: skip
    if state is not None:
        model.load_state_dict(state)
    return model.to(torch_dtype(config.dtype)).eval()


def call(model: Any, config: Config, x: Any) -> functools.partial:
    """``model(x)`` in that configuration, without arguments; x is cast here, not in the call."""
    from labkit.dtypes import torch_dtype

    x = x.to(torch_dtype(config.dtype))
    way = _cast if config.autocast else _rounded if config.tf32 else _plain
    return functools.partial(way, model, x)


def _plain(model: Any, x: Any) -> Any:
    return model(x)


def _cast(model: Any, x: Any) -> Any:
    import torch

    with torch.autocast(x.device.type, torch.float16):
        return model(x)


def _rounded(model: Any, x: Any) -> Any:
    with _tf32():
        return model(x)


def oracle(model: Any, x: Any, *, rows: int = _ROWS) -> Any:
    """The last ``rows`` rows of the last batch element of ``model(x)``, in float64.

    Written with matrix products alone, so that it shares nothing with what it judges but the
    weights.  Scores are made for some queries at a time.

    Parameters
    ----------
    model : a stack in float32; its weights are read, nothing of it is called.
    x : ``[batch, seq_len, dim]``.

    Returns
    -------
    torch.Tensor
        ``[rows, dim]`` float64.
    """
    import torch
    from torch.nn.functional import gelu, layer_norm

    def norm(h, m):
        return layer_norm(h, h.shape[-1:], m.weight.double(), m.bias.double(), m.eps)

    def linear(h, m):
        h = h @ m.weight.double().mT
        return h if m.bias is None else h + m.bias.double()

    h = x[-1].double()
    rows = min(rows, h.shape[0])
    with torch.no_grad(), _exact():
        for layer in model.layers:
            z, heads = norm(h, layer.norm1), layer.num_heads
            q, k, v = (
                linear(z, p).unflatten(-1, (heads, -1)).transpose(0, 1)
                for p in (layer.q_proj, layer.k_proj, layer.v_proj)
            )  # [heads, N, head_dim]
            if layer is model.layers[-1]:
                q, h = q[:, -rows:], h[-rows:]
            at_once = max(1, 2**28 // (heads * k.shape[1]))
            o = torch.cat([
                torch.softmax(part @ k.mT * k.shape[-1] ** -0.5, -1) @ v
                for part in q.split(at_once, dim=1)
            ], 1)  # fmt: skip
            h = h + linear(o.transpose(0, 1).flatten(-2), layer.out_proj)
            h = h + linear(gelu(linear(norm(h, layer.norm2), layer.ff[0])), layer.ff[2])
        return norm(h, model.norm)


def _distance(out: Any, expected: Any) -> float:
    """‖out − float64‖ / ‖float64‖ over the oracle's rows."""
    out = out[-1, -expected.shape[0] :].double()
    return ((out - expected).norm() / expected.norm()).item()


def _weights(plan: dict[str, Any], size: str, device: str) -> Any:
    """One stack in float32 whose weights all configurations share; it lives as long as the plan."""
    import torch

    kept = plan.setdefault("weights", {})
    if size not in kept:
        with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
            torch.manual_seed(0)
            kept[size] = network(SIZES[size], CONFIGS["original"], device)
    return kept[size]


def _configs(plan: Mapping[str, Any], size: str, n: int) -> list[str]:
    """What is measured at that size and length."""
    names = plan["configs"] if n <= 8192 else plan["long"]
    everything = (size, n) in plan.get("seldom_at", ())
    return [name for name in names if everything or name not in plan.get("seldom", ())]


def _forward(result: Result, plan: dict[str, Any], device: str, size: str, n: int) -> None:
    """All configurations at one size and length, in turns."""
    import torch

    shape = {**SIZES[size], "seq_len": n}
    shape["batch"] = plan.get("batch", shape["batch"])
    base = _weights(plan, size, device)
    generator = torch.Generator(device).manual_seed(n)
    x = torch.randn(shape["batch"], n, shape["dim"], device=device, generator=generator)
    expected = oracle(base, x) if n <= plan["oracle_to"] else None
    state = base.state_dict()
    calls: dict[str, functools.partial] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in _configs(plan, size, n):
        try:
            fn = call(network(shape, CONFIGS[name], device, state), CONFIGS[name], x)
            out = fn()
            facts[name] = {"error": _distance(out, expected)} if expected is not None else {}
            del out
            if device == "cuda":
                torch.cuda.synchronize()
                if n in (1024, 2048, 4096):
                    row = {"part": "memory", "size": size, "name": name, **shape}
                    result.rows.append(row | _held(fn))
            calls[name] = fn
        except Exception as error:
            result.notes.append(f"{name}, {size}, N = {n}: {first_line(error)}")
    short = n <= 4096  # the GPU's part is all of a long call, and five of those take a second
    options = {"rep_ms": plan["rep_ms"], "warmup_ms": 5, "max_samples": _SAMPLES}
    options["min_samples"] = plan.get("min_samples", 7 if short else 4)
    for launch in ("included", "hidden"):
        if launch == "hidden" and (device == "cpu" or n > plan["hidden_to"]):
            continue
        timings = timed_or_noted(result, calls, device=device, launch=launch, **options)
        for name in timings:
            row = {"part": "forward", "size": size, "name": name, **shape, "launch": launch}
            result.rows.append(_timed(row | facts[name], timings[name]))
    if device == "cpu":
        for name, fn in calls.items():
            ops = kernels(fn, "cpu")
            result.rows.append({"part": "launch", "size": size, "name": name, **shape,
                                "kernels": len(ops)})  # fmt: skip
        return
    # which of torch's kernels ran is asked at every length: the notes suspect a change
    ways = [w for w in plan["launch_configs"] if w in calls] if n <= plan["launch_to"] else []
    watched = list(calls) if n == 512 else [*ways, *{"sdpa", "sdpa_half"}.intersection(calls)]
    seen = _profiled({name: calls[name] for name in dict.fromkeys(watched)}, result)
    for name, found in seen.items():
        row = {"part": "launch", "size": size, "name": name, **shape, **found}
        result.rows.append(row)
        try:
            if name in ways:
                _ways(row, calls[name])
        except Exception as error:
            result.notes.append(f"launch, {name}, {size}, N = {n}: {first_line(error)}")
    # kernels are kept where the figure of the gaps needs them
    for row in result.rows:
        if row["part"] == "launch" and row.get("seq_len") == n and not _drawn(row):
            row.pop("timeline", None)


def timed_or_noted(
    result: Result, functions: Mapping[str, Callable[[], Any]], **options: Any
) -> Mapping[str, Any]:
    """``labkit.timing.time_many`` of those that it does not refuse; a note for each that it does.

    On a host that many share, the check for work on other streams may come out wrong.
    """
    from labkit.timing import UnsynchronisedError, time_many

    left = dict(functions)
    while left:
        try:
            return time_many(left, **options)
        except UnsynchronisedError as error:
            refused = [name for name in left if str(error).startswith(f"{name} ")]
            result.notes.append(f"not timed: {first_line(error)}")
            for name in refused or list(left):
                del left[name]
    return {}


def _held(fn: functools.partial) -> dict[str, int]:
    """Bytes alive at the peak of one call: the weights, x, and what the call makes."""
    import torch

    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    made = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    model, x = fn.args
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    held = x.numel() * x.element_size()
    return {"made_bytes": made, "weight_bytes": weights, "bytes": made + weights + held}


def _drawn(row: Mapping[str, Any]) -> bool:
    named = row["name"] in ("original", "sdpa", "sdpa_half")
    return row["size"] == "report" and named and row["seq_len"] in (128, 512, 2048)


def _ways(row: dict[str, Any], fn: Callable[[], Any]) -> None:
    """What the host needs, and what a graph of the same kernels does."""
    from labkit.timing import time_fn

    row["host_ms"] = [round(1e3 * s, 6) for s in _host_seconds(fn)]
    replay = _graph(fn)
    timing = time_fn(replay, device="cuda", launch="included", warmup_ms=5, rep_ms=15,
                     max_samples=_SAMPLES)  # fmt: skip
    row["graph_ms"] = [round(ms, 6) for ms in timing.samples_ms]


def _host_seconds(fn: Callable[[], Any], times: int = 15) -> list[float]:
    """How long the host takes to queue the call, the GPU being idle before."""
    import torch

    samples = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fn()
        samples.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return samples


# -- the profile -----------------------------------------------------------------------------------

_warm: list[bool] = []
_RANGE = "labkit call "


def _profiled(
    functions: Mapping[str, Callable[[], Any]], result: Result, calls: int = 5
) -> dict[str, dict[str, Any]]:
    """Kernels of one call of each as torch.profiler saw them; a note where it missed some.

    One profile for all: to start and to end one takes longer than what it watches.  A call and
    the wait for it are a range on the host, and a kernel belongs to the range in which it starts.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from labkit.memory.measuring import _without_profiler_noise

    def watch(times: int) -> Any:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
                     acc_events=True) as seen:  # fmt: skip
            for name, fn in functions.items():
                for _ in range(times):
                    time.sleep(1e-3)  # the clocks of host and GPU agree to less than that
                    with record_function(_RANGE + name):
                        fn()
                        torch.cuda.synchronize()
        return list(seen.events())

    if not functions:
        return {}
    with _without_profiler_noise():
        if not _warm:  # the first profile of a process misses what it starts with
            watch(1)
            _warm.append(True)
        events = watch(calls)
    on_gpu = torch.autograd.DeviceType.CUDA
    span = lambda e: (e.time_range.start, e.time_range.end, e.name)  # noqa: E731
    launched = [span(e) for e in events if e.device_type == on_gpu and not _is_mark(e)]
    ranges = [span(e) for e in events if e.device_type != on_gpu and e.name.startswith(_RANGE)]
    return sorted_out(ranges, launched, result)


def sorted_out(
    ranges: Sequence[tuple], launched: Sequence[tuple], result: Result
) -> dict[str, dict[str, Any]]:
    """Which kernels each call launched: of ``(start, end, name)`` in µs, by when they start.

    Returns
    -------
    dict
        name → ``kernels`` (of one call), ``names``, ``attention``, ``busy_share`` (median over the
        calls), ``busy_us`` and ``timeline`` of the call in the middle.  A name whose calls differ
        in how many kernels there are is left out, and a note says so.
    """
    found: dict[str, list[list[tuple]]] = {}
    margin = 500.0  # µs
    for start, end, name in sorted(ranges):
        mine = sorted(k for k in launched if start - margin <= k[0] < end + margin)
        found.setdefault(name.removeprefix(_RANGE), []).append(mine)
    out = {}
    for name, each_call in found.items():
        counts = [len(mine) for mine in each_call]
        if len(set(counts)) > 1 or not counts[0]:
            result.notes.append(f"{name}: the profiler saw {counts} kernels in its calls.")
            continue
        shares = [gaps(mine)["busy"] for mine in each_call]
        middle = each_call[sorted(range(len(shares)), key=lambda i: shares[i])[len(shares) // 2]]
        begin = middle[0][0]
        names = [kernel for _, _, kernel in middle]
        out[name] = {
            "kernels": len(middle),
            "names": sorted({kernel[:90] for kernel in names}),
            "attention": attention_kernel(names),
            "busy_share": median(shares),
            "busy_us": round(gaps(middle)["busy_us"], 3),
            "timeline": [[round(a - begin, 2), round(b - a, 2)] for a, b, _ in middle],
        }
    return out


def _is_mark(event: Any) -> bool:
    """A copy, a fill, or a range that the profiler draws on the GPU's lane; not a kernel."""
    marks = ("Memcpy", "Memset", "aten::", "ProfilerStep", "## ", "Torch-Compiled", _RANGE)
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(marks)


def gaps(spans: Sequence[tuple]) -> dict[str, float]:
    """Of kernels ``(start, end, …)`` in µs: how long one runs, how long none does, and the share.

    Kernels that overlap count once.
    """
    busy, until = 0.0, -math.inf
    for start, end, *_ in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    span = until - min(s[0] for s in spans)
    return {"busy_us": busy, "gap_us": span - busy, "busy": busy / span if span else 1.0}


def attention_kernel(names: Sequence[str]) -> str:
    """Which backend computed the attention, by the names of kernels: see ``labkit.dispatch``.

    ``"unfused"`` means a softmax over stored scores, ``"none"`` that nothing tells.
    """
    from labkit.dispatch.seen import backend_of_kernel

    found = next((kind for name in names if (kind := backend_of_kernel(name))), None)
    return found or ("unfused" if any("softmax" in name.lower() for name in names) else "none")


# -- torch.compile ---------------------------------------------------------------------------------


def _compiled(
    result: Result, plan: dict[str, Any], device: str, name: str, n: int, mode: str | None
) -> None:
    """Eager and compiled in turns; the first call of the compiled one is timed by itself."""
    import torch

    torch._dynamo.reset()
    try:
        _race_compiled(result, plan, device, name, n, mode)
    finally:
        torch._dynamo.reset()  # with mode="reduce-overhead" it holds memory of its graphs


def _race_compiled(
    result: Result, plan: dict[str, Any], device: str, name: str, n: int, mode: str | None
) -> None:
    import torch

    shape = {**SIZES["report"], "seq_len": n}
    base, config = _weights(plan, "report", device), CONFIGS[name]
    model = network(shape, config, device, base.state_dict())
    x = torch.randn(shape["batch"], n, shape["dim"], device=device)
    eager = call(model, config, x)
    fast = call(torch.compile(model, mode=mode, dynamic=False), config, x)
    begin = time.perf_counter()
    fast()
    torch.cuda.synchronize()
    took = time.perf_counter() - begin
    expected = oracle(base, x)
    labels = {"part": "compile", "size": "report", "config": name, **shape}
    labels["mode"] = mode or "default"
    functions = {"eager": eager, "compiled": fast}
    facts = {who: {"error": _distance(fn(), expected)} for who, fn in functions.items()}
    for who, found in _profiled(functions, result, 3).items():
        del found["timeline"]
        facts[who] |= found
    facts["compiled"]["compile_s"] = took
    for launch in ("included", "hidden"):
        timings = timed_or_noted(
            result, functions, device=device, launch=launch, rep_ms=plan["rep_ms"],
            max_samples=_SAMPLES,
        )  # fmt: skip
        for who in timings:
            row = {**labels, "name": who, "launch": launch, **facts[who]}
            result.rows.append(_timed(row, timings[who]))


# -- what pages quote ------------------------------------------------------------------------------


def series(result: Any, prefix: str) -> tuple[list[int], list[float]]:
    """N and value of the keys ``<prefix>.n<N>``, in order of N."""
    start = f"{prefix}.n"
    found = sorted(
        (int(key.removeprefix(start)), result.value(key))
        for key in result.results
        if key.startswith(start) and key.removeprefix(start).isdigit()
    )
    return [n for n, _ in found], [value for _, value in found]


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where y, growing in x, reaches ``level``: on a straight line between logs.

    The first x if y is there already; None if it never is.
    """
    for i, value in enumerate(y):
        if value < level:
            continue
        if i == 0:
            return float(x[0])
        below = math.log(y[i - 1])
        share = (math.log(level) - below) / (math.log(value) - below)
        return math.exp(math.log(x[i - 1]) + share * (math.log(x[i]) - math.log(x[i - 1])))
    return None


def pays_from(times: Mapping[int, float], other: Mapping[int, float], gain: float = 1.05):
    """The smallest N from which on ``times`` stay at least ``gain`` times below ``other``'s.

    None if they are not at the largest N.
    """
    best = None
    for n in sorted(set(times) & set(other), reverse=True):
        if other[n] < gain * times[n]:
            break
        best = n
    return best


def _last(x: Sequence[int], bound: Sequence[bool]) -> int:
    """The last x of the launch-bound beginning; 0 if not even the first is."""
    last = 0
    for n, is_bound in zip(x, bound, strict=True):
        if not is_bound:
            break
        last = n
    return last


def _summarise(result: Result) -> None:
    for size in SIZES:
        rows = result.select(part="forward", size=size)
        if not rows:
            continue
        batch = rows[0]["batch"]
        about = SIZES[size]
        where = f"dim {about['dim']}, {about['heads']} heads, {about['layers']} layers, "
        where += f"batch {batch}"
        _times(result, size, where)
        _memory(result, size, where)
        for name in CONFIGS:
            _launch(result, size, name, where)
        _crossovers(result, size, where)
    _summarise_compile(result)


def _times(result: Result, size: str, where: str) -> None:
    for launch, key, extra in (
        ("included", "time", "one call on an idle device, launches included"),
        ("hidden", "gpu", "the GPU alone, launches hidden"),
    ):
        rows = result.select(part="forward", size=size, launch=launch)
        first = {r["seq_len"]: r["median_ms"] for r in rows if r["name"] == "original"}
        for row in rows:
            name, n = row["name"], row["seq_len"]
            what = f"{CONFIGS[name].text}, {where}; {extra}"
            result.add(f"{key}.{size}.{name}.n{n}", row["median_ms"] / 1e3, "s", f"median, {what}")
            if name != "original" and n in first:
                speedup = "speedup" if key == "time" else "speedup_gpu"
                how = f"time of original over that of {name}, {where}; {extra}"
                result.add(f"{speedup}.{size}.{name}.n{n}", first[n] / row["median_ms"], "1", how)
            if key == "time" and "error" in row:
                how = f"‖y − float64‖ / ‖float64‖ of the output, {CONFIGS[name].text}, {where}"
                result.add(f"error.{size}.{name}.n{n}", row["error"], "1", how)


def _memory(result: Result, size: str, where: str) -> None:
    for row in result.select(part="memory", size=size):
        how = (
            f"weights, x and what one call makes, at its peak, {CONFIGS[row['name']].text}, {where}"
        )
        key = f"memory.{size}.{row['name']}.n{row['seq_len']}"
        result.add(key, row["bytes"], "bytes", f"{how}; bytes asked of torch's allocator")


def _launch(result: Result, size: str, name: str, where: str) -> None:
    what = f"{CONFIGS[name].text}, {where}"
    rows = sorted(result.select(part="launch", size=size, name=name), key=lambda r: r["seq_len"])
    for row in rows:
        n = row["seq_len"]
        how = "kernels by torch.profiler" if "names" in row else "ATen operators that do work"
        result.add(f"kernels.{size}.{name}.n{n}", row["kernels"], "kernels", f"{how}, {what}")
        if "busy_share" in row:
            how = f"share of the span from the first kernel to the last in which one runs, {what}"
            result.add(f"busy.{size}.{name}.n{n}", row["busy_share"], "1", how)
        if "host_ms" in row:
            how = f"median time in which the host queues one call on an idle GPU, {what}"
            result.add(f"host.{size}.{name}.n{n}", median(row["host_ms"]) / 1e3, "s", how)
        if "graph_ms" in row:
            how = f"median time of one replay of a CUDA graph on an idle GPU, {what}"
            graph = median(row["graph_ms"]) / 1e3
            result.add(f"graph.{size}.{name}.n{n}", graph, "s", how)
            key = f"{size}.{name}.n{n}"
            if f"time.{key}" in result:
                gain = result.value(f"time.{key}") / graph
                result.add(f"graph_gain.{key}", gain, "1", f"eager over graph, {what}")
    if kinds := {row["attention"] for row in rows if "attention" in row}:
        how = f"different backends of attention over N ({', '.join(sorted(kinds))}), {what}"
        result.add(f"switches.{size}.{name}", len(kinds), "1", how)
    x, eager = series(result, f"time.{size}.{name}")
    if len(x) > 1 and x[-1] == 2 * x[-2]:
        how = f"time at N = {x[-1]} over N = {x[-2]}, {what}"
        result.add(f"growth.{size}.{name}", eager[-1] / eager[-2], "1", how)
    _ends(result, size, name, what)


def _ends(result: Result, size: str, name: str, what: str) -> None:
    """Up to which N launching is what takes the time, each way."""
    x, eager = series(result, f"time.{size}.{name}")
    gpu = dict(zip(*series(result, f"gpu.{size}.{name}"), strict=True))
    x, eager = x[: len(gpu)], eager[: len(gpu)]  # of the longest only the whole call is timed
    if not x or set(gpu) != set(x):
        return
    key = f"{size}.{name}"
    how = f"last N of the sweep at which the time is at most {SLACK} × its smallest, {what}"
    flat = int(flat_until(x, eager, SLACK))
    result.add(f"ends_flat.{key}", flat, "tokens", how)
    bound = [t > SLACK * gpu[n] for n, t in zip(x, eager, strict=True)]
    how = f"last N at which the time is more than {SLACK} × the GPU's own, {what}"
    result.add(f"ends_busy.{key}", _last(x, bound), "tokens", how)
    gx, gain = series(result, f"graph_gain.{key}")
    if gx:
        how = f"last N at which the time is more than {SLACK} × that of a CUDA graph, {what}"
        result.add(f"ends_graph.{key}", _last(gx, [g > SLACK for g in gain]), "tokens", how)
    end = crossing(x, [gpu[n] for n in x], min(eager[:3]))
    if end is not None:
        how = f"N at which the GPU's own time reaches that of the shortest call, on logs, {what}"
        result.add(f"ends.{key}", end, "tokens", how)
    count = f"kernels.{key}.n{x[0]}"
    if f"host.{key}.n{x[0]}" in result and count in result:
        each_one = result.value(f"host.{key}.n{x[0]}") / result.value(count)
        result.add(f"per_kernel.{key}", each_one, "s", f"host time per kernel, N = {x[0]}, {what}")


_PAIRS = (
    ("sdpa", "original"), ("original_half", "original"), ("sdpa_half", "sdpa"),
    ("sdpa_autocast", "sdpa"), ("sdpa_tf32", "sdpa"), ("sdpa_half", "sdpa_tf32"),
    ("flash_half", "sdpa_half"),
)  # fmt: skip


def _crossovers(result: Result, size: str, where: str) -> None:
    """From which N on one configuration is faster than another, as a call on an idle device."""
    for name, other in _PAIRS:
        mine, theirs = (
            dict(zip(*series(result, f"time.{size}.{config}"), strict=True))
            for config in (name, other)
        )
        n = pays_from(mine, theirs)
        if n is not None:
            how = f"smallest N from which on {name} is at least 5 % faster than {other}, {where}"
            result.add(f"pays.{size}.{name}_over_{other}", n, "tokens", how)


def _summarise_compile(result: Result) -> None:
    rows = result.select(part="compile")
    for row in rows:
        if row["name"] != "compiled":
            continue
        at = {key: row[key] for key in ("config", "mode", "seq_len", "launch")}
        eager = next(iter(result.select(part="compile", name="eager", **at)), None)
        if eager is None:
            continue
        key = f"{row['config']}.{row['mode'].replace('-', '_')}.n{row['seq_len']}"
        what = f"report's size, {CONFIGS[row['config']].text}, mode {row['mode']}"
        gain = eager["median_ms"] / row["median_ms"]
        if row["launch"] == "included":
            result.add(f"compile.time.{key}", row["median_ms"] / 1e3, "s", f"median, {what}")
            result.add(f"compile.speedup.{key}", gain, "1", f"eager over compiled, {what}")
            if "kernels" in row:
                result.add(f"compile.kernels.{key}", row["kernels"], "kernels", what)
            result.add(f"compile.seconds.{key}", row["compile_s"], "s", f"the first call, {what}")
        else:
            result.add(f"compile.speedup_gpu.{key}", gain, "1", f"the GPU alone, {what}")
