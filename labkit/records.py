"""Records: measured figures kept with everything that is needed to doubt them.

One JSON file per GPU and experiment, ``records/<gpu>/<experiment>.json``::

    {"schema": "labkit-record/1", "experiment": "hierarchy", "quick": false,
     "machine": {"gpu": "NVIDIA H200", "driver": …, "torch": …, "triton": …, "cuda": …, …},
     "commit": "…", "dirty": false, "date": "2026-11-21T10:00:00Z", "command": "…",
     "results": {"copy_peak": {"value": 4.28e12, "unit": "B/s", "how": "median of …"}},
     "rows": [{"bytes": 1048576, "samples_ms": […], "median_ms": …, "error": {…}}, …],
     "notes": ["…"]}

``results`` holds the figures that a page may quote, in base units (bytes, B/s,
FLOP/s, s, …); ``rows`` holds the raw samples behind them.  A page quotes by key,

    {rec}`4.28 TB/s <hierarchy:copy_peak>`

and ``check_quote`` fails unless rounding the recorded value to the decimals
shown gives exactly that text: prose cannot drift from what was measured.

Another run of an experiment, before or after a change of the code, is kept beside
the record with the commit that it measured in its name,
``<experiment>@<seven digits>.json``; what the change brought is quoted from both.

Loads neither torch nor Triton, except ``environment``, which asks them for
their versions.  Used by every chapter; described on the page "How the numbers
were made".
"""

from __future__ import annotations

import datetime
import json
import math
import numbers
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from difflib import get_close_matches
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from labkit.errors import RecordError

__all__ = [
    "DEFAULT_MACHINE",
    "SCHEMA",
    "UNITS",
    "Figures",
    "Quote",
    "Record",
    "available",
    "check_quote",
    "environment",
    "find_quotes",
    "has_full",
    "load",
    "machine_slug",
    "new_record",
    "quotes_in_file",
    "requote",
    "requote_file",
    "save",
    "save_root",
    "search_path",
]

SCHEMA = "labkit-record/1"

#: the machine whose records the course quotes
DEFAULT_MACHINE = "nvidia-h200"

# -- units -----------------------------------------------------------------------

#: units that a record may store; everything else is a scaled way to write one of them
_BASE = (
    "bytes",
    "B/s",
    "FLOP",
    "FLOP/s",
    "FLOP/byte",
    "s",
    "cycles",
    "Hz",
    "W",
    "tokens",
    "kernels",
    "1",
)


def _scaled(base: str, symbol: str, prefixes: Mapping[str, int]) -> dict[str, tuple[str, Decimal]]:
    return {f"{p}{symbol}": (base, Decimal(10) ** power) for p, power in prefixes.items()}


