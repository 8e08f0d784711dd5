"""The experiment on number formats: its roundings are the formats', its checks can fail."""

from __future__ import annotations

import os

import oracle
import pytest
import torch

from labkit.errors import ArgumentError
from labkit.experiments import precision as experiment

NAIVE = ["naive.float32", "naive.float16", "naive.bfloat16"]


@pytest.fixture(scope="module")
def result():
    """Small, and with one way through the interpreter."""
    patch = pytest.MonkeyPatch()
    plan = experiment._plan
    limits = ["naive.float16.no_maximum", "naive.float16", "naive.float16.scale_first"]
    limits += ["naive.float16.softmax32", "math.float16", "naive.bfloat16"]

    def smaller(quick, device):
        made = plan(quick, device)
        made["rounding"].update(seq_len=48, sigma=(1, 16))
        made["overflow"].update(seq_len=24, ways=limits)
        made["underflow"].update(seq_len=64, every=8, ways=NAIVE[1:])
        ways = [*NAIVE, "labkit.float16", "naive.tf32", "labkit.bfloat16"]
        made["error"].update(seq_len=(48,), at=48, sigma=(1, 16), ways=ways)
        return made

    patch.setattr(experiment, "_plan", smaller)
    parts = ("rounding", "overflow", "underflow", "error")
    yield experiment.run(quick=True, device="cpu", parts=parts, limit_s=float("inf"))
    patch.undo()


def test_every_part_ran_and_what_a_cpu_cannot_do_was_left_out(result):
    assert result.notes == []
    assert {row["part"] for row in result.rows} == {"rounding", "overflow", "underflow", "error"}
    ways = {row["way"] for row in result.select(part="error")}
    assert ways == {*NAIVE, "labkit.float16"}


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_rounding_is_that_of_the_dtype(name):
    x = torch.randn(1000, dtype=torch.float64) * torch.logspace(-20, 20, 1000, base=2).double()
    assert torch.equal(experiment.round_to(x, name), x.to(getattr(torch, name)).double())


def test_tf32_keeps_eleven_significant_bits_and_the_range_of_float32():
    unit = 2.0**-10
    near = [1.0, 1 + unit, 1 + 0.4 * unit, 1 + 0.6 * unit, 1 + 0.5 * unit, -1 - 0.5 * unit]
    x = torch.tensor([*near, 3e38, 2.0**-126, float("inf"), float("nan")])
    got = experiment.round_to(x, "tf32")
    assert got[:6].tolist() == [1.0, 1 + unit, 1.0, 1 + unit, 1 + unit, -1 - unit]
    assert got[6].item() == pytest.approx(3e38, rel=unit / 2) and got[7] == 2.0**-126
    assert got[8] == float("inf") and got[9].isnan()
    assert torch.equal(experiment.round_to(got[:8], "tf32"), got[:8])


@pytest.mark.parametrize("name", experiment.FORMATS)
def test_formats_are_what_torch_says(name):
    bits, largest, normal, least = experiment.FORMATS[name]
    if name == "tf32":
        for value in (largest, normal, least):
            assert experiment.round_to(torch.tensor([value]), name).item() == value
        assert experiment.round_to(torch.tensor([least / 4]), name).item() == 0
        assert bits == experiment.FORMATS["float16"][0]
        return
    info = torch.finfo(getattr(torch, name))
    assert (largest, normal, least) == (info.max, info.tiny, info.smallest_normal * info.eps)
    assert info.eps == 2.0 ** (1 - bits)


def test_without_a_rounding_it_is_attention_and_with_one_it_is_not():
    q, k, v, _ = (x[0, 0] for x in experiment.draw(1, 1, 40, 16))
    right = oracle.attention_f64(*(x[None, None] for x in (q, k, v)))[0][0, 0]
    assert torch.allclose(
        experiment.attention_rounded_at(q, k, v, "float64", ()), right, rtol=1e-13
    )
    for place in experiment.PLACES:
        got = experiment.attention_rounded_at(q, k, v, "float16", (place,))
        assert 1e-5 < ((got - right).norm() / right.norm()).item() < 3e-3, place
    with pytest.raises(ArgumentError, match="places"):
        experiment.attention_rounded_at(q, k, v, "float16", ("weights",))


