"""Cases of attention that have broken somebody's kernel: sizes, masks, layouts in memory.

A case is a shape, a mask, a dtype and a *layout*: how the values lie in memory.  Most layouts
surround the values with NaN, so that a kernel that reads past the end of a tensor, and does not
mask what it read, says so.

:func:`covering` picks a few cases out of very many so that every two values of different
factors meet in some case: head_dim 80 with a window, length 129 with multi-query heads, and so
on for all pairs.  Most faults need one or two things to come together, and the full product
would take hours to compile.

Used by ``labkit.experiments.flash_correctness`` and by the tests, which bring their own oracle.
Loads torch when a case is made.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from typing import Any

__all__ = ["FACTORS", "LAYOUTS", "LENGTHS", "Case", "covering", "lay_out", "make", "matrix"]

#: queries and keys: every way to miss or to hit a tile's edge
LENGTHS = (
    (1, 1), (2, 2), (5, 5), (17, 17), (97, 97), (127, 127), (128, 128), (129, 129), (257, 257),
    (1000, 1000), (1, 239), (239, 1), (3, 799), (799, 3), (1023, 1024),
)  # fmt: skip

#: one layout for all tensors, or ``mixed``: another one for each
LAYOUTS = (
    "plain",  # contiguous
    "bnhd",  # [B, N, H, d] transposed
    "packed",  # a slice of one [B, N, 3, H, d] tensor: an offset, and wide strides
    "offset",  # starts 3 elements into its storage: not aligned to 16 bytes
    "bounds",  # the middle of a larger tensor of NaN, odd strides
    "aligned_bounds",  # the same with strides and offset that a tensor descriptor takes
    "strided_d",  # every other element: the last stride is 2
    "transposed_d",  # unit stride along N, not along d
    "expanded",  # one batch element shown as all: stride 0
    "mixed",  # every tensor in another layout
)
_MIXED = ("bnhd", "bounds", "strided_d", "packed")
_NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One problem: ``n_q`` queries and ``n_k`` keys, the mask, the dtype, the layout."""

    n_q: int = 33
    n_k: int = 33
    d: int = 16
    d_v: int | None = None
    heads: int = 1
    kv_heads: int | None = None
    batch: int = 1
    causal: bool = False
    window: int | None = None
    dtype: str = "float32"
    layout: str = "plain"
    #: multiplies q: 100 makes logits that overflow a careless exp
    factor: float = 1.0
    scale: float | None = None

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def dv(self) -> int:
        return self.d_v or self.d

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``flash_attention``."""
        return {"causal": self.causal, "window": self.window, "scale": self.scale}

    def but(self, **changes: Any) -> Case:
        """This case with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        mask = ("causal" if self.causal else "full") + (f"_w{self.window}" if self.window else "")
        parts = [
            self.dtype, f"{self.n_q}x{self.n_k}", f"d{self.d}x{self.dv}",
            f"b{self.batch}h{self.heads}kv{self.kv}", mask, self.layout,
        ]  # fmt: skip
        if self.factor != 1:
            parts.append(f"q*{self.factor:g}")
        if self.scale is not None:
            parts.append(f"scale{self.scale:g}")
        return "-".join(parts)


# -- tensors ---------------------------------------------------------------------------------


def lay_out(x: Any, layout: str) -> Any:
    """The values of ``x`` ``[B, H, N, d]`` in another place in memory, NaN around them.

    ``expanded`` alone changes values: every batch element is the first.
    """
    import torch

    b, h, n, d = x.shape

    def full(*shape: int) -> Any:
        return torch.full(shape, _NAN, dtype=x.dtype, device=x.device)

    if layout == "plain":
        return x.contiguous()
    if layout == "expanded":
        return x[:1].contiguous().expand(b, h, n, d)
    if layout == "bnhd":
        view = full(b, n, h, d).transpose(1, 2)
    elif layout == "packed":
        view = full(b, n, 3, h, d)[:, :, 1].transpose(1, 2)
    elif layout == "offset":
        view = full(x.numel() + 6)[3:-3].view(b, h, n, d)
    elif layout == "bounds":
        view = full(b + 2, h + 2, n + 5, d + 3)[1:-1, 1:-1, 2:-3, 1:-2]
    elif layout == "aligned_bounds":
        view = full(b + 2, h + 2, n + 16, d + 16)[1:-1, 1:-1, 8:-8, 8:-8]
    elif layout == "strided_d":
        view = full(b, h, n, d, 2)[..., 0]
    elif layout == "transposed_d":
        view = full(b, h, d, n).transpose(-1, -2)
    else:
        raise ValueError(f"no layout {layout!r}")
    return view.copy_(x)


