"""Softmax without the whole row: the state, its merge, attention by tiles, low precision."""

from __future__ import annotations

import itertools
import math
import random

import oracle
import pytest
import torch

from labkit import memory
from labkit.errors import ArgumentError
from labkit.naive import naive_attention
from labkit.online_softmax import (
    FinishStep,
    State,
    TileStep,
    attention_tiles,
    finish,
    identity,
    merge,
    merge_outputs,
    online_softmax,
    overflows_above,
    running_normalizer,
    safe_softmax,
    stagnates_at,
    tiled_attention,
    unsafe_softmax,
    update,
)

F64 = torch.float64
LENGTHS = [1, 2, 5, 17, 97, 127, 128, 129, 257]
PAIRS = [(1, 239), (239, 1), (3, 799), (5, 7), (7, 5), (129, 64)]
#: block_m, block_n: smaller than, equal to, larger than the lengths, not dividing them
BLOCKS = [(1, 1), (5, 3), (16, 64), (64, 16), (512, 512)]
MASKS = [
    {"causal": False}, {"causal": True}, {"causal": True, "window": 1},
    {"causal": True, "window": 5}, {"causal": False, "window": 1}, {"causal": False, "window": 6},
]  # fmt: skip


def inputs(n_q, n_k, *, heads=2, kv_heads=1, d=8, dv=5, dtype=F64, batch=2):
    q = torch.randn(batch, heads, n_q, d, dtype=F64)
    k = torch.randn(batch, kv_heads, n_k, d, dtype=F64)
    v = torch.randn(batch, kv_heads, n_k, dv, dtype=F64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def close(a, b, tolerance=1e-12):
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# -- softmax of a row ---------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 30, 1000])
@pytest.mark.parametrize("block", [1, 3, 64, 1000])
def test_safe_and_online_are_softmax(size, block):
    x = torch.randn(3, 4, 57, dtype=F64) * size
    assert close(safe_softmax(x), torch.softmax(x, -1))
    assert close(online_softmax(x, block=block), torch.softmax(x, -1))


def test_unsafe_is_softmax_until_it_overflows():
    x = torch.randn(4, 9, dtype=F64)
    assert close(unsafe_softmax(x), torch.softmax(x, -1))
    assert unsafe_softmax(x + 800).isnan().all()
    assert unsafe_softmax(x - 800).isnan().all(), "0 / 0"


@pytest.mark.parametrize("softmax", [safe_softmax, online_softmax])
def test_a_row_that_is_all_hidden_is_zero_and_the_others_do_not_notice(softmax):
    x = torch.randn(5, 6, dtype=F64)
    x[2] = -math.inf
    x[3, :4] = -math.inf
    p = softmax(x)
    assert p[2].abs().max() == 0
    assert close(p[[0, 1, 3, 4]], torch.softmax(x, -1)[[0, 1, 3, 4]])


def test_running_normalizer_is_right_after_every_block():
    x = torch.randn(3, 20, dtype=F64)
    for block in (1, 6, 20):
        states = list(running_normalizer(x, block=block))
        assert len(states) == math.ceil(20 / block)
        for n, (m, total) in enumerate(states, start=1):
            seen = x[:, : n * block]
            assert torch.equal(m, seen.amax(-1))
            assert close(m + total.log(), seen.logsumexp(-1))


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_bad_block_is_named(bad):
    with pytest.raises(ArgumentError, match=r"block = "):
        list(running_normalizer(torch.zeros(3), block=bad))


def test_a_row_without_scores_is_refused():
    with pytest.raises(ArgumentError, match=r"x\.shape"):
        list(running_normalizer(torch.zeros(2, 0)))


# -- the state ------------------------------------------------------------------------------
def state_of(S, V):
    return update(
        identity(*S.shape[:-1], head_dim_v=V.shape[-1], dtype=S.dtype), S, V
    )


def test_a_state_is_what_its_docstring_says():
    S, V = torch.randn(2, 3, 7, dtype=F64), torch.randn(2, 7, 4, dtype=F64)
    state = state_of(S, V)
    m = S.amax(-1)
    assert torch.equal(state.m, m)
    assert close(state.l, (S - m[..., None]).exp().sum(-1))
    assert close(state.O, (S - m[..., None]).exp() @ V)


def test_update_is_merge_with_the_state_of_the_block():
    S, V = torch.randn(3, 12, dtype=F64) * 5, torch.randn(12, 4, dtype=F64)
    first = state_of(S[:, :5], V[:5])
    a, b = update(first, S[:, 5:], V[5:]), merge(first, state_of(S[:, 5:], V[5:]))
    assert torch.equal(a.m, b.m) and close(a.l, b.l) and close(a.O, b.O)


def test_state_holds_dv_plus_two_numbers_a_row():
    state = state_of(torch.randn(6, 500), torch.randn(500, 16))
    assert sum(t.numel() for t in (state.m, state.l, state.O)) == 6 * (16 + 2)


def test_merging_nothing_with_nothing_is_nothing_and_finishes_to_zero():
    nothing = identity(4, head_dim_v=3)
    for state in (merge(nothing, nothing), update(nothing, torch.full((4, 2), -math.inf),
                                                  torch.randn(2, 3))):
        assert torch.isneginf(state.m).all()
        assert state.l.abs().max() == 0 and state.O.abs().max() == 0
        out, lse = finish(state)
        assert out.abs().max() == 0 and torch.isneginf(lse).all()


def test_a_hidden_row_waits_for_its_first_score():
    """The row that has seen nothing yet, beside one that has: both must come out right."""
    S = torch.tensor([[-math.inf, -math.inf, 2.0, 1.0], [3.0, 1.0, -math.inf, -math.inf]])
    V = torch.randn(4, 3)
    a, b = state_of(S[:, :2], V[:2]), state_of(S[:, 2:], V[2:])
    for state in (merge(a, b), merge(b, a), update(a, S[:, 2:], V[2:])):
        out, lse = finish(state)
        assert close(out, torch.softmax(S, -1) @ V, 1e-6)
        assert close(lse, S.logsumexp(-1), 1e-6)


def test_scores_far_apart_neither_overflow_nor_vanish():
    S = torch.tensor([[-3e4, 3e4, 3e4 - 1]], dtype=F64)
    V = torch.tensor([[1.0], [2.0], [4.0]], dtype=F64)
    for order in itertools.permutations(range(3)):
        state = identity(1, head_dim_v=1, dtype=F64)
        for j in order:
            state = update(state, S[:, j : j + 1], V[j : j + 1])
        out, lse = finish(state)
        assert close(out, torch.softmax(S, -1) @ V) and close(lse, S.logsumexp(-1))


def test_nan_stays_in_its_row():
    S, V = torch.randn(4, 6, dtype=F64), torch.randn(6, 2, dtype=F64)
    S[1, 4] = math.nan
    a, b = state_of(S[:, :3], V[:3]), state_of(S[:, 3:], V[3:])
    for state in (merge(a, b), merge(b, a), update(a, S[:, 3:], V[3:])):
        out, lse = finish(state)
        assert out[1].isnan().all() and lse[1].isnan()
        assert close(out[[0, 2, 3]], (torch.softmax(S, -1) @ V)[[0, 2, 3]])


def test_merge_outputs_merges_finished_pieces():
    S, V = torch.randn(3, 20, dtype=F64) * 4, torch.randn(20, 5, dtype=F64)
    S[1, :8] = -math.inf  # a row that one piece does not see
    S[2] = -math.inf  # and one that no piece sees
    cuts = [(0, 8), (8, 9), (9, 20)]
    pieces = [finish(state_of(S[:, a:b], V[a:b])) for a, b in cuts]
    out, lse = merge_outputs(*(torch.stack(t) for t in zip(*pieces, strict=True)))
    assert close(out[:2], (torch.softmax(S, -1) @ V)[:2])
    assert close(lse[:2], S.logsumexp(-1)[:2])
    assert out[2].abs().max() == 0 and torch.isneginf(lse[2])


# -- attention by tiles ---------------------------------------------------------------------
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_tiles_are_attention_at_every_length(n, mask):
    q, k, v = inputs(n, n)
    right, scores, _ = oracle.attention_f64(q, k, v, **mask)
    for block_m, block_n in BLOCKS[2:] if n > 17 else BLOCKS:
        out, lse = tiled_attention(
            q, k, v, block_m=block_m, block_n=block_n, return_lse=True, **mask
        )
        assert close(out, right) and close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), PAIRS)
