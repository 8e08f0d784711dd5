"""The built book as a reader meets it: links that lead somewhere, pages that draw by themselves.

The site is brought up to date first (``tools/build.py``), so these tests also fail when the book
does not build.  The browser tests refuse every request to another host.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("jupyter_book")
yaml = pytest.importorskip("yaml")

pytest_plugins = ["browser"]

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build/html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
PAGES = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]
PHONE = {"width": 390, "height": 844}


@lru_cache
def _build() -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/build.py")], capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def _built(request) -> None:
    """One test fails for a book that does not build; the others have nothing to look at."""
    if _build().returncode and request.node.name != "test_the_book_builds":
        pytest.skip("the book does not build, see test_the_book_builds")


def test_the_book_builds():
    done = _build()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The site on a port of this machine: ``http://127.0.0.1:…``."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(HTML), **kwargs)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# -- without a browser --------------------------------------------------------------------


class _Document(HTMLParser):
    """What a page defines (ids), where it leads (links), and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {key: value or "" for key, value in attrs}
        self.ids |= {has[key] for key in ("id", "name") if key in has}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        if tag == "link" and has.get("rel") not in ("canonical", "license"):
            self.loads.append(has.get("href", ""))
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.loads.append(has.get("src", ""))


@lru_cache
def document(path: Path) -> _Document:
    return _Document(path.read_text("utf-8"))


def broken_links(page: Path) -> list[str]:
    """Links of a page, inside the site, that lead nowhere."""
    faults = []
    for link in document(page).links + document(page).loads:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or link in ("", "#"):
            continue
        target = page.parent / unquote(parts.path) if parts.path else page
        anchor = unquote(parts.fragment) if target.suffix == ".html" else ""
        if not target.exists() or (anchor and anchor not in document(target).ids):
            faults.append(link)
    return sorted(set(faults))


@pytest.mark.parametrize("page", [*PAGES, "search", "genindex", "index"])
def test_links_inside_the_site_lead_somewhere(page):
    assert broken_links(HTML / f"{page}.html") == []


@pytest.mark.parametrize("page", [*PAGES, "search", "genindex", "index"])
def test_page_loads_nothing_from_another_host(page):
    loads = document(HTML / f"{page}.html").loads
    assert [url for url in loads if urlsplit(url).netloc] == []
    assert page == "index" or any(url.endswith(".css") or ".css?" in url for url in loads)


@pytest.mark.parametrize("page", PAGES)
def test_page_has_one_title_and_headings_in_order(page):
    text = (HTML / f"{page}.html").read_text("utf-8")
    article = re.search(r"<article.*?</article>", text, re.DOTALL)
    assert article
    levels = [int(level) for level in re.findall(r"<h([1-6])\b", article[0])]
    assert levels.count(1) == 1 and levels[0] == 1
    skipped = [(a, b) for a, b in pairwise(levels) if b > a + 1]
    assert skipped == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks/")])
def test_a_chapter_has_the_number_of_its_file(page):
    text = (HTML / f"{page}.html").read_text("utf-8")
    number = int(Path(page).name[:2])
    heading = re.search(r"<h1>(?:<span[^>]*>)?(\d+)\. ", text)
    assert heading and int(heading[1]) == number
    equations = re.findall(r'class="eqno">\((\d+)', text)
    assert {int(first) for first in equations} <= {number}


def test_canary_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "b.html").write_text('<p id="here">', "utf-8")
    links = ("b.html", "b.html#here", "b.html#there", "c.html", "https://example.org/x", "#no")
    page = tmp_path / "a.html"
    page.write_text("".join(f'<a href="{link}">x</a>' for link in links), "utf-8")
    assert broken_links(page) == ["#no", "b.html#there", "c.html"]


def test_stylesheets_load_nothing_from_another_host():
    sheets = {p: p.read_text("utf-8", errors="replace") for p in HTML.rglob("*.css")}
    assert len(sheets) > 3
    foreign = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\s)]*")
    assert {p.name: found for p, text in sheets.items() if (found := foreign.findall(text))} == {}


# -- in a browser -----------------------------------------------------------------------


def _ready(page) -> None:
    """Waits until the page has drawn its mathematics."""
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.evaluate("() => document.fonts.ready.then(() => true)")


