"""The experiments on a training step and on the longest sequence, small and on a CPU."""

from __future__ import annotations

import pytest

from labkit import plots, records
from labkit.errors import ArgumentError
from labkit.experiments import Result, longest_sequence, training_step
from labkit.experiments.layer_forward import SIZES
from labkit.layers.budget import PARTS

TINY = {"dim": 32, "heads": 2, "layers": 2, "batch": 2}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The report's size, small enough for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "report", TINY)
        yield


@pytest.fixture(scope="module")
def step():
    with pytest.MonkeyPatch.context() as patch:
        plan = {
            "work": [("report", 32)], "configs": ("naive.fp32", "sdpa.fp16"),
            "claim": [1], "rep_ms": 2, "min_samples": 3, "oracle_to": 32, "hidden": [],
        }  # fmt: skip
        patch.setattr(training_step, "_plan", lambda quick, device: plan)
        patch.setattr(
            training_step, "CLAIMED_MEMORY", {"flash_half": ("sdpa", "fp16", 125 * 2**20)}
        )
        return training_step.run(quick=True, device="cpu")


def test_a_step_is_timed_weighed_and_compared_with_float64(step):
    assert len(step.select(part="step")) == 2
    for row in step.select(part="step"):
        assert row["median_ms"] > 0 and len(row["samples_ms"]) >= 3
        assert row["peak"] == row["predicted"], row
    assert step.value("error.report.naive.fp32.n32") < 1e-5
    assert 1e-5 < step.value("error.report.sdpa.fp16.n32") < 0.1
    assert step.value("ratio.report.naive.fp32.n32") == 1
    assert step.value("claim.flash_half.b1") == step.value("predicted_claim.flash_half.b1")
    assert not [note for note in step.notes if "Error" in note]
    # a record checks that each median is that of the samples beside it
    record = records.new_record("training_step", step.results, step.rows, "pytest", quick=True)
    assert record.rows == step.rows


def test_a_step_that_the_timer_refuses_costs_no_other(monkeypatch):
    from labkit import timing

    asked = []

    def refuses(functions, **how):
        asked.append([*functions])
        if "b" in functions:
            raise timing.UnsynchronisedError("b leaves work on another CUDA stream: wait for it.")
        return dict.fromkeys(functions, "timed")

    monkeypatch.setattr(timing, "time_many", refuses)
    result = Result()
    how = {"launch": "included", "device": "cpu", "plan": {"rep_ms": 1, "min_samples": 1}}
    found = training_step._in_turns(result, {"a": print, "b": print}, **how)
    assert found == {"a": "timed"} and asked == [["a", "b"], ["a"]]
    assert "another CUDA stream" in result.notes[0]


def test_speedups_and_savings_are_over_float32_of_the_same_backend():
    result = Result()
    for n, half in ((128, 1.1e-3), (512, 0.5e-3), (1024, 0.5e-3)):
        for precision, seconds, peak in (("fp32", 1e-3, 100), ("fp16", half, 40)):
            result.rows.append({
                "part": "step", "size": "report", "backend": "sdpa", "precision": precision,
                "seq_len": n, "batch": 4, "time": seconds, "peak": peak, "predicted": peak,
            })  # fmt: skip
    training_step._summarise(result)
    assert result.value("speedup.report.sdpa.fp16.n512") == 2
    assert result.value("saved.report.sdpa.fp16.n512") == 0.6
    assert result.value("pays.report.sdpa.fp16") == 512
    assert "speedup.report.sdpa.fp32.n512" not in result


def test_the_allocators_history_says_what_was_alive_at_the_peak():
    history = training_step._History()
    square = 4 * 64 * 64

    def event(action, addr, size):
        return {"action": action, "addr": addr, "size": size}

    history.saved = {1: "activations", 2: "activations", 3: "weights"}
    # the second allocation, and the fifth and sixth: what naive attention made, and its backward
    history.attention = [(1, 2, (square,)), (4, 6, (square,))]
    history.grads = {5}
    history.events = [
        event("alloc", 1, 100),
        event("alloc", 2, square),
        event("alloc", 3, 7),
        event("alloc", 9, 50),
        event("free_requested", 9, 50),
        event("alloc", 4, square),  # after the forward pass, by attention: scores
        event("alloc", 7, 8),  # by attention as well, and no scores
        event("alloc", 8, square),  # as large as P, and somebody else's
        event("alloc", 5, 30),  # a gradient
        event("alloc", 6, 11),  # in passing
        event("free_requested", 1, 100),
    ]
    history.after_forward = 5
    found = history.parts({"weights": 1000, "optimizer": 2000})
    assert found == {
        "weights": 1007, "gradients": 30, "optimizer": 2000, "activations": 100,
        "scores": 2 * square, "workspace": 8 + square + 11,
    }  # fmt: skip
    assert tuple(found) == PARTS
    history.why = "no such thing"
    assert "no such thing" in history.parts({})["why"]


