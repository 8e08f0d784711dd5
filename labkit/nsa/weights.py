r"""Which keys each branch looked at: attention weights rebuilt from the log-sum-exp.

A fused kernel never stores P.  It returns one number per row, the LSE, and that is enough: each
weight can be computed alone, in any order, for as many heads and rows as one wants to see.

.. math:: P_{ij} = e^{S_{ij} - \mathrm{LSE}_i}

``weights @ v`` is the branch's output for each of the three branches:

- window: P over the keys :math:`t - W < j \le t`.
- selection: P over the keys of the chosen blocks up to t; 0 elsewhere.
- compression: P is over *compressed* keys.  With mean pooling the compressed value is
  :math:`\bar v_c = \frac1l \sum_j v_j`, so that each of the block's l tokens carries
  :math:`P_{ic}/l`; a token under several overlapping blocks carries the sum of its shares.

.. math:: o_i = \sum_c P_{ic} \bar v_c = \sum_j \Bigl(\sum_{c \ni j} \frac{P_{ic}}{l}\Bigr) v_j

The gated sum of the three, :func:`total_attention_weights`, gives the layer's output.

The guard here is against four mistakes: an LSE in the layout ``[B, M, HQ]``, which has the right
shape when M = HQ; an LSE in base 2; scores that are rounded before the exponential, which turns
an absolute error of S into a relative one of P; and unpooled keys for the compressed branch.

Memory: the result, and scratch of the order of 64 MiB, because rows are computed in chunks.  What
the result takes is known before anything is allocated, and a request that does not fit is refused.

Layout ``[batch, seq_len, heads, head_dim]``; the symbols are those of ``semantics.py``.
Taught in chapter 14 (what did it look at?).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from labkit.errors import ArgumentError, NotEnoughMemoryError, check_positive_int
from labkit.memory import free_memory
from labkit.nsa.checks import (
    check_block_counts,
    check_block_indices,
    check_heads,
    check_lengths,
    check_offsets,
    check_tensor,
    check_window,
)
from labkit.nsa.pooling import compressed_bounds, pool_mean
from labkit.shapes import check_scale
from labkit.units import format_bytes

__all__ = [
    "attention_weights_bytes",
    "compute_attention_weights_from_lse",
    "total_attention_weights",
]

#: bytes of scores that are computed at a time
_SCRATCH = 64 * 2**20
BRANCHES = ("compression", "selection", "sliding_window")
_GATES = {"compression": "g_cmp", "selection": "g_slc", "sliding_window": "g_swa"}


def attention_weights_bytes(q, k, *, heads=None, rows: slice | None = None) -> int:
    """Bytes of the weights ``[B, heads, rows, N]`` that a call with these arguments returns.

    Nothing is allocated; ``heads`` and ``rows`` are those of
    :func:`compute_attention_weights_from_lse`.
    """
    _check_qk(q, k)
    size = 8 if q.dtype == torch.float64 else 4
    many, start, stop = len(_heads(heads, q)), *_rows(rows, q)
    return q.shape[0] * many * (stop - start) * k.shape[1] * size


@torch.no_grad()
def compute_attention_weights_from_lse(
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int = 64,
    block_indices: torch.Tensor | None = None,
    *,
    block_counts: int | torch.Tensor | None = None,
    window_size: int | None = None,
    stride: int | None = None,
    k_cmp: torch.Tensor | None = None,
    spread: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    heads: int | Sequence[int] | None = None,
    rows: slice | None = None,
) -> torch.Tensor:
    r"""The weights of one branch, such that ``weights @ v`` is the branch's output.

    Which branch: the window with ``window_size``, the selection with ``block_indices``, the
    compression with neither.

    Parameters
    ----------
    lse : torch.Tensor
        ``[B, HQ, M]``, natural logarithm, as the branch returned it; −∞ where nothing is seen.
    q, k : torch.Tensor
        ``[B, M, HQ, D]`` and ``[B, N, H, D]``, the branch's own inputs; M ≤ N, and query i
        stands at position i + N − M.
    block_size : int
        tokens of a selection block, or of a compressed one.
    block_indices : torch.Tensor
        ``[B, M, H, S]`` int32 or int64: chosen blocks, −1 for an unused slot.
    block_counts : int or torch.Tensor
        how many slots are used, for all or as ``[B, M, H]``.
    window_size : int
        W: keys :math:`t - W < j \le t`.
    stride : int
        tokens from one compressed block to the next; default ``block_size``.
    k_cmp : torch.Tensor
        ``[B, C, H, D]``: the compressed keys that the branch used, if they are not the means.
    spread : torch.Tensor
        ``[block_size]`` or ``[H, block_size]``: how the *values* were pooled, if not evenly.
        A pooling that is not linear in v, such as an MLP, has no weights over tokens.
    scale : float
        multiplies QKᵀ; default 1/√D.
    cu_seqlens : torch.Tensor
        ``[sequences + 1]``: several sequences in one row of the batch (B = 1, M = N).
    heads, rows
        which query heads and which queries; all by default.  The result for a few of them costs
        no more than what it holds.

    Returns
    -------
    torch.Tensor
        ``[B, heads, rows, N]`` float32 (float64 for a float64 q).  A row that sees something sums
        to 1 (to the sum of ``spread``, if that is given), every other is 0.  Not differentiable.

    Raises
    ------
    ArgumentError
        naming the argument that does not fit.
    NotEnoughMemoryError
        before anything is allocated, with the bytes that it would take.
    """
    problem = problem_of(q, k, scale, cu_seqlens, heads, rows)
    branch = _branch(
        problem, lse, block_size=block_size, block_indices=block_indices,
        block_counts=block_counts, window_size=window_size, stride=stride, k_cmp=k_cmp,
        spread=spread,
    )  # fmt: skip
    return _assemble(problem, [(branch, None)])


@torch.no_grad()
def total_attention_weights(
    attn_weights: Mapping[str, Any],
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int | None = None,
    block_counts: int | torch.Tensor | None = None,
    window_size: int | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    heads: int | Sequence[int] | None = None,
    rows: slice | None = None,
) -> torch.Tensor:
    r"""Σ gate · weights over the branches: its product with v is the layer's output.

    .. math:: A_{ij} = g^{cmp}_i A^{cmp}_{ij} + g^{slc}_i A^{slc}_{ij} + g^{swa}_i A^{swa}_{ij}

    A row sums to the sum of its gates, which need not be 1.

    Parameters
    ----------
    attn_weights : dict
        what ``nsa_func(..., return_attn_weights=True)`` returned: for each branch its ``lse``,
        and ``block_indices`` or ``window_size``; ``gating_weights``; ``options``.  Compressed
        keys that are not means stand beside their LSE as ``k_cmp``, and ``spread`` too.
    q, k : torch.Tensor
        the inputs of that call.
    block_size, window_size, scale, cu_seqlens
        the options of that call; the ones that ``attn_weights`` holds by default.
    block_counts
        as for :func:`compute_attention_weights_from_lse`.
    heads, rows
        which query heads and which queries; all by default.

    Returns
    -------
    torch.Tensor
        ``[B, heads, rows, N]``.

    Raises
    ------
    ArgumentError, NotEnoughMemoryError
        as for :func:`compute_attention_weights_from_lse`.
    """
    options = options_of(attn_weights, block_size, window_size, scale, cu_seqlens)
    problem = problem_of(q, k, options["scale"], options["cu_seqlens"], heads, rows)
    parts = gated(problem, attn_weights, branches_of(problem, attn_weights, options, block_counts))
    if not parts:
        raise ArgumentError(
            "attn_weights", sorted(attn_weights), "holds no branch.",
            "Pass what nsa_func(..., return_attn_weights=True) returned.",
        )  # fmt: skip
    return _assemble(problem, parts)


# -- what is asked for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Checked inputs, and where each query and key stands in its own sequence."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    heads: list[int]
    start: int
    stop: int
    #: [M] and [N]: position, and number of the sequence
    query_at: torch.Tensor
    query_seq: torch.Tensor
    key_at: torch.Tensor
    key_seq: torch.Tensor
    #: where each sequence starts, and the end
    cu: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    def chunks(self) -> Iterator[slice]:
        """Rows, as many at a time as the scratch holds."""
        most = max(len(heads) for _, heads, _ in heads_of_groups(self))
        one = self.q.shape[0] * most * self.k.shape[1] * self.dtype.itemsize
        step = max(1, _SCRATCH // (3 * one))
        for row in range(self.start, self.stop, step):
            yield slice(row, min(row + step, self.stop))

    def visible(self, rows: slice, at: torch.Tensor, seq: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]``: which columns, that end at ``at``, are not ahead of the query."""
        t, own = self.query_at[rows, None], self.query_seq[rows, None]
        return (at[None] <= t) & (seq[None] == own)


