"""Cases of Native Sparse Attention that have broken somebody's kernel, or could.

A case is one of three *parts*: ``"selection"`` (attention to blocks that the case names),
``"compression"`` (attention to pooled keys), ``"whole"`` (three branches, gates, and the choice).
Layouts in memory are those of ``_flash_cases``: most surround the values with NaN.

:func:`matrix` lets every two values of two factors meet: every length with every group, every block
size with every dtype, and so on.

Used by ``labkit.experiments.nsa_correctness`` and by the tests.  Loads torch when a case is made.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from labkit.experiments._flash_cases import covering, lay_out

__all__ = ["CHOICES", "FACTORS", "Case", "make", "matrix"]

#: tokens: every way to miss or to hit the edge of a block or a tile
LENGTHS = (1, 15, 63, 64, 65, 127, 500, 1024, 4097)
#: how a query chose its blocks, and how it wrote that down
CHOICES = (
    "random",  # the forced ones and others, ascending, then −1
    "local",  # the same, shared by 32 neighbours
    "holes",  # −1 in any slot, in no order
    "repeats",  # blocks named twice
    "future",  # any block that exists, also those after the query
    "nothing",  # every third query chose nothing
)
#: one layout for q, k, v and dO (``_flash_cases.lay_out``)
LAYOUTS = ("bnhd", "plain", "packed", "bounds", "strided_d", "offset")
DIMS = ((64, 64), (128, 128), (192, 128), (40, 24))
DTYPES = ("float16", "bfloat16", "float32")
SEQUENCES = ("one", "ragged", "short", "fewer")


@dataclass(frozen=True)
class Case:
    """One problem: sizes, options, and how the tensors lie in memory."""

    part: str = "whole"
    t: int = 65
    group: int = 4
    kv: int = 2
    batch: int = 1
    d: int = 64
    dv: int = 64
    block: int = 64
    slots: int = 4
    window: int = 100
    dtype: str = "bfloat16"
    layout: str = "bnhd"
    choice: str = "random"
    #: which of the slots are used: all, the first two by an int, or a tensor of counts
    counts: str = "all"
    #: one sequence; several one after another; several of which most are shorter than a block;
    #: or half as many queries as keys
    sequences: str = "one"
    #: tokens of a compressed key and from one to the next; 0 means block
    length: int = 0
    stride: int = 0
    #: (initial, local) blocks that every query reads
    forced: tuple[int, int] = (1, 2)
    #: which gates there are
    gates: str = "csw"

    @property
    def heads(self) -> int:
        return self.group * self.kv

    @property
    def queries(self) -> int:
        return (self.t + 1) // 2 if self.sequences == "fewer" else self.t

    @property
    def own_length(self) -> int:
        return self.length or self.block

    @property
    def own_stride(self) -> int:
        return self.stride or self.own_length

    @property
    def offsets(self) -> list[int] | None:
        """Where each sequence starts, or None."""
        if self.sequences == "ragged":  # an empty one among them
            cuts = {0, self.t // 3, self.t // 3 + 1, (3 * self.t) // 4, self.t}
            return [*sorted(cuts)[:-1], *[max(cuts)] * 2]
        if self.sequences == "short":  # shorter than any block, but for the last
            return [*range(0, min(self.t, 60), 7), self.t]
        return None

    def but(self, **changes: Any) -> Case:
        """This case with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"forced": list(self.forced)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "forced", tuple(self.forced))  # JSON has lists only

    def __str__(self) -> str:
        parts = [
            self.part, self.dtype, f"t{self.t}", f"b{self.batch}kv{self.kv}g{self.group}",
            f"d{self.d}x{self.dv}", f"block{self.block}", self.layout, self.sequences,
        ]  # fmt: skip
        if self.part != "compression":
            parts.append(f"slots{self.slots}")
        if self.part == "selection":
            parts += [self.choice, f"counts_{self.counts}"]
        if self.part == "whole":
            parts += [f"w{self.window}", f"forced{self.forced[0]}{self.forced[1]}", self.gates]
        if (self.length, self.stride) != (0, 0):
            parts.append(f"l{self.own_length}d{self.own_stride}")
        return "-".join(parts)


# -- tensors -------------------------------------------------------------------------------------


def positions(case: Case, device: Any = None) -> tuple[Any, Any]:
    """Where each query stands in its sequence ``[M]``, and how long that sequence is."""
    import torch

    if case.offsets is None:
        at = torch.arange(case.t - case.queries, case.t, device=device)
        return at, torch.full_like(at, case.t)
    spans = [b - a for a, b in pairwise(case.offsets)]
    at = [i for n in spans for i in range(n)]
    own = [n for n in spans for _ in range(n)]
    return torch.tensor(at, device=device), torch.tensor(own, device=device)


