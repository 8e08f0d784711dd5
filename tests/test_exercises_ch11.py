"""The graders of chapter 11 take the solutions and turn each known mistake away."""

from __future__ import annotations

import math

import pytest
import torch

from labkit.exercises import ExerciseFailed, ch11


def good_density(density, block):
    return 1 - (1 - density) ** (block * block)


def precise_density(density, block):
    return -math.expm1(block * block * math.log1p(-density))


def good_window(n, window, block):
    back = -(-(window - 1) // block)
    return sum(min(i, back) + 1 for i in range(n // block))


def good_map(seen, block, *, any_is=1, ragged=True):
    rows, cols = (-(-size // block) for size in seen.shape)
    if not ragged:
        rows, cols = (size // block for size in seen.shape)
    out = torch.zeros(rows, cols, dtype=torch.long)
    for r in range(rows):
        for c in range(cols):
            tile = seen[r * block : (r + 1) * block, c * block : (c + 1) * block]
            out[r, c] = any_is * tile.any() + tile.all()
    return out


def padded_map(seen, block):
    """Hidden scores beyond the end: no tile there is full."""
    rows, cols = (-(-size // block) for size in seen.shape)
    padded = torch.zeros(rows * block, cols * block, dtype=torch.bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    return good_map(padded, block)


def good_lists(
    Q, K, V, count, index, seen, scale, block, *, mask=True, blind=True, all_of_them=False
):
    """Gather the keys of a row's tiles."""
    O = torch.zeros(len(Q), V.shape[1], dtype=Q.dtype)  # noqa: E741
    for r in range(len(count)):
        i = torch.arange(r * block, min((r + 1) * block, len(Q)))
        tiles = index[r] if all_of_them else index[r, : count[r]]
        keys = [torch.arange(c * block, min((c + 1) * block, len(K))) for c in tiles.tolist()]
        if not keys:
            continue
        j = torch.cat(keys)
        S = Q[i] @ K[j].T * scale
        if mask:
            S = S.masked_fill(~seen(i[:, None], j), -torch.inf)
        P = torch.softmax(S, dim=-1)
        O[i] = (P.nan_to_num(0.0) if blind else P) @ V[j]
    return O


def online_lists(Q, K, V, count, index, seen, scale, block):
    """One tile at a time, with the merge of chapter 07."""
    O = torch.zeros(len(Q), V.shape[1], dtype=Q.dtype)  # noqa: E741
    for r in range(len(count)):
        i = torch.arange(r * block, min((r + 1) * block, len(Q)))
        m = torch.full((len(i), 1), -1e30, dtype=Q.dtype)
        total, acc = torch.zeros_like(m), torch.zeros(len(i), V.shape[1], dtype=Q.dtype)
        for c in index[r, : count[r]].tolist():
            j = torch.arange(c * block, min((c + 1) * block, len(K)))
            s = (Q[i] @ K[j].T * scale).masked_fill(~seen(i[:, None], j), -torch.inf)
            new = torch.maximum(m, s.amax(1, keepdim=True))
            p, alpha = torch.exp(s - new), torch.exp(m - new)
            total, acc, m = total * alpha + p.sum(1, keepdim=True), acc * alpha + p @ V[j], new
        O[i] = acc / torch.where(total > 0, total, 1.0)
    return O


def dense(Q, K, V, count, index, seen, scale, block):
    i, j = torch.arange(len(Q))[:, None], torch.arange(len(K))
    S = (Q @ K.T * scale).masked_fill(~seen(i, j), -torch.inf)
    return torch.softmax(S, -1).nan_to_num(0.0) @ V


def dense_without_poison(Q, K, V, *rest):
    """Right to the bit, and N × N."""
    return dense(Q, K.nan_to_num(0.0), V.nan_to_num(0.0), *rest)


def good_added(n, window):
    beyond = max(0, n - window)
    return beyond * (beyond + 1) // 2


GOOD = [
    (ch11.expected_block_density, good_density),
    (ch11.expected_block_density, precise_density),
    (ch11.window_blocks, good_window),
    (ch11.tile_map, good_map),
    (ch11.tile_map, lambda *a: good_map(*a).to(torch.int8)),
    (ch11.attention_from_lists, good_lists),
    (ch11.attention_from_lists, online_lists),
    (ch11.added_scores, good_added),
    (ch11.added_scores, lambda n, w: sum(max(0, t - w + 1) for t in range(n))),
]


@pytest.mark.parametrize(("grader", "answer"), GOOD)
def test_solutions_are_taken(grader, answer, capsys):
    grader(answer)
    assert capsys.readouterr().out.startswith("✓ ")


BAD = [
    (ch11.expected_block_density, lambda r, b: 1 - (1 - r) ** b, "block × block scores, and not"),
    (ch11.expected_block_density, lambda r, b: 1 - (1 - r) ** (2 * b), "block × block"),
    (ch11.expected_block_density, lambda r, b: (1 - r) ** (b * b), "stay empty"),
    (ch11.expected_block_density, lambda r, b: r ** (b * b), "all is visible"),
    (ch11.expected_block_density, lambda r, b: r, "density of scores"),
    (ch11.expected_block_density, lambda r, b: r * b * b, "on average"),
    (ch11.expected_block_density, lambda r, b: min(1.0, r * b * b), "touch it once|on average"),
    (ch11.expected_block_density, lambda r, b: 0.5, "When is a tile empty"),
    (ch11.expected_block_density, lambda r, b: "5 %", "number"),
    (ch11.window_blocks, lambda n, w, b: (n // b) ** 2, "a dense mask"),
    (ch11.window_blocks, lambda n, w, b: (n // b) * (n // b + 1) // 2, "triangle"),
    (ch11.window_blocks, lambda n, w, b: n // b * -(-w // b), "begins inside"),
    (ch11.window_blocks, lambda n, w, b: sum(min(i + 1, -(-w // b)) for i in range(n // b)),
     "W − 1 keys"),
    (ch11.window_blocks, lambda n, w, b: sum(min(i, -(-w // b)) + 1 for i in range(n // b)),
     "W − 1 keys"),
    (ch11.window_blocks, lambda n, w, b: n // b * (-(-w // b) + 1), "fewer blocks before"),
    (ch11.window_blocks, lambda n, w, b: n * w // b**2, "first key"),
    (ch11.window_blocks, lambda n, w, b: [1], "number"),
    (ch11.tile_map, lambda s, b: good_map(s, b).clamp(max=1), "needs no mask"),
    (ch11.tile_map, lambda s, b: 2 * good_map(s, b).clamp(max=1), "2 means"),
    (ch11.tile_map, lambda s, b: good_map(s, b, any_is=0) * 2, "some visible scores is 1"),
    (ch11.tile_map, lambda s, b: good_map(s, b).T, "blocks of queries"),
    (ch11.tile_map, lambda s, b: 2 - good_map(s, b), "0 is empty"),
    (ch11.tile_map, lambda s, b: good_map(s, b, ragged=False), "may be smaller"),
    (ch11.tile_map, padded_map, "scores that exist"),
    (ch11.tile_map, lambda s, b: good_map(s, b) * 0, "tiles differ"),
    (ch11.tile_map, lambda s, b: good_map(s, b).tolist(), "tensor"),
    (ch11.attention_from_lists, lambda *a: good_lists(*a, mask=False), r"ask seen\(i, j\)"),
    (ch11.attention_from_lists, lambda *a: good_lists(*a, blind=False), "sees nothing"),
    (ch11.attention_from_lists, lambda *a: good_lists(*a, all_of_them=True), "count|all 12"),
    (ch11.attention_from_lists, dense, "all 12"),
    (ch11.attention_from_lists, dense_without_poison, "all 12"),
    (ch11.attention_from_lists, lambda *a: good_lists(*a[:6], 1.0, a[7]), "multiplied by scale"),
    (ch11.attention_from_lists, lambda *a: good_lists(*a)[:, :1], "shape"),
    (ch11.attention_from_lists, lambda *a: -good_lists(*a), "differs"),
    (ch11.attention_from_lists, lambda *a: 0.0, "tensor"),
    (ch11.added_scores, lambda n, w: (n - w) * (n - w + 1) // 2, "loses nothing"),
    (ch11.added_scores, lambda n, w: good_added(n - 1, w), "first to lose"),
    (ch11.added_scores, lambda n, w: good_added(n + 1, w), "still sees everything"),
    (ch11.added_scores, lambda n, w: max(0, n - w) * n, "each one more"),
    (ch11.added_scores, lambda n, w: max(0, n - w) ** 2, "t − W"),
    (ch11.added_scores, lambda n, w: 0, "position t lose"),
    (ch11.added_scores, lambda n, w: None if n < 0 else "0", "number"),
]  # fmt: skip


@pytest.mark.parametrize(("grader", "answer", "says"), BAD)
def test_mistakes_are_turned_away(grader, answer, says):
    with pytest.raises(ExerciseFailed, match=says):
        grader(answer)


def test_skeletons_are_not_errors(capsys):
    def skeleton(*args): ...

    graders = [
        ch11.expected_block_density, ch11.window_blocks, ch11.tile_map, ch11.attention_from_lists,
        ch11.added_scores,
    ]  # fmt: skip
    for grader in graders:
        for answer in (..., None, skeleton):
            grader(answer)
            assert capsys.readouterr().out.startswith("Not answered yet: ")
