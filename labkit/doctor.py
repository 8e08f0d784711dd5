"""What this machine is, what of the course runs on it, and what to do about each lack.

``python -m labkit doctor`` prints what :func:`examine` finds.  It does not stop at version
numbers: it runs a small Triton kernel in a process of its own, because a machine without a C
compiler, or with a driver of another age than torch's CUDA, shows itself only then.

The set-up page of the book explains the words used here.

Imports: hardware, units, errors; records when it looks for them.  torch is loaded by
``labkit.hardware.detect``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit import hardware
from labkit.errors import LabError
from labkit.hardware import Machine
from labkit.units import GIB, format_bytes

__all__ = ["Ability", "Finding", "Report", "examine", "trial", "try_kernel"]

#: Lower bounds of the packages that decide what runs (pyproject.toml has them all).
LOWEST = {"torch": (2, 11), "triton": (3, 6)}
#: Packages beside torch and Triton whose lack costs a part of the course: name → what it is for.
_EXTRAS = {
    "numpy": "Triton's interpreter",
    "matplotlib": "figures",
    "ipywidgets": "the explorers that run a live kernel",
    "jupyterlab": "`make lab`",
    "nbclient": "`make execute`",
    "jupyter-book": "`make book`",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    part : what was looked at, such as ``"torch"``.
    state : ``"ok"``, ``"note"`` (works, with something to know) or ``"lack"``.
    found : what is there.
    remedy : what would do; empty when nothing is to be done.
    meanwhile : what still works without it.
    """

    part: str
    state: str
    found: str
    remedy: str = ""
    meanwhile: str = ""


@dataclass(frozen=True)
class Ability:
    """One thing that the course does, whether it runs here, and how.

    Attributes
    ----------
    what : such as ``"Triton kernels"``.
    runs : True or False.
    how : how it runs, or why it does not.
    """

    what: str
    runs: bool
    how: str


@dataclass(frozen=True)
class Report:
    """The machine, what was found, and what runs."""

    machine: Machine
    findings: tuple[Finding, ...]
    abilities: tuple[Ability, ...]

    @property
    def usable(self) -> bool:
        """Whether any part of the course runs here."""
        return any(ability.runs for ability in self.abilities)

    @property
    def lacks(self) -> tuple[Finding, ...]:
        """The findings that cost something."""
        return tuple(f for f in self.findings if f.state == "lack")

    @property
    def verdict(self) -> str:
        """One sentence: the best that this machine can do."""
        kernels = next(a for a in self.abilities if a.what == "Triton kernels")
        if kernels.runs and self.machine.can_run == "gpu":
            return f"Everything runs here, on the {self.machine.gpu}."
        if kernels.runs:
            return "Everything but GPU measurements runs here, kernels in Triton's interpreter."
        if self.machine.torch:
            return "Everything but Triton kernels runs here."
        if self.usable:
            return "Memory tables, rooflines, explorers and records run here; torch is missing."
        return "Nothing runs here yet."

    def to_json(self) -> str:
        """The report as JSON, to be attached to a question."""
        machine = asdict(self.machine)
        machine["card"] = self.machine.card.key if self.machine.card else None
        whole = {
            "verdict": self.verdict,
            "usable": self.usable,
            "machine": machine,
            "findings": [asdict(f) for f in self.findings],
            "abilities": [asdict(a) for a in self.abilities],
        }
        return json.dumps(whole, indent=2, ensure_ascii=False)


def trial() -> str:
    """Copy 1024 numbers with ``labkit.kernels.copy`` and compare; return the backend that did it.

    Raises
    ------
    LabError
        if torch or Triton is missing, or the copy differs.  What Triton raises passes through.
    """
    from labkit.kernels import use_interpreter_if_no_gpu

    use_interpreter_if_no_gpu()
    import torch

    from labkit.kernels import backend, copy

    where = backend()
    x = torch.arange(1024, dtype=torch.float32, device="cuda" if where == "gpu" else "cpu")
    if not torch.equal(copy(x), x):
        raise LabError("the copy differs from the original: this Triton does not work here.")
    return where


def try_kernel(timeout_s: float = 180.0) -> tuple[str | None, str]:
    """Run a small Triton kernel in a process of its own.

    Parameters
    ----------
    timeout_s : seconds before it is given up; the first compilation takes some.

    Returns
    -------
    ``(backend, text)``: ``"gpu"`` or ``"interpreter"`` and how long it took, or None and why
    it failed.
    """
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from labkit.doctor import trial; print(trial())"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{type(error).__name__}: {error}"
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return None, lines[-1] if lines else f"it ended with status {done.returncode}"
    return done.stdout.split()[-1], f"{time.perf_counter() - start:.0f} s with start-up"


