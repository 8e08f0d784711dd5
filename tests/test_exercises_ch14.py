"""The graders of chapter 14 take the solutions and turn each known mistake away."""

from __future__ import annotations

import math
from statistics import mean, median

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch14


def good_weights(Q, K, LSE, seen, scale, *, mask=True, scaled=True, power=torch.exp):
    S = (scale if scaled else 1) * Q @ K.T
    P = power(S - LSE[:, None])
    if not mask:
        return P.masked_fill(~torch.isfinite(P), 0.0)
    return torch.where(seen, P, 0.0)


def again(Q, K, LSE, seen, scale):
    return torch.softmax((scale * Q @ K.T).masked_fill(~seen, -math.inf), -1).nan_to_num()


def unmasked_infinity(Q, K, LSE, seen, scale):
    return torch.exp(scale * Q @ K.T - LSE[:, None]) * seen


def good_spread(P, length, stride, seq_len, *, share=None, add=True):
    out = P.new_zeros(len(P), seq_len)
    for c in range(P.shape[1]):
        at = slice(c * stride, c * stride + length)
        value = P[:, c : c + 1] / (share or length)
        out[:, at] = out[:, at] + value if add else value
    return out


def repeated(P, length, stride, seq_len):
    out = (P / length).repeat_interleave(stride, 1)[:, :seq_len]
    return torch.nn.functional.pad(out, (0, seq_len - out.shape[1]))


def good_bytes(b, m, hq, h, s):
    return 4 * b * m * (3 * hq + h * s)


def good_overhead(without, with_):
    return median(b / a for a, b in list(zip(without, with_, strict=True))[1:]) - 1


GOOD = [
    (ch14.weights_of_branch, good_weights),
    (ch14.spread_over_tokens, good_spread),
    (ch14.returned_bytes, good_bytes),
    (ch14.overhead, good_overhead),
]

test_solutions_are_taken = solutions_are_taken(GOOD)


BAD = [
    (ch14.weights_of_branch, lambda *a: good_weights(*a, mask=False), "Use seen"),
    (ch14.weights_of_branch, lambda *a: good_weights(*a, scaled=False), "were scaled"),
    (ch14.weights_of_branch, lambda *a: good_weights(*a, power=torch.exp2), "natural"),
    (ch14.weights_of_branch, again, "normalises again"),
    (ch14.weights_of_branch, unmasked_infinity, "sees nothing"),
    (ch14.weights_of_branch, lambda *a: good_weights(*a).T, "shape|not right"),
    (ch14.weights_of_branch, lambda *a: 2 * good_weights(*a), "of its own row"),
    (ch14.weights_of_branch, lambda *a: 1.0, "tensor"),
    (ch14.spread_over_tokens, lambda *a: good_spread(*a, share=1), "divide by its tokens"),
    (ch14.spread_over_tokens, lambda p, size, d, n: good_spread(p, size, d, n, share=d),
     "however far"),
    (ch14.spread_over_tokens, lambda *a: good_spread(*a, add=False), "overwrite"),
    (ch14.spread_over_tokens, repeated, "not right"),
    (ch14.spread_over_tokens, lambda p, size, d, n: p.new_full((5, n), 1 / n), "0 if none"),
    (ch14.spread_over_tokens, lambda p, *a: p, "shape"),
    (ch14.returned_bytes, lambda b, m, hq, h, s: 4 * b * m * (hq + h * s), "each of the three"),
    (ch14.returned_bytes, lambda b, m, hq, h, s: 4 * b * m * (2 * hq + h * s), "window"),
    (ch14.returned_bytes, lambda b, m, hq, h, s: 4 * b * m * (3 + s) * hq, "for a KV head"),
    (ch14.returned_bytes, lambda b, m, hq, h, s: 4 * b * m * (3 * hq + 2 * h * s), "same tensor"),
    (ch14.returned_bytes, lambda b, m, hq, h, s: 4 * b * m * h * (3 + s), "Every query head"),
    (ch14.returned_bytes, lambda b, m, hq, h, s: b * m * (3 * hq + h * s), "4 bytes"),
    (ch14.returned_bytes, lambda b, m, hq, h, s: 12 * b * m * hq, "come back too"),
    (ch14.returned_bytes, lambda b, m, hq, h, s: 4 * b * hq * m * m, "one branch"),
    (ch14.returned_bytes, lambda *a: 1, "Count three"),
    (ch14.overhead, lambda a, b: median(y / x for x, y in zip(a, b, strict=True)) - 1, "warm-up"),
    (ch14.overhead, lambda a, b: sum(b) / sum(a) - 1, "slowest sample"),
    (ch14.overhead, lambda a, b: sum(b[1:]) / sum(a[1:]) - 1, "take a median"),
    (ch14.overhead, lambda a, b: mean(y / x for x, y in zip(a[1:], b[1:], strict=True)) - 1,
     "one slow sample"),
    (ch14.overhead, lambda a, b: median(b[1:]) / median(a[1:]) - 1, "within a round"),
    (ch14.overhead, lambda a, b: good_overhead(a, b) + 1, "subtract 1"),
    (ch14.overhead, lambda a, b: -0.9, "Ratio within"),
    (ch14.overhead, lambda a, b: "10 %", "number"),
]  # fmt: skip

test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)

test_skeletons_are_not_errors = skeletons_are_not_errors(GOOD)
