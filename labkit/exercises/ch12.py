"""Exercises of chapter 12 (how NSA chooses what to read)."""

from __future__ import annotations

from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = ["choose", "operations", "selected", "shared", "visible"]


@exercise("Complete blocks")
def visible(answer: Any) -> str:
    """Grade ``visible(t, length, stride)``: compressed keys that a query at t sees."""
    cases = ((0, 64, 64), (62, 64, 64), (63, 64, 64), (64, 64, 64), (127, 64, 64), (1000, 64, 64),
             (30, 32, 16), (31, 32, 16), (46, 32, 16), (47, 32, 16), (200, 32, 16), (9, 10, 7),
             (0, 1, 1), (5, 1, 1), (3, 64, 16))  # fmt: skip
    for t, length, stride in cases:
        got = expect_number(call(answer, t, length, stride), "The number of compressed keys")
        right = sum(c * stride + length - 1 <= t for c in range(t + 2))
        where = f"for t = {t}, l = {length} and d = {stride} you count {got:g}"
        expect(got >= 0, f"{where}. Before the first block is complete there is none, and not −1.")
        late = sum(c * stride + length - 1 < t for c in range(t + 2))
        hint = f"Key c is complete at token c·d + l − 1; the last complete one here is {right - 1}."
        if got == late and late != right and stride == length:
            hint = "A query that stands on the last token of a block sees that block: ≤, not <."
        elif got == t // stride + 1:
            hint = "You count the blocks that have begun. They must be complete."
        expect(got == right, f"{where}; there are {right}. {hint}")
    return "one more with every d tokens, once l tokens are there."


@exercise("Tokens in common")
def shared(answer: Any) -> str:
    """Grade ``shared(c, block, length, stride, block_size)``: tokens of both."""
    sizes = ((32, 16, 64), (64, 64, 64), (16, 16, 64), (32, 16, 16), (10, 7, 16), (8, 8, 12))
    for length, stride, block_size in sizes:
        for block in range(4):
            for c in range(30):
                got = expect_number(
                    call(answer, c, block, length, stride, block_size), "The number of tokens"
                )
                key = set(range(c * stride, c * stride + length))
                right = len(key & set(range(block * block_size, (block + 1) * block_size)))
                where = (
                    f"Key {c} of l = {length}, d = {stride} and block {block} of {block_size}: you "
                    f"say {got:g}"
                )
                expect(
                    got >= 0,
                    f"{where}. Where the two do not meet, the difference of the ends is negative.",
                )
                hint = (
                    f"The key stands for tokens {c * stride} to {c * stride + length - 1}, the "
                    f"block holds {block * block_size} to {(block + 1) * block_size - 1}."
                )
                expect(got == right, f"{where}, not {right}. {hint}")
    return "from the later start to the earlier end."


def _choice(importance, t, block_size, count, initial, local):
    own = t // block_size
    urgent = [own - back for back in range(local)] + list(range(initial))
    urgent = list(dict.fromkeys(b for b in urgent if 0 <= b <= own))
    rest = sorted((b for b in range(own + 1) if b not in urgent), key=lambda b: -importance[b])
    return sorted((urgent + rest)[:count])


@exercise("Choose blocks")
def choose(answer: Any) -> str:
    """Grade ``choose(importance, t, block_size, count, initial, local)``: ascending numbers."""
    flat, rising = [0.5] * 10, [0.1 * b for b in range(10)]
    mixed = [0.3, 0.9, 0.1, 0.4, 0.9, 0.2, 0.0, 0.0, 0.0, 0.8]
    cases = (
        (mixed, 79, 10, 4, 1, 2), (mixed, 79, 10, 6, 1, 2), (mixed, 79, 10, 2, 1, 2),
        (mixed, 79, 10, 1, 1, 2), (mixed, 70, 10, 3, 0, 1), (flat, 95, 10, 5, 1, 2),
        (flat, 95, 10, 4, 0, 1), (rising, 29, 10, 5, 1, 2), (rising, 9, 10, 4, 1, 2),
        (mixed, 10, 10, 8, 1, 2), (rising, 99, 10, 3, 2, 3), (mixed, 59, 10, 6, 0, 1),
        ([0.0] * 10, 65, 10, 5, 1, 2), (mixed, 89, 10, 4, 2, 2),
    )  # fmt: skip
    for importance, t, block_size, count, initial, local in cases:
        got = call(answer, list(importance), t, block_size, count, initial, local)
        expect(isinstance(got, (list, tuple)), f"Return a list of block numbers, not {got!r}.")
        got = [int(expect_number(b, "A block number")) for b in got]
        right = _choice(importance, t, block_size, count, initial, local)
        own = t // block_size
        where = (
            f"at t = {t} with blocks of {block_size}, {count} slots, {initial} initial and {local} "
            f"local ones you choose {got}"
        )
        expect(len(set(got)) == len(got), f"{where}: a block is named twice.")
        expect(
            all(0 <= b <= own for b in got),
            f"{where}. The query stands in block {own}: later ones hold its future.",
        )
        expect(
            len(got) <= count,
            f"{where}. Forced blocks take slots of the {count}, they do not come on top.",
        )
        expect(own in got, f"{where}, without block {own}: the query would not see itself.")
        expect(
            len(got) == len(right),
            f"{where}, and {len(right)} are to be had. Importance 0 is no reason to leave a slot "
            "empty.",
        )
        expect(got == sorted(got), f"{where}. Return them ascending.")
        hint = "Forced first: current, the ones before it, then initial. The best of the rest fill."
        if sum(importance[b] for b in got) == sum(importance[b] for b in right):
            hint = "Of equal importance the lower number wins."
        expect(got == right, f"{where}, not {right}. {hint}")
    return "what is forced, then what matters, and ties by number."


