"""No query ever sees its future: perturbed, and by gradients.

Two witnesses for every branch, for the choice of blocks, and for the whole.  What comes after a
query is replaced by other numbers, large ones, and nothing before may change by a single bit.  And
the gradient of an early output with respect to everything late is exactly 0.
"""

from __future__ import annotations

import nsa_oracle
import pytest
import torch
from nsa_layers import SMALL, problem

from labkit.nsa import (
    NativeSparseAttention,
    nsa_compressed_attention,
    nsa_func,
    nsa_selected_attention,
    nsa_window_attention,
)

T = 36
#: inside a block, its last token, the first of the next
CUTS = (31, 20, 32)


def selected(q, k, v, *gates):
    """Every block is named by every query, those of the future too."""
    blocks = torch.arange(3, dtype=torch.int32, device=q.device).expand(1, q.shape[1], 1, 3)
    return nsa_selected_attention(q, k, v, blocks.contiguous(), block_size=16)


def chosen(*tensors):
    """Which blocks each query reads, with as little forced as can be."""
    options = SMALL | {"forced": (0, 1)}
    _, weights = nsa_func(*tensors, **options, return_attn_weights=True)
    return weights["selection"]["block_indices"]


FUNCTIONS = {
    "selection": selected,
    "compression": lambda q, k, v, *g: nsa_compressed_attention(q, k, v, block_size=16),
    "overlapping": lambda q, k, v, *g: nsa_compressed_attention(q, k, v, block_size=8, stride=4),
    "window": lambda q, k, v, *g: nsa_window_attention(q, k, v, window_size=9),
    "whole": lambda *x: nsa_func(*x, **SMALL),
    "choice": lambda *x: chosen(*x),
}


def with_another_future(tensors, t=None):
    """The same up to and with token t, other numbers after it; with None, the same.

    Both are copies: a mean is added up in another order where the tokens lie elsewhere in memory.
    """
    t = tensors[0].shape[1] - 1 if t is None else t
    out = []
    for i, x in enumerate(tensors):
        if x is None:
            out.append(None)
            continue
        x = x.clone()
        generator = torch.Generator().manual_seed(100 + i)
        late = torch.randn(x[:, t + 1 :].shape, generator=generator)
        x[:, t + 1 :] = 30 * late.to(x.device, x.dtype)
        out.append(x)
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_future_changes_no_bit_of_the_past(name, device):
    tensors, _ = problem(device, m=T, dv=16)
    before = FUNCTIONS[name](*with_another_future(tensors))
    for t in CUTS[:1] if name in ("whole", "choice", "window") else CUTS[:2]:
        after = FUNCTIONS[name](*with_another_future(tensors, t))
        assert torch.equal(after[:, : t + 1], before[:, : t + 1]), f"{name} at {t}"
        changed = name == "choice" or not torch.equal(after, before)
        assert changed, f"{name} at {t}: the future was not changed"


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "choice"])
def test_gradients_of_the_future_are_exactly_0(name, device):
    tensors, dout = problem(device, m=T, dv=16)
    t = 31
    leaves = [x.detach().requires_grad_() for x in tensors]
    o = FUNCTIONS[name](*leaves)
    dout = dout.clone()
    dout[:, t + 1 :] = 0  # a loss that looks at tokens up to t only
    used = leaves if name == "whole" else leaves[:3]
    for what, grad in zip(("q", "k", "v", "g_cmp", "g_slc", "g_swa"),
                          torch.autograd.grad(o, used, dout), strict=False):  # fmt: skip
        assert (grad[:, t + 1 :] == 0).all(), f"{name}: d{what} of the future"
        assert grad[:, : t + 1].abs().sum() > 0, f"{name}: d{what} of the past"


def test_a_compressed_block_is_seen_by_its_own_last_token_and_not_before(device):
    """(c + 1) · l − 1 ≤ t: one token earlier it would hold the query's future."""
    (q, k, v, *_), _ = problem(device, m=T)
    _, lse = nsa_compressed_attention(q, k, v, block_size=16, return_lse=True)
    assert torch.isneginf(lse[:, :, :15]).all() and torch.isfinite(lse[:, :, 15:]).all()
    _, true, p = nsa_oracle.compression(q.double(), k.double(), v.double(), length=16)
    seen = (p > 0).sum(-1)
    assert (seen[:, :, 30] == 1).all() and (seen[:, :, 31] == 2).all()
    torch.testing.assert_close(lse[:, :, 15:].double(), true[:, :, 15:], rtol=0, atol=1e-5)


def test_other_sequences_are_never_seen(device):
    """Perturbing one sequence of a varlen batch leaves the others as they were, to the bit."""
    tensors, dout = problem(device, m=22, dv=16)
    cu = torch.tensor([0, 18, 22], device=device)
    before = nsa_func(*with_another_future(tensors), **SMALL, cu_seqlens=cu)
    after = nsa_func(*with_another_future(tensors, 17), **SMALL, cu_seqlens=cu)
    assert torch.equal(before[:, :18], after[:, :18])
    leaves = [x.detach().requires_grad_() for x in tensors]
    dout = dout.clone()
    dout[:, :18] = 0
    grads = torch.autograd.grad(nsa_func(*leaves, **SMALL, cu_seqlens=cu), leaves, dout)
    assert all((g[:, :18] == 0).all() for g in grads), "a gradient crossed into another sequence"


@pytest.mark.parametrize("kind", ["mean", "mlp"])
def test_a_layer_sees_no_future(kind):
    """Projections, rotary positions and a learned pooling included."""
    module = NativeSparseAttention(
        32, 4, 2, 16, 16, 2, 9, kind, compression_length=16, compression_stride=8,
        implementation="reference",
    )  # fmt: skip
    x = torch.randn(1, T, 32).requires_grad_()
    y = module(x)
    for t in CUTS:
        other = with_another_future([x.detach()], t)[0]
        assert torch.equal(module(other)[:, : t + 1], y[:, : t + 1])
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all() and (grad[:, t] != 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_no_future_on_the_gpu(group, dtype):
    """Long enough for every road; cuts around a block's edge."""
    shape = {"m": 1500, "hq": 4 * group, "h": 4, "d": 64, "dv": 64, "dtype": dtype}
    tensors, dout = problem("cuda", **shape)
    options = {"block_counts": 4, "block_size": 64, "window_size": 100}
    before = nsa_func(*with_another_future(tensors), **options)
    for t in (700, 703, 704, 767, 768):
        after = nsa_func(*with_another_future(tensors, t), **options)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1]), t
        late = dout.clone()
        late[:, t + 1 :] = 0
        leaves = [x.detach().requires_grad_() for x in tensors]
        for grad in torch.autograd.grad(nsa_func(*leaves, **options), leaves, late):
            assert (grad[:, t + 1 :] == 0).all()
