r"""Native Sparse Attention in plain PyTorch, written to be read.

Taught in chapter 12 (how NSA chooses what to read).  Three branches look at the same past:

.. math::
    o_t = g^{cmp}_t \, o^{cmp}_t + g^{slc}_t \, o^{slc}_t + g^{swa}_t \, o^{swa}_t

**Compression** attends to one pooled key for each block of tokens (``_compressed``).  Its
probabilities say which blocks matter (``_importance``), and the best of them are chosen
(``_top_blocks``).  **Selection** attends to every token of the chosen blocks (``_selected``),
the **window** to the latest tokens (``_window``).

The public names, their arguments and their order are those of the code that the source notes
analyse; ``forced=(0, 1)`` chooses as that code does.  ``semantics.py`` states every choice.

Everything runs in the dtype of q, and autograd differentiates it.  The probabilities and the LSE
are taken in float32, or in float64 for float64.  Nothing here is fast: a selected key is copied
for each query that reads it, which is what the kernels of chapter 13 avoid.

Loads torch.  Imports downwards: errors, nsa.semantics, nsa.checks, nsa.pooling, nsa.half_rate.
"""

from __future__ import annotations

import torch

from labkit.errors import ArgumentError, check_positive_int
from labkit.nsa.checks import (
    check_block_counts,
    check_block_indices,
    check_lengths,
    check_offsets,
    check_tensor,
    check_window,
)
from labkit.nsa.half_rate import check_half_rate, copy_even_rows, spread
from labkit.nsa.pooling import overlap_weights, pool_mean
from labkit.nsa.semantics import FORCED, check_forced

__all__ = [
    "naive_nsa",
    "naive_nsa_compression",
    "naive_nsa_compression_varlen",
    "naive_nsa_with_compression",
]

# Selected keys and values that may be copied at once, in elements: 2 GiB of float32.
_AT_ONCE = 2**29


def naive_nsa(
    q,
    k,
    v,
    g_slc,
    g_swa,
    block_indices,
    block_counts=None,
    block_size=64,
    window_size=0,
    scale=None,
    cu_seqlens=None,
    head_first=False,
    *,
    half_rate=False,
    queries_at_once=None,
):
    r"""Selection and window: :math:`g^{slc} o^{slc} + g^{swa} o^{swa}` for blocks given.

    Parameters
    ----------
    q : ``[B, M, HQ, D]``, any float dtype.
    k, v : ``[B, N, H, D]`` and ``[B, N, H, V]``; H divides HQ, M ≤ N.
    g_slc, g_swa : ``[B, M, HQ]``, any real numbers; None turns the branch off.
    block_indices : ``[B, M, H, S]``, any integer dtype: blocks of the own sequence, −1 unused.
    block_counts : how many of the S slots are read: None (all), an int, or ``[B, M, H]``.
    block_size : tokens of a block.
    window_size : W ≥ 0 latest keys, the own one among them; 0 turns the branch off.
    scale : multiplies QKᵀ; D^(−1/2) unless given.
    cu_seqlens : ``[sequences + 1]`` integers, with B = 1 and M = N.
    head_first : all tensors, block_indices and the result too, have axes 1 and 2 swapped.
    half_rate : compute even positions and copy each to the odd one after it (chapter 15).
    queries_at_once : rows of one step of the loop.  1 is the loop that the source notes
        analyse; None takes as many as keep the copies of keys and values of a step under 2 GiB in
        float32.

    Returns
    -------
    torch.Tensor
        ``[B, M, HQ, V]`` in the dtype of q.

    Raises
    ------
    ArgumentError
        for shapes that do not go together, a block that does not exist, a count above S, a
        negative window, or bounds that are not those of q's sequences.
    """
    q, k, v, g_slc, g_swa, block_indices, block_counts = _heads_inside(
        head_first, q, k, v, g_slc, g_swa, block_indices, block_counts
    )
    scale = _check(q, k, v, scale, cu_seqlens, g_slc=g_slc, g_swa=g_swa)
    check_positive_int("block_size", block_size)
    check_block_indices(block_indices, q, k, block_size, cu_seqlens)
    check_block_counts(block_counts, block_indices, q)
    window_size = check_window(window_size)
    if half_rate:
        check_half_rate(q.shape[1], k.shape[1])

    def one_sequence(q, k, v, g_slc, g_swa, block_indices, block_counts):
        m, at, stands = q.shape[1], _positions(q, k), _stands(q, k)
        if half_rate:
            rows = [q, g_slc, g_swa, block_indices, block_counts]
            q, g_slc, g_swa, block_indices, block_counts = (_even(x) for x in rows)
            at, stands = at[::2], stands[::2]
        o = q.new_zeros(*q.shape[:3], v.shape[-1])
        if g_slc is not None:
            o_slc, _ = _selected(
                q, k, v, block_indices, block_counts=block_counts, block_size=block_size,
                scale=scale, at=at, queries_at_once=queries_at_once,
            )  # fmt: skip
            o = o + g_slc[..., None] * o_slc
        if g_swa is not None and window_size > 0:
            o_swa, _ = _window(
                q, k, v, window_size=window_size, scale=scale, at=at, stands=stands,
                queries_at_once=queries_at_once,
            )  # fmt: skip
            o = o + g_swa[..., None] * o_swa
        return spread(o, m) if half_rate else o

    arguments = q, k, v, g_slc, g_swa, block_indices, block_counts
    o = _sequence_by_sequence(one_sequence, cu_seqlens, arguments).to(q.dtype)
    return _swap(o) if head_first else o


