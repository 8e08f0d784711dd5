r"""The longest sequence that fits: predicted by the budget, then found by bisection.

A model of two layers, at a small size and at a realistic one, without a mask; a forward pass
without gradients, a training step with a fused AdamW, and the same with checkpointed layers.  The
small size is called ``report``: the report states none, and it is the one that we took for it.

Predicted is the longest seq_len whose budget (``labkit.layers.budget``) is within the memory.
Then it is tried.  On a GPU torch's allocator is held to that memory, and a length fits if the
pass does not run out of it; weights, optimiser and cuBLAS's workspace are inside.  On a CPU,
which cannot be held to a limit honestly, the pass is traced on FakeTensors, and a length fits if
its peak does: that checks the budget, not the machine.

A fused kernel fits sequences of which one pass takes minutes.  There the attention kernels are
left out: what they return and what they need meanwhile is allocated, and nothing is computed.
Where both can be run, their peaks are compared (``hollow``).

The allocator takes memory from the driver in pieces, and a piece that is too small for the next
tensor is lost to it.  ``expandable`` repeats some cases with segments that grow.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).  Claims C22, C23.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from labkit.errors import check_choice
from labkit.experiments import Progress, Result, has_gpu
from labkit.experiments.layer_forward import SIZES, within_budget
from labkit.experiments.training_memory import _held_to, _total_memory, bisect_length
from labkit.experiments.training_step import _forward, a_step, traced_peak
from labkit.units import GIB

__all__ = [
    "CAPS",
    "CHAPTERS",
    "CLAIMED",
    "MODES",
    "NEEDS_GPU",
    "TITLE",
    "hollow_attention",
    "run",
]

TITLE = "The longest sequence that fits into 12, 24, 80 and 141 GB"
CHAPTERS = ("10",)
NEEDS_GPU = False

#: memory to fit into, by the name of the cards that have it; 141: all that an H200 gives
CAPS = {"12": 12 * GIB, "24": 24 * GIB, "80": 80 * GIB, "141": 141 * GIB}
MODES = ("inference", "training", "checkpointed")
#: name in source 001 → configuration, tokens that it states for 12 GB
CLAIMED = {
    "original": ("naive", "fp32", 2048),
    "flash": ("sdpa", "fp32", 4096),
    "flash_half": ("sdpa", "fp16", 8192),
}
#: beyond so many operations of attention in a pass, its kernels are left out
_HOLLOW_FROM = 4e13
_BUDGET_S = 200


def _cases(quick: bool, device: str) -> list[dict[str, Any]]:
    def case(size, backend, precision, mode, cap, expandable=False) -> dict[str, Any]:
        return {"size": size, "backend": backend, "precision": precision, "mode": mode,
                "cap": cap, "expandable": expandable}  # fmt: skip

    if device == "cpu":
        return [
            case("report", "naive", "fp32", "inference", "12"),
            case("report", "naive", "fp32", "training", "12"),
            case("report", "sdpa", "fp32", "training", "12"),
            case("report", "flash", "fp16", "checkpointed", "12"),
        ]
    claimed = [
        case("report", backend, precision, mode, "12")
        for backend, precision, _ in CLAIMED.values()
        for mode in ("inference", "training")
    ]
    if quick:
        return claimed
    ways = [("fp32", "inference"), ("fp16", "inference"), ("fp32", "training"),
            ("autocast_fp16", "training"), ("fp16", "training"),
            ("fp16", "checkpointed")]  # fmt: skip
    out = list(claimed)
    # twelve seconds for what is claimed, as many for each memory up to 80 GB, more for the largest
    main = [w for w in ways if w[0] in ("fp32", "fp16") and w[1] != "checkpointed"]
    for size, cap, some in (
        ("report", "12", ways), ("report", "80", ways), ("report", "24", main),
        ("report", "141", main), ("realistic", "12", main), ("realistic", "80", main),
    ):  # fmt: skip
        out += [
            case(size, backend, precision, mode, cap, True)
            for backend in ("naive", "flash")
            for precision, mode in some
        ]
    # the same tensors as flash, but for what a kernel needs while it runs
    out += [case("report", "sdpa", precision, mode, "12", True) for precision, mode in ways]
    return out


def run(*, quick: bool, device: str | None = None, progress: Progress | None = None) -> Result:
    """Predict and find the longest sequence of each configuration.

    Parameters
    ----------
    quick, device, progress : as for every experiment.

    Returns
    -------
    Result
        Keys end in ``.<size>.<backend>.<precision>.<mode>.<cap>``: ``predicted`` and ``found``
        (tokens), ``ratio`` (found over predicted), ``limit`` (bytes held to).  ``expandable…``
        with growing segments.  ``hollow.<backend>.<precision>.<mode>``: peak without the
        attention kernels over the peak with them.  ``claimed.<name>.<mode>``: tokens found over
        tokens stated for 12 GB.
    """
    device = check_choice("device", device or ("cuda" if has_gpu() else "cpu"), ("cuda", "cpu"))
    result = Result()
    work: list[tuple[str, tuple]] = []
    if device == "cuda":
        work += [
            ("hollow", (backend, precision, mode))
            for backend, precision in (("sdpa", "fp32"), ("sdpa", "fp16"), ("flash", "fp16"))
            for mode in ("training",)
        ]
    work += [("longest", (case,)) for case in _cases(quick, device)]
    do = {
        "hollow": lambda *how: _compare_hollow(result, *how),
        "longest": lambda case: _longest(result, case, device),
    }
    within_budget(result, work, do, _BUDGET_S, progress)
    for name, (backend, precision, stated) in CLAIMED.items():
        for mode in ("inference", "training"):
            key = f"found.report.{backend}.{precision}.{mode}.12"
            if key in result.results:
                ratio = result.results[key]["value"] / stated
                how = f"tokens found over the {stated} that source 001 states for 12 GB"
                result.add(f"claimed.{name}.{mode}", ratio, "1", how)
    result.notes.append(
        "Lengths on CUDA: torch's allocator is limited by set_per_process_memory_fraction."
        if device == "cuda"
        else "Lengths on a CPU: bisected against the traced peak, not against memory."
    )
    return result


# -- one case --------------------------------------------------------------------------------------


def _longest(result: Result, case: dict[str, Any], device: str) -> None:
    from labkit.layers import budget

    size, mode = SIZES[case["size"]], case["mode"]
    how = {
        "backend": case["backend"], "precision": case["precision"], "causal": False,
        "training": mode != "inference", "checkpoint": mode == "checkpointed",
        "device": device, "traced": device == "cpu",
    }  # fmt: skip
    shape = (size["dim"], size["heads"], size["layers"])

    def predict(memory: int) -> int:
        return budget.longest(memory, *shape, size["batch"], **how)

    limit, before, found, text = CAPS[case["cap"]], 0, None, ""
    row: dict[str, Any] = {"part": "longest", **case, **size}
    if device == "cpu":
        predicted = predict(limit)
        text = "traced peak within the limit"
        found = bisect_length(lambda n: _traces_within(case, n, limit), predicted, exact=True)
    else:
        total = _total_memory()
        if case["cap"] == "141" and limit > total:
            limit = total - _elsewhere()
        if limit > total:
            row["how"] = "not found: the card has less memory"
            predicted = predict(limit)
        else:
            with _held_to(limit, case["expandable"]) as before:
                predicted = predict(limit - before)
                text = "torch's allocator held to the limit"
                text += ", expandable segments" if case["expandable"] else ""
                if _operations(case, predicted) > _HOLLOW_FROM:
                    text += ", attention kernels left out"
                # to one part in 128: a pass over a large memory takes a second
                unit = max(1, predicted // 128)
                found = bisect_length(
                    lambda n: _runs(case, n * unit), predicted // unit, exact=True
                )  # fmt: skip
                found = None if found is None else found * unit
    row |= {"limit": limit, "held_before": before, "predicted": predicted, "found": found,
            "how": row.get("how", text)}  # fmt: skip
    result.rows.append(row)
    end = ".".join(case[k] for k in ("size", "backend", "precision", "mode", "cap"))
    where = f"{case['size']} size, batch {size['batch']}, {case['cap']} GB"
    kind = "expandable_" if case["expandable"] else ""
    result.add(f"predicted.{end}", predicted, "tokens", f"by labkit.layers.budget; {where}")
    result.add(f"limit.{end}", limit, "bytes", "memory that it has to fit into")
    if found is not None:
        result.add(f"{kind}found.{end}", found, "tokens", f"{text}; {where}")
        result.add(f"{kind}ratio.{end}", found / predicted, "1", f"found over predicted; {where}")


def _operations(case: Mapping[str, Any], seq_len: int) -> float:
    """Of the attention kernels in one pass: two products forward, five backward."""
    if case["backend"] == "naive":
        return 0.0
    size = SIZES[case["size"]]
    forward = 4.0 * size["batch"] * seq_len**2 * size["dim"] * size["layers"]
    times = {"inference": 1, "training": 3.5, "checkpointed": 4.5}[case["mode"]]
    # float32 kernels are an order of magnitude slower
    return forward * times * (10 if case["precision"] == "fp32" else 1)


def _elsewhere() -> int:
    """Bytes of the card that torch's allocator cannot have: contexts, other programs."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _traces_within(case: Mapping[str, Any], seq_len: int, limit: int) -> bool:
    size = {**SIZES[case["size"]], "seq_len": seq_len}
    mode = case["mode"]
    peak = traced_peak(
        size, case["backend"], case["precision"], training=mode != "inference",
        checkpoint=mode == "checkpointed",
    )  # fmt: skip
    return peak <= limit


