"""Glue between labkit.flash, the cases and the oracle; and the checks that mutants must fail.

Cases and layouts come from ``labkit.experiments._flash_cases``; what is right comes from
``oracle``, which knows nothing of labkit.

The bound on an error is twice that of plain attention in the same dtype, both against float64.
Three places need more, and for a reason:

- **The backward pass makes P again**, from scores and an LSE that each carry a float32 rounding,
  and takes dP − δ from two different sums.  Plain attention keeps P, and where a row sees one
  key it subtracts a number from itself and makes no error at all.  Half precision is too coarse
  to notice; in float32, or where everything cancels, this is the largest error there is.
  ``remade`` says what it amounts to.
- **The base of the exponential is 2**: a score is rounded once more when it is multiplied by
  log₂e, which shows when scores are in the hundreds (``base_two``).
- **LSE is float32** whatever the inputs are, so its yardstick is plain attention in float32.
"""

from __future__ import annotations

from contextlib import contextmanager

import oracle
import torch

from labkit.experiments._flash_cases import LAYOUTS, LENGTHS, Case, lay_out, make, matrix
from labkit.experiments._flash_worker import base_two, remade

__all__ = [
    "CHECKS", "LAYOUTS", "LENGTHS", "Case", "assert_right", "check_case", "lay_out", "make",
    "matrix", "ours", "poisoned",
]  # fmt: skip

_EPS32 = torch.finfo(torch.float32).eps


