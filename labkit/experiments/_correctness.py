"""What the correctness experiments share: workers that judge, repeats, compute-sanitizer, figures.

An experiment describes itself as a :class:`Suite`.  Its *worker* is a module that runs cases:

- ``Case`` and ``make`` are what a case is and its tensors, ``roads`` says which kernels can compute
  it, ``attend`` computes it by one of them, and ``run`` judges what each of them gives;
- as a program (``python -m``) it calls :func:`serve`.

A *road* is one of the kernels that can compute a case.  Workers are processes of their own, several
side by side: most of the time goes into compiling, and one that dies takes its own cases along and
no other.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from labkit.experiments import Progress, Result

__all__ = [
    "Suite",
    "judge",
    "on_every_road",
    "parse_sanitizer",
    "sanitize",
    "sanitizer_command",
    "serve",
    "sum_up",
    "work",
]

_SANITIZER_TIMEOUT_S = 75
# compute-sanitizer's own places when it is not on the PATH
_PLACES = tuple(
    f"usr/local/cuda*/{place}/compute-sanitizer" for place in ("bin", "compute-sanitizer")
)
_BOUND = (
    "twice plain attention's error in the same dtype, largest and mean, against float64, beside "
    "the roundings that making P again from LSE adds"
)


@dataclass(frozen=True)
class Suite:
    """What is judged, by whom, and what it is called.

    Attributes
    ----------
    worker : module that runs the cases.
    tensors : names of what a case gives; each is a column of the record.
    representative : ordinary cases, whose error stands beside that of plain attention.
    repeated : cases that are done again and again.
    watched : tiny cases that compute-sanitizer watches.
    groups : roads that are watched together, by the suffix of their keys.
    order : cases that are alike are neighbours by it, and compile the same kernels.
    timeout_s : how long a worker may take over its share.
    """

    worker: str
    tensors: Sequence[str]
    representative: Sequence[Any]
    repeated: Sequence[Any]
    watched: Sequence[Any]
    groups: Mapping[str, list[str]]
    order: Callable[[Any], Any]
    dtypes: Sequence[str] = field(default=("float16", "bfloat16", "float32"))
    timeout_s: int = 150


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # LABKIT_TUNE=0: the choice by rule, which needs no measurement
    return os.environ | {"PYTHONPATH": path, "LABKIT_TUNE": "0", "OMP_NUM_THREADS": "1"}


# -- judged --------------------------------------------------------------------------------------


def work(suite: Suite, share: Sequence[Any], times: int = 0) -> list[dict[str, Any]]:
    """One worker's share of the cases; what it did not get to is reported as failed.

    ``times`` is what :func:`serve` makes of its argument: 0 judges, more repeats.
    """
    asked = json.dumps([case.to_dict() for case in share])
    try:
        done = subprocess.run(
            [sys.executable, "-m", suite.worker, str(times)],
            input=asked, env=_environment(), capture_output=True, text=True,
            timeout=suite.timeout_s, check=False,
        )  # fmt: skip
        out, why = done.stdout, (done.stderr.strip().splitlines() or ["stopped"])[-1]
    except subprocess.TimeoutExpired as error:
        out, why = error.stdout or b"", f"not done after {suite.timeout_s} s"
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


def judge(
    suite: Suite, result: Result, chosen: Sequence[Any], times: int, report: Progress
) -> None:
    """Every case by every road, then the repeats."""
    workers = max(1, min(15, (os.cpu_count() or 2) - 1, len(chosen) // 2))
    ordered = sorted(chosen, key=suite.order)
    size = -(-len(ordered) // (3 * workers))
    shares = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    rows, done = [], 0
    with ThreadPoolExecutor(workers) as pool:
        # Repeats first: they compile the slowest kernels, one process for each case.
        repeats = [pool.submit(work, suite, [case], times) for case in suite.repeated]
        waiting = {pool.submit(work, suite, share): len(share) for share in shares}
        for future in as_completed(waiting):
            rows += future.result()
            done += waiting[future]
            report(done, len(chosen) + 2, f"{done} of {len(chosen)} cases against float64")
        again = [row for future in repeats for row in future.result()]
    sum_up(suite, result, chosen, rows)
    _repeats(result, again, times)


def sum_up(suite: Suite, result: Result, chosen: Sequence[Any], rows: list[dict[str, Any]]) -> None:
    """From the workers' rows to figures."""
    result.rows += [{"kind": "case", **_finite(row)} for row in rows]
    failed = [row for row in rows if "failed" in row]
    beyond = [(row, name) for row, name, found in _each(rows) if not found["ratio"] <= 1.0]
    for row in failed[:8]:
        result.notes.append(f"{row['case']}: {row['failed']}")
    for row, name in beyond[:8]:
        ratio = row["tensors"][name]["ratio"]
        result.notes.append(f"{row['case']}, {row['road']}: {name} is {ratio:.2f} times the bound")
    result.add("cases", len(chosen), "1", "cases in which every two values of two factors meet")
    result.add("runs", len(rows), "1", "cases × the kernels that can compute them")
    result.add(
        "failures", len(failed) + len(beyond), "1",
        f"tensors with an error beyond the bound ({_BOUND}), and cases that did not run",
    )  # fmt: skip
    for dtype in suite.dtypes:
        for tensor in suite.tensors:
            found = [
                (f["ratio"], row) for row, name, f in _each(rows)
                if name == tensor and row["dtype"] == dtype
            ]  # fmt: skip
            if found:
                _worst(result, f"{dtype}_{tensor}", found, f"error / allowed of {tensor}: {_BOUND}")
    for road in sorted({row["road"] for row in rows if row["road"]}):
        found = [(f["ratio"], row) for row, _, f in _each(rows) if row["road"] == road]
        _worst(result, road, found, f"error / allowed, kernels of the road {road}: {_BOUND}")
    for case in suite.representative:
        for row in rows:
            if row["case"] == str(case) and row["road"] == "default" and "tensors" in row:
                for tensor in row["tensors"]:
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


