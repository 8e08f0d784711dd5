"""Patterns: the definitions by another road, counts by brute force, and five ways to one result."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")

from oracle import assert_within_low_precision_error  # noqa: E402

from labkit import patterns  # noqa: E402
from labkit.errors import ArgumentError  # noqa: E402
from labkit.memory import trace  # noqa: E402
from labkit.patterns import (  # noqa: E402
    HOWS,
    PATTERNS,
    Blocked,
    Clustered,
    Hierarchical,
    Local,
    Pattern,
    Random,
    Strided,
    pattern_attention,
)

N = 70
MARKS = tuple((7 * t * t) % 5 for t in range(N))
ALL = [
    Local(9),
    Strided(5),
    Strided(11, 4),
    Random(6, 3),
    Clustered(4, seed=2),
    Clustered(assignment=MARKS),
    Hierarchical(4, 3),
    Local(2).in_blocks(16),
    Strided(3, 2).in_blocks(8),
    Random(2).in_blocks(16),
    Clustered(5).reordered(N),
]


# -- the definitions, one query after another ------------------------------------------------------


def keys_of(p: Pattern, i: int, n: int) -> set[int]:
    """The keys of the query at position i, listed rather than tested; not for ``Random``."""
    if isinstance(p, patterns.Blocked):
        blocks = keys_of(p.inner, i // p.block, math.ceil(n / p.block))
        return {j for b in blocks for j in range(b * p.block, (b + 1) * p.block) if j < n}
    if isinstance(p, patterns.Reordered):
        place = {token: at for at, token in enumerate(p.tokens)}
        return {place[j] for j in keys_of(p.inner, p.tokens[i], n)}
    if isinstance(p, Local):
        found = range(i - p.window + 1, i + p.window)
    elif isinstance(p, Strided):
        found = [*range(i % p.stride, n, p.stride), *range(i - p.window + 1, i + p.window)]
    elif isinstance(p, Clustered) and p.assignment:
        found = [j for j, mark in enumerate(p.assignment) if mark == p.assignment[i]]
    elif isinstance(p, Hierarchical):
        found = list(range(i - p.window + 1, i + p.window))
        step, near = 2, p.window
        for _ in range(p.levels):
            for start in (i - 2 * near + 1, i + near):
                found += [j for j in range(start, start + near) if j % step == 0]
            step, near = 2 * step, 2 * near
    else:
        raise TypeError(p)
    return {j for j in found if 0 <= j < n}


def drawn(p: Pattern) -> bool:
    """Whether it rests on the hash, which has no second formulation."""
    while isinstance(p, (patterns.Blocked, patterns.Reordered)):
        p = p.inner
    return isinstance(p, Random) or (isinstance(p, Clustered) and p.assignment is None)


@pytest.mark.parametrize("p", [p for p in ALL if not drawn(p)], ids=repr)
@pytest.mark.parametrize(("n_q", "causal"), [(N, False), (N, True), (33, True), (90, False)])
def test_matrix_holds_the_keys_that_the_definition_lists(p, n_q, causal):
    mask = p.dense_mask(n_q, N, causal)
    assert mask.shape == (n_q, N) and mask.dtype == torch.bool
    for t in range(n_q):
        i = t + N - n_q
        if i < 0 and not isinstance(p, (Local, Strided, Hierarchical)):
            continue  # the query stands before the first key, where nothing is defined
        expected = keys_of(p, i, N) if i >= 0 or not isinstance(p, Strided) else None
        if expected is None:
            continue
        seen = set(mask[t].nonzero().flatten().tolist())
        if causal:
            expected = {j for j in expected if j <= i}
            if isinstance(p, patterns.Reordered):
                expected = {j for j in keys_of(p, i, N) if p.tokens[j] <= p.tokens[i]}
        assert seen == expected, f"query {t}"


@pytest.mark.parametrize("p", [p for p in ALL if p.name != "reordered"], ids=repr)
def test_predicate_says_the_same_of_numbers_and_of_tensors(p):
    mask = p.dense_mask(N)
    for i, j in [(0, 0), (3, 69), (69, 3), (31, 32), (32, 31), (16, 5)]:
        assert bool(p.allowed(i, j, N)) == mask[i, j].item()
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    assert torch.equal(p.allowed(i, j, N), mask)
    assert torch.equal(p.allowed(i.int(), j.int(), N), mask)


@pytest.mark.parametrize("inner", [Local(2), Random(2), Clustered(2), Hierarchical(1, 2)], ids=repr)
def test_on_a_grid_a_block_is_what_a_token_was(inner):
    n, block = 70, 16  # the last block is cut short
    squares = inner.dense_mask(5).repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert torch.equal(inner.in_blocks(block).dense_mask(n), squares[:n, :n])


@pytest.mark.parametrize("p", ALL, ids=repr)
def test_every_query_sees_its_own_key(p):
    assert p.sees_own
    assert p.dense_mask(N, N, True).diagonal().all()


@pytest.mark.parametrize(("n", "draws"), [(64, 8), (70, 6), (61, 61), (50, 80), (40, 1)])
def test_random_draws_one_key_from_each_stretch(n, draws):
    off = Random(draws, seed=5).dense_mask(n).clone()
    stretch = torch.arange(n) * min(draws, n) // n
    found = torch.zeros(n, min(draws, n), dtype=torch.int64)
    found.index_add_(1, stretch, off.long())
    own = torch.zeros_like(found)
    own[torch.arange(n), stretch] = 1
    assert ((found == 1) | ((found == 2) & (own == 1))).all()


def test_random_draws_differ_by_seed_and_by_row_and_are_even():
    n, draws = 512, 16
    one, two = (Random(draws, seed=s).dense_mask(n) for s in (0, 1))
    assert torch.equal(one, Random(draws, seed=0).dense_mask(n))
    expected = n * draws * draws / n  # scores that two independent draws share
    assert abs((one & two).sum().item() - n - expected) < 6 * math.sqrt(expected)
    shared = (one[1:] & one[:-1]).sum().item()  # neighbouring rows
    assert abs(shared - (expected + 2 * draws)) < 6 * math.sqrt(expected)
    columns = one.sum(0).double()  # how often each key is drawn: binomial, beside the own one
    assert abs(columns.mean().item() - draws - 1) < 0.2
    assert 0.7 < columns.var().item() / (draws * (1 - draws / n)) < 1.4
    bits = one.view(n, draws, n // draws).double().mean((0, 1))  # place within the stretch
    assert bits.max() / bits.min() < 1.35


def test_clusters_at_random_are_about_even_and_partition_the_tokens():
    mask = Clustered(8, seed=1).dense_mask(512)
    assert torch.equal(mask, mask.T) and torch.equal((mask.int() @ mask.int()) > 0, mask)
    sizes = mask.unique(dim=0).sum(1)
    assert len(sizes) == 8 and sizes.sum() == 512 and sizes.min() > 64 / 2 and sizes.max() < 64 * 2


def test_hash_stays_within_32_bits():
    from labkit.patterns.definitions import _PRIME, _hash

    at = torch.tensor([0, 1, _PRIME - 1, _PRIME, 131071, 2**20])
    wide, narrow = (
        _hash(x[:, None], x[None], _PRIME * 7 + 3) for x in (at.long(), at.to(torch.int32))
    )
    assert torch.equal(wide, narrow.long()) and wide.min() >= 0 and wide.max() < 2**30
    assert len(wide.unique()) == wide.numel()
    assert wide[1, 2].item() == _hash(1, _PRIME - 1, _PRIME * 7 + 3)


def test_a_reordered_pattern_answers_of_numbers_and_of_tensors_and_stays_short_in_print():
    there = Strided(4).reordered(8)
    i = torch.arange(8)
    together = there.allowed(i[:, None], i[None, :])
    assert torch.equal(together, there.dense_mask(8))
    assert all(there.allowed(a, b) is bool(together[a, b]) for a in range(8) for b in range(8))
    with pytest.raises(ArgumentError, match="orders 8 tokens, of 9"):
        there.allowed(0, 1, 9)
    assert len(repr(Strided(4).reordered(4096))) < 100


@pytest.mark.parametrize("assignment", [3, [2**40, 2], "ab", [0.0, 1.0], [], [True, False]])
def test_an_assignment_that_is_none_is_refused(assignment):
    with pytest.raises(ArgumentError, match="assignment"):
        Clustered(assignment=assignment)


def test_a_pattern_of_ones_own_that_can_change_is_refused():
    @dataclass
    class Own(Pattern):
        window: int = 3

        def allowed(self, i, j, keys=None):
            return abs(i - j) < self.window

    with pytest.raises(ArgumentError, match="frozen"):
        patterns.pattern(Own())


def test_an_assignment_may_hold_integers_of_any_kind():
    import numpy as np

    given = Clustered(assignment=list(np.array([5, 7, 5])))
    assert given == Clustered(assignment=(5, 7, 5))
    assert given.dense_mask(3).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]


def test_tokens_brought_together_see_the_same_tokens():
    for p in (Clustered(5), Strided(7), Clustered(assignment=MARKS)):
        there = p.reordered(N)
        tokens = torch.tensor(there.tokens)
        assert sorted(there.tokens) == list(range(N))
        for causal in (False, True):
            original = p.dense_mask(N, N, causal)
            assert torch.equal(there.dense_mask(N, N, causal), original[tokens][:, tokens])
        assert there.statistics(N, block=8).touched < p.statistics(N, block=8).touched


# -- blocks and statistics -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "n", "block", "causal"),
    [(p, N, 16, causal) for p in ALL for causal in (False, True)]
    + [(p, 64, 8, True) for p in (Local(9), Random(6), Local(2).in_blocks(16))],
    ids=repr,
)
def test_blocks_and_statistics_are_those_of_the_matrix(p, n, block, causal, monkeypatch):
    monkeypatch.setattr(patterns.masks, "_AT_ONCE", 3 * block * n)  # several pieces, one short
    mask = p.dense_mask(n, n, causal).tolist()
    lines = range(math.ceil(n / block))
    expected = []
    for r in lines:
        for c in lines:
            inside = [
                mask[t][j]
                for t in range(r * block, min(n, r * block + block))
                for j in range(c * block, min(n, c * block + block))
            ]
            expected.append(2 if all(inside) else 1 if any(inside) else 0)
    found = p.blocks(n, block, causal)
    assert found.flatten().tolist() == expected and found.shape == (len(lines), len(lines))

    stats = p.statistics(n, block=block, causal=causal, heads=3, head_dim=32, batch=2)
    assert stats.visible == sum(map(sum, mask))
    assert (stats.full, stats.partial) == (expected.count(2), expected.count(1))
    everything = sum(1 for t in range(n) for j in range(n) if j <= t or not causal)
    assert stats.dense_visible == everything
    assert stats.density == pytest.approx(stats.visible / everything)
    dense = len(lines) * (len(lines) + 1) // 2 if causal else len(lines) ** 2
    assert stats.dense_blocks == dense
    assert stats.block_density == pytest.approx(stats.touched / dense)
    one_score = 2 * 3 * 32 * 4  # batch, heads, two products of head_dim multiply-adds
    assert stats.useful_flops == one_score * stats.visible
    assert stats.costs["naive"].flops == stats.costs["sdpa"].flops == one_score * n * n
    assert stats.costs["blocks"].flops == one_score * stats.touched * block * block
    assert stats.costs["dense"].flops == one_score * dense * block * block
    assert stats.to_dict()["costs"]["naive"]["read"] == stats.costs["naive"].read


def test_matrix_is_the_same_in_pieces(monkeypatch):
    whole = Hierarchical(4, 3).dense_mask(N, 50, True)
    monkeypatch.setattr(patterns.masks, "_AT_ONCE", 400)
    assert torch.equal(whole, Hierarchical(4, 3).dense_mask(N, 50, True))


def test_block_mask_is_the_one_that_torch_makes_of_all_scores():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    p = Local(60)
    ours = p.block_mask(90, 70, True, block=16)  # blocks jut out over both edges

    def mask_mod(b, h, t, j):
        return p.allowed(t - 20, j) & (j <= t - 20)

    theirs = flex.create_block_mask(mask_mod, None, None, 90, 70, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.full_kv_num_blocks.sum() > 0
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(m, f"{kind}_num_blocks")[0, 0] for m in (ours, theirs)]
        which = [getattr(m, f"{kind}_indices")[0, 0].tolist() for m in (ours, theirs)]
        assert torch.equal(*counts)
        for row, count in enumerate(counts[0].tolist()):
            assert sorted(which[0][row][:count]) == sorted(which[1][row][:count])


def test_five_percent_at_random_touch_every_block_and_a_grid_of_blocks_does_not():
    n, block = 1024, 32
    scattered = Random(n // 20).statistics(n, block=block)
    grid = Random(1).in_blocks(block).statistics(n, block=block)
    assert scattered.density == pytest.approx(0.05, rel=0.05)
    assert scattered.block_density == 1.0
    assert grid.density == pytest.approx(2 / 32, rel=0.1)
    assert grid.block_density == pytest.approx(grid.density)
    assert scattered.costs["blocks"].flops == scattered.costs["sdpa"].flops
    assert grid.costs["blocks"].flops < 0.07 * grid.costs["sdpa"].flops


@pytest.mark.parametrize("draws", [1, 4, 16])
def test_expected_block_density_is_about_what_is_counted(draws):
    n, block = 1024, 8
    counted = (Random(draws, seed=3).blocks(n, block) > 0).double().mean().item()
    expected = patterns.expected_block_density(draws / n, block)
    expected += (1 - expected) * block / n  # the own keys touch the blocks on the diagonal
    # One draw in each stretch is a little more even than free draws.
    assert counted == pytest.approx(expected, rel=0.06)


def test_costs_of_a_matrix_do_not_depend_on_the_pattern_and_those_of_blocks_do():
    options = {"heads": 4, "head_dim": 32, "block": 16, "causal": True}
    few, many = Local(16).statistics(256, **options), Local(128).statistics(256, **options)
    assert few.costs["naive"] == many.costs["naive"] and few.costs["sdpa"] == many.costs["sdpa"]
    assert few.costs["blocks"].tiles < many.costs["blocks"].tiles < many.costs["dense"].tiles
    assert few.costs["naive"].held == 2 * 4 * 256**2 * 2 + 256**2
    assert "scores seen" in str(few) and "naive" in str(few)


def test_what_naive_holds_is_what_a_trace_finds():
    from labkit.patterns import attention
    from labkit.shapes import check_qkv

    shape = (2, 3, 40, 16)
    q, k, v = (torch.randn(shape, dtype=torch.float16) for _ in range(3))
    mask = Local(5).dense_mask(40)
    sizes = check_qkv(q, k, v)
    held = Local(5).statistics(40, heads=3, head_dim=16, batch=2, block=8).costs["naive"].held
    with torch.no_grad():
        found = trace(lambda q, k, v, m: attention._naive(q, k, v, (m, None), sizes, 0.25),
                      q, k, v, mask)  # fmt: skip
    # the negated matrix lives beside S and the masked S; the matrix itself came in
    assert found.peak == held


# -- five ways, one result -------------------------------------------------------------------------


def by_the_book(q, k, v, mask, scale=None):
    """O with KV heads repeated and hidden scores left out of the sums, in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    blind = ~mask.any(1)[:, None]
    s = torch.where(mask | blind, s, torch.full_like(s, -math.inf))
    p = torch.softmax(s, -1) * (~blind).to(s.dtype)
    return torch.einsum("bhij,bhjd->bhid", p, v)


