"""Exercises that check themselves: one module per chapter, one grader per exercise.

A grader takes the reader's answer, a value or a function, and does one of three things:

* prints ``✓ …`` and what was tried, when the answer holds;
* raises :class:`ExerciseFailed` with a message that says what was expected of which input
  and, where it can tell, which mistake gives the value it got;
* prints ``Not answered yet: …`` while the answer is still ``...``, so that a notebook with
  untouched skeletons runs from top to bottom.

Each grader is itself tested with a table of wrong answers that it must reject
(``tests/test_exercises_*.py``).

Imports: nothing of labkit here; the chapters' modules load what they grade with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["ExerciseFailed", "ask", "ch01", "ch02", "ch03", "ch04", "ch05", "expect", "grader"]

_CHAPTERS = ("ch01", "ch02", "ch03", "ch04", "ch05")


def __getattr__(name: str):
    if name in _CHAPTERS:
        return import_module(f"labkit.exercises.{name}")
    raise AttributeError(f"module 'labkit.exercises' has no attribute {name!r}")


class ExerciseFailed(AssertionError):
    """The answer does not hold; the message says what to look at."""

    def _render_traceback_(self) -> list[str]:
        # What IPython prints: the message, not the grader's frames.
        return [f"✗ {self}"]


class _NotAnswered(Exception):
    pass


def grader(check: Callable[..., str]) -> Callable[..., None]:
    """Make a grader of a function that returns what to print after the ✓ or raises.

    The first line of its docstring names the exercise.
    """

    @functools.wraps(check)
    def graded(*answers: Any, **named: Any) -> None:
        title = (check.__doc__ or check.__name__).strip().splitlines()[0].rstrip(".")
        try:
            if any(a is ... or a is None for a in (*answers, *named.values())):
                raise _NotAnswered
            verdict = check(*answers, **named)
        except _NotAnswered:
            print(f"Not answered yet: {title}.")
            return
        print(f"✓ {title}. {verdict}")

    return graded


def ask(answer: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call the reader's function; ``...``, None or NotImplementedError mean "not answered yet".

    Raises
    ------
    ExerciseFailed
        if the answer is not a function, or raises when called.
    """
    if not callable(answer):
        raise ExerciseFailed(f"Pass your function itself, not {answer!r}.")
    try:
        result = answer(*args, **kwargs)
    except NotImplementedError:
        raise _NotAnswered from None
    except ExerciseFailed:
        raise
    except Exception as error:
        shown = ", ".join([*map(_short, args), *(f"{k}={_short(v)}" for k, v in kwargs.items())])
        name = getattr(answer, "__name__", "your function")
        raise ExerciseFailed(f"{name}({shown}) raised {type(error).__name__}: {error}") from error
    items = result if isinstance(result, tuple) else (result,)
    if any(item is ... or item is None for item in items):
        raise _NotAnswered
    return result


def expect(condition: Any, message: str) -> None:
    """Raise :class:`ExerciseFailed` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ExerciseFailed(message)


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"<{list(shape)}>" if shape is not None else repr(value)
