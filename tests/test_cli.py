"""``python -m labkit``: what each command prints, its exit status, and what it must not load."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from labkit import doctor, experiments, hardware, records
from labkit.__main__ import main
from labkit.errors import LabError
from labkit.experiments import Outcome
from labkit.hardware import Machine, card
from labkit.memory import attention_memory


def run(*arguments, **environment):
    """The command in this process; a traceback would show as ``exception``."""
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "120", **environment})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def typed(line):
    """The command as one types it."""
    return run(*line.split())


def python(*arguments, code=None):
    """The command in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "labkit"]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# -- memory ----------------------------------------------------------------------------------------


def test_memory_prints_the_table_without_loading_torch_or_triton():
    code = (
        "import sys; from labkit.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print('LOADED', [m for m in ('torch', 'triton', 'matplotlib') if m in sys.modules])"
    )
    problem = "memory --seq-len 8192 --heads 12 --batch 1 --head-dim 64 --dtype fp16 --card h200"
    done = python(*problem.split(), code=code)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    assert "1.5 GiB" in done.stdout and "[1, 12, 8192, 8192]" in done.stdout
    assert "NVIDIA H200 SXM" in done.stdout


def test_memory_passes_every_option_to_the_table():
    result = typed(
        "memory --seq-len 300 --heads 8 --kv-heads 2 --batch 3 --head-dim 96 --dtype bf16 "
        "--seq-len-k 500 --causal --training --format json"
    )
    table = attention_memory(
        seq_len=300,
        heads=8,
        kv_heads=2,
        batch=3,
        head_dim=96,
        dtype="bfloat16",
        seq_len_k=500,
        causal=True,
        training=True,
    )
    assert json.loads(result.stdout) == json.loads(table.to_json())
    fused = typed("memory --seq-len 300 --method fused --format csv").stdout
    names = [row["name"] for row in csv.DictReader(io.StringIO(fused))]
    assert names == ["Q", "K", "V", "O", "LSE"]


def test_memory_says_whether_it_fits_and_how_far_one_can_go():
    small = typed("memory --seq-len 65536 --heads 32 --card rtx3060 --card b200").stdout
    assert "GeForce RTX 3060 12 GB, 12 GiB on the card: does not fit" in small
    assert "NVIDIA B200 SXM (HGX), 178 GiB as the driver reports it: does not fit" in small
    fits = typed("memory --seq-len 1024 --card rtx3060").stdout
    assert ": fits, " in fits and "longest sequence that fits" in fits
    # With two lengths there is no single longest one.
    assert "longest" not in typed("memory --seq-len 8 --seq-len-k 9 --card t4").stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("memory --seq-len 0", "seq_len = 0"),
        ("memory --seq-len -5", "seq_len = -5"),
        ("memory --seq-len 8 --heads 0", "heads = 0"),
        ("memory --seq-len 8 --dtype float17", "float16"),
        ("memory --seq-len 8 --heads 8 --kv-heads 3", "kv_heads = 3"),
        ("memory --seq-len 8 --method flash", "method = 'flash'"),
        ("memory --seq-len 8 --card h300", "card = 'h300'"),
        ("memory --seq-len 8 --card A100", "fits several"),
        ("hardware h300", "Did you mean"),
        ("hardware --view everything", "overview"),
        ("record nonsense", "nonsense"),
        ("claims C99", "C01"),
    ],
)
def test_bad_input_is_one_clean_message_and_status_two(arguments, named):
    result = typed(arguments)
    assert result.exit_code == 2
    assert named in result.stderr and result.stderr.startswith("labkit: ")
    assert "Traceback" not in result.output and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", ["memory", "memory --seq-len many", "memory --seq-len 2.5", "nonsense"]
)
def test_usage_mistakes_are_status_two(arguments):
    result = typed(arguments)
    assert result.exit_code == 2 and "Usage:" in result.stderr


