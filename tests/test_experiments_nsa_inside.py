"""The experiments of chapters 14 and 15, and the loop that the second one measures."""

from __future__ import annotations

import functools
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from labkit import experiments
from labkit.experiments import half_rate, nsa_weights
from labkit.memory import saved_for_backward
from labkit.nsa import naive_nsa
from labkit.nsa.loop import loop_saved_bytes, selection_loop

QUICK = {"quick": True, "device": "cpu"}


def problem(t=21, dtype=torch.float64, slots=3, size=4):
    generator = torch.Generator().manual_seed(t)
    q, k, v = (
        torch.randn(2, t, h, d, generator=generator, dtype=dtype)
        for h, d in ((4, 8), (2, 8), (2, 6))
    )
    order = torch.rand(2, t, 2, -(-t // size), generator=generator).argsort(-1)
    return q, k, v, order[..., :slots]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tokens_at_once", [False, True])
def test_the_loop_computes_what_the_reference_computes(half, tokens_at_once):
    q, k, v, blocks = problem()
    blocks[0, 2] = -1  # a query that chose nothing
    blocks[1, 7, 0, 1] = -1
    gates = torch.ones(q.shape[:3], dtype=q.dtype)
    right = naive_nsa(q, k, v, gates, None, blocks, None, 4, half_rate=half)
    o = selection_loop(
        q, k, v, blocks, block_size=4, half_rate=half, tokens_at_once=tokens_at_once
    )
    assert torch.allclose(o, right, rtol=0, atol=1e-13)


def test_the_loop_keeps_what_is_predicted_for_each_step():
    q, k, v, blocks = problem(dtype=torch.float32)
    q, k, v, blocks = (x[:1] for x in (q, k, v, blocks))
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    for half, steps in ((False, 21), (True, 11)):
        loop = functools.partial(
            selection_loop, block_indices=blocks, block_size=4, half_rate=half
        )
        kept = saved_for_backward(loop, q, k, v).beyond_inputs
        predicted = loop_saved_bytes(
            seq_len=21, count=3, block_size=4, heads=4, head_dim=8, head_dim_v=6, half_rate=half
        )
        assert predicted == steps * 12 * 4 * 14 * 4
        assert predicted < kept < 1.6 * predicted  # and probabilities, token numbers, masks


@pytest.fixture(scope="module")
def halves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half_rate, "_LIMIT", float("inf"))  # nothing is left out on a slow machine
        return experiments.run("half_rate", **QUICK)


def test_half_rate_halves_operations_and_not_the_loops_peak(halves):
    assert halves.notes == []
    assert halves.value("flops.ratio") == 2.0
    assert halves.value("flops.loop.full") == 2 * halves.value("flops.claimed")
    assert halves.value("flops.compression.full") == halves.value("flops.compression.half")
    assert abs(halves.value("peak.loop.forward.saving")) < 0.01
    assert 0.3 < halves.value("peak.loop.training.saving") < 0.5
    assert abs(halves.value("peak.compression.forward.saving")) < 0.05
    assert halves.value("peak.whole.forward.saving") < 0.1
    assert halves.value("speedup.loop.forward") > 1.2


def test_half_rate_changes_the_function(halves):
    for row in halves.select(part="error"):
        # at ρ = 1 what is left is the token's own key, which the formula leaves out
        assert row["odd"] == pytest.approx(row["expected"], rel=0.15) or row["rho"] == 1.0
    assert halves.value("error.rho1.measured") < 0.2 < halves.value("error.rho0.9.measured")
    assert halves.value("lookup.full.odd") == halves.value("lookup.half.even") == 1.0
    assert halves.value("lookup.half.odd") < 0.1
    assert halves.value("gradients.dq_odd") == 0.0
    assert halves.value("gradients.dk") > 0.3


def test_expected_error_has_its_limits():
    assert half_rate.expected_error(1.0) == 0.0
    assert half_rate.expected_error(0.0, 0.0) == pytest.approx(2**0.5)
    assert half_rate.expected_error(0.5) < half_rate.expected_error(0.0)
    assert half_rate.expected_error(0.5, variance=4) > half_rate.expected_error(0.5)


def test_queries_are_correlated_as_asked():
    generator = torch.Generator().manual_seed(0)
    q = half_rate.correlated_queries((1, 4000, 1, 8), 0.7, generator, "cpu")
    assert (q[:, 1:] * q[:, :-1]).mean().item() == pytest.approx(0.7, abs=0.03)
    assert q.var().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("pattern", ["random", "local"])
def test_random_blocks_are_a_causal_choice_with_the_forced_ones(pattern):
    blocks = half_rate.random_blocks(1, 100, 2, 5, 8, "cpu", pattern=pattern)
    assert blocks.dtype == torch.int32 and blocks.shape == (1, 100, 2, 5)
    own = torch.arange(100)[None, :, None, None] // 8
    assert (blocks <= own).all()
    for forced in (own, (own - 1).clamp(min=0), torch.zeros_like(own)):
        assert (blocks == forced).any(-1).all()
    used = (blocks >= 0).sum(-1)
    assert (used == (own[..., 0] + 1).clamp(max=5)).all()
    assert all(len(set(row)) == len(row) for row in blocks[0, 99].tolist())
    shared = (blocks[0, 80, 0][:, None] == blocks[0, 81, 0]).any(0).float().mean()
    assert shared > 0.7 or pattern == "random"


@pytest.mark.parametrize("name", ["half_rate", "nsa_weights"])
def test_a_part_that_fails_costs_its_rows_only(name, monkeypatch):
    module = {"half_rate": half_rate, "nsa_weights": nsa_weights}[name]

    def broken(*args):
        raise ValueError("no such thing")

    monkeypatch.setattr(module, {"half_rate": "_lookup", "nsa_weights": "_precision"}[name], broken)
    part = {"half_rate": "lookup", "nsa_weights": "precision"}[name]
    result = module.run(**QUICK, parts=(part,))
    assert result.rows == [] and "no such thing" in result.notes[0]
    with pytest.raises(Exception, match="parts"):
        module.run(**QUICK, parts=("nothing",))


def test_weights_are_rebuilt_and_their_rows_sum_to_one():
    result = experiments.run("nsa_weights", **QUICK)
    assert result.notes == []
    for branch in ("compression", "selection", "sliding_window"):
        assert result.value(f"precision.float32.{branch}") < 1e-5
        assert result.value(f"rebuild.n256.{branch}.peak") >= 256 * 256 * 4
    # plain PyTorch rounds S to bfloat16 before it takes the LSE: the rows show it
    assert result.value("precision.bfloat16.selection") > 1e-3
    assert result.value("precision.bfloat16.rounded") > result.value("precision.float16.rounded")


def test_bytes_that_come_back_are_counted():
    assert nsa_weights.returned_bytes(seq_len=10, heads=4, kv_heads=2, count=3, batch=2) == (
        2 * 10 * 4 * (12 + 6)
    )
    assert nsa_weights.weights_bytes(seq_len=10, heads=4, batch=2) == 3200


@pytest.mark.parametrize("module", [half_rate, nsa_weights])
def test_no_job_begins_after_the_limit(module, monkeypatch):
    monkeypatch.setattr(module, "_LIMIT", -1)
    result = module.run(**QUICK)
    assert result.rows == [] and all("left out" in note for note in result.notes)


def test_naive_timing_reads_what_the_child_prints(monkeypatch):
    calls = []

    def child(command, **options):
        calls.append((json.loads(command[-1])["mode"], "TRITON_CACHE_DIR" in options["env"]))
        text = json.dumps({"without": 2.0, "with": 0.5, "without_queued": 1.0, "with_queued": 0.1})
        return SimpleNamespace(returncode=0, stdout=f"hello\n{text}\n", stderr="")

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(subprocess, "run", child)
    result = experiments.Result()
    plan = {"naive": nsa_weights.NOTES}
    for mode in ("cold", "turned", "warm"):
        nsa_weights._naive(result, plan, "cuda", mode)
    assert calls == [("source", True), ("turned", False), ("warm", False)]
    assert result.value("naive.cold.overhead") == -0.75
    assert result.value("naive.warm.with.queued") == 0.1
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nboom")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match="boom"):
        nsa_weights._naive(result, plan, "cuda", "warm")


@pytest.mark.parametrize(
    "job",
    [
        {"heads": 1, "seq_len": 16, "head_dim": 16, "calls": 1, "device": "cpu"},
        pytest.param({"heads": 4, "seq_len": 128, "head_dim": 64, "calls": 3},
                     marks=pytest.mark.gpu),
    ],
    ids=["interpreter", "gpu"],
)  # fmt: skip
def test_the_child_times_both_loops(job):
    from labkit.experiments._nsa_weights_child import MODES, main

    for mode in MODES[:1] if "device" in job else MODES:
        found = main({**job, "mode": mode})
        assert 0 < found["without_queued"] <= found["without"]
        assert 0 < found["with_queued"] <= found["with"]
