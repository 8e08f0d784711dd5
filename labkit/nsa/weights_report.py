r"""A look at attention weights in a few numbers, and a check that they are what they should be.

``weights.py`` rebuilds weights from the LSE.  This file says what the branches looked at without
rebuilding any (:func:`get_attention_weights_summary`), and goes through all rows of all branches
in chunks to see that each is a probability over keys that its query may see
(:func:`validate_attention_weights`).

A row that does not sum to 1 is the one symptom of several mistakes.  Three are recognised and
named: an LSE in base 2, an LSE in the layout ``[B, M, HQ]`` where M = HQ lets it pass, and one
that counts keys the branch does not show, as a mask that looks ahead would.

Taught in chapter 14 (what did it look at?).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from labkit.errors import ArgumentError
from labkit.nsa.weights import (
    BRANCHES,
    Branch,
    Problem,
    branches_of,
    full_float32,
    gated,
    heads_of_groups,
    options_of,
    problem_of,
)

__all__ = ["get_attention_weights_summary", "validate_attention_weights"]


def _stats(x: torch.Tensor) -> dict[str, float | None]:
    """Mean, standard deviation, smallest and largest; None of an empty tensor."""
    x = x.double()
    if not x.numel():
        return dict.fromkeys(("mean", "std", "min", "max"))
    return {
        "mean": x.mean().item(), "std": x.std(correction=0).item(),
        "min": x.min().item(), "max": x.max().item(),
    }  # fmt: skip


@torch.no_grad()
def get_attention_weights_summary(
    attn_weights: Mapping[str, Any], *, block_size: int | None = None
) -> dict[str, dict[str, Any]]:
    """What the branches looked at, in a few numbers; no weight is rebuilt for it.

    Parameters
    ----------
    attn_weights : dict
        what ``nsa_func(..., return_attn_weights=True)`` returned.
    block_size : int
        of that call, if ``attn_weights`` does not hold it.

    Returns
    -------
    dict
        For each branch ``lse`` (mean, std, min, max over the rows that saw something), ``rows``
        and ``empty_rows``.  For the selection also ``blocks``, how many different ones a query
        reads, and ``distance``, how many blocks before its own they lie (without cu_seqlens).
        ``gating_weights``: the statistics of each gate, and its ``share`` of Σ|g|.

    Raises
    ------
    ArgumentError
        if it is no mapping.
    """
    options = options_of(attn_weights, block_size, None, None, None)
    summary: dict[str, dict[str, Any]] = {}
    for name in BRANCHES:
        entry = attn_weights.get(name) or {}
        lse = entry.get("lse")
        if lse is None:
            continue
        seen = torch.isfinite(lse)
        empty = int((~seen).sum())
        summary[name] = {"rows": lse.numel(), "empty_rows": empty, "lse": _stats(lse[seen])}
        if name == "selection" and entry.get("block_indices") is not None:
            summary[name] |= _reads(entry["block_indices"], options)
    gates = {g: x for g, x in (attn_weights.get("gating_weights") or {}).items() if x is not None}
    if gates:
        whole = sum(x.abs().double().sum().item() for x in gates.values()) or 1.0
        summary["gating_weights"] = {
            name: _stats(x) | {"share": x.abs().double().sum().item() / whole}
            for name, x in gates.items()
        }
    return summary


def _reads(indices: torch.Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    ordered = indices.sort(dim=-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    used = (ordered >= 0) & ~again
    reads: dict[str, Any] = {"blocks": _stats(used.sum(dim=-1))}
    if options["block_size"] and options["cu_seqlens"] is None:
        held = options.get("seq_len_k")
        start = (held or indices.shape[1]) - indices.shape[1]
        own = torch.arange(start, start + indices.shape[1], device=indices.device)
        back = (own // options["block_size"])[None, :, None, None] - ordered
        reads["distance"] = _stats(back[used & (back >= 0)])
    return reads


@torch.no_grad()
def validate_attention_weights(
    attn_weights: Mapping[str, Any] | torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    block_size: int | None = None,
    block_counts: int | torch.Tensor | None = None,
    window_size: int | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    tolerance: float | None = None,
) -> dict[str, dict[str, float]]:
    """Raise unless the weights are what they should be; say how well they are otherwise.

    Looks at every row of every branch: weights are finite and not negative, none lies in a
    query's future or in another sequence, and a row sums to 1, or to 0 where its LSE is −∞.
    With v and out, the weights' product with v is out.  Rows are taken in chunks: nothing of
    size M × N is held.

    Parameters
    ----------
    attn_weights : dict or torch.Tensor
        what ``nsa_func(..., return_attn_weights=True)`` returned, or weights of one branch,
        ``[B, HQ, M, N]``.
    q, k : torch.Tensor
        the inputs of that call.
    v, out : torch.Tensor
        ``[B, N, H, V]`` and ``[B, M, HQ, V]``: the values, and the layer's output (of the branch's,
        for a tensor).
    block_size, block_counts, window_size, scale, cu_seqlens
        as for :func:`labkit.nsa.weights.total_attention_weights`.
    tolerance : float
        how far a row's sum may be from 1.  By default what float32 scores of this size, summed
        in two orders, may differ by (TF32 products, if ``options`` say so).

    Returns
    -------
    dict
        For each branch (or ``"weights"``) the ``rows``, the ``empty_rows``, the
        ``largest_sum_error`` and the ``tolerance``; ``output`` with ``relative_error``, the norm
        of the difference over the norm of out, if v and out are given.

    Raises
    ------
    ArgumentError
        naming the branch, what is wrong, and where it recognises the mistake, the mistake.
    """
    if (v is None) != (out is None):
        raise ArgumentError(
            "out" if out is None else "v", None, "is missing.", "Pass v and out, or neither."
        )
    if isinstance(attn_weights, torch.Tensor):
        problem = problem_of(q, k, scale, cu_seqlens, None, None)
        return _validate_tensor(attn_weights, problem, v, out, tolerance or 1e-4)
    options = options_of(attn_weights, block_size, window_size, scale, cu_seqlens)
    problem = problem_of(q, k, options["scale"], options["cu_seqlens"], None, None)
    found = list(branches_of(problem, attn_weights, options, block_counts))
    report: dict[str, dict[str, float]] = {}
    for name, branch in found:
        lse = attn_weights[name]["lse"]
        allowed = _tolerance(problem, name, options) if tolerance is None else tolerance
        argument = f"attn_weights[{name!r}]['lse']"
        _check_numbers(lse, argument)
        sums = _row_sums(problem, branch)
        wrong = _sum_errors(sums, lse)
        worst = wrong.max().item()
        if not worst <= allowed:
            way = _recognise(attn_weights, name, problem, options, block_counts, allowed)
            seen = sums[torch.isfinite(lse)]
            low, high = (seen.min(), seen.max()) if seen.numel() else (sums.min(), sums.max())
            raise ArgumentError(
                argument, f"{int((~(wrong <= allowed)).sum())} of {wrong.numel()} rows",
                f"do not sum to 1, or to 0 where it is −∞: sums from {low:.4g} to {high:.4g}.", way,
            )  # fmt: skip
        report[name] = {
            "rows": lse.numel(), "empty_rows": int((~torch.isfinite(lse)).sum()),
            "largest_sum_error": worst, "tolerance": allowed,
        }  # fmt: skip
    if out is not None:
        parts = gated(problem, attn_weights, found)
        allowed = max([x["tolerance"] for x in report.values()], default=0.0)
        report["output"] = {"relative_error": _output_error(problem, parts, v, out, allowed)}
    return report


def _check_numbers(lse: torch.Tensor, argument: str) -> None:
    bad = torch.isnan(lse) | (lse == math.inf)
    if bad.any():
        raise ArgumentError(
            argument, f"{int(bad.sum())} entries", "are NaN or +∞.",
            "A row that sees nothing has −∞; look for NaN in q and k, and for rows that no kernel "
            "wrote.",
        )  # fmt: skip


def _tolerance(problem: Problem, name: str, options: Mapping[str, Any]) -> float:
    """How far apart two float32 sums of D products may lie, with room for compressed keys."""
    eps = 2.0**-10 if options.get("precision") == "tf32" else torch.finfo(torch.float32).eps
    q, k = problem.q, problem.k
    longest = [x.to(problem.dtype).norm(dim=-1).max().item() for x in (q, k)]
    size = 1 + problem.scale * longest[0] * longest[1]
    allowed = 4 * math.sqrt(q.shape[3]) * eps * size
    if name == "compression" and k.dtype.itemsize < 4:
        # a mean may fall to either side of a rounding to k's dtype
        allowed += 4 * torch.finfo(k.dtype).eps * problem.scale * q.abs().max().item()
    return allowed


def _row_sums(problem: Problem, branch: Branch) -> torch.Tensor:
    """``[B, HQ, M]``, chunk by chunk; a negative or infinite weight makes its row's sum so."""
    q = problem.q
    sums = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float64, device=q.device)
    with full_float32():
        for rows in problem.chunks():
            for kv, heads, _ in heads_of_groups(problem):
                sums[:, heads, rows] = branch(kv, heads, rows).double().sum(dim=-1)
    return sums


