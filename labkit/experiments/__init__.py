"""Experiments: the measurements of the chapters, run and recorded by name.

An experiment is a module in this package::

    TITLE = "Bandwidth and latency of the memory hierarchy"
    CHAPTERS = ("03",)
    NEEDS_GPU = False

    def run(*, quick, device=None, progress=None) -> Result: ...

``quick=True`` finishes in seconds on a laptop CPU and is what a notebook calls;
the full form is what ``make record`` runs, once per GPU.  A record of an earlier
run is replaced only by a valid record of a run that finished.

Loads neither torch nor Triton until an experiment runs.
"""

from __future__ import annotations

import gc
import json
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from labkit import records
from labkit.errors import LabError, NoGpuError, RecordError, check_choice
from labkit.records import Figures, Record

__all__ = [
    "Outcome",
    "Progress",
    "Result",
    "beside",
    "get",
    "has_gpu",
    "names",
    "notebook",
    "run",
    "run_and_record",
    "steps",
]

T = TypeVar("T")

#: ``progress(done, total, what)`` is called as an experiment goes
Progress = Callable[[int, int, str], None]


@dataclass
class Result(Figures):
    """What an experiment found.

    Attributes
    ----------
    results : figures that a page may quote: ``{key: {"value", "unit", "how"}}``, base units.
    rows : one dict per measured point, with ``samples_ms`` where time was taken.
    notes : remarks for whoever reads the record.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, key: str, value: float, unit: str, how: str) -> None:
        """Add one figure; ``unit`` is a base unit (bytes, B/s, FLOP/s, s, 1, …)."""
        self.results[key] = {"value": value, "unit": unit, "how": how}


class Experiment(Protocol):
    """What a module in this package offers."""

    TITLE: str
    CHAPTERS: Sequence[str]
    NEEDS_GPU: bool

    def run(self, *, quick: bool, device: str | None, progress: Progress | None) -> Result:
        """Measure and return what was found."""


@dataclass(frozen=True)
class Outcome:
    """How one experiment of ``run_and_record`` ended.

    ``status`` is "recorded", "measured" (ran, not saved), "skipped" or "failed";
    ``why`` explains all but the first.
    """

    name: str
    status: str
    seconds: float = 0.0
    path: Path | None = None
    error: BaseException | None = None
    why: str = ""


def names() -> tuple[str, ...]:
    """Names of all experiments: the modules of this package, sorted. Nothing is imported."""
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    )


def get(name: str) -> Experiment:
    """The module of that experiment.

    Raises
    ------
    ArgumentError
        if there is none of that name.
    LabError
        if the module does not offer what an experiment has to.
    """
    check_choice("experiment", name, names())
    module = import_module(f"{__name__}.{name}")
    missing = [a for a in ("TITLE", "CHAPTERS", "NEEDS_GPU", "run") if not hasattr(module, a)]
    if missing:
        raise LabError(f"labkit/experiments/{name}.py: lacks {', '.join(missing)}.")
    return module


def has_gpu() -> bool:
    """Whether torch is installed and can use a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def steps(
    items: Iterable[T], progress: Progress | None, what: Callable[[T], str] = str
) -> Iterator[T]:
    """Iterate over ``items`` and report each to ``progress`` before it is worked on."""
    known = list(items)
    for index, item in enumerate(known):
        if progress is not None:
            progress(index, len(known), what(item))
        yield item
    if progress is not None:
        progress(len(known), len(known), "")


