"""Is the fast kernel still attention?  Every case against float64, the same bits each time, and
no stray access.

Three witnesses:

- **A matrix of cases** (``_flash_cases``) in which every two values of different factors meet:
  lengths around every edge of a tile, head_dims, masks, groups, dtypes, layouts in memory, logits
  in the hundreds.  Each is run by every kernel that can compute it (a *road*, ``_flash_worker``)
  and may err twice as much as plain attention in the same dtype, for O, LSE, dQ, dK and dV.
- **250 repeats**, which must agree to the bit: nothing is added in an order that chance decides.
- **compute-sanitizer**: memcheck (accesses beyond an allocation) and racecheck (threads that use
  shared memory without waiting for each other) over tiny cases of every kernel.

Taught in chapters 08 (the forward kernel) and 09 (the backward kernels).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from labkit.experiments import Progress, Result
from labkit.experiments._flash_cases import Case, matrix

TITLE = "Correctness of the flash kernels: error, repeats, sanitizer"
CHAPTERS = ("08", "09")
NEEDS_GPU = True

DTYPES = ("float16", "bfloat16", "float32")
TENSORS = ("o", "lse", "dq", "dk", "dv")
REPEATS = 250
_WORKER_TIMEOUT_S = 150
_SANITIZER_TIMEOUT_S = 75
# compute-sanitizer's own places when it is not on the PATH
_PLACES = tuple(
    f"usr/local/cuda*/{place}/compute-sanitizer" for place in ("bin", "compute-sanitizer")
)


def cases(quick: bool) -> list[Case]:
    """What is judged: the full matrix, and a second one of what the fast roads can take."""
    if quick:
        fast = {"lengths": ((129, 129), (200, 130)), "d": (64, 128), "layout": ("plain", "bnhd"),
                "group": (1, 4), "values": ("same",), "factor": (1.0,)}  # fmt: skip
        return matrix(fast)
    fast = {
        "d": (64, 128), "values": ("same",), "dtype": ("float16", "bfloat16"),
        "layout": ("plain", "bnhd", "packed", "aligned_bounds"), "factor": (1.0,),
    }  # fmt: skip
    return [*matrix(), *matrix(fast), *representative()]


def representative() -> list[Case]:
    """One ordinary problem per dtype, whose error stands beside that of plain attention."""
    shape = {"n_q": 1000, "n_k": 1000, "d": 64, "heads": 4, "batch": 2, "causal": True}
    return [Case(**shape, dtype=dtype, layout="bnhd") for dtype in DTYPES]


def repeated() -> list[Case]:
    """What is done 250 times: ragged and even, grouped, each dtype."""
    return [
        Case(500, 999, 64, heads=8, kv_heads=2, batch=2, causal=True, dtype="float16"),
        Case(1024, 1024, 128, heads=8, batch=2, dtype="bfloat16"),
        Case(1000, 1000, 128, heads=8, batch=2, causal=True, window=200, dtype="bfloat16"),
        Case(500, 500, 64, heads=4, batch=2, causal=True, dtype="float32"),
    ]


def watched() -> list[Case]:
    """What compute-sanitizer watches, a hundred times slower than without it."""
    return [
        Case(129, 200, 64, heads=2, causal=True, dtype="float16"),
        Case(97, 65, 128, heads=1, window=40, dtype="bfloat16"),
        Case(3, 300, 64, heads=4, kv_heads=1, causal=True, dtype="float16"),
        Case(70, 33, 40, d_v=80, heads=1, causal=True, dtype="float32"),
    ]


def run(*, quick: bool, device: str | None = None, progress: Progress | None = None) -> Result:
    """Judge, repeat, and watch.

    Returns
    -------
    Result
        ``rows``: one per case and road with the error of each tensor, the repeats, and the
        sanitizer's summaries.  ``results``: ``cases``, ``failures`` (tensors beyond the bound, or
        not computed); ``<dtype>_<tensor>_{cases,worst,rms,rms_plain}`` with ``worst`` the largest
        error / allowed; ``<road>_cases`` and ``<road>_worst``; ``repeats``, ``repeats_cases``,
        ``repeats_unequal``; ``{memcheck,racecheck}[_by_hand]_errors`` where the tool ran.
    """
    report = progress or (lambda done, total, what: None)
    result = Result()
    chosen = cases(quick)
    _judge(result, chosen, 20 if quick else REPEATS, report)
    if not quick:
        report(len(chosen) + 1, len(chosen) + 2, "compute-sanitizer")
        _sanitize(result)
    report(len(chosen) + 2, len(chosen) + 2, "")
    return result


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # LABKIT_TUNE=0: the choice by rule, which needs no measurement
    return os.environ | {"PYTHONPATH": path, "LABKIT_TUNE": "0", "OMP_NUM_THREADS": "1"}


# -- judged --------------------------------------------------------------------------------------


def _work(share: list[Case], times: int = 0) -> list[dict[str, Any]]:
    """One worker's share of the cases; what it did not get to is reported as failed.

    ``times`` > 0: each case is repeated instead of judged.
    """
    asked = json.dumps([case.to_dict() for case in share])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "labkit.experiments._flash_worker", str(times)],
            input=asked, env=_environment(), capture_output=True, text=True,
            timeout=_WORKER_TIMEOUT_S, check=False,
        )  # fmt: skip
        out, why = done.stdout, (done.stderr.strip().splitlines() or ["stopped"])[-1]
    except subprocess.TimeoutExpired as error:
        out, why = error.stdout or b"", f"not done after {_WORKER_TIMEOUT_S} s"
        out = out.decode() if isinstance(out, bytes) else out
    rows = []
    for line in out.splitlines():
        if line.startswith("{") and line.endswith("}"):
            rows.append(json.loads(line))
    there = {row["case"] for row in rows}
    rows += [
        {"case": str(case), "road": "", "dtype": case.dtype, "failed": why}
        for case in share
        if str(case) not in there
    ]
    return rows


def _judge(result: Result, chosen: list[Case], times: int, report: Progress) -> None:
    workers = max(1, min(15, (os.cpu_count() or 2) - 1, len(chosen) // 2))
    # Neighbours are alike and compile the same kernels: deal them out by head_dim and mask.
    ordered = sorted(chosen, key=lambda c: (c.d, c.dv, c.dtype, c.causal, c.window is None))
    size = -(-len(ordered) // (3 * workers))
    shares = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    rows, done = [], 0
    with ThreadPoolExecutor(workers) as pool:
        # Repeats first: they compile the slowest kernels, one process for each case.
        repeats = [pool.submit(_work, [case], times) for case in repeated()]
        waiting = {pool.submit(_work, share): len(share) for share in shares}
        for future in as_completed(waiting):
            rows += future.result()
            done += waiting[future]
            report(done, len(chosen) + 2, f"{done} of {len(chosen)} cases against float64")
        again = [row for future in repeats for row in future.result()]
    _sum_up(result, chosen, rows)
    _repeats(result, again, times)


def _sum_up(result: Result, chosen: list[Case], rows: list[dict[str, Any]]) -> None:
    """From the workers' rows to figures."""
    result.rows += [{"kind": "case", **_finite(row)} for row in rows]
    failed = [row for row in rows if "failed" in row]
    beyond = [
        (row, name) for row, name, found in _each(rows) if not found["ratio"] <= 1.0
    ]
    for row in failed[:8]:
        result.notes.append(f"{row['case']}: {row['failed']}")
    for row, name in beyond[:8]:
        ratio = row["tensors"][name]["ratio"]
        result.notes.append(f"{row['case']}, {row['road']}: {name} is {ratio:.2f} times the bound")
    bound = "twice plain attention's error in the same dtype, largest and mean, against float64"
    result.add("cases", len(chosen), "1", "cases in which every two values of two factors meet")
    result.add("runs", len(rows), "1", "cases × the kernels that can compute them")
    result.add(
        "failures", len(failed) + len(beyond), "1",
        f"tensors with an error beyond the bound ({bound}), and cases that did not run",
    )  # fmt: skip
    for dtype in DTYPES:
        for tensor in TENSORS:
            found = [
                (f["ratio"], row) for row, name, f in _each(rows)
                if name == tensor and row["dtype"] == dtype
            ]  # fmt: skip
            if found:
                _worst(result, f"{dtype}_{tensor}", found, f"error / allowed of {tensor}: {bound}")
    for road in sorted({row["road"] for row in rows if row["road"]}):
        found = [(f["ratio"], row) for row, _, f in _each(rows) if row["road"] == road]
        _worst(result, road, found, f"error / allowed, kernels of the road {road}: {bound}")
    for case in representative():
        for row in rows:
            if row["case"] == str(case) and row["road"] == "default" and "tensors" in row:
                for tensor in TENSORS:
                    _ordinary(result, case, tensor, row["tensors"][tensor])


