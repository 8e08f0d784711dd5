"""The back matter: the reference covers labkit, docstrings reach it whole, terms stand once."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import labkit
from labkit import claims

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"


def load(name):
    """A module of the book's Sphinx extension, by path: book/ is no package."""
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location(name, BOOK / "_ext" / "labbook" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_module_is_in_the_reference():
    text = (BOOK / "reference.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"automodule:: (labkit\.\w+)", text))
    public = {f"labkit.{m.name}" for m in pkgutil.iter_modules(labkit.__path__)}
    public = {name for name in public if not name.rpartition(".")[2].startswith("_")}
    assert listed == public


DOCSTRING = """\
Do it.

Parameters
----------
size : how large, in bytes; the
    rest of the sentence.
a, b : both as they are.
seq_len, seq_len_k : int
    queries and keys.
method : str or None
    how.
*args : the rest.

Returns
-------
One result per size, in order.

Raises
------
ArgumentError
    if it is wrong.

>>> do(1)
2
"""


def test_descriptions_after_the_colon_move_below_the_name():
    lines = load("docstrings").rewrite(DOCSTRING.splitlines())
    text = "\n".join(lines)
    assert "size\n    how large, in bytes; the\n    rest of the sentence." in text
    assert "a\n    both as they are.\nb\n    both as they are." in text
    assert "*args\n    the rest." in text


def test_types_stay_where_numpydoc_wants_them():
    text = "\n".join(load("docstrings").rewrite(DOCSTRING.splitlines()))
    assert "seq_len, seq_len_k : int\n    queries and keys." in text
    assert "method : str or None\n    how." in text


def test_a_sentence_after_returns_is_a_description_and_a_doctest_ends_raises():
    text = "\n".join(load("docstrings").rewrite(DOCSTRING.splitlines()))
    assert "Returns\n-------\n:\n    One result per size, in order." in text
    assert "    if it is wrong.\n\nExamples\n--------\n>>> do(1)\n2" in text


@pytest.mark.parametrize("answer", ["int", "MemoryTable", "list of Step\n    add them up."])
def test_a_type_after_returns_stays(answer):
    doc = f"Do it.\n\nReturns\n-------\n{answer}\n"
    assert "\n".join(load("docstrings").rewrite(doc.splitlines())) == doc.rstrip("\n")


def test_a_docstring_without_sections_is_left_alone():
    lines = ["One line: with a colon.", "", "And a second paragraph."]
    assert load("docstrings").rewrite(list(lines)) == lines


def test_the_ledger_warns_of_a_cell_that_goes_against_its_verdict(monkeypatch, caplog):
    ledger = load("ledger")

    class Environment:
        found_docs = ()

        def note_dependency(self, path):
            assert Path(path).is_file()

    class State:
        def nested_parse(self, lines, offset, node):
            self.text = "\n".join(lines)

    def build():
        directive = object.__new__(ledger.Claims)
        directive.state = State()
        directive.content_offset = 0
        monkeypatch.setattr(ledger.Claims, "env", Environment(), raising=False)
        monkeypatch.setattr(ledger.Claims, "get_location", lambda self: "claims.md", raising=False)
        said = []
        monkeypatch.setattr(ledger.logger, "warning", lambda *a, **k: said.append(a))
        directive.run()
        return directive.state.text, said

    text, said = build()
    assert "C23" in text and said == []
    monkeypatch.setitem(claims.C12_TABLE, 512, "2 MB")
    text, said = build()
    assert len(said) == 1 and "C12" in str(said[0][1])


def glossary():
    """One tuple of names per entry."""
    text = (BOOK / "glossary.md").read_text(encoding="utf-8")
    body = text[text.index(":sorted:") :].splitlines()[1:]
    entries, names = [], []
    for line in body:
        if line.startswith("  "):
            if names:
                entries.append(tuple(names))
            names = []
        elif line.strip() and not line.startswith("```"):
            names.append(line)
    return entries


def test_glossary_defines_each_word_once_in_english_and_chinese():
    entries = glossary()
    assert len(entries) >= 45
    names = [name.lower() for entry in entries for name in entry]
    assert len(names) == len(set(names))
    without = [e[0] for e in entries if not re.search(r"[\u4e00-\u9fff]", " ".join(e))]
    # Proper names that Chinese texts leave as they are.
    assert set(without) <= {"FlashAttention", "FlexAttention", "GDDR", "TF32", "Triton", "softmax"}


def test_glossary_definitions_are_short():
    text = (BOOK / "glossary.md").read_text(encoding="utf-8")
    for line in re.findall(r"^  (\S.*)$", text, re.M):
        assert line.endswith(".") and len(line) < 330, line


def test_the_reference_lists_every_command():
    from labkit.__main__ import main

    text = (BOOK / "reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)[^`]*` \|", text, re.M)
    assert sorted(listed) == sorted(main.commands)


def test_bibliography_entries_are_whole():
    database = pytest.importorskip("pybtex.database")
    entries = database.parse_file(str(BOOK / "references.bib")).entries
    assert len(entries) >= 22
    for key, entry in entries.items():
        assert re.fullmatch(r"[a-z]+\d{4}[a-z0-9]+|nvidia(CudaGuide|\d{4}\w+)", key), key
        assert entry.persons.get("author"), key
        assert {"title", "year"} <= set(entry.fields), key
        assert "doi" in entry.fields or entry.fields["url"].startswith("https://"), key
    titles = [e.fields["title"].lower() for e in entries.values()]
    assert len(titles) == len(set(titles))
