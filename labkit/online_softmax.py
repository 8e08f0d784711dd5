r"""Softmax and attention without ever holding a whole row of scores.

Taught in chapter 07 (whether softmax can be computed before all scores are known).

A block of scores S and the values V behind it are summed up in three things per row:

.. math::
    m &= \max_j S_j                       && \text{the largest score so far} \\
    \ell &= \sum_j e^{S_j - m}            && \text{the softmax's denominator, relative to } m \\
    O &= \sum_j e^{S_j - m}\, V_j         && \text{the output, not yet divided by } \ell

Two such states of disjoint sets of keys merge into the state of their union:

.. math::
    m &= \max(m_a, m_b), \qquad \alpha_a = e^{m_a - m}, \qquad \alpha_b = e^{m_b - m} \\
    \ell &= \alpha_a \ell_a + \alpha_b \ell_b, \qquad O = \alpha_a O_a + \alpha_b O_b

The merge is associative in exact arithmetic, commutative to the bit, and has an identity
:math:`(-\infty, 0, 0)`, so blocks may come in any order and from anywhere.  It needs
:math:`d_v + 2` numbers per row, however long the row is.  Milakov and Gimelshein (2018) merge
:math:`(m, \ell)`, Rabe and Staats (2021) the output as well; Dao et al. (2022) made a GPU kernel
of it.

The guard for :math:`-\infty`: a row whose scores are all hidden has :math:`m = -\infty`, and
:math:`e^{-\infty - (-\infty)}` is NaN.  Wherever a maximum is subtracted, :math:`-\infty` is
replaced by 0 first; the exponentials are then :math:`e^{-\infty} = 0`, as they should be.

Imports downwards: errors, shapes.  Loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from labkit.errors import ArgumentError, check_positive_int
from labkit.shapes import Sizes, check_qkv, check_scale

__all__ = [
    "FinishStep",
    "State",
    "TileStep",
    "attention_tiles",
    "finish",
    "identity",
    "merge",
    "merge_outputs",
    "online_softmax",
    "overflows_above",
    "running_normalizer",
    "safe_softmax",
    "stagnates_at",
    "tiled_attention",
    "unsafe_softmax",
    "update",
]


# -- softmax of one row, three ways ------------------------------------------------------
def unsafe_softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax as its definition reads: eˣ over the sum of eˣ, in the dtype of ``x``.

    Reads each score twice.  Overflows to NaN when a score is above
    :func:`overflows_above`; a row whose exponentials all underflow is 0/0.

    ``x``: ``[…, keys]``, any float dtype; the result likewise.
    """
    e = torch.exp(x)
    return e / e.sum(dim=-1, keepdim=True)


def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax with the row's maximum subtracted first: no exponential is above 1.

    Reads each score three times: for the maximum, for the sum, for the result.
    A row of −∞ gives 0, where ``torch.softmax`` gives NaN.  Shapes as :func:`unsafe_softmax`.
    """
    m = x.amax(dim=-1, keepdim=True)
    e = torch.exp(x - _finite(m))
    return e / _nonzero(e.sum(dim=-1, keepdim=True))


def online_softmax(x: torch.Tensor, *, block: int = 1) -> torch.Tensor:
    """Safe softmax that finds maximum and sum in one pass, ``block`` scores at a time.

    Reads each score twice: once for (m, ℓ), once for the result (Milakov and Gimelshein
    2018, algorithm 3).  Computes in the dtype of ``x``.  Shapes as :func:`unsafe_softmax`.

    Raises
    ------
    ArgumentError
        if ``block`` is not a positive integer.
    """
    m, total = None, None
    for m, total in running_normalizer(x, block=block):  # noqa: B007 - the last one counts
        pass
    return torch.exp(x - _finite(m)[..., None]) / _nonzero(total)[..., None]


def running_normalizer(
    x: torch.Tensor, *, block: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(m, ℓ) of the scores read so far, after each block: ``[…]`` each, in the dtype of ``x``.

    ``x``: ``[…, keys]`` with at least one key.
    """
    block = check_positive_int("block", block)
    if x.dim() < 1 or 0 in x.shape:
        raise ArgumentError("x.shape", tuple(x.shape), "has no scores.", "Pass […, keys ≥ 1].")
    m = x.new_full(x.shape[:-1], -math.inf)
    total = x.new_zeros(x.shape[:-1])
    for part in x.split(block, dim=-1):
        new = torch.maximum(m, part.amax(dim=-1))
        base = _finite(new)
        total = torch.exp(m - base) * total + torch.exp(part - base[..., None]).sum(dim=-1)
        m = new
        yield m, total


