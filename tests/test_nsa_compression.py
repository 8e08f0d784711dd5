"""Attention to compressed keys: forward and gradients against a dense float64 formulation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import nsa_oracle
import pytest
import torch
from oracle import assert_within_low_precision_error

from labkit.flash.tuning import Config
from labkit.nsa import compression
from labkit.nsa.call import Call
from labkit.nsa.pooling import compressed_bounds


@dataclass(frozen=True)
class Case:
    """One problem; ``lengths`` of the sequences of a varlen batch, then m is their sum."""

    m: int = 45
    n: int | None = None
    group: int = 2
    heads: int = 2
    d: int = 16
    d_v: int | None = None
    length: int = 4
    stride: int | None = None
    batch: int = 1
    dtype: str = "float32"
    lengths: tuple[int, ...] | None = None
    scale: float | None = None
    precision: str = "ieee"

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case, k)}
        return "-".join(f"{k}{v}".replace(" ", "") for k, v in changed.items()) or "plain"

    @property
    def keys(self) -> int:
        return sum(self.lengths) if self.lengths else self.n or self.m

    def call(self, device) -> Call:
        stride = self.stride or self.length
        scale = self.d**-0.5 if self.scale is None else self.scale
        sizes = dict(max_q=self.m, max_k=self.keys)
        if self.lengths:
            cu = torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)
            sizes = dict(max_q=max(self.lengths), max_k=max(self.lengths), cu=cu,
                         cu_cmp=compressed_bounds(cu, self.length, stride))  # fmt: skip
        return Call(scale=scale, precision=self.precision, length=self.length, stride=stride,
                    block_size=self.length, **sizes)  # fmt: skip

    def draw(self, device):
        """q, k_cmp, v_cmp and gradients of o and LSE."""
        torch.manual_seed(0)  # a case drawn twice is the same
        call, dtype = self.call(device), getattr(torch, self.dtype)
        m = self.keys if self.lengths else self.m
        count = call.compressed if call.cu is None else int(call.cu_cmp[-1])
        hq, d_v = self.heads * self.group, self.d_v or self.d
        shapes = [(m, hq, self.d), (count, self.heads, self.d), (count, self.heads, d_v)]
        inputs = [torch.randn(self.batch, *s, device=device).to(dtype) for s in shapes]
        dout = torch.randn(self.batch, m, hq, d_v, device=device).to(dtype)
        return inputs, dout, torch.randn(self.batch, hq, m, device=device)

    def dense(self, inputs, dout, dlse, dtype):
        """O, LSE and gradients by autograd through the oracle, run in ``dtype``."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        cu = None if self.lengths is None else self.call("cpu").cu
        o, lse, _ = nsa_oracle.compressed(
            *leaves, self.keys, length=self.length, stride=self.stride or self.length,
            scale=self.scale, cu_seqlens=cu,
        )  # fmt: skip
        if not o.requires_grad:
            return o, lse, [torch.zeros_like(x) for x in leaves]
        dead = torch.isneginf(lse)
        loss = [o, torch.where(dead, torch.zeros_like(lse), lse)]
        grads = torch.autograd.grad(loss, leaves, [dout.to(dtype), dlse.to(dtype)])
        return o.detach(), lse.detach(), grads


def check(case, device, *, config=None, parts=None):
    """O, LSE, dQ, dK and dV of a case are as close as plain attention in the same dtype."""
    inputs, dout, dlse = case.draw(device)
    call = case.call(device)
    o, lse = compression.forward(*inputs, call, config=config)
    grads = compression.backward(
        dout, dlse, *inputs, o, lse, call, dq_config=config, dkdv_config=config, parts=parts
    )
    exact = case.dense(inputs, dout, dlse, torch.float64)
    plain = case.dense(inputs, dout, dlse, getattr(torch, case.dtype))
    assert_within_low_precision_error(o, exact[0], plain[0], what="o")
    dead = torch.isneginf(exact[1])
    assert torch.equal(torch.isneginf(lse), dead)
    assert not o.transpose(1, 2)[dead].any(), "a query that sees nothing has output 0"
    torch.testing.assert_close(lse[~dead].double(), exact[1][~dead], atol=2e-5, rtol=1e-6)
    for name, ours, true, same in zip(("dq", "dk", "dv"), grads, exact[2], plain[2], strict=True):
        if ours.numel():
            assert_within_low_precision_error(ours, true, same, factor=3, what=name)
    return o, lse, grads


