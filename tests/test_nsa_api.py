"""The functions of labkit.nsa against dense float64, and what torch's tools see of them."""

from __future__ import annotations

import nsa_oracle
import oracle
import pytest
import torch
from flash_cases import poisoned
from nsa_layers import BRANCHES, NAMES, SMALL, alone, assert_layer_right, grads, problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from labkit.errors import LabError
from labkit.flash import DoubleBackwardError
from labkit.memory import saved_for_backward
from labkit.nsa import (
    TokenCompression,
    api,
    gates,
    nsa_compressed_attention,
    nsa_func,
    nsa_selected_attention,
    nsa_window_attention,
    ops,
    pool_mean,
    select_blocks,
    selection,
)
from labkit.nsa.api import attend
from labkit.nsa.call import Call


def test_the_whole_is_the_dense_formula(device):
    assert_layer_right(*problem(device, m=18, hq=4, h=2), **SMALL | {"block_counts": 1})


def test_more_blocks_than_are_read(device):
    assert_layer_right(*problem(device, m=50, d=16, dv=16), **SMALL)


def test_sequences_one_after_another(device):
    """One of them empty, one shorter than a block, one that ends with a block."""
    cu = torch.tensor([0, 5, 5, 21], device=device)
    tensors, dout = problem(device, m=21, hq=3, dv=16)
    found = assert_layer_right(
        tensors, dout, cu, block_counts=1, block_size=16, window_size=4, forced=(0, 1)
    )
    assert torch.isneginf(found["compression"]["lse"][:, :, :5]).all()


def test_fewer_queries_than_keys(device):
    tensors, dout = problem(device, m=5, n=40)
    assert_layer_right(tensors, dout, **SMALL, scale=0.7)


@pytest.mark.parametrize("off", [(0,), (1, 2), (0, 1)], ids=lambda off: f"off{off}")
def test_branches_that_are_off(off, device):
    tensors, dout = problem(device, m=20)
    tensors = [None if i - 3 in off else x for i, x in enumerate(tensors)]
    found = assert_layer_right(tensors, dout, **SMALL)
    assert (found["compression"]["lse"] is None) == (off == (0, 1))
    assert (found["sliding_window"]["lse"] is None) == (2 in off)


@pytest.mark.parametrize("window", [0, 1000])
def test_windows_that_show_nothing_or_everything(window, device):
    tensors, dout = problem(device, m=20)
    assert_layer_right(tensors, dout, **{**SMALL, "window_size": window})


def test_half_precision_with_gates_in_float32(device):
    tensors, dout = problem(device, m=9, dtype=torch.float16)
    half = [*tensors[:3], *(g.float() for g in tensors[3:])]
    ours = grads(lambda *x: nsa_func(*x, **SMALL), half, dout)
    assert ours[0].dtype == torch.float16 and ours[4].dtype == torch.float32
    same = grads(lambda *x: nsa_func(*x, **SMALL), tensors, dout)
    for name, a, b in zip(("o", *NAMES), ours, same, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [1, 63, 64, 65, 500])
def test_the_whole_in_every_dtype(m, dtype):
    tensors, dout = problem("cuda", b=2, m=m, hq=16, h=2, d=64, dv=64, dtype=dtype)
    assert_layer_right(tensors, dout, block_counts=4, block_size=64, window_size=100)


# -- branches alone ------------------------------------------------------------------------------


