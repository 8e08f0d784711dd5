"""What ``labkit.experiments.io_law`` runs in processes of its own.

``python -m labkit.experiments._io_child count JSON``
    counts the points of JSON in Triton's interpreter and prints one JSON list of rows.  For a
    process whose own Triton compiles for a GPU.
``ncu … python -m labkit.experiments._io_child profile JSON``
    runs attention kernel by kernel between ``cudaProfilerStart`` and ``cudaProfilerStop``, a
    marker kernel before each step (see ``labkit.experiments._dram_child``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

NAIVE = ("scores", "softmax", "output")


def count_point(point: dict[str, Any]) -> dict[str, Any]:
    """One point of the law, counted: the row of ``io_law`` without its closed form.

    ``point`` has ``order``, ``batch``, ``heads``, ``seq_len``, ``head_dim``, ``dtype``,
    ``block_m``, ``block_n``.
    """
    import torch

    from labkit import io, kernels
    from labkit.dtypes import torch_dtype

    shape = [point[size] for size in ("batch", "heads", "seq_len", "head_dim")]
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch_dtype(point["dtype"])}
    q, k, v = (torch.randn(shape, **options) for _ in range(3))
    tiles = {"block_m": point["block_m"], "block_n": point["block_n"]}
    with io.count(Q=q, K=k, V=v) as traffic:
        if point["order"] == "naive":
            out = kernels.naive_in_kernels(q, k, v, **tiles)
        else:
            out = kernels.tiled_attention(q, k, v, order=point["order"], **tiles)
    right = torch.softmax(q.double() @ k.double().mT * shape[3] ** -0.5, -1) @ v.double()
    whole = traffic.total()
    return {
        **point,
        "loaded": traffic.loaded,
        "stored": traffic.stored,
        "bytes": whole.bytes,
        "masked": whole.masked,
        "outside": traffic.outside.elements,
        "tensors": [[t, kind, size] for (t, kind), size in traffic.by_tensor().items()],
        # a kernel that moves few bytes and computes something else would prove nothing
        "error": (out.double() - right).abs().max().item(),
    }


def labels(problems: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """What each marker announces, in order: ``(index of the problem, step)``."""
    return [(index, step) for index, problem in enumerate(problems) for step in problem["steps"]]


def _attend(problem: dict[str, Any], q: Any, k: Any, v: Any, mark: Callable[[], None]) -> None:
    """The steps of one problem, ``mark()`` before each."""
    import torch

    from labkit import kernels

    tiles = (problem["block_m"], problem["block_n"])
    for step in problem["steps"]:
        if step == "scores":
            mark()
            scale = q.shape[-1] ** -0.5
            s = torch.ops.labkit.naive_scores(q, k, scale, *tiles)
        elif step == "softmax":
            mark()
            p = torch.ops.labkit.naive_softmax(s)
            del s
        elif step == "output":
            mark()
            torch.ops.labkit.naive_output(p, v, *tiles)
            del p
        elif step == "flash":
            from labkit.flash import flash_attention

            mark()
            flash_attention(q, k, v)
        else:
            block_m = int(step.removeprefix("q_outer_"))
            mark()
            kernels.tiled_attention(q, k, v, block_m=block_m, block_n=problem["block_n"])


def profile(problems: list[dict[str, Any]]) -> None:
    """Run every problem once unwatched, to compile and choose kernels, and once watched."""
    import torch

    from labkit import kernels
    from labkit.dtypes import torch_dtype

    # loading the files registers the operators
    _ = kernels.naive_in_kernels, kernels.tiled_attention
    torch.manual_seed(0)
    cuda = torch.cuda.cudart()
    with torch.no_grad():
        for problem in problems:
            shape = [problem[size] for size in ("batch", "heads", "seq_len", "head_dim")]
            options = {"device": "cuda", "dtype": torch_dtype(problem["dtype"])}
            q, k, v = (torch.randn(shape, **options) for _ in range(3))
            _attend(problem, q, k, v, lambda: None)
            torch.cuda.synchronize()
            cuda.cudaProfilerStart()
            _attend(problem, q, k, v, lambda: torch.cuda._sleep(1))
            torch.cuda.synchronize()
            cuda.cudaProfilerStop()
            del q, k, v


if __name__ == "__main__":
    what, given = sys.argv[1], json.loads(sys.argv[2])
    if what == "count":
        print(json.dumps([count_point(point) for point in given]))
    else:
        profile(given)
