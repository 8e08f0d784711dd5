"""What sparse attention costs: closed forms against counting, query by query and tile by tile."""

from __future__ import annotations

import doctest
import random
import re

import pytest

from labkit.errors import ArgumentError
from labkit.nsa import model
from labkit.nsa.model import PATTERNS, Shape

#: lengths that end inside a block, one block, fewer tokens than a block, overlapping means
SHAPES = [
    {"seq_len": 1},
    {"seq_len": 63},
    {"seq_len": 1000},
    {"seq_len": 1024, "count": 3, "local": 1, "initial": 0, "window": 0},
    {"seq_len": 777, "block_size": 32, "length": 32, "stride": 16, "window": 5000},
    {"seq_len": 500, "block_size": 64, "length": 32, "stride": 16, "count": 2},
]


def test_examples_in_the_docstrings_are_true():
    assert doctest.testmod(model).failed == 0


@pytest.mark.parametrize("sizes", SHAPES)
def test_sums_are_those_of_the_queries(sizes):
    shape = Shape(**sizes)
    seen = [model.keys_read(shape, t) for t in range(shape.seq_len)]
    pairs = model.pairs(shape)
    for branch, total in pairs.items():
        assert total == sum(one[branch] for one in seen), branch
    assert model.slots(shape) == sum(one["slots"] for one in seen)


