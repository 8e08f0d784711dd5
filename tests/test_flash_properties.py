"""What holds for any shape: the bound, and laws of attention that need no oracle."""

from __future__ import annotations

import pytest
import torch
from flash_cases import CHECKS, LAYOUTS, Case, assert_right, check_case, lay_out, make, ours
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from labkit.flash import flash_attention, launch

GPU = torch.cuda.is_available()


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_that_catch_broken_kernels_pass_whole_ones(name, device):
    CHECKS[name](device)  # test_flash_mutants shows that each of them can fail
    assert name in CHECKS


@st.composite
def cases(draw, largest, dtypes):
    kv_heads = draw(st.integers(1, 2))
    return Case(
        n_q=draw(st.integers(1, largest)),
        n_k=draw(st.integers(1, largest)),
        d=draw(st.integers(16, 64) | st.sampled_from([80, 96, 128, 256])),
        d_v=draw(st.none() | st.integers(16, 64) | st.sampled_from([80, 128, 256])),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        batch=draw(st.integers(1, 2)),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, largest + 3)),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        factor=draw(st.sampled_from([1.0, 1.0, 100.0])),
        scale=draw(st.none() | st.floats(0.01, 1.0)),
    )


@settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking in the interpreter would take minutes
)  # fmt: skip
@given(cases(33, ["float16", "float32"]))
def test_any_small_problem(case):
    check_case(case, "cuda" if GPU else "cpu")


@pytest.mark.gpu
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(cases(600, ["float16", "bfloat16", "float32"]))
def test_any_problem(case):
    check_case(case, "cuda")


# -- laws --------------------------------------------------------------------------------------


def assert_near(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_the_order_of_the_keys_does_not_matter(device):
    q, k, v, dout = make(Case(20, 75, d=16), device)
    order = torch.randperm(75).to(device)
    a, b = ours(q, k, v, dout), ours(q, k[:, :, order], v[:, :, order], dout)
    for name in ("o", "lse", "dq"):
        assert_near(a[name], b[name])
    assert_near(a["dk"][:, :, order], b["dk"])


def test_what_is_added_to_every_key_moves_lse_and_nothing_else(device):
    q, k, v, _ = make(Case(20, 75, d=16), device)
    shift = torch.randn(16).to(device)
    a, b = ours(q, k, v, causal=True), ours(q, k + shift, v, causal=True)
    assert_near(a["o"], b["o"], 1e-5)
    assert_near(b["lse"] - a["lse"], (q @ shift) / 4, 1e-5)


def test_the_output_is_a_mean_of_the_values(device):
    q, k, v, _ = make(Case(40, 75, d=16, causal=True), device)
    out = flash_attention(q, k, v, causal=True)
    assert (out <= v.amax(2, keepdim=True) + 1e-6).all()
    assert (out >= v.amin(2, keepdim=True) - 1e-6).all()
    ones = flash_attention(q, k, torch.ones_like(v), causal=True)
    assert_near(ones, torch.ones_like(ones))


def test_the_output_is_linear_in_the_values(device):
    q, k, v, other = make(Case(40, 40, d=16), device)
    a, b = flash_attention(q, k, v, window=9), flash_attention(q, k, other, window=9)
    assert_near(flash_attention(q, k, 2 * v - 3 * other, window=9), 2 * a - 3 * b, 1e-5)


def test_gradients_of_q_and_k_agree_on_the_scores(device):
    """Σ q · dq = Σ S ∘ dS = Σ k · dk: both sums are the same one."""
    case = Case(50, 40, d=16, heads=2, kv_heads=1, causal=True, window=20)
    q, k, v, dout = make(case, device)
    got = ours(q, k, v, dout, **case.options)
    a, b = (q.double() * got["dq"]).sum(), (k.double() * got["dk"]).sum()
    size = (q.double() * got["dq"]).abs().sum()
    assert abs(a - b) < 1e-6 * size


def test_the_window_may_be_as_large_as_an_int(device):
    q, k, v, dout = make(Case(20, 30, d=16), device)
    for window in (50, 2**31 - 1, 2**40):
        for causal in (False, True):
            got = ours(q, k, v, dout, causal=causal, window=window)
            assert_right(got, q, k, v, dout, causal=causal)


# -- plans: what is decided for one call must not leak into another --------------------------------


def test_a_second_call_reads_its_own_tensors(device):
    case = Case(40, 50, d=16, heads=2, causal=True)
    for seed in range(2):  # other values, other memory, the same plan
        q, k, v, dout = make(case.but(scale=None), device)
        q, k, v, dout = (t + seed for t in (q, k, v, dout))
        assert_right(ours(q, k, v, dout, causal=True), q, k, v, dout, causal=True)


@pytest.mark.parametrize(
    "change",
    [
        {"causal": True}, {"window": 7}, {"window": 8}, {"scale": 0.3}, {"n_q": 21}, {"n_k": 34},
        {"d_v": 40}, {"heads": 4}, {"layout": "bnhd"}, {"layout": "strided_d"},
        {"dtype": "float16"},
    ],
    ids=str,
)  # fmt: skip
def test_one_thing_changed_is_another_plan(change, device):
    first = Case(20, 33, d=16, heads=2)
    check_case(first, device, backward=False)
    check_case(first.but(**change), device, backward=False)


def aligned_or_not(x, aligned):
    return x if aligned else lay_out(x, "offset")


def test_alignments_do_not_share_a_plan():
    """A kernel compiled for a q that is aligned to 16 bytes must not be given one that is not."""
    q, k, v, dout = make(Case(20, 33, d=16))
    call = launch.Call(False, 0.25, None, "ieee", 20, 33)
    keys = {
        launch._key(call, aligned_or_not(q, a), aligned_or_not(k, b), aligned_or_not(v, c), dout)
        for a in (True, False) for b in (True, False) for c in (True, False)
    }  # fmt: skip
    assert len(keys) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_any_order_of_alignments_is_right(dtype):
    case = Case(128, 128, d=64, heads=2, causal=True, dtype=dtype)
    q, k, v, dout = make(case, "cuda")
    dlse = torch.randn(1, 2, 128, device="cuda")
    for which in range(16):
        tensors = [
            aligned_or_not(x, not which >> i & 1) for i, x in enumerate((q, k, v, dout))
        ]
        shifted = torch.empty(257, device="cuda")[1:].view(1, 2, 128).copy_(dlse)
        for extra in (None, dlse, shifted):
            assert_right(ours(*tensors, extra, causal=True), q, k, v, dout, extra, causal=True)


def test_plans_are_not_kept_for_ever():
    """A run whose lengths differ each step must not fill the memory with what it decided."""
    before = len(launch._plans)
    for n in range(1, 2200):
        q = torch.empty(1, 1, n, 16, device="meta" if not GPU else "cuda")
        key = ("test", *launch._key(launch.Call(False, 1.0, None, "ieee", n, n), q))
        launch._remember(key, None)
    assert len(launch._plans) < before + 2100
