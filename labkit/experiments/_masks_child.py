"""One case of the experiment ``masks``: compiled beside the others, measured when its turn comes.

Started by ``labkit.experiments.masks`` as ``python -m labkit.experiments._masks_child <name> <pass>
<plan> <path>``.  Makes ``<path>.ready`` when all is compiled, waits for ``<path>.go``, and leaves
what it measured in ``<path>.rows``, as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path

import torch

from labkit.experiments import Result, masks


def main(name: str, what: str, plan: str, files: str) -> None:
    """Compile one case by running it once, and measure it when told to."""
    plan, parent = json.loads(plan), os.getppid()
    labels, which, there, functions = masks.case_apart(plan, name, what)
    torch.manual_seed(0)
    q, k, v, dout = masks._draw(plan, labels["seq_len"], plan["device"])
    leaves = [x.requires_grad_(what == "both") for x in (q, k, v)]
    run = masks._forward if what == "forward" else masks._both
    (function,) = functions.values()
    start = time.perf_counter()
    functools.partial(run, function, leaves, dout)()
    if plan["device"] == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    del q, k, v, dout, leaves
    Path(f"{files}.ready").touch()
    while not Path(f"{files}.go").exists():
        if os.getppid() != parent:
            return  # nobody waits for it any more
        time.sleep(0.02)
    result = Result()
    masks._race(result, plan, plan["device"], functions, labels, which, what, there=there)
    for row in result.rows:
        row["first_s"] = round(first, 2)
    found = json.dumps({"rows": result.rows, "notes": result.notes})
    Path(f"{files}.rows").write_text(found, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
