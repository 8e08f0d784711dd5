"""The graders of chapter 10 take the solutions and turn each known mistake away."""

from __future__ import annotations

import math
import warnings

import torch
from exercise_checks import (
    mistakes_are_turned_away,
    skeletons_are_not_errors,
    solutions_are_taken,
)

from labkit.exercises import ch10


def good_spacing(x, bits):
    return 2.0 ** (math.floor(math.log2(abs(x))) - bits + 1)


def good_scale(scale, streak, finite, *, down=0.5, up=2.0, reset=True, after=2000, clear=True):
    if not finite:
        return scale * down, 0 if clear else streak
    streak += 1
    if streak >= after:
        return scale * up, 0 if reset else streak
    return scale, streak


def good_end(kernels, launch_s, linear_s, square_s):
    host = kernels * launch_s
    if square_s == 0:
        return host / linear_s
    return (-linear_s + math.sqrt(linear_s**2 + 4 * square_s * host)) / (2 * square_s)


def good_speedup(parts):
    return sum(t for t, _ in parts) / sum(t / f for t, f in parts)


def good_choice(rows, seq_len, largest_error, *, near=lambda m, n: abs(math.log(m / n)), exact=True,
                fallback=True, fastest=True):  # fmt: skip
    n = min({r["seq_len"] for r in rows}, key=lambda m: near(m, seq_len))
    rows = [r for r in rows if r["seq_len"] == n]
    fine = [r for r in rows if r["error"] <= largest_error or not exact]
    if not fine:
        return min(rows, key=lambda r: r["error" if fallback else "seconds"])["name"]
    return min(fine, key=lambda r: r["seconds"] if fastest else r["error"])["name"]


GOOD = [
    (ch10.spacing, good_spacing),
    (ch10.spacing, lambda x, bits: math.ldexp(1.0, math.frexp(abs(x))[1] - bits)),
    (ch10.next_scale, good_scale),
    (ch10.next_scale, lambda *a: list(good_scale(*a))),
    (ch10.ends_at, good_end),
    (ch10.ends_at, lambda *a: int(good_end(*a))),
    (ch10.speedup, good_speedup),
    (ch10.choose, good_choice),
]


test_solutions_are_taken = solutions_are_taken(GOOD)


def mean(parts):
    return sum(f for _, f in parts) / len(parts)


BAD = [
    (ch10.spacing, lambda x, b: good_spacing(x, b) / 2, "leading 1"),
    (ch10.spacing, lambda x, b: good_spacing(x, b) * 2, "steps"),
    (ch10.spacing, lambda x, b: abs(x) * 2.0 ** (1 - b), "only e of x"),
    (ch10.spacing, lambda x, b: 2.0 ** (1 - b), "farther out"),
    (ch10.spacing, lambda x, b: -good_spacing(x, b), "positive"),
    (ch10.spacing, lambda x, b: 1e-7, "m · 2\\^e"),
    (ch10.spacing, lambda x, b: "0.5", "number"),
    (ch10.spacing, lambda x, b: 2.0 ** (math.floor(math.log2(x)) - b + 1), "raised ValueError"),
    (ch10.next_scale, lambda s, n, f: (s, n + 1), "half as much"),
    (ch10.next_scale, lambda *a: good_scale(*a, down=0.1), "falls by a factor"),
    (ch10.next_scale, lambda *a: good_scale(*a, up=4.0), "factor of 2"),
    (ch10.next_scale, lambda *a: good_scale(*a, reset=False), "starts again"),
    (ch10.next_scale, lambda *a: good_scale(*a, after=2001), "2000th"),
    (ch10.next_scale, lambda *a: good_scale(*a, after=1999), "one too few"),
    (ch10.next_scale, lambda *a: good_scale(*a, clear=False), "ends the streak"),
    (ch10.next_scale, lambda s, n, f: (s if f else s / 2, n if f else 0), "one more"),
    (ch10.next_scale, lambda s, n, f: s, "pair"),
    (ch10.ends_at, lambda k, t, a, b: math.sqrt(k * t / b) if b else k * t / a, "linear part"),
    (ch10.ends_at, lambda k, t, a, b: k * t / a, "square takes"),
    (ch10.ends_at, lambda k, t, a, b: good_end(1, t, a, b), "all of them"),
    (ch10.ends_at, lambda k, t, a, b: -(a + math.sqrt(a * a + 4 * b * k * t)) / (2 * b), "other"),
    (ch10.ends_at, lambda *a: 512, "equal to that of the work"),
    (ch10.speedup, lambda parts: math.prod(f for _, f in parts), "one after the other"),
    (ch10.speedup, mean, "forgets"),
    (ch10.speedup, lambda p: sum(t * f for t, f in p) / sum(t for t, _ in p), "Add up times"),
    (ch10.speedup, lambda parts: 1 / good_speedup(parts), "share"),
    (ch10.speedup, lambda parts: max(f for _, f in parts), "still take"),
    (ch10.speedup, lambda parts: 1.0, "how long now"),
    (ch10.choose, lambda *a: good_choice(*a, exact=False), "error is 0.05"),
    (ch10.choose, lambda *a: good_choice(*a, fastest=False), "exact enough and faster"),
    (ch10.choose, lambda *a: good_choice(*a, fallback=False), "None is so exact"),
    (ch10.choose, lambda *a: good_choice(*a, near=lambda m, n: m < n), "as factors go"),
    (ch10.choose, lambda rows, n, e: "original" if n <= 256 else "flash, half", "error is 0.0006"),
    (ch10.choose, lambda rows, n, e: good_choice(rows, 1024 if n == 300 else n, e), "nearer"),
    (ch10.choose, lambda rows, n, e: rows[0], "name of the row"),
    (ch10.choose, lambda rows, n, e: "fp16", "names are"),
]  # fmt: skip


test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)

test_skeletons_are_not_errors = skeletons_are_not_errors(GOOD)


def test_spacing_is_what_torch_steps_by():
    for x, dtype in ((100.0, torch.bfloat16), (2048.0, torch.float16), (0.03, torch.float32)):
        bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
        here = torch.tensor(x, dtype=dtype)
        up = torch.nextafter(here, torch.tensor(float("inf"), dtype=dtype))
        assert (up.double() - here.double()).item() == good_spacing(here.item(), bits)


def test_the_rule_is_that_of_torchs_grad_scaler():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    w = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.0)
    scale, streak = 1024.0, 0
    for finite in (True, True, False, True, True, True, True):
        w.grad = torch.full((1,), 1.0 if finite else float("inf"))
        scaler.unscale_(optimizer) if scaler._scale is not None else scaler.scale(w.sum())
        scaler.step(optimizer)
        scaler.update()
        scale, streak = good_scale(scale, streak, finite, after=3)
        assert (scaler.get_scale(), int(scaler._growth_tracker)) == (scale, streak)
