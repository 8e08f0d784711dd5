"""Compressed keys stand for the tokens they say they stand for, and blocks get their true share."""

from __future__ import annotations

import nsa_oracle as dense
import pytest
import torch

from labkit.errors import ArgumentError
from labkit.nsa.pooling import (
    KINDS,
    TokenCompression,
    block_bounds,
    compressed_bounds,
    overlap_weights,
    pool_mean,
    token_blocks,
)
from labkit.nsa.semantics import block_numbers, compressed_keys, overlap

CU = torch.tensor([0, 5, 5, 40, 41, 104])
SHAPES = [(16, 16), (32, 16), (8, 3), (1, 1), (10, 7)]


def tokens(n, *, batch=2, heads=3, d=4, dtype=torch.float64):
    return torch.randn(batch, n, heads, d, dtype=dtype)


@pytest.mark.parametrize(("length", "stride"), SHAPES)
@pytest.mark.parametrize("n", [1, 15, 16, 31, 32, 33, 100])
def test_the_mean_is_a_product_with_the_pooling_matrix(n, length, stride):
    x = tokens(n)
    matrix, _ = dense.pooling_matrix(n, length, stride)
    ours = pool_mean(x, length, stride)
    assert ours.shape[1] == compressed_keys(n, length, stride)
    torch.testing.assert_close(ours, torch.einsum("cn,bnhd->bchd", matrix, x), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("length", "stride"), SHAPES)
def test_no_block_reaches_over_a_boundary(length, stride):
    x = tokens(104, batch=1)
    matrix, which = dense.pooling_matrix(104, length, stride, cu_seqlens=CU)
    ours = pool_mean(x, length, stride, cu_seqlens=CU)
    torch.testing.assert_close(ours, torch.einsum("cn,bnhd->bchd", matrix, x), rtol=0, atol=1e-14)
    counts = torch.bincount(which[:, 0], minlength=5)
    bounds = compressed_bounds(CU, length, stride)
    assert bounds.dtype == torch.int32 and bounds.tolist() == [0, *counts.cumsum(0).tolist()]


def test_selection_blocks_of_each_sequence_are_counted_with_the_incomplete_one():
    assert block_bounds(CU, 16).tolist() == [0, 1, 1, 4, 5, 9]
    assert block_bounds(CU.int(), 64).tolist() == [0, 1, 1, 2, 3, 4]


def test_the_mean_of_half_precision_is_summed_in_float32():
    x = torch.full((1, 4096, 1, 1), 0.1, dtype=torch.bfloat16)
    assert pool_mean(x, 4096).item() == x[0, 0].item()


def test_pooling_has_the_gradient_of_a_mean():
    x = tokens(40).requires_grad_()
    pool_mean(x, 16, 8).sum().backward()
    covered = torch.zeros(40, dtype=torch.float64)
    for first in (0, 8, 16, 24):
        covered[first : first + 16] += 1 / 16
    torch.testing.assert_close(x.grad[0, :, 0, 0], covered)


def test_the_papers_sizes_give_1_2_2_2_1():
    weights = overlap_weights(1024, length=32, stride=16, block_size=64)
    assert weights[3:8, 1].tolist() == [1, 2, 2, 2, 1]
    assert weights[:, 1].sum() == 8 and weights[:4, 0].tolist() == [2, 2, 2, 1]


def test_equal_sizes_give_the_identity_and_nothing_for_the_incomplete_block():
    weights = overlap_weights(70, length=16, stride=16, block_size=16)
    assert torch.equal(weights[:, :4], torch.eye(4)) and not weights[:, 4].any()


