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

from labkit.experiments import Progress, Result
from labkit.experiments._correctness import LIMIT_S, Clock, Suite, judge
from labkit.experiments._flash_cases import Case, matrix

TITLE = "Correctness of the flash kernels: error, repeats, sanitizer"
CHAPTERS = ("08", "09")
NEEDS_GPU = True

DTYPES = ("float16", "bfloat16", "float32")
TENSORS = ("o", "lse", "dq", "dk", "dv")
REPEATS = 250


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


def suite() -> Suite:
    """This experiment, as ``_correctness`` wants it described."""
    return Suite(
        worker="labkit.experiments._flash_worker",
        tensors=TENSORS, representative=representative(), repeated=repeated(), watched=watched(),
        groups={"": ["default", "descriptors"], "_by_hand": ["by_hand"]},
    )  # fmt: skip


def run(
    *, quick: bool, device: str | None = None, progress: Progress | None = None,
    limit_s: float = LIMIT_S,
) -> Result:  # fmt: skip
    """Judge, repeat, and watch.

    Parameters
    ----------
    quick, device, progress : as for every experiment.
    limit_s : no case begins after so many seconds; the record says how many did not.

    Returns
    -------
    Result
        ``rows``: one per case and road with the error of each tensor, the repeats, and the
        sanitizer's summaries.  ``results``: ``cases`` (judged), ``left_out`` (cases that no time
        was left for), ``failures`` (tensors beyond the bound, or not computed);
        ``<dtype>_<tensor>_{cases,worst,rms,rms_plain}`` with ``worst`` the largest
        error / allowed; ``<road>_cases`` and ``<road>_worst``; ``repeats``, ``repeats_cases``,
        ``repeats_unequal``; ``{memcheck,racecheck}[_by_hand]_errors`` where the tool ran.
    """
    report = progress or (lambda done, total, what: None)
    result = Result()
    chosen = cases(quick)
    with Clock(limit_s) as clock:
        judge(suite(), result, chosen, 20 if quick else REPEATS, report, clock, watch=not quick)
    report(len(chosen) + 1, len(chosen) + 1, "")
    return result
