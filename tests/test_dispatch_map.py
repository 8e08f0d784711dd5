"""The map of backends: what the experiment finds on a CPU, what it makes of rows, its figures."""

from __future__ import annotations

import json

import pytest
import torch

from labkit import plots, records
from labkit.errors import ArgumentError
from labkit.experiments import Result, backend_map
from labkit.experiments.backend_map import winners


@pytest.fixture(scope="module")
def quick() -> Result:
    if torch.cuda.is_available():
        pytest.skip("this is about a CPU")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # no limits: nothing is left out, however slow the machine is
        plan = backend_map._plan(True, "cpu")
        plan["policy"]["budget_s"] = 600
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend_map, "_plan", lambda *asked: plan)
            return backend_map.run(quick=True, device="cpu", limit_s=float("inf"))
    finally:
        torch.set_num_threads(threads)


def test_every_part_is_measured_on_a_cpu(quick):
    assert {r["part"] for r in quick.rows} == {
        "switch", "recipe", "layer", "policy", "map", "pick"
    }  # fmt: skip
    assert all("not the faster" in note or "from the shortest" in note for note in quick.notes)
    json.dumps(quick.rows)
    records.new_record("backend_map", quick.results, quick.rows, notes=quick.notes, quick=True)


def test_every_timed_row_has_its_error_against_float64(quick):
    timed = [r for r in quick.rows if "median_ms" in r or "ms" in r]
    assert len(timed) > 20
    for row in timed:
        half = row.get("dtype") == "bfloat16" or row.get("precision") == "autocast_bf16"
        assert 0 < row["error"] < (2e-2 if half else 1e-5)


def test_a_cpu_does_not_switch_and_explain_was_right(quick):
    for dtype in ("float32", "bfloat16"):
        assert quick.value(f"switch_backends_{dtype}") == 1
        assert quick.value(f"recipe_runs_flash_{dtype}") == 1
    assert quick.value("explain_right") == 1.0 and quick.value("explain_watched") == 4
    assert {r["ran"] for r in quick.select(part="switch", backend="math")} == {"math"}


def test_only_the_parts_asked_for_are_run_and_time_is_kept():
    result = backend_map.run(quick=True, device="cpu", parts=["switch"])
    assert {r["part"] for r in result.rows} == {"switch", "recipe"}
    result = backend_map.run(quick=True, device="cpu", parts=["map"], limit_s=1e-9)
    assert result.rows == [] and "Left out when time was up: dense float32" in result.notes[0]
    with pytest.raises(ArgumentError, match="part"):
        backend_map.run(quick=True, device="cpu", parts=["speed"])


