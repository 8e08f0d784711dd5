"""Exercises of chapter 01: what does attention write to memory?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from labkit.exercises import ask, expect, grader

__all__ = ["SNIPPETS", "crossover", "peaks", "scores_bytes", "show_snippets", "three_steps"]


@grader
def scores_bytes(answer: Callable[[int, int, int, int], int]) -> str:
    """Bytes of S.

    ``answer(batch, heads, seq_len, bytes_per_element)`` returns the bytes of S.
    """
    cases = [(1, 1, 512, 4), (1, 12, 2048, 2), (8, 12, 4096, 2), (3, 5, 7, 4)]
    for batch, heads, n, e in cases:
        right = batch * heads * n * n * e
        got = ask(answer, batch, heads, n, e)
        slips = {
            batch
            * heads
            * n
            * e: "S has one row per query and one column per key: N appears twice",
            batch * n * n * e: "each head has its own S",
            heads * n * n * e: "each element of the batch has its own S",
            n * n * e: "each head of each batch element has its own S",
            batch * heads * n * n: "that counts elements: multiply by the bytes of one",
            2 * right: "that is S and P together",
            8 * right: "that is in bits",
        }
        why = next((text for value, text in slips.items() if got == value and got != right), "")
        expect(
            got == right,
            f"batch {batch}, {heads} heads, seq_len {n}, {e} bytes per element: S has {right:,} "
            f"bytes, you say {got!r}." + (f" Hint: {why}." if why else ""),
        )
    return f"{len(cases)} problems, exact to the byte."


@grader
def crossover(answer: Callable[[int], float]) -> str:
    """The length at which the scores outweigh everything else.

    ``answer(head_dim)`` returns the seq_len at which S and P together have as many bytes as
    Q, K, V and O together.
    """
    slips = {
        1.0: "that is where S alone has as many as Q and O, one of the two pairs",
        4.0: "that compares S alone with all four of Q, K, V, O",
        0.5: "solve 2·N² = 4·N·d for N",
    }
    for d in (32, 64, 80, 128):
        got = ask(answer, d)
        try:
            ratio = float(got) / d
        except (TypeError, ValueError):
            ratio = math.nan
        n, quads, squares = 2 * d, 4 * 2 * d * d, 2 * (2 * d) ** 2
        why = slips.get(ratio, "")
        expect(
            ratio == 2.0,
            f"head_dim {d}: you say {got!r}. At the length asked for, 4·N·d and 2·N² are equal."
            + (f" Hint: {why}." if why else ""),
        )
        assert quads == squares and n
    return "It is independent of batch, heads and dtype: all of them cancel."


@grader
def three_steps(answer: Callable[..., Any]) -> str:
    """Attention in three steps.

    ``answer(q, k, v, causal)`` returns ``(S, P, O)`` for q ``[batch, heads, n_q, d]``,
    k ``[batch, heads, n_k, d]``, v ``[batch, heads, n_k, d_v]``.
    """
    import torch

    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = [(5, 5, 4, 4), (3, 7, 4, 6), (1, 6, 16, 2), (6, 4, 3, 5)]
    for n_q, n_k, d, d_v in sizes:
        for causal in (False, True) if n_q <= n_k else (False,):
            q, k, v = draw(2, 3, n_q, d), draw(2, 3, n_k, d), draw(2, 3, n_k, d_v)
            result = ask(answer, q.clone(), k.clone(), v.clone(), causal)
            expect(
                isinstance(result, tuple) and len(result) == 3,
                "Return the three tensors: return S, P, O.",
            )
            _check_steps(torch, q, k, v, causal, *result)
    return f"{len(sizes)} shapes, square and not, causal and not, against float64."


def _check_steps(torch, q, k, v, causal, s, p, o) -> None:
    n_q, n_k, d = q.shape[2], k.shape[2], q.shape[3]
    where = f"n_q = {n_q}, n_k = {n_k}, d = {d}, causal = {causal}: "

    def same(a, b) -> bool:
        return a.shape == b.shape and torch.allclose(a.double(), b, rtol=0, atol=1e-8)

    for name, tensor in (("S", s), ("P", p), ("O", o)):
        expect(isinstance(tensor, torch.Tensor), f"{where}{name} is not a tensor.")
    raw = q @ k.transpose(-2, -1)
    scores = raw / math.sqrt(d)
    i, j = torch.arange(n_q)[:, None], torch.arange(n_k)[None, :]
    seen = j <= i + (n_k - n_q) if causal else torch.ones(n_q, n_k, dtype=torch.bool)
    infinity = torch.tensor(-math.inf, dtype=torch.float64)
    right = torch.softmax(torch.where(seen, scores, infinity), dim=-1)

    # -- S: scores that are not hidden; a wrong mask shows in P, below
    expect(
        s.shape == raw.shape,
        f"{where}S has shape {list(s.shape)}; one row per query and one column per key is "
        f"{list(raw.shape)}.",
    )
    seen4 = seen.expand_as(raw) & ~torch.isneginf(s)
    expect(
        not same(s[seen4], raw[seen4]) or d == 1,
        f"{where}S is QKᵀ without its scale: multiply by 1/√d.",
    )
    expect(
        not same(s[seen4], (raw / d)[seen4]) or d == 1,
        f"{where}S is divided by d; the scale is 1/√d.",
    )
    expect(
        same(s[seen4], scores[seen4]),
        f"{where}S is not QKᵀ/√d (√d with d = head_dim of q, here {math.sqrt(d):.3g}).",
    )

    # -- P
    expect(p.shape == raw.shape, f"{where}P has shape {list(p.shape)}, not {list(raw.shape)}.")
    if not same(p, right):
        ones = torch.ones(1, dtype=torch.float64)
        columns, rows = p.sum(-2), p.sum(-1)
        expect(
            same(rows, ones.expand(rows.shape)) or not same(columns, ones.expand(columns.shape)),
            f"{where}the columns of P sum to 1: the softmax runs over the keys, dim=-1.",
        )
        if causal:
            top_left = torch.where(j <= i, scores, infinity)
            expect(
                not same(p, torch.softmax(scores, dim=-1)),
                f"{where}P looks at every key: hide the scores with j > i + n_k − n_q.",
            )
            expect(
                not same(p, torch.softmax(top_left, dim=-1)),
                f"{where}the mask is aligned to the top left. The last query sees every key: "
                "query i sees key j when j ≤ i + n_k − n_q.",
            )
            expect(
                not same(p, torch.where(seen, torch.softmax(scores, -1), 0 * infinity.exp())),
                f"{where}the mask came after the softmax: rows no longer sum to 1. Hide scores, "
                "not probabilities.",
            )
            expect(
                not same(p, torch.softmax(torch.where(seen, scores, 0 * scores), -1)),
                f"{where}a hidden score of 0 still counts, exp(0) = 1. Use −∞.",
            )
        expect(
            same(rows, ones.expand(rows.shape)),
            f"{where}a row of P sums to {rows.flatten()[0].item():.4g}, not 1.",
        )
        expect(False, f"{where}P is not the softmax of S along each row.")

    # -- O
    out = right @ v
    expect(
        o.shape == out.shape,
        f"{where}O has shape {list(o.shape)}; one row per query, one column per column of V "
        f"is {list(out.shape)}.",
    )
    expect(same(o, out), f"{where}S and P are right, O is not PV.")


# -- the peaks of three functions ----------------------------------------------


def _a(q, k, v):
    import torch

    S = q @ k.mT * q.shape[-1] ** -0.5
    P = torch.softmax(S, dim=-1)
    return P @ v


def _b(q, k, v):
    import torch

    raw = q @ k.mT
    S = raw * q.shape[-1] ** -0.5
    P = torch.softmax(S, dim=-1)
    return P @ v


def _c(q, k, v):
    S = q @ k.mT
    S *= q.shape[-1] ** -0.5
    S -= S.amax(dim=-1, keepdim=True)
    S.exp_()
    S /= S.sum(dim=-1, keepdim=True)
    return S @ v


#: three ways to write attention, by letter
SNIPPETS: dict[str, Callable] = {"a": _a, "b": _b, "c": _c}


def show_snippets() -> None:
    """Print the source of the three functions of the exercise."""
    texts = [inspect.getsource(fn).replace("    import torch\n\n", "") for fn in SNIPPETS.values()]
    print("\n\n".join(text.replace("def _", "def ").strip() for text in texts))


@grader
def peaks(a: float, b: float, c: float) -> str:
    """Peaks by reading.

    The peak of each of the three functions without gradients, in whole units of the bytes of
    S (tensors of N×d and N elements neglected).  Graded by tracing the functions.
    """
    import torch

    from labkit.memory import trace

    n, d = 1024, 8
    inputs = [torch.empty(1, 1, n, d, device="meta") for _ in range(3)]
    unit = n * n * 4
    for name, said in (("a", a), ("b", b), ("c", c)):
        traced = trace(SNIPPETS[name], *inputs)
        right = round(traced.peak / unit)
        squares = [e for e in traced.alive_at_peak() if e.bytes == unit]
        alive = ", ".join(f"the result of {e.op.strip('_')}" for e in squares)
        why = (
            f" At its peak these N×N tensors are alive: {alive}. A tensor lives as long as a "
            "name or a pending expression holds it."
        )
        expect(said == right, f"{name}: you say {said!r}." + why)
    return "The tracer counts the same N×N tensors alive."
