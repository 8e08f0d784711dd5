"""The three things every check of an exercise must do, as tests of a chapter's lists of answers.

``test_exercises_chNN.py`` lists answers, or names them in a dict, and takes its tests from here::

    test_solutions_are_taken = solutions_are_taken(GOOD)
    test_mistakes_are_turned_away = mistakes_are_turned_away(BAD)
    test_skeletons_are_not_errors = skeletons_are_not_errors(GOOD)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest

from labkit.exercises import ExerciseFailed


def _listed(rows: Iterable | Mapping) -> tuple[list, list[str] | None]:
    """The rows of a list, or those of a dict and their names."""
    return (list(rows.values()), list(rows)) if isinstance(rows, Mapping) else (list(rows), None)


def solutions_are_taken(good: Iterable[tuple[Callable, object]] | Mapping):
    """A test of each ``(grader, answer)``: the answer is right."""
    rows, ids = _listed(good)

    @pytest.mark.parametrize(("grader", "answer"), rows, ids=ids)
    def test(grader, answer, capsys):
        grader(answer)
        assert capsys.readouterr().out.startswith("✓ ")

    return test


def mistakes_are_turned_away(bad: Iterable[tuple[Callable, object, str]] | Mapping):
    """A test of each ``(grader, answer, says)``: it is wrong, and the reason matches ``says``."""
    rows, ids = _listed(bad)

    @pytest.mark.parametrize(("grader", "answer", "says"), rows, ids=ids)
    def test(grader, answer, says):
        with pytest.raises(ExerciseFailed, match=says):
            grader(answer)

    return test


def skeletons_are_not_errors(
    good: Iterable[tuple[Callable, object]] | Mapping, *others: object, also: Iterable = ()
):
    """A test that nothing is wrong with an answer that is not there yet.

    Graders whose answer in ``good`` is a function are given ``...``, None, a function without a
    body, and ``others``; graders of a value ``...`` and None; ``also`` are single pairs.
    """

    def skeleton(*args): ...

    good, _ = _listed(good)
    asked = [(g, a) for g, answer in good if callable(answer) for a in (skeleton, *others)]
    asked += [(g, a) for g, _ in good for a in (..., None)]

    def test(capsys):
        assert asked
        for grader, answer in [*asked, *also]:
            grader(answer)
            assert capsys.readouterr().out.startswith("Not answered yet: "), (grader, answer)

    return test
