"""The repository's rules, as tests: what is imported, what is committed, what agrees with what.

Each rule is a function that returns what breaks it; the canaries at the end feed it something
broken and see it noticed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from labkit import records

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TESTS = sorted((ROOT / "tests").glob("test_*.py"))


def tracked() -> list[Path]:
    """Files that git knows, new ones included; without git, what a clone would hold."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )
    if listed.returncode == 0:
        names = listed.stdout.split("\0")
        return sorted(path for name in names if name and (path := ROOT / name).is_file())
    skipped = {".venv", "_build", ".git", "__pycache__", ".pytest_cache", ".ruff_cache",
               ".hypothesis", ".triton", ".ipynb_checkpoints", "dist"}
    return sorted(p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.parts))


# -- layers ------------------------------------------------------------------------

LAYERS = (
    {"errors"},
    {"units", "dtypes", "closed_form", "shapes"},
    {"hardware", "memory", "roofline"},
    {"naive", "online_softmax"},
    {"kernels"},
    {"io", "flash"},
    {"nsa", "patterns"},
    {"layers"},
    {"timing", "records", "dispatch", "experiments"},
    {"plots", "explorers", "widgets"},
    {"claims", "exercises", "doctor", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
#: what a function may import from above when it is called: drawing, nothing else
LAZY = {"plots"}


@cache
def labkit_imports(source: str) -> tuple[tuple[str, bool], ...]:
    """``(submodule, at import time)`` for every import of labkit in ``source``."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue  # most of a tree, and an import is a statement
            if isinstance(child, ast.ImportFrom) and child.module and not child.level:
                parts = child.module.split(".")
                if parts[0] == "labkit":
                    names = [parts[1]] if len(parts) > 1 else [a.name for a in child.names]
                    yield from ((name, top) for name in names)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    parts = alias.name.split(".")
                    if parts[0] == "labkit" and len(parts) > 1:
                        yield parts[1], top
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from walk(child, top and not inside)

    return tuple(walk(ast.parse(source), True))


def upward(module: str, source: str) -> list[str]:
    """Imports of ``labkit.<module>`` that go up."""
    faults = []
    for name, at_import in labkit_imports(source):
        if name not in LEVEL:
            continue  # __version__ and the like
        lazily_allowed = not at_import and name in LAZY
        if LEVEL[name] > LEVEL[module] and not lazily_allowed:
            faults.append(f"labkit.{module} imports labkit.{name}, which lies above it")
    return faults


def modules() -> Iterator[tuple[str, Path]]:
    """``(first-level name, file)`` for every file of labkit."""
    for path in sorted((ROOT / "labkit").rglob("*.py")):
        parts = path.relative_to(ROOT / "labkit").with_suffix("").parts
        if parts != ("__init__",) and parts[0] != "_records":
            yield parts[0], path


def test_every_module_has_a_layer():
    assert {name for name, _ in modules()} <= set(LEVEL)


def test_modules_import_downwards_only():
    faults = [fault for name, path in modules() for fault in upward(name, path.read_text("utf-8"))]
    assert faults == []


def test_modules_of_one_layer_do_not_import_in_a_circle():
    graph: dict[str, set[str]] = {}
    for name, path in modules():
        at_import = {to for to, top in labkit_imports(path.read_text("utf-8")) if top}
        graph.setdefault(name, set()).update((at_import & set(LEVEL)) - {name})
    order: list[str] = []
    while graph:
        free = sorted(name for name, needs in graph.items() if not needs & set(graph))
        assert free, f"these import each other: {sorted(graph)}"
        order += free
        for name in free:
            del graph[name]
    assert order[0] == "errors"


def _python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_import_labkit_is_quick_and_loads_neither_torch_nor_triton():
    code = (
        "import time; start = time.perf_counter(); import labkit; "
        "took = time.perf_counter() - start; import sys; "
        "print(took, 'torch' in sys.modules, 'triton' in sys.modules)"
    )
    runs = [_python(code).stdout.split() for _ in range(3)]
    assert min(float(took) for took, *_ in runs) < 0.2
    assert all(loaded == ["False", "False"] for _, *loaded in runs)


@pytest.mark.parametrize(
    "name",
    [n for n in ("closed_form", "dtypes", "hardware", "memory", "roofline", "records",
                 "experiments", "explorers", "exercises", "doctor")],
)
def test_models_and_records_need_no_torch(name):
    code = f"import sys, labkit.{name}; print('torch' in sys.modules, 'triton' in sys.modules)"
    assert _python(code).stdout.split() == ["False", "False"]


# -- what is committed ---------------------------------------------------------------

_PRIVATE = re.compile(r"/(?:root|work|home/(?!you\b|user\b)\w+|Users/(?!you\b)\w+)/[\w.]")
#: they name folders of a machine that is made for the job
_OTHER_MACHINES = (".github/", ".devcontainer/")
_BINARY = {".png", ".woff", ".jpg", ".ico"}


def private_paths(text: str, host: str = "") -> list[str]:
    """Paths and names in ``text`` that mean something on one machine only."""
    found = [match[0] for match in _PRIVATE.finditer(text)]
    if len(host) > 5 and host in text:
        found.append(host)
    return found


def test_no_tracked_file_names_a_path_or_host_of_one_machine():
    host = socket.gethostname()
    faults = {}
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in _BINARY or name.startswith(("book/_vendor/", *_OTHER_MACHINES)):
            continue
        if found := private_paths(path.read_text("utf-8"), host):
            faults[name] = found[:3]
    assert faults == {}


def test_vendored_files_are_the_published_ones():
    folder = ROOT / "book/_vendor/mathjax"
    lines = (folder / "sha256.txt").read_text().splitlines()
    listed = dict(reversed(line.split(maxsplit=1)) for line in lines)
    there = {
        f"./{path.relative_to(folder).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*") if path.suffix in (".js", ".woff")
    }
    assert there == listed


def test_no_file_is_larger_than_a_reader_should_download():
    big = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked() if p.stat().st_size > 3e6}
    assert big == {}


# -- notebooks -------------------------------------------------------------------------


def _labbook():
    pytest.importorskip("sphinx")
    sys.path[:0] = [str(ROOT / "book/_ext")]
    from labbook import checks

    return checks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_executed_and_silent_on_stderr(path):
    assert _labbook().notebook_faults(json.loads(path.read_text("utf-8"))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_written_the_one_way(path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("nbconvert")
    import execute

    notebook = execute.normalise(nbformat.read(path, as_version=4), path.name)
    same = nbformat.writes(notebook).rstrip("\n") + "\n" == path.read_text("utf-8")
    assert same, f"run: python tools/execute.py --normalise-only notebooks/{path.name}"


def test_what_depends_on_the_address_agrees_with_it():
    pytest.importorskip("nbformat")
    import address
    import first_cell

    url, branch = first_cell.address(ROOT)
    stale = [
        path.name for path, text in address.derived(ROOT, url, branch).items()
        if path.read_text("utf-8") != text
    ]
    assert stale == [], "run: make address"


_FILE = re.compile(r"labkit/[\w/]+(?:\.py|/)")
_TAUGHT = re.compile(r"chapters?\s+((?:\d\d)(?:\s*(?:,|and|to|–)\s*\d\d)*)", re.IGNORECASE)


def _prose(path: Path) -> str:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def _docstring(name: str) -> str:
    path = ROOT / name
    path = path / "__init__.py" if path.is_dir() else path
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_names_the_files_it_teaches_and_one_of_them_names_it(path):
    chapter = path.stem[:2]
    files = sorted(set(_FILE.findall(_prose(path))))
    assert files, f"{path.name} names no file of labkit"
    missing = [name for name in files if not (ROOT / name).exists()]
    assert missing == []
    assert any(
        chapter in match for name in files for match in _TAUGHT.findall(_docstring(name))
    ), f"none of {files} says in its docstring that chapter {chapter} teaches it"


def test_modules_that_name_a_chapter_are_named_by_it():
    there = {path.stem[:2]: _prose(path) for path in NOTEBOOKS}
    faults = []
    for _, path in modules():
        name = path.relative_to(ROOT).as_posix()
        first = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").replace("\n", " ")
        for sentence in re.findall(r"Taught in .*?(?=, used|[.;]|$)", first):
            for chapter in re.findall(r"\b(\d\d)\b", sentence):
                folders = [f"{parent.as_posix()}/" for parent in Path(name).parents[:-2]]
                if chapter in there and not any(n in there[chapter] for n in (name, *folders)):
                    faults.append(f"{name} says chapter {chapter}, which does not name it")
    assert faults == []


# -- pages -----------------------------------------------------------------------------


def _toc_files() -> list[str]:
    yaml = pytest.importorskip("yaml")
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


def test_every_page_and_notebook_is_in_the_table_of_contents():
    pages = [*(ROOT / "book").glob("*.md"), *NOTEBOOKS]
    assert sorted(_toc_files()) == sorted(
        path.relative_to(ROOT).with_suffix("").as_posix() for path in pages
    )


_QUOTE = re.compile(r"<!-- rec: (?P<target>\S+) -->(?P<text>.*?)<!-- /rec -->", re.DOTALL)
_NUMBER = re.compile(r"\d[\d.,]* ?(?:[TGMk]B/s|TFLOP/s|ms|µs|ns|×|%|[TGM]iB|cycles)(?!\w)")


def readme_faults(text: str) -> list[str]:
    """Figures of a README that no record gives."""
    faults = []
    for match in _QUOTE.finditer(text):
        try:
            records.check_quote(match["text"], match["target"], root=ROOT / "records")
        except records.RecordError as error:
            faults.append(str(error))
    bare = _NUMBER.findall(_QUOTE.sub("", text))
    return faults + [f"{number!r} is quoted from no record" for number in bare]


def test_readme_quotes_only_what_is_recorded():
    assert readme_faults((ROOT / "README.md").read_text("utf-8")) == []


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)|src=\"(?!https?:)([^\"]+)\"", text)
    names = [a or b for a, b in links]
    assert names, "the README links to nothing"
    assert [name for name in names if not (ROOT / name).exists()] == []


# -- the lock ----------------------------------------------------------------------------

_PIN = re.compile(r"[a-z0-9][a-z0-9-]*==\d[\w.]*(?: ; [\w ]+[=!]= \"\w+\")?")


def lock_faults(text: str) -> list[str]:
    """Lines of a lock that do not name one exact version."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line for line in lines if not _PIN.fullmatch(line)]


def test_lock_holds_exact_versions_only():
    text = (ROOT / "requirements.txt").read_text("utf-8")
    assert lock_faults(text) == []
    assert text.count("==") > 50


def test_lock_is_what_pyproject_asks_for():
    from importlib import metadata

    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    pins = {line.split(" ;")[0] for line in lines if "==" in line}
    here = {f"{n}=={metadata.version(n).partition('+')[0]}" for n in ("torch", "numpy", "pytest")}
    if not here <= pins:
        pytest.skip("other versions are installed here than the lock names")
    import lock

    assert lock.text() == (ROOT / "requirements.txt").read_text("utf-8")


def test_lock_satisfies_the_lower_bounds():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        if "==" in line and not line.startswith("#"):
            pins[line.split("==")[0]] = line.split("==")[1].split(" ")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras]]
    lacking = [str(w) for w in wanted if pins.get(canonicalize_name(w.name)) not in w.specifier]
    assert lacking == []