def test_tiles_are_attention_where_lengths_differ(n_q, n_k, mask):
    q, k, v = inputs(n_q, n_k)
    right, scores, _ = oracle.attention_f64(q, k, v, **mask)
    dead = torch.isneginf(scores).all(-1)
    for block_m, block_n in BLOCKS[1:]:
        out, lse = tiled_attention(
            q, k, v, block_m=block_m, block_n=block_n, return_lse=True, **mask
        )
        assert close(out, right)
        assert out[dead].numel() == 0 or out[dead].abs().max() == 0
        assert torch.equal(torch.isneginf(lse), dead)
        assert close(lse[~dead], scores.logsumexp(-1)[~dead])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_groups_share_their_kv_head(heads, kv_heads):
    q, k, v = inputs(11, 13, heads=heads, kv_heads=kv_heads)
    right, _, _ = oracle.attention_f64(q, k, v, causal=True)
    assert close(tiled_attention(q, k, v, block_m=4, block_n=3, causal=True), right)


def test_strided_views_and_a_scale_of_ones_own():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(9, 9, kv_heads=2))
    assert not q.is_contiguous()
    right, _, _ = oracle.attention_f64(q, k, v, scale=0.5)
    assert close(tiled_attention(q, k, v, block_m=2, block_n=4, scale=0.5), right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 100])
