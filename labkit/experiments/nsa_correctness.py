"""Are the kernels of Native Sparse Attention still what the formulas say?

Four witnesses:

- **A matrix of cases** (``_nsa_cases``) in which every two values of different factors meet:
  lengths around every edge of a block, groups of 1 to 64, block sizes, head_dims, dtypes, layouts
  in memory, sequences shorter than a block, −1 in any slot, windows of 0 and beyond the end.  Each
  branch and the whole are judged by every kernel that can compute them (a *road*) against dense
  attention in float64, and may err twice as much as plain attention in the same dtype, for O, LSE
  and every gradient, the gates' among them.  The choice of blocks is judged by its scores.
- **Addresses**: more than 2³¹ elements, whose last rows must be those of a small problem.
- **250 repeats**, which must agree to the bit: nothing is added in an order that chance decides.
- **compute-sanitizer**: memcheck (accesses beyond an allocation) and racecheck (threads that use
  shared memory without waiting for each other) over tiny cases of every kernel.

Most of the time goes into compiling, some thousand kernels.  After a limit of time no case begins;
the cases come in an order that shows every part, dtype, group, block and road early, and the record
says how many were left out.

Taught in chapter 13 (the kernels of sparse attention).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from labkit.experiments import Progress, Result
from labkit.experiments._correctness import LIMIT_S, Clock, Suite, judge
from labkit.experiments._nsa_cases import Case, matrix

TITLE = "Correctness of the NSA kernels: error, addresses, repeats, sanitizer"
CHAPTERS = ("13",)
NEEDS_GPU = True

DTYPES = ("float16", "bfloat16", "float32")
TENSORS = ("o", "lse", "dq", "dk", "dv", "dg_cmp", "dg_slc", "dg_swa", "choice")
PARTS = ("selection", "compression", "whole")
REPEATS = 250
#: what flash-linear-attention asks of its own kernels in bfloat16
RMSE = 0.005
#: what the kernels by hand take
_FAST: dict[str, tuple[Any, ...]] = {
    "t": (127, 500, 1100), "group": (1, 2, 4, 16, 64), "block": (64, 128),
    "dims": ((64, 64), (128, 128)), "dtype": ("float16", "bfloat16"),
    "layout": ("bnhd", "packed"), "slots": (4, 16),
    "sequences": ("one", "ragged", "fewer"),
}  # fmt: skip


#: what the kernel by hand may add up, where no gradient is asked for
_ADDED: dict[str, tuple[Any, ...]] = {
    "t": (127, 500, 1100), "group": (1, 4, 16, 64), "block": (64,), "dims": ((128, 128),),
    "dtype": ("float16", "bfloat16"), "layout": ("bnhd", "packed"), "slots": (4, 16),
    "sequences": ("one",), "window": (64,), "gates": ("csw", "cs", "sw"), "forced": ((1, 2),),
}  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """What is judged: the full matrix, and a second one of what the fast roads can take."""
    if quick:
        few = {"t": (65, 130), "group": (4,), "block": (64,), "dims": ((64, 64),),
               "sequences": ("one",), "layout": ("bnhd",), "choice": ("random",),
               "counts": ("all",), "slots": (4,), "stride": ("own",), "window": (64,),
               "gates": ("csw",), "forced": ((1, 2),)}  # fmt: skip
        return [case for part in PARTS for case in matrix(part, few)]
    every = [case for part in PARTS for case in matrix(part)]
    fast = [*matrix("selection", _FAST), *matrix("whole", _ADDED)]
    return list(dict.fromkeys([*every, *fast, *representative()]))


def representative() -> list[Case]:
    """One ordinary problem per dtype, whose error stands beside that of plain attention."""
    shape = {"t": 1024, "group": 16, "kv": 1, "d": 128, "dv": 128, "slots": 8, "window": 128}
    return [Case(**shape, dtype=dtype) for dtype in DTYPES]


def repeated() -> list[Case]:
    """What is done 250 times: every road, blocks that everybody chose, each dtype."""
    shape = {"t": 1000, "d": 128, "dv": 128, "slots": 8, "batch": 2}
    return [
        Case("selection", group=16, **shape),
        Case("selection", group=1, **shape),
        Case("selection", group=2, dtype="float32", **shape),
        Case("compression", group=16, block=16, **shape),
        Case("whole", group=16, **shape),
        Case("whole", group=3, **shape | {"t": 700, "batch": 1, "sequences": "ragged"}),
    ]


def watched() -> list[Case]:
    """What compute-sanitizer watches, a hundred times slower than without it."""
    return [
        Case("selection", 129, 16, 1, slots=3),
        Case("selection", 129, 2, 1, slots=3),
        Case("selection", 70, 3, 1, d=40, dv=24, block=16, slots=3, dtype="float32",
             sequences="ragged", choice="holes", counts="tensor"),
        Case("whole", 97, 4, 1, block=16, slots=3, window=20, dtype="float16"),
        Case("whole", 130, 16, 1, d=128, dv=128, slots=3, window=20),
        Case("compression", 65, 2, 1, block=16, stride=8, length=16, sequences="short"),
    ]  # fmt: skip


def suite() -> Suite:
    """This experiment, as ``_correctness`` wants it described."""
    return Suite(
        worker="labkit.experiments._nsa_worker",
        tensors=TENSORS, representative=representative(), repeated=repeated(), watched=watched(),
        groups={"": ["default", "queries", "keys", "inference"], "_by_hand": ["by_hand", "both"]},
        facts=_facts, timeout_s=200,
    )  # fmt: skip


def _facts(case: Case) -> list[Hashable]:
    """What a case is an example of: each part has kernels of its own."""
    c, part = case, case.part
    factors: dict[str, Any] = {
        "dtype": c.dtype, "group": c.group, "block": c.block, "dims": (c.d, c.dv), "t": c.t,
        "sequences": c.sequences, "stride": c.own_length // c.own_stride,
    }  # fmt: skip
    if part != "compression":
        factors["slots"] = c.slots
    # what the kernels by hand take, apart from blocks and sequences
    half = c.dtype != "float32" and c.d == c.dv in (64, 128) and c.group & (c.group - 1) == 0
    if part == "selection":
        factors |= {"choice": c.choice, "counts": c.counts}
        if half and c.block == 64:  # both ways
            small = c.group < 8  # which have code of their own
            factors |= {"by hand": True, "hand dtype": c.dtype, "hand dims": c.d, "small": small}
    if part == "whole":
        factors |= {"window": c.window, "gates": c.gates, "forced": c.forced}
        if half and c.d == 128 and c.block == 64 and c.sequences == "one":
            # by one kernel, where no gradient is asked for; small groups have code of their own
            factors |= {"added": c.gates, "small added": c.group < 8}
    return [(part,), ("layout", c.layout), *((part, *each) for each in factors.items())]


def run(
    *, quick: bool, device: str | None = None, progress: Progress | None = None,
    limit_s: float = LIMIT_S,
) -> Result:  # fmt: skip
    """Judge, repeat, and watch.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    limit_s : no case begins after so many seconds; what has begun has a few seconds more.  What
        was found by then is the result, also where the process is told to end (SIGTERM).

    Returns
    -------
    Result
        ``rows``: one per case and road with the error of each tensor, the addresses, the repeats,
        and the sanitizer's summaries.  ``results``: as ``flash_correctness``, with ``cases``
        (judged) and ``left_out`` (those that no time was left for), and ``<part>_cases``,
        ``<part>_worst``; ``bfloat16_rmse_worst`` and ``bfloat16_rmse_above``, the largest root
        mean square error over that of the tensor itself, and how many exceed 0.005;
        ``addresses_worst``.

    Notes
    -----
    A failure is an error beyond the bound of its case, for the largest or the mean error: twice
    plain attention's in the same dtype, beside the roundings that making P again from LSE adds.
    In float32 both are errors of long sums, which depend on the order of adding: a ratio a little
    above 1 is counted and named, and is to be read with that.  The root mean square ratio is a
    figure beside the bound, with plain attention's own, and no failure.
    """
    report = progress or (lambda done, total, what: None)
    result, chosen = Result(), cases(quick)
    with Clock(limit_s) as clock:
        distant = judge(
            suite(), result, chosen, 20 if quick else REPEATS, report, clock,
            far=None if quick else far_case(), watch=not quick,
        )  # fmt: skip
    _by_part(result)
    _rmse(result)
    for row in distant:
        _addresses(result, row)
    report(len(chosen) + 1, len(chosen) + 1, "")
    return result


def _found(result: Result) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    return [
        (row, name, found)
        for row in result.rows if row.get("kind") == "case"
        for name, found in row.get("tensors", {}).items()
    ]  # fmt: skip


def _by_part(result: Result) -> None:
    how = "error / allowed, all tensors of the part"
    for part in PARTS:
        ratios = [
            1e6 if found["ratio"] is None else min(1e6, found["ratio"])
            for row, _, found in _found(result) if row.get("part") == part
        ]  # fmt: skip
        if ratios:
            result.add(f"{part}_worst", max(ratios), "1", f"{how} {part}")
            count = len({row["case"] for row in result.rows if row.get("part") == part})
            result.add(f"{part}_cases", count, "1", f"cases of the part {part}")


def _rmse(result: Result) -> None:
    """The root mean square error in bfloat16 over the root mean square of the tensor itself."""
    found = [
        (found["rms"], row, name) for row, name, found in _found(result)
        if row["dtype"] == "bfloat16" and name != "choice" and found["rms"] is not None
    ]  # fmt: skip
    if not found:
        return
    worst, row, name = max(found, key=lambda each: each[0])
    how = "root mean square error / root mean square of the tensor, bfloat16, against float64"
    result.add(
        "bfloat16_rmse_worst", worst, "1", f"{how}; worst: {name} of {row['case']}, {row['road']}"
    )
    above = [each for each in found if each[0] >= RMSE]
    beyond = sum((row["tensors"][name]["rms_plain"] or 0.0) >= RMSE for _, row, name in found)
    result.add(
        "bfloat16_rmse_above", len(above), "1",
        f"tensors of {len(found)} with {how} ≥ 0.005; plain attention in bfloat16 has {beyond}. "
        "A figure and no failure: that is an error beyond the bound of its case",
    )  # fmt: skip
    for value, row, name in sorted(above, key=lambda each: -each[0])[:8]:
        plain = row["tensors"][name]["rms_plain"] or 0.0
        result.notes.append(
            f"RMSE {value:.4f} (plain attention {plain:.4f}): {name} of {row['case']}, "
            f"{row['road']}"
        )


def far_case() -> Case:
    """More than 2³¹ elements of q."""
    return Case("selection", t=264_000, group=16, kv=4, d=128, dv=128, slots=16)


def _addresses(result: Result, row: dict[str, Any]) -> None:
    """What a process of its own found at far addresses."""
    far = far_case()
    result.rows.append({"kind": "addresses", **row})
    if "failed" in row:
        result.notes.append(f"addresses: {row['failed']}")
        return
    how = (
        f"{far.t} tokens × {far.heads} heads × {far.d}: the largest difference between the last "
        "rows and those of a problem with these queries only, over the largest value; selection "
        "forward and backward, and the whole forward"
    )
    result.add("addresses_worst", row["worst"], "1", how)
    result.add("addresses_elements", row["elements"], "1", "elements of q: 2³¹ is 2 147 483 648")
