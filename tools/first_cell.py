"""The cells at the head of every notebook that depend on where the repository lives.

    python tools/first_cell.py          # write them into notebooks/
    python tools/first_cell.py --check  # fail if a notebook has others

Every notebook's first code cell is the same.  It makes the notebook work on a bare machine such as
a Colab image: where labkit is missing it is installed from the repository.  The address comes from
``repository.url`` in ``_config.yml``, its only place; while it is empty the cell says what to do
instead.  With an address on GitHub a line above it links the notebook to Colab.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
CODE_ID, LINK_ID = "first-cell", "open-in-colab"

_MISSING = """\
import importlib.util

if importlib.util.find_spec("labkit") is None:
    raise ModuleNotFoundError("labkit is not installed here. Run `make lab` in the repository.")
"""
_INSTALL = """\
import importlib.util

if importlib.util.find_spec("labkit") is None:  # a bare machine, such as a Colab image
    %pip install --quiet "labkit @ git+{url}"
"""
_READY = """
from labkit import experiments

experiments.notebook()"""


def address(root: Path = ROOT) -> tuple[str, str]:
    """``repository.url`` (may be empty) and ``repository.branch`` of ``_config.yml``."""
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    return (repository.get("url") or "").rstrip("/"), repository.get("branch") or "main"


def source(url: str) -> str:
    """Source of the first code cell."""
    return (_INSTALL.format(url=url) if url else _MISSING) + _READY


def colab(url: str, branch: str, name: str) -> str | None:
    """Address that opens ``notebooks/name`` in Colab, which reads from GitHub only; or None."""
    parts = urlsplit(url)
    if parts.hostname != "github.com":
        return None
    path = parts.path.removesuffix(".git")
    return f"https://colab.research.google.com/github{path}/blob/{branch}/notebooks/{name}"


def put(notebook: NotebookNode, name: str, url: str, branch: str) -> NotebookNode:
    """Give ``notebook`` the head cells for this address; the rest and all outputs stay."""
    cells = [cell for cell in notebook.cells if cell.get("id") != LINK_ID]
    first = next((i for i, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
    has_one = first < len(cells) and (
        cells[first].get("id") == CODE_ID or 'find_spec("labkit")' in cells[first].source
    )
    if has_one:
        cell = cells[first]
    else:
        cell = nbformat.v4.new_code_cell()
        cells.insert(first, cell)
    cell.id, cell.source = CODE_ID, source(url)
    cell.metadata["tags"] = ["hide-input"]
    if link := colab(url, branch, name):
        # on the site the theme's own button does this, so the line is for Jupyter and GitHub
        line = nbformat.v4.new_markdown_cell(f"[Open this notebook in Colab]({link})")
        line.id, line.metadata["tags"] = LINK_ID, ["remove-cell"]
        cells.insert(min(1, first), line)
    notebook.cells = cells
    return notebook


def write(path: Path, notebook: NotebookNode) -> bool:
    """Write a notebook the one way it is written here; whether the file changed."""
    text = nbformat.writes(notebook, version=4).rstrip("\n") + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    url, branch = address()
    wrong = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        before = nbformat.read(path, as_version=4)
        after = put(nbformat.from_dict(before), path.name, url, branch)
        if arguments.check:
            if nbformat.writes(nbformat.read(path, as_version=4)) != nbformat.writes(after):
                wrong.append(path.name)
        elif write(path, after):
            print(f"notebooks/{path.name}: head cells written")
    if wrong:
        sys.exit(f"{', '.join(wrong)}: other head cells than this address gives. "
                 "Run `python tools/first_cell.py`.")


if __name__ == "__main__":
    main()
