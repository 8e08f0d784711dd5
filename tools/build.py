"""Build the site: Jupyter Book with warnings as errors, never green by cache.

    python tools/build.py            # what `make book` runs

Sphinx skips pages that it has read before, and with them their warnings, so a second run after a
failed one would pass.  Here a build that does not end well leaves no cache behind.  What Sphinx
does not track (configuration, style, labkit, deleted pages) makes a new build from scratch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: a change here means that every page may change
GLOBAL = ("_config.yml", "_toc.yml", "requirements.txt", "book/_ext", "book/_static",
          "book/_vendor", "book/references.bib", "labkit", "CHANGELOG.md")
#: a change here is for Sphinx to follow
PAGES = ("book", "notebooks", "records")


def digest(names: tuple[str, ...], root: Path) -> str:
    """A hash of the named files and folders: their paths and what is in them."""
    total = hashlib.sha256()
    for name in names:
        start = root / name
        for path in [start] if start.is_file() else sorted(start.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc" \
                    and ".ipynb_checkpoints" not in path.parts:
                total.update(f"{path.relative_to(root)}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two builds at once would write the same files: the second waits."""
    out.mkdir(exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(root: Path = ROOT) -> int:
    """Bring ``root/_build/html`` up to date; the exit status of Jupyter Book."""
    out = root / "_build"
    with _alone(out):
        return _build(root, out)


def _build(root: Path, out: Path) -> int:
    html, doctrees, good = out / "html", out / ".doctrees", out / ".good"
    now = [digest(GLOBAL, root), digest(PAGES, root)]
    before = good.read_text().split() if good.exists() else []
    if before == now and (html / "index.html").exists():
        print(f"Nothing has changed. {where(html)}")
        return 0
    if before[:1] != now[:1]:
        shutil.rmtree(html, ignore_errors=True)
    if not html.exists():
        for folder in (doctrees, out / "jupyter_execute"):
            shutil.rmtree(folder, ignore_errors=True)
    good.unlink(missing_ok=True)
    print("Building the book …", flush=True)
    start = time.monotonic()
    # -q leaves warnings and errors, which is what one wants to read
    status = subprocess.run(
        [sys.executable, "-c",  # fast_start.py says why not rfc3987_syntax
         "import sys; sys.modules['rfc3987_syntax'] = None; "
         "from jupyter_book.cli.main import main; main()",
         "build", str(root), "-q", "-n", "-W", "--keep-going"],
        cwd=root, check=False, stdin=subprocess.DEVNULL,
    ).returncode
    if status == 0:
        good.write_text("\n".join(now))
        print(f"Built in {time.monotonic() - start:.0f} s. {where(html)}")
    else:
        shutil.rmtree(doctrees, ignore_errors=True)
        print(
            "The build failed: every warning above counts. The pages that could be written are in "
            f"{html.relative_to(root)}, to look at.", file=sys.stderr,
        )
    return status


def where(html: Path) -> str:
    return f"Open {(html / 'index.html').as_uri()}, or run `make serve`."


if __name__ == "__main__":
    sys.exit(build())
