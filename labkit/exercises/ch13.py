"""Exercises of chapter 13 (when is sparse faster than dense)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from labkit.exercises import ExerciseFailed, call, exercise, expect, expect_number

__all__ = ["best_blocks", "bytes_per_token", "expected_union", "same_bytes_group", "union"]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def _why(got: float, mistakes: dict[float, str], otherwise: str) -> str:
    return next((text for value, text in mistakes.items() if _close(got, value)), otherwise)


def _plain(value: Any) -> Any:
    """Tuples, arrays and tensors as nested lists of numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


@exercise("Bytes per token")
def bytes_per_token(answer: Any) -> str:
    """Grade ``bytes_per_token(count, block_size, head_dim, head_dim_v, kv_heads, itemsize)``."""
    for count, size, d, dv, heads, e in ((16, 64, 128, 96, 4, 2), (8, 32, 192, 64, 2, 4)):
        got = expect_number(call(answer, count, size, d, dv, heads, e), "The number of bytes")
        right = count * size * (d + dv) * heads * e
        mistakes = {
            count * size * d * heads * e: "V is read as well as K.",
            count * size * 2 * d * heads * e: "V may be narrower than K.",
            count * size * (d + dv) * heads: "That is elements. How many bytes has one?",
            count * size * (d + dv) * e: "Every KV head reads its own blocks.",
            count * (d + dv) * heads * e: "A block holds block_size keys.",
            count * size * (d + dv) * heads * e * 16: "The heads of a group share what is read: "
            "count KV heads.",
        }
        expect(
            _close(got, right),
            f"for {count} blocks of {size}, D = {d}, V = {dv}, {heads} KV heads and {e} bytes per "
            f"element you return {got:g}. "
            + _why(got, mistakes, "How many keys does a query read, and how wide is each?"),
        )
    return "half a megabyte per token and KV head in this chapter, whatever G is."


@exercise("How many different blocks?")
def expected_union(answer: Any) -> str:
    """Grade ``expected_union(candidates, chosen, queries)``: independent choices, in the mean."""
    for n, s, m in ((253, 13, 16), (253, 13, 1), (20, 20, 3), (100, 1, 2), (1000, 13, 4)):
        got = expect_number(call(answer, n, s, m), "The number of blocks")
        right = n * (1 - (1 - s / n) ** m)
        mistakes = {
            n * (1 - s / n) ** m: "That is how many blocks nobody chose.",
            float(s * m): "That counts a block once for each query that chose it.",
            float(min(n, s * m)): "A block that two queries chose counts once.",
            n * (s / n) ** m: "That is how many blocks everybody chose.",
            1 - (1 - s / n) ** m: "That is the probability for one block. How many are there?",
            n * (1 - (1 - 1 / n) ** (s * m)): "A query never takes the same block twice: it "
            "misses a block with probability 1 − s/n.",
        }
        expect(
            _close(got, right),
            f"for {n} candidates, {s} chosen by each of {m} queries you return {got:g}, and the "
            f"mean is {right:.4g}. "
            + _why(got, mistakes, "With which probability does one block stay unchosen?"),
        )
    return "sixteen random choices of 13 blocks in 253 touch more than half of them."


@exercise("Union and members")
def union(answer: Any) -> str:
    """Grade ``union(choices)``: ascending blocks, and bit i set where query i chose the block."""
    draw = random.Random(13)
    cases: list[list[list[int]]] = [
        [[2, 0, -1], [0, -1, -1], [7, 2, 0]],
        [[0, 3], [3, 5]],
        [[-1, -1], [-1, 4]],
        [[1, 1, 6], [6, -1, 6]],
        [[-1], [-1]],
        [sorted(draw.sample(range(40), 5)) for _ in range(16)],
    ]
    for choices in cases:
        got = call(answer, [list(row) for row in choices])
        shown = f"for the choices {choices if len(choices) < 5 else 'of 16 queries'}"
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise ExerciseFailed(f"{shown}: return two lists, the blocks and their members.")
        blocks, members = (list(_plain(part)) for part in got)
        right = sorted({c for row in choices for c in row if c >= 0})
        bits = [sum(1 << i for i, row in enumerate(choices) if c in row) for c in right]
        expect(-1 not in blocks, f"{shown} your union holds −1, which is an unused slot.")
        expect(
            blocks == right,
            f"{shown} you return the blocks {blocks}, not {right}: each block once, ascending.",
        )
        hint = "bit i belongs to query i"
        counted = [sum(1 << i for i, row in enumerate(choices) for x in row if x == c)
                   for c in right]  # fmt: skip
        turned = [
            sum(1 << (len(choices) - 1 - i) for i, row in enumerate(choices) if c in row)
            for c in right
        ]
        if members == counted and counted != bits:
            hint = "a block that a query names twice is chosen once: set the bit, do not add it"
        elif members == turned and turned != bits:
            hint = "query 0 has the lowest bit"
        elif members == [bin(b).count("1") for b in bits] and members != bits:
            hint = "that is how many chose it, and the kernel needs to know who"
        expect(members == bits, f"{shown} you return the members {members}, not {bits}: {hint}.")
    return "a block is loaded once, and a row is masked by one bit."


