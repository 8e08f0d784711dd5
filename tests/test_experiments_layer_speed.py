"""Experiments 1 and 3 of chapter 10: what they run on a CPU, and what they make of times."""

from __future__ import annotations

import os

import pytest
import torch

from labkit import experiments, records
from labkit.errors import ArgumentError
from labkit.experiments import Result, layer_forward, products

SMALL = {"dim": 32, "heads": 2, "layers": 2, "batch": 2}


def test_the_oracle_is_the_model_in_float64():
    model = layer_forward.network(SMALL, layer_forward.CONFIGS["original"], "cpu")
    x = torch.randn(2, 70, 32)
    expected = layer_forward.oracle(model, x, rows=70)
    double = model.double()(x.double())[-1]
    assert expected.dtype == torch.float64
    assert torch.allclose(expected, double, rtol=0, atol=1e-13)
    assert torch.allclose(layer_forward.oracle(model, x, rows=5), expected[-5:], rtol=0, atol=1e-13)


def test_queries_in_pieces_give_the_same(monkeypatch):
    model = layer_forward.network(SMALL, layer_forward.CONFIGS["original"], "cpu")
    x = torch.randn(1, 40, 32)
    whole = layer_forward.oracle(model, x, rows=8)
    split, sizes = torch.Tensor.split, []

    def small(self, at_once, dim=0):
        sizes.append(at_once)
        return split(self, 7, dim)

    monkeypatch.setattr(torch.Tensor, "split", small)
    assert torch.allclose(layer_forward.oracle(model, x, rows=8), whole, rtol=0, atol=1e-14)
    assert min(sizes) >= 40, "2²⁸ scores hold this sequence at once"


