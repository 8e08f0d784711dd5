"""Where attention's kernels stand under the roof of this machine.

Measures the two ceilings, a large copy and a large matrix product, then every step of naive
attention, naive attention as a whole and each fused backend that torch has here, over lengths
and head dimensions.  Beside each time stand the counted operations and bytes, the lower bound
under the data sheet's and under the measured ceilings, and the error against float64.

The number of heads shrinks as the length grows, so that N² × heads × batch stays the same and
the device is equally full at every length.

Taught in chapter 04 (is it the arithmetic or the bytes?).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from labkit.experiments import Progress, Result
from labkit.experiments import steps as each
from labkit.roofline import Roofline, Step, steps, total

TITLE = "Measured roofline of attention"
CHAPTERS = ("04",)
NEEDS_GPU = False

# queries of one head that are compared with float64
_CHECKED_ROWS = 256
_FUSED = ("flash", "cudnn", "efficient")
# lengths whose figures get a key, so that a page can quote them
_QUOTED = (512, 4096, 16384)


def run(*, quick: bool, device: str | None = None, progress: Progress | None = None) -> Result:
    """Measure ceilings and points.

    Returns
    -------
    Result
        ``results``: ``copy_peak`` (B/s), ``matmul_peak_<dtype>`` (FLOP/s), ``ridge_<dtype>``, and
        per kernel ``<step>_<dtype>_d<head_dim>_n<seq_len>_{time,rate,bandwidth,residual}``.
        ``rows``: one per kernel and size, see ``_row``.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = _plan(quick, device)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    result = Result()
    torch.manual_seed(0)
    spec = _measure_ceilings(result, plan, device, gpu)
    problems = [
        (t, d, n) for t in plan["dtypes"] for d in plan["head_dims"] for n in plan["lengths"]
    ]
    with torch.no_grad():
        for dtype, head_dim, seq_len in each(
            problems, progress, lambda p: f"{p[0]}, d = {p[1]}, N = {p[2]}"
        ):
            roofs = spec.get(dtype), Roofline.from_record(result, dtype, gpu=gpu)
            _measure_problem(result, plan, device, roofs, dtype, head_dim, seq_len)
    return result