CASES = [
    Case(),
    Case(m=50, length=8, stride=4, d_v=24, group=1, heads=1),
    Case(m=20, length=6, stride=5, group=3, heads=1, d=20, batch=2),
    Case(m=5, n=83, group=4, heads=1, scale=0.7),
    Case(m=1, n=40, group=8),
    Case(lengths=(3, 20, 0, 11, 4), heads=1),
    Case(lengths=(9, 22), length=6, stride=4, group=3, heads=1),
    Case(m=20, dtype="float16", group=4, heads=1),
    Case(m=3, length=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case, device):
    check(case, device)


def test_tiles_of_every_kind_agree(device):
    case = Case(m=44, length=2, heads=1, group=2)
    inputs, dout, dlse = case.draw(device)
    exact = case.dense(inputs, dout, dlse, torch.float64)
    for config, parts in ((Config(16, 16, 4, 1), 3), (Config(64, 32, 4, 1), 1)):
        o, _, grads = check(case, device, config=config, parts=parts)
        assert (o - exact[0]).abs().max() < 2e-6
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(grads, exact[2], strict=True))


@pytest.mark.parametrize("parts", [2, 1000])
def test_the_number_of_parts_only_changes_roundings(parts, device):
    case = Case(m=40, n=47, heads=1)
    inputs, dout, dlse = case.draw(device)
    o, lse = compression.forward(*inputs, case.call(device))
    _, dk, dv = compression.backward(dout, dlse, *inputs, o, lse, case.call(device), parts=parts)
    _, _, exact = case.dense(inputs, dout, dlse, torch.float64)
    torch.testing.assert_close(dk.double(), exact[1], atol=5e-6, rtol=0)
    torch.testing.assert_close(dv.double(), exact[2], atol=5e-6, rtol=0)


def test_gradients_are_the_same_to_the_bit(device):
    case = Case(m=45, heads=1)
    inputs, dout, dlse = case.draw(device)
    call = case.call(device)
    o, lse = compression.forward(*inputs, call)
    first = compression.backward(dout, dlse, *inputs, o, lse, call, parts=3)
    for _ in range(250 if device == "cuda" else 1):
        again = compression.backward(dout, dlse, *inputs, o, lse, call, parts=3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_gradient_of_lse_is_a_gradient_of_zero(device):
    case = Case(m=20, heads=1)
    inputs, dout, dlse = case.draw(device)
    call = case.call(device)
    o, lse = compression.forward(*inputs, call)
    without = compression.backward(dout, None, *inputs, o, lse, call)
    zero = compression.backward(dout, torch.zeros_like(dlse), *inputs, o, lse, call)
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))
    some = compression.backward(dout, dlse, *inputs, o, lse, call)
    assert not torch.equal(some[0], without[0])


def test_what_arrives_at_the_lse_of_an_empty_row_stops_there(device):
    case = Case(m=6, length=4, heads=1)
    inputs, dout, dlse = case.draw(device)
    call = case.call(device)
    o, lse = compression.forward(*inputs, call)
    dlse[..., :3] = float("nan")  # as d/dx of log Σ exp of nothing is
    grads = compression.backward(dout, dlse, *inputs, o, lse, call)
    assert all(torch.isfinite(x).all() for x in grads)
    assert not grads[0][:, :3].any()


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (6, 4)])
def test_a_compressed_key_is_seen_from_its_last_token_on(length, stride, device):
    case = Case(m=24, length=length, stride=stride, heads=1)
    (q, k, v), _, _ = case.draw(device)
    call, changed = case.call(device), 2
    o, lse = compression.forward(q, k, v, call)
    k[:, changed], v[:, changed] = 0.1, 1e6
    o_2, lse_2 = compression.forward(q, k, v, call)
    first = changed * stride + length - 1
    assert torch.equal(o[:, :first], o_2[:, :first])
    assert torch.equal(lse[..., :first], lse_2[..., :first])
    assert (o_2[:, first:] != o[:, first:]).all()
    assert (lse_2[..., first:] != lse[..., first:]).all()


