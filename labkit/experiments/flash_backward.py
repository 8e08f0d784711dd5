r"""To keep P or to compute it again: memory, time, error and order of attention's backward pass.

Seven parts, each of which may be missing from a result with the reason among its notes:

``ways``
    one layer with P saved (naive attention), checkpointed (``torch.utils.checkpoint`` over it),
    recomputed by blocks (``labkit.flash``), and torch's own fused attention: the peak of
    forward and backward, predicted, traced and measured, and the time of each pass, against N.
``sweep``
    the backward pass of ``labkit.flash`` beside torch's flash and cuDNN backends, in turns, and
    the same kernels as plain Triton where the card has hand-written ones.  The rate counts five
    products, 2.5 times the forward pass, whatever a kernel computes: the convention of published
    figures.  :math:`\text{FLOP} = 2.5 \cdot 4 B H N^2 d`, half of it if causal.
``split``
    the time of each kernel of one backward pass, by torch.profiler.
``tiles``
    the Triton kernels of two passes, and a kernel of one pass with atomic additions to dQ
    (``labkit/flash/one_pass.py``), each with several tiles: what two passes cost.
``price``
    what it costs to write and read P once, and to compute it again: bytes over the bandwidth
    of memory, and the forward kernel with a head_dim_v of 16.  Where that is the kernel by hand,
    it pads V to the width of K and multiplies in full: an upper bound of S and its exponential.
``error``
    gradients against float64, by dtype: plain attention, torch's backends, ``labkit.flash``;
    float32 also with one and with three TF32 products; with logits of normal size and eight
    times as large.
``repeat``
    the same backward pass again and again: are the gradients equal to the bit?

Taught in chapter 09 (to keep P or to compute it again).  Claims C10, C11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from labkit.errors import check_choice
from labkit.experiments import Progress, Result, _release_memory
from labkit.experiments._jobs import Jobs, first_line

__all__ = [
    "CHAPTERS",
    "NEEDS_GPU",
    "PARTS",
    "TITLE",
    "WAYS",
    "attention_of_way",
    "executed_products",
    "recomputed_peak",
    "run",
]

TITLE = "Backward: P saved, checkpointed, recomputed; its kernels, errors and repeats"
CHAPTERS = ("09",)
NEEDS_GPU = False

#: how the backward pass comes by P, and whose code does it
WAYS = ("saved", "checkpointed", "recomputed", "sdpa")
#: what ``run`` measures
PARTS = ("ways", "sweep", "split", "tiles", "price", "error", "repeat")
_GRADIENTS = ("dq", "dk", "dv")
#: matrix products in the kernels of two passes; five are needed, S and dP are made twice
_PRODUCTS = {"dkdv": 4, "dq": 3}
#: block_m, block_n, warps, stages of the rows ``triton``: the kernels of ``flash/backward.py`` with
#: one choice for every problem, where ``labkit`` takes what is fastest, hand-written ones included
_DKDV, _DQ = (64, 64, 4, 2), (128, 64, 8, 3)


def executed_products(passes: int) -> int:
    """Matrix products for each pair of blocks: 5 in one pass, 7 in two."""
    return {1: 5, 2: 7}[passes]


def recomputed_peak(**sizes: int) -> int:
    """Peak of forward and backward of ``labkit.flash`` above its inputs, in bytes.

    O and the LSE from the forward pass, δ, and three gradients; nothing with N² in it.
    ``sizes`` are the symbols of ``labkit.memory.problem_sizes``.
    """
    from labkit.memory import attention_forms

    forms = attention_forms()
    return sum(forms[name](**sizes) for name in ("O", "LSE", "delta", "dQ", "dK", "dV"))


def attention_of_way(way: str, *, causal: bool = False) -> Callable:
    """The function ``(q, k, v) -> O`` of one of :data:`WAYS`.

    Raises
    ------
    ArgumentError
        for an unknown way.
    """
    from labkit.experiments.training_memory import attention_in_form

    check_choice("way", way, WAYS)
    if way == "recomputed":
        from labkit.flash import flash_attention

        return functools.partial(flash_attention, causal=causal)
    if way == "sdpa":
        return functools.partial(_sdpa_flash, causal=causal)
    form = {"saved": "out_of_place", "checkpointed": "checkpointed"}[way]
    return attention_in_form(form, causal=causal)


def _sdpa_flash(q, k, v, *, causal: bool):
    """torch's flash backend; which one makes the backward pass is decided in the forward pass."""
    from torch.nn.functional import scaled_dot_product_attention

    from labkit.experiments.roofline import _only

    with _only("flash"):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


# -- the plan ----------------------------------------------------------------------