def test_version_is_the_same_everywhere():
    import labkit

    assert f"version: {labkit.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"## {labkit.__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


# -- tests -------------------------------------------------------------------------------

_CHECKS = re.compile(r"_?(?:assert|check|expect|opcheck|fail|reject|accept)")


def vacuous_tests(source: str) -> list[str]:
    """Names of the test functions in ``source`` that cannot fail by what they look at."""

    def looks(node: ast.AST) -> bool:
        if isinstance(node, ast.Assert):
            return not (isinstance(node.test, ast.Constant) and node.test.value)
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            # subprocess.run(…, check=True) raises when the program it runs fails
            checked = any(
                k.arg == "check" and isinstance(k.value, ast.Constant) and k.value.value
                for k in node.keywords
            )
            return checked or name in ("raises", "warns") or bool(_CHECKS.match(name))
        return False

    functions = [
        node for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    return [f.name for f in functions if not any(looks(node) for node in ast.walk(f))]


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.stem)
def test_every_test_asserts(path):
    assert vacuous_tests(path.read_text("utf-8")) == []


def _duplicates(names: Iterable[str]) -> list[str]:
    names = list(names)
    return sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.stem)
def test_no_test_hides_another_of_its_name(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert _duplicates(n.name for n in tree.body if isinstance(n, ast.FunctionDef)) == []


# -- canaries: the rules above notice what they are for -------------------------------------


def test_canary_upward_import_is_noticed():
    assert upward("errors", "from labkit.units import bytes_text")
    assert upward("memory", "from labkit import kernels")
    assert upward("naive", "def f():\n    import labkit.timing")
    assert upward("memory", "from labkit import plots"), "at import time even plots is too high"
    assert upward("memory", "def plot():\n    from labkit import plots") == []
    assert upward("naive", "import labkit.memory") == []


def test_canary_private_path_is_noticed():
    assert private_paths("see /" + "root/x.py") and private_paths("/" + "home/ann/x")
    assert private_paths("ran on box-17f3", host="box-17f3")
    assert private_paths("/usr/bin/python3, /home/you/lab, labkit/work.py") == []


def test_canary_test_without_assertion_is_noticed():
    assert vacuous_tests("def test_a():\n    y = f(x)\n    y.shape == x.shape") == ["test_a"]
    assert vacuous_tests("def test_b():\n    assert True") == ["test_b"]
    assert vacuous_tests("def test_c():\n    assert f(2) == 4") == []
    assert vacuous_tests("def test_d():\n    with pytest.raises(ValueError):\n        f()") == []


def test_canary_loose_pin_is_noticed():
    assert lock_faults("numpy>=2\nnumpy==2.4.6\ntorch==2.13.0+cpu\n# x") == [
        "numpy>=2", "torch==2.13.0+cpu"]


def test_canary_unrecorded_figure_in_readme_is_noticed():
    assert readme_faults("It copies at 4.28 TB/s.")
    assert readme_faults("<!-- rec: nothing:here -->4.28 TB/s<!-- /rec -->")


def test_canary_unexecuted_notebook_is_noticed():
    checks = _labbook()
    cell = {"cell_type": "code", "source": "1 + 1", "execution_count": None, "outputs": []}
    meta = {"kernelspec": {"name": "python3"}}
    assert checks.notebook_faults({"metadata": meta, "cells": [cell]})
    cell["execution_count"] = 1
    assert checks.notebook_faults({"metadata": meta, "cells": [cell]}) == []
    cell["outputs"] = [{"output_type": "stream", "name": "stderr", "text": "warning"}]
    assert checks.notebook_faults({"metadata": meta, "cells": [cell]})
    assert checks.notebook_faults({"metadata": {}, "cells": []})
