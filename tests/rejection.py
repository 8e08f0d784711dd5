"""What a test of bad input asserts: the error names the argument, its value, and what would do."""

from __future__ import annotations

import re

import pytest

from labkit.errors import ArgumentError


def rejected(argument, *says, call):
    """The error names the argument and says what would do; returns it."""
    with pytest.raises(ArgumentError) as caught:
        call()
    error = caught.value
    named = error.argument == argument or error.argument.startswith(
        (f"{argument}.", f"{argument}[")
    )
    assert named, f"{error.argument} is named, not {argument}: {error}"
    text = str(error)
    for word in says:
        assert word in text, text
    assert repr(error.value) in text, text
    assert re.search(r"[A-Z][^.]+ [\s\S]*[.]$", error.remedy), f"no remedy: {text}"
    return error
