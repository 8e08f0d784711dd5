"""Half rate: rows at even positions are computed, and the row after each is a copy of it.

Taught in chapter 15 (is "twice as fast, same function" true?).  The source notes change the
reference family in this way and analyse the price.  What they describe is what
``half_rate=True`` of each function in ``reference.py`` does:

* **Selection and window**: the loop visits the even positions.  An odd row of the output is the
  gated row before it, so that its own query and its own gates are never read.
* **Compression**: attention is computed for every row, as before.  Then the odd rows of the
  gated output *and of block_indices* are overwritten with the even rows before them.
* Positions count from the start of the own sequence: with ``cu_seqlens`` each sequence begins
  with a computed row.  A sequence of odd length ends with one.

The copy at position t = 2i + 1 sees the keys up to 2i.  That is causal, but the token no longer
attends to itself.  In the backward pass the gradient of a copy flows to the row that it copies.

Loads torch.  Imports downwards: errors.
"""

from __future__ import annotations

import torch

from labkit.errors import ArgumentError

__all__ = ["check_half_rate", "computed_rows", "copy_even_rows", "source_rows", "spread"]


def source_rows(m, cu_seqlens=None, *, device=None):
    """Which row each row shows: itself at even positions, the one before at odd ones.

    ``[M]`` int64.  ``cu_seqlens`` may start a sequence at an odd row; its position is 0.
    """
    row = torch.arange(m, device=device if cu_seqlens is None else cu_seqlens.device)
    if cu_seqlens is None:
        return row - row % 2
    sequence = torch.searchsorted(cu_seqlens.long(), row, right=True) - 1
    return row - (row - cu_seqlens.long()[sequence]) % 2


def computed_rows(m, cu_seqlens=None, *, device=None):
    """The rows at even positions, ascending: ``[⌈M/2⌉]`` int64 for one sequence."""
    source = source_rows(m, cu_seqlens, device=device)
    return source.unique()


def spread(computed, m):
    """Rows that were computed → all rows of one sequence: ``[B, ⌈M/2⌉, …]`` → ``[B, M, …]``."""
    return computed.repeat_interleave(2, dim=1)[:, :m]


def copy_even_rows(x, cu_seqlens=None):
    """``x`` ``[B, M, …]`` with each odd row replaced by the even row before it; a new tensor."""
    return x.index_select(1, source_rows(x.shape[1], cu_seqlens, device=x.device))


def check_half_rate(m, n) -> None:
    """Raise ArgumentError unless there are as many queries as keys.

    With one query at a time, as in decoding, the row to copy was computed in an earlier call.
    """
    if m != n:
        raise ArgumentError(
            "half_rate", True, f"needs as many queries as keys, and got {m} and {n}.",
            "Pass the whole sequence, or half_rate=False.",
        )  # fmt: skip
