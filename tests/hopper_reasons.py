"""What every module of kernels written by hand for Hopper must say when it cannot take a call,
and how its kernels are compiled without a card.

Shared by ``test_flash_hopper.py`` and ``test_nsa_hopper*.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
import triton

from labkit.flash import gluon


class OnHopper(torch.Tensor):
    """A CPU tensor that says it lies on a card."""

    is_cuda = True
    device = torch.device("cuda", 0)


def pretend(monkeypatch) -> None:
    """Card 0 is a Hopper card, Gluon is there, and nothing is interpreted."""
    monkeypatch.setattr(gluon, "_hopper", lambda index: True)
    monkeypatch.setattr(gluon, "MISSING", "")
    monkeypatch.setattr(triton, "JITFunction", object)


def check_off_hopper(monkeypatch, why, q: torch.Tensor) -> None:
    """``why(q, k, v)`` has a reason for everything here, and never raises."""
    for thing in (q, q.float(), q[:, :, :0], None):
        reason = why(thing, q, q)
        assert isinstance(reason, str) and reason
    monkeypatch.setattr(gluon, "MISSING", "ImportError: nothing here")
    assert "nothing here" in why(q, q, q)


def check_unreadable(why, q: torch.Tensor, k: torch.Tensor) -> None:
    """``why(q)`` and ``why(q, k)`` of float16 tensors that are right name what is made wrong."""
    assert why(q) is None and why(q, k) is None
    assert "float16" in why(q.float()) and "float16" in why(q, k.bfloat16())
    assert "empty" in why(q, k[:, :0])
    a, b, c, d = q.shape
    assert "16 bytes" in why(q.new_zeros(a, b, c, d + 1)[..., 1:])
    assert "16 bytes" in why(q.new_zeros(a, b, d, c).transpose(2, 3))
    assert "16 bytes" in why(q.new_zeros(a, b, c, 2 * d)[..., ::2])
    assert "16 bytes" in why(q[:1].expand(2, -1, -1, -1))
    far = torch.as_strided(q.to("meta"), q.shape, (2**39, *q.stride()[1:]))  # a stride of 2⁴⁰ bytes
    assert "16 bytes" in why(far)


def compiled_elsewhere(child: str, wanted: list[tuple]) -> dict[tuple, Any]:
    """What the program ``child`` prints, a line of JSON for each of ``wanted``, which it reads.

    In a process of its own: there Triton compiles, and does not interpret.
    """
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", child], input=json.dumps(wanted), capture_output=True, text=True,
        env=env, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(wanted, map(json.loads, done.stdout.splitlines()), strict=True))
