"""One training step in each precision, and the names that it gives to what overflows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from labkit.errors import ArgumentError
from labkit.layers import (
    PRECISIONS,
    AttentionLayer,
    PrecisionOverflowError,
    TrainingStep,
    TransformerModel,
    find_overflow,
)
from labkit.layers.training import matmul_in, why_not

HERE = [p for p in PRECISIONS if p != "tf32" or torch.cuda.is_available()]
DIM = 32


def model(backend="sdpa", layers=2, seed=0, **options) -> TransformerModel:
    torch.manual_seed(seed)
    return TransformerModel(DIM, 2, layers, backend=backend, **options)


def data(n=19, seed=1):
    torch.manual_seed(seed)
    return torch.randn(2, n, DIM), torch.randn(2, n, DIM)


def states(m: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in m.named_parameters()}


def mean_square(out, target):
    return nn.functional.mse_loss(out.float(), target.float())


def louder(m: TransformerModel, name: str, factor: float) -> TransformerModel:
    with torch.no_grad():
        m.get_parameter(name).mul_(factor)
    return m


# -- it trains -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", HERE)
def test_step_lowers_the_loss_in_the_dtypes_it_says(precision, device):
    made = model().to(device)
    x, y = (t.to(device) for t in data())
    step = TrainingStep(made, precision=precision, lr=3e-3)
    results = [step.step(x, y) for _ in range(5)]
    assert results[-1].loss < results[0].loss
    assert not any(r.skipped or r.overflow for r in results)
    assert all(0 < r.grad_norm < math.inf for r in results)
    dtype = PRECISIONS[precision][0]
    moments = [s[k] for s in step.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert {p.dtype for p in made.parameters()} == {p.dtype for p in moments} == {dtype}
    assert results[0].scale == (65536.0 if precision == "autocast_fp16" else 1.0)


def by_hand(m, x, y, precision, steps):
    """The loop as torch's manual has it."""
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)
    dtype = PRECISIONS[precision][1]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "autocast_fp16")
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = mean_square(m(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["fp32", "autocast_fp16", "autocast_bf16"])
def test_step_is_the_loop_that_one_writes_by_hand(precision):
    x, y = data()
    theirs = by_hand(hand := model(), x, y, precision, 3)
    step = TrainingStep(model(), precision=precision)
    assert [step.step(x, y).loss for _ in range(3)] == pytest.approx(theirs, rel=1e-6)
    timed = TrainingStep(model(), precision=precision)
    assert [timed.launch(x, y).item() for _ in range(3)] == theirs
    for (name, p), q in zip(hand.named_parameters(), timed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_of_a_model_that_takes_numbers_of_tokens(precision):
    made = nn.Sequential(nn.Embedding(11, DIM), model(layers=1), nn.Linear(DIM, 11))
    tokens = torch.arange(11)[None]

    def loss(out, y):
        return nn.functional.cross_entropy(out.float().flatten(0, 1), y.flatten())

    step = TrainingStep(made, precision=precision, loss=loss, lr=1e-2)
    losses = [step.step(tokens, tokens).loss for _ in range(4)]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        made[2].weight.fill_(float("inf"))
    with pytest.raises(PrecisionOverflowError, match=r"2\.weight"):
        step.step(tokens, tokens)


def test_loss_scale_saves_small_gradients_on_the_way():
    x, y = data()

    def small(out, y):
        return 1e-4 * mean_square(out, y)

    norms, zeros = {}, {}
    for scale in (1, 1024):
        step = TrainingStep(
            model(), precision="fp16", loss_scale=scale, optimizer="sgd", loss=small
        )
        step.backward(step.forward(x, y))
        zeros[scale] = sum((p.grad == 0).sum().item() for p in step.model.parameters())
        result = step.step(x, y)
        assert result.scale == scale
        norms[scale] = result.grad_norm
    exact = TrainingStep(model(), optimizer="sgd", loss=small).step(x, y).grad_norm
    assert abs(norms[1024] - exact) < abs(norms[1] - exact) / 2
    assert zeros[1024] < zeros[1] / 10


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_optimizer_of_ones_own_and_sgd(precision, device):
    x, y = (t.to(device) for t in data())
    own = TrainingStep(model().to(device), optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
                       precision=precision)  # fmt: skip
    named = TrainingStep(model().to(device), optimizer="sgd", lr=0.5, precision=precision)
    before = states(own.model)
    own.step(x, y)
    named.step(x, y)
    for name, p in own.model.named_parameters():
        torch.testing.assert_close(p, before[name] - 0.5 * p.grad, msg=name)
        torch.testing.assert_close(p, named.model.get_parameter(name), msg=name)


def test_step_of_a_compiled_model():
    x, y = data()
    torch._dynamo.reset()
    made = model("naive", layers=1)
    step = TrainingStep(
        torch.compile(made, backend="aot_eager", fullgraph=True), precision="autocast_bf16"
    )
    losses = [step.step(x, y).loss for _ in range(2)]
    torch._dynamo.reset()
    eager = TrainingStep(model("naive", layers=1), precision="autocast_bf16")
    assert losses == pytest.approx([eager.step(x, y).loss for _ in range(2)], rel=1e-3)


# -- TF32 ------------------------------------------------------------------------------------------


def test_tf32_is_on_inside_only(monkeypatch):
    monkeypatch.setattr("labkit.layers.training.why_not", lambda *a: None)
    x, y = data()
    seen = []

    class Spy(AttentionLayer):
        def forward(self, x):
            seen.append((torch.get_float32_matmul_precision(), self.precision))
            return super().forward(x)

    made = nn.Sequential(Spy(DIM, 2, backend="sdpa", precision="tf32x3"))
    made[0].ff[2].weight.register_hook(lambda g: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    TrainingStep(made, precision="tf32").step(x, y)
    assert seen == [("high", "tf32"), "high"]
    torch.set_float32_matmul_precision("medium")
    try:
        TrainingStep(made, precision="fp32").step(x, y)
        assert seen[2:] == [("highest", "tf32x3"), "highest"]
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), matmul_in("tf32"):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert made[0].precision == "tf32x3"


def test_tf32_needs_tensor_cores_that_have_it(monkeypatch):
    assert "tensor cores" in why_not("tf32", "cpu")
    assert why_not("autocast_fp16", "cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5))
    assert "8.0, and this GPU has 7.5" in why_not("tf32", "cuda")
    assert "8.0" in why_not("autocast_bf16", "cuda")
    assert why_not("autocast_fp16", "cuda") is None
    with pytest.raises(ArgumentError, match=r"tf32.*does not exist here.*nearest.*'fp32'"):
        TrainingStep(model(), precision="tf32")


# -- overflow, named -------------------------------------------------------------------------------


def overflow_of(made, precision, x=None, **options):
    """What the step says, with the weights as they were before it."""
    given, y = data()
    step = TrainingStep(made, precision=precision, **options)
    before = states(made)
    with pytest.raises(PrecisionOverflowError) as error:
        step.step(given if x is None else x, y)
    assert all(torch.equal(p, before[name]) for name, p in states(made).items())
    assert str(error.value) == str(error.value.overflow)
    return error.value.overflow


@pytest.mark.parametrize("precision", ["fp16", "autocast_fp16"])
def test_overflow_of_the_scores_is_named(precision):
    made = louder(
        louder(model("naive"), "layers.1.q_proj.weight", 500), "layers.1.k_proj.weight", 500
    )
    found = overflow_of(made, precision)
    assert (found.where, found.tensor) == ("forward", "S = QKᵀ of layers.1")
    assert (found.operation, found.dtype, found.holds) == ("bmm", "float16", "inf")
    x, _ = data()
    wide = model("naive")
    wide.load_state_dict({n: p.float() for n, p in made.state_dict().items()})
    scores = []
    with torch.no_grad():
        y = wide.layers[1].norm1(wide.layers[0](x))
        q, k = (getattr(wide.layers[1], f"{c}_proj")(y).view(2, 19, 2, 16) for c in "qk")
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
    assert found.largest == pytest.approx(scores.abs().max().item(), rel=0.01)
    assert found.largest > 65504
    text = str(found)
    assert "S = QKᵀ of layers.1 (bmm, float16) holds inf" in text
    assert "float16 ends at 65504" in text
    assert 'backend="flash"' in text and "GradScaler does not help" in text
    assert ('"autocast_bf16"' if "autocast" in precision else '"bf16"') in text


@pytest.mark.parametrize("whole", [True, False])
def test_the_cure_for_scores_of_nsa_computes_the_same_function(whole):
    nsa = {"block_size": 16, "block_counts": 1, "window_size": 8, "implementation": "reference"}
    made = model("nsa", nsa=nsa)
    for name in ("layers.0.q_proj.weight", "layers.0.k_proj.weight"):
        louder(made, name, 500)
    found = overflow_of(made if whole else made.layers[0], "fp16")
    assert found.tensor == ("S = QKᵀ of layers.0" if whole else "S = QKᵀ")
    text = str(found)
    assert '"implementation": "kernels"' in text and "computes the same" in text
    assert 'backend="' not in text


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: TrainingStep(model(), loss=3), "loss = 3.*not a function"),
        (lambda: TrainingStep(model()).step([1.0], [2.0]), "x = 'list'"),
        (lambda: find_overflow(3, torch.zeros(1)), "model = 'int'"),
        (lambda: find_overflow(model(), 3), "x = 'int'"),
    ],
)
def test_what_is_no_model_tensor_or_loss_is_refused(call, named):
    with pytest.raises(ArgumentError, match=named):
        call()