def _plan(quick: bool, device: str) -> dict[str, Any]:
    """Sizes of each part for this kind of device."""
    if device == "cuda":
        import torch

        half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
        lengths = [1024, 2048, 4096] if quick else [1024, 2048, 4096, 8192, 16384]
        return {
            "ways": {"batch": 1, "heads": 16, "head_dim": 128, "dtype": half},
            "lengths": lengths,
            "timed": WAYS,
            "sweep": [
                (d, n, causal)
                for d in ((128,) if quick else (64, 128))
                for n in ((4096,) if quick else (1024, 4096, 16384))
                for causal in (False, True)
            ],
            "tokens": 4096 if quick else 16384,
            "width": 2048,
            "split": [
                (d, n, causal)
                for d in ((128,) if quick else (64, 128))
                for n in ((4096,) if quick else (16384,))
                for causal in (False, True)
            ],
            "tiles": [(d, 4096, False) for d in ((128,) if quick else (64, 128))],
            "price": {"heads": 16, "seq_len": 2048 if quick else 8192, "head_dims": (64, 128)},
            "error": {"heads": 4, "seq_len": 512 if quick else 2048, "head_dim": 64},
            "repeat": {"batch": 2, "heads": 8, "seq_len": 1024, "head_dim": 128, "times": 30},
            "dtype": half,
            "rep_ms": 30 if quick else 100,
            "warmup_ms": 10 if quick else 25,
        }
    return {
        "ways": {"batch": 1, "heads": 2, "head_dim": 32, "dtype": "float32"},
        "lengths": [128] if quick else [64, 128, 256],
        # The interpreter is a simulator: how long it takes says nothing about a kernel.
        "timed": tuple(way for way in WAYS if way != "recomputed"),
        "sweep": [],
        "tokens": 0,
        "width": 0,
        "split": [],
        "tiles": [],
        "price": None,
        "error": {"heads": 1, "seq_len": 97, "head_dim": 32},
        "repeat": {"batch": 1, "heads": 1, "seq_len": 64, "head_dim": 16, "times": 3},
        "dtype": "float32",
        "rep_ms": 20 if quick else 100,
        "warmup_ms": 5,
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
    quick : fewer and smaller points (seconds on a laptop CPU, in Triton's interpreter).
    device : ``"cuda"`` or ``"cpu"``; the GPU if there is one by default.
    progress : called with ``(done, total, what)``.
    parts : which of :data:`PARTS`, all by default.

    Returns
    -------
    Result
        Rows have ``part``; a row that could not be measured is not there, and ``notes`` say
        why.  Keys: ``mem.<way>.n<N>.<predicted|measured>``, ``mem.recomputed.gap``,
        ``time.<way>.n<N>.<forward|backward|both>``,
        ``sweep.<who>.d<d>.n<N>.<full|causal>.<time|rate|vs_flash|vs_cudnn>``,
        ``split.<who>.d<d>.n<N>.<full|causal>.<kernel>``,
        ``tiles.d<d>.<kernel>.<m>x<n>w<warps>``, ``passes.d<d>.<one|two|ratio>``,
        ``price.d<d>.<write|read|again>``,
        ``error.<who>.<dtype>.x<logits>.<dq|dk|dv>``, ``repeat.<who>.<unequal|of|largest>``.
    """
    jobs = Jobs(_plan, quick, device, parts, PARTS)
    job, plan = jobs.add, jobs.plan
    for n in plan["lengths"]:
        for way in WAYS:
            job("ways", f"peak, {way}, N = {n}", _peak, way, n)
        job("ways", f"time, N = {n}", _times, n)
    for case in plan["sweep"]:
        job("sweep", "backward, d = {}, N = {}, causal {}".format(*case), _sweep, *case)
    for case in plan["split"]:
        job("split", "kernels, d = {}, N = {}, causal {}".format(*case), _split, *case)
    for case in plan["tiles"]:
        job("tiles", "tiles, d = {}, N = {}, causal {}".format(*case), _tiles, *case)
    for head_dim in plan["price"]["head_dims"] if plan["price"] else ():
        job("price", f"price of P, d = {head_dim}", _price, head_dim)
    for case in _error_cases(jobs.device):
        job("error", f"error, {case[0]}, {case[1]}, logits × {case[2]}", _error, *case)
    job("repeat", "repeats", _repeats)
    result = jobs.run(progress, tidy=lambda failed: _release_memory() if failed else None)
    _summarise(result)
    return result


def _tensors(shape: Sequence[int], dtype: str, device: str, *, logits: float = 1.0, dv: int = 0):
    """q, k, v that require gradients, and dout; ``logits`` multiplies q."""
    import torch

    from labkit.dtypes import torch_dtype

    generator = torch.Generator(device).manual_seed(shape[2])
    wide = [*shape[:3], dv or shape[3]]
    q, k, v, dout = (
        torch.randn(s, generator=generator, device=device) for s in (shape, shape, wide, wide)
    )
    q, k, v, dout = ((t * f).to(torch_dtype(dtype)) for t, f in zip(
        (q, k, v, dout), (logits, 1, 1, 1), strict=True))  # fmt: skip
    return *(t.requires_grad_() for t in (q, k, v)), dout


def _samples(timing: Any) -> dict[str, Any]:
    samples = [round(ms, 6) for ms in timing.samples_ms]
    return {"samples_ms": samples, "median_ms": median(samples), "method": timing.method}


# -- memory and time of each way -----------------------------------------------------


def _shape(plan: dict[str, Any], n: int) -> tuple[int, ...]:
    ways = plan["ways"]
    return ways["batch"], ways["heads"], n, ways["head_dim"]


def _predicted(way: str, plan: dict[str, Any], n: int, device: str) -> int:
    from labkit.memory import attention_peak, problem_sizes

    problem = {**plan["ways"], "seq_len": n}
    if way == "recomputed":
        return recomputed_peak(**problem_sizes(**problem))
    form = {"saved": "out_of_place", "checkpointed": "checkpointed", "sdpa": "fused"}[way]
    return attention_peak(**problem, training=True, variant=form, device=device)


def _fits(way: str, plan: dict[str, Any], n: int, device: str) -> bool:
    if device != "cuda":
        return True
    import torch

    free, _ = torch.cuda.mem_get_info()
    return 1.3 * _predicted(way, plan, n, device) < free


def _peak(result: Result, plan: dict[str, Any], device: str, way: str, n: int) -> None:
    from labkit.experiments.training_memory import forward_backward
    from labkit.memory import measure

    predicted = _predicted(way, plan, n, device)
    if not _fits(way, plan, n, device):
        result.notes.append(f"peak, {way}, N = {n}: left out, needs {predicted:,} bytes")
        return
    tensors = _tensors(_shape(plan, n), plan["ways"]["dtype"], device)
    _release_memory()
    report = measure(forward_backward, attention_of_way(way), *tensors, predicted=predicted)
    result.rows.append(
        {"part": "ways", "what": "peak", "way": way, "seq_len": n, **plan["ways"],
         **report.to_dict()}
    )  # fmt: skip
    where = f"{_where(plan['ways'])}, N = {n}; forward and backward, above the inputs"
    result.add(f"mem.{way}.n{n}.predicted", predicted, "bytes", f"by the schedule; {where}")
    if report.measured is not None:
        how = f"{report.method}; {where}"
        result.add(f"mem.{way}.n{n}.measured", report.measured, "bytes", how)


def _where(problem: dict[str, Any]) -> str:
    return (
        f"batch {problem['batch']}, {problem['heads']} heads, head_dim {problem['head_dim']}, "
        f"{problem['dtype']}"
    )


def _times(result: Result, plan: dict[str, Any], device: str, n: int) -> None:
    """Forward, backward, and both, of every way that fits, in turns."""
    import torch

    from labkit.timing import time_many

    tensors = _tensors(_shape(plan, n), plan["ways"]["dtype"], device)
    q, k, v, dout = tensors
    how = {"device": device, "rep_ms": plan["rep_ms"], "warmup_ms": plan["warmup_ms"]}
    passes: dict[str, dict[str, Callable]] = {"forward": {}, "backward": {}, "both": {}}
    for way in plan["timed"]:
        if not _fits(way, plan, n, device):
            result.notes.append(f"time, {way}, N = {n}: left out, does not fit")
            continue
        attention = attention_of_way(way)
        try:
            out = attention(q, k, v)
        except Exception as error:
            result.notes.append(f"time, {way}, N = {n}: {first_line(error)}")
            continue
        passes["forward"][way] = functools.partial(attention, q, k, v)
        passes["backward"][way] = functools.partial(
            torch.autograd.grad, out, (q, k, v), dout, retain_graph=True
        )
        passes["both"][way] = functools.partial(_both, attention, *tensors)
    for name in ("forward", "backward", "both"):
        timings = time_many(passes[name], max_samples=100, **how)
        for way in passes[name]:
            row = {"part": "ways", "what": name, "way": way, "seq_len": n, **plan["ways"]}
            result.rows.append({**row, **_samples(timings[way])})
            text = f"median of {timings[way].n}; {_where(plan['ways'])}, N = {n}; ways in turns"
            result.add(f"time.{way}.n{n}.{name}", timings[way].median_ms / 1e3, "s", text)


def _both(attention: Callable, q, k, v, dout):
    import torch

    return torch.autograd.grad(attention(q, k, v), (q, k, v), dout)


# -- the sweep against torch ------------------------------------------------------------


def _config(*numbers: int, descriptors: bool = True) -> Any:
    """A configuration; tensor descriptors only where the card has a copy engine for them."""
    import torch

    from labkit.flash.tuning import Config

    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return Config(*numbers, descriptors=descriptors and able)


def _call(q, k, causal: bool) -> Any:
    from labkit.flash.launch import Call

    return Call(causal, q.shape[-1] ** -0.5, None, "ieee", q.shape[2], k.shape[2])


def _in_triton(q, k, v, dout, causal: bool, dkdv: Any, dq: Any) -> Callable:
    """The Triton kernels of two passes, each with a configuration of its own."""
    import torch

    from labkit.flash import flash_attention, launch

    with torch.no_grad():
        out, lse = flash_attention(q, k, v, causal=causal, return_lse=True)
    tensors = [t.detach() for t in (dout, q, k, v, out, lse)]
    call = _call(q, k, causal)

    def run():
        return launch.backward(
            tensors[0], None, *tensors[1:], call, dkdv_config=dkdv, dq_config=dq
        )

    return run


def _backwards(q, k, v, dout, causal: bool, notes: list[str]) -> dict[str, Callable]:
    """One backward pass of each implementation that takes these tensors."""
    import torch

    from labkit.experiments.roofline import _can, _only
    from labkit.flash import flash_attention

    scale = q.shape[-1] ** -0.5
    found: dict[str, Callable] = {}
    grad = functools.partial(torch.autograd.grad, retain_graph=True)

    def add(name: str, forward: Callable) -> None:
        try:
            out = forward()
            grad(out, (q, k, v), dout)
        except Exception as error:
            notes.append(f"{name}, d = {q.shape[3]}, N = {q.shape[2]}: {first_line(error)}")
        else:
            found[name] = functools.partial(grad, out, (q, k, v), dout)

    add("labkit", functools.partial(flash_attention, q, k, v, causal=causal))
    if "labkit" in found and q.is_cuda:
        try:
            plain = _in_triton(q, k, v, dout, causal, _config(*_DKDV), _config(*_DQ))
            plain()
            found["triton"] = plain
        except Exception as error:
            notes.append(f"triton, d = {q.shape[3]}, N = {q.shape[2]}: {first_line(error)}")
    for backend in ("flash", "cudnn"):
        if not _can(backend, q, k, v, causal=causal):
            notes.append(f"{backend}: torch does not run it here")
            continue
        with _only(backend):
            from torch.nn.functional import scaled_dot_product_attention as sdpa

            add(backend, functools.partial(sdpa, q, k, v, is_causal=causal, scale=scale))
    return found


def _flops(batch: int, heads: int, n: int, head_dim: int, causal: bool) -> float:
    """Five products, half of the pairs if causal: what published rates count."""
    return 2.5 * 4 * batch * heads * n * n * head_dim * (0.5 if causal else 1)


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def _sweep(
    result: Result, plan: dict[str, Any], device: str, head_dim: int, n: int, causal: bool
) -> None:
    from labkit.timing import time_many

    batch, heads = max(1, plan["tokens"] // n), plan["width"] // head_dim
    tensors = _tensors((batch, heads, n, head_dim), plan["dtype"], device)
    functions = _backwards(*tensors, causal, result.notes)
    timings = time_many(
        functions, device=device, rep_ms=plan["rep_ms"], warmup_ms=plan["warmup_ms"],
        max_samples=60,
    )  # fmt: skip
    flops = _flops(batch, heads, n, head_dim, causal)
    sizes = {"batch": batch, "heads": heads, "seq_len": n, "head_dim": head_dim}
    where = f"{_where({**sizes, 'dtype': plan['dtype']})}, N = {n}, {_mask(causal)}; in turns"
    base = f"d{head_dim}.n{n}.{_mask(causal)}"
    for name in functions:
        timing = timings[name]
        rate = flops / (timing.median_ms / 1e3)
        row = {"part": "sweep", "who": name, **sizes, "causal": causal, "dtype": plan["dtype"]}
        result.rows.append({**row, "flops": flops, "rate": rate, **_samples(timing)})
        key = f"sweep.{name}.{base}"
        result.add(f"{key}.time", timing.median_ms / 1e3, "s", f"backward alone; {where}")
        result.add(f"{key}.rate", rate, "FLOP/s", f"five products over the time; {where}")
    for other in ("flash", "cudnn"):
        for ours in ("labkit", "triton"):
            if other in functions and ours in functions:
                ratio = timings[other].median_ms / timings[ours].median_ms
                how = f"time of torch's {other} backend over ours, backward; {where}"
                result.add(f"sweep.{ours}.{base}.vs_{other}", ratio, "1", how)


# -- where the time goes ------------------------------------------------------------------


def _kernel_times(fn: Callable[[], Any], times: int) -> dict[str, list[float]]:
    """ms of every kernel of ``fn``, by kernel name; one number per call of ``fn``."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    fn()
    with profile(activities=both, acc_events=True):  # the first profile misses what it starts with
        fn()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for _ in range(times):
        with profile(activities=both, acc_events=True) as seen:
            fn()
            torch.cuda.synchronize()
        one: dict[str, float] = {}
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                one[event.name] = one.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3
        for name, ms in one.items():
            found.setdefault(name, []).append(ms)
    return found


def kernel_role(name: str) -> str:
    """What a kernel of the backward pass is for, by its name."""
    low = name.lower()
    if "one_pass" in low:
        return "one_pass"
    if "dq_dk_dv" in low:
        return "whole"
    if "dkdv" in low or "dk_dv" in low:
        return "dkdv"
    # rows_kernel pads δ and the LSE for the copy engine of the hand-written kernels
    if "delta" in low or "rows_kernel" in low or "preprocess" in low or "dot_do_o" in low:
        return "delta"
    if "convert_dq" in low or "convert_dkv" in low:
        return "convert"
    if "dq" in low and "dk" not in low:
        return "dq"
    if "memset" in low or "fill" in low:
        return "fill"
    return "whole" if "backward" in low or "bprop" in low or "bwd" in low else "other"


def _split(
    result: Result, plan: dict[str, Any], device: str, head_dim: int, n: int, causal: bool
) -> None:
    batch, heads = max(1, plan["tokens"] // n), plan["width"] // head_dim
    tensors = _tensors((batch, heads, n, head_dim), plan["dtype"], device)
    functions = _backwards(*tensors, causal, [])
    one_product = _flops(batch, heads, n, head_dim, causal) / 5
    base = f"d{head_dim}.n{n}.{_mask(causal)}"
    functions.pop("cudnn", None)  # its kernels' names do not say what they are for
    for who, fn in functions.items():
        roles: dict[str, list[list[float]]] = {}
        for name, samples in _kernel_times(fn, 4).items():
            roles.setdefault(kernel_role(name), []).append(samples)
            result.rows.append(
                {"part": "split", "who": who, "kernel": name[:160], "role": kernel_role(name),
                 "batch": batch, "heads": heads, "seq_len": n, "head_dim": head_dim,
                 "causal": causal, "dtype": plan["dtype"], "samples_ms": samples,
                 "median_ms": median(samples), "method": "torch.profiler, duration of kernels"}
            )  # fmt: skip
        spent = {role: sum(median(s) for s in lists) for role, lists in roles.items()}
        whole = sum(spent.values())
        for role, ms in spent.items():
            how = f"kernels for {role}, {who}, torch.profiler; {_mask(causal)}, N = {n}"
            result.add(f"split.{who}.{base}.{role}", ms / 1e3, "s", how)
            result.add(f"split.{who}.{base}.{role}.share", ms / whole, "1", f"share of; {how}")
            if role in _PRODUCTS and who in ("labkit", "triton"):
                rate = _PRODUCTS[role] * one_product / (ms / 1e3)
                how = f"{_PRODUCTS[role]} products that this kernel executes over its time; {how}"
                result.add(f"split.{who}.{base}.{role}.executed", rate, "FLOP/s", how)


# -- tiles, and one pass against two -----------------------------------------------------

#: configurations to try: block_m, block_n, warps, stages
_TILES = {
    "dkdv": ((64, 64, 4, 2), (64, 128, 8, 2), (64, 128, 4, 2), (128, 128, 8, 2), (32, 128, 4, 3)),
    "dq": ((128, 64, 8, 3), (64, 64, 4, 2)),
    "one_pass": ((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2)),
}


def _tiles(
    result: Result, plan: dict[str, Any], device: str, head_dim: int, n: int, causal: bool
) -> None:
    """Each kernel with each of its tiles; the best of each make one pass and two."""
    import torch

    from labkit.flash import flash_attention
    from labkit.flash.one_pass import one_pass
    from labkit.flash.recompute import delta as delta_of

    batch, heads = max(1, plan["tokens"] // n), plan["width"] // head_dim
    q, k, v, dout = (
        t.detach() for t in _tensors((batch, heads, n, head_dim), plan["dtype"], device)
    )
    with torch.no_grad():
        out, lse = flash_attention(q, k, v, causal=causal, return_lse=True)
    delta = delta_of(dout, out)
    one_product = _flops(batch, heads, n, head_dim, causal) / 5
    best: dict[str, float] = {}
    for kernel, choices in _TILES.items():
        for numbers in choices:
            config = _config(*numbers)
            if kernel == "one_pass":
                # zeroing dQ and rounding it are part of the price of adding to it
                fn = functools.partial(one_pass, q, k, v, out, lse, dout, causal=causal,
                                       delta=delta, config=config)  # fmt: skip
                products, roles = 5, None
            else:
                fn = _in_triton(
                    q, k, v, dout, causal,
                    config if kernel == "dkdv" else _config(*_DKDV),
                    config if kernel == "dq" else _config(*_DQ),
                )  # fmt: skip
                products, roles = _PRODUCTS[kernel], (kernel,)
            try:
                times = _kernel_times(fn, 5)
            except Exception as error:
                result.notes.append(f"tiles, {kernel}, {numbers}: {first_line(error)}")
                _release_memory()
                continue
            picked = [s for name, s in times.items() if not roles or kernel_role(name) in roles]
            samples = [sum(each) for each in zip(*picked, strict=True)]
            ms = median(samples)
            best[kernel] = min(best.get(kernel, ms), ms)
            rate = products * one_product / (ms / 1e3)
            row = {"part": "tiles", "kernel": kernel, "block_m": numbers[0], "block_n": numbers[1],
                   "num_warps": numbers[2], "num_stages": numbers[3],
                   "descriptors": config.descriptors, "batch": batch, "heads": heads,
                   "seq_len": n, "head_dim": head_dim, "causal": causal,
                   "dtype": plan["dtype"]}  # fmt: skip
            method = "torch.profiler, duration of kernels"
            result.rows.append({**row, "executed": rate, "samples_ms": samples, "median_ms": ms,
                                "method": method})  # fmt: skip
            name = f"{numbers[0]}x{numbers[1]}w{numbers[2]}"
            how = f"products that {kernel} executes over its time; N = {n}, {_mask(causal)}"
            result.add(f"tiles.d{head_dim}.{kernel}.{name}", rate, "FLOP/s", how)
    if set(best) == set(_TILES):
        two = best["dkdv"] + best["dq"]
        where = f"best tiles of those tried, without δ; N = {n}, {_mask(causal)}, torch.profiler"
        base = f"passes.d{head_dim}"
        result.add(f"{base}.one", best["one_pass"] / 1e3, "s", f"one pass, atomics; {where}")
        result.add(f"{base}.two", two / 1e3, "s", f"dK/dV and dQ; {where}")
        result.add(f"{base}.ratio", best["one_pass"] / two, "1", f"one pass over two; {where}")


# -- the price of P -----------------------------------------------------------------------


def _price(result: Result, plan: dict[str, Any], device: str, head_dim: int) -> None:
    """Writing and reading P once, and computing it again, for the same scores."""
    import torch

    from labkit.dtypes import itemsize, torch_dtype
    from labkit.flash import flash_attention
    from labkit.kernels import read_sum
    from labkit.timing import time_many

    heads, n = plan["price"]["heads"], plan["price"]["seq_len"]
    scores = heads * n * n
    q, k, v, _ = _tensors((1, heads, n, head_dim), plan["dtype"], device, dv=16)
    q, k, v = (t.detach() for t in (q, k, v))
    stored = torch.zeros(scores * itemsize(plan["dtype"]) // 4, dtype=torch.int32, device=device)
    as_scores = stored.view(torch_dtype(plan["dtype"]))
    with torch.no_grad():
        timings = time_many(
            {
                "write": lambda: as_scores.fill_(0.5),
                "read": lambda: read_sum(stored),
                "again": lambda: flash_attention(q, k, v),
            },
            device=device, rep_ms=plan["rep_ms"], warmup_ms=plan["warmup_ms"], max_samples=60,
        )  # fmt: skip
    what = {
        "write": "fill of a buffer of the size of P",
        "read": "one reading of a buffer of the size of P",
        "again": "labkit.flash forward with head_dim_v = 16: S, its exponential, little else",
    }
    where = f"{heads} heads, N = {n}, head_dim {head_dim}, {plan['dtype']}; in turns"
    for name, text in what.items():
        timing = timings[name]
        row = {"part": "price", "what": name, "heads": heads, "seq_len": n, "head_dim": head_dim}
        result.rows.append({**row, "dtype": plan["dtype"], "scores": scores, **_samples(timing)})
        result.add(f"price.d{head_dim}.{name}", timing.median_ms / 1e3, "s", f"{text}; {where}")
        each = timing.median_ms / 1e3 / scores
        result.add(f"price.d{head_dim}.{name}.each", each, "s", f"per score: {text}; {where}")
    ratio = (timings["write"].median_ms + timings["read"].median_ms) / timings["again"].median_ms
    how = f"(write + read) over computing again; {where}"
    result.add(f"price.d{head_dim}.ratio", ratio, "1", how)


# -- errors -------------------------------------------------------------------------------


def _error_cases(device: str) -> list[tuple[str, str, int]]:
    """(implementation, dtype, factor on the logits)."""
    if device == "cpu":
        pairs = [("naive", "float32"), ("labkit", "float32"), ("naive", "float16"),
                 ("labkit", "float16"), ("sdpa", "float32")]  # fmt: skip
    else:
        pairs = [(who, dtype) for dtype in ("bfloat16", "float16")
                 for who in ("naive", "labkit", "flash", "cudnn")]  # fmt: skip
        pairs += [(who, dtype) for dtype in ("float32", "tf32")
                  for who in ("naive", "labkit", "efficient")]  # fmt: skip
        pairs.append(("labkit", "tf32x3"))
    return [(who, dtype, logits) for logits in (1, 8) for who, dtype in pairs]


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    import torch

    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept


def _gradients(who: str, dtype: str, q, k, v, dout):
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from labkit.experiments.roofline import _only
    from labkit.naive import naive_attention

    if who == "labkit":
        from labkit.flash import flash_attention

        out = flash_attention(q, k, v, precision=dtype if dtype.startswith("tf32") else None)
    elif who == "naive":
        out = naive_attention(q, k, v)
    elif who == "sdpa":
        out = sdpa(q, k, v)
    else:
        with _only(who):
            out = sdpa(q, k, v)
    return torch.autograd.grad(out, (q, k, v), dout)


def _error(
    result: Result, plan: dict[str, Any], device: str, who: str, dtype: str, logits: int
) -> None:
    import torch

    from labkit.naive import naive_attention

    sizes = plan["error"]
    shape = (1, sizes["heads"], sizes["seq_len"], sizes["head_dim"])
    element = "float32" if dtype.startswith("tf32") else dtype
    q, k, v, dout = _tensors(shape, element, device, logits=float(logits))
    with _tf32(dtype == "tf32"):
        ours = _gradients(who, dtype, q, k, v, dout)
    # from the same values, held in their own dtype: rounding the inputs is not the kernel's error
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    true = torch.autograd.grad(naive_attention(*wide), wide, dout.double())
    row = {"part": "error", "who": who, "dtype": dtype, "logits": logits, "batch": 1, **sizes}
    where = f"{sizes['heads']} heads, N = {sizes['seq_len']}, head_dim {sizes['head_dim']}"
    for name, mine, right in zip(_GRADIENTS, ours, true, strict=True):
        difference = mine.double() - right
        relative = (difference.norm() / right.norm()).item()
        row[name] = {"relative": relative, "max_abs": difference.abs().max().item(),
                     "largest": right.abs().max().item()}  # fmt: skip
        how = f"‖{name} − float64‖ / ‖float64‖, logits × {logits}; {where}"
        result.add(f"error.{who}.{dtype}.x{logits}.{name}", relative, "1", how)
        how = f"largest |{name} − float64|, logits × {logits}; {where}"
        result.add(f"error.{who}.{dtype}.x{logits}.{name}.max", row[name]["max_abs"], "1", how)
    result.rows.append(row)


# -- repeats ------------------------------------------------------------------------------


def _repeats(result: Result, plan: dict[str, Any], device: str) -> None:
    sizes = dict(plan["repeat"])
    times = sizes.pop("times")
    shape = tuple(sizes[s] for s in ("batch", "heads", "seq_len", "head_dim"))
    tensors = _tensors(shape, plan["dtype"], device)
    if device == "cpu":
        from labkit.flash import flash_attention

        q, k, v, dout = tensors
        functions: dict[str, Callable] = {"labkit": functools.partial(
            _both, flash_attention, q, k, v, dout)}  # fmt: skip
    else:
        functions = _backwards(*tensors, False, result.notes)
    for who, fn in functions.items():
        _repeat(result, who, fn, times, sizes, plan["dtype"])
    if "flash" not in functions:
        return
    # torch's flash backend can be told to add in order; what does it take?
    from labkit.timing import time_many

    _repeat(result, "flash_in_order", _in_order(functions["flash"]), times, sizes, plan["dtype"])
    # timed at the sweep's size: the problem above leaves most of the card idle
    n, head_dim = max((n for _, n, _ in plan["sweep"]), default=4096), sizes["head_dim"]
    batch, heads = max(1, plan["tokens"] // n), plan["width"] // head_dim
    tensors = _tensors((batch, heads, n, head_dim), plan["dtype"], device)
    flash = _backwards(*tensors, False, [])["flash"]
    timings = time_many(
        {"flash": flash, "flash_in_order": _in_order(flash)}, device=device,
        rep_ms=plan["rep_ms"], warmup_ms=plan["warmup_ms"], max_samples=40,
    )  # fmt: skip
    for who in ("flash", "flash_in_order"):
        row = {"part": "repeat", "what": "time", "who": who, "batch": batch, "heads": heads}
        row |= {"seq_len": n, "head_dim": head_dim, "dtype": plan["dtype"]}
        result.rows.append({**row, **_samples(timings[who])})
    ratio = timings["flash_in_order"].median_ms / timings["flash"].median_ms
    how = f"torch's flash backward with deterministic algorithms over default; N = {n}, in turns"
    result.add("repeat.flash_in_order.cost", ratio, "1", how)


def _in_order(fn: Callable[[], Any]) -> Callable[[], Any]:
    """``fn`` with torch's deterministic algorithms switched on while it runs.

    Not with ``warn_only``: then the flash backend warns and stays as it is.  And without filling
    new tensors with NaN, which that switch does besides.
    """
    import torch
    import torch.utils.deterministic as filling

    def run():
        kept = torch.are_deterministic_algorithms_enabled()
        filled = filling.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        filling.fill_uninitialized_memory = False
        try:
            return fn()
        finally:
            torch.use_deterministic_algorithms(kept)
            filling.fill_uninitialized_memory = filled

    return run


def _repeat(
    result: Result, who: str, fn: Callable, times: int, sizes: dict[str, int], dtype: str
) -> None:
    import torch

    first = [t.clone() for t in fn()]
    unequal = dict.fromkeys(_GRADIENTS, 0)
    largest = dict.fromkeys(_GRADIENTS, 0.0)
    any_unequal = 0
    for _ in range(times):
        differs = False
        for name, one, again in zip(_GRADIENTS, first, fn(), strict=True):
            if not torch.equal(one, again):
                unequal[name] += 1
                differs = True
                gap = (one.double() - again.double()).abs().max().item()
                largest[name] = max(largest[name], gap)
        any_unequal += differs
    row = {"part": "repeat", "what": "equal", "who": who, **sizes, "dtype": dtype, "times": times}
    result.rows.append({**row, "unequal": unequal, "largest": largest})
    where = f"of {times} repeats of the same backward pass, {_where({**sizes, 'dtype': dtype})}"
    how = f"repeats with a bit different from the first, {where}, N = {sizes['seq_len']}"
    result.add(f"repeat.{who}.unequal", any_unequal, "1", how)
    result.add(f"repeat.{who}.of", times, "1", "repeats")
    for name in _GRADIENTS:
        how = f"repeats in which {name} differs, {where}"
        result.add(f"repeat.{who}.{name}", unequal[name], "1", how)
    how = f"largest difference between two runs, any gradient, {where}"
    result.add(f"repeat.{who}.largest", max(largest.values()), "1", how)


# -- summary ------------------------------------------------------------------------------


def _summarise(result: Result) -> None:
    """The figures that speak for many rows."""
    rows = [r for r in result.select(part="ways", what="peak") if r["measured"] is not None]
    for way in WAYS:
        gaps = [abs(r["measured"] / r["predicted"] - 1) for r in rows if r["way"] == way]
        if gaps:
            how = "largest |measured / predicted − 1| of the peaks of that way"
            result.add(f"mem.{way}.gap", max(gaps), "1", how)
    for other in ("flash", "cudnn"):
        for ours in ("labkit", "triton"):
            ratios = [
                result.value(key) for key in result.results
                if key.startswith(f"sweep.{ours}.") and key.endswith(f".vs_{other}")
            ]
            if ratios:
                how = f"of the sweep's ratios of {other}'s time to ours"
                result.add(f"sweep.{ours}.vs_{other}.least", min(ratios), "1", f"smallest {how}")
                result.add(f"sweep.{ours}.vs_{other}.most", max(ratios), "1", f"largest {how}")
    for what in ("forward", "backward", "both"):
        for n in sorted({r["seq_len"] for r in result.select(part="ways", what=what)}):
            keys = {way: f"time.{way}.n{n}.{what}" for way in WAYS}
            if keys["recomputed"] not in result:
                continue
            for way in ("saved", "checkpointed", "sdpa"):
                if keys[way] in result:
                    ratio = result.value(keys[way]) / result.value(keys["recomputed"])
                    how = f"time of {way} over recomputed, {what}, N = {n}"
                    result.add(f"{keys[way]}.ratio", ratio, "1", how)
