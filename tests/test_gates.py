"""The gates of `make book`, `make test`, `make execute`, and `make address` can fail.

A small copy of the book is given one fault after another, and each gate must notice.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
nbformat = pytest.importorskip("nbformat")
sys.path[:0] = [str(ROOT / "tools")]

PNG = (  # one grey pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
RECORD = {
    "schema": "labkit-record/1", "experiment": "tiny", "quick": False,
    "machine": {
        "gpu": "NVIDIA H200", "driver": "1", "torch": "2.11", "triton": "3.6", "cuda": "12",
        "cudnn": "9", "python": "3.12", "platform": "Linux", "cpu": "a CPU",
    },
    "commit": "0123456789abcdef", "dirty": False, "date": "2026-11-21T10:00:00Z",
    "command": "python -m labkit record tiny",
    "results": {"speed": {"value": 4.28e12, "unit": "B/s", "how": "median"}},
    "rows": [], "notes": [],
}


def notebook(*code: str, outputs: dict[int, list] | None = None) -> nbformat.NotebookNode:
    """A notebook with a title and code cells, executed as far as one can see."""
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}})
    nb.cells = [nbformat.v4.new_markdown_cell("# A notebook", id="title")]
    for index, source in enumerate(code):
        cell = nbformat.v4.new_code_cell(source, id=f"code-{index}", execution_count=index + 1)
        cell.outputs = [nbformat.from_dict(o) for o in (outputs or {}).get(index, [])]
        nb.cells.append(cell)
    return nb


def figure(**about) -> dict:
    return {"output_type": "display_data", "data": {"image/png": PNG, "text/plain": "Figure: x"},
            "metadata": {"image/png": about}}


def small_book(folder: Path) -> Path:
    """A book with the real configuration, extension and style, and two pages."""
    (folder / "book").mkdir(parents=True)
    for name in ("_config.yml", "requirements.txt", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / name, folder / "book" / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "book/_vendor").mkdir()
    (folder / "book/references.bib").write_text(
        "@misc{a, title={A title}, author={Ann Author}, year={2024}}\n")
    (folder / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nparts:\n  - caption: Pages\n    chapters:\n"
        "      - file: book/how_measured\n      - file: notebooks/01\n")
    (folder / "book/how_measured.md").write_text("# How\n\n```{records-table}\n```\n")
    (folder / "book/intro.md").write_text(
        "# Small\n\nIt copies at {rec}`4.28 TB/s <tiny:speed>` {cite:p}`a`.\n\n$$a = b$$ (eq)\n\n"
        "See {eq}`eq`, and ($x$), not $y$.\n\n```{bibliography}\n```\n")
    (folder / "records/nvidia-h200").mkdir(parents=True)
    (folder / "records/nvidia-h200/tiny.json").write_text(json.dumps(RECORD))
    (folder / "notebooks").mkdir()
    nbformat.write(
        notebook("1 + 1", outputs={0: [figure(alt="A pixel", dark=PNG, width=320)]}),
        folder / "notebooks/01.ipynb")
    return folder


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**clean, "PYTHONPATH": str(ROOT), **env}, timeout=300,
    )


def build(folder: Path) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import build, pathlib; " \
           f"sys.exit(build.build(pathlib.Path({str(folder)!r})))"
    return run(sys.executable, "-c", code)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    pytest.importorskip("jupyter_book")
    folder = small_book(tmp_path_factory.mktemp("book"))
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def html(folder: Path, page: str) -> str:
    return (folder / "_build/html" / page).read_text("utf-8")


def test_a_quote_is_shown_with_gpu_date_and_commit(built):
    link = re.search(r'<a class="rec"[^>]*>([^<]*)</a>', html(built, "book/intro.html"))
    assert link and link[1] == "4.28 TB/s"
    assert "NVIDIA H200, 2026-11-21, commit 0123456789" in link[0]
    assert 'href="how_measured.html"' in link[0]


def test_the_list_of_records_is_made_from_the_files(built):
    page = html(built, "book/how_measured.html")
    assert "nvidia-h200/tiny" in page and "2026-11-21" in page


def test_a_figure_has_a_light_and_a_dark_form_with_alt_text(built):
    images = re.findall(r"<img[^>]*lab-figure[^>]*>", html(built, "notebooks/01.html"))
    assert len(images) == 2
    assert all('alt="A pixel"' in image and "320px" in image for image in images)
    assert ["only-dark" in image for image in images] == [False, True]


def test_no_page_names_another_host_to_load_from(built):
    for page in ("book/intro.html", "notebooks/01.html", "search.html"):
        loads = re.findall(
            r'<(?:script|link|img|iframe|source)[^>]*(?:src|href)="(https?:[^"]*)"',
            html(built, page))
        assert loads == []


def test_no_page_links_to_a_repository_while_it_has_no_address(built):
    page = html(built, "notebooks/01.html")
    assert "colab.research" not in page
    assert "executablebooks" not in page and 'href="/issues' not in page


def test_equations_are_numbered_by_label(built):
    assert re.search(r'href="#equation-eq">\(1\)', html(built, "book/intro.html"))


def test_punctuation_stays_with_its_formula(built):
    page = html(built, "book/intro.html")
    spans = re.findall(r'<span class="lab-together">(.*?)</span>(?=[ <])', page)
    assert [re.sub(r"<[^>]+>", "", span) for span in spans] == [r"(\(x\)),", r"\(y\)."]


def test_nothing_changed_is_no_work_and_says_so(built):
    done = build(built)
    assert done.returncode == 0
    assert done.stdout.startswith("Nothing has changed")


#: what is wrong: (the page with that fault and no other, what the build must say)
FAULTS = {
    "a wrong figure": ("{rec}`4.82 TB/s <tiny:speed>`", "the page quotes '4.82 TB/s'"),
    "a figure rounded up": ("{rec}`4.3 GB/s <tiny:speed>`", "the page quotes '4.3 GB/s'"),
    "a key that no record has": ("{rec}`4.28 TB/s <tiny:heat>`", "has no result 'heat'"),
    "a record that is missing": ("{rec}`4.28 TB/s <large:speed>`", "large.json: no such record"),
    "a damaged record": ("{rec}`4.28 TB/s <damaged:speed>`", "damaged.json"),
    "a figure of no record": ("{rec}`4.28 TB/s`", "names no record"),
    "a citation that is missing": ("{cite:p}`b`", 'could not find bibtex key "b"'),
    "an equation that is missing": ("{eq}`qe`", "equation not found: qe"),
    "a page that is missing": ("{doc}`nowhere`", "unknown document: 'nowhere'"),
    "an image without alt text": ("![](_static/logo.svg)", "image without alt text: book/_static"),
    "HTML that draws without a text": ('<svg width="9"></svg>', "image without alt text: <svg"),
    "a figure without alt text": (
        notebook("1", outputs={0: [figure(alt="", dark=PNG)]}), "image without alt text: _build"),
    "a cell that was not executed": (notebook("1 + 1", "2 + 2"), "cell 3 was not executed"),
    "a cell that raised": (
        notebook("1 / 0", outputs={0: [{"output_type": "error", "ename": "ZeroDivisionError",
                                        "evalue": "", "traceback": []}]}),
        "cell 2 raised ZeroDivisionError"),
    "a cell that wrote to stderr": (
        notebook("f()", outputs={0: [{"output_type": "stream", "name": "stderr", "text": "x"}]}),
        "cell 2 wrote to stderr"),
}
FAULTS["a cell that was not executed"][0].cells[2].execution_count = None


@pytest.fixture(scope="module")
def broken(built, tmp_path_factory) -> tuple[Path, dict[str, str], subprocess.CompletedProcess]:
    """One build of a book with a page per fault: its folder, the pages, what the build said."""
    folder = tmp_path_factory.mktemp("broken") / "book"
    shutil.copytree(built, folder, ignore=shutil.ignore_patterns("_build"))
    (folder / "records/nvidia-h200/damaged.json").write_text('{"schema": "labkit-rec')
    pages = {}
    for index, (fault, (page, _)) in enumerate(FAULTS.items()):
        if isinstance(page, str):
            pages[fault] = f"book/fault_{index}.md"
            (folder / pages[fault]).write_text(f"# Fault {index}\n\nSee {page}\n")
        else:
            pages[fault] = f"notebooks/fault_{index}.ipynb"
            nbformat.write(page, folder / pages[fault])
    with (folder / "_toc.yml").open("a") as toc:
        toc.writelines(f"      - file: {page.rpartition('.')[0]}\n" for page in pages.values())
    return folder, pages, build(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_canary_the_build_warns_of(fault, broken):
    _, pages, done = broken
    said = [line for line in (done.stdout + done.stderr).splitlines()
            if FAULTS[fault][1] in line and pages[fault].rpartition(".")[0] in line]
    assert said, done.stderr


def test_canary_a_warning_fails_the_build_and_fails_it_again(broken):
    folder, _, first = broken
    second = build(folder)
    assert first.returncode != 0 and second.returncode != 0
    assert "the page quotes '4.82 TB/s'" in second.stdout + second.stderr


def test_canary_a_record_that_changes_fails_the_pages_that_quote_it(built, tmp_path):
    folder = tmp_path / "book"
    shutil.copytree(built, folder)
    record = folder / "records/nvidia-h200/tiny.json"
    changed = record.read_text("utf-8").replace("4280000000000.0", "4380000000000.0")
    record.write_text(changed, "utf-8")
    done = build(folder)
    assert done.returncode != 0
    assert "the page quotes '4.28 TB/s'" in done.stdout + done.stderr


def test_links_to_the_repository_appear_with_its_address(built, tmp_path):
    folder = tmp_path / "book"
    shutil.copytree(built, folder)
    config = folder / "_config.yml"
    text = config.read_text("utf-8")
    text = re.sub(r'(?m)^  url: ".*"', '  url: "https://github.com/ann/lab"', text)
    text = re.sub(r'(?m)^  baseurl: ".*"', '  baseurl: "https://ann.github.io/lab/"', text)
    config.write_text(text, "utf-8")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    page = html(folder, "notebooks/01.html")
    assert "https://colab.research.google.com/github/ann/lab/blob/main/notebooks/01.ipynb" in page
    assert 'href="https://github.com/ann/lab"' in page
    assert 'property="og:url" content="https://ann.github.io/lab/notebooks/01.html"' in page
    assert "<loc>https://ann.github.io/lab/book/intro.html</loc>" in html(folder, "sitemap.xml")


# -- notebooks --------------------------------------------------------------------------


def result(text: str) -> list[dict]:
    return [{"output_type": "execute_result", "execution_count": 1, "metadata": {},
             "data": {"text/plain": text}}]


def test_nbval_passes_what_is_fresh_and_fails_what_is_stale(tmp_path):
    pytest.importorskip("nbval")
    nbformat.write(notebook("6 * 7", outputs={0: result("42")}), tmp_path / "fresh.ipynb")
    nbformat.write(notebook("6 * 8", outputs={0: result("42")}), tmp_path / "stale.ipynb")
    done = run(sys.executable, "-m", "pytest", "-q", "-rA", "-c", os.devnull,
               "-p", "tools.fast_start", "-p", "no:xdist", "-p", "no:cacheprovider",
               "--rootdir", str(tmp_path), "--nbval", str(tmp_path))
    assert done.returncode == 1 and "48" in done.stdout
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) \S*?(\w+)\.ipynb::Cell (\d)", done.stdout, re.M)
    assert sorted(outcomes) == [("FAILED", "stale", "0"), ("PASSED", "fresh", "0")], done.stdout


@pytest.fixture
def workshop(tmp_path) -> Path:
    """A folder with the tools and what they read, in which they can be run for real."""
    for name in ("tools", "labkit"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "pyproject.toml", "CITATION.cff", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("notebooks", "records"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_execute_writes_what_passed_and_leaves_what_failed(workshop):
    pytest.importorskip("nbclient")
    pytest.importorskip("rich")
    names = ("01_good.ipynb", "02_bad.ipynb", "03_noisy.ipynb")
    good, bad, noisy = (workshop / "notebooks" / name for name in names)
    # what the head cell calls, without the two seconds that torch takes in each kernel
    (workshop / "instead/labkit").mkdir(parents=True)
    (workshop / "instead/labkit/__init__.py").write_text("")
    (workshop / "instead/labkit/experiments.py").write_text("def notebook(): ...\n")
    nbformat.write(notebook("print('a')\nprint('b')"), good)
    nbformat.write(notebook("raise RuntimeError('the boiler burst')"), bad)
    nbformat.write(notebook("import sys; print('psst', file=sys.stderr)"), noisy)
    before = bad.read_bytes(), noisy.read_bytes()
    instead = {"cwd": workshop, "PYTHONPATH": str(workshop / "instead")}
    done = run(sys.executable, "tools/execute.py", **instead)
    assert done.returncode == 1
    assert "1 of 3 notebooks" in done.stdout
    assert "the boiler burst" in done.stderr and "02_bad.ipynb was left as it was" in done.stderr
    assert "psst" in done.stderr and "03_noisy.ipynb was left as it was" in done.stderr
    assert (bad.read_bytes(), noisy.read_bytes()) == before
    cells = [c for c in nbformat.read(good, as_version=4).cells if c.cell_type == "code"]
    assert cells[0].id == "first-cell" and cells[0].outputs == []
    assert cells[1].outputs[0].text == "a\nb\n"
    first = good.read_bytes()
    assert run(sys.executable, "tools/execute.py", str(good), **instead).returncode == 0
    assert good.read_bytes() == first, "a second run must change no byte"


# -- address ----------------------------------------------------------------------------


def address(folder: Path, *arguments: str) -> str:
    """Run tools/address.py on ``folder``: empty if it went well, else what it exits with."""
    pytest.importorskip("yaml")
    import address

    try:
        address.main(list(arguments), root=folder)
    except SystemExit as end:
        return str(end.code)
    return ""


def everything(folder: Path) -> dict[str, bytes]:
    names = ["_config.yml", "pyproject.toml", "CITATION.cff", "README.md"]
    paths = [folder / name for name in names] + sorted((folder / "notebooks").glob("*"))
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def addressed(workshop) -> Path:
    nbformat.write(notebook("1 + 1"), workshop / "notebooks/01_a.ipynb")
    assert address(workshop, "--set", "") == ""
    return workshop


def test_address_is_set_everywhere_and_taken_out_without_a_trace(addressed):
    before = everything(addressed)
    assert address(addressed, "--set", "https://github.com/Ann/lab/") == ""
    after = everything(addressed)
    assert all(b"https://github.com/Ann/lab" in text for text in after.values())
    assert b'baseurl: "https://ann.github.io/lab/"' in after["_config.yml"]
    assert b"colab.research.google.com/github/Ann/lab/blob/main/notebooks/01_a.ipynb" \
        in after["01_a.ipynb"]
    assert address(addressed, "--check") == ""
    assert address(addressed, "--set", "") == ""
    assert everything(addressed) == before


def test_canary_address_check_notices_what_was_edited_by_hand(addressed):
    assert address(addressed, "--check") == ""
    path = addressed / "CITATION.cff"
    with path.open("a") as file:
        file.write('repository-code: "https://github.com/x/y"\n')
    assert "CITATION.cff" in address(addressed, "--check")


@pytest.mark.parametrize("url", ["lab", "https://", "https://github.com/ann",
                                 'https://github.com/ann/l"ab', "javascript:alert(1)"])
def test_address_refuses_what_is_none(addressed, url):
    before = everything(addressed)
    assert "address:" in address(addressed, "--set", url)
    assert everything(addressed) == before


def test_first_cell_installs_labkit_from_the_repository(addressed, tmp_path_factory):
    """What Colab does, from a repository on disk: the cell's pip line, then the import."""
    pytest.importorskip("hatchling")
    if shutil.which("git") is None:
        pytest.skip("needs git")
    url = f"file://{addressed}"
    (addressed / "records/nvidia-h200").mkdir()
    (addressed / "records/nvidia-h200/tiny.json").write_text(json.dumps(RECORD))
    assert address(addressed, "--set", url) == ""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(addressed)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    cells = nbformat.read(addressed / "notebooks/01_a.ipynb", as_version=4).cells
    line = next(c for c in cells if c.get("id") == "first-cell").source
    wanted = re.search(r'%pip install --quiet "(labkit @ git\+[^"]+)"', line)
    assert wanted and wanted[1] == f"labkit @ git+{url}"
    target = tmp_path_factory.mktemp("elsewhere") / "site"
    done = run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
               "--no-build-isolation", "--target", str(target),
               # older pips refuse "name @ git+file:…", though they take "name @ git+https:…"
               wanted[1].removeprefix("labkit @ "), cwd=target.parent)
    assert done.returncode == 0, done.stderr
    code = (
        "import labkit, labkit.records as r; "
        f"assert labkit.__file__.startswith({str(target)!r}), labkit.__file__; "
        "print(r.load('tiny').value('speed'))"
    )
    done = run(sys.executable, "-c", code, cwd=target.parent, PYTHONPATH=str(target))
    assert done.stdout.split() == ["4280000000000.0"], done.stderr


