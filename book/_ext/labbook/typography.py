"""Punctuation stays on the line of the formula that it belongs to.

A browser may break the line between an inline formula and the full stop after it, because it
takes the formula for an image.  Here both are put into a span that does not break.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

_AFTER = re.compile(r"[.,;:!?)\]’”%]+|-\w+|’s")
_BEFORE = re.compile(r"[(\[“]+$")


class KeepPunctuation(SphinxPostTransform):
    """``math, "."`` becomes ``span.lab-together(math, ".")``."""

    default_priority = 800
    formats = ("html",)

    def run(self, **kwargs) -> None:
        for math in list(self.document.findall(nodes.math)):
            parent = math.parent
            index = parent.index(math)
            after = parent[index + 1] if index + 1 < len(parent) else None
            before = parent[index - 1] if index else None
            tail = _AFTER.match(after) if isinstance(after, nodes.Text) else None
            head = _BEFORE.search(before) if isinstance(before, nodes.Text) else None
            if not (tail or head):
                continue
            together = nodes.inline("", "", classes=["lab-together"])
            parent[index] = together
            if head:
                together += nodes.Text(head[0])
            together += math
            if tail:
                together += nodes.Text(tail[0])
                parent[index + 1] = nodes.Text(after[tail.end():])
            if head:
                parent[index - 1] = nodes.Text(before[:head.start()])


def setup(app: Sphinx) -> None:
    app.add_post_transform(KeepPunctuation)
