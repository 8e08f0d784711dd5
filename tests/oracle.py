"""What attention should give, in float64, and how far low precision may be from it.

Written apart from labkit on purpose: it shares no line with what it judges.  A fixed
tolerance would be a guess; the bound here is the error that plain attention in the same
dtype makes against float64, times a small factor (flash-attention's tests use 2 for the
output and 3 for gradients).
"""

from __future__ import annotations

import math

import torch


def hidden_pairs(n_q: int, n_k: int, *, causal=True, window=None, device=None) -> torch.Tensor:
    """True where query i may not see key j: ``[n_q, n_k]``.

    The last query stands beside the last key.  A causal query sees no key ahead of it; a
    window of W leaves the W keys up to its own, or without ``causal`` those nearer than W.
    """
    own = torch.arange(n_q, device=device)[:, None] + (n_k - n_q)
    ahead = torch.arange(n_k, device=device)[None, :] - own
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if window is not None:
        hidden = hidden | ((-ahead if causal else ahead.abs()) >= window)
    return hidden


def attention(q, k, v, *, causal=False, scale=None, window=None):
    """O, S and P in the dtype of q, by the book: KV heads repeated, rows without keys 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    p_input = s
    if causal or window is not None:
        n_q, n_k = q.shape[2], k.shape[2]
        hidden = hidden_pairs(n_q, n_k, causal=causal, window=window, device=q.device)
        s = torch.where(hidden, torch.tensor(float("-inf"), dtype=s.dtype, device=s.device), s)
        dead = hidden.all(dim=1)[:, None]
        p_input = torch.where(dead, torch.zeros_like(s), s)
        p = torch.where(dead, torch.zeros_like(s), torch.softmax(p_input, dim=-1))
    else:
        p = torch.softmax(p_input, dim=-1)
    return torch.einsum("bhij,bhjd->bhid", p, v), s, p


def log_sum_exp(s):
    """ln Σ exp of each row of S; −inf, with gradient 0, for a row that sees nothing."""
    dead = torch.isneginf(s).all(dim=-1)
    lse = torch.logsumexp(torch.where(dead[..., None], torch.zeros_like(s), s), dim=-1)
    return torch.where(dead, torch.full_like(lse, float("-inf")), lse)


def attention_f64(q, k, v, *, causal=False, scale=None, window=None):
    """O, S and P in float64, from the values that q, k, v hold in their own dtype."""
    return attention(q.double(), k.double(), v.double(), causal=causal, scale=scale, window=window)


def _gradients(leaves, dout, dlse, options):
    out, s, _ = attention(*leaves, **options)
    if dlse is None:
        return torch.autograd.grad(out, leaves, dout)
    return torch.autograd.grad([out, log_sum_exp(s)], leaves, [dout, dlse])


def gradients_f64(q, k, v, dout, *, dlse=None, **options):
    """dq, dk, dv in float64 by autograd through the oracle."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    dlse = None if dlse is None else dlse.double()
    return _gradients(leaves, dout.double(), dlse, options)


def gradients_plain(q, k, v, dout, *, dlse=None, **options):
    """dq, dk, dv in the dtype of q, by autograd: the yardstick of the error bound."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    dlse = None if dlse is None else dlse.to(q.dtype)
    return _gradients(leaves, dout, dlse, options)


def assert_within_low_precision_error(
    ours, oracle, plain, *, factor=2.0, what="output", extra=None
):
    """‖ours − f64‖ ≤ factor · ‖plain − f64‖ + ε, for the largest and for the mean error.

    ``oracle`` is float64, ``plain`` is ordinary attention in the dtype of ``ours``; ε is one
    rounding of the largest true value, for sizes where plain happens to be exact.  ``extra``,
    in the shape of ``ours``, is an error that the caller has a reason to admit beside that: a
    standard deviation of each element, of whose largest draw among n one expects √(2 ln n).
    """
    assert ours.shape == oracle.shape, f"{what}: shape {tuple(ours.shape)}, not {oracle.shape}"
    assert ours.dtype == plain.dtype, f"{what}: dtype {ours.dtype}, not {plain.dtype}"
    assert torch.isfinite(ours).all(), f"{what}: not finite where the oracle is"
    # In float64 the oracle's own roundings are as large as ours: no yardstick is finer.
    roundings = 16 if ours.dtype == torch.float64 else 1
    rounding = roundings * torch.finfo(ours.dtype).eps * max(1e-30, oracle.abs().max().item())
    for name, norm in (("largest", torch.Tensor.max), ("mean", torch.Tensor.mean)):
        error = norm((ours.double() - oracle).abs()).item()
        allowed = factor * norm((plain.double() - oracle).abs()).item() + rounding
        if extra is not None:
            draws = math.sqrt(2 * math.log(max(2, ours.numel()))) if name == "largest" else 1.0
            allowed += draws * norm(extra).item()
        assert error <= allowed, f"{what}: {name} error {error:.3g}, allowed {allowed:.3g}"
