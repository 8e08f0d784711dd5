"""A fresh process that times ``nsa_func`` as source 004 does, without and with the weights.

Started by ``labkit.experiments.nsa_weights`` as ``python -m labkit.experiments._nsa_weights_child
JSON`` with ``{"heads", "seq_len", "head_dim", "calls", "mode"}`` and perhaps ``"device"``.  Prints
one line of JSON.

A process of its own, because what is measured is what a program sees that has called nothing
before.  The way of timing is the source's on purpose: ``time.time``, ``calls`` calls in a row, one
synchronisation at the end, nothing before.  The modes change one thing each:

``source``  without the weights first, then with them: the source's order.
``turned``  with them first.
``warm``    the source's order, after both have been called and the device is idle.

The clock is also read before the synchronisation: by then all calls are queued.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

MODES = ("source", "turned", "warm")


def main(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of both loops, and of the process's first call."""
    import torch

    from labkit.nsa import nsa_func

    device = job.get("device", "cuda")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def inputs():
        shape = (1, job["seq_len"], job["heads"])
        q, k, v = (torch.randn(*shape, job["head_dim"], device=device) for _ in range(3))
        gates = [torch.softmax(torch.randn(shape, device=device), dim=-1) for _ in range(3)]
        return q, k, v, *gates

    tensors = inputs()
    found: dict[str, float] = {}

    def loop(name: str, weights: bool) -> None:
        start = time.time()
        for _ in range(job["calls"]):
            made = nsa_func(*tensors, return_attn_weights=weights)
        found[f"{name}_queued"] = time.time() - start
        wait()
        found[name] = time.time() - start
        del made

    if job["mode"] == "warm":
        for weights in (False, True):
            nsa_func(*tensors, return_attn_weights=weights)
        wait()
    order = (("without", False), ("with", True))
    for name, weights in order[::-1] if job["mode"] == "turned" else order:
        loop(name, weights)
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
