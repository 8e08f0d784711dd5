"""Exercises of chapter 15 (is "twice as fast, same function" true?)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["copy_gradient", "half_rate_flops", "loop_peak", "overall_speedup"]


@exercise("Operations at half rate")
def half_rate_flops(answer: Any) -> str:
    """Grade ``half_rate_flops(seq_len, count, block_size, heads, head_dim, head_dim_v, W)``."""
    cases = ((2048, 16, 64, 32, 128, 128, 0), (101, 4, 16, 8, 64, 32, 24), (1, 2, 4, 2, 8, 8, 3))
    for t, s, size, hq, d, v, w in cases:
        got = expect_number(call(answer, t, s, size, hq, d, v, w), "The count")
        one = 2 * hq * (d + v) * (s * size + w)
        rows = (t + 1) // 2
        right = rows * one
        mistakes = {
            right // 2: "A multiply-add is two operations.",
            t * one: "Only the even positions are computed.",
            t // 2 * one: "A sequence of odd length ends with a computed row.",
            t / 2 * one: "A sequence of odd length ends with a computed row.",
            rows * 2 * hq * ((d + v) * s * size + w * d): "The window has a second product, PV.",
            rows * 2 * hq * (d + v) * s * size: "The window is a branch too.",
            rows * 2 * (d + v) * (s * size + w): "Every query head has scores of its own.",
            right + t // 2 * hq * v: "A copy is no operation; it moves bytes.",
        }
        hint = "" if got == right else mistakes.get(got, "Rows, times keys of a row, times 2(D+V).")
        expect(
            got == right,
            f"for {t} positions, {s} blocks of {size}, {hq} heads, head_dim {d} and {v}, window "
            f"{w} you return {got:g}. {hint}",
        )
    return "half of the rows, every operation of each."


@exercise("The peak of a loop")
def loop_peak(answer: Any) -> str:
    """Grade ``loop_peak(steps, fixed, freed, kept)`` in bytes."""
    for steps, fixed, freed, kept in ((2048, 600, 33, 0), (1024, 600, 33, 32), (1, 5, 7, 2)):
        got = expect_number(call(answer, steps, fixed, freed, kept), "The peak")
        right = fixed + freed + steps * kept
        mistakes = {
            fixed + steps * (freed + kept): "What a step frees is there for one step at a time.",
            fixed + freed + kept: "What autograd keeps of a step stays until the backward pass.",
            steps * (fixed + freed + kept): "What is fixed is there once.",
            fixed + steps * kept: "The last step's temporaries are alive as well.",
            freed + steps * kept: "Inputs and output are alive too.",
        }
        hint = "" if got == right else mistakes.get(got, "What is alive at the end of the last "
                                                   "step?")  # fmt: skip
        expect(
            got == right,
            f"for {steps} steps with {fixed} bytes fixed, {freed} freed and {kept} kept in each "
            f"you return {got:g}. {hint}",
        )
    return "with nothing kept, the number of steps is not in it."


@exercise("The speed-up of the whole")
def overall_speedup(answer: Any) -> str:
    """Grade ``overall_speedup(share, factor)``: a share of the time becomes so much faster."""
    for share, factor in ((0.9, 2.0), (0.5, 2.0), (0.25, 1.5), (1.0, 2.0), (0.0, 3.0)):
        got = expect_number(call(answer, share, factor), "The speed-up")
        right = 1 / (1 - share + share / factor)
        mistakes = {
            factor: "The rest of the time is not touched.",
            1 + share * (factor - 1): "Add times, not speeds.",
            share * factor + 1 - share: "Add times, not speeds.",
            1 - share + share / factor: "That is the new time; the speed-up is old over new.",
            1 / (1 - share + share * factor): "Faster means less time: divide the share by it.",
        }
        near = (why for value, why in mistakes.items() if math.isclose(got, value, rel_tol=1e-9))
        hint = next(near, "Which time is left?")
        expect(
            math.isclose(got, right, rel_tol=1e-9),
            f"if {share:.0%} of the time becomes {factor:g} times faster you return {got:.4g}. "
            f"{hint}",
        )
    return "what is not halved decides."


@exercise("The gradient of a copy")
def copy_gradient(answer: Any) -> str:
    """Grade ``copy_gradient(dO)``: ``[T, V]`` of all rows to ``[⌈T/2⌉, V]`` of computed ones."""
    import torch

    for t, v in ((6, 3), (7, 2), (1, 4)):
        generator = torch.Generator().manual_seed(t)
        d_out = torch.randn(t, v, generator=generator, dtype=torch.float64)
        computed = torch.zeros((t + 1) // 2, v, dtype=torch.float64, requires_grad=True)
        (right,) = torch.autograd.grad(
            computed.repeat_interleave(2, 0)[:t], computed, d_out
        )  # fmt: skip
        got = call(answer, d_out.clone())
        expect(isinstance(got, torch.Tensor), "The gradient should be a tensor.")
        expect(
            got.shape == right.shape,
            f"for {t} rows the gradient has shape {list(got.shape)}, not {list(right.shape)}: one "
            "row for each even position.",
        )
        hint = "A row is used twice: its gradients add up."
        odd = torch.nn.functional.pad(d_out[1::2], (0, 0, 0, t % 2))
        if torch.allclose(got, d_out[::2]) and t > 1:
            hint = "The copy hands its gradient on as well."
        elif torch.allclose(got, odd) and t > 1:
            hint = "The computed row has a gradient of its own."
        elif torch.allclose(2 * got, right) and t > 1:
            hint = "A copy is no mean: add."
        elif t % 2 and torch.allclose(got, right + torch.nn.functional.pad(
                d_out[-1:], (0, 0, (t - 1) // 2, 0))):  # fmt: skip
            hint = "The last row of an odd length has no copy."
        expect(torch.allclose(got, right), f"for {t} rows the gradient is not right. {hint}")
    return "the odd query gets nothing: whatever the loss says of its row goes to its neighbour's."
