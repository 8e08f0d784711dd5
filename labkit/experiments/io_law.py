"""The law of traffic: bytes counted in the interpreter, exponents fitted, and a GPU's counters.

*Counted.*  The real kernels of chapter 06 run in Triton's interpreter, and every load and store
is added up (``labkit.io.count``).  One size at a time grows: the length, head_dim, the fast
memory that the tile is cut for.  Each count is compared with its closed form, to the byte, and
the slopes between logarithms are fitted.

*Measured.*  On a GPU with Nsight Compute the full form runs the same kernels compiled, and
``labkit.flash`` beside them, and reads the counters of bytes through DRAM and through L2.  The
caches are emptied before each kernel.  Bytes that a kernel wrote and that are still in L2 when
it ends are not DRAM bytes yet.

Without Nsight Compute, or without permission to read counters, a note says so.

Taught in chapter 06 (how few bytes could it take?).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from labkit import io, records
from labkit.errors import LabError, RecordError, check_choice
from labkit.experiments import Progress, Result, has_gpu
from labkit.experiments import steps as each
from labkit.experiments._io_child import NAIVE, count_point, labels
from labkit.experiments.dram import METRICS, find_ncu, group_by_marker, parse_ncu, short_name
from labkit.experiments.scaling import fit_power

TITLE = "Bytes that attention moves: the law, counted and measured"
CHAPTERS = ("06",)
NEEDS_GPU = False

KNOBS = ("seq_len", "head_dim", "fast")
#: fast memory that the tiles are cut for while another size grows, elements
FAST = 2**15
#: the tile that goes by while the other one stays
STREAMED = 16
_WORDS = {"seq_len": "N", "head_dim": "d", "fast": "M_fast"}
_TIMEOUT_S = 240


def run(*, quick: bool, device: str | None = None, progress: Progress | None = None) -> Result:
    """Count the sweeps, fit them, and on a GPU read its counters.

    Returns
    -------
    Result
        ``rows`` of kind ``"count"`` (one per point: ``bytes``, ``formula``, ``rereads``) and
        ``"kernel"`` (one per profiled kernel); ``results`` with the keys
        ``exponent.<order>.<knob>`` (all bytes) and ``exponent.rereads.<knob>`` (the loads of K
        and V of ``q_outer``); with counters also ``hbm.<method>.<N>``, ``l2.<method>.<N>``,
        ``model.<method>.<N>``, ``seconds.<method>.<N>``, ``l2.tile.<block_m>``,
        ``model.tile.<block_m>`` and ``l2.tile_exponent``.
    """
    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    result = Result()
    for row in _counted(points(quick), progress):
        row["formula"] = io.total_bytes(io.attention_traffic(row["order"]), **_sizes(row))
        row["rereads"] = _rereads(row)
        if row["bytes"] != row["formula"] or row["outside"]:
            raise LabError(
                f"{row['order']} moved {row['bytes']} bytes ({row['outside']} lanes outside of "
                f"every tensor) where its closed form has {row['formula']}: {row}. Correct "
                "labkit.io.attention_traffic, or the kernel."
            )
        result.rows.append({"kind": "count", **row})
    _fit(result)
    if device == "cuda" and not quick:
        _profile(result)
    else:
        result.notes.append("HBM and L2 bytes not measured: that takes a GPU and the full form.")
    return result


# -- counted -----------------------------------------------------------------------------------


def square_block(fast: int, head_dim: int) -> int:
    """The largest power of two b for which a b × b tile of S fits beside its rows of Q and K."""
    block = 1
    while 2 * (2 * block) * head_dim + (2 * block) ** 2 <= fast:
        block *= 2
    return block


def blocks(order: str, fast: int, head_dim: int) -> tuple[int, int]:
    """(block_m, block_n) of each order for a fast memory of ``fast`` elements."""
    if order == "naive":
        return (square_block(fast, head_dim),) * 2
    large = io.largest_block_m(fast, head_dim, block_n=STREAMED)
    return (STREAMED, large) if order == "kv_outer" else (large, STREAMED)


def points(quick: bool) -> list[dict[str, Any]]:
    """What is counted: one dict per point, ``sweep`` names the size that grows."""
    # A step of a loop takes the interpreter milliseconds: the quick form has 400 of them.
    lengths = [128, 256, 512] if quick else [128, 256, 512, 1024]
    widths = [32, 64, 128] if quick else [16, 32, 64, 128, 256]
    fasts = [2**i for i in (range(14, 17) if quick else range(13, 18))]
    at = 256 if quick else 512
    plan: list[tuple[str, str, int, int, int]] = []
    for order in io.ORDERS:
        if quick and order in ("two_pass", "kv_outer"):
            continue  # the chapter counts these two itself
        plan += [("seq_len", order, n, 64, FAST) for n in lengths]
    plan += [("head_dim", "q_outer", at, d, FAST) for d in widths]
    plan += [("head_dim", "naive", at, d, FAST) for d in widths if d <= 128]
    plan += [("fast", "q_outer", at, 64, fast) for fast in fasts]
    out = []
    for sweep, order, n, d, fast in plan:
        block_m, block_n = blocks(order, fast, d)
        sizes = {"batch": 1, "heads": 1, "seq_len": n, "head_dim": d, "dtype": "float32"}
        tile = {"fast": fast, "block_m": block_m, "block_n": block_n}
        out.append({"sweep": sweep, "order": order, **sizes, **tile})
    return out


def _counted(plan: list[dict[str, Any]], progress: Progress | None) -> Iterable[dict[str, Any]]:
    """The rows of the plan, counted here or, if Triton compiles here, in a process of its own."""
    from labkit.kernels.runtime import _interpreter_on, require_triton

    require_triton("the experiment io_law")
    if _interpreter_on():
        for point in each(plan, progress, lambda p: f"{p['order']}, {p['sweep']}"):
            yield count_point(point)
        return
    if progress is not None:
        progress(0, 1, "counting in another process")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "labkit.experiments._io_child", "count", json.dumps(plan)]
    done = subprocess.run(
        command, env=_with_path(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"the process that counts failed: {done.stderr.strip()[-600:]}")
    yield from json.loads(done.stdout.splitlines()[-1])


def _with_path(environment: dict[str, str]) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    return environment | {"PYTHONPATH": path}


def _sizes(row: dict[str, Any]) -> dict[str, int]:
    names = ("batch", "heads", "seq_len", "head_dim", "dtype", "block_m", "block_n")
    return io.tiles_of(**{name: row[name] for name in names})


def _rereads(row: dict[str, Any]) -> int | None:
    """Counted bytes of the loads of K and V, for the orders in which they repeat."""
    if row["order"] not in ("q_outer", "two_pass"):
        return None
    return sum(size for tensor, kind, size in row["tensors"] if tensor in "KV" and kind == "load")


def series(result: Any, order: str, sweep: str, y: str = "bytes") -> tuple[list[int], list[int]]:
    """x and y of one counted sweep of a result or record, in order of x."""
    rows = result.select(kind="count", order=order, sweep=sweep)
    pairs = sorted((row[sweep], row[y]) for row in rows)
    return [x for x, _ in pairs], [value for _, value in pairs]


def _fit(result: Result) -> None:
    """Exponents of every sweep, from the counted bytes."""
    for order in io.ORDERS:
        for knob in KNOBS:
            _fit_one(result, f"exponent.{order}.{knob}", order, knob, "bytes", "all bytes")
    for knob in KNOBS:
        what = "bytes of the loads of K and V"
        _fit_one(result, f"exponent.rereads.{knob}", "q_outer", knob, "rereads", what)


def _fit_one(result: Result, key: str, order: str, knob: str, y: str, what: str) -> None:
    x, values = series(result, order, knob, y)
    if len(x) < 3:
        return
    fit = fit_power(x, values, last=len(x))
    how = f"{what}, {order}, counted over {_WORDS[knob]} = {x[0]} … {x[-1]}: least squares on logs"
    result.add(key, fit.exponent, "1", how)


def counters(result: Any = None) -> dict[str, list[tuple[int, float]]]:
    """What a GPU's counters said, by kind: ``{"hbm.naive": [(N, bytes), …], "l2.tile": …}``.

    Parameters
    ----------
    result : a result or record of this experiment; the recorded H200 run by default.

    Returns
    -------
    dict
        pairs in order of N, or of block_m for ``"….tile"``; empty where nothing was read.
    """
    if result is None:
        try:
            result = records.load("io_law")
        except RecordError:
            return {}
    out: dict[str, list[tuple[int, float]]] = {}
    for key in result.results:
        what, _, size = key.rpartition(".")
        if what.split(".")[0] in ("hbm", "l2", "seconds") and size.isdigit():
            out.setdefault(what, []).append((int(size), result.value(key)))
    return {what: sorted(pairs) for what, pairs in out.items()}


# -- measured ----------------------------------------------------------------------------------


def problems(fused: bool, dtype: str, quick: bool = False) -> list[dict[str, Any]]:
    """What is profiled: the lengths, and one length with several tiles.

    Parameters
    ----------
    fused : whether ``labkit.flash`` is there.
    dtype : ``"bfloat16"`` or ``"float16"``.
    """
    common = {"batch": 1, "heads": 16, "head_dim": 64, "dtype": dtype, "block_n": 64}
    common["block_m"] = 128
    methods = (*NAIVE, "q_outer_128", *(("flash",) if fused else ()))
    lengths = [1024, 2048] if quick else [1024, 2048, 4096, 8192, 16384]
    out = [{"seq_len": n, "steps": methods, **common} for n in lengths]
    tiles = tuple(f"q_outer_{m}" for m in (16, 32, 64, 128))
    out.append({"seq_len": lengths[-1] // 2, "steps": tiles, "tiles": True, **common})
    return out


def _has_flash() -> bool:
    try:
        from labkit.flash import flash_attention
    except (ImportError, AttributeError):
        return False
    return callable(flash_attention)


def ncu_command(ncu: str, log: str, plan: list[dict[str, Any]]) -> list[str]:
    """The command that counts kernel by kernel, caches emptied before each."""
    return [
        ncu,
        "--clock-control", "none",
        "--cache-control", "all",
        "--profile-from-start", "off",
        "--metrics", ",".join(METRICS),
        "--csv",
        "--print-units", "base",
        "--log-file", log,
        sys.executable, "-m", "labkit.experiments._io_child", "profile", json.dumps(plan),
    ]  # fmt: skip


def _profile(result: Result) -> None:
    """Run the child under Nsight Compute and add its counts; on refusal, say so and go on."""
    import torch

    ncu = find_ncu()
    if ncu is None:
        result.notes.append("HBM and L2 bytes not measured: Nsight Compute is not installed.")
        return
    fused = _has_flash()
    if not fused:
        result.notes.append("labkit.flash is not there: its bytes were not measured.")
    half = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    free, _ = torch.cuda.mem_get_info()
    # S and P side by side, in two bytes, and half as much again
    plan = [
        p for p in problems(fused, half)
        if 6 * p["heads"] * p["seq_len"] ** 2 < free
    ]  # fmt: skip
    if not plan:
        result.notes.append("HBM and L2 bytes not measured: the smallest problem does not fit.")
        return
    environment = _with_path(os.environ | {"LC_ALL": "C"})
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        try:
            done = subprocess.run(
                ncu_command(ncu, str(log), plan),
                env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            result.notes.append(f"Counters not read: ncu did not finish ({error}).")
            return
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    try:
        groups = group_by_marker(parse_ncu(text), labels(plan))
    except LabError as error:
        said = " / ".join((text + done.stdout + done.stderr).strip().splitlines()[-4:])
        result.notes.append(f"Counters not read: {error} ncu said: {said}")
        return
    add_counters(result, plan, groups)


def add_counters(
    result: Result,
    plan: list[dict[str, Any]],
    groups: list[tuple[tuple[int, str], list[dict[str, Any]]]],
) -> None:
    """Rows and figures of profiled kernels; ``groups`` is what ``group_by_marker`` returns."""
    sums: dict[tuple[int, str], dict[str, float]] = {}
    names: dict[tuple[int, str], list[str]] = {}
    for (index, step), group in groups:
        problem = plan[index]
        sizes = {s: problem[s] for s in ("batch", "heads", "seq_len", "head_dim", "dtype")}
        for kernel in group:
            result.rows.append(
                {"kind": "kernel", "step": step, "tiles": "tiles" in problem, **sizes, **kernel}
            )
        method = "naive" if step in NAIVE else step
        key = (index, method)
        total = sums.setdefault(key, dict.fromkeys(("hbm", "l2", "seconds"), 0.0))
        total["hbm"] += sum(k["dram_read"] + k["dram_write"] for k in group)
        total["l2"] += sum(k["l2"] for k in group)
        total["seconds"] += sum(k["seconds"] for k in group)
        names.setdefault(key, []).extend(short_name(k["kernel"]) for k in group)
    tiles: list[tuple[int, float]] = []
    for (index, method), total in sums.items():
        problem = plan[index]
        shape = [problem[s] for s in ("batch", "heads", "seq_len", "head_dim")]
        where = f"[B, H, N, d] = {shape}, {problem['dtype']}"
        how = f"ncu, caches emptied before each kernel, {where}: {' + '.join(names[index, method])}"
        model = _model(problem, method)
        if "tiles" in problem:
            block_m = int(method.removeprefix("q_outer_"))
            tiles.append((block_m, total["l2"]))
            result.add(f"l2.tile.{block_m}", total["l2"], "bytes", f"L2, {how}")
            result.add(f"hbm.tile.{block_m}", total["hbm"], "bytes", f"DRAM, {how}")
            result.add(f"seconds.tile.{block_m}", total["seconds"], "s", how)
            result.add(f"model.tile.{block_m}", model, "bytes", f"closed form, {where}")
            continue
        n, short = problem["seq_len"], method.split("_128")[0]
        result.add(f"hbm.{short}.{n}", total["hbm"], "bytes", f"DRAM, read and written, {how}")
        result.add(f"l2.{short}.{n}", total["l2"], "bytes", f"through L2, {how}")
        result.add(f"seconds.{short}.{n}", total["seconds"], "s", how)
        if model is not None:
            result.add(f"model.{short}.{n}", model, "bytes", f"closed form, {where}")
    if len(tiles) >= 3:
        x, y = zip(*sorted(tiles), strict=True)
        fit = fit_power(x, y, last=len(x))
        result.add("l2.tile_exponent", fit.exponent, "1", f"L2 bytes against block_m = {x}, ncu")
    _ratios(result)


def _model(problem: dict[str, Any], method: str) -> int | None:
    """The closed form of what is profiled; None for ``flash``, whose tile the tuner chose."""
    if method == "flash":
        return None
    order = "naive" if method == "naive" else "q_outer"
    block_m = problem["block_m"] if method == "naive" else int(method.removeprefix("q_outer_"))
    return io.total_bytes(io.attention_traffic(order), **_sizes(problem | {"block_m": block_m}))


def _ratios(result: Result) -> None:
    """Naive over fused, by bytes of HBM and by time."""
    best = "flash" if any(key.startswith("hbm.flash.") for key in result.results) else "q_outer"
    for key in [k for k in result.results if k.startswith("hbm.naive.")]:
        n = key.rsplit(".", 1)[1]
        if f"hbm.{best}.{n}" not in result.results:
            continue
        for what in ("hbm", "l2", "seconds"):
            ratio = result.value(f"{what}.naive.{n}") / result.value(f"{what}.{best}.{n}")
            result.add(f"ratio.{what}.{n}", ratio, "1", f"{what} of naive over {best} at N = {n}")
