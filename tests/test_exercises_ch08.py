"""Graders of chapter 08: right answers pass, each plausible mistake is turned away and told why."""

from __future__ import annotations

import math

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch08

# -- the folded solutions, as the chapter prints them ---------------------------------------------


def two_stages(tile, seq_len, block_m, block_n):
    start = tile * block_m
    end = min(seq_len, start + block_m)
    whole = (start + 1) // block_n
    return whole, -(-end // block_n) - whole


def programs(registers, num_warps, shared_bytes):
    threads = 32 * num_warps
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    by_shared = 228 * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_shared, 2048 // threads)


def longest_unit(head_dim, block_m, instructions):
    clocks = {
        "product": 4 * head_dim / 4096,
        "exp": 1 / 16,
        "issue": instructions / 128,
        "L2": 2 * head_dim * 2 / block_m / 32,
    }
    name = max(clocks, key=clocks.get)
    return name, clocks[name]


def update(S, V, m, l, O, c):  # noqa: E741
    m_new = torch.maximum(m, c * S.amax(1))
    P = torch.exp2(c * S - m_new[:, None])
    alpha = torch.exp2(m - m_new)
    return m_new, alpha * l + P.sum(1), alpha[:, None] * O + P @ V


def join(o1, lse1, o2, lse2):
    top = torch.maximum(lse1, lse2)
    top = torch.where(top == -math.inf, 0.0, top)
    w1, w2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = w1 + w2
    safe = torch.where(total == 0, 1.0, total)
    o = (w1 / safe)[:, None] * o1 + (w2 / safe)[:, None] * o2
    return o, top + torch.log(total)


def join_logaddexp(o1, lse1, o2, lse2):
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = (torch.exp(x - lse).nan_to_num(0.0) for x in (lse1, lse2))
    return w1[:, None] * o1 + w2[:, None] * o2, lse


RIGHT = {
    "stages": (ch08.two_stages, two_stages),
    "programs": (ch08.programs, programs),
    "unit": (ch08.longest_unit, longest_unit),
    "update": (ch08.update, update),
    "join": (ch08.join, join),
    "join, logaddexp": (ch08.join, join_logaddexp),
}

test_solutions_are_taken = solutions_are_taken(RIGHT)

test_skeletons_are_not_errors = skeletons_are_not_errors(RIGHT)


# -- mistakes -------------------------------------------------------------------------------------


def stages_by_end(tile, n, bm, bn):
    end = min(n, (tile + 1) * bm)
    return end // bn, -(-end // bn) - end // bn


def stages_all(tile, n, bm, bn):
    whole = two_stages(tile, n, bm, bn)[0]
    return whole, -(-n // bn) - whole


def stages_past_end(tile, n, bm, bn):
    whole = two_stages(tile, n, bm, bn)[0]
    return whole, -(-(tile + 1) * bm // bn) - whole


def stages_all_masked(tile, n, bm, bn):
    return 0, sum(two_stages(tile, n, bm, bn))


def by_registers(r, w, s):
    return 65536 // (-(-r // 8) * 8 * 32 * w)


def mixed(by_registers, r, w, s):
    return min(by_registers, 228 * 1024 // (s + 1024), 2048 // (32 * w))


def natural(S, V, m, l, O, c):  # noqa: E741
    m_new = torch.maximum(m, c * math.log(2) * S.amax(1))
    P = torch.exp(c * math.log(2) * S - m_new[:, None])
    alpha = torch.exp(m - m_new)
    return m_new, alpha * l + P.sum(1), alpha[:, None] * O + P @ V


def raw_maximum(S, V, m, l, O, c):  # noqa: E741
    m_new = torch.maximum(m, S.amax(1))
    P = torch.exp2(c * (S - m_new[:, None]))
    alpha = torch.exp2(c * (m - m_new))
    return m_new, alpha * l + P.sum(1), alpha[:, None] * O + P @ V


def no_rescale_of_o(S, V, m, l, O, c):  # noqa: E741
    m_new, l_new, _ = update(S, V, m, l, O, c)
    return m_new, l_new, O + torch.exp2(c * S - m_new[:, None]) @ V


def no_rescale_of_l(S, V, m, l, O, c):  # noqa: E741
    m_new, _, o = update(S, V, m, l, O, c)
    return m_new, l + torch.exp2(c * S - m_new[:, None]).sum(1), o


def upside_down(S, V, m, l, O, c):  # noqa: E741
    m_new = torch.maximum(m, c * S.amax(1))
    P = torch.exp2(c * S - m_new[:, None])
    alpha = torch.exp2(m_new - m)
    return m_new, alpha * l + P.sum(1), alpha[:, None] * O + P @ V


def divides_at_once(S, V, m, l, O, c):  # noqa: E741
    m_new, l_new, o = update(S, V, m, l, O, c)
    return m_new, l_new, o / l_new[:, None]


def only_this_block(S, V, m, l, O, c):  # noqa: E741
    m_new = c * S.amax(1)
    P = torch.exp2(c * S - m_new[:, None])
    alpha = torch.exp2(m - m_new)
    return m_new, alpha * l + P.sum(1), alpha[:, None] * O + P @ V


def plain_mean(o1, lse1, o2, lse2):
    return (o1 + o2) / 2, torch.logaddexp(lse1, lse2)


def unsafe(o1, lse1, o2, lse2):
    w1, w2 = torch.exp(lse1), torch.exp(lse2)
    total = torch.where(w1 + w2 == 0, 1.0, w1 + w2)
    o = (w1[:, None] * o1 + w2[:, None] * o2) / total[:, None]
    return o, torch.log(w1 + w2)


def nan_for_nothing(o1, lse1, o2, lse2):
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = torch.exp(lse1 - lse), torch.exp(lse2 - lse)
    return w1[:, None] * o1 + w2[:, None] * o2, lse


def sums_lse(o1, lse1, o2, lse2):
    return join(o1, lse1, o2, lse2)[0], lse1 + lse2


def base_two(o1, lse1, o2, lse2):
    lse = torch.log2(torch.exp2(lse1) + torch.exp2(lse2))
    return join(o1, lse1, o2, lse2)[0], lse


def weights_swapped(o1, lse1, o2, lse2):
    return join(o2, lse1, o1, lse2)


def zero_lse(o1, lse1, o2, lse2):
    o, lse = join(o1, lse1, o2, lse2)
    return o, lse.nan_to_num(neginf=0.0)


MUTANTS = [
    # exercise, mistake, part of the message
    (ch08.two_stages, stages_by_end, "leave the mask away"),
    (ch08.two_stages, stages_all, "hold a visible key"),
    (ch08.two_stages, stages_past_end, "hold a visible key"),
    (ch08.two_stages, stages_all_masked, "that need no mask; there are"),
    (ch08.two_stages, lambda t, n, m, b: (t * m // b, 1), "need the mask"),
    (ch08.two_stages, lambda t, n, m, b: (t, m // b), "64"),
    (ch08.two_stages, lambda t, n, m, b: t * m // b, "two numbers"),
    (ch08.programs, lambda r, w, s: mixed(65536 // (r * 32 * w), r, w, s), "by eights"),
    (ch08.programs, lambda r, w, s: mixed(65536 // (-(-r // 8) * 8 * w), r, w, s), "32 threads"),
    (
        ch08.programs,
        lambda r, w, s: min(by_registers(r, w, s), 228 * 1024 // s, 2048 // (32 * w)),
        "1 KiB",
    ),
    (ch08.programs, lambda r, w, s: 228 * 1024 // (s + 1024), "Shared memory is not all"),
    (ch08.programs, by_registers, "Registers are not all"),
    (
        ch08.programs,
        lambda r, w, s: min(by_registers(r, w, s), 228 * 1024 // (s + 1024)),
        "2,048 threads",
    ),
    (ch08.programs, lambda r, w, s: 1, "What runs out first"),
    (ch08.programs, lambda r, w, s: "two", "should be a number"),
    (ch08.longest_unit, lambda d, m, n: ("product", 4 * d / 4096), "longest of the four"),
    (ch08.longest_unit, lambda d, m, n: ("exp", longest_unit(d, m, n)[1]), "not the longest"),
    (
        ch08.longest_unit,
        lambda d, m, n: ("product", d / 1024 + 1 / 16 + n / 128 + d / m / 8),
        "the sum",
    ),
    (
        ch08.longest_unit,
        lambda d, m, n: (longest_unit(d, m, n)[0], longest_unit(d, m, n)[1] / 2),
        "Two products",
    ),
    (ch08.longest_unit, lambda d, m, n: longest_unit(d, m, n)[0], "two things"),
    (ch08.update, natural, "natural units"),
    (ch08.update, raw_maximum, "without c"),
    (ch08.update, no_rescale_of_o, "rescale it"),
    (ch08.update, no_rescale_of_l, "relative to the old m"),
    (ch08.update, upside_down, "not finite"),
    (ch08.update, divides_at_once, "divide by l only at the end"),
    (ch08.update, only_this_block, "so far"),
    (ch08.update, lambda *a: update(*a)[:2], "three tensors"),
    (ch08.update, lambda *a: tuple(x[None] for x in update(*a)), "shapes"),
    (ch08.join, plain_mean, "weighted by"),
    (ch08.join, unsafe, "not finite"),
    (ch08.join, nan_for_nothing, "sees no key"),
    (ch08.join, sums_lse, "not finite"),
    (ch08.join, base_two, "LSE is off"),
    (ch08.join, weights_swapped, "weighted by"),
    (ch08.join, zero_lse, "sees no key"),
    (ch08.join, lambda *a: join(*a)[0], "two tensors"),
]

test_mistakes_are_turned_away = mistakes_are_turned_away(MUTANTS)
