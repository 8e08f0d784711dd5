"""The framework: a failing experiment costs nobody else anything, and no record is lost."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from labkit import experiments, records
from labkit.errors import ArgumentError, LabError, NoGpuError, RecordError
from labkit.experiments import Result
from labkit.experiments._jobs import Jobs

REPOSITORY = Path(__file__).resolve().parent.parent


def fine(value=1.0):
    def run(*, quick, device=None, progress=None):
        result = Result(notes=["fine"])
        for n in experiments.steps([1, 2], progress, lambda n: f"n = {n}"):
            result.rows.append({"n": n, "samples_ms": [value, value], "median_ms": value})
        result.add("time", value / 1e3, "s", "median of 2")
        return result

    return run


def failing(*, quick, device=None, progress=None):
    raise RuntimeError("out of registers")


def interrupted(*, quick, device=None, progress=None):
    raise KeyboardInterrupt


def invalid(*, quick, device=None, progress=None):
    return Result(results={"time": {"value": float("nan"), "unit": "s", "how": "broken timer"}})


@pytest.fixture
def fakes(monkeypatch):
    """Replace the registry by modules made here: ``fakes(name=run, …)``."""

    def install(needs_gpu=(), **runs):
        for name, run in runs.items():
            module = types.ModuleType(f"labkit.experiments.{name}")
            module.TITLE, module.CHAPTERS = f"The {name} one", ("01",)
            module.NEEDS_GPU, module.run = name in needs_gpu, run
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(experiments, "names", lambda: tuple(sorted(runs)))

    return install


def test_what_cannot_be_a_record_is_kept_beside(fakes, tmp_path):
    fakes(broken=invalid)
    (outcome,) = experiments.run_and_record(root=tmp_path)
    kept = tmp_path / "broken.refused"
    assert outcome.status == "failed" and str(kept) in outcome.why
    assert "broken timer" in kept.read_text("utf-8")


def stored(root):
    return {p.stem: p.read_bytes() for p in Path(root).glob("*/*")}


def test_a_failing_experiment_stops_nobody_and_keeps_its_earlier_record(fakes, tmp_path, capsys):
    fakes(a=fine(), b=fine(2.0), c=fine())
    experiments.run_and_record(root=tmp_path)
    before = stored(tmp_path)
    assert sorted(before) == ["a", "b", "c"]
    fakes(a=fine(5.0), b=failing, c=fine(6.0))
    outcomes = experiments.run_and_record(root=tmp_path)
    assert [(o.name, o.status) for o in outcomes] == [
        ("a", "recorded"),
        ("b", "failed"),
        ("c", "recorded"),
    ]
    after = stored(tmp_path)
    assert after["b"] == before["b"]
    slug = next(tmp_path.iterdir()).name
    assert records.load("a", slug, root=tmp_path).value("time") == 5e-3
    assert records.load("c", slug, root=tmp_path).value("time") == 6e-3
    out, err = capsys.readouterr()
    assert "failed: RuntimeError: out of registers" in out and "untouched" in out
    assert "failing" in err  # the traceback names the function


def test_a_result_that_is_not_a_valid_record_is_a_failure(fakes, tmp_path):
    fakes(a=fine())
    experiments.run_and_record(root=tmp_path)
    before = stored(tmp_path)
    fakes(a=invalid)
    (outcome,) = experiments.run_and_record(root=tmp_path)
    assert outcome.status == "failed" and isinstance(outcome.error, RecordError)
    assert stored(tmp_path) == before


def test_ctrl_c_keeps_what_was_done_and_what_was_there(fakes, tmp_path):
    fakes(a=fine(), b=fine(), c=fine())
    experiments.run_and_record(root=tmp_path)
    before = stored(tmp_path)
    fakes(a=fine(7.0), b=interrupted, c=fine(7.0))
    with pytest.raises(KeyboardInterrupt):
        experiments.run_and_record(root=tmp_path)
    after = stored(tmp_path)
    assert after["a"] != before["a"] and after["b"] == before["b"] and after["c"] == before["c"]


def test_an_unknown_name_is_refused_before_anything_runs(fakes, tmp_path):
    ran = []
    fakes(a=lambda **k: ran.append(1) or Result())
    with pytest.raises(ArgumentError, match="'hierachy'"):
        experiments.run_and_record(["a", "hierachy"], root=tmp_path)
    assert not ran


def test_where_records_cannot_be_written_nothing_runs(fakes, monkeypatch):
    ran = []
    fakes(a=lambda **k: ran.append(1) or Result())

    def refuse():
        raise RecordError("nowhere")

    monkeypatch.setattr(records, "save_root", refuse)
    with pytest.raises(RecordError, match="nowhere"):
        experiments.run_and_record()
    assert not ran
    assert experiments.run_and_record(write=False)[0].status == "measured"


def test_what_needs_a_gpu_is_skipped_without_one(fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "has_gpu", lambda: False)
    fakes(needs_gpu=("dram",), dram=fine(), other=fine())
    outcomes = experiments.run_and_record(root=tmp_path)
    assert [(o.name, o.status) for o in outcomes] == [("dram", "skipped"), ("other", "recorded")]
    assert "needs a GPU" in capsys.readouterr().out
    with pytest.raises(NoGpuError, match=r"records\.load\('dram'\)"):
        experiments.run("dram")
    with pytest.raises(NoGpuError):
        experiments.run("other", device="cuda")
    with pytest.raises(ArgumentError, match="device"):
        experiments.run("other", device="tpu")


def test_a_quick_run_never_replaces_a_full_record(fakes, tmp_path):
    fakes(a=fine())
    experiments.run_and_record(root=tmp_path)
    before = stored(tmp_path)
    (outcome,) = experiments.run_and_record(quick=True, root=tmp_path)
    assert outcome.status == "measured" and outcome.why == "the full record is kept"
    assert stored(tmp_path) == before


def test_the_record_tells_command_notes_and_samples(fakes, tmp_path):
    fakes(a=fine())
    (outcome,) = experiments.run_and_record(["a", "a"], command="make record", root=tmp_path)
    record = records.load("a", outcome.path.parent.name, root=tmp_path)
    assert record.command == "make record" and record.notes == ["fine"]
    assert [r["n"] for r in record.rows] == [1, 2]


def test_steps_reports_each_item_and_the_end():
    seen = []
    assert list(experiments.steps("ab", lambda *a: seen.append(a))) == ["a", "b"]
    assert seen == [(0, 2, "a"), (1, 2, "b"), (2, 2, "")]
    assert list(experiments.steps("ab", None)) == ["a", "b"]


def test_bars_show_each_experiment_and_survive_markup_in_errors(fakes, tmp_path, monkeypatch):
    pytest.importorskip("rich")

    def bad(*, quick, device=None, progress=None):
        raise ValueError("shape [/1, 2] is wrong")

    fakes(a=fine(), b=bad)
    monkeypatch.setattr(experiments, "_reporter", experiments._Bars)
    outcomes = experiments.run_and_record(root=tmp_path)
    assert [o.status for o in outcomes] == ["recorded", "failed"]


def test_a_module_that_is_no_experiment_is_named(fakes):
    fakes(a=fine())
    del sys.modules["labkit.experiments.a"].TITLE
    with pytest.raises(LabError, match=r"experiments/a\.py: lacks TITLE"):
        experiments.run("a")
    fakes(a=lambda **k: {})
    with pytest.raises(LabError, match="returned a dict"):
        experiments.run("a")


def test_beside_gives_this_machine_and_the_recorded_one(fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_RECORDS", str(tmp_path))
    fakes(needs_gpu=("gpu",), a=fine(3.0), gpu=fine())
    with pytest.raises(RecordError, match="no such record"):
        experiments.beside("a")
    for name in ("a", "gpu"):
        record = records.new_record(name, fine(1.0)(quick=False).results)
        record = type(record)(**{**record.__dict__, "machine": {"gpu": "NVIDIA H200"}})
        records.save(record, root=tmp_path)
    here, recorded = experiments.beside("a")
    assert here.value("time") == 3e-3 and recorded.value("time") == 1e-3
    monkeypatch.setattr(experiments, "has_gpu", lambda: False)
    assert experiments.beside("gpu")[0] is None


# -- jobs ------------------------------------------------------------------------


def test_a_job_that_fails_costs_its_own_rows_and_says_why():
    def count(result, plan, device, n):
        if n == 2:
            raise ValueError("\n  out of luck\nand more")
        result.rows.append({"n": n, "size": plan["size"], "device": device})

    def jobs(parts):
        found = Jobs(lambda quick, device: {"size": 3 if quick else 9}, True, "cpu", parts, "ab")
        for part, n in (("a", 1), ("b", 2), ("a", 2), ("a", 3)):
            found.add(part, f"{part}{n}", count, n)
        found.also("extra", lambda: found.result.notes.append("extra"))
        return found

    seen, tidied = [], []
    result = jobs("a").run(lambda *step: seen.append(step), tidy=tidied.append)
    assert result.rows == [{"n": n, "size": 3, "device": "cpu"} for n in (1, 3)]
    assert result.notes == ["a2: ValueError: out of luck", "extra"]
    assert seen == [(0, 4, "a1"), (1, 4, "a2"), (2, 4, "a3"), (3, 4, "extra"), (4, 4, "")]
    assert tidied == [False, True, False, False]
    assert len(jobs("ab").run(None).notes) == 3
    late = jobs("a").run(None, limit_s=-1)
    assert late.rows == [] and all("left out" in note for note in late.notes)
    with pytest.raises(ArgumentError, match="parts"):
        jobs(("a", "c"))


# -- this package ----------------------------------------------------------------


def test_the_registry_is_the_package_and_loads_no_torch():
    code = (
        "import sys; from labkit import experiments; print(*experiments.names());"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True)
    files = {p.stem for p in (REPOSITORY / "labkit" / "experiments").glob("*.py")} - {"__init__"}
    assert set(out.split()) == {f for f in files if not f.startswith("_")}


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_says_what_it_is_and_which_chapter_uses_it(name):
    module = experiments.get(name)
    assert module.TITLE and isinstance(module.TITLE, str)
    assert module.CHAPTERS and all(c.isdigit() and len(c) == 2 for c in module.CHAPTERS)
    assert isinstance(module.NEEDS_GPU, bool)
    assert module.run.__doc__ and module.__doc__
