r"""Step 5, tuned: the production kernel, its tiles chosen by trying them on the card.

The loop is step 4's, in the general form of ``labkit/flash/forward.py``.  New is who decides
about tiles, warps, stages, and whether the copy engine or pointers fetch them:
``labkit/flash/tuning.py`` leaves out what exceeds the card's shared memory or registers, times
the rest once, and keeps the winner on disk.  Small problems, and all with ``LABKIT_TUNE=0``, take
the choice by rule.

Guards against: a choice made by hand on one card.  The largest tiles that fit are not the
fastest: two programs of 4 warps on one SM let one's products run under the other's exponentials.

Taught in chapter 08 (what does the kernel look like?).
"""

from __future__ import annotations

from labkit.flash import launch, tuning
from labkit.flash.masking import visible_pairs
from labkit.flash.steps import _host

__all__ = ["call_for", "forward", "problem_for"]


def call_for(q, k, causal: bool, scale: float) -> launch.Call:
    """What ``labkit.flash.launch`` wants to know of these tensors, without a window or varlen."""
    return launch.Call(causal, scale, None, "ieee", q.shape[2], k.shape[2])


def problem_for(q, k, v, call: launch.Call, by_hand: str | None) -> tuning.Problem:
    """What the choice depends on; ``by_hand`` says why the hand-written kernel is left out."""
    arch, shared_limit, sms, _ = launch.card(q)
    return tuning.Problem(
        kind="forward", dtype=str(q.dtype).removeprefix("torch."), precision=call.precision,
        head_dim=q.shape[3], head_dim_v=v.shape[3], rows=call.max_q, cols=call.max_k,
        heads=q.shape[0] * q.shape[1], causal=call.causal, windowed=False, descriptors=arch >= 90,
        by_hand=by_hand, arch=arch, shared_limit=shared_limit, sms=sms,
    )  # fmt: skip


def forward(q, k, v, *, causal: bool = False, scale: float | None = None):
    """O and LSE of attention; parameters, result and errors as in ``v1_correct.forward``."""
    sizes, scale = _host.check(q, k, v, scale)
    call = call_for(q, k, causal, scale)
    key = problem_for(q, k, v, call, "step 5 is without it")

    def ready(config: tuning.Config):
        return lambda: launch.forward(q, k, v, call, config=config, splits=1)

    pairs = visible_pairs(sizes.seq_len_q, sizes.seq_len_k, causal, None)
    flops = 4 * sizes.batch * sizes.heads * sizes.head_dim * pairs
    return launch.forward(q, k, v, call, config=tuning.choose(key, flops, ready), splits=1)
