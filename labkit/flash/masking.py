r"""Masking: which scores exist, and which tiles need to ask.

Query i sees key j when both hold (``off = Nk − Nq``: the last query is aligned with the last key)

.. math::
    j &\le i + \mathrm{off}                          &&\text{causal} \\
    |i + \mathrm{off} - j| &< W                      &&\text{window of } W \text{ keys}

For a tile of rows the visible keys are one interval, and so are the keys that *every* row of the
tile sees.  A kernel walks the first interval and evaluates the mask only outside the second:

::

    lo ....... full_lo =================== full_hi ....... hi
      masked            no mask needed            masked

Seen from a tile of keys, the queries that see it are an interval too, with the same inequalities
solved for i: the backward kernel for dK and dV uses that.

:func:`key_bounds` and :func:`query_bounds` round to whole tiles; ``tests/test_flash_forward.py``
compares them with the inequalities one by one.

Taught in chapter 08 (the forward kernel).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["hide", "key_bounds", "query_bounds", "visible_pairs"]


@triton.jit
def key_bounds(
    first, last, Nq, Nk, window,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """``lo, full_lo, full_hi, hi`` for the queries ``first … last − 1`` of a tile.

    ``lo``, ``full_lo`` and ``full_hi`` are multiples of ``BLOCK_N``; ``hi`` is the first key that
    no row of the tile sees.  An empty interval has ``lo ≥ hi``.
    """
    off = Nk - Nq
    lo, hi = 0, Nk  # what some row sees
    all_lo, all_hi = 0, Nk  # what every row sees
    if CAUSAL:
        hi = min(hi, last + off)
        all_hi = min(all_hi, first + off + 1)
    if WINDOW:
        lo = max(lo, first + off - window + 1)
        all_lo = max(all_lo, last - 1 + off - window + 1)
        if not CAUSAL:
            hi = min(hi, last - 1 + off + window)
            all_hi = min(all_hi, first + off + window)
    hi = max(hi, 0)
    lo = lo // BLOCK_N * BLOCK_N
    full_lo = max(lo, tl.cdiv(all_lo, BLOCK_N) * BLOCK_N)
    full_hi = max(all_hi, 0) // BLOCK_N * BLOCK_N
    # No tile is full: everything is masked, in the first of the three loops.
    end = tl.cdiv(hi, BLOCK_N) * BLOCK_N
    full_lo = min(full_lo, end)
    full_hi = max(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_bounds(
    first, last, Nq, Nk, window,
    BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The same for the keys ``first … last − 1`` of a tile: which queries see them."""
    off = Nk - Nq
    lo, hi = 0, Nq
    all_lo, all_hi = 0, Nq
    if CAUSAL:
        lo = max(lo, first - off)
        all_lo = max(all_lo, last - 1 - off)
    if WINDOW:
        hi = min(hi, last - 1 - off + window)
        all_hi = min(all_hi, first - off + window)
        if not CAUSAL:
            lo = max(lo, first - off - window + 1)
            all_lo = max(all_lo, last - 1 - off - window + 1)
    hi = max(hi, 0)
    lo = lo // BLOCK_M * BLOCK_M
    full_lo = max(lo, tl.cdiv(all_lo, BLOCK_M) * BLOCK_M)
    full_hi = max(all_hi, 0) // BLOCK_M * BLOCK_M
    end = tl.cdiv(hi, BLOCK_M) * BLOCK_M
    full_lo = min(full_lo, end)
    full_hi = max(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def hide(s, i, j, Nq, Nk, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """``s`` with −∞ where query i does not see key j; ``i`` and ``j`` broadcast against ``s``.

    Rows and columns of padding are hidden as well, so that no later step has to remember them.
    """
    at = i + (Nk - Nq)
    seen = (i < Nq) & (j < Nk)
    if CAUSAL:
        seen = seen & (j <= at)
    if WINDOW:
        seen = seen & (j > at - window)
        if not CAUSAL:
            seen = seen & (j < at + window)
    return tl.where(seen, s, float("-inf"))


def visible_pairs(n_q: int, n_k: int, causal: bool, window: int | None) -> int:
    """How many (query, key) pairs are visible: what the FLOP formulas count."""
    off = n_k - n_q
    if not causal and window is None:
        return n_q * n_k

    def below(shift: int) -> int:
        # Σ_i clamp(i + off + shift, 0, n_k): keys j < i + off + shift of all queries.
        first, last = off + shift, n_q - 1 + off + shift
        total = 0
        if last >= n_k:
            full = min(n_q, last - n_k + 1)
            total += full * n_k
            last = min(last, n_k - 1)
        first = max(first, 1)
        if last >= first:
            total += (first + last) * (last - first + 1) // 2
        return total

    total = below(1) if causal else below(window)
    return total - (below(1 - window) if window is not None else 0)