def _each(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, dict[str, float]]]:
    """``(row, tensor, what was found)`` of everything that was computed."""
    for row in rows:
        for name, found in row.get("tensors", {}).items():
            yield row, name, found


def _worst(result: Result, key: str, found: list[tuple[float, dict[str, Any]]], how: str) -> None:
    ratio, row = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    count = len({id(r) for _, r in found})
    result.add(f"{key}_cases", count, "1", how)
    # JSON has no infinity: an output that is not finite is a million times beyond the bound
    ratio = ratio if ratio <= 1e6 else 1e6
    result.add(f"{key}_worst", ratio, "1", f"{how}; worst: {row['case']}, {row['road']}")


def _ordinary(result: Result, case: Case, tensor: str, found: dict[str, float]) -> None:
    for column, whose in (("rms", "ours"), ("rms_plain", "plain attention")):
        how = f"root mean square error against float64 / that of {tensor} itself, {whose}, {case}"
        result.add(f"{case.dtype}_{tensor}_{column}", found[column], "1", how)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and not abs(value) < 1e300:
        return None
    return value


# -- repeated ------------------------------------------------------------------------------------


def _repeats(result: Result, rows: list[dict[str, Any]], times: int) -> None:
    """Every road of some cases, again and again: each output must be the first one, to the bit."""
    done = [row for row in rows if "failed" not in row]
    result.notes += [f"not repeated: {r['case']}: {r['failed']}" for r in rows if "failed" in r]
    result.rows += done
    what = f"forward and backward of {len(done)} cases and roads, each {times} times on one input"
    result.add("repeats", times, "1", what)
    result.add("repeats_cases", len(done), "1", what)
    unequal = sum(row["unequal"] for row in done)
    result.add("repeats_unequal", unequal, "1", f"runs with a bit that differs: {what}")


