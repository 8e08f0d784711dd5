"""Sequences one after another: each as flash_attention would do it alone, none sees another."""

from __future__ import annotations

import math

import pytest
import torch
from flash_cases import assert_right, ours, poisoned

from labkit.flash import flash_attention_varlen


def offsets(lengths, device, dtype=torch.int32):
    """0, n₀, n₀ + n₁, …"""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def draw(lengths_q, lengths_k, device, heads=2, kv_heads=None, d=16, dv=None, dtype=torch.float32):
    """q, k, v, dO as ``[total, heads, width]``."""
    kv_heads, dv = kv_heads or heads, dv or d
    n_q, n_k = sum(lengths_q), sum(lengths_k)
    shapes = (n_q, heads, d), (n_k, kv_heads, d), (n_k, kv_heads, dv), (n_q, heads, dv)
    generator = torch.Generator().manual_seed(n_q * 1000 + n_k)
    return [torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes]


def run(q, k, v, cu_q, cu_k, dout=None, dlse=None, **options):
    """What flash_cases.ours does, for varlen."""
    leaves = [t.detach().requires_grad_(dout is not None) for t in (q, k, v)]
    with poisoned():
        o, lse = flash_attention_varlen(*leaves, cu_q, cu_k, return_lse=True, **options)
        got = {"o": o.detach(), "lse": lse.detach()}
        if dout is None:
            return got
        outs, weights = ([o], [dout]) if dlse is None else ([o, lse], [dout, dlse])
        return got | dict(
            zip(("dq", "dk", "dv"), torch.autograd.grad(outs, leaves, weights), strict=True)
        )


def split(x, lengths, dim=0):
    return torch.split(x, list(lengths), dim)


def batched(x):
    """``[n, heads, width]`` → ``[1, heads, n, width]``."""
    return x.transpose(0, 1)[None]


def assert_each_right(got, q, k, v, dout, lengths_q, lengths_k, dlse=None, **options):
    """Every sequence against the oracle, by itself."""
    pieces = zip(
        split(q, lengths_q), split(k, lengths_k), split(v, lengths_k), split(dout, lengths_q),
        split(got["o"], lengths_q), split(got["lse"], lengths_q, 1),
        split(got["dq"], lengths_q), split(got["dk"], lengths_k), split(got["dv"], lengths_k),
        split(dlse, lengths_q, 1) if dlse is not None else [None] * len(lengths_q),
        strict=True,
    )  # fmt: skip
    for q_, k_, v_, dout_, o, lse, dq, dk, dv, dlse_ in pieces:
        if not len(q_):
            assert (dk == 0).all() and (dv == 0).all(), "keys without a query have a gradient"
        elif not len(k_):
            assert (o == 0).all() and torch.isneginf(lse).all() and (dq == 0).all()
        else:
            mine = {"o": o, "dq": dq, "dk": dk, "dv": dv}
            mine = {name: batched(x) for name, x in mine.items()} | {"lse": lse[None]}
            tensors = [batched(x) for x in (q_, k_, v_, dout_)]
            assert_right(mine, *tensors, None if dlse_ is None else dlse_[None], **options)


LENGTHS = [
    ([17], [17]),
    ([5, 40, 1, 33], [5, 40, 1, 33]),
    ([3, 0, 20, 7], [9, 4, 0, 40]),  # no queries; no keys
    ([0, 9, 0], [0, 9, 0]),
    ([40, 1], [2, 60]),  # more queries than keys, and one query of many keys
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS)
def test_each_sequence_is_done_as_it_would_be_alone(lengths_q, lengths_k, causal, device):
    tensors = draw(lengths_q, lengths_k, device, heads=1)
    q, k, v, dout = tensors
    cu = offsets(lengths_q, device), offsets(lengths_k, device)
    got = run(q, k, v, *cu, dout, causal=causal)
    assert_each_right(got, *tensors, lengths_q, lengths_k, causal=causal)


@pytest.mark.parametrize(
    "options",
    [{"window": 6}, {"causal": True, "window": 6, "scale": 0.5}],
    ids=["window", "causal_window_scale"],
)
def test_masks_and_groups_and_value_width(options, device):
    lengths_q, lengths_k = [9, 21, 2], [9, 12, 30]
    tensors = draw(lengths_q, lengths_k, device, 4, 2, d=24, dv=40, dtype=torch.float16)
    q, k, v, dout = tensors
    got = run(q, k, v, offsets(lengths_q, device), offsets(lengths_k, device), dout, **options)
    assert got["o"].shape == (32, 4, 40) and got["lse"].shape == (4, 32)
    assert_each_right(got, *tensors, lengths_q, lengths_k, **options)