@pytest.mark.parametrize(("length", "stride"), SHAPES)
@pytest.mark.parametrize("block_size", [8, 16, 20])
def test_overlap_is_the_number_of_common_tokens(length, stride, block_size):
    n = 70
    weights = overlap_weights(
        n, length=length, stride=stride, block_size=block_size, dtype=torch.float64
    )
    assert weights.shape == (compressed_keys(n, length, stride), block_numbers(n, block_size))
    for c in range(weights.shape[0]):
        own = set(range(c * stride, c * stride + length))
        for block in range(weights.shape[1]):
            common = own & set(range(block * block_size, (block + 1) * block_size))
            assert weights[c, block] == len(common) / stride
            counted = overlap(c, block, length=length, stride=stride, block_size=block_size)
            assert counted == len(common)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_key_depends_on_its_own_tokens_only(kind):
    torch.manual_seed(1)
    pool = TokenCompression(4, 6, kind=kind, length=8, stride=4).double()
    k, v = tokens(30), tokens(30, d=6)
    k_cmp, v_cmp = pool(k, v)
    assert k_cmp.shape == (2, 6, 3, 4) and v_cmp.shape == (2, 6, 3, 6)
    changed = k.clone()
    changed[:, 12:] += 1  # compressed keys 0 and 1 end at tokens 7 and 11
    after, _ = pool(changed, v)
    assert torch.equal(after[:, :2], k_cmp[:, :2])
    assert (after[:, 2:] != k_cmp[:, 2:]).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_learned_pooling_takes_sequences_one_after_another(kind):
    pool = TokenCompression(4, kind=kind, length=8, stride=4).double()
    k, v = tokens(104, batch=1), tokens(104, batch=1)
    ours = pool(k, v, CU)
    parts = [pool(k[:, a:b], v[:, a:b]) for a, b in ((0, 5), (5, 40), (40, 41), (41, 104))]
    for number in range(2):
        expected = torch.cat([part[number] for part in parts], 1)
        torch.testing.assert_close(ours[number], expected, rtol=0, atol=1e-14)


def test_mean_and_untrained_weights_are_the_mean():
    k, v = tokens(40), tokens(40)
    for kind in ("mean", "weighted"):
        k_cmp, v_cmp = TokenCompression(4, kind=kind, length=16, stride=8).double()(k, v)
        torch.testing.assert_close(k_cmp, pool_mean(k, 16, 8))
        torch.testing.assert_close(v_cmp, pool_mean(v, 16, 8))


def test_the_mlp_is_told_the_place_and_the_mean_is_not():
    k = tokens(8).expand(2, 8, 3, 4)
    turned = k.flip(1)
    mlp = TokenCompression(4, kind="mlp", length=8, stride=8).double()
    assert not torch.allclose(mlp(k, k)[0], mlp(turned, k)[0])
    same = torch.ones(1, 8, 1, 4, dtype=torch.float64)
    mlp.key.place.data.zero_()
    plain = mlp(same, same)[0]
    mlp.key.place.data[3] = 1.0
    assert not torch.allclose(mlp(same, same)[0], plain)


@pytest.mark.parametrize(("kind", "count"), [("mean", 0), ("weighted", 2), ("mlp", 10)])
def test_every_parameter_of_keys_and_values_is_trained(kind, count):
    pool = TokenCompression(4, 6, kind=kind, length=8, stride=4, hidden=5).double()
    parameters = list(pool.parameters())
    assert len(parameters) == count
    if count:
        k_cmp, v_cmp = pool(tokens(30), tokens(30, d=6))
        (k_cmp.square().sum() + v_cmp.square().sum()).backward()
        assert all(p.grad.abs().max() > 0 for p in parameters)


def test_fewer_tokens_than_a_block_make_no_key_and_still_a_shape():
    assert pool_mean(tokens(15), 16).shape == (2, 0, 3, 4)
    assert token_blocks(tokens(15), 16, 8).shape == (2, 0, 16, 3, 4)
    k_cmp, _ = TokenCompression(4, length=16, stride=16).double()(tokens(15), tokens(15))
    assert k_cmp.shape == (2, 0, 3, 4)
    short = torch.tensor([0, 3, 9])
    assert pool_mean(tokens(9, batch=1), 16, cu_seqlens=short).shape == (1, 0, 3, 4)


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("cu", [None, (0, 3, 9)])
def test_tokens_of_no_block_have_a_gradient_of_0_and_not_none(cu, stride):
    """A training step on a short sequence must not look like one that forgot a tensor."""
    x = tokens(9, batch=1).requires_grad_()
    made = pool_mean(x, 16, stride, cu_seqlens=None if cu is None else torch.tensor(cu))
    (gradient,) = torch.autograd.grad(made.sum(), x)
    assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"kind": "max"}, "kind"),
        ({"length": 0}, "length"),
        ({"stride": 0}, "stride"),
        ({"length": 16, "stride": 17}, "stride"),
    ],
)
def test_bad_options_are_named(options, argument):
    with pytest.raises(ArgumentError) as error:
        TokenCompression(4, **options)
    assert error.value.argument == argument
