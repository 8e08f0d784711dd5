"""Graders of chapter 03: right answers pass, each plausible mistake is turned away."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from labkit.exercises import ExerciseFailed, ch03

# -- right answers, as the chapter's solutions have them -----------------------------


def copy_rate(elements, itemsize, milliseconds):
    return 2 * elements * itemsize / (milliseconds / 1e3) / 1e12


def largest_copy(l2_bytes, itemsize):
    return l2_bytes // (2 * itemsize)


def bank_ways(words):
    return max(Counter(word % 32 for word in set(words)).values())


def loads_per_thread(bandwidth, latency, threads, load_bytes):
    return math.ceil(bandwidth * latency / (threads * load_bytes))


def passes_needed(ratio, speedup):
    if speedup >= ratio:
        return math.inf
    return max(1, math.ceil(speedup * (ratio - 1) / (ratio - speedup) - 1e-9))


RIGHT = {
    "copy_rate": copy_rate,
    "largest_copy": largest_copy,
    "bank_ways": bank_ways,
    "bytes_in_flight": loads_per_thread,
    "reuse_speedup": passes_needed,
}

#: exercise → what is wrong → (answer, words that the message must have)
MUTANTS = {
    "copy_rate": {
        "the write is forgotten": (lambda n, e, ms: n * e / ms / 1e9, "read and written"),
        "milliseconds taken for seconds": (lambda n, e, ms: 2 * n * e / ms / 1e12, "milliseconds"),
        "both": (lambda n, e, ms: n * e / ms / 1e12, "twice"),
        "bytes per second": (lambda n, e, ms: 2 * n * e / ms * 1e3, "bytes per second"),
        "elements": (lambda n, e, ms: 2 * n / ms / 1e9, "counts elements"),
        "binary": (lambda n, e, ms: 2 * n * e / ms * 1e3 / 2**40, "decimal"),
        "float32 taken for granted": (lambda n, e, ms: 2 * n * 4 / ms / 1e9, "divided by seconds"),
        "text": (lambda n, e, ms: "4 TB/s", "number"),
    },
    "largest_copy": {
        "no room for y": (lambda l2, e: l2 // e, "no room"),
        "bytes": (lambda l2, e: l2 // 2, "in bytes"),
        "not rounded": (lambda l2, e: l2 / (2 * e), "round down"),
        "rounded up": (lambda l2, e: -(-l2 // (2 * e)), "round down"),
        "rounded to even": (lambda l2, e: 2 * (l2 // (4 * e)), "together"),
        "the H200's L2": (lambda l2, e: 60 * 2**20 // (2 * e), "together"),
    },
    "bank_ways": {
        "lanes of one word counted apart": (
            lambda w: max(Counter(x % 32 for x in w).values()),
            "served together",
        ),
        "number of banks in use": (lambda w: len({x % 32 for x in w}), "busiest bank"),
        "16 banks": (lambda w: max(Counter(x % 16 for x in set(w)).values()), "Which bank"),
        "banks of neighbouring words": (
            lambda w: max(Counter(x // 32 for x in set(w)).values()),
            "banks in use",
        ),
        "words taken for bytes": (
            lambda w: max(Counter(x // 4 % 32 for x in set(w)).values()),
            "Which bank",
        ),
        "conflicts instead of passes": (
            lambda w: max(Counter(x % 32 for x in set(w)).values()) - 1,
            "at least one",
        ),
        "the stride of the first two lanes": (
            lambda w: math.gcd(abs(w[1] - w[0]), 32) if w[1] != w[0] else 1,
            "served together|Which bank",
        ),
        "always one": (lambda w: 1, "Which bank"),
        "all lanes": (lambda w: len(w), "banks in use"),
    },
    "bytes_in_flight": {
        "rounded down": (lambda b, t, n, s: int(b * t / (n * s)), "round up"),
        "not rounded": (lambda b, t, n, s: b * t / (n * s), "round up"),
        "all threads together": (lambda b, t, n, s: math.ceil(b * t / s), "together"),
        "bytes per thread": (lambda b, t, n, s: math.ceil(b * t / n), "not loads"),
        "the whole chip": (lambda b, t, n, s: math.ceil(b * t), "whole chip"),
        "divided by latency": (lambda b, t, n, s: math.ceil(b / t / n / s), "times latency"),
        "one more for luck": (lambda b, t, n, s: int(b * t / (n * s)) + 1, "times latency"),
    },
    "reuse_speedup": {
        "the ratio of the bandwidths": (lambda rho, s: rho if s < rho else math.inf, "enough"),
        "as many passes as times faster": (
            lambda rho, s: math.ceil(s) if s < rho else math.inf,
            "only",
        ),
        "the first pass from cache too": (
            lambda rho, s: max(1, math.ceil(s * rho / (rho - s))) if s < rho else math.inf,
            "enough",
        ),
        "rounded down": (
            lambda rho, s: int(s * (rho - 1) / (rho - s)) if s < rho else math.inf,
            "only",
        ),
        "not rounded": (
            lambda rho, s: s * (rho - 1) / (rho - s) if s < rho else math.inf,
            "round up",
        ),
        "no word about the limit": (
            lambda rho, s: max(1, math.ceil(s * (rho - 1) / (rho - s) - 1e-9)),
            "divides by zero",
        ),
        "a large number for the limit": (
            lambda rho, s: passes_needed(rho, s) if s < rho else 10**9,
            "math.inf",
        ),
        "no pass at all": (lambda rho, s: 0, "at least one"),
    },
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, capsys):
    getattr(ch03, name)(RIGHT[name])
    assert capsys.readouterr().out.startswith("✓")


@pytest.mark.parametrize(
    ("name", "mistake"), [(name, mistake) for name, table in MUTANTS.items() for mistake in table]
)
def test_mistakes_are_turned_away_and_explained(name, mistake):
    answer, words = MUTANTS[name][mistake]
    with pytest.raises(ExerciseFailed, match=words):
        getattr(ch03, name)(answer)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("answer", [..., None, lambda *a: None, lambda *a: ...])
def test_a_missing_answer_is_told_so(name, answer, capsys):
    getattr(ch03, name)(answer)
    assert capsys.readouterr().out.startswith("Not answered yet")


def test_every_grader_has_an_answer_and_mistakes():
    assert set(ch03.__all__) == set(RIGHT) == set(MUTANTS)


def test_the_definition_of_ways_counts_a_shared_word_once():
    assert ch03.ways_by_brute_force([0, 32, 64, 64, 1]) == 3
