"""NativeSparseAttention: what it computes, and that decoding gives what the whole pass gives."""

from __future__ import annotations

from copy import deepcopy
from unittest.mock import Mock

import pytest
import torch

from labkit.errors import ArgumentError
from labkit.nsa import NativeSparseAttention, NSACache, naive_nsa_with_compression, pool_mean
from labkit.nsa.layer import rotate

#: dim, query heads, KV heads, then block_size, block_counts, window_size
SHAPE = {"head_dim": 16, "block_size": 16, "block_counts": 2, "window_size": 7}
KINDS = [("mean", None, None), ("mean", 32, 8), ("weighted", 16, 8), ("mlp", 8, 8)]


def layer(kind="mean", length=None, stride=None, *, device="cpu", dtype=None, **options):
    torch.manual_seed(0)
    options = {"implementation": "reference", **SHAPE, **options}
    return NativeSparseAttention(
        48, 4, 2, compression=kind, compression_length=length, compression_stride=stride,
        device=device, dtype=dtype, **options,
    )  # fmt: skip


def tokens(t, *, b=1, dim=48, device="cpu", dtype=torch.float32):
    x = torch.randn(b, t, dim, generator=torch.Generator().manual_seed(1))
    return x.to(device=device, dtype=dtype)


def decoded(module, x, prefill, *, chunk=1, capacity=4):
    """y by a prefill and then ``chunk`` tokens at a time."""
    cache = module.new_cache(x.shape[0], capacity)
    parts = [module(x[:, :prefill], cache=cache)] if prefill else []
    for i in range(prefill, x.shape[1], chunk):
        if chunk == 1:
            parts.append(module.step(x[:, i], cache)[:, None])
        else:
            parts.append(module(x[:, i : i + chunk], cache=cache))
    assert cache.length == x.shape[1]
    return torch.cat(parts, 1)


