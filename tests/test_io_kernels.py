"""The kernels of chapter 06: right against float64, at any size, within the bounds of tensors."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_within_low_precision_error, attention, attention_f64
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from labkit import kernels
from labkit.errors import ArgumentError
from labkit.kernels.tiles import TILED_ORDERS

GPU = torch.cuda.is_available()
ORDERS = ("naive", *TILED_ORDERS)
#: (Nq, Nk, d, dv)
SHAPES = [(1, 1, 16, 16), (2, 5, 8, 24), (17, 33, 40, 16), (1, 70, 16, 16), (65, 1, 16, 16)]


def attend(order, q, k, v, **options):
    if order == "naive":
        return kernels.naive_in_kernels(q, k, v, **options)
    return kernels.tiled_attention(q, k, v, order=order, **options)


def inputs(nq, nk, d, dv, dtype, device, scale=1.0, batch=2, heads=1):
    q = torch.randn(batch, heads, nq, d) * scale
    k, v = torch.randn(batch, heads, nk, d), torch.randn(batch, heads, nk, dv)
    return [t.to(dtype).to(device) for t in (q, k, v)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_twice_the_error_of_plain_attention(order, shape, device):
    q, k, v = inputs(*shape, torch.float32, device)
    out = attend(order, q, k, v, block_m=32, block_n=16)
    oracle, plain = attention_f64(q, k, v)[0], attention(q, k, v)[0]
    assert_within_low_precision_error(out, oracle, plain)


@pytest.mark.parametrize("order", ORDERS)
def test_half_precision_and_huge_scores(order, device):
    # 100 times larger scores: without the maximum of the row, the exponential overflows
    q, k, v = inputs(20, 40, 16, 16, torch.float16, device, scale=100.0)
    out = attend(order, q, k, v, block_m=16, block_n=16)
    # S and P in float16, and O between the passes of kv_outer, as plain attention rounds them
    oracle, plain = attention_f64(q, k, v)[0], attention(q, k, v)[0]
    assert_within_low_precision_error(out, oracle, plain, factor=3.0)


@pytest.mark.parametrize("order", TILED_ORDERS)
def test_lse_is_the_logarithm_of_the_sum(order, device):
    q, k, v = inputs(20, 40, 16, 16, torch.float32, device, scale=3.0)
    _, lse = kernels.tiled_attention(
        q, k, v, order=order, block_m=16, block_n=16, return_lse=True, scale=0.3
    )
    s = q.double() @ k.double().mT * 0.3
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_beyond_the_tensors_is_read(order, device):
    whole = [torch.full((1, 1, 40, 16), float("nan"), device=device) for _ in range(3)]
    for tensor in whole:
        tensor[:, :, :21] = torch.randn(1, 1, 21, 16, device=device)
    # views that end inside their storage: NaN lies where the first unmasked lane would read
    q, k, v = (t[:, :, :21] for t in whole)
    out = attend(order, q, k, v, block_m=32, block_n=32)
    assert torch.isfinite(out).all()
    oracle, plain = attention_f64(q, k, v)[0], attention(q, k, v)[0]
    assert_within_low_precision_error(out, oracle, plain)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("order", ORDERS)
def test_a_nan_in_q_stays_in_its_row(order, device):
    q, k, v = inputs(20, 20, 16, 16, torch.float32, device, batch=1)
    q[0, 0, 3, 5] = float("nan")
    out = attend(order, q, k, v, block_m=16, block_n=16)
    bad = out.isnan().any(-1).flatten().nonzero().flatten().tolist()
    assert bad == [3]


@pytest.mark.parametrize("order", ORDERS)
def test_strided_inputs(order, device):
    q, k, v = inputs(16, 18, 16, 16, torch.float32, device, heads=2)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert not views[0].is_contiguous()
    same = attend(order, q, k, v, block_m=16, block_n=16)
    assert torch.equal(attend(order, *views, block_m=16, block_n=16), same)


def test_torch_sees_shapes_and_flops(device):
    q, k, v = inputs(20, 30, 16, 24, torch.float32, device)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        out, lse = torch.ops.labkit.tiled_attention(*fakes, "q_outer", 0.25, 16, 16)
        assert out.shape == (2, 1, 20, 24) and lse.shape == (2, 1, 20)
        s = torch.ops.labkit.naive_scores(*fakes[:2], 0.25, 16, 16)
        p = torch.ops.labkit.naive_softmax(s)
        assert p.shape == (2, 1, 20, 30)
        assert torch.ops.labkit.naive_output(p, fakes[2], 16, 16).shape == (2, 1, 20, 24)
    pairs = 2 * 20 * 30
    for order, columns in (("naive", 40), ("q_outer", 40), ("kv_outer", 40), ("two_pass", 56)):
        with FlopCounterMode(display=False) as counter:
            attend(order, q, k, v, block_m=16, block_n=16)
        assert counter.get_total_flops() == 2 * pairs * columns, order


@pytest.mark.parametrize("order", TILED_ORDERS)
def test_opcheck(order, device):
    q, k, v = inputs(5, 7, 16, 16, torch.float32, device, batch=1)
    args = (q, k, v, order, 0.25, 16, 16)
    checked = torch.library.opcheck(torch.ops.labkit.tiled_attention, args)
    assert set(checked.values()) == {"SUCCESS"}


def test_bad_input_is_named(device):
    q, k, v = inputs(4, 4, 16, 16, torch.float32, device, heads=2)
    for options, what in (
        ({"block_m": 24}, "block_m = 24"),
        ({"block_n": 8}, "block_n = 8"),
        ({"scale": -1.0}, "scale = -1.0"),
        ({"order": "k_outer"}, "Did you mean 'kv_outer'"),
    ):
        with pytest.raises(ArgumentError, match=what):
            kernels.tiled_attention(q, k, v, **options)
    with pytest.raises(ArgumentError, match="2: these kernels have one per head"):
        kernels.tiled_attention(q, k[:, :1], v[:, :1])
    with pytest.raises(ArgumentError, match="float64"):
        kernels.naive_in_kernels(q.double(), k.double(), v.double())


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_bfloat16_is_refused_in_the_interpreter():
    q, k, v = inputs(4, 4, 16, 16, torch.bfloat16, "cpu")
    for order in ORDERS:
        with pytest.raises(ArgumentError, match="bfloat16"):
            attend(order, q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [127, 1000])
@pytest.mark.parametrize("tile", [(16, 64), (128, 64)])
def test_compiled(order, dtype, n, tile):
    q, k, v = inputs(n, n, 64, 64, dtype, "cuda", heads=4)
    out = attend(order, q, k, v, block_m=tile[0], block_n=tile[1])
    oracle, plain = attention_f64(q, k, v)[0], attention(q, k, v)[0]
    # kv_outer rounds O once per tile of keys, sixteen times here, where plain rounds it once
    factor = 8.0 if order == "kv_outer" else 2.0
    assert_within_low_precision_error(out, oracle, plain, factor=factor)


@pytest.mark.gpu
def test_rows_written_by_one_iteration_are_read_by_the_next():
    # a missing barrier would show as a difference between runs
    q, k, v = inputs(2048, 2048, 64, 64, torch.float16, "cuda", heads=8)
    options = {"order": "kv_outer", "block_m": 64, "block_n": 64}
    first = kernels.tiled_attention(q, k, v, **options)
    for _ in range(20):
        assert torch.equal(kernels.tiled_attention(q, k, v, **options), first)
