"""What attention holds in memory: predicted, traced and measured.

``forms``, ``tables``
    bytes of each tensor as closed forms, and tables of them.
``schedules``
    which tensors are alive when: the peak, predicted to the byte.
``budget``
    free memory, and a refusal before it is exceeded.
``tracing``
    the same found by running the code on FakeTensors (needs torch).
``measuring``
    the same measured on this machine (needs torch).
``saved``
    what autograd keeps for the backward pass (needs torch).

The first four load neither torch nor Triton; the others load torch when used.
Taught in chapters 01 (what attention writes) and 05 (what the backward pass keeps).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from labkit.memory.budget import check_fits, free_memory
from labkit.memory.forms import attention_forms, problem_sizes, visible_pairs
from labkit.memory.schedules import FORMS, VARIANTS, Schedule, attention_peak, schedule
from labkit.memory.tables import (
    METHODS,
    MemoryRow,
    MemoryTable,
    attention_memory,
    longest_seq_len,
    scores_buffer_bytes,
)

if TYPE_CHECKING:
    from labkit.memory.measuring import MemoryReport, measure
    from labkit.memory.saved import SavedReport, saved_for_backward
    from labkit.memory.tracing import Trace, trace

__all__ = [
    "FORMS",
    "METHODS",
    "VARIANTS",
    "MemoryReport",
    "MemoryRow",
    "MemoryTable",
    "SavedReport",
    "Schedule",
    "Trace",
    "attention_forms",
    "attention_memory",
    "attention_peak",
    "check_fits",
    "free_memory",
    "longest_seq_len",
    "measure",
    "problem_sizes",
    "saved_for_backward",
    "schedule",
    "scores_buffer_bytes",
    "trace",
    "visible_pairs",
]

# What needs torch is looked up on use (PEP 562).
_TORCH = {
    "MemoryReport": "measuring",
    "measure": "measuring",
    "SavedReport": "saved",
    "saved_for_backward": "saved",
    "Trace": "tracing",
    "TraceEvent": "tracing",
    "trace": "tracing",
}


def __getattr__(name: str):
    if name not in _TORCH:
        raise AttributeError(f"module 'labkit.memory' has no attribute {name!r}")
    return getattr(import_module(f"labkit.memory.{_TORCH[name]}"), name)
