"""The experiments on memory: what they find must be what the models say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import experiments, records
from labkit.errors import ArgumentError
from labkit.experiments import training_memory
from labkit.experiments.training_memory import bisect_length
from labkit.memory import FORMS, VARIANTS


@settings(max_examples=200)
@given(answer=st.integers(1, 5000), guess=st.integers(1, 6000), exact=st.booleans())
def test_bisection_finds_the_longest(answer, guess, exact):
    asked = []

    def fits(n):
        assert n >= 1
        asked.append(n)
        return n <= answer

    found = bisect_length(fits, guess, exact=exact)
    step = 1 if exact else max(1, guess // 512)
    assert found is not None
    assert answer - step < found <= answer
    assert len(asked) < 40


def test_bisection_of_a_right_guess_asks_twice():
    asked = []
    assert bisect_length(lambda n: asked.append(n) or n <= 777, 777, exact=True) == 777
    assert asked == [778, 777]


def test_bisection_says_when_nothing_fits():
    assert bisect_length(lambda n: False, 100) is None
    assert bisect_length(lambda n: False, 1, exact=True) is None


@pytest.fixture(scope="module")
def naive():
    return experiments.run("naive_memory", quick=True)


@pytest.fixture(scope="module")
def training():
    return experiments.run("training_memory", quick=True)


def test_naive_memory_predicts_every_row(naive):
    assert len(naive.rows) == 2 * 2 * len(VARIANTS)
    for row in naive.rows:
        assert row["predicted"] == row["traced"]
        # 0-dimensional tensors made of Python numbers, on a CPU
        assert abs(row["measured"] - row["predicted"]) <= 16, row
    assert naive.value("largest_gap") <= 16
    assert naive.value("out_of_place_float32_in_s") == pytest.approx(2, abs=1e-3)
    assert naive.value("in_place_float16_in_s") < 1.5


def test_training_memory_saves_and_peaks_as_predicted(training):
    for row in training.select(kind="peak"):
        if row["form"] == "fused":  # scratch of its own, and on CUDA the state of a generator
            assert abs(row["traced"] - row["predicted"]) <= 16 * row["layers"]
            continue
        assert abs(row["measured"] - row["predicted"]) <= 16 * row["layers"], row
        if row["device"] == "cpu":
            assert row["predicted"] == row["traced"], row["form"]
    assert training.value("saved_checkpointed") == 0
    assert training.value("saved_fused") < training.value("saved_out_of_place")
    four, one = (training.value(f"{k}_out_of_place_measured") for k in ("stack4", "peak"))
    assert four > 2 * one
    four, one = (training.value(f"{k}_checkpointed_measured") for k in ("stack4", "peak"))
    assert four < 1.3 * one


def test_lengths_are_confirmed_by_bisection(training):
    rows = training.select(kind="longest")
    assert {r["form"] for r in rows} == set(FORMS)
    for row in rows:
        if row["form"] == "fused":
            assert row["bisected"] is None and "not bisected" in row["how"]
        elif "traced" in row["how"]:
            assert row["bisected"] == row["predicted"]
    name = "longest_{}_training_float16_12_predicted"
    assert training.value(name.format("fused")) > 50 * training.value(name.format("in_place"))
    assert training.value(name.format("in_place")) == training.value(name.format("out_of_place"))


@pytest.mark.parametrize("name", ["naive_memory", "training_memory"])
def test_the_result_makes_a_valid_record(name, request, tmp_path):
    result = request.getfixturevalue(name.split("_")[0])
    record = records.new_record(name, result.results, result.rows, "pytest", quick=True)
    path = records.save(record, root=tmp_path)
    assert records.load(name, record.slug, root=tmp_path).results == record.results
    assert path.exists()


def test_an_unknown_form_is_named():
    with pytest.raises(ArgumentError, match="in_place"):
        training_memory.attention_in_form("inplace")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "expandable", "least"),
    # in training a block cut for dV leaves a piece too small for dP, unless segments can grow
    [("forward", False, 0.98), ("training", True, 0.98), ("training", False, 0.85)],
)
def test_a_limit_on_the_allocator_is_hit_where_predicted(mode, expandable, least):
    case = next(
        c
        for c in training_memory._length_cases(True, "cuda")
        if (c["form"], c["mode"], c["expandable"]) == ("out_of_place", mode, expandable)
    )
    result = experiments.Result()
    training_memory._longest(result, case, "cuda")
    (row,) = result.rows
    assert least * row["predicted"] < row["bisected"] <= row["predicted"]
