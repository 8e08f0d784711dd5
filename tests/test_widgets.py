"""The explorers that run attention: what they measure, and what a dead page keeps of them."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from labkit import widgets
from labkit.errors import ArgumentError, MissingDependencyError, NotEnoughMemoryError
from labkit.memory import VARIANTS, attention_peak
from labkit.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"seq_len": 128, "heads": 2, "head_dim": 32}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_a_run_measures_what_was_predicted(variant, training, device):
    lab = widgets.attention_lab(**SMALL, variant=variant, training=training, causal=True)
    run = lab.run()
    want = attention_peak(
        **SMALL, dtype="float32", variant=variant, training=training, causal=True, device=device
    )
    assert run.predicted == want
    # a scalar (the −∞ of the mask) is an allocation of its own on some devices
    assert abs(run.measured - want) <= 1024
    assert run.seconds > 0
    assert run.device == device


def test_fused_attention_never_holds_the_scores(device):
    lab = widgets.attention_lab(seq_len=1024, heads=4, dtype="float16", variant="fused")
    naive = lab.run(variant="out_of_place")
    fused = lab.run(variant="fused")
    scores = 4 * 1024 * 1024 * 2
    assert fused.measured < scores < naive.measured


def test_measured_points_join_the_predicted_line():
    lab = widgets.attention_lab(**SMALL)
    before = lab.memory_figure()
    assert before.svg().count("<circle") == 0
    assert lab.time_figure() is None
    run, other = lab.run(), lab.run(dtype="float16", seq_len=64)
    figure = lab.memory_figure()
    assert figure.svg().count("<circle") == 2
    # the line is that of the last choices: the run with others is grey
    assert figure.svg().count("lkx-dot lkx-b") == figure.svg().count("lkx-dot lkx-e") == 1
    assert [r[:3] for r in figure.table()[1:]] == [
        [r.what, format_bytes(r.predicted), format_bytes(r.measured)] for r in (run, other)
    ]
    assert lab.time_figure().svg().count("<circle") == 2


def test_line_is_the_schedules_peak():
    lab = widgets.attention_lab(heads=3, dtype="bfloat16", training=True)
    for length, text in lab.memory_figure().table()[1:]:
        n = int(length.replace(",", ""))
        want = attention_peak(seq_len=n, heads=3, dtype="bfloat16", training=True)
        assert text == format_bytes(want)


def test_button_runs_what_is_chosen_and_shows_it():
    lab = widgets.attention_lab(**SMALL)
    parts = lab.widget.parts
    parts["variant"].value = "in_place"
    parts["causal"].value = True
    parts["run"].click()
    (run,) = lab.runs
    assert (run.variant, run.causal, run.seq_len) == ("in_place", True, 128)
    assert run.what in parts["status"].value
    assert "<circle" in parts["memory"].value and "<circle" in parts["time"].value
    assert parts["run"].disabled is False
    parts["clear"].click()
    assert lab.runs == [] and parts["time"].value == "" and "<circle" not in parts["memory"].value


def test_line_follows_the_choices_before_anything_runs():
    parts = widgets.attention_lab(**SMALL).widget.parts
    before = parts["memory"].value
    parts["heads"].value = 16
    assert parts["memory"].value != before
    assert "heads 16" in parts["memory"].value


def test_what_does_not_fit_is_refused_and_said(monkeypatch):
    monkeypatch.setattr("labkit.memory.budget.free_memory", lambda device="cpu": 2**20)
    lab = widgets.attention_lab(seq_len=16384, heads=32)
    with pytest.raises(NotEnoughMemoryError, match="1 MiB free"):
        lab.run()
    lab.widget.parts["run"].click()
    assert "1 MiB free" in lab.widget.parts["status"].value
    assert lab.widget.parts["run"].disabled is False
    assert lab.runs == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seq_len": 0}, "seq_len = 0"),
        ({"heads": 2.0}, "heads = 2.0"),
        ({"dtype": "float64"}, "dtype = 'float64'"),
        ({"variant": "inplace"}, "in_place"),
        ({"training": "yes"}, "training = 'yes'"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        widgets.attention_lab(**arguments)
    with pytest.raises(ArgumentError, match=message):
        widgets.attention_lab(**SMALL).run(**{k: v for k, v in arguments.items()})


def test_without_ipywidgets_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **named):
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingDependencyError, match="pip install 'ipywidgets"):
        widgets.attention_lab()


def test_import_loads_neither_torch_nor_ipywidgets():
    code = (
        "import sys, labkit.widgets; "
        "print([m for m in ('torch', 'ipywidgets', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_controls_are_offered_only_where_a_kernel_is_alive(monkeypatch):
    lab = widgets.attention_lab(**SMALL)
    data, _ = lab._repr_mimebundle_()
    assert set(data) == {"text/html", "image/png", "text/plain"}
    assert "<script" not in data["text/html"] and "<form" not in data["text/html"]
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    live, _ = lab._repr_mimebundle_()
    assert live.pop(widgets.WIDGET_MIME)["model_id"] == lab.widget.model_id
    assert live == data


@pytest.mark.slow
def test_a_stored_notebook_keeps_the_figure(tmp_path, monkeypatch):
    pytest.importorskip("nbconvert")  # tools/execute.py needs it; a GPU box may lack it
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import execute
    from rich.progress import Progress

    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                "from labkit.widgets import attention_lab\nattention_lab(seq_len=512, causal=True)"
            )
        ]
    )
    path = tmp_path / "lab.ipynb"
    nbformat.write(notebook, path)
    with Progress(disable=True) as progress:
        assert execute.execute(path, progress) is None
    stored = nbformat.read(path, as_version=4)
    (output,) = [o for c in stored.cells for o in c.get("outputs", []) if "data" in o]
    # the link to a widget that died with its kernel would show an error in the page
    assert set(output.data) == {"text/html", "image/png", "text/plain"}
    assert "widgets" not in stored.metadata


def test_a_chapter_holds_the_figure_and_nbval_compares_it():
    """``make test`` runs chapter 01 against it: a live figure passes for a stored one."""
    path = next((ROOT / "notebooks").glob("01_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = [c for c in cells if c.cell_type == "code" and "attention_lab" in c.source]
    assert not any("nbval" in tag for tag in cell.metadata.get("tags", []))
    assert [set(o.data) for o in cell.outputs] == [{"text/html", "image/png", "text/plain"}]
