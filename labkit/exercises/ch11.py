"""Exercises of chapter 11 (why a mask saves nothing)."""

from __future__ import annotations

import math
from typing import Any

from labkit.exercises import call, exercise, expect, expect_number

__all__ = [
    "added_scores",
    "attention_from_lists",
    "expected_block_density",
    "tile_map",
    "window_blocks",
]


def _random(*shape: int, seed: int = 11) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@exercise("Tiles under a random mask")
def expected_block_density(answer: Any) -> str:
    """Grade ``expected_block_density(density, block)``: 1 − (1 − ρ)^(b²)."""
    for density, block in ((0.05, 16), (0.001, 16), (0.00005, 128), (0.3, 2), (0.5, 1)):
        got = expect_number(call(answer, density, block), "The share of tiles")
        right = 1 - (1 - density) ** (block * block)
        mistakes = {
            1 - (1 - density) ** block: "A tile has block × block scores, and not block of them.",
            1 - (1 - density) ** (2 * block): "A tile has block × block scores.",
            (1 - density) ** (block * block): "That is the share of the tiles that stay empty.",
            density ** (block * block): "That is the share of the tiles in which all is visible.",
            density: "That is the density of scores. One score is enough to touch a tile.",
            density * block * block: "That many scores of a tile are visible on average. The "
            "chance that there is one at all is smaller, and never above 1.",
            min(1.0, density * block * block): "Near 0 that is close. But scores meet in one tile "
            "now and then, and then they touch it once.",
        }
        near = (why for value, why in mistakes.items() if math.isclose(got, value, rel_tol=1e-9))
        hint = next(near, "When is a tile empty? Each of its scores is hidden with 1 − density.")
        expect(
            math.isclose(got, right, rel_tol=1e-9),
            f"for a density of {density:g} and tiles of {block} × {block} you return {got:.6g}. "
            f"{hint}",
        )
    return "what matters is the number of visible scores for each tile, and tiles are large."


