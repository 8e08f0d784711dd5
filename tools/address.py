"""Set the repository's address, and rewrite everything that is derived from it.

    make address URL=https://github.com/owner/name      # set it
    make address URL=                                    # take it out again
    make address                                         # derive again from _config.yml
    python tools/address.py --check                      # fail if something derived differs

The address stands in ``_config.yml`` (``repository.url``; for GitHub also the address of the Pages
site, ``html.baseurl``).  Derived: the notebooks' head cells, pyproject.toml, CITATION.cff, and the
part of README.md between its ``address`` comments.  An empty address takes all of them out again.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import first_cell
import nbformat

ROOT = Path(__file__).resolve().parent.parent
_FORMS = ("https", "http", "file", "ssh")


def pages(url: str) -> str:
    """Address of the GitHub Pages site of a repository on GitHub, else empty."""
    parts = urlsplit(url)
    if parts.hostname != "github.com":
        return ""
    owner, name = parts.path.removesuffix(".git").strip("/").split("/")
    site = f"{owner.lower()}.github.io"
    return f"https://{site}/" if name.lower() == site else f"https://{site}/{name}/"


def checked(url: str) -> str:
    """``url`` without a trailing slash; exits with what to write instead if it is none."""
    url = url.strip().rstrip("/").removesuffix(".git") if not url.startswith("file:") else url
    parts = urlsplit(url)
    if url and (parts.scheme not in _FORMS or not parts.path.strip("/")):
        sys.exit(f"address: {url!r} is no address of a repository. "
                 "Write it like URL=https://github.com/owner/name")
    if parts.hostname == "github.com" and len(parts.path.strip("/").split("/")) != 2:
        sys.exit(f"address: {url!r} is not of the form https://github.com/owner/name")
    if re.search(r"[\s\"'\\<>`]", url):
        sys.exit(f"address: {url!r} holds a character that no address has.")
    return url


def _config(text: str, url: str) -> str:
    text = re.sub(r'(?m)^(  url:) ".*"$', lambda m: f'{m[1]} "{url}"', text, count=1)
    return re.sub(r'(?m)^(  baseurl:) ".*"$', lambda m: f'{m[1]} "{pages(url)}"', text, count=1)


def _pyproject(text: str, url: str) -> str:
    text = re.sub(r"(?m)^\[project\.urls\]\n(?:[^\[\n].*\n)*\n", "", text)
    if not url:
        return text
    lines = ["[project.urls]", f'Repository = "{url}"']
    if site := pages(url):
        lines.append(f'Documentation = "{site}"')
    head, mark, rest = text.partition("[project.scripts]")
    return head + "\n".join(lines) + "\n\n" + mark + rest


def _citation(text: str, url: str) -> str:
    text = re.sub(r"(?m)^(?:repository-code|url): .*\n", "", text)
    if url:
        text = text.rstrip("\n") + f'\nrepository-code: "{url}"\n'
        if site := pages(url):
            text += f'url: "{site}"\n'
    return text


def _readme(text: str, url: str, branch: str, notebooks: list[str]) -> str:
    lines = []
    if url:
        clone = f"git clone {url}"
        lines += ["", "```bash", clone, f"cd {Path(urlsplit(url).path).name}", "make book", "```"]
        if site := pages(url):
            lines += ["", f"Read it online: <{site}>"]
        links = [(name, first_cell.colab(url, branch, name)) for name in notebooks]
        if any(link for _, link in links):
            lines += ["", "Open a chapter in Colab: " + " · ".join(
                f"[{name[:2]}]({link})" for name, link in links) + "."]
        lines.append("")
    block = "<!-- address -->" + ("\n" + "\n".join(lines) if lines else "") + "<!-- /address -->"
    return re.sub(r"<!-- address -->.*?<!-- /address -->", lambda _: block, text, flags=re.DOTALL)


def derived(root: Path, url: str, branch: str) -> dict[Path, str]:
    """Every derived file with the text that this address gives."""
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    names = [path.name for path in notebooks]
    files = {
        root / "_config.yml": lambda text: _config(text, url),
        root / "pyproject.toml": lambda text: _pyproject(text, url),
        root / "CITATION.cff": lambda text: _citation(text, url),
        root / "README.md": lambda text: _readme(text, url, branch, names),
    }
    texts = {path: change(path.read_text(encoding="utf-8")) for path, change in files.items()}
    for path in notebooks:
        notebook = first_cell.put(nbformat.read(path, as_version=4), path.name, url, branch)
        texts[path] = nbformat.writes(notebook).rstrip("\n") + "\n"
    return texts


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", metavar="URL", help="the new address; '' to take it out")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args(argv)
    now, branch = first_cell.address(root)
    url = now if arguments.set is None else checked(arguments.set)
    changed = []
    for path, text in derived(root, url, branch).items():
        if path.read_text(encoding="utf-8") != text:
            changed.append(str(path.relative_to(root)))
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    if arguments.check and changed:
        sys.exit(f"{', '.join(changed)}: not what the address {url!r} gives. Run `make address`.")
    if not arguments.check:
        print(f"The repository's address is {url or 'not set'}.")
        print(f"Changed: {', '.join(changed) or 'nothing'}.")
        if now == url == "":
            print("Set it with: make address URL=https://github.com/owner/name")


if __name__ == "__main__":
    main()