@exercise("The group at which the roads meet")
def same_bytes_group(answer: Any) -> str:
    """Grade ``same_bytes_group(block_size, head_dim, head_dim_v)``: G of equal bytes per choice."""
    for size, d, dv in ((64, 128, 128), (32, 64, 64), (128, 192, 128)):
        got = expect_number(call(answer, size, d, dv), "G")
        right = size * (d + dv) / (d + 2 * dv)
        mistakes = {
            float(size): "A choice moves q, and the partial output twice: it is written and read.",
            size * (d + dv) / (d + dv + 0.0): "The partial output is written and read again.",
            (d + 2 * dv) / (size * (d + dv)): "That is its reciprocal.",
            size * (d + dv) / (2 * d + 2 * dv): "q is read once for each choice.",
            size * (d + dv) / (2 * (d + dv) + dv): "Count again: q once, the partial output twice.",
        }
        expect(
            _close(got, right),
            f"for blocks of {size}, D = {d} and V = {dv} you return {got:g}. "
            + _why(got, mistakes, "Set G (D + 2V) equal to what a block holds."),
        )
    return "below it the loop turned around moves fewer bytes, and above it more."


def _reference(scores: Sequence[float], count: int) -> list[int]:
    best = sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:count]
    return sorted(best)


@exercise("The best blocks of a stream")
def best_blocks(answer: Any) -> str:
    """Grade ``best_blocks(chunks, count)``: an iterator of score lists, in order of the blocks.

    The answer must pull the chunks one by one: it is given an iterator that watches.
    """
    draw = random.Random(31)
    cases = [
        ([0.1, 0.9, 0.4, 0.8, 0.3], 2, 3),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 2, 2),
        ([0.2, 0.7, 0.7, 0.7, 0.1, 0.7], 3, 4),
        ([0.3, 0.1], 5, 1),
        ([0.0, 0.0, 0.0, 0.0], 2, 3),
        ([draw.random() for _ in range(57)], 6, 8),
        ([round(draw.random(), 1) for _ in range(57)], 6, 8),
        ([-draw.random() for _ in range(20)], 4, 8),
    ]
    for scores, count, width in cases:
        chunks = [scores[i : i + width] for i in range(0, len(scores), width)]
        got = _plain(call(answer, iter([list(chunk) for chunk in chunks]), count))
        right = _reference(scores, count)
        where = f"for the scores {scores if len(scores) < 9 else '…'} in chunks of {width}, {count}"
        expect(isinstance(got, list), f"{where} blocks: return a list of block numbers.")
        if got != right and sorted(got) == right:
            raise ExerciseFailed(f"{where} blocks you return {got}: in ascending order, please.")
        late = sorted(sorted(range(len(scores)), key=lambda c: (-scores[c], -c))[:count])
        hint = "Keep the best so far, and let each chunk compete with them."
        if got == late and late != right:
            hint = "Of equal scores the lower block number wins."
        elif got == _reference(chunks[-1], count) and len(chunks) > 1:
            hint = "Those are numbers within the last chunk: blocks count through all of them."
        elif any(not 0 <= c < len(scores) for c in got if isinstance(c, int)):
            hint = "There is no such block: what fills the places that are not taken yet?"
        expect(got == right, f"{where} blocks you return {got}, not {right}. {hint}")
    return "T × blocks scores were compared, and none of them was stored."