def test_both_sizes_are_the_same_problem_for_attention():
    problems = {
        (s["batch"] * s["heads"], s["dim"] // s["heads"]) for s in layer_forward.SIZES.values()
    }
    assert problems == {(16, 64)}


def test_plans_ask_for_what_there_is():
    for quick in (True, False):
        plan = layer_forward._plan(quick, "cuda")
        names = {*plan["configs"], *plan["launch_configs"], *plan.get("long", ())}
        names |= {item[0] for part, item in plan["work"] if part == "compile"}
        assert names <= set(plan["configs"]) <= set(layer_forward.CONFIGS)
        sized = [item for part, item in plan["work"] if part == "forward"]
        assert {size for size, _ in sized} <= set(layer_forward.SIZES)
    lengths = [n for size, n in sized if size == "report"]
    assert set(layer_forward.CLAIMED) < set(lengths) and max(lengths) == 16384
    short = layer_forward._configs(plan, "report", 256)
    assert set(layer_forward._configs(plan, "report", 512)) - set(short) == set(plan["seldom"])
    assert layer_forward._configs(plan, "report", 16384) == list(plan["long"])
    assert {n for pair in products.FLASH.values() for n in pair} <= set(layer_forward.CONFIGS)


def test_labkit_flash_is_not_tuned_meanwhile(monkeypatch):
    for before in (None, "1"):
        monkeypatch.delenv("LABKIT_TUNE", raising=False)
        if before:
            monkeypatch.setenv("LABKIT_TUNE", before)
        with layer_forward._untuned():
            assert os.environ["LABKIT_TUNE"] == "0"
        assert os.environ.get("LABKIT_TUNE") == before


@pytest.fixture(scope="module")
def quick() -> dict[str, Result]:
    if torch.cuda.is_available():
        pytest.skip("these are the figures of a CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(layer_forward.SIZES, "report", SMALL)
        return {
            name: experiments.run(name, quick=True, device="cpu")
            for name in ("layer_forward", "products")
        }


def test_a_cpu_times_original_and_sdpa_and_counts_their_operators(quick):
    result = quick["layer_forward"]
    assert result.notes == []
    for n in (64, 128, 256):
        for name in ("original", "sdpa"):
            # float32 has 24 bits; a few dozen roundings of them
            assert 0 < result.value(f"error.report.{name}.n{n}") < 32 * 2**-24
        speedup = result.value(f"speedup.report.sdpa.n{n}")
        times = [result.value(f"time.report.{name}.n{n}") for name in ("original", "sdpa")]
        assert speedup == pytest.approx(times[0] / times[1])
        # per layer: scores, scale, softmax, product are one operator of SDPA's, and its copies go
        original = result.value(f"kernels.report.original.n{n}")
        assert original >= result.value(f"kernels.report.sdpa.n{n}") + 2 * 3
    assert not any(key.startswith(("gpu.", "ends", "graph")) for key in result.results)


def test_a_record_of_both_is_valid(quick):
    for name, result in quick.items():
        record = records.new_record(name, result.results, result.rows, "test", notes=[], quick=True)
        assert record.experiment == name


def test_a_cpu_has_a_product_and_no_parts(quick):
    result = quick["products"]
    assert result.notes == []
    value = lambda key: result.value(f"{key}.report.sdpa.n128")  # noqa: E731
    assert value("product") == pytest.approx(value("a") * value("b"))
    assert value("a") * value("b_flash") == pytest.approx(value("direct"))
    assert not any("_gpu" in key for key in result.results)


def test_only_the_parts_asked_for_are_run():
    assert products.run(quick=True, device="cpu", parts=["training"]).rows == []
    for module in (layer_forward, products):
        with pytest.raises(ArgumentError, match="part"):
            module.run(quick=True, device="cpu", parts=["speed"])


def test_what_fails_is_noted_and_the_rest_goes_on():
    result, done = Result(), []

    def broken():
        raise RuntimeError("no such kernel\nand more")

    do = {"a": broken, "b": done.append}
    layer_forward.within_budget(result, [("a", ()), ("b", (3,))], do, 60.0, None)
    assert done == [3] and result.notes == ["a (): RuntimeError: no such kernel"]
    assert [row["item"] for row in result.select(part="clock")] == ["a ()", "b (3,)"]
    layer_forward.within_budget(result, [("b", (4,))], do, -1.0, None)
    assert done == [3] and "left out" in result.notes[-1]


def test_what_the_timer_refuses_costs_itself_alone(monkeypatch):
    from labkit import timing

    asked = []

    def time_many(functions, **options):
        asked.append((sorted(functions), options))
        if "b" in functions:
            raise timing.UnsynchronisedError("b leaves work on another CUDA stream")
        return dict.fromkeys(functions, "timed")

    monkeypatch.setattr(timing, "time_many", time_many)
    result = Result()
    fns = {"a": 1, "b": 2, "c": 3}
    found = layer_forward.timed_or_noted(result, fns, launch="hidden")
    assert found == {"a": "timed", "c": "timed"}
    assert [names for names, _ in asked] == [["a", "b", "c"], ["a", "c"]]
    assert asked[1][1] == {"launch": "hidden"}
    (note,) = result.notes
    assert "b leaves work" in note
    assert layer_forward.timed_or_noted(Result(), {"b": 1}) == {}


def test_a_kernel_belongs_to_the_call_in_which_it_starts():
    calls = [
        (0, 100, "labkit call a"),
        (2000, 2100, "labkit call a"),
        (4000, 4200, "labkit call b"),
    ]
    # the second call of a is half as busy; the GPU's clock is 40 µs ahead of the host's
    launched = [(50, 60, "gemm"), (60, 70, "softmax"), (2050, 2060, "gemm")]
    launched += [(2080, 2090, "softmax"), (4240, 4250, "pytorch_flash::flash_fwd_kernel")]
    result = Result()
    found = layer_forward.sorted_out(calls, launched, result)
    assert result.notes == []
    assert found["a"]["kernels"] == 2 and found["a"]["attention"] == "unfused"
    assert found["a"]["busy_share"] == pytest.approx((1 + 0.5) / 2)
    assert found["b"]["timeline"] == [[0.0, 10.0]] and found["b"]["attention"] == "flash"
    missing = [k for k in launched if k[0] != 2080]
    assert set(layer_forward.sorted_out(calls, missing, result)) == {"b"}
    assert "[2, 1]" in result.notes[0]


def test_tf32_is_allowed_inside_and_as_before_outside():
    seen = []
    before = torch.backends.cuda.matmul.allow_tf32
    model = lambda x: seen.append(torch.backends.cuda.matmul.allow_tf32)  # noqa: E731
    x = torch.ones(2)
    layer_forward.call(model, layer_forward.CONFIGS["original_tf32"], x)()
    layer_forward.call(model, layer_forward.CONFIGS["original"], x)()
    assert seen == [True, before] and torch.backends.cuda.matmul.allow_tf32 == before


def test_a_call_casts_its_input_once_and_not_in_the_call():
    seen = []
    x = torch.ones(2)
    fn = layer_forward.call(seen.append, layer_forward.CONFIGS["sdpa_half"], x)
    fn(), fn()
    assert seen[0].dtype == torch.float16 and seen[0] is seen[1]
    seen.clear()

    def product(x):
        return seen.append((x @ x).dtype)

    layer_forward.call(product, layer_forward.CONFIGS["sdpa_autocast"], torch.ones(2, 2))()
    assert seen == [torch.float16]


# -- what is made of times -------------------------------------------------------------------------


def test_gaps_of_kernels_that_overlap_count_once():
    found = layer_forward.gaps([(0, 10, "a"), (5, 12, "b"), (20, 24, "c"), (21, 22, "d")])
    assert found == {"busy_us": 16, "gap_us": 8, "busy": 16 / 24}
    assert layer_forward.gaps([(3, 4)])["busy"] == 1


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["gemm", "void pytorch_flash::flash_fwd_kernel<…>"], "flash"),
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"], "cudnn"),
        (["fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::…)"], "efficient"),
        (["gemm", "void cunn_SoftMaxForward<…>"], "unfused"),
        (["forward_kernel"], "ours"),
        (["gemm"], "none"),
    ],
)
def test_the_kernels_tell_which_attention_ran(names, kind):
    assert layer_forward.attention_kernel(names) == kind


