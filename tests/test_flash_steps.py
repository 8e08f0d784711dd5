"""The numbered steps of the forward kernel: each is right, on its own, at sizes that hurt."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

from labkit.errors import ArgumentError, NoGpuError
from labkit.flash.steps import STEPS, _host

#: the kernels that this package holds; steps 5 and 6 launch those of labkit.flash
OWN = STEPS[:4]
#: batch, heads, kv_heads, N, head_dim: N below, at and beyond one block of 64
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 2, 1, 5, 16),
    (1, 2, 2, 64, 16),
    (1, 4, 2, 97, 32),
    (2, 1, 1, 129, 16),
    (1, 1, 1, 193, 16),
]
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
each_step = pytest.mark.parametrize("step", OWN, ids=lambda step: step.key)


def guarded(tensor):
    """The same values between NaNs: whoever reads past the end brings a NaN home."""
    buffer = torch.full((tensor.numel() + 8192,), float("nan"), dtype=tensor.dtype)
    buffer = buffer.to(tensor.device)
    inside = buffer[4096:-4096].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def draw(batch, heads, kv_heads, n, d, dtype, device="cpu", size=1.0):
    q = size * torch.randn(batch, heads, n, d)
    k, v = (torch.randn(batch, kv_heads, n, d) for _ in range(2))
    return [guarded(x.to(device, dtype)) for x in (q, k, v)]


def assert_right(step, q, k, v, *, causal=False, scale=None, **tiles):
    forward = step.module.forward
    o, lse = forward(q, k, v, causal=causal, scale=scale, **tiles)
    want, s, _ = oracle.attention_f64(q, k, v, causal=causal, scale=scale)
    plain, _, _ = oracle.attention(q, k, v, causal=causal, scale=scale)
    oracle.assert_within_low_precision_error(o, want, plain, what=step.key)
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    # The products are summed in float32 whatever q is: LSE is as exact as such a sum of d terms.
    largest = max(1.0, s[~s.isinf()].abs().max().item())
    allowed = q.shape[-1] * torch.finfo(torch.float32).eps * largest
    assert (lse.double() - s.logsumexp(-1)).abs().max().item() <= allowed


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs lie between guards and start as NaN; afterwards the guards must be untouched."""
    guards = []

    def outputs(q):
        made = []
        for shape, dtype in ((q.shape, q.dtype), (q.shape[:3], torch.float32)):
            buffer = torch.full((math.prod(shape) + 2048,), 12345.0, dtype=dtype, device=q.device)
            guards.extend((buffer[:1024], buffer[-1024:]))
            made.append(buffer[1024:-1024].view(shape).fill_(float("nan")))
        return tuple(made)

    monkeypatch.setattr(_host, "outputs", outputs)
    yield
    assert guards and all((guard == guard.new_tensor(12345.0)).all() for guard in guards)


@each_step
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_agrees_with_float64(step, causal, shape, device, poisoned):
    dtype = torch.float16 if sum(shape) % 2 else torch.float32
    assert_right(step, *draw(*shape, dtype, device), causal=causal)


@each_step
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (32, 32)])
def test_any_tiles_give_the_same_rows(step, block_m, block_n, device):
    tiles = {**SMALL, "BLOCK_M": block_m, "BLOCK_N": block_n}
    q, k, v = draw(1, 1, 1, 100, 16, torch.float32, device)
    for causal in (False, True):
        assert_right(step, q, k, v, causal=causal, tiles=tiles)


@each_step
def test_large_scores_neither_overflow_nor_lose_the_row(step, device):
    q, k, v = draw(1, 1, 1, 70, 16, torch.float16, device, size=100.0)
    assert_right(step, q, k, v, causal=True, tiles=SMALL)


@each_step
def test_scale_is_what_was_asked_for(step, device):
    q, k, v = draw(1, 1, 1, 40, 16, torch.float32, device)
    assert_right(step, q, k, v, scale=1.7, tiles=SMALL)