@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
def test_scores_that_are_never_written_do_not_overflow(backend):
    made = louder(
        louder(model(backend), "layers.1.q_proj.weight", 500), "layers.1.k_proj.weight", 500
    )
    result = TrainingStep(made, precision="fp16").step(*data())
    assert math.isfinite(result.loss) and not result.skipped


@pytest.mark.parametrize(
    ("parameter", "tensor"),
    [
        ("layers.0.v_proj.weight", "output of layers.0.v_proj"),
        ("layers.1.ff.0.weight", "output of layers.1.ff.0"),
        ("norm.weight", "output of norm"),
    ],
)
def test_overflow_of_a_part_is_named(parameter, tensor):
    made = model()
    with torch.no_grad():
        made.get_parameter(parameter).sign_().mul_(60000)
    found = overflow_of(made, "fp16")
    assert (found.where, found.tensor, found.dtype) == ("forward", tensor, "float16")


def test_overflow_of_the_loss_is_named():
    made = louder(model(), "norm.weight", 400)
    found = overflow_of(made, "fp16", loss=lambda out, y: (out - y.half()).square().mean())
    assert (found.where, found.tensor, found.operation) == ("loss", "the loss", "pow")
    assert "Compute the loss in float32." in found.remedies


def test_overflow_of_a_gradient_under_a_constant_scale_is_named():
    found = overflow_of(model(), "fp16", loss_scale=2.0**26)
    assert found.where == "backward"
    assert found.tensor.startswith("gradient of norm.") and found.others
    assert any("smaller loss_scale than 6.71" in r for r in found.remedies)


