"""Exercises of chapter 03 (the memory hierarchy)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["bank_ways", "bytes_in_flight", "copy_rate", "largest_copy", "reuse_speedup"]


@exercise("Rate of a copy")
def copy_rate(answer: Any) -> str:
    """Grade ``copy_rate(elements, itemsize, milliseconds)`` in TB/s."""
    for elements, itemsize, ms in ((2**30, 4, 2.0), (12_345_678, 2, 0.5)):
        got = expect_number(call(answer, elements, itemsize, ms), "The result")
        right = 2 * elements * itemsize / (ms / 1e3) / 1e12
        where = f"for {elements:,} elements of {itemsize} bytes in {ms} ms"
        mistakes = {
            right / 2: "Each byte is read and written: the copy moves it twice.",
            right / 1e3: "The time is given in milliseconds.",
            right / 2 / 1e3: "The time is in milliseconds, and each byte moves twice.",
            right * 1e12: "That is in bytes per second; the question asks for TB/s.",
            right / itemsize: "That counts elements. How many bytes does each take?",
            right * 1e12 / 2**40: "Rates are decimal: 1 TB/s is 10¹² bytes a second.",
        }
        near = [text for value, text in mistakes.items() if math.isclose(got, value, rel_tol=1e-9)]
        hint = near[0] if near else "Bytes moved, divided by seconds."
        expect(math.isclose(got, right, rel_tol=1e-9), f"{where} you return {got:.6g} TB/s. {hint}")
    return "bytes read plus bytes written, over seconds, in decimal units."


@exercise("The largest copy in L2")
def largest_copy(answer: Any) -> str:
    """Grade ``largest_copy(l2_bytes, itemsize)``: elements of x so that x and y fit in L2."""
    for l2, itemsize in ((40 * 2**20, 4), (60 * 2**20, 2), (1001, 4), (7, 4)):
        got = expect_number(call(answer, l2, itemsize), "The result")
        right = l2 // (2 * itemsize)
        where = f"for {l2:,} bytes of L2 and {itemsize} bytes per element"
        expect(got == int(got), f"{where} you return {got}. Elements are whole: round down.")
        mistakes = {
            l2 // itemsize: "That leaves no room for y.",
            2 * right: "That leaves no room for y.",
            l2 // 2: "That is in bytes; the question asks for elements.",
            right + 1: "One element too many: round down.",
        }
        hint = mistakes.get(int(got), "x and y together must not be larger than L2.")
        expect(got == right, f"{where} you return {got:,.0f} elements. {hint}")
    return "L2 divided by two buffers, rounded down."


def ways_by_brute_force(words: list[int]) -> int:
    """Most different words that one bank is asked for: the definition, bank by bank."""
    return max(len({word for word in words if word % 32 == bank}) for bank in range(32))


@exercise("Bank conflicts")
def bank_ways(answer: Any) -> str:
    """Grade ``bank_ways(words)``: passes that a warp's load of 32 words takes."""
    import random

    cases = {
        "32 words in a row": list(range(32)),
        "every second word": list(range(0, 64, 2)),
        "a column of a 32-word-wide tile": list(range(0, 1024, 32)),
        "a column of a 33-word-wide tile": list(range(0, 33 * 32, 33)),
        "all lanes the same word": [5] * 32,
        "two words of one bank, half the lanes each": [3] * 16 + [35] * 16,
        "the first 16 lanes on one word, the others in a row": [0] * 16 + list(range(16, 32)),
    }
    draw = random.Random(3)
    cases["words at random"] = [draw.randrange(1024) for _ in range(32)]
    cases["words at random, many shared"] = [draw.randrange(96) for _ in range(32)]
    for name, words in cases.items():
        got = expect_number(call(answer, list(words)), "The result")
        right = ways_by_brute_force(words)
        lanes = max(sum(word % 32 == bank for word in words) for bank in range(32))
        hint = "Which bank holds a word? How many different words does the busiest bank serve?"
        if right < lanes and got == lanes:
            hint = "Lanes that ask for the same word are served together."
        elif got == len({word % 32 for word in words}) > 1:
            hint = "That is the number of banks in use. The busiest bank sets the time."
        elif got < 1:
            hint = "A load takes at least one pass."
        expect(got == right, f"for {name} you return {got:g}. {hint}")
    return "the busiest bank's different words; a word that many lanes share is read once."


