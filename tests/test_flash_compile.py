"""What torch's tools see of flash_attention: operators, shapes, FLOPs, what is saved, graphs."""

from __future__ import annotations

import oracle
import pytest
import torch
from flash_cases import Case, assert_right, check_case, make, ours
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from labkit.errors import LabError
from labkit.flash import DoubleBackwardError, flash_attention, flash_attention_varlen
from labkit.memory import saved_for_backward

TINY = Case(5, 9, d=16, d_v=24, heads=2, kv_heads=1, causal=True)


def operator_arguments(case, device, *, grad=False):
    q, k, v, _ = make(case, device)
    q, k, v = (t.requires_grad_(grad) for t in (q, k, v))
    scale = case.d**-0.5
    return (q, k, v, None, None, case.n_q, case.n_k, case.causal, scale, case.window, "ieee")


# -- the operators -------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_the_forward(grad, device):
    arguments = operator_arguments(TINY, device, grad=grad)
    torch.library.opcheck(torch.ops.labkit.flash_forward, arguments)


def test_opcheck_of_the_backward(device):
    q, k, v, cu_q, cu_k, *how = operator_arguments(TINY, device)
    o, lse = torch.ops.labkit.flash_forward(q, k, v, cu_q, cu_k, *how)
    dout, dlse = torch.randn_like(o), torch.randn_like(lse)
    for extra in (None, dlse):
        arguments = (dout, extra, q, k, v, o, lse, cu_q, cu_k, *how)
        torch.library.opcheck(torch.ops.labkit.flash_backward, arguments)


def test_opcheck_of_varlen(device):
    q, k, v = (torch.randn(1, 2, n, 16, device=device) for n in (9, 7, 7))
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32, device=device) for c in ([0, 4, 9], [0, 7, 7]))
    torch.library.opcheck(
        torch.ops.labkit.flash_forward,
        (q, k, v, cu_q, cu_k, 5, 7, False, 0.25, None, "ieee"),
        test_utils=("test_schema", "test_faketensor"),
    )


# -- shapes without data -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "bnhd", "expanded", "transposed_d"])
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(layout, device):
    case = TINY.but(layout=layout, batch=2)
    q, k, v, dout = make(case, device)
    real = ours(q, k, v, dout, causal=True)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v, dout)]
        fake = ours(*fakes, causal=True)
    for name, expected in real.items():
        got = fake[name]
        assert got.shape == expected.shape and got.dtype == expected.dtype, name
        assert got.stride() == expected.stride(), f"{name}: {got.stride()}, {expected.stride()}"


def test_meta_tensors_give_shapes_and_no_launch():
    q, k, v = (torch.empty(2, h, n, 64, device="meta") for h, n in ((8, 10**6), (2, 99), (2, 99)))
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert o.shape == q.shape and o.device.type == lse.device.type == "meta"
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32


def test_the_output_lies_in_memory_as_q_does(device):
    """[B, N, H, d] viewed as [B, H, N, d] comes back so that no copy is needed to view it back."""
    q, k, v, dout = make(TINY.but(layout="bnhd"), device)
    got = ours(q, k, v, dout, causal=True)
    assert got["o"].transpose(1, 2).is_contiguous()
    assert got["dq"].transpose(1, 2).is_contiguous()