def test_input_and_weights_that_are_no_numbers_are_named():
    x, _ = data()
    x[1, 3, 4] = float("nan")
    found = overflow_of(model(), "fp32", x)
    assert (found.where, found.holds) == ("input", "nan")
    made = model()
    with torch.no_grad():
        made.layers[0].out_proj.bias[3] = float("inf")
    found = overflow_of(made, "fp32")
    assert (found.where, found.tensor) == ("weights", "layers.0.out_proj.bias")


def test_input_that_half_precision_cannot_hold_is_not_blamed_on_the_data():
    x, _ = data()
    found = overflow_of(model(), "fp16", 1e6 * x)
    assert (found.where, found.tensor, found.holds) == ("input", "the input x in float16", "inf")
    assert found.largest == pytest.approx(1e6 * x.abs().max().item())
    assert 'precision="bf16"' in str(found) and "Look at the data" not in str(found)
    assert TrainingStep(model(), precision="autocast_fp16").step(1e6 * x, x).overflow is None


@pytest.mark.parametrize("precision", ["fp32", "autocast_fp16"])
def test_target_that_is_no_number_is_named_and_no_scale_is_halved_for_it(precision):
    x, y = data()
    y[0, 0, 0] = float("nan")
    step = TrainingStep(model(), precision=precision, on_overflow="skip")
    scale = step.scale
    found = step.step(x, y).overflow
    assert (found.where, found.tensor, found.holds) == ("input", "the target", "nan")
    assert step.scale == scale
    # hidden in the loss itself it is the loss, and no gradient
    found = find_overflow(step.model, x, lambda out: mean_square(out, y))
    assert (found.where, found.tensor, found.holds) == ("loss", "the loss", "nan")


def test_buffers_are_as_before_the_look():
    made = nn.Sequential(nn.BatchNorm1d(19), nn.Linear(DIM, DIM))
    x, y = data()
    assert find_overflow(made, x, lambda out: mean_square(out, y)) is None
    assert made[0].num_batches_tracked == 0 and not made[0].running_mean.any()


