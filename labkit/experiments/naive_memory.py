"""Naive attention's peak: predicted, traced and measured, for each way of writing it.

Every row is one forward pass without gradients: variant, dtype, causal or not, seq_len; the
peak above the inputs by the schedule, by the trace and by the allocator, and on CUDA what
the allocator handed out and what it reserved beside it.

Taught in chapter 01 (what attention writes).  Claims C02, C12, C22.
"""

from __future__ import annotations

import itertools
from typing import Any

from labkit.experiments import Progress, Result, has_gpu, steps
from labkit.units import format_bytes

__all__ = ["CHAPTERS", "NEEDS_GPU", "TITLE", "run"]

TITLE = "Peak memory of naive attention: predicted, traced, measured"
CHAPTERS = ("01",)
NEEDS_GPU = False

_DTYPES = ("float16", "float32")


def run(
    *, quick: bool = True, device: str | None = None, progress: Progress | None = None
) -> Result:
    """Measure every variant at growing seq_len.

    Parameters
    ----------
    quick : one short length instead of five (seconds on a laptop).
    device : ``"cuda"`` or ``"cpu"``; the GPU if there is one by default.
    progress : called with ``(done, total, what)``.

    Returns
    -------
    Result with one row per variant, dtype, causal and seq_len, and for the longest one
    the keys ``<variant>_<dtype>[_causal]_<column>`` in bytes and ``…_in_s`` in units of the
    bytes of S; ``rows``, ``rows_exact`` and ``largest_gap`` sum up the comparison.
    """
    from labkit.memory import VARIANTS

    device = device or ("cuda" if has_gpu() else "cpu")
    lengths = (256,) if quick else (512, 1024, 2048, 4096, 8192)
    problem = {"batch": 1, "heads": 2 if quick else 12, "head_dim": 64}
    result = Result()
    cases = list(itertools.product(lengths, _DTYPES, (False, True), VARIANTS))
    for n, dtype, causal, variant in steps(
        cases, progress, lambda c: f"{c[3]}, {c[1]}, N = {c[0]}" + (", causal" if c[2] else "")
    ):
        row = _row({**problem, "seq_len": n, "dtype": dtype, "causal": causal}, variant, device)
        result.rows.append(row)
        if n == lengths[-1]:
            _quote(result, row)
    gaps = [abs(r["measured"] - r["predicted"]) for r in result.rows if r["measured"] is not None]
    result.add("rows", len(result.rows), "1", "variants × dtypes × causal × lengths")
    exact = sum(gap == 0 for gap in gaps)
    result.add("rows_exact", exact, "1", "rows in which the measured peak is the predicted one")
    if gaps:
        result.add("largest_gap", max(gaps), "bytes", "largest |measured − predicted| of all rows")
    return result


def _row(problem: dict[str, Any], variant: str, device: str) -> dict[str, Any]:
    import torch

    from labkit.dtypes import torch_dtype
    from labkit.memory import attention_peak, measure, scores_buffer_bytes
    from labkit.naive import naive_attention

    shape = [problem[s] for s in ("batch", "heads", "seq_len", "head_dim")]
    options = {"device": device, "dtype": torch_dtype(problem["dtype"])}
    q, k, v = (torch.randn(shape, **options) for _ in range(3))
    predicted = attention_peak(**problem, variant=variant, device=device)
    with torch.no_grad():
        report = measure(
            naive_attention, q, k, v, variant=variant, causal=problem["causal"], predicted=predicted
        )
    one = scores_buffer_bytes(
        problem["seq_len"], batch=shape[0], heads=shape[1], dtype=problem["dtype"]
    )
    return {"variant": variant, **problem, "scores_bytes": one, **report.to_dict()}


def _quote(result: Result, row: dict[str, Any]) -> None:
    name = f"{row['variant']}_{row['dtype']}" + ("_causal" if row["causal"] else "")
    where = (
        f"forward without gradients, batch {row['batch']}, {row['heads']} heads, "
        f"seq_len {row['seq_len']}, head_dim {row['head_dim']}"
    )
    for column in ("predicted", "traced", "measured", "allocated", "reserved"):
        if row[column] is not None:
            how = f"peak above the inputs, {column}; {where}"
            result.add(f"{name}_{column}", row[column], "bytes", how)
    if row["measured"] is not None:
        one = format_bytes(row["scores_bytes"])
        how = f"measured peak over the bytes of S ({one}); {where}"
        result.add(f"{name}_in_s", row["measured"] / row["scores_bytes"], "1", how)