def test_a_part_that_fails_leaves_a_note_and_the_others(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(backend_map, "_policy", broken)
    monkeypatch.delenv("LABKIT_TUNE", raising=False)
    result = backend_map.run(quick=True, device="cpu", parts=["policy", "map"])
    assert {r["part"] for r in result.rows} == {"map", "pick"}
    assert "policy: RuntimeError: no such kernel" in result.notes
    assert "LABKIT_TUNE" not in __import__("os").environ, "tuning is as it was"


# -- a GPU's rows, made up -------------------------------------------------------------------------


def cell(ms: dict[str, float], picked="cudnn", **changes) -> list[dict]:
    shape = {
        "kind": "dense", "seq_len": 1024, "batch": 8, "heads": 16, "kv_heads": 16, "head_dim": 64,
        "causal": False, "training": False, "dtype": "bfloat16",
    } | changes  # fmt: skip
    rows = [{"part": "map", **shape, "backend": b, "median_ms": t} for b, t in ms.items()]
    sdpa = {b: t for b, t in ms.items() if b in backend_map._TORCH}
    best = min(sdpa, key=sdpa.__getitem__)
    pick = {"part": "pick", **shape, "picked": picked, "fastest": best, "refused": {}}
    return [*rows, pick | {"pick_over_fastest": sdpa[picked] / sdpa[best]}]


@pytest.fixture
def gpu() -> Result:
    result = Result()
    result.rows += cell({"flash": 2.0, "cudnn": 1.0, "ours": 0.5, "naive": 9.0})
    result.rows += cell({"flash": 1.0, "cudnn": 1.02, "ours": 3.0}, seq_len=128)
    result.rows += cell({"flash": 1.0, "cudnn": 1.5}, seq_len=4096, training=True, causal=True)
    result.rows += cell({"efficient": 1.0, "math": 4.0}, "efficient", dtype="float32")
    result.rows += cell({"efficient": 1.0, "cudnn": 2.0}, kind="mask")
    for model, dim, ratio in (("report", 256, 1.0), ("realistic", 1024, 2.0)):
        for n in (128, 512, 2048):
            row = {"part": "layer", "model": model, "dim": dim, "seq_len": n}
            result.rows.append(row | {"precision": "fp32", "median_ms": ratio * n / 512})
            result.rows.append(row | {"precision": "autocast_fp16", "median_ms": 1.0})
    for n, half in ((128, 2.0), (512, 0.5)):
        for training in (False, True):
            row = {"part": "policy", "seq_len": n, "training": training, "backend": "flash"}
            result.rows.append(row | {"dtype": "float32", "ms": 1.0})
            result.rows.append(row | {"dtype": "float16", "ms": half})
    for dtype, seen in (("float16", "ABBB"), ("float32", "CCCC")):
        for n, kernel in zip((128, 1023, 1024, 2048), seen, strict=True):
            row = {"part": "switch", "dtype": dtype, "seq_len": n}
            result.rows.append(row | {"training": False, "picked": "cudnn"})
            watched = {"backend": "sdpa", "ran": "cudnn", "picked": "cudnn", "kernels": [kernel]}
            result.rows.append(row | watched)
    result.rows.append({"part": "recipe", "dtype": "float16", "ran": "cudnn", "error": None})
    backend_map._summarise(result)
    return result


def test_the_winner_of_a_shape_is_the_fastest(gpu):
    found = winners(gpu, dtype="bfloat16", training=False)
    assert found == {(64, False, 128): ("flash", 1.02), (64, False, 1024): ("ours", 2.0)}
    fused = winners(gpu, dtype="bfloat16", training=False, among=("flash", "cudnn"))
    assert fused[64, False, 1024] == ("cudnn", 2.0)
    assert winners(gpu, dtype="bfloat16", training=False, kind="mask", among=("cudnn",)) == {
        (64, False, 1024): ("cudnn", 1.0)
    }
    with pytest.raises(ArgumentError, match="was not measured"):
        winners(gpu, dtype="float16", training=False)


def test_wins_and_picks_are_counted(gpu):
    assert gpu.value("wins_ours_bfloat16_forward") == gpu.value("wins_flash_bfloat16_forward") == 1
    assert gpu.value("wins_flash_bfloat16_training") == 1
    assert "wins_cudnn_bfloat16_forward" not in gpu.results
    # 1.02 is within the noise; 1.5 with the backward pass and 2.0 with a mask are not
    assert (gpu.value("pick_was_fastest"), gpu.value("pick_shapes")) == (3, 5)
    assert gpu.value("pick_share_bfloat16_forward") == pytest.approx(2 / 3)
    assert gpu.value("pick_worst") == 2.0 and "mask" in gpu.results["pick_worst"]["how"]
    assert gpu.value("pick_worst_float32_forward") == 1.0
    assert gpu.value("time_ours_bfloat16_d64_n1024") == 0.5e-3
    assert gpu.value("time_cudnn_bfloat16_d64_n1024_mask") == 2e-3
    assert gpu.value("time_flash_bfloat16_d64_n4096_causal_training") == 1e-3


def test_a_switch_of_kernels_is_named_by_its_length(gpu):
    assert gpu.value("switch_backends_float16") == 1 and gpu.value("switch_lengths_float16") == 4
    assert gpu.value("switch_kernels_sdpa_float16") == 2
    assert gpu.value("switch_change1_sdpa_float16") == 1023
    assert gpu.value("switch_kernels_sdpa_float32") == 1
    assert "switch_change1_sdpa_float32" not in gpu.results
    assert gpu.value("recipe_runs_flash_float16") == 0


def test_crossings_of_layers_lie_where_the_times_are_equal(gpu):
    assert gpu.value("crossing_layer_report_autocast_fp16") == 512
    assert gpu.value("crossing_layer_realistic_autocast_fp16") == 256
    assert gpu.value("layer_gain_realistic_autocast_fp16_n2048") == 8.0


def test_the_shapes_to_compile_are_shared_out_by_kernel():
    shape = backend_map._shape
    group = backend_map._group
    plan = {"map": [
        group("dense", shape(128, 64, causal=True, training=t), ("ours", "flash"), ("float32",))
        for t in (False, True)
    ] + [
        group("dense", shape(n, 128, training=True), ("ours",), ("float32", "tf32"))
        for n in (128, 256)
    ] + [group("mask", shape(128, 64, training=True), ("math",), ("float32",))],
        "policy": {"seq_lens": (64,)},
    }  # fmt: skip
    shares = backend_map._shares(plan, ["map"])
    keys = [{(s["dtype"], s["head_dim"], s["causal"]) for s in share} for share in shares]
    assert keys == [{("float32", 128, False)}, {("tf32", 128, False)}, {("float32", 64, True)}]
    assert [s["seq_len"] for s in shares[0]] == [128, 256]
    assert all(s["training"] for share in shares for s in share)
    assert len(backend_map._shares(plan, ["policy"])) == 4, "one for each dtype"


def test_every_shape_is_compiled_once_and_waited_for(monkeypatch):
    import io
    import subprocess

    class Child:
        def __init__(self, command, **options):
            assert command[-1] == "labkit.experiments._map_child"
            self.stdin, self.waits = io.StringIO(), 0
            self.stdin.close = lambda: None
            children.append(self)

        def wait(self, timeout=None):
            self.waits += 1
            if slow and timeout is not None:
                raise subprocess.TimeoutExpired("child", timeout)

        def kill(self):
            self.killed = True

    monkeypatch.setattr(backend_map.subprocess, "Popen", Child)
    monkeypatch.setattr(backend_map.os, "cpu_count", lambda: 4)
    shape, group = backend_map._shape, backend_map._group
    plan = {"map": [
        group("dense", shape(n, d, training=True), ("ours",), ("float32", "float16"))
        for n in (128, 4096) for d in (64, 128)
    ]}  # fmt: skip
    for slow in (False, True):
        children, result = [], Result()
        with backend_map._compiling(plan, ["map"], "cuda", result) as wait:
            wait()
            assert [c.waits for c in children] == [1, 1]
        sent = [s for c in children for s in json.loads(c.stdin.getvalue())]
        asked = [(s["seq_len"], s["head_dim"], s["dtype"]) for s in sent]
        assert len(asked) == 8 == len(set(asked)) and all(c.killed for c in children)
        assert bool(result.notes) is slow
    with backend_map._compiling(plan, ["map"], "cpu", Result()) as wait:
        wait()
    assert len(children) == 2, "a CPU compiles nothing"


# -- figures ---------------------------------------------------------------------------------------


def axes_of(drawing):
    fig, alt = drawing.figure("dark")
    assert alt is not None and len(alt) > 60
    fig.draw_without_rendering()
    return fig.axes


def test_a_cell_names_the_winner_and_its_lead(gpu):
    forward, training = axes_of(plots.backend_map(gpu))
    assert [text.get_text() for text in forward.texts] == ["flash\n1.02×", "labkit\n2.00×"]
    assert [text.get_text() for text in training.texts] == ["flash\n1.50×"]
    assert [t.get_text() for t in forward.get_xticklabels()] == ["128", "1,024", "4,096"]
    assert [t.get_text() for t in forward.get_yticklabels()] == ["d = 64", "d = 64, causal"]
    assert forward.patches[0].get_alpha() < forward.patches[1].get_alpha()


def test_a_pick_is_shown_with_what_it_costs(gpu):
    forward, training = axes_of(plots.sdpa_picks(gpu))
    assert [text.get_text() for text in forward.texts] == ["cuDNN\nbest", "cuDNN\n1.02×"]
    assert [text.get_text() for text in training.texts] == ["cuDNN\n1.50×"]
    with pytest.raises(ArgumentError, match="no picks"):
        plots.sdpa_picks(Result()).figure()


def test_the_gain_of_half_precision_is_drawn_by_length(gpu):
    (ax,) = axes_of(plots.half_gain(gpu))
    lines = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in ax.lines[:4]}
    assert lines[128, 512, 2048] in {(0.25, 1.0, 4.0), (0.5, 2.0, 8.0)}
    assert lines[128, 512] == (0.5, 2.0)
    names = {text.get_text() for text in ax.texts}
    assert {"step, dim 256", "step, dim 1024", "attention, forward"} <= names
    with pytest.raises(ArgumentError, match="neither for layers"):
        plots.half_gain(Result()).figure()
