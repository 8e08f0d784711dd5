"""Which kernel computes attention: what torch would take, what ran, and what to take instead.

=================  ============================================================================
file               holds
=================  ============================================================================
``sdpa.py``        ``explain``: which SDPA backend would run, and why the others would not;
                   ``force``: one backend, or some in an order of one's own
``seen.py``        ``ran``: which one did run, by the operators and kernels that were seen
``compute.py``     ``attention``: one call for every implementation, by name
``policy.py``      ``Policy``: what was measured on a card, and what it says to use
``measure.py``     ``measure_policy``: makes one
=================  ============================================================================

Importing this package loads neither torch nor Triton; the first use of a name does.
Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "BACKENDS": "compute",
    "Choice": "policy",
    "Crossing": "policy",
    "Explanation": "sdpa",
    "Policy": "policy",
    "PolicyIgnored": "policy",
    "Ran": "seen",
    "Refusal": "sdpa",
    "Segment": "policy",
    "attention": "compute",
    "can_run": "compute",
    "explain": "sdpa",
    "force": "sdpa",
    "load_policy": "policy",
    "measure_policy": "measure",
    "policy_file": "policy",
    "ran": "seen",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(f"labkit.dispatch.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'labkit.dispatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
