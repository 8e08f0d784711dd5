"""Errors that name the argument, the value it had and what would do.

Every public function of labkit checks its input here, before anything is
allocated or launched.  The rule for a message: *what* was wrong, *which value*
it had, *what to pass instead*.

Lowest layer: imports nothing of labkit, loads neither torch nor Triton.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = [
    "ArgumentError",
    "LabError",
    "MissingDependencyError",
    "NoGpuError",
    "NotEnoughMemoryError",
    "RecordError",
    "check_choice",
    "check_positive_int",
    "check_positive_number",
]


class LabError(Exception):
    """Base class: ``except LabError`` catches everything labkit raises on purpose."""


class ArgumentError(LabError, ValueError):
    """An argument that cannot be used.

    Parameters
    ----------
    argument : name of the parameter as the caller wrote it.
    value : the value it had (shown with ``repr``; pass a string for a shape).
    why : what is wrong with it.
    remedy : what would do; a full sentence.
    """

    def __init__(self, argument: str, value: Any, why: str, remedy: str) -> None:
        self.argument, self.value, self.why, self.remedy = argument, value, why, remedy
        super().__init__(f"{argument} = {value!r}: {why} {remedy}")


class NotEnoughMemoryError(LabError, MemoryError):
    """A request that was predicted not to fit, refused before it was allocated."""


class NoGpuError(LabError, RuntimeError):
    """The call needs a GPU and this machine has none that torch can use."""


class MissingDependencyError(LabError, ImportError):
    """An optional package (torch, Triton, ipywidgets …) is not installed."""


class RecordError(LabError, ValueError):
    """A record that is missing, damaged, foreign, or lacks the key asked for."""


def check_positive_int(argument: str, value: Any) -> int:
    """Return ``value`` as an int ≥ 1; raise :class:`ArgumentError` otherwise.

    NumPy integers and zero-dimensional integer tensors pass; ``True``, ``2.0``
    and ``"2"`` do not: each has hidden a unit or a parsing mistake before.
    """
    if isinstance(value, bool):
        raise ArgumentError(argument, value, "is a bool.", "Pass a positive integer.")
    try:
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise ArgumentError(
            argument, value, f"is a {kind}, not an integer.", "Pass a positive integer."
        ) from None
    if number < 1:
        raise ArgumentError(argument, value, "is not positive.", "Pass an integer of at least 1.")
    return number


def check_positive_number(argument: str, value: Any) -> float:
    """Return ``value`` as a finite float > 0; raise :class:`ArgumentError` otherwise."""
    if isinstance(value, (bool, str)):
        kind = type(value).__name__
        raise ArgumentError(argument, value, f"is a {kind}.", "Pass a positive number.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise ArgumentError(
            argument, value, f"is a {kind}, not a number.", "Pass a positive number."
        ) from None
    if not 0 < number < float("inf"):
        raise ArgumentError(argument, value, "is not positive and finite.", "Pass a number > 0.")
    return number


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; otherwise list them, nearest first."""
    known = list(choices)
    if value in known:
        return value
    near = get_close_matches(str(value), known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ArgumentError(argument, value, "is not known.", f"{hint}Known: {', '.join(known)}.")
