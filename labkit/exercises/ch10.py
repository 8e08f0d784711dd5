"""Exercises of chapter 10 (fp32, fp16, which kernel, and who decides)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import ExerciseFailed, call, exercise, expect, expect_number

__all__ = ["choose", "ends_at", "next_scale", "spacing", "speedup"]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


@exercise("The next number")
def spacing(answer: Any) -> str:
    """Grade ``spacing(x, bits)``: from \\|x\\| to the next larger number with ``bits`` bits."""
    for x, bits in ((1.0, 24), (1.0, 11), (100.0, 8), (-100.0, 11), (2048.0, 11), (65000.0, 11),
                    (0.03, 8), (1e-3, 24), (2047.0, 11)):  # fmt: skip
        got = expect_number(call(answer, x, bits), "The distance")
        power = math.floor(math.log2(abs(x)))
        right = 2.0 ** (power - bits + 1)
        mistakes = {
            right / 2: "The first of the bits is the leading 1: one fewer is left behind it.",
            2 * right: "Between 2^e and 2^(e+1) there are 2^(bits − 1) steps.",
            abs(x) * 2.0 ** (1 - bits): "The distance is the same from 2^e up to 2^(e+1): only e "
            "of x counts.",
            2.0 ** (1 - bits): "That is the distance at 1; farther out it is larger.",
            -right: "A distance is positive.",
        }
        near = (why for value, why in mistakes.items() if _close(got, value))
        hint = "" if _close(got, right) else next(near, "Write x as m · 2^e with 1 ≤ m < 2.")
        expect(
            _close(got, right),
            f"for x = {x:g} and {bits} significant bits you return {got:g}. {hint}",
        )
    return "a score of 100 has neighbours half a unit away in bfloat16: e^0.25 is 28 % more."


@exercise("What a scaler does")
def next_scale(answer: Any) -> str:
    """Grade ``next_scale(scale, streak, finite)`` → (scale, streak): GradScaler's own rule."""
    for scale, streak, finite, right in (
        (65536.0, 0, True, (65536.0, 1)),
        (1024.0, 0, False, (512.0, 0)),
        (65536.0, 1998, True, (65536.0, 1999)),
        (65536.0, 1999, True, (131072.0, 0)),
        (65536.0, 700, False, (32768.0, 0)),
        (1024.0, 1999, False, (512.0, 0)),
        (4.0, 5, True, (4.0, 6)),
    ):
        got = call(answer, scale, streak, finite)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise ExerciseFailed(f"Return the pair (scale, streak), not {got!r}.")
        new, after = (expect_number(x, what) for x, what in zip(got, ("The scale", "The streak"),
                                                                strict=True))  # fmt: skip
        what = "finite" if finite else "not all finite"
        where = (
            f"scale {scale:g}, streak {streak}, gradients {what}: you return ({new:g}, {after:g})"
        )
        hint = ""
        if not finite and new >= scale:
            hint = "What overflowed must be scaled less the next time: half as much."
        elif not finite and after != 0:
            hint = "A step that was skipped ends the streak."
        elif finite and streak == 1999 and new == scale:
            hint = "This is the 2000th good step in a row."
        elif finite and streak == 1998 and new != scale:
            hint = "That is 1999 good steps, one too few."
        elif finite and new == 2 * scale and after != 0:
            hint = "After it grew, the count starts again."
        elif finite and new != scale:
            hint = "It grows by a factor of 2, and only after 2000 good steps."
        elif finite and after != right[1]:
            hint = "Every good step counts one more."
        elif (new, after) != right:
            hint = "It falls by a factor of 2."
        expect((new, after) == right, f"{where}, and the answer is {right}. {hint}".rstrip())
    return "now and then it overflows on purpose: that is how it learns how far it may go."


@exercise("Where launching stops mattering")
def ends_at(answer: Any) -> str:
    """Grade ``ends_at(kernels, launch_s, linear_s, square_s)``: k·t = aN + bN² solved for N."""
    for kernels, launch, linear, square in (
        (40, 5e-6, 1e-8, 2e-11), (12, 4e-6, 3e-8, 1e-12), (100, 8e-6, 0.0, 1e-10),
        (7, 1e-5, 2e-7, 0.0),
    ):  # fmt: skip
        got = expect_number(call(answer, kernels, launch, linear, square), "The length")
        host = kernels * launch
        right = host / linear if not square else (
            (-linear + math.sqrt(linear**2 + 4 * square * host)) / (2 * square)
        )  # fmt: skip
        mistakes = (
            {math.sqrt(host / square): "The linear part takes time as well."} if square else {}
        )
        if linear:
            mistakes[host / linear] = "The square takes time as well."
        if square:
            one = launch
            root = (-linear + math.sqrt(linear**2 + 4 * square * one)) / (2 * square)
            mistakes[root] = (
                "Each kernel is launched: all of them together take kernels · launch_s."
            )
            mistakes[(-linear - math.sqrt(linear**2 + 4 * square * host)) / (2 * square)] = (
                "A length is positive: take the other root."
            )
        near = (why for value, why in mistakes.items() if math.isclose(got, value, rel_tol=2e-3))
        good = math.isclose(got, right, rel_tol=1e-3, abs_tol=1.0)
        hint = "" if good else next(near, "Set the time of the launches equal to that of the work.")
        expect(
            good,
            f"for {kernels} kernels, {launch:g} s to launch one, {linear:g} s per token and "
            f"{square:g} s per pair you return {got:.6g}. {hint}",
        )
    return "below that length a faster kernel changes nothing; fewer kernels do."