@pytest.mark.parametrize("sizes", SHAPES)
def test_one_query_sees_what_the_definitions_say(sizes):
    shape = Shape(**sizes)
    for t in {0, shape.seq_len // 3, shape.seq_len - 1}:
        seen = model.keys_read(shape, t)
        complete = [
            c for c in range(shape.seq_len)
            if c * shape.d + shape.l - 1 <= t and c * shape.d + shape.l <= shape.seq_len
        ]  # fmt: skip
        assert seen["compression"] == len(complete)
        assert seen["window"] == sum(t - shape.window < j <= t for j in range(shape.seq_len))
        own = t // shape.block_size
        chosen = [own, *range(own)][: shape.count]
        tokens = {j for c in chosen for j in range(c * shape.block_size, t + 1)
                  if j // shape.block_size == c}  # fmt: skip
        assert seen["selection"] == len(tokens)
        costs = model.query_costs(shape, t)
        width = shape.head_dim + shape.v
        assert costs["selection"]["flops"] == 2 * len(tokens) * shape.heads * width
        assert costs["selection"]["bytes"] == len(tokens) * shape.kv_heads * width * shape.e
        parts = ("compression", "top-k", "selection", "window")
        assert costs["total"]["bytes"] == sum(costs[p]["bytes"] for p in parts)


def test_claim_c26_is_half_and_lacks_a_product_of_the_window():
    sizes = {"seq_len": 2048, "count": 16, "block_size": 64, "heads": 32}
    claimed = model.claimed_flops(**sizes, head_dim=128)
    assert round(claimed / 1e9, 1) == 17.2
    shape = Shape(**sizes, kv_heads=8, window=0)
    assert model.naive_flops(shape) == 2 * claimed
    windowed = Shape(**sizes, kv_heads=8, window=512)
    more = model.naive_flops(windowed) - model.naive_flops(shape)
    claimed_more = model.claimed_flops(**sizes, head_dim=128, window=512) - claimed
    assert more == 4 * claimed_more, "twice for multiply-adds, twice for V"
    # what is useful of it: early queries have fewer blocks, and each ends in its own
    assert 0.7 < model.flops(shape)["selection"] / model.naive_flops(shape) < 0.75


def test_backward_is_five_products_and_both_is_the_sum():
    shape = Shape(seq_len=4096, head_dim=192, head_dim_v=128)
    forward, backward, both = (model.flops(shape, w) for w in ("forward", "backward", "both"))
    for branch in ("compression", "selection", "window", "dense"):
        assert backward[branch] * (192 + 128) == forward[branch] * (3 * 192 + 2 * 128)
    assert all(both[b] == forward[b] + backward[b] for b in both)
    assert backward["top-k"] == 0 and forward["top-k"] > 0
    assert forward["total"] == sum(forward[b] for b in model.BRANCHES)


def simulated(candidates: int, chosen: int, queries: int, spread: float | None) -> float:
    """Draw the choices and count the different blocks."""
    draw = random.Random(3)
    total = 0
    for _ in range(200):
        common = [draw.random() for _ in range(candidates)]
        union = set()
        for _ in range(queries):
            scores = [(x + spread * draw.random()) if spread is not None else draw.random()
                      for x in common]  # fmt: skip
            best = sorted(range(candidates), key=lambda c: -scores[c])
            union.update(best[:chosen])
        total += len(union)
    return total / 200


@pytest.mark.parametrize(
    "candidates, chosen, spread",
    [(60, 13, None), (60, 13, 0.06), (200, 4, 0.1), (13, 13, 0.06), (13, 13, None)],
)
def test_expected_union_is_the_mean_of_draws(candidates, chosen, spread):
    for queries in (1, 4):
        expected = model.expected_union(candidates, chosen, queries, spread)
        drawn = simulated(candidates, chosen, queries, spread)
        assert expected == pytest.approx(drawn, rel=0.03), queries
    assert model.expected_union(candidates, chosen, 1, spread) == pytest.approx(chosen)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_union_of_one_query_is_its_slots_and_more_queries_share_more(pattern):
    shape = Shape(seq_len=8192)
    assert model.union_blocks(shape, 1, pattern) == pytest.approx(model.slots(shape))
    per_tile = [model.union_blocks(shape, m, pattern) for m in (1, 4, 16, 64)]
    assert per_tile == sorted(per_tile, reverse=True)
    assert min(per_tile) * 64 / 8192 < shape.blocks
    waste = [model.executed_over_useful(shape, m, pattern) for m in (1, 4, 16)]
    assert waste == sorted(waste) and waste[0] > 1


def test_by_keys_reads_less_than_query_by_query_below_two_thirds_of_a_block():
    # per (query, block) pair: G (D + 2V) e against l' (D + V) e
    for group, less in ((1, True), (32, True), (64, False)):
        shape = Shape(seq_len=32768, kv_heads=64 // group)
        keys = sum(model.by_keys_bytes(shape).values())
        queries = sum(model.by_queries_bytes(shape).values())
        assert (keys < queries) is less, group
    shape = Shape(seq_len=32768)
    once = shape.seq_len * shape.kv_heads * shape.key_bytes
    assert model.by_keys_bytes(shape)["kv"] == once, "each block once"
    pieces = model.by_keys_bytes(shape, part=256)["kv"]
    assert once < pieces < 10 * once


def test_stored_scores_grow_as_the_square_and_nothing_else_does():
    short, long = Shape(seq_len=8192), Shape(seq_len=65536)
    grown = {
        name: model.topk_bytes(long, fused=False)[name] / model.topk_bytes(short, fused=False)[name]
        for name in ("scores", "rows")
    }
    assert grown == {"scores": 64, "rows": 8}
    assert "scores" not in model.topk_bytes(long)
    for what in ("kept", "backward"):
        assert model.extra_bytes(long)[what] == 8 * model.extra_bytes(short)[what]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"seq_len": 0}, "seq_len = 0"),
        ({"seq_len": 10, "kv_heads": 3}, "kv_heads = 3"),
        ({"seq_len": 10, "window": -1}, "window = -1"),
        ({"seq_len": 10, "local": 0}, "local = 0"),
        ({"seq_len": 10, "dtype": "fp13"}, "dtype"),
        ({"seq_len": 10, "window": False}, "window = False"),
    ],
)
def test_a_size_that_cannot_be_is_named(sizes, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Shape(**sizes)


def test_a_position_beyond_the_end_is_refused():
    with pytest.raises(ArgumentError, match="position = 10"):
        model.keys_read(Shape(seq_len=10), 10)