def naive_nsa_compression(
    q,
    k,
    v,
    g_cmp,
    block_counts,
    block_size,
    scale,
    head_first=False,
    *,
    forced=FORCED,
    half_rate=False,
    length=None,
    stride=None,
    compress=None,
):
    r"""Compression and the choice of blocks: ``(block_indices, g_cmp · o_cmp)``.

    Parameters
    ----------
    q, k, v, scale, head_first : as in :func:`naive_nsa`; ``scale`` may be None.
    g_cmp : ``[B, M, HQ]``; None turns the branch's output to 0, and blocks are chosen still.
    block_counts : blocks to choose, the forced ones among them: an int S, or ``[B, M, H]`` whose
        largest entry is S.
    block_size : tokens of a selection block (l′).
    forced : ``(initial, local)`` blocks that are always chosen.
    half_rate : rows of both results at odd positions are copies of the row before; everything is
        computed all the same, as the source notes have it (chapter 15).
    length, stride : l and d of the compression; ``block_size`` and ``length`` unless given.
    compress : ``compress(k, v) → (k_cmp, v_cmp)``, such as a ``TokenCompression``, whose own
        ``length`` and ``stride`` are then the defaults; None is the mean.

    Returns
    -------
    block_indices : ``[B, M, H, S]`` int32, ascending, then −1; no gradient passes through it.
    o_cmp : ``[B, M, HQ, V]`` in the dtype of q, gated.
    """
    return _compression(
        q, k, v, g_cmp, block_counts, block_size, scale, None, head_first,
        forced=forced, half_rate=half_rate, length=length, stride=stride, compress=compress,
    )  # fmt: skip


def naive_nsa_compression_varlen(
    q,
    k,
    v,
    g_cmp,
    block_counts,
    block_size,
    scale,
    cu_seqlens,
    head_first=False,
    *,
    forced=FORCED,
    half_rate=False,
    length=None,
    stride=None,
    compress=None,
):
    """:func:`naive_nsa_compression` for sequences one after another in a batch of one.

    ``cu_seqlens`` ``[sequences + 1]`` says where each begins.  Blocks are pooled, numbered and
    chosen within a sequence; one that is shorter than a block gets its forced blocks, and 0.
    """
    return _compression(
        q, k, v, g_cmp, block_counts, block_size, scale, cu_seqlens, head_first,
        forced=forced, half_rate=half_rate, length=length, stride=stride, compress=compress,
    )  # fmt: skip


def naive_nsa_with_compression(
    q,
    k,
    v,
    g_cmp,
    g_slc,
    g_swa,
    block_counts,
    block_size=64,
    window_size=0,
    scale=None,
    cu_seqlens=None,
    head_first=False,
    *,
    forced=FORCED,
    half_rate=False,
    length=None,
    stride=None,
    compress=None,
    queries_at_once=None,
    return_block_indices=False,
):
    """The whole layer: blocks are chosen by compression, and the three branches are summed.

    Arguments are those of :func:`naive_nsa` and :func:`naive_nsa_compression`.  Returns
    ``[B, M, HQ, V]``, and with ``return_block_indices`` also what was chosen.
    """
    block_indices, o_cmp = _compression(
        q, k, v, g_cmp, block_counts, block_size, scale, cu_seqlens, head_first,
        forced=forced, half_rate=half_rate, length=length, stride=stride, compress=compress,
    )  # fmt: skip
    # The slots after a row's count hold −1 already, so the counts need not be told again.
    o = o_cmp + naive_nsa(
        q, k, v, g_slc, g_swa, block_indices, None, block_size, window_size, scale, cu_seqlens,
        head_first, half_rate=half_rate, queries_at_once=queries_at_once,
    )  # fmt: skip
    return (o, block_indices) if return_block_indices else o


