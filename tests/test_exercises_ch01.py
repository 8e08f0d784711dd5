"""The graders of chapter 01 accept the solution and reject each known wrong answer."""

from __future__ import annotations

import math

import pytest
import torch

from labkit.exercises import ExerciseFailed, ch01


def solution(q, k, v, causal):
    S = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        i = torch.arange(q.shape[2])[:, None]
        j = torch.arange(k.shape[2])[None, :]
        S = S.masked_fill(j > i + k.shape[2] - q.shape[2], float("-inf"))
    P = torch.softmax(S, dim=-1)
    return S, P, P @ v


def steps(
    *,
    scale=lambda q, k, v: q.shape[-1] ** -0.5,
    dim=-1,
    offset=lambda q, k: k.shape[2] - q.shape[2],
    mask=True,
    fill=float("-inf"),
    after=False,
):
    def answer(q, k, v, causal):
        S = q @ k.mT * scale(q, k, v)
        j, i = torch.arange(k.shape[2])[None, :], torch.arange(q.shape[2])[:, None]
        hidden = j > i + offset(q, k)
        if causal and mask and not after:
            S = S.masked_fill(hidden, fill)
        P = torch.softmax(S, dim=dim)
        if causal and after:
            P = P.masked_fill(hidden, 0)
        return S, P, P @ v

    return answer


def transposed(q, k, v, causal):
    return tuple(t.mT for t in solution(q, k, v, causal))


def accepted(capsys) -> bool:
    return capsys.readouterr().out.startswith("✓")


def test_solutions_are_accepted(capsys):
    ch01.scores_bytes(lambda batch, heads, n, e: batch * heads * n * n * e)
    assert accepted(capsys)
    ch01.crossover(lambda d: 2 * d)
    assert accepted(capsys)
    ch01.three_steps(solution)
    assert accepted(capsys)
    ch01.three_steps(steps())
    assert accepted(capsys)
    ch01.peaks(a=2, b=3, c=1)
    assert accepted(capsys)


@pytest.mark.parametrize(
    ("mutant", "says"),
    [
        (lambda b, h, n, e: b * h * n * e, "twice"),
        (lambda b, h, n, e: b * n * n * e, "each head"),
        (lambda b, h, n, e: h * n * n * e, "batch"),
        (lambda b, h, n, e: b * h * n * n, "elements"),
        (lambda b, h, n, e: 2 * b * h * n * n * e, "S and P"),
        (lambda b, h, n, e: b * h * n * n * e * 8, "bits"),
        (lambda b, h, n, e: b * h * n * n * 4, "bytes"),
        (lambda b, h, n, e: b * h * n * n * e / 2**20, "bytes"),
        (lambda b, h, n: 1, "TypeError"),
        (7, "function itself"),
    ],
)
def test_wrong_bytes_of_s_are_rejected(mutant, says):
    with pytest.raises(ExerciseFailed, match=says):
        ch01.scores_bytes(mutant)


@pytest.mark.parametrize(
    "mutant", [lambda d: d, lambda d: 4 * d, lambda d: d / 2, lambda d: 128, lambda d: "2d"]
)
def test_wrong_crossovers_are_rejected(mutant):
    with pytest.raises(ExerciseFailed, match="equal"):
        ch01.crossover(mutant)


@pytest.mark.parametrize(
    ("mutant", "says"),
    [
        (steps(scale=lambda q, k, v: 1.0), "without its scale"),
        (steps(scale=lambda q, k, v: 1 / q.shape[-1]), "divided by d"),
        (steps(scale=lambda q, k, v: v.shape[-1] ** -0.5), "QKᵀ/√d"),
        (steps(scale=lambda q, k, v: k.shape[2] ** -0.5), "QKᵀ/√d"),
        (steps(dim=-2), "columns of P"),
        (steps(dim=1), "sums to"),
        (steps(mask=False), "every key"),
        (steps(offset=lambda q, k: 0), "top left"),
        (steps(offset=lambda q, k: k.shape[2] - q.shape[2] - 1), "not the softmax|row of P"),
        (steps(offset=lambda q, k: k.shape[2] - q.shape[2] + 1), "not the softmax"),
        (steps(after=True), "after the softmax"),
        (steps(fill=0.0), "exp\\(0\\)"),
        (lambda q, k, v, causal: solution(q, k, v, causal)[2], "three tensors"),
        (lambda q, k, v, causal: (*solution(q, k, v, causal)[:2], v), "not PV"),
        (lambda q, k, v, causal: (*solution(q, k, v, causal)[:2], 2 * solution(q, k, v, causal)[2]),
         "not PV"),
        (lambda q, k, v, causal: solution(q, k, v, False), "every key"),
        (lambda q, k, v, causal: solution(q[:1], k, v, causal), "S has shape|broadcast|not QKᵀ"),
        (transposed, "not QKᵀ/√d"),
    ],
)  # fmt: skip
def test_wrong_attentions_are_rejected(mutant, says):
    with pytest.raises(ExerciseFailed, match=says):
        ch01.three_steps(mutant)


@pytest.mark.parametrize(
    "wrong", [(1, 3, 1), (3, 3, 1), (2, 2, 1), (2, 4, 1), (2, 3, 2), (2, 3, 0)]
)
def test_wrong_peaks_are_rejected(wrong):
    with pytest.raises(ExerciseFailed, match="N×N tensors are alive"):
        ch01.peaks(*wrong)


def test_a_skeleton_is_not_an_error(capsys):
    def skeleton(*args):
        return ...

    def empty(*args): ...

    def unwritten(*args):
        raise NotImplementedError

    for answer in (skeleton, empty, unwritten, ..., None):
        for check in (ch01.scores_bytes, ch01.crossover, ch01.three_steps):
            check(answer)
            assert capsys.readouterr().out.startswith("Not answered yet: ")
    ch01.three_steps(lambda q, k, v, causal: (..., ..., ...))
    assert capsys.readouterr().out == "Not answered yet: Attention in three steps.\n"
    ch01.peaks(a=..., b=..., c=...)
    assert capsys.readouterr().out == "Not answered yet: Peaks by reading.\n"


def test_snippets_show_as_the_reader_would_write_them(capsys):
    ch01.show_snippets()
    shown = capsys.readouterr().out
    assert shown.startswith("def a(q, k, v):\n    S = q @ k.mT")
    assert "import" not in shown
    assert shown.count("def ") == 3
