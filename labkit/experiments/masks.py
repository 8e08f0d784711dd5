r"""Masks: time and bytes at equal density, dense work under a mask against blocks left out.

Parts, each of which may be missing from a result with the reason among its notes:

``blocks``
    how many blocks a random pattern touches, against the share of scores it keeps: counted, and
    by :math:`1 - (1 - p)^{b^2}`.
``density``
    every pattern at about the same share of scores, as it is and drawn on a grid of blocks: naive
    and SDPA under a matrix, FlexAttention, and for the local one our kernel with a window; dense
    causal attention as the yardstick.
``lengths``
    a local window of fixed width by each way, against N.
``sorted``
    clusters whose tokens are brought together first, the gathers included.

Times are of one implementation beside the others in turns.  ``peak`` is what a call holds beyond
its inputs and beyond the matrix or lists that were made before (``mask_bytes``).  ``error`` is
relative to float64, over some rows of the last head: of O, and of dQ where there is a backward
pass.  On a CPU ``blocks`` stands for the kernels.

Taught in chapter 11 (a mask saves nothing).  Claim C25.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from labkit.errors import LabError, check_choice
from labkit.experiments import Progress, Result, _release_memory
from labkit.experiments._correctness import _environment
from labkit.experiments._jobs import Jobs, first_line, untuned
from labkit.experiments.flash_forward import _exact, _timed

__all__ = ["CHAPTERS", "NEEDS_GPU", "PARTS", "TITLE", "at_density", "made_for", "run"]

TITLE = "Masks: dense work under a mask against blocks left out, at equal density"
CHAPTERS = ("11",)
NEEDS_GPU = False

PARTS = ("blocks", "density", "sorted", "lengths")
#: at most so many samples of a row are kept
_SAMPLES = 15
_PASSES = ("forward", "both")
NAMES = ("local", "strided", "random", "clustered", "hierarchical")
_PATTERNS = (
    "local", "random", "random_blocks", "strided", "clustered", "hierarchical", "clustered_sorted",
)  # fmt: skip


def at_density(name: str, density: float, seq_len: int, *, block: int | None = None) -> Any:
    """The pattern of that name with about so many of the scores of causal attention.

    Parameters
    ----------
    name : one of the five.
    density : share of the N(N + 1)/2 scores that dense causal attention has.
    block : draw it on a grid of blocks.

    Returns
    -------
    Pattern
        its number nearest to the density, found by counting; at least one key or block beside
        the own where the pattern has such a number.
    """
    from labkit.patterns import Clustered, Hierarchical, Local, Random, Strided

    check_choice("name", name, NAMES)
    n = seq_len if block is None else math.ceil(seq_len / block)
    if name == "strided":
        made = Strided(max(1, round(1 / density)))
    elif name == "clustered":
        made = Clustered(max(1, round(1 / density)), seed=1)
    elif name == "random":
        # the own key comes on top, 2/N of a causal row's keys on average
        made = Random(max(1, round(n * density - 2)), seed=1)
    else:

        def far_enough(window: int) -> Any:
            return Hierarchical(window, max(1, math.ceil(math.log2(n / window))))

        made = _nearest(Local if name == "local" else far_enough, density, n)
    return made if block is None else made.in_blocks(block)


def _nearest(make: Callable[[int], Any], density: float, n: int) -> Any:
    """Of ``make(width)`` the one whose causal density is nearest, by bisection on the width."""
    low, high = 1, n

    def share(width: int) -> float:
        # Both patterns keep a number of keys that depends on the distance only, or nearly so:
        # the last row and the average over rows are known from its keys, without all N² scores.
        import torch

        distance = torch.arange(n)
        kept = make(width).allowed(torch.tensor(n - 1), n - 1 - distance, n).double()
        return ((n - distance) * kept).sum().item() / (n * (n + 1) / 2)

    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if share(middle) < density else (low, middle)
    below = max(1, low - 1)
    return make(min((below, low), key=lambda width: abs(share(width) - density)))


# -- the plan ------------------------------------------------------------------------------------


def _plan(quick: bool, device: str) -> dict[str, Any]:
    if device == "cpu":
        return {
            "shape": {"batch": 1, "heads": 1, "head_dim": 32, "dtype": "float32"},
            "seq_len": 2048, "density": 0.05, "block": 64, "window": 64, "lengths": (512, 2048),
            "patterns": _PATTERNS, "hows": ("naive", "sdpa", "blocks"), "rep_ms": 10,
            "matrices": ("local", "random"), "deep": ("local", "random", "random_blocks"),
            "passes": ("forward",), "counted": 512, "per_row": (1, 4, 26), "limit_s": 20.0,
            "device": "cpu", "apart": None, "yardstick": "sdpa",
        }  # fmt: skip
    import torch

    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    plan = {
        "shape": {"batch": 1, "heads": 16, "head_dim": 64, "dtype": half},
        "seq_len": 16384, "density": 0.05, "block": 128, "window": 256,
        "lengths": (2048, 32768, 8192, 16384, 4096),
        "patterns": _PATTERNS,
        "hows": ("naive", "sdpa", "flex", "window"), "matrices": ("local", "random"),
        "deep": ("local", "random", "random_blocks"), "rep_ms": 40, "passes": _PASSES,
        "counted": 4096, "per_row": (1, 2, 4, 8, 16, 32, 205), "limit_s": 115.0,
        "device": "cuda", "apart": "flex", "yardstick": "flash",
    }  # fmt: skip
    if quick:
        plan |= {
            "seq_len": 4096, "patterns": ("local", "random", "random_blocks"),
            "lengths": (1024, 4096), "rep_ms": 20, "passes": ("forward",), "limit_s": 45.0,
        }  # fmt: skip
    return plan


def _work(plan: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Part, pattern or length, and pass, the most wanted first.

    What the time does not suffice for is the rest: so everything forward, and then backward.
    """
    for what in plan["passes"]:
        yield "density", "dense", what
        for name in plan["patterns"]:
            if what == "forward" or name in plan["deep"]:
                yield ("sorted" if name.endswith("_sorted") else "density"), name, what
        yield from (("lengths", str(n), what) for n in plan["lengths"])


