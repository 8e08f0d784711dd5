"""Cases for the selection kernels: what they are given, and the check that every road must pass.

Shared by ``test_nsa_selection*.py``, which run them in the interpreter or on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import nsa_oracle
import torch
from oracle import assert_within_low_precision_error

from labkit.experiments._flash_worker import remade
from labkit.nsa.call import Call

FORCED = (1, 2)


@dataclass(frozen=True)
class Case:
    """One problem: sizes, choice, and what is done with it.

    ``m`` queries, ``n`` keys (None: as many); ``lengths`` of the sequences of a varlen batch, then
    m is their sum.  ``pattern``: ``random`` (with −1 anywhere), ``messy`` (out of range, in the
    future, named twice), ``all`` (every block), ``nothing``, ``first`` (block 0 only).
    """

    m: int
    n: int | None = None
    group: int = 2
    heads: int = 1
    d: int = 16
    d_v: int | None = None
    block: int = 16
    slots: int = 3
    pattern: str = "random"
    dtype: str = "float32"
    batch: int = 1
    lengths: tuple[int, ...] | None = None
    scale: float | None = None
    strided: bool = False

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.n or self.m}", f"g{self.group}h{self.heads}", f"d{self.d}"]
        parts += [f"v{self.d_v}"] * (self.d_v is not None)
        parts += [f"b{self.block}s{self.slots}", self.pattern, self.dtype]
        parts += [f"batch{self.batch}"] * (self.batch > 1)
        parts += ["varlen" + "_".join(map(str, self.lengths))] if self.lengths else []
        parts += ["strided"] * self.strided
        return "-".join(parts)


def offsets(lengths, device="cpu", block=None) -> torch.Tensor:
    """Where each sequence starts; with ``block`` in blocks, the last of each perhaps incomplete."""
    sizes = [n if block is None else -(-n // block) for n in lengths]
    return torch.tensor([0, *sizes], device=device).cumsum(0).to(torch.int32)


def call_of(case: Case, device="cpu", precision="ieee") -> Call:
    """The ``Call`` that ``api.py`` would make."""
    n = case.n or case.m
    scale = case.d**-0.5 if case.scale is None else case.scale
    sizes = dict(max_q=case.m, max_k=n)
    if case.lengths is not None:
        sizes = dict(
            max_q=max(case.lengths), max_k=max(case.lengths),
            cu=offsets(case.lengths, device), cu_blocks=offsets(case.lengths, device, case.block),
        )  # fmt: skip
    return Call(scale=scale, precision=precision, block_size=case.block, count=case.slots, **sizes)


def positions(case: Case, device="cpu") -> torch.Tensor:
    """Position of each query in its sequence."""
    if case.lengths is not None:
        return torch.cat([torch.arange(n, device=device) for n in case.lengths])
    n = case.n or case.m
    return torch.arange(n - case.m, n, device=device)


def choose(case: Case, device="cpu") -> torch.Tensor:
    """``block_indices`` ``[B, M, H, S]``."""
    shape = (case.batch, case.m, case.heads, case.slots)
    own = (positions(case, device) // case.block)[None, :, None, None]
    if case.pattern == "nothing":
        return torch.full(shape, -1, device=device)
    if case.pattern == "first":
        chosen = torch.full(shape, -1, device=device)
        chosen[..., case.slots // 2] = 0
        return chosen
    if case.pattern == "all":
        every = torch.arange(case.slots, device=device).expand(shape)
        return torch.where(every <= own, every, -1)
    blocks = int(own.max()) + 1
    drawn = torch.rand(*shape[:3], blocks, device=device)
    drawn = torch.where(torch.arange(blocks, device=device) <= own, drawn, -1.0)
    drawn[..., 0] = 3.0
    drawn.scatter_(3, own.expand(*shape[:3], 1), 2.0)
    value, chosen = drawn.topk(min(case.slots, blocks), -1)
    chosen = torch.where(value < 0, -1, chosen)
    if chosen.shape[-1] < case.slots:
        rest = chosen.new_full((*shape[:3], case.slots - chosen.shape[-1]), -1)
        chosen = torch.cat([chosen, rest], -1)
    if case.pattern == "messy":
        extra = torch.randint(-1, blocks + 3, shape, device=device)
        chosen = torch.where(torch.rand(shape, device=device) < 0.4, extra, chosen)
        twice = torch.rand(shape[:3], device=device) < 0.3
        chosen[..., -1] = torch.where(twice, chosen[..., 0], chosen[..., -1])
    unused = torch.rand(shape, device=device) < 0.1
    return torch.where(unused, -1, chosen)[..., torch.randperm(case.slots, device=device)]


def _tensor(case: Case, n: int, heads: int, width: int, device) -> torch.Tensor:
    shape = (case.batch, n, heads, width)
    if case.strided:  # heads before positions, and room after each row
        x = torch.randn(case.batch, heads, n, width + 3, device=device)[..., :width].transpose(1, 2)
        return x.to(getattr(torch, case.dtype))
    return torch.randn(shape, device=device).to(getattr(torch, case.dtype))


def make(case: Case, device="cpu"):
    """q, k, v, dout, dlse, block_indices."""
    n, hq = case.n or case.m, case.group * case.heads
    d_v = case.d_v or case.d
    q = _tensor(case, case.m, hq, case.d, device)
    k = _tensor(case, n, case.heads, case.d, device)
    v = _tensor(case, n, case.heads, d_v, device)
    dout = _tensor(case, case.m, hq, d_v, device)
    dlse = torch.randn(case.batch, hq, case.m, device=device)
    return q, k, v, dout, dlse, choose(case, device)


def truth(case: Case, q, k, v, chosen, dtype=torch.float64):
    """O and LSE by the dense oracle in ``dtype``."""
    cu = None if case.lengths is None else offsets(case.lengths, q.device)
    o, lse, _ = nsa_oracle.selection(
        *(x.to(dtype) for x in (q, k, v)), chosen, block_size=case.block, scale=case.scale,
        cu_seqlens=cu,
    )  # fmt: skip
    return o, lse


def gradients(case: Case, q, k, v, dout, dlse, chosen, dtype=torch.float64):
    """dq, dk, dv by autograd through the oracle; ``dlse`` None if it is not used."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    o, lse = truth(case, *leaves, chosen, dtype)
    if dlse is None:
        return torch.autograd.grad(o, leaves, dout.to(dtype))
    return torch.autograd.grad([o, lse], leaves, [dout.to(dtype), dlse.to(dtype)])