#: ``weights(kv_head, heads in the group, rows) -> [B, heads, rows, N]``
Branch = Callable[[int, list[int], slice], torch.Tensor]


def problem_of(q, k, scale, cu_seqlens, heads, rows) -> Problem:
    _check_qk(q, k)
    m, n = q.shape[1], k.shape[1]
    start, stop = _rows(rows, q)
    key_at = torch.arange(n, device=q.device)
    if cu_seqlens is None:
        cu, key_seq = (0, n), torch.zeros_like(key_at)
        query_at, query_seq = key_at[n - m :], key_seq[n - m :]
    else:
        cu_seqlens, _ = check_offsets(cu_seqlens, q, k)
        cu = tuple(cu_seqlens.tolist())
        key_seq = torch.searchsorted(cu_seqlens.long(), key_at, right=True) - 1
        query_at = key_at = key_at - cu_seqlens.long()[key_seq]
        query_seq = key_seq
    return Problem(
        q, k, check_scale(scale, q.shape[3]), _heads(heads, q), start, stop, query_at, query_seq,
        key_at, key_seq, cu,
    )  # fmt: skip


def _check_qk(q, k) -> None:
    for name, x in (("q", q), ("k", k)):
        check_tensor(name, x, 4, "[batch, seq_len, heads, head_dim]")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ArgumentError(
            "k.shape", tuple(k.shape), f"does not go with q's {tuple(q.shape)}.",
            "Pass the same batch and head_dim.",
        )  # fmt: skip
    if k.dtype != q.dtype or not q.is_floating_point():
        raise ArgumentError(
            "k.dtype", str(k.dtype).removeprefix("torch."),
            f"does not go with q's {str(q.dtype).removeprefix('torch.')}.",
            "Pass the q and k of the call, of one floating dtype.",
        )  # fmt: skip
    check_heads(q, k)
    if q.shape[1] > k.shape[1]:
        raise ArgumentError(
            "q.shape", tuple(q.shape), f"has more queries than there are keys, {k.shape[1]}.",
            "Pass at most as many queries as keys; the last ones stand beside each other.",
        )  # fmt: skip


