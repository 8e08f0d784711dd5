"""Find a Chromium for the browser tests, and install one where that is possible.

    python tools/browser.py            # print its path
    python tools/browser.py --install  # what `make test` runs

The tests drive the browser that is there; nothing is downloaded behind your back, except by
apt-get when you are root (as in a container).  With CI=true a missing browser is an error,
elsewhere the browser tests are skipped and say so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW_TO = (
    "Install one (`apt-get install chromium`, or `.venv/bin/python -m playwright install "
    "chromium`), or name one: CHROMIUM=/path/to/chrome make test"
)


def find() -> str | None:
    """Path of a Chromium or Chrome: ``$CHROMIUM``, then the PATH, then Playwright's own."""
    if own := os.environ.get("CHROMIUM"):
        return shutil.which(own)
    for name in NAMES:
        if (path := shutil.which(name)) and _runs(path):
            return path
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if os.path.exists(path) else None


def _runs(path: str) -> bool:
    """Ubuntu's chromium-browser without its snap is a script that only prints advice."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and b"Chrom" in done.stdout


def install() -> str | None:
    """Install Chromium with apt-get, as root only; its path, or None."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return None
    print("Installing Chromium for the browser tests …", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"],
                    ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        done = subprocess.run(command, env=environment, check=False, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL)
        if done.returncode:
            print(f"browser: `{' '.join(command)}` failed", file=sys.stderr)
            return None
    return find()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true")
    arguments = parser.parse_args()
    path = find() or (install() if arguments.install else None)
    if path:
        if not arguments.install:
            print(path)
        return
    in_ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
    print(f"browser: no Chromium found; the browser tests "
          f"{'cannot run' if in_ci else 'will be skipped'}. {HOW_TO}", file=sys.stderr)
    if in_ci or not arguments.install:
        sys.exit(1)


if __name__ == "__main__":
    main()
