"""Exercises of chapter 02 (what grows)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = [
    "exponent",
    "exponent_in_heads",
    "largest_batch",
    "length_of_equal_cost",
    "scores_growth",
]


def _near(got: float, right: float, tolerance: float = 1e-9) -> bool:
    return math.isclose(got, right, rel_tol=tolerance, abs_tol=1e-12)


@exercise("Growth of the scores")
def scores_growth(answer: Any) -> str:
    """Grade ``scores_growth(seq_len=1, batch=1, heads=1, head_dim=1)``, factors by size."""
    alone = {
        "seq_len": (4, "A row and a column of S for each token."),
        "batch": (2, "Each sequence has its own S."),
        "heads": (2, "Each head has its own S."),
        "head_dim": (1, "S holds one number per pair of tokens, however long the vectors are."),
    }
    for knob, (right, why) in alone.items():
        got = expect_number(call(answer, **{knob: 2}), "The result")
        expect(_near(got, right), f"twice the {knob} gives a factor of {right}, not {got:g}. {why}")
    for factors, right in (
        ({"seq_len": 3, "batch": 5, "heads": 7, "head_dim": 2}, 315),
        ({"seq_len": 0.5, "batch": 4}, 1),
        ({}, 1),
    ):
        got = expect_number(call(answer, **factors), "The result")
        hint = "The factors multiply." if factors else "Nothing grew."
        expect(_near(got, right), f"for {factors} the factor is {right}, not {got:g}. {hint}")
    return "2 for seq_len, 1 for batch and heads, 0 for head_dim; the factors multiply."


@exercise("Fit an exponent")
def exponent(answer: Any) -> str:
    """Grade ``exponent(x, y)``: the least-squares slope on logarithms."""
    sizes = [64, 128, 256, 512, 1024]
    for power, factor in ((2, 3e-7), (1, 5.0), (0, 2.0), (0.5, 1e3)):
        got = expect_number(call(answer, sizes, [factor * n**power for n in sizes]), "The exponent")
        hints = {
            math.log(factor): "That is the intercept, the logarithm of the coefficient.",
            power * math.log(2): "x and y need logarithms to the same base.",
            power / math.log(2): "x and y need logarithms to the same base.",
        }
        hint = next((text for wrong, text in hints.items() if _near(got, wrong)), "")
        expect(
            _near(got, power),
            f"y = {factor:g} · x^{power} gives {got:.4g}. {hint or 'Is it a slope of logarithms?'}",
        )
    # noise: only least squares over all points finds this slope
    x, y = [1, 2, 4, 16], [1.0, 5.0, 3.0, 90.0]
    u, w = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_u, mean_w = sum(u) / 4, sum(w) / 4
    right = sum((a - mean_u) * (b - mean_w) for a, b in zip(u, w, strict=True)) / sum(
        (a - mean_u) ** 2 for a in u
    )
    got = expect_number(call(answer, x, y), "The exponent")
    hints = {
        (w[-1] - w[0]) / (u[-1] - u[0]): "That uses the first and the last point only.",
        (w[1] - w[0]) / (u[1] - u[0]): "That uses the first two points only.",
        sum((w[i + 1] - w[i]) / (u[i + 1] - u[i]) for i in range(3)) / 3: (
            "That is the mean of the slopes between neighbours; on even steps it would use the "
            "first and the last point only."
        ),
        sum(a * b for a, b in zip(u, w, strict=True)) / sum(a * a for a in u): (
            "That line is forced through the origin. Subtract the means first."
        ),
    }
    hint = next((text for wrong, text in hints.items() if _near(got, wrong)), "Use all points.")
    expect(_near(got, right, 1e-6), f"on points with noise you return {got:.4f}. {hint}")
    return "exact on power laws, least squares on noise."


@exercise("Who else is in the sum")
def exponent_in_heads(answer: Any) -> str:
    """Grade ``exponent_in_heads(seq_len, batch, heads, head_dim, itemsize)``."""
    for n, b, h, d, e in ((1024, 1, 1, 64, 2), (2048, 3, 12, 128, 4), (128, 1, 2, 64, 2)):

        def total(heads: float, n: int = n, b: int = b, d: int = d, e: int = e) -> float:
            return b * heads * (4 * n * d + 2 * n * n) * e + n * n

        got = expect_number(call(answer, n, b, h, d, e), "The exponent")
        right = 1 - n * n / total(h)
        where = f"for seq_len={n}, batch={b}, heads={h}, head_dim={d}, itemsize={e}"
        hints = {
            1.0: "The mask does not grow with heads.",
            1 - right: "That is the mask's share. Its exponent is 0; the others have 1.",
            math.log2(total(2 * h) / total(h)): (
                "That is the exponent of a whole doubling; the local one is the slope here."
            ),
            1 - n * n * e / (total(h) - n * n + n * n * e): "The mask takes one byte per element.",
            1 - h * n * n / (total(h) - n * n + h * n * n): "All heads share one mask.",
            1 - b * n * n / (total(h) - n * n + b * n * n): "All sequences share one mask.",
            1 - n * n / (2 * b * h * n * n * e + n * n): "Q, K, V and O are in the sum, too.",
            1 - n * n / (b * h * (4 * n * d + n * n) * e + n * n): "Count S and P.",
        }
        hint = next((text for wrong, text in hints.items() if _near(got, wrong)), "")
        hint = hint or "Weigh each tensor's exponent with its share of the bytes."
        expect(_near(got, right), f"{where} you return {got:.6f}. {hint}")
    return "1 minus the share of the mask."


@exercise("Where the square begins")
def length_of_equal_cost(answer: Any) -> str:
    """Grade ``length_of_equal_cost(t_small, n_large, t_large)``, times in seconds."""
    for t0, c, n in ((40e-6, 1e-11, 16384), (10e-6, 4e-10, 1024), (1e-3, 1e-9, 2048)):
        t = t0 + c * n * n
        got = expect_number(call(answer, t0, n, t), "The length")
        right = math.sqrt(t0 / c)
        hints = {
            n * math.sqrt(t0 / t): "t_large holds the fixed cost as well; take it off first.",
            n * t0 / (t - t0): "That treats the growing part as linear.",
            n * math.sqrt((t - t0) / t0): "Upside down: a larger fixed cost must give a longer N.",
            t0 / c: "That is its square.",
        }
        hint = next((text for wrong, text in hints.items() if _near(got, wrong, 1e-6)), "")
        expect(
            _near(got, right, 1e-6),
            f"for t_small = {t0:g} s and t_large = {t:.6g} s at n_large = {n} you return "
            f"{got:.1f}; there the square takes {c * got * got:.3g} s. {hint}".rstrip(),
        )
    return "there fixed cost and square take as long as each other, and the exponent is 1."


@exercise("How many fit")
def largest_batch(answer: Any) -> str:
    """Grade ``largest_batch(budget_bytes, seq_len, heads, itemsize)``."""
    gib = 2**30
    for budget, n, h, e in (
        (12 * gib, 2048, 12, 4),
        (80 * gib, 4096, 32, 2),
        (gib, 16384, 16, 2),
        (2 * 3 * 1024**2 * 5 * 2, 1024, 5, 2),
        (2 * 3 * 1024**2 * 5 * 2 - 1, 1024, 5, 2),
    ):
        got = expect_number(call(answer, budget, n, h, e), "The batch")
        one = 2 * h * n * n * e
        right = budget // one
        where = f"for {budget:,} bytes, seq_len={n}, heads={h}, itemsize={e}"
        expect(got == int(got), f"{where} you return {got:.3f}. Round down to whole sequences.")
        hints = {
            budget // (one // 2): "That counts S alone; P is as large.",
            budget // (2 * h * n * n): "How many bytes does an element take?",
            budget // (2 * n * n * e): "Each head has its own S and P.",
            budget // (2 * h * n * e): "S has seq_len rows and seq_len columns.",
        }
        hint = hints.get(int(got), "")
        if not hint and got > right:
            hint = f"{int(got)} sequences take {int(got) * one:,} bytes."
        if not hint:
            hint = f"{int(got) + 1} sequences take {(int(got) + 1) * one:,} bytes and would fit."
        expect(got == right, f"{where} you return {got:g}. {hint}")
    return "whole sequences only; half the length fits four times as many."