def _heads(heads, q) -> list[int]:
    if heads is None:
        return list(range(q.shape[2]))
    chosen = [heads] if isinstance(heads, int) else [int(h) for h in heads]
    wrong = [h for h in chosen if not 0 <= h < q.shape[2]]
    if wrong or not chosen:
        raise ArgumentError(
            "heads", heads, "names no query head.", f"Use numbers from 0 to {q.shape[2] - 1}."
        )
    return chosen


def _rows(rows, q) -> tuple[int, int]:
    if rows is None:
        return 0, q.shape[1]
    if not isinstance(rows, slice):
        raise ArgumentError("rows", rows, "is not a slice.", "Pass slice(first, last + 1).")
    start, stop, step = rows.indices(q.shape[1])
    if step != 1 or stop <= start:
        raise ArgumentError(
            "rows", rows, f"is empty or has a step, of {q.shape[1]} queries.",
            "Pass slice(first, last + 1).",
        )  # fmt: skip
    return start, stop


def _check_lse(lse, q, argument: str = "lse") -> None:
    b, m, hq, _ = q.shape
    if not isinstance(lse, torch.Tensor):
        raise ArgumentError(argument, type(lse).__name__, "is not a tensor.", "Pass [B, HQ, M].")
    if tuple(lse.shape) != (b, hq, m):
        turned = tuple(lse.shape) == (b, m, hq)
        raise ArgumentError(
            f"{argument}.shape", tuple(lse.shape),
            "is [B, M, HQ]: queries before heads." if turned else "does not fit q.",
            f"Transpose it: {argument}.transpose(1, 2)." if turned else
            f"Pass [B, HQ, M] = {(b, hq, m)}.",
        )  # fmt: skip


