"""What a page must have, checked while it is built; a lack is a warning and fails the build."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def notebook_faults(notebook: dict) -> list[str]:
    """Why the stored outputs of a notebook cannot be shown; empty if they can."""
    faults = []
    if notebook.get("metadata", {}).get("kernelspec", {}).get("name") != "python3":
        faults.append("its kernel is not the plain 'python3'")
    unrun = []
    for index, cell in enumerate(notebook["cells"], start=1):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        if cell.get("execution_count") is None:
            unrun.append(str(index))
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                faults.append(f"cell {index} raised {output.get('ename')}")
            elif output.get("name") == "stderr":
                faults.append(f"cell {index} wrote to stderr")
    if len(unrun) == 1:
        faults.append(f"cell {unrun[0]} was not executed")
    elif unrun:
        faults.append(f"cells {', '.join(unrun)} were not executed")
    return faults


def _notebook(app: Sphinx, docname: str, source: list[str]) -> None:
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    for fault in notebook_faults(json.loads(source[0])):
        logger.warning(
            "notebook: %s. Run `make execute`.", fault, location=docname, type="labbook"
        )


class _Images(HTMLParser):
    """Finds images in raw HTML that say nothing to those who do not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = dict(attrs)
        if tag == "img" and not (has.get("alt") or "").strip():
            self.silent.append(self.get_starttag_text() or tag)
        if tag == "svg" and not (
            has.get("aria-hidden") == "true"
            or (has.get("aria-label") or has.get("aria-labelledby") or "").strip()
        ):
            self.silent.append(self.get_starttag_text() or tag)


def silent_images(html: str) -> list[str]:
    """Start tags of the images in ``html`` that have no text alternative."""
    # a script may hold markup as strings; what it draws is tested in a browser
    parser = _Images()
    parser.feed(re.sub(r"<script\b.*?</script>", "", html, flags=re.DOTALL | re.IGNORECASE))
    return parser.silent


def _alt(app: Sphinx, doctree: nodes.document) -> None:
    for image in doctree.findall(nodes.image):
        if not image.get("alt", "").strip():
            logger.warning(
                "image without alt text: %s", image.get("uri"), location=image, type="labbook"
            )
    for raw in doctree.findall(nodes.raw):
        if "html" in raw.get("format", "").split():
            for tag in silent_images(raw.astext()):
                logger.warning(
                    "image without alt text: %s", tag[:120], location=raw, type="labbook"
                )


def setup(app: Sphinx) -> None:
    app.connect("source-read", _notebook)
    app.connect("doctree-read", _alt)
