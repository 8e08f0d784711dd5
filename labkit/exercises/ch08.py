"""Exercises of chapter 08 (the forward kernel)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["join", "longest_unit", "programs", "two_stages", "update"]


@exercise("Two stages")
def two_stages(answer: Any) -> str:
    """Grade ``two_stages(tile, seq_len, block_m, block_n)`` -> (whole, masked) blocks of keys."""
    cases = ((0, 256, 64, 64), (3, 256, 64, 64), (1, 256, 128, 64), (1, 256, 64, 128),
             (2, 300, 128, 64), (0, 5, 64, 64), (4, 300, 64, 32), (1, 200, 128, 64))  # fmt: skip
    for tile, n, block_m, block_n in cases:
        got = call(answer, tile, n, block_m, block_n)
        expect(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "Return two numbers: blocks without a mask, and blocks with one.",
        )
        whole, masked = (expect_number(x, "A number of blocks") for x in got)
        first, last = tile * block_m, min(n, (tile + 1) * block_m) - 1
        seen = [j for j in range(0, n, block_n) if j <= last]
        right = sum(j + block_n - 1 <= first for j in seen)
        where = f"for tile {tile} of N = {n} with {block_m} rows and {block_n} keys"
        expect(
            whole <= right,
            f"{where} you leave the mask away in {whole:g} blocks. Only {right} are visible to the "
            f"tile's first row, {first}, to their last key.",
        )
        expect(
            whole >= right,
            f"{where} you find {whole:g} blocks that need no mask; there are {right}.",
        )
        expect(
            masked == len(seen) - right,
            f"{where} you mask {masked:g} blocks. The tile's last row is {last}, so {len(seen)} "
            f"blocks hold a visible key, and {len(seen) - right} of them need the mask.",
        )
    return "whole blocks end at or before the first row, visible ones begin at or before the last."


@exercise("Programs per SM")
def programs(answer: Any) -> str:
    """Grade ``programs(registers, num_warps, shared_bytes)`` on an SM of Hopper."""
    cases = (
        (128, 4, 40 * 1024), (170, 4, 40 * 1024), (250, 4, 96 * 1024), (190, 8, 160 * 1024),
        (32, 4, 40 * 1024), (24, 4, 1024), (168, 8, 100 * 1024), (40, 8, 57 * 1024),
    )  # fmt: skip

    def by_registers(r: int, w: int, s: int) -> int:
        return 65536 // (-(-r // 8) * 8 * 32 * w)

    def by_shared(r: int, w: int, s: int) -> int:
        return 228 * 1024 // (s + 1024)

    def right(r: int, w: int, s: int) -> int:
        return min(by_registers(r, w, s), by_shared(r, w, s), 2048 // (32 * w))

    mistakes = {
        by_registers: "Registers are not all that runs out.",
        by_shared: "Shared memory is not all that runs out.",
        lambda *x: min(by_registers(*x), by_shared(*x)): "An SM has 2,048 threads at most.",
        lambda r, w, s: min(65536 // (r * 32 * w), by_shared(r, w, s), 2048 // (32 * w)): (
            "Registers are handed out to a thread by eights."
        ),
        lambda r, w, s: min(by_registers(r, w, s), 228 * 1024 // s, 2048 // (32 * w)): (
            "The system keeps 1 KiB of shared memory for each program."
        ),
        lambda r, w, s: min(65536 // (-(-r // 8) * 8 * w), by_shared(r, w, s), 2048 // (32 * w)): (
            "A warp has 32 threads, and each has its registers."
        ),
    }
    answers = [
        expect_number(call(answer, *case), "The number of programs") for case in cases
    ]  # fmt: skip
    hint = "What runs out first: registers, shared memory, or threads? Only whole programs count."
    for mistake, text in mistakes.items():
        if all(got == mistake(*case) for got, case in zip(answers, cases, strict=True)):
            hint = text
    for got, (registers, warps, shared) in zip(answers, cases, strict=True):
        wanted = right(registers, warps, shared)
        expect(
            got == wanted,
            f"for {registers} registers, {warps} warps and {shared // 1024} KiB you return "
            f"{got:g}, not {wanted}. {hint}",
        )
    return "registers, shared memory, threads: the first that runs out decides."


@exercise("The longest unit")
def longest_unit(answer: Any) -> str:
    """Grade ``longest_unit(head_dim, block_m, instructions)`` -> (name, clocks per score)."""
    cases = ((128, 64, 16), (64, 64, 16), (64, 128, 7.2), (128, 128, 7.6), (32, 128, 6),
             (64, 32, 6), (64, 128, 8), (256, 16, 20))  # fmt: skip
    for d, block_m, instructions in cases:
        got = call(answer, d, block_m, instructions)
        expect(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "Return two things: the name of the unit, and its clocks per score.",
        )
        clocks = {
            "product": 4 * d / 4096,
            "exp": 1 / 16,
            "issue": instructions / 128,
            "L2": 4 * d / block_m / 32,
        }
        most = max(clocks.values())
        value = expect_number(got[1], "The clocks")
        where = f"for d = {d}, {block_m} rows and {instructions} instructions"
        mistakes = {
            most / 2: "Two products, and each multiply-add is two operations; K and V.",
            sum(clocks.values()): "That is the sum, as if nothing overlapped.",
            min(clocks.values()): "That is the shortest of the four.",
        }
        near = [hint for v, hint in mistakes.items() if math.isclose(v, value, rel_tol=1e-6)]
        hint = near[0] if near else f"The four are {', '.join(clocks)}."
        expect(
            math.isclose(value, most, rel_tol=1e-6),
            f"{where} you return {value:.4g} clocks, where the longest of the four takes "
            f"{most:.4g}. {hint}",
        )
        expect(
            got[0] in clocks and math.isclose(clocks[got[0]], most, rel_tol=1e-6),
            f"{where} you name {got[0]!r}, which is not the longest.",
        )
    return "at d = 64 products and exponentials tie; eight instructions per score tie with both."


def _streams():
    """Raw scores, values and a constant, for a few blocks of keys."""
    import torch

    generator = torch.Generator().manual_seed(8)
    for rows, keys, d, size in ((3, 8, 4, 1.0), (5, 16, 8, 30.0), (1, 4, 2, 300.0)):
        blocks = [
            (size * torch.randn(rows, keys, generator=generator, dtype=torch.float64),
             torch.randn(keys, d, generator=generator, dtype=torch.float64))
            for _ in range(3)
        ]  # fmt: skip
        yield blocks, d**-0.5 * math.log2(math.e)


@exercise("One update")
def update(answer: Any) -> str:
    """Grade ``update(S, V, m, l, O, c)`` -> (m, l, O), base 2, in float64."""
    import torch

    for blocks, c in _streams():
        rows, d = blocks[0][0].shape[0], blocks[0][1].shape[1]
        m = torch.full((rows,), -math.inf, dtype=torch.float64)
        state = (m, torch.zeros_like(m), torch.zeros(rows, d, dtype=torch.float64))
        for number, (s, v) in enumerate(blocks):
            state = call(answer, s.clone(), v.clone(), *(x.clone() for x in state), c)
            expect(
                isinstance(state, (tuple, list)) and len(state) == 3,
                "Return three tensors: m, l, and O.",
            )
            m, l, o = state  # noqa: E741
            shapes = [tuple(getattr(x, "shape", ())) for x in state]
            expect(
                shapes == [(rows,), (rows,), (rows, d)],
                f"m, l and O have the shapes {shapes}, not {[(rows,), (rows,), (rows, d)]}.",
            )
            expect(
                all(bool(torch.isfinite(x).all()) for x in state),
                f"after block {number + 1} something is not finite. The first block starts from "
                "m = −∞: 2 to the power of −∞ − m is 0 and takes care of itself, if m is new.",
            )
            seen = torch.cat([x for x, _ in blocks[: number + 1]], 1)
            values = torch.cat([x for _, x in blocks[: number + 1]], 0)
            weights = torch.softmax(seen * c * math.log(2), -1)
            top = (c * seen).amax(1)
            natural = torch.allclose(m, top * math.log(2), rtol=1e-9)
            raw = torch.allclose(m, seen.amax(1), rtol=1e-9) and not torch.allclose(m, top)
            hint = "m is kept in base 2: the largest c·S so far."
            hint = "You keep it in natural units. " + hint if natural else hint
            hint = "You keep the largest S, without c. " + hint if raw else hint
            expect(
                torch.allclose(m, top, rtol=1e-9),
                f"after block {number + 1} your m is off by {(m - top).abs().max():.3g}. {hint}",
            )
            total = torch.exp2(c * seen - top[:, None]).sum(1)
            expect(
                torch.allclose(l, total, rtol=1e-9),
                f"after block {number + 1} your l is {l[0]:.6g}, the sum of 2^(c·S − m) is "
                f"{total[0]:.6g}. What was added before was relative to the old m.",
            )
            got = o / l[:, None]
            worst = float((got - weights @ values).abs().max())
            expect(
                worst < 1e-9,
                f"after block {number + 1} your O / l is off by up to {worst:.2g}. O is a sum "
                "of P V relative to m as well: rescale it, and divide by l only at the end.",
            )
    return "one multiply-add and one exp2 per score; l and O rescaled by 2^(m − m')."


@exercise("Join two halves")
def join(answer: Any) -> str:
    """Grade ``join(o1, lse1, o2, lse2)`` -> (o, lse), natural LSE, in float64."""
    import torch

    generator = torch.Generator().manual_seed(9)
    for size in (1.0, 20.0, 800.0):
        s = size * torch.randn(6, 24, generator=generator, dtype=torch.float64)
        v = torch.randn(24, 5, generator=generator, dtype=torch.float64)
        s[1, :9] = s[2, 9:] = -math.inf  # a row that sees one half only
        s[3] = -math.inf  # and one that sees nothing
        halves = []
        for part in (slice(0, 9), slice(9, 24)):
            p = torch.softmax(s[:, part], -1).nan_to_num(0.0)
            halves += [p @ v[part], s[:, part].logsumexp(-1)]
        got = call(answer, *(x.clone() for x in halves))
        expect(isinstance(got, (tuple, list)) and len(got) == 2, "Return two tensors: O and LSE.")
        o, lse = got
        right_o, right_lse = torch.softmax(s, -1).nan_to_num(0.0) @ v, s.logsumexp(-1)
        expect(
            tuple(o.shape) == (6, 5) and tuple(lse.shape) == (6,),
            f"O and LSE have shapes {tuple(o.shape)} and {tuple(lse.shape)}, not (6, 5) and (6,).",
        )
        seen = torch.isfinite(right_lse)
        expect(
            bool(torch.isfinite(o[seen]).all() and torch.isfinite(lse[seen]).all()),
            f"with scores of size {size:g} something is not finite. Subtract the larger LSE before "
            "you take exponentials.",
        )
        worst = float((lse - right_lse)[seen].abs().max())
        expect(worst < 1e-9, f"your LSE is off by up to {worst:.2g}: ln(e^LSE₁ + e^LSE₂).")
        worst = float((o - right_o)[seen].abs().max())
        expect(
            worst < 1e-9,
            f"your O is off by up to {worst:.2g}. Each half is weighted by e^(LSE of the half − "
            "LSE of both), and the two weights add up to 1.",
        )
        expect(
            bool((o[~seen] == 0).all() and (lse[~seen] == -math.inf).all()),
            "A row that sees no key in either half must come out as O = 0 and LSE = −∞; yours has "
            f"O = {o[3, 0]:g} and LSE = {lse[3]:g}.",
        )
    return "softmax of the two LSEs: the halves of a row know enough to be joined."
