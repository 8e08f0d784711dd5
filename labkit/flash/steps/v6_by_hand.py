r"""Step 6, by hand: who does what when, for Hopper alone.

In the steps before the compiler decides when a warp waits.  ``labkit/flash/hopper.py`` is written
in Gluon, one level below Triton's language, where the program says it itself: one warp does
nothing but ask the copy engine for tiles, groups of warps multiply and exponentiate, and
:math:`Q K_{j+1}^\top` is issued before :math:`P_j V_j`, so that the tensor cores have work
while the exponentials of block j + 1 are computed.

Runs on compute capability 9.0 with Triton's Gluon; elsewhere step 5 is the last.

Taught in chapter 08 (what does the kernel look like?).
"""

from __future__ import annotations

from labkit.errors import ArgumentError
from labkit.flash import launch, tuning
from labkit.flash.steps import _host
from labkit.flash.steps.v5_tuned import call_for, problem_for

__all__ = ["configs", "forward", "tried"]

_chosen: dict[str, tuning.Config] = {}
#: problem → configuration → ms: what was tried, the losers too
tried: dict[str, dict[str, float]] = {}


def configs(q, k, v, *, causal: bool = False) -> list[tuning.Config]:
    """The configurations of the hand-written kernel for these tensors.

    Raises
    ------
    ArgumentError
        if it cannot run on them; the message says why.
    """
    from labkit.flash import hopper

    why = hopper.supports(q, k, v, causal=causal, window=None)
    problem = problem_for(q, k, v, call_for(q, k, causal, 1.0), None)
    found = [] if why else hopper.candidates(problem)
    if not found:
        raise ArgumentError(
            "q", tuple(q.shape), f"cannot go to the hand-written Hopper kernel: {why or 'none'}.",
            "Use step 5.",
        )  # fmt: skip
    return found


def forward(q, k, v, *, causal: bool = False, scale: float | None = None):
    """O and LSE of attention; parameters, result and errors as in ``v1_correct.forward``."""
    _, scale = _host.check(q, k, v, scale)
    call = call_for(q, k, causal, scale)
    key = problem_for(q, k, v, call, None).key
    if key not in _chosen:
        found = configs(q, k, v, causal=causal)

        def ready(config: tuning.Config):
            return lambda: launch.forward(q, k, v, call, config=config)

        best, tried[key] = tuning.fastest(found, ready)
        _chosen[key] = best or found[0]
    return launch.forward(q, k, v, call, config=_chosen[key])
