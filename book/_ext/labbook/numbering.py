"""A chapter has the number of its file: ``notebooks/12_….ipynb`` is chapter 12.

Sphinx counts the chapters that are there.  This book is written part by part, and a chapter that
is still to come would move the number of every later one away from what the prose calls it.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles as Collector

_CHAPTER = re.compile(r"notebooks/(\d\d)_")


def renumber(env: BuildEnvironment) -> None:
    """Put the file's number first in every section number of a chapter."""
    for page, numbers in env.toc_secnumbers.items():
        chapter = _CHAPTER.match(page)
        if not chapter:
            continue
        first = int(chapter[1])
        env.toc_secnumbers[page] = {
            anchor: (first, *number[1:]) if number else number
            for anchor, number in numbers.items()
        }
        for node in (env.titles[page], *env.tocs[page].findall(nodes.reference)):
            if node.get("secnumber"):
                node["secnumber"] = [first, *node["secnumber"][1:]]


def _wrap(_app: Sphinx) -> None:
    count = Collector.assign_section_numbers
    if getattr(count, "by_file", False):
        return

    def assign_section_numbers(self, env: BuildEnvironment) -> list[str]:
        before = env.toc_secnumbers
        count(self, env)
        renumber(env)
        return [page for page, now in env.toc_secnumbers.items() if before.get(page) != now]

    assign_section_numbers.by_file = True
    Collector.assign_section_numbers = assign_section_numbers


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", _wrap)
