r"""Standard attention, written the way it is taught: one line per equation.

Taught in chapter 01 (what attention writes); the backward pass in chapter 05 (what the
backward pass keeps).

.. math::
    S &= \mathrm{scale}\cdot QK^\top            \qquad [B, H, N_q, N_k] \\
    P &= \mathrm{softmax}_{\text{row}}(S)       \qquad [B, H, N_q, N_k] \\
    O &= PV                                     \qquad [B, H, N_q, d_v]

Three variants compute the same O and hold different things alive meanwhile
(``labkit.memory.schedule`` predicts each to the byte):

``out_of_place``
    every operation makes a new tensor, as the equations read and as most people write it.
``in_place``
    scale, mask and softmax overwrite the one N×N buffer.  Autograd needs the softmax's
    output unspoilt, so when gradients are recorded only scale and mask are in place.
``softmax_fp32``
    the softmax is taken in float32 and cast back, as the eager attention of many model
    libraries does to protect half precision.

Causal means aligned to the bottom right: query i sees key j when j ≤ i + Nk − Nq.  When
Nq > Nk the first Nq − Nk queries see nothing; their output is 0, where a plain softmax
would give NaN.

Grouped-query attention (fewer KV heads than query heads) costs no copy of K or V: the
queries of a group are stacked as more rows of one matrix product.  If q is not contiguous
in (heads, seq_len), stacking copies q once, N·d elements; repeating K and V for each
query head would make copies of group times their size.

Imports downwards: errors, dtypes, shapes, memory.  Loads torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from labkit.errors import check_choice
from labkit.memory.budget import check_fits
from labkit.memory.schedules import VARIANTS, attention_peak
from labkit.shapes import Sizes, check_qkv, check_same_shape, check_scale

__all__ = [
    "VARIANTS",
    "attention_steps",
    "causal_mask",
    "naive_attention",
    "naive_attention_backward",
    "softmax_backward",
    "softmax_backward_diagonal_only",
]

# Below this, the prediction is not worth its microseconds: a launch-bound attention must
# not be timed with our bookkeeping in it.
_ALWAYS_FITS = 2**30


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_scores: bool = False,
    variant: str = "out_of_place",
):
    r"""softmax(scale · QKᵀ) V in three steps, S and P written to memory.

    Parameters
    ----------
    q : torch.Tensor
        ``[batch, heads, seq_len_q, head_dim]``, float16, bfloat16, float32 or float64.
    k : torch.Tensor
        ``[batch, kv_heads, seq_len_k, head_dim]``; ``kv_heads`` divides ``heads``.
    v : torch.Tensor
        ``[batch, kv_heads, seq_len_k, head_dim_v]``.
    causal : bool
        query i sees key j when j ≤ i + Nk − Nq.
    scale : float
        multiplies QKᵀ; default 1/√head_dim.
    return_scores : bool
        also return S (scaled and masked, the input of the softmax) and P, both
        ``[batch, heads, seq_len_q, seq_len_k]``, P such that ``P @ V`` is O.
    variant : str
        ``"out_of_place"``, ``"in_place"`` or ``"softmax_fp32"``; see the module.

    Returns
    -------
    torch.Tensor or tuple
        O ``[batch, heads, seq_len_q, head_dim_v]`` in q's dtype, or ``(O, S, P)``.

    Raises
    ------
    ArgumentError
        if shapes, dtypes, devices or head counts do not go together.
    NotEnoughMemoryError
        if the predicted peak is more than the free memory of the device; nothing has been
        allocated then.

    Notes
    -----
    A NaN in a row of q stays in that row of O.  A NaN in v reaches every row, also those
    that do not see its key: P is 0 there, and 0 · NaN is NaN.  That is the price of
    multiplying by the masked half instead of skipping it.

    ``in_place`` without gradients sums a row of P in q's dtype: in float16 it is exact
    enough, and overflows when a row of more than 65504 keys is uniform.
    """
    sizes = check_qkv(q, k, v)
    check_choice("variant", variant, VARIANTS)
    scale = check_scale(scale, sizes.head_dim)
    records_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    _check_it_fits(q, sizes, causal, variant, records_grad)

    # -- step 1:  S = scale · QKᵀ, hidden scores set to −∞ ---------------------
    hidden, unseeing = _what_is_hidden(sizes, causal, q.device)
    if variant == "in_place":
        S = (_group(q, sizes) @ k.transpose(-2, -1)).mul_(scale)
        for mask, value in ((hidden, float("-inf")), (unseeing, 0.0)):
            if mask is None:
                continue
            if records_grad:  # writing into a view would make autograd clone S, twice
                S.masked_fill_(_repeat_rows(mask, sizes), value)
            else:
                _ungroup(S, sizes).masked_fill_(mask, value)
        S = _ungroup(S, sizes)
    else:
        S = _ungroup(_group(q, sizes) @ k.transpose(-2, -1), sizes) * scale
        if hidden is not None:
            S = S.masked_fill(hidden, float("-inf"))
        if unseeing is not None:
            S = S.masked_fill(unseeing, 0.0)
    scores = S if return_scores else None

    # -- step 2:  P = softmax(S) along each row --------------------------------
    if variant == "softmax_fp32":
        wide = torch.promote_types(q.dtype, torch.float32)
        P = torch.softmax(S, dim=-1, dtype=wide).to(q.dtype)
    elif variant == "in_place" and not records_grad:
        scores = S.clone() if return_scores else None
        P = _softmax_in_place(S)
    else:
        P = torch.softmax(S, dim=-1)
    del S  # else it would stay alive through step 3: the peak would be 2·S + O

    # -- step 3:  O = PV -------------------------------------------------------
    O = _ungroup(_group(P, sizes) @ v, sizes)  # noqa: E741
    if unseeing is not None:
        O = O.masked_fill(unseeing, 0.0)  # noqa: E741
    if not return_scores:
        return O
    if unseeing is not None:
        scores, P = scores.masked_fill(unseeing, float("-inf")), P.masked_fill(unseeing, 0.0)
    return O, scores, P


def attention_steps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The three steps one at a time: yields ``("S", S)``, ``("P", P)``, ``("O", O)``.

    Shapes, dtypes and errors as for :func:`naive_attention`.
    """
    O, S, P = naive_attention(q, k, v, causal=causal, scale=scale, return_scores=True)  # noqa: E741
    yield from (("S", S), ("P", P), ("O", O))


