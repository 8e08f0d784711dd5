"""The roofline and DRAM experiments: counts, labels and the profiler's log, without a GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from labkit.errors import LabError
from labkit.experiments import Result, dram, run
from labkit.experiments import roofline as points
from labkit.experiments._dram_child import labels
from labkit.roofline import Roofline, steps

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def log_of(kernels: list[tuple[str, dict[str, tuple[str, str]]]]) -> str:
    """A log as ``ncu --csv --log-file`` writes it."""
    lines = ["==PROF== Connected to process 77 (/usr/bin/python3.12)"]
    for i, (name, _) in enumerate(kernels):
        lines.append(f'==PROF== Profiling "{name[:20]}" - {i}: 0%....50%....100% - 1 pass')
    lines += ["==PROF== Disconnected from process 77", HEADER]
    for i, (name, metrics) in enumerate(kernels):
        for metric, (unit, value) in metrics.items():
            lines.append(
                f'"{i}","77","python3.12","127.0.0.1","{name}","1","7","(128, 1, 1)","(8, 1, 1)",'
                f'"0","9.0","Command line profiler metrics","{metric}","{unit}","{value}"'
            )
    return "\n".join(lines) + "\n"


# a line as Nsight Compute 2025.3 wrote it on an H200
REAL = (
    '"9","615","python3.12","127.0.0.1","void <unnamed>::softmax_warp_forward<c10::BFloat16, '
    'c10::BFloat16, float, 10, 0, 0>(T2 *, const T1 *, int, int, int, const bool *, int, bool)",'
    '"1","7","(32, 4, 1)","(2048, 1, 1)","0","9.0","Command line profiler metrics",'
)


def test_a_log_from_an_h200_is_read():
    lines = ["==WARNING== Note: Running with uncontrolled GPU caches.", HEADER]
    for metric, unit, value in (
        ("dram__bytes_read.sum", "byte", "27,648"),
        ("dram__bytes_write.sum", "byte", "10,882,816"),
        ("gpu__time_duration.sum", "ns", "16,096"),
        ("lts__t_bytes.sum", "byte", "48,496,352"),
    ):
        lines.append(f'{REAL}"{metric}","{unit}","{value}"')
    (kernel,) = dram.parse_ncu("\n".join(lines))
    assert kernel["dram_write"] == 10882816 and kernel["seconds"] == pytest.approx(16.096e-6)
    assert dram.short_name(kernel["kernel"]) == "softmax_warp_forward"
    assert dram.short_name("nvjet_sm90_tst_64x64_64x13_1x2_h_bz_NNT") == (
        "nvjet_sm90_tst_64x64_64x13_1x2_h_bz_NNT"
    )
    assert dram.short_name("cuda::<unnamed>::spin_kernel(long)") == "spin_kernel"


def counts(read="1,024", write="2048", l2="4,096", time="1,500") -> dict[str, tuple[str, str]]:
    values = (read, write, l2, time)
    units = ("byte", "byte", "byte", "ns")
    return dict(zip(dram.METRICS, zip(units, values, strict=True), strict=True))


SPIN = ("at::cuda::<unnamed>::spin_kernel(long)", counts("0", "0", "32", "1,000"))


def test_the_profilers_log_is_read_kernel_by_kernel():
    kernels = dram.parse_ncu(log_of([SPIN, ("softmax<float, 4>(int, T2)", counts())]))
    assert [k["kernel"] for k in kernels] == [SPIN[0], "softmax<float, 4>(int, T2)"]
    assert kernels[1]["dram_read"] == 1024 and kernels[1]["dram_write"] == 2048
    assert kernels[1]["l2"] == 4096 and kernels[1]["seconds"] == pytest.approx(1.5e-6)


def test_scaled_units_are_converted():
    scaled = counts() | {"dram__bytes_read.sum": ("Mbyte", "2,147.48")}
    assert dram.parse_ncu(log_of([("k", scaled)]))[0]["dram_read"] == pytest.approx(2147.48e6)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", "no table"),
        (log_of([("k", {"dram__bytes_read.sum": ("byte", "1")})]), "lacks dram_write"),
        (log_of([("k", counts() | {"lts__t_bytes.sum": ("furlong", "1")})]), "unit 'furlong'"),
        (log_of([("k", counts(read="n/a"))]), "is 'n/a'"),
    ],
)
def test_a_log_without_counts_is_refused(text, why):
    with pytest.raises(LabError, match=why):
        dram.parse_ncu(text)


def test_kernels_go_to_the_step_whose_marker_precedes_them():
    names = labels([{"fused": ["flash"]}, {"fused": []}])
    assert [n for n in names if n[0] == 0][-1] == (0, "fused_flash") and len(names) == 9
    kernels = [{"kernel": k} for k in ("spin_kernel", "gemm", "reduce", "spin_kernel", "mul")]
    (first, two), (second, one) = dram.group_by_marker(kernels, names[:2])
    assert (first, second) == ((0, "scores"), (0, "scale"))
    assert [k["kernel"] for k in two] == ["gemm", "reduce"] and len(one) == 1


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["gemm", "spin_kernel"], "before the first marker"),
        (["spin_kernel", "gemm"], "1 markers for 2 steps"),
        (["spin_kernel", "spin_kernel", "mul"], "'scores' launched no kernel"),
    ],
)
def test_a_log_out_of_step_is_refused(names, why):
    with pytest.raises(LabError, match=why):
        dram.group_by_marker([{"kernel": n} for n in names], [(0, "scores"), (0, "scale")])


PROBLEM = {"name": "small", "batch": 1, "heads": 2, "seq_len": 64, "head_dim": 16}
PROBLEM |= {"dtype": "float16", "fused": ["flash"]}


def fake_ncu(folder, script: str) -> str:
    path = folder / "ncu"
    path.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_profile_fills_the_ledger_from_what_ncu_writes(tmp_path, monkeypatch):
    kernels = []
    for i, name in enumerate(["gemm", "mul", "softmax", "gemm", "flash_fwd"]):
        kernels += [SPIN, (name, counts(read=str(100 * (i + 1)), write="7", l2="9"))]
    log = tmp_path / "log"
    log.write_text(log_of(kernels))
    # writes the log where --log-file says, as ncu does
    script = (
        f"text = open({str(log)!r}).read()\n"
        "open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write(text)"
    )
    monkeypatch.setattr(dram, "find_ncu", lambda: fake_ncu(tmp_path, script))
    result = Result()
    dram._profile(result, [PROBLEM], "warm")
    assert result.notes == []
    assert result.value("small_softmax_warm_read") == 300
    assert result.value("small_naive_warm_read") == 100 + 200 + 300 + 400
    assert result.value("small_fused_flash_warm_write") == 7
    assert "softmax" in result.how("small_softmax_warm_read")
    assert len(result.select(kind="kernel", caches="warm")) == 5


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("print('==ERROR== ERR_NVGPUCTRPERM'); sys.exit(1)", "ERR_NVGPUCTRPERM"),
        ("import time; time.sleep(30)", "did not finish"),
    ],
)
def test_a_refusing_or_hanging_profiler_leaves_a_note_and_the_rest(
    script, why, tmp_path, monkeypatch
):
    monkeypatch.setattr(dram, "find_ncu", lambda: fake_ncu(tmp_path, script))
    monkeypatch.setattr(dram, "_TIMEOUT_S", 1)
    result = Result()
    dram._profile(result, [PROBLEM], "cold")
    assert result.results == {} and len(result.notes) == 1 and why in result.notes[0]


def test_missing_profiler_is_said_once(monkeypatch):
    monkeypatch.setattr(dram, "find_ncu", lambda: None)
    result = Result()
    for caches in ("cold", "warm"):
        dram._profile(result, [PROBLEM], caches)
    assert result.notes == ["DRAM bytes not measured: Nsight Compute (ncu) is not installed."]


def test_busy_shares_are_read_and_added(tmp_path, monkeypatch):
    shares = {metric: ("%", str(10 * (i + 1))) for i, metric in enumerate(dram.BUSY)}
    kernels = []
    for name in ["gemm", "mul", "softmax", "gemm"]:
        kernels += [(SPIN[0], shares), (name, shares)]
    # two kernels in one step: their shares have no sum
    kernels += [(SPIN[0], shares), ("split", shares), ("combine", shares)]
    log = tmp_path / "log"
    log.write_text(log_of(kernels))
    script = (
        f"text = open({str(log)!r}).read()\n"
        "open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write(text)"
    )
    monkeypatch.setattr(dram, "find_ncu", lambda: fake_ncu(tmp_path, script))
    result = Result()
    dram._profile(result, [PROBLEM], "busy")
    assert result.notes == []
    assert result.value("small_softmax_busy_dram") == pytest.approx(0.1)
    assert result.value("small_softmax_busy_warps") == pytest.approx(0.4)
    assert "small_fused_flash_busy_dram" not in result
    assert len(result.select(kind="busy")) == 6 and "small_naive_busy_read" not in result


def test_command_leaves_the_clocks_alone_and_passes_the_problems():
    command = dram.ncu_command("/x/ncu", "warm", "/tmp/log", [PROBLEM])
    assert command[:3] == ["/x/ncu", "--clock-control", "none"]
    assert command[command.index("--cache-control") + 1] == "none"
    assert json.loads(command[-1]) == [PROBLEM]
    cold = dram.ncu_command("/x/ncu", "cold", "/tmp/log", [PROBLEM])
    assert cold[cold.index("--cache-control") + 1] == "all"
    busy = dram.ncu_command("/x/ncu", "busy", "/tmp/log", [PROBLEM])
    assert busy[busy.index("--metrics") + 1] == ",".join(dram.BUSY)


def test_child_needs_a_gpu_and_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "labkit.experiments._dram_child", json.dumps([PROBLEM])],
        capture_output=True,
        text=True,
        check=False,
    )
    import torch

    assert (done.returncode == 0) == torch.cuda.is_available(), done.stderr


def test_traced_traffic_equals_the_compulsory_bytes_of_the_forms():
    result = Result()
    dram._moved(result, PROBLEM)
    rows = result.select(kind="moved")
    assert [r["step"] for r in rows] == ["scores", "scale", "softmax", "output", "naive", "fused"]
    for row in rows:
        assert row["traced"] == row["formula"], row["step"]


def test_traced_traffic_sees_a_copy_that_the_model_leaves_out():
    import torch

    q = torch.empty(1, 2, 32, 8, device="meta")
    plain = dram.traced_traffic(lambda x: x.mT @ x, q)
    copied = dram.traced_traffic(lambda x: x.mT.contiguous() @ x, q)
    extra = sum(e["read"] + e["written"] for e in copied) - sum(
        e["read"] + e["written"] for e in plain
    )
    assert extra == 2 * q.numel() * 4
    assert dram.traced_traffic(lambda x: x.view(2, 32, 8)[0].mT, q) == []


def test_quick_ledger_holds_without_a_gpu():
    result = run("dram", quick=True, device="cpu")
    held = {row["method"]: row for row in result.select(kind="held")}
    n2 = result.rows[0]["batch"] * result.rows[0]["heads"] * result.rows[0]["seq_len"] ** 2 * 4
    assert held["naive"]["formula"] == held["naive"]["traced"] >= 2 * n2
    assert held["naive"]["measured"] == pytest.approx(held["naive"]["traced"], rel=0.05)
    assert held["fused"]["traced"] < n2 / 4
    assert any("DRAM bytes not measured" in note for note in result.notes)


def test_points_of_a_tiny_plan_are_complete_and_right(monkeypatch):
    plan = {
        "dtypes": ["float32"],
        "head_dims": [16],
        "lengths": [64, 512],
        "pairs": 2**18,
        "copy_bytes": 2**20,
        "matmul_sizes": [128],
        "rep_ms": 2,
        "min_samples": 2,
        "causal": [64],
        "fused": ["flash"],
    }
    monkeypatch.setattr(points, "_plan", lambda quick, device: plan)
    result = run("roofline", quick=True, device="cpu")
    roof = Roofline.from_record(result, "float32")
    assert roof.ridge == pytest.approx(result.value("ridge_float32"))
    rows = [r for r in result.rows if "seq_len" in r]
    names = ["scores", "scale", "softmax", "output", "naive", "fused"]
    assert [r["step"] for r in rows if r["seq_len"] == 512] == names
    assert [r["step"] for r in rows if r["causal"]] == ["naive", "fused"]
    for row in rows:
        # the same number of pairs at every length, whatever the heads
        assert row["batch"] * row["heads"] * row["seq_len"] ** 2 == plan["pairs"]
        assert row["error"]["relative"] < 1e-5, row
        assert row["residual"] == pytest.approx(row["median_ms"] / row["lower_ms"])
        assert row["rate"] == pytest.approx(row["flops"] / row["median_ms"] * 1e3)
        assert row["samples_ms"] and math.isfinite(row["bandwidth"])
    naive = result.select(step="naive", seq_len=512)[0]
    sizes = {k: naive[k] for k in ("batch", "heads", "seq_len", "head_dim", "dtype")}
    assert naive["lower_ms"] / 1e3 == pytest.approx(roof.time_of(steps(), **sizes).lower)
    assert naive["flops"] == 4 * plan["pairs"] * 16
    parts = [r["median_ms"] for r in rows if r["seq_len"] == 512 and r["step"] in names[:4]]
    assert naive["sum_of_steps_ms"] == pytest.approx(sum(parts))
    assert result.value("speedup_float32_d16_n512") > 0


def test_a_wrong_kernel_shows_in_the_error_column():
    import torch

    q, k, v = torch.randn(3, 1, 1, 32, 8).double().unbind(0)
    oracle = points._oracle(q, k, v, 8**-0.5)
    right = torch.softmax(q @ k.mT * 8**-0.5, -1) @ v
    assert points._error(right, oracle["output"])["relative"] < 1e-12
    unscaled = torch.softmax(q @ k.mT, -1) @ v
    assert points._error(unscaled, oracle["output"])["relative"] > 1e-2
    causal = points._oracle(q, k, v, 8**-0.5, causal=True)["output"]
    assert torch.allclose(causal[0], v[0, 0, 0]) and not torch.allclose(causal, oracle["output"])