def _choose(case: Case, generator: Any) -> Any:
    """``[B, M, H, slots]`` int32, on the CPU."""
    import torch

    at, own = positions(case)
    m, s = case.queries, case.slots
    most = -(-case.t // case.block)
    shape = (case.batch, m, case.kv, most)
    score = torch.rand(shape, generator=generator)
    if case.choice == "local":
        shared = torch.rand((case.batch, -(-m // 32), case.kv, most), generator=generator)
        score = 0.06 * score + shared.repeat_interleave(32, 1)[:, :m]
    block = torch.arange(most)
    current = (at // case.block)[:, None]
    last = current if case.choice != "future" else ((own - 1) // case.block)[:, None]
    forced = (block == 0) | ((block <= current) & (block > current - 2))
    score = score + 2.0 * forced[:, None]
    score = score.masked_fill((block > last)[:, None], -1.0)
    value, index = score.topk(min(s, most), -1)
    chosen = torch.where(value < 0, most, index).sort(-1).values
    chosen = torch.where(chosen == most, -1, chosen)
    chosen = torch.nn.functional.pad(chosen, (0, s - chosen.shape[-1]), value=-1)
    if case.choice == "holes":
        chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=generator) < 0.3, -1)
        chosen = chosen[..., torch.randperm(s, generator=generator)]
    elif case.choice == "repeats":
        chosen = chosen[..., torch.randint(0, s, (s,), generator=generator)]
    elif case.choice == "nothing":
        chosen[:, ::3] = -1
    return chosen.to(torch.int32)


def make(case: Case, device: str = "cpu") -> tuple[Any, ...]:
    """q, k, v, three gates, dO, block_indices and block_counts; the same on every device."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    dtype = getattr(torch, case.dtype)

    def normal(length: int, heads: int, width: int) -> Any:
        x = torch.randn(case.batch, length, heads, width, generator=generator).to(dtype).to(device)
        return lay_out(x.transpose(1, 2), case.layout).transpose(1, 2)

    m = case.queries
    q, k = normal(m, case.heads, case.d), normal(case.t, case.kv, case.d)
    v, dout = normal(case.t, case.kv, case.dv), normal(m, case.heads, case.dv)
    gates = torch.rand(case.batch, m, 3, case.heads, generator=generator).to(dtype).to(device)
    blocks = _choose(case, generator)
    shape = blocks.shape[:3]
    counts = torch.randint(0, case.slots + 1, shape, generator=generator)
    return q, k, v, *gates.unbind(2), dout, blocks.to(device), counts.to(device)


# -- which cases ---------------------------------------------------------------------------------

_COMMON: dict[str, tuple[Any, ...]] = {
    "t": LENGTHS,
    "group": (1, 2, 3, 8, 16, 64),
    "block": (16, 32, 64, 128),
    "dtype": DTYPES,
    "dims": DIMS,
    "sequences": SEQUENCES,
}
#: what meets what, for each part
FACTORS: dict[str, dict[str, tuple[Any, ...]]] = {
    "selection": _COMMON | {
        "layout": LAYOUTS, "choice": CHOICES, "slots": (1, 4, 9),
        "counts": ("all", "int", "tensor"),
    },
    "compression": _COMMON | {"layout": LAYOUTS, "stride": ("own", "half", "quarter")},
    "whole": _COMMON | {
        "window": (0, 1, 64, 5000), "slots": (1, 2, 4, 16), "forced": ((1, 2), (0, 1)),
        "gates": ("csw", "cs", "s", "cw"), "layout": ("bnhd", "bounds"),
    },
}  # fmt: skip


def matrix(part: str, narrowed: dict[str, Iterable[Any]] | None = None) -> list[Case]:
    """The cases of one part; ``narrowed`` takes the place of some of :data:`FACTORS`."""
    factors = FACTORS[part] | {k: tuple(v) for k, v in (narrowed or {}).items()}
    return list(dict.fromkeys(_case(part, row) for row in covering(factors)))


def _case(part: str, row: dict[str, Any]) -> Case:
    row = dict(row)
    row["d"], row["dv"] = row.pop("dims")
    stride = row.pop("stride", "own")
    if stride != "own":
        row["length"] = row["block"]
        row["stride"] = row["block"] // {"half": 2, "quarter": 4}[stride]
    # Few heads where there are many tokens: float64 has to hold every score.
    large = row["t"] * row["group"] > 40_000
    kv = 1 if large else 2
    batch = 1 if large or row["sequences"] in ("ragged", "short") else 2
    return Case(part, kv=kv, batch=batch, **row)
