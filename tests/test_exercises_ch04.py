"""Graders of chapter 04: right answers pass, each plausible mistake is turned away and told why."""

from __future__ import annotations

import math

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)
from torch.nn.functional import scaled_dot_product_attention

from labkit.exercises import ch04

# -- the folded solutions, as the chapter prints them -------------------------------------------


def intensity(seq_len_q, seq_len_k, head_dim, itemsize):
    flops = 2 * seq_len_q * seq_len_k * head_dim
    elements = seq_len_q * head_dim + seq_len_k * head_dim + seq_len_q * seq_len_k
    return flops / (elements * itemsize)


def seq_len_for_share(head_dim, num, den):
    return -(-2 * head_dim * num // (den - num))


def bounds(flops, bytes_moved, peak_flops, bandwidth):
    compute, memory = flops / peak_flops, bytes_moved / bandwidth
    return max(compute, memory), compute + memory, "memory" if memory > compute else "compute"


def fused_turns_compute_bound(ridge, head_dim, itemsize):
    return -(-ridge * (head_dim * itemsize + 1) // head_dim)


def leaner_attention(q, k, v):
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(s, dim=-1) @ v


def leaner_by_roots(q, k, v):
    c = q.shape[-1] ** -0.25
    return torch.softmax((q * c) @ (k * c).mT, dim=-1) @ v


RIGHT = {
    "intensity": (ch04.intensity, intensity),
    "share": (ch04.seq_len_for_share, seq_len_for_share),
    "bounds": (ch04.bounds, bounds),
    "turns": (ch04.fused_turns, fused_turns_compute_bound),
    "lean": (ch04.leaner_attention, leaner_attention),
    "lean, roots": (ch04.leaner_attention, leaner_by_roots),
}

test_solutions_are_taken = solutions_are_taken(RIGHT)

test_skeletons_are_not_errors = skeletons_are_not_errors(RIGHT)


# -- mistakes ----------------------------------------------------------------------------------


def scaled_after(q, k, v):
    return torch.softmax((q @ k.mT) * q.shape[-1] ** -0.5, -1) @ v


def scaled_in_place(q, k, v):
    s = q @ k.mT
    s *= q.shape[-1] ** -0.5
    return torch.softmax(s, -1) @ v


def unscaled(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


def scaled_twice(q, k, v):
    c = q.shape[-1] ** -0.5
    return torch.softmax((q * c) @ (k * c).mT, -1) @ v


def scaled_by_rows(q, k, v):
    return torch.softmax((q * q.shape[-2] ** -0.5) @ k.mT, -1) @ v


def scales_its_input(q, k, v):
    q *= q.shape[-1] ** -0.5
    return torch.softmax(q @ k.mT, -1) @ v


def softmax_over_queries(q, k, v):
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -2) @ v


def copies_p(q, k, v):
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    return torch.softmax(s, -1).clone() @ v


def fused(q, k, v):
    return scaled_dot_product_attention(q, k, v)


MUTANTS = [
    # exercise, mistake, part of the message
    (ch04.intensity, lambda nq, nk, d, e: 2 * d / e, "limit"),
    (ch04.intensity, lambda nq, nk, d, e: d, "limit"),
    (ch04.intensity, lambda nq, nk, d, e: intensity(nq, nk, d, e) / 2, "multiply-add"),
    (ch04.intensity, lambda nq, nk, d, e: intensity(nq, nk, d, 1), "per element"),
    (ch04.intensity, lambda nq, nk, d, e: intensity(nq, nk, d, 2), "4 bytes per element"),
    (ch04.intensity, lambda nq, nk, d, e: 2 * nq * nk * d / ((nq + nk) * d * e), "S is written"),
    (ch04.intensity, lambda nq, nk, d, e: 2 * nq * nk * d / (nq * nk * e), "limit"),
    (ch04.intensity, lambda nq, nk, d, e: intensity(nq, nq, d, e), "300 queries, 700 keys"),
    (
        ch04.intensity,
        lambda nq, nk, d, e: 2 * nq * nk * d / ((2 * nq * d + nq * nk) * e),
        "one row per key",
    ),
    (
        ch04.intensity,
        lambda nq, nk, d, e: 2 * nq * nk * d / ((nq * d + nk * d + 2 * nq * nk) * e),
        "not read",
    ),
    (ch04.intensity, lambda nq, nk, d, e: 1 / intensity(nq, nk, d, e), "other way round"),
    (ch04.intensity, lambda nq, nk, d, e: "51.2", "should be a number"),
    (ch04.intensity, lambda nq, nk, d, e: nq // 0, "ZeroDivisionError"),
    (ch04.intensity, 51.2, "Pass the function itself"),
    (ch04.seq_len_for_share, lambda d, p, q: 8 * d, "share of 9/10"),
    (ch04.seq_len_for_share, lambda d, p, q: 2 * d * p / (q - p), "round up"),
    (ch04.seq_len_for_share, lambda d, p, q: 2 * d * p // (q - p), "less than"),
    (ch04.seq_len_for_share, lambda d, p, q: 2 * d * p // (q - p) + 1, "is long enough"),
    (ch04.seq_len_for_share, lambda d, p, q: -(-d * p // (q - p)), "less than"),
    (ch04.seq_len_for_share, lambda d, p, q: -(-2 * d * p // q), "less than"),
    (ch04.seq_len_for_share, lambda d, p, q: -(-2 * d * (q - p) // p), "less than"),
    (ch04.seq_len_for_share, lambda d, p, q: math.ceil(2 * d / (q / p - 1)) + d, "long enough"),
    (ch04.seq_len_for_share, lambda d, p, q: 0, "at least one token"),
    (ch04.bounds, lambda f, b, p, w: (f / p + b / w, max(f / p, b / w), "memory"), "the sum"),
    (
        ch04.bounds,
        lambda f, b, p, w: (min(f / p, b / w), f / p + b / w, bounds(f, b, p, w)[2]),
        "longer of",
    ),
    (
        ch04.bounds,
        lambda f, b, p, w: (max(f / p, b / w), 2 * max(f / p, b / w), bounds(f, b, p, w)[2]),
        "add up",
    ),
    (
        ch04.bounds,
        lambda f, b, p, w: (*bounds(f, b, p, w)[:2], "memory" if b > f else "compute"),
        "you say",
    ),
    (
        ch04.bounds,
        lambda f, b, p, w: (*bounds(f, b, p, w)[:2], "memory" if b / w >= f / p else "compute"),
        "on the ridge",
    ),
    (
        ch04.bounds,
        lambda f, b, p, w: (*bounds(f, b, p, w)[:2], "compute" if b / w > f / p else "memory"),
        "you say",
    ),
    (ch04.bounds, lambda f, b, p, w: max(f / p, b / w), "three things"),
    (ch04.bounds, lambda f, b, p, w: (max(f * p, b * w), f * p + b * w, "memory"), "lower bound"),
    (ch04.fused_turns, lambda r, d, e: r * e, "still left of the ridge"),
    (ch04.fused_turns, lambda r, d, e: r * (d * e + 1) / d, "round up"),
    (ch04.fused_turns, lambda r, d, e: r * (d * e + 1) // d, "still left of the ridge"),
    (ch04.fused_turns, lambda r, d, e: r * (d * e + 1) // d + 1, "already"),
    (ch04.fused_turns, lambda r, d, e: -(-r * (d * e + 1) // (2 * d)), "still left"),
    (ch04.fused_turns, lambda r, d, e: -(-r * (d * e + e) // d), "already"),
    (ch04.fused_turns, lambda r, d, e: 2 * -(-r * (d * e + 1) // d), "already"),
    (ch04.fused_turns, lambda r, d, e: 416, "ridge of 295"),
    (ch04.fused_turns, lambda r, d, e: -5, "at least one token"),
    (ch04.leaner_attention, scaled_after, "reads and writes all of it"),
    (ch04.leaner_attention, scaled_in_place, "in place or not"),
    (ch04.leaner_attention, unscaled, "off by up to"),
    (ch04.leaner_attention, scaled_twice, "once"),
    (ch04.leaner_attention, scaled_by_rows, "√d"),
    (ch04.leaner_attention, scales_its_input, "changes its inputs"),
    (ch04.leaner_attention, softmax_over_queries, "off by up to"),
    (ch04.leaner_attention, copies_p, "clone"),
    (ch04.leaner_attention, fused, "fused attention"),
    (ch04.leaner_attention, lambda q, k, v: leaner_attention(q, k, v)[0], "has shape"),
]

test_mistakes_are_turned_away = mistakes_are_turned_away(MUTANTS)