def test_a_sequence_is_done_as_it_would_be_alone(device):
    case = Case(lengths=(21, 0, 14), heads=1)
    (q, k, v), dout, dlse = case.draw(device)
    call = case.call(device)
    q[:, 21:], k[:, 5:], v[:, 5:] = float("nan"), float("nan"), float("nan")
    o, lse = compression.forward(q, k, v, call)
    grads = compression.backward(dout, dlse, q, k, v, o, lse, call, parts=2)
    alone = replace(case, m=21, lengths=None).call(device)
    q, k, v, dout, dlse = q[:, :21], k[:, :5], v[:, :5], dout[:, :21], dlse[..., :21]
    o_1, lse_1 = compression.forward(q, k, v, alone)
    assert torch.equal(o[:, :21], o_1)
    assert torch.equal(lse[..., :21], lse_1)
    expected = compression.backward(dout, dlse, q, k, v, o_1, lse_1, alone, parts=2)
    for ours, want in zip(grads, expected, strict=True):
        assert torch.equal(ours[:, : want.shape[1]], want)


def test_offsets_of_64_bits_are_as_good(device):
    case = Case(lengths=(9, 12), heads=1)
    inputs, _, _ = case.draw(device)
    call = case.call(device)
    wide = replace(call, cu=call.cu.long(), cu_cmp=call.cu_cmp.long())
    for a, b in zip(
        compression.forward(*inputs, call), compression.forward(*inputs, wide), strict=True
    ):
        assert torch.equal(a, b)


def test_strided_views_are_read_where_they_lie(device):
    case = Case(m=9, group=3)
    inputs, dout, dlse = case.draw(device)
    call = case.call(device)
    o, lse = compression.forward(*inputs, call)
    grads = compression.backward(dout, dlse, *inputs, o, lse, call)

    def strange(x):  # heads first in memory, and every other element of a longer last axis
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        wide = wide.to(device).transpose(1, 2).contiguous().transpose(1, 2)
        wide[..., ::2] = x
        return wide[..., ::2]

    views, g = [strange(x) for x in inputs], strange(dout)
    o_2, lse_2 = compression.forward(*views, call)
    assert torch.equal(o, o_2)
    assert torch.equal(lse, lse_2)
    again = compression.backward(g, dlse.mT.contiguous().mT, *views, o_2, lse_2, call)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_no_queries_and_no_keys(device):
    case = Case(m=12, heads=1)
    (q, k, v), dout, dlse = case.draw(device)
    call = case.call(device)
    o, lse = compression.forward(q, k[:, :0], v[:, :0], replace(call, max_k=3, max_q=3))
    assert not o.any()
    assert torch.isneginf(lse).all()
    grads = compression.backward(dout, dlse, q, k[:, :0], v[:, :0], o, lse, call)
    assert not grads[0].any()
    o, lse = compression.forward(q[:, :0], k, v, replace(call, max_q=0))
    assert o.shape[1] == lse.shape[2] == 0
    grads = compression.backward(dout[:, :0], None, q[:, :0], k, v, o, lse, replace(call, max_q=0))
    assert not any(x.any() for x in grads)


