"""Docstrings of labkit as napoleon wants them.

labkit writes ``name : what it is.`` where numpydoc wants the type after the colon and the
description below it.  Napoleon would take such a description for a type and look for classes of
that name, so it is moved to its own line here, before napoleon sees it.  Where a type does stand
after the colon (``seq_len : int`` with an indented text below), nothing changes.
"""

from __future__ import annotations

import importlib.util
import re

from sphinx.application import Sphinx

_FIELDS = {"Parameters", "Attributes"}
_ANSWERS = {"Returns", "Yields"}
_FIELD = re.compile(r"(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*) : ?(?P<text>.*)")
#: one or two words that name a type, such as "int", "str or None", "list of Step", "torch.Tensor"
_WORD = r"[\w.]+(?:\[.*?\])?"
_TYPE = re.compile(rf"{_WORD}(?:(?: or | of |, ?){_WORD})*(?:, optional)?")
#: common English words with which no type begins
_PROSE = re.compile(r"(?:a|an|as|one|the|this|what|how|why|who|where|which|whether|its?|see) ")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_type(text: str, below: list[str], margin: int) -> bool:
    described = bool(below) and bool(below[0].strip()) and _indent(below[0]) > margin
    return described and bool(_TYPE.fullmatch(text)) and not _PROSE.match(text)


def _sections(lines: list[str]) -> list[tuple[str, int, int]]:
    """(title, first line of the body, line after it) of each numpydoc section."""
    heads = [
        i
        for i in range(len(lines) - 1)
        if lines[i].strip() and re.fullmatch(r"\s*-{3,}\s*", lines[i + 1])
    ]
    if not heads:
        return []
    ends = [*heads[1:], len(lines)]
    return [(lines[i].strip(), i + 2, end) for i, end in zip(heads, ends, strict=True)]


def _fields(body: list[str]) -> list[str]:
    margin = min((_indent(line) for line in body if line.strip()), default=0)
    starts = [i for i, line in enumerate(body) if line.strip() and _indent(line) == margin]
    out = body[: starts[0]] if starts else body
    for start, end in zip(starts, [*starts[1:], len(body)], strict=True):
        line, below = body[start], body[start + 1 : end]
        match = _FIELD.fullmatch(line.strip())
        if match is None or _is_type(match["text"], below, margin):
            out += [line, *below]
            continue
        # One entry for each of several names: a list of attributes knows no other form.
        for name in match["names"].split(", "):
            text = [" " * (margin + 4) + match["text"]] if match["text"] else []
            out += [" " * margin + name, *text, *below]
    return out


def _answer(body: list[str]) -> list[str]:
    """``Returns`` with a sentence in it: a description without a type."""
    text = [line for line in body if line.strip()]
    if not text:
        return body
    margin, first = _indent(text[0]), text[0].strip()
    if re.fullmatch(_WORD, first) or _is_type(first, text[1:], margin):
        return body
    return [" " * margin + ":", *(" " * 4 + line if line.strip() else line for line in body)]


def _example(body: list[str]) -> int:
    """Where a doctest ends the section that it follows; the length if there is none."""
    margin = min((_indent(line) for line in body if line.strip()), default=0)
    for i, line in enumerate(body):
        if line[margin:].startswith(">>> ") and i and not body[i - 1].strip():
            return i
    return len(body)


def rewrite(lines: list[str]) -> list[str]:
    """The docstring with every ``name : description`` on two lines."""
    out, done = [], 0
    for title, start, end in _sections(lines):
        out += lines[done:start]
        stop = end if title == "Examples" else start + _example(lines[start:end])
        change = _fields if title in _FIELDS else _answer if title in _ANSWERS else list
        out += change(lines[start:stop])
        if stop < end:
            margin = " " * _indent(lines[start - 1])
            out += [f"{margin}Examples", f"{margin}--------", *lines[stop:end]]
        done = end
    return out + lines[done:]


def _process(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = rewrite(lines)
    if what in {"attribute", "property", "data"} and lines:
        # "One sentence: and more." is no "type: description"; an empty comment comes first.
        lines[:0] = ["..", ""]


def _configure(app: Sphinx, config) -> None:
    # Types of other libraries, whose documentation would have to be asked for over the network.
    config.nitpick_ignore_regex = [
        *config.nitpick_ignore_regex,
        (r"py:.*", r"(torch|triton|matplotlib|numpy|np|pathlib|collections|ipywidgets)\..*"),
        # Attributes are listed with their class, not each with an entry of its own.
        (r"py:attr", r".*"),
    ]
    config.napoleon_use_ivar = True
    # The value of a table such as CARDS would fill a page.
    config.autodoc_default_options = {"no-value": True, **config.autodoc_default_options}
    if importlib.util.find_spec("triton") is None:  # macOS: the reference still builds
        config.autodoc_mock_imports = [*config.autodoc_mock_imports, "triton"]


def setup(app: Sphinx) -> None:
    app.connect("config-inited", _configure)
    app.connect("autodoc-process-docstring", _process, priority=400)  # napoleon: 500
