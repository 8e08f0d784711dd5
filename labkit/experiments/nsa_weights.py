r"""What it costs to return what attention weights can be made of, and to make them.

Source 004 times ``nsa_func`` without and with ``return_attn_weights``: no warm-up, ``time.time``,
100 calls, one synchronisation.  Here that is done as it says, in fresh processes, and then well.

``naive``
    the source's benchmark at its sizes, in its order and in the other, with a cold and a warm
    cache of compiled kernels, and after a warm-up: the same question, five answers.
``well``
    both calls warmed up and in turns: the time of the GPU, between events, with the launches
    hidden; and of the host with an idle GPU.
``memory``
    bytes that stay alive after the call because of what it returns: three LSEs and the choice of
    blocks; and what the weights themselves would take.
``rebuild``
    time and peak of ``compute_attention_weights_from_lse`` for one head, by branch, and of the
    gated total.
``precision``
    how far the rows of rebuilt weights are from summing to 1, by dtype; and how far they would be
    if the scores were rounded to half precision before the exponential.

Taught in chapter 14 (what did it look at?).  Claims C34, C35 and C38.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from labkit.experiments import Progress, Result
from labkit.experiments._jobs import Jobs

__all__ = ["CHAPTERS", "NEEDS_GPU", "PARTS", "TITLE", "returned_bytes", "run", "weights_bytes"]

TITLE = "Attention weights from the LSE: the cost of returning and of rebuilding them"
CHAPTERS = ("14",)
NEEDS_GPU = False

PARTS = ("naive", "well", "memory", "rebuild", "precision")
#: the sizes of the source's benchmark: as many KV heads as heads, float32
NOTES = {"seq_len": 256, "heads": 16, "head_dim": 64, "calls": 100}
_BRANCHES = ("compression", "selection", "sliding_window")
#: seconds after which no further job begins, and those that a child may take
_LIMIT, _CHILD = 60, 60


def returned_bytes(*, seq_len: int, heads: int, kv_heads: int, count: int, batch: int = 1) -> int:
    """Bytes of three LSEs ``[B, HQ, M]`` float32 and of block_indices ``[B, M, H, S]`` int32.

    >>> returned_bytes(seq_len=65536, heads=64, kv_heads=4, count=16) // 2**20
    64
    """
    return batch * seq_len * 4 * (3 * heads + kv_heads * count)


def weights_bytes(*, seq_len: int, heads: int, batch: int = 1) -> int:
    """Bytes of one branch's weights ``[B, HQ, M, N]`` in float32.

    >>> weights_bytes(seq_len=65536, heads=64) // 2**40
    1
    """
    return batch * heads * seq_len * seq_len * 4


# -- the plan --------------------------------------------------------------------------------------


def _plan(quick: bool, device: str) -> dict[str, Any]:
    if device == "cuda":
        import torch

        half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
        record = {"heads": 64, "kv_heads": 4, "head_dim": 128, "count": 16, "block_size": 64}
        lengths = (2048,) if quick else (2048, 8192, 32768)
        source = {"heads": 16, "kv_heads": 16, "head_dim": 64, "count": 16, "block_size": 64}
        return {
            "naive": NOTES,
            "modes": ("source", "turned", "warm") if quick else
            ("source", "turned", "warm", "cold"),
            "well": [(256, source, "float32"), *((n, record, half) for n in lengths)],
            "memory": [(n, record, half) for n in lengths],
            "rebuild": [(n, record, half) for n in ((1024,) if quick else (1024, 4096, 16384))],
            "precision": [("float32", 256, source), (half, 2048, record)],
            "window": 512,
            "rep_ms": 30 if quick else 100,
        }  # fmt: skip
    small = {"heads": 4, "kv_heads": 2, "head_dim": 32, "count": 4, "block_size": 16}
    return {
        "naive": None,
        "modes": (),
        "well": [],  # the interpreter's time is not a kernel's
        "memory": [],
        "rebuild": [(n, small, "float32") for n in ((256,) if quick else (256, 512, 1024))],
        "precision": [(dtype, 256, small) for dtype in ("float32", "float16", "bfloat16")],
        "window": 32,
        "rep_ms": 20,
    }


def run(
    *,
    quick: bool,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Sequence[str] = PARTS,
) -> Result:
    """Measure every part.

    Parameters
    ----------
    quick : fewer and smaller points (seconds on a laptop CPU).
    device : ``"cuda"`` or ``"cpu"``; the GPU if there is one by default.
    progress : called with ``(done, total, what)``.
    parts : which of :data:`PARTS`, all by default.

    Returns
    -------
    Result
        Rows have ``part``; a row that could not be measured is not there, and ``notes`` say
        why.  Keys: ``naive.<cold|source|turned|warm>.<without|with>`` in seconds for all calls,
        ``….<without|with>.queued`` and ``….overhead`` (with / without − 1),
        ``well.<shape>.n<N>.<without|with>.<gpu|host>`` and ``….overhead.<gpu|host>``,
        ``memory.n<N>.<returned|predicted|weights>``, ``rebuild.n<N>.<branch|total>.<time|peak>``,
        ``precision.<dtype>.<branch>`` and ``….rounded``.
    """
    jobs = Jobs(_plan, quick, device, parts, PARTS)
    job, plan = jobs.add, jobs.plan
    for case in plan["well"]:
        job("well", f"well timed, N = {case[0]}, {case[1]['heads']} heads", _well, *case)
    for case in plan["memory"]:
        job("memory", f"memory, N = {case[0]}", _memory, *case)
    for case in plan["rebuild"]:
        job("rebuild", f"rebuild, N = {case[0]}", _rebuild, *case)
    for case in plan["precision"]:
        job("precision", f"row sums, {case[0]}", _precision, *case)
    # After the others, whose calls have left compiled kernels of these sizes on disk; the one
    # that compiles everything again is the last.
    for mode in plan["modes"]:
        job("naive", f"as the source times it, {mode}", _naive, mode)
    return jobs.run(progress, limit_s=_LIMIT)


def _inputs(n: int, sizes: dict[str, int], dtype: str, device: str) -> Any:
    """q, k, v and three gates between 0 and 1."""
    import torch

    from labkit.dtypes import torch_dtype

    kind = torch_dtype(dtype)
    generator = torch.Generator(device).manual_seed(n)
    heads = (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])
    q, k, v = (
        torch.randn(1, n, h, sizes["head_dim"], generator=generator, device=device).to(kind)
        for h in heads
    )
    gates = [torch.rand(q.shape[:3], generator=generator, device=device).to(kind) for _ in range(3)]
    return q, k, v, *gates


def _where(n: int, sizes: dict[str, int], dtype: str) -> str:
    return (
        f"N = {n}, {sizes['heads']} heads, {sizes['kv_heads']} KV heads, head_dim "
        f"{sizes['head_dim']}, {sizes['count']} blocks of {sizes['block_size']}, {dtype}"
    )


def _returned(n: int, sizes: dict[str, int], dtype: str, device: str, window: int) -> Any:
    """Inputs, and what ``nsa_func`` returns beside its output."""
    q, k, v, *gates = _inputs(n, sizes, dtype, device)
    if device == "cuda":
        from labkit.nsa import nsa_func

        _, weights = nsa_func(
            q, k, v, *gates, block_counts=sizes["count"], block_size=sizes["block_size"],
            window_size=window, return_attn_weights=True,
        )  # fmt: skip
    else:
        weights = _by_reference(q, k, v, gates, sizes, window)
    weights["options"] = {"block_size": sizes["block_size"]}
    return q, k, v, weights


def _by_reference(q, k, v, gates, sizes: dict[str, int], window: int) -> dict[str, Any]:
    """The same from plain PyTorch, where no GPU runs the kernels."""
    from labkit.nsa import naive_nsa_compression, pool_mean
    from labkit.nsa.reference import _compressed, _positions, _selected, _window

    size, scale, at = sizes["block_size"], q.shape[-1] ** -0.5, _positions(q, k)
    k_cmp, v_cmp = (pool_mean(x, size) for x in (k, v))
    blocks, _ = naive_nsa_compression(q, k, v, gates[0], sizes["count"], size, None)
    _, cmp, _ = _compressed(q, k_cmp, v_cmp, length=size, stride=size, scale=scale, at=at)
    _, slc = _selected(q, k, v, blocks, block_size=size, scale=scale)
    _, swa = _window(q, k, v, window_size=window, scale=scale)
    return {
        "compression": {"lse": cmp, "block_indices": blocks},
        "selection": {"lse": slc, "block_indices": blocks},
        "sliding_window": {"lse": swa, "window_size": window},
        "gating_weights": dict(zip(("g_cmp", "g_slc", "g_swa"), gates, strict=True)),
    }


# -- as the source times it ------------------------------------------------------------------------


def _naive(result: Result, plan: dict[str, Any], device: str, mode: str) -> None:
    job = {**plan["naive"], "mode": "source" if mode == "cold" else mode}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, **({"TRITON_CACHE_DIR": folder} if mode == "cold" else {})}
        done = subprocess.run(
            [sys.executable, "-m", "labkit.experiments._nsa_weights_child", json.dumps(job)],
            capture_output=True, text=True, env=env, timeout=_CHILD,
        )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the child ended with {done.returncode}: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    result.rows.append({"part": "naive", "mode": mode, **plan["naive"], **found})
    calls = f"{job['calls']} calls, time.time, one synchronisation; fresh process, {mode}"
    where = f"N = {job['seq_len']}, {job['heads']} heads, head_dim {job['head_dim']}, float32"
    for name in ("without", "with"):
        result.add(f"naive.{mode}.{name}", found[name], "s", f"{calls}, {where}")
        how = f"until all calls were queued, before the synchronisation; {calls}, {where}"
        result.add(f"naive.{mode}.{name}.queued", found[f"{name}_queued"], "s", how)
    overhead = found["with"] / found["without"] - 1
    result.add(f"naive.{mode}.overhead", overhead, "1", f"with / without − 1; {calls}, {where}")


# -- well ------------------------------------------------------------------------------------------


def _well(
    result: Result, plan: dict[str, Any], device: str, n: int, sizes: dict[str, int], dtype: str
) -> None:
    import torch

    from labkit.nsa import nsa_func
    from labkit.timing import time_many

    tensors = _inputs(n, sizes, dtype, device)
    options = {"block_counts": sizes["count"], "block_size": sizes["block_size"],
               "window_size": plan["window"]}  # fmt: skip
    calls = {
        name: functools.partial(nsa_func, *tensors, return_attn_weights=weights, **options)
        for name, weights in (("without", False), ("with", True))
    }
    shape = "source" if n == NOTES["seq_len"] else "record"
    for clock, launch in (("gpu", "hidden"), ("host", "included")):
        with torch.no_grad():
            timings = time_many(
                calls, device=device, rep_ms=plan["rep_ms"], warmup_ms=20, max_samples=200,
                launch=launch,
            )  # fmt: skip
        for name, timing in timings.items():
            samples = [round(ms, 6) for ms in timing.samples_ms]
            result.rows.append(
                {"part": "well", "shape": shape, "seq_len": n, "dtype": dtype, "clock": clock,
                 "what": name, "samples_ms": samples, "median_ms": median(samples),
                 "method": timing.method, **sizes}
            )  # fmt: skip
            how = f"median of {timing.n}, in turns, launches {launch}; {_where(n, sizes, dtype)}"
            result.add(f"well.{shape}.n{n}.{name}.{clock}", timing.median_ms / 1e3, "s", how)
        ratio = 1 / timings.ratios("without")["with"] - 1
        how = f"with / without − 1, median of rounds, launches {launch}; {_where(n, sizes, dtype)}"
        result.add(f"well.{shape}.n{n}.overhead.{clock}", ratio, "1", how)


# -- memory ----------------------------------------------------------------------------------------


def _memory(
    result: Result, plan: dict[str, Any], device: str, n: int, sizes: dict[str, int], dtype: str
) -> None:
    """Bytes alive after the call: with what it returns, less without."""
    import torch

    from labkit.nsa import nsa_func

    tensors = _inputs(n, sizes, dtype, device)
    alive = {}
    for name, weights in (("warm", True), ("without", False), ("with", True)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        with torch.no_grad():
            made = nsa_func(
                *tensors, block_counts=sizes["count"], block_size=sizes["block_size"],
                window_size=plan["window"], return_attn_weights=weights,
            )  # fmt: skip
        torch.cuda.synchronize()
        alive[name] = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
        del made
    returned = alive["with"] - alive["without"]
    names = {"seq_len": n, "heads": sizes["heads"]}
    predicted = returned_bytes(**names, kv_heads=sizes["kv_heads"], count=sizes["count"])
    row = {"returned": returned, "predicted": predicted, "weights": weights_bytes(**names),
           "output": alive["without"]}  # fmt: skip
    result.rows.append({"part": "memory", "dtype": dtype, **names, **sizes, **row})
    where = _where(n, sizes, dtype)
    result.add(f"memory.n{n}.returned", returned, "bytes",
               f"alive after the call with the weights' parts, less without; {where}")  # fmt: skip
    result.add(f"memory.n{n}.predicted", predicted, "bytes", f"three LSEs and the choice; {where}")
    result.add(f"memory.n{n}.weights", row["weights"], "bytes",
               f"the weights of one branch, float32, computed; {where}")  # fmt: skip


# -- rebuilding ------------------------------------------------------------------------------------


def _rebuilders(q, k, weights: dict[str, Any], **options: Any) -> dict[str, Callable]:
    """A function for each branch, and for the gated total."""
    from labkit.nsa import compute_attention_weights_from_lse, total_attention_weights

    size = weights["options"]["block_size"]
    which: dict[str, dict[str, Any]] = {
        "compression": {"block_size": size},
        "selection": {"block_size": size, "block_indices": weights["selection"]["block_indices"]},
        "sliding_window": {"window_size": weights["sliding_window"]["window_size"]},
    }
    calls = {
        name: functools.partial(
            compute_attention_weights_from_lse, weights[name]["lse"], q, k, **which[name], **options
        )
        for name in _BRANCHES
    }
    return {**calls, "total": functools.partial(total_attention_weights, weights, q, k, **options)}


def _rebuild(
    result: Result, plan: dict[str, Any], device: str, n: int, sizes: dict[str, int], dtype: str
) -> None:
    import torch

    from labkit.memory.measuring import CPU_METHOD, CUDA_METHOD, _measure_cpu, _measure_cuda
    from labkit.timing import time_many

    q, k, _, weights = _returned(n, sizes, dtype, device, plan["window"])
    calls = _rebuilders(q, k, weights, heads=[0])
    timings = time_many(
        calls, device=device, rep_ms=plan["rep_ms"], warmup_ms=5, max_samples=50,
        **({"launch": "included"} if device == "cuda" else {}),
    )  # fmt: skip
    for name, call in calls.items():
        if device == "cuda":
            peak, method = _measure_cuda(call, torch.device("cuda"), [])["measured"], CUDA_METHOD
        else:
            (peak, _, _), method = _measure_cpu(call, []), CPU_METHOD
        samples = [round(ms, 6) for ms in timings[name].samples_ms]
        result.rows.append(
            {"part": "rebuild", "branch": name, "seq_len": n, "dtype": dtype, **sizes,
             "peak": peak, "weights": weights_bytes(seq_len=n, heads=1), "samples_ms": samples,
             "median_ms": median(samples), "method": timings[name].method}
        )  # fmt: skip
        where = f"one head of {_where(n, sizes, dtype)}"
        result.add(f"rebuild.n{n}.{name}.time", timings[name].median_ms / 1e3, "s",
                   f"median of {timings[name].n}; {where}")  # fmt: skip
        if peak is not None:
            result.add(f"rebuild.n{n}.{name}.peak", peak, "bytes", f"{method}; {where}")


# -- precision -------------------------------------------------------------------------------------


def _precision(
    result: Result, plan: dict[str, Any], device: str, dtype: str, n: int, sizes: dict[str, int]
) -> None:
    """Largest |row sum − 1| of the rebuilt weights, and with scores rounded to half precision."""
    import torch

    q, k, _, weights = _returned(n, sizes, dtype, device, plan["window"])
    for name, call in _rebuilders(q, k, weights, heads=[0]).items():
        if name == "total":
            continue
        w = call()
        seen = torch.isfinite(weights[name]["lse"][:, :1])
        error = (w.double().sum(-1) - seen.double()).abs().max().item()
        row = {"part": "precision", "branch": name, "dtype": dtype, "seq_len": n, **sizes}
        row["error"] = error
        whose = "kernels" if device == "cuda" else "plain PyTorch in that dtype"
        where = f"LSE of {whose}; {_where(n, sizes, dtype)}"
        result.add(f"precision.{dtype}.{name}", error, "1", f"largest |row sum − 1|; {where}")
        if name == "selection" and dtype in ("float16", "bfloat16"):
            # the same weights, had S been stored in that dtype: e^(rounded S − S) each
            lse = weights[name]["lse"][:, :1, :, None]
            s = torch.where(w > 0, w.log() + lse, float("-inf"))
            rounded = torch.exp(s.to(q.dtype).float() - lse)
            row["rounded"] = (rounded.double().sum(-1) - seen.double()).abs().max().item()
            row["largest_weight_error"] = (
                ((rounded - w).abs() / w.clamp(min=1e-30))[w > 0].max().item()
            )
            how = f"largest relative error of a weight if S were rounded; {where}"
            result.add(f"precision.{dtype}.rounded", row["largest_weight_error"], "1", how)
        result.rows.append(row)
