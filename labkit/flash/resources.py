r"""What a kernel takes: registers, spills, shared memory and instructions, read without a GPU.

Triton compiles for a card that is not there.  The binary says which registers, which local memory
(what did not fit in registers: a *spill*) and how much shared memory a program will have, and its
disassembly says which instructions the inner loop consists of.  :func:`report` compiles one kernel
for one architecture as the launch code would launch it; :func:`table` does many.

Times of one score follow, in clocks of one SM.  A score takes 4d FLOP of the two products,
one exponential, the :attr:`Resources.per_score` instructions that a thread issues for it, and
its share of K and V from L2, which a program reads once for BLOCK_M queries:

.. math::
    t_{\text{product}} &= \frac{4 d}{\text{FLOP per clock}}, &
    t_{\exp} &= \frac{1}{16}, \\
    t_{\text{issue}} &= \frac{\text{instructions per score}}{128}, &
    t_{\text{L2}} &= \frac{2 d\,e / \text{BLOCK\_M}}{\text{bytes per clock}} .

The longest is a lower bound.  Hopper does 4096 dense half-precision FLOP per clock and SM: at
d = 64 product and exponential take 1/16 clock each, and eight instructions per score take as long.
An SM has four schedulers, and each issues one instruction for 32 threads per clock: 128.

Taught in chapter 08 (what does the kernel look like?).
Imports: errors, hardware, dtypes, units; torch and Triton only in the process that compiles.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from labkit.dtypes import itemsize
from labkit.errors import LabError, check_choice, check_positive_int
from labkit.hardware import CAPABILITIES, CARDS, Card
from labkit.kernels.runtime import require_triton
from labkit.units import KIB, format_bytes

__all__ = [
    "ARCHS",
    "KERNELS",
    "REGISTERS_PER_THREAD",
    "CompileError",
    "ResourceTable",
    "Resources",
    "report",
    "reports",
    "table",
]

#: what can be compiled: the steps of chapter 08, and Triton's forward and backward kernels (not
#: those written by hand for Hopper)
KERNELS = ("v1", "v2", "v3", "v4", "forward", "dkdv", "dq")

#: architecture → compute capability; the limits of each stand in ``labkit.hardware``
ARCHS = {
    "sm_80": "8.0",
    "sm_86": "8.6",
    "sm_89": "8.9",
    "sm_90": "9.0",
    "sm_100": "10.0",
    "sm_120": "12.0",
}
#: an instruction has 8 bits for a register's number, and one number means zero
REGISTERS_PER_THREAD = 255
#: CUDA C++ Programming Guide, Technical Specifications per Compute Capability
THREADS_PER_SM = {"8.0": 2048, "8.6": 1536, "8.9": 1536, "9.0": 2048, "10.0": 2048, "12.0": 1536}
#: the same guide, Throughput of Native Arithmetic Instructions: exp2 per clock and SM
EXP_PER_CLOCK = 16
#: four schedulers, each one instruction for 32 threads per clock
ISSUE_PER_CLOCK = 128

_SASS = {
    "wgmma": r"\bHGMMA\.",
    "mma.sync": r"\bHMMA\.",
    "tcgen05.mma": r"\bUTC[A-Z]*MMA",
    "exp2": r"\bMUFU\.EX2\b",
    "TMA load": r"\bUTMALDG",
    "TMA store": r"\bUTMASTG",
    "cp.async": r"\bLDGSTS",
    "local load": r"\bLDL\b",
    "local store": r"\bSTL\b",
}
_PTX = {
    "wgmma.mma_async": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "ex2.approx": r"\bex2\.approx\b",
    "cp.async.bulk.tensor": r"\bcp\.async\.bulk\.tensor\b",
    "cp.async": r"\bcp\.async\.c[ag]\b",
}


class CompileError(LabError, RuntimeError):
    """Triton could not compile the kernel for that architecture; the message is the compiler's."""


