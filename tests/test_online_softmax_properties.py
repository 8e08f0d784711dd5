"""Laws of the (m, ℓ, O) state, on inputs that hypothesis makes up.

The exact laws are checked in float64 up to rounding; commutativity to the bit.
"""

from __future__ import annotations

import itertools
import math

import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.online_softmax import State, finish, identity, merge, merge_outputs, update
from labkit.online_softmax import tiled_attention as tiled

settings.register_profile("lab", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("lab")

F64 = torch.float64
#: scores as they come, far apart, equal, and hidden
SCORES = st.one_of(
    st.floats(-8, 8), st.floats(-3e4, 3e4), st.just(0.0), st.just(-math.inf)
)
VALUES = st.floats(-4, 4)


@st.composite
def rows(draw, keys=None, most=12):
    """S ``[2, n]`` and V ``[n, 2]`` for n keys."""
    n = draw(st.integers(1, most)) if keys is None else keys
    S = draw(st.lists(SCORES, min_size=2 * n, max_size=2 * n))
    V = draw(st.lists(VALUES, min_size=2 * n, max_size=2 * n))
    return torch.tensor(S, dtype=F64).view(2, n), torch.tensor(V, dtype=F64).view(n, 2)


def empty() -> State:
    return identity(2, head_dim_v=2, dtype=F64)


def of(block) -> State:
    return update(empty(), *block)


states = rows().map(of)


def assert_same(a: State, b: State) -> None:
    assert torch.equal(a.m, b.m)
    for x, y, size in ((a.l, b.l, b.l), (a.O, b.O, 4 * b.l[..., None])):
        # O may cancel: its rounding is measured against the sum of absolute values, ≤ 4·ℓ
        assert ((x - y).abs() <= 1e-12 * size).all()


def assert_identical(a: State, b: State) -> None:
    for x, y in ((a.m, b.m), (a.l, b.l), (a.O, b.O)):
        assert torch.equal(x, y)


@given(states, states)
def test_merge_is_commutative_to_the_bit(a, b):
    assert_identical(merge(a, b), merge(b, a))


@given(states, states, states)
def test_merge_is_associative_up_to_rounding(a, b, c):
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(states)
def test_the_empty_state_is_the_identity_to_the_bit(a):
    assert_identical(merge(a, empty()), a)
    assert_identical(merge(empty(), a), a)


@given(states, states)
def test_a_merge_is_finite_and_its_sum_lies_between(a, b):
    c = merge(a, b)
    for x in (c.l, c.O):
        assert torch.isfinite(x).all()
    seen = ~torch.isneginf(c.m)
    assert (c.l[seen] >= 1).all() and (c.l[~seen] == 0).all()
    assert (c.l <= a.l + b.l).all()


@given(rows(), st.data())
def test_any_split_of_the_keys_in_any_order_gives_the_whole(block, data):
    S, V = block
    n = S.shape[1]
    order = data.draw(st.permutations(range(n)))
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=n)) | {0, n})
    pieces = [
        of((S[:, list(part)], V[list(part)]))
        for part in (order[a:b] for a, b in itertools.pairwise(cuts))
    ]
    # any tree of merges: take two neighbours, or not neighbours, until one is left
    while len(pieces) > 1:
        i = data.draw(st.integers(0, len(pieces) - 1))
        a = pieces.pop(i)
        j = data.draw(st.integers(0, len(pieces) - 1))
        pieces[j] = merge(a, pieces[j])
    assert_same(pieces[0], of(block))


@given(rows(), st.data())
def test_updates_one_block_after_another_give_the_whole(block, data):
    S, V = block
    size = data.draw(st.integers(1, S.shape[1]))
    state = empty()
    for part, values in zip(S.split(size, 1), V.split(size, 0), strict=True):
        state = update(state, part, values)
    assert_same(state, of(block))
    out, lse = finish(state)
    dead = torch.isneginf(S).all(-1)
    assert (out[dead] == 0).all() and torch.isneginf(lse[dead]).all()
    live = ~dead
    assert torch.allclose(out[live], (torch.softmax(S, -1) @ V)[live], rtol=1e-12, atol=1e-12)
    assert torch.allclose(lse[live], S.logsumexp(-1)[live], rtol=1e-12, atol=1e-12)


@given(states, st.floats(-1e3, 1e3))
def test_adding_a_constant_to_all_scores_moves_m_and_nothing_else(a, c):
    moved = State(a.m + c, a.l, a.O)
    out, lse = finish(moved)
    same_out, same_lse = finish(a)
    assert torch.equal(out, same_out)
    seen = ~torch.isneginf(a.m)
    assert torch.allclose(lse[seen], same_lse[seen] + c, rtol=1e-12, atol=1e-9)


@given(states, states, states)
def test_finished_pieces_merge_to_the_finished_whole(a, b, c):
    pieces = [finish(x) for x in (a, b, c)]
    out, lse = merge_outputs(*(torch.stack(t) for t in zip(*pieces, strict=True)))
    want, want_lse = finish(merge(a, merge(b, c)))
    # exp(LSE − max) repeats the rounding of LSE, which grows with its size (up to 3e4 here)
    assert torch.allclose(out, want, rtol=1e-10, atol=1e-10)
    seen = ~torch.isneginf(want_lse)
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert torch.allclose(lse[seen], want_lse[seen], rtol=1e-12, atol=1e-10)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 10), st.integers(1, 10)),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 10)),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.integers(0, 2**31),
    st.data(),
)
def test_attention_by_tiles_is_attention(lengths, blocks, causal, window, heads, seed, data):
    (n_q, n_k), (block_m, block_n), (h, h_kv) = lengths, blocks, heads
    torch.manual_seed(seed)
    q = torch.randn(1, h, n_q, 4, dtype=F64)
    k, v = torch.randn(1, h_kv, n_k, 4, dtype=F64), torch.randn(1, h_kv, n_k, 3, dtype=F64)
    order = data.draw(st.permutations(range(-(-n_k // block_n))))
    mask = {"causal": causal, "window": window}
    out, lse = tiled(
        q, k, v, block_m=block_m, block_n=block_n, order=order, return_lse=True, **mask
    )
    right, S, _ = oracle.attention_f64(q, k, v, **mask)
    assert torch.allclose(out, right, rtol=1e-12, atol=1e-12)
    assert torch.allclose(lse, S.logsumexp(-1), rtol=1e-12, atol=1e-12)
