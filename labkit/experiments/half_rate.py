r"""Half rate: operations, time, memory, error and gradients of computing every other row.

Source 000 changes a plain PyTorch Native Sparse Attention so that even positions are computed and
odd ones copied, and predicts what that saves.  Its typical sizes are measured here: T = 2048,
16 blocks of 64 tokens, 32 query heads, 8 KV heads, head_dim 128, float32.

``flops``
    counted by torch's FlopCounterMode while the loop runs, beside what the source states.
``time``
    forward, and forward with backward, of the loop over positions (``labkit/nsa/loop.py``), of the
    same in large steps (``naive_nsa``), of the compression stage, and of the whole, full and at
    half rate in turns.  Loops are launched by the host step by step: wall clock, synchronised;
    on a CPU the processor's time, which does not count who else is busy.
``memory``
    the peak above the inputs of each, without autograd and with, and what autograd keeps.
``error``
    odd rows at half rate against the full form, for queries whose neighbours are correlated by
    :math:`\rho`.  For scores of variance 1 and a share f of blocks in common with the neighbour,
    one expects :math:`\sqrt{2 (1 - f e^{\rho - 1})}`.
``lookup``
    each query looks for one key; how often the value found is the right one.
``gradients``
    against the full form's, with the same gradient of the output.
``kernels``
    the same idea with ``nsa_selected_attention``: odd rows choose nothing.  Beside it, half as many
    blocks for every row, which is as many operations.

Taught in chapter 15 (is "twice as fast, same function" true?).  Claims C26 to C31.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from labkit.errors import check_choice
from labkit.experiments import Progress, Result, _release_memory
from labkit.experiments._jobs import Jobs

__all__ = [
    "CHAPTERS",
    "FORMS",
    "NEEDS_GPU",
    "PARTS",
    "RATES",
    "TITLE",
    "correlated_queries",
    "expected_error",
    "lookup_rate",
    "random_blocks",
    "run",
]

TITLE = "Half rate: what computing every other row saves, and what it changes"
CHAPTERS = ("15",)
NEEDS_GPU = False

PARTS = ("flops", "time", "memory", "error", "lookup", "gradients", "kernels")
#: what is run: the loop, the loop that makes token numbers query by query, large steps, the
#: compression stage alone, and the whole: compression, and the loop over what it chose
FORMS = ("loop", "lean_loop", "reference", "compression", "whole")
RATES = ("full", "half")
#: seconds after which no further job begins: a record of most is better than none
_LIMIT = 100

#: what the source calls typical, and what it states for these sizes (MB as MiB; FLOPs as it counts)
NOTES = {
    "seq_len": 2048, "count": 16, "block_size": 64, "heads": 32, "kv_heads": 8, "head_dim": 128,
}  # fmt: skip


def expected_error(rho: float, common: float = 1.0, variance: float = 1.0) -> float:
    r"""Relative error of an odd row, :math:`\sqrt{2(1 - f e^{\sigma^2(\rho - 1)})}`.

    For values that are independent of the keys, many keys, normal scores of ``variance``
    :math:`\sigma^2`, and neighbours whose scores are correlated by ``rho`` :math:`= \rho` on the
    share ``common`` :math:`= f` of their keys and chosen apart on the rest.

    >>> round(expected_error(0.0), 3), expected_error(1.0)
    (1.124, 0.0)
    """
    import math

    return math.sqrt(max(0.0, 2 * (1 - common * math.exp(variance * (rho - 1)))))


# -- inputs ----------------------------------------------------------------------------------------


def correlated_queries(shape: Sequence[int], rho: float, generator: Any, device: str) -> Any:
    """``[B, T, HQ, D]`` unit normal; neighbours in T are correlated by ``rho``."""
    import torch

    noise = torch.randn(*shape, generator=generator, device=device)
    if not rho:
        return noise
    fresh = (1 - rho * rho) ** 0.5
    q = torch.empty_like(noise)
    q[:, 0] = noise[:, 0]
    for t in range(1, shape[1]):
        q[:, t] = rho * q[:, t - 1] + fresh * noise[:, t]
    return q


def random_blocks(
    batch: int, seq_len: int, kv_heads: int, count: int, block_size: int, device: str,
    *, pattern: str = "random", seed: int = 0,
) -> Any:  # fmt: skip
    """A causal choice ``[B, T, H, count]`` int32: block 0, the current, the previous, and others.

    Ascending, then −1.  ``"local"``: 32 neighbours share most of the others.
    """
    import torch

    check_choice("pattern", pattern, ("random", "local"))
    generator = torch.Generator(device).manual_seed(seed)
    blocks = -(-seq_len // block_size)
    own = torch.arange(seq_len, device=device) // block_size
    score = torch.rand(batch, seq_len, kv_heads, blocks, generator=generator, device=device)
    if pattern == "local":
        shape = (batch, -(-seq_len // 32), kv_heads, blocks)
        common = torch.rand(shape, generator=generator, device=device)
        score = 0.06 * score + common.repeat_interleave(32, 1)[:, :seq_len]
    c = torch.arange(blocks, device=device)
    ahead = (c > own[:, None])[None, :, None]
    forced = (c == 0) | (c == own[:, None]) | (c == own[:, None] - 1)
    score = score.masked_fill(forced[None, :, None], 3.0).masked_fill(ahead, -1.0)
    best, index = score.topk(min(count, blocks), -1)
    index = torch.where(best < 0, blocks, index).sort(-1).values
    index = torch.where(index == blocks, -1, index)
    return torch.nn.functional.pad(index, (0, count - index.shape[-1]), value=-1).int()


def _inputs(sizes: dict[str, int], device: str, *, grad: bool = False, rho: float = 0.0) -> Any:
    """q, k, v, gates of 1, a chosen set of blocks, and dout; float32."""
    import torch

    generator = torch.Generator(device).manual_seed(15)
    t, heads, width = sizes["seq_len"], sizes["heads"], sizes["head_dim"]
    q = correlated_queries((1, t, heads, width), rho, generator, device)
    k, v = (
        torch.randn(1, t, sizes["kv_heads"], width, generator=generator, device=device)
        for _ in range(2)
    )
    dout = torch.randn(q.shape, generator=generator, device=device)
    blocks = random_blocks(
        1, t, sizes["kv_heads"], sizes["count"], sizes["block_size"], device
    )
    q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
    gates = torch.ones(q.shape[:3], device=device)
    return q, k, v, gates, blocks, dout


def _form(form: str, rate: str, sizes: dict[str, int]) -> Callable:
    """``(q, k, v, gates, blocks) -> output`` of one of :data:`FORMS`."""
    from labkit.nsa import naive_nsa, naive_nsa_compression
    from labkit.nsa.loop import selection_loop

    half, size, count = rate == "half", sizes["block_size"], sizes["count"]
    if form in ("loop", "lean_loop"):
        options = {"block_size": size, "half_rate": half, "tokens_at_once": form == "loop"}
        return lambda q, k, v, gates, blocks: selection_loop(q, k, v, blocks, **options)
    if form == "reference":
        return lambda q, k, v, gates, blocks: naive_nsa(
            q, k, v, gates, None, blocks, None, size, half_rate=half
        )
    if form == "compression":
        return lambda q, k, v, gates, blocks: naive_nsa_compression(
            q, k, v, gates, count, size, None, half_rate=half
        )[1]

    def whole(q, k, v, gates, blocks):
        chosen, o = naive_nsa_compression(q, k, v, gates, count, size, None, half_rate=half)
        one = selection_loop(q, k, v, chosen, block_size=size, half_rate=half)
        return o + gates[..., None] * one

    return whole


def _training(form: str, rate: str, sizes: dict[str, int]) -> Callable:
    import torch

    forward = _form(form, rate, sizes)

    def both(q, k, v, gates, blocks, dout):
        return torch.autograd.grad(forward(q, k, v, gates, blocks), (q, k, v), dout)

    return both


# -- the plan --------------------------------------------------------------------------------------


def _plan(quick: bool, device: str) -> dict[str, Any]:
    if device == "cuda":
        from labkit.memory import free_memory

        sizes = dict(NOTES)
        while sizes["seq_len"] > 128 and 1.3 * _kept(sizes) + 2**31 > (free_memory("cuda") or 0):
            sizes["seq_len"] //= 2  # a smaller card: the same loop, fewer turns
        if quick:
            sizes["seq_len"] = min(sizes["seq_len"], 256)
        return {
            "sizes": sizes,
            "samples": 3,
            "rhos": (0.0, 0.9, 1.0) if quick else (0.0, 0.5, 0.9, 0.99, 1.0),
            "error": {**NOTES, "seq_len": 2048},
            "lookup": {"seq_len": 1024, "heads": 8, "head_dim": 64, "block_size": 64},
            "gradients": {**NOTES, "seq_len": 256, "count": 4, "head_dim": 64},
            "kernels": [(2048, 32, 8, "random")] + [
                (t, 64, 4, pattern)
                for t in (() if quick else (8192, 32768))
                for pattern in ("random", "local")
            ],
            "rep_ms": 30 if quick else 60,
        }
    small = {"seq_len": 32, "count": 2, "block_size": 8, "heads": 4, "kv_heads": 2, "head_dim": 32}
    return {
        "sizes": small if quick else {**small, "seq_len": 256, "count": 8, "block_size": 16},
        "samples": 3,
        "rhos": (0.0, 0.9, 1.0) if quick else (0.0, 0.5, 0.9, 0.99, 1.0),
        "error": {
            "seq_len": 384, "count": 6, "block_size": 16, "heads": 4, "kv_heads": 2, "head_dim": 64,
        },
        "lookup": {"seq_len": 128, "heads": 2, "head_dim": 64, "block_size": 16},
        "gradients": small,
        "kernels": [],  # how long the interpreter takes says nothing about a kernel
        "rep_ms": 20,
    }  # fmt: skip


def _kept(sizes: dict[str, int]) -> int:
    from labkit.nsa.loop import loop_saved_bytes

    names = ("seq_len", "count", "block_size", "heads", "head_dim")
    return loop_saved_bytes(**{name: sizes[name] for name in names})


def _where(sizes: dict[str, int]) -> str:
    return (
        f"T = {sizes['seq_len']}, {sizes['count']} blocks of {sizes['block_size']}, "
        f"{sizes['heads']} heads, {sizes['kv_heads']} KV heads, head_dim {sizes['head_dim']}, "
        "float32"
    )


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
        why.  Keys: ``flops.<loop|compression>.<full|half>``, ``flops.claimed``, ``flops.ratio``,
        ``time.<form>.<forward|training>.<full|half>`` and ``speedup.<form>.<forward|training>``,
        ``time.copy``, ``peak.<form>.<forward|training>.<full|half>`` and ``….saving`` (the share
        of the full form's peak that half rate saves), ``error.rho<ρ>.<measured|expected|common>``,
        ``lookup.<full|half>.<even|odd>``, ``gradients.<dq_odd|dq|dk|dv>``,
        ``kernels.<pattern>.n<T>.<forward|backward>.<full|half|fewer>`` and ``….speedup``.
    """
    jobs = Jobs(_plan, quick, device, parts, PARTS)
    job, plan = jobs.add, jobs.plan
    job("flops", "operations", _flops)
    for rho in plan["rhos"]:
        job("error", f"error, ρ = {rho}", _error, rho)
    job("lookup", "lookup", _lookup)
    job("gradients", "gradients", _gradients)
    for case in plan["kernels"]:
        job("kernels", "kernels, T = {}, {} heads, {} KV heads, {}".format(*case), _kernels, *case)
    if jobs.device == "cuda" and {"memory", "time"} & set(parts):
        jobs.also("room for what autograd keeps", functools.partial(_make_room, plan))
    for passes in ("forward", "training"):
        for form in FORMS:
            if form == "lean_loop" and passes == "training":
                continue  # what autograd keeps is the same
            job("memory", f"peak, {form}, {passes}", _memory, form, passes)
            if form != "lean_loop":
                job("time", f"time, {form}, {passes}", _time, form, passes)
    job("time", "the copy of block_indices", _copy)
    # torch keeps the room between the jobs: the driver is not asked for it again
    result = jobs.run(progress, limit_s=_LIMIT, tidy=lambda failed: gc.collect())
    _release_memory()
    if jobs.device == "cuda" and plan["sizes"]["seq_len"] < NOTES["seq_len"]:
        result.notes.append(
            f"the loop ran at T = {plan['sizes']['seq_len']}: at {NOTES['seq_len']} autograd would "
            f"keep {_kept(NOTES) / 2**30:.0f} GiB, or the run is quick."
        )
    return result


