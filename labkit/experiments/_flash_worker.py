"""The program that runs cases of attention on the GPU and judges them against float64.

Started by ``labkit.experiments.flash_correctness`` as
``python -m labkit.experiments._flash_worker`` with a JSON list of cases on standard input, several
side by side: most of the time goes into compiling.  Prints one JSON line per case and road.

A *road* is one of the kernels that can compute a case:

``default``
    what ``flash_attention`` chooses by itself for a problem of this size.
``descriptors``
    the Triton kernels with tiles brought in by the copy engine, which large problems take.
``by_hand``
    the hand-pipelined Hopper kernels, which large problems take.

What is right is computed here by the book, in float64: P in memory, KV heads repeated.  The
tests have another oracle, written apart, and compare the two.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from labkit.experiments._correctness import on_every_road, serve
from labkit.experiments._flash_cases import Case, make  # noqa: F401 - a worker has both

ROADS = ("default", "descriptors", "by_hand")
#: how many times the error of plain attention is allowed
FACTOR = 2.0
_EPS32 = torch.finfo(torch.float32).eps


# -- by the book ---------------------------------------------------------------------------------


def hidden(n_q: int, n_k: int, causal: bool, window: int | None, device: Any) -> torch.Tensor:
    """True where query i does not see key j, ``[n_q, n_k]``."""
    i = torch.arange(n_q, device=device)[:, None] + (n_k - n_q)
    j = torch.arange(n_k, device=device)[None, :]
    out = j > i if causal else torch.zeros(n_q, n_k, dtype=torch.bool, device=device)
    if window is not None:
        out = out | (j <= i - window) | (j >= i + window)
    return out


def attention(q, k, v, *, causal, window, scale) -> tuple[torch.Tensor, ...]:
    """O, LSE, S and P in q's dtype; O = 0 and LSE = −∞ where a row sees nothing."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    dark = hidden(q.shape[2], k.shape[2], causal, window, q.device)
    blind = dark.all(-1)
    s = s.masked_fill(dark, -math.inf)
    safe = s.masked_fill(blind[:, None], 0.0)
    p = torch.softmax(safe, -1).masked_fill(blind[:, None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(blind, -math.inf)
    return p @ v, lse, s, p


def gradients(q, k, v, dout, **options) -> tuple[torch.Tensor, ...]:
    """dQ, dK, dV by autograd through :func:`attention`, in q's dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*leaves, **options)[0], leaves, dout)


# -- what is admitted beside twice the error of plain attention ----------------------------------


def base_two(q, k, v, s64, p64) -> torch.Tensor:
    """What multiplying each score by log₂e, rounded to float32, does to O: root mean square."""
    group = q.shape[1] // k.shape[1]
    p_error = torch.where(torch.isneginf(s64), 0.0, _EPS32 * s64.abs() * p64)
    return (p_error.square() @ v.double().repeat_interleave(group, dim=1).square()).sqrt()


def remade(q, k, v, dout, dlse, s64, p64, scale) -> tuple[torch.Tensor, ...]:
    """What making P again does to dQ, dK, dV: root mean square.

    P comes from scores and an LSE that each carry a float32 rounding, and dP − δ from two
    different sums; plain attention keeps P.  A sum's rounding is one of the terms that were
    added, not of what is left when they cancel.  dS is rounded to the dtype of K before it is
    multiplied, and may be subnormal there.  δ is made of O as it was rounded to q's dtype; where
    one key takes nearly all the weight, dP − δ cancels down to that rounding.
    """
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    eps = torch.finfo(q.dtype).eps
    tiny = torch.finfo(q.dtype).smallest_normal * eps
    q, k, v, dout = (t.double() for t in (q, k, v, dout))
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    dlse = torch.zeros_like(q[..., 0]) if dlse is None else dlse.double()
    dark = torch.isneginf(s64)
    lse = torch.logsumexp(s64, -1)
    size = torch.where(torch.isneginf(lse), 0.0, lse).abs()[..., None]
    size = size + q.abs() @ k.mT.abs() * scale
    p_error = _EPS32 * size * p64

    dp, dp_size = dout @ v.mT, dout.abs() @ v.mT.abs()
    delta, delta_size = (dp * p64).sum(-1) - dlse, (dp_size * p64).sum(-1) + dlse.abs()
    one_hot = (p64 > 0.9).any(-1) & (p64 < 1).all(-1)
    o_rounding = eps * (dout * (p64 @ v)).square().sum(-1).sqrt()
    delta_error = (_EPS32 * delta_size + torch.where(one_hot, o_rounding, 0.0))[..., None]
    ds_error = (p_error * (dp - delta[..., None])).abs()
    ds_error = (ds_error + p64 * (_EPS32 * dp_size + delta_error) + tiny) * scale
    ds_error = torch.where(dark, 0.0, ds_error)

    dq = ds_error.square() @ k.square()
    dk = (ds_error.square().mT @ q.square()).unflatten(1, (-1, group)).sum(2)
    dv = ((p_error + tiny).square().mT @ dout.square()).unflatten(1, (-1, group)).sum(2)
    return tuple(x.sqrt() + tiny for x in (dq, dk, dv))


# -- judging -------------------------------------------------------------------------------------


def compared(own, wanted, yardstick, more, rounding: float) -> dict[str, float]:
    """``own`` against float64: largest errors, what was allowed, and the worse of two ratios.

    Allowed is twice the error of ``yardstick``, for the largest and for the mean, and beside that
    ``rounding`` and ``more``: a standard deviation of each element, or None.
    """
    error, least = (own.double() - wanted).abs(), (yardstick - wanted).abs()
    ratios = []
    # The admitted error is a standard deviation; of n draws the largest is √(2 ln n) of them.
    most = math.sqrt(2 * math.log(max(2, error.numel())))
    for norm, draws in ((torch.Tensor.mean, 1.0), (torch.Tensor.max, most)):
        allowed = FACTOR * norm(least).item() + rounding
        allowed += 0.0 if more is None else draws * norm(more).item()
        ratios.append(norm(error).item() / allowed)
    ratio = max(ratios) if torch.isfinite(own).all() else math.inf
    shown = {"error": error.max().item(), "plain": least.max().item(), "allowed": allowed}
    size = wanted.square().mean().sqrt().item() or 1.0
    shown["rms"] = error.square().mean().sqrt().item() / size
    shown["rms_plain"] = least.square().mean().sqrt().item() / size
    return shown | {"ratio": ratio}


def judge(case: Case, tensors: tuple, got: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """``{tensor: {"error", "plain", "allowed", "ratio"}}``: largest errors, and the worse of the
    ratios error / allowed for the largest and the mean error; infinite where not finite."""
    q, k, v, dout = tensors
    options = case.options
    o64, lse64, s64, p64 = attention(q.double(), k.double(), v.double(), **options)
    true = {"o": o64, "lse": lse64} | dict(
        zip(("dq", "dk", "dv"), gradients(*(x.double() for x in tensors), **options), strict=True)
    )
    plain = {"o": attention(q, k, v, **options)[0]} | dict(
        zip(("dq", "dk", "dv"), gradients(q, k, v, dout, **options), strict=True)
    )
    # LSE is float32 whatever the inputs are
    plain["lse"] = attention(q.float(), k.float(), v.float(), **options)[1]
    extra = {"o": base_two(q, k, v, s64, p64)} | dict(
        zip(("dq", "dk", "dv"), remade(q, k, v, dout, None, s64, p64, case.scale), strict=True)
    )
    largest = torch.where(torch.isneginf(s64), 0.0, s64).abs().max().item()
    blind = torch.isneginf(lse64)
    out = {}
    for name, own in got.items():
        wanted, yardstick = true[name], plain[name].double()
        more = extra.get(name)
        if name == "lse":
            if not torch.equal(torch.isneginf(own), blind):
                out[name] = dict.fromkeys(("error", "plain", "allowed"), 0.0) | {"ratio": math.inf}
                continue
            own, wanted, yardstick = (x.masked_fill(blind, 0.0) for x in (own, wanted, yardstick))
            rounding = 16 * _EPS32 * max(1.0, largest)
        else:
            rounding = torch.finfo(own.dtype).eps * max(1e-30, wanted.abs().max().item())
        out[name] = compared(own, wanted, yardstick, more, rounding)
    return out


# -- roads ---------------------------------------------------------------------------------------


def roads(q, k, v, dout, case: Case) -> list[str]:
    """Which kernels can compute these tensors."""
    from labkit.flash import hopper, hopper_backward, launch

    found = ["default"]
    if launch._describable(q, k, v, dout) and launch.card(q)[0] >= 90:
        found.append("descriptors")
    reasons = [
        module.supports(q, k, v, causal=case.causal, window=case.window)
        for module in (hopper, hopper_backward)
    ]
    if reasons == [None, None]:
        found.append("by_hand")
    return found


def attend(q, k, v, dout, case: Case, road: str) -> dict[str, torch.Tensor]:
    """o, lse, dq, dk, dv by one road."""
    from labkit.flash import flash_attention, launch
    from labkit.flash.tuning import Config

    if road == "default":
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, lse = flash_attention(*leaves, return_lse=True, **case.options)
        grads = torch.autograd.grad(o, leaves, dout)
        return {"o": o.detach(), "lse": lse.detach()} | dict(
            zip(("dq", "dk", "dv"), grads, strict=True)
        )
    scale = case.d**-0.5 if case.scale is None else case.scale
    if road == "descriptors":
        call = launch.Call(case.causal, scale, case.window, "ieee", case.n_q, case.n_k)
        tile = 64 if q.element_size() == 2 else 32
        config = Config(tile, tile, 4, 2, descriptors=True)
        o, lse = launch.forward(q, k, v, call, config=config, splits=1)
        grads = launch.backward(
            dout, None, q, k, v, o, lse, call, dkdv_config=config, dq_config=config
        )
        return {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    from labkit.flash import hopper, hopper_backward

    options = {"scale": scale, "causal": case.causal, "window": case.window}
    dout = dout if launch._describable(dout) else dout.contiguous()
    o, lse = launch.like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    hopper.forward(q, k, v, o, lse, **options)
    delta = (dout.float() * o.float()).sum(-1).contiguous()
    dq, dk, dv = (launch.like(x, x.shape[3]) for x in (q, k, v))
    hopper_backward.backward(q, k, v, dout, lse, delta, dq, dk, dv, **options)
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def run(case: Case, device: str = "cuda") -> list[dict[str, Any]]:
    """Every road of one case, judged; outputs are full of NaN before they are written."""
    return on_every_road(sys.modules[__name__], case, device)


if __name__ == "__main__":
    serve(sys.modules[__name__])
