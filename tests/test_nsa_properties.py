"""What holds for any shape: the bound, and laws of sparse attention that need no oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nsa_layers import SMALL, alone, assert_layer_right, problem

from labkit.flash import flash_attention
from labkit.nsa import (
    nsa_compressed_attention,
    nsa_func,
    nsa_selected_attention,
    nsa_window_attention,
)

GPU = torch.cuda.is_available()


@st.composite
def cases(draw, largest, dtypes):
    """Arguments of ``problem``, options of ``nsa_func``, and where sequences start."""
    h = draw(st.integers(1, 2))
    m = draw(st.integers(1, largest))
    shape = {
        "m": m, "h": h, "hq": h * draw(st.sampled_from([1, 2, 3, 5, 16])),
        "d": draw(st.integers(16, 48)), "dv": draw(st.integers(16, 48)),
        "dtype": draw(st.sampled_from(dtypes)), "seed": draw(st.integers(0, 9)),
    }  # fmt: skip
    options = {
        "block_counts": draw(st.integers(1, 5)),
        "block_size": draw(st.sampled_from([16, 32, 64])),
        "window_size": draw(st.integers(0, m + 2)),
        "forced": (draw(st.integers(0, 2)), draw(st.integers(1, 3))),
    }
    cuts = draw(st.none() | st.lists(st.integers(0, m), max_size=3))
    if cuts is None:
        shape |= {"b": draw(st.integers(1, 2)), "n": m + draw(st.integers(0, 20))}
    return shape, options, None if cuts is None else [0, *sorted(cuts), m]


def check(case, device):
    shape, options, cuts = case
    cu = None if cuts is None else torch.tensor(cuts, device=device)
    assert_layer_right(*problem(device, **shape), cu, **options)


@settings(
    max_examples=1, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking in the interpreter would take minutes
)  # fmt: skip
@given(cases(20, [torch.float16, torch.float32]))
def test_any_small_problem(case):
    assert case[0]["m"] >= 1
    check(case, "cuda" if GPU else "cpu")


# Each problem compiles a dozen kernels of its own, which takes a GPU box most of a minute.
@pytest.mark.gpu
@settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
@given(cases(400, [torch.float16, torch.bfloat16, torch.float32]))
def test_any_problem(case):
    assert case[0]["m"] >= 1
    check(case, "cuda")


# -- laws ----------------------------------------------------------------------------------------


def assert_near(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def dense(q, k, v, **options):
    o = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, **options)
    return o.transpose(1, 2)


def test_all_blocks_chosen_is_dense_attention(device):
    (q, k, v, *_), _ = problem(device, m=20)
    every = torch.arange(2, dtype=torch.int32, device=device).expand(1, 20, 1, 2)
    assert_near(nsa_selected_attention(q, k, v, every, block_size=16), dense(q, k, v))
    assert_near(nsa_window_attention(q, k, v, window_size=20), dense(q, k, v))
    # blocks of one token: a compressed key is a key, and every one is complete at once
    assert_near(nsa_compressed_attention(q, k, v, block_size=1), dense(q, k, v))


def test_the_order_and_the_number_of_slots_do_not_matter(device):
    (q, k, v, *_), _ = problem(device, m=40)
    a = torch.tensor([0, 2, 1], device=device)
    b = torch.tensor([-1, 1, 2, -1, 0, 1], device=device)
    one, other = (
        nsa_selected_attention(q, k, v, x.expand(1, 40, 1, len(x)), block_size=16) for x in (a, b)
    )
    assert_near(one, other)


def test_the_output_is_linear_in_the_gates(device):
    tensors, _ = problem(device, m=20)
    qkv, gates = tensors[:3], tensors[3:]
    whole = nsa_func(*tensors, **SMALL)
    parts = [nsa_func(*alone(tensors, b), **SMALL) for b in ("compression", "selection", "window")]
    assert_near(whole, sum(parts))
    third = nsa_func(*qkv, gates[0], None, 2 * gates[2], **SMALL)
    assert_near(third, parts[0] + 2 * parts[2])


def test_each_branch_is_a_mean_of_the_values(device):
    """With values of 1 every branch gives 1, or 0 where it sees nothing."""
    (q, k, v, *_), _ = problem(device, m=20)
    ones, one = torch.ones_like(v), torch.ones(1, 20, 2, device=device)
    whole = nsa_func(q, k, ones, one, one, one, **SMALL)
    expected = 2.0 + (torch.arange(20, device=device) >= 15).float()
    assert_near(whole, expected[:, None, None].expand_as(whole))


def test_a_batch_is_its_entries(device):
    tensors, _ = problem(device, b=2, m=20)
    both = nsa_func(*tensors, **SMALL)
    assert_near(both[1:], nsa_func(*(x[1:] for x in tensors), **SMALL))


def test_what_is_added_to_every_key_moves_lse_and_nothing_else(device):
    (q, k, v, *_), _ = problem(device, m=20)
    shift = torch.randn(16, generator=torch.Generator().manual_seed(5)).to(device)
    a, b = (
        nsa_compressed_attention(q, x, v, block_size=4, stride=2, return_lse=True)
        for x in (k, k + shift)
    )
    assert_near(a[0], b[0], 1e-5)
    moved = torch.where(torch.isneginf(a[1]), 0, b[1] - a[1])
    expected = torch.where(torch.isneginf(a[1]), 0, (q @ shift).transpose(1, 2) / 4)
    assert_near(moved, expected, 1e-5)