@pytest.mark.parametrize("step", OWN[2:], ids=lambda step: step.key)
def test_every_head_is_done_once_when_few_run_together(step, device, monkeypatch):
    q, k, v = draw(1, 5, 5, 50, 16, torch.float32, device)
    monkeypatch.setattr(step.module, "L2_SHARE", 2 * (2 * 50 * 16 * 4))  # two heads of five
    assert_right(step, q, k, v, causal=True, tiles=SMALL)


@each_step
def test_nan_in_a_row_of_q_stays_there(step, device):
    q, k, v = draw(1, 2, 2, 40, 16, torch.float32, device)
    q[0, 1, 7, 3] = float("nan")
    o, lse = step.module.forward(q, k, v, tiles=SMALL)
    lost = o.isnan().any(dim=-1)
    assert lost[0, 1, 7] and lost.sum() == 1
    assert lse.isnan().sum() == 1 and lse[0, 1, 7].isnan()


@pytest.mark.parametrize("step", OWN[2:], ids=lambda step: step.key)
def test_blocks_beyond_the_diagonal_are_not_read(step, device):
    """NaN in the keys that no row of the first block sees: step 2 reads them, step 3 does not."""
    q, k, v = draw(1, 1, 1, 64, 16, torch.float32, device)
    k[:, :, 32:] = float("nan")
    v[:, :, 32:] = float("nan")
    first = STEPS[1].module.forward(q, k, v, causal=True, tiles=SMALL)[0][:, :, :32]
    assert first.isnan().any(), "step 2 multiplies by the hidden half, and 0 · NaN is NaN"
    o, _ = step.module.forward(q, k, v, causal=True, tiles=SMALL)
    assert not o[:, :, :32].isnan().any()


def test_step_5_is_the_production_kernel(device):
    for causal in (False, True):
        assert_right(STEPS[4], *draw(1, 2, 1, 70, 16, torch.float16, device), causal=causal)


def test_step_6_says_why_it_cannot_run_here(device):
    q, k, v = draw(1, 1, 1, 64, 16, torch.float32, device)  # no card has it for float32
    with pytest.raises((ArgumentError, NoGpuError), match=r"hand-written|GPU|Hopper"):
        STEPS[5].forward(q, k, v)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (lambda q, k, v: (q, k[:, :, :-1].contiguous(), v[:, :, :-1].contiguous()), "k.shape"),
        (lambda q, k, v: tuple(x[..., :40].contiguous() for x in (q, k, v)), "q.shape"),
        (lambda q, k, v: (q, k, v[..., :16].contiguous()), "q.shape"),
        (lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), "q"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "q.dtype"),
        (lambda q, k, v: (q[:, :1], k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), "k.shape"),
    ],
)
@each_step
def test_what_a_step_cannot_do_is_named(step, change, argument, device):
    q, k, v = draw(1, 2, 2, 33, 64, torch.float32, device)
    with pytest.raises(ArgumentError) as caught:
        step.forward(*change(q, k, v))
    assert caught.value.argument == argument


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's own limit")
def test_bfloat16_is_refused_by_the_interpreter():
    q = torch.zeros(1, 1, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="interpreter"):
        STEPS[0].forward(q, q, q)


def test_steps_are_numbered_and_described():
    assert [step.key for step in STEPS] == [f"v{i}" for i in range(1, 7)]
    for step in STEPS:
        assert step.module.forward.__doc__ and step.module.__doc__.startswith(f"Step {step.number}")
        assert 1.0 <= step.low <= step.high and 1.0 <= step.low_causal <= step.high_causal


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d", [64, 128])
def test_on_the_gpu_in_bfloat16(step, causal, d):
    q, k, v = draw(2, 4, 2, 1000, d, torch.bfloat16, "cuda")
    if step.key == "v6" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the hand-written kernel is for Hopper")
    assert_right(step, q, k, v, causal=causal)
