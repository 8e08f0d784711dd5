"""What ``labkit.experiments.nsa_speed`` runs in processes of its own.

``python -m labkit.experiments._nsa_child warm WHOSE DTYPE [SEQ_LEN]``
    compiles one implementation's kernels; several such processes run side by side, and Triton's
    cache on disk keeps what they compile.
``ncu … python -m labkit.experiments._nsa_child profile JSON``
    runs each road of the selection between ``cudaProfilerStart`` and ``cudaProfilerStop``, a
    marker kernel before each step (see ``labkit.experiments._dram_child``), and writes which ran
    to the file that JSON names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def labels(problem: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each marker announces, in order: (pattern, step)."""
    return [(pattern, step) for pattern in problem["patterns"] for step in problem["steps"]]


def _step(step: str, shape: Any, x: Mapping[str, Any], blocks: Any) -> Callable[[], Any]:
    """One step as a function that launches its kernels and nothing else."""
    from labkit.experiments import nsa_speed
    from labkit.nsa import selection, selection_backward

    q, k, v, call = x["q"], x["k"], x["v"], nsa_speed._call_of(shape)
    if step == "fla":
        long = blocks.long()
        return lambda: nsa_speed._fla_selection(shape, x, long)
    if step == "backward":
        o, lse = selection.forward(q, k, v, blocks, call)
        return lambda: selection_backward.backward(x["do"], None, q, k, v, o, lse, blocks, call)
    return lambda: selection.forward(q, k, v, blocks, call, road=step)


def profile(problem: Mapping[str, Any]) -> None:
    """Every step once unwatched, to compile and choose kernels, and once watched."""
    import torch

    from labkit.experiments import nsa_speed
    from labkit.nsa.model import Shape

    def note(line: str) -> None:
        with Path(problem["ran"]).open("a", encoding="utf-8") as file:
            print(" ".join(line.split()), file=file)

    shape = Shape(seq_len=problem["seq_len"], dtype=problem["dtype"])
    cuda = torch.cuda.cudart()
    torch.manual_seed(0)
    with torch.no_grad():
        x = nsa_speed._draw(shape, "random", "cuda", problem["dtype"], grad=False)
        chosen = {p: nsa_speed.choices(shape, p, "cuda") for p in problem["patterns"]}
        for pattern, step in labels(problem):
            try:
                fn = _step(step, shape, x, chosen[pattern])
                fn()
                torch.cuda.synchronize()
            except Exception as error:
                note(f"not {step} {pattern}: {type(error).__name__}: {error}"[:300])
                continue
            cuda.cudaProfilerStart()
            torch.cuda._sleep(1)
            fn()
            torch.cuda.synchronize()
            cuda.cudaProfilerStop()
            note(f"ran {step} {pattern}")


def warm(whose: str, dtype: str, seq_len: int = 0) -> None:
    """Compile what one implementation needs; some kernels are compiled for a length."""
    import torch

    from labkit.experiments import nsa_speed
    from labkit.nsa.model import Shape

    if whose.startswith("group_"):
        # as long as the timed problem: sizes that are 1 are compiled apart
        shape = Shape(seq_len=8192, kv_heads=64 // int(whose.removeprefix("group_")), dtype=dtype)
    else:
        # fla's dK/dV is compiled for the number of blocks, and chooses at the first length it meets
        shape = Shape(seq_len=seq_len or (16384 if whose == "topk" else 8192), dtype=dtype)
    x = nsa_speed._draw(shape, "random", "cuda", dtype)
    blocks = nsa_speed.choices(shape, "random", "cuda")
    qkv = (x["q"], x["k"], x["v"])
    if whose.startswith("group_"):
        torch.autograd.grad(nsa_speed._selection(shape, x, blocks), qkv, x["do"])
        with torch.no_grad():
            nsa_speed._selection(shape, x, blocks)
            for road in ("keys", "both") if shape.group < 8 else ():
                with suppress(Exception):
                    _step(road, shape, x, blocks)()
    elif whose == "topk":
        for count in (4, 16, 64):
            nsa_speed._chosen(Shape(seq_len=16384, count=count, dtype=dtype), x)
    elif whose == "labkit":
        gates = [x[name] for name in ("g_cmp", "g_slc", "g_swa")]
        torch.autograd.grad(nsa_speed._whole(shape, x), (*qkv, *gates), x["do"])
        torch.autograd.grad(nsa_speed._selection(shape, x, blocks), qkv, x["do"])
        with torch.no_grad():  # other kernels: the last one adds the branches
            nsa_speed._whole(shape, x)
            nsa_speed._whole(shape, x, False)
        two = nsa_speed._whole(shape, x, False)
        torch.autograd.grad(two, (*qkv, *gates[:2]), x["do"])
    elif whose == "roads":
        with torch.no_grad():
            for road in ("queries", "keys"):
                with suppress(Exception):
                    _step(road, shape, x, blocks)()
            with suppress(Exception):
                from labkit.nsa import selection, selection_backward

                call = nsa_speed._call_of(shape)
                o, lse = selection.forward(*qkv, blocks, call)
                selection_backward.backward(
                    x["do"], None, *qkv, o, lse, blocks, call, road="keys"
                )
    elif whose == "fla_forward":
        with torch.no_grad():
            nsa_speed._fla_selection(shape, x, blocks.long())
    elif whose == "fla_backward":
        with torch.no_grad():
            # from any output: what is wanted is the compiled kernel
            nsa_speed._fla("parallel_nsa_bwd")(
                q=x["q"], k=x["k"], v=x["v"], o=x["do"], do=x["do"], block_size=64,
                lse=torch.zeros(1, shape.seq_len, 64, device="cuda"), block_indices=blocks.long(),
                block_counts=16, scale=128**-0.5,
            )  # fmt: skip
    else:
        from fla.ops.nsa.compression import parallel_nsa_compression
        from fla.ops.utils.pooling import mean_pooling

        k_cmp, v_cmp = (mean_pooling(y, 64, None) for y in qkv[1:])
        out, lse = parallel_nsa_compression(
            q=x["q"], k=k_cmp, v=v_cmp, TK=shape.seq_len, block_size=64, scale=128**-0.5
        )
        torch.autograd.grad(out, qkv, x["do"])
        with torch.no_grad():
            nsa_speed._fla("parallel_nsa_topk")(
                q=x["q"], k=k_cmp, lse=lse, TK=shape.seq_len, block_counts=16, block_size=64,
                scale=128**-0.5,
            )  # fmt: skip
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1] == "warm":
        warm(*sys.argv[2:4], *map(int, sys.argv[4:5]))
    else:
        profile(json.loads(sys.argv[2]))