@dataclass(frozen=True)
class Resources:
    """What the compiler made of one kernel for one architecture.

    Attributes
    ----------
    kernel, arch, dtype, head_dim, causal : what was compiled.
    tiles : block_m, block_n, num_warps, num_stages and how tiles are fetched.
    registers : per thread, of at most 255.
    spill_bytes : local memory per thread: what did not fit in registers.
    shared_bytes : shared memory per program, what the compiler and Triton's launcher ask for.
    estimate : what ``tuning.shared_bytes`` expected; None for the steps.
    counts : instructions in the binary, by kind (whole kernel, not only the loop).
    ptx_counts : the same in PTX, the assembly before register allocation.
    loop : instructions of the loop over unmasked keys by opcode; empty if none was recognised.
    ptx, sass : both texts; sass is empty, and so are ``counts`` and ``loop``, where disassembling
        (a second per kernel) was not asked for.
    """

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    causal: bool
    tiles: dict[str, Any]
    registers: int
    spill_bytes: int
    shared_bytes: int
    estimate: int | None
    counts: dict[str, int]
    ptx_counts: dict[str, int]
    loop: dict[str, int]
    ptx: str = field(repr=False, compare=False)
    sass: str = field(repr=False, compare=False)

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return self.tiles["num_warps"]

    @property
    def shared_limit(self) -> int:
        """Most shared memory that one block may have on this architecture, bytes."""
        return CAPABILITIES[ARCHS[self.arch]].smem_per_block

    @property
    def fits(self) -> bool:
        """Whether the card can launch it."""
        return self.shared_bytes <= self.shared_limit and self.registers <= REGISTERS_PER_THREAD

    @property
    def programs_per_sm(self) -> int:
        """Programs that an SM holds at once, by registers, shared memory and threads."""
        capability = CAPABILITIES[ARCHS[self.arch]]
        threads = 32 * self.num_warps
        # Registers are handed out 256 at a time to each warp; the system keeps 1 KiB per block.
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = capability.registers_per_sm // 4 // (per_warp * self.num_warps)
        by_shared = capability.smem_per_sm // (self.shared_bytes + KIB)
        return min(by_registers, by_shared, THREADS_PER_SM[ARCHS[self.arch]] // threads)

    @property
    def scores_per_thread(self) -> float:
        """Scores of one tile that a thread works on."""
        block_m, block_n = (self.tiles[n] for n in ("block_m", "block_n"))
        return block_m * block_n / (32 * self.num_warps)

    @property
    def per_score(self) -> float | None:
        """Instructions that a thread issues for one score, in the loop without a mask."""
        return sum(self.loop.values()) / self.scores_per_thread if self.loop else None

    def clocks_per_score(
        self, card: Card | None = None, *, l2_bytes_per_clock: float | None = None
    ) -> dict[str, float]:
        """Clocks of one SM for one score: ``product``, ``exp``, ``issue``, ``L2``.

        Parameters
        ----------
        card : whose tensor cores; by default the first of the table with this architecture.
        l2_bytes_per_clock : what one SM gets from L2 (measured); without it there is no ``L2``.

        Notes
        -----
        For the forward kernels: two products, 4·d FLOP per score.
        """
        card = card or next(c for c in CARDS.values() if c.compute_capability == ARCHS[self.arch])
        per_clock = card.peak[self.dtype] / (card.sm_count * card.tensor_clock_hz)
        clocks = {"product": 4 * self.head_dim / per_clock, "exp": 1 / EXP_PER_CLOCK}
        if self.per_score is not None:
            clocks["issue"] = self.per_score / ISSUE_PER_CLOCK
        if l2_bytes_per_clock is not None:
            share = 2 * self.head_dim * itemsize(self.dtype) / self.tiles["block_m"]
            clocks["L2"] = share / l2_bytes_per_clock
        return clocks

    def __str__(self) -> str:
        return str(ResourceTable([self]))

    def _repr_html_(self) -> str:
        return ResourceTable([self])._repr_html_()


class ResourceTable(Sequence):
    """Several :class:`Resources`, printed as text or HTML; what failed to compile says so."""

    _HEAD = ("kernel", "card", "tiles", "registers", "spills", "shared", "programs/SM")

    def __init__(self, rows: Sequence[Resources | CompileError]) -> None:
        self.rows = list(rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def _cells(self) -> list[tuple[str, ...]]:
        out = []
        for r in self.rows:
            if isinstance(r, CompileError):
                out.append((*r.args[1:3], "does not compile", "", "", "", ""))
                continue
            t = r.tiles
            tiles = f"{t['block_m']}×{t['block_n']}, {t['num_warps']} warps, {t['num_stages']} st."
            shared = f"{format_bytes(r.shared_bytes)} of {format_bytes(r.shared_limit)}"
            spills = f"{r.spill_bytes} B" if r.spill_bytes else "none"
            fits = str(r.programs_per_sm) if r.fits else "too large"
            mask = ", causal" if r.causal else ""
            name = f"{r.kernel}, d = {r.head_dim}{mask}"
            out.append((name, r.arch, tiles, str(r.registers), spills, shared, fits))
        return out

    def __str__(self) -> str:
        rows = [self._HEAD, *self._cells()]
        wide = [max(len(row[i]) for row in rows) for i in range(len(self._HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in self._HEAD)
        body = "".join(
            "<tr>"
            + f'<th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self._cells()
        )
        return (
            f'<table class="labkit-table"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
        )


# -- compiling ---------------------------------------------------------------------------------


def report(
    kernel: str,
    config: Mapping[str, Any] | Any | None = None,
    arch: str = "sm_90",
    *,
    dtype: str = "bfloat16",
    head_dim: int = 128,
    seq_len: int = 4096,
    causal: bool = False,
    group: int = 1,
    precision: str = "ieee",
    disassemble: bool = True,
) -> Resources:
    """Compile one kernel for one architecture and read what it takes.

    Parameters
    ----------
    kernel : one of :data:`KERNELS`.
    config : ``labkit.flash.tuning.Config`` or a mapping with its fields (for a step: the keys of
        its ``TILES``); None takes what the step or ``tuning.default`` would choose there.
    arch : one of :data:`ARCHS`.
    dtype : ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    head_dim, seq_len, causal, group : of the problem; seq_len only decides which tails there are.
    precision : how float32 is multiplied, ``"ieee"`` or ``"tf32"`` (production kernels).
    disassemble : whether to read the instructions too.

    Raises
    ------
    ArgumentError
        if an argument is unknown.
    CompileError
        if Triton cannot compile it; the message is the compiler's.
    MissingDependencyError
        if torch or Triton is not installed.
    """
    request = _request(
        kernel, config, arch, dtype, head_dim, seq_len, causal, group, precision, disassemble
    )
    found = reports([request])[0]
    if isinstance(found, CompileError):
        raise found
    return found


def table(
    kernels: Iterable[str] = ("forward", "dkdv", "dq"),
    archs: Iterable[str] = tuple(ARCHS),
    *,
    configs: Iterable[Any] = (None,),
    dtype: str = "bfloat16",
    head_dims: Iterable[int] = (128,),
    causal: bool = False,
    precision: str = "ieee",
    disassemble: bool = False,
) -> ResourceTable:
    """:func:`report` of every combination, compiled together.

    Errors of the compiler become rows; other parameters and errors are those of ``report``.
    """
    archs, configs, head_dims = list(archs), list(configs), list(head_dims)
    requests = [
        _request(kernel, config, arch, dtype, head_dim, 4096, causal, 1, precision, disassemble)
        for kernel in kernels
        for head_dim in head_dims
        for config in configs
        for arch in archs
    ]
    return ResourceTable(reports(requests))


def reports(requests: Sequence[str]) -> list[Resources | CompileError]:
    """Answers to several requests (JSON, from :func:`report`'s arguments); each is asked once."""
    missing = [r for r in dict.fromkeys(requests) if r not in _known]
    # A process takes seconds to load Triton: another one pays from a few kernels on.
    processes = max(1, min(4, os.cpu_count() or 1, len(missing) // 3))
    shares = [missing[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(len(shares)) as pool:
        for share, answers in zip(shares, pool.map(_compile, shares), strict=True):
            _known.update(zip(share, answers, strict=True))
    return [_known[r] for r in requests]


_known: dict[str, Resources | CompileError] = {}


def _request(
    kernel, config, arch, dtype, head_dim, seq_len, causal, group, precision, disassemble
) -> str:
    check_choice("kernel", kernel, KERNELS)
    check_choice("arch", arch, ARCHS)
    check_choice("dtype", dtype, ("float16", "bfloat16", "float32"))
    check_choice("precision", precision, ("ieee", "tf32"))
    for name, value in (("head_dim", head_dim), ("seq_len", seq_len), ("group", group)):
        check_positive_int(name, value)
    if config is not None:
        config = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    capability = ARCHS[arch]
    card = next(c for c in CARDS.values() if c.compute_capability == capability)
    request = {
        "kernel": kernel, "arch": arch, "number": int(arch.removeprefix("sm_")), "tiles": config,
        "dtype": dtype, "head_dim": head_dim, "seq_len": seq_len, "causal": causal,
        "group": group, "precision": precision, "sms": card.sm_count, "l2_bytes": card.l2_bytes,
        "disassemble": disassemble, "shared_limit": CAPABILITIES[capability].smem_per_block,
    }  # fmt: skip
    return json.dumps(request, sort_keys=True)


def _compile(requests: Sequence[str]) -> list[Resources | CompileError]:
    if not requests:
        return []
    require_triton("labkit.flash.resources")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    child = subprocess.run(
        [sys.executable, "-m", "labkit.flash._resources_child"],
        input=f"[{','.join(requests)}]", capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    lines = child.stdout.splitlines()
    if child.returncode or len(lines) != len(requests):
        why = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise LabError(f"The process that compiles ended with {child.returncode}: {why[0]}")
    return [_read(json.loads(r), json.loads(a)) for r, a in zip(requests, lines, strict=True)]


def _read(request: dict[str, Any], answer: dict[str, Any]) -> Resources | CompileError:
    if "error" in answer:
        return CompileError(answer["error"], request["kernel"], request["arch"])
    sass, ptx = answer["sass"], answer["ptx"]
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", answer["usage"]))
    tiles = {name.lower(): value for name, value in answer["tiles"].items()}
    return Resources(
        kernel=request["kernel"],
        arch=request["arch"],
        dtype=request["dtype"],
        head_dim=request["head_dim"],
        causal=request["causal"],
        tiles=tiles,
        registers=int(usage["REG"]),
        spill_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=answer["shared"],
        estimate=answer["estimate"],
        counts={name: len(re.findall(p, sass)) for name, p in _SASS.items()} if sass else {},
        ptx_counts={name: len(re.findall(p, ptx)) for name, p in _PTX.items()},
        loop=_hot_loop(sass),
        ptx=ptx,
        sass=sass,
    )


# -- reading SASS --------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@functools.cache
def _instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, opcode, operands) of each instruction."""
    return [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(sass)]


def _hot_loop(sass: str) -> dict[str, int]:
    """Opcodes of the loop over unmasked keys: the shortest with products and exponentials.

    A loop is what lies between a backward branch and its target.  Waits for a barrier leave the
    loop for code at the end of the kernel and jump back; such a jump spans the end of the
    kernel, or a loop with products of its own, and is no loop over keys.
    """
    code = _instructions(sass)
    found: list[tuple[int, int, Counter]] = []
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            first = int(target[1], 16)
            body = Counter(o.split(".")[0] for a, o, _ in code if first <= a <= address)
            products = any(o in body for o in ("HGMMA", "HMMA", "UTCHMMA", "FFMA2"))
            if (products or body["FFMA"] > 200) and body["MUFU"] and not body["EXIT"]:
                found.append((first, address, body))
    return dict(min(found, key=lambda x: x[1] - x[0])[2]) if found else {}
