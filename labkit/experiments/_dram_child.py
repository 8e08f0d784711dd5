"""The program that Nsight Compute watches: attention step by step, a marker kernel before each.

Started by ``labkit.experiments.dram`` as ``ncu … python -m labkit.experiments._dram_child JSON``
where JSON is a list of ``{"dtype", "batch", "heads", "seq_len", "head_dim", "fused"}``.  Nothing
is measured here: the profiler counts, between ``cudaProfilerStart`` and ``cudaProfilerStop``.

The marker is torch's spin kernel: it touches no memory, so that the caches go from one step to
the next as they would without it, and its name tells the parent where a step begins.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

#: part of the marker kernel's name
MARKER = "spin_kernel"
NAIVE = ("scores", "scale", "softmax", "output")


def labels(problems: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """What each marker announces, in order: ``(index of the problem, step)``."""
    return [
        (index, step)
        for index, problem in enumerate(problems)
        for step in (*NAIVE, *(f"fused_{name}" for name in problem["fused"]))
    ]


def _attend(q: Any, k: Any, v: Any, fused: list[str], mark: Callable[[], None]) -> None:
    """Naive attention and then each fused backend, ``mark()`` before each step.

    Buffers are dropped as ``labkit.naive`` drops them, so that the allocator hands the same
    memory on and the L2 cache sees what it sees in real use.
    """
    import torch

    from labkit.experiments.roofline import _only, _sdpa

    scale = q.shape[-1] ** -0.5
    mark()
    s = q @ k.mT
    mark()
    s = s * scale
    mark()
    p = torch.softmax(s, -1)
    del s
    mark()
    p @ v
    del p
    for backend in fused:
        with _only(backend):
            attend = _sdpa(q, k, v, scale, causal=False)
            mark()
            attend()


def main(problems: list[dict[str, Any]]) -> None:
    """Run every problem once unwatched, to load and choose kernels, and once watched."""
    import torch

    from labkit.dtypes import torch_dtype

    torch.manual_seed(0)
    cuda = torch.cuda.cudart()
    with torch.no_grad():
        for problem in problems:
            shape = [problem[size] for size in ("batch", "heads", "seq_len", "head_dim")]
            options = {"device": "cuda", "dtype": torch_dtype(problem["dtype"])}
            q, k, v = (torch.randn(shape, **options) for _ in range(3))
            _attend(q, k, v, problem["fused"], lambda: None)
            torch.cuda.synchronize()
            cuda.cudaProfilerStart()
            _attend(q, k, v, problem["fused"], lambda: torch.cuda._sleep(1))
            torch.cuda.synchronize()
            cuda.cudaProfilerStop()
            del q, k, v


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
