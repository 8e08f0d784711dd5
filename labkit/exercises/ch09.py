"""Exercises of chapter 09 (to keep P or to compute it again)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["backward_flops", "break_even", "delta", "dq_of_block", "first_query_block"]


def _random(*shape: int, seed: int = 9) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _same(a: Any, b: Any) -> bool:
    import torch

    return a.shape == b.shape and torch.allclose(a.double(), b, rtol=0, atol=1e-9)


def _expect_tensor(value: Any, shape: Any, name: str, where: str = "") -> None:
    import torch

    expect(
        isinstance(value, torch.Tensor), f"{name} should be a tensor, not {type(value).__name__}."
    )
    expect(
        value.shape == shape, f"{where}{name} has shape {list(value.shape)}, not {list(shape)}."
    )


@exercise("The break-even head_dim")
def break_even(answer: Any) -> str:
    """Grade ``break_even(peak_flops, bandwidth, itemsize)``: 2e/β = 2d/π solved for d."""
    cases = ((19.5e12, 2.0e12, 4), (312e12, 2.0e12, 2), (67e12, 4.8e12, 4), (71e12, 936e9, 2))
    for peak, bandwidth, size in cases:
        got = expect_number(call(answer, peak, bandwidth, size), "The head_dim")
        ridge = peak / bandwidth
        right = size * ridge
        mistakes = {
            right / 2: "P is written by the forward pass and read by the backward pass: two trips.",
            2 * right: "A score takes d multiply-adds, and each is two operations.",
            ridge: "That is FLOP per byte. How many bytes does an element take?",
            1 / right: "That is its reciprocal: the peak belongs on top.",
            4 * right: "Two trips of e bytes, against 2d operations.",
        }
        near = (why for value, why in mistakes.items() if math.isclose(got, value, rel_tol=1e-9))
        hint = next(near, "Set the time of the bytes equal to the time of the operations.")
        expect(
            math.isclose(got, right, rel_tol=1e-9),
            f"for {peak / 1e12:g} TFLOP/s, {bandwidth / 1e12:g} TB/s and {size} bytes per element "
            f"you return {got:.6g}. {hint}",
        )
    return "the ridge, times the bytes of an element: narrower heads are cheaper to compute again."


@exercise("Delta, with a loss on the LSE")
def delta(answer: Any) -> str:
    """Grade ``delta(dout, out, dlse)`` such that dS = P ⊙ (dP − delta), in float64."""
    import torch

    for nq, nk, d in ((3, 3, 4), (2, 7, 5), (5, 2, 6)):
        q, k, v = _random(2, 3, nq, d), _random(2, 3, nk, d, seed=8), _random(2, 3, nk, d, seed=7)
        d_out, d_lse = _random(2, 3, nq, d, seed=6), _random(2, 3, nq, seed=5)
        s = (q @ k.mT).requires_grad_()
        p, lse = torch.softmax(s, -1), torch.logsumexp(s, -1)
        loss = ((p @ v) * d_out).sum() + (lse * d_lse).sum()
        (d_s,) = torch.autograd.grad(loss, s)
        p, d_p = p.detach(), d_out @ v.mT
        right = (d_out * (p @ v)).sum(-1) - d_lse
        assert torch.allclose(d_s, p * (d_p - right[..., None]))
        got = call(answer, d_out.clone(), p @ v, d_lse.clone())
        where = f"for {nq} queries, {nk} keys, d = {d}: "
        expect(isinstance(got, torch.Tensor), "delta should be a tensor.")
        if got.shape == (*right.shape, 1):
            got = got[..., 0]
        _expect_tensor(got, right.shape, "delta", where)
        mistakes = [
            (right + d_lse, "the gradient of the LSE is left out"),
            (right + 2 * d_lse, "the sign of dLSE: dS = P ⊙ (dP − delta), and dLSE raises dS"),
            (-right, "its sign: it is subtracted from dP"),
            ((d_out * d_out).sum(-1) - d_lse, "the product is of dO and O"),
        ]
        why = next((text for wrong, text in mistakes if _same(got, wrong)), "")
        expect(
            _same(got, right),
            f"{where}P ⊙ (dP − delta) is not autograd's dS. "
            + (f"Look at {why}." if why else "∂LSE/∂S = P: where does dLSE enter dS?"),
        )
    return "one vector takes both outputs back; the kernels need no other change."


@exercise("dQ of one query block")
def dq_of_block(answer: Any) -> str:
    """Grade ``dq_of_block(Q, K, V, dO, LSE, D, scale, block)``: one head, key blocks in turn."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    for rows, keys, d, dv, block in ((4, 8, 3, 3, 4), (3, 10, 4, 2, 4), (2, 5, 2, 3, 8)):
        scale = 0.6
        q, k, v = _random(rows, d), _random(keys, d, seed=8), _random(keys, dv, seed=7) + 1
        d_out = _random(rows, dv, seed=6)
        leaf = q.clone().requires_grad_()
        s = leaf @ k.mT * scale
        p = torch.softmax(s, -1)
        (right,) = torch.autograd.grad(p @ v, leaf, d_out)
        s, p = s.detach(), p.detach()
        lse, rowsum = torch.logsumexp(s, -1), (d_out * (p @ v)).sum(-1)
        whole_rows = False

        class Shapes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal whole_rows
                made = func(*args, **(kwargs or {}))
                view = any(r.alias_info for r in func._schema.returns)
                if isinstance(made, torch.Tensor) and not view:
                    whole_rows |= sorted(made.shape[-2:]) == [rows, keys]  # noqa: B023
                return made

        inputs = [t.clone() for t in (q, k, v, d_out, lse, rowsum)]
        with torch.no_grad(), Shapes():
            got = call(answer, *inputs, scale, block)
        where = f"for {rows} queries, {keys} keys in blocks of {block}, d = {d}, dv = {dv}: "
        _expect_tensor(got, right.shape, "dQ", where)
        d_p = d_out @ v.mT
        d_s = p * (d_p - rowsum[:, None])
        last = slice((keys - 1) // block * block, keys)
        whole = slice(0, keys // block * block)
        mistakes = [
            (right / scale, "S was scaled, so its gradient is too"),
            (right * scale, "the scale enters dQ once"),
            (p * d_p @ k * scale, "D is subtracted from each row of dP"),
            (torch.exp(s) * (d_p - rowsum[:, None]) @ k * scale, "P is e^(S − LSE)"),
            (d_s[:, last] @ k[last] * scale, "dQ is a sum over all key blocks: add, not replace"),
            (d_s[:, whole] @ k[whole] * scale, "the last block may be shorter"),
        ]
        why = next((text for wrong, text in mistakes if _same(got, wrong)), "")
        expect(
            _same(got, right),
            f"{where}dQ differs from autograd's." + (f" Hint: {why}." if why else ""),
        )
        expect(
            keys <= block or not whole_rows,
            f"{where}dQ is right, but a tensor of all {rows} × {keys} scores was made. Take "
            f"{block} keys at a time.",
        )
    return "it never holds more than one block of scores, whatever the number of keys."


@exercise("The first query that matters")
def first_query_block(answer: Any) -> str:
    """Grade ``first_query_block(key_block, block_q, block_k, seq_len_q, seq_len_k)``, causal."""
    from labkit.flash.recompute import visible_blocks

    cases = [
        (64, 64, 16, 16), (64, 64, 16, 32), (64, 64, 32, 16), (32, 64, 16, 16), (64, 32, 16, 8),
        (60, 50, 16, 16), (17, 97, 8, 16), (97, 17, 16, 4), (1, 9, 16, 4),
    ]  # fmt: skip
    for nq, nk, bq, bk in cases:
        first: dict[int, int] = {}
        for i, j, _ in visible_blocks(nq, nk, bq, bk, causal=True):
            first[j] = min(first.get(j, i), i)
        for j, right in first.items():
            got = expect_number(call(answer, j, bq, bk, nq, nk), "The block")
            where = (
                f"for key block {j}, blocks of {bq} queries and {bk} keys, {nq} queries and {nk} "
                f"keys you return {got:g}, and the answer is {right}"
            )
            hint = "Which is the first query that sees the first key of the block?"
            if got == j * bk // bq and nq != nk:
                hint = "Query i sees key j when j ≤ i + Nk − Nq: the last ones are aligned."
            elif got < 0:
                hint = "There is no block before block 0."
            elif got == right + 1:
                hint = "The block on the diagonal is visible in part, so it counts."
            expect(got == right, f"{where}. {hint}")
    return "a program of dK and dV starts there, and half of the pairs are never computed."


@exercise("Operations of two passes")
def backward_flops(answer: Any) -> str:
    """Grade ``backward_flops(seq_len_q, seq_len_k, head_dim, head_dim_v)`` of the two kernels."""
    cases = ((100, 300, 64, 80), (128, 128, 64, 64), (7, 5, 192, 128), (1, 1, 1, 1))
    for nq, nk, d, dv in cases:
        got = expect_number(call(answer, nq, nk, d, dv), "The count")
        pairs = nq * nk
        right = 2 * pairs * (4 * d + 3 * dv)
        mistakes = {
            right / 2: "A multiply-add counts as two operations.",
            2 * pairs * (3 * d + 2 * dv): "That is one pass: two passes compute S and dP twice.",
            2 * pairs * 7 * d: "V and dO are dv wide: dP and dV sum over dv or give dv columns.",
            2 * pairs * (3 * d + 4 * dv): "S, dK and dQ have d in them, S twice; dP and dV dv.",
            2 * pairs * (4 * d + 2 * dv): "dP is needed by both kernels.",
            2 * pairs * (3 * d + 3 * dv): "S is needed by both kernels.",
        }
        near = (why for value, why in mistakes.items() if got == value)
        hint = "" if got == right else next(near, "List the products of each kernel.")
        expect(
            got == right,
            f"for {nq} queries, {nk} keys, head_dim {d} and head_dim_v {dv} you return {got:g}. "
            f"{hint}",
        )
    return "four products with d in them and three with dv."