def test_weights_that_overflow_in_the_update_are_named():
    x, y = data()
    step = TrainingStep(model(), precision="fp16", lr=1e9)
    with pytest.raises(PrecisionOverflowError, match=r"after the update.*load them again") as error:
        step.step(x, y)
    assert error.value.overflow.where == "weights"
    step = TrainingStep(model(), precision="fp16", lr=1e9, on_overflow="skip")
    assert step.step(x, y).overflow.where == "weights"


def test_gradscaler_halves_until_the_gradients_fit():
    x, y = data()
    step = TrainingStep(model(), precision="autocast_fp16", loss_scale=2.0**26, on_overflow="raise")
    before = states(step.model)
    results = []
    while not results or results[-1].skipped:
        if results:
            assert all(torch.equal(p, before[n]) for n, p in states(step.model).items())
        results.append(step.step(x, y))
        assert len(results) < 20
    assert [r.scale for r in results] == [2.0 ** (26 - i) for i in range(len(results))]
    assert len(results) > 1
    assert results[0].overflow.where == "backward"
    assert "halves its scale" in str(results[0].overflow)
    assert results[-1].overflow is None and math.isfinite(results[-1].grad_norm)


def test_gradscaler_keeps_its_scale_when_the_scale_is_not_to_blame():
    made = louder(
        louder(model("naive"), "layers.1.q_proj.weight", 500), "layers.1.k_proj.weight", 500
    )
    step = TrainingStep(made, precision="autocast_fp16", on_overflow="skip")
    results = [step.step(*data()) for _ in range(2)]  # a second step may be tried
    assert all(r.skipped and r.overflow.where == "forward" for r in results)
    assert step.scale == 65536.0


def test_what_is_hidden_by_a_mask_is_no_overflow():
    x, y = data()
    for backend, options in (("naive", {}), ("tiled", {}), ("naive", {"window": 3})):
        made = model(backend, **options)
        assert find_overflow(made, x, lambda out: mean_square(out, y)) is None
    gradient = torch.ones_like(made.norm.weight)
    made.norm.weight.grad = gradient
    find_overflow(made, x, lambda out: mean_square(out, y))
    assert made.norm.weight.grad is gradient
    assert made.norm.bias.grad is None
    assert not made._forward_hooks and not made.layers[0].q_proj._forward_pre_hooks


def test_overflow_in_anybodys_model_is_named():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).half()
    with torch.no_grad():
        made[2].weight.fill_(60000)
    found = find_overflow(torch.compile(made, backend="eager"), 9 * torch.ones(2, 8).half())
    assert found.tensor == "output of 2"
    assert found.largest > 65504


def test_flex_attention_is_looked_at_from_outside():
    made = AttentionLayer(DIM, 2, backend="sdpa", pattern="strided", sparse="blocks")
    x, _ = data()
    with torch.no_grad():
        assert find_overflow(made, x) is None
        made.ff[2].weight.fill_(float(torch.finfo(torch.float32).max))
        assert find_overflow(made, 1e5 * x).tensor in ("output of ff.2", "output of ff")
        made(x)  # and the compiler behind it works as before


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "fp8"}, "precision = 'fp8'.*Known: fp32, tf32, autocast_fp16"),
        ({"precision": "bf16", "loss_scale": 2.0}, "loss_scale.*bf16.*do not underflow"),
        ({"precision": "fp16", "loss_scale": 0}, "loss_scale = 0"),
        ({"optimizer": "adm"}, "optimizer.*adamw"),
        ({"lr": -1.0}, "lr"),
        ({"on_overflow": "ignore"}, "on_overflow.*raise, skip"),
        ({"model": nn.GELU()}, "model.*parameters"),
        ({"model": lambda x: x}, "model.*no torch.nn.Module"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "model.*asks for a gradient"),
        ({"optimizer": 5}, "optimizer = 5.*adamw"),
        ({"eps": -1.0}, "eps = -1.0"),
        ({"model": nn.Linear(2, 2).half(), "precision": "autocast_fp16"}, r"weight is.*\.float"),
    ],
)
def test_option_that_does_not_fit_is_refused(options, says):
    with pytest.raises(ArgumentError, match=says):
        TrainingStep(**{"model": nn.Linear(2, 2), **options})
