"""The experiment of chapter 08: what it finds on a CPU, and what it makes of rows."""

from __future__ import annotations

import pytest
import torch

from labkit import experiments
from labkit.errors import ArgumentError
from labkit.experiments import Result, flash_forward


@pytest.fixture(scope="module")
def quick() -> Result:
    if torch.cuda.is_available():
        pytest.skip("the short form on a CPU counts bytes; a GPU times")
    return experiments.run("flash_forward", quick=True, device="cpu")


def test_every_step_is_right_on_a_cpu(quick):
    assert quick.notes == []
    rows = quick.select(part="steps")
    assert {r["name"] for r in rows} == {"v1", "v2", "v3", "v4", "v5", "ours"}
    assert {r["causal"] for r in rows} == {False, True}
    # float16 rounds to 2⁻¹¹ relative; P and O are rounded once each
    assert all(0 < r["error"] < 2**-10 for r in rows)
    assert not any("median_ms" in r for r in rows), "the interpreter's time is nobody's"


def test_memory_beyond_the_inputs_is_o_and_lse(quick):
    (row,) = quick.select(part="memory")
    assert row["predicted_bytes"] == row["traced_bytes"] == row["measured_bytes"]
    assert row["predicted_bytes"] == row["heads"] * row["seq_len"] * (2 * row["head_dim"] + 4)


def test_traffic_falls_where_a_step_says_so(quick):
    times = {k.removeprefix("traffic_"): quick.value(k) for k in quick.results if "traffic" in k}
    # N = 192: Q once, and K and V once for each of three blocks of 64 rows, two of 128
    assert times["v1_d32_n192"] == times["v3_d32_n192"] == pytest.approx((1 + 3 + 3) / 3)
    assert times["v4_d32_n192"] == pytest.approx((1 + 2 + 2) / 3)
    assert times["v2_d32_n192_causal"] == times["v1_d32_n192"], "hidden blocks are read, too"
    assert times["v3_d32_n192_causal"] == pytest.approx((1 + 2 + 2) / 3), "6 of 9 blocks"


def test_only_the_parts_asked_for_are_run():
    result = flash_forward.run(quick=True, device="cpu", parts=["memory"])
    assert {r["part"] for r in result.rows} == {"memory"}
    with pytest.raises(ArgumentError, match="part"):
        flash_forward.run(quick=True, device="cpu", parts=["speed"])


def test_a_part_that_fails_leaves_a_note_and_the_others(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(flash_forward, "_traffic", broken)
    result = flash_forward.run(quick=True, device="cpu", parts=["memory", "traffic"])
    assert {r["part"] for r in result.rows} == {"memory"}
    assert len(result.notes) == 2 and all("no such kernel" in note for note in result.notes)


# -- what it makes of rows ---------------------------------------------------------------------


def row(part: str, name: str, ms: float, **more) -> dict:
    at = {"head_dim": 64, "seq_len": 4096, "causal": False, "batch": 4, "heads": 32}
    return {"part": part, "name": name, "median_ms": ms, "rate": 1e12 / ms, **at, **more}


@pytest.fixture
def made() -> Result:
    result = Result()
    result.add("matmul_bfloat16_sustained", 5e11, "FLOP/s", "made up")
    for name, ms in (("v1", 6.0), ("v2", 4.0), ("v3", 5.0), ("ours", 2.0), ("flash", 3.0)):
        result.rows.append(row("steps", name, ms))
    for n, ours, flash in ((16384, 4.0, 5.0), (1024, 4.0, 2.0)):
        result.rows.append(row("steps", "ours", ours, seq_len=n))
        result.rows.append(row("steps", "flash", flash, seq_len=n))
    for launch, ms in (("hidden", 1.0), ("included", 3.0)):
        for shape, factor in (("a", 1.0), ("b", 2.0)):
            more = {"shape": shape, "launch": launch}
            result.rows += [
                row("small", "ours", factor * ms, **more), row("small", "torch", 1.0, **more)
            ]
        more = {"launch": launch, "seq_len": 128}
        result.rows += [
            row("speedup", "ours", ms, **more), row("speedup", "naive_float32", 10.0, **more)
        ]
    flash_forward._summarise(result)
    return result


def test_ratios_are_times_of_the_other_over_ours(made):
    assert made.value("ratio_flash_d64_n4096") == 1.5
    assert made.value("ratio_flash_long_least") == 1.25
    assert made.value("ratio_flash_long_most") == 1.5
    assert made.value("ratio_flash_short_least") == 0.5
    assert made.value("ratio_v1_d64_n4096") == 3.0


def test_gain_is_the_step_before_over_the_step(made):
    assert made.value("gain_v2_d64_n4096") == 1.5
    assert made.value("gain_v3_d64_n4096") == 0.8
    assert flash_forward.gain(made, 2, 64, 4096) == 1.5
    assert "gain_v4_d64_n4096" not in made
    with pytest.raises(ArgumentError, match="not measured"):
        flash_forward.gain(made, 4, 64, 4096)


def test_share_is_of_the_sustained_ceiling(made):
    assert made.value("share_d64_n4096") == pytest.approx(1.0)


def test_small_shapes_and_speedups_tell_the_gpu_from_the_host(made):
    assert made.value("small_gpu_b") == 2.0 and made.value("small_host_b") == 6.0
    assert made.value("small_gpu_worst") == 2.0 and made.value("small_host_worst") == 6.0
    assert made.value("c17_naive_float32_n128") == 10.0
    assert made.value("c17_naive_float32_n128_host") == pytest.approx(10 / 3)


@pytest.mark.parametrize("causal", [False, True])
def test_oracle_is_attention_of_the_last_rows(causal):
    from labkit.naive import naive_attention

    q, k, v = torch.randn(2, 4, 90, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16)
    exact = naive_attention(q.double(), k.double(), v.double(), causal=causal)
    oracle = flash_forward._oracle(q, k, v, causal=causal)
    assert torch.allclose(oracle, exact[-1, -1, -64:], atol=1e-12)
    assert flash_forward._error(exact, oracle) < 1e-12
    exact[-1, -1, -1] *= 1.5
    assert flash_forward._error(exact, oracle) > 0.01