def check_branch(name, tensors, dout, ours, dense):
    """o, LSE and gradients of one branch; the loss uses o and LSE."""
    extra = [x.detach().requires_grad_() for x in tensors]
    o, lse = ours(*extra)
    seen = ~torch.isneginf(lse)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1)).to(lse.device)
    outs = [o, lse] if seen.any() else [o]
    got = torch.autograd.grad(outs, extra, [dout, dlse * seen][: len(outs)])

    def run(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        o, lse, _ = dense(*leaves)
        o = o + 0 * sum(x.sum() for x in leaves)
        value = torch.where(seen, lse, 0)
        back = torch.autograd.grad([o, value], leaves, [dout.to(dtype), dlse.to(dtype)])
        return o.detach(), lse.detach(), *back

    true, plain = run(torch.float64), run(o.dtype)
    assert torch.equal(seen, ~torch.isneginf(true[1])), f"{name}: −∞ elsewhere"
    assert (o.transpose(1, 2)[~seen] == 0).all(), f"{name}: a blind row is not 0"
    pairs = zip(
        ("o", "lse", "dq", "dk", "dv"), (o.detach(), lse.detach(), *got), true, plain, strict=True
    )
    for what, a, b, c in pairs:
        if what == "lse":
            a, b, c = (torch.where(seen, x, 0) for x in (a, b, c))
        oracle.assert_within_low_precision_error(
            a, b, c, what=f"{name} {what}", extra=1e-6 * b.abs() + 5e-7
        )


@pytest.mark.parametrize("varlen", [False, True])
def test_selection_alone(varlen, device):
    """−1 in any slot, a block named twice, a block of the future, counts as a tensor."""
    (q, k, v, *_), dout = problem(device, m=34, hq=4, h=2)
    cu = torch.tensor([0, 18, 34], device=device) if varlen else None
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(-1, 2, (1, 34, 2, 4), generator=generator).to(device)
    if varlen:
        blocks[:, 18:].clamp_(max=0)  # 16 tokens are one block
    counts = torch.randint(0, 5, (1, 34, 2), generator=generator).to(device)
    counts[:, 0] = 0  # a query that reads nothing
    for given in (counts,) if varlen else (3, None):
        check_branch(
            "selection", (q, k, v), dout,
            lambda *x, c=given: nsa_selected_attention(
                *x, blocks, c, 16, cu_seqlens=cu, return_lse=True
            ),
            lambda *x, c=given: nsa_oracle.selection(
                *x, blocks, block_size=16, block_counts=c, cu_seqlens=cu
            ),
        )  # fmt: skip


def test_compression_alone(device):
    """l = 8, d = 4: overlapping; and a sequence too short for one."""
    (q, k, v, *_), dout = problem(device, m=30)
    cu = torch.tensor([0, 7, 30], device=device)
    for options in ({"cu_seqlens": None}, {"cu_seqlens": cu}):
        check_branch(
            "compression", (q, k, v), dout,
            lambda *x, o=options: nsa_compressed_attention(
                *x, block_size=8, stride=4, return_lse=True, **o
            ),
            lambda *x, o=options: nsa_oracle.compression(*x, length=8, stride=4, **o),
        )  # fmt: skip


def test_compression_by_a_module(device):
    """A learned pooling takes the place of the mean, and its parameters get gradients."""
    (q, k, v, *_), dout = problem(device, m=40)
    module = TokenCompression(16, 24, kind="weighted", length=16, stride=8).to(device)
    o = nsa_compressed_attention(q, k, v, compress=module)
    same = nsa_compressed_attention(q, k, v, block_size=16, stride=8)
    torch.testing.assert_close(o, same, rtol=0, atol=2e-6)  # it begins as the mean
    o.backward(dout)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("window", [0, 1, 9, 100])
def test_the_window_alone(window, device):
    (q, k, v, *_), dout = problem(device, m=9, n=20)
    check_branch(
        "window", (q, k, v), dout,
        lambda *x: nsa_window_attention(*x, window_size=window, return_lse=True),
        lambda *x: nsa_oracle.window(*x, window_size=window),
    )  # fmt: skip


def test_choosing_alone(device):
    """With its own l, d and l′, and fewer queries than keys."""
    (q, k, *_), _ = problem(device, m=9, n=80, hq=4, h=2)
    k_cmp = pool_mean(k, 16, 8)
    _, lse, _ = nsa_oracle.compressed(q, k_cmp, k_cmp, 80, length=16, stride=8)
    got = select_blocks(
        q, k_cmp, lse.float(), block_counts=3, block_size=32, length=16, stride=8, seq_len=80,
        forced=(0, 1),
    )  # fmt: skip
    assert got.shape == (1, 9, 2, 3) and got.dtype == torch.int32
    _, score = nsa_oracle.choice(
        q.double(), k.double(), block_counts=3, block_size=32, length=16, stride=8, forced=(0, 1),
        k_cmp=k_cmp.double(),
    )  # fmt: skip
    nsa_oracle.assert_choice_is_best(
        got, score, block_size=32, block_counts=3, forced=(0, 1), tolerance=1e-5
    )


# -- what the weights can be made of again ---------------------------------------------------------


def test_the_structure_of_the_weights(device):
    tensors, _ = problem(device, b=2, m=9, hq=4, h=2)
    o, weights = nsa_func(*tensors, return_attn_weights=True, **SMALL)
    assert torch.equal(o, nsa_func(*tensors, **SMALL)), "asking for weights changes the output"
    assert list(weights) == ["compression", "selection", "sliding_window", "gating_weights"]
    for branch in ("compression", "selection"):
        assert list(weights[branch]) == ["lse", "block_indices"]
        assert weights[branch]["lse"].shape == (2, 4, 9)
        assert weights[branch]["lse"].dtype == torch.float32
        assert weights[branch]["block_indices"].shape == (2, 9, 2, 2)
        assert weights[branch]["block_indices"].dtype == torch.int32
    assert weights["sliding_window"]["lse"].shape == (2, 4, 9)
    assert weights["sliding_window"]["window_size"] == 9
    for name, gate in zip(("g_cmp", "g_slc", "g_swa"), tensors[3:], strict=True):
        assert weights["gating_weights"][name] is gate


# -- the gated sum -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("v", [16, 24, 192])
def test_the_gated_sum_is_a_sum(count, v, device):
    outs = [torch.randn(2, 5, 3, v, device=device).transpose(0, 1) for _ in range(count)]
    weights = [torch.randn(5, 3, 2, device=device).transpose(1, 2) for _ in range(count)]
    dout = torch.randn(5, 2, 3, v, device=device)
    leaves = [x.detach().requires_grad_() for x in (*outs, *weights)]
    with poisoned():
        o = gates.combine(leaves[:count], leaves[count:])
        got = torch.autograd.grad(o, leaves, dout)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    true = sum(g[..., None] * x for x, g in zip(exact[:count], exact[count:], strict=True))
    torch.testing.assert_close(o.double(), true, rtol=1e-6, atol=1e-6)
    for a, b in zip(got, torch.autograd.grad(true, exact, dout.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_gated_sum_rounds_once(device):
    """1 + 2⁻¹¹ − 1: each product rounded to half precision would lose the middle one."""
    one = torch.ones(1, 1, 1, 16, device=device, dtype=torch.float16)
    small = one * 2**-11
    gate = torch.ones(1, 1, 1, device=device, dtype=torch.float16)
    o = gates.combine([one, small, one], [gate, gate, -gate])
    assert (o == small).all()


def test_a_nan_stays_in_its_row(device):
    outs = [torch.randn(1, 9, 4, 24, device=device) for _ in range(3)]
    weights = [torch.rand(1, 9, 4, device=device) for _ in range(3)]
    clean = gates.combine(outs, weights)
    weights[1][0, 4, 2] = float("nan")
    o = gates.combine(outs, weights)
    assert o[0, 4, 2].isnan().all()
    o[0, 4, 2] = clean[0, 4, 2]
    assert torch.equal(o, clean)


# -- torch's tools -------------------------------------------------------------------------------


def operator_arguments(device, grad=False):
    (q, k, v, *_), _ = problem(device, m=9, d=16, dv=24)
    call = Call(scale=0.25, block_size=16, length=8, stride=4, count=2, max_q=9, max_k=9)
    q, k, v = (x.contiguous().requires_grad_(grad) for x in (q, k, v))
    blocks = torch.zeros(1, 9, 1, 2, dtype=torch.int32, device=device)
    pooled = [pool_mean(x.detach(), 8, 4).requires_grad_(grad) for x in (k, v)]
    return (q, k, v, blocks), (q, *pooled), ops._flat(call)


def test_opcheck_of_the_forward_operators(device):
    grad = True
    selected, compressed, flat = operator_arguments(device, grad)
    torch.library.opcheck(torch.ops.labkit.nsa_selection, (*selected, *flat))
    torch.library.opcheck(torch.ops.labkit.nsa_compression, (*compressed, *flat))
    outs = [torch.randn(1, 5, 2, 16, device=device, requires_grad=grad) for _ in range(2)]
    gs = [torch.rand(1, 5, 2, device=device, requires_grad=grad) for _ in range(2)]
    torch.library.opcheck(torch.ops.labkit.nsa_combine, (outs, gs))


def test_opcheck_of_the_backward_operators_and_the_choice(device):
    (q, k, v, blocks), (_, k_cmp, v_cmp), flat = operator_arguments(device)
    o, lse = torch.ops.labkit.nsa_selection(q, k, v, blocks, *flat)
    dout, dlse = torch.randn_like(o), torch.randn_like(lse)
    backward = torch.ops.labkit.nsa_selection_backward
    some = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        backward, (dout, dlse, q, k, v, o, lse, blocks, *flat), test_utils=some
    )
    o, lse = torch.ops.labkit.nsa_compression(q, k_cmp, v_cmp, *flat)
    backward = torch.ops.labkit.nsa_compression_backward
    torch.library.opcheck(backward, (dout, None, q, k_cmp, v_cmp, o, lse, *flat), test_utils=some)
    select = torch.ops.labkit.nsa_select_blocks
    torch.library.opcheck(select, (q, k_cmp, lse, *flat), test_utils=some)
    gs = [torch.rand(1, 9, 2, device=device)]
    combine = torch.ops.labkit.nsa_combine_backward
    torch.library.opcheck(combine, (dout, [o], gs), test_utils=some)


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(device):
    tensors, dout = problem(device, m=9)
    real = grads(lambda *x: nsa_func(*x, **SMALL), tensors, dout)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(x) for x in tensors]
        fake = grads(lambda *x: nsa_func(*x, **SMALL), fakes, mode.from_tensor(dout))
    for name, a, b in zip(("o", *NAMES), real, fake, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert a.stride() == b.stride(), f"{name}: {b.stride()}, really {a.stride()}"


def test_meta_tensors_give_shapes_and_no_launch():
    q, k = (torch.empty(2, 10**5, h, 64, device="meta") for h in (8, 2))
    gate = torch.empty(2, 10**5, 8, device="meta")
    o, weights = nsa_func(q, k, k, gate, gate, gate, return_attn_weights=True)
    assert o.shape == q.shape and o.device.type == "meta"
    assert weights["selection"]["block_indices"].shape == (2, 10**5, 2, 16)


def test_flops_are_those_of_the_pairs():
    (q, k, v, *_), dout = problem("meta", b=2, m=40)  # counted without being computed
    blocks = torch.zeros(2, 40, 1, 2, device="meta", dtype=torch.int32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    width, back = 2 * (16 + 24), 2 * (3 * 16 + 2 * 24)
    # two blocks of 16: 1, 2, …, 32 keys, then 32 each
    pairs = 2 * 2 * (32 * 33 // 2 + 8 * 32)
    with FlopCounterMode(display=False) as forward:
        o = nsa_selected_attention(*leaves, blocks, block_size=16)
    with FlopCounterMode(display=False) as backward:
        o.backward(dout)
    assert forward.get_total_flops() == width * pairs
    assert backward.get_total_flops() == back * pairs
    # keys of 16 tokens: one from query 15, two from query 31
    pairs = 2 * 2 * (16 + 2 * 9)
    with FlopCounterMode(display=False) as forward:
        o = nsa_compressed_attention(*leaves, block_size=16)
    with FlopCounterMode(display=False) as backward:
        o.backward(dout)
    assert forward.get_total_flops() == width * pairs
    assert backward.get_total_flops() == back * pairs


def test_pairs_are_counted_one_by_one():
    for m, n, slots, size in (
        (9, 9, 1, 4),
        (5, 9, 2, 4),
        (9, 9, 3, 4),
        (1, 9, 1, 4),
        (3, 20, 1, 16),
    ):
        each = [min(i + n - m + 1, slots * size) for i in range(m)]
        assert ops.selected_pairs(m, n, slots, size) == sum(each)
        seen = [sum(c * 3 + 3 < i + n - m + 1 for c in range((n - 4) // 3 + 1)) for i in range(m)]
        assert ops.compressed_pairs(m, n, 4, 3) == sum(seen)


@pytest.mark.parametrize("listening", [False, True])
def test_autograd_keeps_each_output_once(listening, device):
    """q, k, v and gates; compressed k and v; o and LSE of each branch; the chosen blocks."""
    tensors, _ = problem(device, m=40, dv=16)
    leaves = [x.detach().contiguous().requires_grad_() for x in tensors]

    def run(*leaves):
        if not listening:
            return nsa_func(*leaves, **SMALL)
        with FlopCounterMode(display=False):  # the road through the operators
            return nsa_func(*leaves, **SMALL)

    report = saved_for_backward(run, *leaves)
    kept = sorted((tuple(x.shape), x.dtype) for x in report.tensors if not x.is_input)
    o, lse = ((1, 40, 2, 16), "float32"), ((1, 2, 40), "float32")
    pooled = ((1, 2, 1, 16), "float32")
    flash = ((1, 2, 40, 16), "float32")  # the window's o, heads first, which is the same memory
    blocks = ((1, 40, 1, 2), "int32")
    unique = {entry for entry in kept}
    assert unique <= {o, lse, pooled, flash, blocks}, kept
    size = sum(x.bytes for x in report.tensors if not x.is_input)
    expected = 3 * 40 * 2 * 16 * 4 + 3 * 40 * 2 * 4 + 2 * 2 * 16 * 4 + 40 * 2 * 4
    assert size == expected, (size, expected, kept)


@pytest.fixture
def adding(monkeypatch):
    """The sum as the selection's last step, as the Hopper kernel makes it; how many it added."""
    added = []

    def forward_sum(q, k, v, blocks, call, others, gates):
        o, lse = selection.forward(q, k, v, blocks, call)
        added.append(len(others))
        parts = zip(gates, (o, *others), strict=True)
        return sum(g.float()[..., None] * x.float() for g, x in parts).to(q.dtype), lse

    monkeypatch.setattr(selection, "forward_sum", forward_sum)
    return added


@pytest.mark.parametrize(
    ("off", "window", "others"),
    [((), 8, [2]), ((), 0, [2]), ((0,), 8, [1]), ((2,), 8, [1]), ((1,), 8, []), ((0, 2), 8, [])],
)
def test_a_sum_as_the_last_step_has_the_same_parts(off, window, others, adding, device):
    tensors, _ = problem(device, m=20)
    only = [None if i - 3 in off else x for i, x in enumerate(tensors)]
    how = {**SMALL, "window_size": window, "return_attn_weights": True}
    with FlopCounterMode(display=False):  # the road through the operators
        expected, known = nsa_func(*only, **how)
    assert adding == []
    found, weights = nsa_func(*only, **how)
    assert adding == others
    torch.testing.assert_close(found, expected)
    for name in ("compression", "selection", "sliding_window"):
        lse, same = weights[name]["lse"], known[name]["lse"]
        assert lse is same is None or torch.equal(lse, same)


@pytest.mark.parametrize("graded", [False, True])
def test_the_window_goes_where_it_holds_least(graded, monkeypatch, device):
    """Last with gradients to come: autograd then takes it first.  Else first: a sum waits."""
    order = []
    for module, name in ((api, "_attend_window"), (ops, "attend_selected")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, name=name: order.append(name) or real(*a)
        )
    tensors, _ = problem(device, m=20)
    nsa_func(*(x.detach().requires_grad_(graded) for x in tensors), **SMALL)
    assert order == ["_attend_window", "attend_selected"][:: -1 if graded else 1]


def test_where_somebody_listens_each_branch_is_there_by_itself(adding, device):
    tensors, dout = problem(device, m=20)
    plain = [x.detach() for x in tensors]
    for i in range(len(plain)):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(plain)]
        torch.autograd.grad(nsa_func(*leaves, **SMALL), leaves[i], dout)
        assert adding == []
    with forward_ad.dual_level(), pytest.raises(LabError, match="forward-mode"):
        nsa_func(*plain[:5], forward_ad.make_dual(plain[5], plain[5]), **SMALL)
    assert adding == []
    # nor where only the compressed keys have a gradient
    q, k, v, *g = plain
    pooled = [pool_mean(x, 16).requires_grad_() for x in (k, v)]
    sizes = dict.fromkeys(("block_size", "length", "stride"), 16)
    call = Call(scale=0.25, **sizes, count=2, max_q=20, max_k=20)
    o, _ = attend(q, k, v, {f"g_{n}": x for n, x in zip(("cmp", "slc", "swa"), g, strict=True)},
                  call, 9, compressed=pooled)  # fmt: skip
    assert adding == [] and torch.autograd.grad(o, pooled, dout)[0].abs().sum() > 0
    with torch.no_grad():
        nsa_func(*leaves, **SMALL)
    assert adding == [2]


def test_nothing_is_kept_without_gradients(device):
    tensors, _ = problem(device, m=5)
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.no_grad():
        assert nsa_func(*leaves, **SMALL).grad_fn is None
    with torch.inference_mode():
        assert nsa_func(*leaves, **SMALL).is_inference()


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_road_through_the_operators_gives_the_same_bits(branch, device):
    tensors, dout = problem(device, m=20)
    only = alone(tensors, branch)
    direct = grads(lambda *x: nsa_func(*x, **SMALL), only, dout)
    with FlopCounterMode(display=False):
        through = grads(lambda *x: nsa_func(*x, **SMALL), only, dout)
    assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_second_derivative_is_refused_with_the_reason(branch, listening, device):
    tensors, _ = problem(device, m=5)
    only = alone(tensors, branch)
    leaves = [None if x is None else x.detach().requires_grad_() for x in only]
    counter = FlopCounterMode(display=False)
    if listening:
        counter.__enter__()
    try:
        o = nsa_func(*leaves, **SMALL)
        used = [x for x in leaves if x is not None]
        first = torch.autograd.grad(o.square().sum(), used, create_graph=True)
        with pytest.raises(DoubleBackwardError, match="second derivative") as caught:
            torch.autograd.grad(first[0].sum(), used)
    finally:
        if listening:
            counter.__exit__(None, None, None)
    assert isinstance(caught.value, LabError)


@pytest.mark.parametrize("branch", BRANCHES)
def test_forward_mode_is_refused(branch, device):
    """A tangent that is dropped without a word would be a derivative of 0."""
    tensors, _ = problem(device, m=20)
    only = alone(tensors, branch)
    with (
        forward_ad.dual_level(),
        pytest.raises((LabError, NotImplementedError), match=r"(?i)forward"),
    ):
        q = forward_ad.make_dual(only[0], torch.ones_like(only[0]))
        nsa_func(q, *only[1:], **SMALL)
    with (
        forward_ad.dual_level(),
        pytest.raises((LabError, NotImplementedError), match=r"(?i)forward"),
    ):
        gate = [
            None if g is None else forward_ad.make_dual(g * 1, torch.ones_like(g)) for g in only[3:]
        ]
        nsa_func(*only[:3], *gate, **SMALL)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_whole_it_gives_the_same(device):
    compiled = torch.compile(nsa_func, fullgraph=True, backend="aot_eager")
    tensors, dout = problem(device, m=9)
    expected = grads(lambda *x: nsa_func(*x, **SMALL), tensors, dout)
    got = grads(lambda *x: compiled(*x, **SMALL), tensors, dout)
    for name, a, b in zip(("o", *NAMES), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_inductor(dtype, dynamic):
    compiled = torch.compile(nsa_func, fullgraph=True, dynamic=dynamic)
    for m in (300, 500) if dynamic else (300,):
        tensors, dout = problem("cuda", b=2, m=m, hq=16, h=1, d=64, dv=64, dtype=dtype)
        expected = grads(lambda *x: nsa_func(*x), tensors, dout)
        got = grads(lambda *x: compiled(*x), tensors, dout)
        for name, a, b in zip(("o", *NAMES), got, expected, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=8 * eps, msg=name)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    tensors, _ = problem("cuda", m=500, hq=16, h=1, d=64, dv=64, dtype=torch.bfloat16)
    blocks = torch.randint(0, 8, (1, 500, 1, 4), device="cuda", dtype=torch.int32)
    with torch.no_grad():
        nsa_func(*tensors)
        nsa_selected_attention(*tensors[:3], blocks)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = nsa_func(*tensors)
            alone = nsa_selected_attention(*tensors[:3], blocks)
        tensors[0].copy_(torch.randn_like(tensors[0]))
        graph.replay()
        assert torch.equal(o, nsa_func(*tensors))
        assert torch.equal(alone, nsa_selected_attention(*tensors[:3], blocks))


@pytest.mark.gpu
def test_on_a_stream_of_its_own():
    tensors, dout = problem("cuda", m=300, hq=16, h=1, d=64, dv=64, dtype=torch.float16)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_layer_right(tensors, dout, block_counts=3, block_size=32, window_size=40)


# -- a memory of checked calls must not leak -------------------------------------------------------


def test_a_number_in_a_tensor_is_read_each_time(device):
    """A memory of checked calls knows a tensor by its address, not by what is in it."""
    tensors, _ = problem(device, m=20)
    scale = torch.tensor(0.1)
    nsa_func(*tensors, **SMALL, scale=scale)
    scale.fill_(2.0)
    ours = nsa_func(*tensors, **SMALL, scale=scale)
    assert torch.equal(ours, nsa_func(*tensors, **SMALL, scale=2.0))


def test_what_a_window_of_0_gives_can_be_written_to(device):
    q, k, v = problem(device, m=3)[0][:3]
    o, lse = nsa_window_attention(q, k, v, window_size=0, return_lse=True)
    o += 1
    lse[0, 0, 0] = 0
    assert (o == 1).all() and torch.isneginf(lse).sum() == lse.numel() - 1


def test_one_thing_changed_is_another_call(device):
    tensors, _ = problem(device, m=18, dv=16)
    first = nsa_func(*tensors, **SMALL)
    for change in ({"window_size": 3}, {"scale": 0.1}):
        other = nsa_func(*tensors, **{**SMALL, **change})
        assert not torch.equal(first, other), change
    assert torch.equal(first, nsa_func(*tensors, **SMALL))
