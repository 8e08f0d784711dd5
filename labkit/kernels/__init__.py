"""Small Triton kernels: for a GPU's memory hierarchy, its matrix units, and attention's traffic.

=====================  ==========================================  ==================
function               question                                    file
=====================  ==========================================  ==================
``copy``               how fast is device memory?                  device_copy.py
``read_sum``           how fast are L2 and L1, read only?          buffer_read.py
``pointer_chase``      how long does one access take?              latency.py
``shared_gather``      how fast is shared memory?                  shared_memory.py
``matmul``             how fast are the matrix units?              gemm.py
``naive_in_kernels``   what do S and P cost, kernel by kernel?     naive_steps.py
``tiled_attention``    what does the order of the loops cost?      tiles.py
=====================  ==========================================  ==================

Each is a ``torch.library.custom_op`` in the namespace ``labkit`` with a fake
implementation and a FLOP formula: FakeTensor, ``torch.compile``,
``FlopCounterMode`` and ``torch.library.opcheck`` see it as they see a torch operator.

Importing this package loads neither torch nor Triton; the first use of a name
loads its file.  Without Triton that use raises ``MissingDependencyError``.
Without a GPU the kernels run in Triton's interpreter, slowly and exactly, if it
was switched on before Triton was imported: see ``use_interpreter_if_no_gpu``.

Taught in chapter 03 (the memory hierarchy); the last two in chapter 06 (how few bytes?).
"""

from __future__ import annotations

from importlib import import_module

from labkit.kernels.runtime import backend, require_triton, use_interpreter_if_no_gpu

_HOME = {
    "copy": "device_copy",
    "read_sum": "buffer_read",
    "pointer_chase": "latency",
    "clocked_chase": "latency",
    "make_chain": "latency",
    "conflict_start": "shared_memory",
    "rotation_table": "shared_memory",
    "shared_gather": "shared_memory",
    "shared_gather_bytes": "shared_memory",
    "matmul": "gemm",
    "naive_in_kernels": "naive_steps",
    "tiled_attention": "tiles",
}

__all__ = ["backend", "require_triton", "use_interpreter_if_no_gpu", *sorted(_HOME)]


def __getattr__(name: str):
    if name in _HOME:
        require_triton(f"labkit.kernels.{name}")
        value = getattr(import_module(f"labkit.kernels.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'labkit.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
