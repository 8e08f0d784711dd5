"""The experiment io_law: what it fits, what it refuses, and what it makes of a profiler's log."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from labkit import experiments, io, plots
from labkit.errors import LabError, RecordError
from labkit.experiments import Result, io_law

GPU = torch.cuda.is_available()
needs_interpreter = pytest.mark.skipif(GPU, reason="counts in the interpreter")


def small(quick):
    """The real plan at lengths that take the interpreter a second."""
    kept = []
    for order in ("naive", "q_outer"):
        for sweep, sizes in (
            ("seq_len", ((64, 32, 2**12), (128, 32, 2**12), (256, 32, 2**12))),
            ("head_dim", ((128, 16, 2**13), (128, 32, 2**13), (128, 64, 2**13))),
            ("fast", ((256, 16, 2**12), (256, 16, 2**13), (256, 16, 2**14))),
        ):
            for n, d, fast in sizes if sweep != "fast" or order == "q_outer" else ():
                block_m, block_n = io_law.blocks(order, fast, d)
                one = {"batch": 1, "heads": 1, "seq_len": n, "head_dim": d, "dtype": "float32"}
                tile = {"fast": fast, "block_m": block_m, "block_n": block_n}
                kept.append({"sweep": sweep, "order": order, **one, **tile})
    return kept


@pytest.fixture(scope="module")
def result():
    if GPU:
        pytest.skip("counts in the interpreter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io_law, "points", small)
        return experiments.run("io_law", quick=True, device="cpu")


def test_the_law_comes_out_of_the_counts(result):
    assert result.value("exponent.rereads.seq_len") == pytest.approx(2)
    assert result.value("exponent.rereads.head_dim") == pytest.approx(2)
    assert result.value("exponent.rereads.fast") == pytest.approx(-1)
    # S and P do not know d
    assert result.value("exponent.naive.head_dim") < 1
    assert 1.5 < result.value("exponent.naive.seq_len") <= 2
    assert any("not measured" in note for note in result.notes)


def test_rows_hold_counts_that_equal_their_forms_and_are_right(result):
    rows = result.select(kind="count")
    assert len(rows) == 15
    for row in rows:
        assert row["bytes"] == row["formula"] == row["loaded"] + row["stored"]
        assert row["outside"] == 0 and row["error"] < 2e-6


@needs_interpreter
def test_a_count_that_differs_from_its_form_is_refused(monkeypatch):
    monkeypatch.setattr(io_law, "points", lambda quick: small(quick)[:1])
    wrong = dict(io.attention_traffic("naive"))
    wrong["O", "store"] = wrong["O", "store"] * 2
    monkeypatch.setattr(io, "attention_traffic", lambda order: wrong)
    with pytest.raises(LabError, match="where its closed form has"):
        io_law.run(quick=True, device="cpu")


@pytest.mark.parametrize("quick", [True, False])
def test_tiles_of_the_plan_fit_and_are_used_whole(quick):
    for point in io_law.points(quick):
        d, fast = point["head_dim"], point["fast"]
        held = (point["block_m"], point["block_n"])
        if point["order"] == "naive":
            b = held[0]
            assert 2 * b * d + b * b <= fast
        else:
            large = max(held) if point["order"] == "kv_outer" else held[0]
            assert io.tile_elements(large, io_law.STREAMED, d) <= fast
        if point["sweep"] != "seq_len":
            # a tile longer than the sequence would be a tile for a larger fast memory
            assert max(held) <= point["seq_len"] or point["order"] == "naive"


def test_the_counting_process_gives_the_same_rows(clean_env):
    plan = io_law.points(True)[:1]
    environment = {**io_law._with_path(clean_env), "TRITON_INTERPRET": "1"}
    import json

    command = [sys.executable, "-m", "labkit.experiments._io_child", "count", json.dumps(plan)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout.splitlines()[-1])
    sizes = io_law._sizes(row)
    assert row["bytes"] == io.total_bytes(io.attention_traffic(row["order"]), **sizes)


# -- counters ------------------------------------------------------------------------------------


def profiled(plan):
    """Groups as ``group_by_marker`` returns them: 100 bytes of HBM for each kernel."""
    one = {"dram_read": 60.0, "dram_write": 40.0, "seconds": 1e-3}
    return [
        (name, [{"kernel": f"k_{name[1]}", "l2": 1000.0 / _tile(name[1]), **one}])
        for name in io_law.labels(plan)
    ]


def _tile(step):
    return int(step.rsplit("_", 1)[1]) if step.startswith("q_outer") else 1


def test_counters_are_added_up_per_method():
    plan = io_law.problems(True, "bfloat16", quick=True)
    result = Result()
    io_law.add_counters(result, plan, profiled(plan))
    assert result.value("hbm.naive.1024") == 300 and result.value("hbm.flash.1024") == 100
    assert result.value("l2.naive.2048") == 3000
    assert result.value("ratio.hbm.2048") == 3 and result.value("seconds.naive.1024") == 3e-3
    assert result.value("l2.tile_exponent") == pytest.approx(-1)
    sizes = {"batch": 1, "heads": 16, "seq_len": 1024, "head_dim": 64, "dtype": "bfloat16"}
    at = io.tiles_of(**sizes, block_m=32, block_n=64)
    assert result.value("model.tile.32") == io.total_bytes(io.attention_traffic("q_outer"), **at)
    at = io.tiles_of(**sizes, block_m=128, block_n=64)
    assert result.value("model.naive.1024") == io.total_bytes(io.attention_traffic("naive"), **at)
    assert "k_scores" in result.how("hbm.naive.1024")
    found = io_law.counters(result)
    assert found["hbm.naive"] == [(1024, 300.0), (2048, 300.0)]
    assert [m for m, _ in found["l2.tile"]] == [16, 32, 64, 128]


def test_without_flash_the_tiled_kernel_stands_in():
    plan = io_law.problems(False, "float16", quick=True)
    result = Result()
    io_law.add_counters(result, plan, profiled(plan))
    assert "hbm.flash.1024" not in result and result.value("ratio.hbm.1024") == 3
    assert "q_outer at" in result.how("ratio.hbm.1024")


def test_a_missing_record_gives_no_points(monkeypatch):
    def nothing(name):
        raise RecordError("none")

    monkeypatch.setattr(io_law.records, "load", nothing)
    assert io_law.counters() == {}


def test_a_refusing_profiler_leaves_a_note(monkeypatch, tmp_path):
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!{sys.executable}\nprint('==ERROR== ERR_NVGPUCTRPERM')\n")
    ncu.chmod(0o755)
    monkeypatch.setattr(io_law, "find_ncu", lambda: str(ncu))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**37, 2**37))
    result = Result()
    io_law._profile(result)
    assert result.results == {} and "ERR_NVGPUCTRPERM" in result.notes[-1]
    monkeypatch.setattr(io_law, "find_ncu", lambda: None)
    io_law._profile(result)
    assert "not installed" in result.notes[-1]


def test_the_profiler_is_told_to_leave_the_clocks_and_empty_the_caches():
    command = io_law.ncu_command("/x/ncu", "/tmp/log", [])
    assert command[:5] == ["/x/ncu", "--clock-control", "none", "--cache-control", "all"]
    assert command[-2:] == ["profile", "[]"] and os.fspath(command[-4]) == "-m"


# -- figures -------------------------------------------------------------------------------------


def drawn(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 40
    fig.draw_without_rendering()
    return fig, alt


def test_loop_orders_show_one_tile_being_made_in_each_fused_order():
    fig, _ = drawn(plots.loop_orders())
    strong = [sum(p.get_alpha() == 0.9 for p in ax.patches) for ax in fig.axes]
    assert strong == [0, 1, 1]


def test_order_bars_are_as_long_as_their_bytes():
    moved = {
        "naive": {("S", "store"): 3 * 2**20, ("Q", "load"): 2**20},
        "q_outer": {("K", "load"): 2**20},
    }
    fig, alt = drawn(plots.order_bars(moved, 2**19))
    ends = sorted(p.get_x() + p.get_width() for p in fig.axes[0].patches)
    assert ends[-1] == 4 * 2**20
    assert "naive 4 MiB" in alt and "Q outside 1 MiB" in alt


def test_law_draws_each_sweep_with_its_exponent(result):
    fig, _ = drawn(plots.traffic_law(result))
    texts = [[t.get_text() for t in ax.texts] for ax in fig.axes]
    assert "its K, V\n2.00" in texts[0] and "its K, V\n2.00" in texts[1]
    assert "its K, V\n−1.00" in texts[2]
    assert not any(t.startswith("naive") for t in texts[2])


def test_traffic_draws_lines_and_points():
    lines = {"naive": [(1024, 1e9), (2048, 4e9)], "once": [(1024, 1e7), (2048, 2e7)]}
    fig, alt = drawn(plots.traffic(lines, {"naive, HBM": [(1024, 9e8)], "none": []}))
    assert len(fig.axes[0].lines) == 3 and "naive, HBM" in alt
    fig, alt = drawn(plots.traffic(lines))
    assert len(fig.axes[0].lines) == 2 and "measured" not in alt
    with pytest.raises(LabError, match="is empty"):
        plots.traffic({}).figure()


def test_tile_traffic_draws_the_model_and_what_was_read():
    model = [(16, 8e9), (32, 4e9), (64, 2e9)]
    fig, alt = drawn(plots.tile_traffic(model, [(16, 8.1e9)], least=1e8))
    assert len(fig.axes[0].lines) == 3 and "factor of 4" in alt
    fig, _ = drawn(plots.tile_traffic(model))
    assert len(fig.axes[0].lines) == 1