def test_the_staircase_against_the_inequality(device):
    """n(t) of the kernels, read off which keys move the LSE, for many (l, d)."""
    for length, stride in ((1, 1), (3, 1), (5, 3), (4, 4)):
        case = Case(m=1, n=12, length=length, stride=stride, group=1, heads=1)
        (_, k, v), _, _ = case.draw(device)
        q = torch.zeros(1, 12, 1, 16, device=device)
        call = replace(case.call(device), max_q=12)
        _, lse = compression.forward(q, k, v, call)
        counts = [
            sum(c * stride + length - 1 <= t for c in range(call.compressed)) for t in range(12)
        ]
        expected = torch.tensor(counts, device=device).log()
        torch.testing.assert_close(lse[0, 0], expected)


def test_the_table_has_tiles_for_every_call(device):
    for dtype, width in ((torch.float16, 64), (torch.float16, 192), (torch.float32, 256)):
        for group in (1, 3, 16, 64):
            for m in (1, 5, 4096):
                q = torch.empty(1, m, group, width, dtype=dtype, device=device)
                call = Call(scale=1.0, max_q=m, max_k=m)
                for kind in ("forward", "dq", "dkdv", "topk"):
                    c = compression.config_for(kind, q, width, call, group)
                    assert c.block_m >= max(16, group)
                    assert c.block_m & (c.block_m - 1) == 0
                    assert c.block_n >= 16


@pytest.mark.parametrize("kind", ["forward", "dq", "dkdv", "topk"])
def test_no_two_warpgroups_share_sixteen_keys(kind, monkeypatch):
    """Triton 3.6 reads past the end of shared memory there, in TF32 on Hopper."""
    monkeypatch.setattr(compression.launch, "card", lambda x: (90, 227 * 1024))
    q = torch.empty(1, 512, 4, 128, device="meta")
    for precision in ("tf32", "tf32x3"):
        call = Call(scale=1.0, max_q=512, max_k=512, precision=precision)
        assert compression.config_for(kind, q, 128, call, 4).num_warps == 4


def test_offsets_beyond_32_bits_are_noticed():
    c = Config(64, 64, 4, 2)
    near = torch.empty(1, 70, 2, 8, device="meta")
    far = near.as_strided((1, 70, 2, 8), (0, 2**25, 2**25, 1))
    assert not compression.is_wide(c, near)
    assert compression.is_wide(c, near, far)


# -- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(m=4096, group=16, d=128, length=64, dtype="bfloat16"),
        Case(m=2000, group=16, heads=1, d=192, d_v=128, length=64, dtype="bfloat16", batch=2),
        Case(m=1500, group=4, d=64, length=32, stride=16, dtype="float16"),
        Case(m=1, n=9000, group=16, d=128, length=64, dtype="bfloat16", batch=3),
        Case(lengths=(1, 700, 64, 0, 63, 1111), group=8, d=128, length=64, dtype="bfloat16"),
        Case(m=1000, group=12, d=96, length=64, dtype="bfloat16"),
        Case(m=1024, group=1, d=32, length=16, dtype="bfloat16"),
        Case(m=600, group=4, d=128, length=32),
        Case(m=300, group=4, d=256, length=16),
    ],
    ids=str,
)
def test_on_the_gpu(case, device):
    check(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_float32_on_tensor_cores(precision, device):
    case = Case(m=1024, group=4, d=128, length=16)
    (q, k, v), dout, dlse = case.draw(device)
    call = replace(case.call(device), precision=precision)
    o, lse = compression.forward(q, k, v, call)
    found = compression.backward(dout, dlse, q, k, v, o, lse, call)
    exact = replace(call, precision="ieee")
    o, lse = compression.forward(q, k, v, exact)
    want = compression.backward(dout, dlse, q, k, v, o, lse, exact)
    for name, x, y in zip(("dq", "dk", "dv"), found, want, strict=True):
        ratio = ((x - y).norm() / y.norm()).item()
        assert ratio < (4e-6 if precision == "tf32x3" else 4e-3), f"{name} {ratio}"


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [(64, 64, 4, 2), (128, 64, 8, 2), (64, 128, 8, 2)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_both_roads_to_memory(tiles, descriptors, device):
    case = Case(m=3000, group=16, heads=1, d=128, length=16, dtype="bfloat16")
    check(case, device, config=Config(*tiles, descriptors))
