"""The graders of chapter 09 take the solutions and turn each known mistake away."""

from __future__ import annotations

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch09


def good_dq(
    Q, K, V, dO, LSE, D, scale, block, *,
    outer=None, rowsum=True, normalise=True, keep=True, ragged=True,
):  # fmt: skip
    dQ = torch.zeros_like(Q)
    end = len(K) if ragged else len(K) // block * block
    for j in range(0, end, block):
        k, v = K[j : j + block], V[j : j + block]
        S = Q @ k.mT * scale
        P = torch.exp(S - LSE[:, None]) if normalise else torch.exp(S)
        dS = P * (dO @ v.mT - (D[:, None] if rowsum else 0))
        add = dS @ k
        dQ = dQ + add if keep else add
    return dQ * (scale if outer is None else outer)


def whole_row(Q, K, V, dO, LSE, D, scale, block):
    return good_dq(Q, K, V, dO, LSE, D, scale, len(K))


def whole_column(Q, K, V, dO, LSE, D, scale, block):
    """Right, and all of it at once, transposed."""
    PT = torch.exp(K @ Q.mT * scale - LSE)
    return (PT * (V @ dO.mT - D)).mT @ K * scale


def good_delta(dout, out, dlse):
    return (dout * out).sum(-1) - dlse


def good_first(j, block_q, block_k, nq, nk):
    return max(0, j * block_k - (nk - nq)) // block_q


def good_flops(nq, nk, d, dv):
    return 2 * nq * nk * (4 * d + 3 * dv)


GOOD = [
    (ch09.break_even, lambda peak, bandwidth, e: e * peak / bandwidth),
    (ch09.delta, good_delta),
    (ch09.delta, lambda *a: good_delta(*a)[..., None]),
    (ch09.dq_of_block, good_dq),
    (ch09.first_query_block, good_first),
    (ch09.backward_flops, good_flops),
]

test_solutions_are_taken = solutions_are_taken(GOOD)


BAD = [
    (ch09.break_even, lambda p, b, e: e * p / b / 2, "two trips"),
    (ch09.break_even, lambda p, b, e: 2 * e * p / b, "two operations"),
    (ch09.break_even, lambda p, b, e: p / b, "bytes does an element"),
    (ch09.break_even, lambda p, b, e: b / p / e, "reciprocal"),
    (ch09.break_even, lambda p, b, e: 4 * e * p / b, "against 2d"),
    (ch09.break_even, lambda p, b, e: 128, "equal to the time"),
    (ch09.break_even, lambda p, b, e: "128", "number"),
    (ch09.delta, lambda do, o, dl: (do * o).sum(-1), "left out"),
    (ch09.delta, lambda do, o, dl: (do * o).sum(-1) + dl, "sign of dLSE"),
    (ch09.delta, lambda do, o, dl: dl - (do * o).sum(-1), "its sign"),
    (ch09.delta, lambda do, o, dl: (do * do).sum(-1) - dl, "dO and O"),
    (ch09.delta, lambda do, o, dl: (do * o).mean(-1) - dl, "∂LSE/∂S"),
    (ch09.delta, lambda do, o, dl: (do * o).sum(-2), "shape"),
    (ch09.delta, lambda do, o, dl: 0.0, "tensor"),
    (ch09.dq_of_block, lambda *a: good_dq(*a, outer=1.0), "gradient is too"),
    (ch09.dq_of_block, lambda *a: good_dq(*a, outer=0.36), "once"),
    (ch09.dq_of_block, lambda *a: good_dq(*a, rowsum=False), "D is subtracted"),
    (ch09.dq_of_block, lambda *a: good_dq(*a, normalise=False), "S − LSE"),
    (ch09.dq_of_block, lambda *a: good_dq(*a, keep=False), "add, not replace"),
    (ch09.dq_of_block, lambda *a: good_dq(*a, ragged=False), "shorter"),
    (ch09.dq_of_block, whole_row, "at a time"),
    (ch09.dq_of_block, whole_column, "at a time"),
    (ch09.dq_of_block, lambda *a: -good_dq(*a), "differs"),
    (ch09.dq_of_block, lambda *a: good_dq(*a)[:, :1], "shape"),
    (ch09.first_query_block, lambda j, bq, bk, nq, nk: j, "first key"),
    (ch09.first_query_block, lambda j, bq, bk, nq, nk: j * bk // bq, "aligned"),
    (ch09.first_query_block, lambda j, bq, bk, nq, nk: 0, "first key"),
    (ch09.first_query_block, lambda j, bq, bk, nq, nk: (j * bk - nk + nq) // bq, "before block 0"),
    (ch09.first_query_block, lambda *a: good_first(*a) + 1, "diagonal"),
    (ch09.first_query_block, lambda j, bq, bk, nq, nk: -(-(max(0, j * bk - nk + nq)) // bq),
     "diagonal"),
    (ch09.backward_flops, lambda nq, nk, d, dv: nq * nk * (4 * d + 3 * dv), "two operations"),
    (ch09.backward_flops, lambda nq, nk, d, dv: 2 * nq * nk * (3 * d + 2 * dv), "one pass"),
    (ch09.backward_flops, lambda nq, nk, d, dv: 14 * nq * nk * d, "dv wide"),
    (ch09.backward_flops, lambda nq, nk, d, dv: 2 * nq * nk * (3 * d + 4 * dv), "S twice"),
    (ch09.backward_flops, lambda nq, nk, d, dv: 2 * nq * nk * (4 * d + 2 * dv), "dP is needed"),
    (ch09.backward_flops, lambda nq, nk, d, dv: 2 * nq * nk * (3 * d + 3 * dv), "S is needed"),
    (ch09.backward_flops, lambda nq, nk, d, dv: 0, "each kernel"),
]  # fmt: skip

test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)

test_skeletons_are_not_errors = skeletons_are_not_errors(GOOD)
