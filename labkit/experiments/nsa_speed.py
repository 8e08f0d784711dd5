r"""Native Sparse Attention: how fast, through which road, and where it loses.

HQ = 64 query heads over H = 4 KV heads of 128, blocks of 64, 16 of them, window 512.  Every part
times its functions in turns, so that what counts is the ratio.  Parts, each of which may be missing
from a result with the reason among its notes:

``patterns``
    how many different blocks neighbouring queries choose, counted and by the model.
``traffic``
    (interpreter) bytes that the kernels' loads and stores ask for, counted, and by the model.
``sweep``
    selection, and the whole of three branches with top-k, beside dense attention (torch's cuDNN
    backend), forward and backward, against T.  Two patterns of choice:
    *random* (neighbours share the forced blocks only) and *local* (32 neighbours share three
    quarters).  The whole chooses for itself: from queries without a relation, and from queries of
    which 32 neighbours are alike.
``branches``
    each branch alone, forward and backward: pooling, compression, top-k, selection, window, gates.
``roads``
    selection by queries, by keys, and by hand: the same problem, each way.
``groups``
    G = 1 … 64 with the same number of query heads: the same useful operations.  Groups below 8
    forward by each of their roads, too.
``memory``
    bytes that a call holds, at two lengths.
``error``
    each implementation against float64.
``topk``
    claim C32: torch.topk over stored scores, and choosing while the scores are made.
``peers``
    fla-core where it can be imported (a note says if not): two lengths of the sweep, in turns with
    ours and with dense attention once more, its error, and its top-k.  A ratio to fla's time is one
    of this part; times of ours and of dense attention are those of the other parts.

fla's kernels take minutes to compile and to choose their configurations, so they come last, and no
other figure waits for them.  Its compilers start with ours, sleep while anything is
timed, and go on before their turn.  A run ends with its budget of time, and records what it has.

``memory`` and ``counters``, the bytes that are held and moved, are also measured for
``nsa_bytes.py``.

Taught in chapter 13 (when is sparse faster than dense).  Claims C26, C32.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from labkit.errors import LabError, check_choice
from labkit.experiments import Progress, Result, has_gpu
from labkit.experiments import steps as each
from labkit.experiments._jobs import end, first_line
from labkit.nsa import model
from labkit.nsa.model import PATTERNS, Shape

__all__ = [
    "CHAPTERS",
    "NEEDS_GPU",
    "PARTS",
    "PASSES",
    "ROADS",
    "TITLE",
    "choices",
    "counted_unions",
    "crossing",
    "crossover_on",
    "run",
]

TITLE = "Sparse attention: against dense, by branch, by road, by group"
CHAPTERS = ("13",)
NEEDS_GPU = False

PARTS = (
    "patterns", "traffic", "sweep", "branches", "roads", "groups", "memory", "error", "topk",
    "counters", "peers",
)  # fmt: skip
PASSES = ("forward", "backward")
ROADS = ("queries", "keys", "hopper")
#: neighbours that have a preference in common in the pattern ``local``
_ALIKE = 32
#: at most so many samples of a row are kept
_SAMPLES = 15
#: no part is begun that would probably end after so many seconds, and what runs then ends
BUDGET_S = 300
#: what a part probably takes on an H200, where it is more than five seconds
_LONG = {("counters", 32768): 45, ("sweep", 131072): 15, ("sweep", 65536): 8,
         ("branches", 131072): 8}  # fmt: skip
#: for compiling ours beforehand, and for the profiler
_TIMEOUT_S = 60
#: what is left for fla's own times when its compilers have to end
_FOR_PEERS_S = 45


# -- the plan --------------------------------------------------------------------------------------


def _plan(quick: bool, device: str) -> dict[str, Any]:
    if device == "cpu":
        small = {"heads": 4, "kv_heads": 1, "head_dim": 16, "block_size": 16, "count": 4}
        return {
            "dtype": "float32",
            "patterns": [(2048, 1), (2048, 16)],
            "traffic": [{"seq_len": 128, **small, "window": 32}],
            "parts": ("patterns", "traffic"),
        }
    import torch

    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    if quick:
        return {
            # no peers: compiling theirs takes a minute
            "dtype": half, "rep_ms": 25, "warm": False,
            "patterns": [(2048, 16)],
            "sweep": [8192],
            "branches": [8192],
            "memory": [(2048, 8192)],
            "parts": ("patterns", "sweep", "branches"),
        }  # fmt: skip
    # what the chapter cannot do without comes first
    lengths = [8192, 32768, 65536, 2048, 4096, 16384]
    topk = [("n", n) for n in (4096, 8192, 16384, 32768, 65536)]
    return {
        "dtype": half, "rep_ms": 60, "warm": True,
        "patterns": [(32768, 1), (32768, 4), (32768, 16)],
        "sweep": [*lengths, 131072],
        "branches": [8192, 65536, 32768, 2048, 4096, 16384, 131072],
        "roads": [(n, pattern) for n in (32768, 8192) for pattern in PATTERNS],
        "groups": [*((8192, g, p) for p in PATTERNS for g in (16, 1, 2, 4, 8, 32, 64)),
                   *((32768, g, p) for p in PATTERNS for g in (16, 1, 2, 4))],
        "memory": [(8192, 32768)],
        "error": ["rows", "gradients"],
        "topk": [*topk, *(("s", s) for s in (4, 16, 64))],
        "counters": [32768],
        # 32,768 first: fla's kernels choose their configurations at the first length they meet
        "peers": [("sweep", 32768), ("sweep", 8192), ("error", "rows"), ("error", "gradients"),
                  *(("topk", knob) for knob in topk)],
        "parts": ("patterns", "sweep", "branches", "roads", "groups", "memory", "error", "topk",
                  "peers"),
    }  # fmt: skip


def run(
    *,
    quick: bool,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Sequence[str] | None = None,
    budget_s: float = BUDGET_S,
) -> Result:
    """Measure the parts that this device can.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    parts : some of :data:`PARTS`; by default all that the device can.
    budget_s : what would probably end after so many seconds is left out, what then still runs is
        stopped, and notes say so.  On a GPU, where the full form also ends when the process is
        told to (SIGTERM), with what it has.

    Returns
    -------
    Result
        ``results`` with the keys ``dense.<pass>.n<T>``, ``selection.<who>.<pattern>.<pass>.n<T>``
        and ``whole.<who>.<pattern>.<pass>.n<T>`` (s), ``….vs_fla.…`` (our time over theirs) and
        ``….speedup.…`` (dense over ours), ``crossover.<what>.<pattern>.<pass>`` (tokens),
        ``branch.<name>.<pass>.n<T>``, ``road.<road>.<pattern>.<pass>.n<T>``,
        ``group.labkit.<pattern>.<pass>.g<G>`` (8,192 tokens; else with ``.n<T>``),
        ``group.road.<road>.<pattern>.forward.g<G>.n<T>`` (groups below 8), ``error.…``,
        ``topk.…``, ``model.…`` and ``union.…``; with
        those parts ``memory.<what>.…``, ``l2.<step>.<pattern>`` and ``hbm.…``.
        ``rows``: one per measured function, ``part`` as in the list above.
    """
    import torch

    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    plan = _plan(quick, device)
    for part in parts or ():
        check_choice("part", part, PARTS)
    parts_here = plan["parts"] if parts is None else [p for p in PARTS if p in parts and p in plan]
    work = [(part, item) for part in parts_here for item in plan[part]]
    # 128k after the others: it takes longest, and every other figure stands without it
    work.sort(key=lambda w: (w[0] == "peers", w[1] == 131072))
    result, begin = Result(), time.monotonic()
    torch.manual_seed(0)
    do = {
        "patterns": _patterns, "traffic": _traffic, "sweep": _sweep, "branches": _branches,
        "roads": _roads, "groups": _groups, "memory": _memory, "error": _error, "topk": _topk,
        "counters": _counters, "peers": _peers,
    }  # fmt: skip
    if device == "cuda" and quick:
        result.notes.append("The short form has no peers: compiling their kernels takes long.")
    timed = device == "cuda" and not quick
    finished = 0
    with _Compilers(result, plan["dtype"]) as compilers:
        try:
            with _ends(budget_s if timed else None):
                wants_peers = plan.get("warm") and "peers" in parts_here
                if wants_peers and not _warm(compilers, everything=parts is None):
                    result.notes.append("fla-core is not installed: no row is its.")
                    work = [w for w in work if w[0] != "peers"]
                for part, item in each(work, progress, lambda w: f"{w[0]} {w[1]}"):
                    spent = time.monotonic() - begin
                    if part == "peers" and spent + _FOR_PEERS_S < budget_s:
                        compilers.finish(budget_s - _FOR_PEERS_S - spent)
                        spent = time.monotonic() - begin
                    if device == "cuda" and spent + _LONG.get((part, item), 5) > budget_s:
                        result.notes.append(f"{part} {item}: left out after {spent:.0f} s.")
                        finished += 1
                        continue
                    try:
                        do[part](result, plan, device, item)
                    except Exception as error:  # one point fewer, not one record fewer
                        result.notes.append(f"{part} {item}: {first_line(error)}")
                    took = round(time.monotonic() - begin - spent, 2)
                    row = {"part": "clock", "item": f"{part} {item}", "seconds": took}
                    result.rows.append(row)
                    finished += 1
                    if device == "cuda":
                        torch.cuda.empty_cache()
        except _Over as over:
            spent = time.monotonic() - begin
            for part, item in work[finished:]:
                result.notes.append(f"{part} {item}: stopped after {spent:.0f} s ({over}).")
    _summarise(result)
    return result


class _Over(BaseException):
    """The time is over; not an ``Exception``, so that nothing on the way takes it for its own."""


@contextmanager
def _ends(after_s: float | None) -> Iterator[None]:
    """Raise :class:`_Over` in the block after so many seconds, or when the process is to end."""
    if after_s is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: object) -> None:
        raise _Over("its budget" if number == signal.SIGALRM else "it was told to end")

    before = {number: signal.signal(number, over) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, max(0.01, after_s))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


# -- what is attended ------------------------------------------------------------------------------


def choices(
    shape: Shape, pattern: str = "random", device: str = "cpu", *, seed: int = 0
) -> Any:
    """A choice of blocks for every query: ``[1, T, H, S]`` int32, ascending, −1 behind.

    Each query scores every block that it may see and takes the best, after the forced ones.
    ``"random"``: every score is drawn for itself.  ``"local"``: a score is one that 32 neighbours
    have in common, plus noise of 0.06 of its range (``labkit.nsa.model.PATTERNS``).
    """
    import torch

    spread = PATTERNS[check_choice("pattern", pattern, PATTERNS)]
    generator = torch.Generator(device=device).manual_seed(seed)
    made = {"device": device, "generator": generator}
    n, heads, blocks = shape.seq_len, shape.kv_heads, shape.blocks
    block = torch.arange(blocks, device=device)
    taken = min(shape.count, blocks)
    out = torch.full((1, n, heads, shape.count), -1, dtype=torch.int32, device=device)
    for start in range(0, n, 4096):  # all scores at once would be gigabytes at 128k
        position = torch.arange(start, min(n, start + 4096), device=device)
        score = torch.rand(len(position), heads, blocks, **made)
        if spread is not None:
            groups = -(-len(position) // _ALIKE)
            common = torch.rand(groups, heads, blocks, **made)
            score = score * spread + common.repeat_interleave(_ALIKE, 0)[: len(position)]
        own = (position // shape.block_size)[:, None]
        forced = (block < shape.initial) | ((own - shape.local < block) & (block <= own))
        score = score.masked_fill(forced[:, None], 2.0).masked_fill((block > own)[:, None], -1.0)
        value, index = score.topk(taken, -1)
        ascending = torch.where(value < 0, blocks, index).sort(-1).values
        out[0, position, :, :taken] = torch.where(ascending == blocks, -1, ascending).int()
    return out


def counted_unions(blocks: Any, tile: int) -> float:
    """Different blocks per tile of ``tile`` queries, in the mean over tiles and KV heads."""
    import torch

    b, n, heads, _ = blocks.shape
    whole = n // tile * tile
    x = blocks[:, :whole].reshape(b, whole // tile, tile, heads, -1).transpose(2, 3).flatten(-2)
    x = x.sort(-1).values
    new = torch.ones_like(x, dtype=torch.bool)
    new[..., 1:] = x[..., 1:] != x[..., :-1]
    return (new & (x >= 0)).sum(-1).double().mean().item()


def _draw(shape: Shape, pattern: str, device: str, dtype: str, *, grad: bool = True) -> dict:
    """q, k, v, three gates and dO; in ``local`` 32 neighbouring queries are alike."""
    import torch

    from labkit.dtypes import torch_dtype

    made = {"device": device, "dtype": torch_dtype(dtype)}
    t, h, hk, d = shape.seq_len, shape.heads, shape.kv_heads, shape.head_dim
    q = torch.randn(1, t, h, d, **made)
    if pattern == "local":
        common = torch.randn(1, -(-t // _ALIKE), h, d, **made)
        q = 0.1 * q + common.repeat_interleave(_ALIKE, 1)[:, :t]
    out = {"q": q, "k": torch.randn(1, t, hk, d, **made), "v": torch.randn(1, t, hk, d, **made)}
    for name in ("g_cmp", "g_slc", "g_swa"):
        out[name] = torch.rand(1, t, h, **made)
    for x in out.values():
        x.requires_grad_(grad)
    out["do"] = torch.randn_like(q)
    return out


def _call_of(shape: Shape) -> Any:
    from labkit.nsa.call import Call

    return Call(
        scale=shape.head_dim**-0.5, block_size=shape.block_size, length=shape.l, stride=shape.d,
        count=shape.count, initial=shape.initial, local=shape.local, max_q=shape.seq_len,
        max_k=shape.seq_len,
    )  # fmt: skip


# -- who computes it -------------------------------------------------------------------------------


def _dense_backend(result: Result, x: Mapping[str, Any]) -> str:
    """The first of torch's fused backends that takes these heads; cuDNN's on the H200."""
    for backend in ("cudnn", "flash"):
        try:
            _dense({name: x[name][:, :256].detach() for name in "qkv"}, backend)
        except RuntimeError as error:
            result.notes.append(f"dense is not {backend}'s: {first_line(error)}")
        else:
            return backend
    raise LabError("torch has no fused attention for these tensors.")


def _dense(x: Mapping[str, Any], backend: str) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    from labkit.experiments.roofline import _only

    with _only(backend):
        out = scaled_dot_product_attention(
            *(x[name].transpose(1, 2) for name in "qkv"), is_causal=True, enable_gqa=True
        )
    return out.transpose(1, 2)


def _selection(shape: Shape, x: Mapping[str, Any], blocks: Any) -> Any:
    # as nsa_func calls it: the public function also reads the numbers on the host
    from labkit.nsa import ops

    return ops.attend_selected(x["q"], x["k"], x["v"], blocks, _call_of(shape))[0]


def _whole(shape: Shape, x: Mapping[str, Any], window: bool = True) -> Any:
    from labkit.nsa import nsa_func

    return nsa_func(
        x["q"], x["k"], x["v"], x["g_cmp"], x["g_slc"], x["g_swa"] if window else None,
        block_counts=shape.count, block_size=shape.block_size, window_size=shape.window,
    )  # fmt: skip


def _fla(what: str) -> Any:
    """A name of fla-core's ``parallel`` module."""
    from fla.ops.nsa import parallel

    return getattr(parallel, what)


