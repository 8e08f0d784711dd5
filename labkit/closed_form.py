r"""Closed forms: sums of monomials in the sizes of the problem.

Every byte and FLOP count in the course is a polynomial in a few sizes,

.. math:: f(B, H, N, d, e) = \sum_i c_i\, B^{b_i} H^{h_i} N^{n_i} d^{d_i} e^{e_i}.

Holding them as data, instead of as a Python expression, buys three things:
exact integer values at any size, the exponent of each size read off instead of
fitted, and one formula for all readers: the tables, the LaTeX in the chapters
and the script of the interactive figures evaluate the same terms.

Lowest layer: imports nothing of labkit but its errors, loads neither torch nor Triton.
Taught in chapter 02 (what grows).
"""

from __future__ import annotations

from fractions import Fraction

from labkit.errors import ArgumentError

__all__ = ["Form", "symbols"]

Powers = tuple[tuple[str, int], ...]
Number = int | Fraction


class Form:
    """A sum of monomials with exact rational coefficients.

    >>> B, H, N, e = symbols("B H N e")
    >>> S = B * H * N**2 * e
    >>> S(B=1, H=12, N=2048, e=2)
    100663296
    >>> S.degree("N"), S.degree("B")
    (2, 1)
    """

    __slots__ = ("terms",)

    def __init__(self, terms: dict[Powers, Number] | Number = 0) -> None:
        if isinstance(terms, (int, Fraction)):
            terms = {(): terms}
        self.terms: dict[Powers, Fraction] = {p: Fraction(c) for p, c in terms.items() if c != 0}

    # -- algebra ---------------------------------------------------------------
    @staticmethod
    def of(value: Form | Number) -> Form:
        """``value`` as a Form (numbers become constants)."""
        return value if isinstance(value, Form) else Form(value)

    def __add__(self, other: Form | Number) -> Form:
        out = dict(self.terms)
        for powers, coefficient in Form.of(other).terms.items():
            out[powers] = out.get(powers, Fraction(0)) + coefficient
        return Form(out)

    def __mul__(self, other: Form | Number) -> Form:
        out: dict[Powers, Fraction] = {}
        for left, a in self.terms.items():
            for right, b in Form.of(other).terms.items():
                merged = dict(left)
                for name, power in right:
                    merged[name] = merged.get(name, 0) + power
                powers = tuple(sorted((n, p) for n, p in merged.items() if p))
                out[powers] = out.get(powers, Fraction(0)) + a * b
        return Form(out)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Form:
        return self * -1

    def __sub__(self, other: Form | Number) -> Form:
        return self + Form.of(other) * -1

    def __rsub__(self, other: Form | Number) -> Form:
        return Form.of(other) - self

    def __truediv__(self, number: Number) -> Form:
        return self * (Fraction(1) / Fraction(number))

    def __pow__(self, power: int) -> Form:
        if power < 0:
            raise ArgumentError("power", power, "is negative.", "Pass an integer of at least 0.")
        out = Form(1)
        for _ in range(power):
            out = out * self
        return out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Form, int, Fraction)):
            return NotImplemented
        return self.terms == Form.of(other).terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    # -- reading ---------------------------------------------------------------
    @property
    def symbols(self) -> tuple[str, ...]:
        """The sizes that the form depends on, sorted."""
        return tuple(sorted({name for powers in self.terms for name, _ in powers}))

    def __call__(self, **sizes: int) -> Number:
        """The exact value; an int when it is whole.

        Raises
        ------
        ArgumentError
            if a size that the form needs is missing.
        """
        total = Fraction(0)
        for powers, coefficient in self.terms.items():
            for name, power in powers:
                if name not in sizes:
                    needs = f"This form needs {self.symbols}."
                    raise ArgumentError(name, None, "is missing.", needs)
                coefficient *= Fraction(sizes[name]) ** power
            total += coefficient
        return int(total) if total.denominator == 1 else total

    def degree(self, name: str) -> int:
        """The highest power of ``name``: how the form grows when only that size grows."""
        return max((dict(powers).get(name, 0) for powers in self.terms), default=0)

    def leading(self, name: str) -> Form:
        """The terms with the highest power of ``name``: what is left in the limit."""
        top = self.degree(name)
        return Form({p: c for p, c in self.terms.items() if dict(p).get(name, 0) == top})

    def substitute(self, **sizes: Form | Number) -> Form:
        """Replace sizes by numbers or other forms; the rest stays symbolic."""
        out = Form(0)
        for powers, coefficient in self.terms.items():
            term = Form(coefficient)
            for name, power in powers:
                factor = Form.of(sizes[name]) if name in sizes else Form({((name, 1),): 1})
                term = term * factor**power
            out = out + term
        return out

    # -- writing ---------------------------------------------------------------
    def _ordered(self) -> list[tuple[Powers, Fraction]]:
        return sorted(self.terms.items(), key=lambda t: (-sum(p for _, p in t[0]), t[0]))

    def latex(self, names: dict[str, str] | None = None) -> str:
        r"""LaTeX source, highest degree first; ``names`` maps a size to its symbol."""
        names = {"Nq": "N_q", "Nk": "N_k", "Hkv": "H_{kv}", "dv": "d_v"} | (names or {})
        text = ""
        for powers, c in self._ordered():
            sign = "-" if c < 0 else ("+" if text else "")
            c = abs(c)
            quotient = rf"\tfrac{{{c.numerator}}}{{{c.denominator}}}"
            number = str(c) if c.denominator == 1 else quotient
            body = r"\,".join(names.get(n, n) + (f"^{{{p}}}" if p != 1 else "") for n, p in powers)
            factor = body if c == 1 and body else (rf"{number}\,{body}" if body else number)
            text += (f" {sign} " if text else sign) + factor
        return text or "0"

    def to_json(self) -> list[list]:
        """``[[coefficient, {size: power}], …]``: what the explorers' script evaluates."""
        return [[float(c) if c.denominator > 1 else int(c), dict(p)] for p, c in self._ordered()]

    def __repr__(self) -> str:
        parts = []
        for powers, c in self._ordered():
            parts.append("·".join([str(c)] + [n + (f"^{p}" if p != 1 else "") for n, p in powers]))
        return f"Form({' + '.join(parts) or '0'})"


def symbols(names: str) -> tuple[Form, ...]:
    """One Form per name in a space-separated string: ``B, N = symbols("B N")``."""
    return tuple(Form({((name, 1),): 1}) for name in names.split())