def _finite(m: torch.Tensor) -> torch.Tensor:
    # What to subtract: 0 where nothing was seen, since −∞ − (−∞) is NaN.  NaN stays NaN.
    return torch.where(m == -math.inf, torch.zeros_like(m), m)


def _nonzero(total: torch.Tensor) -> torch.Tensor:
    # What to divide by: 1 where nothing was seen.  A row that saw a score has ℓ ≥ 1 or so.
    return torch.where(total == 0, torch.ones_like(total), total)


# -- the state -----------------------------------------------------------------------------
@dataclass(frozen=True)
class State:
    """What is known of some rows after some of their keys: dv + 2 numbers per row.

    Attributes
    ----------
    m : torch.Tensor
        ``[…, rows]``: largest score so far; −∞ before the first.
    l : torch.Tensor
        ``[…, rows]``: Σ exp(S − m), the denominator.
    O : torch.Tensor
        ``[…, rows, head_dim_v]``: Σ exp(S − m)·V, not divided by ``l`` yet.
    """

    m: torch.Tensor
    l: torch.Tensor
    O: torch.Tensor


def identity(
    *rows: int,
    head_dim_v: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> State:
    """The state of no keys at all: (−∞, 0, 0).  Merging it with a state changes nothing.

    >>> identity(2, head_dim_v=3).m
    tensor([-inf, -inf])
    """
    like = {"dtype": dtype, "device": device}
    return State(
        torch.full(rows, -math.inf, **like),
        torch.zeros(rows, **like),
        torch.zeros(*rows, head_dim_v, **like),
    )


def update(
    state: State,
    S: torch.Tensor,
    V: torch.Tensor,
    *,
    p_dtype: torch.dtype | None = None,
) -> State:
    r"""Take one block of scores and values into the state.

    .. math::
        m' &= \max(m, \max_j S_j), \qquad \alpha = e^{m - m'}, \qquad P_j = e^{S_j - m'} \\
        \ell' &= \alpha\,\ell + \sum_j P_j, \qquad O' = \alpha\,O + \sum_j P_j V_j

    Parameters
    ----------
    state : State
        rows ``[…, rows]``.
    S : torch.Tensor
        ``[…, rows, keys]`` scaled scores in the state's dtype, −∞ where hidden; keys ≥ 1.
    V : torch.Tensor
        ``[…, keys, head_dim_v]``, the values behind those keys, any float dtype.
    p_dtype : torch.dtype
        what P is rounded to before it is multiplied by V; tensor cores need the dtype of V.
        The sum ℓ is taken before the rounding.  None: the state's dtype.

    Notes
    -----
    m is detached: it moves ℓ and O and the result of :func:`finish` not at all, so its
    derivative is exactly 0, and autograd need not find that out through a maximum.
    """
    m = torch.maximum(state.m, S.detach().amax(dim=-1))
    base = _finite(m)
    alpha = torch.exp(state.m - base)  # 0 for the first block: e^−∞
    P = torch.exp(S - base[..., None])
    total = alpha * state.l + P.sum(dim=-1)
    P = P if p_dtype is None else P.to(p_dtype).to(P.dtype)
    return State(m, total, alpha[..., None] * state.O + P @ V.to(P.dtype))


def merge(a: State, b: State) -> State:
    """The state of the union of two disjoint sets of keys; see the module's equations.

    ``merge(a, b)`` and ``merge(b, a)`` agree to the bit; brackets may be moved up to rounding.
    Shapes and dtypes of ``a`` and ``b`` must agree; the result has the same.
    """
    m = torch.maximum(a.m, b.m)
    base = _finite(m)
    of_a, of_b = torch.exp(a.m - base), torch.exp(b.m - base)
    return State(
        m,
        of_a * a.l + of_b * b.l,
        of_a[..., None] * a.O + of_b[..., None] * b.O,
    )


def finish(state: State) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The output and the log-sum-exp of the keys seen: O/ℓ and m + log ℓ.

    Returns
    -------
    tuple
        O ``[…, rows, head_dim_v]`` and LSE ``[…, rows]``, natural logarithm.  A row that saw
        no key has O = 0 and LSE = −∞, with zero gradients.
    """
    nothing = state.l == 0
    total = _nonzero(state.l)
    lse = torch.where(nothing, state.m, _finite(state.m) + torch.log(total))
    return state.O / total[..., None], lse


def merge_outputs(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Merge finished pieces: attention over disjoint sets of keys, each with its LSE.

    .. math::
        \mathrm{LSE} = \log \sum_s e^{\mathrm{LSE}_s}, \qquad
        O = \sum_s e^{\mathrm{LSE}_s - \mathrm{LSE}}\, O_s

    A finished piece is a state with m = LSE and ℓ = 1, so this is :func:`merge` of all of
    them.  Split-K decoding merges the pieces of one GPU so, ring attention those of many.

    Parameters
    ----------
    outputs : torch.Tensor
        ``[pieces, …, rows, head_dim_v]``, each divided by its own sum.
    lses : torch.Tensor
        ``[pieces, …, rows]``, −∞ for a piece without visible keys (its output is 0).

    Returns
    -------
    tuple
        O ``[…, rows, head_dim_v]`` and LSE ``[…, rows]``; 0 and −∞ where no piece saw a key.
    """
    # The piece that saw no key has ℓ = 0, not 1; e^(−∞ − m) makes it so.
    m = lses.detach().amax(dim=0)
    weights = torch.exp(lses - _finite(m))
    return finish(State(m, weights.sum(dim=0), (weights[..., None] * outputs).sum(dim=0)))


# -- attention by tiles --------------------------------------------------------------------
@dataclass(frozen=True)
class TileStep:
    """One tile taken into the state: what a figure needs to show the algorithm.

    Attributes
    ----------
    i, j : block of queries and block of keys.
    rows, keys : which queries and which keys those are.
    S : ``[batch, heads, rows, keys]``, scaled, −∞ where hidden: the only scores in existence.
    before, after : the state of these rows, ``[batch, heads, rows]`` …
    alpha : ``[batch, heads, rows]``: the factor by which the old ℓ and O were multiplied.
    """

    i: int
    j: int
    rows: slice
    keys: slice
    S: torch.Tensor = field(repr=False)
    before: State = field(repr=False)
    after: State = field(repr=False)
    alpha: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class FinishStep:
    """A block of queries has met its last key: O is divided by ℓ, and LSE written.

    Attributes
    ----------
    i, rows : block of queries.
    before : the state of these rows.
    O, LSE : ``[batch, heads, rows, head_dim_v]`` and ``[batch, heads, rows]``.
    """

    i: int
    rows: slice
    before: State = field(repr=False)
    O: torch.Tensor = field(repr=False)
    LSE: torch.Tensor = field(repr=False)


def attention_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_m: int = 64,
    block_n: int = 64,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    accumulate: torch.dtype | None = None,
    p_dtype: torch.dtype | None = None,
    order: Sequence[int] | None = None,
) -> Iterator[TileStep | FinishStep]:
    """Attention tile by tile, as a generator of what it does.

    For each block of queries: a :class:`TileStep` for each block of keys that any of them
    sees, then a :class:`FinishStep`.  Arguments as :func:`tiled_attention`.
    """
    sizes = check_qkv(q, k, v)
    scale = check_scale(scale, sizes.head_dim)
    block_m = check_positive_int("block_m", block_m)
    block_n = check_positive_int("block_n", block_n)
    window = None if window is None else check_positive_int("window", window)
    _check_float("accumulate", accumulate)
    _check_float("p_dtype", p_dtype)
    # 16-bit sums would stagnate: keep at least float32, as a kernel's accumulators are
    wide = accumulate or torch.promote_types(q.dtype, torch.float32)
    row_blocks = _blocks(sizes.seq_len_q, block_m)
    key_blocks = _blocks(sizes.seq_len_k, block_n)
    # a function that returns a generator: what is wrong is said at the call, not at the first step
    return _tiles(
        q, k, v, sizes, scale, row_blocks, key_blocks, _order(order, len(key_blocks)),
        causal, window, wide, p_dtype,
    )  # fmt: skip


