"""The hierarchy experiment: what it reports on a CPU, and what it refuses to record."""

from __future__ import annotations

import pytest
import torch

from labkit import kernels, records
from labkit.errors import LabError
from labkit.experiments import hierarchy, run


@pytest.fixture(scope="module")
def quick():
    return run("hierarchy", quick=True, device="cpu")


def test_quick_run_makes_a_valid_record(quick):
    record = records.new_record("hierarchy", quick.results, quick.rows, "test", quick=True)
    assert record.value("copy_peak") == quick.value("copy_peak")


def test_copy_rows_cover_the_caches_and_the_memory(quick):
    rows = [r for r in quick.rows if r["kind"] == "copy"]
    sizes = [r["bytes"] for r in rows]
    assert min(sizes) <= 32 * 2**10 and max(sizes) >= 128 * 2**20
    for row in rows:
        assert row["bandwidth"] == pytest.approx(row["bytes"] / (row["median_ms"] / 1e3), rel=1e-3)
    assert quick.value("copy_cache_peak") == max(r["bandwidth"] for r in rows)
    assert quick.value("copy_peak") == rows[-1]["bandwidth"]


def test_the_cache_is_faster_than_memory(quick):
    assert quick.value("copy_cache_peak") > quick.value("copy_peak")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
def test_every_kernel_is_checked_in_the_interpreter(quick):
    errors = {r["kernel"]: r["error"] for r in quick.rows if r["kind"] == "interpreted"}
    assert set(errors) == {"copy", "read_sum", "pointer_chase", "shared_gather", "matmul"}
    assert errors.pop("matmul") < 1e-6
    assert set(errors.values()) == {0.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
def test_a_wrong_kernel_is_not_recorded(monkeypatch):
    monkeypatch.setattr(kernels, "copy", lambda x: x + 1, raising=False)
    with pytest.raises(LabError, match="copy differs from its oracle"):
        hierarchy._interpreted(hierarchy.Result())


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with hierarchy._OneThread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_quick_run_on_the_gpu_orders_the_levels():
    result = run("hierarchy", quick=True, device="cuda")
    value = result.value
    assert value("shared_peak") > value("l2_read_peak") > value("read_peak")
    assert value("latency_l1") < value("latency_l2") < value("latency_memory")
    assert value("bank_conflict_32") > 4
    records.new_record("hierarchy", result.results, result.rows, "test", quick=True)
