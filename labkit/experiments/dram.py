"""The byte ledger of S and P: formula, traced tensors, allocator, and DRAM as a profiler counts it.

Two questions, four witnesses.  *How much is held?* is answered by the closed form, by a trace
without memory, and by the allocator.  *How much moves?* is answered by the closed form, by a
trace that adds up what each operator reads and writes, and by the GPU's own counters of bytes
through DRAM and through the L2 cache, kernel by kernel.

Nsight Compute reads the counters twice: with the caches emptied before each kernel (``cold``),
which is what "each kernel reads its inputs from HBM" assumes, and as the kernel before left them
(``warm``), which is what happens.  Bytes that a kernel wrote and that still sit in L2 when it ends
are not yet DRAM bytes; a later kernel, or nobody, pays for them.  A third run (``busy``) asks which
parts of the chip were busy meanwhile, for the kernels whose bytes do not explain their time.

Without Nsight Compute, or without permission to read counters, the profiler's column stays empty
and a note says why.

Taught in chapter 04 (is it the arithmetic or the bytes?).
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkit.errors import LabError
from labkit.experiments import Progress, Result
from labkit.experiments import steps as each
from labkit.experiments._dram_child import MARKER, NAIVE, labels
from labkit.roofline import steps, total

TITLE = "Bytes of S and P: held, and moved through DRAM"
CHAPTERS = ("04",)
NEEDS_GPU = False

#: counter → name; bytes and seconds
METRICS = {
    "dram__bytes_read.sum": "dram_read",
    "dram__bytes_write.sum": "dram_write",
    "lts__t_bytes.sum": "l2",
    "gpu__time_duration.sum": "seconds",
}
#: counter → name; shares of what the part could do, 0 to 1
BUSY = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
}
_BUSY_WORDS = {
    "dram": "DRAM bandwidth",
    "issue": "cycles in which a scheduler issues an instruction",
    "special": "issue rate of the special-function pipe (XU)",
    "warps": "warps resident",
}
# stage → what ncu does to the caches before a kernel, and the counters it reads
_STAGES = {"cold": ("all", METRICS), "warm": ("none", METRICS), "busy": ("all", BUSY)}
_TIMEOUT_S = 180
# the profiler's own places when it is not on the PATH
_NCU_PLACES = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")


def run(*, quick: bool, device: str | None = None, progress: Progress | None = None) -> Result:
    """Fill the ledger.

    Returns
    -------
    Result
        ``rows`` of kind ``"held"`` (bytes alive at the peak), ``"moved"`` (bytes per step,
        formula and trace) and ``"kernel"`` (one per profiled kernel); ``results`` with the keys
        ``<problem>_<step>_{formula,traced,cold_read,cold_write,warm_read,warm_write,warm_l2}``
        and ``<problem>_<method>_held_{formula,traced,measured}``, bytes; and
        ``large_<step>_busy_{dram,issue,special,warps}``, shares.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    problems = _problems(quick, device)
    result = Result()
    stages = [*problems, *(_STAGES if device == "cuda" and not quick else ())]
    for stage in each(stages, progress, lambda s: s if isinstance(s, str) else s["name"]):
        if isinstance(stage, str):
            # more counters than fit in one pass replay each kernel: one problem is enough
            named = [p for p in problems if stage != "busy" or p["name"] == "large"]
            _profile(result, named, stage)
        else:
            _held(result, stage, device)
            _moved(result, stage)
    if device == "cpu":
        result.notes.append("DRAM bytes not measured: the counters of this page are a GPU's.")
    elif quick:
        result.notes.append("DRAM bytes not measured: the quick form does not start the profiler.")
    return result


def _problems(quick: bool, device: str) -> list[dict[str, Any]]:
    if device == "cpu":
        common = {"dtype": "float32", "head_dim": 64, "batch": 1, "heads": 2, "fused": ["flash"]}
        lengths = {"small": 1024} if quick else {"small": 1024, "large": 4096}
        return [{"name": name, "seq_len": n, **common} for name, n in lengths.items()]
    import torch

    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    common = {"head_dim": 64, "batch": 1, "dtype": half}
    out = [
        # S is 16 MiB: S, its scaled copy and P fit in the L2 of an H200 together
        {"name": "small", "heads": 8, "seq_len": 1024, **common},
        # S is 2 GiB: nothing that one kernel writes is still in L2 for the next
        {"name": "large", "heads": 64, "seq_len": 4096, **common},
        # a row of S is 32 KiB; K and V of a head are 2 MiB each
        {"name": "long", "heads": 4, "seq_len": 16384, **common},
        # a row of S is 64 KiB: more than softmax keeps on chip
        {"name": "long_float32", "heads": 4, "seq_len": 16384, **common, "dtype": "float32"},
    ][: 1 if quick else None]
    free, _ = torch.cuda.mem_get_info()
    # S, scaled S and P side by side, and as much again for what the parent holds
    out = [problem for problem in out if _sizes_bytes(problem) * 6 < free]
    return [{**problem, "fused": _backends(problem)} for problem in out]


