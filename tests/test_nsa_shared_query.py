"""labkit.nsa.shared_query: one q for three branches, its gradient summed in one pass."""

import pytest
import torch

from labkit.nsa import shared_query
from labkit.nsa.shared_query import add, share


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 65, 4, 33)])
def test_the_sum_is_rounded_once(shape, count, dtype, device):
    torch.manual_seed(0)
    parts = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
    exact = sum(x.double() for x in parts)
    single = sum(x.float() for x in parts).to(dtype)
    assert torch.equal(add(parts), single)
    assert (single.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_tensors_that_lie_otherwise_are_added_too(device):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 5, 3, 8, device=device) for _ in range(2))
    turned = torch.randn(2, 3, 5, 8, device=device).transpose(1, 2)
    gap = torch.randn(2, 5, 3, 16, device=device)[..., ::2]
    for other in (turned, gap):
        torch.testing.assert_close(add([a, b, other]), a + b + other)
        torch.testing.assert_close(add([other, other]), 2 * other)
    same = add([turned, turned, turned])
    assert same.stride() == turned.stride()
    torch.testing.assert_close(same, 3 * turned)


def test_each_use_has_its_part_of_the_gradient(device):
    x = torch.randn(1, 6, 2, 16, device=device, requires_grad=True)
    a, b, c = share(x, 3)
    weights = [torch.randn_like(x) for _ in range(3)]
    loss = sum((y * w).sum() for y, w in zip((a, b, c), weights, strict=True))
    loss.backward()
    torch.testing.assert_close(x.grad, sum(weights))
    x.grad = None
    (share(x, 3)[1] * 2).sum().backward()  # the others are not used: nothing is added
    torch.testing.assert_close(x.grad, torch.full_like(x, 2))
    with torch.no_grad():
        assert all(y is x for y in share(x, 3))


def test_a_second_derivative_passes_through(device):
    x = torch.randn(1, 4, 1, 16, device=device, requires_grad=True)
    a, b, _ = share(x, 3)
    (g,) = torch.autograd.grad((a * b).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(h, torch.full_like(x, 2))


def test_the_whole_adds_once(device, monkeypatch):
    """``nsa_func``'s dQ goes through one sum of three."""
    from labkit.nsa import nsa_func

    seen = []
    monkeypatch.setattr(
        shared_query, "add", lambda parts: seen.append(len(parts)) or sum(parts[1:], parts[0])
    )
    q, k, v = (torch.randn(1, 20, h, 16, device=device, requires_grad=True) for h in (2, 1, 1))
    g = [torch.rand(1, 20, 2, device=device) for _ in range(3)]
    nsa_func(q, k, v, *g, block_size=16, block_counts=1, window_size=4).sum().backward()
    assert seen == [3]
