"""``{rec}`4.28 TB/s <hierarchy:copy_peak>```: a figure that cannot drift from its record.

labkit.records does the checking; here a mismatch becomes a Sphinx warning, which fails the build,
and a match becomes a link to the page that says how it was measured, with GPU, date and commit as
its tooltip.  The page is rebuilt when the record changes.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from labkit import records
from labkit.errors import RecordError

logger = logging.getLogger(__name__)

#: the page that explains records; quotes link to it
EXPLAINED_ON = "book/how_measured"

_ROLE = re.compile(r"(?P<text>.+?)\s*<(?P<target>[^<>]+)>", re.DOTALL)


def _split(target: str) -> tuple[str, str, str]:
    """``machine/experiment:key`` → its three parts; the machine may be left out."""
    place, _, key = target.partition(":")
    machine, _, experiment = place.rpartition("/")
    return machine or records.DEFAULT_MACHINE, experiment, key


def provenance(record: records.Record) -> str:
    """One line: which GPU, which day, which commit."""
    commit = f"commit {record.commit[:10]}" if record.commit != "unknown" else "commit unknown"
    if record.dirty:
        commit += " with local changes"
    return f"{record.machine.get('gpu') or record.machine.get('cpu')}, {record.date[:10]}, {commit}"


class rec_quote(nodes.inline):
    """A checked figure: ``title`` is the tooltip; the text is the child."""


def _visit_html(translator, node: rec_quote) -> None:
    builder = translator.builder
    href = builder.get_relative_uri(builder.current_docname, EXPLAINED_ON)
    translator.body.append(
        translator.starttag(node, "a", "", CLASS="rec", href=href, title=node["title"])
    )


def _depart_html(translator, node: rec_quote) -> None:
    translator.body.append("</a>")


def _pass(translator, node) -> None:
    """Other builders show the text alone."""


class Rec(SphinxRole):
    """The role itself."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        location = self.get_location()
        match = _ROLE.fullmatch(self.text.strip())
        if match is None:
            logger.warning(
                "rec: %r names no record; write {rec}`4.28 TB/s <experiment:key>`",
                self.text, location=location, type="rec",
            )
            return [nodes.inline(self.rawtext, self.text)], []
        text, target = match["text"].strip(), match["target"].strip()
        root = Path(self.env.srcdir) / "records"
        try:
            machine, experiment, _key = _split(target)
            self.env.note_dependency(str(root / machine / f"{experiment}.json"))
            record = records.check_quote(text, target, root=root)
        except RecordError as error:
            logger.warning("rec: %s", error, location=location, type="rec")
            return [nodes.inline(self.rawtext, text)], []
        node = rec_quote(self.rawtext, text)
        node["title"] = f"Measured: {provenance(record)} · record {machine}/{experiment}"
        return [node], []


class RecordsTable(SphinxDirective):
    """``records-table``: every record of the repository with where it comes from."""

    HEADINGS = ("Record", "GPU", "Date (UTC)", "Software", "Commit", "Figures")

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir) / "records"
        lines = []
        for machine, experiments in records.available(root).items():
            for experiment in experiments:
                self.env.note_dependency(str(root / machine / f"{experiment}.json"))
                try:
                    record = records.load(experiment, machine, root=root)
                except RecordError as error:
                    logger.warning("rec: %s", error, location=self.get_location(), type="rec")
                    continue
                about = record.machine
                software = ", ".join(
                    f"{name} {about[name]}"
                    for name in ("torch", "triton", "cuda", "driver", "python")
                    if about.get(name)
                )
                commit = record.commit[:10] + ("*" if record.dirty else "")
                lines.append((
                    f"{machine}/{experiment}", about.get("gpu") or "none (CPU)",
                    record.date[:10], software, commit, str(len(record.results)),
                ))
        # A new file in records/ changes this page although no noted file changed.
        self.env.note_reread()
        if not lines:
            return [nodes.paragraph("", "This copy of the repository holds no records.")]
        return [self._table(lines)]

    def _table(self, lines: list[tuple[str, ...]]) -> nodes.table:
        group = nodes.tgroup(cols=len(self.HEADINGS))
        group += [nodes.colspec(colwidth=1) for _ in self.HEADINGS]
        head, body = nodes.thead(), nodes.tbody()
        group += [head, body]
        for part, rows in ((head, [self.HEADINGS]), (body, lines)):
            for row in rows:
                part += nodes.row("", *(
                    nodes.entry("", nodes.paragraph("", text)) for text in row
                ))
        return nodes.table("", group, classes=["records-table"])


def setup(app: Sphinx) -> None:
    app.add_role("rec", Rec())
    app.add_directive("records-table", RecordsTable)
    app.add_node(
        rec_quote, html=(_visit_html, _depart_html),
        latex=(_pass, _pass), text=(_pass, _pass), man=(_pass, _pass), texinfo=(_pass, _pass),
    )