def draw(n_q=N, n_k=N, heads=2, kv_heads=2, dtype=torch.float32, device="cpu", d=16, d_v=16):
    made = {"dtype": dtype, "device": device}
    torch.manual_seed(n_q + n_k)
    q, dout = torch.randn(2, heads, n_q, d, **made), torch.randn(2, heads, n_q, d_v, **made)
    k, v = (torch.randn(2, kv_heads, n_k, width, **made) for width in (d, d_v))
    return q, k, v, dout


def check(p, how, *, causal=True, backward=True, scale=None, block=16, reorder=False, **sizes):
    q, k, v, dout = draw(**sizes)
    mask = p.dense_mask(q.shape[2], k.shape[2], causal, q.device)

    def run(fn, *tensors):
        leaves = [x.detach().clone().requires_grad_(backward) for x in tensors]
        out = fn(*leaves)
        grads = torch.autograd.grad(out, leaves, dout.to(out.dtype)) if backward else ()
        return [out.detach(), *grads]

    options = {"how": how, "causal": causal, "scale": scale, "block": block, "reorder": reorder}
    ours = run(lambda *x: pattern_attention(*x, p, **options), q, k, v)
    book = functools.partial(by_the_book, mask=mask, scale=scale)
    plain, true = run(book, q, k, v), run(book, q.double(), k.double(), v.double())
    for name, *three in zip(("O", "dq", "dk", "dv"), ours, true, plain, strict=False):
        factor = 2.0 if name == "O" else 3.0
        assert_within_low_precision_error(*three, factor=factor, what=f"{how} {p}: {name}")


