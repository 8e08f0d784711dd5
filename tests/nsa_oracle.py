"""What Native Sparse Attention should give, by dense formulations that share no line with labkit.

Every branch is ordinary attention over all N keys with a mask ``[B, HQ, M, N]``, so there is
nothing to gather and nothing to index wrongly; pooling is a product with a matrix that holds 1/l;
importance is probability spread over tokens and summed again; the choice of blocks is Python's
``sorted``, query by query.  Functions run in the dtype of q: in float64 they are the oracle, in
a low precision the plain yardstick of ``oracle.assert_within_low_precision_error``.

Layout as in labkit.nsa: q ``[B, M, HQ, D]``, k ``[B, N, H, D]``, v ``[B, N, H, V]``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from oracle import log_sum_exp

NEVER = float("-inf")


def places(m, n, cu_seqlens=None, device=None):
    """Sequence and position of each query and each key: four vectors."""
    if cu_seqlens is None:
        zeros = torch.zeros(n, dtype=torch.long, device=device)
        position = torch.arange(n, device=device)
        return zeros[n - m :], position[n - m :], zeros, position
    ends = [int(e) for e in cu_seqlens]
    sequence, position = [], []
    for number, (a, b) in enumerate(pairwise(ends)):
        sequence += [number] * (b - a)
        position += range(b - a)
    both = [torch.tensor(x, dtype=torch.long, device=device) for x in (sequence, position)]
    return *both, *both


def masked_attention(q, k, v, seen, scale=None):
    """O ``[B, M, HQ, V]``, LSE ``[B, HQ, M]``, P ``[B, HQ, M, N]`` where ``seen`` allows."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[1] == 0:
        o = q.new_zeros(*q.shape[:3], v.shape[-1])
        p = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], 0)
        return o, p.sum(-1) + NEVER, p
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    s = torch.where(seen, s, torch.full_like(s, NEVER))
    dead = ~seen.any(-1, keepdim=True).expand(*s.shape[:3], 1)
    p = torch.softmax(torch.where(dead, torch.zeros_like(s), s), -1)
    p = torch.where(dead, torch.zeros_like(p), p)
    return torch.einsum("bhij,bjhd->bihd", p, v), log_sum_exp(s), p


# -- one branch at a time ---------------------------------------------------------------------