def _ordinary(result: Result, case: Any, tensor: str, found: dict[str, float]) -> None:
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


def repeat(worker: ModuleType, case: Any, times: int) -> list[dict[str, Any]]:
    """Every road of a case ``times`` times more; ``unequal`` counts runs with another bit."""
    import torch

    tensors = worker.make(case, "cuda")
    rows = []
    for road in worker.roads(*tensors, case):
        first = worker.attend(*tensors, case, road)
        unequal = 0
        for _ in range(times):
            again = worker.attend(*tensors, case, road)
            unequal += any(not torch.equal(again[n], first[n]) for n in first)
        rows.append({"kind": "repeats", "case": str(case), "road": road, "dtype": case.dtype,
                     "times": times, "unequal": unequal})  # fmt: skip
    return rows


def on_every_road(worker: ModuleType, case: Any, device: str, **labels: Any) -> list[dict]:
    """Every road of one case, judged; outputs are full of NaN before they are written."""
    import torch

    tensors = worker.make(case, device)
    rows = []
    for road in worker.roads(*tensors, case) if device == "cuda" else ["default"]:
        torch.use_deterministic_algorithms(True, warn_only=True)  # it fills torch.empty with NaN
        try:
            got = worker.attend(*tensors, case, road)
        finally:
            torch.use_deterministic_algorithms(False)
        rows.append({"case": str(case), **labels, "road": road, "dtype": case.dtype,
                     "tensors": worker.judge(case, tensors, got)})  # fmt: skip
        del got
    return rows


def serve(worker: ModuleType) -> None:
    """A worker's program: cases come in as JSON, rows go out, one line each.

    A case that fails says why.  With a number as argument each case is repeated that many times
    instead of judged; with −1 it is what the worker's ``far`` makes of it.
    """
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    for entry in json.load(sys.stdin):
        case = worker.Case(**entry)
        try:
            if times < 0:
                rows = worker.far(case)
            else:
                rows = repeat(worker, case, times) if times else worker.run(case)
        except Exception:
            said = traceback.format_exc().strip().splitlines()[-1]
            rows = [{"case": str(case), "road": "", "dtype": case.dtype, "failed": said[-300:]}]
        for row in rows:
            print(json.dumps(row), flush=True)


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


def sanitizer_command(
    suite: Suite, sanitizer: str | None, tool: str, roads: list[str]
) -> list[str]:
    """The command that watches the child; without a sanitizer, the child alone."""
    cases = [case.to_dict() for case in suite.watched]
    asked = json.dumps({"worker": suite.worker, "roads": roads, "cases": cases})
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


def sanitize(suite: Suite, result: Result) -> None:
    """memcheck and racecheck over every group of roads."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        result.notes.append("compute-sanitizer is not installed: accesses and races not checked.")
        return
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def child(tool: str | None, roads: list[str]) -> str:
        command = sanitizer_command(suite, sanitizer if tool else None, tool or "", roads)
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
        ready = {s: pool.submit(child, None, roads) for s, roads in suite.groups.items()}
        ready = {suffix: job.result() for suffix, job in ready.items()}
        jobs = {
            (tool, suffix): pool.submit(child, tool, roads)
            for suffix, roads in suite.groups.items()
            if re.search(r"^ran [1-9]", ready[suffix], re.M)
            for tool in _SUMMARY
        }  # fmt: skip
    for suffix, said in ready.items():
        if not re.search(r"^ran \d", said, re.M):
            last = (said.strip().splitlines() or ["nothing"])[-1]
            result.notes.append(f"Not watched{suffix.replace('_', ' ')}: the child said {last}")
    for (tool, suffix), job in jobs.items():
        found = parse_sanitizer(tool, job.result())
        row = {"kind": "sanitizer", "tool": tool, "roads": suite.groups[suffix]}
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
        which = f"{runs} tiny cases, roads {', '.join(suite.groups[suffix])}"
        how = f"compute-sanitizer --tool {tool}, {which}"
        result.add(f"{tool}{suffix}_errors", errors, "1", how)