@pytest.mark.parametrize("how", ["naive", "sdpa", "blocks"])
@pytest.mark.parametrize("p", ALL, ids=repr)
def test_every_way_gives_the_result_and_its_gradients(p, how):
    check(p, how, causal=True)


@pytest.mark.parametrize("how", ["naive", "sdpa", "blocks"])
def test_every_way_takes_groups_widths_lengths_scales_and_half_precision(how):
    check(Local(9), how, causal=False, n_q=40, heads=4, d_v=8, scale=0.5)
    check(Hierarchical(4, 2), how, n_k=90, heads=6, dtype=torch.float64)
    check(Random(7), how, dtype=torch.float16)
    check(Strided(9, 3), how, dtype=torch.bfloat16, n_q=1)


def test_flex_gives_the_same_on_a_cpu_forward():
    check(Random(6, 3), "flex", backward=False, heads=4, n_q=90)  # 20 rows see nothing


def test_window_kernel_gives_the_same():
    pytest.importorskip("triton")
    check(Local(9), "window", n_q=17, n_k=20, heads=2, kv_heads=1)


@pytest.mark.parametrize("how", ["naive", "blocks"])
def test_tokens_brought_together_give_the_same_attention(how):
    check(Clustered(5), how, reorder=True)


@dataclass(frozen=True)
class Odd(Pattern):
    """A reader's own pattern, in which even queries see nothing."""

    def allowed(self, i, j, keys=None):
        return (i % 2 == 1) & (j < 20)


