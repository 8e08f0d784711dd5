"""The backward kernels: dQ, dK, dV against float64, zero where nothing is seen, the same each time.

The bound is that of the forward pass, twice the error of plain attention in the same dtype
(flash-attention's own tests allow gradients three times).
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from flash_cases import LAYOUTS, Case, assert_right, check_case, make, matrix, ours

from labkit.flash import flash_attention
from labkit.memory import measure

ids = {"ids": str}

SMALL = [
    # every length
    Case(1, 1), Case(2, 2, causal=True), Case(5, 5, causal=True, dtype="float16"),
    Case(17, 17, window=4), Case(64, 128, causal=True, dtype="float16"),
    Case(129, 129, causal=True), Case(257, 257, causal=True, window=50),
    Case(1, 239, causal=True), Case(239, 1, causal=True), Case(3, 799, window=99),
    Case(300, 3, causal=True), Case(97, 40, causal=True),
    # every head_dim; values of another
    Case(19, 35, d=17, d_v=33), Case(19, 35, d=40, d_v=16, dtype="float16"),
    Case(19, 35, d=64, d_v=80), Case(19, 35, d=80, causal=True), Case(19, 35, d=96, d_v=64),
    Case(19, 35, d=128, window=8, dtype="float16"), Case(19, 35, d=192, d_v=128),
    Case(19, 35, d=256, dtype="float16"),
    # groups: a KV head collects the gradients of its queries
    Case(9, 40, heads=8, kv_heads=2, causal=True), Case(9, 23, heads=6, kv_heads=2),
    Case(40, 9, heads=3, kv_heads=1, causal=True, dtype="float16"),
    # windows that leave one key, or nothing
    Case(20, 50, window=1), Case(50, 20, causal=True, window=1), Case(90, 20, window=7),
    # scales and logits
    Case(33, 65, scale=1.0), Case(33, 65, d=64, factor=100.0, causal=True),
    Case(33, 65, factor=100.0, dtype="float16"),
]  # fmt: skip
LAID_OUT = [
    Case(9, 20, d=24, batch=batch, heads=2, layout=layout, causal=True, dtype=dtype)
    for layout, dtype, batch in zip(
        LAYOUTS, ("float16", "float32") * 5, (1, 1, 1, 1, 2, 1, 1, 1, 2, 2), strict=True
    )
]


@pytest.mark.parametrize("case", SMALL + LAID_OUT, **ids)
def test_gradients_are_within_twice_the_error_of_plain_attention(case, device):
    check_case(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", matrix(), **ids)
def test_full_matrix(case):
    check_case(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mask", [(False, None), (True, None), (True, 64), (False, 64)])
@pytest.mark.parametrize("n", [1, 2, 5, 17, 97, 127, 128, 129, 257, 1000])
def test_every_length_with_every_mask(n, mask, dtype):
    case = Case(n, n, 64, batch=2, causal=mask[0], window=mask[1], dtype=dtype)
    check_case(case, "cuda")


# -- rows and keys without a partner -------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [Case(60, 20, causal=True), Case(70, 20, window=5), Case(20, 70, window=6)],
    **ids,
)
def test_what_sees_nothing_and_what_is_not_seen_has_no_gradient(case, device):
    q, k, v, dout = make(case, device)
    got = ours(q, k, v, dout, **case.options)
    hidden = oracle.hidden_pairs(case.n_q, case.n_k, causal=case.causal, window=case.window)
    rows, keys = hidden.all(1).to(device), hidden.all(0).to(device)
    assert rows.any() or keys.any()
    assert (got["dq"][:, :, rows] == 0).all()
    for name in ("dk", "dv"):
        assert (got[name][:, :, keys] == 0).all() and (got[name][:, :, ~keys] != 0).any(-1).all()
    # a row with one key has P = 1 whatever q is
    several = ((~hidden).sum(1) > 1).to(device)
    assert (got["dq"][:, :, several] != 0).any(-1).all()


def test_no_gradient_arrives_and_none_leaves(device):
    q, k, v, dout = make(Case(9, 40, heads=2, kv_heads=1), device)
    got = ours(q, k, v, torch.zeros_like(dout), causal=True)
    for name in ("dq", "dk", "dv"):
        assert (got[name] == 0).all(), name


# -- NaN stays where it comes from ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "dout"])
def test_a_nan_row_spoils_its_own_dq_and_its_own_heads_dk_and_dv(name, device):
    case = Case(20, 37, heads=4, kv_heads=2, causal=True)
    tensors = dict(zip(("q", "k", "v", "dout"), make(case, device), strict=True))
    clean = ours(**tensors, causal=True)
    tensors[name][0, 2, 7, 3] = math.nan
    got = ours(**tensors, causal=True)
    assert torch.isnan(got["dq"][0, 2, 7]).all()
    assert torch.isnan(got["dk"][0, 1]).any() and torch.isnan(got["dv"][0, 1]).any()
    got["dq"][0, 2, 7] = clean["dq"][0, 2, 7]
    assert torch.equal(got["dq"], clean["dq"]), "dq: the NaN is in another row"
    for other in ("dk", "dv"):
        got[other][0, 1] = clean[other][0, 1]
        assert torch.equal(got[other], clean[other]), f"{other}: the NaN is in another head"


def test_a_nan_key_spoils_only_the_queries_that_see_it(device):
    q, k, v, dout = make(Case(32, 40, heads=2), device)
    options = {"causal": True, "window": 8}
    clean = ours(q, k, v, dout, **options)
    k[0, 1, 20, 3] = math.nan
    got = ours(q, k, v, dout, **options)
    spoilt = torch.isnan(got["dq"]).any(-1)
    assert spoilt[0, 1, 12:20].all()
    # 0 · NaN is NaN: a query that shares a tile with this key takes it in through dS K
    for name in ("dq", "dk", "dv"):
        got[name][0, 1] = clean[name][0, 1]
        assert torch.equal(got[name], clean[name]), f"{name}: the NaN is in another head"


# -- the gradient that arrives -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("lone", [False, True])
def test_gradient_of_lse(lone, dtype, device):
    """A loss of O and LSE, and one of LSE alone."""
    case = Case(40, 33, d=24, d_v=40, heads=2, kv_heads=1, causal=True, dtype=dtype)
    q, k, v, dout = make(case, device)
    dlse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1)).to(device)
    if lone:
        dout = torch.zeros_like(dout)
    got = ours(q, k, v, dout, dlse, causal=True)
    if lone:
        assert (got["dv"] == 0).all()
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        lse = flash_attention(*leaves, causal=True, return_lse=True)[1]
        seen = ~torch.isneginf(lse)
        grads = torch.autograd.grad(lse, leaves, dlse * seen, allow_unused=True)
        assert torch.equal(grads[0], got["dq"]) and torch.equal(grads[1], got["dk"])
        assert grads[2] is None or (grads[2] == 0).all()
    assert_right(got, q, k, v, dout, dlse, causal=True)


def test_gradient_of_a_sum_is_a_number_with_strides_of_zero(device):
    q, k, v, _ = make(Case(17, 41, heads=2, causal=True), device)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    flash_attention(*leaves, causal=True).sum().backward()
    one = torch.ones(1, 2, 17, 16, device=device)
    expected = ours(q, k, v, one, causal=True)
    for leaf, name in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert torch.equal(leaf.grad, expected[name])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_only_the_gradients_that_are_asked_for(wanted, device):
    q, k, v, dout = make(Case(20, 30), device)
    full = ours(q, k, v, dout)
    named = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
    for name in wanted:
        named[name].requires_grad_()
    flash_attention(*named.values()).backward(dout)
    for name, leaf in named.items():
        if name in wanted:
            assert torch.equal(leaf.grad, full[f"d{name}"])
        else:
            assert leaf.grad is None


def test_gradients_reach_through_views(device):
    """Packed in one projection, as a model has them: the gradient of the whole is dense."""
    packed = torch.randn(1, 19, 3, 2, 16, device=device, requires_grad=True)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    out = flash_attention(q, k, v, causal=True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device)
    out.backward(dout)
    expected = ours(q, k, v, dout, causal=True)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert torch.equal(packed.grad[:, :, i].transpose(1, 2), expected[name])


def test_one_tensor_for_all_three_collects_all_three_gradients(device):
    x = torch.randn(1, 1, 37, 16, device=device)
    dout = torch.randn(1, 1, 37, 16, device=device)
    got = ours(x, x, x, dout, causal=True)
    leaf = x.clone().requires_grad_()
    flash_attention(leaf, leaf, leaf, causal=True).backward(dout)
    total = got["dq"] + got["dk"] + got["dv"]
    torch.testing.assert_close(leaf.grad, total, rtol=0, atol=1e-5)


# -- memory --------------------------------------------------------------------------------------


def test_grouped_heads_cost_no_copy_of_k_and_v(device):
    q, k, v, _ = make(Case(40, 96, d=128, heads=8, kv_heads=1, dtype="float16"), device)
    o_and_lse = q.numel() * 2 + q.shape[1] * q.shape[2] * 4
    with torch.no_grad():
        report = measure(lambda *t: flash_attention(*t, causal=True), q, k, v)
    assert report.measured is not None
    repeated = 8 * k.numel() * 2
    assert report.measured < o_and_lse + repeated / 4, str(report)


@pytest.mark.gpu
def test_extra_memory_is_the_output_and_the_lse():
    case = Case(4096, 4096, 64, heads=16, kv_heads=4, batch=2, causal=True, dtype="bfloat16")
    q, k, v, _ = make(case, "cuda")
    with torch.no_grad():
        report = measure(lambda *t: flash_attention(*t, causal=True), q, k, v)
    expected = q.numel() * 2 + q.shape[0] * q.shape[1] * q.shape[2] * 4
    assert report.measured <= expected * 1.001, str(report)


@pytest.mark.gpu
def test_training_peak_is_the_gradients_and_two_numbers_per_row():
    case = Case(4096, 4096, 64, heads=16, kv_heads=4, batch=2, causal=True, dtype="bfloat16")
    q, k, v, dout = make(case, "cuda")

    def step(q, k, v, dout):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(flash_attention(*leaves, causal=True), leaves, dout)

    report = measure(step, q, k, v, dout)
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    kept = q.numel() * 2 + rows * 4  # o and LSE
    # dq, dk, dv; delta; and the float32 sum of dq if a kernel keeps one
    made = (q.numel() + k.numel() + v.numel()) * 2 + rows * 4 + q.numel() * 4
    assert report.measured <= (kept + made) * 1.02, str(report)


# -- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_q", "n_k", "options"),
    [
        (2, 3, {}), (3, 2, {"causal": True}), (2, 4, {"causal": True, "window": 2}),
        (4, 2, {"window": 1}),
    ],
)  # fmt: skip
def test_gradcheck_of_the_oracle(n_q, n_k, options):
    q = torch.randn(1, 2, n_q, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, n_k, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 1, n_k, 3, dtype=torch.float64, requires_grad=True)

    def o_and_lse(q, k, v):
        o, s, _ = oracle.attention(q, k, v, **options)
        lse = oracle.log_sum_exp(s)
        return o, torch.where(torch.isneginf(lse), 0.0, lse)

    assert torch.autograd.gradcheck(o_and_lse, (q, k, v))


def test_oracle_agrees_with_the_library():
    q, k, v, _ = (t.double() for t in make(Case(17, 17, heads=4, kv_heads=2)))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(oracle.attention(q, k, v, causal=True)[0], expected)
    seen = ~oracle.hidden_pairs(9, 17, causal=True, window=4)
    assert seen.sum(1).tolist() == [4] * 9 and seen[-1, -1] and not seen[-1, 12]
    seen = ~oracle.hidden_pairs(9, 9, causal=False, window=3)
    assert torch.equal(seen, seen.T) and seen[4].tolist() == [2 <= j <= 6 for j in range(9)]


# -- deterministic, large ------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(500, 999, 64, heads=8, kv_heads=2, batch=2, causal=True, dtype="float16"),
        Case(1000, 1000, 128, heads=8, batch=2, causal=True, dtype="bfloat16"),
        Case(1024, 1024, 128, heads=8, batch=2, dtype="bfloat16"),
        Case(500, 500, 64, heads=4, causal=True, window=100, dtype="float32"),
    ],
    **ids,
)
def test_gradients_are_the_same_to_the_bit_250_times(case):
    q, k, v, dout = make(case, "cuda")
    first = ours(q, k, v, dout, **case.options)
    for _ in range(250):
        again = ours(q, k, v, dout, **case.options)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gradients_of_tensors_of_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    n, d = 2**25 + 77, 64  # n · d > 2³¹
    q, dout = (torch.randn(1, 1, n, d, device="cuda", dtype=torch.float16) for _ in range(2))
    k, v = (torch.randn(1, 1, 40, d, device="cuda", dtype=torch.float16) for _ in range(2))
    dout[:, :, : n - 300] = 0  # dk and dv are sums over all queries: the last ones' only
    got = ours(q, k, v, dout)
    tail = slice(n - 300, n)
    assert_right(
        {name: x if name in ("dk", "dv") else x[:, :, tail] for name, x in got.items()},
        q[:, :, tail], k, v, dout[:, :, tail],
    )  # fmt: skip
    assert (got["dq"][:, :, : n - 300] == 0).all()


@pytest.mark.gpu
def test_gradients_of_keys_of_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    n, d = 2**25 + 77, 64
    k, v = (torch.randn(1, 1, n, d, device="cuda", dtype=torch.float16) for _ in range(2))
    q, dout = (torch.randn(1, 1, 9, d, device="cuda", dtype=torch.float16) for _ in range(2))
    got = ours(q, k, v, dout, causal=True, window=500)
    tail = slice(n - 600, n)
    assert_right(
        {name: x[:, :, tail] if name in ("dk", "dv") else x for name, x in got.items()},
        q, k[:, :, tail], v[:, :, tail], dout, causal=True, window=500,
    )  # fmt: skip
    assert (got["dk"][:, :, : n - 600] == 0).all() and (got["dv"][:, :, : n - 600] == 0).all()


@pytest.mark.gpu
def test_rows_that_lie_four_gigabytes_apart():
    """Offsets inside one tile do not fit 32 bits."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    far = torch.full((2**32 + 64,), math.nan, device="cuda", dtype=torch.float16)
    q, k, v, dout = make(Case(128, 128, 64, causal=True, dtype="float16"), "cuda")
    for name in ("q", "k", "v", "dout"):
        tensors = {"q": q, "k": k, "v": v, "dout": dout}
        tensors[name] = far.as_strided((1, 1, 128, 64), (0, 0, 2**25, 1)).copy_(tensors[name])
        assert_right(ours(**tensors, causal=True), **tensors, causal=True)
