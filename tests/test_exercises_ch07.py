"""The graders of chapter 07 take the solutions and turn each known mistake away."""

from __future__ import annotations

import math

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch07

INF = math.inf


# -- one pass -----------------------------------------------------------------------------
def good_normalizer(scores, *, rescale=True, guard=True, follow=True, first=False):
    m, total = -INF, 0.0
    for s in scores:
        new = max(m, s) if follow or m == -INF else m
        if new > -INF or not guard:
            total = total * (math.exp(m - new) if rescale else 1.0) + math.exp(s - new)
        m = new
    return m, total


def two_passes(scores):
    m = max(scores)
    return m, sum(math.exp(s - m) for s in scores)


def unshifted(scores):
    m, total = -INF, 0.0
    for s in scores:
        m, total = max(m, s), total + math.exp(s)
    return m, total / math.exp(m)


def from_the_first(scores):
    first = next(scores)
    m, total = first, 1.0
    for s in scores:
        m = max(m, s)
        total += math.exp(min(s - first, 700.0))
    return m, total


# -- merge ----------------------------------------------------------------------------------
def good_merge(a, b, *, l_factors=(1, 1), o_factors=(1, 1), guard=True, divide=False, m_of=None):
    m = torch.maximum(a[0], b[0])
    base = torch.where(m == -INF, 0.0, m) if guard else m
    wa, wb = torch.exp(a[0] - base), torch.exp(b[0] - base)

    def weigh(x, y, factors):
        first, second = (w if f else torch.ones_like(w) for w, f in zip((wa, wb), factors,
                                                                         strict=True))
        shape = (-1,) + (1,) * (x.dim() - 1)
        return first.view(shape) * x + second.view(shape) * y

    total, out = weigh(a[1], b[1], l_factors), weigh(a[2], b[2], o_factors)
    if divide:
        out = out / torch.where(total == 0, 1.0, total)[:, None]
    return (m if m_of is None else m_of(a, b)), total, out


def changing_merge(a, b):
    result = good_merge(a, b)
    a[1].zero_()
    return result


# -- attention --------------------------------------------------------------------------------
def good_attention(
    q, k, v, block, *, l_factor=True, o_factor=True, follow=True, divide=False, drop=False,
    scale=True, guard=True, shift=True,
):  # fmt: skip
    m = torch.full((q.shape[0],), -INF, dtype=q.dtype)
    total, out = torch.zeros_like(m), torch.zeros(q.shape[0], v.shape[1], dtype=q.dtype)
    for start in range(0, k.shape[0], block):
        keys, values = k[start : start + block], v[start : start + block]
        if drop and keys.shape[0] < block:
            break
        s = q @ keys.T * (q.shape[1] ** -0.5 if scale else 1)
        new = torch.maximum(m, s.amax(-1)) if follow or start == 0 else m
        if not shift:
            new = torch.zeros_like(m)
        alpha = torch.exp(m - new) if guard else torch.exp(m - m)
        p = torch.exp(s - new[:, None])
        total = total * (alpha if l_factor else 1) + p.sum(-1)
        out = out * (alpha[:, None] if o_factor else 1) + p @ values
        m = new
        if divide:
            out = out / total[:, None]
    return out if divide else out / total[:, None]


def whole_row(q, k, v, block):
    return torch.softmax(q @ k.T * q.shape[1] ** -0.5, -1) @ v


def last_block(q, k, v, block):
    n = k.shape[0] - block
    return torch.softmax(q @ k[n:].T * q.shape[1] ** -0.5, -1) @ v[n:]


# -- combine ------------------------------------------------------------------------------------
def good_combine(outs, lses):
    lse = torch.logsumexp(lses, 0)
    return (torch.exp(lses - lse)[..., None] * outs).sum(0), lse


def unsafe_combine(outs, lses):
    w = torch.exp(lses)
    return (w[..., None] * outs).sum(0) / w.sum(0)[..., None], torch.log(w.sum(0))


GOOD = [
    (ch07.normalizer, good_normalizer),
    (ch07.normalizer, lambda scores: list(good_normalizer(scores))),
    (ch07.merge, good_merge),
    (ch07.merge, lambda a, b: list(good_merge(b, a))),
    (ch07.attention, good_attention),
    (ch07.combine, good_combine),
    (ch07.stagnation, 8192),
    (ch07.stagnation, 2**13),
]

test_solutions_are_taken = solutions_are_taken(GOOD)


def wrong(good, **how):
    return lambda *args: good(*args, **how)