@contextmanager
def poisoned():
    """Every torch.empty inside is full of NaN: an output that is not written shows itself."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def ours(q, k, v, dout=None, dlse=None, **options):
    """``{"o", "lse"}`` of ``flash_attention``, and ``{"dq", "dk", "dv"}`` if dout is given."""
    from labkit.flash import flash_attention

    with poisoned():
        if dout is None:
            with torch.no_grad():
                o, lse = flash_attention(q, k, v, return_lse=True, **options)
            return {"o": o, "lse": lse}
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        o, lse = flash_attention(*leaves, return_lse=True, **options)
        outs, weights = ([o], [dout]) if dlse is None else ([o, lse], [dout, dlse])
        grads = torch.autograd.grad(outs, leaves, weights)
    return {"o": o.detach(), "lse": lse.detach()} | dict(
        zip(("dq", "dk", "dv"), grads, strict=True)
    )


# -- judging -------------------------------------------------------------------------------------


def assert_right(got, q, k, v, dout=None, dlse=None, *, factor=2.0, **options):
    """Assert that what ``ours`` returned is within the bound of the oracle."""
    options = {"causal": False, "window": None, "scale": None, **options}
    assert set(got) == ({"o", "lse"} if dout is None else {"o", "lse", "dq", "dk", "dv"})
    o64, s64, p64 = oracle.attention_f64(q, k, v, **options)
    o, _, _ = oracle.attention(q, k, v, **options)
    judge_lse(got["lse"], q, k, v, s64, options, factor)
    dead = torch.isneginf(s64).all(-1)
    assert (got["o"][dead] == 0).all(), "o: a row that sees nothing is not 0"
    if torch.equal(p64, p64.round()) and factor == 2.0:
        # One key per row: P is exactly 1.  A GPU makes it of cS − cm with one multiply-add, which
        # rounds one of the two: P and the sum of P are off from 1 alike, and their quotient is
        # rounded.  Less than one rounding of float32 is left, nothing in half precision.
        rounding = torch.finfo(o.dtype).eps if o.dtype == torch.float32 and o.is_cuda else 0.0
        off = (got["o"].double() - o64).abs()
        assert (off <= rounding * o64.abs()).all(), "o: one key per row is copied"
    oracle.assert_within_low_precision_error(
        got["o"], o64, o, factor=factor, what="o", extra=base_two(q, k, v, s64, p64)
    )
    if dout is None:
        return
    true = oracle.gradients_f64(q, k, v, dout, dlse=dlse, **options)
    plain = oracle.gradients_plain(q, k, v, dout, dlse=dlse, **options)
    assert (got["dq"][dead] == 0).all(), "dq: a row that sees nothing is not 0"
    again = remade(q, k, v, dout, dlse, s64, p64, options["scale"])
    for index, name in enumerate(("dq", "dk", "dv")):
        oracle.assert_within_low_precision_error(
            got[name], true[index], plain[index],
            factor=factor, what=name, extra=again[index],
        )  # fmt: skip


def judge_lse(lse, q, k, v, s64, options, factor=2.0):
    """LSE against float64, with plain attention in float32 as the yardstick."""
    true = oracle.log_sum_exp(s64)
    assert lse.shape == true.shape, f"lse: shape {tuple(lse.shape)}, not {tuple(true.shape)}"
    assert lse.dtype == torch.float32, f"lse: dtype {lse.dtype}"
    dead = torch.isneginf(true)
    assert torch.equal(torch.isneginf(lse), dead), "lse: −inf where a key is seen, or not where not"
    if dead.all():
        return
    plain = oracle.log_sum_exp(oracle.attention(q.float(), k.float(), v.float(), **options)[1])
    error = (lse.double() - true)[~dead].abs().max().item()
    yardstick = (plain.double() - true)[~dead].abs().max().item()
    largest = torch.where(torch.isneginf(s64), 0.0, s64).abs().max().item()
    # A dot product on tensor cores aligns its terms to the largest and truncates: its error is
    # some roundings of the largest score, however few terms there are.
    allowed = factor * yardstick + 16 * _EPS32 * max(1.0, largest)
    assert error <= allowed, f"lse: largest error {error:.3g}, allowed {allowed:.3g}"


def check_case(case: Case, device: str = "cpu", *, backward: bool = True, factor: float = 2.0):
    """Run one case through labkit and hold all it gives to the bound.

    Inputs must be the same afterwards, to the bit; so must what lies around them.
    """
    tensors = make(case, device)
    before = [_bits(t) for t in tensors]
    q, k, v, dout = tensors
    got = ours(q, k, v, dout if backward else None, **case.options)
    for name, tensor, bits in zip(("q", "k", "v", "dout"), tensors, before, strict=True):
        assert torch.equal(_bits(tensor), bits), f"{name} or what lies around it was written"
    assert_right(got, q, k, v, dout if backward else None, factor=factor, **case.options)


def _bits(x):
    """The whole storage as integers (NaN is not equal to itself)."""
    flat = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    return flat.clone()


# -- checks that a broken kernel must fail -------------------------------------------------------
#
# Each is small enough for the interpreter.  test_flash_mutants breaks the kernels one way at a
# time and expects the check that it names to notice; test_flash_properties runs them on the
# kernels as they are.


def _many_blocks(device):
    """More keys than one tile holds: the running max and sum are used, and O is rescaled."""
    check_case(Case(70, 300, d=16), device, backward=False)


def _growing_scores(device):
    """The largest score of each row comes last, so that every block rescales what came before."""
    q, k, v, _ = make(Case(40, 300, d=16), device)
    order = k[0, 0].norm(dim=1).argsort()
    k = k[:, :, order] * torch.linspace(0.1, 8, 300, device=device)[:, None]
    assert_right(ours(q, k, v), q, k, v)


def _shrinking_scores(device):
    """The largest score of each row comes first: what comes later must not lower the maximum."""
    q, k, v, _ = make(Case(40, 90, d=32, factor=100.0), device)
    k = k * torch.linspace(1, 0.01, 90, device=device)[:, None]
    assert_right(ours(q, k, v), q, k, v)


def _ragged_tail(device):
    """Lengths that fill no tile, NaN behind them."""
    check_case(Case(37, 75, d=16, layout="bounds"), device)


def _causal_square(device):
    check_case(Case(80, 80, d=16, causal=True), device)


def _causal_more_keys(device):
    """The mask is aligned at the bottom right: with Nq < Nk that is not the top left."""
    check_case(Case(40, 90, d=16, causal=True), device)


def _causal_more_queries(device):
    """The first queries see nothing."""
    check_case(Case(70, 37, d=16, causal=True), device)


def _window_causal(device):
    check_case(Case(100, 100, d=16, causal=True, window=50), device)


def _window_full(device):
    check_case(Case(70, 90, d=16, window=33), device)


def _strides(device):
    """q, k, v and dO each lie in memory in another way."""
    check_case(Case(17, 25, d=24, d_v=40, heads=2, batch=2, layout="mixed"), device)


def _groups(device):
    """Query heads 0 and 1 read KV head 0, and 2 and 3 read KV head 1; dK and dV collect both."""
    check_case(Case(20, 37, d=16, heads=4, kv_heads=2), device)


def _groups_of_long_sequences(device):
    """The same where the heads of a group do not share a tile."""
    check_case(Case(70, 20, d=16, heads=4, kv_heads=2), device, backward=False)


def _one_query_many_keys(device):
    """Several programs share one tile of queries, each with a part of the keys."""
    check_case(Case(3, 300, d=16, causal=True), device, backward=False)


def _huge_logits(device):
    """Scores in the hundreds: exp overflows unless the row's maximum is taken off first."""
    check_case(Case(30, 90, d=32, factor=100.0), device)


def _own_scale(device):
    """A scale that is not 1/√d, and counts once in every product."""
    check_case(Case(30, 40, d=16, scale=0.7), device)


def _lse_gradient(device):
    """A loss that depends on LSE too."""
    case = Case(30, 40, d=16, causal=True)
    q, k, v, dout = make(case, device)
    dlse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1)).to(device)
    assert_right(ours(q, k, v, dout, dlse, causal=True), q, k, v, dout, dlse, causal=True)


#: name → check(device), which raises AssertionError
CHECKS = {
    check.__name__.removeprefix("_"): check
    for check in (
        _many_blocks, _growing_scores, _shrinking_scores, _ragged_tail, _causal_square,
        _causal_more_keys, _causal_more_queries, _window_causal, _window_full, _strides, _groups,
        _groups_of_long_sequences, _one_query_many_keys, _huge_logits, _own_scale, _lse_gradient,
    )
}  # fmt: skip
