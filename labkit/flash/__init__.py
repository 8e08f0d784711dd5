"""FlashAttention in Triton: attention that never writes S and P, forward and backward.

======================  ===============================================================  =======
file                    holds                                                            chapter
======================  ===============================================================  =======
``masking.py``          which scores exist, and which tiles need to ask                  08
``softmax.py``          one step of the online softmax                                   08
``tiles.py``            how rows come from memory and go back                            08
``forward.py``          the forward kernel, and the merge of split keys                  08
``hopper.py``           the forward kernel by hand for Hopper, in Gluon                  08
``backward.py``         the kernels of delta, dK/dV and dQ                               09
``hopper_backward.py``  the kernels of dK/dV and dQ by hand for Hopper, in Gluon         09
``one_pass.py``         the backward pass with atomic additions, to be compared          09
``tuning.py``           which tile sizes, chosen once and kept                           08
``launch.py``           from tensors to a grid of programs                               08
``ops.py``              torch operators: autograd, FakeTensor, FLOPs                     09
``api.py``              the public functions and their checks                            08
``steps/``              the forward kernel as it grows, step by step                     08
``recompute.py``        the backward pass by tiles in plain PyTorch                      09
``resources.py``        registers, spills and shared memory, read without a GPU          08
======================  ===============================================================  =======

Importing this package loads neither torch nor Triton; the first use of a name does.
Taught in chapters 08 (the forward kernel) and 09 (the backward kernels).
"""

from __future__ import annotations

from importlib import import_module

from labkit.kernels.runtime import require_triton

_HOME = {
    "DoubleBackwardError": "ops",
    "ForwardModeError": "ops",
    "flash_attention": "api",
    "flash_attention_varlen": "api",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        require_triton(f"labkit.flash.{name}")
        value = getattr(import_module(f"labkit.flash.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'labkit.flash' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
