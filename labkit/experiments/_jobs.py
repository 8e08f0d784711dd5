"""What experiments of many parts share: jobs, of which one may fail and the others stand."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from labkit.errors import check_choice
from labkit.experiments import Progress, Result, _release_memory, has_gpu, steps
from labkit.experiments.scaling import _one_thread

__all__ = ["Jobs", "end", "first_line", "untuned"]


def first_line(error: BaseException) -> str:
    """An error as a record names it: its kind and what it says first."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session, and its children: a compiler, or who is watched."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps even a killed process
        process.wait(5)


@contextmanager
def untuned() -> Iterator[None]:
    """labkit.flash takes its tiles by rule: each tuned shape would compile a dozen kernels."""
    before = os.environ.get("LABKIT_TUNE")
    os.environ["LABKIT_TUNE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LABKIT_TUNE"]
        else:
            os.environ["LABKIT_TUNE"] = before


class Jobs:
    """The jobs of one run, in order, and what they found.

    Parameters
    ----------
    plan : ``plan(quick, device)`` gives the sizes of a run.
    quick, device : as for every experiment; the GPU if there is one by default.
    parts : which parts are asked for.
    known : which parts there are.

    Raises
    ------
    ArgumentError
        if a part is not known.
    """

    def __init__(
        self, plan: Callable[[bool, str], dict[str, Any]], quick: bool, device: str | None,
        parts: Iterable[str], known: Sequence[str],
    ) -> None:  # fmt: skip
        self.parts = tuple(check_choice("parts", part, known) for part in parts)
        self.device = device or ("cuda" if has_gpu() else "cpu")
        self.plan = plan(quick, self.device)
        self.result = Result()
        self._work: list[tuple[str, Callable[[], None]]] = []

    def add(self, part: str, text: str, function: Callable[..., None], *args: Any) -> None:
        """``function(result, plan, device, *args)``, called ``text``, if its part is asked for."""
        if part in self.parts:
            self.also(text, functools.partial(function, self.result, self.plan, self.device, *args))

    def also(self, text: str, function: Callable[[], None]) -> None:
        """``function()``, whatever is asked for."""
        self._work.append((text, function))

    def run(
        self, progress: Progress | None, *, limit_s: float = float("inf"),
        tidy: Callable[[bool], object] = lambda failed: _release_memory(),
    ) -> Result:  # fmt: skip
        """Do the jobs; one that fails costs its own rows, and a note says why.

        Parameters
        ----------
        progress : called with ``(done, total, what)``.
        limit_s : a job that would start later than this is left out, and a note says so.
        tidy : called after each job with whether it failed; gives memory back by default.
        """
        start = time.perf_counter()
        with _one_thread(self.device):
            for text, function in steps(self._work, progress, lambda w: w[0]):
                if time.perf_counter() - start > limit_s:
                    self.result.notes.append(f"{text}: left out, the run had taken {limit_s} s")
                    continue
                failed = False
                try:
                    function()
                except Exception as error:
                    self.result.notes.append(f"{text}: {first_line(error)}")
                    failed = True
                tidy(failed)
        return self.result