def made_for(plan: dict[str, Any], name: str) -> Any:
    """The pattern that a run of this plan calls so: ``local``, ``local_blocks`` …"""
    base, _, how = name.partition("_")
    block = plan["block"] if how == "blocks" else None
    return at_density(base, plan["density"], plan["seq_len"], block=block)


def _hows(plan: dict[str, Any], name: str, what: str) -> list[str]:
    """How a pattern is computed at the main size."""
    # A matrix takes as long whatever it holds: a few patterns show that.
    hows = set(plan["hows"])
    if plan["matrices"] is not None and name not in plan["matrices"]:
        hows -= {"naive", "sdpa"}
    elif what == "both" and name != "local":
        hows -= {"naive"}
    if name != "local":
        hows -= {"window"}
    return [how for how in plan["hows"] if how in hows]


# -- running -------------------------------------------------------------------------------------


def run(
    *,
    quick: bool,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Sequence[str] | None = None,
) -> Result:
    """Measure what this device can.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    parts : some of :data:`PARTS`; all by default.

    Returns
    -------
    Result
        ``results``: ``density_<pattern>``, ``touched_<pattern>`` (share of dense attention's
        blocks), ``time_<pattern>_<how>_<pass>``, ``peak_…``, ``speedup_…`` (over dense causal
        attention by our kernel, on a CPU by SDPA), ``mask_bytes_<pattern>_<how>``;
        ``time_dense_<how>_<pass>``; ``length_<how>_<pass>_n<N>`` and ``length_peak_…``;
        ``random_counted_b<block>_k<keys a row>`` and ``random_expected_…``;
        ``difference_dense_n<N>``: how far dense attention is from local.  A pattern is one of
        the five, with ``_blocks`` if drawn on a grid, or ``clustered_sorted``; a pass is
        ``forward`` or ``both``.
        ``rows``: one per measured function.
    """
    import torch

    torch.manual_seed(0)
    jobs = Jobs(_plan, quick, device, PARTS if parts is None else parts, PARTS)
    measure = {"density": _density, "sorted": _sorted, "lengths": _lengths}
    with untuned(), _Apart(jobs) as apart:
        jobs.plan["children"] = apart
        jobs.add("blocks", "blocks", _blocks)  # counted while the compilers work
        if jobs.plan["apart"]:
            jobs.also("compiling", functools.partial(_warm, jobs.plan, jobs.parts))
            jobs.also("waiting", apart.wait)
        for part, item, what in _work(jobs.plan):
            jobs.add(part, f"{part} {item} {what}", measure[part], item, what)
        result = jobs.run(progress, limit_s=jobs.plan["limit_s"], tidy=_tidy)
    _summarise(result, jobs.plan, jobs.device)
    return result


