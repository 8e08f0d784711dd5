"""The tiled backward of chapter 09 against float64 autograd: any tiles, masks, heads, lengths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_within_low_precision_error, gradients_f64, gradients_plain

from labkit.errors import ArgumentError
from labkit.flash import recompute

FORMS = [recompute.one_pass, recompute.two_passes]


def visible_pairs(n_q, n_k, causal, window):
    """The definition, pair by pair."""
    off = n_k - n_q

    def sees(i, j):
        if causal and j > i + off:
            return False
        if window is None:
            return True
        return j > i + off - window if causal else abs(i + off - j) < window

    return torch.tensor([[sees(i, j) for j in range(n_k)] for i in range(n_q)])


def forward(q, k, v, *, causal=False, window=None, scale=None):
    """O and LSE by the book, differentiable: rows without keys give 0 and −∞."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = visible_pairs(q.shape[2], k.shape[2], causal, window)
    dead = ~seen.any(dim=1)
    s = (q @ k.mT * scale).masked_fill(~seen, float("-inf")).masked_fill(dead[:, None], 0.0)
    out = (torch.softmax(s, -1) @ v).masked_fill(dead[:, None], 0.0)
    return out, torch.logsumexp(s, -1).masked_fill(dead, float("-inf"))


def problem(b=1, h=2, hkv=2, n_q=5, n_k=5, d=4, dv=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    # not centred: a wrong row sum shows
    return randn(b, h, n_q, d), randn(b, hkv, n_k, d), randn(b, hkv, n_k, dv) + 1, randn(
        b, h, n_q, dv
    )


def true_gradients(q, k, v, dout, dlse=None, **how):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = forward(*leaves, **how)
    loss = (out * dout).sum()
    if dlse is not None:
        seen = lse > -math.inf
        loss = loss + (lse[seen] * dlse[seen]).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, leaves)


def assert_close(ours, true):
    for name, mine, right in zip(("dq", "dk", "dv"), ours, true, strict=True):
        assert mine.shape == right.shape and mine.dtype == right.dtype, name
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11, msg=name)


CASES = [
    {},
    {"causal": True},
    {"window": 2},
    {"causal": True, "window": 2},
    {"causal": True, "window": 1},
    {"scale": 0.7},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", CASES, ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(5, 5), (1, 7), (7, 1), (3, 8), (8, 3)])
def test_gradients_are_autograds_in_float64(form, how, n_q, n_k):
    q, k, v, dout = problem(b=2, h=4, hkv=2, n_q=n_q, n_k=n_k, d=3, dv=5)
    dlse = torch.randn(2, 4, n_q, dtype=torch.float64)
    out, lse, true = true_gradients(q, k, v, dout, dlse, **how)
    assert_close(form(q, k, v, out, lse, dout, dlse=dlse, block_q=2, block_k=3, **how), true)


@settings(max_examples=60, deadline=None)
@given(
    n_q=st.integers(1, 12), n_k=st.integers(1, 12), block_q=st.integers(1, 13),
    block_k=st.integers(1, 13), group=st.integers(1, 3), kv_heads=st.integers(1, 2),
    causal=st.booleans(), window=st.one_of(st.none(), st.integers(1, 14)),
    form=st.sampled_from(FORMS), with_lse=st.booleans(),
)  # fmt: skip
def test_any_tiles_give_the_same(
    n_q, n_k, block_q, block_k, group, kv_heads, causal, window, form, with_lse
):
    q, k, v, dout = problem(h=group * kv_heads, hkv=kv_heads, n_q=n_q, n_k=n_k, d=2, dv=3)
    dlse = torch.ones(1, group * kv_heads, n_q, dtype=torch.float64) if with_lse else None
    how = {"causal": causal, "window": window}
    out, lse, true = true_gradients(q, k, v, dout, dlse, **how)
    ours = form(q, k, v, out, lse, dout, dlse=dlse, block_q=block_q, block_k=block_k, **how)
    assert_close(ours, true)


@given(
    n_q=st.integers(1, 9), n_k=st.integers(1, 9), block_q=st.integers(1, 5),
    block_k=st.integers(1, 5), causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 10)),
)  # fmt: skip
def test_blocks_are_called_what_they_are(n_q, n_k, block_q, block_k, causal, window):
    seen = visible_pairs(n_q, n_k, causal, window)
    named = {
        (i, j): how
        for i, j, how in recompute.visible_blocks(
            n_q, n_k, block_q, block_k, causal=causal, window=window
        )
    }
    band = recompute.Band.of(n_q, n_k, causal, window)
    for i, a in enumerate(range(0, n_q, block_q)):
        for j, b in enumerate(range(0, n_k, block_k)):
            rows, cols = slice(a, min(a + block_q, n_q)), slice(b, min(b + block_k, n_k))
            pairs = seen[rows, cols]
            right = "all" if pairs.all() else "some" if pairs.any() else "none"
            name = named.get((i, j), "none")
            # a window of few keys may pass between the corners of a block: "some" is safe
            assert name == right or (name, right) == ("some", "none")
            assert torch.equal(band.mask(rows, cols), pairs)


