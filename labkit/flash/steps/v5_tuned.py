r"""Step 5, tuned: the production kernel, its tiles chosen by trying them on the card.

The loop is step 4's, in the general form of ``labkit/flash/forward.py``.  New is who decides
about tiles, warps, stages, and whether the copy engine or pointers fetch them:
``labkit/flash/tuning.py`` leaves out what exceeds the card's shared memory or registers, times
the rest once, and keeps the winner on disk.

Guards against: a choice made by hand on one card.  The largest tiles that fit are not the
fastest: two programs of 4 warps on one SM let one's products run under the other's exponentials.

Taught in chapter 08 (what does the kernel look like?).
"""

from __future__ import annotations

from labkit.flash import launch, tuning
from labkit.flash.steps import _host

__all__ = ["call_for", "forward", "problem_for"]


def call_for(q, k, causal: bool, scale: float) -> launch.Call:
    """What ``labkit.flash.launch`` wants to know of these tensors, without a window or varlen."""
    return launch.Call(causal, scale, None, "ieee", q.shape[2], k.shape[2])


def problem_for(q, k, v, call: launch.Call, by_hand: str | None) -> tuning.Problem:
    """What the choice depends on; ``by_hand`` says why the hand-written kernel is left out."""
    describable = launch._describable(q, k, v)
    heads = q.shape[0] * q.shape[1]
    return launch._problem("forward", call, q, k, v, heads, describable, by_hand)


def forward(q, k, v, *, causal: bool = False, scale: float | None = None):
    """O and LSE of attention; parameters, result and errors as in ``v1_correct.forward``."""
    sizes, scale = _host.check(q, k, v, scale)
    call = call_for(q, k, causal, scale)
    problem = problem_for(q, k, v, call, "step 5 is without it")
    flops = launch._flops(call, sizes.batch * sizes.heads, 2 * sizes.head_dim)
    config = tuning.choose(
        problem, flops, lambda c: launch.forward(q, k, v, call, config=c, splits=1)
    )
    return launch.forward(q, k, v, call, config=config, splits=1)