def _tidy(failed: bool) -> None:
    from labkit.patterns import clear_masks

    clear_masks()
    _release_memory()


def _warm(plan: dict[str, Any], parts: Sequence[str]) -> None:
    """Let our own kernels be compiled, by a call of each kind, while other programs compile too."""
    from labkit.patterns import Local, pattern_attention

    for part, item, what in _work(plan):
        if part not in parts or (part == "density" and item not in ("dense", "local")):
            continue
        n = int(item) if item.isdigit() else plan["seq_len"]
        which = Local(plan["window"]) if item.isdigit() else made_for(plan, "local")
        options = {"how": "window", "causal": True}
        functions = [functools.partial(_dense, plan["yardstick"])]
        if "window" in plan["hows"]:
            functions.append(lambda q, k, v, w=which, o=options: pattern_attention(q, k, v, w, **o))
        for function in functions:
            q, k, v, dout = _draw(plan, n, plan["device"])
            leaves = [x.requires_grad_(what == "both") for x in (q, k, v)]
            (_forward if what == "forward" else _both)(function, leaves, dout)


class _Apart:
    """Programs that compile FlexAttention side by side, and then measure one after another.

    Each predicate and length is compiled for itself, some seconds on one core, and what is
    compiled stays in its program.  A program says that it is ready by a file, waits for another
    one, measures its case as this program would, and leaves its rows in a third.
    """

    def __init__(self, jobs: Jobs) -> None:
        self.plan, self.result, self.parts = jobs.plan, jobs.result, jobs.parts
        self.children: dict[tuple[str, str], tuple[subprocess.Popen, Path]] = {}

    def __enter__(self) -> _Apart:
        self.begin = time.perf_counter()
        self.folder = tempfile.TemporaryDirectory()
        # Each has its core; a pool of compilers for each of them would be too many.
        environment = _environment() | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        plan = json.dumps(self.plan)
        for name, what in _cases_apart(self.plan, self.parts):
            files = Path(self.folder.name) / f"{name}_{what}"
            with open(f"{files}.log", "wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "labkit.experiments._masks_child", name, what, plan,
                     str(files)], env=environment, stdout=log, stderr=log,
                )  # fmt: skip
            self.children[name, what] = child, files
        return self

    def __exit__(self, *exc: object) -> None:
        for child, _ in self.children.values():
            child.kill()
            child.wait()
        self.folder.cleanup()

    def wait(self, seconds: float = 36.0) -> None:
        """Until all are ready or have failed: nothing is timed while others use the GPU.

        Not longer than so many seconds from the start of all.
        """
        self._wait(self.begin + seconds - time.perf_counter(), *self.children)

    def _wait(self, seconds: float, *cases: tuple[str, str]) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and not all(map(self._settled, cases)):
            time.sleep(0.05)

    def _settled(self, case: tuple[str, str]) -> bool:
        child, files = self.children[case]
        return Path(f"{files}.ready").exists() or child.poll() is not None

    def measured(self, name: str, what: str) -> bool:
        """Let the program of this case measure, and take its rows; whether there were any."""
        if (name, what) not in self.children:
            return False
        child, files = self.children[name, what]
        self._wait(10, (name, what))  # a late one is nearly done: sooner than to begin anew
        if child.poll() is None and Path(f"{files}.ready").exists():
            Path(f"{files}.go").touch()
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=15)
        child.kill()
        child.wait()
        try:
            found = json.loads(Path(f"{files}.rows").read_text("utf-8"))
        except (OSError, ValueError):
            lines = Path(f"{files}.log").read_text("utf-8", "replace").strip().splitlines()
            why = (lines or ["nothing was said"])[-1][:200]
            self.result.notes.append(f"{name}, {what}: its own program gave no result: {why}")
            return False
        self.result.rows += found["rows"]
        self.result.notes += found["notes"]
        return bool(found["rows"])


