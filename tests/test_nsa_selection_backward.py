"""Gradients of attention to chosen blocks against autograd through dense attention in float64."""

from __future__ import annotations

import pytest
import torch
from nsa_cases import Case, call_of, check_backward, make, truth

from labkit.experiments._flash_cases import covering
from labkit.nsa import by_keys, selection, selection_backward

SMALL = [
    Case(1), Case(15, group=3, d=24, d_v=40, slots=4, dtype="float16"),
    Case(33, group=1, heads=2, pattern="messy"), Case(20, 50, group=8, slots=4, scale=0.7),
    Case(3, 130, group=16, block=64, slots=2, dtype="float16"),
    Case(40, group=5, block=32, slots=4, d=64, strided=True, pattern="messy"),
    Case(60, lengths=(5, 0, 1, 54), group=4, heads=2, slots=4, pattern="messy"),
    Case(9, 140, group=2, block=128, slots=2, d=20, d_v=72), Case(17, 40, group=64, slots=2),
    Case(20, pattern="nothing"), Case(20, pattern="first", batch=2),
    Case(10, 90, block=48, slots=2), Case(4, 70, d=192, d_v=17, slots=4),
]  # fmt: skip

MATRIX = [
    Case(**row, heads=2, d=128, slots=6)
    for row in covering(
        {
            "m": (1, 15, 63, 64, 65, 127, 500, 1024),
            "group": (1, 2, 3, 8, 16, 64),
            "block": (16, 32, 64, 128),
            "dtype": ("bfloat16", "float16", "float32"),
            "pattern": ("random", "messy"),
        }
    )
] + [Case(4097, group=group, d=64, block=64, slots=16, dtype="bfloat16") for group in (1, 3, 16)]


def run(*tensors):
    return selection_backward.backward(*tensors, road="keys")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_are_within_three_times_the_error_of_plain_attention(case, device):
    check_backward(case, run, device)


def test_gradients_without_one_that_reaches_the_lse(device):
    check_backward(Case(33, group=2, pattern="messy"), run, device, with_dlse=False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_full_matrix(case):
    check_backward(case, run, "cuda")


def test_lists_in_pieces_and_queries_in_ranges_give_the_same_gradients(device, monkeypatch):
    monkeypatch.setattr(by_keys, "PIECE", 64)
    monkeypatch.setattr(by_keys, "RANGE", 16)
    case = Case(50, block=16, slots=3, group=2, pattern="messy")
    q, k, v, dout, dlse, chosen = make(case, device)
    call = call_of(case, device)
    o, lse = (x.to(q.dtype) for x in truth(case, q, k, v, chosen))
    whole = selection_backward.by_keys(dout, dlse, q, k, v, o, lse, chosen, call)
    ranges = selection_backward.by_keys(dout, dlse, q, k, v, o, lse, chosen, call, workspace=2**15)
    for one, two in zip(whole, ranges, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    check_backward(case, lambda *a: selection_backward.by_keys(*a, workspace=2**15), device)


def test_keys_that_nobody_chose_get_zero(device):
    case = Case(64, block=16, slots=1, group=2, pattern="first")
    q, k, v, dout, dlse, chosen = make(case, device)
    o, lse = selection.forward(q, k, v, chosen, call_of(case, device), road="queries")
    dq, dk, dv = run(dout, dlse, q, k, v, o, lse, chosen, call_of(case, device))
    assert (dk[:, 16:] == 0).all() and (dv[:, 16:] == 0).all()
    assert (dk[:, :16] != 0).any() and (dq != 0).any()


def test_a_gradient_without_memory_of_its_own_is_taken(device):
    """``o.sum().backward()`` hands down one number with strides of 0."""
    case = Case(20, group=2)
    q, k, v, dout, _, chosen = make(case, device)
    call = call_of(case, device)
    o, lse = selection.forward(q, k, v, chosen, call, road="queries")
    flat = torch.ones((), device=device).expand(dout.shape)
    ours = run(flat, None, q, k, v, o, lse, chosen, call)
    want = run(torch.ones_like(dout), None, q, k, v, o, lse, chosen, call)
    assert all(map(torch.equal, ours, want))


def test_gradients_cannot_flow_to_the_future(device):
    case = Case(50, block=16, slots=3, group=2, pattern="messy")
    q, k, v, dout, dlse, chosen = make(case, device)
    call = call_of(case, device)
    o, lse = selection.forward(q, k, v, chosen, call, road="queries")
    t = 21
    dout[:, t + 1 :] = 0
    dlse[..., t + 1 :] = 0
    _, dk, dv = run(dout, dlse, q, k, v, o, lse, chosen, call)
    assert (dk[:, t + 1 :] == 0).all() and (dv[:, t + 1 :] == 0).all()


def test_nothing_chosen_gives_no_gradient(device):
    case = Case(5)
    q, k, v, dout, dlse, chosen = make(case, device)
    for choice in (chosen[..., :0], torch.full_like(chosen, -1)):
        o, lse = selection.forward(q, k, v, choice, call_of(case, device))
        grads = run(dout, dlse, q, k, v, o, lse, choice, call_of(case, device))
        assert all((x == 0).all() for x in grads)


@pytest.mark.gpu
def test_repeats_are_equal_to_the_bit():
    case = Case(1024, group=16, d=128, block=64, slots=16, dtype="bfloat16")
    q, k, v, dout, dlse, chosen = make(case, "cuda")
    call = call_of(case, "cuda")
    o, lse = selection.forward(q, k, v, chosen, call, road="queries")
    first = run(dout, dlse, q, k, v, o, lse, chosen, call)
    for _ in range(50):
        assert all(map(torch.equal, first, run(dout, dlse, q, k, v, o, lse, chosen, call)))


@pytest.mark.gpu
def test_backward_never_waits_for_the_host():
    case = Case(2048, group=16, d=128, block=64, slots=16, dtype="bfloat16")
    q, k, v, dout, dlse, chosen = make(case, "cuda")
    call = call_of(case, "cuda")
    o, lse = selection.forward(q, k, v, chosen, call, road="queries")
    run(dout, dlse, q, k, v, o, lse, chosen, call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = run(dout, dlse, q, k, v, o, lse, chosen, call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(x).all() for x in grads)
