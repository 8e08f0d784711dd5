"""Bandwidth and latency of every place where bytes live, and the rate of the matrix units.

On a GPU, with the kernels of ``labkit.kernels``:

``copy``         y = x at growing sizes: the cliff where two buffers no longer fit in L2.
``read``         one buffer read again and again past L1: L2, then device memory, read only.
``read_l1``      each multiprocessor reads its own part again and again: L1.
``shared``       lookups in a table in shared memory, without and with bank conflicts.
``latency``      a pointer chase through growing working sets.
``parallelism``  the same read by one program, two, four …: how many bytes must be in flight.
``reuse``        r passes over a large buffer, whole or in blocks that stay in cache, in one
                 kernel; ``reuse_kernels`` the same with a kernel for each pass over a block.
``matmul``       C = AB by dtype, ours and torch's, in a short burst and sustained.
``launch``       what one almost empty kernel costs.

On a CPU, torch copies and multiplies on one thread: the same cliffs, at the sizes of the CPU's
caches, and the Triton kernels run once in the interpreter to be checked.

Every kernel's result is compared with an oracle first; ``error`` in a row is 0 where it must
be equal bit for bit, and relative to float64 for the matrix product.

Taught in chapter 03 (where do the bytes live?).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import linear_regression, median
from typing import Any

from labkit.errors import LabError
from labkit.experiments import Progress, Result
from labkit.experiments import steps as each
from labkit.units import GIB, KIB, MIB, format_bytes

TITLE = "Bandwidth and latency of the memory hierarchy"
CHAPTERS = ("03", "04")
NEEDS_GPU = False


def run(*, quick: bool, device: str | None = None, progress: Progress | None = None) -> Result:
    """Measure the hierarchy of this machine.

    Returns
    -------
    Result
        ``results``: ``copy_peak``, ``copy_cache_peak``, ``read_peak``, ``l2_read_peak``,
        ``l1_read_peak``, ``shared_peak`` (B/s); ``latency_{l1,l2,memory}`` (s) and
        ``…_cycles``; ``sm_clock`` (Hz); ``matmul_<dtype>_{ours,torch}_{burst,sustained}``
        (FLOP/s); ``launch_*`` (s); ``bytes_in_flight`` and ``bytes_in_flight_per_sm`` (bytes);
        and ratios of these.  On a CPU: the copies and the products.
        ``rows``: one per point, ``kind`` as in the list above.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    result = Result()
    parts = _on_cpu(quick) if device == "cpu" else _on_gpu(quick)
    for _, part in each(parts, progress, lambda item: item[0]):
        part(result)
        if device == "cuda":
            torch.cuda.empty_cache()
    return result


# -- the same experiment on both -------------------------------------------------------------


def blocked_passes(x: Any, passes: int, block: int) -> None:
    """``passes`` times x ← −x, block by block: each block is finished while it is in cache."""
    for part in x.split(block):
        for _ in range(passes):
            part.neg_()


