"""A transformer layer whose attention can be exchanged, a small model, and a training step.

======================  ===============================================================  =======
file                    holds                                                            chapter
======================  ===============================================================  =======
``attention.py``        one attention, five ways to compute it; which can run here       10
``layer.py``            the layer: projections, attention, residual, feed-forward        10, 11
``model.py``            a stack of layers, at a small size and at a realistic one        10
``training.py``         one training step in each precision, overflow named              10
``overflow.py``         which tensor was the first that held no number                   10
``budget.py``           bytes of a model, part by part, without torch                    10
``tape.py``             what lives when, in a pass without data                          10
======================  ===============================================================  =======

Tensors are ``[batch, seq_len, dim]`` outside and ``[batch, heads, seq_len, head_dim]`` inside.
Importing this package loads neither torch nor Triton; the first use of a name does.
Taught in chapters 10 (fp32, fp16, which kernel, and who decides) and 11 (a mask saves nothing).
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from labkit.errors import MissingDependencyError

_HOME = {
    "BACKENDS": "attention",
    "AttentionLayer": "layer",
    "Budget": "budget",
    "Overflow": "overflow",
    "PRECISIONS": "training",
    "PrecisionOverflowError": "overflow",
    "StepResult": "training",
    "TrainingStep": "training",
    "TransformerModel": "model",
    "attend": "attention",
    "available": "attention",
    "find_overflow": "overflow",
    "layer_budget": "budget",
    "longest": "budget",
}
#: modules that need no torch
_PURE = {"budget"}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        if _HOME[name] not in _PURE and find_spec("torch") is None:
            raise MissingDependencyError(
                f"labkit.layers.{name} needs torch, which is not installed: pip install torch. "
                "Without it you still have labkit.layers.budget and the recorded figures."
            )
        value = getattr(import_module(f"labkit.layers.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'labkit.layers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