def _used(indices, counts, problem: Problem, block_size: int) -> torch.Tensor:
    """The chosen blocks, −1 also in slots beyond ``counts``."""
    q, k = problem.q, problem.k
    cu = None if len(problem.cu) == 2 else torch.tensor(problem.cu, device=q.device)
    indices = check_block_indices(indices, q, k, block_size, cu)
    counts = check_block_counts(counts, indices, q)
    if counts is None:
        return indices
    slot = torch.arange(indices.shape[3], device=indices.device)
    unused = slot >= (counts[..., None] if isinstance(counts, torch.Tensor) else counts)
    return indices.masked_fill(unused, -1)


# -- the branches ----------------------------------------------------------------------------------


@contextmanager
def full_float32() -> Iterator[None]:
    """Products in float32, whatever the program has set: TF32 would cost three digits of P."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _probabilities(problem: Problem, lse, keys, kv, heads, rows, visible) -> torch.Tensor:
    r"""``[B, heads, rows, columns]``: :math:`e^{S - \mathrm{LSE}}` where visible, else 0.

    ``keys`` is ``[B, columns, H, D]``; ``visible`` is ``[rows, columns]`` or
    ``[B, rows, columns]``.
    """
    q = problem.q[:, rows, heads].to(problem.dtype)  # [B, rows, heads, D]
    p = torch.einsum("brhd,bcd->bhrc", q, keys[:, :, kv].to(problem.dtype)).mul_(problem.scale)
    p.sub_(lse[:, heads, rows, None].to(problem.dtype)).exp_()
    hidden = ~visible if visible.dim() == 2 else ~visible[:, None]
    return p.masked_fill_(hidden, 0.0)


def _branch(
    problem: Problem, lse, *, block_size, block_indices=None, block_counts=None,
    window_size=None, stride=None, k_cmp=None, spread=None, argument="lse",
) -> Branch:  # fmt: skip
    _check_lse(lse, problem.q, argument)
    if window_size is not None:
        if block_indices is not None:
            raise ArgumentError(
                "window_size", window_size, "and block_indices are two branches.",
                "Pass one of them, and neither for the compressed branch.",
            )  # fmt: skip
        return _window(problem, lse, window_size)
    block_size = check_positive_int("block_size", block_size)
    if block_indices is not None:
        chosen = _used(block_indices, block_counts, problem, block_size)
        return _selection(problem, lse, chosen, block_size)
    return _compression(problem, lse, block_size, stride, k_cmp, spread)


def _window(problem: Problem, lse, window_size) -> Branch:
    window_size = check_window(window_size)

    def weights(kv: int, heads: list[int], rows: slice) -> torch.Tensor:
        near = problem.key_at[None] > problem.query_at[rows, None] - window_size
        seen = problem.visible(rows, problem.key_at, problem.key_seq) & near
        return _probabilities(problem, lse, problem.k, kv, heads, rows, seen)

    return weights


def _selection(problem: Problem, lse, block_indices, block_size: int) -> Branch:
    block_of = problem.key_at // block_size  # [N], in the key's own sequence
    blocks = int(block_of.max()) + 1

    def weights(kv: int, heads: list[int], rows: slice) -> torch.Tensor:
        named = block_indices[:, rows, kv].long()  # [B, rows, S]
        chosen = torch.zeros(*named.shape[:2], blocks + 1, dtype=torch.bool, device=named.device)
        # A −1 lands in a column of its own, and a block named twice is chosen once.
        chosen.scatter_(2, torch.where(named < 0, blocks, named), True)
        seen = chosen[:, :, block_of] & problem.visible(rows, problem.key_at, problem.key_seq)
        return _probabilities(problem, lse, problem.k, kv, heads, rows, seen)

    return weights


def _compression(problem: Problem, lse, length: int, stride, k_cmp, spread) -> Branch:
    length, stride = check_lengths(length, stride, length)
    cu = torch.tensor(problem.cu, device=problem.q.device)
    if k_cmp is None:
        # in k's dtype: the branch saw the rounded means
        k_cmp = pool_mean(problem.k, length, stride, cu_seqlens=cu if len(cu) > 2 else None)
    first = compressed_bounds(cu, length, stride).long()
    total = int(first[-1])
    want = (problem.k.shape[0], total, *problem.k.shape[2:])
    if tuple(k_cmp.shape) != want:
        raise ArgumentError(
            "k_cmp.shape", tuple(k_cmp.shape), "does not fit.", f"Pass [B, C, H, D] = {want}."
        )
    number = torch.arange(total, device=cu.device)
    c_seq = torch.searchsorted(first, number, right=True) - 1
    last = (number - first[c_seq]) * stride + length - 1  # where each compressed block ends
    share = _share(spread, problem, length)  # [H, length]
    own_blocks = first.diff()[problem.key_seq]

    def weights(kv: int, heads: list[int], rows: slice) -> torch.Tensor:
        seen = problem.visible(rows, last, c_seq)
        p = _probabilities(problem, lse, k_cmp, kv, heads, rows, seen)
        # A column of zeros for the tokens that no block, or no further block, stands for.
        p = torch.nn.functional.pad(p, (0, 1))
        out = p.new_zeros(*p.shape[:3], problem.k.shape[1])
        for back in range(-(-length // stride)):
            own = problem.key_at // stride - back
            inside = problem.key_at - own * stride
            there = (own >= 0) & (own < own_blocks) & (inside < length)
            column = torch.where(there, first[problem.key_seq] + own, total)
            out += p[..., column] * share[kv, inside.clamp(max=length - 1)]
        return out

    return weights


def _share(spread, problem: Problem, length: int) -> torch.Tensor:
    heads = problem.k.shape[2]
    if spread is None:
        share = torch.full((), 1.0 / length, dtype=problem.dtype, device=problem.q.device)
        return share.expand(heads, length)
    if not isinstance(spread, torch.Tensor) or spread.shape not in ((length,), (heads, length)):
        shown = tuple(spread.shape) if isinstance(spread, torch.Tensor) else type(spread).__name__
        raise ArgumentError(
            "spread", shown, "does not fit.", f"Pass [{length}] or [{heads}, {length}]."
        )
    return spread.to(problem.dtype).expand(heads, length)


# -- putting them together -------------------------------------------------------------------------


def heads_of_groups(problem: Problem) -> Iterator[tuple[int, list[int], list[int]]]:
    """``(KV head, its query heads that are asked for, their places in the result)``."""
    for kv in range(problem.k.shape[2]):
        pairs = [(h, i) for i, h in enumerate(problem.heads) if h // problem.group == kv]
        if pairs:
            yield kv, [h for h, _ in pairs], [i for _, i in pairs]


def _assemble(problem: Problem, parts: Sequence[tuple[Branch, Any]]) -> torch.Tensor:
    """The sum of the branches' weights, each times its gate ``[B, M, HQ]`` if it has one."""
    q, n = problem.q, problem.k.shape[1]
    shape = (q.shape[0], len(problem.heads), problem.stop - problem.start, n)
    _check_memory(shape, problem)
    out = torch.zeros(shape, dtype=problem.dtype, device=q.device)
    with full_float32():
        for rows in problem.chunks():
            here = slice(rows.start - problem.start, rows.stop - problem.start)
            for kv, heads, places in heads_of_groups(problem):
                for branch, gate in parts:
                    w = branch(kv, heads, rows)
                    if gate is not None:
                        w *= gate[:, rows, heads].transpose(1, 2)[..., None].to(w.dtype)
                    out[:, places, here] += w
    return out


