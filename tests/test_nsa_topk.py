"""The choice of blocks: importance, forced blocks, ties, against sorting in Python."""

from __future__ import annotations

from dataclasses import dataclass, replace

import nsa_oracle
import pytest
import torch

from labkit.flash.tuning import Config
from labkit.nsa import compression, topk
from labkit.nsa.call import Call
from labkit.nsa.pooling import compressed_bounds
from labkit.nsa.semantics import overlap


@dataclass(frozen=True)
class Case:
    """One problem; ``lengths`` of the sequences of a varlen batch, then m is their sum."""

    m: int = 40
    n: int | None = None
    group: int = 2
    heads: int = 1
    d: int = 16
    length: int = 4
    stride: int | None = None
    block: int | None = None
    count: int = 4
    forced: tuple[int, int] = (1, 2)
    batch: int = 1
    dtype: str = "float32"
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case, k)}
        return "-".join(f"{k}{v}".replace(" ", "") for k, v in changed.items()) or "plain"

    @property
    def keys(self) -> int:
        return sum(self.lengths) if self.lengths else self.n or self.m

    @property
    def block_size(self) -> int:
        return self.block or self.length

    def call(self, device) -> Call:
        stride = self.stride or self.length
        sizes = dict(max_q=self.m, max_k=self.keys)
        if self.lengths:
            cu = torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)
            sizes = dict(max_q=max(self.lengths), max_k=max(self.lengths), cu=cu,
                         cu_cmp=compressed_bounds(cu, self.length, stride))  # fmt: skip
        initial, local = self.forced
        return Call(scale=self.d**-0.5, length=self.length, stride=stride, count=self.count,
                    block_size=self.block_size, initial=initial, local=local, **sizes)  # fmt: skip

    def draw(self, device):
        """q and k_cmp; sharp enough that importance differs from block to block."""
        torch.manual_seed(0)
        call, dtype = self.call(device), getattr(torch, self.dtype)
        m = self.keys if self.lengths else self.m
        count = call.compressed if call.cu is None else int(call.cu_cmp[-1])
        q = torch.randn(self.batch, m, self.heads * self.group, self.d, device=device)
        k = torch.randn(self.batch, count, self.heads, self.d, device=device)
        return q.to(dtype), k.to(dtype)


def choose(case, q, k, device, config=None):
    call = case.call(device)
    _, lse = compression.forward(q, k, k, call)
    return topk.select(q, k, lse, call, config=config)


def check(case, device, *, config=None, tolerance=1e-6):
    """Ours is a best choice where scores within rounding are equal, and else the oracle's."""
    q, k = case.draw(device)
    ours = choose(case, q, k, device, config)
    cu = None if case.lengths is None else case.call("cpu").cu.tolist()
    both = dict(block_size=case.block_size, block_counts=case.count, forced=case.forced,
                cu_seqlens=cu)  # fmt: skip
    empty = torch.zeros(case.batch, case.keys, case.heads, 1, dtype=torch.float64)
    theirs, score = nsa_oracle.choice(
        q.double().cpu(), empty, k_cmp=k.double().cpu(), length=case.length, stride=case.stride,
        **both,
    )  # fmt: skip
    assert ours.dtype == torch.int32
    nsa_oracle.assert_choice_is_best(ours, score, n=case.keys, tolerance=tolerance, **both)
    assert (ours.cpu() == theirs).all(-1).double().mean() > 0.9  # near-ties are rare
    return ours


