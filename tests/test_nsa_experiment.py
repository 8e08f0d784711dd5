"""The NSA correctness experiment: what it covers, and what it would say of a wrong kernel.

The GPU part runs here on the CPU where it can: a worker's formulas against the tests' own oracle.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations, pairwise, product

import nsa_oracle
import pytest
import torch

from labkit import records
from labkit.experiments import _correctness as common
from labkit.experiments import _nsa_cases as cases
from labkit.experiments import _nsa_worker as worker
from labkit.experiments import nsa_correctness as experiment
from labkit.experiments import run
from labkit.experiments._nsa_cases import Case

SHAPE = {"t": 40, "group": 2, "d": 16, "dv": 24, "block": 16, "slots": 3, "window": 9}
CASES = [
    Case("selection", **SHAPE, choice="holes", counts="tensor"),
    Case("selection", **SHAPE, choice="repeats", counts="int", sequences="ragged"),
    Case("compression", **SHAPE, length=16, stride=4, sequences="fewer"),
    Case("compression", **SHAPE, sequences="ragged", layout="bounds"),
    Case("whole", **SHAPE),
    Case("whole", **SHAPE, sequences="ragged", gates="cs", forced=(0, 1)),
]


def exact(case, blocks=None):
    """The worker's results in float64, heads first, and the tensors of the case."""
    tensors = [
        x.double() if x.is_floating_point() else x for x in worker.make(case.but(dtype="float32"))
    ]
    q, k, v, *gates, dout, chosen, counts = tensors
    first = [x.transpose(1, 2) for x in (q, k, v, dout)]
    chosen = worker._used(chosen, counts, case) if blocks is None else blocks
    if case.part == "compression":
        return worker.compressed(*first, case), tensors, chosen
    if case.part == "selection":
        got = worker.branch(*first, worker.see_chosen(case, chosen), case.d**-0.5)
        return got, tensors, chosen
    named = zip(worker._GATES.items(), gates, strict=True)
    weights = {name: g.mT for (letter, name), g in named if letter in case.gates}
    return worker.whole(*first[:3], weights, first[3], chosen, case), tensors, chosen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_experiments_formulas_are_the_oracle_of_the_tests(case, monkeypatch):
    monkeypatch.setattr(worker, "_AT_ONCE", 2000)  # a few rows at a time
    got, (q, k, v, *gates, dout, _, _), blocks = exact(case)
    cu = None if case.offsets is None else torch.tensor(case.offsets)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *gates)]
    if case.part == "whole":
        names = ["dq", "dk", "dv", *(f"d{n}" for c, n in worker._GATES.items() if c in case.gates)]
        given = [g if c in case.gates else None for c, g in zip("csw", leaves[3:], strict=True)]
        leaves = [*leaves[:3], *(g for g in given if g is not None)]
        o = nsa_oracle.layer(
            *leaves[:3], *given, block_indices=blocks, block_size=16, window_size=9, cu_seqlens=cu
        )
    else:
        leaves, names = leaves[:3], ["dq", "dk", "dv"]
        if case.part == "selection":
            o, lse, _ = nsa_oracle.selection(*leaves, blocks, block_size=16, cu_seqlens=cu)
        else:
            o, lse, _ = nsa_oracle.compression(
                *leaves, length=case.own_length, stride=case.own_stride, cu_seqlens=cu
            )
        torch.testing.assert_close(got["lse"], lse.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(got["o"].transpose(1, 2), o.detach(), rtol=0, atol=1e-12)
    for name, true in zip(names, torch.autograd.grad(o, leaves, dout), strict=True):
        ours = got[name].transpose(1, 2) if true.dim() == 4 else got[name].mT
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-12, msg=name)


@cache
def right(case):
    """What a good kernel would give for a case: plain attention in float32."""
    tensors = worker.make(case)
    q, k, v, *gates, dout, _, _ = tensors
    first = [x.transpose(1, 2) for x in (q, k, v, dout)]
    blocks, _ = nsa_oracle.choice(
        q.double(), k.double(), block_counts=case.slots, block_size=case.block
    )
    weights = {name: g.mT for name, g in zip(worker._GATES.values(), gates, strict=True)}
    got = worker.whole(*first[:3], weights, first[3], blocks, case)
    swapped = {n: x.transpose(1, 2) if x.dim() == 4 else x.mT for n, x in got.items()}
    return tensors, swapped | {"blocks": blocks}


