"""Run notebooks in place on the machine at hand, and write them the one way they are written.

    python tools/execute.py                                   # all of notebooks/
    python tools/execute.py notebooks/01_standard_attention.ipynb
    python tools/execute.py --normalise-only notebooks        # no run: metadata, ids, head cells

A notebook that fails is reported and left as it was; the others go on.  What changes from run to
run without meaning anything (times of execution, the interpreter's version, random cell ids) is
left out, so that a second run on the same machine changes no byte but measured outputs.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import fast_start  # noqa: F401 - before nbformat
import first_cell
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
#: an id that was given here; other tools give shorter ones
_ID = re.compile(r"[0-9a-f]{12}")
#: what a cell may say about itself
KEPT = ("tags", "mystnb")


def normalise(notebook: NotebookNode, name: str) -> NotebookNode:
    """Take out what varies without meaning: see the module's docstring.

    A new cell's id is made from what it says, so converting a draft again gives the same ids; an
    id once given stays, whatever is edited later.
    """
    first_cell.put(notebook, name, *first_cell.address(ROOT))
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    taken: set[str] = set()
    for cell in notebook.cells:
        cell.source = cell.source.rstrip()
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT})
        named = cell.id in (first_cell.CODE_ID, first_cell.LINK_ID) or _ID.fullmatch(cell.id)
        if not named or cell.id in taken:
            text = f"{cell.cell_type}\0{cell.source}"
            cell.id = hashlib.sha256(text.encode()).hexdigest()[:12]
            while cell.id in taken:
                cell.id = hashlib.sha256(cell.id.encode()).hexdigest()[:12]
        taken.add(cell.id)
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs)
            for output in cell.outputs:
                _drop_dead_widget(output)
    return notebook


def _drop_dead_widget(output: NotebookNode) -> None:
    """The controls die with the kernel; what a page shows is the figure stored beside them."""
    data = output.get("data", {})
    if len(data) > 1:
        data.pop(WIDGET_MIME, None)


def _merged(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """How often a stream was flushed depends on the machine: one output per run of text."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if output.output_type == "stream" and last is not None \
                and last.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def execute(path: Path, progress: Progress) -> str | None:
    """Run one notebook and write it; what went wrong, or None."""
    notebook = normalise(nbformat.read(path, as_version=4), path.name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    task = progress.add_task(path.name, total=len(code))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as sockets:
        client = NotebookClient(
            notebook, timeout=TIMEOUT_S, kernel_name="python3", record_timing=False,
            store_widget_state=False, resources={"metadata": {"path": str(path.parent)}},
            on_cell_executed=lambda **_: progress.advance(task),
            # socket files that only this user can open, instead of open TCP ports
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
        )
        try:
            client.execute()
        except (CellExecutionError, DeadKernelError, RuntimeError, TimeoutError) as error:
            progress.update(task, description=f"[red]{path.name}")
            return strip_ansi(str(error)).strip()
    for number, cell in enumerate(code, start=1):
        for output in cell.outputs:
            if output.get("name") == "stderr":
                return f"cell {number} wrote to stderr; a reader would see:\n{output.text.strip()}"
    first_cell.write(path, normalise(notebook, path.name))
    return None


def find(names: list[str]) -> list[Path]:
    """The notebooks named, or in the folders named."""
    paths: list[Path] = []
    for name in names or ["notebooks"]:
        path = Path(name) if Path(name).exists() else ROOT / name
        if path.is_dir():
            paths += sorted(path.glob("*.ipynb"))
        elif path.suffix == ".ipynb" and path.is_file():
            paths.append(path)
        else:
            sys.exit(f"execute: no notebook or folder {name!r}.")
    return [path.resolve() for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="notebooks or folders; all by default")
    parser.add_argument("--normalise-only", action="store_true", help="do not run anything")
    arguments = parser.parse_args()
    paths = find(arguments.notebooks)
    if arguments.normalise_only:
        for path in paths:
            if first_cell.write(path, normalise(nbformat.read(path, as_version=4), path.name)):
                print(f"{path.name}: normalised")
        return
    console = Console(stderr=True)
    failures: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("cells"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for path in paths:
            if fault := execute(path, progress):
                failures[path.name] = fault
    for name, fault in failures.items():
        console.rule(f"[red]{name} was left as it was")
        console.print(fault, markup=False, highlight=False, soft_wrap=True)
    done = len(paths) - len(failures)
    print(f"{done} of {len(paths)} notebooks executed and written.")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
