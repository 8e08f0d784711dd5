"""Bugs that public implementations of NSA have had: one test for each, so that none is ours."""

from __future__ import annotations

from itertools import pairwise

import nsa_oracle
import pytest
import torch
from nsa_layers import SMALL, grads, problem

from labkit.errors import ArgumentError
from labkit.nsa import (
    naive_nsa_with_compression,
    nsa_compressed_attention,
    nsa_func,
    nsa_selected_attention,
    pool_mean,
    select_blocks,
)

GPU = torch.cuda.is_available()


def test_the_naive_form_and_the_kernels_are_one_function(device):
    """Naive ≠ parallel: the plain form said one thing and the kernel computed another.

    Everything that could be mistaken differs: V ≠ D, an odd group, a ragged length, a scale.
    """
    tensors, dout = problem(device, m=21, hq=3, dv=40)
    options = {"block_counts": 2, "block_size": 16, "window_size": 5, "scale": 0.4}
    ours = grads(lambda *x: nsa_func(*x, **options), tensors, dout)
    naive = grads(
        lambda *x: naive_nsa_with_compression(*x, **options),
        [x.double() for x in tensors], dout.double(),
    )  # fmt: skip
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


def far_apart(device, dtype, m, heads, width, apart, memory, at):
    """``[1, m, heads, width]`` whose tokens lie ``apart`` elements apart in ``memory``."""
    x = memory.as_strided((1, m, heads, width), (m * apart, apart, width, 1), at)
    return x.copy_(torch.randn(1, m, heads, width, generator=torch.Generator().manual_seed(at)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_beyond_32_bits(dtype):
    """int32 overflow at long T: an offset of more than 2³¹ elements reads and writes elsewhere.

    Few tokens that lie 2²⁵ elements apart: what a tensor of 2³² elements is to an address.
    """
    m, apart = 130, 2**25
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    memory = torch.empty(m * apart, dtype=dtype, device="cuda")
    q = far_apart("cuda", dtype, m, 16, 64, apart, memory, 0)
    k = far_apart("cuda", dtype, m, 1, 64, apart, memory, 4096)
    v = far_apart("cuda", dtype, m, 1, 64, apart, memory, 8192)
    assert q.stride(1) * (m - 1) > 2**32
    gates = [torch.rand(1, m, 16, device="cuda", dtype=dtype) for _ in range(3)]
    dout = far_apart("cuda", dtype, m, 16, 64, apart, memory, 16384)
    near = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v, *gates)]
    options = {"block_counts": 3, "block_size": 16, "window_size": 20}
    far = grads(lambda *x: nsa_func(*x, **options), (q, k, v, *gates), dout)
    for a, b in zip(far, grads(lambda *x: nsa_func(*x, **options), near, dout), strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=float(4 * torch.finfo(dtype).eps * b.abs().max())
        )


@pytest.mark.parametrize("lengths", [(17, 3, 0, 1)])
def test_a_sequence_without_a_complete_block_gives_no_nan(lengths, device):
    """A varlen chunk with no visible block gave NaN: −∞ − (−∞), or 0 / 0."""
    total = sum(lengths)
    cu = torch.tensor([0, *lengths], device=device).cumsum(0)
    tensors, dout = problem(device, m=total, dv=16)
    ours = grads(lambda *x: nsa_func(*x, **SMALL, cu_seqlens=cu), tensors, dout)
    assert all(torch.isfinite(x).all() for x in ours)
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    o, lse = nsa_compressed_attention(q, k, v, block_size=16, cu_seqlens=cu, return_lse=True)
    for a, b in pairwise(cu.tolist()):
        assert torch.isneginf(lse[:, :, a : min(b, a + 15)]).all()
        assert (o[:, a : min(b, a + 15)] == 0).all()
    short = torch.cat([torch.arange(a, min(b, a + 15)) for a, b in pairwise(cu.tolist())])
    grad = torch.autograd.grad(o, q, dout)[0]
    assert (grad[:, short] == 0).all(), "a query that sees no block has no gradient"


def test_dv_is_written_where_v_lies(device):
    """Wrong dv address: k's strides and width were used for v.

    K and V differ in width and in layout, with several batch entries and KV heads.
    """
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    q = normal(2, 18, 4, 16)
    k = normal(2, 2, 18, 16).transpose(1, 2)
    v = normal(18, 2, 2, 2, 48)[:, :, :, 1].transpose(0, 1)
    dout = normal(2, 18, 4, 48)
    blocks = torch.tensor([0, -1, 1], dtype=torch.int32, device=device).expand(2, 18, 2, 3)
    _, dq, dk, dv = grads(
        lambda *x: nsa_selected_attention(*x, blocks, block_size=16), (q, k, v), dout
    )
    true = grads(
        lambda *x: nsa_oracle.selection(*x, blocks, block_size=16)[0],
        [x.double() for x in (q, k, v)], dout.double(),
    )[1:]  # fmt: skip
    for a, b in zip((dq, dk, dv), true, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5)


@pytest.mark.gpu
def test_the_whole_is_faster_than_dense_from_16k():
    """Loses to dense at short N: the crossover is recorded (chapter 13), and lies below this."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the crossover depends on the card")
    from labkit.timing import time_fn

    q = torch.randn(1, 16384, 64, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 16384, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gates = [torch.rand(1, 16384, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        sparse = time_fn(lambda: nsa_func(q, k, v, *gates))
        dense = time_fn(lambda: attention(*heads_first, is_causal=True, enable_gqa=True))
    assert sparse.median_ms < dense.median_ms, (sparse, dense)


def test_the_lse_is_heads_first_and_another_layout_is_refused(device):
    """LSE passed in the wrong layout: [B, M, HQ] read as [B, HQ, M] is silent nonsense."""
    (q, k, v, *_), _ = problem(device, m=33)
    _, lse = nsa_compressed_attention(q, k, v, block_size=16, return_lse=True)
    _, true, _ = nsa_oracle.compression(q.double(), k.double(), v.double(), length=16)
    assert lse.shape == (1, 2, 33) and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), true, rtol=0, atol=1e-5)
    k_cmp = pool_mean(k, 16)
    with pytest.raises(ArgumentError, match="heads come before seq_len"):
        select_blocks(q, k_cmp, lse.transpose(1, 2), block_counts=2, block_size=16)


def test_the_compression_mask_does_not_look_into_the_future(device):
    """A mask that shows a block before its last token: its mean holds tokens yet to come."""
    q, k, v = (x.clone() for x in problem(device, m=48)[0][:3])
    before = nsa_compressed_attention(q, k, v, block_size=16)
    k[:, 31], v[:, 31] = 9.0, 9.0  # the last token of the second block
    after = nsa_compressed_attention(q, k, v, block_size=16)
    assert torch.equal(before[:, :31], after[:, :31])
    assert ((before - after)[:, 31:].abs().amax((0, 2, 3)) > 1e-3).all()