def _make_room(plan: dict[str, Any]) -> None:
    """Take from the driver, in one piece, what the longest loop will need.

    Thousands of tensors of 16 MiB taken one by one would be thousands of calls of the driver.
    """
    import torch

    from labkit.memory import free_memory

    _release_memory()
    wanted = int(1.15 * _kept(plan["sizes"])) + 4 * 2**30
    torch.empty(min(wanted, int(0.85 * (free_memory("cuda") or 0))), dtype=torch.int8,
                device="cuda")  # fmt: skip
    # What libraries take once and keep is taken before anything is measured.
    *inputs, dout = _inputs({**plan["sizes"], "seq_len": 64}, "cuda", grad=True)
    _training("whole", "full", plan["sizes"])(*inputs, dout)


# -- operations ------------------------------------------------------------------------------------


def _flops(result: Result, plan: dict[str, Any], device: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from labkit.nsa.model import claimed_flops

    sizes = plan["sizes"]
    inputs = _inputs(sizes, device)[:5]
    names = ("seq_len", "count", "block_size", "heads", "head_dim")
    claimed = claimed_flops(**{name: sizes[name] for name in names})
    how = f"as source 000 counts, multiply-adds of the loop; {_where(sizes)}"
    result.add("flops.claimed", claimed, "FLOP", how)
    counted = {}
    for form in ("loop", "compression"):
        for rate in RATES:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                _form(form, rate, sizes)(*inputs)
            counted[form, rate] = counter.get_total_flops()
            row = {"part": "flops", "form": form, "rate": rate, "flops": counted[form, rate]}
            result.rows.append(row | {"claimed": claimed if form == "loop" else None} | sizes)
            how = f"FlopCounterMode, a multiply-add is two; forward, {_where(sizes)}"
            result.add(f"flops.{form}.{rate}", counted[form, rate], "FLOP", how)
    ratio = counted["loop", "full"] / counted["loop", "half"]
    result.add("flops.ratio", ratio, "1", f"full over half rate, loop; {_where(sizes)}")


# -- time ------------------------------------------------------------------------------------------


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _clock(device: str) -> tuple[Callable[[], float], str]:
    """What is read before and after, and its name.

    On a CPU that others use as well a wall clock would measure them, too.
    """
    if device == "cpu":
        return time.process_time, "processor time"
    return time.perf_counter, "wall clock, synchronised"


def _in_turns(functions: dict[str, Callable], device: str, samples: int) -> dict[str, list[float]]:
    """Milliseconds of each by :func:`_clock`, after one warm-up each."""
    clock, _ = _clock(device)
    out: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(samples):
        order = list(functions) if turn % 2 == 0 else list(functions)[::-1]
        for name in order:
            _wait(device)
            start = clock()
            made = functions[name]()
            _wait(device)
            out[name].append(round((clock() - start) * 1e3, 6))
            del made
    return out


def _time(result: Result, plan: dict[str, Any], device: str, form: str, passes: str) -> None:
    import torch

    sizes, training = plan["sizes"], passes == "training"
    *inputs, dout = _inputs(sizes, device, grad=training)
    functions = {}
    for rate in RATES:
        make = _training(form, rate, sizes) if training else _form(form, rate, sizes)
        functions[rate] = functools.partial(make, *inputs, *([dout] if training else []))
    with torch.set_grad_enabled(training):
        samples = _in_turns(functions, device, plan["samples"])
    _, method = _clock(device)
    for rate in RATES:
        middle = median(samples[rate])
        result.rows.append(
            {"part": "time", "form": form, "passes": passes, "rate": rate, **sizes,
             "samples_ms": samples[rate], "median_ms": middle, "method": method}
        )  # fmt: skip
        how = f"median of {len(samples[rate])}, {method}, full and half in turns; {_where(sizes)}"
        result.add(f"time.{form}.{passes}.{rate}", middle / 1e3, "s", how)
    ratio = median(f / h for f, h in zip(samples["full"], samples["half"], strict=True))
    how = f"full over half rate, median of pairs; {_where(sizes)}"
    result.add(f"speedup.{form}.{passes}", ratio, "1", how)


def _copy(result: Result, plan: dict[str, Any], device: str) -> None:
    from labkit.nsa.half_rate import copy_even_rows
    from labkit.timing import time_fn

    sizes = plan["sizes"]
    blocks = _inputs(sizes, device)[4]
    timing = time_fn(functools.partial(copy_even_rows, blocks), device=device,
                     rep_ms=plan["rep_ms"], warmup_ms=5, max_samples=100)  # fmt: skip
    samples = [round(ms, 6) for ms in timing.samples_ms]
    result.rows.append(
        {"part": "time", "form": "copy", "passes": "forward", "rate": "half", **sizes,
         "samples_ms": samples, "median_ms": median(samples), "method": timing.method}
    )  # fmt: skip
    how = f"odd rows of block_indices copied, median of {timing.n}; {_where(sizes)}"
    result.add("time.copy", timing.median_ms / 1e3, "s", how)
    result.add("copied", blocks.numel() // 2, "1", f"T/2 · H · S; {_where(sizes)}")


# -- memory ----------------------------------------------------------------------------------------


def _memory(result: Result, plan: dict[str, Any], device: str, form: str, passes: str) -> None:
    import torch

    from labkit.memory.measuring import CPU_METHOD, CUDA_METHOD

    sizes, training = plan["sizes"], passes == "training"
    *inputs, dout = _inputs(sizes, device, grad=training)
    inputs = [*inputs, dout] if training else inputs
    peaks = {}
    for rate in RATES:
        make = _training(form, rate, sizes) if training else _form(form, rate, sizes)
        call = functools.partial(make, *inputs)
        with torch.set_grad_enabled(training):
            peak = (_cuda_peak if device == "cuda" else _cpu_peak)(call)
        method = CUDA_METHOD if device == "cuda" else CPU_METHOD
        peaks[rate] = peak
        result.rows.append(
            {"part": "memory", "form": form, "passes": passes, "rate": rate, **sizes,
             "measured": peak, "method": method}
        )  # fmt: skip
        how = f"{method}, above the inputs; {_where(sizes)}"
        result.add(f"peak.{form}.{passes}.{rate}", peak, "bytes", how)
    saving = 1 - peaks["half"] / peaks["full"]
    how = f"share of the full form's peak that half rate saves; {_where(sizes)}"
    result.add(f"peak.{form}.{passes}.saving", saving, "1", how)


def _cuda_peak(call: Callable) -> int:
    """Peak of the bytes asked of torch's allocator above what was alive before."""
    import torch

    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del out
    return peak


def _cpu_peak(call: Callable) -> int:
    """Peak of torch's CPU allocator above what was alive before, by the profiler's events.

    ``labkit.memory.measure`` also finds out which operator made each tensor, which takes long for
    the thousands of a loop.
    """
    import json
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from torch.profiler import ProfilerActivity, profile

    from labkit.memory.measuring import _without_profiler_noise

    call()
    with TemporaryDirectory() as folder, _without_profiler_noise():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = call()
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del out
    changes = [e for e in events if e.get("name") == "[memory]" and "Bytes" in e.get("args", {})]
    changes = [e for e in changes if e["args"].get("Device Type", 0) == 0]
    live = peak = 0
    alive = set()
    for event in sorted(changes, key=lambda e: e["ts"]):
        size, address = event["args"]["Bytes"], event["args"].get("Addr")
        if size > 0:
            alive.add(address)
        elif address not in alive:
            continue  # it was alive before and never counted
        else:
            alive.discard(address)
        live += size
        peak = max(peak, live)
    if not peak:
        raise RuntimeError("the profiler saw no memory events")
    return peak


# -- what it computes ------------------------------------------------------------------------------


def _error(result: Result, plan: dict[str, Any], device: str, rho: float) -> None:
    import torch

    from labkit.nsa import naive_nsa, naive_nsa_compression

    sizes = plan["error"]
    q, k, v, gates, *_ = _inputs(sizes, device, rho=rho)
    size, count = sizes["block_size"], sizes["count"]
    with torch.no_grad():
        blocks, _ = naive_nsa_compression(q, k, v, None, count, size, None)
        full, half = (
            naive_nsa(q, k, v, gates, None, blocks, None, size, half_rate=rate == "half")
            for rate in RATES
        )
    first = size * count  # from here on a query has to choose
    assert first % 2 == 0
    rows = {"odd": slice(first + 1, None, 2), "even": slice(first, None, 2),
            "all": slice(first, None)}  # fmt: skip
    error = {
        name: ((half - full)[:, at].norm() / full[:, at].norm()).item() for name, at in rows.items()
    }
    even, odd = blocks[:, first:-1:2], blocks[:, first + 1 :: 2]
    same = (odd[..., :, None] == even[..., None, :]).any(-1).float().mean().item()
    expected = expected_error(rho, same)
    result.rows.append(
        {"part": "error", "rho": rho, **sizes, "common": same, "expected": expected, **error}
    )
    where = f"queries of neighbours correlated by {rho}, scores of variance 1; {_where(sizes)}"
    key = f"error.rho{rho:g}"
    how = f"‖half − full‖ / ‖full‖ of the odd rows; {where}"
    result.add(f"{key}.measured", error["odd"], "1", how)
    result.add(f"{key}.all", error["all"], "1", f"the same of all rows; {where}")
    result.add(f"{key}.expected", expected, "1", f"√(2(1 − f e^(ρ − 1))); {where}")
    result.add(f"{key}.common", same, "1", f"f, blocks that neighbours have in common; {where}")


def lookup_rate(*, half_rate: bool, seq_len: int, heads: int, head_dim: int, block_size: int,
                device: str = "cpu", seed: int = 0) -> dict[str, float]:  # fmt: skip
    """How often a query that looks for one earlier key finds that key's value.

    Keys are random unit vectors; query t is a large multiple of one key chosen among those up to
    t, so that full attention returns its value.  Every block is selected.

    Returns
    -------
    dict
        the share found at ``even`` and at ``odd`` positions.
    """
    import torch

    from labkit.nsa import naive_nsa

    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, seq_len, heads, head_dim)
    k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    k, v = (torch.nn.functional.normalize(x, dim=-1) for x in (k, v))
    t = torch.arange(seq_len, device=device)
    wanted = (torch.rand(seq_len, generator=generator, device=device) * (t + 1)).long()
    q = 40 * head_dim**0.5 * k[:, wanted]
    blocks = -(-seq_len // block_size)
    every = torch.arange(blocks, device=device).expand(1, seq_len, heads, blocks)
    gates = torch.ones(shape[:3], device=device)
    with torch.no_grad():
        o = naive_nsa(q, k, v, gates, None, every, None, block_size, half_rate=half_rate)
        found = torch.einsum("bthd,bnhd->bhtn", o, v).argmax(-1)  # whose value it is
    right = (found == wanted).float().mean(dim=(0, 1))
    return {"even": right[::2].mean().item(), "odd": right[1::2].mean().item()}


def _lookup(result: Result, plan: dict[str, Any], device: str) -> None:
    for rate in RATES:
        rates = lookup_rate(half_rate=rate == "half", device=device, **plan["lookup"])
        result.rows.append({"part": "lookup", "rate": rate, **plan["lookup"], **rates})
        for where, share in rates.items():
            how = f"share of queries at {where} positions that find the value they look for"
            result.add(f"lookup.{rate}.{where}", share, "1", how)


def _gradients(result: Result, plan: dict[str, Any], device: str) -> None:
    sizes = plan["gradients"]
    *inputs, dout = _inputs(sizes, device, grad=True)
    full, half = (_training("reference", rate, sizes)(*inputs, dout) for rate in RATES)
    row = {"part": "gradients", **sizes, "dq_odd": half[0][:, 1::2].abs().max().item()}
    for name, a, b in zip(("dq", "dk", "dv"), full, half, strict=True):
        row[name] = ((a - b).norm() / a.norm()).item()
        row[f"{name}_cosine"] = ((a * b).sum() / (a.norm() * b.norm())).item()
        how = f"‖half − full‖ / ‖full‖, same dO, selection; {_where(sizes)}"
        result.add(f"gradients.{name}", row[name], "1", how)
        result.add(f"gradients.{name}_cosine", row[f"{name}_cosine"], "1", f"cosine; {how}")
    how = f"largest |dq| at an odd position at half rate; {_where(sizes)}"
    result.add("gradients.dq_odd", row["dq_odd"], "1", how)
    result.rows.append(row)


# -- with kernels ----------------------------------------------------------------------------------


def _kernels(
    result: Result, plan: dict[str, Any], device: str, t: int, heads: int, kv: int, pattern: str
) -> None:
    """Full, at half rate (odd rows choose nothing), and with half as many blocks."""
    import torch

    from labkit.nsa import nsa_selected_attention
    from labkit.nsa.half_rate import spread
    from labkit.timing import time_many

    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    generator = torch.Generator(device).manual_seed(t)
    q, k, v, dout = (
        torch.randn(1, t, h, 128, generator=generator, device=device).to(dtype)
        for h in (heads, kv, kv, heads)
    )
    blocks = random_blocks(1, t, kv, 16, 64, device, pattern=pattern)
    even = blocks.clone()
    even[:, 1::2] = -1
    fewer = random_blocks(1, t, kv, 8, 64, device, pattern=pattern)
    forms = {
        "full": lambda: nsa_selected_attention(q, k, v, blocks),
        "half": lambda: spread(nsa_selected_attention(q, k, v, even)[:, ::2], t),
        "fewer": lambda: nsa_selected_attention(q, k, v, fewer),
    }
    options = {"device": device, "rep_ms": plan["rep_ms"], "warmup_ms": 20, "max_samples": 100}
    with torch.no_grad():
        timed = {"forward": time_many(forms, **options)}
    for x in (q, k, v):
        x.requires_grad_()
    outs = {name: form() for name, form in forms.items()}
    back = {
        name: functools.partial(torch.autograd.grad, o, (q, k, v), dout, retain_graph=True)
        for name, o in outs.items()
    }
    timed["backward"] = time_many(back, **options)
    for passes, timings in timed.items():
        ratios = timings.ratios("full")
        for name, timing in timings.items():
            samples = [round(ms, 6) for ms in timing.samples_ms]
            result.rows.append(
                {"part": "kernels", "pattern": pattern, "seq_len": t, "heads": heads,
                 "kv_heads": kv, "passes": passes, "rate": name, "samples_ms": samples,
                 "median_ms": median(samples), "method": timing.method}
            )  # fmt: skip
            where = f"{pattern} blocks, 16 of 64, T = {t}, {heads} heads, {kv} KV heads, D = 128"
            key = f"kernels.{pattern}.n{t}.{passes}.{name}"
            how = f"median of {timing.n}, in turns; {where}"
            result.add(key, timing.median_ms / 1e3, "s", how)
            if name != "full":
                how = f"times faster than full; {where}"
                result.add(f"{key}.speedup", ratios[name], "1", how)
