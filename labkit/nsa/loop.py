r"""The loop that source 000 counts: one query after another, everything of each in memory.

Taught in chapter 15 (is "twice as fast, same function" true?).  ``reference.py`` computes the
same function in larger steps.  Claims about a loop's time and memory are about what a loop does,
so here it is, with the tensors that the source lists:

================ ================================ ===================================
tensor           size                             lives
================ ================================ ===================================
k, v             T × HQ × (D + V)                 throughout: one copy per query head
tokens           T × HQ × S·l′ (int64)            throughout, unless made query by query
o                T × HQ × V                       throughout
k_i, v_i         S·l′ × HQ × (D + V)              one step; with autograd until backward
p_i              S·l′ × HQ                        the same
================ ================================ ===================================

``half_rate`` takes every other step, and writes its row twice.  A step's tensors are freed one by
one as the next step makes its own, so there is one set and a part of another, however many steps
there are; what autograd keeps is kept once for each.

Loads torch.
"""

from __future__ import annotations

import torch

__all__ = ["loop_saved_bytes", "selection_loop"]


def selection_loop(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    half_rate: bool = False,
    tokens_at_once: bool = True,
) -> torch.Tensor:
    """Attention to the chosen blocks, one query at a time; no gates.

    Parameters
    ----------
    q : ``[B, T, HQ, D]``, any float dtype.
    k, v : ``[B, T, H, D]`` and ``[B, T, H, V]``.
    block_indices : ``[B, T, H, S]`` integers, −1 for an unused slot.  A block that is named twice
        counts twice, as a gather makes it.
    block_size : tokens of a block (l′).
    scale : multiplies QKᵀ; D^(−1/2) unless given.
    half_rate : compute even positions, copy each to the odd one after it.
    tokens_at_once : make the token numbers of all queries before the loop, as the source does;
        otherwise of one query at a time.

    Returns
    -------
    torch.Tensor
        ``[B, T, HQ, V]``; 0 where a query chose nothing.
    """
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    k, v, blocks = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v, block_indices))
    place = torch.arange(block_size, device=q.device)
    if tokens_at_once:
        tokens = (blocks.long()[..., None] * block_size + place).flatten(3)  # [B, T, HQ, S·l′]
    o = q.new_zeros(batch, length, heads, v.shape[3])
    for b in range(batch):
        for t in range(0, length, 2 if half_rate else 1):
            if tokens_at_once:
                mine = tokens[b, t]
            else:
                mine = (blocks[b, t].long()[..., None] * block_size + place).flatten(1)
            seen = (mine >= 0) & (mine <= t)  # [HQ, S·l′]
            rows = mine.clamp(0, length - 1).T[..., None]  # [S·l′, HQ, 1]
            k_i = k[b].gather(0, rows.expand(-1, -1, width))  # [S·l′, HQ, D]
            v_i = v[b].gather(0, rows.expand(-1, -1, v.shape[3]))
            s_i = scale * torch.einsum("hd,nhd->hn", q[b, t], k_i)
            # a row without keys would be 0/0
            p_i = s_i.masked_fill(~seen, float("-inf")).softmax(-1)
            p_i = p_i.masked_fill(~seen.any(-1, keepdim=True), 0.0)
            o[b, t] = torch.einsum("hn,nhv->hv", p_i, v_i)
            if half_rate and t + 1 < length:
                o[b, t + 1] = o[b, t]
    return o


def loop_saved_bytes(
    *, seq_len: int, count: int, block_size: int, heads: int, head_dim: int,
    head_dim_v: int | None = None, itemsize: int = 4, half_rate: bool = False,
) -> int:  # fmt: skip
    """What autograd keeps of the gathered keys and values of all steps: the bulk of what it keeps.

    >>> loop_saved_bytes(seq_len=2048, count=16, block_size=64, heads=32, head_dim=128) / 2**30
    64.0
    """
    steps = -(-seq_len // 2) if half_rate else seq_len
    return steps * count * block_size * heads * (head_dim + (head_dim_v or head_dim)) * itemsize