def _pass(case: Mapping[str, Any], seq_len: int, *, hollow: bool) -> None:
    """One forward pass, or two steps: the first one makes the optimiser's state."""
    import torch

    size, mode = SIZES[case["size"]], case["mode"]
    step, x, target = a_step(
        size, case["backend"], case["precision"], "cuda", batch=size["batch"], seq_len=seq_len,
        checkpoint=mode == "checkpointed",
    )  # fmt: skip
    with hollow_attention() if hollow else nullcontext():
        if mode == "inference":
            del target
            _forward(step, x)
        else:
            for _ in range(2):
                step.launch(x, target)
        torch.cuda.synchronize()


def _runs(case: Mapping[str, Any], seq_len: int) -> bool:
    """Whether a pass over so many tokens does not run out of memory."""
    import torch

    from labkit.errors import NotEnoughMemoryError

    try:
        _pass(case, seq_len, hollow=_operations(case, seq_len) > _HOLLOW_FROM)
        return True
    except (torch.OutOfMemoryError, NotEnoughMemoryError):
        return False
    finally:
        gc.collect()  # the traceback of an error holds the frames, and they hold tensors
        torch.cuda.empty_cache()


# -- without the attention kernels -----------------------------------------------------------------


def _is_attention(name: str) -> bool:
    return name.startswith(("labkit::flash_forward", "labkit::flash_backward")) or (
        name.startswith("aten::_scaled_dot_product_") and "math" not in name
    )


