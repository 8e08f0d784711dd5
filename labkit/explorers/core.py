"""The explorer object: a figure with controls that a static page can run.

One call in a notebook returns an :class:`Explorer`.  What it shows depends on
where it is shown:

- the page and JupyterLab get HTML: the figure as SVG, drawn here; a slider and a
  number box for each size; a table of the figures; one inline script that draws
  again when an input moves.  No kernel answers it, nothing is fetched;
- with scripts off the stored figure stays, and a line says what is missing;
- print and viewers without HTML get a PNG of the same shapes;
- a terminal gets the table.

Everything is computed from closed forms of labkit, passed to the script as data.
The output is the same bytes on every run, so that notebooks diff cleanly.

Imports: labkit.errors, labkit.dtypes and this package; matplotlib when the PNG is asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from labkit.closed_form import Form
from labkit.errors import ArgumentError, check_choice, check_positive_int
from labkit.explorers import scene
from labkit.explorers.model import Model, dyadic

__all__ = ["Explorer", "check", "choice", "size"]

#: positions of a size's slider; its number box takes any integer between min and max
_STOPS = {
    "N": [2**k * f // 2 for k in range(7, 21) for f in (2, 3)][:-1],
    "B": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "H": [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64, 96, 128],
    "d": [16, 32, 48, 64, 80, 96, 128, 160, 192, 256],
}
_LARGEST = {"N": 2**20, "B": 4096, "H": 1024, "d": 1024}


# -- controls --------------------------------------------------------------------------
def size(name: str, argument: str, value: int) -> dict[str, Any]:
    """A slider and a number box for an integer size of the closed forms.

    Parameters
    ----------
    name : symbol in the forms: ``N``, ``B``, ``H`` or ``d``.
    argument : what the reader calls it: ``seq_len`` …
    value : where it starts.

    Raises
    ------
    ArgumentError
        if ``value`` is not an integer between 1 and the largest that the box takes.
    """
    value = check_positive_int(argument, value)
    if value > _LARGEST[name]:
        raise ArgumentError(
            argument, value, "is beyond the explorer.", f"Pass at most {_LARGEST[name]}."
        )
    return {
        "kind": "size",
        "name": name,
        "label": argument,
        "value": value,
        "min": 1,
        "max": _LARGEST[name],
        "stops": _STOPS[name],
    }


def choice(name: str, label: str, value: str, options: Iterable[tuple]) -> dict[str, Any]:
    """A select; an option is ``(value, label, sizes it sets)``."""
    options = list(options)
    check_choice(name, value, [o[0] for o in options])
    return {
        "kind": "choice",
        "name": name,
        "label": label,
        "value": value,
        "options": [{"value": v, "label": text, "sets": sets} for v, text, sets in options],
    }


def check(name: str, label: str, value: bool) -> dict[str, Any]:
    """A checkbox; its name is 1 or 0 in expressions."""
    if not isinstance(value, bool):
        raise ArgumentError(name, value, "is not a bool.", "Pass True or False.")
    return {"kind": "check", "name": name, "label": label, "value": value}


@cache
def _asset(name: str, *parts: str) -> str:
    """A file of this package without comments, blank lines and indentation.

    ``parts`` are further files that stand where the first one has the line ``// parts``: what a
    single figure needs travels in no other page.
    """
    folder = files("labkit.explorers")
    text = folder.joinpath(name).read_text(encoding="utf-8")
    added = "".join(folder.joinpath(part).read_text(encoding="utf-8") for part in parts)
    lines = text.replace("// parts\n", added, 1).splitlines()
    kept = (line.strip() for line in lines)
    return "\n".join(line for line in kept if line and not line.startswith(("//", "/* ")))


# -- the object ------------------------------------------------------------------------
class Explorer:
    """An interactive figure; the value of the last expression of a cell shows it.

    Parameters
    ----------
    spec : the description that ``model.py``, ``scene.py`` and ``runtime.js`` read:

        ``title`` and ``about`` : text;
        ``controls`` : what the reader moves (none: a figure without script);
        ``constants`` : sizes that nothing moves;
        ``forms`` : closed forms by name (a Form, or its JSON);
        ``quantities`` : expressions by name;
        ``figure`` : what to draw;
        ``summary`` : one or two sentences with holes;
        ``table`` : ``head`` and ``rows`` of texts.
    """

    #: files of this package that go into the page; ``parts`` go into the script
    script: str = "runtime.js"
    parts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ("style.css",)
    #: ``draw(model, layout)`` makes the shapes
    draw = staticmethod(scene.draw)

    def __init__(self, spec: Mapping[str, Any]) -> None:
        spec = copy.deepcopy(dict(spec))
        spec["forms"] = {
            name: dyadic(form.to_json() if isinstance(form, Form) else form)
            for name, form in spec["forms"].items()
        }
        spec.setdefault("constants", {})
        spec["layouts"] = {
            name: box | {"h": scene.height(spec, name)} for name, box in scene.LAYOUTS.items()
        }
        self.spec: dict[str, Any] = spec
        # through JSON, so that Python draws from exactly what the script will read
        self.spec = json.loads(self._json())

    # -- values ----------------------------------------------------------------------
    @property
    def state(self) -> dict[str, Any]:
        """The value of each control, by name."""
        return {c["name"]: c["value"] for c in self.spec["controls"]}

    def _model(self, changes: Mapping[str, Any]) -> Model:
        state = self.state
        for name, value in changes.items():
            check_choice("control", name, state)
            control = next(c for c in self.spec["controls"] if c["name"] == name)
            if control["kind"] == "size":
                none = control["min"] == 0 and value == 0 and value is not False
                state[name] = 0 if none else check_positive_int(control["label"], value)
            elif control["kind"] == "choice":
                state[name] = check_choice(name, value, [o["value"] for o in control["options"]])
            else:
                state[name] = bool(value)
        return Model(self.spec, state)

    def values(self, **changes: Any) -> dict[str, Any]:
        """Every quantity of the figure, at the initial state or with some controls changed.

        >>> from labkit.explorers import scores_buffer
        >>> scores_buffer(seq_len=2048, heads=12).values(N=4096)["scores"]
        402653184
        """
        model = self._model(changes)
        return {name: model(name) for name in self.spec["quantities"]}

    def summary(self, **changes: Any) -> str:
        """The sentence below the figure."""
        return self._model(changes).text(self.spec["summary"])

    def table(self, **changes: Any) -> list[list[str]]:
        """The table below the figure, header first."""
        model = self._model(changes)
        rows = [self.spec["table"]["head"], *self.spec["table"]["rows"]]
        return [[model.text(cell) for cell in row] for row in rows]

    # -- output ----------------------------------------------------------------------
    def _json(self) -> str:
        text = json.dumps(self.spec, ensure_ascii=False, separators=(",", ":"))
        return text.replace("</", "<\\/")  # nothing in it may close the script element

    @property
    def key(self) -> str:
        """Names the content: two explorers with one key are the same explorer."""
        texts = (self._json(), _asset(self.script, *self.parts), *map(_asset, self.styles))
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]

    def svg(self, layout: str = "wide", **changes: Any) -> str:
        """The figure as the inside of an ``<svg>``; ``layout`` is ``"wide"`` or ``"narrow"``."""
        check_choice("layout", layout, scene.LAYOUTS)
        return scene.svg(self.draw(self._model(changes), layout))

    def png(self, layout: str = "wide") -> bytes:
        """The figure at its initial state as a PNG, two pixels per unit."""
        box = self.spec["layouts"][layout]
        return scene.png(self.draw(self._model({}), layout), box["w"], box["h"])

    def _control_html(self, control: dict[str, Any]) -> str:
        name, label = escape(control["name"]), escape(control["label"])
        if control["kind"] == "size":
            stops, value = control["stops"], control["value"]
            nearest = min(range(len(stops)), key=lambda i: (abs(stops[i] - value), i))
            return (
                f'<div class="lkx-control" data-control="{name}">'
                f'<label><span>{label}</span><input type="number" inputmode="numeric" '
                f'autocomplete="off" min="{control["min"]}" max="{control["max"]}" step="1" '
                f'value="{value}"></label>'
                f'<input type="range" autocomplete="off" aria-label="{label}, slider" min="0" '
                f'max="{len(stops) - 1}" step="1" value="{nearest}" '
                f'aria-valuetext="{stops[nearest]}"></div>'
            )
        if control["kind"] == "choice":
            options = "".join(
                f'<option value="{escape(o["value"])}"'
                f"{' selected' if o['value'] == control['value'] else ''}>"
                f"{escape(o['label'])}</option>"
                for o in control["options"]
            )
            return (
                f'<div class="lkx-control" data-control="{name}"><label><span>{label}</span>'
                f'<select autocomplete="off">{options}</select></label></div>'
            )
        checked = " checked" if control["value"] else ""
        return (
            f'<div class="lkx-control lkx-check" data-control="{name}"><label>'
            f'<input type="checkbox" autocomplete="off"{checked}><span>{label}</span></label></div>'
        )

    def _label(self) -> str:
        """What a screen reader says of the drawing."""
        return self.spec["title"]

    def html(self) -> str:
        """The fragment that goes into the page: style, figure, inputs, table, script."""
        spec, key = self.spec, self.key
        figures = "".join(
            f'<svg class="lkx-svg lkx-{name}" role="img" aria-label="{escape(self._label())}" '
            f'viewBox="0 0 {scene.number(box["w"])} {scene.number(box["h"])}" '
            f'style="font-size:{box["font"]}px">{self.svg(name)}</svg>'
            for name, box in spec["layouts"].items()
        )
        controls = "".join(self._control_html(c) for c in spec["controls"])
        head, *rows = self.table()
        cells = "".join(f'<th scope="col">{escape(c)}</th>' for c in head)
        body = "".join(
            "<tr>"
            + f'<th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{escape(c)}</td>" for c in row[1:])
            + "</tr>"
            for row in rows
        )
        inputs = script = still = ""
        if spec["controls"]:
            inputs = (
                f'<form class="lkx-controls" hidden>{controls}'
                '<button type="button" class="lkx-reset">Reset</button></form>'
                '<p class="lkx-error" role="alert"></p>'
            )
            # not <noscript>: a notebook that is not trusted has scripts, but not this one
            still = (
                '<p class="lkx-still">This figure has inputs when scripts may run (JavaScript on, '
                "notebook trusted). What you see is its first state.</p>"
            )
            code = _asset(self.script, *self.parts)
            script = f"<script>({code})({json.dumps(key)},{self._json()})</script>"
        return (
            f'<div class="lkx" data-lkx="{key}">'
            f"<style>{''.join(map(_asset, self.styles))}</style>"
            f'<figure role="group" aria-label="{escape(spec["title"])}">'
            f"<figcaption><strong>{escape(spec['title'])}</strong> "
            f"<span>{escape(spec['about'])}</span></figcaption>"
            f'{inputs}<div class="lkx-figure">{figures}</div>'
            f'<p class="lkx-summary" aria-live="polite">{escape(self.summary())}</p>'
            f'<div class="lkx-scroll"><table class="lkx-table"><thead><tr>{cells}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{still}</figure>{script}</div>"
        )

    def __str__(self) -> str:
        head, *rows = self.table()
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

        def line(row: list[str]) -> str:
            first, *rest = (
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            return "  ".join((first, *rest)).rstrip()

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        body = "\n".join([line(head), rule, *map(line, rows)])
        return f"{self.spec['title']}\n{self.summary()}\n\n{body}"

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        import base64

        box = self.spec["layouts"]["wide"]
        data = {
            "text/html": self.html(),
            "image/png": base64.b64encode(self.png()).decode(),
            "text/plain": str(self),
        }
        alt = f"{self.spec['title']}. {self.summary()}"
        return data, {"image/png": {"alt": alt, "width": box["w"], "height": box["h"]}}