def naive_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""The gradients of attention, written by hand.

    With dO the gradient of a loss with respect to O,

    .. math::
        dV &= P^\top dO, \qquad dP = dO\,V^\top, \\
        dS &= P \odot \bigl(dP - \mathrm{rowsum}(dP \odot P)\bigr), \\
        dQ &= \mathrm{scale}\; dS\,K, \qquad dK = \mathrm{scale}\; dS^\top Q .

    (Dao et al. 2022, appendix B.2; derived in chapter 05.)

    Parameters
    ----------
    q, k, v, causal, scale
        as for :func:`naive_attention`.
    dout : torch.Tensor
        dO, ``[batch, heads, seq_len_q, head_dim_v]``, dtype and device of q.

    Returns
    -------
    tuple
        dq, dk, dv, shaped as q, k, v; a KV head collects the gradients of its group.

    Raises
    ------
    ArgumentError, NotEnoughMemoryError
        as for :func:`naive_attention`.
    """
    sizes = check_qkv(q, k, v)
    expected = (sizes.batch, sizes.heads, sizes.seq_len_q, sizes.head_dim_v)
    check_same_shape("dout", dout, expected, q)
    scale = check_scale(scale, sizes.head_dim)
    with torch.no_grad():
        _, _, P = naive_attention(q, k, v, causal=causal, scale=scale, return_scores=True)
        P, dO, Q = _group(P, sizes), _group(dout, sizes), _group(q, sizes)

        dV = P.transpose(-2, -1) @ dO
        dP = dO @ v.transpose(-2, -1)
        dS = softmax_backward(P, dP)
        dQ = dS @ k * scale
        dK = dS.transpose(-2, -1) @ Q * scale
    return _ungroup(dQ, sizes), dK, dV


def softmax_backward(P: torch.Tensor, dP: torch.Tensor) -> torch.Tensor:
    r"""dS from dP: the vector–Jacobian product of a row-wise softmax.

    The Jacobian of one row, ∂P_j/∂S_k = P_j (δ_jk − P_k), is not diagonal: raising one
    score lowers every other probability of the row.  Summed against dP it gives

    .. math:: dS_{ik} = P_{ik}\Bigl(dP_{ik} - \sum_j dP_{ij} P_{ij}\Bigr).

    ``P`` and ``dP``: ``[…, seq_len_q, seq_len_k]``, same dtype; the result likewise.
    """
    return P * (dP - (dP * P).sum(dim=-1, keepdim=True))


def softmax_backward_diagonal_only(P: torch.Tensor, dP: torch.Tensor) -> torch.Tensor:
    r"""The WRONG form dS = dP ⊙ P ⊙ (1 − P), kept to be refuted (claim C09).

    It keeps the diagonal of the softmax's Jacobian only; it is the derivative of a
    sigmoid.  Chapter 05 shows numerically what it gets wrong.  Shapes as for
    :func:`softmax_backward`.
    """
    return dP * P * (1 - P)


def causal_mask(seq_len_q: int, seq_len_k: int, device=None) -> torch.Tensor:
    """True where a score is hidden: ``[seq_len_q, seq_len_k]`` bool, j > i + Nk − Nq."""
    i = torch.arange(seq_len_q, device=device)[:, None]
    j = torch.arange(seq_len_k, device=device)[None, :]
    return j > i + (seq_len_k - seq_len_q)


# -- parts ---------------------------------------------------------------------


def _what_is_hidden(sizes: Sizes, causal: bool, device):
    """The causal mask, and the rows that it leaves nothing to see (or None, None)."""
    if not causal:
        return None, None
    hidden = causal_mask(sizes.seq_len_q, sizes.seq_len_k, device)
    if not sizes.unseeing:
        return hidden, None
    # A row of −∞ has no softmax.  Its scores become 0 and its output is set to 0 later:
    # nothing on the way is NaN, so nothing is NaN in the gradients either.
    return hidden, (torch.arange(sizes.seq_len_q, device=device) < sizes.unseeing)[:, None]


def _softmax_in_place(S: torch.Tensor) -> torch.Tensor:
    """The softmax of each row, written over S."""
    S.sub_(S.amax(dim=-1, keepdim=True))
    S.exp_()
    S.div_(S.sum(dim=-1, keepdim=True))
    return S


def _group(x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """``[B, H, N, …]`` → ``[B, Hkv, group · N, …]``: a group's queries as rows of one matrix."""
    if sizes.group == 1:
        return x
    return x.reshape(sizes.batch, sizes.kv_heads, sizes.group * x.shape[2], x.shape[3])