def _compression(
    q, k, v, g_cmp, block_counts, block_size, scale, cu_seqlens, head_first,
    *, forced, half_rate, length, stride, compress,
):  # fmt: skip
    q, k, v, g_cmp, block_counts = _heads_inside(head_first, q, k, v, g_cmp, block_counts)
    scale = _check(q, k, v, scale, cu_seqlens, g_cmp=g_cmp)
    check_positive_int("block_size", block_size)
    forced = check_forced(forced)
    if half_rate:
        check_half_rate(q.shape[1], k.shape[1])
    slots = _slots(block_counts, q, k)
    if compress is not None:
        length = getattr(compress, "length", None) if length is None else length
        stride = getattr(compress, "stride", None) if stride is None else stride
    length, stride = check_lengths(length, stride, block_size)

    def one_sequence(q, k, v, g_cmp, block_counts):
        n, at = k.shape[1], _positions(q, k)
        if compress is None:
            k_cmp, v_cmp = (pool_mean(x, length, stride) for x in (k, v))
        else:
            k_cmp, v_cmp = compress(k, v)
        o, _, p = _compressed(q, k_cmp, v_cmp, length=length, stride=stride, scale=scale, at=at)
        o = torch.zeros_like(o) if g_cmp is None else g_cmp[..., None] * o
        scores = _importance(p.detach(), n, length=length, stride=stride, block_size=block_size)
        chosen = _top_blocks(
            scores, at, slots=slots, block_counts=block_counts, block_size=block_size,
            forced=forced,
        )  # fmt: skip
        if half_rate:
            chosen, o = copy_even_rows(chosen), copy_even_rows(o)
        return chosen, o

    counts = block_counts if isinstance(block_counts, torch.Tensor) else None
    chosen, o = _sequence_by_sequence(one_sequence, cu_seqlens, (q, k, v, g_cmp, counts))
    o = o.to(q.dtype)
    return (_swap(chosen), _swap(o)) if head_first else (chosen, o)


# -- one branch at a time: no gates, one sequence length, [B, M, HQ, D] --------------------


