"""The graders of chapter 06 take the solutions and turn each known mistake away."""

from __future__ import annotations

import math

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch06


def up(a, b):
    return -(-a // b)


def good_matmul(m, n, k, bm, bn):
    return up(n, bn) * m * k + up(m, bm) * k * n + m * n


def good_tile(fast, d, bn):
    return (fast - 2 * bn * d) // (2 * d + bn + 2)


def good_kv_outer(n, d, bn):
    return 2 * n * d + up(n, bn) * (3 * n * d + 4 * n)


def good_passes(
    slow, block, *, scale=True, shift=True, global_max=True, k_block=None, s_name=None, skip=0,
    again=False, ragged=True, normalise=True, twice=False,
):  # fmt: skip
    """Two passes, with a switch for each mistake."""
    k_block = k_block or block
    for first in range(0, slow.seq_len_q - skip, block):
        stop = min(first + block, slow.seq_len_q) if ragged else first + block
        q = slow.load("Q", first, stop)
        q = q / math.sqrt(slow.head_dim) if scale else q
        tiles = [
            (n, min(n + k_block, slow.seq_len_k)) for n in range(0, slow.seq_len_k, k_block)
        ]
        largest = torch.full((len(q), 1), -math.inf, dtype=q.dtype)
        for n in tiles:
            s = q @ slow.load(s_name or "K", *n).T
            largest = torch.maximum(largest, s.amax(1, keepdim=True))
        total, o = 0, 0
        for n in tiles:
            if again:
                q = slow.load("Q", first, stop) / math.sqrt(slow.head_dim)
            s = q @ slow.load("K", *n).T
            top = (largest if global_max else s.amax(1, keepdim=True)) if shift else 0
            p = torch.exp(s - top)
            total = total + p.sum(1, keepdim=True)
            o = o + p @ slow.load("V", *n)
        slow.store(first, o / total if normalise else o)
        if twice:
            slow.store(first, o / total)


def one_pass(slow, block):
    """The online softmax of chapter 07 is welcome: it loads less."""
    for first in range(0, slow.seq_len_q, block):
        q = slow.load("Q", first, min(first + block, slow.seq_len_q)) / math.sqrt(slow.head_dim)
        m, total, o = torch.full((len(q), 1), -math.inf, dtype=q.dtype), 0, 0
        for n in range(0, slow.seq_len_k, block):
            rows = n, min(n + block, slow.seq_len_k)
            s = q @ slow.load("K", *rows).T
            larger = torch.maximum(m, s.amax(1, keepdim=True))
            p, keep = torch.exp(s - larger), torch.exp(m - larger)
            total, o = total * keep + p.sum(1, keepdim=True), o * keep + p @ slow.load("V", *rows)
            m = larger
        slow.store(first, o / total)


GOOD = [
    (ch06.matmul, good_matmul),
    (ch06.largest_tile, good_tile),
    (ch06.kv_outer, good_kv_outer),
    (ch06.half_the_bytes, 4),
    (ch06.two_passes, good_passes),
    (ch06.two_passes, one_pass),
]

test_solutions_are_taken = solutions_are_taken(GOOD)


def wrong(**change):
    return lambda slow, block: good_passes(slow, block, **change)


BAD = [
    (ch06.matmul, lambda m, n, k, a, b: up(m, a) * m * k + up(n, b) * k * n + m * n, "column of t"),
    (ch06.matmul, lambda m, n, k, a, b: up(n, b) * m * k + up(m, a) * k * n, "written, too"),
    (ch06.matmul, lambda m, n, k, a, b: good_matmul(m, n, k, a, b) + m * n, "written once"),
    (ch06.matmul, lambda m, n, k, a, b: m * k + k * n + m * n, "each matrix once"),
    (ch06.matmul, lambda m, n, k, a, b: 2 * m * n * k + m * n, "without tiles"),
    (ch06.matmul, lambda m, n, k, a, b: 4 * good_matmul(m, n, k, a, b), "not bytes"),
    (ch06.matmul, lambda m, n, k, a, b: n / b * m * k + m / a * k * n + m * n, "round up"),
    (ch06.matmul, lambda m, n, k, a, b: n // b * m * k + m // a * k * n + m * n, "round up"),
    (
        ch06.matmul,
        lambda m, n, k, a, b: up(m, a) * up(n, b) * (a + b) * k + m * n,
        "only what is inside",
    ),
    (ch06.matmul, lambda m, n, k, a, b: 7, "Count the tiles"),
    (ch06.matmul, lambda m, n: 7, "TypeError"),
    (ch06.matmul, lambda *a: "many", "number"),
    (ch06.largest_tile, lambda f, d, b: (f - 2 * b * d) // (2 * d), "tile of S"),
    (ch06.largest_tile, lambda f, d, b: (f - 2 * b * d) // (2 * d + b), "maximum and a sum"),
    (ch06.largest_tile, lambda f, d, b: (f - 2 * b * d) // (d + b + 2), "O has as many"),
    (ch06.largest_tile, lambda f, d, b: f // (2 * d + b + 2), "take room first"),
    (ch06.largest_tile, lambda f, d, b: (f - b * d) // (2 * d + b + 2), "two tiles"),
    (ch06.largest_tile, lambda f, d, b: (f - 2 * b * d) // (2 * d + 2 * b + 2), "P overwrites"),
    (ch06.largest_tile, lambda f, d, b: up(f - 2 * b * d, 2 * d + b + 2), "no longer fits"),
    (ch06.largest_tile, lambda f, d, b: (f - 2 * b * d) / (2 * d + b + 2), "whole"),
    (ch06.largest_tile, lambda f, d, b: 128, "largest that fits"),
    (ch06.kv_outer, lambda n, d, b: 2 * n * d + up(n, b) * (2 * n * d + 4 * n), "written back"),
    (ch06.kv_outer, lambda n, d, b: 2 * n * d + up(n, b) * (n * d + 4 * n), "written back"),
    (ch06.kv_outer, lambda n, d, b: 2 * n * d + up(n, b) * 3 * n * d, "travel with O"),
    (ch06.kv_outer, lambda n, d, b: 2 * n * d + up(n, b) * (3 * n * d + 2 * n), "and written"),
    (ch06.kv_outer, lambda n, d, b: 3 * n * d + 4 * n + up(n, b) * 2 * n * d, "K and V stay"),
    (ch06.kv_outer, lambda n, d, b: up(n, b) * (5 * n * d + 4 * n), "loaded once"),
    (ch06.kv_outer, lambda n, d, b: 2 * n * d + n // b * (3 * n * d + 4 * n), "cut off"),
    (ch06.kv_outer, lambda n, d, b: 2 * n * d + n / b * (3 * n * d + 4 * n), "round up"),
    (
        ch06.kv_outer,
        lambda n, d, b: 3 * n * d + 2 * n + up(n, b) * (3 * n * d + 4 * n),
        "zeros",
    ),
    (ch06.kv_outer, lambda n, d, b: n * d, "what is loaded"),
    (ch06.half_the_bytes, 2, "fit into fast memory"),
    (ch06.half_the_bytes, 8, "third"),
    (ch06.half_the_bytes, 1, "fewer bytes"),
    (ch06.half_the_bytes, 0.25, "before over"),
    (ch06.half_the_bytes, 3, "two places"),
    (ch06.half_the_bytes, "four", "number"),
    (ch06.two_passes, wrong(scale=False), "divided by √d"),
    (ch06.two_passes, wrong(shift=False), "Subtract the largest"),
    (ch06.two_passes, wrong(global_max=False), "whole row"),
    (ch06.two_passes, wrong(normalise=False), "division by the sum"),
    (ch06.two_passes, wrong(k_block=1000), "at once"),
    (ch06.two_passes, wrong(s_name="S"), "stay in fast memory"),
    (ch06.two_passes, wrong(skip=8), "never stored"),
    (ch06.two_passes, wrong(ragged=False), "min\\(first"),
    (ch06.two_passes, wrong(again=True), "are enough"),
    (ch06.two_passes, wrong(twice=True), "you store"),
    (ch06.two_passes, lambda slow: slow.load("Q", 0, 1), "TypeError"),
    (ch06.two_passes, 3, "function itself"),
]

test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)


def unfinished(*args):
    raise NotImplementedError


test_skeletons_are_not_errors = skeletons_are_not_errors(GOOD, unfinished)
