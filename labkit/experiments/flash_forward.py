r"""The forward kernel: what each step gained, and where the last one stands.

Parts, each of which may be missing from a result with the reason among its notes:

``ceiling``
    torch's matrix product, in a burst and sustained: what the card does at all.
``steps``
    every step of ``labkit.flash.steps``, ``labkit.flash.flash_attention``, torch's fused backends
    and naive attention, in turns, at batch · seq_len = 16k and heads · head_dim = 2048.  The rate
    counts :math:`4 B H N^2 d` operations, half of it if causal, whatever a kernel computes.
``ablation``
    step 3 with the tiles of step 4 and the other way round: which of the two changes it was.
``small``
    decoding, short sequences, few KV heads, float32: ours against torch's default choice, the
    GPU alone and with the host's part.
``memory``
    what a call holds beyond its inputs, predicted, traced and measured.
``speedup``
    claim C17: ours over three baselines, against N.
``traffic``
    (interpreter) the bytes that each step's loads and stores ask for.

Every output is compared with float64; ``error`` in a row is relative, over some rows of one head.

Taught in chapter 08 (what does the kernel look like?).  Claims C11, C17.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from labkit.errors import ArgumentError, check_choice
from labkit.experiments import Progress, Result, has_gpu
from labkit.experiments import steps as each
from labkit.experiments._jobs import first_line

__all__ = ["CHAPTERS", "NEEDS_GPU", "PARTS", "TITLE", "extra_bytes", "gain", "run"]

TITLE = "Forward: the kernel step by step, against torch's and the matrix units' ceiling"
CHAPTERS = ("08",)
NEEDS_GPU = False

#: what ``run`` measures, in order
PARTS = ("ceiling", "steps", "ablation", "small", "memory", "speedup", "traffic")
_TOKENS, _WIDTH = 16384, 2048
_BACKENDS = ("flash", "cudnn", "efficient")
#: at most so many samples of a row are kept: a record is read by people too
_SAMPLES = 25


def extra_bytes(batch: int, heads: int, seq_len: int, head_dim: int, itemsize: int) -> int:
    """What the forward pass may hold beyond its inputs: O, and one float32 of LSE per row."""
    return batch * heads * seq_len * (head_dim * itemsize + 4)


def gain(record: Any, step: int, head_dim: int, seq_len: int, *, causal: bool = False) -> float:
    """Time of the step before over the time of ``step``, as a result or record has it.

    Raises
    ------
    ArgumentError
        if one of the two was not measured there.
    """
    at = {"part": "steps", "head_dim": head_dim, "seq_len": seq_len, "causal": causal}
    found = [record.select(name=f"v{number}", **at) for number in (step - 1, step)]
    if not all(found):
        raise ArgumentError(
            "step", step, f"was not measured at {at}.", "Ask for one of the record's rows."
        )
    before, after = (rows[0]["median_ms"] for rows in found)
    return before / after


# -- the plan ------------------------------------------------------------------------------------


def _plan(quick: bool, device: str) -> dict[str, Any]:
    if device == "cpu":
        return {
            "steps": [(16, 97, causal) for causal in (False, True)],
            "stepped": (97,),
            "tokens": 1,
            "width": 32,
            "dtype": "float16",
            "traffic": [(32, 192, causal) for causal in (False, True)],
            "memory": [(32, 96)],
            "parts": ("steps", "memory", "traffic"),
        }
    import torch

    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    both = (False, True)
    if quick:
        return {
            "steps": [(128, 4096, causal) for causal in both],
            "stepped": (4096,),
            "tokens": 4096,
            "width": _WIDTH,
            "dtype": half,
            "rep_ms": 20,
            "ablation": [],
            "small": _small()[:4],
            "memory": [(64, 4096)],
            "speedup": (128, 2048),
            "parts": ("steps", "small", "memory", "speedup"),
        }
    return {
        "steps": [(d, n, c) for d in (64, 128) for n in (1024, 4096, 16384) for c in both],
        "stepped": (4096, 16384),
        "tokens": _TOKENS,
        "width": _WIDTH,
        "dtype": half,
        "rep_ms": 60,
        "ablation": [(64, 4096, False), (128, 4096, False), (128, 4096, True)],
        "small": _small(),
        "memory": [(64, 4096), (128, 16384)],
        "speedup": (128, 512, 2048, 4096),
        "parts": ("ceiling", "steps", "ablation", "small", "memory", "speedup"),
    }


def _small() -> list[dict[str, Any]]:
    """Shapes at which a kernel for long sequences could embarrass itself."""

    def shape(name, batch, heads, kv_heads, nq, nk, d, dtype="bfloat16", causal=False):
        return {
            "name": name, "batch": batch, "heads": heads, "kv_heads": kv_heads, "seq_len_q": nq,
            "seq_len_k": nk, "head_dim": d, "dtype": dtype, "causal": causal,
        }  # fmt: skip

    shapes = [
        shape("decode_16k", 1, 32, 32, 1, 16384, 128),
        shape("n512", 1, 16, 16, 512, 512, 64, causal=True),
        shape("float32_n1024", 1, 16, 16, 1024, 1024, 64, "float32"),
        shape("decode_gqa_16k", 1, 32, 4, 1, 16384, 128),
    ]
    shapes += [shape(f"decode_{n // 1024}k", 1, 32, 32, 1, n, 128) for n in (1024, 4096, 65536)]
    shapes += [shape(f"decode_gqa_{n // 1024}k", 1, 32, 4, 1, n, 128) for n in (1024, 4096, 65536)]
    shapes += [shape("decode_batch16_4k", 16, 32, 4, 1, 4096, 128)]
    shapes += [shape(f"n{n}", 1, 16, 16, n, n, 64, causal=True) for n in (128, 256)]
    shapes += [shape("n512_d128", 1, 16, 16, 512, 512, 128, causal=True)]
    shapes += [shape("gqa_n4096", 1, 32, 4, 4096, 4096, 128, causal=True)]
    shapes += [shape("float32_n256", 1, 16, 16, 256, 256, 64, "float32", True)]
    shapes += [shape("float32_n4096", 1, 16, 16, 4096, 4096, 64, "float32")]
    shapes += [shape("float32_n1024_d128", 1, 16, 16, 1024, 1024, 128, "float32", True)]
    return shapes


# -- running -------------------------------------------------------------------------------------


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
    parts : some of :data:`PARTS`; by default all that the device can.

    Returns
    -------
    Result
        ``results``: per size ``rate_<name>_<size>``, ``ratio_<backend>_<size>`` (time of the
        backend over ours), ``gain_v<n>_<size>`` (time of the step before over this one's),
        ``share_<size>`` (of the ceiling), their least and largest; ``small_*``, ``memory_*``,
        ``c17_*``, ``traffic_*``.  A size is ``d<head_dim>_n<seq_len>``, with ``_causal``.
        ``rows``: one per measured function, ``part`` as in the list above.
    """
    import torch

    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    plan = _plan(quick, device)
    for part in parts or ():
        check_choice("part", part, PARTS)
    work = [
        (part, item)
        for part in plan["parts"]
        if parts is None or part in parts
        for item in (plan[part] if isinstance(plan.get(part), list) else [None])
    ]
    result = Result()
    torch.manual_seed(0)
    measure_part = {
        "ceiling": _ceiling, "steps": _steps, "ablation": _ablation, "small": _one_small,
        "memory": _memory, "speedup": _speedup, "traffic": _traffic,
    }  # fmt: skip
    with torch.no_grad():
        for part, item in each(work, progress, lambda w: f"{w[0]} {w[1] or ''}"):
            try:
                measure_part[part](result, plan, device, item)
            except Exception as error:  # one point fewer, not one record fewer
                result.notes.append(f"{part} {item}: {first_line(error)}")
            if device == "cuda":
                torch.cuda.empty_cache()
    _summarise(result)
    return result


