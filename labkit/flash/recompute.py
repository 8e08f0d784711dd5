r"""The backward pass of attention from Q, K, V, O and the LSE, tile by tile, in plain PyTorch.

Taught in chapter 09 (to keep P or to compute it again).  It is what the kernels of
``labkit/flash/backward.py`` compute, in the order in which they do, without a GPU and in any
floating dtype, float64 included.

The forward pass kept, of each row, :math:`\mathrm{LSE}_i = \log\sum_j e^{S_{ij}}` and
:math:`O_i`.  Given :math:`dO`, and :math:`d\mathrm{LSE}` if the LSE was used as well:

.. math::
    D_i   &= \textstyle\sum_a dO_{ia} O_{ia} - d\mathrm{LSE}_i   & (1) \\
    S_{ij}  &= \mathrm{scale}\; Q_i K_j^\top                     & (2) \\
    P_{ij}  &= e^{S_{ij} - \mathrm{LSE}_i}                       & (3) \\
    dV_j    &= \textstyle\sum_i P_{ij}^\top\, dO_i               & (4) \\
    dP_{ij} &= dO_i V_j^\top                                     & (5) \\
    dS_{ij} &= P_{ij} \odot (dP_{ij} - D_i)                      & (6) \\
    dK_j    &= \mathrm{scale} \textstyle\sum_i dS_{ij}^\top Q_i  & (7) \\
    dQ_i    &= \mathrm{scale} \textstyle\sum_j dS_{ij} K_j       & (8)

with i a block of queries and j a block of keys (Dao et al. 2022, appendix B).  dK and dV are
sums over query blocks, dQ is a sum over key blocks, so no order of the two loops finishes all
three.  Two ways out, both here:

:func:`one_pass`
    key blocks outside.  dK_j and dV_j stay with their loop, dQ_i is added to in memory, once
    for each key block.  Five products for each pair of blocks.  In parallel the additions to
    dQ meet: atomics take them in whatever order they come.
:func:`two_passes`
    (4) and (7) with key blocks outside, then (8) with query blocks outside.  Every gradient
    is written once, by its own loop, always in the same order; (2) and (5) are computed
    twice.  Seven products.

Nothing here is larger than one block of scores for all heads.  Layout, grouped-query heads,
the causal mask (bottom right) and the window are those of ``labkit.flash.flash_attention``:
query i sees key j when :math:`i + N_k - N_q - j` lies in a band, and a block of pairs is
skipped, taken whole, or masked.  A row that sees no key has O = 0 and LSE = −∞, and gets and
gives no gradient.

Products take their factors in the dtype of q and are accumulated in float32 (in float64 for
float64), as tensor cores do: P and dS are rounded to q's dtype before they are multiplied.

Imports downwards: errors, shapes.  Loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from labkit.errors import ArgumentError, check_positive_int
from labkit.shapes import Sizes, check_qkv, check_same_shape, check_scale

__all__ = ["Band", "block_of_pairs", "delta", "one_pass", "two_passes", "visible_blocks"]


# -- which pairs ---------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """The pairs that see each other: query i and key j when low ≤ i + offset − j ≤ high.

    No mask is the band from −∞ to ∞; causal starts it at 0; a window of W keys ends it at
    W − 1 (and, without causal, starts it at −(W − 1)).
    """

    low: float
    high: float
    offset: int

    @classmethod
    def of(cls, seq_len_q: int, seq_len_k: int, causal: bool, window: int | None) -> Band:
        """The band of one problem; ``window`` is a number of keys, or None.

        Raises
        ------
        ArgumentError
            if ``window`` is not a positive integer.
        """
        reach = math.inf if window is None else check_positive_int("window", window) - 1
        return cls(0 if causal else -reach, reach, seq_len_k - seq_len_q)

    def block(self, rows: slice, cols: slice) -> str:
        """``"none"``, ``"all"`` or ``"some"``: how many pairs of a block are visible."""
        least = rows.start + self.offset - (cols.stop - 1)
        most = rows.stop - 1 + self.offset - cols.start
        if most < self.low or least > self.high:
            return "none"
        return "all" if self.low <= least and most <= self.high else "some"

    def mask(self, rows: slice, cols: slice, device=None) -> torch.Tensor:
        """True where a pair is visible: bool, ``[rows, cols]``."""
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        j = torch.arange(cols.start, cols.stop, device=device)[None, :]
        distance = i + self.offset - j
        return (distance >= self.low) & (distance <= self.high)


def visible_blocks(
    seq_len_q: int,
    seq_len_k: int,
    block_q: int,
    block_k: int,
    *,
    causal: bool = False,
    window: int | None = None,
) -> list[tuple[int, int, str]]:
    """The blocks of pairs that the backward pass visits: ``(query block, key block, how)``.

    ``how`` is ``"all"`` or, where the mask must be applied, ``"some"``; blocks without a
    visible pair are left out.

    >>> visible_blocks(4, 4, 2, 2, causal=True)
    [(0, 0, 'some'), (1, 0, 'all'), (1, 1, 'some')]
    """
    band = Band.of(seq_len_q, seq_len_k, causal, window)
    found = []
    for i, rows in enumerate(_blocks(seq_len_q, block_q, "block_q")):
        for j, cols in enumerate(_blocks(seq_len_k, block_k, "block_k")):
            if (how := band.block(rows, cols)) != "none":
                found.append((i, j, how))
    return found


def _blocks(length: int, block: int, argument: str) -> Iterator[slice]:
    check_positive_int(argument, block)
    for start in range(0, length, block):
        yield slice(start, min(start + block, length))


# -- equations -----------------------------------------------------------------


def delta(dout: torch.Tensor, out: torch.Tensor, dlse: torch.Tensor | None = None) -> torch.Tensor:
    r"""Equation (1): what is subtracted from each row of dP.

    :math:`\mathrm{rowsum}(dP \odot P) = \mathrm{rowsum}(dO \odot O)`, an N-vector from two
    tensors of N·d.  Raising a score raises the LSE by P, so a gradient of the LSE enters dS
    as :math:`P \odot d\mathrm{LSE}`: subtracted here, it costs nothing later.

    Parameters
    ----------
    dout, out : ``[batch, heads, seq_len_q, head_dim_v]``, any floating dtype.
    dlse : ``[batch, heads, seq_len_q]`` or None.

    Returns
    -------
    ``[batch, heads, seq_len_q]``, float32 (float64 for float64).
    """
    wide = _wide(out)
    rows = (dout.to(wide) * out.to(wide)).sum(dim=-1)
    return rows if dlse is None else rows - dlse


def block_of_pairs(Q, K, V, dO, LSE, D, scale, visible=None):
    r"""Equations (2), (3), (5), (6) for one block of queries and one block of keys.

    Parameters
    ----------
    Q, dO : ``[…, block_q, d]``, ``[…, block_q, dv]``.
    K, V : ``[…, block_k, d]``, ``[…, block_k, dv]``.
    LSE, D : ``[…, block_q]``, float32 or float64; LSE = ∞ gives a row of zeros.
    scale : multiplies QKᵀ.
    visible : bool ``[block_q, block_k]``, or None if every pair is.

    Returns
    -------
    P and dS, ``[…, block_q, block_k]``, in the accumulator's dtype.
    """
    S = _product(Q, K.mT) * scale  # (2)
    if visible is not None:
        S = torch.where(visible, S, -math.inf)
    P = torch.exp(S - LSE[..., None])  # (3)
    dP = _product(dO, V.mT)  # (5)
    dS = P * (dP - D[..., None])  # (6)
    return P, dS


def one_pass(q, k, v, out, lse, dout, **how):
    """dq, dk, dv with key blocks outside and five products for each pair of blocks.

    Parameters, returns, errors: :func:`two_passes`.  ``dlse`` and ``order`` besides:
    ``order`` is the sequence of key blocks, which a GPU does not promise; dq depends on it
    by rounding.
    """
    order = how.pop("order", None)
    p = _Problem(q, k, v, out, lse, dout, **how)
    dQ, dK, dV = p.zeros(p.Q), p.zeros(p.K), p.zeros(p.V)
    columns = list(_blocks(p.sizes.seq_len_k, p.block_k, "block_k"))
    for cols in columns if order is None else [columns[j] for j in order]:
        for rows in _blocks(p.sizes.seq_len_q, p.block_q, "block_q"):
            if (block := p.block(rows, cols)) is None:
                continue
            P, dS = block
            dV[..., cols, :] += p.over_group(_product(p.round(P).mT, p.dO[..., rows, :]))  # (4)
            dK[..., cols, :] += p.over_group(_product(p.round(dS).mT, p.Q[..., rows, :]))  # (7)
            dQ[..., rows, :] += _product(p.round(dS), p.K[..., cols, :])  # (8)
    return p.finish(dQ, dK, dV)


def two_passes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv in two passes, each gradient written once: seven products.

    Parameters
    ----------
    q : ``[batch, heads, seq_len_q, head_dim]``, floating, float64 too.
    k, v : ``[batch, kv_heads, seq_len_k, head_dim]``, ``[…, head_dim_v]``, dtype of q.
    out, dout : ``[batch, heads, seq_len_q, head_dim_v]``, dtype of q.
    lse : ``[batch, heads, seq_len_q]``, natural logarithm, −∞ where no key is visible.
    dlse : the gradient of a loss with respect to ``lse``, or None.
    causal, window, scale : as in the forward pass.
    block_q, block_k : rows and columns of a block; any positive sizes.

    Returns
    -------
    dq, dk, dv, shaped and typed as q, k, v; a KV head collects the gradients of its group.

    Raises
    ------
    ArgumentError
        if shapes or dtypes do not go together, or a size is not positive.
    """
    p = _Problem(
        q, k, v, out, lse, dout, dlse=dlse, causal=causal, window=window, scale=scale,
        block_q=block_q, block_k=block_k,
    )  # fmt: skip
    dQ, dK, dV = p.zeros(p.Q), p.zeros(p.K), p.zeros(p.V)

    # -- first pass: a key block stays, query blocks go by; dV_j and dK_j grow in place -----
    for cols in _blocks(p.sizes.seq_len_k, p.block_k, "block_k"):
        for rows in _blocks(p.sizes.seq_len_q, p.block_q, "block_q"):
            if (block := p.block(rows, cols)) is None:
                continue
            P, dS = block
            dV[..., cols, :] += p.over_group(_product(p.round(P).mT, p.dO[..., rows, :]))  # (4)
            dK[..., cols, :] += p.over_group(_product(p.round(dS).mT, p.Q[..., rows, :]))  # (7)

    # -- second pass: a query block stays, key blocks go by; dQ_i grows in place ------------
    for rows in _blocks(p.sizes.seq_len_q, p.block_q, "block_q"):
        for cols in _blocks(p.sizes.seq_len_k, p.block_k, "block_k"):
            if (block := p.block(rows, cols)) is None:
                continue
            _, dS = block
            dQ[..., rows, :] += _product(p.round(dS), p.K[..., cols, :])  # (8)
    return p.finish(dQ, dK, dV)


