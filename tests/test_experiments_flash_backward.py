"""The experiment on the backward pass: its predictions hold, its checks can fail."""

from __future__ import annotations

import pytest
import torch

from labkit import records
from labkit.errors import ArgumentError
from labkit.experiments import Result
from labkit.experiments import flash_backward as experiment
from labkit.memory import attention_forms, problem_sizes


@pytest.fixture(scope="module")
def result():
    device = None if torch.cuda.is_available() else "cpu"
    return experiment.run(quick=True, device=device, parts=("ways", "error", "repeat"))


def test_every_part_ran(result):
    assert result.notes == []
    assert {row["part"] for row in result.rows} == {"ways", "error", "repeat"}


def test_predicted_and_measured_peaks_agree(result):
    rows = result.select(part="ways", what="peak")
    assert {row["way"] for row in rows} == set(experiment.WAYS)
    for row in rows:
        if row["way"] == "sdpa":  # torch's kernel has scratch that nobody but it knows of
            assert row["measured"] >= row["predicted"]
            continue
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.02), row["way"]
    assert result.value("mem.recomputed.gap") <= 0.02


def test_recomputing_needs_less_than_saving_as_soon_as_n_is_long(result):
    n = max(row["seq_len"] for row in result.select(part="ways"))
    saved, ours = (result.value(f"mem.{way}.n{n}.measured") for way in ("saved", "recomputed"))
    assert ours < saved


def test_predicted_peak_is_linear_in_n():
    def peak(n):
        return experiment.recomputed_peak(**problem_sizes(seq_len=n, heads=4, head_dim=64))

    assert peak(8192) == 8 * peak(1024)
    sizes = problem_sizes(seq_len=128, heads=4, kv_heads=2, head_dim=64, dtype="float16")
    shapes = [(4, 64, 2), (4, 64, 2), (2, 64, 2), (2, 64, 2), (4, 1, 4), (4, 1, 4)]
    by_hand = sum(heads * 128 * width * size for heads, width, size in shapes)
    assert experiment.recomputed_peak(**sizes) == by_hand
    assert "delta" in attention_forms()


def test_errors_are_those_of_the_dtype(result):
    unit = {"float32": 2**-23, "tf32": 2**-10, "tf32x3": 2**-20}
    unit |= {"float16": 2**-10, "bfloat16": 2**-7}
    for row in result.select(part="error"):
        for name in ("dq", "dk", "dv"):
            error = row[name]["relative"]
            assert 0.01 * unit[row["dtype"]] < error < 30 * row["logits"] * unit[row["dtype"]], row
    ours, plain = (result.value(f"error.{w}.float16.x1.dk") for w in ("labkit", "naive"))
    assert ours < 2 * plain


def test_our_gradients_repeat_to_the_bit(result):
    assert result.value("repeat.labkit.unequal") == 0
    assert result.value("repeat.labkit.of") >= 3


def test_a_change_of_one_bit_is_counted():
    made = Result()
    base = torch.ones(3)

    def runs():
        for i in range(4):
            yield base, base + (i == 2) * 1e-7, base

    calls = runs()
    sizes = {"batch": 1, "heads": 1, "seq_len": 3, "head_dim": 1}
    experiment._repeat(made, "it", lambda: next(calls), 3, sizes, "float32")
    assert made.value("repeat.it.unequal") == 1
    assert made.value("repeat.it.dk") == 1 and made.value("repeat.it.dq") == 0
    assert 0 < made.value("repeat.it.largest") < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plan of a CPU")
def test_sweep_and_price_run_at_tiny_sizes():
    plan = {"tokens": 32, "width": 16, "dtype": "float32", "rep_ms": 1, "warmup_ms": 1,
            "price": {"heads": 1, "seq_len": 32}}  # fmt: skip
    made = Result()
    experiment._sweep(made, plan, "cpu", 16, 32, True)
    assert {row["who"] for row in made.rows} == {"labkit", "flash"}
    assert made.notes == ["cudnn: torch does not run it here"]
    ours, flash = (made.value(f"sweep.{w}.d16.n32.causal.time") for w in ("labkit", "flash"))
    assert made.value("sweep.labkit.d16.n32.causal.vs_flash") == pytest.approx(flash / ours)
    assert made.value("sweep.flash.d16.n32.causal.rate") == pytest.approx(
        2.5 * 4 * 32 * 32 * 16 / 2 / flash
    )
    experiment._price(made, plan, "cpu", 16)
    whole = made.value("price.d16.again")
    assert made.value("price.d16.again.each") == pytest.approx(whole / 32**2)
    experiment._summarise(made)
    assert made.value("sweep.labkit.vs_flash.least") == pytest.approx(flash / ours)