WHOLE = Case("whole", **SHAPE | {"t": 70, "kv": 1}, dtype="float32")


@pytest.mark.parametrize(
    ("tensor", "wrong"), [(None, ""), ("o", "one element"), ("dk", "everywhere"), ("dg_swa", "nan")]
)
def test_a_worker_finds_a_wrong_tensor(tensor, wrong):
    tensors, got = right(WHOLE)
    if tensor is not None:
        bad = got[tensor].clone(memory_format=torch.contiguous_format)
        if wrong == "everywhere":
            bad *= 1.01
        else:
            bad.view(-1)[7] += 0.05 if wrong == "one element" else math.nan
        got = got | {tensor: bad}
    for name, found in worker.judge(WHOLE, tensors, got).items():
        assert (found["ratio"] > 1) == (name == tensor), (name, tensor)


@pytest.mark.parametrize("wrong", ["future", "unforced", "worse", "twice", "missing"])
def test_a_worker_finds_a_wrong_choice(wrong):
    tensors, got = right(WHOLE)
    blocks = got["blocks"].clone()
    if wrong == "future":
        blocks[0, 30, 0] = torch.tensor([0, 1, 3])
    elif wrong == "unforced":
        blocks[0, 69, 0] = torch.tensor([1, 3, 4])
    elif wrong == "worse":  # three slots hold two forced ones (0 and 4, 3) and none besides
        case = WHOLE.but(forced=(0, 1), slots=1)
        q, k = tensors[:2]
        blocks, score = nsa_oracle.choice(
            q.double(), k.double(), block_counts=2, block_size=16, forced=(0, 1)
        )
        assert worker.judge_choice(case, q, k, blocks)["ratio"] <= 1
        worst = score[0, 69, 0, [0, 16, 32, 48]].argmin()
        blocks[0, 69, 0] = torch.tensor([worst, 4])
        assert worker.judge_choice(case, q, k, blocks)["ratio"] > 1
        return
    elif wrong == "twice":
        blocks[0, 69, 0] = torch.tensor([0, 4, 4])
    else:
        blocks[0, 69, 0, 2] = -1
    assert worker.judge_choice(WHOLE, *tensors[:2], blocks)["ratio"] == math.inf


# -- which cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", experiment.PARTS)
def test_every_two_values_of_two_factors_meet(part):
    found = cases.matrix(part)
    assert len(found) == len(set(map(str, found))) < 100
    for a, b in combinations(("t", "group", "block", "dtype", "sequences"), 2):
        met = {(getattr(c, a), getattr(c, b)) for c in found}
        assert met == set(product(cases.FACTORS[part][a], cases.FACTORS[part][b])), (a, b)


def test_the_issues_sizes_are_all_there():
    assert cases.LENGTHS == (1, 15, 63, 64, 65, 127, 500, 1024, 4097)
    every = experiment.cases(quick=False)
    assert {c.group for c in every} >= {1, 2, 3, 8, 16, 64}
    assert {c.block for c in every} == {16, 32, 64, 128}
    assert {c.d for c in every} >= {192} and any(c.d != c.dv for c in every)
    whole = [c for c in every if c.part == "whole"]
    assert {0, 5000} <= {c.window for c in whole} and max(c.t for c in whole) < 5000
    short = [c.offsets for c in every if c.sequences == "short" and c.t > 60]
    assert short and all(min(b - a for a, b in pairwise(o)) < 16 for o in short)


@pytest.mark.parametrize("choice", cases.CHOICES)
def test_choices_are_what_they_are_called(choice):
    case = Case("selection", **SHAPE | {"t": 70, "slots": 4}, choice=choice)
    *_, blocks, _ = worker.make(case)
    current = torch.arange(70)[:, None, None] // 16
    assert blocks.min() >= -1 and blocks.max() <= 4
    assert (blocks[0] > current).any() == (choice == "future")
    inner = (blocks[..., :-1] == -1) & (blocks[..., 1:] >= 0)
    assert inner.any() == (choice == "holes")
    same = (blocks[..., :, None] == blocks[..., None, :]) & (blocks[..., None] >= 0)
    assert (same.sum((-1, -2)) > (blocks >= 0).sum(-1)).any() == (choice == "repeats")
    assert (blocks[0] == -1).all(-1).all(-1)[::3].all() == (choice == "nothing")