def _backends(problem: dict[str, Any]) -> list[str]:
    """The fused backends that torch has for this problem on this GPU."""
    import torch

    from labkit.dtypes import torch_dtype
    from labkit.experiments.roofline import _FUSED, _can

    shape = (1, 1, 128, problem["head_dim"])
    q = torch.empty(shape, device="cuda", dtype=torch_dtype(problem["dtype"]))
    return [name for name in _FUSED if _can(name, q, q, q, causal=False)]


def _sizes(problem: dict[str, Any]) -> dict[str, Any]:
    return {k: problem[k] for k in ("batch", "heads", "seq_len", "head_dim", "dtype")}


def _sizes_bytes(problem: dict[str, Any]) -> int:
    """Bytes of one N×N buffer."""
    return steps()[0].writes["S"](**_symbols(problem))


def _symbols(problem: dict[str, Any]) -> dict[str, int]:
    from labkit.roofline import problem as symbols_of

    return symbols_of(**_sizes(problem))


def _where(problem: dict[str, Any]) -> str:
    shape = [problem[s] for s in ("batch", "heads", "seq_len", "head_dim")]
    return f"[B, H, N, d] = {shape}, {problem['dtype']}"


# -- held --------------------------------------------------------------------------------------


def _held(result: Result, problem: dict[str, Any], device: str) -> None:
    """Peak of naive and of fused attention: predicted, traced, measured."""
    import torch

    from labkit.dtypes import torch_dtype
    from labkit.memory import attention_peak, measure

    shape = [problem[s] for s in ("batch", "heads", "seq_len", "head_dim")]
    options = {"device": device, "dtype": torch_dtype(problem["dtype"])}
    q, k, v = (torch.randn(shape, **options) for _ in range(3))
    functions = _functions(problem, device)
    fused = steps("fused")[0]
    predicted = {
        "naive": attention_peak(**_sizes(problem), variant="out_of_place", device=device),
        # what fused attention allocates is what it writes
        "fused": sum(form(**_symbols(problem)) for form in fused.writes.values()),
    }
    for method, fn in functions.items():
        with torch.no_grad():
            report = measure(fn, q, k, v, predicted=predicted[method])
        row = {"kind": "held", "problem": problem["name"], "method": method, **_sizes(problem)}
        row |= {"formula": report.predicted, "traced": report.traced, "measured": report.measured}
        result.rows.append({**row, "how": str(report.method)})
        for column in ("formula", "traced", "measured"):
            if row[column] is not None:
                how = f"peak above the inputs, {method}, {column}, {_where(problem)}"
                result.add(f"{problem['name']}_{method}_held_{column}", row[column], "bytes", how)


def _functions(problem: dict[str, Any], device: str) -> dict[str, Callable]:
    from torch.nn.functional import scaled_dot_product_attention

    from labkit.experiments.roofline import _only
    from labkit.naive import naive_attention

    # torch's choice of backend depends on the device; a CPU has one fused kernel
    backend = problem["fused"][0] if device == "cuda" else "flash"

    def naive(q, k, v):
        return naive_attention(q, k, v)

    def fused(q, k, v):
        with _only(backend):
            return scaled_dot_product_attention(q, k, v)

    return {"naive": naive, "fused": fused}


# -- moved: formula and trace ------------------------------------------------------------------


