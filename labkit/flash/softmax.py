r"""One step of the online softmax, for a tile of scores: the heart of the forward kernel.

With S the raw product QKᵀ and :math:`c = \mathrm{scale} \cdot \log_2 e`, a tile changes the state
of its rows as

.. math::
    m'     &= \max(m,\ \mathrm{rowmax}(S)) \\
    P      &= 2^{\,c S - c m'} \\
    \alpha &= 2^{\,c (m - m')} \\
    l'     &= \alpha\, l + \mathrm{rowsum}(P) \\
    O'     &= \alpha\, O + P V .

:math:`e^x = 2^{x \log_2 e}`, and the hardware only has the right-hand side.  Folding the scale
and :math:`\log_2 e` into one constant leaves one multiply-add and one exponential per score.
m is kept in units of S: the scale is positive, so the maximum is taken before it.

At the end :math:`O / l` is the output and :math:`\mathrm{LSE} = \mathrm{scale}\; m + \ln l` is
what the backward pass needs (chapter 09).

Taught in chapter 08 (the forward kernel); the algorithm is chapter 07's.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish", "rescale_and_exponentiate"]


@triton.jit
def rescale_and_exponentiate(s, m, l, o, c, MASKED: tl.constexpr):
    """``P, m', l', αO`` of one tile; ``s`` [rows, keys], ``m``, ``l`` [rows], ``o`` [rows, dv].

    ``MASKED``: a row may have no visible key so far.  Then m' is −∞ and −∞ − (−∞) would be NaN;
    with 0 in its place P and α come out as 0.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    finite = m_new
    if MASKED:
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * c - (c * finite)[:, None])
    # The difference first: c·m − c·m' becomes one multiply-add, which rounds only one of its two
    # products.  Where the maximum stays, α would be off from 1 in the same direction each time.
    alpha = tl.exp2((m - finite) * c)
    l = l * alpha + tl.sum(p, 1)
    return p, m_new, l, o * alpha[:, None]


@triton.jit
def finish(m, l, o, scale):
    """``O / l`` and the natural LSE of each row; 0 and −∞ for a row that saw nothing."""
    nothing = l == 0.0
    l = tl.where(nothing, 1.0, l)
    lse = tl.where(nothing, float("-inf"), m * scale + tl.log(l))
    return o / l[:, None], lse