def assert_near(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# -- what it computes ----------------------------------------------------------------------------


def test_it_is_the_layer_of_the_paper():
    """Projections, sigmoid gates, the three branches, output projection, written out."""
    module, x = layer(rotary_base=None), tokens(40, b=2)
    q = module.q_proj(x).view(2, 40, 4, 16)
    k, v = (p(x).view(2, 40, 2, 16) for p in (module.k_proj, module.v_proj))
    gates = torch.sigmoid(x @ module.g_proj.weight.T).view(2, 40, 3, 4)
    o = naive_nsa_with_compression(q, k, v, *gates.unbind(2), 2, 16, 7)
    assert_near(module(x), o.reshape(2, 40, 64) @ module.o_proj.weight.T)


@pytest.mark.parametrize("kind", ["mlp"])
def test_kernels_and_reference_are_one_function(kind, device):
    """Forward and the gradient of x and of every parameter."""
    results = []
    for implementation in ("kernels", "reference"):
        module = layer(kind, 16, 8, device=device, implementation=implementation)
        x = tokens(20, device=device).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        named = {"x": x.grad} | {n: p.grad for n, p in module.named_parameters()}
        results.append({"y": y.detach(), **named})
    assert all(g is not None and g.abs().sum() > 0 for g in results[0].values())
    for name, ours in results[0].items():
        # what is added to every key changes no probability: that gradient is 0 but for rounding
        scale = results[1][name].abs().max().clamp(min=1e-2)
        assert_near(ours / scale, results[1][name] / scale, 1e-5)


def test_sequences_one_after_another_are_each_their_own():
    module, x = layer("weighted", 16, 8), tokens(50)
    cu = torch.tensor([0, 3, 3, 20, 50])
    y = module(x, cu_seqlens=cu)
    for a, b in ((0, 3), (3, 20), (20, 50)):
        assert_near(y[:, a:b], module(x[:, a:b]))


def test_it_drops_into_a_transformer_block():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = torch.nn.LayerNorm(48), layer()

        def forward(self, x):
            return x + self.attention(self.norm(x))

    block, x = Block(), tokens(30, b=2)
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    again = Block()
    again.load_state_dict(block.state_dict())
    assert torch.equal(again(x), block(x))
    assert "num_heads=4, num_kv_heads=2" in repr(block)


def test_gates_lie_between_0_and_1_and_turn_branches_off():
    module, x = layer(), tokens(30)
    *_, gates = module._project(x, torch.arange(30))
    assert list(gates) == ["g_cmp", "g_slc", "g_swa"]
    assert all(g.shape == (1, 30, 4) and (g > 0).all() and (g < 1).all() for g in gates.values())
    assert len({g.data_ptr() for g in gates.values()}) == 3
    with torch.no_grad():  # a gate of 0 for the window: nothing of the window's size matters
        module.g_proj.weight.zero_()
        module.g_proj.weight.view(3, 4, 48)[2] = -1e4 * x[0, 20].sign()
    at_20 = module(x)[0, 20]
    module.window_size = 1
    assert_near(module(x)[0, 20], at_20)


def test_weights_come_with_the_output(device):
    module = layer(device=device, implementation="kernels")
    x = tokens(9, device=device)
    y, weights = module(x, return_attn_weights=True)
    assert torch.equal(y, module(x))
    assert weights["selection"]["block_indices"].shape == (1, 9, 2, 2)
    assert weights["gating_weights"]["g_swa"].shape == (1, 9, 4)


# -- rotary positions ------------------------------------------------------------------------------


def test_rotation_keeps_lengths_and_depends_on_distances():
    x, y = (torch.randn(1, 1, 2, 16, dtype=torch.float32) for _ in range(2))

    def at(z, position):
        return rotate(z, torch.tensor([position]), 10_000.0)

    assert torch.equal(at(x, 0), x)
    assert_near(at(x, 77).norm(dim=-1), x.norm(dim=-1), 1e-5)
    near, far = at(x, 5) * at(y, 3), at(x, 1005) * at(y, 1003)
    assert_near(near.sum(-1), far.sum(-1), 1e-3)
    assert not torch.allclose(near.sum(-1), (at(x, 5) * at(y, 4)).sum(-1), atol=1e-3)


def test_positions_matter_only_with_rotation():
    """Without positions the first token of a window cannot tell its neighbours apart."""
    x = tokens(10)
    swapped = x[:, [1, 0, *range(2, 10)]]
    plain, rotary = layer(rotary_base=None, window_size=64), layer(window_size=64)
    assert_near(plain(x)[:, 5:], plain(swapped)[:, 5:])
    assert (rotary(x)[:, 5:] - rotary(swapped)[:, 5:]).abs().max() > 1e-3


# -- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prefill", "chunk"),
    [(0, 0, 1), (1, 1, 1), (2, 16, 9), (3, 37, 1), (3, 0, 9)],
)
def test_a_step_gives_what_the_whole_pass_gives(kind, prefill, chunk):
    module, x = layer(*KINDS[kind], dtype=torch.float64), tokens(52, b=2).double()
    assert_near(decoded(module, x, prefill, chunk=chunk), module(x), 1e-12)


def test_a_step_of_the_kernels_gives_what_their_whole_pass_gives(device):
    module = layer("weighted", 16, 8, device=device, implementation="kernels")
    x = tokens(18, device=device)
    assert_near(decoded(module, x, 15, chunk=2), module(x))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "length", "stride"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_on_the_gpu(kind, length, stride, dtype):
    """Every position; half precision within some roundings, where no choice flips."""
    module = layer(kind, length, stride, device="cuda", dtype=dtype, implementation="kernels")
    x = tokens(200, b=2, device="cuda", dtype=dtype)
    with torch.no_grad():
        y, found = module(x, return_attn_weights=True)
        cache = module.new_cache(2, 8)
        same, parts = [], []
        for i in range(200):
            out, now = module(x[:, i : i + 1], cache=cache, return_attn_weights=True)
            parts.append(out)
            a, b = found["selection"]["block_indices"], now["selection"]["block_indices"]
            same.append((a[:, i] == b[:, 0]).all(-1).all(-1))
    same = torch.stack(same, 1)
    assert same.float().mean() > (0.999 if dtype == torch.float32 else 0.9)
    gap = (torch.cat(parts, 1) - y).float().abs().amax(-1)[same].max()
    assert gap < 16 * torch.finfo(dtype).eps * y.abs().max()