def test_the_message_of_a_bad_size_reaches_the_shell():
    done = python("memory", "--seq-len", "0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "labkit: seq_len = 0: is not positive. Pass an integer of at least 1.\n"


def test_help_lists_every_command():
    text = run("--help").stdout
    for command in ("doctor", "memory", "hardware", "record", "quotes", "claims"):
        assert f"  {command} " in text
        assert run(command, "-h").exit_code == 0


# -- hardware --------------------------------------------------------------------------------------


def test_hardware_shows_the_table_or_one_card_with_its_sources():
    everything = run("hardware").stdout
    for row in hardware.CARDS.values():
        assert row.name in everything
    one = run("hardware", "NVIDIA GeForce RTX 3060").stdout
    assert one.startswith("GeForce RTX 3060 12 GB (Ampere, compute capability 8.6)")
    assert "https://" in one and "99 KiB" in one
    two = run("hardware", "h200", "b200", "--view", "compute").stdout
    assert "989 TFLOP/s" in two and "V100" not in two
    data = json.loads(run("hardware", "t4", "--json").stdout)
    assert data == [json.loads(json.dumps(card("t4").to_dict()))]


# -- doctor ----------------------------------------------------------------------------------------


def machine(**what):
    """A made-up machine: a laptop without a GPU unless told otherwise."""
    about = {
        "torch": "2.13.0",
        "triton": "3.7.1",
        "python": "3.11.7",
        "platform": "Linux",
        "cpu": "a CPU",
        "cores": 2,
        "ram_bytes": 16 * 2**30,
        "ram_free_bytes": 8 * 2**30,
        "can_run": "interpreter",
    }
    return Machine(**(about | what))


H200 = {
    "gpu": "NVIDIA H200",
    "gpu_count": 1,
    "compute_capability": "9.0",
    "gpu_total_bytes": 143156 * 2**20,
    "gpu_free_bytes": 142000 * 2**20,
    "cuda": "12.8",
    "can_run": "gpu",
}


@pytest.fixture
def here(monkeypatch):
    """Set what detect() finds and what trying a kernel gives."""

    def set_up(tried=("interpreter", "1 s"), **what):
        monkeypatch.setattr(hardware, "detect", lambda: machine(**what))
        monkeypatch.setattr(doctor, "try_kernel", lambda: tried)
        return doctor.examine()

    return set_up


def states(report):
    return {finding.part: finding.state for finding in report.findings}


def test_doctor_on_a_laptop(here):
    report = here()
    assert report.usable and states(report)["GPU"] == "note"
    assert "interpreter" in report.verdict
    runs = {a.what: a.runs for a in report.abilities}
    assert runs["Triton kernels"] and not runs["bandwidth, latency, times of this GPU"]
    result = run("doctor")
    assert result.exit_code == 0 and "Triton kernels" in result.stdout
    assert report.verdict in " ".join(result.stdout.split())


def test_doctor_on_an_h200(here):
    report = here(tried=("gpu", "9 s"), card=card("h200"), **H200)
    assert report.verdict == "Everything runs here, on the NVIDIA H200."
    assert states(report)["GPU"] == "ok"
    assert all(ability.runs for ability in report.abilities)
    text = run("doctor").stdout
    assert "139 GiB free of 140 GiB" in text and "compute capability 9.0" in text


def test_doctor_without_torch_says_what_still_works_and_what_to_install(here):
    report = here(torch=None, triton=None, can_run="no-torch")
    lacks = {f.part: f for f in report.lacks}
    assert "pip install torch" in lacks["torch"].remedy and lacks["torch"].meanwhile
    assert {"torch", "Triton"} <= set(lacks)
    runs = [a.what for a in report.abilities if a.runs]
    assert runs == ["memory tables, rooflines, explorers, records"]
    result = run("doctor")
    assert result.exit_code == 0 and "pip install torch" in result.stdout


def test_doctor_with_nothing_usable_is_status_one(here, monkeypatch):
    monkeypatch.setattr(doctor, "_tables_work", lambda: (False, "ImportError: no numpy"))
    report = here(torch=None, triton=None, can_run="no-torch")
    assert not report.usable and report.verdict == "Nothing runs here yet."
    assert run("doctor").exit_code == 1
    assert run("doctor", "--json").exit_code == 1


def test_doctor_tells_a_gpu_that_torch_cannot_use(here):
    report = here(**{**H200, "can_run": "interpreter"}, problems={"gpu": "no code for 9.0"})
    gpu = next(f for f in report.findings if f.part == "GPU")
    assert gpu.state == "lack" and "no code for 9.0" in gpu.found and "pytorch.org" in gpu.remedy
    assert "interpreter" in report.verdict


def test_doctor_tells_a_kernel_that_fails(here):
    report = here(tried=(None, "RuntimeError: Failed to find C compiler."), **H200)
    finding = next(f for f in report.findings if f.part == "Triton kernel")
    assert finding.state == "lack" and "C compiler" in finding.found
    assert "--trial" in finding.remedy
    assert report.verdict == "Everything but Triton kernels runs here."


def test_doctor_tells_what_spoils_a_gpu(here, monkeypatch):
    monkeypatch.setattr(doctor, "_has_c_compiler", lambda: False)
    report = here(
        tried=("interpreter", "1 s"),
        **{**H200, "gpu": "Tesla T4", "compute_capability": "7.5", "gpu_free_bytes": 2**29},
        interpreter=True,
    )
    found = states(report)
    assert found["GPU memory"] == found["compute capability"] == "note"
    assert found["TRITON_INTERPRET"] == found["data sheet"] == "note"
    assert found["C compiler"] == "lack"


def test_doctor_tells_old_versions(here):
    report = here(torch="2.10.1+cu128", triton="3.5.0")
    assert states(report)["torch"] == states(report)["Triton"] == "note"
    assert states(here(torch="2.11.0a0+git", triton="3.10.0"))["torch"] == "ok"


def test_doctor_json_can_be_attached_to_a_question(here):
    here(tried=("gpu", "9 s"), card=card("h200"), **H200)
    data = json.loads(run("doctor", "--json").stdout)
    assert data["usable"] is True and data["machine"]["card"] == "h200"
    assert {f["part"] for f in data["findings"]} >= {"torch", "Triton", "GPU", "records"}


def test_doctor_without_a_trial_starts_no_process(monkeypatch):
    def refuse():
        raise AssertionError("a kernel was tried")

    monkeypatch.setattr(doctor, "try_kernel", refuse)
    result = run("doctor", "--no-try")
    assert result.exit_code == 0 and "What runs here" in result.stdout


def test_a_real_kernel_runs_and_a_broken_one_is_told(monkeypatch):
    backend, text = doctor.try_kernel()
    assert backend in {"gpu", "interpreter"} and "s with start-up" in text
    monkeypatch.setattr(sys, "executable", str(Path("/does/not/exist")))
    assert doctor.try_kernel()[0] is None
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    backend, text = doctor.try_kernel(timeout_s=0.01)
    assert backend is None and "TimeoutExpired" in text


# -- record ----------------------------------------------------------------------------------------


def fake_run(monkeypatch, *outcomes):
    seen = {}

    def run_and_record(which, **options):
        seen.update(options, which=which)
        return list(outcomes)

    monkeypatch.setattr(experiments, "run_and_record", run_and_record)
    return seen


def test_record_passes_its_options_on(monkeypatch):
    seen = fake_run(monkeypatch, Outcome("hierarchy", "recorded"))
    result = run("record", "hierarchy", "--quick", "--no-write", "--device", "cpu")
    assert result.exit_code == 0
    assert seen.pop("command").startswith("python -m labkit")
    assert seen == {"which": ["hierarchy"], "quick": True, "write": False, "device": "cpu"}
    fake_run(monkeypatch, Outcome("a", "measured"))
    assert run("record").exit_code == 0


def test_record_tells_failures_and_emptiness(monkeypatch):
    fake_run(monkeypatch, Outcome("a", "recorded"), Outcome("b", "failed", why="boom"))
    result = run("record")
    assert result.exit_code == 1 and "1 failed: b" in result.stderr
    fake_run(monkeypatch, Outcome("a", "skipped", why="no GPU"))
    result = run("record")
    assert result.exit_code == 1 and "doctor" in result.stderr


def test_record_list_names_every_experiment():
    text = run("record", "--list").stdout
    for name in experiments.names():
        assert f" {name} " in text
    assert "needs a GPU" in text


# -- quotes ----------------------------------------------------------------------------------------


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A record of 4.2812 TB/s, and a page that quotes it."""
    root = tmp_path / "records"
    monkeypatch.setenv("LABKIT_RECORDS", str(root))
    figures = {"copy_peak": {"value": 4.2812e12, "unit": "B/s", "how": "copy"}}
    record = records.new_record("hierarchy", figures)
    path = records.save(record, root=root)
    page = tmp_path / "page.md"
    target = f"{path.parent.name}/hierarchy:copy_peak"

    def write(text):
        page.write_text(f"# Title\n\nIt copies {{rec}}`{text} <{target}>`.\n", encoding="utf-8")
        return page

    return write


def test_quotes_accepts_what_the_record_says(pages):
    result = run("quotes", str(pages("4.28 TB/s")))
    assert result.exit_code == 0 and "1 quoted figures in 1 pages, 0 wrong" in result.stdout


def test_quotes_tells_and_rewrites_what_it_does_not(pages):
    page = pages("4.82 TB/s")
    result = run("quotes", str(page))
    assert result.exit_code == 1 and "4.28 TB/s" in result.stderr
    result = run("quotes", "--write", str(page))
    assert result.exit_code == 0 and "1 quote rewritten" in result.stdout
    assert "4.28 TB/s" in page.read_text(encoding="utf-8")


def test_quotes_without_a_checkout_says_so(monkeypatch, tmp_path):
    import labkit.__main__ as cli

    monkeypatch.setattr(cli, "__file__", str(tmp_path / "labkit" / "__main__.py"))
    result = run("quotes")
    assert result.exit_code == 2 and "checkout" in result.stderr


# -- claims ----------------------------------------------------------------------------------------


def test_claims_prints_verdicts_and_cells():
    result = run("claims", "c3", "C09")
    assert result.exit_code == 0
    assert "refuted" in result.stdout and "88.89 %" in result.stdout
    assert "C08" not in result.stdout
    page = run("claims", "--markdown").stdout
    assert page.startswith("````{list-table}") and "{dropdown} C23" in page


def test_claims_with_a_wrong_cell_is_status_one(monkeypatch):
    from labkit import claims

    monkeypatch.setitem(claims.C12_TABLE, 512, "2 MB")
    result = run("claims", "C12")
    assert result.exit_code == 1 and "against the verdict" in result.stdout


def test_a_lab_error_anywhere_becomes_a_message(monkeypatch):
    def fail(*a, **k):
        raise LabError("the reason, and what to do.")

    monkeypatch.setattr(experiments, "run_and_record", fail)
    result = run("record")
    assert result.exit_code == 2 and result.stderr == "labkit: the reason, and what to do.\n"