def make(case: Case, device: str = "cpu") -> tuple[Any, Any, Any, Any]:
    """q, k, v and dO of a case; the same numbers on every device and in every run."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    dtype = getattr(torch, case.dtype)
    shapes = {
        "q": (case.batch, case.heads, case.n_q, case.d),
        "k": (case.batch, case.kv, case.n_k, case.d),
        "v": (case.batch, case.kv, case.n_k, case.dv),
        "dout": (case.batch, case.heads, case.n_q, case.dv),
    }
    out = []
    for index, (name, shape) in enumerate(shapes.items()):
        x = torch.randn(shape, generator=generator)
        if name == "q":
            x *= case.factor
        layout = _MIXED[index] if case.layout == "mixed" else case.layout
        out.append(lay_out(x.to(dtype).to(device), layout))
    return tuple(out)


# -- which cases -----------------------------------------------------------------------------


def covering(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows, one value per factor, in which every two values of two factors meet.

    Greedy and the same every time: start a row from a pair that has not met yet, then give
    each other factor the value that meets most others for the first time.
    """
    names = list(factors)
    left = {
        (a, i, b, j)
        for a, b in combinations(range(len(names)), 2)
        for i, j in product(range(len(factors[names[a]])), range(len(factors[names[b]])))
    }

    def new(row: dict[int, int], at: int, value: int) -> int:
        pairs = (
            (at, value, other, j) if at < other else (other, j, at, value)
            for other, j in row.items()
        )
        return sum(pair in left for pair in pairs)

    rows = []
    while left:
        a, i, b, j = min(left)
        row = {a: i, b: j}
        for at in sorted(set(range(len(names))) - set(row)):
            # among equals, turn round: no value is used more than the others
            values = range(len(factors[names[at]]))
            turn = len(rows) % len(values)
            row[at] = max(values, key=lambda x: (new(row, at, x), -((x - turn) % len(values))))
        left -= {(x, row[x], y, row[y]) for x, y in combinations(range(len(names)), 2)}
        rows.append({name: factors[name][row[at]] for at, name in enumerate(names)})
    return rows


#: what meets what in the full matrix; ``values`` is the value head_dim: d's own, or another
FACTORS: dict[str, tuple[Any, ...]] = {
    "lengths": LENGTHS,
    "layout": LAYOUTS,
    "d": (16, 40, 64, 80, 96, 128, 192, 256),
    "mask": ("full", "causal", "window", "causal_window"),
    "dtype": ("float16", "bfloat16", "float32"),
    "group": (1, 4, "all"),
    "values": ("same", "other"),
    "factor": (1.0, 100.0),
}
#: another head_dim for the values
_OTHER = {16: 40, 40: 64, 64: 128, 80: 16, 96: 48, 128: 64, 192: 128, 256: 80}


def matrix(factors: dict[str, Iterable[Any]] | None = None) -> list[Case]:
    """The cases of the full matrix; ``factors`` narrows some of :data:`FACTORS`."""
    rows = covering({**FACTORS, **{k: tuple(v) for k, v in (factors or {}).items()}})
    return [_case(row) for row in rows]


def _case(row: dict[str, Any]) -> Case:
    n_q, n_k = row["lengths"]
    heads, kv_heads = {1: (2, 2), 4: (8, 2), "all": (4, 1)}[row["group"]]
    # neither a multiple of a tile nor so wide that it hides nothing
    window = max(1, n_k // 3)
    return Case(
        n_q, n_k, row["d"], row["d"] if row["values"] == "same" else _OTHER[row["d"]],
        heads, kv_heads, batch=2,
        causal=row["mask"].startswith("causal"),
        window=window if row["mask"].endswith("window") else None,
        dtype=row["dtype"], layout=row["layout"], factor=row["factor"],
    )  # fmt: skip
