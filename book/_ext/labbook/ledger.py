"""``{labkit-claims}``: the claims ledger, made from ``labkit.claims`` while the book is built.

A cell that comes out otherwise than its verdict says is a Sphinx warning, which fails the build.
Recorded cells become ``rec`` roles, which note their records as what the page depends on.
"""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from labkit import claims, hardware, memory, roofline

logger = logging.getLogger(__name__)


class Claims(SphinxDirective):
    """The table of verdicts, then every table of the notes beside the computed one."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        for module in (claims, hardware, memory, roofline):
            self.env.note_dependency(str(Path(module.__file__).resolve()))
        for table in claims.comparisons():
            if not table.as_expected:
                logger.warning("labkit.claims: %s", table, location=self.get_location())
        text = claims.as_markdown(pages=self.env.found_docs)
        container = nodes.container(classes=["claims-ledger"])
        lines = StringList(text.splitlines(), source="labkit.claims")
        self.state.nested_parse(lines, self.content_offset, container)
        return container.children


def setup(app: Sphinx) -> None:
    app.add_directive("labkit-claims", Claims)
