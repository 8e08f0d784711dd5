"""The correctness experiment: what it covers, what it would say of a wrong kernel, and its words.

The GPU part runs here on the CPU where it can: a worker judges a case through the interpreter.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from flash_cases import Case, make

from labkit import records
from labkit.experiments import _correctness as common
from labkit.experiments import _flash_worker as worker
from labkit.experiments import flash_correctness as experiment
from labkit.experiments import run

CASES = [
    Case(9, 14, heads=4, kv_heads=2, batch=2, causal=True),
    Case(14, 9, causal=True, window=3),
    Case(7, 20, window=4, scale=0.3, d_v=24),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_experiments_reference_is_the_oracle_of_the_tests(case):
    q, k, v, dout = (x.double() for x in make(case))
    o, lse, s, p = worker.attention(q, k, v, **case.options)
    expected = oracle.attention_f64(q, k, v, **case.options)
    for ours, theirs in zip((o, s, p), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, oracle.log_sum_exp(expected[1]), rtol=0, atol=1e-13)
    for ours, theirs in zip(
        worker.gradients(q, k, v, dout, **case.options),
        oracle.gradients_f64(q, k, v, dout, **case.options),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
def test_a_worker_finds_the_kernels_right():
    (row,) = worker.run(CASES[0], "cpu")
    assert row["road"] == "default" and set(row["tensors"]) == set(experiment.TENSORS)
    assert all(0 < found["ratio"] <= 1 for found in row["tensors"].values())


@pytest.mark.parametrize("tensor", experiment.TENSORS)
@pytest.mark.parametrize("wrong", ["one element", "everywhere", "nan"])
def test_a_worker_finds_a_wrong_tensor(tensor, wrong):
    case = Case(40, 50, d=16, dtype="float16")
    tensors = make(case)
    q, k, v, _ = tensors
    o, _, _, _ = worker.attention(q, k, v, **case.options)
    lse = worker.attention(q.float(), k.float(), v.float(), **case.options)[1]
    right = dict(zip(("dq", "dk", "dv"), worker.gradients(*tensors, **case.options), strict=True))
    right |= {"o": o, "lse": lse}
    assert all(found["ratio"] < 1 for found in worker.judge(case, tensors, right).values())
    got = {name: x.clone() for name, x in right.items()}
    if wrong == "one element":
        got[tensor][0, 0, 3:4] += 0.05
    elif wrong == "everywhere":
        got[tensor] *= 1.01
    else:
        got[tensor][0, 0, 3:4] = math.nan
    for name, found in worker.judge(case, tensors, got).items():
        assert (found["ratio"] > 1) == (name == tensor)


def test_an_lse_that_is_finite_where_nothing_is_seen_is_wrong():
    case = Case(9, 4, causal=True)
    tensors = make(case)
    lse = worker.attention(*tensors[:3], **case.options)[1]
    assert worker.judge(case, tensors, {"lse": lse})["lse"]["ratio"] <= 1
    got = {"lse": lse.masked_fill(torch.isneginf(lse), 0.0)}
    assert worker.judge(case, tensors, got)["lse"]["ratio"] == math.inf


# -- figures ---------------------------------------------------------------------------------


def rows(ratio=0.5, road="default"):
    found = {"error": 1e-3, "plain": 1e-3, "allowed": 2e-3, "rms": 1e-4, "rms_plain": 2e-4}
    return [
        {"case": str(case), "road": road, "dtype": case.dtype,
         "tensors": {name: found | {"ratio": ratio} for name in experiment.TENSORS}}
        for case in experiment.representative()
    ]  # fmt: skip


def summed_up(*rows):
    result = experiment.Result()
    common.sum_up(experiment.suite(), result, experiment.representative(), list(rows))
    records.new_record("flash_correctness", result.results, result.rows, "test")
    return result


def test_figures_of_a_good_run():
    result = summed_up(*rows())
    assert result.value("failures") == 0 and result.value("cases") == 3 and not result.notes
    assert result.value("bfloat16_dq_worst") == 0.5 and result.value("bfloat16_dq_cases") == 1
    assert result.value("float32_o_rms") == 1e-4 and result.value("float32_o_rms_plain") == 2e-4
    assert result.value("default_cases") == 3


@pytest.mark.parametrize("ratio", [1.2, math.inf, math.nan])
def test_an_error_beyond_the_bound_is_a_failure_and_is_named(ratio):
    bad, *good = rows(), *rows()
    bad = bad[0] | {"road": "by_hand", "tensors": {"dk": {"ratio": ratio, "error": ratio}}}
    result = summed_up(bad, *good)
    assert result.value("failures") == 1
    assert any("by_hand: dk" in note for note in result.notes)


def test_a_case_that_did_not_run_is_a_failure():
    gone = {"case": "float16-…", "road": "", "dtype": "float16", "failed": "illegal address"}
    result = summed_up(gone, *rows())
    assert result.value("failures") == 1 and "illegal address" in result.notes[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a worker that must fail")
def test_a_worker_that_dies_fails_all_its_cases():
    done = common.work(experiment.suite(), [CASES[0], CASES[1]])  # there is no GPU
    assert [row["case"] for row in done] == [str(CASES[0]), str(CASES[1])]
    assert all("failed" in row for row in done)


# -- compute-sanitizer -----------------------------------------------------------------------


def test_summaries_of_the_sanitizer_are_read():
    parse = common.parse_sanitizer
    good = "========= COMPUTE-SANITIZER\nran 7\n========= ERROR SUMMARY: 0 errors\n"
    assert parse("memcheck", good) == (0, 7)
    assert parse("memcheck", good.replace("0 errors", "1 error")) == (1, 7)
    race = "ran 7\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"
    assert parse("racecheck", race) == (3, 7)
    assert parse("memcheck", "========= ERROR SUMMARY: 0 errors\n") is None, "the child did not run"
    assert parse("memcheck", "ran 7\nSegmentation fault\n") is None


def test_the_child_is_started_with_what_it_is_to_run():
    command = common.sanitizer_command(
        experiment.suite(), "/x/compute-sanitizer", "racecheck", ["default"]
    )
    assert command[:3] == ["/x/compute-sanitizer", "--tool", "racecheck"]
    assert "labkit.experiments._sanitizer_child" in command
    assert '"roads": ["default"]' in command[-1]
    assert common.sanitizer_command(experiment.suite(), None, "", [])[0] != "/x/compute-sanitizer"


# -- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", experiment.cases(quick=True), ids=str)
def test_every_road_of_what_fast_roads_can_take(case):
    from flash_cases import assert_right

    tensors = make(case, "cuda")
    q, k, v, dout = tensors
    for road in worker.roads(*tensors, case):
        assert_right(worker.attend(*tensors, case, road), q, k, v, dout, **case.options)


@pytest.mark.gpu
def test_quick_run():
    result = run("flash_correctness", quick=True)
    assert result.value("failures") == 0, result.notes
    assert result.value("repeats_unequal") == 0
    records.new_record("flash_correctness", result.results, result.rows, "test", quick=True)
