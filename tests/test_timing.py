"""labkit.timing: samples that mean something, or a refusal that says why."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time

import pytest
import torch

from labkit.errors import ArgumentError, NoGpuError
from labkit.timing import Comparison, Timing, UnsynchronisedError, quantile, time_fn, time_many

FAST = {"warmup_ms": 1.0, "rep_ms": 20.0}


def test_median_and_spread_of_known_samples():
    timing = Timing([5.0, 1.0, 2.0, 3.0, 4.0], "by hand", "cpu")
    assert (timing.n, timing.median_ms) == (5, 3.0)
    assert timing.p20 == pytest.approx(1.8)
    assert timing.p80 == pytest.approx(4.2)
    assert timing.spread == pytest.approx(0.8)
    assert timing.rate(6e6) == pytest.approx(2e9)  # 6 MB in 3 ms
    assert timing.to_dict()["samples_ms"] == [5.0, 1.0, 2.0, 3.0, 4.0]
    assert "3 ms" in str(timing)


def test_quantile_matches_torch():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        expected = torch.quantile(torch.tensor(values, dtype=torch.float64), q)
        assert quantile(values, q) == pytest.approx(float(expected))


def test_cpu_time_is_the_time_that_passed():
    timing = time_fn(lambda: time.sleep(0.004), device="cpu", **FAST)
    assert 4.0 <= timing.median_ms < 12.0
    assert timing.n >= 5
    assert timing.device == "cpu" and "perf_counter" in timing.method


def test_short_functions_are_called_often_enough_to_be_seen():
    timing = time_fn(lambda: None, device="cpu", **FAST)
    assert 0 < timing.median_ms < 5e-3  # a call costs well under 5 µs
    assert "calls per sample" in timing.method


def test_min_samples_hold_for_a_slow_function():
    timing = time_fn(
        lambda: time.sleep(0.01), device="cpu", min_samples=7, rep_ms=1.0, warmup_ms=1.0
    )
    assert timing.n == 7


def test_warm_up_runs_before_the_first_sample():
    calls = []

    def slow_start():
        time.sleep(0.02 if not calls else 0.001)
        calls.append(1)

    assert max(time_fn(slow_start, device="cpu", **FAST).samples_ms) < 15


def test_before_runs_outside_the_interval():
    order = []

    def before():
        order.append("before")
        time.sleep(0.01)

    timing = time_fn(
        lambda: order.append("fn"),
        device="cpu",
        before=before,
        warmup_ms=1.0,
        rep_ms=1.0,
        max_samples=5,
    )
    assert timing.median_ms < 5.0
    assert order[-10:] == ["before", "fn"] * 5


def test_many_are_timed_in_turns_and_compared_within_a_round():
    order = []

    def named(name, seconds):
        def fn():
            order.append(name)
            time.sleep(seconds)

        return fn

    both = time_many(
        {"slow": named("slow", 0.004), "fast": named("fast", 0.001)},
        device="cpu",
        warmup_ms=1.0,
        rep_ms=1.0,
        min_samples=6,
    )
    assert list(both) == ["slow", "fast"] and len(both) == 2
    # every other round backwards, so that neither always runs on the other's leavings
    assert order[-12:] == ["slow", "fast", "fast", "slow"] * 3
    ratio = both.ratios("slow")
    assert ratio["slow"] == 1.0
    assert 2.0 < ratio["fast"] < 5.0
    assert "slow" in str(both)


def test_ratios_cancel_drift():
    drifting = Comparison(
        {
            "a": Timing([2.0, 4.0, 8.0], "by hand", "cpu"),
            "b": Timing([1.0, 2.0, 4.0], "by hand", "cpu"),
        }
    )
    assert drifting.ratios("a") == {"a": 1.0, "b": 2.0}
    with pytest.raises(ArgumentError, match="baseline"):
        drifting.ratios("c")


async def coroutine():
    return 1


def generator():
    yield 1


@pytest.mark.parametrize(
    "deferred",
    [
        coroutine,
        generator,
        lambda: map(abs, [1, 2]),
        lambda: (x for x in [1]),
        concurrent.futures.Future,
        torch.futures.Future,
    ],
    ids=["coroutine", "generator", "map", "generator expression", "future", "torch future"],
)
def test_refuses_work_that_was_only_promised(deferred):
    with pytest.raises(UnsynchronisedError, match="still to be done"):
        time_fn(deferred, device="cpu", **FAST)


def test_consumed_promises_are_timed():
    assert time_fn(lambda: asyncio.run(coroutine()), device="cpu", **FAST).median_ms > 0
    assert time_fn(lambda: list(generator()), device="cpu", **FAST).median_ms > 0


def test_a_tensor_result_is_no_promise():
    x = torch.randn(64)
    assert time_fn(lambda: x + 1, device="cpu", **FAST).n >= 5


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"warmup_ms": 0}, "warmup_ms"),
        ({"rep_ms": -1}, "rep_ms"),
        ({"min_samples": 0}, "min_samples"),
        ({"min_samples": 9, "max_samples": 3}, "max_samples"),
        ({"device": "tpu"}, "device"),
        ({"launch": "maybe"}, "launch"),
    ],
)
def test_bad_arguments_are_named(kwargs, argument):
    with pytest.raises(ArgumentError) as error:
        time_fn(lambda: None, **({"device": "cpu"} | kwargs))
    assert error.value.argument == argument


def test_not_a_function():
    with pytest.raises(ArgumentError, match="not a function"):
        time_fn(3.0)
    with pytest.raises(ArgumentError, match="functions"):
        time_many({})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_says_so():
    with pytest.raises(NoGpuError, match="device='cpu'"):
        time_fn(lambda: None, device="cuda")


@pytest.mark.parametrize(("later_us", "refused"), [(5, False), (60, True)])
def test_stray_work_is_what_delays_every_probe(monkeypatch, later_us, refused):
    """A host that others share delays the first probes; the rule is tried without a GPU."""
    from labkit.timing import _Cuda

    cuda, probes = _Cuda.__new__(_Cuda), []

    def left_over(fn):
        if fn() is None:
            return 2e-6
        probes.append(fn)
        return 1e-6 * (30 if len(probes) <= 7 else later_us)

    monkeypatch.setattr(cuda, "_host_time", lambda fn: 1e-4, raising=False)
    monkeypatch.setattr(cuda, "_cycles", lambda seconds: 1000, raising=False)
    monkeypatch.setattr(cuda, "_added_ms", lambda fn, spin: 0.3 if fn() else 0.0, raising=False)
    monkeypatch.setattr(cuda, "_left_over_s", left_over, raising=False)
    if refused:
        with pytest.raises(UnsynchronisedError, match="another CUDA stream"):
            cuda.refuse_unseen("layer", lambda: 1)
        assert len(probes) == 25, "five times five"
    else:
        cuda.refuse_unseen("layer", lambda: 1)
        assert len(probes) == 10, "no more than it takes"


@pytest.mark.gpu
def test_cuda_times_the_gpu_and_not_the_call():
    x = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    timing = time_fn(lambda: x.fill_(1), **FAST)
    assert timing.device == "cuda" and "L2 overwritten" in timing.method
    # 256 MiB cannot be written in less than 10 µs, nor in more than 10 ms on any GPU
    assert 0.01 < timing.median_ms < 10


@pytest.mark.gpu
def test_cuda_flush_makes_a_cached_read_slower():
    x = torch.ones(2**22, device="cuda")  # 16 MiB: fits in the L2 of a data-centre GPU
    out = torch.empty((), device="cuda")
    read = lambda: torch.sum(x, dim=0, out=out)  # noqa: E731
    cold = time_fn(read, **FAST)
    warm = time_fn(read, flush_l2=False, **FAST)
    assert cold.median_ms > 1.05 * warm.median_ms


@pytest.mark.gpu
def test_cuda_launch_included_is_longer_for_many_small_kernels():
    x = torch.zeros(16, device="cuda")

    def many():
        for _ in range(8):
            x.add_(1)

    hidden = time_fn(many, launch="hidden", **FAST)
    included = time_fn(many, launch="included", **FAST)
    assert included.median_ms > 1.3 * hidden.median_ms


@pytest.mark.gpu
def test_cuda_refuses_another_stream_that_is_not_joined():
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda")
    small = torch.zeros(16, device="cuda")

    def astray():
        small.add_(1)
        with torch.cuda.stream(other):
            return a @ a

    def joined():
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            result = a @ a
        torch.cuda.current_stream().wait_stream(other)
        return result

    with pytest.raises(UnsynchronisedError, match="another CUDA stream"):
        time_fn(astray, **FAST)
    direct = time_fn(lambda: a @ a, **FAST)
    assert time_fn(joined, **FAST).median_ms > 0.8 * direct.median_ms


@pytest.mark.gpu
def test_cuda_refuses_work_that_is_not_on_the_gpu():
    x = torch.randn(256, 256)
    with pytest.raises(UnsynchronisedError, match="no work on the current CUDA stream"):
        time_fn(lambda: x @ x, device="cuda", **FAST)


@pytest.mark.gpu
def test_cuda_takes_an_almost_empty_kernel():
    x = torch.zeros(1, device="cuda")
    assert 0 < time_fn(lambda: x.zero_(), **FAST).median_ms < 0.1


@pytest.mark.gpu
def test_wall_clock_refuses_a_gpu_function_that_does_not_wait():
    a = torch.randn(4096, 4096, device="cuda")
    with pytest.raises(UnsynchronisedError, match="still working"):
        time_fn(lambda: a @ a, device="cpu", **FAST)

    def waits():
        a @ a
        torch.cuda.synchronize()

    assert time_fn(waits, device="cpu", **FAST).median_ms > 0
