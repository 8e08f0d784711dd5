"""The graders of chapter 13 take the solutions and turn each known mistake away."""

from __future__ import annotations

from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch13


def good_bytes(count, size, d, dv, heads, e):
    return count * size * (d + dv) * heads * e


def good_expected(n, s, m):
    return n * (1 - (1 - s / n) ** m)


def good_union(choices):
    members = {}
    for i, row in enumerate(choices):
        for block in row:
            if block >= 0:
                members[block] = members.get(block, 0) | 1 << i
    blocks = sorted(members)
    return blocks, [members[block] for block in blocks]


def good_group(size, d, dv):
    return size * (d + dv) / (d + 2 * dv)


def good_best(chunks, count, *, tie=1, offset=True, ascending=True):
    best, first = [], 0
    for chunk in chunks:
        best += [(-score, tie * (first + i)) for i, score in enumerate(chunk)]
        best = sorted(best)[:count]
        first += len(chunk) if offset else 0
    found = [abs(block) for _, block in best]
    return sorted(found) if ascending else found


def padded_best(chunks, count):
    """Places that are not taken hold block 10⁶ with score 0: negative scores never get in."""
    best, first = [(0.0, 10**6)] * count, 0
    for chunk in chunks:
        best += [(-score, first + i) for i, score in enumerate(chunk)]
        best = sorted(best)[:count]
        first += len(chunk)
    return sorted(block for _, block in best)


GOOD = [
    (ch13.bytes_per_token, good_bytes),
    (ch13.expected_union, good_expected),
    (ch13.union, good_union),
    (ch13.union, lambda c: tuple(map(tuple, good_union(c)))),
    (ch13.same_bytes_group, good_group),
    (ch13.best_blocks, good_best),
]

test_solutions_are_taken = solutions_are_taken(GOOD)


def bits(choices, of):
    blocks, _ = good_union(choices)
    return blocks, [of(choices, block) for block in blocks]


BAD = [
    (ch13.bytes_per_token, lambda c, s, d, dv, h, e: c * s * d * h * e, "V is read"),
    (ch13.bytes_per_token, lambda c, s, d, dv, h, e: 2 * c * s * d * h * e, "V"),
    (ch13.bytes_per_token, lambda c, s, d, dv, h, e: c * s * (d + dv) * h, "elements"),
    (ch13.bytes_per_token, lambda c, s, d, dv, h, e: c * s * (d + dv) * e, "own blocks"),
    (ch13.bytes_per_token, lambda c, s, d, dv, h, e: c * (d + dv) * h * e, "block_size keys"),
    (ch13.bytes_per_token, lambda *a: 16 * good_bytes(*a), "share"),
    (ch13.bytes_per_token, lambda *a: 1, "How many keys"),
    (ch13.expected_union, lambda n, s, m: s * m, "once"),
    (ch13.expected_union, lambda n, s, m: min(n, s * m), "counts"),
    (ch13.expected_union, lambda n, s, m: n * (1 - s / n) ** m, "nobody"),
    (ch13.expected_union, lambda n, s, m: n * (s / n) ** m, "everybody"),
    (ch13.expected_union, lambda n, s, m: 1 - (1 - s / n) ** m, "How many are there"),
    (ch13.expected_union, lambda n, s, m: n * (1 - (1 - 1 / n) ** (s * m)), "same block twice"),
    (ch13.expected_union, lambda n, s, m: s, "unchosen"),
    (ch13.union, lambda c: good_union(c)[0], "two lists"),
    (ch13.union, lambda c: (good_union(c)[0][::-1], good_union(c)[1][::-1]), "ascending"),
    (ch13.union, lambda c: (sorted({b for r in c for b in r}), [0]), "unused slot"),
    (ch13.union, lambda c: bits(c, lambda x, b: sum(r.count(b) << i for i, r in enumerate(x))),
     "names twice"),
    (ch13.union, lambda c: bits(c, lambda x, b: sum(b in r for r in x)), "who"),
    (ch13.union, lambda c: bits(
        c, lambda x, b: sum((b in r) << (len(x) - 1 - i) for i, r in enumerate(x))), "lowest bit"),
    (ch13.same_bytes_group, lambda size, d, dv: size, "written and read"),
    (ch13.same_bytes_group, lambda size, d, dv: 1 / good_group(size, d, dv), "reciprocal"),
    (ch13.same_bytes_group, lambda size, d, dv: size / 2, "once for each"),
    (ch13.same_bytes_group, lambda size, d, dv: 16, "equal to what"),
    (ch13.best_blocks, lambda *a: good_best(*a, tie=-1), "lower block number"),
    (ch13.best_blocks, lambda *a: good_best(*a, offset=False), "return"),
    (ch13.best_blocks, lambda *a: good_best(*a, ascending=False), "ascending"),
    (ch13.best_blocks, padded_best, "no such block"),
    (ch13.best_blocks, lambda chunks, count: good_best([list(chunks)[-1]], count), "last chunk"),
    (ch13.best_blocks, lambda chunks, count: good_best([next(chunks)], count), "compete"),
    (ch13.best_blocks, lambda chunks, count: 3, "list"),
]  # fmt: skip

test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)

test_skeletons_are_not_errors = skeletons_are_not_errors(GOOD)