@pytest.mark.gpu
def test_a_training_step_under_autocast():
    module = layer("mlp", 32, 16, device="cuda", implementation="kernels", block_size=64)
    x = tokens(300, b=2, device="cuda").requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for name, p in module.named_parameters():
        assert p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all(), name
    assert x.grad.abs().sum() > 0


def test_what_the_cache_holds():
    module, x = layer("mean", 16, 8), tokens(45, b=2)
    cache = module.new_cache(2, capacity=8)
    assert isinstance(cache, NSACache) and cache.length == 0 and cache.capacity == 8
    module(x[:, :10], cache=cache)
    assert cache.compressed[0].shape[1] == 0  # no complete block yet
    for i in range(10, 45):
        module.step(x[:, i], cache)
    *_, k, v, _ = module._project(x, torch.arange(45))
    assert_near(cache.keys, k)
    assert_near(cache.values, v)
    for kept, whole in zip(cache.compressed, (k, v), strict=True):
        assert_near(kept, pool_mean(whole, 16, 8))
    assert 45 <= cache.capacity <= 90, "room doubles"
    row = 2 * 2 * (16 + 16) * 4  # batch, KV heads, K and V, float32
    assert cache.bytes == row * (cache.capacity + cache._blocks[0].shape[1])
    assert repr(cache) == f"NSACache(batch=2, length=45, capacity={cache.capacity})"


def test_room_is_made_by_doubling_not_by_every_token():
    module, x = layer(), tokens(64)
    cache, rooms = module.new_cache(1, 4), set()
    for i in range(64):
        module.step(x[:, i], cache)
        rooms.add(cache.keys.data_ptr())
    assert len(rooms) == 5, "4, 8, 16, 32, 64"


def test_a_step_takes_a_token_with_or_without_its_axis():
    module, x = layer(), tokens(3)
    a, b = module.new_cache(1), module.new_cache(1)
    for i in range(3):
        flat, axis = module.step(x[:, i], a), module.step(x[:, i : i + 1], b)
        assert flat.shape == (1, 48) and axis.shape == (1, 1, 48)
        assert torch.equal(flat, axis[:, 0])


def test_a_copy_of_a_cache_goes_its_own_way_with_the_same_layer():
    module, x = layer("mean", 16, 8), tokens(40)
    cache = module.new_cache(1, 4)
    module(x[:, :33], cache=cache)
    fork = deepcopy(cache)
    other = module.step(-x[:, 33], fork)
    assert_near(module.step(x[:, 33], cache), module(x[:, :34])[:, 33])
    assert fork.length == cache.length == 34 and fork.keys.data_ptr() != cache.keys.data_ptr()
    assert (other - module(x[:, :34])[:, 33]).abs().max() > 1e-3
    both, kept = deepcopy((module, cache))
    assert_near(both.step(x[:, 34], kept), module.step(x[:, 34], cache))


def test_a_call_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    module, x = layer(), tokens(20)
    cache = module.new_cache(1)
    module(x[:, :17], cache=cache)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(module, "_by_reference", Mock(side_effect=MemoryError))
        module.step(x[:, 17], cache)
    assert cache.length == 17
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ArgumentError, match="new_cache"):
        module.step(x[:, 17], cache)
    assert cache.length == 17
    assert_near(module.step(x[:, 17], cache), module(x[:, :18])[:, 17])


def test_a_cache_carries_no_gradient():
    module, x = layer(), tokens(5).requires_grad_()
    y = module(x, cache=module.new_cache(1))
    assert not y.requires_grad and module(x).requires_grad


def test_a_value_may_be_wider_than_a_key():
    module, x = layer("mlp", 8, 8, head_dim_v=24), tokens(40)
    assert module(x).shape == (1, 40, 48)
    assert_near(decoded(module, x, 33), module(x))