def _check_memory(shape: Sequence[int], problem: Problem) -> None:
    needed = math.prod(shape) * problem.dtype.itemsize
    free = free_memory(problem.q.device)
    if free is None or needed + _SCRATCH <= free:
        return
    one = needed // (shape[1] * shape[2])
    raise NotEnoughMemoryError(
        f"The attention weights {list(shape)} take {format_bytes(needed)} in "
        f"{str(problem.dtype).removeprefix('torch.')}, and {problem.q.device} has "
        f"{format_bytes(free)} free. Nothing was allocated. One query of one head takes "
        f"{format_bytes(one)}: ask for a few with heads=[0] and rows=slice(0, 1024)."
    )


def options_of(attn_weights, block_size, window_size, scale, cu_seqlens) -> dict[str, Any]:
    if not isinstance(attn_weights, Mapping):
        raise ArgumentError(
            "attn_weights", type(attn_weights).__name__, "is not a mapping.",
            "Pass what nsa_func(..., return_attn_weights=True) returned.",
        )  # fmt: skip
    held = attn_weights.get("options") or {}
    window = (attn_weights.get("sliding_window") or {}).get("window_size")
    given = {
        "block_size": (block_size, held.get("block_size")),
        "window_size": (window_size, window if window is not None else held.get("window_size")),
        "scale": (scale, held.get("scale")),
        "cu_seqlens": (cu_seqlens, held.get("cu_seqlens")),
    }
    kept = {name: held.get(name) for name in ("length", "stride", "precision")}
    return kept | {
        name: stored if asked is None else asked for name, (asked, stored) in given.items()
    }