_DECIMAL = {"k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_BINARY = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}

#: unit as quoted → (unit as recorded, how many of the latter it is)
UNITS: dict[str, tuple[str, Decimal]] = {
    **{unit: (unit, Decimal(1)) for unit in _BASE if unit != "1"},
    **_scaled("B/s", "B/s", _DECIMAL),
    **_scaled("FLOP/s", "FLOP/s", _DECIMAL),
    **_scaled("FLOP", "FLOP", _DECIMAL),
    **_scaled("bytes", "B", _DECIMAL),
    **_scaled("Hz", "Hz", _DECIMAL),
    **_scaled("s", "s", {"m": -3, "µ": -6, "n": -9}),
    **{unit: ("bytes", Decimal(2) ** power) for unit, power in _BINARY.items()},
    **{f"{unit}/s": ("B/s", Decimal(2) ** power) for unit, power in _BINARY.items()},
    "B": ("bytes", Decimal(1)),
    "byte": ("bytes", Decimal(1)),
    "": ("1", Decimal(1)),
    "×": ("1", Decimal(1)),
    "%": ("1", Decimal("0.01")),
}

# -- where records live ----------------------------------------------------------

_PACKAGE = Path(__file__).resolve().parent


def _checkout() -> Path | None:
    """The repository that this package is run from, or None for an installed copy."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() else None


def search_path() -> list[Path]:
    """Folders that records are read from, first match wins.

    ``$LABKIT_RECORDS`` if set (your own records), then the checkout's
    ``records/``, or the copy that ships inside the installed package.
    """
    own = os.environ.get("LABKIT_RECORDS")
    checkout = _checkout()
    shipped = checkout / "records" if checkout else _PACKAGE / "_records"
    return [*([Path(own)] if own else []), shipped]


def save_root() -> Path:
    """The folder that new records are written to.

    Raises
    ------
    RecordError
        if labkit is an installed copy and ``$LABKIT_RECORDS`` is not set: records
        do not belong into ``site-packages``.
    """
    if own := os.environ.get("LABKIT_RECORDS"):
        return Path(own)
    if checkout := _checkout():
        return checkout / "records"
    raise RecordError(
        "labkit is installed, not run from a checkout, so there is no records/ folder to write to. "
        "Set LABKIT_RECORDS to a folder of yours, or run `make record` in a clone."
    )


def machine_slug(name: str) -> str:
    """The folder name of a machine: ``"NVIDIA H200"`` → ``"nvidia-h200"``."""
    name = name.replace("(R)", "").replace("(TM)", "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


# -- the record ------------------------------------------------------------------


class Figures:
    """Access to ``results`` and ``rows`` by name, shared by records and fresh results."""

    results: Mapping[str, Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]

    @property
    def label(self) -> str:
        """What error messages call this object."""
        return "result"

    def _result(self, key: str) -> Mapping[str, Any]:
        if key not in self.results:
            # a record holds hundreds of keys: name the likeliest
            near = get_close_matches(key, self.results, n=4, cutoff=0.3) or sorted(self.results)[:4]
            known = f"{', '.join(near) or 'none'} (of {len(self.results)} keys)"
            raise RecordError(
                f"{self.label}: has no result {key!r}. Nearest: {known}. "
                f"Correct the key, or run the experiment again: `python -m labkit record`."
            )
        return self.results[key]

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def value(self, key: str) -> float:
        """The figure under ``key`` in its base unit.

        Raises
        ------
        RecordError
            if there is no such key; the message names the nearest keys.
        """
        return self._result(key)["value"]

    def unit(self, key: str) -> str:
        """The base unit of the figure under ``key``."""
        return self._result(key)["unit"]

    def how(self, key: str) -> str:
        """How the figure was made, one sentence."""
        return self._result(key)["how"]

    def quote(self, key: str, like: str) -> str:
        """The figure written in the form of ``like``: its unit and its number of decimals.

        ``record.quote("copy_peak", "0.00 TB/s")`` gives ``"4.28 TB/s"``.
        """
        result = self._result(key)
        where = f"{self.label}:{key}"
        return _format_like(like, result["value"], result["unit"], where)

    def select(self, **wanted: Any) -> list[Mapping[str, Any]]:
        """The rows whose fields have the given values."""
        return [r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())]


@dataclass(frozen=True)
class Record(Figures):
    """One experiment on one machine.

    Attributes
    ----------
    experiment : name of the module in ``labkit.experiments``.
    machine : what it ran on: gpu, driver, torch, triton, cuda, cudnn, python, platform, cpu.
    commit : commit of the code that ran, ``"unknown"`` if it could not be told.
    dirty : whether tracked files differed from that commit; None if unknown.
    date : UTC, ISO 8601.
    command : what was typed.
    quick : whether it was the short form of the experiment, which nobody should quote.
    results : ``{key: {"value": number, "unit": base unit, "how": sentence}}``.
    rows : one dict per measured point, with ``samples_ms`` where time was taken.
    notes : remarks of the experiment.
    path : file it was read from, if any.
    """

    experiment: str
    machine: Mapping[str, Any]
    commit: str
    dirty: bool | None
    date: str
    command: str
    results: Mapping[str, Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    quick: bool = False
    path: Path | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """The file it was read from, or the experiment."""
        return str(self.path or self.experiment)

    @property
    def slug(self) -> str:
        """Folder name of the machine."""
        return machine_slug(self.machine.get("gpu") or f"cpu {self.machine['cpu']}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``save`` writes."""
        return {
            "schema": SCHEMA,
            "experiment": self.experiment,
            "quick": self.quick,
            "date": self.date,
            "command": self.command,
            "commit": self.commit,
            "dirty": self.dirty,
            "machine": dict(self.machine),
            "results": {k: dict(v) for k, v in self.results.items()},
            "notes": list(self.notes),
            "rows": [dict(r) for r in self.rows],
        }


# -- validation ------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    # A JSON file gives a float or an int; to ask an abstract class takes ten times as long.
    plain = type(value) in (float, int)
    real = plain or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    return real and math.isfinite(value)


def _complaint(data: Any, experiment: str | None) -> str | None:
    """What is wrong with a parsed record file, or None."""
    if not isinstance(data, dict) or "schema" not in data:
        return "is not a labkit record (it has no 'schema')"
    if data["schema"] != SCHEMA:
        return f"has schema {data['schema']!r}, and this labkit reads {SCHEMA!r}"
    fields: dict[str, Any] = {
        "experiment": str,
        "quick": bool,
        "date": str,
        "command": str,
        "commit": str,
        "dirty": (bool, type(None)),
        "machine": dict,
        "results": dict,
        "notes": list,
        "rows": list,
    }
    for name, kind in fields.items():
        if name not in data:
            return f"lacks {name!r}"
        if not isinstance(data[name], kind):
            return f"has a {type(data[name]).__name__} as {name!r}"
    wanted, _, commit = (experiment or data["experiment"]).partition("@")
    if data["experiment"] != wanted:
        return f"is a record of {data['experiment']!r}, not of {wanted!r}"
    if not data["commit"].startswith(commit):
        return f"was made at commit {data['commit'][:7]}, not at {commit}"
    if not (data["machine"].get("gpu") or data["machine"].get("cpu")):
        return "does not say which machine it was made on"
    for key, result in data["results"].items():
        if not re.fullmatch(r"[A-Za-z0-9_.=-]+", key):
            return f"has a result named {key!r}; use letters, digits, and _ . = -"
        if not isinstance(result, dict) or not {"value", "unit", "how"} <= result.keys():
            return f"has a result {key!r} without 'value', 'unit' or 'how'"
        if not _is_number(result["value"]):
            return f"has {result['value']!r} as the value of {key!r}, not a finite number"
        if result["unit"] not in _BASE:
            return (
                f"has the unit {result['unit']!r} for {key!r}; "
                f"records store base units: {', '.join(_BASE)}"
            )
        if not isinstance(result["how"], str) or not result["how"].strip():
            return f"does not say how {key!r} was made"
    for index, row in enumerate(data["rows"]):
        if not isinstance(row, dict):
            return f"has a {type(row).__name__} as row {index}"
        if "samples_ms" in row:
            samples = row["samples_ms"]
            if not samples or not all(_is_number(s) and s >= 0 for s in samples):
                return f"has no valid samples in row {index}"
            median = row.get("median_ms")
            if not _is_number(median) or not math.isclose(
                median, statistics.median(samples), rel_tol=1e-6, abs_tol=1e-12
            ):
                return f"has a median_ms in row {index} that is not the median of its samples"
    return None


def _or_anew(first: str, experiment: str) -> str:
    """The other way out of a bad file: a new run, but for one that was kept of its commit."""
    if "@" in experiment:
        return ""
    return f", or {first} and run `python -m labkit record {experiment}`"


def _from_text(text: str, path: Path, experiment: str | None) -> Record:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise RecordError(
            f"{path}: is damaged ({error}). Restore it with `git checkout -- {path.name}` in its "
            f"folder{_or_anew('delete it', path.stem)}."
        ) from None
    if complaint := _complaint(data, experiment):
        raise RecordError(
            f"{path}: {complaint}. Restore the original"
            f"{_or_anew('move it away', experiment or path.stem)}."
        )
    del data["schema"]
    names = Record.__dataclass_fields__
    return Record(**{k: v for k, v in data.items() if k in names}, path=path)


# -- reading ---------------------------------------------------------------------


def available(root: Path | str | None = None) -> dict[str, tuple[str, ...]]:
    """The records at hand: ``{machine: (experiment, …)}``, sorted. Files are not opened."""
    found: dict[str, set[str]] = {}
    for folder in [Path(root)] if root is not None else search_path():
        for path in folder.glob("*/*.json"):
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {machine: tuple(sorted(found[machine])) for machine in sorted(found)}


def load(
    experiment: str, machine: str = DEFAULT_MACHINE, *, root: Path | str | None = None
) -> Record:
    """Read ``records/<machine>/<experiment>.json``.

    Parameters
    ----------
    experiment : its name, e.g. ``"hierarchy"``; ``"hierarchy@0123abc"`` is the run that was kept
        of that commit.
    machine : folder name of the machine (``machine_slug``).
    root : folder to read from instead of ``search_path``.

    Raises
    ------
    RecordError
        if there is no such file, or it is damaged, foreign, or lacks a field; the
        message names the file and what to do.
    """
    path = _find(experiment, machine, root)
    return _from_text(_text(path), path, experiment)


def _find(experiment: str, machine: str, root: Path | str | None) -> Path:
    folders = [Path(root)] if root is not None else search_path()
    for folder in folders:
        path = folder / machine / f"{experiment}.json"
        if path.is_file():
            return path
    known = available(root)
    machines = [name for name, experiments in known.items() if experiment in experiments]
    if machines:
        hint = f"There is one of: {', '.join(machines)}."
    elif machine in known:
        hint = f"{machine} has: {', '.join(known[machine])}."
    else:
        hint = f"Machines with records: {', '.join(known) or 'none'}."
    if "@" in experiment:
        hint += " A run that was kept of its commit comes with the course: nothing makes it again."
    else:
        hint += f" To make one on the machine at hand: `python -m labkit record {experiment}`."
    raise RecordError(f"{folders[0] / machine / experiment}.json: no such record. {hint}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error}"  # reported as damaged, with the remedy


@lru_cache(maxsize=64)
def _shared(path: Path, experiment: str, changed_ns: int, size: int) -> Record:
    """:func:`load` for those who only read: the book quotes one file dozens of times."""
    return _from_text(_text(path), path, experiment)


# -- writing ---------------------------------------------------------------------


def _run(*command: str, cwd: Path | None = None) -> str | None:
    """Output of a command, stripped; None if it is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> tuple[str, bool | None]:
    """The commit that runs and whether the tree differs from it.

    ``$LABKIT_COMMIT``, with ``-dirty`` appended if the tree differs, overrules git: a copy on
    another machine may have no git, or one that stands at an older commit.  Records are left out
    of the comparison: the first one that `make record` writes would mark all later ones as dirty.
    """
    told = os.environ.get("LABKIT_COMMIT", "").strip()
    if told:
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    if root := _checkout():
        commit = _run("git", "rev-parse", "HEAD", cwd=root)
        top = _run("git", "rev-parse", "--show-toplevel", cwd=root)
        if commit and top and Path(top).resolve() == root:
            changed = _run("git", "status", "--porcelain", "--", ".", ":!records", cwd=root)
            return commit, None if changed is None else bool(changed)
    return "unknown", None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match.group(1).strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def environment() -> dict[str, Any]:
    """What the machine at hand is, as far as it can be told; what cannot is None."""
    found: dict[str, Any] = {
        "gpu": None,
        "gpu_memory_bytes": None,
        "gpu_power_limit_w": None,
        "driver": None,
        "cuda": None,
        "cudnn": None,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "labkit": _version("labkit"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
    }
    if found["torch"] is None:
        return found
    import torch

    found["torch"] = str(torch.__version__)
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
        cudnn = torch.backends.cudnn.version()
        found["cudnn"] = None if cudnn is None else str(cudnn)
        answer = _run(
            "nvidia-smi",
            f"--id={device}",
            "--query-gpu=driver_version,power.limit",
            "--format=csv,noheader,nounits",
        )
        if answer:
            driver, _, power = (part.strip() for part in answer.splitlines()[0].partition(","))
            found["driver"] = driver
            found["gpu_power_limit_w"] = float(power) if power[:1].isdigit() else None
    return found


def _plain(value: Any) -> Any:
    """NumPy and torch scalars as Python numbers, tuples as lists; for JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def new_record(
    experiment: str,
    results: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
    *,
    notes: Sequence[str] = (),
    quick: bool = False,
) -> Record:
    """A record of what was just measured, with the environment filled in.

    Parameters
    ----------
    experiment : its name.
    results : ``{key: {"value": number, "unit": base unit, "how": sentence}}``.
    rows : measured points; with ``samples_ms`` and their ``median_ms`` where time was taken.
    command : what was typed; the process's own command line by default.
    notes, quick : see ``Record``.

    Raises
    ------
    RecordError
        if the result would not be a valid record (NaN, unknown unit, no ``how`` …).
    """
    commit, dirty = _commit()
    if command is None:
        # As typed, without the folders of this machine.
        typed = [Path(word).name if os.path.isabs(word) else word for word in sys.orig_argv[1:]]
        command = shlex.join(["python", *typed])
    record = Record(
        experiment=experiment,
        machine=environment(),
        commit=commit,
        dirty=dirty,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command,
        results=_plain(results),
        rows=_plain(list(rows)),
        notes=[str(n) for n in notes],
        quick=quick,
    )
    if complaint := _complaint(record.to_dict(), experiment):
        raise RecordError(f"new record of {experiment!r}: it {complaint}. Correct the experiment.")
    return record


def _dump(record: Record) -> str:
    """JSON with one row per line: readable, and a diff shows which row changed."""
    data = record.to_dict()
    rows = data.pop("rows")
    head = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    body = f"[\n{lines}\n ]" if rows else "[]"
    return f'{head[:-2]},\n "rows": {body}\n}}\n'


def has_full(experiment: str, machine: str, *, root: Path | str) -> bool:
    """Whether ``root`` holds a valid record of that experiment that is not a quick one."""
    if not (Path(root) / machine / f"{experiment}.json").is_file():
        return False
    try:
        return not load(experiment, machine, root=root).quick
    except RecordError:
        return False  # damaged or foreign: there is nothing to protect


def save(record: Record, *, root: Path | str | None = None) -> Path:
    """Write ``<root>/<machine>/<experiment>.json`` and return its path.

    The text goes to a temporary file beside the target, is read back and
    validated there, and only then takes the target's place in one step: whatever
    fails, the earlier record is still there, whole.

    Raises
    ------
    RecordError
        if the record is not valid, or is a quick one and would replace a full one.
    OSError
        if the folder cannot be written.
    """
    folder = (Path(root) if root is not None else save_root()) / record.slug
    path = folder / f"{record.experiment}.json"
    if record.quick and has_full(record.experiment, record.slug, root=folder.parent):
        raise RecordError(
            f"{path}: holds a full record, and a quick one may not replace it. "
            f"Run without --quick, or delete the file first."
        )
    try:
        text = _dump(record)
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"{path}: not written, the record cannot be stored as JSON ({error}). "
            "Results and rows may hold finite numbers, text, lists and dicts."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{record.experiment}-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _from_text(temporary.read_text(encoding="utf-8"), path, record.experiment)
        temporary.chmod(0o644)  # mkstemp makes it private to its owner
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# -- quotes ----------------------------------------------------------------------

_TO_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TEXT = re.compile(
    r"(?P<sign>[+−-]?)"
    r"(?P<whole>\d{1,3}(?:,\d{3})+|\d+)"
    r"(?:\.(?P<decimals>\d+))?"
    r"(?P<power>e[+-]?\d+|\s?×\s?10[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)?"
    r"(?P<space>[\s\u00a0\u202f]?)"
    r"(?P<unit>\S*)"
)
_ROLE = re.compile(r"(?<!`)\{rec\}`(?P<body>[^`]*)`")
# the same for a page that no Sphinx reads: the README
_COMMENT = re.compile(r"<!-- rec: (?P<target>\S+) -->(?P<text>[^<]*)<!-- /rec -->")
_BODY = re.compile(r"\s*(?P<text>[^<>]+?)\s*<(?P<target>[^<>]+)>\s*")
_TARGET = re.compile(
    r"(?:(?P<machine>[a-z0-9-]+)/)?(?P<experiment>[a-z0-9_]+(?:@[0-9a-f]{7})?)"
    r":(?P<key>[A-Za-z0-9_.=-]+)"
)
_FENCE = re.compile(r"^ {0,3}(?P<fence>`{3,}|~{3,})(?P<info>.*)$")


@dataclass(frozen=True)
class Quote:
    """A figure quoted in a page: ``{rec}`text <target>```.

    ``source`` is the whole role as written, ``line`` counts from 1 inside the
    text that was searched, ``where`` says which file and cell.
    """

    text: str
    target: str
    source: str
    line: int
    where: str = ""


def _round(value: Decimal, decimals: int) -> str:
    """Half away from zero, as taught at school; never a negative zero."""
    rounded = value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_UP)
    return f"{abs(rounded) if rounded == 0 else rounded:f}"


def _format_like(like: str, value: float, unit: str, where: str) -> str:
    """``value`` (in base ``unit``) with the unit, decimals and form of ``like``."""
    match = _TEXT.fullmatch(like.strip())
    if match is None:
        raise RecordError(
            f"{where}: {like!r} is not a number with a unit. Write it like '4.28 TB/s', '61.3 %', "
            "'1.2e-3' or '16,384 tokens'; words such as 'about' go outside the quote."
        )
    shown = match["unit"]
    if shown not in UNITS:
        known = ", ".join(filter(None, UNITS))
        raise RecordError(f"{where}: unknown unit {shown!r}. Known: {known}.")
    base, scale = UNITS[shown]
    if base != unit:
        fits = ", ".join(name or "(none)" for name, (b, _) in UNITS.items() if b == unit)
        raise RecordError(f"{where}: is recorded in {unit}, which {shown!r} is not. Use: {fits}.")
    # repr is the shortest text that gives the same float: 0.145 stays 0.145 and rounds to 0.15
    number = Decimal(repr(value)) / scale
    decimals = len(match["decimals"] or "")
    power = match["power"] or ""
    if power:
        exponent = number.adjusted() if number else 0
        mantissa = _round(number.scaleb(-exponent), decimals)
        if abs(Decimal(mantissa)) >= 10:  # 9.96 → 10.0: one power up
            exponent += 1
            mantissa = _round(number.scaleb(-exponent), decimals)
        if power.startswith("e"):
            digits = len(re.sub(r"\D", "", power))
            signed = "+" if "+" in power else ""
            text = f"{mantissa}e{'-' if exponent < 0 else signed}{abs(exponent):0{digits}d}"
        else:
            spaced = power.partition("10")[0]
            text = f"{mantissa}{spaced}10{str(exponent).translate(_TO_SUPERSCRIPT)}"
    else:
        text = _round(number, decimals)
        if "," in match["whole"]:
            whole, dot, rest = text.partition(".")
            text = f"{int(whole):,}{dot}{rest}"
    if text.startswith("-"):
        text = ("−" if match["sign"] != "-" else "-") + text[1:]
    elif match["sign"] == "+":
        text = "+" + text
    return f"{text}{match['space']}{shown}"


def _resolve(target: str, root: Path | str | None) -> tuple[Record, str]:
    match = _TARGET.fullmatch(target.strip())
    if match is None:
        raise RecordError(
            f"{target!r} does not name a figure. Write 'experiment:key' or "
            "'machine/experiment:key', e.g. 'hierarchy:copy_peak'; another run's commit goes "
            "behind the experiment, as in 'masks@899a359:time_dense_flash_forward'."
        )
    path = _find(match["experiment"], match["machine"] or DEFAULT_MACHINE, root)
    stat = path.stat()
    return _shared(path, match["experiment"], stat.st_mtime_ns, stat.st_size), match["key"]


def _requoted(text: str, target: str, root: Path | str | None) -> tuple[str, Record]:
    record, key = _resolve(target, root)
    if record.quick:
        raise RecordError(
            f"{record.path}: is a quick record, not fit to be quoted. "
            f"Run `python -m labkit record {record.experiment}` without --quick."
        )
    return record.quote(key, text), record


def requote(text: str, target: str, *, root: Path | str | None = None) -> str:
    """The recorded figure of ``target`` in the form of ``text``: same unit, same decimals.

    Raises
    ------
    RecordError
        if the target does not exist, is a quick record, or is in another unit.
    """
    return _requoted(text, target, root)[0]


def check_quote(text: str, target: str, *, root: Path | str | None = None) -> Record:
    """Raise ``RecordError`` unless ``text`` is what rounding the record gives.

    Parameters
    ----------
    text : what the page shows, e.g. ``"4.28 TB/s"``.
    target : ``"experiment:key"`` (on the H200) or ``"machine/experiment:key"``.
    root : folder of the records; ``search_path`` by default.

    Returns
    -------
    Record
        the record that is quoted, to be read and not changed: other quotes share it.
    """
    right, record = _requoted(text, target, root)
    if right != text.strip():
        raise RecordError(
            f"the page quotes {text.strip()!r} for {target}, and the record gives {right!r}. "
            "Run `python -m labkit quotes --write` to update the pages."
        )
    return record


def find_quotes(markdown: str, where: str = "") -> Iterator[Quote]:
    """Every ``{rec}`` role in a Markdown text, code blocks left out.

    A README has no roles; there a quote stands between ``<!-- rec: target -->`` and
    ``<!-- /rec -->``.

    Raises
    ------
    RecordError
        for a role that is not of the form ``text <target>``: it would render a
        figure that nobody has checked.
    """
    prose = _without_code(markdown)
    for role in _ROLE.finditer(prose):
        line = prose.count("\n", 0, role.start()) + 1
        body = _BODY.fullmatch(role["body"])
        if body is None:
            raise RecordError(
                f"{where or 'text'}, line {line}: {role[0]} names no record. "
                "Write {rec}`4.28 TB/s <hierarchy:copy_peak>`."
            )
        text = re.sub(r"[ \t]*\n[ \t]*", " ", body["text"])  # a role may wrap over two lines
        yield Quote(text, body["target"].strip(), role[0], line, where)
    for match in _COMMENT.finditer(prose):
        line = prose.count("\n", 0, match.start()) + 1
        yield Quote(match["text"], match["target"], match[0], line, where)


def _without_code(markdown: str) -> str:
    """The text with the lines of its code blocks blanked.

    A fence opens code, unless it is a MyST directive such as ``{note}``, whose
    body is prose and may hold quotes.
    """
    lines = markdown.split("\n")
    fences: list[tuple[str, bool]] = []  # (mark, is code), innermost last
    for index, line in enumerate(lines):
        match = _FENCE.match(line)
        if match is None:
            if fences and fences[-1][1]:
                lines[index] = ""
            continue
        mark, info = match["fence"], match["info"].strip()
        top, code = fences[-1] if fences else ("", False)
        if top and not info and mark[0] == top[0] and len(mark) >= len(top):
            fences.pop()
        elif code:
            lines[index] = ""
        else:
            prose = info.startswith("{") and not info.startswith(("{code", "{literal", "{math"))
            fences.append((mark, not prose))
    return "\n".join(lines)


def quotes_in_file(path: Path | str) -> list[Quote]:
    """The quotes of a Markdown page, or of the Markdown cells of a notebook."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return list(find_quotes(text, path.name))
    quotes: list[Quote] = []
    for index, cell in enumerate(json.loads(text)["cells"]):
        if cell["cell_type"] == "markdown":
            quotes += find_quotes("".join(cell["source"]), f"{path.name}, cell {index}")
    return quotes


def requote_file(path: Path | str, *, root: Path | str | None = None) -> int:
    """Bring every quote of a page up to date in place; return how many changed."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    changed = 0
    # One rewriting brings all quotes of the same spelling up to date.
    for quote in {q.source: q for q in quotes_in_file(path)}.values():
        right = requote(quote.text, quote.target, root=root)
        if right == quote.text:
            continue
        new = f"{{rec}}`{right} <{quote.target}>`"
        if quote.source.startswith("<!--"):
            new = f"<!-- rec: {quote.target} -->{right}<!-- /rec -->"
        for old, fresh in _spellings(quote.source, new, notebook=path.suffix == ".ipynb"):
            if old in text:
                text = text.replace(old, fresh)
                changed += 1
                break
        else:
            raise RecordError(f"{quote.where}: could not rewrite {quote.source}. Edit it by hand.")
    if changed:
        path.write_text(text, encoding="utf-8")
    return changed


def _spellings(old: str, new: str, *, notebook: bool) -> list[tuple[str, str]]:
    """How the two are written in the file: as they are, or inside JSON strings."""
    if not notebook:
        return [(old, new)]
    return [
        (json.dumps(old, ensure_ascii=flag)[1:-1], json.dumps(new, ensure_ascii=flag)[1:-1])
        for flag in (False, True)
    ]