def test_where_a_curve_reaches_a_level():
    cross = layer_forward.crossing
    assert cross([128, 256, 512], [1, 2, 8], 4) == pytest.approx(256 * 2**0.5)
    assert cross([128, 256], [5, 9], 4) == 128
    assert cross([128, 256], [1, 2], 4) is None


def test_paying_means_from_there_on():
    base = {128: 1.0, 256: 1.0, 512: 1.0, 1024: 1.0}
    pays = layer_forward.pays_from
    assert pays({128: 0.5, 256: 1.1, 512: 0.5, 1024: 0.5}, base) == 512
    assert pays({128: 0.5, 256: 0.5, 512: 0.5, 1024: 0.97}, base) is None, "3 % is noise"
    assert pays({1024: 0.5}, base) == 1024


def made() -> Result:
    """Times that a card might have: 300 µs of launching, and a GPU that works N² µs / 10⁴."""
    result = Result()
    size = {**layer_forward.SIZES["report"]}
    for n in (128, 256, 512, 1024, 2048, 4096):
        for name, speed in (("original", 1.0), ("sdpa", 4.0), ("sdpa_half", 16.0)):
            gpu = 1e-4 * n**2 / speed * 1e-3 + 0.01
            floor = 0.3 if name == "original" else 0.2
            shape = {"size": "report", "name": name, "seq_len": n, **size}
            for launch, ms in (("included", max(floor, gpu)), ("hidden", gpu)):
                row = {**shape, "part": "forward", "launch": launch, "error": 1e-7}
                result.rows.append({**row, "median_ms": ms, "samples_ms": [ms]})
            row = {**shape, "part": "launch", "kernels": 40 if name == "original" else 30}
            row |= {"names": ["x"], "attention": "flash" if n < 512 else "efficient"}
            row |= {"busy_share": min(1.0, gpu / floor), "host_ms": [floor], "graph_ms": [gpu]}
            result.rows.append(row)
            if n == 2048:
                row = {**shape, "part": "memory", "bytes": 3 * 2**20, "made_bytes": 2**21}
                result.rows.append(row)
    layer_forward._summarise(result)
    return result


def test_the_launch_bound_region_ends_where_the_gpu_becomes_the_longer():
    result = made()
    # 10 µs + N²/10⁷ ms = 300 µs at N = 1703
    assert result.value("ends.report.original") == pytest.approx(1703, rel=0.02)
    for way in ("flat", "busy", "graph"):
        assert result.value(f"ends_{way}.report.original") == 1024, way
    assert result.value("ends_flat.report.sdpa_half") == 4096
    assert "ends.report.sdpa_half" not in result, "not reached in this sweep"
    assert result.value("per_kernel.report.original") == pytest.approx(7.5e-6)
    assert result.value("graph_gain.report.original.n128") == pytest.approx(0.3 / 0.0116384)
    assert result.value("growth.report.original") == pytest.approx(1.6877 / 0.4294, rel=1e-3)
    assert result.value("switches.report.sdpa") == 2
    assert "efficient, flash" in result.how("switches.report.sdpa")
    assert result.value("memory.report.sdpa.n2048") == 3 * 2**20


def test_speed_ups_are_of_the_original():
    result = made()
    assert result.value("speedup.report.sdpa.n128") == pytest.approx(1.5)
    assert result.value("speedup_gpu.report.sdpa.n4096") == pytest.approx(1.68772 / 0.42943)
    assert result.value("pays.report.sdpa_over_original") == 128
    assert result.value("pays.report.sdpa_half_over_sdpa") == 4096


# -- products --------------------------------------------------------------------------------------


def times(attention, rest, layers):
    whole = {k: layers * attention[k] + rest["h" if "h" in k else "o"] for k in attention}
    return products.decompose(whole, attention, layers)


