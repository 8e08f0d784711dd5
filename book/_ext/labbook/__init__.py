"""The book's own Sphinx extension.

``quotes``      the ``rec`` role: a measured figure, checked against its record; a list of records
``figures``     notebook figures in a light and a dark form, with alt text
``checks``      every notebook is executed, every image has alt text
``site``        links that exist only once the repository's address is set
``docstrings``  labkit's docstrings as napoleon wants them
``ledger``      the claims ledger, computed while the book is built
``numbering``   a chapter has the number of its file
``typography``  punctuation that stays with its formula
"""

from __future__ import annotations

from sphinx.application import Sphinx

from . import checks, docstrings, figures, ledger, numbering, quotes, site, typography


def setup(app: Sphinx) -> dict:
    for part in (quotes, figures, checks, site, docstrings, ledger, numbering, typography):
        part.setup(app)
    # version enters Sphinx's cache key: raise it when the doctrees would change
    safe = {"parallel_read_safe": True, "parallel_write_safe": True}
    return {"version": "3", "env_version": 3, **safe}
