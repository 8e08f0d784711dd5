"""The longest sequence against memory: predicted lines, and what was found (chapter 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labkit.errors import ArgumentError
from labkit.plots.training import longest_lengths

if TYPE_CHECKING:
    from labkit.plots.drawing import Drawing

__all__ = ["longest_found"]

#: what a line is called, by the configuration's key in a record
_WORDS = {
    "naive.fp32.inference": "naive, float32, forward",
    "naive.fp32.training": "naive, float32",
    "naive.fp16.training": "naive, half",
    "flash.fp32.training": "flash, float32",
    "flash.fp16.training": "flash, half",
    "flash.fp16.checkpointed": "flash, half,\ncheckpointed",
    "flash.fp16.inference": "flash, half, forward",
}


def longest_found(
    record: Any,
    *,
    ways: Sequence[str] = (
        "naive.fp32.training", "naive.fp16.training", "flash.fp32.training",
        "flash.fp16.training", "flash.fp16.checkpointed",
    ),
    size: str = "report",
) -> Drawing:  # fmt: skip
    """Predicted lengths as lines, found ones as circles, both axes logarithmic.

    Parameters
    ----------
    record : of the experiment ``longest_sequence``, or its result.
    ways : ``backend.precision.mode`` of each line.
    size : ``"report"`` or ``"realistic"``.

    Raises
    ------
    ArgumentError
        if the record has fewer than two memories for each of ``ways``.
    """
    caps = ("12", "24", "80", "141")
    lines: dict[str, list[tuple[float, float]]] = {}
    points = []
    for way in ways:
        ends = [f"{size}.{way}.{cap}" for cap in caps]
        line = [
            (record.value(f"limit.{end}"), record.value(f"predicted.{end}"))
            for end in ends
            if f"predicted.{end}" in record
        ]
        if len(line) < 2:
            continue
        lines[_WORDS.get(way, way.replace(".", ", "))] = line
        points += [
            (record.value(f"limit.{end}"), record.value(f"expandable_found.{end}"))
            for end in ends
            if f"expandable_found.{end}" in record
        ]
    if not lines:
        raise ArgumentError("ways", list(ways), f"are not in this record for {size!r}.",
                            "Pass configurations that were recorded at two memories.")  # fmt: skip
    return longest_lengths(lines, points)