@exercise("A speed-up of parts")
def speedup(answer: Any) -> str:
    """Grade ``speedup(parts)``: parts are (seconds, factor); the whole's factor by Amdahl."""
    for parts in (
        [(6.0, 3.0), (3.0, 1.5), (1.0, 1.0)], [(8.0, 4.0), (2.0, 1.0)], [(5.0, 2.0)],
        [(1.0, 100.0), (1.0, 1.0)],
    ):  # fmt: skip
        got = expect_number(call(answer, list(parts)), "The factor")
        total = sum(t for t, _ in parts)
        right = total / sum(t / f for t, f in parts)
        mistakes = {
            math.prod(f for _, f in parts): "Factors multiply when they act on the same time, one "
            "after the other. These act on different parts.",
            sum(f for _, f in parts) / len(parts): "A mean forgets how long each part takes.",
            sum(t * f for t, f in parts) / total: "Add up times, not factors: a part of t seconds "
            "takes t / factor.",
            1 / right: "That is the share of the time that is left.",
            max(f for _, f in parts): "The other parts still take their time.",
        }
        near = (why for value, why in mistakes.items() if _close(got, value))
        hint = "" if _close(got, right) else next(near, "How long did it take, how long now?")
        expect(_close(got, right), f"for {parts} you return {got:.6g}. {hint}")
    return "what is not faster sets the limit, and the limit moves with N."


def _rows() -> list[dict[str, Any]]:
    """Made-up measurements with a crossing and one fast way that is not exact."""
    table = {
        "original": (1e-7, {128: 1.0, 1024: 4.0, 8192: 200.0}),
        "flash": (2e-7, {128: 1.3, 1024: 2.0, 8192: 90.0}),
        "flash, half": (6e-4, {128: 1.2, 1024: 1.1, 8192: 12.0}),
        "rough": (5e-2, {128: 0.5, 1024: 0.6, 8192: 6.0}),
    }
    return [
        {"name": name, "seq_len": n, "seconds": ms / 1e3, "error": error}
        for name, (error, times) in table.items()
        for n, ms in times.items()
    ]


@exercise("A policy of one's own")
def choose(answer: Any) -> str:
    """Grade ``choose(rows, seq_len, largest_error)``: the fastest that is exact enough."""
    rows = _rows()
    for n, error, right in (
        (128, 1e-2, "original"), (1024, 1e-2, "flash, half"), (8192, 1e-6, "flash"),
        (128, 1.0, "rough"), (1100, 1e-6, "flash"), (300, 1e-2, "original"),
        (500, 1e-2, "flash, half"), (100_000, 1e-2, "flash, half"), (64, 1e-6, "original"),
        (8192, 1e-9, "original"),
    ):  # fmt: skip
        got = call(answer, [dict(r) for r in rows], n, error)
        expect(isinstance(got, str), f"Return the name of the row, not {got!r}.")
        nearest = min({r["seq_len"] for r in rows}, key=lambda m: abs(math.log(m / n)))
        here = {r["name"]: r for r in rows if r["seq_len"] == nearest}
        hint = ""
        if got not in here:
            hint = f"The names are {', '.join(here)}."
        elif error == 1e-9:
            hint = "None is so exact: take the one with the smallest error."
        elif here[got]["error"] > error:
            hint = f"Its error is {here[got]['error']:g}."
        elif n == 300 and got == "flash, half":
            hint = "300 is nearer to 128 than to 1024, as factors go: costs grow by factors, too."
        elif here[got]["seconds"] > here[right]["seconds"]:
            hint = f"At {nearest:,} tokens {right!r} is exact enough and faster."
        expect(
            got == right,
            f"for {n:,} tokens and an error of at most {error:g} you choose {got!r}, and the "
            f"answer is {right!r}. {hint}",
        )
    return "no threshold is written down: another card has other rows, and another answer."
