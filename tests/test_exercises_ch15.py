"""The graders of chapter 15 take the solutions and turn each known mistake away."""

from __future__ import annotations

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch15


def good_flops(t, s, size, hq, d, v, w, *, rows=None, factor=2, tail=0):
    rows = (t + 1) // 2 if rows is None else rows
    return rows * factor * hq * (d + v) * (s * size + w) + tail


def good_peak(steps, fixed, freed, kept):
    return fixed + freed + steps * kept


def good_speedup(share, factor):
    return 1 / (1 - share + share / factor)


def good_gradient(dO):
    out = dO[::2].clone()
    out[: len(dO) // 2] += dO[1::2]
    return out


def doubled_last(dO):
    out = good_gradient(dO)
    if len(dO) % 2:
        out[-1] += dO[-1]
    return out


def only_odd(dO):
    return torch.nn.functional.pad(dO[1::2], (0, 0, 0, len(dO) % 2))


GOOD = [
    (ch15.half_rate_flops, good_flops),
    (ch15.loop_peak, good_peak),
    (ch15.overall_speedup, good_speedup),
    (ch15.copy_gradient, good_gradient),
]

test_solutions_are_taken = solutions_are_taken(GOOD)


BAD = [
    (ch15.half_rate_flops, lambda *a: good_flops(*a, factor=1), "two operations"),
    (ch15.half_rate_flops, lambda *a: good_flops(*a, rows=a[0]), "even positions"),
    (ch15.half_rate_flops, lambda *a: good_flops(*a, rows=a[0] // 2), "odd length"),
    (ch15.half_rate_flops, lambda *a: good_flops(*a, rows=a[0] / 2), "odd length"),
    (ch15.half_rate_flops,
     lambda t, s, b, h, d, v, w: (t + 1) // 2 * 2 * h * ((d + v) * s * b + w * d),
     "second product"),
    (ch15.half_rate_flops,
     lambda t, s, b, h, d, v, w: (t + 1) // 2 * 2 * h * (d + v) * s * b, "is a branch"),
    (ch15.half_rate_flops,
     lambda t, s, b, h, d, v, w: (t + 1) // 2 * 2 * (d + v) * (s * b + w), "Every query head"),
    (ch15.half_rate_flops, lambda *a: good_flops(*a, tail=a[0] // 2 * a[3] * a[5]), "no operation"),
    (ch15.half_rate_flops, lambda *a: 0, "Rows, times"),
    (ch15.loop_peak, lambda n, a, b, c: a + n * (b + c), "one step at a time"),
    (ch15.loop_peak, lambda n, a, b, c: a + b + c, "until the backward"),
    (ch15.loop_peak, lambda n, a, b, c: n * (a + b + c), "there once"),
    (ch15.loop_peak, lambda n, a, b, c: a + n * c, "last step"),
    (ch15.loop_peak, lambda n, a, b, c: b + n * c, "Inputs and output"),
    (ch15.loop_peak, lambda n, a, b, c: 0, "What is alive"),
    (ch15.overall_speedup, lambda s, f: f, "not touched"),
    (ch15.overall_speedup, lambda s, f: 1 + s * (f - 1), "Add times"),
    (ch15.overall_speedup, lambda s, f: 1 - s + s / f, "new time"),
    (ch15.overall_speedup, lambda s, f: 1 / (1 - s + s * f), "less time"),
    (ch15.overall_speedup, lambda s, f: 1.85, "Which time"),
    (ch15.copy_gradient, lambda g: g[::2], "hands its gradient on"),
    (ch15.copy_gradient, only_odd, "of its own"),
    (ch15.copy_gradient, lambda g: good_gradient(g) / 2, "no mean"),
    (ch15.copy_gradient, doubled_last, "no copy"),
    (ch15.copy_gradient, lambda g: -good_gradient(g), "add up"),
    (ch15.copy_gradient, lambda g: g, "one row for each even"),
    (ch15.copy_gradient, lambda g: 0.0, "tensor"),
]  # fmt: skip

test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)

test_skeletons_are_not_errors = skeletons_are_not_errors(GOOD)
