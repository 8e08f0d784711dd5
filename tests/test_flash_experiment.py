"""The correctness experiment: what it covers, what it would say of a wrong kernel, and its words.

The GPU part runs here on the CPU where it can: a worker judges a case through the interpreter.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time

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
def test_cases_that_cannot_run_say_why():
    done = common.work(experiment.suite(), [CASES[0], CASES[1]])  # there is no GPU
    assert [row["case"] for row in done] == [str(CASES[0]), str(CASES[1])]
    assert all("CUDA" in row["failed"] or "NVIDIA" in row["failed"] for row in done)


# -- a run that has no time, or workers that go --------------------------------------------------

WORKER = """
import sys, time
from dataclasses import asdict, dataclass
from labkit.experiments._correctness import serve

@dataclass(frozen=True)
class Case:
    what: str
    dtype: str = "float16"
    part: str = "whole"

    def to_dict(self):
        return asdict(self)

    def __str__(self):
        return self.what

def run(case):
    if "raise" in case.what:
        raise ValueError("no such kernel")
    if "die" in case.what:
        sys.exit("illegal address")
    if "hang" in case.what:
        time.sleep(60)
    print("not a row {")
    found = {"ratio": 0.5, "rms": 0.1, "rms_plain": 0.2}
    return [{"case": str(case), "road": "default", "dtype": case.dtype, "tensors": {"o": found}}]

def far(case):
    return [{"case": str(case), "road": "default", "dtype": case.dtype, "worst": 0.25}]

if __name__ == "__main__":
    serve(sys.modules[__name__])
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A worker whose cases do what they are called, and its suite."""
    (tmp_path / "fake_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    from importlib import import_module

    module = import_module("fake_worker")
    made = common.Suite(
        worker="fake_worker", tensors=("o",), representative=(), repeated=(), watched=(),
        groups={}, timeout_s=3,
    )  # fmt: skip
    yield module.Case, made
    del sys.modules["fake_worker"]


def judged(suite, cases, clock=None, **more):
    result = experiment.Result()
    silent = lambda done, total, what: None  # noqa: E731
    distant = common.judge(suite, result, cases, 0, silent, clock, **more)
    records.new_record("flash_correctness", result.results, result.rows, "test")
    return result, distant


def test_a_worker_that_dies_or_hangs_takes_its_own_case_along(fake, monkeypatch):
    case, suite = fake
    monkeypatch.setattr(common.os, "cpu_count", lambda: 2)  # one worker for all
    wanted = [case(x) for x in ("a", "raise", "b", "die", "c", "hang", "d")]
    result, distant = judged(suite, wanted, far=case("far"))
    assert distant[0]["worst"] == 0.25
    assert result.value("cases") == 7 and result.value("left_out") == 0
    assert result.value("default_cases") == 4 and result.value("failures") == 3
    why = {row["case"]: row["failed"] for row in result.rows if "failed" in row}
    assert why == {
        "raise": "ValueError: no such kernel", "die": "illegal address",
        "hang": "not done after 3 s",
    }  # fmt: skip
    assert "repeats_unequal" not in result  # nothing was repeated


def test_a_run_ends_with_its_time_and_says_what_it_left_out(fake):
    case, suite = fake
    result, _ = judged(suite, [case(x) for x in "abc"], common.Clock(0), far=case("far"))
    assert result.value("cases") == 0 and result.value("left_out") == 3
    assert result.value("failures") == 0
    assert "3 of 3 cases were not judged" in result.notes[0]
    assert "addresses: no time was left for far" in result.notes


def test_a_run_that_is_told_to_end_keeps_what_it_has(fake, monkeypatch):
    case, suite = fake
    monkeypatch.setattr(common.os, "cpu_count", lambda: 2)

    def told(done, total, what):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    result = experiment.Result()
    begin = time.monotonic()
    with common.Clock(60) as clock:
        common.judge(suite, result, [case(x) for x in ("a", "b", "hang", "c")], 0, told, clock)
    assert time.monotonic() - begin < 10 and clock.left() <= 0
    assert result.value("cases") == 2 and result.value("left_out") == 2
    assert signal.getsignal(signal.SIGTERM) != clock.stop


def test_a_command_that_takes_too_long_ends_with_its_children(monkeypatch):
    monkeypatch.setattr(common, "_SANITIZER_TIMEOUT_S", 0.2)
    begin = time.monotonic()
    # a child of the child holds what would be a pipe
    said = common._outcome(["sh", "-c", "sleep 60 & sleep 60"], dict(os.environ), common.Clock())
    assert said.startswith("not done after") and time.monotonic() - begin < 5
    assert common._outcome(["echo", "ran 3"], dict(os.environ), common.Clock()) == "ran 3\n"


def test_the_first_cases_of_a_run_show_every_value():
    every = common.spread(experiment.suite(), experiment.cases(quick=False))
    assert sorted(map(str, every)) == sorted(map(str, experiment.cases(quick=False)))
    facts = [set(case.to_dict().items()) for case in every]
    assert set().union(*facts[: len(every) // 3]) == set().union(*facts)


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
