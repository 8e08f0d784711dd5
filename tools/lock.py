"""Write requirements.txt: what pyproject.toml asks for and everything that needs, exact versions.

    make lock                       # from the versions installed in .venv
    python tools/lock.py --check    # fail if requirements.txt is not what would be written

The versions are the ones installed; this file decides which packages belong and under which
environment markers, so that one lock serves Python 3.11 and 3.12, with and without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.txt"

#: build tools of labkit itself: `pip install -e . --no-build-isolation` asks no index for them
BUILD = ("hatchling>=1.24", "editables>=0.5")
PYTHONS = ("3.11", "3.12")
#: packages that exist for some platforms only
MARKERS = {"triton": 'sys_platform == "linux"'}

HEAD = """\
# A lock: what the course needs, exact versions, everything they need in turn included.
# Written by `make lock` (tools/lock.py) from pyproject.toml; do not edit.
#
#     python3.11 -m pip install -r requirements.txt
#
# torch is named without a build tag, so a CPU wheel (torch 2.13.0+cpu) and PyPI's CUDA wheel both
# satisfy it.  The CUDA wheel brings its own nvidia-* packages, at the versions that torch names;
# listed here, they would be gigabytes for machines without a GPU.
"""


def environments() -> Iterable[dict[str, str]]:
    for python in PYTHONS:
        yield {
            **default_environment(), "python_version": python, "python_full_version": f"{python}.0",
            "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
        }


def wanted() -> list[Requirement]:
    """labkit's dependencies, those of its extras, and its build tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *BUILD]
    for extra in project["optional-dependencies"].values():
        lines += extra
    return [Requirement(line) for line in lines]


def closure(roots: Iterable[Requirement]) -> dict[str, str]:
    """``{name: version}`` of every package that ``roots`` need, directly or not."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    missing: dict[str, str] = {}
    todo = [(root, "pyproject.toml") for root in roots]
    while todo:
        requirement, because = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing[name] = because
            continue
        if not requirement.specifier.contains(dist.version, prereleases=True):
            sys.exit(f"lock: {because} needs {requirement}; {dist.version} is installed.")
        found[name] = dist.version.partition("+")[0]  # no build tag: see HEAD
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in dist.requires or ():
                needed = Requirement(line)
                if needed.marker is None or any(
                    needed.marker.evaluate({**environment, "extra": extra})
                    for environment in environments()
                ):
                    todo.append((needed, name))
    if missing:
        lacks = ", ".join(f"{name} (needed by {why})" for name, why in sorted(missing.items()))
        sys.exit(f"lock: not installed here: {lacks}. Install them into .venv first.")
    return found


def text() -> str:
    lines = []
    for name, version in sorted(closure(wanted()).items()):
        marker = MARKERS.get(name)
        lines.append(f"{name}=={version}" + (f" ; {marker}" if marker else ""))
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    new = text()
    if not arguments.check:
        LOCK.write_text(new, encoding="utf-8")
        print(f"requirements.txt: {new.count('==')} packages")
    elif LOCK.read_text(encoding="utf-8") != new:
        sys.exit("requirements.txt differs from what pyproject.toml and .venv give: `make lock`.")


if __name__ == "__main__":
    main()
