"""Records: what is read is valid, what is written loses nothing, what is quoted is right."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from labkit import records
from labkit.errors import RecordError

REPOSITORY = Path(__file__).resolve().parent.parent

RESULTS = {
    "copy_peak": {"value": 4.2837e12, "unit": "B/s", "how": "median of 20 copies of 4 GiB"},
    "latency": {"value": 5.605e-7, "unit": "s", "how": "pointer chase"},
    "matrix": {"value": 2.5 * 2**20, "unit": "bytes", "how": "allocator peak"},
    "share": {"value": 0.145, "unit": "1", "how": "S and P over all"},
    "speedup": {"value": 12.25, "unit": "1", "how": "ratio of medians"},
    "error": {"value": 2.349e-3, "unit": "1", "how": "against float64"},
    "error_up": {"value": 9.96e-3, "unit": "1", "how": "against float64"},
    "longest": {"value": 36864, "unit": "tokens", "how": "bisected"},
    "slope": {"value": -0.04, "unit": "1", "how": "least squares"},
}
ROWS = [{"n": 256, "samples_ms": [1.0, 3.0, 2.0], "median_ms": 2.0, "error": {"max": 1e-3}}]


@pytest.fixture
def root(tmp_path):
    record = records.new_record("demo", RESULTS, ROWS, "python -m labkit record demo")
    record = type(record)(**{**record.__dict__, "machine": {"gpu": "NVIDIA H200"}})
    records.save(record, root=tmp_path)
    return tmp_path


def path_of(root: Path) -> Path:
    return root / "nvidia-h200" / "demo.json"


def edit(root: Path, change) -> None:
    path = path_of(root)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# -- reading and writing ---------------------------------------------------------


def test_a_saved_record_is_read_back_whole(root):
    record = records.load("demo", root=root)
    assert record.value("copy_peak") == 4.2837e12
    assert record.unit("copy_peak") == "B/s"
    assert record.how("latency") == "pointer chase"
    assert record.rows == ROWS
    assert record.select(n=256) == ROWS and record.select(n=7) == []
    assert record.slug == "nvidia-h200"
    assert "share" in record and "nothing" not in record
    assert records.available(root) == {"nvidia-h200": ("demo",)}


def test_another_run_is_kept_by_its_commit(root):
    """It is found by its name only, and its name is what the file says of itself."""
    text = path_of(root).read_text("utf-8")
    commit = json.loads(text)["commit"][:7]
    kept = path_of(root).with_stem(f"demo@{commit}")
    kept.write_text(text.replace("4283700000000.0", "4183700000000.0"), "utf-8")
    assert records.load("demo", root=root).value("copy_peak") == 4.2837e12
    assert records.load(f"demo@{commit}", root=root).value("copy_peak") == 4.1837e12
    records.check_quote("4.18 TB/s", f"demo@{commit}:copy_peak", root=root)
    with pytest.raises(RecordError, match=r"4\.18"):
        records.check_quote("4.28 TB/s", f"nvidia-h200/demo@{commit}:copy_peak", root=root)
    for wrong, why in (("demo@fffffff", "at commit"), (f"other@{commit}", "is a record of 'demo'")):
        kept.rename(kept.with_stem(wrong))
        with pytest.raises(RecordError, match=why) as refused:
            records.load(wrong, root=root)
        assert "labkit record" not in str(refused.value)  # it would make another
        kept.with_stem(wrong).rename(kept)
    with pytest.raises(RecordError, match=r"no such record.*nothing makes it again"):
        records.load("demo@abcdef0", root=root)
    with pytest.raises(RecordError, match="does not name a figure"):
        records.check_quote("4.18 TB/s", "demo@xyz:copy_peak", root=root)


def test_a_new_record_says_where_and_how_it_was_made():
    record = records.new_record("demo", RESULTS, command="make record")
    assert record.command == "make record"
    assert record.machine["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record.machine["cpu"]
    assert {"gpu", "driver", "torch", "triton", "cuda", "cudnn", "platform"} <= set(record.machine)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.date)
    if (REPOSITORY / ".git").exists() and shutil.which("git"):
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, text=True)
        assert record.commit == head.strip()
        assert isinstance(record.dirty, bool)


def test_the_command_is_what_was_typed_without_the_folders_of_a_machine(monkeypatch):
    typed = ["/opt/venv/bin/python3.12", "-m", "labkit", "record", "scaling", "/opt/course/x.py"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert records.new_record("demo", {}).command == "python -m labkit record scaling x.py"


def test_without_git_the_commit_is_the_one_told_or_unknown(monkeypatch):
    monkeypatch.setattr(records, "_run", lambda *a, **k: None)
    monkeypatch.delenv("LABKIT_COMMIT", raising=False)
    assert records._commit() == ("unknown", None)
    monkeypatch.setenv("LABKIT_COMMIT", "abc123")
    assert records._commit() == ("abc123", False)
    monkeypatch.setenv("LABKIT_COMMIT", "abc123-dirty")
    assert records._commit() == ("abc123", True)


def test_a_commit_that_is_told_overrides_the_one_that_git_finds(monkeypatch):
    monkeypatch.setenv("LABKIT_COMMIT", "abc123")
    assert records._commit() == ("abc123", False)


def test_numpy_numbers_are_stored_as_plain_numbers(tmp_path):
    np = pytest.importorskip("numpy")
    results = {"x": {"value": np.float32(0.5), "unit": "s", "how": "by hand"}}
    record = records.new_record("demo", results, [{"n": np.int64(3), "list": (np.float64(1.5),)}])
    path = records.save(record, root=tmp_path)
    assert json.loads(path.read_text())["rows"] == [{"n": 3, "list": [1.5]}]


def test_records_are_read_without_torch():
    code = (
        "import sys; from labkit import records; records.available();"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# -- bad records -----------------------------------------------------------------


def test_a_missing_record_says_what_there_is_and_how_to_make_it(root):
    with pytest.raises(RecordError, match=r"no such record.*nvidia-h200 has: demo.*record other"):
        records.load("other", root=root)
    with pytest.raises(RecordError, match="There is one of: nvidia-h200"):
        records.load("demo", "nvidia-a100", root=root)


@pytest.mark.parametrize("text", ["", "{", '{"schema": "labkit-record/1", ', "not json"])
def test_a_damaged_record_is_named_with_a_remedy(root, text):
    path_of(root).write_text(text)
    with pytest.raises(RecordError, match=r"demo\.json: is damaged.*git checkout.*record demo"):
        records.load("demo", root=root)


def test_a_record_that_is_not_text_is_damaged(root):
    path_of(root).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="is damaged"):
        records.load("demo", root=root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("schema"), "is not a labkit record"),
        (lambda d: d.update(schema="nvbench/3"), "nvbench/3"),
        (lambda d: d.update(experiment="other"), "is a record of 'other', not of 'demo'"),
        (lambda d: d.pop("results"), "lacks 'results'"),
        (lambda d: d.update(rows={}), "has a dict as 'rows'"),
        (lambda d: d.update(machine={}), "which machine"),
        (lambda d: d["results"]["share"].pop("how"), "without 'value', 'unit' or 'how'"),
        (lambda d: d["results"]["share"].update(how=" "), "does not say how"),
        (lambda d: d["results"]["share"].update(value="0.1"), "not a finite number"),
        (lambda d: d["results"]["share"].update(value=math.nan), "not a finite number"),
        (lambda d: d["results"]["share"].update(value=True), "not a finite number"),
        (lambda d: d["results"]["copy_peak"].update(unit="TB/s"), "base units"),
        (lambda d: d["results"].update({"a b": d["results"]["share"]}), "named 'a b'"),
        (lambda d: d["rows"].append(3), "as row 1"),
        (lambda d: d["rows"][0].update(samples_ms=[]), "no valid samples"),
        (lambda d: d["rows"][0].update(samples_ms=[-1.0]), "no valid samples"),
        (lambda d: d["rows"][0].update(median_ms=1.9), "not the median"),
    ],
)
def test_a_foreign_or_edited_record_is_refused(root, change, message):
    edit(root, change)
    with pytest.raises(RecordError, match=re.escape(message)) as caught:
        records.load("demo", root=root)
    assert "demo.json" in str(caught.value) and "record demo" in str(caught.value)


def test_a_missing_key_names_the_nearest_that_exist(root):
    with pytest.raises(RecordError, match=r"'copy_peek'\. Nearest: copy_peak\b.*\(of \d+ keys\)"):
        records.load("demo", root=root).value("copy_peek")
    with pytest.raises(RecordError, match=r"'zzz'\. Nearest: \w+"):
        records.load("demo", root=root).value("zzz")


@pytest.mark.parametrize(
    "result",
    [
        {"value": math.inf, "unit": "s", "how": "x"},
        {"value": 1.0, "unit": "ms", "how": "x"},
        {"value": 1.0, "unit": "s", "how": ""},
        {"value": 1.0, "unit": "s"},
    ],
)
def test_an_experiment_cannot_make_an_invalid_record(result):
    with pytest.raises(RecordError, match="Correct the experiment"):
        records.new_record("demo", {"x": result})


# -- nothing is lost -------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_keeps_the_earlier_record(root, monkeypatch, step):
    before = path_of(root).read_bytes()
    record = records.load("demo", root=root)
    record = type(record)(**{**record.__dict__, "command": "another"})

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        records.save(record, root=root)
    assert path_of(root).read_bytes() == before
    assert [p.name for p in path_of(root).parent.iterdir()] == ["demo.json"]


@pytest.mark.parametrize("poison", [{"bad": object}, {"median_ms": math.nan}])
def test_an_unstorable_record_never_reaches_the_file(root, poison):
    before = path_of(root).read_bytes()
    good = records.load("demo", root=root)
    bad = type(good)(**{**good.__dict__, "rows": [poison]})
    with pytest.raises(RecordError, match="cannot be stored"):
        records.save(bad, root=root)
    assert path_of(root).read_bytes() == before


def test_an_invalid_record_never_replaces_a_valid_one(root):
    before = path_of(root).read_bytes()
    good = records.load("demo", root=root)
    bad = type(good)(
        **{**good.__dict__, "results": {"x": {"value": 1.0, "unit": "ms", "how": "?"}}}
    )
    with pytest.raises(RecordError, match="base units"):
        records.save(bad, root=root)
    assert path_of(root).read_bytes() == before
    assert [p.name for p in path_of(root).parent.iterdir()] == ["demo.json"]


def test_a_quick_record_never_replaces_a_full_one_and_is_not_quoted(root):
    full = records.load("demo", root=root)
    quick = type(full)(**{**full.__dict__, "quick": True})
    with pytest.raises(RecordError, match="holds a full record"):
        records.save(quick, root=root)
    path_of(root).unlink()
    records.save(quick, root=root)
    with pytest.raises(RecordError, match="quick record"):
        records.check_quote("4.28 TB/s", "demo:copy_peak", root=root)
    records.save(full, root=root)
    assert records.load("demo", root=root).quick is False


def test_own_records_are_found_before_the_shipped_ones(root, monkeypatch):
    monkeypatch.setenv("LABKIT_RECORDS", str(root))
    assert records.search_path()[0] == root and len(records.search_path()) == 2
    assert records.save_root() == root
    assert records.load("demo").value("longest") == 36864


def test_an_installed_copy_refuses_to_write_into_site_packages(tmp_path, monkeypatch):
    monkeypatch.delenv("LABKIT_RECORDS", raising=False)
    monkeypatch.setattr(records, "_PACKAGE", tmp_path / "site-packages" / "labkit")
    with pytest.raises(RecordError, match="LABKIT_RECORDS"):
        records.save_root()
    assert records.search_path() == [tmp_path / "site-packages" / "labkit" / "_records"]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("cpu Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu-intel-xeon-cpu-2-20ghz"),
    ],
)
def test_the_folder_of_a_machine(name, slug):
    assert records.machine_slug(name) == slug


# -- quotes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("4.28 TB/s", "copy_peak"),
        ("4.284 TB/s", "copy_peak"),
        ("4 TB/s", "copy_peak"),
        ("4284 GB/s", "copy_peak"),
        ("4,284 GB/s", "copy_peak"),
        ("560.5 ns", "latency"),
        ("0.56 µs", "latency"),
        ("561 ns", "latency"),  # 560.5 rounds away from zero
        ("2.5 MiB", "matrix"),
        ("2560 KiB", "matrix"),
        ("2.62 MB", "matrix"),
        ("3 MiB", "matrix"),
        ("15 %", "share"),  # 0.145 is a little less in binary; its decimal text decides
        ("14.5%", "share"),
        ("0.15", "share"),
        ("12.3×", "speedup"),
        ("12.25 ×", "speedup"),
        ("2.3e-3", "error"),
        ("2.35e-03", "error"),
        ("2.3×10⁻³", "error"),
        ("2.35 × 10⁻³", "error"),
        ("1.0e-2", "error_up"),
        ("0.2 %", "error"),
        ("36,864 tokens", "longest"),
        ("36864 tokens", "longest"),
        ("−0.04", "slope"),
        ("-0.04", "slope"),
        ("0.0", "slope"),
    ],
)
def test_a_right_quote_passes(root, text, key):
    records.check_quote(text, f"demo:{key}", root=root)
    records.check_quote(text, f"nvidia-h200/demo:{key}", root=root)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("4.29 TB/s", "copy_peak"),
        ("4.280 TB/s", "copy_peak"),
        ("4.3 GB/s", "copy_peak"),
        ("560 ns", "latency"),
        ("2.5 MB", "matrix"),
        ("14 %", "share"),
        ("0.14", "share"),
        ("12.2×", "speedup"),
        ("2.3e-2", "error"),
        ("2.3×10⁻²", "error"),
        ("36,865 tokens", "longest"),
        ("0.04", "slope"),
        ("-0.0", "slope"),
    ],
)
def test_a_wrong_quote_is_rejected_and_the_right_one_named(root, text, key):
    with pytest.raises(RecordError, match="the record gives") as caught:
        records.check_quote(text, f"demo:{key}", root=root)
    right = re.search(r"gives '(.+?)'", str(caught.value))[1]
    records.check_quote(right, f"demo:{key}", root=root)


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("4.28 TB/s", "demo:none", "has no result 'none'"),
        ("4.28 TB/s", "nope:copy_peak", "no such record"),
        ("4.28 TB/s", "copy_peak", "does not name a figure"),
        ("4.28 TB/s", "../etc/demo:copy_peak", "does not name a figure"),
        ("about 4.28 TB/s", "demo:copy_peak", "not a number with a unit"),
        ("4.28 furlongs", "demo:copy_peak", "unknown unit"),
        ("4.28 ms", "demo:copy_peak", "recorded in B/s"),
        ("4.28", "demo:copy_peak", "recorded in B/s"),
    ],
)
def test_a_quote_that_cannot_be_checked_is_an_error(root, text, target, message):
    with pytest.raises(RecordError, match=re.escape(message)):
        records.check_quote(text, target, root=root)


def test_a_figure_is_written_in_the_form_asked_for(root):
    record = records.load("demo", root=root)
    assert record.quote("copy_peak", "0.00 TB/s") == "4.28 TB/s"
    assert record.quote("longest", "0,000 tokens") == "36,864 tokens"
    assert record.quote("error", "0.0e0") == "2.3e-3"
    assert record.quote("share", "0.0 %") == "14.5 %"


PAGE = """\
The copy reaches {rec}`4.28 TB/s <demo:copy_peak>` and waits {rec}`561
ns <nvidia-h200/demo:latency>`.

