"""Exercises of chapter 05 (what the backward pass keeps)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["backward", "delta", "longest", "saved", "softmax_backward"]


def _random(*shape: int, seed: int = 5) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _same(a: Any, b: Any) -> bool:
    import torch

    return a.shape == b.shape and torch.allclose(a.double(), b, rtol=0, atol=1e-9)


def _expect_tensor(value: Any, shape: Any, name: str, where: str) -> None:
    import torch

    expect(
        isinstance(value, torch.Tensor), f"{name} should be a tensor, not {type(value).__name__}."
    )
    expect(value.shape == shape, f"{where}{name} has shape {list(value.shape)}, not {list(shape)}.")


@exercise("The softmax, backwards")
def softmax_backward(answer: Any) -> str:
    """Grade ``softmax_backward(P, dP)`` returning dS, in float64."""
    import torch

    for shape in ((4, 6), (1, 3), (2, 3, 5, 7)):
        s = _random(*shape).requires_grad_()
        p = torch.softmax(s, dim=-1)
        d_p = _random(*shape, seed=6)
        (right,) = torch.autograd.grad(p, s, d_p)
        p = p.detach()
        keep = p.clone(), d_p.clone()
        got = call(answer, p, d_p)
        where = f"for P of shape {list(shape)}: "
        _expect_tensor(got, right.shape, "dS", where)
        expect(_same(p, keep[0]) and _same(d_p, keep[1]), "Your function changed its inputs.")
        product = d_p * p
        mistakes = [
            (product * (1 - p), "(1 − P) keeps the diagonal of the Jacobian only"),
            (product, "that is P ⊙ dP: raising one score lowers the other probabilities too"),
            (d_p - product.sum(-1, keepdim=True), "the factor P in front is missing"),
            (p * (d_p - product.sum(-2, keepdim=True)), "the sum runs along the row, dim=-1"),
            (p * (d_p - product.mean(-1, keepdim=True)), "it is a sum, not a mean"),
            (p * (d_p - d_p.sum(-1, keepdim=True)), "the sum is of dP ⊙ P, not of dP"),
            (p * (d_p + product.sum(-1, keepdim=True)), "the row's sum is subtracted"),
            (p * (d_p - product.sum()), "each row has its own sum"),
        ]
        why = next((text for wrong, text in mistakes if _same(got, wrong)), "")
        expect(
            _same(got, right),
            f"{where}dS differs from autograd's. "
            + (f"{why[0].upper()}{why[1:]}." if why else "Write out the sum over j."),
        )
    return "it agrees with autograd in float64, and each row of dS sums to 0."


@exercise("Attention, backwards")
def backward(answer: Any) -> str:
    """Grade ``attention_backward(q, k, v, dout)`` returning dQ, dK, dV, in float64."""
    import torch

    for nq, nk, d, dv in ((3, 3, 4, 4), (2, 5, 4, 6), (6, 2, 9, 3)):
        q, k, v = (
            t.requires_grad_()
            for t in (_random(2, 2, nq, d), _random(2, 2, nk, d, seed=8), _random(2, 2, nk, dv))
        )
        d_out = _random(2, 2, nq, dv, seed=9)
        p = torch.softmax(q @ k.mT * d**-0.5, dim=-1)
        right = torch.autograd.grad(p @ v, (q, k, v), d_out)
        q, k, v, p = (t.detach() for t in (q, k, v, p))
        with torch.no_grad():
            got = call(answer, q.clone(), k.clone(), v.clone(), d_out.clone())
        expect(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "Return three tensors: dQ, dK, dV, in this order.",
        )
        if any(t is None or t is ... for t in got):
            call(lambda: None)  # a skeleton that returns a tuple
        where = f"for {nq} queries, {nk} keys, d = {d}, dv = {dv}: "
        for name, mine, true, like in zip(
            ("dQ", "dK", "dV"), got, right, ("Q", "K", "V"), strict=True
        ):
            _expect_tensor(mine, true.shape, name, where + f"(as {like}) ")
        d_p = d_out @ v.mT
        diagonal = p * d_p * (1 - p)
        mistakes = {
            "dV": [(p @ p.mT @ d_out if nq == nk else None, "dV = Pᵀ dO")],
            "dQ": [
                (right[0] * math.sqrt(d), "S was scaled by 1/√d, so its gradient is too"),
                (right[0] / math.sqrt(d), "the scale enters once, not twice"),
                (diagonal @ k * d**-0.5, "dS has the diagonal of the Jacobian only, (1 − P)"),
                (p * d_p @ k * d**-0.5, "dS lacks the row sum"),
            ],
            "dK": [
                (right[1] * math.sqrt(d), "S was scaled by 1/√d, so its gradient is too"),
                (right[1] / math.sqrt(d), "the scale enters once, not twice"),
                (diagonal.mT @ q * d**-0.5, "dS has the diagonal of the Jacobian only, (1 − P)"),
            ],
        }
        # dV first: it needs the least
        for name, mine, true in sorted(
            zip(("dQ", "dK", "dV"), got, right, strict=True), key=lambda t: t[0] != "dV"
        ):
            why = next((w for m, w in mistakes[name] if m is not None and _same(mine, m)), "")
            expect(
                _same(mine, true),
                f"{where}{name} differs from autograd's." + (f" Hint: {why}." if why else ""),
            )
    return "three gradients, square and not, agree with autograd in float64."


@exercise("One number per row")
def delta(answer: Any) -> str:
    """Grade ``delta(dout, out)`` returning rowsum(dP ⊙ P), ``[batch, heads, seq_len_q]``."""
    import torch

    for nq, nk, d in ((3, 3, 4), (2, 7, 5), (5, 2, 6)):
        q, k, v = _random(2, 3, nq, d), _random(2, 3, nk, d, seed=8), _random(2, 3, nk, d, seed=7)
        d_out = _random(2, 3, nq, d, seed=9)
        p = torch.softmax(q @ k.mT, dim=-1)
        right = ((d_out @ v.mT) * p).sum(-1)
        got = call(answer, d_out, p @ v)
        where = f"for {nq} queries, {nk} keys, d = {d}: "
        expect(isinstance(got, torch.Tensor), "delta should be a tensor.")
        if got.shape == (*right.shape, 1):
            got = got[..., 0]
        _expect_tensor(got, right.shape, "delta", where)
        expect(
            _same(got, right),
            f"{where}the result is not rowsum(dP ⊙ P). Put dP = dO Vᵀ in and exchange the sums.",
        )
    return "N numbers in place of two N × N matrices; FlashAttention's backward starts from them."


@exercise("What is saved")
def saved(answer: Any) -> str:
    """Grade the bytes that a soft-capped attention saves, in units of S, by tracing it."""
    import torch

    from labkit.memory import saved_for_backward

    said = expect_number(answer, "The answer")
    n, d = 512, 8
    q, k, v = (torch.empty(1, 1, n, d, device="meta", requires_grad=True) for _ in range(3))
    report = saved_for_backward(soft_capped, q, k, v)
    right = report.beyond_inputs / (n * n * 4)
    kept = ", ".join(t.kept_by for t in report.tensors if not t.is_input)
    hints = {
        1.0: "P is one of them. Which derivative is cheapest to write with its own result?",
        3.0: "A product with a Python number needs nothing but that number.",
        4.0: "Most of these operations need nothing, or what the next one needs anyway.",
    }
    expect(
        said == right,
        f"you say {said:g} units. {hints.get(said, 'Ask of each line what its derivative needs.')}",
    )
    return f"{right:g} units, kept by {kept}."


def soft_capped(q: Any, k: Any, v: Any) -> Any:
    """The function of the exercise: scores held between −50 and 50 by a tanh."""
    import torch

    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    s = 50 * torch.tanh(s / 50)
    p = torch.softmax(s, dim=-1)
    return p @ v


@exercise("As long as it gets")
def longest(answer: Any) -> str:
    """Grade ``longest(memory_bytes, heads, itemsize, buffers)``, the N×N buffers alone."""
    cases = [
        (12 * 2**30, 16, 2, 3),
        (80 * 2**30, 1, 4, 2),
        (10**9, 3, 4, 3),
        (24, 2, 4, 3),
        # the square root of a number so large that a float cannot hold it
        (4 * (10**9 + 7) ** 2 - 1, 1, 4, 1),
    ]
    for memory, heads, size, buffers in cases:
        got = expect_number(call(answer, memory, heads, size, buffers), "The result")
        where = (
            f"for {memory:,} bytes, {heads} heads, {size} bytes per element and {buffers} buffers "
            f"you return {got:,.0f}"
        )
        right = math.isqrt(memory // (buffers * heads * size))

        def needs(n: int, unit: int = buffers * heads * size) -> int:
            return unit * n * n

        expect(got == int(got), f"{where}: a seq_len is a whole number. Round down.")
        n = int(got)
        mistakes = {
            memory // (buffers * heads * size): "That is N². Each buffer has N × N elements.",
            math.isqrt(memory // (buffers * size)): "Each head has its own buffers.",
            math.isqrt(memory // (heads * size)): "Several buffers are alive at once.",
            math.isqrt(memory // (buffers * heads)): "An element takes more than one byte.",
        }
        hint = "" if n == right else mistakes.get(n, "")
        expect(needs(n) <= memory, f"{where}, which needs {needs(n):,}. {hint}".rstrip())
        expect(needs(n + 1) > memory, f"{where}, but {n + 1:,} fits as well. {hint}".rstrip())
    return "the integer inverse of a square, exact also where a float is not."
