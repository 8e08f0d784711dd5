"""Names and sizes of the element types, without loading torch.

A dtype may be given as a name (``"float16"``), a common short form
(``"fp16"``, ``"half"``) or a ``torch.dtype``.  Inside labkit the torch name is
used throughout.

Imports: labkit.errors only.
"""

from __future__ import annotations

from typing import Any

from labkit.errors import check_choice

__all__ = ["ITEMSIZE", "dtype_name", "itemsize", "torch_dtype"]

#: bytes per element
ITEMSIZE: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "bool": 1,
}
_SHORT = {
    "fp64": "float64",
    "double": "float64",
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
}


def dtype_name(dtype: Any, argument: str = "dtype") -> str:
    """The torch name of ``dtype``: ``"float16"`` for ``"fp16"``, ``"half"`` or ``torch.float16``.

    Raises
    ------
    ArgumentError
        if the name is unknown; the message lists the known ones.
    """
    name = str(dtype).removeprefix("torch.")
    name = _SHORT.get(name, name)
    return check_choice(argument, name, ITEMSIZE)


def itemsize(dtype: Any, argument: str = "dtype") -> int:
    """Bytes per element."""
    return ITEMSIZE[dtype_name(dtype, argument)]


def torch_dtype(dtype: Any, argument: str = "dtype"):
    """The ``torch.dtype`` of that name (loads torch)."""
    import torch

    return getattr(torch, dtype_name(dtype, argument))