def traced_traffic(fn: Callable, *args: Any) -> list[dict[str, Any]]:
    """What each operator of ``fn`` reads and writes, found without running it.

    Parameters
    ----------
    fn : called with FakeTensors on the CPU in the shape of ``args``.
    args : tensors on any device, ``meta`` included.

    Returns
    -------
    list of dict
        ``op``, ``read``, ``written`` (bytes) per operator that is not a view.  An expanded input
        counts its storage once; an input that appears twice counts twice.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    events = []

    def size(value: Any) -> int:
        tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)

    class Follow(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            returns = func._schema.returns
            aliases = [r.alias_info for r in returns]
            # a view, a fresh and unwritten tensor, and a question about a tensor move nothing
            still = any(a is not None and not a.is_write for a in aliases)
            name = func._schema.name.removeprefix("aten::")
            if not still and not name.startswith(("empty", "_unsafe_view", "detach", "prim::")):
                read = size((args, kwargs))
                events.append({"op": name, "read": read, "written": size(out)})
            return out

    with FakeTensorMode():
        fakes = [torch.empty(a.shape, dtype=a.dtype, device="cpu") for a in args]
        with torch.no_grad(), Follow():
            fn(*fakes)
    return events


def _moved(result: Result, problem: dict[str, Any]) -> None:
    """Bytes per step by the closed forms, and by adding up the operators' tensors."""
    import torch

    from labkit.dtypes import torch_dtype

    shape = [problem[s] for s in ("batch", "heads", "seq_len", "head_dim")]
    dtype = torch_dtype(problem["dtype"])
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(3))
    functions = _functions(problem, "cpu")
    naive = [*steps(), total(steps(), "naive", "naive")]
    events = traced_traffic(functions["naive"], q, k, v)
    if [e["op"] for e in events] != ["bmm", "mul", "_softmax", "bmm"]:
        raise LabError(
            f"naive attention ran {[e['op'] for e in events]}, not the four kernels of its model. "
            "Correct labkit.roofline.steps, or labkit.naive."
        )
    traced = [e["read"] + e["written"] for e in events]
    whole = traced_traffic(functions["fused"], q, k, v)
    rows = zip(naive, [*traced, sum(traced)], strict=True)
    fused = [(steps("fused")[0], sum(e["read"] + e["written"] for e in whole))]
    for step, by_trace in [*rows, *fused]:
        formula = step.at(**_sizes(problem)).bytes
        row = {"kind": "moved", "problem": problem["name"], "step": step.key, **_sizes(problem)}
        result.rows.append({**row, "formula": formula, "traced": by_trace})
        key = f"{problem['name']}_{step.key}"
        where = f"{step.name}, {_where(problem)}"
        result.add(f"{key}_formula", formula, "bytes", f"each tensor once, {where}")
        result.add(f"{key}_traced", by_trace, "bytes", f"operators' inputs and outputs, {where}")


# -- moved: the GPU's counters -----------------------------------------------------------------


def find_ncu() -> str | None:
    """The path of Nsight Compute's command line, or None."""
    if found := shutil.which("ncu"):
        return found
    for pattern in _NCU_PLACES:
        places = sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
        if places:
            return str(places[0])
    return None


def ncu_command(ncu: str, stage: str, log: str, problems: list[dict[str, Any]]) -> list[str]:
    """The command that counts kernel by kernel; ``stage`` is ``"cold"``, ``"warm"`` or ``"busy"``.

    ``--clock-control none`` leaves the card's clocks as they are.
    """
    caches, metrics = _STAGES[stage]
    return [
        ncu,
        "--clock-control", "none",
        "--cache-control", caches,
        "--profile-from-start", "off",
        "--metrics", ",".join(metrics),
        "--csv",
        "--print-units", "base",
        "--log-file", log,
        sys.executable, "-m", "labkit.experiments._dram_child", json.dumps(problems),
    ]  # fmt: skip