@pytest.mark.parametrize("seq_len", [16, 64, 24])  # dim, 4 · dim, and neither
@pytest.mark.parametrize("precision", ["fp32", "autocast_bf16"])
def test_what_looks_like_scores_is_none(seq_len, precision, monkeypatch):
    """[batch, seq_len, 4 · dim] has the shape of scores where seq_len = 4 · dim.

    A CPU has no history of its allocator: here each tensor that an operator makes is one.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    dim, heads, layers, batch = 16, 4, 2, 4  # batch · seq_len is a weight's size as well
    step, x, target = training_step.a_step(
        {"dim": dim, "heads": heads, "layers": layers}, "naive", precision, "cpu",
        batch=batch, seq_len=seq_len,
    )  # fmt: skip
    events, kept, expected = [], {}, {"scores": 0, "weights": 0}
    weights = {4 * dim * dim, dim * dim}

    class Allocator(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if not isinstance(t, torch.Tensor) or t.untyped_storage().data_ptr() in kept:
                    continue
                address, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
                kept[address] = t  # nothing is freed: an address is one tensor
                events.append({"action": "alloc", "addr": address, "size": size})
                square = tuple(t.shape[-2:]) == (seq_len, seq_len)
                if square and t.numel() == batch * heads * seq_len**2:
                    expected["scores"] += size
                copied = "_to_copy" in str(func) and t.dtype == torch.bfloat16
                if copied and t.dim() == 2 and t.numel() in weights:
                    expected["weights"] += size
            return out

    for t in (*step.model.parameters(), x, target):
        kept[t.untyped_storage().data_ptr()] = t
    monkeypatch.setattr(training_step._History, "_read", lambda self: list(events))
    monkeypatch.setattr(training_step._History, "_allocations", lambda self: len(events))
    history = training_step._History()
    with Allocator():
        loss = history.forward(step, x, target)
        step.backward(loss)
    history.events = events
    found = history.parts({})
    assert found["scores"] == expected["scores"] >= layers * 2 * 4 * batch * heads * seq_len**2
    copied = layers * 12 * dim**2 * 2 if precision != "fp32" else 0
    assert found["weights"] == copied <= expected["weights"]
    assert sum(found.values()) == sum(event["size"] for event in events)
    history.why = ""
    with Allocator(), history._watching_attention():  # as many tokens as head_dim
        step.model(x[:, : dim // heads])
    assert "as large as q" in history.parts({})["why"]


def test_the_longest_is_found_where_it_was_predicted(monkeypatch):
    monkeypatch.setitem(longest_sequence.CAPS, "12", 4 * 2**20)
    result = Result()
    case = {"size": "report", "backend": "naive", "precision": "fp32", "mode": "training",
            "cap": "12", "expandable": False}  # fmt: skip
    longest_sequence._longest(result, case, "cpu")
    (row,) = result.rows
    assert row["found"] == row["predicted"] > 50
    assert result.value("ratio.report.naive.fp32.training.12") == 1
    with pytest.raises(ArgumentError, match="ways"):
        plots.longest_found(result, ways=("naive.fp32.training",))  # one memory is no line
    monkeypatch.setitem(longest_sequence.CAPS, "24", 8 * 2**20)
    longest_sequence._longest(result, case | {"cap": "24", "expandable": True}, "cpu")
    drawing = plots.longest_found(result, ways=("naive.fp32.training",))
    assert len(drawing.args[1]) == 1 and [*drawing.args[0]] == ["naive, float32"]
    record = records.new_record("longest_sequence", result.results, result.rows, "pytest")
    assert record.results == result.results


def test_without_its_kernels_attention_allocates_the_same_and_computes_nothing():
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    x = torch.full((2, 8, 2, 16), float("nan")).transpose(1, 2).requires_grad_()
    with longest_sequence.hollow_attention():
        out = sdpa(x, x, x)
        grad = torch.autograd.grad(out, x, torch.ones_like(out))[0]
    real = sdpa(x, x, x)
    assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)
    assert grad.shape == x.shape
    assert real.isnan().all() and not out.isnan().all()  # nobody has multiplied anything


def test_the_full_run_asks_for_every_memory_and_the_claims_first():
    cases = longest_sequence._cases(False, "cuda")
    assert [c["expandable"] for c in cases[:6]] == [False] * 6
    for cap in longest_sequence.CAPS:
        for backend in ("naive", "flash"):
            for precision in ("fp32", "fp16"):
                modes = {
                    c["mode"]
                    for c in cases
                    if (c["cap"], c["backend"], c["precision"]) == (cap, backend, precision)
                }
                assert modes >= {"inference", "training"}  # fmt: skip
    assert len(cases) == len({tuple(c.items()) for c in cases})


def test_an_unknown_precision_is_named():
    with pytest.raises(ArgumentError, match="autocast_fp16"):
        training_step.a_step(TINY, "sdpa", "fp61", "cpu", batch=1, seq_len=8)