def test_what_multiplies_within_attention_is_amdahls_alone():
    # flash 5 ×, half 2 ×, both 10 × on attention; half 4 × on the rest
    found = times({"o": 10, "f": 2, "h": 5, "fh": 1}, {"o": 8, "h": 2}, 2)
    assert found["a"] == pytest.approx(28 / 12) and found["b"] == pytest.approx(28 / 12)
    assert found["direct"] == pytest.approx(28 / 4)
    assert found["product_over_direct"] == pytest.approx((28 / 12) ** 2 / 7)
    assert found["inside_attention"] == pytest.approx(1) and found["inside"] == pytest.approx(1)
    assert found["mixing"] == pytest.approx(found["product_over_direct"])
    assert found["predicted_over_direct"] == pytest.approx(1)
    assert found["a_predicted"] == pytest.approx(found["a"])


def test_without_a_rest_only_the_inside_is_left():
    found = times({"o": 12, "f": 6, "h": 6, "fh": 1}, {"o": 0, "h": 0}, 1)
    assert found["product_over_direct"] == pytest.approx(4 / 12)
    assert found["mixing"] == pytest.approx(1) and found["inside"] == pytest.approx(1 / 3)
    assert found["inside_attention"] == pytest.approx(1 / 3)


def test_speed_ups_of_one_part_that_is_everything_do_multiply():
    found = times({"o": 8, "f": 4, "h": 2, "fh": 1}, {"o": 0, "h": 0}, 3)
    assert found["product_over_direct"] == pytest.approx(1) == pytest.approx(found["mixing"])
    assert found["b_flash"] == pytest.approx(4)


def made_products() -> Result:
    result = Result()
    for n in (512, 1024, 4096):
        alone = {"original": 8.0, "original_half": 4.0, "sdpa": 2.0, "sdpa_half": 0.25}
        for name, ms in alone.items():
            ms *= (n / 1024) ** 2
            rest = 1.0 if name.endswith("half") else 3.0
            row = {"size": "report", "name": name, "seq_len": n}
            result.rows.append({**row, "part": "attention", "median_ms": ms})
            for launch, floor in (("included", 10.0), ("hidden", 0.0)):
                whole = max(floor, 2 * ms + rest)
                result.rows.append({**row, "part": "parts", "launch": launch, "median_ms": whole})
        for name, ms in (
            ("original", 40.0), ("original_autocast", 25.0), ("sdpa", 20.0), ("sdpa_autocast", 8.0),
        ):  # fmt: skip
            row = {"part": "training", "name": name, "seq_len": n, "median_ms": ms}
            result.rows.append(row)
    products._summarise(result)
    return result


def test_a_call_and_the_gpu_alone_are_kept_apart():
    result = made_products()
    assert result.value("a.report.sdpa.n512") == 1, "both take what launching takes"
    assert result.value("a_gpu.report.sdpa.n512") == pytest.approx(7 / 4)
    assert result.value("share.report.original.n1024") == pytest.approx(16 / 19)
    for n in (512, 1024, 4096):
        end = f"report.sdpa.n{n}"
        whole = result.value(f"product_over_direct_gpu.{end}")
        parts = result.value(f"mixing_gpu.{end}") * result.value(f"inside_gpu.{end}")
        assert parts == pytest.approx(whole)
        assert result.value(f"predicted_over_direct_gpu.{end}") == pytest.approx(1)


def test_a_forward_speed_up_times_a_training_speed_up():
    result = made_products()
    assert result.value("training.b_flash.n1024") == pytest.approx(2.5)
    assert result.value("training.direct.n1024") == pytest.approx(5)
    expected = result.value("a.report.sdpa.n1024") * 2.5
    assert result.value("training.mixed.n1024") == pytest.approx(expected)
    assert result.value("training.mixed_over_direct.n1024") == pytest.approx(expected / 5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["layer_forward", "products"])
def test_the_short_form_runs_on_a_gpu(name):
    result = experiments.run(name, quick=True, device="cuda")
    assert result.notes == []
    if name == "layer_forward":
        for n in (128, 2048):
            call, gpu = (result.value(f"{k}.report.original.n{n}") for k in ("time", "gpu"))
            assert gpu < 1.1 * call
            assert result.value(f"graph.report.original.n{n}") < 1.2 * call
        assert result.value("switches.report.sdpa_half") >= 1
        assert result.value("error.report.sdpa_half.n2048") < 2**-8
        # S at N = 2048: 16 heads of 16 MiB; naive attention holds two of them at its peak
        held = result.value("memory.report.original.n2048")
        assert 512 * 2**20 < held < 2 * 512 * 2**20
        assert result.value("memory.report.sdpa.n2048") < held / 4
    else:
        assert 0.7 < result.value("predicted_over_direct_gpu.report.sdpa.n2048") < 1.4