def _reuse_by_calls(result: Result, quick: bool, device: str, kind: str) -> None:
    """Blocks that fit in cache against whole passes: the speed-up of keeping bytes close.

    Let a pass over the whole buffer run at β, and a pass over a block that is already in cache
    at ρβ (both measured here).  Of r passes over a block the first finds it in memory, the others
    in cache, so blocks should be r / (1 + (r − 1) / ρ) times faster: ρ only in the limit.
    """
    import torch

    from labkit.timing import time_many

    timer = {"warmup_ms": 1, "rep_ms": 10 if quick else 60, "device": device}
    with _OneThread() if device == "cpu" else nullcontext():
        size = 2**26 if device == "cpu" else min(2**30, 2 ** (_free().bit_length() - 3))
        # 256 KiB fit in a core's L2; a quarter of a GPU's leaves room for what both halves hold.
        block = 2**18 if device == "cpu" else _l2_bytes() // 4
        x = torch.randn(size // 4, device=device)
        small = x[: block // 4].clone()
        often = 64
        original = x.clone()
        ratio = 0.0
        for passes in (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32):
            blocked_passes(x, passes, block // 4)
            error = _equal("blocked_passes", x, -original if passes % 2 else original)
            turns = time_many(
                {
                    "whole": lambda r=passes: blocked_passes(x, r, x.numel()),
                    "blocks": lambda r=passes: blocked_passes(x, r, block // 4),
                    "in cache": lambda: blocked_passes(small, often, block // 4),
                },
                min_samples=5,
                **timer,
            )
            x.copy_(original)
            for how, timing in turns.items():
                moved = 2 * block * often if how == "in cache" else 2 * size * passes
                columns = {"how": how, "passes": passes, "bytes": size, "block": block}
                bandwidth = timing.rate(moved)
                row = _row(kind, timing, **columns, bandwidth=bandwidth, error=error)
                result.rows.append(row)
            # Rates in the same round, so that what else the machine does weighs on both.
            gain = turns.ratios("whole")
            ratio = gain["in cache"] * block * often / (size * passes)
            what = f"{passes} passes over {format_bytes(size)}: whole over in blocks of "
            result.add(f"{kind}_{passes}", gain["blocks"], "1", what + format_bytes(block))
        what = "a pass over a block in cache over a pass over the whole buffer, rates"
        result.add(f"{kind}_ratio", ratio, "1", what)


# -- rows -----------------------------------------------------------------------------------


def _row(kind: str, timing: Any, **columns: Any) -> dict[str, Any]:
    """One measured point; its median is that of the samples as they are stored."""
    samples = [round(s, 7) for s in timing.samples_ms]
    return {
        "kind": kind,
        **columns,
        "median_ms": median(samples),
        "samples_ms": samples,
        "method": timing.method,
    }


def _equal(what: str, got: Any, expected: Any) -> float:
    """0.0 if the results are equal bit for bit; otherwise the experiment is worth nothing."""
    import torch

    same = torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected
    if not same:
        raise LabError(f"hierarchy: {what} differs from its oracle; nothing was recorded.")
    return 0.0


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["bandwidth"])


def _add_rate(result: Result, key: str, row: dict[str, Any], what: str) -> None:
    result.add(
        key,
        row["bandwidth"],
        "B/s",
        f"{what}, {format_bytes(row['bytes'])} working set, "
        f"median of {len(row['samples_ms'])} ({row['method']})",
    )


# -- GPU ------------------------------------------------------------------------------------


def _on_gpu(quick: bool) -> list[tuple[str, Callable[[Result], None]]]:
    return [
        ("copy", lambda r: _copy(r, quick)),
        ("L2 and memory reads", lambda r: _read(r, quick)),
        ("L1 reads", lambda r: _read_l1(r, quick)),
        ("shared memory", lambda r: _shared(r, quick)),
        ("latency", lambda r: _latency(r, quick)),
        ("bytes in flight", lambda r: _parallelism(r, quick)),
        ("reuse", lambda r: _reuse(r, quick)),
        ("reuse by separate kernels", lambda r: _reuse_by_calls(r, quick, "cuda", "reuse_kernels")),
        ("launch", _launch),
        ("matmul", lambda r: _matmul(r, quick)),
    ]


def _l2_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def _sms() -> int:
    import torch

    device = torch.cuda.current_device()
    return torch.cuda.get_device_properties(device).multi_processor_count


def _free() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]


def _graph_of(fn: Callable[[], Any], count: int) -> Any:
    """``count`` calls captured in a CUDA graph: replayed, they cost no launches."""
    import torch

    fn()  # compiled and allocated before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            fn()
    return graph


def _copy(result: Result, quick: bool) -> None:
    """Copies of growing buffers, many to a graph: one alone is too short for its events."""
    import torch

    from labkit import kernels
    from labkit.timing import time_many

    rows = []
    for power in range(16, 31 if quick else 33, 2 if quick else 1):
        size = 2**power
        if 4 * size > _free():
            break
        x = torch.randn(size // 4, device="cuda")
        y = torch.empty_like(x)
        error = _equal("copy", kernels.copy(x), x)
        count = max(1, min(100, 512 * MIB // size))
        functions = {"ours": lambda x=x: kernels.copy(x), "torch": lambda x=x, y=y: y.copy_(x)}
        if count > 1:
            # Not a graph of one copy: its replay ran at two thirds of the rate on an H200, which
            # is what a copy engine, instead of the SMs, would give.
            functions = {who: _graph_of(fn, count).replay for who, fn in functions.items()}
        both = time_many(functions, warmup_ms=10, rep_ms=30, max_samples=100, flush_l2=False)
        for who, timing in both.items():
            rate = timing.rate(2 * size * count)
            columns = {"by": who, "bytes": 2 * size, "copies": count, "bandwidth": rate}
            rows.append(_row("copy", timing, **columns, error=error))
        del functions
    result.rows += rows
    l2 = _l2_bytes()
    for who, suffix in (("torch", ""), ("ours", "_ours")):
        mine = [row for row in rows if row["by"] == who]
        large = [row for row in mine if row["bytes"] >= 8 * l2]
        small = [row for row in mine if row["bytes"] <= l2]
        what = f"copy ({who}), bytes read plus bytes written"
        _add_rate(result, f"copy{suffix}_peak", _best(large), what)
        _add_rate(result, f"copy{suffix}_cache_peak", _best(small), what)


def _whole_chunks(size: int) -> int:
    """``size`` rounded so that 8 programs on each multiprocessor share it evenly.

    A program loads 8 KiB at a time; a buffer too small for a load each has fewer programs.
    """
    unit = 8 * KIB * _sms()
    loads = max(1, round(size / unit))
    return (loads if loads <= 8 else round(loads / 8) * 8) * unit


def _int32(size: int):
    import torch

    return torch.randint(0, 2**16, (size // 4,), dtype=torch.int32, device="cuda")


def _read(result: Result, quick: bool) -> None:
    from labkit import kernels
    from labkit.timing import time_fn

    sizes = [2**p for p in range(20, 34)] + [s * MIB for s in (24, 40, 48, 56, 72, 80, 96)]
    if quick:
        sizes = [2**p for p in (20, 22, 24, 25, 26, 28, 30, 32)]
    rows = []
    for size in sorted(set(map(_whole_chunks, sizes))):
        if 2 * size > _free():
            continue
        x = _int32(size)
        repeats = max(1, 4 * GIB // size)
        total = int(x.sum()) * repeats % 2**32
        error = _equal("read_sum", int(kernels.read_sum(x, repeats)), total)
        timing = time_fn(
            lambda x=x, n=repeats: kernels.read_sum(x, n),
            warmup_ms=5,
            rep_ms=25,
            flush_l2=False,
        )
        rate = timing.rate(repeats * size)
        row = _row("read", timing, bytes=size, repeats=repeats, bandwidth=rate, error=error)
        rows.append(row)
    result.rows += rows
    l2 = _l2_bytes()
    what = "integer sum read past L1 (ld.global.cg)"
    _add_rate(result, "l2_read_peak", _best([r for r in rows if r["bytes"] <= l2]), what)
    # Of the largest buffer alone, read once: of smaller ones, read again, L2 still holds a part,
    # and their rate is not that of memory.
    _add_rate(result, "read_peak", rows[-1], f"{what}, {rows[-1]['repeats']} reading(s)")
    value = result.value
    result.add(
        "l2_to_memory", value("l2_read_peak") / value("read_peak"), "1", "l2_read_peak / read_peak"
    )


def _read_l1(result: Result, quick: bool) -> None:
    from labkit import kernels
    from labkit.timing import time_fn

    rows = []
    for per_sm in (64,) if quick else (16, 32, 64, 128, 192, 256):  # KiB
        size = per_sm * KIB * _sms()
        x = _int32(size)
        repeats = 24 * GIB // size
        total = int(x.sum()) * repeats % 2**32
        error = _equal("read_sum", int(kernels.read_sum(x, repeats, level="l1")), total)
        timing = time_fn(
            lambda x=x, n=repeats: kernels.read_sum(x, n, level="l1"),
            warmup_ms=5,
            rep_ms=20,
            flush_l2=False,
        )
        columns = {"bytes": size, "bytes_per_sm": per_sm * KIB, "repeats": repeats}
        rate = timing.rate(repeats * size)
        rows.append(_row("read_l1", timing, **columns, bandwidth=rate, error=error))
    result.rows += rows
    _add_rate(result, "l1_read_peak", _best(rows), "integer sum, each program its own part")
    ratio = result.value("l1_read_peak") / result.value("read_peak")
    result.add("l1_to_read_peak", ratio, "1", "l1_read_peak / read_peak")


def _shared(result: Result, quick: bool) -> None:
    from labkit import kernels
    from labkit.timing import time_fn

    entries, lanes, per_sm, steps = 1024, 8192, 4, 2000
    programs = per_sm * _sms()
    table = kernels.rotation_table(entries, "cuda")
    rows = []
    for ways in (1, 32) if quick else (1, 2, 4, 8, 16, 32):
        start = kernels.conflict_start(programs, lanes, entries, ways=ways, device="cuda")
        after = kernels.shared_gather(table, start, steps)
        error = _equal("shared_gather", after, (start + steps) % entries)
        timing = time_fn(
            lambda s=start: kernels.shared_gather(table, s, steps, check=False),
            warmup_ms=5,
            rep_ms=20,
            flush_l2=False,
        )
        moved = kernels.shared_gather_bytes(entries, lanes, programs, steps)
        columns = {"bytes": 4 * entries * per_sm * _sms(), "moved": moved, "ways": ways}
        rate = timing.rate(moved)
        rows.append(_row("shared", timing, **columns, bandwidth=rate, error=error))
    result.rows += rows
    how = f"{lanes} lookups in a table of {entries} words per step, stores and loads counted"
    _add_rate(result, "shared_peak", rows[0], how)
    for row in rows[1:]:
        slower = row["median_ms"] / rows[0]["median_ms"]
        what = f"time with {row['ways']} lanes per bank over time without conflict"
        result.add(f"bank_conflict_{row['ways']}", slower, "1", what)
    relative = [row["median_ms"] / rows[0]["median_ms"] for row in rows]
    offset = linear_regression([row["ways"] for row in rows], relative).intercept
    what = "time at 0 lanes per bank over time without conflict, on the line fitted to all degrees"
    result.add("bank_conflict_offset", offset, "1", what)
    value = result.value
    for other in ("read_peak", "copy_peak"):
        result.add(
            f"shared_to_{other}", value("shared_peak") / value(other), "1", f"shared_peak / {other}"
        )


def _latency(result: Result, quick: bool) -> None:
    """Chase by level and working set; the kernel reads the counters itself.

    Past L1 (``.cg``): before each walk all multiprocessors read the whole buffer once, so that
    L2 holds what it can hold of it, and each walk goes on where the one before stopped.
    Through L1 (``.ca``): at least 64 laps per walk, because L1 is emptied between kernels.
    """
    from labkit import kernels

    rows = []
    walked = {
        "l1": [2**p for p in range(12, 18)],
        "l2": sorted([2**p for p in range(12, 31)] + [s * MIB for s in (20, 24, 28, 40, 48, 56)]),
    }
    if quick:
        walked = {
            "l1": [2**14, 2**16],
            "l2": [2**p for p in (14, 17, 20, 23, 25, 27, 28)],
        }
    for level, sizes in walked.items():
        for size in sizes:
            if 2 * size > _free():
                continue
            chain = kernels.make_chain(size, device="cuda")
            nodes = size // 128
            steps = max(2**16, 64 * nodes) if level == "l1" else min(2**16, max(2**14, nodes))
            at, walks = 0, []
            for _ in range(3 if quick else 6):
                if level == "l2":
                    kernels.read_sum(chain, 1)
                walk = kernels.clocked_chase(chain, steps, start=at, level=level, check=False)
                index, cycles, nanoseconds = walk.tolist()
                walks.append((cycles, nanoseconds))
                at = index
            walks = walks[1:]  # the first compiled and warmed up
            error = _check_chase(chain, level)
            samples = [nanoseconds / 1e6 for _, nanoseconds in walks]
            rows.append(
                {
                    "kind": "latency",
                    "level": level,
                    "bytes": size,
                    "steps": steps,
                    "cycles": median(cycles / steps for cycles, _ in walks),
                    "seconds": median(ns / steps for _, ns in walks) / 1e9,
                    "clock": median(cycles / ns for cycles, ns in walks) * 1e9,
                    "error": error,
                    "median_ms": median(samples),
                    "samples_ms": samples,
                    "method": "%clock64 and %globaltimer read by the kernel around its loop",
                }
            )
    result.rows += rows
    l2 = _l2_bytes()
    through = [r for r in rows if r["level"] == "l1" and r["bytes"] <= 64 * KIB]
    past = [r for r in rows if r["level"] == "l2"]
    chosen = {
        "l1": max(through, key=lambda r: r["bytes"]),
        "l2": min((r for r in past if r["bytes"] >= MIB), key=lambda r: r["seconds"]),
        "memory": max((r for r in past if r["bytes"] >= 4 * l2), key=lambda r: r["bytes"]),
    }
    for place, row in chosen.items():
        how = (
            f"pointer chase, one 128-byte line per step, {format_bytes(row['bytes'])} working set, "
            f"{row['steps']} steps, median of {len(row['samples_ms'])} walks"
        )
        result.add(f"latency_{place}", row["seconds"], "s", how)
        result.add(f"latency_{place}_cycles", row["cycles"], "cycles", how)
    clock = median(row["clock"] for row in rows)
    result.add("sm_clock", clock, "Hz", "%clock64 over %globaltimer during the pointer chases")
    value = result.value
    result.add(
        "latency_memory_to_l1",
        value("latency_memory") / value("latency_l1"),
        "1",
        "latency_memory / latency_l1",
    )
    result.add(
        "bytes_in_flight",
        value("read_peak") * value("latency_memory"),
        "bytes",
        "read_peak × latency_memory (Little's law)",
    )
    result.add(
        "bytes_in_flight_per_sm",
        value("bytes_in_flight") / _sms(),
        "bytes",
        f"bytes_in_flight / {_sms()} multiprocessors",
    )


def _check_chase(chain, level: str) -> float:
    """Five steps followed on the host and on the device."""
    from labkit import kernels

    index = 0
    for _ in range(5):
        index = int(chain[index])
    return _equal("pointer_chase", int(kernels.pointer_chase(chain, 5, level=level)), index)


def _parallelism(result: Result, quick: bool) -> None:
    """The same buffer, read once by more and more programs of 8 KiB in flight each."""
    from labkit import kernels
    from labkit.timing import time_fn

    # A power of two, so that every number of programs shares it without a mask: a mask would
    # make each load wait for the comparison before it and halve what is in flight.
    size = 2 ** min(29, _free().bit_length() - 3)
    x = _int32(size)
    expected = int(x.sum()) % 2**32
    programs, rows = 1, []
    while programs <= 16 * _sms():
        error = _equal("read_sum", int(kernels.read_sum(x, 1, programs=programs)), expected)
        timing = time_fn(
            lambda p=programs: kernels.read_sum(x, 1, programs=p),
            warmup_ms=2,
            rep_ms=15,
            max_samples=40,
        )
        columns = {"bytes": size, "programs": programs, "bytes_per_program": 8 * KIB}
        rate = timing.rate(size)
        rows.append(_row("parallelism", timing, **columns, bandwidth=rate, error=error))
        programs *= 4 if quick else 2
    result.rows += rows
    result.add("one_program_read", rows[0]["bandwidth"], "B/s", "read_sum by one program")


def _reuse(result: Result, quick: bool) -> None:
    """Readings of a buffer larger than L2, whole or in blocks that fit, within one kernel.

    Nothing holds the programs of a kernel together, so the longer it runs, the further they
    drift apart: then some are blocks ahead, or many ask for the same lines at once, and what is
    measured is neither L2 nor memory.  On an H200 the rate of 32 readings of each of 500 blocks
    in one kernel came out above that of a single block.  So every kernel reads a block 128
    times, or 128/r blocks r times, but at most 64 blocks.
    """
    from labkit import kernels
    from labkit.timing import time_fn, time_many

    # So few programs that all of them run at once: each block is then read by all together.
    programs = 8 * _sms()
    block = 16 * KIB * programs
    turns = 128
    # So large that what L2 still holds of it at the next reading hardly counts: less than a
    # hundredth of 8 GiB.
    pieces = max(1, min(1 if quick else 8, _free() // 4 // (64 * block)))
    blocks = 64 * pieces
    x = _int32(blocks * block)
    once = int(x.sum())
    columns = {"block": block, "bytes": blocks * block}
    timer = {"warmup_ms": 5, "rep_ms": 20 if quick else 60, "flush_l2": False}

    def in_blocks(passes: int) -> list[Any]:
        at_a_time = min(64, turns // passes)
        parts = x.split(at_a_time * block // 4)
        return [kernels.read_sum(p, passes, programs=programs, blocks=at_a_time) for p in parts]

    one = x[: block // 4]
    expected = int(one.sum()) * turns % 2**32
    error = _equal("read_sum", int(kernels.read_sum(one, turns, programs=programs)), expected)
    in_cache = time_fn(lambda: kernels.read_sum(one, turns, programs=programs), **timer)
    rate = in_cache.rate(turns * block)
    here = {"how": "in cache", "passes": turns, "bytes": block, "block": block}
    result.rows.append(_row("reuse", in_cache, **here, bandwidth=rate, error=error))
    whole_rate = 0.0
    for passes in (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32):
        functions = {
            "whole": lambda r=passes: [kernels.read_sum(x, r, programs=programs)],
            "blocks": lambda r=passes: in_blocks(r),
        }
        expected = once * passes % 2**32
        error = max(
            _equal("read_sum", sum(map(int, fn())) % 2**32, expected) for fn in functions.values()
        )
        both = time_many(functions, **timer)
        for how, timing in both.items():
            bandwidth = timing.rate(passes * blocks * block)
            here = columns | {"how": how, "passes": passes, "bandwidth": bandwidth}
            result.rows.append(_row("reuse", timing, **here, error=error))
        if passes == 1:
            whole_rate = both["whole"].rate(blocks * block)
        what = f"{passes} readings of {format_bytes(blocks * block)}: whole over in blocks of "
        speedup = both.ratios("whole")["blocks"]
        result.add(f"reuse_{passes}", speedup, "1", what + format_bytes(block))
    what = "read bandwidth of a block in L2 over that of the whole buffer, read once"
    result.add("reuse_ratio", rate / whole_rate, "1", what)


def _launch(result: Result) -> None:
    """An almost empty kernel: alone on an idle GPU, back to back, and replayed from a graph."""
    import torch

    from labkit import kernels
    from labkit.timing import time_fn

    x = torch.zeros(1024, device="cuda")
    count = 200
    back_to_back = {
        "torch": lambda: x.zero_(),
        "triton": lambda: kernels.copy(x),
    }
    for who, fn in back_to_back.items():

        def many(fn=fn) -> None:
            for _ in range(count):
                fn()

        queued = time_fn(many, warmup_ms=10, rep_ms=60, flush_l2=False, launch="included")
        per = queued.seconds / count
        how = f"{count} launches in a row on an idle GPU, divided by {count}, median of {queued.n}"
        result.rows.append(_row("launch", queued, by=who, launches=count, seconds=per))
        result.add(f"launch_{who}", per, "s", how)
    alone = time_fn(back_to_back["torch"], warmup_ms=5, rep_ms=20, launch="hidden")
    result.rows.append(_row("launch", alone, by="gpu alone", launches=1, seconds=alone.seconds))
    result.add("launch_empty_kernel", alone.seconds, "s", "one zero_ of 4 KiB, launch hidden")
    graph = _graph_of(back_to_back["torch"], count)
    replayed = time_fn(graph.replay, warmup_ms=10, rep_ms=60, flush_l2=False)
    per = replayed.seconds / count
    result.rows.append(_row("launch", replayed, by="graph", launches=count, seconds=per))
    result.add("launch_graph", per, "s", f"{count} kernels replayed from a CUDA graph, per kernel")


def _matmul(result: Result, quick: bool) -> None:
    import torch

    from labkit import kernels
    from labkit.timing import time_fn, time_many

    half = ["bfloat16"] if torch.cuda.get_device_capability() >= (8, 0) else []
    plan = [(name, "ieee", 8192) for name in (*half, "float16")]
    plan += [("float32", "ieee", 4096), ("float32", "tf32", 8192)]
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for dtype, precision, n in plan[:1] if quick else plan:
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            name = "tf32" if precision == "tf32" else dtype
            a, b = (torch.randn(n, n, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
            functions = {
                "ours": lambda a=a, b=b, p=precision: kernels.matmul(a, b, precision=p),
                "torch": lambda a=a, b=b: a @ b,
            }
            exact = a[:128].double() @ b.double()
            errors = {
                who: ((fn()[:128].double() - exact).norm() / exact.norm()).item()
                for who, fn in functions.items()
            }
            both = time_many(functions, warmup_ms=20, rep_ms=80, flush_l2=False)
            for who, timing in both.items():
                error = {"relative": errors[who]}
                columns = {"by": who, "dtype": name, "size": n, "load": "in turns"}
                row = _row("matmul", timing, **columns, rate=timing.rate(2 * n**3), error=error)
                result.rows.append(row)
                what = f"{n}³ on normal random data, in turns with the other, median of {timing.n}"
                result.add(f"matmul_{name}_{who}", timing.rate(2 * n**3), "FLOP/s", what)
                what = f"‖C − C64‖ / ‖C64‖ over the first 128 rows of {n}³"
                result.add(f"matmul_{name}_{who}_error", errors[who], "1", what)
            share = both.ratios("torch")["ours"]
            what = "time of torch over time of ours, median over rounds"
            result.add(f"matmul_{name}_ours_to_torch", share, "1", what)
            if dtype != "float32" and not quick:
                _burst_and_sustained(result, name, n, functions["torch"], time_fn)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _burst_and_sustained(
    result: Result, name: str, n: int, fn: Callable[[], Any], time_fn: Callable
) -> None:
    """The same product after a second of rest, and after three seconds of work.

    The matrix units draw more power than the card may sustain: it lowers its clock.
    """
    import torch

    torch.cuda.synchronize()
    time.sleep(1.0)
    timings = {"burst": time_fn(fn, warmup_ms=1, rep_ms=15, min_samples=8, flush_l2=False)}
    end = time.perf_counter() + 3.0
    while time.perf_counter() < end:
        for _ in range(50):
            fn()
        torch.cuda.synchronize()
    timings["sustained"] = time_fn(fn, warmup_ms=1, rep_ms=150, flush_l2=False)
    for load, timing in timings.items():
        rate = timing.rate(2 * n**3)
        columns = {"by": "torch", "dtype": name, "size": n, "load": load}
        result.rows.append(_row("matmul", timing, **columns, rate=rate))
        when = {"burst": "after 1 s of rest", "sustained": "after 3 s of the same work"}[load]
        result.add(
            f"matmul_{name}_{load}",
            rate,
            "FLOP/s",
            f"torch, {n}³ on normal random data, {when}, median of {timing.n}",
        )


# -- CPU ------------------------------------------------------------------------------------


def _on_cpu(quick: bool) -> list[tuple[str, Callable[[Result], None]]]:
    return [
        ("copy", lambda r: _cpu_copy(r, quick)),
        ("order", lambda r: _cpu_order(r, quick)),
        ("reuse", lambda r: _reuse_by_calls(r, quick, "cpu", "reuse")),
        ("matmul", lambda r: _cpu_matmul(r, quick)),
        ("kernels in the interpreter", _interpreted),
    ]


class _OneThread:
    """Caches belong to a core: measure one, and give torch its threads back afterwards."""

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *exc: object) -> None:
        import torch

        torch.set_num_threads(self.before)


def _cpu_copy(result: Result, quick: bool) -> None:
    import torch

    from labkit.timing import time_fn

    rows = []
    with _OneThread():
        for power in range(13, 27 if quick else 29):
            size = 2**power
            x = torch.randn(size // 4)
            y = torch.empty_like(x)
            timing = time_fn(
                lambda x=x, y=y: y.copy_(x),
                warmup_ms=2,
                rep_ms=15 if quick else 100,
                max_samples=400,
                device="cpu",
            )
            error = _equal("copy", y, x)
            columns = {"by": "torch", "bytes": 2 * size, "bandwidth": timing.rate(2 * size)}
            rows.append(_row("copy", timing, **columns, error=error))
    result.rows += rows
    what = "torch copy on one CPU thread, bytes read plus bytes written"
    _add_rate(result, "copy_peak", rows[-1], what)
    _add_rate(result, "copy_cache_peak", _best(rows), what)


def gather_lines(lines: Any, orders: Any, out: Any) -> None:
    """Copy lines into one small buffer, a few thousand at a time, in the order given."""
    import torch

    for order in orders:
        torch.index_select(lines, 0, order, out=out)


def _cpu_order(result: Result, quick: bool) -> None:
    """Every line of 64 bytes of a growing buffer, gathered in order and at random."""
    import torch

    from labkit.timing import time_many

    at_a_time = 2**12  # 256 KiB of output, written again and again
    out = torch.empty(at_a_time, 16)
    with _OneThread():
        for power in range(14, 27, 3 if quick else 1):
            size = 2**power
            lines = torch.randn(size // 64, 16)
            count = lines.shape[0]
            laps = max(1, 2**15 // count)  # a short buffer is walked several times
            orders = {
                "in order": torch.arange(count).repeat(laps),
                "at random": torch.cat([torch.randperm(count) for _ in range(laps)]),
            }
            error = 0.0
            functions = {}
            for name, order in orders.items():
                split = order.split(at_a_time)
                gather_lines(lines, split, out)
                error = max(error, _equal("gather_lines", out, lines[split[-1]]))
                functions[name] = lambda s=split, x=lines: gather_lines(x, s, out)
            timings = {"warmup_ms": 2, "rep_ms": 10 if quick else 60, "min_samples": 3}
            both = time_many(functions, max_samples=200, device="cpu", **timings)
            for order, timing in both.items():
                seconds = timing.seconds / (laps * count)
                columns = {"order": order, "bytes": size, "seconds": seconds}
                result.rows.append(_row("order", timing, **columns, error=error))


def _cpu_matmul(result: Result, quick: bool) -> None:
    import torch

    from labkit.timing import time_fn

    n = 512 if quick else 2048
    for dtype in ("float32", "float64"):
        a, b = (torch.randn(n, n, dtype=getattr(torch, dtype)) for _ in range(2))
        timing = time_fn(lambda a=a, b=b: a @ b, warmup_ms=20, rep_ms=60, device="cpu")
        exact = a.double() @ b.double()
        error = {"relative": (((a @ b).double() - exact).norm() / exact.norm()).item()}
        rate = timing.rate(2 * n**3)
        columns = {"by": "torch", "dtype": dtype, "size": n, "load": "in turns"}
        result.rows.append(_row("matmul", timing, **columns, rate=rate, error=error))
        what = f"torch, {n}³ on normal random data, all threads, median of {timing.n}"
        result.add(f"matmul_{dtype}_torch", rate, "FLOP/s", what)


def _interpreted(result: Result) -> None:
    """Run each Triton kernel once at a small size, if Triton is here; exact, not timed."""
    import torch

    from labkit import kernels
    from labkit.errors import MissingDependencyError, NoGpuError

    try:
        if kernels.backend() != "interpreter":
            result.notes.append("The Triton kernels are compiled here; --device cpu skips them.")
            return
    except (MissingDependencyError, NoGpuError) as error:
        result.notes.append(f"The Triton kernels were not run: {error}")
        return
    x = torch.randn(5000)
    integers = torch.randint(0, 2**16, (5000,), dtype=torch.int32)
    table = kernels.rotation_table(1024, "cpu")
    start = kernels.conflict_start(1, 1024, 1024)
    a, b = torch.randn(48, 40), torch.randn(40, 56)
    exact = a.double() @ b.double()
    chain = kernels.make_chain(4 * KIB, device="cpu")
    checks = {
        "copy": _equal("copy", kernels.copy(x), x),
        "read_sum": _equal(
            "read_sum", int(kernels.read_sum(integers, 3)), 3 * int(integers.sum()) % 2**32
        ),
        "pointer_chase": _check_chase(chain, "l2"),
        "shared_gather": _equal(
            "shared_gather", kernels.shared_gather(table, start, 4), (start + 4) % 1024
        ),
        "matmul": ((kernels.matmul(a, b).double() - exact).norm() / exact.norm()).item(),
    }
    for name, error in checks.items():
        result.rows.append({"kind": "interpreted", "kernel": name, "error": error})