@pytest.mark.parametrize("how", ["naive", "sdpa", "blocks"])
@pytest.mark.parametrize(
    ("p", "n_q", "blind"), [(Odd(), N, slice(0, None, 2)), (Local(9), 110, slice(0, 40))]
)
def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient(p, n_q, blind, how):
    *leaves, dout = draw(n_q)
    for x in leaves:
        x.requires_grad_()
    out = pattern_attention(*leaves, p, how=how, causal=True, block=16)
    assert (out[:, :, blind] == 0).all() and torch.isfinite(out).all() and (out != 0).any()
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    assert (dq[:, :, blind] == 0).all() and (dq != 0).any()
    assert all(torch.isfinite(x).all() for x in (dk, dv))


def test_by_name_it_is_the_pattern_with_its_defaults():
    q, k, v, _ = draw()
    for name, cls in PATTERNS.items():
        assert patterns.pattern(name) == cls() and cls.name == name
        assert torch.equal(
            pattern_attention(q, k, v, name), pattern_attention(q, k, v, cls(), how="sdpa")
        )
    p = Random(3)
    assert patterns.pattern(p) is p


# -- what is kept ----------------------------------------------------------------------------------


def test_a_matrix_is_made_once_and_let_go(monkeypatch):
    from labkit.patterns import attention

    made = []
    original = attention.masks.dense_mask
    monkeypatch.setattr(
        attention.masks, "dense_mask", lambda *a, **o: made.append(a) or original(*a, **o)
    )
    patterns.clear_masks()
    q, k, v, _ = draw()
    for _ in range(3):
        pattern_attention(q, k, v, Local(9))
    assert len(made) == 1
    pattern_attention(q, k, v, Local(9), causal=True)
    assert len(made) == 2
    patterns.clear_masks()
    pattern_attention(q, k, v, Local(9))
    assert len(made) == 3
    for window in range(1, 20):
        pattern_attention(q, k, v, Local(window))
    assert len(attention._made_before) == attention._KEPT