@exercise("The tiles of a window")
def window_blocks(answer: Any) -> str:
    """Grade ``window_blocks(seq_len, window, block)``: tiles of a causal window, square tiles."""
    cases = ((96, 43, 8), (64, 16, 16), (64, 17, 16), (64, 18, 16), (96, 1, 8), (96, 40, 8),
             (64, 64, 16), (64, 200, 16), (8, 4, 4), (30, 7, 1))  # fmt: skip
    for n, window, block in cases:
        got = expect_number(call(answer, n, window, block), "The count")
        rows = n // block
        first = [max(0, i * block - window + 1) // block for i in range(rows)]
        right = sum(i - f + 1 for i, f in enumerate(first))
        whole = -(-window // block)
        mistakes = {
            rows * rows: "That is all of them: a dense mask.",
            rows * (rows + 1) // 2: "That is the whole triangle: the window hides nothing in it.",
            rows * whole: "A window that ends inside a block begins inside one, too; and the first "
            "queries have no block before them.",
            sum(min(i + 1, whole) for i in range(rows)): "The first query of a block looks back "
            "further than the last one: a window of W keys begins W − 1 keys before the query.",
            sum(min(i + 1, whole + 1) for i in range(rows)): "How far back does the first query of "
            "a block see? W − 1 keys, and with W = 1 the block before is not touched.",
            rows * (whole + 1): "The first blocks of queries have fewer blocks before them.",
        }
        hint = "" if got == right else next(
            (why for value, why in mistakes.items() if got == value),
            "Take one block of queries: which is the first key that its first query sees?",
        )  # fmt: skip
        expect(
            got == right,
            f"for {n} tokens, a window of {window} and tiles of {block} × {block} you return "
            f"{got:g}, and {right} tiles have a visible score. {hint}",
        )
    return "linear in N: each block of queries meets ⌈(W − 1)/b⌉ + 1 blocks, once there are some."


@exercise("From a mask to a list of tiles")
def tile_map(answer: Any) -> str:
    """Grade ``tile_map(seen, block)``: ``[rows, cols]``, 0 empty, 1 in part, 2 full."""
    import torch

    generator = torch.Generator().manual_seed(7)
    i, j = torch.arange(12)[:, None], torch.arange(12)[None, :]
    triangle, window = j <= i, (j <= i) & (i - j < 5)
    scattered = torch.rand(10, 13, generator=generator) < 0.08
    cases = [
        ("a window", window, 4), ("a causal mask", triangle, 4), ("a window", window, 3),
        ("a mask of 10 × 13", scattered, 4), ("a causal mask", triangle, 5),
    ]  # fmt: skip

    def counts(seen: Any, block: int) -> tuple[Any, Any]:
        rows, cols = (-(-size // block) for size in seen.shape)
        found, there = torch.zeros(rows, cols), torch.zeros(rows, cols)
        for r in range(rows):
            for c in range(cols):
                tile = seen[r * block : (r + 1) * block, c * block : (c + 1) * block]
                found[r, c], there[r, c] = tile.sum(), tile.numel()
        return found, there

    for name, seen, block in cases:
        found, there = counts(seen, block)
        right = (found > 0).long() + (found == there).long()
        got = call(answer, seen.clone(), block)
        where = f"for {name} and tiles of {block} × {block}: "
        expect(isinstance(got, torch.Tensor), f"{where}return a tensor, not {type(got).__name__}.")
        expect(
            got.shape == right.shape,
            f"{where}the map has shape {list(got.shape)}, not {list(right.shape)}. The last tile "
            "may be smaller, and it counts.",
        )
        got = got.long()
        square = right.shape[0] == right.shape[1]
        mistakes = [
            ((found > 0).long(), "a tile in which all is visible is 2: it needs no mask"),
            ((found > 0).long() + (found == block * block).long(),
             "a tile at the end is smaller, and full when all scores that exist are visible"),
            (2 * (found == there).long(), "a tile with some visible scores is 1"),
            (2 * (found > 0).long(), "2 means that every score of the tile is visible"),
            (2 - right, "0 is empty and 2 is full"),
        ]  # fmt: skip
        if square:
            mistakes.append((right.T, "rows of the map are blocks of queries"))
        why = next((text for wrong, text in mistakes if torch.equal(got, wrong)), "")
        expect(
            torch.equal(got, right),
            f"{where}{int((got != right).sum())} of {right.numel()} tiles differ"
            + (f": {why}." if why else "."),
        )
    return "three kinds of tiles: skipped, computed and masked, computed as it is."


@exercise("FlexAttention in ten lines")
def attention_from_lists(answer: Any) -> str:
    """Grade ``attention_from_lists(Q, K, V, count, index, seen, scale, block)``, one head."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    generator = torch.Generator().manual_seed(3)
    for n, d, dv, block in ((12, 4, 3, 4), (16, 5, 4, 4), (15, 4, 4, 4)):
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        mask = (j <= i) & ((i - j < 3) | (torch.rand(n, n, generator=generator) < 0.06))
        mask[1] = False  # this query sees nothing
        if n == 16:
            mask[:, 4:8] = False  # a column of tiles that nobody looks at
            mask[4:8] = False  # and a row of tiles without any
        count, index = _lists(mask, block)
        q, k, v = _random(n, d), _random(n, d, seed=12), _random(n, dv, seed=13) + 1
        scale = 0.7
        s = (q @ k.T * scale).masked_fill(~mask, -torch.inf)
        right = torch.softmax(s, -1).nan_to_num(0.0) @ v
        square = False

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal square
                made = func(*args, **(kwargs or {}))
                view = any(r.alias_info for r in func._schema.returns)
                if isinstance(made, torch.Tensor) and not view:
                    square |= [*made.shape[-2:]] == [n, n]  # noqa: B023
                return made

        # keys and values that no list names are poison
        poisoned = k.clone(), v.clone()
        named = {int(c) for r in range(len(count)) for c in index[r, : count[r]]}
        for c in set(range(index.shape[1])) - named:
            for x in poisoned:
                x[c * block : (c + 1) * block] = torch.nan

        def seen(i, j):
            return mask[i, j]  # noqa: B023

        with torch.no_grad(), Sizes():
            got = call(answer, q.clone(), *poisoned, count, index, seen, scale, block)
        where = f"for {n} tokens, tiles of {block} × {block}: "
        expect(isinstance(got, torch.Tensor), f"{where}O should be a tensor.")
        expect(
            got.shape == right.shape,
            f"{where}O has shape {list(got.shape)}, not {list(right.shape)}.",
        )
        expect(
            not got[1].isnan().any() or got[2:].isnan().any(),
            f"{where}query 1 sees nothing, so its output is 0; yours is NaN.",
        )
        expect(
            not got.isnan().any(),
            f"{where}there is NaN in O. It stands in keys that no list names: row r of index holds "
            "count[r] tiles, and what follows is not for you. (0 · NaN is NaN.)",
        )
        expect(
            not square,
            f"{where}a tensor of all {n} × {n} scores was made. Take one block of queries, and of "
            "the keys only the tiles in its list.",
        )
        dense = torch.softmax(q @ k.T * scale, -1) @ v
        rows = torch.zeros(len(count), index.shape[1], dtype=torch.bool)
        for r, many in enumerate(count):
            rows[r, index[r, :many].long()] = True
        whole = rows.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n]
        loose = torch.softmax((q @ k.T * scale).masked_fill(~whole, -torch.inf), -1)
        bare = torch.softmax((q @ k.T).masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0) @ v
        mistakes = [
            (dense, "that is dense attention"),
            (loose.nan_to_num(0.0) @ v, "ask seen(i, j) for each score of a tile"),
            (bare, "the scores are multiplied by scale"),
        ]
        why = next((t for wrong, t in mistakes if torch.allclose(got, wrong, atol=1e-9)), "")
        expect(
            torch.allclose(got, right, rtol=0, atol=1e-9),
            f"{where}O differs from masked attention" + (f": {why}." if why else "."),
        )
    return "the same function as the mask, and what is in no list is neither read nor computed."


def _lists(mask: Any, block: int) -> tuple[Any, Any]:
    """Of a mask as FlexAttention keeps it: tiles of each row, and which, those first."""
    import torch

    rows, cols = (-(-size // block) for size in mask.shape)
    touched = torch.zeros(rows, cols, dtype=torch.bool)
    for r in range(rows):
        for c in range(cols):
            tile = mask[r * block : (r + 1) * block, c * block : (c + 1) * block]
            touched[r, c] = tile.any()
    order = torch.argsort(touched.int(), dim=1, descending=True, stable=True)
    return touched.sum(1, dtype=torch.int32), order.to(torch.int32)


@exercise("What the swap adds")
def added_scores(answer: Any) -> str:
    """Grade ``added_scores(seq_len, window)``: seen by dense causal attention, not by a window."""
    for n, window in ((8, 3), (128, 256), (256, 256), (257, 256), (2048, 256), (5, 1), (1, 1)):
        got = expect_number(call(answer, n, window), "The count")
        beyond = max(0, n - window)
        right = beyond * (beyond + 1) // 2
        raw = (n - window) * (n - window + 1) // 2
        mistakes = {
            raw: "A sequence that is shorter than the window loses nothing.",
            beyond * (beyond - 1) // 2: "The query at position W is the first to lose a key: the "
            "window holds W keys, its own among them.",
            (beyond + 1) * (beyond + 2) // 2: "The window holds W keys, the query's own among "
            "them: the query at position W − 1 still sees everything.",
            beyond * n: "Only queries beyond the window lose keys, and each one more than the one "
            "before.",
            beyond * beyond: "Under a causal mask the query at position t loses t − W + 1 keys.",
        }
        hint = "" if got == right else next(
            (why for value, why in mistakes.items() if got == value),
            "How many keys does the query at position t lose?",
        )  # fmt: skip
        expect(
            got == right,
            f"for {n} tokens and a window of {window} you return {got:g}, and the answer is "
            f"{right}. {hint}",
        )
    return "0 up to N = W, where no test can tell the two layers apart."