def _ungroup(x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """The inverse of :func:`_group` (always a view of a fresh product)."""
    if sizes.group == 1:
        return x
    return x.view(sizes.batch, sizes.heads, sizes.seq_len_q, x.shape[3])


def _repeat_rows(mask: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """A mask ``[Nq, …]`` for the grouped scores ``[B, Hkv, group · Nq, Nk]``."""
    return mask if sizes.group == 1 else mask.repeat(sizes.group, 1)


def _check_it_fits(q, sizes: Sizes, causal: bool, variant: str, training: bool) -> None:
    """Refuse, before anything is allocated, what the schedule predicts not to fit."""
    rough = 16 * sizes.batch * sizes.heads * sizes.seq_len_q * sizes.seq_len_k
    if rough < _ALWAYS_FITS or type(q) not in (torch.Tensor, torch.nn.Parameter):
        return
    if q.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return  # meta and fake tensors allocate nothing
    peak = attention_peak(
        seq_len=sizes.seq_len_q,
        seq_len_k=sizes.seq_len_k,
        batch=sizes.batch,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        head_dim_v=sizes.head_dim_v,
        dtype=sizes.dtype,
        causal=causal,
        variant=variant,
        device=q.device.type,
        # The backward pass comes later and may be given memory until then.
        training=False,
        records_grad=training,
    )
    what = f"naive attention ({variant}) over {sizes.seq_len_q} × {sizes.seq_len_k} scores"
    check_fits(peak, f"{what}, {sizes.heads} heads, batch {sizes.batch}", device=q.device)
