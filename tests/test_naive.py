"""Naive attention against a float64 oracle that shares no code with it.

Each case here has broken somebody's attention before: lengths that are not a multiple of
anything, more queries than keys, grouped heads, strided inputs, rows with nothing to see,
logits that overflow a careless exp.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    assert_within_low_precision_error,
    attention,
    attention_f64,
    gradients_f64,
    gradients_plain,
)

from labkit.errors import ArgumentError, NotEnoughMemoryError
from labkit.memory import budget
from labkit.naive import (
    VARIANTS,
    attention_steps,
    causal_mask,
    naive_attention,
    naive_attention_backward,
    softmax_backward,
    softmax_backward_diagonal_only,
)

LENGTHS = [(n, n) for n in (1, 2, 5, 17, 97, 127, 128, 129, 257)] + [(1, 239), (239, 1), (3, 799)]
HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]


def draw(n_q, n_k, heads=2, kv_heads=None, *, batch=2, d=16, dv=None, dtype=torch.float64):
    kv_heads, dv = kv_heads or heads, dv or d
    shapes = (batch, heads, n_q, d), (batch, kv_heads, n_k, d), (batch, kv_heads, n_k, dv)
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_output_is_attention_at_every_length(n_q, n_k, causal, variant):
    q, k, v = draw(n_q, n_k, d=12, dv=20)
    ours = naive_attention(q, k, v, causal=causal, variant=variant)
    torch.testing.assert_close(ours, attention_f64(q, k, v, causal=causal)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("n_q", "n_k"), [(17, 17), (5, 9), (9, 5)])
def test_a_query_head_reads_the_kv_head_of_its_group(heads, kv_heads, n_q, n_k, variant):
    q, k, v = draw(n_q, n_k, heads, kv_heads)
    expected = attention_f64(q, k, v, causal=True)
    out, s, p = naive_attention(q, k, v, causal=True, return_scores=True, variant=variant)
    for ours, oracle in zip((out, s, p), expected, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_low_precision_error_is_that_of_plain_attention(dtype, causal, variant):
    q, k, v = draw(129, 200, 4, 2, dtype=dtype, d=64)
    ours = naive_attention(q, k, v, causal=causal, variant=variant)
    # In place, S − max, exp and the quotient are rounded one by one: three roundings where
    # the library's softmax has one.
    factor = 3.0 if variant == "in_place" else 2.0
    oracle, plain = attention_f64(q, k, v, causal=causal)[0], attention(q, k, v, causal=causal)[0]
    assert_within_low_precision_error(ours, oracle, plain, factor=factor)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_huge_logits_do_not_overflow(dtype, variant):
    q, k, v = draw(65, 65, dtype=dtype)
    q = q * 100
    ours = naive_attention(q, k, v, causal=True, variant=variant)
    oracle, plain = attention_f64(q, k, v, causal=True)[0], attention(q, k, v, causal=True)[0]
    assert_within_low_precision_error(ours, oracle, plain, factor=3.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recording", [False, True])
def test_a_row_that_sees_nothing_gives_zero(variant, recording):
    q, k, v = (t.requires_grad_(recording) for t in draw(9, 4, 4, 2))
    out, s, p = naive_attention(q, k, v, causal=True, return_scores=True, variant=variant)
    assert (out[:, :, :5] == 0).all()
    assert (p[:, :, :5] == 0).all()
    assert torch.isneginf(s[:, :, :5]).all()
    assert (out[:, :, 5:] != 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nan_query_stays_in_its_row(variant):
    q, k, v = draw(33, 33, 4, 2)
    clean = naive_attention(q, k, v, causal=True, variant=variant)
    q[1, 2, 7, 3] = float("nan")
    out = naive_attention(q, k, v, causal=True, variant=variant)
    hit = torch.isnan(out)
    assert hit[1, 2, 7].all()
    hit[1, 2, 7] = False
    assert not hit.any()
    out[1, 2, 7] = clean[1, 2, 7]
    torch.testing.assert_close(out, clean, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs_give_the_same_and_stay_unchanged(variant):
    packed = torch.randn(2, 19, 3, 4, 16, dtype=torch.float64)  # [B, N, qkv, H, d], as one Linear
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    k, v = k[:, ::2], v[:, ::2]  # two KV heads, every other one
    before = packed.clone()
    ours = naive_attention(q, k, v, causal=True, variant=variant)
    expected = naive_attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_multiplies_the_scores(variant):
    q, k, v = draw(5, 7)
    _, s, _ = naive_attention(q, k, v, scale=0.5, return_scores=True, variant=variant)
    torch.testing.assert_close(s, 0.5 * q @ k.mT, rtol=0, atol=1e-13)
    _, s, _ = naive_attention(q, k, v, return_scores=True, variant=variant)
    torch.testing.assert_close(s, q @ k.mT / math.sqrt(16), rtol=0, atol=1e-13)


def test_steps_come_in_order_and_multiply_to_the_output():
    q, k, v = draw(6, 8)
    steps = list(attention_steps(q, k, v, causal=True))
    assert [name for name, _ in steps] == ["S", "P", "O"]
    s, p, o = (t for _, t in steps)
    torch.testing.assert_close(torch.softmax(s, -1), p)
    torch.testing.assert_close(p @ v, o)


def test_causal_mask_is_aligned_to_the_bottom_right():
    assert causal_mask(2, 4).tolist() == [[False, False, False, True], [False] * 4]
    assert causal_mask(3, 1).tolist() == [[True], [True], [False]]


@settings(max_examples=25, deadline=None)
@given(
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    causal=st.booleans(),
    variant=st.sampled_from(VARIANTS),
    seed=st.integers(0, 2**16),
)
def test_any_problem_agrees_with_the_oracle(n_q, n_k, kv_heads, group, causal, variant, seed):
    torch.manual_seed(seed)
    q, k, v = draw(n_q, n_k, kv_heads * group, kv_heads, d=5, dv=3)
    out, s, p = naive_attention(q, k, v, causal=causal, variant=variant, return_scores=True)
    for ours, oracle in zip((out, s, p), attention_f64(q, k, v, causal=causal), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-11)
    torch.testing.assert_close(p @ v.repeat_interleave(group, 1), out)


@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 2**16))
def test_a_constant_added_to_a_row_of_scores_changes_nothing(shift, seed):
    # One more key dimension, in which every key is 1, adds q's entry there to the whole row.
    torch.manual_seed(seed)
    q, k, v = draw(7, 7)
    extra_q = torch.cat([q, torch.full_like(q[..., :1], shift)], dim=-1)
    extra_k = torch.cat([k, torch.ones_like(k[..., :1])], dim=-1)
    torch.testing.assert_close(
        naive_attention(extra_q, extra_k, v, scale=0.25), naive_attention(q, k, v, scale=0.25)
    )


# -- backward ------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (17, 17), (5, 9), (9, 5), (1, 33)])
def test_gradients_by_hand_are_those_of_autograd(n_q, n_k, heads, kv_heads, causal):
    q, k, v = draw(n_q, n_k, heads, kv_heads, d=8, dv=6)
    dout = torch.randn(2, heads, n_q, 6, dtype=torch.float64)
    ours = naive_attention_backward(q, k, v, dout, causal=causal, scale=0.7)
    expected = gradients_f64(q, k, v, dout, causal=causal, scale=0.7)
    for name, a, b in zip(("dq", "dk", "dv"), ours, expected, strict=True):
        assert a.shape == b.shape, name
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n_q", "n_k"), [(9, 9), (4, 9), (9, 4)])
def test_autograd_goes_through_every_variant(n_q, n_k, variant):
    q, k, v = (t.requires_grad_() for t in draw(n_q, n_k, 4, 2))
    dout = torch.randn(2, 4, n_q, 16, dtype=torch.float64)
    out = naive_attention(q, k, v, causal=True, variant=variant)
    ours = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip(ours, gradients_f64(q, k, v, dout, causal=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_by_finite_differences(causal):
    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return naive_attention(q, k, v, causal=causal)

        @staticmethod
        def backward(ctx, dout):
            return naive_attention_backward(*ctx.saved_tensors, dout, causal=causal)

    q, k, v = (t.requires_grad_() for t in draw(5, 3, 2, 1, batch=1, d=3, dv=2))
    assert torch.autograd.gradcheck(ByHand.apply, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradient_error_is_that_of_plain_attention(dtype):
    q, k, v = draw(65, 65, 4, 2, dtype=dtype, d=32)
    dout = torch.randn(2, 4, 65, 32).to(dtype)
    ours = naive_attention_backward(q, k, v, dout, causal=True)
    oracle = gradients_f64(q, k, v, dout, causal=True)
    plain = gradients_plain(q, k, v, dout, causal=True)
    for name, a, b, c in zip(("dq", "dk", "dv"), ours, oracle, plain, strict=True):
        assert_within_low_precision_error(a, b, c, factor=3.0, what=name)


def test_the_diagonal_only_form_is_refuted():
    s = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    d_p = torch.randn(4, 6, dtype=torch.float64)
    p = torch.softmax(s, -1)
    (true,) = torch.autograd.grad(p, s, d_p)
    p = p.detach()
    torch.testing.assert_close(softmax_backward(p, d_p), true, rtol=0, atol=1e-14)
    wrong = softmax_backward_diagonal_only(p, d_p)
    assert (wrong - true).norm() > 0.1 * true.norm()
    # A row of dS sums to zero, since adding a constant to a row of S changes nothing.
    torch.testing.assert_close(true.sum(-1), torch.zeros(4, dtype=torch.float64))
    assert wrong.sum(-1).abs().max() > 1e-3


def test_a_query_that_sees_nothing_gets_and_gives_no_gradient():
    q, k, v = draw(9, 4)
    dout = torch.randn_like(q)
    dq, dk, dv = naive_attention_backward(q, k, v, dout, causal=True)
    assert (dq[:, :, :5] == 0).all()
    changed = dout.clone()
    changed[:, :, :5] = 1e6
    for a, b in zip(
        naive_attention_backward(q, k, v, changed, causal=True), (dq, dk, dv), strict=True
    ):
        assert torch.equal(a, b)


# -- bad input -----------------------------------------------------------------


def _bad(**changes):
    q, k, v = draw(4, 4, 4, 2, dtype=torch.float32)
    return {"q": q, "k": k, "v": v} | changes


@pytest.mark.parametrize(
    ("changes", "argument", "says"),
    [
        ({"q": torch.randn(4, 16)}, "q.shape", "4"),
        ({"q": [[1.0]]}, "q", "torch.Tensor"),
        ({"k": torch.randn(2, 2, 4, 8)}, "k.shape", "head_dim"),
        ({"k": torch.randn(1, 2, 4, 16)}, "k.shape", "batch"),
        ({"v": torch.randn(2, 2, 5, 16)}, "v.shape", "one value per key"),
        ({"v": torch.randn(2, 1, 4, 16)}, "v.shape", "heads"),
        ({"k": torch.randn(2, 3, 4, 16), "v": torch.randn(2, 3, 4, 16)}, "k.shape", "divide"),
        ({"k": torch.randn(2, 2, 4, 16).double()}, "k.dtype", "float64"),
        ({"v": torch.randn(2, 2, 4, 16, device="meta")}, "v.device", "meta"),
        ({"q": torch.ones(2, 4, 4, 16, dtype=torch.int64)}, "q.dtype", "float16"),
        ({"q": torch.randn(2, 4, 0, 16)}, "q.shape", "0"),
        ({"variant": "inplace"}, "variant", "in_place"),
        ({"scale": -1.0}, "scale", "positive"),
        ({"scale": float("nan")}, "scale", "positive"),
    ],
)
def test_bad_input_is_named(changes, argument, says):
    call = _bad(**changes)
    with pytest.raises(ArgumentError) as error:
        naive_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
    assert error.value.argument == argument
    assert says in str(error.value)


def test_bad_dout_is_named():
    q, k, v = draw(4, 4)
    with pytest.raises(ArgumentError, match=r"dout\.shape"):
        naive_attention_backward(q, k, v, torch.randn(2, 2, 4, 15, dtype=torch.float64))
    with pytest.raises(ArgumentError, match=r"dout\.dtype"):
        naive_attention_backward(q, k, v, torch.randn(2, 2, 4, 16))


def test_a_request_larger_than_free_memory_is_refused_before_it_is_made(monkeypatch):
    # One row, expanded: a million queries and keys that take no memory themselves.
    q = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**20, 8)
    with pytest.raises(NotEnoughMemoryError, match=r"8 TiB.*free.*Nothing was allocated"):
        naive_attention(q, q, q)
    monkeypatch.setattr(budget, "free_memory", lambda device: 2**27)
    q = torch.zeros(1, 32, 2048, 8)
    with pytest.raises(NotEnoughMemoryError, match="1 GiB"):
        naive_attention(q, q, q)