def _cases_apart(plan: dict[str, Any], parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``(name of a pattern or a length, pass)`` of all that is measured by programs apart."""
    for part, item, what in _work(plan) if plan["apart"] else ():
        if part not in parts or item == "dense":
            continue
        # For a length it takes seconds too, and says nothing new between the ends.
        if part != "lengths" or (what == "forward" and int(item) in _ends(plan)):
            yield item, what


def case_apart(plan: dict[str, Any], name: str, what: str) -> tuple[Any, ...]:
    """Labels, pattern, the pattern whose blocks are computed, and the function, of such a case."""
    from labkit.patterns import Local

    labels = {"part": "density", "pattern": name, "seq_len": plan["seq_len"], "causal": True}
    if name.isdigit():
        labels |= {"part": "lengths", "pattern": "local", "seq_len": int(name)}
        which = there = Local(plan["window"])
    else:
        which = there = made_for(plan, name)
    if name.endswith("_sorted"):
        there = which.reordered(plan["seq_len"])
    how = plan["apart"]
    function = _functions(plan, which, [how], reorder=there is not which)[how]
    return labels, which, there, {how: function}


def _ends(plan: dict[str, Any]) -> tuple[int, int]:
    """The lengths that FlexAttention is compiled for."""
    return min(plan["lengths"]), max(plan["lengths"])


def _blocks(result: Result, plan: dict[str, Any], device: str) -> None:
    """How soon random scores touch every block."""
    from labkit.patterns import Random, expected_block_density

    n, fine = plan["counted"], 16
    for per_row in plan["per_row"]:
        touched = Random(per_row, seed=1).blocks(n, fine, device=device) > 0
        for block in (16, 64, 128):
            many, share = block // fine, per_row / n
            found = touched.unflatten(0, (-1, many)).unflatten(2, (-1, many)).any(3).any(1)
            row = {"part": "blocks", "seq_len": n, "block": block, "per_row": per_row}
            row |= {"share": share, "counted": found.double().mean().item()}
            result.rows.append(row | {"expected": expected_block_density(share, block)})


def _draw(plan: dict[str, Any], n: int, device: str) -> tuple[Any, ...]:
    """q, k, v and the gradient of O, ``[batch, heads, n, head_dim]``."""
    import torch

    from labkit.dtypes import torch_dtype

    s = plan["shape"]
    made = {"device": device, "dtype": torch_dtype(s["dtype"])}
    return tuple(torch.randn(s["batch"], s["heads"], n, s["head_dim"], **made) for _ in range(4))


def _dense(name: str, q, k, v):
    import torch

    if name == "flash":
        from labkit.flash import flash_attention

        return flash_attention(q, k, v, causal=True)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _density(result: Result, plan: dict[str, Any], device: str, name: str, what: str) -> None:
    """One pattern at the main size by each way, or the yardstick: dense causal attention."""
    n = plan["seq_len"]
    labels = {"part": "density", "pattern": name, "seq_len": n, "causal": True}
    if name == "dense":
        from labkit.patterns import Local

        names = dict.fromkeys((plan["yardstick"], "sdpa"))
        functions = {kind: functools.partial(_dense, kind) for kind in names}
        _race(result, plan, device, functions, labels, Local(n), what)
        return
    which, hows = made_for(plan, name), _hows(plan, name, what)
    if plan["children"].measured(name, what):
        hows.remove(plan["apart"])
    _race(result, plan, device, _functions(plan, which, hows), labels, which, what)


def _sorted(result: Result, plan: dict[str, Any], device: str, name: str, what: str) -> None:
    """A pattern whose tokens are brought together, attended there, and put back."""
    if plan["children"].measured(name, what):
        return
    labels = {"part": "density", "pattern": name, "seq_len": plan["seq_len"], "causal": True}
    which = made_for(plan, name)
    functions = _functions(plan, which, [plan["apart"] or "blocks"], reorder=True)
    there = which.reordered(plan["seq_len"])
    _race(result, plan, device, functions, labels, which, what, there=there)


def _lengths(result: Result, plan: dict[str, Any], device: str, length: str, what: str) -> None:
    """A window of fixed width, and dense attention beside it."""
    from labkit.patterns import Local

    n, which = int(length), Local(plan["window"])
    labels = {"part": "lengths", "pattern": "local", "seq_len": n, "causal": True}
    # Where their law is seen, they would take the most of the time.
    most = {"naive": 8192, "sdpa": 32768 if what == "forward" else 16384}
    hows = [how for how in plan["hows"] if n <= most.get(how, n)]
    if plan["apart"] in hows:
        wanted = (length, what) in _cases_apart(plan, PARTS)
        if not wanted or plan["children"].measured(length, what):
            hows.remove(plan["apart"])
    functions = _functions(plan, which, hows)
    functions["dense"] = functools.partial(_dense, plan["yardstick"])
    _race(result, plan, device, functions, labels, which, what)


def _functions(plan, which, hows, *, reorder: bool = False) -> dict[str, Callable]:
    """Functions of q, k, v: one for each way."""
    from labkit.patterns import pattern_attention

    options = {"causal": True, "block": plan["block"], "reorder": reorder}
    return {how: functools.partial(_attend, pattern_attention, which, how, options) for how in hows}


def _attend(attention, which, how, options, q, k, v):
    return attention(q, k, v, which, how=how, **options)


def _race(result, plan, device, functions, labels, which, what, *, there=None) -> None:
    """Check each function, weigh it, time all that ran in turns; a row for each.

    ``there`` is the pattern whose blocks are computed, if that is not ``which``.
    """
    if not functions:
        return
    n = labels["seq_len"]
    stats = _statistics(there or which, n, plan, device)
    q, k, v, dout = _draw(plan, n, device)
    leaves = [x.requires_grad_(what == "both") for x in (q, k, v)]
    truth = _oracle(which, q, k, v, dout, what)
    calls, found = {}, {}
    for name, fn in functions.items():
        call = functools.partial(_forward if what == "forward" else _both, fn, leaves, dout)
        start = time.perf_counter()
        try:
            found[name] = {
                "error": _error(call(), truth),
                "first_s": round(time.perf_counter() - start, 2),
                "mask_bytes": _mask_bytes(there or which, name, labels, plan, device),
                "peak": _peak(call, device),
            }
        except Exception as error:
            where = f"{labels['pattern']}, {name}, {what}, seq_len {n}"
            result.notes.append(f"{where}: {first_line(error)}")
            continue
        calls[name] = call
    _time(result, plan, calls, found, labels | {"pass": what}, stats)


def _forward(fn, leaves, dout):
    import torch

    with torch.no_grad():
        return fn(*leaves)


def _both(fn, leaves, dout):
    import torch

    return torch.autograd.grad(fn(*leaves), leaves, dout)[0]


def _time(result, plan, calls, found, labels, stats) -> None:
    from labkit.timing import time_many

    if not calls:
        return
    options = {"warmup_ms": plan["rep_ms"] / 4, "rep_ms": plan["rep_ms"], "max_samples": _SAMPLES}
    timings: dict[str, Any] = {}
    try:
        timings |= time_many(calls, **options)
    except LabError:  # one cannot be timed: the others are, each for itself
        for name, call in calls.items():
            try:
                timings |= time_many({name: call}, **options)
            except LabError as error:
                result.notes.append(f"{name} at {labels}: {first_line(error)}")
    for name in timings:
        cost = stats["costs"][_cost_name(name, labels["pattern"])]
        row = {**labels, **plan["shape"], "name": name, **found[name], **stats, **cost}
        row.pop("costs")
        result.rows.append(_timed(row, timings[name]))


def _cost_name(how: str, pattern: str) -> str:
    """Under which name the model of costs has it."""
    if pattern == "dense" or how == "dense":
        return "dense"
    return {"naive": "naive", "sdpa": "sdpa"}.get(how, "blocks")


def _statistics(which, n: int, plan: dict[str, Any], device: str) -> dict[str, Any]:
    """What of a pattern's statistics a row holds."""
    from dataclasses import asdict

    s = which.statistics(n, block=plan["block"], causal=True, device=device, **plan["shape"])
    return {
        "made": repr(which)[:200], "block": s.block, "density": s.density,
        "block_density": s.block_density, "full": s.full, "partial": s.partial,
        "useful_flops": s.useful_flops, "costs": {k: asdict(c) for k, c in s.costs.items()},
    }  # fmt: skip


def _mask_bytes(which, how: str, labels, plan: dict[str, Any], device: str) -> int:
    """What is made once and kept: the matrix, or the lists of blocks."""
    from labkit.patterns.masks import block_mask_bytes

    n = labels["seq_len"]
    if labels["pattern"] == "dense" or how not in ("naive", "sdpa", "flex"):
        return 0
    if how != "flex":
        return n * n
    made = which.block_mask(n, causal=True, device=device, block=plan["block"])
    return block_mask_bytes(made)


def _peak(call: Callable, device: str) -> int | None:
    """Bytes that torch's allocator handed out at most beyond what there was before the call."""
    import torch

    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del out
    return peak


# -- the truth -----------------------------------------------------------------------------------


def _oracle(which, q, k, v, dout, what: str):
    """In float64, of 64 rows of the last head: their numbers, and O or dQ there."""
    import torch

    n = q.shape[2]
    q, k, v = (x.detach() for x in (q, k, v))
    rows = torch.linspace(0, n - 1, min(64, n), device=q.device).long()
    q64, dout64 = (x[-1, -1, rows].double() for x in (q, dout))
    k64, v64 = (x[-1, -1].double() for x in (k, v))
    j = torch.arange(n, device=q.device)[None, :]
    seen = which.predicate(n, q.device)(rows[:, None], j) & (j <= rows[:, None])
    with _exact():
        s = (q64 @ k64.mT * q.shape[3] ** -0.5).masked_fill(~seen, float("-inf"))
        p = torch.softmax(s, -1)
        if what == "forward":
            return rows, p @ v64
        dp = dout64 @ v64.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        return rows, ds @ k64 * q.shape[3] ** -0.5


def _error(out, truth) -> float:
    """‖· − float64‖ / ‖float64‖ over the oracle's rows."""
    rows, expected = truth
    difference = out.detach()[-1, -1, rows].double() - expected
    return (difference.norm() / expected.norm()).item()


# -- what pages quote ------------------------------------------------------------------------------


def _summarise(result: Result, plan: dict[str, Any], device: str) -> None:
    for row in result.select(part="blocks"):
        key = f"b{row['block']}_k{row['per_row']}"
        how = f"blocks of {row['block']} touched by {row['per_row']} random keys a row, of "
        how += f"{row['seq_len']}"
        result.add(f"random_counted_{key}", row["counted"], "1", how)
        result.add(f"random_expected_{key}", row["expected"], "1", f"1 − (1 − p)^(b²): {how}")
    s = plan["shape"]
    size = f"batch {s['batch']}, {s['heads']} heads, head_dim {s['head_dim']}, {s['dtype']}, causal"
    yard = plan["yardstick"]
    dense = {
        row["pass"]: row["median_ms"]
        for row in result.select(part="density", pattern="dense", name=yard)
    }
    seen = set()
    for row in result.select(part="density"):
        name, how, what = row["pattern"], row["name"], row["pass"]
        at = f"{row['made']}, seq_len {row['seq_len']}, {size}"
        if name not in seen and name != "dense":
            seen.add(name)
            result.add(f"density_{name}", row["density"], "1", f"scores seen over dense; {at}")
            result.add(f"touched_{name}", row["block_density"], "1",
                       f"blocks of {row['block']} touched over dense; {at}")  # fmt: skip
        key, at = f"{name}_{how}_{what}", f"{how}, {what}; {at}"
        if name == "dense":
            at = f"dense causal, {how}, {what}; seq_len {row['seq_len']}, {size}"
        result.add(f"time_{key}", row["median_ms"] / 1e3, "s", f"median; {at}")
        if row.get("peak") is not None:
            result.add(f"peak_{key}", row["peak"], "bytes", f"peak beyond the inputs; {at}")
        if row["mask_bytes"] and what == "forward":
            result.add(f"mask_bytes_{name}_{how}", row["mask_bytes"], "bytes", f"kept; {at}")
        if what in dense and name != "dense":
            result.add(f"speedup_{key}", dense[what] / row["median_ms"], "1",
                       f"time of dense causal attention ({yard}) over this; {at}")  # fmt: skip
    for row in result.select(part="lengths"):
        if row["name"] == "dense" and row["pass"] == "forward":
            at = f"‖dense − local‖ / ‖local‖ of O; {row['made']}, seq_len {row['seq_len']}, {size}"
            result.add(f"difference_dense_n{row['seq_len']}", row["error"], "1", at)
        key = f"{row['name']}_{row['pass']}_n{row['seq_len']}"
        at = f"{row['name']}, {row['pass']}; {row['made']}, seq_len {row['seq_len']}, {size}"
        result.add(f"length_{key}", row["median_ms"] / 1e3, "s", f"median; {at}")
        if row.get("peak") is not None:
            result.add(f"length_peak_{key}", row["peak"], "bytes", f"peak beyond the inputs; {at}")