@exercise("One query reads its blocks")
def selected(answer: Any) -> str:
    """Grade ``selected(q, K, V, blocks, t, block_size)``: the output of one query, [V]."""
    import torch

    generator = torch.Generator().manual_seed(12)
    n, d, width = 22, 6, 3  # the last block of 4 is incomplete
    k = torch.randn(n, d, generator=generator, dtype=torch.float64)
    v = torch.randn(n, width, generator=generator, dtype=torch.float64)
    cases = (
        ([0, 1, 2], 11), ([0, 2], 9), ([2, 0], 9), ([0, -1, 2, -1], 11), ([0, 2, 2], 11),
        ([5, 0], 21), ([5, 1], 20), ([4, 1], 17), ([0, 3], 9), ([-1, -1], 9), ([4], 9),
    )  # fmt: skip
    for blocks, t in cases:
        q = torch.randn(d, generator=generator, dtype=torch.float64)
        got = call(answer, q.clone(), k.clone(), v.clone(), list(blocks), t, 4)
        where = f"for blocks {blocks} at t = {t}"
        expect(
            isinstance(got, torch.Tensor) and tuple(got.shape) == (width,),
            f"{where} return a tensor of {width} numbers.",
        )

        def attend(seen, q=q, scale=d**-0.5):
            p = torch.softmax(scale * k[seen] @ q, 0)
            return p @ v[seen] if len(seen) else torch.zeros(width, dtype=torch.float64)

        named = list(dict.fromkeys(b for b in blocks if b >= 0))
        tokens = [j for b in named for j in range(4 * b, min(n, 4 * b + 4))]
        right = attend([j for j in tokens if j <= t])
        expect(
            bool(torch.isfinite(got).all()),
            f"{where} something is not finite. A query that sees nothing gives 0, and softmax "
            "over nothing gives NaN.",
        )
        twice = [j for b in blocks if b >= 0 for j in range(4 * b, min(n, 4 * b + 4)) if j <= t]
        last = [j for b in blocks for j in range(4 * b, 4 * b + 4) if -n <= j <= t]
        mistakes = (
            (attend(tokens), "You read keys after t: a chosen block may reach into the future."),
            (attend(twice), "A block that is named twice counts once."),
            (attend(last), "−1 marks an unused slot, and K[-4:0] … are real rows in Python."),
            (attend([j for j in tokens if j < t]), "Key t itself is visible."),
            (attend([j for j in tokens if j <= t], scale=1.0), "The scale is 1/√D."),
        )
        hint = next((text for o, text in mistakes if torch.allclose(got, o)), "")
        worst = float((got - right).abs().max())
        expect(worst < 1e-9, f"{where} your output is off by up to {worst:.2g}. {hint}".rstrip())
    return "gather, mask by position, softmax: −1, repeats and the future stay out."


@exercise("Operations of the reference")
def operations(answer: Any) -> str:
    """Grade ``operations(seq_len, count, block_size, window, heads, head_dim, head_dim_v)``."""
    cases = (
        (2048, 16, 64, 512, 32, 128, 128), (2048, 16, 64, 0, 32, 128, 128),
        (4096, 8, 32, 128, 16, 64, 96), (100, 2, 16, 10, 4, 8, 8), (64, 1, 64, 7, 1, 16, 32),
    )  # fmt: skip
    for n, count, size, window, heads, d, dv in cases:
        got = expect_number(call(answer, n, count, size, window, heads, d, dv), "The operations")
        keys = count * size
        right = 2 * n * heads * (keys + window) * (d + dv)
        mistakes = {
            right // 2: "A multiply-add is two operations.",
            n * heads * (keys * (d + dv) + window * d): "That is the claim as it stands: "
            "multiply-adds, and a window without the product with V.",
            2 * n * heads * (keys * (d + dv) + window * d): "The window has a product with V, too.",
            4 * n * heads * (keys + window) * d: "V is as wide as head_dim_v.",
        }
        where = f"for T = {n}, S = {count}, l′ = {size}, W = {window}, HQ = {heads}, D = {d}"
        expect(
            got == right,
            f"{where}, V = {dv} you return {got:,.0f}, not {right:,}. "
            + mistakes.get(int(got), "Two products, each over every key that is read."),
        )
    return "34.4 GFLOP for the sizes of the source notes, twice what they say."
