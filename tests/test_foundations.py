"""The lowest layer: errors that name the argument, units, dtypes, closed forms."""

from __future__ import annotations

import doctest
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.closed_form import Form, symbols
from labkit.dtypes import ITEMSIZE, dtype_name, itemsize, torch_dtype
from labkit.errors import ArgumentError, check_choice, check_positive_int, check_positive_number
from labkit.units import format_bytes, format_rate, format_seconds, significant

DOCUMENTED = (
    "closed_form", "units", "memory.schedules", "memory.tables",
)  # fmt: skip


@pytest.mark.parametrize("module", DOCUMENTED)
def test_examples_in_docstrings_are_true(module):
    result = doctest.testmod(import_module(f"labkit.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


# -- errors ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 7, np.int64(3), torch.tensor(5)])
def test_positive_integers_of_any_kind_pass(value):
    assert check_positive_int("n", value) == int(value)


@pytest.mark.parametrize("value", [0, -4, 2.0, "2", True, None, float("nan")])
def test_what_is_no_positive_integer_is_named(value):
    with pytest.raises(ArgumentError) as caught:
        check_positive_int("seq_len", value)
    assert f"seq_len = {value!r}" in str(caught.value)
    assert caught.value.remedy.startswith("Pass")


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), True, "1", None])
def test_what_is_no_positive_number_is_refused(value):
    with pytest.raises(ArgumentError, match="bytes = "):
        check_positive_number("bytes", value)


def test_unknown_choice_lists_the_known_and_the_nearest():
    with pytest.raises(ArgumentError, match=r"Did you mean 'flash'\? Known: naive, flash\."):
        check_choice("backend", "flsh", ["naive", "flash"])


# -- units and dtypes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (192 * 2**20, "192 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (-(2**20), "−1 MiB"),
        (1000 * 2**20, "1000 MiB"),
    ],
)
def test_sizes_are_binary(count, text):
    assert format_bytes(count) == text


def test_rates_are_decimal_and_times_are_readable():
    assert format_rate(4.8e12, "B/s") == "4.8 TB/s"
    assert format_rate(999, "B/s") == "999 B/s"
    assert format_seconds(0.00123) == "1.23 ms"
    assert format_seconds(2e-9) == "2 ns"
    assert significant(0) == "0"


@pytest.mark.parametrize("name", ITEMSIZE)
def test_every_dtype_has_the_size_that_torch_gives_it(name):
    assert torch_dtype(name).itemsize == itemsize(name)
    assert dtype_name(torch_dtype(name)) == name


def test_unknown_dtype_is_refused():
    assert dtype_name("half") == "float16"
    with pytest.raises(ArgumentError, match="float17"):
        itemsize("float17")


# -- closed forms --------------------------------------------------------------------

B, H, N, d = symbols("B H N d")
SIZES = st.fixed_dictionaries({name: st.integers(1, 10**6) for name in "BHNd"})


@settings(max_examples=40)
@given(SIZES)
def test_a_form_is_the_polynomial_that_it_was_written_as(sizes):
    b, h, n, w = (sizes[name] for name in "BHNd")
    form = (B * H * N**2 - 3 * N * d) * 4 + Fraction(1, 2) * N * (N + 1) - B
    assert form(**sizes) == 4 * (b * h * n**2 - 3 * n * w) + n * (n + 1) // 2 - b


@settings(max_examples=40)
@given(SIZES)
def test_json_terms_and_the_form_have_one_value(sizes):
    form = 2 * B * H * N**2 + Fraction(1, 2) * N * d
    total = Fraction(0)
    for coefficient, powers in form.to_json():
        term = Fraction(coefficient)
        for name, power in powers.items():
            term *= sizes[name] ** power
        total += term
    assert total == form(**sizes)


def test_degree_leading_terms_and_substitution():
    form = 4 * N * d + 2 * N**2
    assert (form.degree("N"), form.degree("d"), form.degree("B")) == (2, 1, 0)
    assert form.leading("N") == 2 * N**2
    assert form.substitute(d=N) == 6 * N**2
    assert form.substitute(d=64) == 256 * N + 2 * N**2
    assert form - form == Form(0)
    assert form.symbols == ("N", "d")


def test_latex_is_ordered_and_signed():
    assert (4 * N * d + 2 * N**2 - N / 2).latex() == r"4\,N\,d + 2\,N^{2} - \tfrac{1}{2}\,N"
    assert Form(0).latex() == "0"
    assert (B * symbols("Nq")[0]).latex() == r"B\,N_q"


def test_missing_size_and_negative_power_are_named():
    with pytest.raises(ArgumentError, match=r"d = None: is missing.*'N', 'd'"):
        (N * d)(N=3)
    with pytest.raises(ArgumentError, match="power = -1"):
        N**-1