def test_order_is_asked_for_in_earnest_and_only_inside():
    def look():
        strict = not torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled() and strict

    assert experiment._in_order(look)() and not look()


def test_a_failing_part_costs_its_rows_alone(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(experiment, "_repeats", broken)
    made = experiment.run(quick=True, device="cpu", parts=("repeat",))
    assert made.rows == [] and made.notes == ["repeats: RuntimeError: no such kernel"]


def test_tiles_are_tried_and_the_best_of_each_compared(monkeypatch):
    """The GPU's part with its profiler replaced: what is launched, counted and divided."""
    launched = []

    def times(fn, repeats):
        gradients = fn()
        launched.append([t.isfinite().all().item() for t in gradients])
        return {"delta_kernel": [9.0] * 3, "dkdv_kernel": [2.0] * 3, "dq_kernel": [1.0] * 3} if len(
            launched) <= 2 else {"one_pass_kernel": [3.5] * 3, "fill": [0.5] * 3}  # fmt: skip

    monkeypatch.setattr(experiment, "_kernel_times", times)
    monkeypatch.setattr(
        experiment, "_TILES",
        {"dkdv": ((16, 16, 4, 1),), "dq": ((16, 16, 4, 1),), "one_pass": ((16, 16, 4, 1),)},
    )  # fmt: skip
    monkeypatch.setattr(experiment, "_DKDV", (16, 16, 4, 1))
    monkeypatch.setattr(experiment, "_DQ", (16, 16, 4, 1))
    made = Result()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = {"tokens": 32, "width": 16, "dtype": "float32"}
    experiment._tiles(made, plan, device, 16, 32, False)
    assert made.notes == [] and launched == [[True] * 3] * 3
    assert made.value("passes.d16.two") == pytest.approx(3e-3)
    assert made.value("passes.d16.one") == pytest.approx(4e-3)
    assert made.value("passes.d16.ratio") == pytest.approx(4 / 3)
    product = 2 * 32 * 32 * 16
    assert made.value("tiles.d16.dkdv.16x16w4") == pytest.approx(4 * product / 2e-3)
    assert made.value("tiles.d16.one_pass.16x16w4") == pytest.approx(5 * product / 4e-3)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("dkdv_kernel", "dkdv"), ("_dkdv_kernel", "dkdv"), ("dq_kernel", "dq"),
        ("delta_kernel", "delta"), ("one_pass_kernel", "one_pass"),
        ("rows_kernel", "delta"),
        ("void pytorch_flash::flash_bwd_dot_do_o_kernel<true>", "delta"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<…>", "whole"),
        ("void pytorch_flash::flash_bwd_convert_dq_kernel<…>", "convert"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "whole"),
        ("Memset (Device)", "fill"), ("ampere_sgemm_128x64_nn", "other"),
    ],
)  # fmt: skip
def test_kernels_are_known_by_their_names(name, role):
    assert experiment.kernel_role(name) == role


def test_unknown_words_are_named():
    with pytest.raises(ArgumentError, match="way"):
        experiment.attention_of_way("kept")
    with pytest.raises(ArgumentError, match="parts"):
        experiment.run(quick=True, device="cpu", parts=("everything",))


def test_products():
    assert (experiment.executed_products(1), experiment.executed_products(2)) == (5, 7)


def test_record_if_there_is_one_holds_what_the_chapter_says():
    if "flash_backward" not in records.available().get("nvidia-h200", ()):
        pytest.skip("flash_backward has not been recorded yet")
    record = records.load("flash_backward")
    assert record.value("repeat.labkit.unequal") == 0
    assert record.value("mem.recomputed.gap") <= 0.02
    assert record.value("sweep.labkit.vs_flash.least") >= 1
