"""Exercises of chapter 01 (what attention writes)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["attention", "crossover", "peak", "scores_bytes"]


@exercise("Bytes of the scores")
def scores_bytes(answer: Any) -> str:
    """Grade ``scores_bytes(batch, heads, seq_len_q, seq_len_k, itemsize)``."""
    for batch, heads, rows, columns, size in ((1, 1, 512, 512, 4), (2, 12, 7, 1000, 2)):
        got = expect_number(call(answer, batch, heads, rows, columns, size), "The result")
        right = batch * heads * rows * columns * size
        where = f"for batch={batch}, heads={heads}, {rows} queries, {columns} keys, {size} bytes"
        mistakes = {
            2 * right: "That is S and P together; the question asks for S alone.",
            right / size: "That is the number of elements. How many bytes does each take?",
            batch * heads * rows**2 * size: "S has one column per key, not per query.",
            batch * heads * columns**2 * size: "S has one row per query, not per key.",
            rows * columns * size: "That is one head of one batch element.",
            heads * rows * columns * size: "Each batch element has its own S.",
            batch * rows * columns * size: "Each head has its own S.",
        }
        hint = mistakes.get(got, "Count rows, columns, heads and batch elements.")
        expect(got == right, f"{where} you return {got:,.0f} bytes. {hint}")
    return "one row per query, one column per key, for each head and batch element."


@exercise("The crossover")
def crossover(answer: Any) -> str:
    """Grade ``crossover(head_dim, heads, kv_heads)``."""
    for head_dim, heads, kv_heads in ((64, 12, 12), (128, 32, 8), (80, 32, 1), (1, 3, 1)):
        got = expect_number(call(answer, head_dim, heads, kv_heads), "The result")
        where = f"for head_dim={head_dim}, heads={heads}, kv_heads={kv_heads}"
        expect(got == int(got), f"{where} you return {got}. A seq_len is a whole number: round up.")

        def outweighs(n: int, d: int = head_dim, h: int = heads, hkv: int = kv_heads) -> bool:
            return 2 * h * n * n >= (2 * h + 2 * hkv) * n * d

        n = int(got)
        expect(
            n >= 1 and outweighs(n),
            f"{where} you return {n}, but there S and P are still smaller than Q, K, V and O.",
        )
        expect(
            n == 1 or not outweighs(n - 1),
            f"{where} you return {n}, but at {n - 1} S and P outweigh the rest already. "
            "Do K and V have as many heads as Q?",
        )
    return "N = d (H + Hkv) / H, rounded up; the dtype and the batch cancel."


@exercise("Attention in three steps")
def attention(answer: Any) -> str:
    """Grade ``causal_attention_steps(q, k, v)`` returning O and P, in float64."""
    import torch

    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for batch, heads, nq, nk, d in ((1, 1, 4, 4, 3), (2, 3, 5, 9, 8), (1, 2, 1, 6, 4)):
        q = random(batch, heads, nq, d)
        k, v = random(batch, heads, nk, d), random(batch, heads, nk, d)
        keep = [x.clone() for x in (q, k, v)]
        got = call(answer, q, k, v)
        expect(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "Return two tensors: O and P, in this order.",
        )
        out, prob = got
        where = f"for {nq} queries and {nk} keys"
        shapes = {"O": (out, (batch, heads, nq, d)), "P": (prob, (batch, heads, nq, nk))}
        for name, (tensor, shape) in shapes.items():
            actual = tuple(getattr(tensor, "shape", ()))
            expect(actual == shape, f"{where} {name} has shape {actual}, should be {shape}.")
        expect(
            all(torch.equal(a, b) for a, b in zip(keep, (q, k, v), strict=True)),
            "Your function changes its inputs. Work on new tensors.",
        )
        expect(not torch.isnan(prob).any(), f"{where} P holds NaN. Is a whole row masked?")

        # the oracle: one query at a time, over the keys that it may see, no mask at all
        for b in range(batch):
            for h in range(heads):
                for i in range(nq):
                    seen = i + nk - nq + 1
                    row, name = prob[b, h, i], f"row {i} of P ({where})"
                    hidden = row[seen:]
                    expect(
                        not hidden.any(),
                        f"{name} gives weight to keys that query {i} may not see: "
                        f"key {seen} and later. The last query sees all {nk} keys.",
                    )
                    expect(
                        math.isclose(float(row.sum()), 1, abs_tol=1e-12),
                        f"{name} sums to {float(row.sum()):.6f}, not 1. "
                        "Does the softmax run over the keys, after the mask?",
                    )
                    logits = k[b, h, :seen] @ q[b, h, i]
                    weight = torch.exp((logits - logits.max()) / math.sqrt(d))
                    weight = weight / weight.sum()
                    expect(
                        torch.allclose(row[:seen], weight, rtol=0, atol=1e-12),
                        f"{name} sums to 1 but has the wrong weights. "
                        f"Are the scores divided by √d = {math.sqrt(d):.3f}?",
                    )
                    expect(
                        torch.allclose(out[b, h, i], weight @ v[b, h, :seen], rtol=0, atol=1e-12),
                        f"row {i} of O ({where}) is not the average of V that P asks for.",
                    )
    return "equal to one query at a time, to float64's last digits."


#: the function of the exercise, as the chapter prints it
def _five_lines(q: Any, k: Any, v: Any) -> Any:
    import torch

    d = q.shape[-1]
    s = q @ k.transpose(-1, -2)
    s = s / d**0.5
    s = s - s.amax(-1, keepdim=True)
    e = torch.exp(s)
    p = e / e.sum(-1, keepdim=True)
    return p @ v


@exercise("Read the peak off the code")
def peak(answer: Any) -> str:
    """Grade the peak of the printed function in units of S; the key is traced, not typed."""
    import torch

    from labkit.memory import scores_buffer_bytes, trace

    got = expect_number(answer, "The peak")
    n, d = 2048, 1
    unit = scores_buffer_bytes(n, dtype="float32")
    right = round(trace(_five_lines, *(torch.empty(1, 1, n, d) for _ in range(3))).peak / unit)
    hints = {
        right - 1: "While p is written, is only e still alive?",
        right + 1: "An assignment to s frees the tensor that s named before.",
        right + 2: "That counts every tensor ever made. Most are dead before p is written.",
    }
    hint = hints.get(got, "Go line by line: which names are bound?")
    expect(got == right, f"Not {got:g}. {hint}")
    return "s, e and p are alive while p is written."
