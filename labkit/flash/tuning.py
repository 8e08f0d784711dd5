"""Tuning: which tile sizes, how many warps, how deep a pipeline; chosen once, kept on disk.

A configuration is four numbers and two choices: copy engine or pointers, and Triton's kernel or
the one written by hand.  The space of them is small, and most of it can be ruled out on paper:
tiles must fit the shared memory that one block of the card may have (:func:`shared_bytes`), and
the accumulators must fit its registers (:func:`registers`).  What fails either is never launched.

What is left is timed on the real inputs, the first time that a card meets a problem of a kind
(pass, dtype, head_dim, mask, and size to the next power of two), and the winner is kept in a JSON
file: ``$LABKIT_CACHE`` or ``~/.cache/labkit``, one file per GPU, Triton version and version of
the kernels.  Problems too small for the choice to matter, CUDA graph capture, and
``LABKIT_TUNE=0`` take :func:`default` instead, which needs no GPU to decide.

Taught in chapter 08 (the forward kernel).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

__all__ = [
    "KINDS",
    "NEAR",
    "Config",
    "Problem",
    "cache_file",
    "choose",
    "default",
    "forget",
    "registers",
    "shared_bytes",
    "smaller",
    "space",
]

KINDS = ("forward", "dkdv", "dq")
#: keys of a window up to which it is a near one: a row sees a few tiles, and starting and ending a
#: tile of queries counts
NEAR = 1024


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Attributes
    ----------
    block_m, block_n : queries and keys in a tile.
    num_warps : warps that share a program, 32 threads each.
    num_stages : tiles in flight in the software pipeline.
    descriptors : whether tiles come through tensor descriptors (TMA).
    by_hand : the hand-pipelined Hopper kernel (``hopper.py``, ``hopper_backward.py``) instead.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    descriptors: bool = False
    by_hand: str = ""


@dataclass(frozen=True)
class Problem:
    """What a choice of configuration depends on.

    Attributes
    ----------
    kind : one of ``KINDS``.
    dtype : ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    precision : ``"ieee"``, ``"tf32x3"`` or ``"tf32"``; matters for float32.
    head_dim, head_dim_v : d and dv.
    rows, cols : Nq and Nk (the longest, for varlen).
    heads : programs per tile: batch × query heads (× KV heads for dK/dV, and where the heads of
        a group share a tile).
    causal, windowed : the mask.
    descriptors : whether to use the copy engine: the card has one, the tensors can be described
        to it, and the problem is worth the time that describing takes the host.
    by_hand : why the hand-written Hopper kernel cannot or should not run; None when it can.
    arch : compute capability as ten times major plus minor: 90 for Hopper.
    shared_limit : shared memory that one block may have, bytes.
    sms : multiprocessors.
    near : the window has at most ``NEAR`` keys, as many to each side without a causal mask.
    """

    kind: str
    dtype: str
    precision: str
    head_dim: int
    head_dim_v: int
    rows: int
    cols: int
    heads: int
    causal: bool
    windowed: bool
    descriptors: bool
    by_hand: str | None
    arch: int
    shared_limit: int
    sms: int
    near: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 4 if self.dtype == "float32" else 2

    @property
    def key(self) -> str:
        """Problems with the same key share a choice."""
        size = min(max(self.rows, self.cols), 4096)  # beyond, nothing about the choice changes
        few = self.heads * -(-self.rows // 128) < 2 * self.sms
        parts = (
            self.kind, self.dtype, self.precision if self.itemsize == 4 else "-",
            f"d{self.head_dim}", f"dv{self.head_dim_v}", f"n{1 << (size - 1).bit_length()}",
            "causal" if self.causal else "full",
            "near" if self.near else "window" if self.windowed else "-",
            "few" if few else "many", "tma" if self.descriptors else "-",
            "hand" if self.by_hand is None else "-",
        )  # fmt: skip
        return " ".join(parts)


#: of the 255 registers that a thread can have, some hold addresses, masks and row sums
_MOST_REGISTERS = 230


def _pow2(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def shared_bytes(config: Config, problem: Problem) -> int:
    """Upper estimate of the shared memory of a block: the tiles that lie there at once.

    The streamed pair (K and V, or Q and dO) once per stage, the resident tiles once; a dK/dV
    program keeps K and V, a dQ program Q and dO.  ``tests/test_flash_resources.py`` holds the
    estimate against the compiler's figure.
    """
    d, dv, e = _pow2(problem.head_dim), _pow2(problem.head_dim_v), problem.itemsize
    m, n = config.block_m, config.block_n
    streamed = m if problem.kind == "dkdv" else n
    resident = {"forward": m * d, "dkdv": n * (d + dv), "dq": m * (d + dv)}[problem.kind]
    if problem.kind == "forward" and config.by_hand and problem.near:
        resident *= 2  # the next Q comes while this one is worked on
    vectors = 8 * m * config.num_stages if problem.kind == "dkdv" else 0
    stages = config.num_stages
    if 100 <= problem.arch < 120 and problem.kind != "forward":
        stages += 1  # tcgen05 may still read a tile when the copy engine fetches the next but one
    return e * (stages * streamed * (d + dv) + resident) + vectors + 1024


def registers(config: Config, problem: Problem) -> float:
    """Registers per thread that accumulators and scores alone need (of at most 255)."""
    d, dv = _pow2(problem.head_dim), _pow2(problem.head_dim_v)
    m, n = config.block_m, config.block_n
    scores = m * n * (1.5 if problem.kind == "forward" else 2.5)  # S and P; S, dP and dS
    held = {"forward": m * dv, "dkdv": n * (d + dv), "dq": m * d}[problem.kind]
    return (held + scores) / (32 * config.num_warps)


#: (block_m, block_n, warps, stages): what won or came within a few per cent somewhere.  Small
#: tiles with 4 warps leave room for two programs on a multiprocessor, which hide each other's
#: softmax; large ones with 8 warps read K and V less often.
_GRID = {
    "forward": (
        (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 3),
        (128, 64, 8, 3), (64, 32, 4, 3), (128, 32, 4, 2), (64, 64, 4, 2),
    ),
    "dkdv": (
        (64, 64, 4, 2), (128, 64, 4, 2), (64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 4, 3),
        (32, 64, 4, 2), (32, 32, 4, 2),
    ),
    "dq": (
        (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3),
        (64, 32, 4, 2), (32, 32, 4, 2),
    ),
}  # fmt: skip
_GRID_FP32 = {
    "forward": ((128, 64, 4, 1), (128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
    "dkdv": ((64, 32, 4, 2), (32, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 3), (32, 32, 4, 2)),
    "dq": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
}


def space(problem: Problem) -> list[Config]:
    """The configurations worth timing for this problem.

    Those of the hand-written kernel first, if it can run, and then only the first few of Triton's.
    Of Triton's, those are left out that by estimate exceed the card's shared memory or registers,
    or have a tile longer than the sequence.  Never empty: without any, :func:`default`.
    """
    found = _by_hand(problem)
    rows = _pow2(problem.rows if problem.kind != "dkdv" else problem.cols)
    grid = _GRID if problem.itemsize == 2 else _GRID_FP32
    for m, n, warps, stages in grid[problem.kind][: 3 if found else None]:
        config = Config(m, n, warps, stages, problem.descriptors)
        if shared_bytes(config, problem) > problem.shared_limit:
            continue
        if registers(config, problem) > _MOST_REGISTERS:
            continue
        if (m if problem.kind != "dkdv" else n) > max(rows, 64):
            continue
        found.append(config)
    return found or [default(problem)]


def _by_hand(problem: Problem) -> list[Config]:
    """The hand-written kernels' own configurations, the best first, if they can run at all."""
    if problem.by_hand is not None:
        return []
    if problem.kind == "forward":
        from labkit.flash import hopper as module
    else:
        from labkit.flash import hopper_backward as module
    return module.candidates(problem)


