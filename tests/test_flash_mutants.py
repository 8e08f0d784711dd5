"""The checks can fail: each of these broken kernels is noticed, and for the right reason.

A test suite that passes proves something only if it would not pass on a broken kernel.  Here is
a table of mistakes that people have made (flash_mutants.MUTANTS), each put into a copy of
``labkit.flash``, and the check that must complain.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flash_cases import CHECKS
from flash_mutants import MUTANTS

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """``{name: {"outcome", "why"}}`` of every mutant, run side by side."""
    done = subprocess.run(
        [sys.executable, str(HERE / "flash_mutants.py"), str(tmp_path_factory.mktemp("mutants"))],
        env={
            **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        },
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(MUTANTS), done.stderr[-2000:]
    return {line["name"]: line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS[1:], ids=lambda m: m.name.replace(" ", "_"))
def test_a_broken_kernel_is_noticed(mutant, found):
    outcome = found[mutant.name]
    assert outcome["outcome"] == "killed", outcome
    assert mutant.says in outcome["why"], f"killed for another reason: {outcome['why']}"


@pytest.mark.slow
def test_the_copy_itself_passes(found):
    """Else every mutant would be killed by whatever is wrong with the copy."""
    assert MUTANTS[0].old == MUTANTS[0].new
    assert found[MUTANTS[0].name]["outcome"] == "alive", found[MUTANTS[0].name]


def test_every_check_kills_something_and_every_mutant_has_its_own_name():
    assert {m.check for m in MUTANTS} == set(CHECKS)
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) > 20