# -- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(5, 9, d=16, d_v=24, heads=4, kv_heads=2, batch=3),
        Case(9, 5, d=16, d_v=24, heads=2, causal=True),
        Case(9, 20, heads=2, causal=True, window=4),
        Case(20, 9, window=4),
    ],
    ids=str,
)
def test_flops_are_those_of_the_visible_pairs(case, device):
    q, k, v, dout = make(case, device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with FlopCounterMode(display=False) as forward:
        o = flash_attention(*leaves, **case.options)
    with FlopCounterMode(display=False) as backward:
        o.backward(dout)
    hidden = oracle.hidden_pairs(case.n_q, case.n_k, causal=case.causal, window=case.window)
    pairs = case.batch * case.heads * int((~hidden).sum())
    # S and O; S again, dV, dP, dQ, dK
    assert forward.get_total_flops() == 2 * pairs * (case.d + case.dv)
    assert backward.get_total_flops() == 2 * pairs * (3 * case.d + 2 * case.dv)


# -- what autograd keeps -------------------------------------------------------------------------


@pytest.mark.parametrize("listening", [False, True])
def test_autograd_keeps_q_k_v_o_and_one_lse(listening, device):
    case = Case(40, 70, d=16, d_v=24, heads=2, kv_heads=1)
    q, k, v, _ = (t.requires_grad_() for t in make(case, device))

    def run(q, k, v):
        if not listening:
            return flash_attention(q, k, v, causal=True)
        with FlopCounterMode(display=False):  # the road through the operator
            return flash_attention(q, k, v, causal=True)

    report = saved_for_backward(run, q, k, v)
    assert sorted(t.shape for t in report.tensors if t.is_input) == sorted(
        tuple(t.shape) for t in (q, k, v)
    )
    kept = sorted((t.shape, t.dtype, t.bytes) for t in report.tensors if not t.is_input)
    assert kept == [
        ((1, 2, 40), "float32", 1 * 2 * 40 * 4),
        ((1, 2, 40, 24), "float32", 1 * 2 * 40 * 24 * 4),
    ]


def test_nothing_is_kept_without_gradients(device):
    q, k, v, _ = make(TINY, device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.no_grad():
        assert flash_attention(*leaves).grad_fn is None
    with torch.inference_mode():
        assert flash_attention(*leaves).is_inference()
    assert flash_attention(*(t.detach() for t in leaves)).grad_fn is None


def test_a_change_of_q_before_the_backward_pass_is_noticed(device):
    q, k, v, dout = make(TINY, device)
    leaves = [t.requires_grad_() for t in (q * 1, k * 1, v * 1)]
    o = flash_attention(*leaves)
    with torch.no_grad():
        leaves[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.backward(dout)


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_road_through_the_operator_gives_the_same_bits(return_lse, device):
    case = Case(20, 33, d=24, heads=2, kv_heads=1, causal=True, window=9)
    q, k, v, dout = make(case, device)
    dlse = torch.randn(q.shape[:3], device=device) if return_lse else None
    direct = ours(q, k, v, dout, dlse, **case.options)
    with FlopCounterMode(display=False):
        through = ours(q, k, v, dout, dlse, **case.options)
    for name, expected in direct.items():
        assert torch.equal(through[name], expected), name


# -- what it cannot do, and says so --------------------------------------------------------------


@pytest.mark.parametrize("listening", [False, True])
def test_a_second_derivative_is_refused_with_the_reason(listening, device):
    leaves = [t.requires_grad_() for t in make(TINY, device)[:3]]
    counter = FlopCounterMode(display=False)
    if listening:
        counter.__enter__()
    try:
        o = flash_attention(*leaves)
        first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        assert all(g.requires_grad for g in first)
        with pytest.raises(DoubleBackwardError, match="naive_attention") as caught:
            torch.autograd.grad(first[0].sum(), leaves)
    finally:
        if listening:
            counter.__exit__(None, None, None)
    assert isinstance(caught.value, LabError) and "second derivative" in str(caught.value)


def test_first_derivatives_with_create_graph_are_right(device):
    q, k, v, dout = make(TINY, device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = torch.autograd.grad(flash_attention(*leaves), leaves, dout, create_graph=True)
    expected = ours(q, k, v, dout)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert torch.equal(grad, expected[name])


def test_vmap_is_a_loop_over_the_batch(device):
    q, k, v, _ = make(TINY, device)
    factors = torch.tensor([1.0, -2.0], device=device)
    got = torch.func.vmap(lambda f: flash_attention(q * f, k, v))(factors)
    for out, f in zip(got, factors, strict=True):
        assert torch.equal(out, flash_attention(q * f, k, v))


def test_forward_mode_is_refused(device):
    """A tangent that is dropped without a word would be a derivative of 0."""
    q, k, v, _ = make(TINY, device)
    tangent = torch.ones_like(q)
    refusals = LabError, NotImplementedError
    with pytest.raises(refusals, match=r"(?i)forward"):
        torch.func.jvp(lambda x: flash_attention(x, k, v), (q,), (tangent,))
    for grad in (False, True):
        with forward_ad.dual_level(), pytest.raises(refusals, match=r"(?i)forward"):
            flash_attention(forward_ad.make_dual(q.clone().requires_grad_(grad), tangent), k, v)


def test_the_gradient_transform_is_refused(device):
    """torch.func cannot see through a custom operator's autograd; it says so itself."""
    q, k, v, _ = make(TINY, device)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: flash_attention(x, k, v).sum())(q)


# -- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_it_gives_the_same(dynamic, device):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def block(q, k, v):
        o, lse = flash_attention(q * 1.5, k, v, causal=True, return_lse=True)
        return o * 2, lse

    for n in (9, 12) if dynamic else (9,):
        q, k, v, dout = make(TINY.but(n_q=n), device)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        o, lse = block(*leaves)
        grads = torch.autograd.grad(o, leaves, dout)
        got = dict(zip(("o", "lse", "dq", "dk", "dv"), (o / 2, lse, *grads), strict=True))
        got["dq"], got["dk"], got["dv"] = got["dq"] / 3, got["dk"] / 2, got["dv"] / 2
        assert_right({n: t.detach() for n, t in got.items()}, (q * 1.5).detach(), k.detach(),
              v.detach(), dout, causal=True)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_compiled_with_inductor(dtype):
    case = Case(257, 300, 64, heads=4, kv_heads=2, batch=2, causal=True, dtype=dtype, layout="bnhd")
    q, k, v, dout = make(case, "cuda")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    compiled = torch.compile(flash_attention, fullgraph=True)
    o = compiled(*leaves, causal=True)
    grads = torch.autograd.grad(o, leaves, dout)
    expected = ours(q, k, v, dout, causal=True)
    for name, got in zip(("o", "dq", "dk", "dv"), (o, *grads), strict=True):
        assert torch.equal(got, expected[name]), name


@pytest.mark.gpu
def test_in_a_cuda_graph():
    case = Case(200, 200, 64, heads=4, batch=2, causal=True, dtype="float16")
    q, k, v, _ = make(case, "cuda")
    with torch.no_grad():
        flash_attention(q, k, v, causal=True)  # compiled, and chosen, before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = flash_attention(q, k, v, causal=True)
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(o, flash_attention(q, k, v, causal=True))


@pytest.mark.gpu
def test_on_a_stream_of_its_own():
    case = Case(500, 500, 64, heads=8, batch=4, causal=True, dtype="float16")
    with torch.cuda.stream(torch.cuda.Stream()):
        check_case(case, "cuda")


@pytest.mark.gpu
def test_varlen_compiles_around_its_look_at_the_offsets():
    q, k, v = (torch.randn(30, 2, 16, device="cuda", dtype=torch.float16) for _ in range(3))
    cu = torch.tensor([0, 9, 30], device="cuda", dtype=torch.int32)
    eager = flash_attention_varlen(q, k, v, cu, cu, causal=True)
    compiled = torch.compile(flash_attention_varlen)(q, k, v, cu, cu, causal=True)
    assert torch.equal(eager, compiled)