def default(problem: Problem) -> Config:
    """A good configuration by rule, without a GPU.

    The hand-written kernel's first one, if it can run.  Else the first of a list, large tiles
    before small ones, that fits shared memory and registers; where there are fewer tiles of 128
    rows than multiprocessors, of those with 64 rows or fewer.  If none fits, the last of the list
    with one stage.
    """
    if problem.arch < 70:  # the interpreter: small tiles keep it quick and every mask used
        return Config(32, 32, 4, 1)
    if by_hand := _by_hand(problem):
        return by_hand[0]
    wide = max(_pow2(problem.head_dim), _pow2(problem.head_dim_v))
    exact = problem.dtype == "float32" and problem.precision == "ieee"
    if exact:  # products on the CUDA cores: each element of a tile is also a register
        order = [(64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 2), (16, 16, 4, 1)]
    elif problem.dtype == "float32":
        order = [(128, 32, 8, 2)] if problem.kind == "forward" else []
        order += [(64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 2), (16, 16, 4, 1)]
    elif problem.kind == "forward":
        order = [(128, 64, 4, 3 if wide <= 64 else 2), (128, 64, 4, 2), (128, 64, 8, 2),
                 (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)]  # fmt: skip
        if problem.causal and wide >= 128:
            order = order[3:]  # a tile on the diagonal is half masked: the smaller wastes less
    elif problem.kind == "dkdv":
        order = [(64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2), (16, 32, 4, 1)]
    else:
        order = [(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1)]
    own = problem.rows if problem.kind != "dkdv" else problem.cols
    programs = problem.heads * -(-own // 128)
    if programs < problem.sms or own <= 64:  # few tiles: smaller ones keep more of the card busy
        order = [c for c in order if (c[0] if problem.kind != "dkdv" else c[1]) <= 64]
    if wide >= 256:
        order = [c for c in order if min(c[0], c[1]) <= 64]
    for m, n, warps, stages in order:
        config = Config(m, n, warps, stages, problem.descriptors and problem.arch >= 90)
        fits = shared_bytes(config, problem) <= problem.shared_limit
        if fits and registers(config, problem) <= (255 if exact else _MOST_REGISTERS):
            return config
    return replace(config, num_stages=1)


def smaller(config: Config) -> Config | None:
    """The next smaller configuration to try where this one does not fit; None if it is the last."""
    if config.num_stages > 1:
        return replace(config, num_stages=config.num_stages - 1)
    if max(config.block_m, config.block_n) > 16:
        m, n = config.block_m, config.block_n
        return replace(config, block_m=m // 2 if m >= n else m, block_n=n if m >= n else n // 2)
    return None


# -- the choice, kept ----------------------------------------------------------------------------

#: below this many FLOPs a wrong choice costs less than making it
WORTH_TUNING = 1e11

_chosen: dict[str, Config] = {}
_loaded: set[Path] = set()


@cache
def _kernels_version() -> str:
    """Changes when a kernel does: a choice made for another kernel is no choice."""
    text = b""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in ("api.py", "resources.py", "recompute.py"):
            text += path.read_bytes()
    return hashlib.sha256(text).hexdigest()[:8]


def cache_file() -> Path:
    """Where the choices for the current GPU are kept."""
    import torch
    import triton

    folder = os.environ.get("LABKIT_CACHE")
    root = Path(folder) if folder else Path.home() / ".cache" / "labkit"
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"  # noqa: E501
    return root / f"flash-{gpu}-triton{triton.__version__}-{_kernels_version()}.json"


def _load(path: Path) -> None:
    if path in _loaded:
        return
    _loaded.add(path)
    # A damaged or foreign file costs a new measurement, never a crash.
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        for key, value in json.loads(path.read_text("utf-8")).items():
            _chosen.setdefault(key, Config(**value["config"]))


def _save(path: Path, key: str, config: Config, times: dict[str, float]) -> None:
    with contextlib.suppress(OSError):  # a read-only home: the choice lasts for this process
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: dict = {}
        with contextlib.suppress(OSError, ValueError):
            there = json.loads(path.read_text("utf-8"))
            kept = there if isinstance(there, dict) else {}
        kept[key] = {"config": asdict(config), "ms": times}
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(kept, indent=1, sort_keys=True), "utf-8")
        draft.replace(path)


def forget() -> None:
    """Drop the choices of this process (the file stays)."""
    _chosen.clear()
    _loaded.clear()


def choose(
    problem: Problem,
    flops: float,
    ready: Callable[[Config], Callable[[], None]],
    *,
    always: bool = False,
) -> Config:
    """The configuration for ``problem``: remembered, read from disk, or timed now.

    Parameters
    ----------
    problem : what is to be computed.
    flops : how much work one launch is; small work takes the default.
    ready : makes of a configuration something that launches the kernel on the real inputs.
    always : time even what is small.
    """
    import torch

    if problem.arch < 70:
        return default(problem)
    key = problem.key
    if key in _chosen:
        return _chosen[key]
    if os.environ.get("LABKIT_TUNE", "1") == "0" or (flops < WORTH_TUNING and not always):
        return default(problem)
    if torch.cuda.is_current_stream_capturing():
        return default(problem)
    path = cache_file()
    _load(path)
    if key not in _chosen:
        config, times = fastest(space(problem), ready)
        _chosen[key] = config if config is not None else default(problem)
        _save(path, key, _chosen[key], times)
    return _chosen[key]


def fastest(
    configs: Iterable[Config], ready: Callable[[Config], Callable[[], None]]
) -> tuple[Config | None, dict[str, float]]:
    """Time each configuration; the fastest, and all times in ms.  What cannot run is left out."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    times: dict[str, float] = {}
    best, best_ms = None, float("inf")
    for config in configs:
        try:
            ms = do_bench(ready(config), warmup=5, rep=20, return_mode="median")
        except (OutOfResources, CompilationError, PTXASError, NotImplementedError):
            continue  # this compiler version cannot make it: one candidate fewer
        c = config
        name = f"{c.by_hand or 'triton'} {c.block_m}x{c.block_n} w{c.num_warps} s{c.num_stages}"
        times[name + (" tma" if c.descriptors else "")] = round(ms, 5)
        if ms < best_ms:
            best, best_ms = config, ms
    return best, times