def test_float64_attention_agrees_with_autograd_whatever_the_block():
    inputs = experiment.draw(2, 2, 21, 8, sigma=3)
    right = oracle.gradients_f64(*inputs)
    o = oracle.attention_f64(*inputs[:3])[0]
    for rows in (4, 64):
        got = experiment.float64_attention(*inputs, rows=rows)
        for mine, true in zip(got, (o, *right), strict=True):
            assert torch.allclose(mine, true, rtol=1e-11, atol=1e-13)


def test_scores_are_as_wide_as_asked():
    q, k, _, _ = experiment.draw(1, 2, 256, 64, sigma=9)
    assert (q @ k.mT / 8).std().item() == pytest.approx(9, rel=0.05)


def test_scores_cost_most_and_the_rounding_of_p_costs_less_as_they_grow(result):
    for name in ("float16", "bfloat16"):
        scores, p, o = (
            [result.value(f"rounding.{name}.{place}.s{s}") for s in (1, 16)]
            for place in ("scores", "probabilities", "output")
        )
        assert scores[1] > 2 * scores[0] and p[1] < p[0]
        assert o[1] == pytest.approx(o[0], rel=0.1)
    tf32, half = (result.value(f"rounding.{n}.all.s1") for n in ("tf32", "float16"))
    assert tf32 == pytest.approx(half, rel=0.1)  # eleven bits each


def test_overflow_is_where_the_formats_say(result):
    largest = {r["way"]: r["o"] for r in result.select(part="overflow")}
    assert largest["naive.float16"] == 2**15  # the next power of two is above 65,504
    assert largest["naive.float16.softmax32"] == 2**15  # too late: the product has overflowed
    assert largest["naive.float16.scale_first"] == 2**18  # √64 more
    assert largest["naive.float16.no_maximum"] <= 64  # e^(64/8) fits, e^(128/8) does not
    assert largest["math.float16"] > 2**20
    assert largest["naive.bfloat16"] == 2**40  # the end of the sweep


def test_a_scaled_loss_saves_float16_and_bfloat16_needs_none(result):
    for tensor in ("dq", "dk", "dv"):
        key = f"underflow.naive.float16.{tensor}"
        assert result.value(f"{key}.l0") > 0.1 and result.value(f"{key}.l0.zeros") > 0.2
        assert result.value(f"{key}.l16") < 2e-3 and result.value(f"{key}.l16.zeros") < 0.01
        assert f"{key}.l40" not in result  # it overflows: no number
        key = f"underflow.naive.bfloat16.{tensor}"
        assert result.value(f"{key}.l0") == pytest.approx(result.value(f"{key}.l24"), rel=1e-3)


def test_errors_grow_with_the_scores_and_are_ordered_by_format(result):
    def error(way, sigma=1, kind="relative"):
        (row,) = result.select(part="error", way=way, seq_len=48, sigma=sigma)
        return row["o"][kind]

    assert error("naive.float32") < 1e-5 < error("naive.float16") < error("naive.bfloat16")
    assert all(error(way, 16) > 1.5 * error(way) for way in NAIVE)
    assert error("labkit.float16") < 1.5 * error("naive.float16")
    assert error("labkit.float16", kind="whole") > error("labkit.float16")


def test_what_fails_costs_its_point_alone_and_time_is_limited(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(experiment._MEASURE, "rounding", broken)
    monkeypatch.setitem(experiment._ITEMS, "rounding", lambda plan, device: ["one", "two"])
    monkeypatch.setenv("LABKIT_TUNE", "1")
    made = experiment.run(quick=True, device="cpu", parts=("rounding",))
    assert made.notes == [f"rounding {x}: RuntimeError: no such kernel" for x in ("one", "two")]
    assert os.environ["LABKIT_TUNE"] == "1"
    made = experiment.run(quick=True, device="cpu", parts=("rounding",), limit_s=-1)
    assert [note.split(":")[0] for note in made.notes] == ["rounding one", "rounding two"]
    assert all("left out" in note for note in made.notes)
    with pytest.raises(ArgumentError, match="part"):
        experiment.run(quick=True, device="cpu", parts=("speed",))


def test_switches_are_put_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with experiment._switches(experiment.WAYS["naive.tf32"]):
        assert matmul.allow_tf32
    assert matmul.allow_tf32 == before


@pytest.mark.gpu
def test_tf32_products_are_those_of_eleven_bits(device):
    made = experiment.run(quick=True, device=device, parts=("error",))
    for name in ("naive.tf32", "labkit.tf32"):
        assert 1e-4 < made.value(f"error.{name}.o.n512.s1") < 3e-3
    assert made.value("error.labkit.tf32x3.o.n512.s1") < 1e-5