def test_error_is_at_most_that_of_plain_attention(dtype, causal, size):
    q, k, v = inputs(129, 129, d=64, dv=64, dtype=dtype)
    q = q * size
    right, _, _ = oracle.attention_f64(q, k, v, causal=causal)
    plain, _, _ = oracle.attention(q, k, v, causal=causal)
    for p_dtype in (None, dtype):
        out = tiled_attention(q, k, v, block_m=32, block_n=32, causal=causal, p_dtype=p_dtype)
        assert out.dtype == dtype
        if plain.isfinite().all():
            oracle.assert_within_low_precision_error(out, right, plain)
        else:  # q·k alone is beyond float16, and plain attention has lost it
            assert dtype == torch.float16 and size == 100
            bound = 8 * torch.finfo(dtype).eps * right.abs().max()
            assert (out.double() - right).abs().max() <= bound


def test_what_is_accumulated_in_is_what_was_asked_for():
    q, k, v = inputs(5, 7, dtype=torch.float16)
    for accumulate, wide in ((None, torch.float32), (F64, F64), (torch.float16, torch.float16)):
        steps = list(attention_tiles(q, k, v, block_n=2, accumulate=accumulate))
        for step in steps:
            state = step.before
            assert {state.m.dtype, state.l.dtype, state.O.dtype} == {wide}
        out, lse = tiled_attention(q, k, v, accumulate=accumulate, return_lse=True)
        assert (out.dtype, lse.dtype) == (torch.float16, wide)
    assert tiled_attention(*inputs(5, 7), return_lse=True)[1].dtype == F64


def test_p_is_rounded_only_where_asked():
    q, k, v = inputs(33, 65, dtype=torch.float32)
    exact = tiled_attention(q, k, v, block_n=16)
    rounded = tiled_attention(q, k, v, block_n=16, p_dtype=torch.bfloat16)
    _, lse = tiled_attention(q, k, v, block_n=16, return_lse=True)
    _, same = tiled_attention(q, k, v, block_n=16, p_dtype=torch.bfloat16, return_lse=True)
    error = (rounded - exact).abs().max()
    assert 1e-4 < error < 2**-8 * v.abs().max()
    assert torch.equal(lse, same), "ℓ is summed before the rounding"


