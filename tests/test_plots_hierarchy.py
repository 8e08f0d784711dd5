"""Figures of chapter 03: what they draw of the rows that they are given."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.errors import ArgumentError
from labkit.experiments import Result

MIB = 2**20


@pytest.fixture
def gpu() -> Result:
    """A result with the shape of a GPU's; the figures in it are made up."""
    result = Result()
    add = result.rows.append
    for size in (1, 16, 64, 1024):
        add({"kind": "copy", "by": "torch", "bytes": 2 * size * MIB, "bandwidth": 1e12 + size})
        add({"kind": "read", "bytes": size * MIB, "bandwidth": 5e12 - size})
        add({"kind": "latency", "level": "l2", "bytes": size * MIB, "cycles": 200 + size / 4})
    for size in (4, 8):
        add({"kind": "read_l1", "bytes": size * MIB, "bandwidth": 25e12})
        add({"kind": "latency", "level": "l1", "bytes": size * 1024, "cycles": 40})
    add({"kind": "shared", "ways": 1, "bytes": MIB, "bandwidth": 30e12})
    add({"kind": "shared", "ways": 32, "bytes": MIB, "bandwidth": 1e12})
    for programs in (1, 2, 4, 8, 16):
        row = {"kind": "parallelism", "programs": programs, "bytes_per_program": 8192}
        add(row | {"bytes": MIB, "bandwidth": programs * 1e10})
    result.add("reuse_ratio", 2.0, "1", "made up")
    for passes in (1, 2, 4):
        add({"kind": "reuse", "how": "blocks", "passes": passes, "bytes": MIB, "error": 0.0})
        add({"kind": "reuse_kernels", "how": "blocks", "passes": passes, "bytes": MIB})
        result.add(f"reuse_{passes}", 0.9 + passes / 10, "1", "made up")
        result.add(f"reuse_kernels_{passes}", 0.8, "1", "made up")
    return result


@pytest.fixture
def cpu() -> Result:
    result = Result()
    for size in (1, 16, 64):
        row = {"kind": "copy", "by": "torch", "bytes": size * MIB, "bandwidth": 1e10}
        result.rows.append(row)
        for order in ("in order", "at random"):
            row = {"kind": "order", "order": order, "bytes": size * MIB, "seconds": 1e-9 * size}
            result.rows.append(row)
    return result


def axes_of(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 40
    fig.draw_without_rendering()
    return fig.axes[0]


def test_bandwidth_draws_each_place_and_the_size_of_l2(gpu):
    ax = axes_of(plots.hierarchy_bandwidth(gpu, l2_bytes=60 * MIB))
    drawn = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in ax.lines}
    assert drawn[(2 * MIB, 32 * MIB, 128 * MIB, 2048 * MIB)][0] == 1e12 + 1
    assert drawn[(4 * MIB, 8 * MIB)] == (25e12, 25e12)
    assert drawn[(MIB,)] == (30e12,)  # conflict-free, not the 32-way row
    assert any(set(line.get_xdata()) == {60 * MIB} for line in ax.lines)
    texts = {text.get_text() for text in ax.texts}
    assert {"L2", "shared memory", "read through L1"} <= texts


def test_bandwidth_of_a_cpu_has_its_own_words(cpu, gpu):
    (_, for_cpu), (_, for_gpu) = (plots.hierarchy_bandwidth(s).figure() for s in (cpu, gpu))
    assert "Copy bandwidth" in for_cpu and "shared memory" in for_gpu


def test_latency_needs_a_pointer_chase(gpu, cpu):
    ax = axes_of(plots.hierarchy_latency(gpu))
    assert ax.get_ylabel() == "cycles per load"
    assert max(ax.lines[0].get_ydata()) == 456
    with pytest.raises(ArgumentError, match="pointer chase"):
        plots.hierarchy_latency(cpu).figure()


def test_access_order_draws_both_orders(cpu):
    ax = axes_of(plots.access_order(cpu))
    assert {"in order", "at random"} <= {text.get_text() for text in ax.texts}


def test_littles_line_bends_where_it_meets_the_ceiling(gpu):
    latency, peak = 4e-7, 1e11
    ax = axes_of(plots.bytes_in_flight(gpu, latency=latency, peak=peak))
    points, rising, level = ax.lines
    assert list(points.get_xdata()) == [8192 * p for p in (1, 2, 4, 8, 16)]
    assert rising.get_ydata()[0] == pytest.approx(8192 / latency)
    assert rising.get_xdata()[-1] == pytest.approx(peak * latency)
    assert rising.get_ydata()[-1] == pytest.approx(peak) == level.get_ydata()[-1]


def test_reuse_draws_the_formula_and_both_measurements(gpu):
    ax = axes_of(plots.reuse(gpu))
    curve, limit, one, many = ax.lines
    assert curve.get_ydata()[0] == 1 and curve.get_ydata()[-1] == pytest.approx(4 / (1 + 3 / 2))
    assert set(limit.get_ydata()) == {2.0}
    assert list(one.get_ydata()) == [1.0, 1.1, 1.3] and list(many.get_ydata()) == [0.8] * 3