def chosen_tokens(block_indices, n, block_size, *, block_counts=None, cu_seqlens=None):
    """True where a query's choice and its past hold a key: ``[B, M, H, N]``."""
    batch, m, heads, slots = block_indices.shape
    device = block_indices.device
    seq_q, t, seq_k, pos = places(m, n, cu_seqlens, device)
    named = torch.zeros(batch, m, heads, n, dtype=torch.bool, device=device)
    for s in range(slots):
        hit = block_indices[..., s, None].long() == (pos // block_size)
        if block_counts is not None:
            used = torch.as_tensor(block_counts, device=device) > s
            hit = hit & (used[..., None] if used.dim() else used)
        named = named | hit
    past = (seq_q[:, None] == seq_k) & (pos <= t[:, None])
    return named & past[None, :, None]


def selection(
    q, k, v, block_indices, *, block_size, block_counts=None, scale=None, cu_seqlens=None
):
    """Attention to the tokens of the chosen blocks: O, LSE, P."""
    seen = chosen_tokens(
        block_indices, k.shape[1], block_size, block_counts=block_counts, cu_seqlens=cu_seqlens
    )
    group = q.shape[2] // k.shape[2]
    seen = seen.repeat_interleave(group, dim=2).transpose(1, 2)  # [B, HQ, M, N]
    return masked_attention(q, k, v, seen, scale)


def window(q, k, v, *, window_size, scale=None, cu_seqlens=None):
    """Attention to the latest ``window_size`` keys: O, LSE, P."""
    seq_q, t, seq_k, pos = places(q.shape[1], k.shape[1], cu_seqlens, q.device)
    behind = t[:, None] - pos
    seen = (seq_q[:, None] == seq_k) & (behind >= 0) & (behind < window_size)
    return masked_attention(q, k, v, seen[None, None], scale)


def pooling_matrix(n, length, stride, *, cu_seqlens=None, dtype=torch.float64, device=None):
    """``[C, N]``: 1/l where a compressed key stands for a token; and (sequence, last) of each."""
    ends = [0, n] if cu_seqlens is None else [int(e) for e in cu_seqlens]
    rows, which = [], []
    for number, (a, b) in enumerate(pairwise(ends)):
        for first in range(a, b, stride):
            if first + length <= b:
                row = [0.0] * n
                row[first : first + length] = [1.0 / length] * length
                rows.append(row)
                which.append((number, first - a + length - 1))
    matrix = torch.tensor(rows, dtype=dtype, device=device).reshape(len(rows), n)
    return matrix, torch.tensor(which, dtype=torch.long, device=device).reshape(-1, 2)


def compressed(q, k_cmp, v_cmp, n, *, length, stride, scale=None, cu_seqlens=None):
    """Attention to given compressed keys under the staircase mask: O, LSE, P ``[B, HQ, M, C]``."""
    _, which = pooling_matrix(n, length, stride, cu_seqlens=cu_seqlens, device=q.device)
    seq_q, t, _, _ = places(q.shape[1], n, cu_seqlens, q.device)
    stairs = (seq_q[:, None] == which[:, 0]) & (which[:, 1] <= t[:, None])
    return masked_attention(q, k_cmp, v_cmp, stairs[None, None], scale)


def compression(q, k, v, *, length, stride=None, scale=None, cu_seqlens=None):
    """The same with mean pooling: O, LSE, P ``[B, HQ, M, C]``."""
    stride = length if stride is None else stride
    n = k.shape[1]
    matrix, _ = pooling_matrix(
        n, length, stride, cu_seqlens=cu_seqlens, dtype=q.dtype, device=q.device
    )
    k_cmp, v_cmp = (torch.einsum("cn,bnhd->bchd", matrix, x) for x in (k, v))
    return compressed(
        q, k_cmp, v_cmp, n, length=length, stride=stride, scale=scale, cu_seqlens=cu_seqlens
    )


# -- the choice of blocks ---------------------------------------------------------------------


def importance(p, n, group, *, length, stride, block_size, cu_seqlens=None):
    """Importance ``[B, M, H, N]`` of the block that each *token* lies in.

    A compressed key's probability is spread evenly over its l tokens, tokens are summed block by
    block, and l/d restores the unit.
    """
    matrix, _ = pooling_matrix(
        n, length, stride, cu_seqlens=cu_seqlens, dtype=p.dtype, device=p.device
    )
    _, _, sequence, position = places(n, n, cu_seqlens, p.device)
    together = (sequence[:, None] == sequence) & (
        position[:, None] // block_size == position // block_size
    )
    of_token = p @ matrix @ together.to(p.dtype) * (length / stride)  # [B, HQ, M, N]
    return of_token.unflatten(1, (-1, group)).sum(2).transpose(1, 2)


def forced_blocks(t, block_size, forced):
    """The blocks that a query at position t always chooses, most urgent first."""
    initial, local = forced
    own = t // block_size
    order = [own - back for back in range(local)] + list(range(initial))
    return list(dict.fromkeys(b for b in order if 0 <= b <= own))


def choice(
    q, k, *, block_counts, block_size, length=None, stride=None, forced=(1, 2), scale=None,
    cu_seqlens=None, k_cmp=None,
):  # fmt: skip
    """Which blocks each query reads: ``[B, M, H, S]``, by sorting in Python; and importance."""
    length = block_size if length is None else length
    stride = length if stride is None else stride
    n, group = k.shape[1], q.shape[2] // k.shape[2]
    options = {"length": length, "stride": stride, "scale": scale, "cu_seqlens": cu_seqlens}
    if k_cmp is None:
        _, _, p = compression(q, k, k, **options)
    else:
        _, _, p = compressed(q, k_cmp, k_cmp, n, **options)
    options.pop("scale")
    score = importance(p, n, group, block_size=block_size, **options)
    seq_q, t, seq_k, _ = (x.tolist() for x in places(q.shape[1], n, cu_seqlens))
    first = [seq_k.index(s) for s in seq_q]  # where the own sequence starts
    slots = int(torch.as_tensor(block_counts).max())
    result = torch.full((*q.shape[:2], k.shape[2], slots), -1, dtype=torch.int32)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            urgent = forced_blocks(t[i], block_size, forced)
            blocks = range(t[i] // block_size + 1)
            for h in range(k.shape[2]):
                count = block_counts
                if isinstance(block_counts, torch.Tensor):
                    count = int(block_counts[b, i, h])
                row = score[b, i, h].tolist()
                rest = [x for x in blocks if x not in urgent]
                rest.sort(key=lambda x: (-row[first[i] + x * block_size], x))
                kept = sorted((urgent + rest)[:count])
                result[b, i, h, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return result.to(q.device), score


def assert_choice_is_best(ours, score, *, block_size, block_counts, forced=(1, 2),
                          cu_seqlens=None, n=None, tolerance=1e-6):  # fmt: skip
    """``ours`` is a best choice under ``score``, where scores closer than ``tolerance`` are equal.

    Compares sets of scores and not block numbers, so that a near-tie which rounds the other way
    passes, and a block that is worse by more than that does not.  ``score`` as from ``choice``.
    """
    n = score.shape[-1] if n is None else n
    seq_q, t, seq_k, _ = (x.tolist() for x in places(ours.shape[1], n, cu_seqlens))
    ours, score = ours.cpu(), score.double().cpu()
    for b in range(ours.shape[0]):
        for i in range(ours.shape[1]):
            start, own = seq_k.index(seq_q[i]), t[i] // block_size
            urgent = forced_blocks(t[i], block_size, forced)
            for h in range(ours.shape[2]):
                row = ours[b, i, h].tolist()
                where = f"batch {b}, query {i}, KV head {h}: {row}"
                named = [x for x in row if x >= 0]
                count = block_counts
                if isinstance(block_counts, torch.Tensor):
                    count = int(block_counts[b, i, h])
                assert row == named + [-1] * (len(row) - len(named)), f"{where}: −1 comes last"
                assert named == sorted(set(named)), f"{where}: ascending, each once"
                assert len(named) == min(count, own + 1), f"{where}: {count} of {own + 1}"
                assert all(x <= own for x in named), f"{where}: block {own} is the current one"
                assert set(urgent[:count]) <= set(named), f"{where}: forced {urgent}"
                worth = {x: float(score[b, i, h, start + x * block_size]) for x in range(own + 1)}
                free = sorted(worth[x] for x in named if x not in urgent)
                best = sorted(worth[x] for x in worth if x not in urgent)
                best = best[len(best) - len(free) :]
                gap = max((abs(x - y) for x, y in zip(free, best, strict=True)), default=0.0)
                assert gap <= tolerance, f"{where}: worse by {gap:.3g} than {worth}"


# -- the layer --------------------------------------------------------------------------------


def layer(
    q, k, v, g_cmp, g_slc, g_swa, *, block_indices, block_size, window_size, block_counts=None,
    length=None, stride=None, scale=None, cu_seqlens=None,
):  # fmt: skip
    """Σ gate · branch for a choice that is given; None is a branch that is off."""
    length = block_size if length is None else length
    both = {"scale": scale, "cu_seqlens": cu_seqlens}
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    if g_cmp is not None:
        o = o + g_cmp[..., None] * compression(q, k, v, length=length, stride=stride, **both)[0]
    if g_slc is not None:
        o_slc = selection(
            q, k, v, block_indices, block_size=block_size, block_counts=block_counts, **both
        )[0]
        o = o + g_slc[..., None] * o_slc
    if g_swa is not None:
        o = o + g_swa[..., None] * window(q, k, v, window_size=window_size, **both)[0]
    return o