def test_blocks_keep_nothing_of_the_size_of_their_scores():
    n, kept = 256, []

    def pack(t):
        kept.append(t.numel())
        return t

    q, k, v, _ = draw(n, n)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pattern_attention(q.requires_grad_(), k, v, Random(6), how="blocks", block=32)
    assert max(kept) == q.numel() < 2 * 2 * n * n / 8
    assert sum(kept) == 4 * q.numel() + q.numel() // q.shape[-1]  # q, k, v, O and the LSE


def test_scores_of_blocks_do_not_overflow_in_float16():
    q, k, v, _ = (x.half() for x in draw())
    q, k = 200 * q, 200 * k
    out = pattern_attention(q, k, v, Random(6), how="blocks", block=16)
    assert not torch.isfinite((q @ k.mT) * 0.25).all() and torch.isfinite(out).all()
    assert pattern_attention(q, k, v, Random(6), how="naive").isnan().any()
    with torch.autocast("cpu", torch.float16):  # what it adds up in is not autocast's choice
        wide = pattern_attention(q.float(), k.float(), v.float(), Random(6), how="blocks", block=16)
    assert torch.equal(wide.half(), out)


def test_derivatives_of_a_function_go_through_blocks():
    patterns.clear_masks()
    p, (q, k, v, dout) = Random(4), draw()

    def value(q, k, v):
        return (pattern_attention(q, k, v, p, how="blocks", causal=True, block=16) * dout).sum()

    found = torch.func.grad(value, argnums=(0, 1, 2))(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for a, b in zip(found, torch.autograd.grad(value(*leaves), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "how", "spoilt"),
    [
        ("v", "naive", (0, 96)),
        ("v", "sdpa", (0, 96)),
        ("v", "blocks", (16, 48)),  # the rows of blocks 1 and 2 read block 1
        ("k", "naive", (20, 29)),  # a hidden score is overwritten, and not added to
        ("k", "blocks", (20, 29)),
        ("q", "naive", (20, 21)),
        ("q", "sdpa", (20, 21)),
        ("q", "blocks", (20, 21)),
    ],
)
def test_a_nan_reaches_the_rows_that_the_way_says(name, how, spoilt):
    tensors = dict(zip("qkv", draw(96, 96), strict=False))
    tensors[name][:, :, 20] = math.nan
    out = pattern_attention(**tensors, pattern=Local(9), how=how, causal=True, block=16)
    rows = out.isnan().all(-1)[0, 0].nonzero().flatten().tolist()
    assert rows == list(range(*spoilt))


def test_blocks_cannot_be_traced_without_data():
    q, k, v, _ = draw()
    with pytest.raises(ArgumentError, match=r'without data.*how="sdpa"'):
        trace(lambda q: pattern_attention(q, k, v, Local(9), how="blocks"), q)


def test_a_matrix_made_in_inference_mode_serves_training_and_a_fake_one_is_not_kept():
    patterns.clear_masks()
    q, k, v, dout = draw()
    with torch.inference_mode():
        pattern_attention(q, k, v, Local(9))
    q.requires_grad_()
    assert torch.autograd.grad(pattern_attention(q, k, v, Local(9)), q, dout)[0].abs().sum() > 0
    patterns.clear_masks()
    assert trace(lambda q: pattern_attention(q, q, q, Local(9)), q.detach()).peak > 0
    assert torch.isfinite(pattern_attention(q, k, v, Local(9))).all()


@pytest.mark.parametrize("how", ["naive", "blocks"])
@pytest.mark.parametrize("pattern", [Local(9), Clustered(assignment=[0, 1, 2] * 16)], ids=str)
@pytest.mark.parametrize("place", ["inference", "fake", "grad"])
def test_what_is_made_in_passing_is_not_kept(place, pattern, how):
    """Tensors of another world are no use in this one, nor the other way round."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from labkit.patterns import attention, definitions

    reorder = isinstance(pattern, Clustered)

    def attend(q):
        return pattern_attention(q, q, q, pattern, how=how, block=16, reorder=reorder).sum()

    def elsewhere():
        if place == "inference":
            with torch.inference_mode():
                attend(torch.randn(1, 2, 48, 16))
        elif place == "grad":
            torch.func.grad(attend)(torch.randn(1, 2, 48, 16))
        elif how == "naive":  # of blocks a fake tensor is refused
            with FakeTensorMode():
                attend(torch.randn(1, 2, 48, 16))

    patterns.clear_masks()
    definitions._kept_table.cache_clear()
    elsewhere()
    q = torch.randn(1, 2, 48, 16, requires_grad=True)
    assert torch.autograd.grad(attend(q), q)[0].isfinite().all()
    elsewhere()
    held = [x for made in attention._made_before.values() for x in made]
    held += [t for line in held if isinstance(line, tuple) for t in line]
    tensors = [x for x in held if isinstance(x, torch.Tensor)]
    assert tensors and not any(x.is_inference() for x in tensors)
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    assert {type(x) for x in tensors} == {torch.Tensor}


def test_importing_loads_neither_torch_nor_triton_and_masks_not_the_compiler():
    code = (
        "import sys, labkit.patterns; print('torch' in sys.modules, 'triton' in sys.modules)\n"
        "from labkit.patterns import attention, masks; print('torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False", "False"]
    assert set(patterns.__all__) <= set(dir(patterns))
    assert all(getattr(patterns, name) is not None for name in patterns.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Lokal'"):
        _ = patterns.Lokal


def test_it_is_part_of_a_compiled_graph():
    p, q = Random(6, 3), torch.randn(1, 2, 64, 16)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend(q):
        return pattern_attention(q, q, q, p, causal=True) * 2

    expected = pattern_attention(q, q, q, p, how="naive", causal=True) * 2
    assert torch.allclose(attend(q), expected, atol=1e-5)


@pytest.mark.parametrize("how", ["blocks", "flex"])
def test_lists_of_blocks_are_made_once_for_a_graph(how, monkeypatch):
    pytest.importorskip("torch.nn.attention.flex_attention")
    made, counts, p = [], patterns.masks.counts, Strided(5, 3)
    monkeypatch.setattr(patterns.masks, "counts", lambda *a: made.append(a[1]) or counts(*a))
    patterns.clear_masks()
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def attend(q, k, v):
        return pattern_attention(q, k, v, p, how=how, causal=True, block=16)

    with torch.set_grad_enabled(how == "blocks"):
        lengths = (16, 16, 32) if how == "blocks" else (16, 16)
        for n in lengths:  # the second length is a symbol to the compiler
            q, k, v, dout = draw(n, n)
            q.requires_grad_(how == "blocks")
            out = attend(q, k, v)
            expected = pattern_attention(q, k, v, p, how="naive", causal=True)
            torch.testing.assert_close(out, expected)
            if how == "blocks":
                ours, theirs = (torch.autograd.grad(o, q, dout)[0] for o in (out, expected))
                torch.testing.assert_close(ours, theirs)
    assert made == list(dict.fromkeys(lengths))
    torch._dynamo.reset()


def test_a_constant_is_marked_as_torch_marks_it():
    ours = patterns.masks.constant(lambda: 0)
    theirs = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(theirs) != {}


def test_a_pattern_that_is_made_inside_of_a_compiled_graph_has_its_parameters():
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def attend(q, k, v, window):
        near = Blocked(Local(window), 4)
        return [pattern_attention(q, k, v, near, how=how, block=16) for how in ("blocks", "flex")]

    q, k, v, _ = draw(16, 16)
    for window in (1, 2):  # the second is a symbol to the compiler
        expected = pattern_attention(q, k, v, Local(window).in_blocks(4), how="naive")
        for out in attend(q, k, v, window):
            torch.testing.assert_close(out, expected)
    torch._dynamo.reset()


# -- what is refused -------------------------------------------------------------------------------

X = torch.zeros(1, 2, 8, 16)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: patterns.pattern("lokal"), "Did you mean 'local'"),
        (lambda: patterns.pattern(256), "hierarchical"),
        (lambda: pattern_attention(X, X, X, "local", how="sparse"), "naive, sdpa, blocks, flex"),
        (lambda: pattern_attention(X, X, X, Random(2), how="window"), 'how="flex"'),
        (lambda: pattern_attention(X, X, X, Random(2), reorder=True), "in_blocks"),
        (lambda: pattern_attention(X[:, :, :4], X, X, Clustered(2), reorder=True), "Leave it out"),
        (lambda: pattern_attention(X, X, X, Clustered(assignment=[0, 1])), "assigns 2 tokens"),
        (lambda: pattern_attention(X, X, X, "local", block=0), "block = 0"),
        (lambda: Clustered(3).reordered(9).dense_mask(8), "orders 9 tokens"),
        (lambda: Local(0), "window = 0"),
        (lambda: Strided(4, -1), "window = -1"),
        (lambda: Random(1.5), "per_row = 1.5"),
        (lambda: Random(3, seed=-1), "seed = -1"),
        (lambda: Clustered(assignment=[0.5]), "integer for each key"),
        (lambda: Clustered(assignment=[]), "integer for each key"),
        (lambda: Hierarchical(64, 30), "fewer levels"),
        (lambda: Local(4).in_blocks(0), "block = 0"),
        (lambda: Blocked("local"), "is not a pattern"),
        (lambda: patterns.Reordered("local", (0, 1)), "is not a pattern"),
        (lambda: patterns.Reordered(Local(2), (0, 0)), "not an order of tokens"),
        (lambda: patterns.Reordered(Local(2), (0, 2)), "not an order of tokens"),
        (lambda: patterns.Reordered(Local(2), ()), "Name each of"),
        (lambda: patterns.Reordered(Local(2), 3), "tokens = 3"),
        (lambda: patterns.Reordered(Local(2), "ab"), "not an order of tokens"),
        (lambda: Random(4).allowed(0, 1), "allowed(i, j, keys)"),
        (lambda: Random(2**20).dense_mask(4, 2**20), "32 bits"),
        (lambda: Local(4).statistics(0), "seq_len = 0"),
        (lambda: Local(4).statistics(8, dtype="fp12"), "dtype"),
        (lambda: patterns.expected_block_density(1.2, 8), "share"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(call, says):
    with pytest.raises(ArgumentError) as refusal:
        call()
    assert says in str(refusal.value)


def test_flex_says_on_a_cpu_what_has_a_backward_pass():
    x = X.clone().requires_grad_()
    with pytest.raises(ArgumentError, match='how="blocks"'):
        pattern_attention(x, x, x, "local", how="flex")


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", list(HOWS))
@pytest.mark.parametrize("p", [Local(70), Random(30), Clustered(4).in_blocks(64)], ids=repr)
def test_every_way_on_a_gpu(p, how, dtype):
    if how == "window" and not isinstance(p, Local):
        pytest.skip("a window is local")
    check(p, how, n_q=600, n_k=600, d=64, d_v=64, dtype=dtype, device="cuda", block=128)


@pytest.mark.gpu
def test_rows_that_see_nothing_on_a_gpu():
    for how in HOWS:
        check(Local(70), how, n_q=640, n_k=400, d=64, d_v=64, dtype=torch.float16,
                device="cuda", block=128)  # fmt: skip


@pytest.mark.gpu
def test_more_patterns_than_the_compiler_keeps_by_default():
    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.float16)
    for window in range(20, 32):
        out = pattern_attention(q, q, q, Local(window), how="flex", causal=True)
        expected = pattern_attention(q, q, q, Local(window), how="naive", causal=True)
        assert (out - expected).abs().max() < 1e-2 * expected.abs().max()