def test_causal_blocks_are_exactly_those_with_a_visible_pair():
    for n_q, n_k in ((64, 64), (16, 64), (64, 16), (63, 65)):
        seen = visible_pairs(n_q, n_k, True, None)
        wanted = sum(
            bool(seen[a : a + 8, b : b + 4].any())
            for a in range(0, n_q, 8)
            for b in range(0, n_k, 4)
        )
        assert len(recompute.visible_blocks(n_q, n_k, 8, 4, causal=True)) == wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_low_precision_errs_no_more_than_plain_attention(form, dtype, causal):
    q, k, v, dout = problem(h=4, hkv=2, n_q=97, n_k=130, d=32, dv=32, dtype=dtype, seed=3)
    how = {"causal": causal}
    # what a forward kernel leaves: the LSE in float32, O rounded to the dtype of q
    out, lse = forward(q.double(), k.double(), v.double(), **how)
    ours = form(q, k, v, out.to(dtype), lse.float(), dout, block_q=32, block_k=48, **how)
    oracle, plain = gradients_f64(q, k, v, dout, **how), gradients_plain(q, k, v, dout, **how)
    for name, mine, true, simple in zip(("dq", "dk", "dv"), ours, oracle, plain, strict=True):
        assert_within_low_precision_error(mine, true, simple, what=name)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_see_nothing_have_and_give_no_gradient(form):
    q, k, v, dout = problem(n_q=6, n_k=2)
    out, lse, _ = true_gradients(q, k, v, dout, causal=True)
    assert (lse[..., :4] == -math.inf).all()
    dq, dk, dv = form(q, k, v, out, lse, dout, causal=True, block_q=3, block_k=2)
    assert (dq[..., :4, :] == 0).all() and (dq[..., 4:, :] != 0).any()
    changed = dout.clone()
    changed[..., :4, :] = 1e6
    again = form(q, k, v, out, lse, changed, causal=True, block_q=3, block_k=2)
    for first, second in zip((dq, dk, dv), again, strict=True):
        assert torch.equal(first, second)


def test_two_passes_have_one_order_and_one_pass_has_many():
    q, k, v, dout = problem(n_q=64, n_k=64, d=16, dv=16, dtype=torch.float32)
    out, lse, _ = true_gradients(q, k, v, dout)
    args = (q, k, v, out, lse, dout)
    blocks = {"block_q": 16, "block_k": 8}
    first, second = recompute.two_passes(*args, **blocks), recompute.two_passes(*args, **blocks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    forwards = recompute.one_pass(*args, **blocks)
    backwards = recompute.one_pass(*args, **blocks, order=reversed(range(8)))
    assert not torch.equal(forwards[0], backwards[0]), "dq is summed in another order"
    assert torch.equal(forwards[1], backwards[1]) and torch.equal(forwards[2], backwards[2])
    torch.testing.assert_close(forwards[0], backwards[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_is_larger_than_a_block_of_scores_or_an_input(form):
    from torch.utils._python_dispatch import TorchDispatchMode

    n, d, block = 256, 8, 16
    q, k, v, dout = problem(h=2, hkv=2, n_q=n, n_k=n, d=d, dv=d, dtype=torch.float32)
    out, lse, _ = true_gradients(q, k, v, dout, causal=True)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                largest = max(largest, made.numel())
            return made

    with Sizes():
        form(q, k, v, out, lse, dout, causal=True, block_q=block, block_k=block)
    assert 0 < largest <= max(2 * block * block, 2 * n * d)


def test_delta_is_the_row_sum_of_dp_and_p():
    q, k, v, dout = problem(n_q=6, n_k=9, dv=7)
    p = torch.softmax(q @ k.mT, -1)
    right = (dout @ v.mT * p).sum(-1)
    torch.testing.assert_close(recompute.delta(dout, p @ v), right)
    torch.testing.assert_close(recompute.delta(dout, p @ v, right), torch.zeros_like(right))
    assert recompute.delta(dout.half(), (p @ v).half()).dtype == torch.float32


def test_gradcheck_of_attention_with_this_backward():
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = forward(q, k, v, causal=True)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            return recompute.two_passes(
                *ctx.saved_tensors, dout, dlse=dlse, causal=True, block_q=2, block_k=2
            )

    q, k, v, _ = problem(h=2, hkv=1, n_q=3, n_k=4, d=2, dv=3)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(Attention.apply, leaves)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"block_q": 0}, "block_q"),
        ({"block_k": 2.5}, "block_k"),
        ({"window": 0}, "window"),
        ({"scale": -1.0}, "scale"),
        ({"lse": torch.zeros(1, 2, 5, 1)}, "lse.shape"),
        ({"dlse": torch.zeros(1, 2, 4)}, "dlse.shape"),
        ({"dout": torch.zeros(1, 2, 5, 3, dtype=torch.float64)}, "dout.shape"),
        ({"out": torch.zeros(1, 2, 5, 4)}, "out.dtype"),
    ],
)
def test_bad_input_is_named(change, names):
    q, k, v, dout = problem()
    out, lse = forward(q, k, v)
    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout, **change}
    for form in FORMS:
        with pytest.raises(ArgumentError) as raised:
            form(**given)
        assert raised.value.argument == names


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1, 8])
def test_lse_does_not_drift_with_the_number_of_blocks(factor):
    """A rescaling factor of 1 + δ for each block that leaves the maximum would add up in LSE."""
    from labkit.flash import flash_attention

    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8192, 64, generator=g, device="cuda") for _ in range(3))
    _, lse = flash_attention(q * factor, k, v, return_lse=True)
    exact = torch.logsumexp((q * factor).double() @ k.double().mT * 64**-0.5, -1)
    plain = torch.logsumexp((q * factor) @ k.mT * 64**-0.5, -1)
    error, allowed = ((x.double() - exact).pow(2).mean().sqrt() for x in (lse, plain))
    assert error <= 3 * allowed
