"""What grows: the fit finds the law, the sweeps measure it, and records come out valid."""

from __future__ import annotations

import pytest
import torch

from labkit import experiments, records
from labkit.errors import ArgumentError
from labkit.experiments import scaling


@pytest.fixture(scope="module")
def quick():
    return experiments.run("scaling", quick=True, device="cpu")


# -- fitting ---------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_is_recovered(exponent):
    x = [64, 128, 256, 512, 1024]
    fit = scaling.fit_power(x, [3e-7 * v**exponent for v in x])
    assert fit.exponent == pytest.approx(exponent, abs=1e-12)
    assert fit.coefficient == pytest.approx(3e-7)
    assert fit.low == pytest.approx(exponent) and fit.high == pytest.approx(exponent)
    assert fit.range == (128, 1024) and fit.n == 4
    assert fit(2048) == pytest.approx(3e-7 * 2048**exponent)


def test_the_fit_is_the_least_squares_line():
    np = pytest.importorskip("numpy")
    x, y = [1, 2, 4, 8], [1.0, 2.2, 3.9, 9.0]
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    fit = scaling.fit_power(x, y)
    assert fit.exponent == pytest.approx(slope) and fit.coefficient == pytest.approx(
        np.exp(intercept)
    )
    assert fit.low < slope < fit.high


def test_a_constant_cost_bends_the_small_end_only():
    x = [2**i for i in range(4, 14)]
    y = [1e-5 + 1e-10 * v**2 for v in x]
    local = scaling.doublings(x, y)
    assert local == sorted(local) and local[0] < 0.02 and local[-1] > 1.99
    assert scaling.fit_power(x, y).exponent > 1.9 > scaling.fit_power(x, y, last=8).exponent
    # 1.5 times its least is reached at N = √(5e-6 / 1e-10) = 224
    assert scaling.flat_until(x, y) == 128
    assert scaling.flat_until(x, y, tolerance=2.0) == 256


def test_flat_until_stops_at_the_first_rise():
    assert scaling.flat_until([1, 2, 4, 8], [1.0, 1.1, 5.0, 1.0]) == 2
    assert scaling.flat_until([1, 2, 4], [1.0, 0.9, 1.0]) == 4


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1], [1], "too few"),
        ([1, 2], [1], "too few"),
        ([2, 1], [1, 2], "does not rise"),
        ([1, 1], [1, 2], "does not rise"),
        ([1, 2], [1, 0], "no logarithm"),
        ([0, 2], [1, 1], "no logarithm"),
    ],
)
def test_points_that_have_no_slope_are_refused(x, y, message):
    with pytest.raises(ArgumentError, match=message):
        scaling.fit_power(x, y)


def test_a_line_needs_two_points():
    with pytest.raises(ArgumentError, match="last"):
        scaling.fit_power([1, 2, 4], [1, 2, 4], last=1)


# -- what is measured ----------------------------------------------------------------


def test_the_three_lines_are_attention():
    q, k, v = (torch.randn(2, 3, 17, 8, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(scaling.three_lines(q, k, v), expected)


def test_attention_in_three_lines_is_four_operators_at_any_length():
    for n in (8, 64):
        q, k, v = (torch.randn(1, 1, n, 16) for _ in range(3))
        names = scaling.kernels(lambda: scaling.three_lines(q, k, v), "cpu")  # noqa: B023
        assert names == ["bmm", "mul", "_softmax", "bmm"]


def test_memory_grows_with_the_exponents_of_the_closed_form(quick):
    exact = {"seq_len": 2.0, "batch": 1.0, "heads": 1.0, "head_dim": 0.0}
    for knob, exponent in exact.items():
        assert quick.value(f"memory_exponent.{knob}") == pytest.approx(exponent, abs=0.02)


def test_every_peak_was_predicted(quick):
    rows = [row for row in quick.rows if row["sweep"] in scaling.KNOBS]
    assert len(rows) >= 16
    assert all(row["traced_bytes"] == row["predicted_bytes"] for row in rows)
    # beyond that, a CPU holds the Python number that scales S: torch wraps it in a tensor
    assert {row["measured_bytes"] - row["predicted_bytes"] for row in rows} == {12}


def test_time_grows_more_with_seq_len_than_with_head_dim(quick):
    # Loose: this machine may be busy. The record of a quiet one is tested below.
    assert quick.value("time_exponent.seq_len") > quick.value("time_exponent.head_dim") + 0.4


def test_the_result_is_a_valid_record(quick):
    record = records.new_record("scaling", quick.results, quick.rows, quick=True)
    assert record.value("launch.kernels") == record.value("launch.kernels.most") == 4
    errors = [row["error"]["max_abs"] for row in record.rows if "error" in row]
    assert len(errors) > 10 and max(errors) < 1e-5


def test_series_come_in_order(quick):
    x, y = scaling.series(quick, "one_head", how="eager")
    assert x == sorted(x) and len(x) == len(y) and min(y) > 0
    assert scaling.series(quick, "seq_len", "measured_bytes")[1][-1] > 2**20


def test_threads_are_given_back(quick, monkeypatch):
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), scaling._one_thread("cpu"):
        assert torch.get_num_threads() == 1
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_a_graph_replays_what_was_captured():
    q, k, v = (torch.randn(1, 1, 64, 64, device="cuda") for _ in range(3))
    out = {}

    def fn():
        out["O"] = scaling.three_lines(q, k, v)

    replay = scaling._graph(fn)
    q.copy_(torch.randn_like(q))
    replay()
    torch.testing.assert_close(out["O"], scaling.three_lines(q, k, v))
    assert len(scaling.kernels(fn, "cuda")) >= 4


@pytest.mark.gpu
def test_a_gpu_hides_the_square_at_the_small_end():
    result = experiments.run("scaling", quick=True, device="cuda")
    assert result.value("launch.flat_until") >= 128
    assert result.value("launch.eager_over_graph") > 1.5
    assert 4 <= result.value("launch.kernels") <= 8


# -- the committed record ------------------------------------------------------------


def recorded():
    if "scaling" not in records.available().get(records.DEFAULT_MACHINE, ()):
        pytest.skip("no H200 record of scaling yet")
    return records.load("scaling")


def test_on_the_h200_the_exponents_are_those_of_the_model():
    record = recorded()
    assert record.value("memory_exponent.seq_len") == pytest.approx(2, abs=0.01)
    assert record.value("memory_exponent.head_dim") == pytest.approx(0, abs=0.01)
    assert 1.8 < record.value("time_exponent.seq_len") < 2.2
    for knob in ("batch", "heads"):
        assert 0.8 < record.value(f"time_exponent.{knob}") < 1.1


def test_on_the_h200_one_head_is_launch_bound_and_a_full_device_is_not():
    record = recorded()
    assert record.value("ratio.one_head.2048") < 4 < 40 < record.value("ratio.full.2048")
    assert record.value("launch.eager_over_graph") > 2
