"""Notebook figures: the light form and, where labkit.plots stored one, the dark form.

``labkit.plots.show`` keeps in the output's metadata what the PNG alone cannot say: ``alt`` (text
for readers who do not see it), ``dark`` (the same figure drawn for a dark page, base64) and
``width`` (CSS pixels).  MyST-NB ignores the first two, so this plug-in renders such outputs.
"""

from __future__ import annotations

import hashlib
from binascii import a2b_base64

from docutils import nodes
from myst_nb.core.render import MimeData, NbElementRenderer, load_mime_renders
from sphinx import addnodes
from sphinx.application import Sphinx

MIME = "image/png"


class LabFigure:
    """A MyST-NB MIME render plug-in (see ``myst_nb.core.render.MimeRenderPlugin``)."""

    mime_priority_overrides: tuple = ()

    @staticmethod
    def handle_mime(
        renderer: NbElementRenderer, data: MimeData, inline: bool
    ) -> list[nodes.Element] | None:
        about = data.output_metadata.get(MIME, {})
        if data.mime_type != MIME or "alt" not in about:
            return None

        def image(base64: str, theme: str) -> nodes.image:
            content = a2b_base64(base64)
            name = f"{hashlib.sha256(content).hexdigest()}.png"
            node = nodes.image(uri=renderer.write_file([name], content, exists_ok=True))
            node["alt"] = about["alt"]
            node["classes"] += ["lab-figure", theme]
            if "width" in about:
                node["width"] = f"{round(float(about['width']))}px"
            return node

        if not about.get("dark"):
            return [image(data.string, "dark-light")]
        # paper has one colour: only HTML gets the dark form
        dark = addnodes.only(expr="html")
        dark += image(about["dark"], "only-dark")
        return [image(data.string, "only-light"), dark]


def setup(app: Sphinx) -> None:
    # MyST-NB finds plug-ins through entry points of installed packages.  This one belongs to the
    # book and not to the labkit wheel, so it joins the (cached) list that MyST-NB reads.
    plugins = load_mime_renders()
    if LabFigure not in plugins:
        plugins.append(LabFigure)
