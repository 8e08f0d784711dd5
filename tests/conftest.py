"""Fixtures for every test, and the one line that must run before Triton is imported.

Without a GPU the kernels run in Triton's interpreter.  Triton decides that when
it is imported (its own library functions are decorated then), so the variable is
set here, before any test module can import it.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU that torch can use (skipped without one)")


#: files that take longest: begun last, one of them would keep a worker busy while the others wait
LONGEST = (
    "test_site.py", "test_gates.py", "test_flash_hopper.py", "08_flash_forward.ipynb",
    "test_explorers_in_book.py", "test_flash_mutants.py", "test_kernels.py", "04_roofline.ipynb",
    "15_half_rate.ipynb", "02_what_grows.ipynb", "test_widgets.py", "test_io_law.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    rank = {name: n for n, name in enumerate(LONGEST)}
    # then the other notebooks: each starts a kernel, and is longer than most files of tests
    items.sort(key=lambda i: (rank.get(i.path.name, len(LONGEST)), i.path.suffix != ".ipynb"))
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU that torch can use; this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _spared_by_the_collector():
    """What is there before a file's tests is not searched for garbage again.

    ``labkit.memory.measure`` collects garbage before it measures, and would walk over all of
    torch and all of pytest's tests each time: half a second, for nothing.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Each test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run on this machine: ``"cuda"``, or ``"cpu"`` through the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def clean_env(monkeypatch) -> dict[str, str]:
    """An environment for a subprocess that must see Triton's compiler, not its interpreter."""
    env = dict(os.environ)
    env.pop("TRITON_INTERPRET", None)
    return env