def _sum_errors(sums: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return (sums - torch.isfinite(lse).to(sums)).abs()


def _recognise(attn_weights, name, problem, options, block_counts, allowed) -> str:
    """Which known mistake would explain an LSE whose rows do not sum to 1."""
    lse = attn_weights[name]["lse"]
    guesses = [("It is a logarithm to base 2: multiply it by ln 2.", lse * math.log(2))]
    if lse.shape[1] == lse.shape[2]:
        turned = lse.transpose(1, 2)
        guesses.append(("It is [B, M, HQ]: transpose it, M equals HQ here.", turned))
    for text, guess in guesses:
        entry = {**attn_weights[name], "lse": guess}
        ((_, branch),) = branches_of(problem, {name: entry}, options, block_counts)
        if (_sum_errors(_row_sums(problem, branch), guess) <= allowed).all():
            return text
    return (
        "Sums above 1: it leaves out keys that this branch sees. Below: it counts keys that it "
        "does not, such as the future. Check block_size, scale, window_size and cu_seqlens, and "
        "that q and k are those of the call."
    )


def _output_error(problem: Problem, parts, v, out, tolerance: float) -> float:
    """‖Σ gate · weights @ v − out‖ / ‖out‖; raises if that is more than out's dtype explains."""
    want = (*problem.q.shape[:3], v.shape[-1])
    if tuple(out.shape) != want or tuple(v.shape[:3]) != tuple(problem.k.shape[:3]):
        raise ArgumentError(
            "out.shape", tuple(out.shape), f"does not go with q and v's {tuple(v.shape)}.",
            f"Pass [B, M, HQ, V] = {want}.",
        )  # fmt: skip
    missed = 0.0
    with full_float32():
        for rows in problem.chunks():
            for kv, heads, _ in heads_of_groups(problem):
                made = 0.0
                for branch, gate in parts:
                    w = branch(kv, heads, rows)
                    if gate is not None:
                        w = w * gate[:, rows, heads].transpose(1, 2)[..., None].to(w.dtype)
                    made = made + torch.einsum("bhrn,bnd->brhd", w, v[:, :, kv].to(w.dtype))
                missed += (made - out[:, rows, heads]).double().square().sum().item()
    error = math.sqrt(missed) / max(out.double().norm().item(), 1e-30)
    allowed = 8 * torch.finfo(out.dtype).eps + tolerance
    if not error <= allowed:
        raise ArgumentError(
            "out", f"relative error {error:.3g}", f"is not the weights' product with v, to within "
            f"{allowed:.2g}.", "Check that v, the gates and out are those of the call.",
        )  # fmt: skip
    return error


def _validate_tensor(w, problem: Problem, v, out, tolerance: float) -> dict[str, dict[str, float]]:
    b, m, hq, _ = problem.q.shape
    want = (b, hq, m, problem.k.shape[1])
    if tuple(w.shape) != want:
        raise ArgumentError(
            "attn_weights.shape", tuple(w.shape), "does not fit q and k.",
            f"Pass [B, HQ, M, N] = {want}.",
        )  # fmt: skip
    if not torch.isfinite(w).all() or (w < 0).any():
        raise ArgumentError(
            "attn_weights", "weights", "are negative, or not finite.", "A weight is e to a power."
        )
    ahead = ~problem.visible(slice(0, m), problem.key_at, problem.key_seq)
    lost = w.masked_fill(~ahead, 0.0).sum(dim=-1)
    if (lost > 0).any():
        b_, h_, i_ = (int(x) for x in (lost > 0).nonzero()[0])
        raise ArgumentError(
            "attn_weights", f"{lost.max():.3g} of a row",
            f"lies in the query's future or in another sequence, first in batch {b_}, head {h_}, "
            f"row {i_}.", "A query sees the keys up to its own position.",
        )  # fmt: skip
    sums = w.double().sum(dim=-1)
    empty = sums == 0
    worst = torch.where(empty, 0.0, (sums - 1).abs()).max().item()
    if not worst <= tolerance:
        raise ArgumentError(
            "attn_weights", f"a row that sums to {1 + worst:.4g} or {1 - worst:.4g}",
            "is neither empty nor a probability.", "Rebuild it with the LSE of the same branch.",
        )  # fmt: skip
    report = {"weights": {
        "rows": sums.numel(), "empty_rows": int(empty.sum()), "largest_sum_error": worst,
        "tolerance": tolerance,
    }}  # fmt: skip
    if out is not None:
        def whole(kv, heads, rows):
            return w[:, heads, rows].to(problem.dtype)

        error = _output_error(problem, [(whole, None)], v, out, tolerance)
        report["output"] = {"relative_error": error}
    return report
