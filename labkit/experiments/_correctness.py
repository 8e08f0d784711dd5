"""What the correctness experiments share: workers that judge, repeats, compute-sanitizer, figures.

An experiment describes itself as a :class:`Suite`.  Its *worker* is a module that runs cases:

- ``Case`` and ``make`` are what a case is and its tensors, ``roads`` says which kernels can compute
  it, ``attend`` computes it by one of them, and ``run`` judges what each of them gives;
- as a program (``python -m``) it calls :func:`serve`.

A *road* is one of the kernels that can compute a case.  Workers are processes of their own, several
side by side: most of the time goes into compiling.  Each is given one case after another, so that
one that dies or hangs takes one case along and no other.

A run has a time limit (:class:`Clock`), after which no case begins.  What was found by then is the
record, and it says how much was left out.  Cases come in an order in which even the first dozens
have a bit of everything (:func:`spread`); neighbours in it share hardly a kernel, so that nothing
is compiled twice at the same time, and what one worker compiled the others find on disk.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from labkit.experiments import Progress, Result
from labkit.experiments._jobs import end

__all__ = [
    "Clock",
    "Suite",
    "judge",
    "on_every_road",
    "parse_sanitizer",
    "sanitize",
    "sanitizer_command",
    "serve",
    "spread",
    "sum_up",
    "work",
]

#: no case begins after so many seconds
LIMIT_S = 230
#: how long what has begun may take beyond the limit
_GRACE_S = 15
_SANITIZER_TIMEOUT_S = 150
#: processor cores that are left to compute-sanitizer while it runs
_FOR_SANITIZER = 4
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
    facts : what a case is an example of; the first cases of a run show every fact early.
    timeout_s : how long one case may take; compiling its kernels is most of that.
    """

    worker: str
    tensors: Sequence[str]
    representative: Sequence[Any]
    repeated: Sequence[Any]
    watched: Sequence[Any]
    groups: Mapping[str, list[str]]
    facts: Callable[[Any], Iterable[Hashable]] = lambda case: case.to_dict().items()
    dtypes: Sequence[str] = field(default=("float16", "bfloat16", "float32"))
    timeout_s: int = 150


class Clock:
    """The time that a run has; as a context it also ends the run where the process is told to.

    ``timeout 300 python -m labkit record …`` sends SIGTERM: what was found is then recorded, if
    the command leaves a few seconds for it (``timeout -k 15 300 …``).

    >>> 0 < Clock(60).left() <= 60
    True
    """

    def __init__(self, limit_s: float = math.inf) -> None:
        self._start, self.limit_s, self._grace = time.monotonic(), limit_s, _GRACE_S
        self._before: Any = None

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start

    def left(self) -> float:
        """Seconds in which something may begin."""
        return self.limit_s - self.spent()

    def patience(self) -> float:
        """Seconds in which something that has begun has to end."""
        return self.left() + self._grace

    def stop(self, *_signal: object) -> None:
        """The time is over."""
        self.limit_s, self._grace = min(self.limit_s, self.spent()), 2

    def __enter__(self) -> Clock:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self.stop)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def spread(suite: Suite, cases: Sequence[Any]) -> list[Any]:
    """The cases in another order: each next one has most of what was rare so far."""
    facts = [list(suite.facts(case)) for case in cases]
    seen: Counter[Any] = Counter()
    left, out = list(range(len(cases))), []
    while left:
        best = max(left, key=lambda i: sum(4.0 ** -seen[fact] for fact in facts[i]))
        left.remove(best)
        seen.update(facts[best])
        out.append(cases[best])
    return out


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # LABKIT_TUNE=0: the choice by rule, which needs no measurement
    return os.environ | {"PYTHONPATH": path, "LABKIT_TUNE": "0", "OMP_NUM_THREADS": "1"}


# -- judged --------------------------------------------------------------------------------------