# -- watched -------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, or None."""
    if found := shutil.which("compute-sanitizer"):
        return found
    for pattern in _PLACES:
        if places := sorted(Path("/").glob(pattern), reverse=True):
            return str(places[0])
    return None


def sanitizer_command(sanitizer: str | None, tool: str, roads: list[str]) -> list[str]:
    """The command that watches the child; without a sanitizer, the child alone."""
    asked = json.dumps({"roads": roads, "cases": [case.to_dict() for case in watched()]})
    child = [sys.executable, "-m", "labkit.experiments._sanitizer_child", asked]
    return child if sanitizer is None else [sanitizer, "--tool", tool, "--print-limit", "5", *child]


_SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed"),
}


def parse_sanitizer(tool: str, text: str) -> tuple[int, int] | None:
    """``(errors, runs)`` of a sanitizer's output, or None if it did not come to an end.

    >>> parse_sanitizer("memcheck", "ran 5\\n========= ERROR SUMMARY: 0 errors")
    (0, 5)
    """
    summary, ran = _SUMMARY[tool].search(text), re.search(r"^ran (\d+)$", text, re.MULTILINE)
    return (int(summary[1]), int(ran[1])) if summary and ran else None


def _sanitize(result: Result) -> None:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        result.notes.append("compute-sanitizer is not installed: accesses and races not checked.")
        return
    groups = {"": ["default", "descriptors"], "_by_hand": ["by_hand"]}
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def child(tool: str | None, roads: list[str]) -> str:
        command = sanitizer_command(sanitizer if tool else None, tool or "", roads)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True,
                timeout=_SANITIZER_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not done after {_SANITIZER_TIMEOUT_S} s"
        return done.stdout + done.stderr

    with ThreadPoolExecutor(4) as pool:
        # once unwatched, so that everything is compiled; a watched compiler takes minutes
        ready = dict(zip(groups, pool.map(lambda r: child(None, r), groups.values()), strict=True))
        jobs = {
            (tool, suffix): pool.submit(child, tool, roads)
            for suffix, roads in groups.items() if re.search(r"^ran [1-9]", ready[suffix], re.M)
            for tool in _SUMMARY
        }  # fmt: skip
    for suffix, said in ready.items():
        if not re.search(r"^ran \d", said, re.M):
            last = (said.strip().splitlines() or ["nothing"])[-1]
            result.notes.append(f"Not watched{suffix.replace('_', ' ')}: the child said {last}")
    for (tool, suffix), job in jobs.items():
        found = parse_sanitizer(tool, job.result())
        row = {"kind": "sanitizer", "tool": tool, "roads": groups[suffix]}
        if found is None:
            last = (job.result().strip().splitlines() or ["nothing"])[-1]
            result.notes.append(f"{tool}{suffix.replace('_', ' ')} gave no summary: {last[-200:]}")
            result.rows.append({**row, "errors": None})
            continue
        errors, runs = found
        result.rows.append({**row, "errors": errors, "runs": runs})
        if errors:
            said = [x for x in job.result().splitlines() if x.startswith("=========")][1:4]
            result.notes.append(f"{tool}{suffix}: {' / '.join(said)}")
        which = f"{runs} tiny cases, roads {', '.join(groups[suffix])}"
        how = f"compute-sanitizer --tool {tool}, {which}"
        result.add(f"{tool}{suffix}_errors", errors, "1", how)