@contextmanager
def hollow_attention() -> Iterator[None]:
    """Inside, fused attention kernels are not launched; what they would return is allocated.

    The outputs have the right shapes, strides and dtypes, and hold whatever was in memory.  What
    a backward kernel needs while it runs is allocated and freed: delta, and for torch's own
    half-precision kernel dQ in float32.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    class Hollow(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = func._schema.name
            if not _is_attention(name):
                return func(*args, **kwargs)
            with FakeTensorMode() as fake:

                def to_fake(x):
                    return fake.from_tensor(x) if isinstance(x, torch.Tensor) else x

                outs = func(*tree_map(to_fake, args), **tree_map(to_fake, kwargs))

            def allocate(x):
                if not isinstance(x, torch.Tensor):
                    return x
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

            made = tree_map(allocate, outs)
            if "backward" in name:
                q = next(x for x in args if isinstance(x, torch.Tensor) and x.dim() == 4)
                rows = q.shape[:3]
                scratch = [torch.empty(rows, dtype=torch.float32, device=q.device)]
                if name.startswith("aten") and q.dtype != torch.float32:
                    scratch.append(torch.empty(q.shape, dtype=torch.float32, device=q.device))
                del scratch
            return made

    with Hollow():
        yield


def _compare_hollow(result: Result, backend: str, precision: str, mode: str) -> None:
    """Peak of a pass without the attention kernels, beside the peak with them."""
    import torch

    case = {"size": "report", "backend": backend, "precision": precision, "mode": mode}
    peaks = {}
    for hollow in (False, True):
        _pass(case, 4096, hollow=hollow)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_stats()["requested_bytes.all.current"]
        _pass(case, 4096, hollow=hollow)
        peaks[hollow] = torch.cuda.memory_stats()["requested_bytes.all.peak"] - start
    row = {"part": "hollow", **case, "seq_len": 4096, "real": peaks[False], "hollow": peaks[True]}
    result.rows.append(row)
    how = "requested peak without the attention kernels over that with them; 4096 tokens"
    result.add(f"hollow.{backend}.{precision}.{mode}", peaks[True] / peaks[False], "1", how)
