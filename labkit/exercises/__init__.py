"""Checks for the exercises at the end of each chapter.

Each module ``chNN`` holds one grader per exercise.  A grader takes the reader's answer, a
value or a function, and either prints why it is right or raises :class:`ExerciseFailed` with
a message that says what went wrong and where to look.  An answer that was not given yet
(``...``, ``None``, a function that returns nothing) is told so and raises nothing, so that a
notebook with unanswered exercises still runs from top to bottom.

A grader is only as good as the wrong answers that it turns away: ``tests/test_exercises_*.py``
feeds each one a list of plausible mistakes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from labkit.errors import LabError

__all__ = ["ExerciseFailed", "Unanswered", "call", "exercise", "expect", "expect_number"]

_CHAPTERS = frozenset(f"ch{number:02d}" for number in range(1, 16))


class ExerciseFailed(LabError, AssertionError):
    """An answer that is wrong; the message says why."""


class Unanswered(Exception):
    """The reader has not written an answer yet."""


def __getattr__(name: str):
    # graders load torch when they need it; ``labkit.exercises.ch01`` works without an import
    if name in _CHAPTERS:
        return import_module(f"labkit.exercises.{name}")
    raise AttributeError(f"module 'labkit.exercises' has no attribute {name!r}")


def exercise(title: str) -> Callable[[Callable[[Any], str]], Callable[[Any], None]]:
    """Make a grader out of a function that takes the answer and returns the praise.

    The grader prints ``Not answered yet`` for a missing answer and ``✓ title: praise`` for a
    right one; ExerciseFailed passes through.
    """

    def wrap(check: Callable[[Any], str]) -> Callable[[Any], None]:
        @functools.wraps(check)
        def grader(answer: Any) -> None:
            try:
                if answer is ... or answer is None:
                    raise Unanswered
                praise = check(answer)
            except Unanswered:
                print(f"Not answered yet: {title}.")
            else:
                print(f"✓ {title}: {praise}")

        return grader

    return wrap


def call(answer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the reader's function; an exception in it becomes a message.

    Raises
    ------
    Unanswered
        if it returns None or ``...`` or raises NotImplementedError: a skeleton.
    ExerciseFailed
        if it is not a function or raises anything else.
    """
    if not callable(answer):
        raise ExerciseFailed(f"Pass the function itself, not {answer!r}.")
    try:
        value = answer(*args, **kwargs)
    except NotImplementedError:
        raise Unanswered from None
    except Exception as error:
        shown = ", ".join(
            [_short(a) for a in args] + [f"{name}={_short(a)}" for name, a in kwargs.items()]
        )
        name = getattr(answer, "__name__", "your function")
        raise ExerciseFailed(f"{name}({shown}) raised {type(error).__name__}: {error}") from error
    if value is None or value is ...:
        raise Unanswered
    return value


def expect(condition: Any, message: str) -> None:
    """Raise :class:`ExerciseFailed` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ExerciseFailed(message)


def expect_number(value: Any, what: str) -> float:
    """``value`` as a float; ExerciseFailed if it is no real number."""
    if isinstance(value, (bool, str)):
        raise ExerciseFailed(f"{what} should be a number, not {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ExerciseFailed(f"{what} should be a number, not {type(value).__name__}.") from None


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"tensor{list(shape)}" if shape is not None and len(shape) else repr(value)