def test_gradient_of_lse(device):
    lengths_q, lengths_k = [9, 21], [12, 14]
    tensors = draw(lengths_q, lengths_k, device)
    q, k, v, dout = tensors
    dlse = torch.randn(2, 30, generator=torch.Generator().manual_seed(1)).to(device)
    cu = offsets(lengths_q, device), offsets(lengths_k, device)
    got = run(q, k, v, *cu, dout, dlse, causal=True)
    assert_each_right(got, *tensors, lengths_q, lengths_k, dlse, causal=True)


def test_one_sequence_is_flash_attention(device):
    q, k, v, dout = draw([30], [41], device)
    got = run(q, k, v, offsets([30], device), offsets([41], device), dout, causal=True)
    alone = ours(*(batched(x) for x in (q, k, v, dout)), causal=True)
    for name in ("o", "dq", "dk", "dv"):
        torch.testing.assert_close(batched(got[name]), alone[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(got["lse"][None], alone["lse"], rtol=0, atol=1e-6)


def test_offsets_of_64_bits_are_as_good(device):
    q, k, v, _ = draw([5, 9], [5, 9], device)
    narrow, wide = (offsets([5, 9], device, t) for t in (torch.int32, torch.int64))
    a, b = run(q, k, v, narrow, narrow), run(q, k, v, wide, wide)
    assert torch.equal(a["o"], b["o"]) and torch.equal(a["lse"], b["lse"])


def test_strided_views_are_read_where_they_lie(device):
    """q, k, v as slices of one projection, NaN before and behind."""
    lengths = [7, 0, 26]
    packed = torch.full((33 + 8, 3, 2, 20), math.nan, device=device)
    inner = packed[4:-4, :, :, 1:17]
    inner.copy_(torch.randn(33, 3, 2, 16))
    q, k, v = inner.unbind(1)
    dout = torch.randn(33, 2, 16, device=device)
    cu = offsets(lengths, device)
    got = run(q, k, v, cu, cu, dout, causal=True)
    assert_each_right(got, q, k, v, dout, lengths, lengths, causal=True)


def test_nan_of_one_sequence_stays_there(device):
    lengths = [10, 25, 8]
    q, k, v, dout = draw(lengths, lengths, device, heads=1)
    cu = offsets(lengths, device)
    clean = run(q, k, v, cu, cu, dout)
    for x in (q, k, v):
        x[10:35] = math.nan
    got = run(q, k, v, cu, cu, dout)
    for name in ("o", "dq", "dk", "dv"):
        assert torch.isnan(got[name][10:35]).all(), name
        for part in (slice(0, 10), slice(35, 43)):
            assert torch.equal(got[name][part], clean[name][part]), name
    assert torch.equal(got["lse"][:, :10], clean["lse"][:, :10])
    assert torch.equal(got["lse"][:, 35:], clean["lse"][:, 35:])


# -- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [40, 64, 128])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": 50}, {"causal": True, "window": 50}],
    ids=["full", "causal", "window", "causal_window"],
)
def test_many_lengths_on_the_gpu(options, d, dtype):
    lengths_q = [1, 128, 0, 257, 64, 3, 1000, 127]
    lengths_k = [239, 128, 5, 257, 0, 799, 1000, 129]
    tensors = draw(lengths_q, lengths_k, "cuda", 4, 2, d=d, dtype=dtype)
    q, k, v, dout = tensors
    cu = offsets(lengths_q, "cuda"), offsets(lengths_k, "cuda")
    got = run(q, k, v, *cu, dout, **options)
    assert_each_right(got, *tensors, lengths_q, lengths_k, **options)


@pytest.mark.gpu
def test_the_same_to_the_bit_each_time():
    lengths = [300, 1, 0, 700, 130]
    q, k, v, dout = draw(lengths, lengths, "cuda", 4, 2, d=64, dtype=torch.bfloat16)
    cu = offsets(lengths, "cuda")
    first = run(q, k, v, cu, cu, dout, causal=True)
    for _ in range(50):
        again = run(q, k, v, cu, cu, dout, causal=True)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_thousands_of_short_sequences():
    lengths = [(7 * i) % 19 for i in range(20_000)]
    q, k, v, dout = draw(lengths, lengths, "cuda", 2, 1, dtype=torch.float16)
    cu = offsets(lengths, "cuda")
    got = run(q, k, v, cu, cu, dout, causal=True)
    at = cu.tolist()
    for s in (1, 5000, 19_998, 19_999):
        part = slice(at[s], at[s + 1])
        mine = {name: batched(got[name][part]) for name in ("o", "dq", "dk", "dv")}
        mine["lse"] = got["lse"][None, :, part]
        assert_right(mine, *(batched(x[part]) for x in (q, k, v, dout)), causal=True)