CASES = [
    Case(),
    Case(m=66, length=8, stride=4, block=8, count=5, heads=2),
    Case(m=61, length=6, stride=4, block=10, group=1, count=5),
    Case(m=30, length=3, stride=3, block=6, group=3, forced=(0, 1)),
    Case(m=24, length=8, block=4, count=5),
    Case(m=5, n=61, group=4, count=7, forced=(2, 3)),
    Case(m=1, n=50, group=3, batch=2),
    Case(lengths=(3, 14, 0, 21), heads=2),
    Case(lengths=(9, 22), length=6, stride=2, block=6, count=2),
    Case(m=20, dtype="float16", group=4),
    Case(m=3, length=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_best_blocks(case, device):
    check(case, device, tolerance=1e-6 if case.dtype == "float32" else 1e-4)


def test_tiles_of_every_kind_choose_the_same(device):
    """16 blocks at a time of up to 50: full tiles, masked ones, lists merged more than once."""
    case = Case(m=100, length=2, group=2, count=5)
    first = check(case, device, config=Config(64, 16, 4, 1))
    q, k = case.draw(device)
    second = choose(case, q, k, device, Config(128, 64, 4, 1))
    assert (first == second).all(-1).double().mean() > 0.98


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64])
def test_any_number_of_blocks(count, device):
    ours = check(Case(m=44, length=2, count=count), device)
    assert ours.shape[-1] == count
    if count == 64:  # more than exist: all up to the own one
        for t in (0, 13, 43):
            every = list(range(t // 2 + 1))
            assert ours[0, t, 0].tolist() == every + [-1] * (64 - len(every))


# -- what is chosen anyway -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "forced", "expected"),
    [
        (1, (1, 2), [9]),
        (2, (1, 2), [8, 9]),
        (3, (1, 2), [0, 8, 9]),
        (1, (0, 1), [9]),
        (3, (2, 4), [7, 8, 9]),
        (5, (3, 2), [0, 1, 2, 8, 9]),
        (4, (3, 2), [0, 1, 8, 9]),
        (5, (1, 99), [5, 6, 7, 8, 9]),
        (3, (99, 1), [0, 1, 9]),
    ],
)
def test_forced_blocks_in_order_of_need(count, forced, expected, device):
    """The own block, those before it, then the first: whatever the scores say (block 4 wins)."""
    case = Case(m=1, n=40, count=count, forced=forced, group=1)
    q, k = case.draw(device)
    k[:, 4] = 3 * q[:, 0]
    assert choose(case, q, k, device)[0, 0, 0].tolist() == expected


def test_importance_decides_the_rest(device):
    case = Case(m=1, n=40, count=4, group=2)
    q, k = case.draw(device)
    k[:, 6] = 3 * q[:, 0, 1]  # one head of the group is enough
    assert choose(case, q, k, device)[0, 0, 0].tolist() == [0, 6, 8, 9]


@pytest.mark.parametrize(("count", "expected"), [(4, [0, 1, 8, 9]), (6, [0, 1, 2, 3, 8, 9])])
def test_equal_importance_goes_to_the_lower_block(count, expected, device):
    case = Case(m=4, n=40, count=count)
    q, k = case.draw(device)
    k[:] = 1.0
    assert choose(case, q, k, device)[0, -1, 0].tolist() == expected


def test_blocks_without_importance_are_candidates(device):
    """A block that nothing compressed stands for yet has importance 0, and its number decides."""
    case = Case(m=16, length=8, block=2, count=3, forced=(0, 1))
    q, k = case.draw(device)
    # Token 6: no compressed key at all.
    assert choose(case, q, k, device)[0, 6, 0].tolist() == [0, 1, 3]


def test_no_compressed_keys_at_all(device):
    case = Case(m=7, length=8, block=2, count=3)
    q, k = case.draw(device)
    assert k.shape[1] == 0
    ours = choose(case, q, k, device)
    assert ours[0, :, 0].tolist() == [[0, -1, -1]] * 2 + [[0, 1, -1]] * 2 + [[0, 1, 2]] * 2 + [
        [0, 2, 3]
    ]


def test_a_nan_score_shows(device):
    """A probability that is not a number makes its block important and no forced one less so."""
    case = Case(m=1, n=40, count=4, group=1)
    q, k = case.draw(device)
    call = case.call(device)
    _, lse = compression.forward(q, k, k, call)
    k[:, 5] = float("nan")
    assert topk.select(q, k, lse, call)[0, 0, 0].tolist() == [0, 5, 8, 9]


# -- the future, other sequences, strides --------------------------------------------------------


@pytest.mark.parametrize(("length", "stride", "block"), [(4, 4, 4), (6, 2, 4)])
def test_the_future_changes_no_choice(length, stride, block, device):
    case = Case(m=36, length=length, stride=stride, block=block)
    q, k = case.draw(device)
    before = choose(case, q, k, device)
    changed = 3
    k[:, changed:] = torch.randn_like(k[:, changed:]) * 5
    after = choose(case, q, k, device)
    first = changed * stride + length - 1
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.equal(before[:, first:], after[:, first:])


def test_a_sequence_chooses_as_it_would_alone(device):
    case = Case(lengths=(21, 0, 14))
    q, k = case.draw(device)
    q[:, 21:], k[:, 5:] = float("nan"), float("nan")
    ours = choose(case, q, k, device)
    alone = choose(replace(case, m=21, lengths=None), q[:, :21], k[:, :5], device)
    assert torch.equal(ours[:, :21], alone)


def test_strided_views_are_read_where_they_lie(device):
    case = Case(m=20, heads=2, group=3)
    q, k = case.draw(device)
    call = case.call(device)
    _, lse = compression.forward(q, k, k, call)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    ours = topk.select(*views, lse.mT.contiguous().mT, call)
    assert torch.equal(ours, topk.select(q, k, lse, call))


def test_no_queries(device):
    case = Case(m=12)
    q, k = case.draw(device)
    call = replace(case.call(device), max_q=0)
    lse = torch.empty(1, 2, 0, device=device)
    assert topk.select(q[:, :0], k, lse, call).shape == (1, 0, 1, 4)


def test_how_many_compressed_keys_overlap_a_block():
    """What the kernel loops over is as many as there are, or one more."""
    for sizes in ((32, 16, 64), (4, 4, 4), (6, 4, 10), (7, 3, 5), (8, 8, 4), (3, 3, 9), (5, 1, 2)):
        length, stride, block_size = sizes
        most = max(
            sum(
                overlap(c, j, length=length, stride=stride, block_size=block_size) > 0
                for c in range(60)
            )
            for j in range(12)
        )
        bound = topk.overlapping(length, stride, block_size)
        assert most <= bound <= most + 1, sizes
    assert topk.overlapping(64, 64, 64) == 1
    assert topk.overlapping(32, 16, 64) == 5


# -- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(m=1500, group=16, d=128, length=64, count=16, dtype="bfloat16"),
        Case(m=700, group=16, d=128, length=8, count=16, dtype="bfloat16"),
        Case(m=400, group=4, d=64, length=32, stride=16, block=64, dtype="float16", heads=4),
        Case(lengths=(1, 300, 64, 0, 63, 411), group=8, d=128, length=16, dtype="bfloat16"),
        Case(m=300, group=12, d=192, length=16, count=33, dtype="bfloat16"),
        Case(m=500, group=1, d=32, length=4, count=64),
        Case(m=1, n=5000, group=16, d=128, length=16, count=16, batch=3),
    ],
    ids=str,
)
def test_on_the_gpu(case, device):
    check(case, device, tolerance=1e-5 if case.dtype == "float32" else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles", [(64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2), (32, 32, 4, 2)]
)
def test_every_tile_size(tiles, device):
    case = Case(m=600, group=16, d=128, length=4, count=16, dtype="bfloat16")
    check(case, device, config=Config(*tiles), tolerance=1e-4)