# -- what the generator yields ----------------------------------------------------------------
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(12, 12), (5, 14), (14, 5)])
def test_a_tile_is_visited_if_and_only_if_it_holds_a_visible_score(n_q, n_k, mask):
    q, k, v = inputs(n_q, n_k)
    hidden = oracle.hidden_pairs(n_q, n_k, **mask)
    for block_m, block_n in ((1, 1), (5, 3), (4, 4), (3, 7), (20, 20)):
        wanted = {
            (i // block_m, j // block_n)
            for i, j in itertools.product(range(n_q), range(n_k))
            if not hidden[i, j]
        }
        steps = list(attention_tiles(q, k, v, block_m=block_m, block_n=block_n, **mask))
        visits = [(s.i, s.j) for s in steps if isinstance(s, TileStep)]
        assert sorted(visits) == sorted(wanted)
        finished = [s.i for s in steps if isinstance(s, FinishStep)]
        assert finished == list(range(math.ceil(n_q / block_m)))


def test_steps_hold_the_algorithm():
    q, k, v = inputs(7, 9, heads=4, kv_heads=2)
    _, scores, _ = oracle.attention_f64(q, k, v, causal=True)
    state = None
    for step in attention_tiles(q, k, v, block_m=3, block_n=4, causal=True):
        if isinstance(step, FinishStep):
            assert step.before is state
            out, lse = finish(step.before)
            assert torch.equal(step.O, out) and torch.equal(step.LSE, lse)
            state = None
            continue
        assert close(step.S, scores[:, :, step.rows, step.keys])
        if state is None:
            assert torch.isneginf(step.before.m).all() and step.alpha.abs().max() == 0
        else:
            assert step.before is state
            assert close(step.alpha, (step.before.m - step.after.m).exp())
        p = (step.S - step.after.m[..., None]).exp()
        assert close(step.after.l, step.alpha * step.before.l + p.sum(-1))
        values = v[:, :, step.keys].repeat_interleave(2, dim=1)
        assert close(step.after.O, step.alpha[..., None] * step.before.O + p @ values)
        state = step.after


def test_any_order_of_key_blocks_gives_the_same_attention():
    q, k, v = inputs(9, 50)
    right, _, _ = oracle.attention_f64(q, k, v, causal=True)
    orders = [random.Random(n).sample(range(10), 10) for n in range(6)]
    for order in [list(range(10))[::-1], *orders]:
        how = {"block_m": 4, "block_n": 5, "causal": True, "order": order}
        assert close(tiled_attention(q, k, v, **how), right)
        visits = [s.j for s in attention_tiles(q, k, v, **how) if isinstance(s, TileStep)]
        assert visits[-10:] == order  # the last queries see every block


def test_skipped_tiles_are_not_read():
    q, k, v = inputs(8, 8)
    k[:, :, 4:], v[:, :, 4:] = math.nan, math.nan
    out = tiled_attention(q, k, v, block_m=4, block_n=4, causal=True)
    right, _, _ = oracle.attention_f64(q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True)
    assert close(out[:, :, :4], right)
    assert out[:, :, 4:].isnan().all()


def test_nan_in_a_query_or_a_key_stays_with_those_who_see_it():
    q, k, v = inputs(10, 10, kv_heads=2)
    right, _, _ = oracle.attention_f64(q, k, v, causal=True)
    q[0, 1, 3] = math.nan
    k[1, 0, 6] = math.nan
    out = tiled_attention(q, k, v, block_m=4, block_n=3, causal=True)
    spoilt = torch.zeros(2, 2, 10, dtype=torch.bool)
    spoilt[0, 1, 3] = True
    spoilt[1, 0, 6:] = True
    assert torch.equal(out.isnan().any(-1), spoilt)
    assert close(out[~spoilt], right[~spoilt])


# -- gradients ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n_q", "n_k", "mask"),
    [(5, 5, {}), (3, 7, {"causal": True}), (6, 3, {"causal": True}), (6, 6, {"window": 2})],
)
def test_gradcheck(n_q, n_k, mask):
    leaves = [t.requires_grad_() for t in inputs(n_q, n_k, d=3, dv=2, batch=1)]
    dead = max(0, n_q - n_k) if mask.get("causal") else 0

    def attention(q, k, v):
        out, lse = tiled_attention(q, k, v, block_m=2, block_n=3, return_lse=True, **mask)
        return out, lse[:, :, dead:]  # −∞ has no difference quotient

    assert torch.autograd.gradcheck(attention, leaves)