# -- parts ---------------------------------------------------------------------


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of accumulators: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b accumulated wide: the factors' values are exact there, so only sums round."""
    return a.to(_wide(a)) @ b.to(_wide(b))


class _Problem:
    """The tensors with the query heads of a group in a dimension of their own.

    Q, O and dO are ``[batch, kv_heads, group, seq_len_q, …]``; K and V are
    ``[batch, kv_heads, 1, seq_len_k, …]`` and broadcast over the group: no copy.
    """

    def __init__(
        self, q, k, v, out, lse, dout, *, dlse=None, causal=False, window=None, scale=None,
        block_q=64, block_k=64,
    ) -> None:  # fmt: skip
        self.sizes: Sizes = check_qkv(q, k, v)
        s = self.sizes
        for name, tensor in (("out", out), ("dout", dout)):
            check_same_shape(name, tensor, (s.batch, s.heads, s.seq_len_q, s.head_dim_v), q)
        for name, tensor in (("lse", lse), ("dlse", dlse)):
            rows = (s.batch, s.heads, s.seq_len_q)
            if tensor is not None and tuple(tensor.shape) != rows:
                raise ArgumentError(
                    f"{name}.shape", tuple(tensor.shape), "is not one number per row of queries.",
                    f"Pass {rows}.",
                )  # fmt: skip
        self.scale = check_scale(scale, s.head_dim)
        self.block_q = check_positive_int("block_q", block_q)
        self.block_k = check_positive_int("block_k", block_k)
        self.band = Band.of(s.seq_len_q, s.seq_len_k, causal, window)
        self.dtype, self.wide = q.dtype, _wide(q)
        group = (s.kv_heads, s.group)
        self.Q, self.dO = q.unflatten(1, group), dout.unflatten(1, group)
        self.K, self.V = k.unsqueeze(2), v.unsqueeze(2)
        self.D = delta(dout, out, dlse).unflatten(1, group)  # (1)
        # A row that saw nothing has S = −∞ and LSE = −∞, whose difference is NaN; with +∞ in place
        # of the LSE its P is 0.
        lse = torch.where(lse == -math.inf, math.inf, lse)
        self.LSE = lse.to(self.wide).unflatten(1, group)

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(like.shape, dtype=self.wide, device=like.device)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """A factor of a product, in the dtype in which tensor cores take it."""
        return x.to(self.dtype)

    def over_group(self, x: torch.Tensor) -> torch.Tensor:
        """A KV head collects what each query head of its group gives it."""
        return x.sum(dim=2, keepdim=True)

    def block(self, rows: slice, cols: slice):
        """P and dS of a block, or None if no pair of it is visible."""
        how = self.band.block(rows, cols)
        if how == "none":
            return None
        visible = self.band.mask(rows, cols, self.Q.device) if how == "some" else None
        return block_of_pairs(
            self.Q[..., rows, :], self.K[..., cols, :], self.V[..., cols, :],
            self.dO[..., rows, :], self.LSE[..., rows], self.D[..., rows], self.scale, visible,
        )  # fmt: skip

    def finish(self, dQ, dK, dV):
        """The scale, once for each of dQ and dK instead of once for each block; q's layout."""
        dq = (dQ * self.scale).flatten(1, 2).to(self.dtype)
        dk = (dK * self.scale).squeeze(2).to(self.dtype)
        return dq, dk, dV.squeeze(2).to(self.dtype)
