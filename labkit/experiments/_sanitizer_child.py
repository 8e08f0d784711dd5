"""The program that compute-sanitizer watches: a few tiny cases, every kernel of each road.

Started by ``labkit.experiments._correctness`` as ``compute-sanitizer --tool … python -m
labkit.experiments._sanitizer_child JSON`` where JSON is ``{"worker": a module, "roads": […],
"cases": […]}``.  Inputs are made on the CPU and nothing is judged, so that what is launched is what
is to be watched.
With ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` each tensor is an allocation of its own, and an access
past its end is one that the tool can see.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any


def main(asked: dict[str, Any]) -> None:
    """Run what is asked; print how many (case, road) ran."""
    import torch

    worker = import_module(asked["worker"])
    ran = 0
    for entry in asked["cases"]:
        case = worker.Case(**entry)
        tensors = [x.cuda() for x in worker.make(case)]
        for road in worker.roads(*tensors, case):
            if road in asked["roads"]:
                worker.attend(*tensors, case, road)
                torch.cuda.synchronize()
                ran += 1
    print(f"ran {ran}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