def _tiles(
    q, k, v, sizes, scale, row_blocks, key_blocks, order, causal, window, wide, p_dtype
) -> Iterator[TileStep | FinishStep]:
    for i, rows in enumerate(row_blocks):
        Q = q[:, :, rows].to(wide)
        state = identity(
            sizes.batch, sizes.heads, Q.shape[2],
            head_dim_v=sizes.head_dim_v, dtype=wide, device=q.device,
        )  # fmt: skip
        for j in order:
            keys = key_blocks[j]
            if not _any_visible(sizes, rows, keys, causal, window):
                continue  # skipped: neither K nor V of this tile is read
            K = _for_query_heads(k[:, :, keys], sizes.group).to(wide)
            V = _for_query_heads(v[:, :, keys], sizes.group).to(wide)

            S = (Q @ K.mT) * scale
            hidden = _hidden(sizes, rows, keys, causal, window, q.device)
            if hidden is not None:
                S = S.masked_fill(hidden, -math.inf)
            before, state = state, update(state, S, V, p_dtype=p_dtype)
            yield TileStep(
                i, j, rows, keys, S, before, state, torch.exp(before.m - _finite(state.m))
            )
        O, lse = finish(state)
        yield FinishStep(i, rows, state, O, lse)


def _for_query_heads(tile: torch.Tensor, group: int) -> torch.Tensor:
    # A KV head serves its whole group: the tile is repeated, K and V are not.
    return tile if group == 1 else tile.repeat_interleave(group, dim=1)


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def _check_float(argument: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(
            argument, dtype, "is no float dtype.", "Pass torch.float32, torch.float16, …, or None."
        )


def _order(order: Sequence[int] | None, blocks: int) -> list[int]:
    order = list(range(blocks)) if order is None else [int(j) for j in order]
    if sorted(order) != list(range(blocks)):
        raise ArgumentError(
            "order", order, f"is not an order of the {blocks} blocks of keys.",
            f"Pass each of 0 … {blocks - 1} once.",
        )  # fmt: skip
    return order


# Query i may see keys in first(i) ≤ j ≤ last(i).  off aligns the last query with the last key.
def _first(sizes: Sizes, i: int, window: int | None) -> int:
    off = sizes.seq_len_k - sizes.seq_len_q
    return 0 if window is None else max(0, i + off - window + 1)


def _last(sizes: Sizes, i: int, causal: bool, window: int | None) -> int:
    off, end = sizes.seq_len_k - sizes.seq_len_q, sizes.seq_len_k - 1
    if causal:
        return min(end, i + off)
    return end if window is None else min(end, i + off + window - 1)


def _any_visible(sizes: Sizes, rows: slice, keys: slice, causal: bool, window: int | None) -> bool:
    # first and last grow with i, so the last row sees furthest and the first row longest back;
    # the rows between them leave no gap.
    return (
        _last(sizes, rows.stop - 1, causal, window) >= keys.start
        and _first(sizes, rows.start, window) < keys.stop
    )


def _hidden(
    sizes: Sizes, rows: slice, keys: slice, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """``[rows, keys]``, True where a score does not count; None for a tile that is all visible."""
    if _last(sizes, rows.start, causal, window) >= keys.stop - 1 and (
        _first(sizes, rows.stop - 1, window) <= keys.start
    ):
        return None
    off = sizes.seq_len_k - sizes.seq_len_q
    i = torch.arange(rows.start, rows.stop, device=device)[:, None] + off
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
    hidden = (j > i) if causal else torch.zeros_like(j > i)
    if window is not None:
        hidden = hidden | (j <= i - window)
        if not causal:
            hidden = hidden | (j >= i + window)
    return hidden


def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_m: int = 64,
    block_n: int = 64,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    accumulate: torch.dtype | None = None,
    p_dtype: torch.dtype | None = None,
    order: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention that holds one tile of S at a time, in plain PyTorch.

    It is FlashAttention's arithmetic without its speed: every operation on a tile is a
    kernel launch of its own, and autograd, if it records, keeps every tile.

    Parameters
    ----------
    q : torch.Tensor
        ``[batch, heads, seq_len_q, head_dim]``, float16, bfloat16, float32 or float64.
    k : torch.Tensor
        ``[batch, kv_heads, seq_len_k, head_dim]``; ``kv_heads`` divides ``heads``.
    v : torch.Tensor
        ``[batch, kv_heads, seq_len_k, head_dim_v]``.
    block_m, block_n : int
        queries and keys in a tile; need not divide the lengths.
    causal : bool
        query i sees key j when j ≤ i + Nk − Nq.
    scale : float
        multiplies QKᵀ; default 1/√head_dim.
    window : int
        with ``causal`` the last ``window`` keys, its own included; without,
        keys nearer than ``window`` to i + Nk − Nq.
    return_lse : bool
        also return LSE.
    accumulate : torch.dtype
        dtype of S, P, m, ℓ and O on the way; default float32, float64 for float64 inputs.
        Products inside a tile are taken in it as well.
    p_dtype : torch.dtype
        what P is rounded to before PV; default ``accumulate``.  A kernel on tensor cores
        uses the dtype of v.
    order : list of int
        in which order blocks of keys are read; default ascending.

    Returns
    -------
    torch.Tensor or tuple
        O ``[batch, heads, seq_len_q, head_dim_v]`` in q's dtype, or ``(O, LSE)`` with LSE
        ``[batch, heads, seq_len_q]`` in the accumulating dtype.  A row that sees no key has
        O = 0 and LSE = −∞.

    Raises
    ------
    ArgumentError
        if shapes, dtypes, devices or head counts do not go together, or a block, window or
        order cannot be used.

    Notes
    -----
    A NaN in a row of q stays in that row of O.  A NaN in v reaches the rows that read its
    tile, and no others: skipped tiles are not read.
    """
    steps = attention_tiles(
        q, k, v, block_m=block_m, block_n=block_n, causal=causal, scale=scale, window=window,
        accumulate=accumulate, p_dtype=p_dtype, order=order,
    )  # fmt: skip
    outputs, lses = [], []
    for step in steps:
        if isinstance(step, FinishStep):
            outputs.append(step.O.to(q.dtype))
            lses.append(step.LSE)
    O = torch.cat(outputs, dim=2)
    return (O, torch.cat(lses, dim=2)) if return_lse else O


# -- what low precision does to it -----------------------------------------------------------
def overflows_above(dtype: torch.dtype, terms: int = 1) -> float:
    """The score above which ``terms`` equal exponentials no longer add up in ``dtype``.

    >>> round(overflows_above(torch.float16), 2), round(overflows_above(torch.float32), 1)
    (11.09, 88.7)
    """
    terms = check_positive_int("terms", terms)
    return math.log(torch.finfo(dtype).max) - math.log(terms)


def stagnates_at(dtype: torch.dtype, step: float = 1.0) -> float:
    """The sum at which adding ``step`` once more changes nothing, by trying it in ``dtype``.

    A sum of p bits cannot hold both itself and a term 2ᵖ times smaller: it stays where it is.
    For float16 (p = 11) a running sum of ones stops at 2048, for bfloat16 (p = 8) at 256.
    Infinity if the sum overflows before it stops.

    Raises
    ------
    ArgumentError
        if ``step`` is not a power of two that ``dtype`` holds exactly.
    """
    one = torch.tensor(step, dtype=dtype)
    if not (step > 0 and math.frexp(step)[0] == 0.5 and one.item() == step):
        raise ArgumentError("step", step, "is not a power of two here.", "Pass 1, 2, 4, …, 64.")
    total = one.clone()
    # Below a power of two the sums are exact multiples of step, so only powers need trying.
    while torch.isfinite(total) and (total + one).item() != total.item():
        total = total * 2
    return total.item()
