"""labkit: the kernels, memory models and measurements of The Attention Memory Lab.

``import labkit`` loads neither torch nor Triton; each submodule loads what it
needs on first use.  Modules import downwards only:

    errors, units, dtypes, shapes, closed_form
      → hardware, memory, roofline          models of memory and hardware
      → naive, online_softmax               reference attention
      → kernels, io, flash, nsa, patterns   Triton
      → layers                              a transformer layer, and training it
      → timing, records, dispatch, experiments  measurement
      → plots, explorers, widgets           figures
      → claims, exercises, doctor, __main__ what readers call
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_SUBMODULES = frozenset({
    "claims", "closed_form", "dispatch", "doctor", "dtypes", "errors", "exercises", "experiments",
    "explorers", "flash", "hardware", "io", "kernels", "layers", "memory", "naive", "nsa",
    "online_softmax", "patterns", "plots", "records", "roofline", "shapes", "timing", "units",
    "widgets",
})  # fmt: skip

__all__ = ["__version__", *sorted(_SUBMODULES)]


def __getattr__(name: str):
    # PEP 562: ``labkit.naive`` works after ``import labkit`` and costs nothing before.
    if name in _SUBMODULES:
        return import_module(f"labkit.{name}")
    raise AttributeError(f"module 'labkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