def _ceiling(result: Result, plan: dict[str, Any], device: str, _: None) -> None:
    import torch

    from labkit.dtypes import torch_dtype
    from labkit.experiments.hierarchy import _burst_and_sustained
    from labkit.timing import time_fn

    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch_dtype(plan["dtype"])) for _ in range(2))
    _burst_and_sustained(result, plan["dtype"], n, lambda: a @ b, time_fn)
    for row in result.rows:
        row.setdefault("part", "ceiling")


def _draw(batch, heads, kv_heads, nq, nk, d, dtype, device):
    import torch

    from labkit.dtypes import torch_dtype

    made = {"device": device, "dtype": torch_dtype(dtype)}
    q = torch.randn(batch, heads, nq, d, **made)
    k, v = (torch.randn(batch, kv_heads, nk, d, **made) for _ in range(2))
    return q, k, v


def _shape(plan: dict[str, Any], head_dim: int, seq_len: int) -> tuple[int, int]:
    return max(1, plan["tokens"] // seq_len), plan["width"] // head_dim


def _steps(result: Result, plan: dict[str, Any], device: str, item: tuple[int, int, bool]) -> None:
    """All implementations at one size, in turns."""
    from labkit.flash.steps import STEPS

    d, n, causal = item
    batch, heads = _shape(plan, d, n)
    q, k, v = _draw(batch, heads, heads, n, n, d, plan["dtype"], device)
    functions: dict[str, Callable[[], Any]] = {}
    if n in plan["stepped"]:
        for step in STEPS[: 5 if device == "cpu" else 6]:
            functions[step.key] = functools.partial(step.forward, q, k, v, causal=causal)
    functions["ours"] = functools.partial(_ours, q, k, v, causal=causal)
    if device == "cuda":
        for backend in _BACKENDS:
            functions[backend] = functools.partial(_sdpa, backend, q, k, v, causal=causal)
        if n <= 4096:
            functions["naive"] = functools.partial(_naive, q, k, v, causal=causal)
    labels = {"part": "steps", "head_dim": d, "seq_len": n, "causal": causal, "batch": batch}
    labels |= {"heads": heads, "dtype": plan["dtype"]}
    flops = 4 * batch * heads * n * n * d // (2 if causal else 1)
    _race(result, plan, device, functions, labels, flops, _oracle(q, k, v, causal=causal))
    for row in result.select(**labels):
        if tried := _tried(row["name"], q, k, v, causal):
            row["tried_ms"] = tried


def _tried(name: str, q, k, v, causal: bool) -> dict[str, float]:
    """Which configurations a step tried on these tensors, and the time of each."""
    import json
    from contextlib import suppress

    from labkit.flash import tuning
    from labkit.flash.steps import v5_tuned, v6_by_hand

    call = v5_tuned.call_for(q, k, causal, q.shape[3] ** -0.5)
    if name == "v6":
        return v6_by_hand.tried.get(v5_tuned.problem_for(q, k, v, call, None).key, {})
    if name == "v5":
        key = v5_tuned.problem_for(q, k, v, call, "step 5 is without it").key
        with suppress(OSError, ValueError, KeyError):
            return json.loads(tuning.cache_file().read_text("utf-8"))[key]["ms"]
    return {}


def _ablation(result: Result, plan: dict[str, Any], device: str, item: tuple) -> None:
    """Copy engine and size of tiles, one without the other; and two programs per SM."""
    from labkit.flash.steps import STEPS

    d, n, causal = item
    batch, heads = _shape(plan, d, n)
    q, k, v = _draw(batch, heads, heads, n, n, d, plan["dtype"], device)
    small = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    large = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    pair = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    functions = {}
    for step in (STEPS[2], STEPS[3]):
        for name, tiles in (("small", small), ("large", large), ("pair", pair)):
            functions[f"{step.key}_{name}"] = functools.partial(
                step.module.forward, q, k, v, causal=causal, tiles=tiles
            )
    labels = {"part": "ablation", "head_dim": d, "seq_len": n, "causal": causal, "batch": batch}
    labels |= {"heads": heads, "dtype": plan["dtype"]}
    flops = 4 * batch * heads * n * n * d // (2 if causal else 1)
    _race(result, plan, device, functions, labels, flops, _oracle(q, k, v, causal=causal))


def _race(result, plan, device, functions, labels, flops, oracle) -> None:
    """Check each function once, time those that ran in turns, add a row for each."""
    from labkit.timing import time_many

    errors: dict[str, float] = {}
    for name, fn in list(functions.items()):
        try:
            out = fn()
            errors[name] = _error(out[0] if isinstance(out, tuple) else out, oracle)
            del out
        except Exception as error:
            del functions[name]
            where = {k: labels[k] for k in ("head_dim", "seq_len", "causal") if k in labels}
            result.notes.append(f"{name} at {where}: {first_line(error)}")
    if device == "cpu":  # the interpreter's time says nothing about a GPU
        for name, error in errors.items():
            result.rows.append({**labels, "name": name, "flops": flops, "error": error})
        return
    timings = time_many(
        functions, warmup_ms=plan["rep_ms"] / 2, rep_ms=plan["rep_ms"], max_samples=_SAMPLES
    )
    for name in functions:
        row = {**labels, "name": name, "flops": flops, "error": errors[name]}
        row["rate"] = flops / (timings[name].median_ms / 1e3)
        result.rows.append(_timed(row, timings[name]))


def _timed(row: dict[str, Any], timing: Any) -> dict[str, Any]:
    from statistics import median

    samples = [round(s, 6) for s in timing.samples_ms]
    return {**row, "median_ms": median(samples), "samples_ms": samples, "method": timing.method}


def _one_small(result: Result, plan: dict[str, Any], device: str, s: dict[str, Any]) -> None:
    """One small shape: ours, and what torch chooses by itself."""
    from labkit.experiments.scaling import kernels
    from labkit.timing import time_many

    sizes = (s["batch"], s["heads"], s["kv_heads"], s["seq_len_q"], s["seq_len_k"], s["head_dim"])
    q, k, v = _draw(*sizes, s["dtype"], device)
    grouped = s["heads"] != s["kv_heads"]
    functions = {
        "ours": lambda: _ours(q, k, v, causal=s["causal"]),
        "torch": lambda: _default(q, k, v, causal=s["causal"], grouped=grouped),
    }
    if s["dtype"] == "float32":
        functions["ours_tf32x3"] = lambda: _ours(q, k, v, causal=s["causal"], precision="tf32x3")
    oracle = _oracle(q, k, v, causal=s["causal"])
    errors = {name: _error(fn(), oracle) for name, fn in functions.items()}
    for launch in ("hidden", "included"):
        timings = time_many(
            functions, warmup_ms=10, rep_ms=plan["rep_ms"], launch=launch, max_samples=_SAMPLES
        )
        for name, fn in functions.items():
            row = {**s, "part": "small", "shape": s["name"], "name": name, "launch": launch}
            row["error"] = errors[name]
            if launch == "hidden":
                row["kernels"] = [kernel[:100] for kernel in kernels(fn, device)]
            result.rows.append(_timed(row, timings[name]))


def _memory(result: Result, plan: dict[str, Any], device: str, item: tuple[int, int]) -> None:
    from labkit.dtypes import itemsize
    from labkit.flash import flash_attention
    from labkit.memory import measure

    d, n = item
    batch, heads = _shape(plan, d, n)
    q, k, v = _draw(batch, heads, heads, n, n, d, plan["dtype"], device)
    predicted = extra_bytes(batch, heads, n, d, itemsize(plan["dtype"]))
    flash_attention(q, k, v, return_lse=True)  # tunes, and what tuning holds is not the call's
    found = measure(flash_attention, q, k, v, return_lse=True, predicted=predicted)
    result.rows.append({
        "part": "memory", "head_dim": d, "seq_len": n, "batch": batch, "heads": heads,
        "dtype": plan["dtype"], "predicted_bytes": predicted, "traced_bytes": found.traced,
        "measured_bytes": found.measured, "memory_method": found.method,
        "scores_bytes": batch * heads * n * n * itemsize(plan["dtype"]),
    })  # fmt: skip


def _speedup(result: Result, plan: dict[str, Any], device: str, _: None) -> None:
    """C17: how many times faster flash attention is, by baseline, N, and what is counted."""
    import torch

    from labkit.flash.steps import STEPS
    from labkit.timing import time_many

    batch, heads, d = 1, 8, 64
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to mean float32
    try:
        for n in plan["speedup"]:
            q, k, v = _draw(batch, heads, heads, n, n, d, "float32", device)
            half = [x.to(torch.bfloat16) for x in (q, k, v)]
            functions = {
                "naive_float32": lambda a=(q, k, v): _naive(*a),
                "naive_bfloat16": lambda a=half: _naive(*a),
                "v1": lambda a=half: STEPS[0].forward(*a),
                "ours": lambda a=half: _ours(*a),
                "ours_float32": lambda a=(q, k, v): _ours(*a),
            }
            for launch in ("hidden", "included"):
                timings = time_many(
                    functions, warmup_ms=15, rep_ms=plan["rep_ms"], launch=launch,
                    max_samples=_SAMPLES,
                )  # fmt: skip
                for name in functions:
                    row = {"part": "speedup", "name": name, "seq_len": n, "batch": batch}
                    row |= {"heads": heads, "head_dim": d, "launch": launch}
                    result.rows.append(_timed(row, timings[name]))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _traffic(result: Result, plan: dict[str, Any], device: str, item: tuple) -> None:
    """Bytes by tl.load and tl.store, counted in the interpreter: what each step asks for."""
    from labkit import io
    from labkit.flash.steps import STEPS

    d, n, causal = item
    q, k, v = _draw(1, 1, 1, n, n, d, plan["dtype"], device)
    for step in STEPS[:4]:
        tiles = {"tiles": step.module.tiles_for(d, 2)} if step.number == 4 else {}
        with io.count() as traffic:
            step.module.forward(q, k, v, causal=causal, **tiles)
        result.rows.append({
            "part": "traffic", "name": step.key, "head_dim": d, "seq_len": n, "causal": causal,
            "loaded_bytes": traffic.loaded, "stored_bytes": traffic.stored,
            "compulsory_bytes": 3 * n * d * 2,
        })  # fmt: skip


# -- who computes it -----------------------------------------------------------------------------


def _ours(q, k, v, *, causal: bool = False, precision: str | None = None):
    from labkit.flash import flash_attention

    return flash_attention(q, k, v, causal=causal, precision=precision)


def _naive(q, k, v, *, causal: bool = False):
    from labkit.naive import naive_attention

    return naive_attention(q, k, v, causal=causal)


def _sdpa(backend: str, q, k, v, *, causal: bool = False):
    from torch.nn.functional import scaled_dot_product_attention

    from labkit.experiments.roofline import _only

    with _only(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def _default(q, k, v, *, causal: bool, grouped: bool):
    """What a user gets who asks torch for attention and for nothing else."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


# -- errors --------------------------------------------------------------------------------------


@contextmanager
def _exact() -> Iterator[None]:
    """No TF32 in the oracle's own products; float64 has none, but q·k in float32 would."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _oracle(q, k, v, *, causal: bool):
    """O in float64 of the last 64 rows of the last head of the last batch element.

    The last rows, because they see most keys; the last head, because offsets are largest there.
    """
    import torch

    group = q.shape[1] // k.shape[1]
    head = (q.shape[1] - 1) // group
    rows = min(64, q.shape[2])
    q64, k64, v64 = q[-1, -1, -rows:].double(), k[-1, head].double(), v[-1, head].double()
    with _exact():
        s = q64 @ k64.mT * q.shape[3] ** -0.5
        if causal:
            i = torch.arange(k.shape[2] - rows, k.shape[2], device=q.device)[:, None]
            j = torch.arange(k.shape[2], device=q.device)[None, :]
            s = s.masked_fill(j > i, float("-inf"))
        return torch.softmax(s, -1) @ v64


def _error(out, oracle) -> float:
    """‖O − float64‖ / ‖float64‖ over the oracle's rows."""
    difference = out[-1, -1, -oracle.shape[0] :].double() - oracle
    return (difference.norm() / oracle.norm()).item()


# -- what pages quote ------------------------------------------------------------------------------


def _size(row: dict[str, Any]) -> str:
    return f"d{row['head_dim']}_n{row['seq_len']}" + ("_causal" if row["causal"] else "")


def _summarise(result: Result) -> None:
    _summarise_steps(result)
    _summarise_ablation(result)
    _summarise_small(result)
    for row in result.select(part="memory"):
        size = f"d{row['head_dim']}_n{row['seq_len']}"
        if row["measured_bytes"]:
            how = f"peak beyond the inputs at {size}, {row['memory_method']}"
            result.add(f"memory_measured_{size}", row["measured_bytes"], "bytes", how)
            over = row["measured_bytes"] / row["predicted_bytes"]
            result.add(f"memory_ratio_{size}", over, "1", "measured over O and LSE")
        result.add(f"memory_predicted_{size}", row["predicted_bytes"], "bytes", "O and LSE")
    for row in result.select(part="speedup"):
        if row["name"] == "ours":
            continue
        at = {"part": "speedup", "seq_len": row["seq_len"], "launch": row["launch"]}
        ours = result.select(name="ours", **at)[0]["median_ms"]
        key = f"c17_{row['name']}_n{row['seq_len']}"
        if row["launch"] == "included":
            key += "_host"
        counted = "the GPU alone" if row["launch"] == "hidden" else "with the host's part"
        how = f"time of {row['name']} over labkit.flash in bfloat16, 8 heads, d = 64, {counted}"
        result.add(key, row["median_ms"] / ours, "1", how)
    for row in result.select(part="traffic"):
        times = row["loaded_bytes"] / row["compulsory_bytes"]
        how = "bytes loaded over the bytes of Q, K and V, counted in the interpreter"
        result.add(f"traffic_{row['name']}_{_size(row)}", times, "1", how)


def _summarise_steps(result: Result) -> None:
    from labkit.flash.steps import STEPS

    ceiling = next((k for k in result.results if k.endswith("_sustained")), None)
    ratios: dict[str, list[float]] = {}
    rows = [r for r in result.select(part="steps") if "median_ms" in r]
    for size in dict.fromkeys(_size(r) for r in rows):
        here = {r["name"]: r for r in rows if _size(r) == size}
        for name, row in here.items():
            how = f"counted operations over median time, {row['batch']} × {row['heads']} heads"
            result.add(f"rate_{name}_{size}", row["rate"], "FLOP/s", how)
        for step in STEPS[1:]:
            if step.key in here and f"v{step.number - 1}" in here:
                change = here[f"v{step.number - 1}"]["median_ms"] / here[step.key]["median_ms"]
                how = f"time of step {step.number - 1} over step {step.number}"
                result.add(f"gain_{step.key}_{size}", change, "1", how)
        if "ours" not in here:
            continue
        for name in (*_BACKENDS, "naive", "v1"):
            if name in here:
                ratio = here[name]["median_ms"] / here["ours"]["median_ms"]
                result.add(f"ratio_{name}_{size}", ratio, "1", f"time of {name} over ours")
                kind = "long" if here[name]["seq_len"] >= 4096 else "short"
                ratios.setdefault(f"{name}_{kind}", []).append(ratio)
        if ceiling:
            share = here["ours"]["rate"] / result.value(ceiling)
            result.add(f"share_{size}", share, "1", f"rate of ours over {ceiling}")
    for name, values in ratios.items():
        how = f"of ratio_{name.rsplit('_', 1)[0]}_* at N ≥ 4096"
        if name.endswith("short"):
            how = how.replace("≥ 4096", "< 4096")
        result.add(f"ratio_{name}_least", min(values), "1", f"smallest {how}")
        result.add(f"ratio_{name}_most", max(values), "1", f"largest {how}")


def _summarise_ablation(result: Result) -> None:
    for row in result.select(part="ablation"):
        key = f"ablation_{row['name']}_{_size(row)}"
        result.add(key, row["rate"], "FLOP/s", "counted operations over median time")


def _summarise_small(result: Result) -> None:
    worst: dict[str, float] = {}
    for launch, word in (("hidden", "gpu"), ("included", "host")):
        rows = {(r["shape"], r["name"]): r for r in result.select(part="small", launch=launch)}
        for shape in dict.fromkeys(shape for shape, _ in rows):
            ours, torch = (rows[shape, name]["median_ms"] for name in ("ours", "torch"))
            how = "time of ours over torch's default choice, "
            how += "the GPU alone" if word == "gpu" else "with the host's part"
            result.add(f"small_{word}_{shape}", ours / torch, "1", how)
            result.add(f"small_{word}_{shape}_time", ours / 1e3, "s", "median time of ours")
            if split := rows.get((shape, "ours_tf32x3")):
                what = how.replace("ours", 'ours with precision="tf32x3"')
                ratio = split["median_ms"] / torch
                result.add(f"small_{word}_{shape}_tf32x3", ratio, "1", what)
            worst[word] = max(worst.get(word, 0.0), ours / torch)
    for word, value in worst.items():
        result.add(f"small_{word}_worst", value, "1", f"largest of small_{word}_*")