def _profile(result: Result, problems: list[dict[str, Any]], stage: str) -> None:
    """Run the child under Nsight Compute and add its counts; on refusal, say so and go on."""
    ncu = find_ncu()
    if ncu is None:
        _note(result, "DRAM bytes not measured: Nsight Compute (ncu) is not installed.")
        return
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # LC_ALL: ncu writes decimals as the locale does
    environment = os.environ | {"PYTHONPATH": path, "LC_ALL": "C"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        try:
            done = subprocess.run(
                ncu_command(ncu, stage, str(log), problems),
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            _note(result, f"Counters ({stage}) not read: ncu did not finish ({error}).")
            return
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    try:
        kernels = parse_ncu(text, _STAGES[stage][1])
        groups = group_by_marker(kernels, labels(problems))
    except LabError as error:
        tail = (text + done.stdout + done.stderr).strip().splitlines()[-3:]
        said = " / ".join(line.strip() for line in tail)
        _note(result, f"Counters ({stage}) not read: {error} ncu said: {said}")
        return
    for (index, step), group in groups:
        if stage == "busy":
            _add_busy(result, problems[index], step, group)
        else:
            _add_counts(result, problems[index], step, group, stage)
    for problem in problems if stage != "busy" else ():
        _add_naive(result, problem["name"], stage)


def _note(result: Result, text: str) -> None:
    if text not in result.notes:
        result.notes.append(text)


_SCALES = {
    "": 1.0, "%": 0.01, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6,
    "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
}  # fmt: skip


def parse_ncu(text: str, metrics: dict[str, str] = METRICS) -> list[dict[str, Any]]:
    """The kernels of an Nsight Compute CSV log, in launch order.

    Parameters
    ----------
    text : the log: lines that begin with ``==`` and one CSV table with the columns ``ID``,
        ``Kernel Name``, ``Metric Name``, ``Metric Unit`` and ``Metric Value``.
    metrics : counter → name in the result.

    Returns
    -------
    list of dict
        ``kernel``, and the values of ``metrics`` in bytes, seconds and shares of 1.

    Raises
    ------
    LabError
        if there is no table, a unit is unknown, or a kernel lacks a metric (counters refused).
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    start = next((i for i, line in enumerate(lines) if '"Metric Name"' in line), None)
    if start is None:
        raise LabError("the log holds no table of metrics.")
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if (name := metrics.get(row["Metric Name"])) is None:
            continue
        unit, value = row["Metric Unit"], row["Metric Value"].replace(",", "")
        if unit not in _SCALES:
            raise LabError(f"{row['Metric Name']} has the unknown unit {unit!r}.")
        try:
            kernel[name] = float(value) * _SCALES[unit]
        except ValueError:
            raise LabError(f"{row['Metric Name']} of a kernel is {value!r}.") from None
    for kernel in kernels.values():
        if missing := [m for m in metrics.values() if m not in kernel]:
            raise LabError(f"kernel {kernel['kernel']!r} lacks {', '.join(missing)}.")
    return list(kernels.values())


def group_by_marker(
    kernels: list[dict[str, Any]], names: list[tuple[int, str]]
) -> list[tuple[tuple[int, str], list[dict[str, Any]]]]:
    """The kernels between one marker and the next, under the name that the marker announces.

    Raises
    ------
    LabError
        if there are more or fewer markers than names, a step launched no kernel, or kernels
        come before the first marker.
    """
    groups: list[list[dict[str, Any]]] = []
    for kernel in kernels:
        if MARKER in kernel["kernel"]:
            groups.append([])
        elif not groups:
            raise LabError(f"kernel {kernel['kernel']!r} comes before the first marker.")
        else:
            groups[-1].append(kernel)
    if len(groups) != len(names):
        raise LabError(f"{len(groups)} markers for {len(names)} steps.")
    for name, group in zip(names, groups, strict=True):
        if not group:
            raise LabError(f"step {name[1]!r} launched no kernel.")
    return list(zip(names, groups, strict=True))


def short_name(kernel: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters.

    >>> short_name("void <unnamed>::softmax_warp_forward<c10::BFloat16, float, 10>(T2 *, int)")
    'softmax_warp_forward'
    """
    plain = kernel.replace("<unnamed>::", "").removeprefix("void ")
    return re.split(r"[<(]", plain)[0].split("::")[-1]


def _add_counts(
    result: Result, problem: dict[str, Any], step: str, group: list[dict[str, Any]], caches: str
) -> None:
    for kernel in group:
        labelled = {"kind": "kernel", "problem": problem["name"], "step": step, "caches": caches}
        result.rows.append({**labelled, **_sizes(problem), **kernel})
    key = f"{problem['name']}_{step}_{caches}"
    names = " + ".join(short_name(k["kernel"]) for k in group)
    how = f"ncu, {caches} caches, {_where(problem)}: {names}"
    for column, suffix in (("dram_read", "read"), ("dram_write", "write"), ("l2", "l2")):
        result.add(f"{key}_{suffix}", sum(k[column] for k in group), "bytes", f"{column}, {how}")
    result.add(f"{key}_kernels", len(group), "kernels", how)


def _add_busy(
    result: Result, problem: dict[str, Any], step: str, group: list[dict[str, Any]]
) -> None:
    for kernel in group:
        labelled = {"kind": "busy", "problem": problem["name"], "step": step}
        result.rows.append({**labelled, **_sizes(problem), **kernel})
    if len(group) > 1:
        return  # shares of different kernels have no sum
    where = f"{short_name(group[0]['kernel'])}, {_where(problem)}"
    for name, words in _BUSY_WORDS.items():
        key = f"{problem['name']}_{step}_busy_{name}"
        result.add(key, group[0][name], "1", f"ncu, {words}, share of the most possible: {where}")


def _add_naive(result: Result, name: str, caches: str) -> None:
    """The four steps of naive attention added up."""
    for suffix in ("read", "write", "l2"):
        parts = [result.value(f"{name}_{step}_{caches}_{suffix}") for step in NAIVE]
        key = f"{name}_naive_{caches}_{suffix}"
        result.add(key, sum(parts), "bytes", f"sum of {', '.join(NAIVE)}, ncu, {caches} caches")