# -- make and CI ---------------------------------------------------------------------------


def test_make_alone_lists_every_target_and_does_nothing():
    done = run("make", "-f", str(ROOT / "Makefile"))
    assert done.returncode == 0
    for target in ("book", "test", "execute", "lab", "serve", "record", "lint", "lock", "clean"):
        assert re.search(rf"make {target}\s+\w", done.stdout), target


@pytest.fixture
def bare(tmp_path) -> Path:
    """A clone without .venv, in a place of its own."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _old_python(folder: Path, body: str) -> str:
    tools = folder / "bin"
    tools.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    return f"{tools}:/usr/bin:/bin"


def test_make_says_that_python_is_too_old(bare):
    path = _old_python(bare, 'case "$1" in --version) echo Python 3.8.10;; *) exit 1;; esac')
    done = run("make", "book", cwd=bare, PATH=path)
    assert done.returncode != 0
    assert "found no Python 3.11 or newer (python3 is Python 3.8.10)" in done.stderr
    assert not (bare / ".venv").exists()


def test_make_says_that_venv_is_missing(bare):
    body = 'case "$*" in *ensurepip*) exit 1;; --version) echo Python 3.11.2;; *) exit 0;; esac'
    done = run("make", "book", cwd=bare, PATH=_old_python(bare, body))
    assert done.returncode != 0
    assert "Python 3.11.2 lacks venv" in done.stderr and "python3-venv" in done.stderr


def test_ci_builds_the_book_then_runs_the_tests_and_stops_at_the_first_failure(tmp_path):
    ci = ROOT / ".ci/run"
    assert os.access(ci, os.X_OK)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ci, tmp_path / ".ci/run")
    makefile = tmp_path / "Makefile"
    makefile.write_text("test:\n\t@echo ran-test CI=$$CI\nbook:\n\t@echo ran-book\n")
    done = run(str(tmp_path / ".ci/run"), cwd=Path("/"))
    assert done.returncode == 0 and done.stdout.split() == ["ran-book", "ran-test", "CI=true"]
    makefile.write_text("test:\n\t@echo ran-test\nbook:\n\t@echo ran-book; exit 1\n")
    done = run(str(tmp_path / ".ci/run"), cwd=Path("/"))
    assert done.returncode != 0 and "ran-test" not in done.stdout
    makefile.write_text("test:\n\t@exit 1\nbook:\n\t@echo ran-book\n")
    assert run(str(tmp_path / ".ci/run"), cwd=Path("/")).returncode != 0


def test_without_a_browser_ci_fails_and_a_laptop_is_told_what_to_do(tmp_path):
    pytest.importorskip("playwright")
    program = [sys.executable, str(ROOT / "tools/browser.py")]
    none = {"CHROMIUM": str(tmp_path / "none"), "PATH": str(tmp_path)}
    for ci, status in (("true", 1), ("", 0)):
        done = run(*program, "--install", **none, CI=ci)
        assert done.returncode == status
        assert "apt-get install chromium" in done.stderr