def _one_form_for_each_theme_and_the_light_one_on_paper(tab) -> None:
    """Each figure shows the form for the theme, and print is dark ink on bare paper."""
    shown = """() => ['only-light', 'only-dark'].map(c =>
                 [...document.querySelectorAll(`article img.${c}`)]
                   .filter(i => getComputedStyle(i).display != 'none').length)"""
    in_all = tab.evaluate("() => document.querySelectorAll('article img.only-light').length")
    for theme in ("light", "dark"):  # one load for both: the page follows the system's wish
        tab.emulate_media(media="screen", color_scheme=theme)
        tab.wait_for_function(
            "theme => document.documentElement.dataset.theme == theme", arg=theme, timeout=5000
        )
        assert tab.evaluate(shown) == ([in_all, 0] if theme == "light" else [0, in_all])
    tab.emulate_media(media="print", color_scheme="dark")  # the harder of the two to print
    assert tab.evaluate(shown) == [in_all, 0]
    ink, paper = tab.evaluate(
        """() => { const style = getComputedStyle(document.querySelector('article p'));
             const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
             return [numbers(style.color), numbers(style.backgroundColor)]; }"""
    )
    assert max(ink[:3]) < 90, "text on paper is dark"
    assert len(paper) == 4 and paper[3] == 0, "and has no ground of its own"


def _nothing_sticks_out_on_a_phone(tab) -> None:
    tab.emulate_media(media="screen", color_scheme="light")
    tab.set_viewport_size(PHONE)
    wide = tab.evaluate(
        """() => {
             const room = document.documentElement.clientWidth + 1;
             const scrolls = e => { for (; e; e = e.parentElement) {
               const flow = getComputedStyle(e).overflowX;
               if (['auto', 'scroll', 'hidden', 'clip'].includes(flow)) return true; } };
             return [...document.querySelectorAll('article *')]
               .filter(e => e.getBoundingClientRect().right > room && !scrolls(e.parentElement))
               .map(e => e.outerHTML.slice(0, 120));
           }""")
    assert wide == []
    assert tab.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"] + 1


@pytest.mark.browser
@pytest.mark.parametrize("page", PAGES)
def test_page_draws_by_itself_in_each_theme_on_paper_and_on_a_phone(page, site, open_page):
    """No request to another host, no script error (both by ``open_page``), nothing missing.

    One load for all of it: opening a page is what takes the time.
    """
    tab = open_page(viewport={"width": 1280, "height": 900})
    missing: list[str] = []
    tab.on("response", lambda r: missing.append(r.url) if r.status >= 400 else None)
    tab.goto(f"{site}/{page}.html")
    _ready(tab)
    assert missing == []
    assert tab.locator("mjx-merror, .problematic, .system-message").count() == 0
    undrawn = tab.evaluate(
        """() => [...document.querySelectorAll('article .math')]
               .filter(m => !m.querySelector('mjx-container')).map(m => m.textContent)""")
    assert undrawn == []
    empty = tab.evaluate(
        """async () => {
             const images = [...document.querySelectorAll('article img')];
             images.forEach(i => { i.loading = 'eager'; });
             await Promise.all(images.map(i => i.decode().catch(() => {})));
             return images.filter(i => !i.naturalWidth).map(i => i.src);
           }""")
    assert empty == []
    _one_form_for_each_theme_and_the_light_one_on_paper(tab)
    _nothing_sticks_out_on_a_phone(tab)


@pytest.mark.browser
def test_theme_can_be_switched_by_the_reader(site, open_page):
    tab = open_page(viewport={"width": 1280, "height": 900})
    tab.goto(f"{site}/{PAGES[0]}.html")
    seen = set()
    for _ in range(3):
        tab.locator("button.theme-switch-button").first.click()
        seen.add(tab.evaluate("() => document.documentElement.dataset.theme"))
    assert seen == {"light", "dark"}


@pytest.mark.browser
def test_search_finds_a_page_offline(site, open_page):
    tab = open_page()
    tab.goto(f"{site}/search.html?q=warms")
    tab.wait_for_selector("#search-results li")
    found = tab.locator("#search-results li a").all_inner_texts()
    assert any("How the numbers were made" in title for title in found)


@pytest.mark.browser
def test_front_page_opens_from_the_root(site, open_page):
    tab = open_page()
    tab.goto(f"{site}/")
    tab.wait_for_url(f"**/{TOC['root']}.html")
    assert tab.locator("article h1").inner_text().startswith("The Attention Memory Lab")
