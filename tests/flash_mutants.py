"""Breaks a copy of labkit.flash, one way at a time, and runs the check that should notice.

Started by test_flash_mutants.py as a program of its own: it loads torch and Triton once and
forks for every mutant, so that each imports ``labkit.flash`` afresh, from its own broken copy,
and registers its own operators.

    python tests/flash_mutants.py FOLDER     prints one JSON line per mutant
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One mistake: in ``file``, ``old`` (which occurs once) becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    #: the check of flash_cases.CHECKS that must notice
    check: str
    #: what the complaint must name; a mutant killed for another reason proves little
    says: str


MUTANTS = [
    Mutant(
        "nothing is broken", "softmax.py", "p = tl.exp2(", "p = tl.exp2(", "many_blocks", "",
    ),
    # -- the online softmax
    Mutant(
        "O is not rescaled when the maximum grows", "softmax.py",
        "o * alpha[:, None]", "o", "growing_scores", "o: ",
    ),
    Mutant(
        "the sum is not rescaled when the maximum grows", "softmax.py",
        "l * alpha + tl.sum(p, 1)", "l + tl.sum(p, 1)", "growing_scores", "",
    ),
    Mutant(
        "no maximum is taken off before exp", "softmax.py",
        "m_new = tl.maximum(m, tl.max(s, 1))", "m_new = tl.zeros_like(m)", "huge_logits", "",
    ),
    Mutant(
        "the maximum is that of one block", "softmax.py",
        "m_new = tl.maximum(m, tl.max(s, 1))", "m_new = tl.max(s, 1)", "shrinking_scores", "",
    ),
    Mutant(
        "LSE without the maximum", "softmax.py",
        "m * scale + tl.log(l)", "tl.log(l)", "many_blocks", "lse: ",
    ),
    Mutant(
        "e instead of 2 as the base", "softmax.py",
        "p = tl.exp2(", "p = tl.exp(", "many_blocks", "",
    ),
    Mutant(
        "a row that sees nothing is divided by 0", "softmax.py",
        "tl.where(nothing, 1.0, l)", "tl.where(nothing, 0.0, l)",
        "causal_more_queries", "o: ",
    ),
    # -- the mask
    Mutant(
        "causal mask off by one", "masking.py",
        "seen = seen & (j <= at)", "seen = seen & (j < at)", "causal_square", "",
    ),
    Mutant(
        "causal mask aligned at the top left", "masking.py",
        "at = i + (Nk - Nq)", "at = i", "causal_more_keys", "",
    ),
    Mutant(
        "the tail beyond the last key is not masked", "masking.py",
        "seen = (i < Nq) & (j < Nk)", "seen = (i < Nq) & (j >= 0)", "ragged_tail", "",
    ),
    Mutant(
        "window one key too wide on the left", "masking.py",
        "seen = seen & (j > at - window)", "seen = seen & (j >= at - window)", "window_causal", "",
    ),
    Mutant(
        "window one key too narrow on the right", "masking.py",
        "seen = seen & (j < at + window)", "seen = seen & (j < at + window - 1)",
        "window_full", "",
    ),
    Mutant(
        "the diagonal tile is taken for one that needs no mask", "masking.py",
        "full_hi = max(all_hi, 0) // BLOCK_N * BLOCK_N",
        "full_hi = tl.cdiv(max(all_hi, 0), BLOCK_N) * BLOCK_N", "causal_square", "",
    ),
    # -- memory
    Mutant(
        "strides of rows and columns swapped", "tiles.py",
        "row[:, None] * stride_n + column[None, :] * stride_d",
        "row[:, None] * stride_d + column[None, :] * stride_n", "strides", "",
    ),
    Mutant(
        "what lies beyond the last row is loaded", "tiles.py",
        "tile = tl.load(at, mask=inside, other=0.0)", "tile = tl.load(at)", "ragged_tail", "",
    ),
    # -- groups, splits
    Mutant(
        "a query head reads the KV head of its number modulo theirs", "forward.py",
        "kv_head = head if PACK else head // GROUP",
        "kv_head = head if PACK else head % (heads // GROUP)", "groups_of_long_sequences", "",
    ),
    Mutant(
        "a KV head collects from the wrong queries", "backward.py",
        "head = kv_head * GROUP + g", "head = g * kv_heads + kv_head", "groups", "dk: ",
    ),
    Mutant(
        "parts of the keys are averaged, not weighed", "forward.py",
        "weight = tl.exp(part_lse - safe)", "weight = tl.exp(part_lse * 0.0)",
        "one_query_many_keys", "",
    ),
    # -- the backward pass
    Mutant(
        "causal mask missing in the backward pass", "backward.py",
        "st = hide(st, i[None, :], j[:, None], Nq, Nk, window, CAUSAL, WINDOW)",
        "st = hide(st, i[None, :], j[:, None], Nq, Nk, window, False, WINDOW)",
        "causal_square", "dk: ",
    ),
    Mutant(
        "delta missing", "backward.py",
        "ds = p * (dp - delta_i[:, None])", "ds = p * dp", "own_scale", "dq: ",
    ),
    Mutant(
        "delta added", "backward.py",
        "dst = pt * (dpt - delta_i[None, :])", "dst = pt * (dpt + delta_i[None, :])",
        "own_scale", "dk: ",
    ),
    Mutant(
        "scale twice", "backward.py",
        "store_tile(dq, acc * scale,", "store_tile(dq, acc * scale * scale,", "own_scale", "dq: ",
    ),
    Mutant(
        "scale forgotten", "backward.py",
        "store_tile(dk, dk_acc * scale,", "store_tile(dk, dk_acc,", "own_scale", "dk: ",
    ),
    Mutant(
        "the gradient of LSE with the wrong sign", "backward.py",
        "out -= tl.where(saw", "out += tl.where(saw", "lse_gradient", "dq: ",
    ),
]  # fmt: skip


def run(mutant: Mutant, folder: Path) -> dict[str, str]:
    """In a process of its own: import the broken copy, run the check, say what came of it."""
    source = (folder / "labkit/flash" / mutant.file).read_text("utf-8")
    if source.count(mutant.old) != 1:
        return {"outcome": "stale", "why": f"{mutant.file} has {mutant.old!r} not once"}
    (folder / "labkit/flash" / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    import labkit

    # labkit.flash comes from the copy, everything else from where it is
    labkit.__path__.insert(0, str(folder / "labkit"))
    import flash_cases

    import labkit.flash.launch

    if not labkit.flash.launch.__file__.startswith(str(folder)):
        return {"outcome": "stale", "why": f"ran {labkit.flash.launch.__file__}, not the copy"}
    try:
        flash_cases.CHECKS[mutant.check]("cpu")
    except AssertionError as error:
        return {"outcome": "killed", "why": str(error).splitlines()[0]}
    except Exception:
        return {"outcome": "crashed", "why": traceback.format_exc()[-300:]}
    return {"outcome": "alive", "why": ""}


def main(folder: Path, at_once: int = 2) -> None:
    """Run all mutants, ``at_once`` at a time."""
    import torch

    torch.set_num_threads(1)  # a fork does not take over threads
    # What every mutant would load for itself, and nothing that could hold a thread.
    import oracle  # noqa: F401
    import torch._dynamo
    import torch._inductor.config
    import torch.utils.flop_counter
    import triton.language  # noqa: F401

    import labkit.kernels.runtime
    import labkit.memory  # noqa: F401

    waiting, running = list(enumerate(MUTANTS)), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            index, mutant = waiting.pop(0)
            own = folder / str(index)
            shutil.copytree(
                ROOT / "labkit/flash", own / "labkit/flash",
                ignore=shutil.ignore_patterns("steps", "__pycache__"),
            )  # fmt: skip
            pid = os.fork()
            if pid == 0:
                start = time.perf_counter()
                try:
                    found = run(mutant, own)
                except BaseException:
                    found = {"outcome": "crashed", "why": traceback.format_exc()[-300:]}
                found |= {"name": mutant.name, "seconds": round(time.perf_counter() - start, 1)}
                (own / "found.json").write_text(json.dumps(found))
                os._exit(0)
            running[pid] = index
        pid, status = os.wait()
        path = folder / str(running.pop(pid)) / "found.json"
        if path.exists():
            print(path.read_text(), flush=True)
        else:
            print(json.dumps({"outcome": "crashed", "why": f"status {status}"}), flush=True)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    main(Path(sys.argv[1]))
