"""The experiment ``masks``: the patterns that it makes, and what it says of them."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from labkit.errors import ArgumentError
from labkit.experiments import Result, masks, run
from labkit.patterns import Blocked


@pytest.mark.parametrize("name", masks.NAMES)
def test_patterns_are_made_at_about_the_density_asked_for(name):
    found = masks.at_density(name, 0.05, 1024).statistics(1024, block=64, causal=True)
    assert found.density == pytest.approx(0.05, rel=0.25)
    grid = masks.at_density(name, 0.1, 2048, block=32)
    assert isinstance(grid, Blocked) and grid.block == 32
    stats = grid.statistics(2048, block=32, causal=True)
    assert stats.density == pytest.approx(0.1, rel=0.35)
    # Only the blocks on the diagonal are cut by causality.
    assert stats.partial == 64 and stats.density == pytest.approx(stats.block_density, rel=0.2)


def test_unknown_pattern_is_refused():
    with pytest.raises(ArgumentError, match="hierarchical"):
        masks.at_density("locale", 0.05, 64)


def plan_without_limit():
    """Nothing is left out, however slow the machine is."""
    return masks._plan(True, "cpu") | {"limit_s": float("inf")}


@pytest.fixture(scope="module")
def result():
    plan = plan_without_limit() | {
        "shape": {"batch": 1, "heads": 2, "head_dim": 32, "dtype": "float32"},
        "seq_len": 128, "block": 16, "lengths": (64, 128), "window": 16, "rep_ms": 1,
        "counted": 128, "per_row": (1, 6), "passes": ("forward", "both"),
        "patterns": ("local", "clustered_blocks", "clustered_sorted"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_plan", lambda quick, device: plan)
        return run("masks", quick=True, device="cpu")


def test_everything_planned_was_measured_against_float64(result):
    assert result.notes == []
    rows = [row for row in result.rows if row["part"] != "blocks"]
    done = {(row["pattern"], row["name"], row["pass"]) for row in rows if row["part"] == "density"}
    assert {("local", how, what) for how in ("naive", "sdpa", "blocks")
            for what in ("forward", "both")} < done  # fmt: skip
    assert ("clustered_sorted", "blocks", "forward") in done
    assert ("clustered_blocks", "blocks", "forward") in done
    assert {row["seq_len"] for row in rows if row["part"] == "lengths"} == {64, 128}
    same = [row for row in rows if row["part"] == "density" or row["name"] != "dense"]
    assert max(row["error"] for row in same) < 1e-5
    assert all(row["median_ms"] > 0 and row["samples_ms"] for row in rows)


def test_dense_attention_is_said_to_be_another_function(result):
    assert result.value("difference_dense_n128") > 0.1


def test_what_a_page_quotes_comes_from_the_rows(result):
    row = result.select(part="density", pattern="local", name="blocks", **{"pass": "forward"})[0]
    dense = result.select(part="density", pattern="dense", name="sdpa", **{"pass": "forward"})[0]
    assert result.value("time_local_blocks_forward") == row["median_ms"] / 1e3
    speedup = dense["median_ms"] / row["median_ms"]
    assert result.value("speedup_local_blocks_forward") == pytest.approx(speedup)
    assert result.value("touched_local") == row["block_density"]
    assert result.value("mask_bytes_local_sdpa") == 128 * 128
    naive = result.select(part="density", pattern="local", name="naive", **{"pass": "forward"})[0]
    assert naive["flops"] == 4 * 2 * 32 * 128 * 128  # heads, head_dim, every score
    assert row["flops"] == pytest.approx(
        4 * 2 * 32 * 16 * 16 * (row["full"] + row["partial"])
    )  # blocks of 16


def test_scattered_keys_touch_the_blocks_that_are_expected(result):
    for row in result.select(part="blocks"):
        assert row["counted"] == pytest.approx(row["expected"], abs=0.15)
    assert result.value("random_counted_b128_k6") == 1.0
    assert result.value("random_counted_b16_k1") < 1.0


def test_cases_in_programs_of_their_own_are_measured_like_the_others(monkeypatch):
    plan = plan_without_limit() | {
        "seq_len": 64, "block": 16, "lengths": (32, 64, 128), "rep_ms": 1, "apart": "blocks",
        "patterns": ("clustered_sorted",),
    }  # fmt: skip
    cases = list(masks._cases_apart(plan, masks.PARTS))
    assert cases == [("clustered_sorted", "forward"), ("32", "forward"), ("128", "forward")]
    assert list(masks._cases_apart(plan, ["blocks"])) == []
    assert list(masks._cases_apart(plan | {"apart": None}, masks.PARTS)) == []
    monkeypatch.setattr(masks, "_plan", lambda quick, device: dict(plan))
    result = masks.run(quick=True, device="cpu", parts=("sorted",))
    assert result.notes == []
    (row,) = result.rows
    assert row["pattern"] == "clustered_sorted" and row["name"] == "blocks"
    assert row["error"] < 1e-5 and row["median_ms"] > 0 and row["samples_ms"]


def test_a_case_whose_program_fails_is_measured_here(monkeypatch):
    plan = plan_without_limit() | {
        "seq_len": 64, "block": 16, "rep_ms": 1, "apart": "blocks",
        "patterns": ("clustered_sorted",),
    }  # fmt: skip
    monkeypatch.setattr(masks, "_plan", lambda quick, device: dict(plan))
    monkeypatch.setattr(masks.sys, "executable", "false")
    result = masks.run(quick=True, device="cpu", parts=("sorted",))
    assert [row["name"] for row in result.rows] == ["blocks"]
    assert len(result.notes) == 1 and "clustered_sorted, forward" in result.notes[0]


def test_one_function_that_cannot_be_timed_costs_no_other():
    plan = plan_without_limit() | {"rep_ms": 1}
    result = Result()

    def later():
        yield

    calls = {"naive": later, "sdpa": lambda: 1}
    found = {name: {"mask_bytes": 0} for name in calls}
    stats = {"costs": {"naive": {}, "sdpa": {"flops": 7}}}
    masks._time(result, plan, calls, found, {"pattern": "local"}, stats)
    assert [(row["name"], row["flops"]) for row in result.rows] == [("sdpa", 7)]
    assert len(result.notes) == 1 and "naive" in result.notes[0]


@pytest.mark.gpu
def test_on_a_gpu_bytes_are_measured_and_flex_runs():
    found = run("masks", quick=True)
    assert found.notes == []
    flex = found.select(part="density", pattern="random_blocks", name="flex")[0]
    naive = found.select(part="density", pattern="local", name="naive")[0]
    assert 0 < flex["peak"] < naive["peak"] / 10
