"""The NSA reference family against dense formulations in float64 that share no code with it.

Kernels are tested against this family later, so what is wrong here would be wrong twice.
"""

from __future__ import annotations

import inspect

import nsa_oracle as dense
import pytest
import torch
from oracle import assert_within_low_precision_error, attention_f64

from labkit.errors import ArgumentError
from labkit.nsa import reference
from labkit.nsa.reference import (
    naive_nsa,
    naive_nsa_compression,
    naive_nsa_compression_varlen,
    naive_nsa_with_compression,
)

F64 = torch.float64
LENGTHS = (1, 15, 63, 64, 65, 127)
LONG = (500, 1024, 4097)
GROUPS = (1, 2, 3, 8, 16, 64)
BLOCK_SIZES = (16, 32, 64, 128)
CU = torch.tensor([0, 5, 5, 40, 41, 104])  # shorter than a block, empty, 35, one token, 63


def draw(n, *, m=None, heads=2, group=2, batch=2, d=8, dv=6, dtype=F64, device="cpu"):
    """q, k, v and the three gates, [B, T, heads, D]; gates of both signs."""
    m = n if m is None else m
    shapes = [(batch, m, heads * group, d), (batch, n, heads, d), (batch, n, heads, dv)]
    shapes += [(batch, m, heads * group)] * 3
    return [torch.randn(s, dtype=F64).to(device, dtype) for s in shapes]