def _plan(quick: bool, device: str) -> dict[str, Any]:
    """What to measure: sizes by device and by how much time there is."""
    import torch

    if device == "cpu":
        return {
            "dtypes": ["float32"],
            "head_dims": [64],
            "lengths": [256, 1024, 4096] if quick else [256, 512, 1024, 2048, 4096],
            "pairs": 2**23,
            "copy_bytes": 2**27,
            "matmul_sizes": [1024, 2048],
            "rep_ms": 120 if quick else 500,
            "min_samples": 3 if quick else 5,
            "causal": [] if quick else [1024],
            "fused": ["flash"],
        }
    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    free, _ = torch.cuda.mem_get_info()
    pairs = 2**26 if quick else 2**30
    # float32 S, its scaled copy, P and room for one more, in at most half of what is free
    while pairs > 2**22 and 4 * 4 * pairs > free // 2:
        pairs //= 2
    return {
        "dtypes": [half] if quick else [half, "float32"],
        "head_dims": [64] if quick else [64, 128],
        "lengths": [512, 2048, 8192] if quick else [512, 1024, 2048, 4096, 8192, 16384],
        "pairs": pairs,
        "copy_bytes": min(2**31, 2 ** int(math.log2(free // 4))),
        "matmul_sizes": [8192] if quick else [4096, 8192, 16384],
        "rep_ms": 40 if quick else 60,
        "min_samples": 5,
        "causal": [] if quick else [4096, 16384],
        "fused": list(_FUSED),
    }


# -- ceilings ----------------------------------------------------------------------------------


def _measure_ceilings(
    result: Result, plan: dict[str, Any], device: str, gpu: str | None
) -> dict[str, Roofline]:
    """Add the measured ceilings to ``result``; return the data sheet's by dtype, where known."""
    import torch

    from labkit.dtypes import itemsize, torch_dtype
    from labkit.roofline import card_or_none
    from labkit.timing import time_fn

    source = torch.empty(plan["copy_bytes"] // 4, device=device).normal_()
    target = torch.empty_like(source)
    timing = time_fn(
        lambda x=source, y=target: y.copy_(x), rep_ms=plan["rep_ms"] * 3, device=device
    )
    filled = time_fn(lambda y=target: y.fill_(1.0), rep_ms=plan["rep_ms"] * 3, device=device)
    size = source.numel() * 4
    del source, target
    result.add(
        "copy_peak",
        2 * size / (timing.median_ms / 1e3),
        "B/s",
        f"torch copy of {size // 2**20} MiB, bytes read plus bytes written, median of {timing.n}",
    )
    result.rows.append(_timed({"step": "copy", "bytes": 2 * size}, timing))
    result.add(
        "fill_peak",
        size / (filled.median_ms / 1e3),
        "B/s",
        f"torch fill of {size // 2**20} MiB, bytes written, median of {filled.n}",
    )
    result.rows.append(_timed({"step": "fill", "bytes": size}, filled))
    card = card_or_none(gpu)
    spec = {}
    for dtype in plan["dtypes"]:
        best, tried = 0.0, []
        for n in plan["matmul_sizes"]:
            if dtype == "float32" and device == "cuda" and n > 8192:
                continue  # a second per product
            a, b = (torch.randn(n, n, device=device, dtype=torch_dtype(dtype)) for _ in range(2))
            timing = time_fn(lambda a=a, b=b: a @ b, rep_ms=plan["rep_ms"] * 3, device=device)
            tried.append(n)
            rate = 2 * n**3 / (timing.median_ms / 1e3)
            row = {"step": "matmul", "dtype": dtype, "size": n, "flops": 2 * n**3, "rate": rate}
            row["bytes"] = 3 * n * n * itemsize(dtype)
            result.rows.append(_timed(row, timing))
            if rate > best:
                best, where, count = rate, n, timing.n
        result.add(
            f"matmul_peak_{dtype}",
            best,
            "FLOP/s",
            f"torch matmul {where}³ on normal random data, {_precision(dtype, device)}, best size "
            f"of {tried}, median of {count}",
        )
        result.add(
            f"ridge_{dtype}",
            best / result.value("copy_peak"),
            "FLOP/byte",
            f"matmul_peak_{dtype} over copy_peak",
        )
        if card is not None and dtype in card.peak:
            spec[dtype] = Roofline.from_card(card, dtype)
    return spec


def _precision(dtype: str, device: str) -> str:
    import torch

    if dtype != "float32" or device == "cpu":
        return f"{dtype} in and out"
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return "float32 with TF32 products" if tf32 else "float32 products (TF32 off)"


# -- points ------------------------------------------------------------------------------------


def _measure_problem(
    result: Result,
    plan: dict[str, Any],
    device: str,
    roofs: tuple[Roofline | None, Roofline],
    dtype: str,
    head_dim: int,
    seq_len: int,
) -> None:
    """Time every step, the whole and the fused backends at one size."""
    import torch

    from labkit.dtypes import torch_dtype
    from labkit.naive import naive_attention

    count = max(1, plan["pairs"] // seq_len**2)
    heads = min(16, count)
    batch = count // heads
    shape = (batch, heads, seq_len, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch_dtype(dtype)) for _ in range(3))
    scale = head_dim**-0.5
    sizes = {"batch": batch, "heads": heads, "seq_len": seq_len, "head_dim": head_dim}
    sizes["dtype"] = dtype
    naive, forms = steps(), {step.key: step for step in steps()}
    oracle = _oracle(q, k, v, scale)

    def record(what: Step | list[Step], fn: Callable[[], Any], **labels: Any) -> float:
        whole = what if isinstance(what, Step) else total(what, "naive", "naive")
        out = fn()
        error = _error(out, oracle[labels.pop("check", whole.key)])
        del out
        row = _row(whole, what, fn, sizes, roofs, plan, device, error, labels)
        result.rows.append(row)
        if not labels.get("causal"):
            _quote(result, row)
        return row["median_ms"]

    summed = record(forms["scores"], lambda: q @ k.mT)
    scores = q @ k.mT
    summed += record(forms["scale"], lambda s=scores: s * scale)
    scaled = scores * scale
    del scores
    summed += record(forms["softmax"], lambda s=scaled: torch.softmax(s, -1))
    weights = torch.softmax(scaled, -1)
    del scaled
    summed += record(forms["output"], lambda p=weights: p @ v)
    del weights
    whole = record(naive, lambda: naive_attention(q, k, v, scale=scale), check="output")
    result.rows[-1]["sum_of_steps_ms"] = summed
    fused_ms = {}
    for backend in plan["fused"]:
        if _can(backend, q, k, v, causal=False):
            with _only(backend):
                fn = _sdpa(q, k, v, scale, causal=False)
                row = {"backend": backend, "check": "output"}
                fused_ms[backend] = record(steps("fused")[0], fn, **row)
    _compare(result, whole, fused_ms, sizes)
    if seq_len in plan["causal"]:
        oracle["output"] = _oracle(q, k, v, scale, causal=True)["output"]
        run_naive = lambda: naive_attention(q, k, v, scale=scale, causal=True)  # noqa: E731
        record(steps(causal=True), run_naive, check="output", causal=True)
        for backend in fused_ms:
            with _only(backend):
                fn = _sdpa(q, k, v, scale, causal=True)
                row = {"backend": backend, "check": "output", "causal": True}
                record(steps("fused", causal=True)[0], fn, **row)


def _row(
    step: Step,
    parts: Step | list[Step],
    fn: Callable[[], Any],
    sizes: dict[str, Any],
    roofs: tuple[Roofline | None, Roofline],
    plan: dict[str, Any],
    device: str,
    error: dict[str, float],
    labels: dict[str, Any],
) -> dict[str, Any]:
    """One measured kernel: counts, bounds in ms, samples, rates, residuals, error.

    ``residual`` is the median over the lower bound under the measured ceilings,
    ``residual_spec`` the same under the data sheet's.
    """
    from labkit.timing import time_fn

    least = plan["min_samples"]
    timing = time_fn(fn, rep_ms=plan["rep_ms"], min_samples=least, device=device)
    cost = step.at(**sizes)
    row = {"step": step.key, "backend": None, "causal": False, **sizes, **labels}
    row |= {"flops": cost.flops, "bytes": cost.bytes, "intensity": cost.intensity}
    seconds = timing.median_ms / 1e3
    for suffix, roof in zip(("_spec", ""), roofs, strict=True):
        if roof is not None:
            bounds = roof.time_of(parts, **sizes)
            row[f"lower{suffix}_ms"] = bounds.lower * 1e3
            row[f"limited_by{suffix}"] = bounds.limited_by
            row[f"residual{suffix}"] = seconds / bounds.lower
    row |= {"rate": cost.flops / seconds, "bandwidth": cost.bytes / seconds, "error": error}
    return _timed(row, timing)


def _timed(row: dict[str, Any], timing: Any) -> dict[str, Any]:
    samples = [round(s, 6) for s in timing.samples_ms]
    return {**row, "median_ms": timing.median_ms, "samples_ms": samples, "method": timing.method}


def _quote(result: Result, row: dict[str, Any]) -> None:
    """Give the figures of a row keys, so that a page can quote them."""
    if row["seq_len"] not in _QUOTED:
        return
    name = f"{row['step']}_{row['backend']}" if row["backend"] else row["step"]
    key = f"{name}_{row['dtype']}_d{row['head_dim']}_n{row['seq_len']}"
    where = f"batch {row['batch']}, heads {row['heads']}, median of {len(row['samples_ms'])}"
    result.add(f"{key}_time", row["median_ms"] / 1e3, "s", where)
    result.add(f"{key}_rate", row["rate"], "FLOP/s", f"counted operations over time; {where}")
    result.add(f"{key}_bandwidth", row["bandwidth"], "B/s", f"compulsory bytes over time; {where}")
    result.add(f"{key}_residual", row["residual"], "1", "time over the measured ceilings' bound")


def _compare(
    result: Result, naive_ms: float, fused_ms: dict[str, float], sizes: dict[str, Any]
) -> None:
    if not fused_ms or sizes["seq_len"] not in _QUOTED:
        return
    key = f"{sizes['dtype']}_d{sizes['head_dim']}_n{sizes['seq_len']}"
    best = min(fused_ms, key=fused_ms.__getitem__)
    how = f"time of naive attention over the fastest fused backend ({best})"
    result.add(f"speedup_{key}", naive_ms / fused_ms[best], "1", how)


# -- fused backends ----------------------------------------------------------------------------


def _can(backend: str, q: Any, k: Any, v: Any, *, causal: bool) -> bool:
    """Whether torch would run this backend on these tensors; asked, not tried, so nothing warns."""
    import torch

    if q.device.type == "cpu":
        return backend == "flash"
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, False)
    ask = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    }
    return ask[backend](params, False)


@contextmanager
def _only(backend: str) -> Iterator[None]:
    """Allow one backend, so that the time belongs to the kernel that the row names."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    name = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }[backend]
    with sdpa_kernel(name):
        yield


def _sdpa(q: Any, k: Any, v: Any, scale: float, *, causal: bool) -> Callable[[], Any]:
    from torch.nn.functional import scaled_dot_product_attention

    return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


# -- errors ------------------------------------------------------------------------------------


def _oracle(q: Any, k: Any, v: Any, scale: float, *, causal: bool = False) -> dict[str, Any]:
    """The first rows of the first head of each step in float64, from the same inputs."""
    import torch

    rows = min(_CHECKED_ROWS, q.shape[2])
    q64, k64, v64 = q[0, 0, :rows].double(), k[0, 0].double(), v[0, 0].double()
    scores = q64 @ k64.mT
    scaled = scores * scale
    if causal:
        hidden = torch.ones(scores.shape, dtype=torch.bool, device=q.device).triu(1)
        scaled = scaled.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scaled, -1)
    return {"scores": scores, "scale": scaled, "softmax": weights, "output": weights @ v64}


def _error(out: Any, oracle: Any) -> dict[str, float]:
    """``relative``: ‖out − float64‖ / ‖float64‖; ``max``: the largest difference."""
    difference = out[0, 0, : oracle.shape[0]].double() - oracle
    relative = difference.norm() / oracle.norm()
    return {"relative": relative.item(), "max": difference.abs().max().item()}