def examine(*, try_out: bool = True) -> Report:
    """Look at this machine and say what runs on it.  Never raises.

    Parameters
    ----------
    try_out : whether to run a small Triton kernel (some seconds) and not only read versions.
    """
    machine = hardware.detect()
    findings = [
        _python(),
        _torch(machine),
        _triton(machine),
        *_gpu(machine),
        _memory(machine),
        *_extras(),
    ]
    backend = machine.can_run if machine.can_run in {"gpu", "interpreter"} else None
    how = {"gpu": f"compiled for the {machine.gpu}", "interpreter": "in Triton's interpreter"}
    text = how.get(backend or "", "Triton or torch is missing")
    if backend and try_out:
        ran, said = try_kernel()
        if ran is None:
            findings.append(_kernel_failed(machine, said))
            text, backend = f"tried, and failed: {said}", None
        else:
            backend, text = ran, f"{how[ran]} (tried: {said})"
    findings.append(_records(machine))
    return Report(machine, tuple(findings), tuple(_abilities(machine, backend, text)))


# -- findings ----------------------------------------------------------------------------------


def _version_of(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _python() -> Finding:
    return Finding("Python", "ok", f"{sys.version.split()[0]} ({sys.executable})")


def _old(package: str, version: str) -> str:
    lowest = LOWEST[package]
    if _version_of(version) and _version_of(version) < lowest:
        return f"{package} {'.'.join(map(str, lowest))} or newer"
    return ""


def _torch(machine: Machine) -> Finding:
    meanwhile = "memory tables, rooflines, explorers and recorded figures"
    if machine.torch is None:
        broken = machine.problems.get("torch")
        if broken:
            return Finding(
                "torch",
                "lack",
                f"installed, and fails to load ({broken})",
                "Install it again: pip install --force-reinstall torch.",
                meanwhile,
            )
        return Finding(
            "torch",
            "lack",
            "not installed",
            "pip install torch (no GPU: add --index-url https://download.pytorch.org/whl/cpu).",
            meanwhile,
        )
    built = f"CUDA {machine.cuda}" if machine.cuda else "no CUDA"
    built = machine.cuda if machine.cuda and machine.cuda.startswith("ROCm") else built
    old = _old("torch", machine.torch)
    if old:
        return Finding(
            "torch", "note", f"{machine.torch} ({built})", f"labkit is tested with {old}."
        )
    return Finding("torch", "ok", f"{machine.torch} ({built})")


def _triton(machine: Machine) -> Finding:
    if machine.triton is None:
        there_is_one = sys.platform == "linux"
        return Finding(
            "Triton",
            "lack",
            "not installed",
            "pip install triton."
            if there_is_one
            else "There are wheels for Linux only; on Windows use WSL 2.",
            "everything that is not a Triton kernel",
        )
    old = _old("triton", machine.triton)
    if old:
        return Finding("Triton", "note", machine.triton, f"labkit is tested with {old}.")
    return Finding("Triton", "ok", machine.triton)


def _has_c_compiler() -> bool:
    """Triton compiles a small C launcher on first use, with $CC, gcc or clang."""
    named = os.environ.get("CC")
    return any(shutil.which(tool) for tool in (named, "gcc", "clang", "cc") if tool)


def _gpu(machine: Machine) -> list[Finding]:
    measured = "figures recorded on an H200 stand in for this machine's"
    if machine.gpu is None:
        return [
            Finding(
                "GPU",
                "note",
                "none",
                "A GPU adds its own figures: use a machine with one, or Colab (book, set-up).",
                measured,
            )
        ]
    free = format_bytes(machine.gpu_free_bytes) if machine.gpu_free_bytes else "unknown"
    total = format_bytes(machine.gpu_total_bytes) if machine.gpu_total_bytes else "unknown"
    several = f", {machine.gpu_count} of them" if machine.gpu_count > 1 else ""
    about = f"{machine.gpu}{several}, {free} free of {total}"
    if machine.compute_capability:
        about += f", compute capability {machine.compute_capability}"
    why = machine.problems.get("gpu")
    if why:
        return [
            Finding(
                "GPU",
                "lack",
                f"{about}; {why}",
                "Install the torch that fits the driver: https://pytorch.org/get-started/locally/.",
                "everything on the CPU, kernels in Triton's interpreter",
            )
        ]
    if machine.torch is None:
        return [Finding("GPU", "note", about, "It is used once torch is installed.")]
    found = [Finding("GPU", "ok", about)]
    if machine.gpu_free_bytes is not None and machine.gpu_free_bytes < GIB:
        found.append(
            Finding(
                "GPU memory",
                "note",
                f"{free} free",
                "End what else uses the GPU (nvidia-smi lists it) before you measure.",
                "small sizes",
            )
        )
    if machine.compute_capability and _version_of(machine.compute_capability) < (8, 0):
        found.append(
            Finding(
                "compute capability",
                "note",
                machine.compute_capability,
                "Triton supports 8.0 and newer (A100, RTX 30 series); below that a kernel may "
                "fail to compile. TRITON_INTERPRET=1 runs it on the CPU.",
                "PyTorch on this GPU",
            )
        )
    if machine.card is None:
        found.append(
            Finding(
                "data sheet",
                "note",
                "this GPU is not in labkit.hardware",
                "Rooflines need ceilings: measure them with `python -m labkit record`.",
                "everything that is measured",
            )
        )
    if machine.interpreter:
        found.append(
            Finding(
                "TRITON_INTERPRET",
                "note",
                "on: kernels run on the CPU although there is a GPU",
                "Unset TRITON_INTERPRET.",
            )
        )
    if machine.triton and not _has_c_compiler():
        found.append(
            Finding(
                "C compiler",
                "lack",
                "none of $CC, gcc, clang",
                "Triton builds its launcher with one: apt-get install gcc.",
                "everything that is not a Triton kernel",
            )
        )
    elif machine.triton and not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        found.append(
            Finding(
                "Python headers",
                "note",
                "no Python.h",
                "If kernels fail to build: apt-get install python3-dev.",
            )
        )
    return found


def _memory(machine: Machine) -> Finding:
    if machine.ram_bytes is None or machine.ram_free_bytes is None:
        return Finding("memory", "note", f"unknown; {machine.cpu}, {machine.cores} cores")
    found = (
        f"{format_bytes(machine.ram_free_bytes)} free of {format_bytes(machine.ram_bytes)}; "
        f"{machine.cpu}, {machine.cores} cores"
    )
    if machine.ram_free_bytes < 2 * GIB:
        return Finding("memory", "note", found, "The notebooks want 2 GiB: close something.")
    return Finding("memory", "ok", found)


def _extras() -> list[Finding]:
    here, missing = [], []
    for package in _EXTRAS:
        try:
            here.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    findings = [Finding("packages", "ok", ", ".join(here))] if here else []
    for package in missing:
        findings.append(
            Finding(
                package,
                "lack",
                "not installed",
                f"pip install {package} (or `make venv`, for the exact versions of the book).",
                f"everything but {_EXTRAS[package]}",
            )
        )
    return findings


def _kernel_failed(machine: Machine, said: str) -> Finding:
    remedy = (
        "`python -m labkit doctor --trial` shows the whole message; TRITON_INTERPRET=1 runs "
        "kernels on the CPU."
    )
    if machine.can_run == "interpreter":
        remedy = "Install the versions of the book: make venv."
    return Finding("Triton kernel", "lack", said, remedy, "everything that is not a Triton kernel")


def _records(machine: Machine) -> Finding:
    from labkit import records

    try:
        known = records.available()
        mine = records.machine_slug(machine.gpu) if machine.gpu else None
    except Exception as error:
        return Finding("records", "lack", f"{type(error).__name__}: {error}", "Check records/.")
    if not known:
        return Finding(
            "records",
            "lack",
            "none found",
            "Run from the repository, or set LABKIT_RECORDS to its folder records.",
            "everything that is not quoted from a record",
        )
    found = "; ".join(f"{name}: {len(what)}" for name, what in known.items())
    if mine and mine not in known and machine.can_run == "gpu":
        return Finding("records", "note", found, "`make record` measures this GPU.")
    return Finding("records", "ok", found)


# -- abilities ---------------------------------------------------------------------------------


def _tables_work() -> tuple[bool, str]:
    try:
        from labkit.memory import attention_memory

        attention_memory(seq_len=8, heads=1)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    return True, "anywhere"


def _abilities(machine: Machine, backend: str | None, kernels: str) -> list[Ability]:
    torch_here = machine.torch is not None
    no_torch = "torch is missing"
    on_gpu = torch_here and machine.gpu is not None and "gpu" not in machine.problems
    on_gpu = on_gpu and machine.gpu_free_bytes is not None
    tables, how = _tables_work()
    where = f"on the {machine.gpu}" if on_gpu else "on the CPU"
    measured = "by the CUDA allocator" if on_gpu else "by the CPU profiler's memory events"
    return [
        Ability("memory tables, rooflines, explorers, records", tables, how),
        Ability("attention in PyTorch", torch_here, where if torch_here else no_torch),
        Ability("memory, traced", torch_here, "without allocating" if torch_here else no_torch),
        Ability("memory, measured", torch_here, measured if torch_here else no_torch),
        Ability("Triton kernels", backend is not None, kernels),
        Ability(
            "bandwidth, latency, times of this GPU",
            backend == "gpu",
            "with `make record`" if backend == "gpu" else "the recorded H200's are shown",
        ),
    ]