def _fla_selection(shape: Shape, x: Mapping[str, Any], blocks: Any) -> Any:
    return _fla("ParallelNSAFunction").apply(
        x["q"], x["k"], x["v"], blocks, shape.count, shape.block_size, shape.head_dim**-0.5, None
    )


def _fla_whole(shape: Shape, x: Mapping[str, Any]) -> Any:
    # its window needs another package: compression, top-k and selection
    return _fla("parallel_nsa")(
        x["q"], x["k"], x["v"], g_cmp=x["g_cmp"], g_slc=x["g_slc"], g_swa=None,
        block_counts=shape.count, block_size=shape.block_size, window_size=0,
    )  # fmt: skip


class _Compilers:
    """Processes that compile kernels beforehand; Triton keeps what they compile on disk.

    They may be made to sleep, so that nothing of theirs runs beside what is timed.
    """

    def __init__(self, result: Result, dtype: str) -> None:
        self.result, self.dtype = result, dtype
        self.running: dict[str, tuple[subprocess.Popen, Path]] = {}
        self._folder: tempfile.TemporaryDirectory | None = None

    def start(self, jobs: Iterable[str]) -> None:
        """``jobs``: what ``_nsa_child`` calls them, with a length if they need one."""
        self._folder = self._folder or tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        # what they choose while others run is not to be kept: only what they compile is
        apart = {"LABKIT_CACHE": str(folder), "FLA_CACHE_RESULTS": "0"}
        environment = _with_path(dict(os.environ)) | apart
        for job in jobs:
            log = folder / (job.replace(" ", "_") + ".txt")
            whose, *length = job.split()
            with log.open("w") as file:
                self.running[job] = (subprocess.Popen(
                    [sys.executable, "-m", "labkit.experiments._nsa_child", "warm", whose,
                     self.dtype, *length],
                    env=environment, stdout=subprocess.DEVNULL, stderr=file,
                    start_new_session=True,
                ), log)  # fmt: skip

    def wait(self, jobs: Iterable[str], seconds: float) -> None:
        """Until these are done; those that are not by then are stopped, and a note says so."""
        begin = time.monotonic()
        waiting = [job for job in jobs if job in self.running]
        while waiting:
            process, log = self.running[waiting[0]]
            job, took = waiting[0], time.monotonic() - begin
            try:
                process.wait(max(0.05, seconds - took))
            except subprocess.TimeoutExpired:
                self.result.notes.append(f"compiling {job} took longer than {seconds:.0f} s.")
                end(process)
            else:
                if process.returncode:
                    last = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
                    self.result.notes.append(f"compiling {job} failed: {' '.join(last)[:200]}")
            del self.running[waiting.pop(0)]
        took = round(time.monotonic() - begin, 2)
        self.result.rows.append({"part": "clock", "item": "compiling", "seconds": took})

    def sleep(self) -> None:
        """Stop those that run, until :meth:`finish`; what the GPU has of theirs comes to an end."""
        if self._signal(signal.SIGSTOP):
            time.sleep(0.5)

    def finish(self, seconds: float) -> None:
        """Wake those that sleep, and wait until they are done."""
        if self._signal(signal.SIGCONT):
            self.wait(list(self.running), seconds)

    def _signal(self, number: int) -> bool:
        for process, _ in self.running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        return bool(self.running)

    def __enter__(self) -> _Compilers:
        return self

    def __exit__(self, *error: object) -> None:
        for process, _ in self.running.values():
            end(process)
        self.running.clear()
        if self._folder is not None:
            self._folder.cleanup()