BAD = [
    (ch07.normalizer, wrong(good_normalizer, rescale=False), "rescale"),
    (ch07.normalizer, wrong(good_normalizer, guard=False), "NaN"),
    (ch07.normalizer, wrong(good_normalizer, follow=False), "m must follow|OverflowError"),
    (ch07.normalizer, two_passes, "ValueError|l is|max"),
    (ch07.normalizer, unshifted, "l is|ZeroDivision|Overflow"),
    (ch07.normalizer, from_the_first, "from the first|l is"),
    (ch07.normalizer, lambda scores: max(scores), "two numbers"),
    (ch07.normalizer, lambda scores: (max(scores), "1"), "number"),
    (ch07.normalizer, lambda scores: (next(scores), 1.0), "m is"),
    (ch07.normalizer, lambda scores: good_normalizer(scores)[::-1], "m is"),
    (ch07.merge, wrong(good_merge, l_factors=(0, 0)), "different maxima"),
    (ch07.merge, wrong(good_merge, l_factors=(1, 0)), "different maxima|Either side"),
    (ch07.merge, wrong(good_merge, l_factors=(0, 1)), "different maxima|Either side"),
    (ch07.merge, wrong(good_merge, o_factors=(0, 0)), "same factors"),
    (ch07.merge, wrong(good_merge, o_factors=(1, 0)), "O is wrong"),
    (ch07.merge, wrong(good_merge, guard=False), "NaN"),
    (ch07.merge, wrong(good_merge, divide=True), "Do not divide"),
    (ch07.merge, wrong(good_merge, m_of=lambda a, b: a[0]), "larger of the two"),
    (ch07.merge, wrong(good_merge, m_of=lambda a, b: a[0] + b[0]), "larger of the two|NaN"),
    (ch07.merge, lambda a, b: good_merge(a, b)[:2], "3 tensors"),
    (ch07.merge, lambda a, b: a, "m should|l is|O is"),
    (ch07.merge, changing_merge, "changed its inputs"),
    (ch07.merge, lambda a, b: (1.0, 2.0, 3.0), "should be a tensor"),
    (ch07.merge, lambda a, b: (*good_merge(a, b)[:2], good_merge(a, b)[2].T), "shape"),
    (ch07.attention, wrong(good_attention, o_factor=False), "rescale it by α"),
    (ch07.attention, wrong(good_attention, l_factor=False), "rescale it by α"),
    (ch07.attention, wrong(good_attention, l_factor=False, o_factor=False), "Nothing is rescaled"),
    (ch07.attention, wrong(good_attention, follow=False), "m must follow"),
    (ch07.attention, wrong(good_attention, shift=False), "m must follow"),
    (ch07.attention, wrong(good_attention, divide=True), "once, after the last"),
    (ch07.attention, wrong(good_attention, drop=True), "shorter block"),
    (ch07.attention, wrong(good_attention, scale=False), "scale"),
    (ch07.attention, wrong(good_attention, guard=False), "NaN"),
    (ch07.attention, whole_row, "One block at a time"),
    (ch07.attention, last_block, "last block alone"),
    (ch07.attention, lambda q, k, v, block: good_attention(q, k, v, block).T, "shape"),
    (ch07.attention, lambda q, k, v, block: 0.0, "tensor"),
    (ch07.attention, lambda q, k: q, "TypeError"),
    (ch07.combine, lambda o, lses: (o.mean(0), torch.logsumexp(lses, 0)), "plain mean"),
    (ch07.combine, unsafe_combine, "largest LSE"),
    (
        ch07.combine,
        lambda o, lses: ((lses[..., None] * o).sum(0) / lses.sum(0)[..., None], lses.sum(0)),
        "e to its LSE",
    ),
    (
        ch07.combine,
        lambda o, lses: ((torch.softmax(lses, 0)[..., None] * o).mean(0), lses[0]),
        "sum, do not average",
    ),
    (ch07.combine, lambda o, lses: (good_combine(o, lses)[0], lses.amax(0)), "log-sum-exp"),
    (ch07.combine, lambda o, lses: good_combine(o, lses)[0], "2 tensors"),
    (ch07.stagnation, 256, "one key at a time"),
    (ch07.stagnation, 4096, "hidden one"),
    (ch07.stagnation, 16384, "half of the distance"),
    (ch07.stagnation, 65536, "float16's 11 bits"),
    (ch07.stagnation, 2048, "float16's 11 bits"),
    (ch07.stagnation, "many", "number"),
]

test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)

test_skeletons_are_not_errors = skeletons_are_not_errors(
    GOOD,
    lambda *args: ...,
    also=[
        (ch07.merge, lambda a, b: (..., ..., ...)),
        (ch07.combine, lambda o, lses: (None, None)),
        (ch07.normalizer, lambda scores: (..., ...)),
    ],
)
