"""What depends on where the repository and the site live.

``repository.url`` in ``_config.yml`` is empty until ``make address`` sets it.  Only then do pages
carry links to the repository and to Colab.  ``html.baseurl`` likewise switches link previews and
the sitemap on: without an address both would hold wrong ones.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

logger = logging.getLogger(__name__)

COLAB = "https://colab.research.google.com"


def _links(app: Sphinx, config: Config) -> None:
    options = config.html_theme_options
    url = options.get("repository_url", "").rstrip("/")
    if not url:
        # the theme would draw buttons to a repository that does not exist
        options.pop("repository_url", None)
        options.pop("launch_buttons", None)
        return
    options.update(
        repository_url=url,
        use_repository_button=True,
        use_issues_button=True,
        use_edit_page_button=True,
    )
    if urlsplit(url).hostname == "github.com":  # Colab opens notebooks from GitHub only
        options["launch_buttons"] = {"colab_url": COLAB, "notebook_interface": "jupyterlab"}


def setup(app: Sphinx) -> None:
    if app.config.html_baseurl:
        app.setup_extension("sphinxext.opengraph")
        app.setup_extension("sphinx_sitemap")
        app.config.ogp_site_url = app.config.html_baseurl
        app.config.ogp_use_first_image = True
        app.config.ogp_social_cards = {"enable": False}
        app.config.sitemap_url_scheme = "{link}"
        app.config.sitemap_show_lastmod = False
    # before the theme reads its options
    app.connect("config-inited", _links, priority=100)