def branches_of(problem, attn_weights, options, block_counts) -> Iterator[tuple[str, Branch]]:
    """The branches that ``attn_weights`` holds an LSE of."""
    for name in BRANCHES:
        entry = attn_weights.get(name) or {}
        lse = entry.get("lse")
        if lse is None:
            continue
        need = "window_size" if name == "sliding_window" else "block_size"
        if options[need] is None:
            raise ArgumentError(
                need, None, f"is not among attn_weights, and the {name} branch needs it.",
                "Pass the one of the call that made them.",
            )  # fmt: skip
        how: dict[str, Any] = {"block_size": options["block_size"]}
        if name == "compression":
            how = {"block_size": options["length"] or options["block_size"]}
            how |= {"stride": options["stride"]}
            how |= {what: entry.get(what) for what in ("k_cmp", "spread")}
        elif name == "sliding_window":
            how["window_size"] = options["window_size"]
        else:
            if entry.get("block_indices") is None:
                raise ArgumentError(
                    "attn_weights['selection']", sorted(entry), "has no block_indices.",
                    "Pass what nsa_func(..., return_attn_weights=True) returned.",
                )  # fmt: skip
            how |= {"block_indices": entry["block_indices"], "block_counts": block_counts}
        yield name, _branch(problem, lse, argument=f"attn_weights[{name!r}]['lse']", **how)


def gate_of(attn_weights, name: str, problem: Problem) -> torch.Tensor | None:
    """The branch's gate ``[B, M, HQ]``; None of a branch whose gate is None, which is off."""
    key = _GATES[name]
    gates = attn_weights.get("gating_weights") or {}
    gate = gates.get(key)
    if gate is None and key in gates:
        return None
    want = tuple(problem.q.shape[:3])
    if not isinstance(gate, torch.Tensor) or tuple(gate.shape) != want:
        shown = tuple(gate.shape) if isinstance(gate, torch.Tensor) else gate
        raise ArgumentError(
            f"attn_weights['gating_weights'][{key!r}]", shown, f"is no gate of the {name} branch.",
            f"It should be [B, M, HQ] = {want}, or None for a branch that is off.",
        )  # fmt: skip
    return gate


def gated(problem: Problem, attn_weights, found) -> list[tuple[Branch, torch.Tensor]]:
    """Branches with their gates; a branch that is off is left out."""
    parts = [(branch, gate_of(attn_weights, name, problem)) for name, branch in found]
    return [(branch, gate) for branch, gate in parts if gate is not None]