@exercise("Loads under way")
def bytes_in_flight(answer: Any) -> str:
    """Grade ``loads_per_thread(bandwidth, latency, threads, load_bytes)``."""
    cases = (
        (4.8e12, 350e-9, 132 * 2048, 16),
        (4.8e12, 350e-9, 132 * 2048, 4),
        (4.8e12, 350e-9, 132 * 256, 16),
        (2e12, 400e-9, 108 * 2048, 4),
        (1.024e12, 1e-6, 1000, 1024),
    )
    for bandwidth, latency, threads, size in cases:
        got = expect_number(call(answer, bandwidth, latency, threads, size), "The result")
        exact = bandwidth * latency / (threads * size)
        right = math.ceil(exact - 1e-9)
        where = (
            f"for {bandwidth / 1e12:g} TB/s, {latency * 1e9:g} ns, {threads:,} threads and loads "
            f"of {size} bytes"
        )
        expect(got == int(got), f"{where} you return {got:g}. Loads are whole: round up.")
        mistakes = {
            math.floor(exact): "So many do not quite fill the pipe: round up.",
            math.ceil(bandwidth * latency / size): "That is for all threads together.",
            math.ceil(bandwidth * latency / threads): "That is bytes per thread, not loads.",
            math.ceil(bandwidth * latency): "That is the bytes of the whole chip.",
        }
        hint = mistakes.get(int(got), "Bytes in flight are bandwidth times latency.")
        expect(got == right, f"{where} you return {got:,.0f}. {hint}")
    return "Little's law: bandwidth × latency, shared among threads and loads."


@exercise("What reuse is worth")
def reuse_speedup(answer: Any) -> str:
    """Grade ``passes_needed(ratio, speedup)``: the least r with r / (1 + (r − 1)/ρ) ≥ s."""
    cases = ((10.0, 5.0), (12.0, 6.0), (12.0, 11.0), (7.0, 1.0), (7.0, 3.0), (4.0, 3.9))
    for ratio, wanted in cases:
        got = expect_number(call(answer, ratio, wanted), "The result")
        where = f"for a ratio of {ratio:g} and {wanted:g} times faster"
        expect(got == int(got), f"{where} you return {got:g}. Passes are whole: round up.")

        def gain(r: float, rho: float = ratio) -> float:
            return r / (1 + (r - 1) / rho)

        r = int(got)
        expect(r >= 1, f"{where} you return {r}. There is at least one pass.")
        expect(
            gain(r) >= wanted * (1 - 1e-12),
            f"{where} you return {r}, but {r} passes make it {gain(r):.3f} times faster only. "
            "The first pass comes from memory either way.",
        )
        expect(
            r == 1 or gain(r - 1) < wanted * (1 - 1e-12),
            f"{where} you return {r}, but {r - 1} passes are enough: they give {gain(r - 1):.3f}.",
        )
    try:
        beyond = answer(7.0, 7.0)
    except (ValueError, OverflowError):
        beyond = math.inf
    except ZeroDivisionError:
        expect(
            False, "for a ratio of 7 and 7 times faster your function divides by zero. Return ∞."
        )
    expect(
        beyond == math.inf,
        f"for a ratio of 7 and 7 times faster you return {beyond}. No number of passes reaches the "
        "ratio itself: return math.inf.",
    )
    return "r = s (ρ − 1) / (ρ − s), rounded up: half the ratio takes ρ − 1 passes."
