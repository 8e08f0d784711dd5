"""What attention should give, in float64, and how far low precision may be from it.

Written apart from labkit on purpose: it shares no line with what it judges.  A fixed
tolerance would be a guess; the bound here is the error that plain attention in the same
dtype makes against float64, times a small factor (flash-attention's tests use 2 for the
output and 3 for gradients).
"""

from __future__ import annotations

import torch


def hidden_pairs(n_q: int, n_k: int) -> torch.Tensor:
    """True where a causal mask aligned to the bottom right hides a score."""
    return torch.tensor([[j - i > n_k - n_q for j in range(n_k)] for i in range(n_q)])


def attention(q, k, v, *, causal=False, scale=None):
    """O, S and P in the dtype of q, by the book: KV heads repeated, rows without keys 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    p_input = s
    if causal:
        hidden = hidden_pairs(q.shape[2], k.shape[2]).to(q.device)
        s = torch.where(hidden, torch.tensor(float("-inf"), dtype=s.dtype, device=s.device), s)
        dead = hidden.all(dim=1)[:, None]
        p_input = torch.where(dead, torch.zeros_like(s), s)
        p = torch.where(dead, torch.zeros_like(s), torch.softmax(p_input, dim=-1))
    else:
        p = torch.softmax(p_input, dim=-1)
    return torch.einsum("bhij,bhjd->bhid", p, v), s, p


def attention_f64(q, k, v, *, causal=False, scale=None):
    """O, S and P in float64, from the values that q, k, v hold in their own dtype."""
    return attention(q.double(), k.double(), v.double(), causal=causal, scale=scale)


def gradients_f64(q, k, v, dout, *, causal=False, scale=None):
    """dq, dk, dv in float64 by autograd through the oracle."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, _, _ = attention(*leaves, causal=causal, scale=scale)
    return torch.autograd.grad(out, leaves, dout.double())


def gradients_plain(q, k, v, dout, *, causal=False, scale=None):
    """dq, dk, dv in the dtype of q, by autograd: the yardstick of the error bound."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, _, _ = attention(*leaves, causal=causal, scale=scale)
    return torch.autograd.grad(out, leaves, dout)


def assert_within_low_precision_error(ours, oracle, plain, *, factor=2.0, what="output"):
    """‖ours − f64‖ ≤ factor · ‖plain − f64‖ + ε, for the largest and for the mean error.

    ``oracle`` is float64, ``plain`` is ordinary attention in the dtype of ``ours``; ε is one
    rounding of the largest true value, for sizes where plain happens to be exact.
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
        assert error <= allowed, f"{what}: {name} error {error:.3g}, allowed {allowed:.3g}"
