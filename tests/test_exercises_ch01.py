"""Chapter 01's graders accept the solution and turn away each plausible mistake."""

from __future__ import annotations

import math

import pytest
import torch

from labkit.exercises import ExerciseFailed, ch01


def accepted(grader, answer, capsys) -> bool:
    grader(answer)
    return capsys.readouterr().out.startswith("✓")


def attention(q, k, v, *, scale=None, axis=-1, mask="bottom right", out=None):
    nq, nk = q.shape[-2], k.shape[-2]
    i, j = torch.arange(nq)[:, None], torch.arange(nk)[None, :]
    offset = {"bottom right": nk - nq, "top left": 0, "strict": nk - nq - 1, "none": nk}[mask]
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = torch.softmax(s.masked_fill(j > i + offset, float("-inf")), axis)
    return (p @ v if out is None else out(p, v)), p


SOLUTIONS = [
    (ch01.scores_bytes, lambda b, h, m, n, e: b * h * m * n * e),
    (ch01.crossover, lambda d, h, hkv: -(-d * (h + hkv) // h)),
    (ch01.attention, attention),
    (ch01.peak, 3),
]

MISTAKES = [
    (ch01.scores_bytes, lambda b, h, m, n, e: 2 * b * h * m * n * e),
    (ch01.scores_bytes, lambda b, h, m, n, e: b * h * m * n),
    (ch01.scores_bytes, lambda b, h, m, n, e: b * h * m * m * e),
    (ch01.scores_bytes, lambda b, h, m, n, e: b * h * n * n * e),
    (ch01.scores_bytes, lambda b, h, m, n, e: m * n * e),
    (ch01.scores_bytes, lambda b, h, m, n, e: b * h * m * n * 4),
    (ch01.crossover, lambda d, h, hkv: 2 * d),
    (ch01.crossover, lambda d, h, hkv: d * (h + hkv) // h),
    (ch01.crossover, lambda d, h, hkv: d * (h + hkv) / h),
    (ch01.crossover, lambda d, h, hkv: math.ceil(d * (h + hkv) / h) + 1),
    (ch01.crossover, lambda d, h, hkv: d),
    (ch01.attention, lambda q, k, v: attention(q, k, v, scale=1.0)),
    (ch01.attention, lambda q, k, v: attention(q, k, v, scale=1 / q.shape[-1])),
    (ch01.attention, lambda q, k, v: attention(q, k, v, axis=-2)),
    (ch01.attention, lambda q, k, v: attention(q, k, v, mask="top left")),
    (ch01.attention, lambda q, k, v: attention(q, k, v, mask="strict")),
    (ch01.attention, lambda q, k, v: attention(q, k, v, mask="none")),
    (ch01.attention, lambda q, k, v: attention(q, k, v)[::-1]),
    (ch01.attention, lambda q, k, v: attention(q, k, v)[0]),
    (ch01.attention, lambda q, k, v: attention(q, k, v, out=lambda p, v: p @ v + 1e-9)),
    (ch01.attention, lambda q, k, v: attention(q.float().double(), k, v)),
    (ch01.attention, lambda q, k, v: attention(q.mul_(1.0).add_(1e-3), k, v)),
    (ch01.attention, lambda q, k, v: 1 / 0),
    (ch01.peak, 1),
    (ch01.peak, 2),
    (ch01.peak, 4),
    (ch01.peak, 5),
    (ch01.peak, "three"),
]


@pytest.mark.parametrize(("grader", "answer"), SOLUTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_solution_is_accepted(grader, answer, capsys):
    assert accepted(grader, answer, capsys)


@pytest.mark.parametrize("case", range(len(MISTAKES)))
def test_mistake_is_turned_away(case):
    grader, answer = MISTAKES[case]
    with pytest.raises(ExerciseFailed) as caught:
        grader(answer)
    assert len(str(caught.value)) > 10


@pytest.mark.parametrize("grader", [grader for grader, _ in SOLUTIONS])
@pytest.mark.parametrize("empty", [..., None])
def test_missing_answer_is_told_so(grader, empty, capsys):
    grader(empty)
    assert capsys.readouterr().out.startswith("Not answered yet")


@pytest.mark.parametrize("grader", [ch01.scores_bytes, ch01.crossover, ch01.attention])
def test_skeleton_counts_as_unanswered(grader, capsys):
    def skeleton(*args): ...

    grader(skeleton)
    assert capsys.readouterr().out.startswith("Not answered yet")