```{note}
Inside a directive: {rec}`14.5 % <demo:share>`.
```

Shown, not meant: ``{rec}`1 TB/s <demo:copy_peak>` ``

````md
```{note}
{rec}`9 TB/s <demo:copy_peak>`
```
````

Last: {rec}`12.3× <demo:speedup>`
"""


def test_quotes_are_found_in_prose_and_directives_but_not_in_code():
    found = list(records.find_quotes(PAGE, "page.md"))
    assert [(q.text, q.target, q.line) for q in found] == [
        ("4.28 TB/s", "demo:copy_peak", 1),
        ("561 ns", "nvidia-h200/demo:latency", 1),
        ("14.5 %", "demo:share", 5),
        ("12.3×", "demo:speedup", 16),
    ]


def test_a_role_without_a_target_is_an_error():
    with pytest.raises(RecordError, match=r"page\.md, line 2.*names no record"):
        list(records.find_quotes("x\n{rec}`4.28 TB/s`", "page.md"))


@pytest.mark.parametrize("ascii_only", [False, True])
def test_stale_quotes_are_rewritten_in_pages_and_notebooks(root, tmp_path, ascii_only):
    stale = PAGE.replace("4.28", "1.11").replace("12.3×", "9.9×")
    page = tmp_path / "page.md"
    page.write_text(stale, encoding="utf-8")
    cells = [
        {"cell_type": "code", "source": ["# {rec}`1.11 TB/s`\n"]},
        {"cell_type": "markdown", "source": stale.splitlines(keepends=True)},
    ]
    notebook = tmp_path / "book.ipynb"
    notebook.write_text(json.dumps({"cells": cells}, ensure_ascii=ascii_only), encoding="utf-8")
    for path in (page, notebook):
        assert records.requote_file(path, root=root) == 2
        quotes = records.quotes_in_file(path)
        assert [q.text for q in quotes] == ["4.28 TB/s", "561 ns", "14.5 %", "12.3×"]
        for quote in quotes:
            records.check_quote(quote.text, quote.target, root=root)
        assert records.requote_file(path, root=root) == 0
    assert page.read_text(encoding="utf-8") == PAGE
    assert json.loads(notebook.read_text(encoding="utf-8"))["cells"][0] == cells[0]


def test_a_stale_quote_of_a_readme_is_found_and_rewritten(root, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("It copies at\n<!-- rec: demo:copy_peak -->1.11 TB/s<!-- /rec --> there.\n")
    assert [(q.text, q.line) for q in records.quotes_in_file(page)] == [("1.11 TB/s", 2)]
    assert records.requote_file(page, root=root) == 1
    assert page.read_text() == (
        "It copies at\n<!-- rec: demo:copy_peak -->4.28 TB/s<!-- /rec --> there.\n"
    )


def test_a_stale_quote_that_stands_twice_is_rewritten_twice(root, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("{rec}`4.1 TB/s <demo:copy_peak>`\n\nagain {rec}`4.1 TB/s <demo:copy_peak>`\n")
    assert records.requote_file(page, root=root) == 1
    assert [q.text for q in records.quotes_in_file(page)] == ["4.3 TB/s"] * 2


def test_a_record_that_changes_is_read_again_and_what_is_shared_is_not_handed_out(root):
    first = records.check_quote("4.28 TB/s", "demo:copy_peak", root=root)
    assert records.check_quote("4.28 TB/s", "demo:copy_peak", root=root) is first
    assert records.load("demo", root=root) is not first
    text = path_of(root).read_text("utf-8")
    value = json.loads(text)["results"]["copy_peak"]["value"]
    path_of(root).write_text(text.replace(str(value), str(value + 0.5e12)), "utf-8")
    with pytest.raises(RecordError, match="the page quotes"):
        records.check_quote("4.28 TB/s", "demo:copy_peak", root=root)


# -- this repository -------------------------------------------------------------

RECORD_FILES = sorted((REPOSITORY / "records").glob("*/*.json"))
PAGES = sorted([*(REPOSITORY / "book").rglob("*.md"), *(REPOSITORY / "notebooks").glob("*.ipynb")])


@pytest.mark.parametrize("path", RECORD_FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_committed_record_is_valid_and_in_its_place(path):
    record = records.load(path.stem, path.parent.name, root=REPOSITORY / "records")
    assert record.slug == path.parent.name
    assert record.quick is False
    assert record.commit != "unknown"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_quote_of_the_book_is_what_was_measured(path, monkeypatch):
    monkeypatch.delenv("LABKIT_RECORDS", raising=False)
    wrong = []
    for quote in records.quotes_in_file(path):
        try:
            records.check_quote(quote.text, quote.target, root=REPOSITORY / "records")
        except RecordError as error:
            wrong.append(f"{quote.where}, line {quote.line}: {error}")
    assert not wrong, "\n".join(wrong)
