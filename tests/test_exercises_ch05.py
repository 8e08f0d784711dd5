"""The graders of chapter 05 take the solutions and turn each known mistake away."""

from __future__ import annotations

import math

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch05


def good_softmax(p, dp):
    return p * (dp - (dp * p).sum(-1, keepdim=True))


def good_backward(q, k, v, dout, *, ds=good_softmax, dq_scale=None, dk_scale=None, flip=False):
    scale = q.shape[-1] ** -0.5
    p = torch.softmax(q @ k.mT * scale, -1)
    dv = p.mT @ dout
    d_s = ds(p, dout @ v.mT)
    dq = d_s @ k * (scale if dq_scale is None else dq_scale)
    dk = d_s.mT @ q * (scale if dk_scale is None else dk_scale)
    return (dk, dq, dv) if flip else (dq, dk, dv)


def good_longest(memory, heads, itemsize, buffers):
    return math.isqrt(memory // (buffers * heads * itemsize))


GOOD = [
    (ch05.softmax_backward, good_softmax),
    (ch05.backward, good_backward),
    (ch05.delta, lambda dout, out: (dout * out).sum(-1)),
    (ch05.delta, lambda dout, out: (dout * out).sum(-1, keepdim=True)),
    (ch05.saved, 2),
    (ch05.longest, good_longest),
]

test_solutions_are_taken = solutions_are_taken(GOOD)


def changing(p, dp):
    result = good_softmax(p, dp)
    p.zero_()
    return result


BAD = [
    (ch05.softmax_backward, lambda p, dp: dp * p * (1 - p), "diagonal"),
    (ch05.softmax_backward, lambda p, dp: dp * p, "lowers the other"),
    (ch05.softmax_backward, lambda p, dp: dp - (dp * p).sum(-1, keepdim=True), "factor P"),
    (ch05.softmax_backward, lambda p, dp: p * (dp - (dp * p).sum(-2, keepdim=True)), "dim=-1"),
    (ch05.softmax_backward, lambda p, dp: p * (dp - (dp * p).mean(-1, keepdim=True)), "mean"),
    (ch05.softmax_backward, lambda p, dp: p * (dp - dp.sum(-1, keepdim=True)), "not of dP"),
    (ch05.softmax_backward, lambda p, dp: p * (dp + (dp * p).sum(-1, keepdim=True)), "subtract"),
    (ch05.softmax_backward, lambda p, dp: p * (dp - (dp * p).sum()), "own sum"),
    (ch05.softmax_backward, lambda p, dp: -good_softmax(p, dp), "differs"),
    (ch05.softmax_backward, lambda p, dp: good_softmax(p, dp)[..., :1], "shape"),
    (ch05.softmax_backward, lambda p, dp: 0.0, "tensor"),
    (ch05.softmax_backward, changing, "changed its inputs"),
    (ch05.softmax_backward, lambda p: p, "TypeError"),
    (ch05.backward, lambda *a: good_backward(*a, dq_scale=1.0), "gradient is too"),
    (ch05.backward, lambda *a: good_backward(*a, dk_scale=1.0), "dK.*gradient is too"),
    (ch05.backward, lambda *a: good_backward(*a, dk_scale=1 / a[0].shape[-1]), "once"),
    (ch05.backward, lambda *a: good_backward(*a, ds=lambda p, dp: dp * p * (1 - p)), "diagonal"),
    (ch05.backward, lambda *a: good_backward(*a, ds=lambda p, dp: dp * p), "row sum"),
    (ch05.backward, lambda *a: good_backward(*a, flip=True), "dQ"),
    (ch05.backward, lambda *a: good_backward(*a)[:2], "three tensors"),
    (ch05.backward, lambda q, k, v, do: (*good_backward(q, k, v, do)[:2], v), "dV"),
    (ch05.backward, lambda q, k, v, do: good_backward(q, k, v, do)[0], "three tensors"),
    (ch05.delta, lambda dout, out: (dout * out).sum(-2), "shape|rowsum"),
    (ch05.delta, lambda dout, out: (dout * out).mean(-1), "exchange the sums"),
    (ch05.delta, lambda dout, out: dout.sum(-1), "exchange the sums"),
    (ch05.delta, lambda dout, out: (dout * dout).sum(-1), "exchange the sums"),
    (ch05.delta, lambda dout, out: dout * out, "shape"),
    (ch05.saved, 1, "derivative"),
    (ch05.saved, 3, "Python number"),
    (ch05.saved, 4, "need nothing"),
    (ch05.saved, 2.5, "each line"),
    (ch05.saved, "two", "number"),
    (ch05.longest, lambda m, h, e, b: m // (b * h * e), "N²"),
    (ch05.longest, lambda m, h, e, b: math.isqrt(m // (b * e)), "own buffers"),
    (ch05.longest, lambda m, h, e, b: math.isqrt(m // (h * e)), "Several"),
    (ch05.longest, lambda m, h, e, b: math.isqrt(m // (b * h)), "one byte"),
    (ch05.longest, lambda m, h, e, b: math.sqrt(m / (b * h * e)), "whole number"),
    (ch05.longest, lambda m, h, e, b: int(math.sqrt(m / (b * h * e))), "needs"),
    (ch05.longest, lambda m, h, e, b: good_longest(m, h, e, b) - 1, "fits as well"),
    (ch05.longest, lambda m, h, e, b: good_longest(m, h, e, b) + 1, "needs"),
]

test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)

test_skeletons_are_not_errors = skeletons_are_not_errors(
    GOOD,
    lambda *args: ...,
    also=[(ch05.backward, lambda q, k, v, dout: (..., ..., ...))],
)
