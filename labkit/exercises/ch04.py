"""Exercises of chapter 04 (is it the arithmetic or the bytes?)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["bounds", "fused_turns", "intensity", "leaner_attention", "seq_len_for_share"]


@exercise("Intensity of a product")
def intensity(answer: Any) -> str:
    """Grade ``intensity(seq_len_q, seq_len_k, head_dim, itemsize)`` of S = QKᵀ, FLOP/byte."""
    from labkit.roofline import steps

    scores = steps()[0]
    cases = ((512, 512, 64, 2), (512, 512, 64, 4), (300, 700, 80, 2), (1, 4096, 128, 1))
    for nq, nk, d, e in cases:
        got = expect_number(call(answer, nq, nk, d, e), "The intensity")
        sizes = {"B": 1, "H": 1, "Hkv": 1, "Nq": nq, "Nk": nk, "d": d, "dv": d, "e": e}
        right = float(scores.ratio(**sizes))
        flops, read, written = 2 * nq * nk * d, (nq + nk) * d, nq * nk
        mistakes = {
            2 * d / e: "That is the limit for long sequences, as if Q and K were free to read.",
            right / 2: "A multiply-add counts as two operations.",
            right * e: "That is FLOP per element. How many bytes does an element take?",
            flops / (read * e): "S is written as well.",
            flops / ((2 * nq * d + written) * e): "K has one row per key, not per query.",
            flops / ((read + 2 * written) * e): "S is written once and not read.",
            1 / right: "That is bytes per FLOP: the quotient is the other way round.",
        }
        near = (why for value, why in mistakes.items() if math.isclose(got, value, rel_tol=1e-9))
        hint = next(near, "Count the operations, then the elements of the three tensors.")
        expect(
            math.isclose(got, right, rel_tol=1e-9),
            f"for {nq} queries, {nk} keys, head_dim {d} and {e} bytes per element you return "
            f"{got:.6g} FLOP/byte. {hint}",
        )
    return "three tensors, each moved once, for any two lengths."


@exercise("Long enough")
def seq_len_for_share(answer: Any) -> str:
    """Grade ``seq_len_for_share(head_dim, num, den)``; the key is found by trying lengths."""
    from labkit.roofline import steps

    square = steps()[0].square
    limit = square.limit("N")
    cases = ((64, 4, 5), (128, 9, 10), (80, 1, 2), (5, 3, 7), (3, 1, 3), (7, 99, 100), (1, 1, 9))
    for d, num, den in cases:
        got = expect_number(call(answer, d, num, den), "The length")
        where = f"for head_dim={d} and a share of {num}/{den}"
        expect(got == int(got), f"{where} you return {got}. A seq_len is a whole number: round up.")
        n, share = int(got), Fraction(num, den)

        def reached(length: int, d: int = d) -> Fraction:
            return square(N=length, d=d, e=2) / limit(d=d, e=2)

        expect(n >= 1, f"{where} you return {n}. A sequence has at least one token.")
        expect(
            reached(n) >= share,
            f"{where} you return {n}, where {float(reached(n)):.4f} of the limit is reached, "
            f"less than {float(share):.4f}.",
        )
        expect(
            n == 1 or reached(n - 1) < share,
            f"{where} you return {n}, but {n - 1} is long enough. "
            "Round up once, and only what is not whole.",
        )
    return "N = 2d · s/(1 − s), rounded up: 8d for four fifths, 18d for nine tenths."


@exercise("Bounds")
def bounds(answer: Any) -> str:
    """Grade ``bounds(flops, bytes_moved, peak_flops, bandwidth)`` -> (lower, upper, bound)."""
    from labkit.roofline import Roofline

    cases = (
        (1e12, 1e9, 1e14, 2e12),  # right of the ridge
        (1e9, 1e9, 1e14, 2e12),  # left of it
        (64.0, 2.0, 32.0, 1.0),  # on it
        (3.0, 5.0, 2.0, 7.0),
    )
    for flops, moved, peak, bandwidth in cases:
        got = call(answer, flops, moved, peak, bandwidth)
        expect(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "Return three things: the lower bound, the upper bound, and 'memory' or 'compute'.",
        )
        lower, upper = (expect_number(x, "A bound") for x in got[:2])
        right = Roofline(peak, bandwidth).time(flops, moved)
        bound = Roofline(peak, bandwidth).bound(flops / moved)
        where = f"for {flops:g} FLOP, {moved:g} bytes, {peak:g} FLOP/s and {bandwidth:g} B/s"
        swapped = math.isclose(lower, right.upper) and not math.isclose(lower, right.lower)
        expect(not swapped, f"{where} your lower bound is the sum: that assumes no overlap.")
        expect(
            math.isclose(lower, right.lower),
            f"{where} your lower bound is {lower:g} s. Overlapped, a kernel takes the longer of "
            "its two times.",
        )
        expect(
            math.isclose(upper, right.upper),
            f"{where} your upper bound is {upper:g} s. Without overlap the two times add up.",
        )
        expect(
            got[2] == bound,
            f"{where} you say {got[2]!r}. The intensity is {flops / moved:g} FLOP/byte and the "
            f"ridge {peak / bandwidth:g}; on the ridge it counts as 'compute'.",
        )
    return "the longer of two times, their sum, and the side of the ridge."


@exercise("Where fused attention turns")
def fused_turns(answer: Any) -> str:
    """Grade ``fused_turns_compute_bound(ridge, head_dim, itemsize)``."""
    from labkit.roofline import steps

    square = steps("fused")[0].square
    for ridge, d, e in (
        (206, 64, 2),
        (295, 128, 2),
        (14, 64, 4),
        (71, 16, 1),
        (10, 10, 2),
        (1, 1, 1),
    ):
        got = expect_number(call(answer, ridge, d, e), "The length")
        where = f"for a ridge of {ridge}, head_dim={d} and {e} bytes per element"
        expect(got == int(got), f"{where} you return {got}. A seq_len is a whole number: round up.")
        n = int(got)
        expect(n >= 1, f"{where} you return {n}. A sequence has at least one token.")
        at = square(N=n, d=d, e=e)
        expect(
            at >= ridge,
            f"{where} you return {n}, where the intensity is {float(at):.3f}: still left of the "
            "ridge. Is the LSE, 4 bytes a row, among the bytes?",
        )
        expect(
            n == 1 or square(N=n - 1, d=d, e=e) < ridge,
            f"{where} you return {n}, but at {n - 1} it is compute-bound already. Two products "
            "count 4 N² d operations, and Q, K, V and O move once each.",
        )
    return "N ≥ ridge · (e + 1/d): about twice the ridge in a 16-bit type."


@exercise("Save a third")
def leaner_attention(answer: Any) -> str:
    """Grade attention in plain operators that moves the bytes of no scale kernel, in float64."""
    import torch

    from labkit.experiments.dram import traced_traffic
    from labkit.naive import naive_attention
    from labkit.roofline import steps, total

    generator = torch.Generator().manual_seed(11)
    for batch, heads, n, d in ((1, 2, 33, 16), (2, 1, 64, 10)):
        shape = (batch, heads, n, d)
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        keep = [x.clone() for x in (q, k, v)]
        got = call(answer, q, k, v)
        actual = tuple(getattr(got, "shape", ()))
        expect(actual == shape, f"for inputs of shape {shape}, O has shape {actual}.")
        expect(
            all(torch.equal(a, b) for a, b in zip(keep, (q, k, v), strict=True)),
            "Your function changes its inputs. Work on new tensors.",
        )
        worst = float((got - naive_attention(q, k, v)).abs().max())
        expect(
            worst < 1e-12,
            f"for inputs of shape {shape}, O is off by up to {worst:.2g}. The scores must be "
            f"divided by √d = {math.sqrt(d):.3f}, once.",
        )
    size = {"heads": 2, "seq_len": 512, "head_dim": 32, "dtype": "float32"}
    q = torch.empty(1, 2, 512, 32, device="meta")
    events = traced_traffic(answer, q, q, q)
    names = [event["op"] for event in events]
    fused = next((name for name in names if "attention" in name), None)
    expect(
        fused is None,
        f"{fused} is fused attention. Here the three steps stay apart: use plain operators.",
    )
    moved = sum(event["read"] + event["written"] for event in events)
    lean = total(steps(scale_kernel=False), "lean", "lean").at(**size).bytes
    # scaling Q, or Q and K by √c each, reads and writes an N × d tensor or two
    allowed = lean + 4 * 2 * 512 * 32 * 4
    before = total(steps(), "naive", "naive").at(**size).bytes
    expect(
        moved <= allowed,
        f"Your operators ({', '.join(names)}) read and write {moved / before:.2f} times the bytes "
        f"of naive attention; {allowed / before:.2f} is possible. An operator on S, in place or "
        "not, reads and writes all of it.",
    )
    return f"{1 - moved / before:.0%} fewer bytes at N = 16 d, and the same O."
