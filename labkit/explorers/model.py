"""The model of an explorer: closed forms, expressions over them, and text.

An explorer is described by *data*: the terms of closed forms
(``labkit.closed_form.Form.to_json``), small expressions over their values, and
sentences with holes.  This file evaluates that data in Python, for the figure
that is stored in the page; ``runtime.js`` evaluates the same data in the
reader's browser.  Neither knows a formula of attention.

An expression is

- a number,
- a name: a size (``"N"``), or a quantity of the explorer, evaluated on use,
- ``["form", which]`` or ``["form", which, {size: expression}]``: the exact value
  of a closed form, with some sizes replaced,
- ``["longest", which, size, limit]``: the largest integer ``size`` at which the
  form is still ≤ ``limit`` (0 if it never is), exact,
- ``["+", a, b, …]``, and likewise ``* min max``; ``["-", a, b]``, ``["/", a, b]``;
  ``["//", a, b]``, the quotient rounded down;
  ``["<", a, b]``, ``["<=", a, b]`` and ``["==", a, b]`` give 1 or 0,
- ``["if", condition, a, b]``; ``["case", control, {value: …}]`` by the value of
  a control.

``which`` names a form, or is a ``case`` that ends in names.  A text is a string
with holes ``{name:format}``, or an ``if``, a ``case`` or ``["cat", …]`` of texts.

Imports: labkit.units only; loads neither torch nor Triton.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from labkit import units

__all__ = ["FORMATS", "Model", "dyadic"]

#: 2**62 tokens: no closed form of the course is this far from its limit
_LONGEST = 2**62
_HOLE = re.compile(r"\{(\w+)(?::(\w+))?\}")

#: name of a format in a text -> what it does; runtime.js holds the same table
FORMATS = {
    "bytes": units.format_bytes,
    "flop": lambda v: units.format_rate(v, "FLOP"),
    "flops": lambda v: units.format_rate(v, "FLOP/s"),
    "int": lambda v: f"{int(v):,}",
    "percent": lambda v: units.significant(v * 100) + " %",
    "rate": lambda v: units.format_rate(v, "B/s"),
    "seconds": units.format_seconds,
    "sig": units.significant,
}


def dyadic(terms: list[list]) -> list[list]:
    """``terms`` if a browser can evaluate them exactly.

    Coefficients must be integers or fractions over a power of two (up to 2³²):
    only those survive JSON without rounding.

    Raises
    ------
    ValueError
        if a coefficient is something like one third.
    """
    for coefficient, _ in terms:
        if isinstance(coefficient, float) and not (coefficient * 2**32).is_integer():
            raise ValueError(f"coefficient {coefficient!r} is not a fraction over a power of two")
    return terms


class Model:
    """Evaluates an explorer's ``spec`` (see ``labkit.explorers.core``) at a state.

    Parameters
    ----------
    spec : the description: ``controls``, ``constants``, ``forms``, ``quantities``.
    state : value of each control, by name.
    """

    def __init__(self, spec: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.spec, self.state = spec, dict(state)
        self.sizes: dict[str, Any] = dict(spec.get("constants", {}))
        for control in spec["controls"]:
            value = self.state[control["name"]]
            if control["kind"] == "choice":
                option = next(o for o in control["options"] if o["value"] == value)
                self.sizes.update(option.get("sets", {}))
            else:
                self.sizes[control["name"]] = int(value)

    def with_size(self, name: str, value: int) -> Model:
        """The same model with one size replaced: how a curve is sampled."""
        other = object.__new__(Model)
        other.spec, other.state = self.spec, self.state
        other.sizes = self.sizes | {name: value}
        return other

    # -- closed forms ------------------------------------------------------------
    def _which(self, which: Any) -> list[list]:
        while isinstance(which, list):
            _, control, options = which
            which = options[str(self.state[control])]
        return self.spec["forms"][which]

    @staticmethod
    def _exact(terms: list[list], sizes: Mapping[str, Any]) -> Fraction:
        total = Fraction(0)
        for coefficient, powers in terms:
            term = Fraction(coefficient)
            for name, power in powers.items():
                term *= int(sizes[name]) ** power
            total += term
        return total

    def _longest(self, terms: list[list], name: str, limit: float) -> int:
        def fits(n: int) -> bool:
            return self._exact(terms, self.sizes | {name: n}) <= limit

        low, high = 0, 1
        while high < _LONGEST and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    # -- expressions -------------------------------------------------------------
    def __call__(self, expression: Any) -> Any:
        """The value of ``expression``: a number, or the text that a size holds."""
        if isinstance(expression, (int, float)):
            return expression
        if isinstance(expression, str):
            if expression in self.spec["quantities"]:
                return self(self.spec["quantities"][expression])
            return self.sizes[expression]
        op, *rest = expression
        if op == "form":
            replaced = {name: self(e) for name, e in (rest[1] if len(rest) > 1 else {}).items()}
            exact = self._exact(self._which(rest[0]), self.sizes | replaced)
            return int(exact) if exact.denominator == 1 else float(exact)
        if op == "longest":
            return self._longest(self._which(rest[0]), rest[1], self(rest[2]))
        if op == "case":
            return self(rest[1][str(self.state[rest[0]])])
        if op == "if":
            return self(rest[1] if self(rest[0]) else rest[2])
        values = [float(self(e)) for e in rest]
        if op == "+":
            total = 0.0
            for value in values:  # not sum(): Python 3.12 compensates, a browser does not
                total += value
            return total
        if op == "*":
            return math.prod(values)
        if op == "-":
            return values[0] - values[1]
        if op == "/":
            return values[0] / values[1]
        if op == "//":
            return float(math.floor(values[0] / values[1]))
        if op in ("min", "max"):
            return min(values) if op == "min" else max(values)
        compare = {"<": float.__lt__, "<=": float.__le__, "==": float.__eq__}
        return int(compare[op](values[0], values[1]))

    # -- text --------------------------------------------------------------------
    def text(self, text: Any) -> str:
        """``text`` with its holes filled."""
        if isinstance(text, str):
            return _HOLE.sub(lambda m: FORMATS[m[2]](self(m[1])) if m[2] else str(self(m[1])), text)
        op, *rest = text
        if op == "cat":
            return "".join(self.text(t) for t in rest)
        if op == "case":
            return self.text(rest[1][str(self.state[rest[0]])])
        return self.text(rest[1] if self(rest[0]) else rest[2])