def remade_errors(case: Case, q, k, v, dout, dlse, chosen):
    """What making P again from LSE costs dq, dk, dv, as the flash tests count it."""
    cu = None if case.lengths is None else offsets(case.lengths, q.device)
    _, lse, p = nsa_oracle.selection(
        q.double(), k.double(), v.double(), chosen, block_size=case.block, scale=case.scale,
        cu_seqlens=cu,
    )  # fmt: skip
    scores = torch.where(p > 0, p.log() + lse[..., None], float("-inf"))
    heads_first = (x.transpose(1, 2) for x in (q, k, v, dout))
    errors = remade(*heads_first, dlse, scores, p, case.scale)
    return tuple(x.transpose(1, 2) for x in errors)


def rmse_ratio(ours, oracle) -> float:
    """‖ours − oracle‖ / ‖oracle‖."""
    error = (ours.double() - oracle).norm() / oracle.norm().clamp_min(1e-30)
    return error.item()


def assert_close(case: Case, what: str, ours, oracle, plain, factor=2.0, extra=None) -> None:
    """Within twice the error of dense attention in the same dtype; in bf16 a ratio below 0.005."""
    assert_within_low_precision_error(
        ours, oracle, plain.to(ours.dtype), factor=factor, what=f"{case} {what}", extra=extra
    )
    if case.dtype == "bfloat16" and oracle.abs().max() > 0:
        ratio = rmse_ratio(ours, oracle)
        assert ratio < 0.005, f"{case} {what}: RMSE ratio {ratio:.4g}"


def assert_lse(case: Case, ours, oracle) -> None:
    """LSE: −∞ where the oracle says so, elsewhere as exact as scores in float32 allow."""
    assert ours.dtype == torch.float32 and ours.shape == oracle.shape
    empty = torch.isneginf(oracle)
    assert torch.equal(torch.isneginf(ours), empty), f"{case}: rows without keys"
    error = (ours.double() - oracle)[~empty].abs()
    limit = 2e-5 * (1 + oracle[~empty].abs())
    assert (error <= limit).all(), f"{case}: LSE off by {error.max():.3g}"


def check_forward(case: Case, run, device="cpu", precision="ieee"):
    """``run(q, k, v, chosen, call)`` against the oracle; returns what the backward needs."""
    torch.manual_seed(0)
    q, k, v, dout, dlse, chosen = make(case, device)
    o, lse = run(q, k, v, chosen, call_of(case, device, precision))
    want, want_lse = truth(case, q, k, v, chosen)
    plain, _ = truth(case, q, k, v, chosen, q.dtype)
    assert_lse(case, lse, want_lse)
    assert_close(case, "o", o, want, plain)
    nothing = torch.isneginf(want_lse).transpose(1, 2)
    assert (o[nothing] == 0).all(), f"{case}: a query with nothing selected must give 0"
    return q, k, v, dout, dlse, chosen, o, lse


def check_backward(case: Case, run, device="cpu", precision="ieee", with_dlse=True) -> None:
    """``run(dout, dlse, q, k, v, o, lse, chosen, call)`` against autograd through the oracle."""
    torch.manual_seed(0)
    q, k, v, dout, dlse, chosen = make(case, device)
    dlse = dlse if with_dlse else None
    o, lse = truth(case, q, k, v, chosen)
    o, lse = o.to(q.dtype), lse.float()
    ours = run(dout, dlse, q, k, v, o, lse, chosen, call_of(case, device, precision))
    want = gradients(case, q, k, v, dout, dlse, chosen)
    plain = gradients(case, q, k, v, dout, dlse, chosen, q.dtype)
    for name, *three, extra in zip(
        ("dq", "dk", "dv"), ours, want, plain, remade_errors(case, q, k, v, dout, dlse, chosen),
        strict=True,
    ):  # fmt: skip
        assert_close(case, name, *three, factor=3.0, extra=extra)