def _warm(compilers: _Compilers, *, everything: bool) -> bool:
    """Compile ours, several processes at once; fla's begin, and sleep when ours are done.

    Returns whether there is an fla to compare with.
    """
    ours = ["labkit 32768", "labkit 2048"]
    if everything:
        ours += ["roads", "topk", *(f"group_{g}" for g in (1, 2, 4, 8, 32, 64))]
    compilers.start(ours)
    fla = _has_fla()
    if fla:
        compilers.start(f"{what} {n}" for n in (32768, 8192) for what in
                        ("fla_backward", "fla_whole", "fla_forward"))  # fmt: skip
    compilers.wait(ours, _TIMEOUT_S)
    compilers.sleep()
    return fla


def _has_fla() -> bool:
    try:
        _fla("parallel_nsa")
    except Exception:  # it imports much, and any of it may fail
        return False
    return True


def _with_path(environment: dict[str, str]) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    return environment | {"PYTHONPATH": path}


# -- timing ----------------------------------------------------------------------------------------


def _race(
    result: Result, plan: dict[str, Any], functions: dict[str, Callable[[], Any]],
    labels: dict[str, Any], extra: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Run each once, time those that ran in turns, add a row for each; median seconds by name."""
    import torch

    for name, fn in list(functions.items()):
        try:
            fn()
            torch.cuda.synchronize()
        except Exception as error:
            del functions[name]
            result.notes.append(f"{name} at {labels}: {first_line(error)}")
            torch.cuda.empty_cache()
    times = _in_turns(functions, plan["rep_ms"]) if functions else {}
    for name, samples in times.items():
        more = (extra or {}).get(name, {})
        samples[:] = [round(ms, 5) for ms in samples]  # the median is that of what is stored
        row = {**labels, "name": name, **more, "median_ms": median(samples)}
        result.rows.append({**row, "samples_ms": samples, "method": _METHOD})
    return {name: median(samples) / 1e3 for name, samples in times.items()}


_METHOD = (
    "CUDA events on the current stream, L2 overwritten before each, queued behind a spin of 2 ms, "
    "implementations in turns"
)


def _in_turns(functions: Mapping[str, Callable[[], Any]], rep_ms: float) -> dict[str, list[float]]:
    """Samples of each in milliseconds: one of each per round, every other round backwards.

    ``labkit.timing.time_many`` without its tests of the functions, which call each a dozen times:
    dense attention at 128k takes seconds.
    """
    import torch

    from labkit.timing import _Cuda

    cuda = _Cuda(flush=True, launch_included=False)
    spin = cuda._cycles(2e-3)
    slowest = 0.0
    for fn in functions.values():
        start, end = cuda.event_pair()
        start.record()
        fn()
        end.record()
        end.synchronize()
        slowest = max(slowest, start.elapsed_time(end))
        cuda.spin_cycles[id(fn)] = spin
    fewest = 3 if slowest > 400 else 5
    events: dict[str, list] = {name: [] for name in functions}
    for turn in range(max(fewest, min(_SAMPLES, round(rep_ms / slowest)))):
        names = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in names:
            events[name].append(cuda.record(functions[name], None))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}


def _gradient(out: Any, wanted: Sequence[Any], dout: Any) -> Callable[[], Any]:
    import torch

    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def _both(
    result: Result, plan: dict[str, Any], forward: dict[str, tuple[Callable, Sequence, Any]],
    labels: dict[str, Any],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Forward without a graph and then backward; ``forward``: name → (function, inputs, dO)."""
    import torch

    found = {}
    with torch.no_grad():
        found["forward"] = _race(
            result, plan, {name: fn for name, (fn, _, _) in forward.items()},
            {**labels, "pass": "forward"},
        )  # fmt: skip
    backward = {}
    for name, (fn, wanted, dout) in forward.items():
        if name not in found["forward"] or not wanted:
            continue
        try:
            out = fn()
            backward[name] = _gradient(out, wanted, dout)
        except Exception as error:
            result.notes.append(f"{name} with gradients at {labels}: {first_line(error)}")
    found["backward"] = _race(result, plan, backward, {**labels, "pass": "backward"})
    return found


# -- patterns --------------------------------------------------------------------------------------


def _patterns(result: Result, plan: dict[str, Any], device: str, item: tuple[int, int]) -> None:
    n, tile = item
    shape = Shape(seq_len=n)
    for pattern in PATTERNS:
        counted = counted_unions(choices(shape, pattern, device), tile)
        by_model = model.union_blocks(shape, tile, pattern) * tile / n
        row = {"part": "patterns", "pattern": pattern, "seq_len": n, "tile": tile}
        result.rows.append({**row, "counted": counted, "model": by_model})
        where = f"{pattern}, T = {n}, 16 of blocks of 64"
        how = f"different blocks that {tile} neighbouring queries choose, mean; {where}"
        result.add(f"union.{pattern}.m{tile}", counted, "1", how)
        result.add(f"union_model.{pattern}.m{tile}", by_model, "1", f"expected {how}")


# -- traffic, counted in the interpreter -----------------------------------------------------------


def _traffic(result: Result, plan: dict[str, Any], device: str, item: dict[str, Any]) -> None:
    """Loads of K and V by each portable road, counted."""
    import torch

    from labkit import io
    from labkit.nsa import selection

    shape = Shape(**item, dtype=plan["dtype"])
    x = _draw(shape, "random", device, plan["dtype"], grad=False)
    for pattern in PATTERNS:
        blocks = choices(shape, pattern)
        for road in ROADS[:2]:
            with torch.no_grad(), io.count(Q=x["q"], K=x["k"], V=x["v"]) as traffic:
                selection.forward(
                    *(x[name] for name in "qkv"), blocks, _call_of(shape), road=road
                )
            moved = {f"{t}.{kind}": size for (t, kind), size in traffic.by_tensor().items()}
            kv = sum(moved.get(f"{t}.load", 0) for t in "KV")
            row = {"part": "traffic", "road": road, "pattern": pattern, **item}
            result.rows.append({**row, "bytes": traffic.total().bytes, "kv": kv, "moved": moved})
            what = f"loads of K and V, road by {road}, {pattern}, counted in the interpreter"
            result.add(f"counted.{road}.{pattern}.kv", kv, "bytes", what)


# -- sweep -----------------------------------------------------------------------------------------


def _sweep(
    result: Result, plan: dict[str, Any], device: str, n: int, fla: bool = False
) -> None:
    """Everything at one length, forward and backward, in turns; with fla's, what it has too."""
    shape = Shape(seq_len=n, dtype=plan["dtype"])
    x = {pattern: _draw(shape, pattern, device, plan["dtype"]) for pattern in PATTERNS}
    one = x["random"]
    qkv = [one[name] for name in "qkv"]
    functions: dict[str, tuple[Callable, Sequence, Any]] = {
        "dense": (functools.partial(_dense, one, _dense_backend(result, one)), qkv, one["do"])
    }
    for pattern, here in x.items():
        blocks = choices(shape, pattern, device)
        every = [here[name] for name in ("q", "k", "v", "g_cmp", "g_slc", "g_swa")]
        functions[f"selection.labkit.{pattern}"] = (
            functools.partial(_selection, shape, one, blocks), qkv, one["do"]
        )  # fmt: skip
        if not fla:
            functions[f"whole.labkit.{pattern}"] = (
                functools.partial(_whole, shape, here), every, here["do"]
            )  # fmt: skip
        # its time does not depend on the pattern: once is enough to show it
        elif pattern == "random" or n == 32768:
            functions[f"selection.fla.{pattern}"] = (
                functools.partial(_fla_selection, shape, one, blocks.long()), qkv, one["do"]
            )  # fmt: skip
    # fla's whole has no window here: beside it, ours without one
    functions["two.labkit.random"] = (
        functools.partial(_whole, shape, one, False), [*qkv, one["g_cmp"], one["g_slc"]], one["do"]
    )  # fmt: skip
    if fla:
        functions["two.fla.random"] = (
            functools.partial(_fla_whole, shape, one), [*qkv, one["g_cmp"], one["g_slc"]],
            one["do"],
        )  # fmt: skip
    found = _both(result, plan, functions, {"part": "peers" if fla else "sweep", "seq_len": n})
    where = f"HQ 64, H 4, D 128, 16 blocks of 64, window 512, {plan['dtype']}, T = {n}; in turns"
    for what, times in found.items():
        for name, seconds in times.items():
            result.add(f"{name}.{what}.n{n}", seconds, "s", f"median, {what}, {where}")
        _ratios(result, times, what, n, where)
    totals = {
        name: sum(found[what][name] for what in PASSES)
        for name in found["forward"] if name in found["backward"]
    }  # fmt: skip
    _ratios(result, totals, "both", n, where)
    if fla:
        return
    for pattern, here in x.items():
        chosen = _chosen(shape, here)
        if chosen is not None:
            how = f"blocks that 16 neighbours chose together in the whole's {pattern} data, T = {n}"
            result.add(f"whole.union.{pattern}.n{n}", counted_unions(chosen, 16), "1", how)


def _ratios(result: Result, times: Mapping[str, float], what: str, n: int, where: str) -> None:
    for name, seconds in times.items():
        kind, who, pattern = (*name.split("."), "", "")[:3]
        if who != "labkit":
            continue
        theirs = times.get(f"{kind}.fla.{pattern}")
        if theirs:
            how = f"our time over fla-core's, {what}, {pattern}, {where}"
            result.add(f"{kind}.vs_fla.{pattern}.{what}.n{n}", seconds / theirs, "1", how)
        if "dense" in times:
            how = f"time of dense attention over ours, {what}, {pattern}, {where}"
            ratio = times["dense"] / seconds
            result.add(f"{kind}.speedup.{pattern}.{what}.n{n}", ratio, "1", how)


def _chosen(shape: Shape, x: Mapping[str, Any]) -> Any:
    """The blocks that the whole chooses for these inputs; None where its parts are not there."""
    import torch

    try:
        from labkit.nsa import ops
        from labkit.nsa.pooling import pool_mean

        call = _call_of(shape)
        with torch.no_grad():
            kc, vc = (pool_mean(x[name], shape.l, shape.d) for name in "kv")
            _, lse = ops.attend_compressed(x["q"], kc, vc, call)
            return ops.select(x["q"], kc, lse, call)
    except Exception:
        return None


# -- branches --------------------------------------------------------------------------------------


def _branches(result: Result, plan: dict[str, Any], device: str, n: int) -> None:
    """Each branch alone, on what the one before it gives."""
    import torch

    from labkit.nsa import api, ops
    from labkit.nsa.gates import combine
    from labkit.nsa.pooling import pool_mean

    shape = Shape(seq_len=n, dtype=plan["dtype"])
    x, call = _draw(shape, "random", device, plan["dtype"]), _call_of(shape)
    q, k, v, do = (x[name] for name in ("q", "k", "v", "do"))
    gates = [x[name] for name in ("g_cmp", "g_slc", "g_swa")]
    with torch.no_grad():
        kc, vc = (pool_mean(y, shape.l, shape.d) for y in (k, v))
        o_cmp, lse = ops.attend_compressed(q, kc, vc, call)
        blocks = ops.select(q, kc, lse, call)
        o_slc, _ = ops.attend_selected(q, k, v, blocks, call)
        o_swa, _ = api._attend_window(q, k, v, call, shape.window)
    kc, vc = kc.requires_grad_(), vc.requires_grad_()
    outputs = [y.requires_grad_() for y in (o_cmp, o_slc, o_swa)]
    functions: dict[str, tuple[Callable, Sequence, Any]] = {
        "pooling": (
            lambda: torch.cat([pool_mean(y, shape.l, shape.d) for y in (k, v)], 3), [k, v],
            torch.cat([torch.ones_like(kc), torch.ones_like(vc)], 3).detach(),
        ),
        "compression": (lambda: ops.attend_compressed(q, kc, vc, call)[0], [q, kc, vc], do),
        "top-k": (lambda: ops.select(q, kc, lse, call), (), None),
        "selection": (lambda: ops.attend_selected(q, k, v, blocks, call)[0], [q, k, v], do),
        "window": (
            lambda: api._attend_window(q, k, v, call, shape.window)[0], [q, k, v], do
        ),
        "gates": (lambda: combine(outputs, gates), [*outputs, *gates], do),
        "whole": (
            functools.partial(_whole, shape, x),
            [x[name] for name in ("q", "k", "v", "g_cmp", "g_slc", "g_swa")], do,
        ),
    }  # fmt: skip
    found = _both(result, plan, functions, {"part": "branches", "seq_len": n})
    useful = {what: model.flops(shape, what) for what in PASSES}
    for what, times in found.items():
        alone = {name: s for name, s in times.items() if name != "whole"}
        for name, seconds in times.items():
            how = f"{name} alone, {what}, T = {n}, random data; in turns"
            result.add(f"branch.{name}.{what}.n{n}", seconds, "s", how)
            if name != "whole":
                share = f"share of the sum of the branches, {what}, T = {n}"
                result.add(
                    f"branch.{name}.share.{what}.n{n}", seconds / sum(alone.values()), "1", share
                )
            if useful[what].get(name):
                rate = useful[what][name] / seconds
                how = f"useful operations of {name} over its time, {what}, T = {n}"
                result.add(f"branch.{name}.rate.{what}.n{n}", rate, "FLOP/s", how)
        result.add(f"branch.sum.{what}.n{n}", sum(alone.values()), "s", f"of all, {what}, T = {n}")


# -- roads and groups ------------------------------------------------------------------------------


def _roads(result: Result, plan: dict[str, Any], device: str, item: tuple[int, str]) -> None:
    """The same selection by each road."""
    import torch

    from labkit.nsa import selection, selection_backward

    n, pattern = item
    shape = Shape(seq_len=n, dtype=plan["dtype"])
    x, call = _draw(shape, "random", device, plan["dtype"], grad=False), _call_of(shape)
    q, k, v, do = (x[name] for name in ("q", "k", "v", "do"))
    blocks = choices(shape, pattern, device)
    with torch.no_grad():
        forward = {
            road: functools.partial(selection.forward, q, k, v, blocks, call, road=road)
            for road in ROADS
        }
        o, lse = selection.forward(q, k, v, blocks, call)
        backward = {
            road: functools.partial(
                selection_backward.backward, do, None, q, k, v, o, lse, blocks, call, road=road
            )
            for road in ROADS[1:]  # there is no stock backward pass by queries
        }
        for what, functions in (("forward", forward), ("backward", backward)):
            labels = {"part": "roads", "seq_len": n, "pattern": pattern, "pass": what}
            times = _race(result, plan, functions, labels)
            for road, seconds in times.items():
                how = f"selection by {road}, {what}, {pattern}, T = {n}; in turns"
                result.add(f"road.{road}.{pattern}.{what}.n{n}", seconds, "s", how)


def _groups(
    result: Result, plan: dict[str, Any], device: str, item: tuple[int, int, str]
) -> None:
    """64 query heads over 64 / G KV heads: useful operations do not depend on G."""
    n, group, pattern = item
    shape = Shape(seq_len=n, kv_heads=64 // group, dtype=plan["dtype"])
    x = _draw(shape, "random", device, plan["dtype"])
    blocks = choices(shape, pattern, device)
    qkv = [x[name] for name in "qkv"]
    functions = {"labkit": (functools.partial(_selection, shape, x, blocks), qkv, x["do"])}
    labels = {"part": "groups", "seq_len": n, "group": group, "pattern": pattern}
    found = _both(result, plan, functions, labels)
    for what, times in found.items():
        for who, seconds in times.items():
            how = f"selection, {who}, {what}, {pattern}, 64 heads in groups of {group}, T = {n}"
            key = f"group.{who}.{pattern}.{what}.g{group}"
            result.add(key if n == 8192 else f"{key}.n{n}", seconds, "s", how)
    if group < 8:
        _group_roads(result, plan, labels, [q.detach() for q in qkv], blocks, _call_of(shape))


def _group_roads(
    result: Result, plan: dict[str, Any], labels: dict[str, Any], qkv: list, blocks, call
) -> None:
    """The forward pass of a small group by each road, where all of them can be taken."""
    import torch

    from labkit.nsa import selection

    module = selection.hopper("hopper")
    if module is None or not module.supports(*qkv, call):
        return
    n, group, pattern = (labels[name] for name in ("seq_len", "group", "pattern"))
    with torch.no_grad():
        functions = {
            road: functools.partial(selection.forward, *qkv, blocks, call, road=road)
            for road in ("keys", "hopper", "both")
        }
        times = _race(result, plan, functions, {**labels, "pass": "forward by road"})
    for road, seconds in times.items():
        how = f"selection by {road}, forward, {pattern}, groups of {group}, T = {n}; in turns"
        result.add(f"group.road.{road}.{pattern}.forward.g{group}.n{n}", seconds, "s", how)


# -- memory ----------------------------------------------------------------------------------------


def _peak(fn: Callable[[], Any]) -> tuple[Any, int, int]:
    """What ``fn`` returns, the most it held beyond what was there, and what is left; bytes asked
    for, not the allocator's rounding."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = fn()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    left = stats["requested_bytes.all.current"] - before
    return out, stats["requested_bytes.all.peak"] - before, left


def _memory(result: Result, plan: dict[str, Any], device: str, lengths: tuple[int, int]) -> None:
    """Two lengths: the slope between them is bytes per token."""
    import torch

    measured: dict[str, list[int]] = {}
    predicted: dict[str, list[int]] = {}
    for n in lengths:
        shape = Shape(seq_len=n, dtype=plan["dtype"])
        x = _draw(shape, "random", device, plan["dtype"])
        wanted = [x[name] for name in ("q", "k", "v", "g_cmp", "g_slc", "g_swa")]
        warm = _whole(shape, x)
        torch.autograd.grad(warm, wanted, x["do"])
        del warm
        with torch.no_grad():
            out, peak, _ = _peak(functools.partial(_whole, shape, x))
        output = out.numel() * out.element_size()
        del out
        found = {"forward": peak - output}
        out, _, left = _peak(functools.partial(_whole, shape, x))
        found["kept"] = left - output
        grads, peak, _ = _peak(functools.partial(torch.autograd.grad, out, wanted, x["do"]))
        found["backward"] = peak - sum(g.numel() * g.element_size() for g in grads)
        del out, grads
        by_model = model.extra_bytes(shape)
        for what, value in found.items():
            measured.setdefault(what, []).append(value)
            predicted.setdefault(what, []).append(by_model[what])
            row = {"part": "memory", "what": what, "seq_len": n, "measured": value}
            result.rows.append({**row, "model": by_model[what]})
        del x, wanted
        torch.cuda.empty_cache()
    short, long = lengths
    words = {
        "forward": "held at the peak of a forward pass beyond inputs and output",
        "kept": "kept for the backward pass beyond inputs and output",
        "backward": "held at the peak of a backward pass beyond what was kept and the gradients",
    }
    for what, (first, last) in measured.items():
        how = f"{words[what]}, slope between T = {short} and {long}"
        result.add(f"memory.{what}.per_token", (last - first) / (long - short), "bytes", how)
        first_model, last_model = predicted[what]
        slope = (last_model - first_model) / (long - short)
        result.add(f"memory.{what}.model", slope, "bytes", f"by the model: {how}")
        for n, value in zip(lengths, (first, last), strict=True):
            result.add(f"memory.{what}.n{n}", value, "bytes", f"{words[what]}, T = {n}")
        # what the model does not have is workspace, which does not grow for ever
        rest = last - predicted[what][1]
        how = f"measured less the model at T = {long}: {words[what]}"
        result.add(f"memory.{what}.rest", rest, "bytes", how)
        # linear: the length times the slope is all there is
        how = f"bytes a token at T = {long} over those at T = {short}, {what}"
        result.add(f"memory.{what}.linear", last / long / (first / short), "1", how)


# -- error -----------------------------------------------------------------------------------------


def _error(
    result: Result, plan: dict[str, Any], device: str, item: str, fla: bool = False
) -> None:
    """Against float64, from the same inputs: rows of a long sequence, gradients of a short one."""
    import torch

    rows = item == "rows"
    shape = Shape(seq_len=32768 if rows else 2048, heads=32, kv_heads=2, dtype=plan["dtype"])
    x = _draw(shape, "random", device, plan["dtype"])
    q, k, v, do = (x[name] for name in ("q", "k", "v", "do"))
    blocks = choices(shape, "random", device)
    right = _right(shape, x, blocks, 64 if rows else shape.seq_len, torch.float64)
    functions: dict[str, Callable[[], Any]] = {
        "labkit": functools.partial(_selection, shape, x, blocks)
    }
    if fla:
        functions = {"fla": functools.partial(_fla_selection, shape, x, blocks.long())}
    found = {} if fla else {"plain": _right(shape, x, blocks, right["o"].shape[1], q.dtype)}
    for who, fn in functions.items():
        try:
            out = fn()
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
            found[who] = {"o": out.detach(), "dq": dq} | ({} if rows else {"dk": dk, "dv": dv})
        except Exception as error:
            result.notes.append(f"error of {who}: {first_line(error)}")
    for who, tensors in found.items():
        for name, value in tensors.items():
            if name not in right:
                continue
            true = right[name]
            # the oracle holds the last rows of the last KV head and its group
            mine = value
            if who != "plain":
                heads = shape.group if name in ("o", "dq") else 1
                mine = value[:, -true.shape[1] :, -heads:]
            gap = (mine.double() - true).norm() / true.norm()
            row = {"part": "error", "who": who, "tensor": name, "seq_len": shape.seq_len}
            result.rows.append({**row, "relative": gap.item()})
            how = f"‖{name} − float64‖ / ‖float64‖ of {who}, random choice, T = {shape.seq_len}"
            result.add(f"error.{who}.{name}.n{shape.seq_len}", gap.item(), "1", how)


def _right(shape: Shape, x: Mapping[str, Any], blocks: Any, rows: int, dtype: Any) -> dict:
    """Dense masked attention of the last ``rows`` queries of the last KV head, in ``dtype``."""
    import torch

    g, t = shape.group, shape.seq_len
    q = x["q"].detach()[:, -rows:, -g:].to(dtype).requires_grad_()
    k, v = (x[name].detach()[:, :, -1:].to(dtype).requires_grad_() for name in "kv")
    chosen = torch.zeros(rows, shape.blocks + 1, dtype=torch.bool, device=q.device)
    chosen.scatter_(1, blocks[0, -rows:, -1].long() % (shape.blocks + 1), True)
    seen = chosen[:, : shape.blocks].repeat_interleave(shape.block_size, 1)[:, :t]
    key, query = torch.arange(t, device=q.device), torch.arange(t - rows, t, device=q.device)
    seen &= key[None] <= query[:, None]
    s = torch.einsum("bmgd,bnhd->bgmn", q, k) * shape.head_dim**-0.5
    p = torch.softmax(s.masked_fill(~seen, float("-inf")), -1)
    o = torch.einsum("bgmn,bnhd->bmgd", p, v)
    dout = x["do"][:, -rows:, -g:].to(dtype)
    grads = torch.autograd.grad(o, (q, k, v), dout)
    out = {"o": o.detach(), "dq": grads[0]}
    # the gradients of keys need every query
    return out | ({"dk": grads[1], "dv": grads[2]} if rows == t else {})


# -- top-k -----------------------------------------------------------------------------------------


def _stored_scores(shape: Shape, q: Any, k_cmp: Any, lse: Any, out: Any) -> Any:
    """Importance of every block for every query, written to ``out`` ``[1, T, H, C]`` float32."""
    import torch

    heads, group, scale = shape.kv_heads, shape.group, shape.head_dim**-0.5
    for start in range(0, shape.seq_len, 2048):
        part = slice(start, start + 2048)
        # [H, queries · G, C]
        rows = q[0, part].unflatten(1, (heads, group)).permute(1, 0, 2, 3)
        s = rows.flatten(1, 2) @ k_cmp[0].permute(1, 2, 0)
        s = s.view(heads, -1, group, s.shape[2]).float() * scale
        norm = lse[0, :, part].view(heads, group, -1).permute(0, 2, 1)
        p = torch.exp(s - norm[..., None].clamp(min=-1e30))
        last = torch.arange(1, s.shape[3] + 1, device=q.device) * shape.d - 1
        future = last[None] > torch.arange(start, start + s.shape[1], device=q.device)[:, None]
        p = p.masked_fill(future[None, :, None], 0.0)
        out[0, part] = p.sum(2).permute(1, 0, 2)
    return out


def _topk(
    result: Result, plan: dict[str, Any], device: str, item: tuple[str, int], fla: bool = False
) -> None:
    """torch.topk over scores that lie in memory, and the kernel that stores none."""
    import torch

    from labkit.nsa import ops
    from labkit.nsa.pooling import pool_mean

    knob, value = item
    n, count = (value, 16) if knob == "n" else (16384, value)
    shape = Shape(seq_len=n, count=count, dtype=plan["dtype"])
    x, call = _draw(shape, "random", device, plan["dtype"], grad=False), _call_of(shape)
    with torch.no_grad():
        kc, vc = (pool_mean(x[name], shape.l, shape.d) for name in "kv")
        _, lse = ops.attend_compressed(x["q"], kc, vc, call)
        out = torch.empty(
            1, n, shape.kv_heads, shape.compressed, device=device, dtype=torch.float32
        )
        stored = _stored_scores(shape, x["q"], kc, lse, out)
        functions: dict[str, Callable[[], Any]] = {
            "fused": functools.partial(ops.select, x["q"], kc, lse, call),
            "torch": functools.partial(torch.topk, stored, min(count, stored.shape[3]), -1),
        }
        if knob == "n":
            functions["scores"] = functools.partial(
                _stored_scores, shape, x["q"], kc, lse, torch.empty_like(out)
            )
            if fla:
                functions["fla"] = functools.partial(
                    _fla("parallel_nsa_topk"), x["q"], kc, n, lse.transpose(1, 2).contiguous(),
                    count, shape.block_size, shape.head_dim**-0.5,
                )  # fmt: skip
        part = "peers" if fla else "topk"
        times = _race(result, plan, functions, {"part": part, "seq_len": n, "count": count})
    words = {
        "fused": "scores and choice in one kernel",
        "torch": "torch.topk alone over stored scores",
        "scores": "making and storing the scores with torch",
        "fla": "fla-core's kernel of scores and choice",
    }
    for name, seconds in times.items():
        how = f"{words[name]}, T = {n}, {count} blocks; in turns"
        result.add(f"topk.{name}.{knob}{value}", seconds, "s", how)
    if knob == "n":
        size = stored.numel() * 4
        result.add(f"topk.bytes.n{n}", size, "bytes", f"float32 scores of T × blocks, T = {n}")
        if {"torch", "fused"} <= set(times):
            how = f"torch.topk alone over the fused kernel, scores included there, T = {n}"
            result.add(f"topk.ratio.n{n}", times["torch"] / times["fused"], "1", how)
        if {"torch", "scores", "fused"} <= set(times):
            how = f"scores and torch.topk over the fused kernel, T = {n}"
            both = times["torch"] + times["scores"]
            result.add(f"topk.stored_ratio.n{n}", both / times["fused"], "1", how)


# -- peers -----------------------------------------------------------------------------------------


def _peers(result: Result, plan: dict[str, Any], device: str, item: tuple[str, Any]) -> None:
    """fla-core beside ours, in turns; figures that another part has measured stay that part's."""
    part, value = item
    apart = Result()
    try:
        {"sweep": _sweep, "error": _error, "topk": _topk}[part](
            apart, plan, device, value, fla=True
        )
    finally:  # what was measured before the time was over
        result.results = apart.results | result.results
        result.rows += apart.rows
        result.notes += apart.notes


# -- counters --------------------------------------------------------------------------------------


def _counters(result: Result, plan: dict[str, Any], device: str, n: int) -> None:
    """Run the roads under Nsight Compute; on refusal, say so and go on."""
    from labkit.experiments._nsa_child import labels
    from labkit.experiments.dram import METRICS, find_ncu, group_by_marker, parse_ncu

    ncu = find_ncu()
    if ncu is None:
        result.notes.append("L2 and DRAM bytes not measured: Nsight Compute is not installed.")
        return
    steps = ["queries", "keys", "hopper", "backward", *(["fla"] if _peers(plan) else [])]
    problem = {"seq_len": n, "dtype": plan["dtype"], "steps": steps, "patterns": list(PATTERNS)}
    with tempfile.TemporaryDirectory() as folder:
        log, listed = Path(folder) / "ncu.csv", Path(folder) / "ran.txt"
        problem["ran"] = str(listed)
        command = [
            ncu, "--clock-control", "none", "--cache-control", "all",
            "--profile-from-start", "off", "--metrics", ",".join(METRICS), "--csv",
            "--print-units", "base", "--log-file", str(log),
            sys.executable, "-m", "labkit.experiments._nsa_child", "profile", json.dumps(problem),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, env=_with_path(os.environ | {"LC_ALL": "C"}), capture_output=True,
                text=True, timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            result.notes.append(f"Counters not read: ncu did not finish ({first_line(error)}).")
            return
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        said = listed.read_text("utf-8").splitlines() if listed.is_file() else []
    try:
        result.notes += [line for line in said if line.startswith("not ")]
        wanted = [label for label in labels(problem) if f"ran {label[1]} {label[0]}" in said]
        groups = group_by_marker(parse_ncu(text), wanted)
    except LabError as error:
        said = " / ".join((text + done.stdout + done.stderr).strip().splitlines()[-4:])
        result.notes.append(f"Counters not read: {error} ncu said: {said[:400]}")
        return
    add_counters(result, problem, groups)


def add_counters(
    result: Result, problem: Mapping[str, Any],
    groups: Sequence[tuple[tuple[str, str], list[dict[str, Any]]]],
) -> None:  # fmt: skip
    """Rows and figures of profiled kernels; ``groups``: ((pattern, step), kernels)."""
    from labkit.experiments.dram import short_name

    shape = Shape(seq_len=problem["seq_len"], dtype=problem["dtype"])
    for (pattern, step), kernels in groups:
        for kernel in kernels:
            row = {"part": "counters", "step": step, "pattern": pattern}
            result.rows.append({**row, "seq_len": shape.seq_len, **kernel})
        names = " + ".join(dict.fromkeys(short_name(k["kernel"]) for k in kernels))
        how = f"ncu, caches emptied before each kernel, {pattern}, T = {shape.seq_len}: {names}"
        l2 = sum(k["l2"] for k in kernels)
        result.add(f"l2.{step}.{pattern}", l2, "bytes", f"through L2, {how}"[:400])
        dram = sum(k["dram_read"] + k["dram_write"] for k in kernels)
        result.add(f"hbm.{step}.{pattern}", dram, "bytes", f"DRAM, {how}"[:400])
        # the kernel that attends, without lists and merges; it may run once for each chunk
        alone: dict[str, dict[str, float]] = {}
        for kernel in kernels:
            one = alone.setdefault(short_name(kernel["kernel"]), {"l2": 0.0, "seconds": 0.0})
            one["l2"] += kernel["l2"]
            one["seconds"] += kernel["seconds"]
        name, largest = max(alone.items(), key=lambda item: item[1]["seconds"])
        where = f"{name}, {pattern}, T = {shape.seq_len}"
        result.add(f"l2.{step}.{pattern}.kernel", largest["l2"], "bytes", f"through L2, {where}")
        result.add(f"l2.{step}.{pattern}.seconds", largest["seconds"], "s", f"under ncu, {where}")
        rate = largest["l2"] / largest["seconds"]
        result.add(f"l2.{step}.{pattern}.rate", rate, "B/s", f"through L2 over time, {where}")
        predicted = _predicted(shape, step, pattern)
        if predicted:
            result.add(f"model.{step}.{pattern}", predicted, "bytes", f"by the model, {where}")
            how = f"measured through L2 over the model, {where}"
            result.add(f"l2.{step}.{pattern}.over_model", largest["l2"] / predicted, "1", how)


def _predicted(shape: Shape, step: str, pattern: str) -> float | None:
    """What the model says of a step's attending kernel."""
    if step == "fla":
        return sum(model.by_queries_bytes(shape, 1).values())
    if step == "queries":
        return sum(model.by_queries_bytes(shape, max(1, 64 // shape.group), pattern).values())
    if step == "hopper":
        from labkit.nsa.hopper import CONFIGS

        tile = CONFIGS[shape.head_dim][0].block_m // shape.group
        return sum(model.by_queries_bytes(shape, tile, pattern).values())
    if step in ("keys", "backward"):
        from labkit.nsa import by_keys, hopper_backward

        what = "forward" if step == "keys" else "backward"
        piece = (by_keys if step == "keys" else hopper_backward).PIECE
        found = model.by_keys_bytes(shape, what, part=piece // shape.group)
        return found["kv"] + found["rows"]
    return None


# -- what pages quote ------------------------------------------------------------------------------


def crossing(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The length at which a ratio that grows passes 1, straight between logarithms.

    The shortest length if it is above 1 from the start; None if it never is.

    >>> round(crossing([1024, 4096], [0.5, 2.0]))
    2048
    """
    pairs = sorted(zip(lengths, ratios, strict=True))
    if not pairs or all(r < 1 for _, r in pairs):
        return None
    # the last time it rises above 1: from there on sparse is faster
    for (x0, r0), (x1, r1) in reversed(list(itertools.pairwise(pairs))):
        if r0 < 1 <= r1:
            share = -math.log(r0) / (math.log(r1) - math.log(r0))
            return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
    return float(pairs[0][0])


def series(result: Any, prefix: str) -> list[tuple[int, float]]:
    """(T, value) of the figures ``<prefix>.n<T>``, in order of T."""
    found = []
    for key in result.results:
        head, _, size = key.rpartition(".n")
        if head == prefix and size.isdigit():
            found.append((int(size), result.value(key)))
    return sorted(found)


#: what of a card each branch is bound by, for a prediction
_BOUND = {
    "pooling": "memory", "compression": "tensor", "top-k": "tensor", "selection": "l2",
    "window": "tensor", "gates": "memory", "dense": "tensor",
}  # fmt: skip


def crossover_on(card: str, result: Any, passes: str = "forward") -> float | None:
    r"""Where dense and sparse meet on another card, predicted from the H200's times.

    .. math::
        t_{\text{card}} = t_{\text{H200}} \cdot \frac{r_{\text{H200}}}{r_{\text{card}}}

    for each branch, with r the resource that binds it: the tensor cores' peak (dense,
    compression, top-k, window), the memory bandwidth (pooling, gates), or the L2's rate
    (selection), for which SMs times clock stands in: data sheets do not state it.  A prediction
    from one machine: no other card has been measured.

    Parameters
    ----------
    card : a key of ``labkit.hardware.CARDS``.
    result : a result or record of this experiment on an H200.
    passes : ``"forward"``, ``"backward"`` or ``"both"``.

    Returns
    -------
    tokens, or None if they do not meet within the lengths measured.
    """
    from labkit.hardware import card as find

    here, there = find("h200"), find(card)
    slower = {
        "tensor": here.peak["float16"] / there.peak["float16"],
        "memory": here.memory_bandwidth / there.memory_bandwidth,
        "l2": here.sm_count * here.boost_clock_hz / (there.sm_count * there.boost_clock_hz),
    }
    wanted = PASSES if passes == "both" else (check_choice("passes", passes, PASSES),)
    dense: dict[int, float] = {}
    sparse: dict[int, float] = {}
    for what in wanted:
        for n, seconds in series(result, f"dense.{what}"):
            dense[n] = dense.get(n, 0.0) + seconds * slower[_BOUND["dense"]]
        for name, bound in _BOUND.items():
            for n, seconds in series(result, f"branch.{name}.{what}"):
                sparse[n] = sparse.get(n, 0.0) + seconds * slower[bound]
    lengths = sorted(set(dense) & set(sparse))
    return crossing(lengths, [dense[n] / sparse[n] for n in lengths])


def _patterns_of(result: Result) -> Iterator[tuple[str, str, str]]:
    for kind in ("selection", "whole"):
        for pattern in PATTERNS:
            for what in (*PASSES, "both"):
                yield kind, pattern, what


def _summarise(result: Result) -> None:
    for kind, pattern, what in _patterns_of(result):
        pairs = series(result, f"{kind}.speedup.{pattern}.{what}")
        at = crossing([n for n, _ in pairs], [r for _, r in pairs]) if pairs else None
        if at is not None:
            least = pairs[0][0]
            how = f"T at which {kind} and dense take the same time, {what}, {pattern}"
            how += f"; at most: it is faster at {least} already" if at <= least else ""
            result.add(f"crossover.{kind}.{pattern}.{what}", at, "tokens", how)
    for what in PASSES:
        for n, dense in series(result, f"dense.{what}"):
            whole = f"whole.labkit.random.{what}.n{n}"
            if whole in result:
                how = f"time of all branches over dense, {what}, random data, T = {n}"
                result.add(f"loss.whole.{what}.n{n}", result.value(whole) / dense, "1", how)
            both = [f"selection.labkit.{pattern}.{what}.n{n}" for pattern in ("random", "local")]
            if all(key in result for key in both):
                first, second = (result.value(key) for key in both)
                how = f"time of selection with a random choice over a local one, {what}, T = {n}"
                result.add(f"choice.{what}.n{n}", first / second, "1", how)
    for key in list(result.results):
        if not key.startswith("group.labkit."):
            continue
        base = re.sub(r"\.g\d+", ".g16", key)
        if base in result and base != key:
            name = key.replace("group.labkit.", "group.ratio.")
            how = "time over that of groups of 16, the same useful operations"
            result.add(name, result.value(key) / result.value(base), "1", how)
    ratios = [
        result.value(k) for k in result.results if re.fullmatch(r"group\.ratio\..*\.g\d+", k)
    ]
    if ratios:
        how = "largest of group.ratio.*, T = 8192"
        result.add("group.ratio.worst", max(ratios), "1", how)
    for name in ("torch", "fused", "scores"):
        pairs = series(result, f"topk.{name}")
        if len(pairs) >= 3:
            from labkit.experiments.scaling import fit_power

            fit = fit_power([n for n, _ in pairs], [s for _, s in pairs], last=3)
            how = f"exponent of T in the time of {name}, last three lengths"
            result.add(f"topk.{name}.exponent", fit.exponent, "1", how)
    for name in ("torch", "fused"):
        low, high = f"topk.{name}.s4", f"topk.{name}.s64"
        if low in result and high in result:
            how = f"time of {name} for 64 blocks over 4: log S would be 3 times, S 16 times"
            ratio = result.value(high) / result.value(low)
            result.add(f"topk.{name}.s_ratio", ratio, "1", how)
    if "dense.forward.n8192" in result and "branch.selection.forward.n8192" in result:
        from labkit.hardware import CARDS

        for key in CARDS:
            for what in PASSES:
                try:
                    at = crossover_on(key, result, what)
                except (KeyError, LabError):
                    continue
                if at is not None:
                    how = f"where dense and the whole meet, {what}: predicted from this record"
                    result.add(f"predicted.{key}.{what}", at, "tokens", how)
