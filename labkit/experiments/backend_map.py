r"""Which implementation of attention wins where, and what SDPA picks by itself.

Parts, each of which may be missing from a result with the reason among its notes:

``switch``
    claim C24: at the shape that we took for the report's, what SDPA picks at each of many lengths
    around 1024, and which kernels that backend then launches; and what the report's recipe for
    forcing flash attention really runs.
``layer``
    claim C20: a training step of that layer and of a larger one, float32 against half precision,
    by length.
``policy``
    the same of attention alone: ``labkit.dispatch.measure_policy`` at that shape.
``map``
    SDPA's flash, cuDNN, efficient and math, labkit.flash and naive attention, by head_dim,
    seq_len, dtype and mask, forward and with the backward pass: the GPU's time, in turns.  With
    every shape, which backend SDPA picks and whether that was the fastest of its backends.

In ``map`` batch · seq_len is 8192 (one sequence above that) and heads · head_dim is 1024.
labkit.flash runs with the tiles that it takes by rule, untuned: tuning a hundred shapes would take
minutes.  Every timed row carries its error against float64, over some rows of one head.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).  Claims C20, C24.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from labkit.errors import ArgumentError, check_choice
from labkit.experiments import Progress, Result, has_gpu
from labkit.experiments import steps as each
from labkit.experiments._correctness import _environment
from labkit.experiments._jobs import first_line, untuned

__all__ = ["CHAPTERS", "NEEDS_GPU", "PARTS", "TITLE", "run", "winners"]

TITLE = "The backends of attention by shape and dtype: who wins, what SDPA picks, who decides"
CHAPTERS = ("10",)
NEEDS_GPU = False

#: what ``run`` measures, in order
PARTS = ("switch", "layer", "policy", "map")
_TOKENS, _WIDTH = 8192, 1024
#: the layer that stands for the report's, which states no size: dim 256 in 4 heads, batch 4
_REPORT = {"batch": 4, "heads": 4, "kv_heads": 4, "head_dim": 64}
_FUSED = ("flash", "cudnn", "efficient")
_TORCH = (*_FUSED, "math", "flash_cpu")
_SAMPLES = 15
#: S of naive and math attention is left out above this
_LOG_SCORES = 30
_SCORES = 2**_LOG_SCORES
#: how long nothing is timed for the sake of those who compile
_PATIENCE_S = 40
#: faster by less than this share of the time is no difference
_NOISE = 0.03


# -- the plan ------------------------------------------------------------------------------------


def _shape(seq_len: int, head_dim: int, **changes: Any) -> Any:
    from labkit.dispatch.measure import Shape

    heads = _WIDTH // head_dim
    sizes = {"batch": max(1, _TOKENS // seq_len), "heads": heads, "kv_heads": heads}
    return Shape(seq_len, head_dim=head_dim, **(sizes | changes))


def _group(kind: str, shape: Any, backends: Sequence[str], dtypes: Sequence[str]) -> dict[str, Any]:
    return {"kind": kind, "shape": shape, "backends": tuple(backends), "dtypes": tuple(dtypes)}


def _plan(quick: bool, device: str) -> dict[str, Any]:
    both = (False, True)
    if device == "cpu":
        from labkit.dispatch.measure import Shape, candidates

        small = [
            Shape(n, heads=2, kv_heads=2, head_dim=32, causal=c, training=c)
            for n in (32, 64) for c in both
        ]  # fmt: skip
        return {
            "lengths": (128, 256, 512, 1000, 1024, 1025, 2048),
            "watched": (32, 64),
            "dtypes": ("float32", "bfloat16"),
            "forced": ("flash_cpu", "math"),
            "layer": [("tiny", (16, 32), ("fp32", "autocast_bf16"))],
            "policy": {"seq_lens": (32, 64), "dtypes": ("float32", "bfloat16"), "budget_s": 2},
            "map": [_group("dense", s, candidates("cpu"), ("float32",)) for s in small],
            "rep_ms": 2,
            "limit_s": 20,
        }
    import torch

    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    everybody = (*_FUSED, "math", "ours", "naive")
    plan: dict[str, Any] = {
        "lengths": tuple(sorted({*range(64, 4097, 64), 1000, 1023, 1025, 1056, 2047, 2049})),
        "watched": (128, 256, 512, 1000, 1024, 1025, 1536, 2048, 4096),
        "dtypes": ("float16", "float32"),
        "forced": _FUSED,
        "rep_ms": 8,
        "limit_s": 140,
    }
    if quick:
        plan |= {
            "watched": (512, 1024, 2048),
            "layer": [("report", (128, 1024), ("fp32", "autocast_fp16"))],
            "policy": {
                "seq_lens": (128, 1024, 4096), "budget_s": 8, "dtypes": ("float32", "float16"),
            },
            "map": [
                _group("dense", _shape(n, 64, causal=True, training=t), everybody, (half,))
                for n in (128, 1024, 4096) for t in both
            ],
            "limit_s": 40,
        }  # fmt: skip
        return plan
    lengths = (1024, 128, 4096, 16384, 512, 2048)  # a map cut short is a coarse one
    some = lengths[:4]
    groups = [
        _group("dense", _shape(n, d, causal=c, training=t), everybody, (half,))
        for n in lengths for d in (64, 128) for c in (True, False) for t in both
    ]  # fmt: skip
    groups += [
        _group("dense", _shape(n, 64, training=t), ("efficient", "math", "ours", "naive"),
               ("float32", "tf32"))
        for n in (1024, 128, 4096, 512) for t in both
    ]  # fmt: skip
    groups += [
        _group("mask", _shape(n, 64, training=t), backends, (dtype,))
        for n in (1024, 4096) for t in both
        for backends, dtype in ((("cudnn", "efficient", "math"), half),
                                (("efficient", "math"), "float32"))
    ]  # fmt: skip
    groups += [
        _group("gqa", _shape(n, 128, kv_heads=2, causal=True, training=t),
               (*_FUSED, "math", "ours"), (half,))
        for n in (1024, 4096) for t in both
    ]  # fmt: skip
    groups += [
        _group("dense", _shape(n, d, causal=True, training=t), everybody, (half,))
        for n in some for d in (32, 256) for t in both
    ]  # fmt: skip
    layers = (64, 128, 256, 512, 1024, 2048)
    return plan | {
        "layer": [
            ("report", layers, ("fp32", "tf32", "autocast_fp16", "fp16")),
            ("realistic", layers, ("fp32", "autocast_fp16")),
        ],
        "policy": {
            "seq_lens": (32, 128, 256, 512, 1024, 4096), "budget_s": 12,
            "dtypes": ("float32", "tf32", "float16"),
        },
        "map": groups,
    }  # fmt: skip


# -- running -------------------------------------------------------------------------------------


def run(
    *,
    quick: bool,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Sequence[str] | None = None,
    limit_s: float | None = None,
) -> Result:
    """Measure the parts that this device can.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    parts : some of :data:`PARTS`; all by default.
    limit_s : begin no further shape after so many seconds; 140 by default for the full run.

    Returns
    -------
    Result
        ``results``: ``pick_*`` (how often SDPA's pick was the fastest of its backends),
        ``wins_<backend>_*``, ``time_<backend>_<dtype>_<size>``, ``switch_*``, ``recipe_*`` (C24),
        ``crossing_*``, ``gain_*``, ``layer_*`` (C20).  ``rows``: ``part`` as in the list above.
    """
    import torch

    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    for part in parts or ():
        check_choice("part", part, PARTS)
    plan = _plan(quick, device)
    end = time.perf_counter() + (limit_s or plan["limit_s"])
    wanted = PARTS if parts is None else tuple(parts)
    work = [("switch", dtype) for dtype in (*plan["dtypes"], "recipe")]
    work += [("layer", item) for item in plan["layer"]]
    work += [("policy", None)]
    work += [("map", group) for group in plan["map"]]
    work = [(part, item) for part, item in work if part in wanted]
    result, left_out = Result(), []
    torch.manual_seed(0)
    measure = {"switch": _switch, "layer": _layer, "policy": _policy, "map": _map}
    with untuned(), _compiling(plan, wanted, device, result) as compiled:
        for part, item in each(work, progress, _said):
            if part != "switch":
                compiled()  # a time beside fifteen compilers would be theirs, too
            if time.perf_counter() > end:
                left_out.append(_said((part, item)))
                continue
            try:
                measure[part](result, plan, device, item)
            except Exception as error:  # one shape fewer, not one record fewer
                result.notes.append(f"{_said((part, item))}: {first_line(error)}")
            if device == "cuda":
                torch.cuda.empty_cache()
    if left_out:
        result.notes.append(f"Left out when time was up: {'; '.join(left_out)}.")
    result.notes = list(dict.fromkeys(result.notes))
    _summarise(result)
    return result


def _said(work: tuple[str, Any]) -> str:
    part, item = work
    if part != "map":
        return f"{part} {item[0] if part == 'layer' else item or ''}".strip()
    return f"{item['kind']} {'/'.join(item['dtypes'])} {_size(item['shape'].labels())}"


@contextmanager
def _compiling(
    plan: dict[str, Any], wanted: Sequence[str], device: str, result: Result
) -> Iterator[Callable[[], None]]:
    """Start processes that compile labkit's kernels; gives a function that waits for them."""
    shares = _shares(plan, wanted) if device == "cuda" else []
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    shares = [[s for share in shares[i::workers] for s in share] for i in range(workers)]
    children = []
    for share in filter(None, shares):
        child = subprocess.Popen(
            [sys.executable, "-m", "labkit.experiments._map_child"], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=_environment(),
        )  # fmt: skip
        json.dump(share, child.stdin)
        child.stdin.close()
        children.append(child)
    start = time.perf_counter()

    def wait() -> None:
        """Until they are done or their time is over; those that are not go on beside the clock."""
        for child in children:
            try:
                child.wait(timeout=max(0.0, _PATIENCE_S - (time.perf_counter() - start)))
            except subprocess.TimeoutExpired:
                result.notes.append(
                    f"Some kernels were still compiled, by other processes, after {_PATIENCE_S} s."
                )

    try:
        yield wait
    finally:
        for child in children:
            child.kill()
            child.wait()


def _shares(plan: dict[str, Any], wanted: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The shapes of labkit's kernels, one list for each that compile the same kernels."""
    shares: dict[tuple, list[dict[str, Any]]] = {}
    groups = plan["map"] if "map" in wanted else []
    if "policy" in wanted:
        groups = groups + [
            _group("report", shape, ("ours",), plan["policy"].get("dtypes", _all_dtypes()))
            for shape in _policy_shapes(plan)
        ]  # fmt: skip
    for group in groups:
        shape = group["shape"]
        # with its backward pass a shape compiles the forward kernel, too
        if "ours" in group["backends"] and shape.training:
            for dtype in group["dtypes"]:
                # short and long sequences take different tiles, and so different kernels
                key = (dtype, shape.head_dim, shape.causal, shape.seq_len <= 1024, group["kind"])
                shares.setdefault(key, []).append({**shape.labels(), "dtype": dtype})
    return sorted(shares.values(), key=len, reverse=True)


def _all_dtypes() -> tuple[str, ...]:
    from labkit.dispatch.compute import DTYPES

    return DTYPES


def _policy_shapes(plan: dict[str, Any]) -> list[Any]:
    from labkit.dispatch.measure import Shape

    return [Shape(n, training=True, **_REPORT) for n in plan["policy"]["seq_lens"]]


# -- C24: does SDPA switch ----------------------------------------------------------------------


def _switch(result: Result, plan: dict[str, Any], device: str, dtype: str) -> None:
    """What SDPA picks at each length, and which kernels each backend launches at some."""
    if dtype == "recipe":
        return _recipe(result, plan, device)
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from labkit.dispatch import explain, force, ran
    from labkit.dispatch.measure import Shape

    base = {"part": "switch", "dtype": dtype, **_REPORT}
    picks = {}
    for n in plan["lengths"]:
        for training in (False, True):
            shape = Shape(n, training=training, **_REPORT)
            picks[n, training] = explain(*shape.empty(dtype, device)).would_run
            result.rows.append(
                {**base, "seq_len": n, "training": training, "picked": picks[n, training]}
            )
    for n in plan["watched"]:
        q, k, v, _ = Shape(n, **_REPORT).draw(dtype, device)
        seen = ran(sdpa, q, k, v)
        picked = explain(q, k, v).would_run
        row = {**base, "seq_len": n, "backend": "sdpa", "ran": seen.backend, "picked": picked}
        result.rows.append({**row, "kernels": _names(seen)})
        for name in plan["forced"]:
            try:
                with force(name, inputs=(q, k, v)):
                    seen = ran(sdpa, q, k, v)
            except ArgumentError:
                continue
            row = {**base, "seq_len": n, "backend": name, "ran": seen.backend}
            result.rows.append({**row, "kernels": _names(seen)})


def _names(seen: Any) -> list[str]:
    """The kernels of attention on a GPU, the operators of torch on a CPU, to be compared."""
    names = seen.attention_kernels or tuple(n for n in seen.operators if "attention" in n)
    return [name[:160] for name in names]


def _recipe(result: Result, plan: dict[str, Any], device: str) -> None:
    """What ``torch.backends.cuda.sdp_kernel``, as the report calls it, comes to."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from labkit.dispatch import ran
    from labkit.dispatch.measure import Shape

    if device == "cuda":
        _order_of_ones_own(result)
    for dtype in plan["dtypes"]:
        q, k, v, _ = Shape(1024 if device == "cuda" else 64, **_REPORT).draw(dtype, device)
        row = {"part": "recipe", "dtype": dtype, "ran": None, "error": None, "warned": None}
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                with torch.backends.cuda.sdp_kernel(
                    enable_flash=True, enable_math=False, enable_mem_efficient=False
                ):
                    row["ran"] = ran(sdpa, q, k, v).backend
            except (RuntimeError, AttributeError) as error:
                row["error"] = first_line(error)
        old = [w for w in heard if issubclass(w.category, (FutureWarning, DeprecationWarning))]
        row["warned"] = str(old[0].message)[:200] if old else None
        result.rows.append(row)


#: what a process of its own prints: SDPA's order of backends, before, within and after
_ORDER = """
import json, torch
from torch.nn.attention import SDPBackend as B, sdpa_kernel
q = torch.empty(1, 4, 512, 64, device="cuda", dtype=torch.float16)
order, pick = torch._C._get_sdp_priority_order, lambda: torch._fused_sdp_choice(q, q, q)
seen = {}
if FIRST:
    seen["learnt"] = (pick(), order())
with sdpa_kernel([B.EFFICIENT_ATTENTION, B.FLASH_ATTENTION], set_priority=True):
    seen["within"] = (pick(), order())
seen["after"] = (pick(), order())
print(json.dumps(seen))
"""


def _order_of_ones_own(result: Result) -> None:
    """Whether ``set_priority`` holds in a process that has and one that has not called SDPA yet."""
    for first in (True, False):
        code = _ORDER.replace("FIRST", str(first))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=False
        )
        row = {"part": "order", "called_before": first, "asked": "efficient, then flash"}
        try:
            seen = json.loads(done.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            result.notes.append(f"order: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
            continue
        names = {-1: "none", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "other"}
        for when, (picked, order) in seen.items():
            row[f"picked_{when}"], row[f"order_{when}"] = names[picked], [names[i] for i in order]
        result.rows.append(row)


# -- C20: half or not -----------------------------------------------------------------------------


def _layer(result: Result, plan: dict[str, Any], device: str, item: tuple) -> None:
    """A training step of a model by precision and length: launches included, as a user has it."""
    import copy

    import torch

    from labkit.dispatch.measure import timed
    from labkit.layers import TrainingStep, TransformerModel

    name, lengths, precisions = item
    tiny = functools.partial(TransformerModel, 32, 2, 1)  # a CPU's autocast is slow
    make = {"report": TransformerModel.report, "realistic": TransformerModel.realistic}
    steps = {}
    for precision in precisions:
        torch.manual_seed(0)
        model = make.get(name, tiny)(backend="sdpa").to(device)
        # a step that overflows is left out and not raised: it costs the same
        steps[precision] = TrainingStep(model, precision=precision, on_overflow="skip")
    for n in lengths:
        functions, errors = {}, {}
        for precision, step in steps.items():
            held = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
            x = torch.randn(4, n, model.dim, device=device).to(held)
            with torch.no_grad():
                exact = copy.deepcopy(step.model).double()(x[:1].double())
                with step.arithmetic(), step.autocast():
                    difference = step.model(x[:1]).double() - exact
            errors[precision] = (difference.norm() / exact.norm()).item()
            functions[precision] = functools.partial(step.launch, x, torch.randn_like(x))
        timings, notes = timed(
            functions, warmup_ms=plan["rep_ms"], rep_ms=2 * plan["rep_ms"], max_samples=_SAMPLES,
            device=device, launch="included",
        )  # fmt: skip
        result.notes += [f"layer {name} n{n}: {note}" for note in notes]
        for precision, timing in timings.items():
            row = {"part": "layer", "model": name, "dim": model.dim, "batch": 4, "seq_len": n}
            row |= {"precision": precision, "launch": "included", "method": timing.method}
            row["samples_ms"] = _rounded(timing.samples_ms)
            row["median_ms"] = median(row["samples_ms"])
            row["error"] = errors[precision]  # of the model's output, against float64
            result.rows.append(row)


def _rounded(samples: Sequence[float]) -> list[float]:
    return [round(s, 6) for s in samples]


def _policy(result: Result, plan: dict[str, Any], device: str, _: None) -> None:
    """Attention alone at the shape taken for the report's, as a policy measures it."""
    from dataclasses import asdict

    from labkit.dispatch import measure_policy

    policy = measure_policy(
        heads=_REPORT["heads"], head_dim=_REPORT["head_dim"], batch=_REPORT["batch"], causal=False,
        training=(False, True), device=device, **plan["policy"],
    )  # fmt: skip
    for point in policy.points:
        result.rows.append({**asdict(point), "part": "policy", "launch": policy.launch})
    result.notes += [f"policy: {note}" for note in policy.notes]
    for training, what in ((False, "forward"), (True, "training")):
        for fast in ("tf32", "float16", "bfloat16"):
            try:
                found = policy.crossing(fast=fast, training=training)
            except ArgumentError:
                continue
            how = f"best in {fast} against best in float32, attention alone, launches included"
            _add_crossing(result, f"{fast}_{what}", found, how)
        for n in sorted({p.seq_len for p in policy.points}):
            _add_gains(result, policy, n, training, what)


def _add_gains(result: Result, policy: Any, n: int, training: bool, what: str) -> None:
    best: dict[str, float] = {}
    for p in policy.points:
        if p.seq_len == n and p.training == training:
            best[p.dtype] = min(p.ms, best.get(p.dtype, p.ms))
    for dtype, ms in best.items():
        if dtype != "float32" and "float32" in best:
            how = f"attention, {what}: best time in float32 over best in {dtype}, {n} tokens"
            result.add(f"gain_{dtype}_{what}_n{n}", best["float32"] / ms, "1", how)


def _add_crossing(result: Result, name: str, found: Any, how: str) -> None:
    """Where the gain passes 1, if it does, and what it is at the longest length."""
    if found.seq_len is None:
        result.notes.append(f"{name}: not the faster at the longest length ({how}).")
    else:
        result.add(f"crossing_{name}", found.seq_len, "tokens", f"{how}: faster from here on")
        if found.after is None:
            result.notes.append(f"{name}: the faster from the shortest length on ({how}).")
    result.add(f"crossing_{name}_gain_at_longest", found.gain_at_longest, "1", how)


# -- the map ---------------------------------------------------------------------------------------


def _map(result: Result, plan: dict[str, Any], device: str, group: dict[str, Any]) -> None:
    """One shape: everybody in turns, and what SDPA would have picked."""
    import torch

    from labkit.dispatch import explain
    from labkit.dispatch.measure import race

    shape = group["shape"]
    make_mask = None
    if group["kind"] == "mask":
        n = shape.seq_len
        mask = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        make_mask = lambda dtype: mask  # noqa: E731
    whole = [b for b in group["backends"] if shape.scores <= _SCORES or b not in ("math", "naive")]
    if len(whole) < len(group["backends"]):
        result.notes.append(f"math and naive are left out where S has more than 2^{_LOG_SCORES} "
                            "elements.")  # fmt: skip
    rows, notes = race(
        shape, whole, group["dtypes"], device=device, attn_mask=make_mask,
        warmup_ms=plan["rep_ms"] / 3, rep_ms=plan["rep_ms"], max_samples=_SAMPLES,
        samples=True,
    )  # fmt: skip
    result.notes += notes
    for row in rows:
        del row["ms"]
        row["median_ms"] = median(row["samples_ms"])  # of the samples as they are kept
        result.rows.append({"part": "map", "kind": group["kind"], **row})
    for dtype in group["dtypes"]:
        if dtype == "tf32":
            continue  # SDPA picks by dtype; TF32 is not one
        asked = explain(
            *shape.empty(dtype, device), is_causal=shape.causal,
            attn_mask=make_mask(dtype) if make_mask else None,
            enable_gqa=shape.heads != shape.kv_heads,
        )  # fmt: skip
        here = {r["backend"]: r["median_ms"] for r in rows if r["dtype"] == dtype}
        sdpa = {name: ms for name, ms in here.items() if name in _TORCH}
        row = {"part": "pick", "kind": group["kind"], **shape.labels(), "dtype": dtype}
        row |= {"picked": asked.would_run, "refused": _in_words(asked)}
        if asked.would_run in sdpa:
            row["fastest"] = min(sdpa, key=sdpa.__getitem__)
            row["pick_over_fastest"] = sdpa[asked.would_run] / min(sdpa.values())
        result.rows.append(row)


def _in_words(asked: Any) -> dict[str, str]:
    return {name: "; ".join(map(str, why)) for name, why in asked.refused.items()}


def winners(
    record: Any, *, dtype: str, training: bool, kind: str = "dense", among: Sequence[str] = ()
) -> dict[tuple[int, bool, int], tuple[str, float]]:
    """Who was the fastest: ``{(head_dim, causal, seq_len): (backend, lead)}``.

    Parameters
    ----------
    record : a result of this experiment, or its record.
    dtype, training, kind : which rows; kind is ``"dense"``, ``"gqa"`` or ``"mask"``.
    among : consider these backends only.

    Returns
    -------
    dict
        ``lead``: the time of the second over that of the first; 1.0 if there is no second.

    Raises
    ------
    ArgumentError
        if nothing of the kind was measured.
    """
    shapes: dict[tuple[int, bool, int], list[tuple[float, str]]] = {}
    for row in record.select(part="map", kind=kind, training=training):
        if row["dtype"] == dtype and (not among or row["backend"] in among):
            key = (row["head_dim"], row["causal"], row["seq_len"])
            shapes.setdefault(key, []).append((row["median_ms"], row["backend"]))
    if not shapes:
        raise ArgumentError(
            "record", f"{kind} {dtype}, training={training}", "was not measured there.",
            "Ask for what its rows have.",
        )  # fmt: skip
    found = {}
    for key, times in sorted(shapes.items()):
        times.sort()
        found[key] = (times[0][1], times[1][0] / times[0][0] if len(times) > 1 else 1.0)
    return found


# -- what pages quote ------------------------------------------------------------------------------


def _size(row: dict[str, Any]) -> str:
    size = f"d{row['head_dim']}_n{row['seq_len']}" + ("_causal" if row["causal"] else "")
    return size + ("_training" if row["training"] else "")


def _summarise(result: Result) -> None:
    _summarise_switch(result)
    _summarise_layer(result)
    _summarise_map(result)


def _summarise_switch(result: Result) -> None:
    asked = [r for r in result.select(part="switch") if "backend" not in r]
    for dtype in dict.fromkeys(r["dtype"] for r in asked):
        rows = [r for r in asked if r["dtype"] == dtype]
        picks = {r["picked"] for r in rows}
        lengths = sorted({r["seq_len"] for r in rows})
        result.add(
            f"switch_backends_{dtype}", len(picks), "1",
            f"different backends that SDPA picks over {len(lengths)} lengths from {lengths[0]} to "
            f"{lengths[-1]}, batch 4, 4 heads of 64: {', '.join(sorted(map(str, picks)))}",
        )  # fmt: skip
        result.add(f"switch_lengths_{dtype}", len(lengths), "1", "lengths that were asked about")
    watched = [r for r in result.select(part="switch") if "backend" in r]
    agree = [r["ran"] == r["picked"] for r in watched if r["backend"] == "sdpa"]
    if agree:
        how = "share of watched calls in which the profiler saw the backend that explain named"
        result.add("explain_right", sum(agree) / len(agree), "1", how)
        result.add("explain_watched", len(agree), "1", "calls watched by the profiler")
    for who in dict.fromkeys((r["backend"], r["dtype"]) for r in watched):
        rows = sorted(
            (r for r in watched if (r["backend"], r["dtype"]) == who), key=lambda r: r["seq_len"]
        )
        kernels = [tuple(r["kernels"]) for r in rows]
        name = "_".join(who)
        how = f"different kernels that {' '.join(who)} launches over {len(rows)} lengths"
        result.add(f"switch_kernels_{name}", len(set(kernels)), "1", how)
        changes = [r["seq_len"] for r, a, b in zip(rows[1:], kernels, kernels[1:], strict=False)
                   if a != b]  # fmt: skip
        for place, n in enumerate(changes, 1):
            how = f"{' '.join(who)}: first watched length with other kernels than the one before"
            result.add(f"switch_change{place}_{name}", n, "tokens", how)
    for row in result.select(part="order"):
        name = "after_a_call" if row["called_before"] else "before_any_call"
        how = "sdpa_kernel([efficient, flash], set_priority=True): efficient was picked within"
        result.add(f"order_held_{name}", int(row["picked_within"] == "efficient"), "1", how)
        how = f"the backend picked after it: {row['picked_after']}"
        result.add(f"order_after_is_cudnn_{name}", int(row["picked_after"] == "cudnn"), "1", how)
    for row in result.select(part="recipe"):
        how = "sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False)"
        how += f" in {row['dtype']}: {row['ran'] or row['error']}"
        forced = row["ran"] in ("flash", "flash_cpu")
        result.add(f"recipe_runs_flash_{row['dtype']}", int(forced), "1", how)


def _summarise_layer(result: Result) -> None:
    from labkit.dispatch.policy import crossing

    for model in dict.fromkeys(r["model"] for r in result.select(part="layer")):
        rows = result.select(part="layer", model=model)
        ms = {(r["precision"], r["seq_len"]): r["median_ms"] for r in rows}
        for precision in dict.fromkeys(r["precision"] for r in rows):
            if precision == "fp32":
                continue
            gain = {
                n: ms["fp32", n] / t for (p, n), t in ms.items() if p == precision and ("fp32", n)
                in ms
            }  # fmt: skip
            how = f"training step of the {model} model, batch 4: fp32 over {precision}"
            for n, value in gain.items():
                result.add(f"layer_gain_{model}_{precision}_n{n}", value, "1", how)
            if len(gain) > 1:
                _add_crossing(result, f"layer_{model}_{precision}", crossing(gain), how)


_QUOTED = (128, 512, 1024, 4096, 16384)


def _summarise_map(result: Result) -> None:
    for row in result.select(part="map"):
        if row["kind"] != "dense" or (
            row["head_dim"] in (64, 128) and row["seq_len"] in _QUOTED
        ):  # fmt: skip
            extra = "" if row["kind"] == "dense" else f"_{row['kind']}"
            result.add(
                f"time_{row['backend']}_{row['dtype']}_{_size(row)}{extra}",
                row["median_ms"] / 1e3, "s", "median, GPU's part, in turns with the others",
            )  # fmt: skip
    picks = [r for r in result.select(part="pick") if "pick_over_fastest" in r]
    sets = {"": picks}
    for training, what in ((False, "forward"), (True, "training")):
        sets[f"_{what}"] = [r for r in picks if r["training"] == training]
    for dtype in dict.fromkeys(r["dtype"] for r in picks):
        for what in ("forward", "training"):
            sets[f"_{dtype}_{what}"] = [r for r in sets[f"_{what}"] if r["dtype"] == dtype]
    for name, rows in sets.items():
        if not rows:
            continue
        right = [r for r in rows if r["pick_over_fastest"] <= 1 + _NOISE]
        how = f"shapes in which SDPA's pick is within {_NOISE:.0%} of the fastest of its backends"
        result.add(f"pick_was_fastest{name}", len(right), "1", how)
        result.add(f"pick_shapes{name}", len(rows), "1", "shapes measured")
        result.add(f"pick_share{name}", len(right) / len(rows), "1", f"{how}, as a share")
        worst = max(rows, key=lambda r: r["pick_over_fastest"])
        how = f"time of the pick over the fastest's: {worst['picked']} for {worst['fastest']}, "
        how += f"{worst['dtype']} {_size(worst)} {worst['kind']}"
        result.add(f"pick_worst{name}", worst["pick_over_fastest"], "1", how)
    for dtype in dict.fromkeys(r["dtype"] for r in result.select(part="map", kind="dense")):
        for training, what in ((False, "forward"), (True, "training")):
            try:
                found = winners(result, dtype=dtype, training=training)
            except ArgumentError:
                continue
            first = [who for who, _ in found.values()]
            for who in dict.fromkeys(first):
                how = f"of {len(first)} shapes without mask, {dtype}, {what}: how many it won"
                result.add(f"wins_{who}_{dtype}_{what}", first.count(who), "1", how)