def test_a_case_without_a_complete_block_is_judged_and_not_given_up():
    """Gradients of k and v are 0 where nothing is visible, whatever the stride."""
    case = Case("compression", t=9, group=2, kv=1, d=16, dv=16, dtype="float32", block=16,
                length=16, stride=8)  # fmt: skip
    (row,) = worker.run(case, device="cpu")
    assert set(row["tensors"]) == {"o", "lse", "dq", "dk", "dv"}
    assert all(found["ratio"] <= 1 for found in row["tensors"].values())


def test_the_whole_is_judged_without_gradients_too():
    """There another kernel may add up the branches (on Hopper, head_dim 128)."""
    case = Case("whole", **SHAPE).but(dtype="float32")
    tensors = worker.make(case)
    assert worker.roads(*tensors, case) == ["default", "inference"]
    got = worker.attend(*tensors, case, "inference")
    assert set(got) == {"o", "blocks"} and not got["o"].requires_grad
    found = worker.judge(case, tensors, got)
    assert set(found) == {"o", "choice"} and all(x["ratio"] <= 1 for x in found.values())
    assert torch.equal(got["o"], worker.attend(*tensors, case, "default")["o"])
    added = [c for c in experiment.cases(quick=False) if c.part == "whole" and c.d == c.dv == 128
             and c.group in (16, 64) and c.block == 64 and c.dtype != "float32"
             and c.offsets is None]  # fmt: skip
    assert {c.gates for c in added} >= {"csw", "cs", "sw"}


def test_a_run_that_ends_early_has_judged_a_bit_of_everything():
    every = common.spread(experiment.suite(), experiment.cases(quick=False))
    assert sorted(map(str, every)) == sorted(map(str, experiment.cases(quick=False)))
    facts = [set(experiment._facts(case)) for case in every]
    missing = set().union(*facts) - set().union(*facts[: len(every) // 4])
    assert not missing
    first = every[:12]
    assert {c.part for c in first} == set(experiment.PARTS)
    assert {c.dtype for c in first} == set(experiment.DTYPES)
    hand = ("selection", "by hand", True)
    assert any(hand in each for each in facts[:12]), "the kernels by hand"
    added = [("whole", "added", gates) for gates in ("csw", "cs", "sw")]
    assert all(any(one in each for each in facts[: len(every) // 4]) for one in added), "the sum"


# -- figures ---------------------------------------------------------------------------------------


def summed_up(ratio=0.5, rms=1e-3):
    found = {"error": 1e-3, "plain": 1e-3, "allowed": 2e-3, "rms": rms, "rms_plain": 2e-3}
    rows = [
        {"case": str(case), "part": case.part, "road": "default", "dtype": case.dtype,
         "tensors": {name: found | {"ratio": ratio} for name in ("o", "dq", "choice")}}
        for case in experiment.representative()
    ]  # fmt: skip
    result = experiment.Result()
    common.sum_up(experiment.suite(), result, experiment.representative(), rows)
    experiment._by_part(result)
    experiment._rmse(result)
    records.new_record("nsa_correctness", result.results, result.rows, "test")
    return result


def test_figures_of_a_good_run():
    result = summed_up()
    assert result.value("failures") == 0 and result.value("cases") == 3 and not result.notes
    assert result.value("bfloat16_dq_worst") == 0.5 and result.value("whole_worst") == 0.5
    assert result.value("bfloat16_rmse_worst") == 1e-3 and result.value("bfloat16_rmse_above") == 0
    assert result.value("whole_cases") == 3


def test_an_error_beyond_a_bound_is_counted_and_named():
    result = summed_up(ratio=1.2, rms=0.006)
    assert result.value("failures") == 9 and result.value("bfloat16_rmse_above") == 2
    assert any("RMSE 0.0060 (plain attention 0.0020)" in note for note in result.notes)
    how = result.results["bfloat16_rmse_above"]["how"]
    assert "plain attention in bfloat16 has 0" in how and "no failure" in how
    assert summed_up(ratio=math.inf).value("whole_worst") == 1e6


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_quick_run():
    result = run("nsa_correctness", quick=True)
    assert result.value("failures") == 0, result.notes
    assert result.value("repeats_unequal") == 0
    records.new_record("nsa_correctness", result.results, result.rows, "test", quick=True)
