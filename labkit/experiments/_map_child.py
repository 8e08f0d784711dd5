"""Compiles labkit's kernels for some shapes, so that who measures finds them on disk.

Started by ``labkit.experiments.backend_map`` as ``python -m labkit.experiments._map_child`` with a
JSON list of shapes on standard input, several side by side: Triton keeps what it compiled in a
folder that all processes share.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Run each shape once; one that fails will fail again where it is measured, and be noted."""
    from contextlib import suppress

    import torch

    from labkit.dispatch.compute import function, with_backward
    from labkit.dispatch.measure import Shape

    for asked in json.load(sys.stdin):
        dtype = asked.pop("dtype")
        shape = Shape(**asked)
        with suppress(Exception), torch.set_grad_enabled(shape.training):
            q, k, v, dout = shape.draw(dtype, "cuda")
            forward = function("ours", q, k, v, is_causal=shape.causal, tf32=dtype == "tf32")
            (with_backward(forward, (q, k, v), dout) if shape.training else forward)()
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
