"""Problems for the functions of labkit.nsa, and the judgement of what they give.

What is right comes from ``nsa_oracle``, which shares no line with labkit.
"""

from __future__ import annotations

import nsa_oracle
import oracle
import torch
from flash_cases import poisoned

from labkit.nsa import nsa_func, pool_mean
from labkit.nsa.semantics import FORCED

__all__ = ["BRANCHES", "NAMES", "SMALL", "alone", "assert_layer_right", "grads", "problem"]

NAMES = ("dq", "dk", "dv", "dg_cmp", "dg_slc", "dg_swa")
BRANCHES = ("compression", "selection", "window")
#: options for lengths that the interpreter manages
SMALL = {"block_counts": 2, "block_size": 16, "window_size": 9}


def problem(device, *, b=1, m=40, n=None, hq=2, h=1, d=16, dv=24, dtype=torch.float32, seed=0):
    """q, k, v, three gates and dO; strided as a model's projections are."""
    generator = torch.Generator().manual_seed(seed)
    n = m if n is None else n

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    q, k = normal(b, m, hq, d), normal(b, h, n, d).transpose(1, 2)
    v = normal(b, n, h, 2, dv)[:, :, :, 1]
    g = torch.rand(b, m, 3, hq, generator=generator).to(dtype).to(device).unbind(2)
    return (q, k, v, *g), normal(b, m, hq, dv)


def grads(function, tensors, dout):
    """o and the gradient of everything that has one."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    o = function(*leaves)
    used = [x for x in leaves if x is not None]
    return [o.detach(), *torch.autograd.grad(o, used, dout)]


def assert_layer_right(tensors, dout, cu=None, **options):
    """nsa_func, forward and every gradient, within twice what plain attention errs."""
    found = {}

    def function(*x):
        o, weights = nsa_func(*x, cu_seqlens=cu, return_attn_weights=True, **options)
        found.update(weights)
        return o

    with poisoned():
        ours = grads(function, tensors, dout)
    blocks = found["compression"]["block_indices"]
    fixed = {"block_indices": blocks, "block_size": options["block_size"], "cu_seqlens": cu,
             "window_size": options["window_size"], "scale": options.get("scale")}  # fmt: skip

    def dense(*x):
        x = [y if y is None else y * 1 for y in x]
        return nsa_oracle.layer(*x, **fixed) + 0 * sum(y.sum() for y in x if y is not None)

    exact = [None if x is None else x.double() for x in tensors]
    true, plain = grads(dense, exact, dout.double()), grads(dense, tensors, dout)
    names = ["o", *(n for n, x in zip(NAMES, tensors, strict=True) if x is not None)]
    for name, a, b, c in zip(names, ours, true, plain, strict=True):
        oracle.assert_within_low_precision_error(a, b, c, what=name, extra=1e-6 * b.abs() + 1e-6)
    if blocks is not None:
        count = options["block_counts"]
        # the kernels are given means in the dtype of k, and so is the oracle
        k_cmp = pool_mean(tensors[1], options["block_size"], cu_seqlens=cu).double()
        _, score = nsa_oracle.choice(
            exact[0], exact[1], k_cmp=k_cmp, block_counts=count,
            block_size=options["block_size"], forced=options.get("forced", FORCED), cu_seqlens=cu,
            scale=options.get("scale"),
        )  # fmt: skip
        nsa_oracle.assert_choice_is_best(
            blocks, score, block_size=options["block_size"], block_counts=count,
            forced=options.get("forced", FORCED), cu_seqlens=cu, tolerance=1e-5,
        )  # fmt: skip
    return found


def alone(tensors, branch):
    """The tensors of nsa_func with one gate, and the other branches off."""
    gates = zip(BRANCHES, tensors[3:], strict=True)
    return [*tensors[:3], *(gate if name == branch else None for name, gate in gates)]