def test_gradients_of_output_and_lse_are_the_oracles_and_zero_for_dead_rows():
    q, k, v = inputs(9, 6, heads=4, kv_heads=2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = tiled_attention(*leaves, block_m=4, block_n=2, causal=True, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    want = oracle.gradients_f64(*leaves, dout, dlse=dlse, causal=True)
    for a, b in zip(got, want, strict=True):
        assert close(a, b)
    assert got[0][:, :, :3].abs().max() == 0


def test_gradients_are_right_where_two_scores_tie():
    """A derivative through the maximum would have to choose; there is none."""
    q, k, v = inputs(4, 6, batch=1)
    k[:, :, 3] = k[:, :, 1]
    leaves = [t.requires_grad_() for t in (q * 3, k, v)]
    dout = torch.randn(1, 2, 4, 5, dtype=F64)
    steps = list(attention_tiles(*leaves, block_n=2))
    assert not any(s.before.m.requires_grad for s in steps)
    assert steps[-1].before.l.requires_grad
    got = torch.autograd.grad(tiled_attention(*leaves, block_n=2), leaves, dout)
    for a, b in zip(got, oracle.gradients_f64(*leaves, dout), strict=True):
        assert close(a, b)


# -- memory: C11's O(N) -----------------------------------------------------------------------
def peak(function, n, **how):
    empty = [torch.empty(1, 1, n, 64, device="meta") for _ in range(3)]
    return memory.trace(function, *empty, **how).peak


def test_extra_memory_is_linear_in_seq_len_and_naives_is_square():
    tiles = {n: peak(tiled_attention, n, block_m=512, block_n=512) for n in (1024, 2048, 4096)}
    # two rows of 64 and two of LSE per query: O and LSE as pieces and, at the end, as a whole
    per_row = 2 * (64 + 1) * 4
    assert tiles[2048] - tiles[1024] <= 1024 * per_row
    assert tiles[4096] - tiles[2048] <= 2048 * per_row
    naive = {n: peak(naive_attention, n) for n in (1024, 2048, 4096)}
    assert naive[4096] > 3.9 * naive[2048] > 15 * naive[1024]
    assert tiles[4096] < naive[4096] / 16


# -- low precision ------------------------------------------------------------------------------
def test_overflow_starts_where_it_is_said_to():
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        limit = overflows_above(dtype)
        below = torch.tensor(limit * 0.999, dtype=dtype)
        assert torch.exp(below).isfinite()
        assert torch.exp(torch.tensor(limit * 1.005, dtype=dtype)).isinf()
    assert overflows_above(torch.float16) == pytest.approx(11.0899, abs=1e-4)
    assert overflows_above(torch.float16, 4096) == pytest.approx(math.log(65504 / 4096))


def test_float16_softmax_overflows_without_the_maximum_and_not_with_it():
    x = torch.randn(4, 64) * 2 + 12
    right = torch.softmax(x.half().double(), -1)
    assert unsafe_softmax(x.half()).isnan().any()
    for softmax in (safe_softmax, online_softmax):
        error = (softmax(x.half()).double() - right).abs().max()
        assert error < 64 * torch.finfo(torch.float16).eps * right.max()


@pytest.mark.parametrize(
    ("dtype", "at"), [(torch.float16, 2**11), (torch.bfloat16, 2**8), (torch.float32, 2**24)]
)
def test_a_sum_of_ones_stops_where_it_is_said_to(dtype, at):
    assert stagnates_at(dtype) == at
    if at < 10_000:  # add them one by one
        total = torch.zeros((), dtype=dtype)
        for _ in range(at + 100):
            total = total + torch.ones((), dtype=dtype)
        assert total.item() == at
    assert stagnates_at(torch.bfloat16, 64) == 2**14
    assert stagnates_at(torch.float16, 64) == math.inf, "overflows first"


@pytest.mark.parametrize("bad", [0.0, -1.0, 3.0, 0.1])
def test_stagnation_takes_powers_of_two(bad):
    with pytest.raises(ArgumentError, match="step = "):
        stagnates_at(torch.float16, bad)


def test_a_float16_state_stagnates_and_a_float32_state_does_not():
    n = 2560
    q, k = torch.zeros(1, 1, 1, 8).half(), torch.zeros(1, 1, n, 8).half()
    v = torch.ones(1, 1, n, 1).half()
    for accumulate, total in ((torch.float16, 2048), (None, n)):
        _, lse = tiled_attention(q, k, v, block_n=1, accumulate=accumulate, return_lse=True)
        assert lse.item() == pytest.approx(math.log(total), rel=1e-3)


# -- bad input --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 0}, "block_m = 0"),
        ({"block_n": 2.5}, "block_n = 2.5"),
        ({"window": 0}, "window = 0"),
        ({"window": True}, "window = True"),
        ({"scale": -1.0}, "scale = -1.0"),
        ({"accumulate": torch.int32}, "accumulate = torch.int32"),
        ({"p_dtype": "float16"}, "p_dtype = 'float16'"),
        ({"order": [0, 0]}, r"order = \[0, 0\]"),
        ({"order": [0]}, r"order = \[0\]"),
    ],
)
def test_bad_arguments_are_named_at_the_call(change, message):
    q, k, v = inputs(4, 8)
    for function in (tiled_attention, attention_tiles):  # the generator too, before its first step
        with pytest.raises(ArgumentError, match=message):
            function(q, k, v, **{"block_n": 4, **change})


def test_bad_shapes_are_named():
    q, k, v = inputs(4, 8)
    with pytest.raises(ArgumentError, match=r"k\.shape"):
        tiled_attention(q, k[..., :3], v)
    with pytest.raises(ArgumentError, match=r"v\.dtype"):
        tiled_attention(q, k, v.float())


def test_state_is_frozen():
    state = identity(2, head_dim_v=1)
    with pytest.raises(AttributeError):
        state.m = torch.zeros(2)
    assert isinstance(state, State)
