"""Exercises of chapter 14 (what did it look at?)."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["overhead", "returned_bytes", "spread_over_tokens", "weights_of_branch"]


def _random(*shape: int, seed: int = 14) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _expect_matrix(value: Any, shape: tuple[int, ...], where: str) -> None:
    import torch

    expect(
        isinstance(value, torch.Tensor),
        f"The weights should be a tensor, not {type(value).__name__}.",
    )
    expect(
        tuple(value.shape) == shape,
        f"{where}the weights have shape {list(value.shape)}, not {list(shape)}.",
    )


def _same(a: Any, b: Any) -> bool:
    import torch

    return a.shape == b.shape and torch.allclose(a.double(), b, rtol=0, atol=1e-9, equal_nan=True)


@exercise("Weights from the LSE")
def weights_of_branch(answer: Any) -> str:
    """Grade ``weights_of_branch(Q, K, LSE, seen, scale)``: one head, ``[M, N]``."""
    import torch

    for m, n, d, scale in ((5, 7, 4, 0.5), (3, 3, 2, 1.0), (6, 9, 3, 0.3)):
        q, k = _random(m, d), _random(n, d, seed=3)
        seen = _random(m, n, seed=4) > -0.3
        seen[0] = False  # a query before the first complete block
        s = (scale * q @ k.T).masked_fill(~seen, -math.inf)
        own = torch.logsumexp(s, -1)
        # Keys of another branch may share the row's LSE: the weights then sum to less than 1.
        for lse, kind in ((own, "its own LSE"), (torch.logaddexp(own, own - 1), "a merged LSE")):
            right = torch.where(seen, torch.exp(s - lse[:, None]), 0.0)
            got = call(answer, q.clone(), k.clone(), lse.clone(), seen.clone(), scale)
            where = f"for {m} queries, {n} keys and {kind}: "
            _expect_matrix(got, (m, n), where)
            hint = "Each weight is e^(S − LSE) of its own row."
            whole = torch.exp(scale * q @ k.T - lse[:, None])
            if not torch.isfinite(got).all():
                hint = "Row 0 sees nothing: its LSE is −∞, and e^(S + ∞) is no weight. Mask last."
            elif _same(got, whole.masked_fill(~torch.isfinite(whole), 0.0)):
                hint = "A key that is not seen has a score too. Use seen."
            elif kind != "its own LSE" and _same(got, torch.softmax(s, -1).nan_to_num()):
                hint = "Softmax normalises again. The LSE says what the row was divided by."
            elif _same(got, torch.where(seen, torch.exp(q @ k.T - lse[:, None]), 0.0)):
                hint = "The scores of the branch were scaled."
            elif _same(got, torch.where(seen, torch.exp2(s - lse[:, None]), 0.0)):
                hint = "The LSE is a natural logarithm."
            expect(_same(got, right), f"{where}the weights are not right. {hint}")
    return "any entry can be computed alone, and a row that saw nothing is 0."


@exercise("From blocks to tokens")
def spread_over_tokens(answer: Any) -> str:
    """Grade ``spread_over_tokens(P, length, stride, seq_len)``: ``[M, C]`` to ``[M, seq_len]``."""
    import torch

    for n, length, stride in ((12, 4, 4), (14, 4, 4), (16, 8, 4), (17, 6, 2), (3, 4, 4)):
        blocks = max(0, (n - length) // stride + 1)
        p = torch.softmax(_random(5, blocks), -1) if blocks else torch.zeros(5, 0).double()
        right = torch.zeros(5, n, dtype=torch.float64)
        for c in range(blocks):
            right[:, c * stride : c * stride + length] += p[:, c : c + 1] / length
        got = call(answer, p.clone(), length, stride, n)
        where = f"for {n} tokens in blocks of {length}, one every {stride}: "
        _expect_matrix(got, (5, n), where)
        hint = "Token j gets P/length of every block that holds it, and 0 if none does."
        last = torch.zeros_like(right)
        for c in range(blocks):
            last[:, c * stride : c * stride + length] = p[:, c : c + 1] / length
        if _same(got, right * length):
            hint = "The block's probability is shared: divide by its tokens."
        elif _same(got, right * length / stride) and stride != length:
            hint = "A compressed key is the mean of `length` tokens, however far the next one is."
        elif _same(got, last):
            hint = "Blocks overlap: add, do not overwrite."
        expect(_same(got, right), f"{where}the weights are not right. {hint}")
    return "rows keep their sum, and with mean pooling the product with v does not change."


@exercise("What comes back")
def returned_bytes(answer: Any) -> str:
    """Grade ``returned_bytes(batch, seq_len, heads, kv_heads, slots)`` of ``nsa_func``."""
    for b, m, hq, h, s in ((1, 65536, 64, 4, 8), (2, 100, 8, 8, 3), (1, 1, 32, 2, 16)):
        got = expect_number(call(answer, b, m, hq, h, s), "The number of bytes")
        right = 4 * b * m * (3 * hq + h * s)
        mistakes = {
            4 * b * m * (hq + h * s): "There is an LSE for each of the three branches.",
            4 * b * m * (2 * hq + h * s): "The window returns its LSE as well.",
            4 * b * m * (3 * hq + hq * s): "Blocks are chosen for a KV head, not for a query head.",
            4 * b * m * (3 * hq + 2 * h * s): "Both entries hold the same tensor of blocks.",
            4 * b * m * (3 * h + h * s): "Every query head has an LSE.",
            b * m * (3 * hq + h * s): "float32 and int32 take 4 bytes each.",
            4 * b * m * 3 * hq: "The chosen blocks come back too.",
            4 * b * hq * m * m: "That is what the weights of one branch would take.",
        }
        hint = "" if got == right else mistakes.get(got, "Count three LSEs and one choice.")
        expect(
            got == right,
            f"for batch {b}, {m} queries, {hq} heads, {h} KV heads and {s} slots you return "
            f"{got:g}. {hint}",
        )
    return "it grows with the queries alone; the weights would grow with their square."


@exercise("An honest overhead")
def overhead(answer: Any) -> str:
    """Grade ``overhead(without, with_)``: samples in turns, the first round a warm-up."""
    cases = (
        ([900.0, 1.0, 1.0, 1.0, 1.0], [1.1, 1.1, 1.1, 1.1, 1.1]),
        ([50.0, 1.0, 2.0, 3.0, 4.0, 5.0], [50.0, 1.2, 2.2, 3.3, 4.4, 55.0]),
        ([10.0, 4.0, 1.0], [1.0, 4.0, 2.0]),
    )
    for a, b in cases:
        got = expect_number(call(answer, list(a), list(b)), "The overhead")
        pairs = [y / x for x, y in zip(a, b, strict=True)]
        right = median(pairs[1:]) - 1
        mistakes = {
            median(pairs) - 1: "The first round is a warm-up: leave it out.",
            sum(b) / sum(a) - 1: "A sum is decided by its slowest sample, and the first round is "
            "a warm-up.",
            sum(b[1:]) / sum(a[1:]) - 1: "A sum is decided by its slowest sample: take a median.",
            sum(pairs[1:]) / len(pairs[1:]) - 1: "A mean is moved by one slow sample: take a "
            "median.",
            median(b[1:]) / median(a[1:]) - 1: "The machine drifts: compare within a round, then "
            "take the median of the ratios.",
            right + 1: "An overhead of nothing is 0: subtract 1.",
            1 - 1 / (right + 1): "The overhead is relative to the time without.",
        }
        near = (why for value, why in mistakes.items() if math.isclose(got, value, rel_tol=1e-9))
        hint = next(near, "Ratio within each round, median over the rounds, minus 1.")
        expect(
            math.isclose(got, right, rel_tol=1e-9, abs_tol=1e-12),
            f"for {a} ms without and {b} ms with you return {got:.4g}. {hint}",
        )
    return "a warm-up is left out, a drift cancels within a round, and a hiccup does not count."