def run(
    name: str,
    *,
    quick: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run one experiment and return what it found; nothing is written.

    Parameters
    ----------
    name : one of ``names``.
    quick : the short form (seconds on a laptop) or the full one (what is recorded).
    device : ``"cuda"`` or ``"cpu"``; the GPU if there is one by default.
    progress : called with ``(done, total, what)``.

    Raises
    ------
    ArgumentError
        if there is no such experiment or device.
    NoGpuError
        if the experiment needs a GPU and there is none.
    """
    experiment = get(name)
    if device is not None:
        check_choice("device", device, ("cuda", "cpu"))
    wants_gpu = device == "cuda" or (experiment.NEEDS_GPU and device is None)
    if experiment.NEEDS_GPU and device == "cpu":
        raise NoGpuError(f"{name} measures a GPU and cannot run with device='cpu'. Leave it out.")
    if wants_gpu and not has_gpu():
        raise NoGpuError(
            f"{name} needs a GPU, and torch finds none here. Read the recorded run instead: "
            f"labkit.records.load({name!r}); `python -m labkit doctor` says what is missing."
        )
    result = experiment.run(quick=quick, device=device, progress=progress)
    if not isinstance(result, Result):
        raise LabError(
            f"labkit/experiments/{name}.py: run() returned a {type(result).__name__}, not a Result."
        )
    return result


# -- several, with records -------------------------------------------------------


class _Lines:
    """Progress as plain lines: for logs, pipes, and where rich is not installed."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        sys.stdout.flush()

    def start(self, name: str, title: str) -> Progress:
        self.done += 1
        print(f"[{self.done}/{self.total}] {name}: {title}", flush=True)
        return lambda done, total, what: None

    def end(self, outcome: Outcome) -> None:
        print(f"      {_sentence(outcome)}", flush=True)


class _Bars:
    """Progress as two bars: experiments, and steps of the one that runs."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            TextColumn("[dim]{task.fields[what]}"),
        )
        self.all = self.bars.add_task("experiments", total=total, what="")
        self.one: Any = None

    def __enter__(self) -> _Bars:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def start(self, name: str, title: str) -> Progress:
        self.bars.update(self.all, what=title)
        self.one = self.bars.add_task(f"  {name}", total=None, what="")

        def progress(done: int, total: int, what: str) -> None:
            self.bars.update(self.one, completed=done, total=total, what=what)

        return progress

    def end(self, outcome: Outcome) -> None:
        if self.one is not None:
            self.bars.remove_task(self.one)
            self.one = None
        mark = {"failed": "[red]✗", "skipped": "[yellow]–"}.get(outcome.status, "[green]✓")
        from rich.markup import escape

        self.bars.console.print(f"{mark} {outcome.name}[/]: {escape(_sentence(outcome))}")
        self.bars.advance(self.all)


def _reporter(total: int) -> _Lines | _Bars:
    if sys.stdout.isatty():
        try:
            return _Bars(total)
        except ImportError:
            pass
    return _Lines(total)


def _sentence(outcome: Outcome) -> str:
    if outcome.status == "failed":
        kept = "its earlier record, if any, is untouched"
        return f"failed: {outcome.why} ({kept})"
    if outcome.status == "skipped":
        return f"skipped: {outcome.why}"
    where = f", {outcome.path}" if outcome.path else ""
    why = f"; {outcome.why}" if outcome.why else ""
    return f"{outcome.status} in {outcome.seconds:.1f} s{where}{why}"


def _release_memory() -> None:
    """Give back what an experiment, above all a failed one, still held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_and_record(
    which: Sequence[str] | None = None,
    *,
    quick: bool = False,
    write: bool = True,
    device: str | None = None,
    command: str | None = None,
    root: Path | str | None = None,
) -> list[Outcome]:
    """Run experiments one after another and record each as soon as it is done.

    An experiment that fails is reported and the others go on.  Its earlier record
    stays as it was; so do all records when you stop the run with Ctrl-C.

    Parameters
    ----------
    which : names; all by default.
    quick : the short form; a quick record never replaces a full one.
    write : whether to save records.
    device : see ``run``.
    command : what the records say was typed; the process's command line by default.
    root : folder to write to; ``labkit.records.save_root`` by default.

    Returns
    -------
    One ``Outcome`` per experiment, in order.

    Raises
    ------
    ArgumentError
        if a name is unknown, before anything runs.
    RecordError
        if records cannot be written here, before anything runs.
    """
    chosen = list(dict.fromkeys(which)) if which else list(names())
    for name in chosen:
        check_choice("experiment", name, names())
    folder = (Path(root) if root is not None else records.save_root()) if write else None
    outcomes: list[Outcome] = []
    with _reporter(len(chosen)) as report:
        for name in chosen:
            outcome = _one(name, quick, device, command, folder, report)
            outcomes.append(outcome)
            report.end(outcome)
            _release_memory()
    return outcomes


def _one(
    name: str,
    quick: bool,
    device: str | None,
    command: str | None,
    folder: Path | None,
    report: _Lines | _Bars,
) -> Outcome:
    start = time.perf_counter()
    path = None
    try:
        progress = report.start(name, get(name).TITLE)
        result = run(name, quick=quick, device=device, progress=progress)
        try:
            record = records.new_record(
                name, result.results, result.rows, command, notes=result.notes, quick=quick
            )
        except RecordError as error:
            raise RecordError(f"{error}{_keep(name, result, folder)}") from error
        why = ""
        if folder is not None and quick and records.has_full(name, record.slug, root=folder):
            why = "the full record is kept"
        elif folder is not None:
            path = records.save(record, root=folder)
    except NoGpuError as error:
        return Outcome(name, "skipped", error=error, why=str(error))
    except Exception as error:
        # Not BaseException: Ctrl-C stops the whole run, with everything so far on disk.
        if not isinstance(error, LabError):
            traceback.print_exception(error)  # a bug: show where
        why = f"{type(error).__name__}: {error}"
        return Outcome(name, "failed", time.perf_counter() - start, error=error, why=why)
    seconds = time.perf_counter() - start
    return Outcome(name, "recorded" if path else "measured", seconds, path, why=why)


def _keep(name: str, result: Result, folder: Path | None) -> str:
    """Save what was measured but cannot be a record: the minutes on a GPU are spent.

    Returns what to add to the message.
    """
    if folder is None:
        return ""
    path = folder / f"{name}.refused"
    measured = {"results": result.results, "rows": result.rows, "notes": result.notes}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, default=str, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        return f" What was measured could not be kept: {error}."
    return f" What was measured is in {path}."


# -- notebooks -------------------------------------------------------------------


def notebook() -> None:
    """Set up a notebook: kernels run in Triton's interpreter if there is no GPU, plot style.

    Every chapter calls it in its first cell.  Prints nothing.
    """
    try:
        from labkit.kernels import use_interpreter_if_no_gpu
    except ImportError:
        pass  # no torch: the pages that need it say so where they use it
    else:
        use_interpreter_if_no_gpu()
    from labkit import plots

    plots.use_style()


def beside(name: str, *, device: str | None = None) -> tuple[Result | None, Record]:
    """This machine's quick run beside the recorded full run on the H200.

    Returns
    -------
    ``(here, recorded)``; ``here`` is None if the experiment needs a GPU and there is none.

    Raises
    ------
    RecordError
        if there is no record, or it is not valid.
    """
    recorded = records.load(name)
    if recorded.quick:
        raise RecordError(f"{recorded.path}: is a quick record. Record it again without --quick.")
    try:
        here = run(name, quick=True, device=device)
    except NoGpuError:
        here = None
    return here, recorded
