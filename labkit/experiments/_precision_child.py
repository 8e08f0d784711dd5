"""Compiles the kernels of ways of ``labkit.experiments.precision``, for Triton's cache on disk.

``python -m labkit.experiments._precision_child WAY … SIZES``, several side by side; SIZES is a JSON
list of (heads, seq_len, head_dim).
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress


def main(*arguments: str) -> None:
    """Run each size once; one that fails will fail again where it is measured, and be noted."""
    import torch

    from labkit.experiments.precision import WAYS, _forward_backward, draw

    *names, sizes = arguments
    for name in names:
        for heads, n, d in json.loads(sizes):
            with suppress(Exception):
                _forward_backward(WAYS[name], *draw(1, heads, n, d, device="cuda"))
                torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
