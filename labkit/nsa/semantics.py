r"""What Native Sparse Attention means here: every choice that implementations differ in.

Taught in chapter 12 (how NSA chooses what to read).  The paper (Yuan et al. 2025) leaves some
of these open, and public code fills the gaps in different ways; where it does, the last column
says why ours is as it is.  ``reference.py`` is this table in PyTorch, and every kernel is tested
against it.

Sizes: B sequences of N keys; M ≤ N queries; HQ query heads in groups of G = HQ / H around
H KV heads; compressed keys stand for l tokens each and start d tokens apart; selection blocks
hold l′ tokens (``block_size``); a query chooses up to n of them; the window holds W keys.

================== =========================================== ===================================
point              ours                                        elsewhere, and why ours
================== =========================================== ===================================
layout             q ``[B, M, HQ, D]``, k ``[B, N, H, D]``,    the same in the code of the source
                   v ``[B, N, H, V]``; ``head_first`` swaps    notes, whose compression with
                   axes 1 and 2 of every argument and result   ``head_first`` moves its output only
position           query i stands at t = i + N − M: the last   M = N in most code; this one serves
                   query beside the last key                   decoding too
several lengths    B = 1, ``cu_seqlens``; positions and block  the same
                   numbers count from the own sequence
pooling            mean over l tokens, l = d = l′, unless a    the paper: an MLP, l = 32, d = 16,
                   module is given                             l′ = 64; mean is the code's
last block         compressed when complete, never before      some average what there is, or
                                                               zeros with it
visible            compressed key c at t when                  some use <: they hide a block from
                   c·d + l − 1 ≤ t                             its own last token
nothing visible    output 0, LSE −∞, gradients 0               LSE 0, or NaN.  −∞ is what a sum of
                                                               no exponentials has
importance         Σ over the group and over c of p · overlap  a mean over the group: the same
                   of c with the block, in units of d          order.  Raw logits: another order
block ↔ c          true overlap of tokens                      the same as equation 9 of the paper
                                                               when both of its indices count from 1
always chosen      block 0, the current and the previous one:  paper: 1 initial, 2 local.  Code of
                   ``forced=(1, 2)``; counted among the n      the notes: current only, ``(0, 1)``
too small an n     current, previous, …, then the initial      by number of the block, or of chance:
                                                               a query must at least see itself
candidates         every block up to the current one, also     some admit compressed blocks only
                   when its importance is 0
equal importance   the lower block number wins                 ``torch.topk`` promises no order
more than exist    the slots that are left hold −1             −1, or 0, which reads block 0 again
result             ascending, then −1; int32                   by importance, int64
−1 anywhere        an unused slot                              the same
named twice        counts once                                 counts twice in a gather
future             a key after t is never seen, even if its    the same
                   block is named
``block_counts``   only the first so many slots are read       one vectorised form ignores an int
window             t − W < j ≤ t: W keys with the own one;     W + 1 keys in some
                   0 is a branch that gives 0
scale              D^(−1/2) of the key, all three branches     the same
gates              any real numbers, no sigmoid inside;        sigmoid in the paper, softmax in
                   None turns a branch off                     some: both are the caller's
output             o = Σ gate · branch, in the dtype of q      the same
LSE                natural logarithm, float32 (float64 for     base 2 in some kernels
                   float64), ``[B, HQ, M]``
half rate          rows at even positions are computed; the    ``half_rate.py``, chapter 15
                   row after each is a copy
================== =========================================== ===================================

This file imports errors only; it loads no torch.
"""

from __future__ import annotations

import operator
from typing import Any

from labkit.errors import ArgumentError

__all__ = ["FORCED", "block_numbers", "check_forced", "compressed_keys", "overlap"]

#: (initial, local): how many first blocks, and how many last ones up to the own, are always read
FORCED = (1, 2)


def compressed_keys(n: int, length: int, stride: int) -> int:
    """How many compressed keys stand for n tokens: complete blocks only."""
    return max(0, (n - length) // stride + 1)


def block_numbers(n: int, block_size: int) -> int:
    """How many selection blocks n tokens make, the last one perhaps incomplete."""
    return -(-n // block_size)


def overlap(c: int, block: int, *, length: int, stride: int, block_size: int) -> int:
    """How many tokens compressed key ``c`` and selection block ``block`` have in common.

    >>> [overlap(c, 1, length=32, stride=16, block_size=64) // 16 for c in range(2, 9)]
    [0, 1, 2, 2, 2, 1, 0]
    """
    first = max(c * stride, block * block_size)
    last = min(c * stride + length, (block + 1) * block_size)
    return max(0, last - first)


def check_forced(forced: Any) -> tuple[int, int]:
    """Return ``(initial, local)``; raise ArgumentError for anything but two counts.

    ``local`` is at least 1: a query that does not see its own block does not see itself.
    """
    remedy = "Pass (initial, local), such as (1, 2) or (0, 1)."
    try:
        initial, local = (operator.index(count) for count in forced)
    except (TypeError, ValueError):
        raise ArgumentError("forced", forced, "is not a pair of integers.", remedy) from None
    if initial < 0:
        raise ArgumentError("forced", forced, "has a negative number of initial blocks.", remedy)
    if local < 1:
        raise ArgumentError("forced", forced, "leaves out the query's own block.", remedy)
    return initial, local