def draw_choice(n, block_size, slots, *, m=None, heads=2, batch=2, device="cpu"):
    """Block numbers in any order, also of the future, some slots −1, some blocks named twice."""
    blocks = -(-n // block_size)
    shape = (batch, n if m is None else m, heads, slots)
    return torch.randint(-1, blocks, shape, device=device)


def assert_near(ours, expected, atol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


def swap(x):
    return x.transpose(1, 2)


# -- the whole against dense attention --------------------------------------------------------


@pytest.mark.parametrize(("n", "block_size"), [(1, 16), (15, 16), (65, 64), (127, 32)])
def test_all_blocks_selected_is_dense_causal_attention(n, block_size):
    q, k, v, g, *_ = draw(n)
    every = torch.arange(-(-n // block_size)).expand(2, n, 2, -1)
    ours = naive_nsa(q, k, v, g, None, every, block_size=block_size)
    expected = attention_f64(swap(q), swap(k), swap(v), causal=True)[0]
    assert_near(ours, swap(expected) * g[..., None])


@pytest.mark.parametrize("n", [1, 65, 127])
def test_a_window_of_everything_is_dense_causal_attention(n):
    q, k, v, _, _, g = draw(n)
    none = torch.full((2, n, 2, 1), -1)
    ours = naive_nsa(q, k, v, None, g, none, window_size=n + 7)
    expected = attention_f64(swap(q), swap(k), swap(v), causal=True)[0]
    assert_near(ours, swap(expected) * g[..., None])


# -- one branch at a time ---------------------------------------------------------------------


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n", LENGTHS)
def test_selection_is_attention_under_the_mask_of_its_tokens(n, block_size):
    q, k, v, *_ = draw(n)
    chosen = draw_choice(n, block_size, 4)
    scale = 8**-0.5
    o, lse = reference._selected(q, k, v, chosen, block_size=block_size, scale=scale)
    o_dense, lse_dense, _ = dense.selection(q, k, v, chosen, block_size=block_size)
    assert_near(o, o_dense)
    assert_near(lse, lse_dense)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n", LENGTHS)
def test_compression_is_attention_to_means_under_a_staircase(n, block_size):
    q, k, v, g, *_ = draw(n)
    _, ours = naive_nsa_compression(q, k, v, g, 2, block_size, None)
    o, lse, _ = dense.compression(q, k, v, length=block_size)
    assert_near(ours, g[..., None] * o)
    pooled = reference.pool_mean(k, block_size), reference.pool_mean(v, block_size)
    _, ours_lse, _ = reference._compressed(
        q, *pooled, length=block_size, stride=block_size, scale=8**-0.5, at=torch.arange(n)
    )
    assert_near(ours_lse, lse)


@pytest.mark.parametrize("window_size", [1, 2, 16, 64, 126, 127, 1000])
@pytest.mark.parametrize("n", [1, 65, 127])
def test_the_window_holds_its_own_key_and_w_minus_1_before(n, window_size):
    q, k, v, *_ = draw(n)
    o, lse = reference._window(q, k, v, window_size=window_size, scale=8**-0.5)
    o_dense, lse_dense, _ = dense.window(q, k, v, window_size=window_size)
    assert_near(o, o_dense)
    assert_near(lse, lse_dense)


def test_a_window_of_one_reads_the_value_of_the_own_token():
    q, k, v, *_ = draw(9, group=3)
    o, _ = reference._window(q, k, v, window_size=1, scale=1.0)
    assert_near(o, v.repeat_interleave(3, dim=2))


def test_a_window_of_0_and_a_gate_of_none_turn_a_branch_off():
    q, k, v, g_cmp, g_slc, g_swa = draw(40)
    chosen = draw_choice(40, 16, 2)
    off = naive_nsa(q, k, v, g_slc, g_swa, chosen, block_size=16, window_size=0)
    assert_near(off, naive_nsa(q, k, v, g_slc, None, chosen, block_size=16, window_size=5), 0)
    assert off.abs().max() > 0.1
    nothing = naive_nsa(q, k, v, None, g_swa, chosen, block_size=16)
    assert nothing.shape == off.shape and not nothing.any()
    picked, o_cmp = naive_nsa_compression(q, k, v, None, 2, 16, None)
    assert not o_cmp.any()
    assert torch.equal(picked, naive_nsa_compression(q, k, v, g_cmp, 2, 16, None)[0])


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_size_reads_its_own_kv_head(group):
    q, k, v, g_cmp, g_slc, g_swa = draw(50, group=group, heads=2, batch=1)
    ours, chosen = naive_nsa_with_compression(
        q, k, v, g_cmp, g_slc, g_swa, 3, 16, 10, forced=(0, 1), return_block_indices=True
    )
    assert torch.equal(chosen, dense.choice(q, k, block_counts=3, block_size=16, forced=(0, 1))[0])
    expected = dense.layer(
        q, k, v, g_cmp, g_slc, g_swa, block_indices=chosen, block_size=16, window_size=10
    )
    assert_near(ours, expected)


@pytest.mark.parametrize("scale", [None, 1.0, 0.03])
def test_the_scale_reaches_every_branch_and_the_choice(scale):
    q, k, v, *gates = draw(70)
    ours, chosen = naive_nsa_with_compression(
        q, k, v, *gates, 3, 16, 9, scale, forced=(0, 1), return_block_indices=True
    )
    expected, _ = dense.choice(q, k, block_counts=3, block_size=16, forced=(0, 1), scale=scale)
    assert torch.equal(chosen, expected)
    assert_near(
        ours,
        dense.layer(
            q, k, v, *gates, block_indices=chosen, block_size=16, window_size=9, scale=scale
        ),
    )


# -- the choice of blocks ---------------------------------------------------------------------


@pytest.mark.parametrize("forced", [(1, 2), (0, 1), (2, 3), (0, 2)])
@pytest.mark.parametrize("slots", [1, 2, 4, 16])
def test_the_choice_is_what_sorting_in_python_gives(slots, forced):
    q, k, v, g, *_ = draw(127)
    ours, _ = naive_nsa_compression(q, k, v, g, slots, 16, None, forced=forced)
    expected, score = dense.choice(q, k, block_counts=slots, block_size=16, forced=forced)
    assert ours.dtype == torch.int32 and torch.equal(ours, expected)
    dense.assert_choice_is_best(ours, score, block_size=16, block_counts=slots, forced=forced)


@pytest.mark.parametrize(("length", "stride", "block_size"), [(16, 16, 16), (32, 16, 64)])
def test_importance_is_summed_over_the_group_in_units_of_the_stride(length, stride, block_size):
    q, k, *_ = draw(200, group=3)
    sizes = {"length": length, "stride": stride}
    _, _, p = dense.compression(q, k, k, **sizes)
    ours = reference._importance(
        p.unflatten(1, (2, 3)).permute(0, 3, 1, 2, 4), 200, block_size=block_size, **sizes
    )
    expected = dense.importance(p, 200, 3, block_size=block_size, **sizes)
    assert_near(ours, expected[..., ::block_size])


@pytest.mark.parametrize("n", [*LENGTHS, 200])
def test_the_choice_at_every_length_and_with_counts_for_each_row(n):
    q, k, v, g, *_ = draw(n)
    counts = torch.randint(1, 6, (2, n, 2))
    ours, _ = naive_nsa_compression(q, k, v, g, counts, 16, None)
    expected, _ = dense.choice(q, k, block_counts=counts, block_size=16)
    assert torch.equal(ours, expected)


def test_the_default_chooses_the_first_the_previous_and_the_current_block():
    q, k, v, g, *_ = draw(127)
    ours, _ = naive_nsa_compression(q, k, v, g, 3, 16, None)
    assert ours[0, 100, 0].tolist() == [0, 5, 6]
    assert ours[0, 16, 1].tolist() == [0, 1, -1]
    assert ours[0, 0, 0].tolist() == [0, -1, -1]


@pytest.mark.parametrize(("count", "expected"), [(1, [6]), (2, [5, 6]), (3, [0, 5, 6])])
def test_when_slots_run_short_the_current_block_comes_first(count, expected):
    q, k, v, g, *_ = draw(127)
    ours, _ = naive_nsa_compression(q, k, v, g, count, 16, None)
    assert ours[1, 100, 1].tolist() == expected


def test_equal_importance_goes_to_the_lower_block():
    q, k, v, g, *_ = draw(127)
    k = k[:, :1].expand_as(k)  # every compressed key the same: every complete block ties
    ours, _ = naive_nsa_compression(q, k, v, g, 4, 16, None, forced=(0, 1))
    assert ours[0, 120, 0].tolist() == [0, 1, 2, 7]
    # At t = 95 block 5 is complete and ties too; it is the current one and is forced.
    assert ours[0, 95, 0].tolist() == [0, 1, 2, 5]


def test_a_tie_against_forced_blocks_is_never_lost():
    """A block with all the probability of every head scores G, and forced ones stand above it."""
    q, k, v, g, *_ = draw(127, group=8)
    q = torch.ones_like(q)
    k = torch.zeros_like(k)
    k[:, 16:32] = 300.0  # block 1 takes everything
    ours, _ = naive_nsa_compression(q, k, v, g, 2, 16, None, forced=(0, 1))
    assert ours[0, 120, 0].tolist() == [1, 7]
    ours, _ = naive_nsa_compression(q, k, v, g, 1, 16, None, forced=(0, 1))
    assert ours[0, 120, 0].tolist() == [7]


def test_the_choice_may_round_but_not_be_worse_in_float32():
    q, k, v, g, *_ = draw(200, dtype=torch.float32)
    ours, _ = naive_nsa_compression(q, k, v, g, 5, 16, None)
    _, score = dense.choice(q.double(), k.double(), block_counts=5, block_size=16)
    dense.assert_choice_is_best(ours, score, block_size=16, block_counts=5)
    spoilt = ours.clone()
    spoilt[0, 199, 0] = torch.tensor([0, *sorted(
        set(range(1, 11)) - set(ours[0, 199, 0].tolist()))[:2], 11, 12])  # fmt: skip
    with pytest.raises(AssertionError, match="worse by"):
        dense.assert_choice_is_best(spoilt, score, block_size=16, block_counts=5)


@pytest.mark.parametrize(
    ("length", "stride", "block_size"),
    [(32, 16, 64), (8, 4, 16), (16, 8, 8), (10, 7, 16), (16, 16, 32)],
)
def test_compression_of_any_length_and_stride_chooses_by_true_overlap(length, stride, block_size):
    q, k, v, *gates = draw(100, batch=1)
    ours, chosen = naive_nsa_with_compression(
        q, k, v, *gates, 3, block_size, 5, forced=(0, 1), length=length, stride=stride,
        return_block_indices=True,
    )  # fmt: skip
    both = {"length": length, "stride": stride}
    _, score = dense.choice(q, k, block_counts=3, block_size=block_size, forced=(0, 1), **both)
    # Blocks that lie alike to the compressed keys tie in exact arithmetic: compare scores.
    dense.assert_choice_is_best(
        chosen, score, block_size=block_size, block_counts=3, forced=(0, 1), tolerance=1e-12
    )
    expected = dense.layer(
        q, k, v, *gates, block_indices=chosen, block_size=block_size, window_size=5, **both
    )
    assert_near(ours, expected)


# -- slots, counts ----------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [None, 1, 3, 5, "tensor"])
def test_slots_after_the_count_are_not_read(counts):
    n, slots = 90, 5
    q, k, v, g, *_ = draw(n)
    chosen = draw_choice(n, 16, slots)
    if counts == "tensor":
        counts = torch.randint(0, slots + 1, (2, n, 2))
    ours = naive_nsa(q, k, v, g, None, chosen, counts, 16)
    o, _, _ = dense.selection(q, k, v, chosen, block_size=16, block_counts=counts)
    assert_near(ours, g[..., None] * o)


def test_unused_slots_may_stand_anywhere_and_a_block_named_twice_counts_once():
    q, k, v, g, *_ = draw(64)
    plain = torch.tensor([0, 2]).expand(2, 64, 2, 2)
    untidy = torch.tensor([-1, 2, -1, 0, 2, -1, 0]).expand(2, 64, 2, 7)
    assert_near(
        naive_nsa(q, k, v, g, None, untidy, block_size=16),
        naive_nsa(q, k, v, g, None, plain, block_size=16),
        1e-14,
    )


def test_the_integer_dtype_of_the_choice_does_not_matter():
    q, k, v, g, *_ = draw(40)
    chosen = draw_choice(40, 16, 3)
    a, b = (
        naive_nsa(q, k, v, g, None, chosen.to(t), block_size=16) for t in (torch.int32, torch.int64)
    )
    assert torch.equal(a, b)


# -- nothing visible --------------------------------------------------------------------------


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    q, k, v, g_cmp, g_slc, _ = (x.requires_grad_() for x in draw(40))
    none = torch.full((2, 40, 2, 3), -1)
    none[:, 20:] = 2  # for t < 32 a block of the future
    o, lse = reference._selected(q, k, v, none, block_size=16, scale=1.0)
    assert not o[:, :32].any() and torch.isneginf(lse[:, :, :32]).all()
    assert torch.isfinite(lse[:, :, 32:]).all()
    _, o_cmp = naive_nsa_compression(q, k, v, g_cmp, 1, 16, None)
    assert not o_cmp[:, :15].any() and (o_cmp[:, 15] != 0).all()
    (naive_nsa(q, k, v, g_slc, None, none, block_size=16) + o_cmp).sum().backward()
    for name, x in (("q", q), ("k", k), ("v", v), ("g_cmp", g_cmp), ("g_slc", g_slc)):
        assert torch.isfinite(x.grad).all(), name
    assert not q.grad[:, :15].any() and not g_cmp.grad[:, :15].any()
    assert q.grad[:, 31:].any()


# -- several lengths, decoding, layouts -------------------------------------------------------


@pytest.mark.parametrize("forced", [(1, 2), (0, 1)])
def test_sequences_one_after_another_do_not_see_each_other(forced):
    q, k, v, *gates = draw(104, batch=1)
    chosen, o_cmp = naive_nsa_compression_varlen(q, k, v, gates[0], 3, 16, None, CU, forced=forced)
    expected, _ = dense.choice(q, k, block_counts=3, block_size=16, forced=forced, cu_seqlens=CU)
    assert torch.equal(chosen, expected)
    o, _, _ = dense.compression(q, k, v, length=16, cu_seqlens=CU)
    assert_near(o_cmp, gates[0][..., None] * o)
    ours = naive_nsa_with_compression(q, k, v, *gates, 3, 16, 12, None, CU, forced=forced)
    assert_near(
        ours,
        dense.layer(
            q, k, v, *gates, block_indices=chosen, block_size=16, window_size=12, cu_seqlens=CU
        ),
    )
    with_int32 = naive_nsa_with_compression(
        q, k, v, *gates, 3, 16, 12, None, CU.int(), forced=forced
    )
    assert torch.equal(ours, with_int32)


def test_counts_for_each_row_go_with_several_lengths():
    q, k, v, *gates = draw(104, batch=1)
    counts = torch.randint(1, 4, (1, 104, 2))
    chosen, _ = naive_nsa_compression_varlen(q, k, v, None, counts, 16, None, CU)
    expected, _ = dense.choice(q, k, block_counts=counts, block_size=16, cu_seqlens=CU)
    assert torch.equal(chosen, expected)
    untidy = draw_choice(16, 16, 4, m=104, batch=1)  # −1 and block 0, which every sequence has
    ours = naive_nsa(q, k, v, gates[1], gates[2], untidy, counts, 16, 3, cu_seqlens=CU)
    expected = dense.layer(
        q, k, v, None, *gates[1:], block_indices=untidy, block_size=16, window_size=3,
        block_counts=counts, cu_seqlens=CU,
    )  # fmt: skip
    assert_near(ours, expected)


@pytest.mark.parametrize("m", [1, 5, 64])
def test_fewer_queries_than_keys_are_the_last_rows(m):
    q, k, v, *gates = draw(100)
    whole = naive_nsa_with_compression(q, k, v, *gates, 3, 16, 12)
    last = [x[:, -m:] for x in (q, *gates)]
    assert_near(
        naive_nsa_with_compression(last[0], k, v, *last[1:], 3, 16, 12), whole[:, -m:], 1e-14
    )


def test_heads_first_swaps_every_argument_and_result():
    q, k, v, *gates = draw(50)
    counts = torch.randint(1, 4, (2, 50, 2))
    o, chosen = naive_nsa_with_compression(
        q, k, v, *gates, counts, 16, 9, return_block_indices=True
    )
    turned = [swap(x) for x in (q, k, v, *gates)]
    o_turned, chosen_turned = naive_nsa_with_compression(
        *turned, swap(counts), 16, 9, head_first=True, return_block_indices=True
    )
    assert torch.equal(swap(o_turned), o) and torch.equal(swap(chosen_turned), chosen)
    ours = naive_nsa(
        *turned[:3], *turned[4:], swap(chosen), block_size=16, window_size=9, head_first=True
    )
    expected = naive_nsa(q, k, v, *gates[1:], chosen, block_size=16, window_size=9)
    assert_near(swap(ours), expected, 0)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_the_size_of_a_step_changes_nothing(step):
    q, k, v, *gates = draw(30)
    whole = naive_nsa_with_compression(q, k, v, *gates, 2, 16, 9)
    assert_near(
        naive_nsa_with_compression(q, k, v, *gates, 2, 16, 9, queries_at_once=step), whole, 1e-14
    )


def test_the_public_names_have_the_public_argument_order():
    assert list(inspect.signature(naive_nsa).parameters)[:12] == [
        "q", "k", "v", "g_slc", "g_swa", "block_indices", "block_counts", "block_size",
        "window_size", "scale", "cu_seqlens", "head_first",
    ]  # fmt: skip
    compression = ["q", "k", "v", "g_cmp", "block_counts", "block_size", "scale"]
    ours = list(inspect.signature(naive_nsa_compression).parameters)
    assert ours[:8] == [*compression, "head_first"]
    ours = list(inspect.signature(naive_nsa_compression_varlen).parameters)
    assert ours[:9] == [*compression, "cu_seqlens", "head_first"]
    assert list(inspect.signature(naive_nsa_with_compression).parameters)[:12] == [
        "q", "k", "v", "g_cmp", "g_slc", "g_swa", "block_counts", "block_size", "window_size",
        "scale", "cu_seqlens", "head_first",
    ]  # fmt: skip


# -- gradients and the future -----------------------------------------------------------------


@pytest.mark.parametrize("cu_seqlens", [None, CU], ids=["batch", "varlen"])
def test_every_gradient_is_the_dense_formulations(cu_seqlens):
    leaves = [x.requires_grad_() for x in draw(104, batch=1, group=3)]
    ours, chosen = naive_nsa_with_compression(
        *leaves, 3, 16, 12, cu_seqlens=cu_seqlens, return_block_indices=True
    )
    expected = dense.layer(
        *leaves, block_indices=chosen, block_size=16, window_size=12, cu_seqlens=cu_seqlens
    )
    dout = torch.randn_like(ours)
    pairs = zip(
        ("q", "k", "v", "g_cmp", "g_slc", "g_swa"),
        torch.autograd.grad(ours, leaves, dout),
        torch.autograd.grad(expected, leaves, dout),
        strict=True,
    )
    for name, a, b in pairs:
        assert b.abs().max() > 0.1, name
        torch.testing.assert_close(
            a, b, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("forced", [(1, 2), (0, 1)])
@pytest.mark.parametrize("now", [0, 14, 15, 16, 47, 62])
def test_no_row_changes_when_its_future_does(now, forced):
    arguments = draw(64, batch=1)
    options = {"block_counts": 3, "block_size": 16, "window_size": 9, "forced": forced}
    before, chosen = naive_nsa_with_compression(*arguments, **options, return_block_indices=True)
    for x in arguments:
        x[:, now + 1 :] += 10 * torch.randn_like(x[:, now + 1 :])
    after, chosen_after = naive_nsa_with_compression(
        *arguments, **options, return_block_indices=True
    )
    assert torch.equal(chosen[:, : now + 1], chosen_after[:, : now + 1])
    assert_near(after[:, : now + 1], before[:, : now + 1], 1e-13)
    assert not torch.allclose(after[:, now + 1 :], before[:, now + 1 :])


def test_no_gradient_of_a_row_reaches_its_future():
    leaves = [x.requires_grad_() for x in draw(48, batch=1)]
    o = naive_nsa_with_compression(*leaves, 2, 16, 9, forced=(0, 1))
    for now in (0, 15, 16, 30):
        gradients = torch.autograd.grad(o[:, now].sum(), leaves, retain_graph=True)
        for x in gradients:
            assert not x[:, now + 1 :].any(), now
        assert gradients[2][:, : now + 1].any(), now  # v


def test_a_nan_that_no_query_may_see_stays_where_it_is():
    """An unused slot, a future block and the end of the last block are copied, and never read."""
    q, k, v, g, *_ = draw(60, batch=1)
    chosen = draw_choice(60, 16, 4, batch=1)
    chosen[chosen == 0] = -1
    chosen[:, 48:][chosen[:, 48:] == 3] = -1
    assert (chosen[:, :48] == 3).any() and (chosen == -1).any()
    expected = naive_nsa(q, k, v, g, None, chosen, block_size=16)
    for x in (k, v):
        x[:, 48:] = x[:, :16] = float("nan")
    k.requires_grad_(), q.requires_grad_()
    ours = naive_nsa(q, k, v, g, None, chosen, block_size=16)
    assert torch.equal(ours, expected)
    assert torch.isfinite(torch.autograd.grad(ours.sum(), q)[0]).all()


# -- low precision, large tensors -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_is_that_of_plain_attention_in_the_same_dtype(dtype):
    arguments = draw(150, d=16, dv=16, dtype=dtype)
    ours, chosen = naive_nsa_with_compression(*arguments, 3, 16, 20, return_block_indices=True)
    options = {"block_indices": chosen, "block_size": 16, "window_size": 20}
    oracle = dense.layer(*(x.double() for x in arguments), **options)
    plain = dense.layer(*arguments, **options)
    assert ours.dtype == dtype
    assert_within_low_precision_error(ours, oracle, plain)


def test_the_lse_of_half_precision_is_float32_and_of_float64_float64():
    for dtype, expected in ((torch.float16, torch.float32), (F64, F64)):
        q, k, v, *_ = draw(20, dtype=dtype)
        _, lse = reference._window(q, k, v, window_size=4, scale=1.0)
        assert lse.dtype == expected and lse.shape == (2, 4, 20)


def test_the_whole_layer_at_500_tokens():
    arguments = draw(500, batch=1, heads=1, group=4, dv=8)
    ours, chosen = naive_nsa_with_compression(*arguments, 6, 32, 70, return_block_indices=True)
    assert torch.equal(chosen, dense.choice(*arguments[:2], block_counts=6, block_size=32)[0])
    assert_near(ours, dense.layer(*arguments, block_indices=chosen, block_size=32, window_size=70))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n", LONG)
def test_long_sequences_on_a_gpu(n, block_size):
    arguments = draw(n, batch=1, heads=2, group=4, d=32, dv=32, device="cuda")
    ours, chosen = naive_nsa_with_compression(
        *arguments, 8, block_size, 100, return_block_indices=True
    )
    q, k = arguments[:2]
    options = {"block_size": block_size}
    _, _, p = dense.compression(q, k, k, length=block_size)
    score = dense.importance(p, n, 4, length=block_size, stride=block_size, **options)
    dense.assert_choice_is_best(chosen, score, block_counts=8, tolerance=1e-12, **options)
    assert_near(ours, dense.layer(*arguments, block_indices=chosen, window_size=100, **options))


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"q": lambda x: x[:, :, :3]}, "k"),
        ({"q": lambda x: x.repeat(1, 2, 1, 1), "g_slc": None, "g_swa": None}, "q"),
        ({"k": lambda x: x[..., :5]}, "k, v"),
        ({"v": lambda x: x[:, :-1]}, "k, v"),
        ({"v": lambda x: x.float()}, "v.dtype"),
        ({"g_slc": lambda x: x[..., None]}, "g_slc"),
        ({"g_swa": lambda x: x[:, :-1]}, "g_swa"),
        ({"block_indices": lambda x: x.double()}, "block_indices.dtype"),
        ({"block_indices": lambda x: x[:, :, :1]}, "block_indices.shape"),
        ({"block_indices": lambda x: x + 3}, "block_indices"),
        ({"block_indices": lambda x: x - 1}, "block_indices"),
        ({"block_counts": 4}, "block_counts"),
        ({"block_counts": 0}, "block_counts"),
        ({"block_counts": torch.full((2, 40, 2), 4)}, "block_counts"),
        ({"block_size": 0}, "block_size"),
        ({"window_size": -1}, "window_size"),
        ({"cu_seqlens": torch.tensor([0, 40])}, "q.shape"),
    ],
)
def test_bad_input_of_naive_nsa_is_named(change, argument):
    q, k, v, _, g_slc, g_swa = draw(40)
    arguments = {
        "q": q, "k": k, "v": v, "g_slc": g_slc, "g_swa": g_swa,
        "block_indices": draw_choice(40, 16, 3), "block_size": 16,
    }  # fmt: skip
    for name, new in change.items():
        arguments[name] = new(arguments[name]) if callable(new) else new
    if "block_indices" in change:
        arguments["block_indices"][0, 0, 0, 0] = arguments["block_indices"].min()
    with pytest.raises(ArgumentError) as error:
        naive_nsa(**arguments)
    assert error.value.argument == argument


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"block_counts": 0}, "block_counts"),
        ({"block_counts": torch.ones(2, 40)}, "block_counts"),
        ({"forced": (1, 0)}, "forced"),
        ({"forced": (-1, 1)}, "forced"),
        ({"forced": 2}, "forced"),
        ({"stride": 20}, "stride"),
        ({"half_rate": True, "drop": 1}, "half_rate"),
    ],
)
def test_bad_input_of_compression_is_named(change, argument):
    q, k, v, g, *_ = draw(40)
    arguments = {"block_counts": 2, "block_size": 16, "scale": None, **change}
    drop = arguments.pop("drop", 0)
    with pytest.raises(ArgumentError) as error:
        naive_nsa_compression(q[:, drop:], k, v, g[:, drop:], **arguments)
    assert error.value.argument == argument