class _Worker:
    """A process that is given one case after another; a new one if it was stopped or went."""

    def __init__(self, suite: Suite, clock: Clock) -> None:
        self.suite, self.clock = suite, clock
        self._process: subprocess.Popen[str] | None = None
        self._served = 0
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115

    def do(self, case: Any, times: int = 0) -> list[dict[str, Any]] | None:
        """The rows of a case, of which one may say why it failed; None if the time was over."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        with suppress(OSError):  # it is gone already: its output says so
            print(json.dumps({"case": case.to_dict(), "times": times}), file=process.stdin)
            process.stdin.flush()
        rows: list[dict[str, Any]] = []
        begin = time.monotonic()
        while True:
            try:
                line = self._said.get(timeout=0.5)
            except queue.Empty:
                late = time.monotonic() - begin > self.suite.timeout_s
                if not late and self.clock.patience() > 0:
                    continue
                self.close()
                why = f"not done after {self.suite.timeout_s} s"
                return [_failed(case, why)] if late else None
            if line is None:
                self._errors.seek(0)
                why = (self._errors.read().strip().splitlines() or ["stopped"])[-1]
                again = self._served > 0  # was it this case, or one before?
                self.close()
                if again:
                    return self.do(case, times)
                return [_failed(case, why[-300:])]
            try:
                found = json.loads(line) if line.startswith("{") else None
            except ValueError:
                continue
            if isinstance(found, dict) and "done" in found:
                self._served += 1
                if not found["done"]:
                    self.close()
                return rows
            if isinstance(found, dict):
                rows.append(found)

    def _start(self) -> None:
        self._errors.seek(0)
        self._errors.truncate()
        process = subprocess.Popen(
            [sys.executable, "-m", self.suite.worker], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
        said: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def listen() -> None:
            for line in process.stdout or ():
                said.put(line.strip())
            said.put(None)

        threading.Thread(target=listen, daemon=True).start()
        self._process, self._said, self._served = process, said, 0

    def close(self) -> None:
        """End the process and what it started."""
        if self._process is not None:
            end(self._process)
        self._process = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._errors.close()


def _failed(case: Any, why: str) -> dict[str, Any]:
    return {"case": str(case), "road": "", "dtype": case.dtype, "failed": why}


def work(suite: Suite, share: Sequence[Any], times: int = 0) -> list[dict[str, Any]]:
    """The rows of some cases, one after another by one worker; one that fails says why.

    ``times`` is what :func:`serve` makes of it: 0 judges, more repeats.
    """
    with _Worker(suite, Clock()) as worker:
        return [row for case in share for row in worker.do(case, times) or ()]


def judge(
    suite: Suite, result: Result, chosen: Sequence[Any], times: int, report: Progress,
    clock: Clock | None = None, *, far: Any = None, watch: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every case by every road, the repeats, and compute-sanitizer beside them.

    Parameters
    ----------
    times : how often ``suite.repeated`` are done again.
    clock : no case begins after its limit; those that did not are counted, and a note names some.
    far : a case for the worker's ``far``, which begins first.
    watch : whether compute-sanitizer is to run, beside everything else.

    Returns
    -------
    What ``far`` said: rows, none where there was no time or no such case.
    """
    clock = clock or Clock()
    first = ([(far, -1)] if far is not None else []) + [(case, times) for case in suite.repeated]
    tasks = [*first, *((case, 0) for case in spread(suite, chosen))]
    rows, again, distant, gone = [], [], [], []
    lock, waiting = threading.Lock(), iter(tasks)

    def some(after: Future[None] | None) -> None:
        """One worker's life: a task after another, while there is time."""
        if after is not None:
            with suppress(Exception):
                after.result()
        with _Worker(suite, clock) as worker:
            while True:
                with lock:
                    case, kind = next(waiting, (None, 0))
                if case is None:
                    return
                try:
                    found = worker.do(case, kind) if clock.left() > 0 else None
                except Exception as error:  # one case fewer, not one record fewer
                    found = [_failed(case, f"{type(error).__name__}: {str(error)[:200]}")]
                if kind:  # they hold much, and their processes are their own
                    worker.close()
                with lock:
                    if found is None:
                        gone.append((case, kind))
                    else:
                        (rows if not kind else distant if kind < 0 else again).extend(found)
                    if not kind and found is not None:
                        done = len({row["case"] for row in rows})
                        report(done, len(chosen) + 1, f"{done} of {len(chosen)} cases")

    aside = Result()
    count = max(1, min(15, (os.cpu_count() or 2) - 1, len(tasks) // 2))
    with ThreadPoolExecutor(count + 1) as pool:
        watching = pool.submit(sanitize, suite, aside, clock) if watch else None
        late = min(_FOR_SANITIZER, count - 1) if watch else 0
        jobs = [pool.submit(some, watching if i >= count - late else None) for i in range(count)]
        try:
            for job in jobs:
                job.result()
        except BaseException:  # Ctrl-C: nobody waits for what is left
            clock.stop()
            raise
    if watching is not None and (error := watching.exception()):
        aside.notes.append(f"Not watched: {type(error).__name__}: {str(error)[:200]}")
    sum_up(suite, result, chosen, rows, [case for case, kind in gone if not kind], clock.spent())
    _repeats(result, again, times)
    for case, kind in gone:
        if kind:
            what = "addresses" if kind < 0 else "repeats"
            result.notes.append(f"{what}: no time was left for {case}")
    result.results |= aside.results
    result.rows += aside.rows
    result.notes += aside.notes
    return distant


def sum_up(
    suite: Suite, result: Result, chosen: Sequence[Any], rows: list[dict[str, Any]],
    left_out: Sequence[Any] = (), spent_s: float = 0.0,
) -> None:  # fmt: skip
    """From the workers' rows to figures; ``left_out`` are cases that were not judged."""
    result.rows += [{"kind": "case", **_finite(row)} for row in rows]
    failed = [row for row in rows if "failed" in row]
    beyond = [(row, name) for row, name, found in _each(rows) if not found["ratio"] <= 1.0]
    for row in failed[:8]:
        result.notes.append(f"{row['case']}: {row['failed']}")
    for row, name in beyond[:8]:
        ratio = row["tensors"][name]["ratio"]
        result.notes.append(f"{row['case']}, {row['road']}: {name} is {ratio:.2f} times the bound")
    how, left = "cases in which every two values of two factors meet", len(left_out)
    if left:
        some = "; ".join(str(case) for case in left_out[:4])
        result.notes.append(
            f"{left} of {len(chosen)} cases were not judged, the time was over after "
            f"{spent_s:.0f} s: {some}{' …' if left > 4 else ''}"
        )
        how += f", but for {left} of {len(chosen)}: no time was left for them"
    result.add("cases", len(chosen) - left, "1", how)
    result.add("left_out", left, "1", f"cases that no time was left for, of {len(chosen)}")
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
    """A worker's program: a case comes in as a line of JSON, its rows go out, one line each.

    Each line is ``{"case": …, "times": n}``: 0 judges the case, more repeats it that many times,
    and −1 gives it to the worker's ``far``.  A case that fails says why.  After its rows comes
    ``{"done": true}``, or false if the process ends there: after an illegal access nothing that
    it computes can be trusted.
    """
    for line in sys.stdin:
        asked = json.loads(line)
        case, times, sound = worker.Case(**asked["case"]), asked["times"], True
        try:
            if times < 0:
                rows = worker.far(case)
            else:
                rows = repeat(worker, case, times) if times else worker.run(case)
        except Exception:
            said = traceback.format_exc().strip().splitlines()[-1]
            rows, sound = [_failed(case, said[-300:])], _is_sound()
        for row in rows:
            print(json.dumps(row))
        print(json.dumps({"done": sound}), flush=True)
        if not sound:
            return


def _is_sound() -> bool:
    """Whether the GPU still does what this process asks; an illegal access is never forgiven."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def _repeats(result: Result, rows: list[dict[str, Any]], times: int) -> None:
    """Every road of some cases, again and again: each output must be the first one, to the bit."""
    done = [row for row in rows if "failed" not in row]
    result.notes += [f"not repeated: {r['case']}: {r['failed']}" for r in rows if "failed" in r]
    result.rows += done
    what = f"forward and backward of {len(done)} cases and roads, each {times} times on one input"
    result.add("repeats", times, "1", what)
    result.add("repeats_cases", len(done), "1", what)
    if not done:
        return  # that none of them differs would say nothing
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


def _outcome(command: list[str], environment: dict[str, str], clock: Clock) -> str:
    """What a command says, or that it was not done in time; it and its children end then."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        begin = time.monotonic()
        while True:
            try:
                process.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                took = time.monotonic() - begin
                if took > _SANITIZER_TIMEOUT_S or clock.patience() <= 0:
                    end(process)
                    return f"not done after {took:.0f} s"
        file.seek(0)
        return file.read()


def sanitize(suite: Suite, result: Result, clock: Clock | None = None) -> None:
    """memcheck and racecheck over every group of roads."""
    clock = clock or Clock()
    sanitizer = find_sanitizer()
    if sanitizer is None:
        result.notes.append("compute-sanitizer is not installed: accesses and races not checked.")
        return
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def child(tool: str | None, roads: list[str]) -> str:
        command = sanitizer_command(suite, sanitizer if tool else None, tool or "", roads)
        return _outcome(command, environment, clock)

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