def _selected(
    q, k, v, block_indices, *, block_size, scale, block_counts=None, at=None, queries_at_once=None
):
    """Attention to the tokens of the chosen blocks: o ``[B, M, HQ, V]``, LSE ``[B, HQ, M]``.

    ``at`` ``[M]`` holds the position of each query; the last of them stand beside the last keys
    unless it is given.
    """
    batch, n, heads = k.shape[:3]
    at = _positions(q, k) if at is None else at
    named = _named_once(block_indices, block_counts)
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(heads, device=q.device)[None, None, :, None]
    place = torch.arange(block_size, device=q.device)

    def rows(q, at, blocks):
        tokens = (blocks[..., None] * block_size + place).flatten(-2)  # [B, m, H, S·l′]
        seen = (tokens >= 0) & (tokens <= at[:, None, None])
        tokens = tokens.clamp(0, n - 1)
        # What is not seen is 0 and not only weighted with 0: a NaN there must not come through.
        k_chosen = k[b, tokens, h].masked_fill(~seen[..., None], 0)  # [B, m, H, S·l′, D]
        v_chosen = v[b, tokens, h].masked_fill(~seen[..., None], 0)
        s = scale * torch.einsum("bmhgd,bmhnd->bmhgn", _grouped(q, heads), k_chosen)
        p, lse = _softmax(s, seen[:, :, :, None])
        o = torch.einsum("bmhgn,bmhnv->bmhgv", p.to(v.dtype), v_chosen)
        return o.flatten(2, 3), lse.flatten(2, 3)

    a_row = batch * heads * named.shape[-1] * block_size * (k.shape[-1] + v.shape[-1])
    step = queries_at_once or max(1, _AT_ONCE // max(1, a_row))
    parts = [
        rows(q[:, i : i + step], at[i : i + step], named[:, i : i + step])
        for i in range(0, q.shape[1], step)
    ]
    return torch.cat([o for o, _ in parts], 1), torch.cat([x for _, x in parts], 1).mT


def _window(q, k, v, *, window_size, scale, at=None, stands=None, queries_at_once=None):
    """Attention to the W latest keys: o ``[B, M, HQ, V]``, LSE ``[B, HQ, M]``.

    ``stands`` is what ``at`` holds as a range of Python's: slices need numbers, and asking the
    tensor for them would wait for the device and end a compiled graph.
    """
    heads = k.shape[2]
    if at is None:
        at, stands = _positions(q, k), _stands(q, k)
    parts = []
    step = queries_at_once or 512
    for i in range(0, q.shape[1], step):
        now = at[i : i + step]
        # Of all keys only those that some row of this step sees.
        first, last = max(0, stands[i] - window_size + 1), stands[i : i + step][-1] + 1
        keys = torch.arange(first, last, device=q.device)
        seen = (keys <= now[:, None]) & (keys > now[:, None] - window_size)  # [m, keys]
        q_rows = _grouped(q[:, i : i + step], heads)
        s = scale * torch.einsum("bmhgd,bnhd->bmhgn", q_rows, k[:, first:last])
        p, lse = _softmax(s, seen[:, None, None])
        o = torch.einsum("bmhgn,bnhv->bmhgv", p.to(v.dtype), v[:, first:last])
        parts.append((o.flatten(2, 3), lse.flatten(2, 3)))
    return torch.cat([o for o, _ in parts], 1), torch.cat([x for _, x in parts], 1).mT


def _compressed(q, k_cmp, v_cmp, *, length, stride, scale, at):
    """Attention to compressed keys whose blocks are complete at the query's position.

    Returns o ``[B, M, HQ, V]``, LSE ``[B, HQ, M]`` and p ``[B, M, H, G, C]``.
    """
    heads, count = k_cmp.shape[2], k_cmp.shape[1]
    last = torch.arange(count, device=q.device) * stride + length - 1
    seen = last <= at[:, None]  # [M, C]
    s = scale * torch.einsum("bmhgd,bchd->bmhgc", _grouped(q, heads), k_cmp)
    p, lse = _softmax(s, seen[:, None, None])
    o = torch.einsum("bmhgc,bchv->bmhgv", p.to(v_cmp.dtype), v_cmp)
    return o.flatten(2, 3), lse.flatten(2, 3).mT, p


# -- which blocks ---------------------------------------------------------------------------


def _importance(p, n, *, length, stride, block_size):
    """How much each selection block matters to a group: ``[B, M, H, blocks]``.

    p ``[B, M, H, G, C]``: probabilities of the compressed keys of a sequence of n tokens.
    """
    weights = overlap_weights(
        n, length=length, stride=stride, block_size=block_size, dtype=p.dtype, device=p.device
    )
    return p.sum(3) @ weights


def _top_blocks(importance, at, *, slots, block_size, forced, block_counts=None):
    """The forced blocks and the most important others: ``[B, M, H, slots]`` int32.

    Ascending, then −1.  ``block_counts`` ``[B, M, H]`` may ask for fewer in some rows.
    """
    initial, local = forced
    block = torch.arange(importance.shape[-1], device=at.device)
    current = (at // block_size)[:, None, None]  # [M, 1, 1]
    back = current - block  # 0 for the own block, negative for the future
    # One number to sort by.  Importance is at most group · l/d; what is forced stands above it,
    # the current block first, then back to the local ones, then the initial ones.
    above = 1e6 + local + initial
    score = torch.where(block < initial, above - local - block, importance.double())
    score = torch.where(back < local, above - back, score)
    score = torch.where(back < 0, float("-inf"), score)
    # A stable sort keeps the lower block first among equals, which topk does not promise.
    best, order = score.sort(dim=-1, descending=True, stable=True)
    best, order = best[..., :slots], order[..., :slots]
    keep = best > float("-inf")
    if block_counts is not None:
        keep = keep & (torch.arange(order.shape[-1], device=at.device) < block_counts[..., None])
    unused = importance.shape[-1]
    order = torch.where(keep, order, unused).sort(dim=-1).values
    order = torch.where(order == unused, -1, order).to(torch.int32)
    return torch.nn.functional.pad(order, (0, slots - order.shape[-1]), value=-1)


def _named_once(block_indices, block_counts=None):
    """block_indices int64 with −1 for slots after the count and for blocks named before."""
    named = block_indices.long()
    slot = torch.arange(named.shape[-1], device=named.device)
    if block_counts is not None:
        counts = block_counts[..., None] if isinstance(block_counts, torch.Tensor) else block_counts
        named = named.masked_fill(slot >= counts, -1)
    before = slot[:, None] > slot[None, :]
    again = ((named[..., :, None] == named[..., None, :]) & before).any(-1)
    return named.masked_fill(again, -1)


# -- small parts ----------------------------------------------------------------------------


def _softmax(s, seen):
    """p and LSE over the last axis where ``seen``; 0 and −∞, without gradient, where nothing is."""
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    blind = ~seen.any(-1, keepdim=True)
    # A row of −∞ has no softmax: such rows get 0 before, and their result is masked after.
    s = s.masked_fill(~seen, float("-inf")).masked_fill(blind, 0.0)
    p = s.softmax(-1).masked_fill(blind, 0.0)
    lse = s.logsumexp(-1).masked_fill(blind[..., 0], float("-inf"))
    return p, lse


def _grouped(q, heads):
    """``[B, M, HQ, D]`` → ``[B, M, H, G, D]``: query head hq reads KV head hq // G."""
    return q.unflatten(2, (heads, -1))


def _positions(q, k):
    m, n = q.shape[1], k.shape[1]
    return torch.arange(n - m, n, device=q.device)


def _stands(q, k):
    m, n = q.shape[1], k.shape[1]
    return range(n - m, n)


def _even(x):
    return x[:, ::2] if isinstance(x, torch.Tensor) else x


def _swap(x):
    return x.transpose(1, 2)


def _heads_inside(head_first, *arguments):
    """[B, heads, rows, …] → [B, rows, heads, …] for every tensor, if that is how they come."""
    if not head_first:
        return arguments
    return tuple(_swap(x) if isinstance(x, torch.Tensor) else x for x in arguments)


def _sequence_by_sequence(function, cu_seqlens, arguments):
    """Call ``function`` on each sequence, and lay its results one after another again."""
    if cu_seqlens is None:
        return function(*arguments)
    results = []
    for start, end in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        if end > start:
            cut = (x[:, start:end] if isinstance(x, torch.Tensor) else x for x in arguments)
            results.append(function(*cut))
    if isinstance(results[0], tuple):
        return tuple(torch.cat(parts, 1) for parts in zip(*results, strict=True))
    return torch.cat(results, 1)


# -- what is refused ------------------------------------------------------------------------


def _check(q, k, v, scale, cu_seqlens, **gates):
    """Refuse tensors that do not go together; return the scale."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, 4, "[batch, seq_len, heads, head_dim]")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ArgumentError(
                f"{name}.dtype", str(x.dtype), f"is no float dtype, or not q's {q.dtype}.",
                "Pass all three in one float dtype.",
            )  # fmt: skip
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ArgumentError(
            "k, v", shapes, "differ in an axis that they share.",
            "Pass q [B, M, HQ, D], k [B, N, H, D] and v [B, N, H, V].",
        )  # fmt: skip
    if q.shape[2] % k.shape[2]:
        raise ArgumentError(
            "k", shapes, f"{k.shape[2]} KV heads do not divide {q.shape[2]} query heads.",
            "Every KV head serves a group of equal size.",
        )  # fmt: skip
    if q.shape[1] > k.shape[1]:
        raise ArgumentError(
            "q", shapes, "has more queries than there are keys.",
            "Pass M ≤ N: the last query stands beside the last key.",
        )  # fmt: skip
    for name, gate in gates.items():
        if gate is not None and gate.shape != q.shape[:3]:
            raise ArgumentError(
                name, tuple(gate.shape), f"is not {tuple(q.shape[:3])}.",
                "Pass one number for each query and query head, or None for no such branch.",
            )  # fmt: skip
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, q, k)
    return q.shape[-1] ** -0.5 if scale is None else scale


def _slots(block_counts, q, k):
    """How many slots a row of the choice has."""
    if not isinstance(block_counts, torch.Tensor):
        return check_positive_int("block_counts", block_counts)
    shape = (*q.shape[:2], k.shape[2])
    if block_counts.is_floating_point() or block_counts.shape != shape:
        raise ArgumentError(
            "block_counts", f"{tuple(block_counts.shape)}, {block_counts.dtype}",
            f"is not {shape} of an integer dtype.", "Pass a number for each query and KV head.",
        )  # fmt: skip
    return int(block_counts.max())
