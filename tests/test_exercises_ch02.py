"""Chapter 02's graders accept the solution and turn away each plausible mistake."""

from __future__ import annotations

import math

import numpy as np
import pytest

from labkit.exercises import ExerciseFailed, ch02


def slope(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)[0]


def heads(n, b, h, d, e, *, mask=1.0, io=4, scores=2, per_mask=lambda b, h, e: 1):
    grows = b * h * (io * n * d + scores * n * n) * e
    return grows / (grows + mask * n * n * per_mask(b, h, e))


SOLUTIONS = [
    (
        ch02.scores_growth,
        lambda seq_len=1, batch=1, heads=1, head_dim=1: seq_len**2 * batch * heads,
    ),
    (ch02.exponent, slope),
    (ch02.exponent, lambda x, y: np.polyfit(np.log2(x), np.log2(y), 1)[0]),
    (ch02.exponent_in_heads, heads),
    (ch02.length_of_equal_cost, lambda t0, n, t: n * math.sqrt(t0 / (t - t0))),
    (ch02.largest_batch, lambda m, n, h, e: m // (2 * h * n * n * e)),
    (ch02.largest_batch, lambda m, n, h, e: math.floor(m / (2 * h * n * n * e))),
]

MISTAKES = [
    (ch02.scores_growth, lambda seq_len=1, batch=1, heads=1, head_dim=1: seq_len * batch * heads),
    (ch02.scores_growth, lambda seq_len=1, batch=1, heads=1, head_dim=1: seq_len**2),
    (
        ch02.scores_growth,
        lambda seq_len=1, batch=1, heads=1, head_dim=1: seq_len**2 * batch * heads * head_dim,
    ),
    (
        ch02.scores_growth,
        lambda seq_len=1, batch=1, heads=1, head_dim=1: seq_len**2 + batch + heads - 2,
    ),
    (
        ch02.scores_growth,
        lambda seq_len=1, batch=1, heads=1, head_dim=1: max(seq_len**2, batch, heads),
    ),
    (ch02.scores_growth, lambda **factors: 4),
    (ch02.exponent, lambda x, y: 2.0),
    (ch02.exponent, lambda x, y: np.polyfit(x, y, 1)[0]),
    (ch02.exponent, lambda x, y: np.polyfit(np.log(x), np.log(y), 1)[1]),
    (ch02.exponent, lambda x, y: np.polyfit(np.log2(x), np.log(y), 1)[0]),
    (ch02.exponent, lambda x, y: np.polyfit(np.log(y), np.log(x), 1)[0]),
    (ch02.exponent, lambda x, y: math.log(y[1] / y[0]) / math.log(x[1] / x[0])),
    (ch02.exponent, lambda x, y: math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])),
    (ch02.exponent, lambda x, y: np.diff(np.log(y)).mean() / np.log(2)),
    (ch02.exponent, lambda x, y: (np.diff(np.log(y)) / np.diff(np.log(x))).mean()),
    (ch02.exponent, lambda x, y: np.dot(np.log(x), np.log(y)) / np.dot(np.log(x), np.log(x))),
    (ch02.exponent_in_heads, lambda n, b, h, d, e: 1.0),
    (ch02.exponent_in_heads, lambda n, b, h, d, e: 1 - heads(n, b, h, d, e)),
    (ch02.exponent_in_heads, lambda n, b, h, d, e: heads(n, b, h, d, e, io=0)),
    (ch02.exponent_in_heads, lambda n, b, h, d, e: heads(n, b, h, d, e, io=3)),
    (ch02.exponent_in_heads, lambda n, b, h, d, e: heads(n, b, h, d, e, scores=1)),
    (ch02.exponent_in_heads, lambda n, b, h, d, e: heads(n, b, h, d, e, mask=0.5)),
    (
        ch02.exponent_in_heads,
        lambda n, b, h, d, e: heads(n, b, h, d, e, per_mask=lambda b, h, e: e),
    ),
    (
        ch02.exponent_in_heads,
        lambda n, b, h, d, e: heads(n, b, h, d, e, per_mask=lambda b, h, e: h),
    ),
    (
        ch02.exponent_in_heads,
        lambda n, b, h, d, e: heads(n, b, h, d, e, per_mask=lambda b, h, e: b),
    ),
    (
        ch02.exponent_in_heads,
        lambda n, b, h, d, e: math.log2(heads(n, b, h, d, e) / heads(n, b, 2 * h, d, e) * 2),
    ),
    (ch02.length_of_equal_cost, lambda t0, n, t: n * math.sqrt(t0 / t)),
    (ch02.length_of_equal_cost, lambda t0, n, t: n * t0 / (t - t0)),
    (ch02.length_of_equal_cost, lambda t0, n, t: n * math.sqrt((t - t0) / t0)),
    (ch02.length_of_equal_cost, lambda t0, n, t: t0 * n * n / (t - t0)),
    (ch02.length_of_equal_cost, lambda t0, n, t: n / 2),
    (ch02.length_of_equal_cost, lambda t0, n, t: -n * math.sqrt(t0 / (t - t0))),
    (ch02.largest_batch, lambda m, n, h, e: m / (2 * h * n * n * e)),
    (ch02.largest_batch, lambda m, n, h, e: -(-m // (2 * h * n * n * e))),
    (ch02.largest_batch, lambda m, n, h, e: m // (h * n * n * e)),
    (ch02.largest_batch, lambda m, n, h, e: m // (2 * h * n * n)),
    (ch02.largest_batch, lambda m, n, h, e: m // (2 * n * n * e)),
    (ch02.largest_batch, lambda m, n, h, e: m // (2 * h * n * e)),
    (ch02.largest_batch, lambda m, n, h, e: (m - 1) // (2 * h * n * n * e)),
    (ch02.largest_batch, lambda m, n, h, e: max(1, m // (2 * h * n * n * e))),
    (ch02.largest_batch, lambda m, n, h, e: round(m / (2 * h * n * n * e))),
    (ch02.largest_batch, lambda m, n, h, e: m // 0),
    (ch02.largest_batch, lambda m, n, h, e: "3"),
    (ch02.largest_batch, 3),
]


@pytest.mark.parametrize(("grader", "answer"), SOLUTIONS)
def test_the_solution_passes(grader, answer, capsys):
    grader(answer)
    assert capsys.readouterr().out.startswith("✓")


@pytest.mark.parametrize(("grader", "answer"), MISTAKES)
def test_a_mistake_is_turned_away_with_a_reason(grader, answer, capsys):
    with pytest.raises(ExerciseFailed) as caught:
        grader(answer)
    assert capsys.readouterr().out == ""
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("name", ch02.__all__)
def test_an_open_exercise_says_so_and_goes_on(name, capsys):
    grader = getattr(ch02, name)
    for answer in (..., None, lambda *args, **kwargs: ..., lambda *args, **kwargs: None):
        grader(answer)
        assert capsys.readouterr().out.startswith("Not answered yet")


def test_every_grader_is_given_mistakes_and_the_solution():
    graders = {getattr(ch02, name) for name in ch02.__all__}
    assert {g for g, _ in SOLUTIONS} == graders
    assert all(sum(g is grader for g, _ in MISTAKES) >= 6 for grader in graders)


@pytest.mark.parametrize(
    ("grader", "answer", "hint"),
    [
        (ch02.scores_growth, lambda seq_len=1, **_: seq_len, "A row and a column"),
        (ch02.exponent, lambda x, y: np.polyfit(np.log2(x), np.log(y), 1)[0], "the same base"),
        (ch02.exponent_in_heads, lambda n, b, h, d, e: 1.0, "does not grow with heads"),
        (ch02.length_of_equal_cost, lambda t0, n, t: n * (t0 / t) ** 0.5, "take it off first"),
        (ch02.largest_batch, lambda m, n, h, e: m // (h * n * n * e), "P is as large"),
    ],
)
def test_the_reason_names_the_mistake(grader, answer, hint):
    with pytest.raises(ExerciseFailed, match=hint):
        grader(answer)
