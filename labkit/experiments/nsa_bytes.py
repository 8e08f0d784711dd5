r"""Native Sparse Attention: the bytes that it holds, and the bytes that it moves.

``memory``
    what a call holds at its peak, and keeps for the backward pass, beside its inputs: two lengths,
    and the bytes per token between them, beside the model's (``labkit.nsa.model.extra_bytes``).
``counters``
    bytes through L2 and DRAM as Nsight Compute counts them, and by the model.
``traffic``
    (interpreter, where there is no GPU) bytes that the kernels' loads and stores ask for.

The parts themselves stand in ``nsa_speed.py``, with the problem that all share.  They are a record
of their own because nothing here is a time: they need no quiet machine, and times age faster.

Taught in chapter 13 (when is sparse faster than dense).
"""

from __future__ import annotations

from labkit.experiments import Progress, Result, has_gpu, nsa_speed

__all__ = ["CHAPTERS", "NEEDS_GPU", "TITLE", "run"]

TITLE = "Sparse attention: bytes held, bytes moved"
CHAPTERS = ("13",)
NEEDS_GPU = False


def run(*, quick: bool, device: str | None = None, progress: Progress | None = None) -> Result:
    """Measure; ``quick`` leaves the profiler out.  Keys: ``memory.…``, ``l2.…``, ``hbm.…``."""
    device = device or ("cuda" if has_gpu() else "cpu")
    parts = ["traffic"] if device == "cpu" else ["memory"] if quick else ["memory", "counters"]
    return nsa_speed.run(quick=quick, device=device, progress=progress, parts=parts)
