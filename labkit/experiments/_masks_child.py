"""Compiles FlexAttention for one case of the experiment ``masks``, into the compiler's cache.

Started by ``labkit.experiments.masks`` as ``python -m labkit.experiments._masks_child <case>
<plan>``, several side by side: most of a first call is compiling, on one core.
"""

from __future__ import annotations

import functools
import json
import sys

from labkit.experiments import masks


def main(case: str, plan: str) -> None:
    """Run one case once: ``[name of a pattern or a length, pass]``."""
    from labkit.patterns import Local

    (name, what), plan = json.loads(case), json.loads(plan)
    length = int(name) if name.isdigit() else plan["seq_len"]
    sort = name.endswith("_sorted")
    made = Local(plan["window"]) if name.isdigit() else None
    which = made or masks.made_for(plan, name.removesuffix("_sorted"))
    fn = masks._functions(plan, which, ["flex"], reorder=sort)["flex"]
    q, k, v, dout = masks._draw(plan, length, "cuda")
    leaves = [x.requires_grad_(what == "both") for x in (q, k, v)]
    functools.partial(masks._forward if what == "forward" else masks._both, fn, leaves, dout)()


if __name__ == "__main__":
    main(*sys.argv[1:])
