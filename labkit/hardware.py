r"""What the cards are, by data sheet, and what this machine is.

Taught in chapter 03 (where do the bytes live, and how fast is each place?).

Every figure of :data:`CARDS` carries the document it was taken from.  Four things are
said once here and hold for the whole table:

* **Memory sizes are binary.**  A "12 GB" card carries 12 GiB = 12 × 2³⁰ bytes of DRAM, and
  "80 GB" of HBM are 80 GiB.  What a program can have is less: :attr:`Card.usable_bytes`.
  Cards with GDDR6 and error correction in the same memory (T4, A10, L4, L40S) give up one
  sixteenth of it while ECC is on, as it is by default.
* **Rates are decimal**: 1 TB/s = 10¹² bytes/s, 1 TFLOP/s = 10¹² operations/s, and a
  multiply-add is two operations.
* **Peaks are dense.**  Data sheets since Hopper print the tensor cores' rate with 2:4
  structured sparsity; that is halved here.  ``float32`` and ``float64`` are the CUDA cores';
  ``tf32``, ``float16``, ``bfloat16`` and ``float8_e4m3fn`` are the tensor cores', with
  float32 accumulation.  GeForce cards accumulate in float32 at half the rate at which they
  accumulate in float16: :attr:`Card.float16_accumulate_float16` has the faster one.
* **Peaks are at the clock that the data sheet assumes.**  That is the boost clock, except that
  H100 and H200 state a lower one for the tensor cores: :attr:`Card.tensor_clock_hz` (SXM: 1.83
  GHz beside 1.98).  A card under load is held by its power limit; chapter 04 measures what is
  left.

What depends on the compute capability alone stands once, in :data:`CAPABILITIES`.

Imports: errors, dtypes, units.  No torch: :func:`detect` loads it only when it is called.
"""

from __future__ import annotations

import html
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from labkit.dtypes import dtype_name
from labkit.errors import ArgumentError, check_choice
from labkit.units import GIB, KIB, MIB, format_bytes, format_rate, significant

__all__ = [
    "CAPABILITIES",
    "CARDS",
    "Capability",
    "Card",
    "CardTable",
    "Machine",
    "card",
    "detect",
    "table",
]

# --- documents --------------------------------------------------------------------------------

_IMAGES = "https://images.nvidia.com"
_CUDA_GUIDE = (
    "CUDA C++ Programming Guide, Technical Specifications per Compute Capability — "
    "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#features-and-technical-specifications"
)
_CUDA_THROUGHPUT = (
    "CUDA C++ Programming Guide, Throughput of Native Arithmetic Instructions — "
    "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions"
)
_VOLTA = (
    "NVIDIA Tesla V100 GPU Architecture (WP-08608-001) — "
    f"{_IMAGES}/content/volta-architecture/pdf/volta-architecture-whitepaper.pdf"
)
_V100 = (
    "NVIDIA V100 data sheet — "
    f"{_IMAGES}/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
)
_TURING = (
    "NVIDIA Turing GPU Architecture (WP-09183-001) — "
    f"{_IMAGES}/aem-dam/en-zz/Solutions/design-visualization/technologies/"
    "turing-architecture/NVIDIA-Turing-Architecture-Whitepaper.pdf"
)
_T4 = (
    "NVIDIA T4 data sheet — https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/"
    "tesla-t4/t4-tensor-core-datasheet-951643.pdf"
)
_GA100 = (
    "NVIDIA A100 Tensor Core GPU Architecture — "
    f"{_IMAGES}/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
)
_A100 = (
    "NVIDIA A100 data sheet — https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/"
    "a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_GA102 = (
    "NVIDIA Ampere GA102 GPU Architecture — "
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"
)
_A10 = (
    "NVIDIA A10 data sheet — https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/"
    "a10/pdf/datasheet-new/nvidia-a10-datasheet.pdf"
)
_RTX3060 = (
    "GeForce RTX 3060 product page — "
    "https://www.nvidia.com/en-us/geforce/graphics-cards/30-series/rtx-3060-3060ti/"
)
_ADA = (
    "NVIDIA Ada GPU Architecture — "
    f"{_IMAGES}/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
)
_L4 = "NVIDIA L4 data sheet — https://resources.nvidia.com/en-us-gpu-resources/l4-tensor-datasheet"
_L40S = "NVIDIA L40S data sheet — https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"
_GH100 = (
    "NVIDIA H100 Tensor Core GPU Architecture — "
    "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
)
_H100 = (
    "NVIDIA H100 data sheet — "
    "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
)
_H200 = (
    "NVIDIA H200 data sheet — https://resources.nvidia.com/en-us-data-center-overview-mc/"
    "en-us-data-center-overview/hpc-datasheet-sc23-h200"
)
_GB202 = (
    "NVIDIA RTX Blackwell GPU Architecture — "
    f"{_IMAGES}/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_B200 = (
    "NVIDIA Blackwell data sheet, HGX B200 — "
    "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet"
)
_B200_TUNING = "Blackwell Tuning Guide — https://docs.nvidia.com/cuda/blackwell-tuning-guide/"
_B200_QUERY = "device properties printed on a B200 — https://github.com/pytorch/ao/pull/4002"


# --- what the compute capability decides ------------------------------------------------------


@dataclass(frozen=True)
class Capability:
    """What every GPU of one compute capability has in common.

    Attributes
    ----------
    architecture : ``"Ampere"``, ``"Hopper"`` …
    smem_per_sm : most shared memory an SM can be set to, bytes.
    smem_per_block : most shared memory one thread block can ask for (opt-in), bytes.  From 8.0
        on it is 1 KiB less than the SM has: the system keeps 1 KiB for each block.
    l1_per_sm : the SRAM of an SM that L1 cache and shared memory divide, bytes.
    registers_per_sm : register file, bytes (65 536 registers of 32 bits).
    float32_per_clock : fused multiply-adds in float32 per clock and SM ("CUDA cores").
    float64_per_clock : the same in float64, without tensor cores.
    smem_bytes_per_clock : bytes per clock and SM that shared memory gives without bank
        conflicts: 32 banks of 4 bytes.
    """

    architecture: str
    smem_per_sm: int
    smem_per_block: int
    l1_per_sm: int
    float32_per_clock: int
    float64_per_clock: int
    registers_per_sm: int = 256 * KIB
    smem_bytes_per_clock: int = 128


#: compute capability → what it decides.  CUDA C++ Programming Guide, appendix Compute Capabilities.
CAPABILITIES: dict[str, Capability] = {
    "7.0": Capability("Volta", 96 * KIB, 96 * KIB, 128 * KIB, 64, 32),
    "7.5": Capability("Turing", 64 * KIB, 64 * KIB, 96 * KIB, 64, 2),
    "8.0": Capability("Ampere", 164 * KIB, 163 * KIB, 192 * KIB, 64, 32),
    "8.6": Capability("Ampere", 100 * KIB, 99 * KIB, 128 * KIB, 128, 2),
    "8.9": Capability("Ada Lovelace", 100 * KIB, 99 * KIB, 128 * KIB, 128, 2),
    "9.0": Capability("Hopper", 228 * KIB, 227 * KIB, 256 * KIB, 128, 64),
    "10.0": Capability("Blackwell", 228 * KIB, 227 * KIB, 256 * KIB, 128, 64),
    "12.0": Capability("Blackwell", 100 * KIB, 99 * KIB, 128 * KIB, 128, 2),
}


# --- cards ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """One card, by data sheet.

    Attributes
    ----------
    key : short name, ``"h200"``.
    name : full name.
    compute_capability : ``"9.0"``.
    memory_bytes : DRAM on the card, bytes (its GB are GiB).
    usable_bytes : total that the driver reports to a program, bytes; None where we have no
        printed listing.  It differs by some tens of MiB between drivers.
    memory_type : ``"HBM3e"``, ``"GDDR6"`` …
    memory_bandwidth : bytes/s to and from that memory, reads and writes together.
    l2_bytes : L2 cache, bytes.
    sm_count : streaming multiprocessors.
    boost_clock_hz : clock that the CUDA-core peaks assume, Hz.
    tensor_clock_hz : clock that the tensor-core peaks assume, Hz, where the vendor states
        another one (H100, H200); otherwise equal to ``boost_clock_hz``.
    peak : dtype → dense operations/s (see the module's text).
    cuda_core_float16 : operations/s in float16 without tensor cores, or None.
    float16_accumulate_float16 : operations/s of the tensor cores that add up in float16, where
        that is faster than with float32 (GeForce); otherwise None.
    sources : field (or ``"peak.<dtype>"``) → document and address.
    reported_as : names that torch and nvidia-smi use.
    """

    key: str
    name: str
    compute_capability: str
    memory_bytes: int
    memory_type: str
    memory_bandwidth: float
    l2_bytes: int
    sm_count: int
    boost_clock_hz: float
    tensor_clock_hz: float
    peak: dict[str, float]
    sources: dict[str, str]
    reported_as: tuple[str, ...]
    usable_bytes: int | None = None
    cuda_core_float16: float | None = None
    float16_accumulate_float16: float | None = None

    # -- what the compute capability decides ---------------------------------------------------
    @property
    def capability(self) -> Capability:
        """The row of :data:`CAPABILITIES`."""
        return CAPABILITIES[self.compute_capability]

    @property
    def arch(self) -> str:
        """Architecture, such as ``"Hopper"``."""
        return self.capability.architecture

    @property
    def smem_per_sm(self) -> int:
        """Most shared memory an SM can be set to, bytes."""
        return self.capability.smem_per_sm

    @property
    def smem_per_block(self) -> int:
        """Most shared memory one thread block can ask for (opt-in), bytes."""
        return self.capability.smem_per_block

    @property
    def l1_per_sm(self) -> int:
        """SRAM that L1 cache and shared memory divide, bytes per SM."""
        return self.capability.l1_per_sm

    @property
    def registers_per_sm(self) -> int:
        """Register file, bytes per SM."""
        return self.capability.registers_per_sm

    # -- sums over the chip ----------------------------------------------------------------------
    @property
    def smem_bytes(self) -> int:
        """Shared memory of all SMs together, bytes."""
        return self.sm_count * self.smem_per_sm

    @property
    def l1_bytes(self) -> int:
        """L1 and shared memory of all SMs together, bytes."""
        return self.sm_count * self.l1_per_sm

    @property
    def register_bytes(self) -> int:
        """Registers of all SMs together, bytes."""
        return self.sm_count * self.registers_per_sm

    @property
    def smem_bandwidth(self) -> float:
        """Bytes/s of all shared memories: SMs × 128 bytes per clock × boost clock.

        For an A100: 108 × 128 × 1.41 GHz = 19.5 TB/s, the "19 TB/s" of the FlashAttention
        paper (Dao et al., 2022).
        """
        return self.sm_count * self.capability.smem_bytes_per_clock * self.boost_clock_hz

    # -- balance ---------------------------------------------------------------------------------
    def ridge(self, dtype: Any = "bfloat16") -> float:
        r"""Operations per byte at which arithmetic and memory take the same time.

        :math:`I^* = \pi / \beta`, the ridge point of the roofline, by data sheet.

        Raises
        ------
        ArgumentError
            if the card has no peak for ``dtype``; the message lists those it has.
        """
        name = str(dtype).removeprefix("torch.")
        name = name if name in self.peak else dtype_name(dtype)
        if name not in self.peak:
            raise ArgumentError(
                "dtype",
                name,
                f"has no peak on {self.name}.",
                f"Known for it: {', '.join(self.peak)}.",
            )
        return self.peak[name] / self.memory_bandwidth

    def source(self, item: str) -> str:
        """The document a field was taken from: ``"l2_bytes"``, ``"peak.tf32"`` …

        Raises
        ------
        ArgumentError
            if there is no such field.
        """
        return self.sources[check_choice("item", item, self.sources)]

    def to_dict(self) -> dict[str, Any]:
        """Every field and every derived size as plain data: bytes, bytes/s, Hz, operations/s."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return plain | {"peak": dict(self.peak), "sources": dict(self.sources)}

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.arch}, compute capability {self.compute_capability})"]
        rows = [(label, text, self.sources.get(item)) for label, text, item in self._lines()]
        notes = list(dict.fromkeys(note for _, _, note in rows if note))
        wide = max(len(label) for label, _, _ in rows)
        tall = max(len(text) for _, text, _ in rows)
        for label, text, note in rows:
            mark = f"[{notes.index(note) + 1}]" if note else ""
            lines.append(f"  {label:<{wide}}  {text:<{tall}}  {mark}".rstrip())
        lines.append("Sources; sizes binary, rates decimal, peaks dense")
        lines += [f"  [{i}] {note}" for i, note in enumerate(notes, 1)]
        return "\n".join(lines)

    def _lines(self) -> list[tuple[str, str, str]]:
        """(label, value, key of the source) in the order in which they are read."""
        usable = "not known" if self.usable_bytes is None else format_bytes(self.usable_bytes, 4)
        lines = [
            ("memory", f"{format_bytes(self.memory_bytes)} {self.memory_type}", "memory_bytes"),
            ("as the driver reports it", usable, "usable_bytes"),
            ("memory bandwidth", format_rate(self.memory_bandwidth, "B/s", 4), "memory_bandwidth"),
            ("L2 cache", format_bytes(self.l2_bytes, 4), "l2_bytes"),
            ("SMs", str(self.sm_count), "sm_count"),
            ("registers per SM", format_bytes(self.registers_per_sm), "registers_per_sm"),
            ("shared memory per SM", format_bytes(self.smem_per_sm), "smem_per_sm"),
            ("shared memory per block", format_bytes(self.smem_per_block), "smem_per_block"),
            ("boost clock", f"{significant(self.boost_clock_hz / 1e9, 4)} GHz", "boost_clock_hz"),
        ]
        if self.tensor_clock_hz != self.boost_clock_hz:
            text = f"{significant(self.tensor_clock_hz / 1e9, 4)} GHz"
            lines.append(("clock of the tensor peaks", text, "tensor_clock_hz"))
        for dtype, rate in self.peak.items():
            lines.append((f"peak {dtype}", format_rate(rate, "FLOP/s", 4), f"peak.{dtype}"))
        if self.float16_accumulate_float16:
            text = format_rate(self.float16_accumulate_float16, "FLOP/s", 4)
            lines.append(("… adding up in float16", text, "float16_accumulate_float16"))
        return lines


_PLAIN = (
    "key",
    "name",
    "arch",
    "compute_capability",
    "memory_type",
    "memory_bytes",
    "usable_bytes",
    "memory_bandwidth",
    "l2_bytes",
    "sm_count",
    "smem_per_sm",
    "smem_per_block",
    "l1_per_sm",
    "registers_per_sm",
    "boost_clock_hz",
    "tensor_clock_hz",
    "cuda_core_float16",
    "float16_accumulate_float16",
)
_FROM_DOCUMENT = (
    "memory_bytes",
    "memory_type",
    "memory_bandwidth",
    "l2_bytes",
    "sm_count",
    "boost_clock_hz",
)
_FROM_CAPABILITY = ("smem_per_sm", "smem_per_block", "l1_per_sm", "registers_per_sm")


def _make(
    key: str,
    name: str,
    cc: str,
    *,
    memory_gib: int,
    memory_type: str,
    bandwidth: float,
    l2: float,
    sms: int,
    boost_mhz: float,
    peaks: dict[str, float],
    main: str,
    reported_as: tuple[str, ...],
    tensor_mhz: float | None = None,
    usable: int | None = None,
    half: float | None = None,
    half_half: float | None = None,
    **sources: str,
) -> Card:
    """A row of the table: bandwidth in GB/s, L2 in MiB, peaks in TFLOP/s; ``main`` is the
    document of every field that ``sources`` does not name (``peak__tf32`` for ``peak.tf32``)."""
    given = {item.replace("__", "."): text for item, text in sources.items()}
    where = {item: given.pop(item, main) for item in _FROM_DOCUMENT}
    where["compute_capability"] = (
        "CUDA GPU Compute Capability — https://developer.nvidia.com/cuda-gpus"
    )
    where |= dict.fromkeys(_FROM_CAPABILITY, _CUDA_GUIDE)
    where["tensor_clock_hz"] = given.pop("tensor_clock_hz", where["boost_clock_hz"])
    for dtype in peaks:
        where[f"peak.{dtype}"] = given.pop(f"peak.{dtype}", main)
    if cc in {"7.5", "8.6", "8.9", "12.0"}:
        where["peak.float64"] = f"SMs × 2 multiply-adds per clock × boost clock; {_CUDA_THROUGHPUT}"
    if usable is not None:
        where["usable_bytes"] = given.pop("usable_bytes")
    if half is not None:
        where["cuda_core_float16"] = given.pop("cuda_core_float16", main)
    if half_half is not None:
        where["float16_accumulate_float16"] = given.pop("float16_accumulate_float16", main)
    assert not given, f"{key}: a source for no field: {given}"
    return Card(
        key=key,
        name=name,
        compute_capability=cc,
        memory_bytes=memory_gib * GIB,
        memory_type=memory_type,
        memory_bandwidth=bandwidth * 1e9,
        l2_bytes=round(l2 * MIB),
        sm_count=sms,
        boost_clock_hz=boost_mhz * 1e6,
        tensor_clock_hz=(tensor_mhz or boost_mhz) * 1e6,
        peak={dtype: rate * 1e12 for dtype, rate in peaks.items()},
        sources=where,
        reported_as=reported_as,
        usable_bytes=usable,
        cuda_core_float16=None if half is None else half * 1e12,
        float16_accumulate_float16=None if half_half is None else half_half * 1e12,
    )


_VOLTA_PEAKS = {"float64": 7.8, "float32": 15.7, "float16": 125}
_GA100_PEAKS = {"float64": 9.7, "float32": 19.5, "tf32": 156, "float16": 312, "bfloat16": 312}
# The data sheets round to 67, 989/2, 1979/2 and 3958/2; the architecture document has the digits.
_GH100_PEAKS = {
    "float64": 33.5,
    "float32": 66.9,
    "tf32": 494.7,
    "float16": 989.4,
    "bfloat16": 989.4,
    "float8_e4m3fn": 1978.9,
}
_CUDA_CORES = ("float64", "float32")
_H200_PEAK = f"{_H200} (halved: it prints sparse rates), digits from the same chip: {_GH100}"

_ROWS = (
    _make(
        "v100-sxm2-16",
        "NVIDIA V100 SXM2 16 GB",
        "7.0",
        memory_gib=16,
        memory_type="HBM2",
        bandwidth=900,
        l2=6,
        sms=80,
        boost_mhz=1530,
        peaks=_VOLTA_PEAKS,
        half=31.4,
        main=_VOLTA,
        reported_as=("Tesla V100-SXM2-16GB",),
    ),
    _make(
        "v100-sxm2-32",
        "NVIDIA V100 SXM2 32 GB",
        "7.0",
        memory_gib=32,
        memory_type="HBM2",
        bandwidth=900,
        l2=6,
        sms=80,
        boost_mhz=1530,
        peaks=_VOLTA_PEAKS,
        half=31.4,
        main=_VOLTA,
        memory_bytes=_V100,
        memory_bandwidth=_V100,
        reported_as=("Tesla V100-SXM2-32GB",),
    ),
    _make(
        "t4",
        "NVIDIA T4",
        "7.5",
        memory_gib=16,
        memory_type="GDDR6",
        bandwidth=320,
        l2=4,
        sms=40,
        boost_mhz=1590,
        peaks={"float64": 0.254, "float32": 8.1, "float16": 65},
        half=16.3,
        cuda_core_float16="twice float32: " + _CUDA_THROUGHPUT,
        main=_TURING,
        memory_bytes=_T4,
        peak__float16=_T4,
        usable=15843721216,
        usable_bytes="deviceQuery on a T4 — https://chiemon.github.io/2024/12/25/"
        "%E6%98%BE%E5%8D%A1%E4%BF%A1%E6%81%AF.html",
        reported_as=("Tesla T4", "NVIDIA T4"),
    ),
    _make(
        "a100-pcie-40",
        "NVIDIA A100 PCIe 40 GB",
        "8.0",
        memory_gib=40,
        memory_type="HBM2",
        bandwidth=1555,
        l2=40,
        sms=108,
        boost_mhz=1410,
        peaks=_GA100_PEAKS,
        half=78,
        main=_GA100,
        memory_bandwidth=_A100,
        reported_as=("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
    ),
    _make(
        "a100-sxm-40",
        "NVIDIA A100 SXM 40 GB",
        "8.0",
        memory_gib=40,
        memory_type="HBM2",
        bandwidth=1555,
        l2=40,
        sms=108,
        boost_mhz=1410,
        peaks=_GA100_PEAKS,
        half=78,
        main=_GA100,
        usable=42405855232,
        usable_bytes="deviceQuery on an A100-SXM4-40GB — https://upb-pc2.atlassian.net/wiki/spaces/"
        "PC2DOK/pages/1900609/NVIDIA+A100+40GB+with+NVLINK",
        reported_as=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
    ),
    _make(
        "a100-pcie-80",
        "NVIDIA A100 PCIe 80 GB",
        "8.0",
        memory_gib=80,
        memory_type="HBM2e",
        bandwidth=1935,
        l2=40,
        sms=108,
        boost_mhz=1410,
        peaks=_GA100_PEAKS,
        half=78,
        main=_GA100,
        memory_bytes=_A100,
        memory_bandwidth=_A100,
        reported_as=("NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-80GB"),
    ),
    _make(
        "a100-sxm-80",
        "NVIDIA A100 SXM 80 GB",
        "8.0",
        memory_gib=80,
        memory_type="HBM2e",
        bandwidth=2039,
        l2=40,
        sms=108,
        boost_mhz=1410,
        peaks=_GA100_PEAKS,
        half=78,
        main=_GA100,
        memory_bytes=_A100,
        memory_bandwidth=_A100,
        reported_as=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", "A100-SXM-80GB"),
    ),
    _make(
        "a10",
        "NVIDIA A10",
        "8.6",
        memory_gib=24,
        memory_type="GDDR6",
        bandwidth=600,
        l2=6,
        sms=72,
        boost_mhz=1695,
        peaks={
            "float64": 0.488,
            "float32": 31.2,
            "tf32": 62.5,
            "float16": 125,
            "bfloat16": 125,
        },
        half=31.2,
        cuda_core_float16="equal to float32: " + _CUDA_THROUGHPUT,
        main=_A10,
        l2_bytes=_GA102,
        sm_count=f"9216 CUDA cores of 128 per SM; {_GA102}",
        reported_as=("NVIDIA A10",),
    ),
    _make(
        "l4",
        "NVIDIA L4",
        "8.9",
        memory_gib=24,
        memory_type="GDDR6",
        bandwidth=300,
        l2=48,
        sms=58,
        boost_mhz=2040,
        peaks={
            "float64": 0.473,
            "float32": 30.3,
            "tf32": 60,
            "float16": 121,
            "bfloat16": 121,
            "float8_e4m3fn": 242.5,
        },
        half=30.3,
        cuda_core_float16="equal to float32: " + _CUDA_THROUGHPUT,
        main=f"{_L4} (its tensor rates are sparse: halved)",
        l2_bytes=f"AD104: {_ADA}",
        reported_as=("NVIDIA L4",),
    ),
    _make(
        "l40s",
        "NVIDIA L40S",
        "8.9",
        memory_gib=48,
        memory_type="GDDR6",
        bandwidth=864,
        l2=96,
        sms=142,
        boost_mhz=2520,
        peaks={
            "float64": 1.43,
            "float32": 91.6,
            "tf32": 183,
            "float16": 362.05,
            "bfloat16": 362.05,
            "float8_e4m3fn": 733,
        },
        half=91.6,
        cuda_core_float16="equal to float32: " + _CUDA_THROUGHPUT,
        main=_L40S,
        l2_bytes="AD102 with all of its L2, as the L40 (some databases list 48 MB) — "
        "https://arxiv.org/abs/2606.22588",
        usable=46068 * MIB,
        usable_bytes="nvidia-smi on an L40S — "
        "https://github.com/akash-network/provider-configs/pull/99",
        reported_as=("NVIDIA L40S",),
    ),
    _make(
        "rtx3060",
        "GeForce RTX 3060 12 GB",
        "8.6",
        memory_gib=12,
        memory_type="GDDR6",
        bandwidth=360,
        l2=2.25,
        sms=28,
        boost_mhz=1777,
        peaks={
            "float64": 0.199,
            "float32": 12.7,
            "tf32": 12.7,
            "float16": 25.5,
            "bfloat16": 25.5,
        },
        half=12.7,
        half_half=51,
        cuda_core_float16="equal to float32: " + _CUDA_THROUGHPUT,
        float16_accumulate_float16=f"twice the rate with float32 accumulation: {_GA102}",
        main=_RTX3060,
        memory_bandwidth=f"192 bits × 15 Gbit/s; {_RTX3060}",
        l2_bytes="2 359 296 bytes by deviceQuery (the chip GA106 has 3 MiB), cudaDeviceProp — "
        "https://docs.nvidia.com/cuda/cuda-runtime-api/structcudaDeviceProp.html",
        peak__tf32=f"28 SMs × 256 per clock × boost clock; {_GA102}",
        peak__float16=f"28 SMs × 512 per clock × boost clock; {_GA102}",
        peak__bfloat16=f"28 SMs × 512 per clock × boost clock; {_GA102}",
        peak__float32=f"3584 CUDA cores × 2 × boost clock; {_RTX3060}",
        reported_as=("NVIDIA GeForce RTX 3060",),
    ),
    _make(
        "rtx3090",
        "GeForce RTX 3090",
        "8.6",
        memory_gib=24,
        memory_type="GDDR6X",
        bandwidth=936,
        l2=6,
        sms=82,
        boost_mhz=1695,
        peaks={
            "float64": 0.556,
            "float32": 35.6,
            "tf32": 35.6,
            "float16": 71,
            "bfloat16": 71,
        },
        half=35.6,
        half_half=142,
        main=_GA102,
        reported_as=("NVIDIA GeForce RTX 3090",),
    ),
    _make(
        "rtx4090",
        "GeForce RTX 4090",
        "8.9",
        memory_gib=24,
        memory_type="GDDR6X",
        bandwidth=1008,
        l2=72,
        sms=128,
        boost_mhz=2520,
        peaks={
            "float64": 1.29,
            "float32": 82.6,
            "tf32": 82.6,
            "float16": 165.2,
            "bfloat16": 165.2,
            "float8_e4m3fn": 330.3,
        },
        half=82.6,
        half_half=330.3,
        main=_ADA,
        usable=24563 * MIB,
        usable_bytes="NVBench on an RTX 4090 — https://github.com/NVIDIA/nvbench/pull/207",
        reported_as=("NVIDIA GeForce RTX 4090",),
    ),
    _make(
        "rtx5090",
        "GeForce RTX 5090",
        "12.0",
        memory_gib=32,
        memory_type="GDDR7",
        bandwidth=1792,
        l2=96,
        sms=170,
        boost_mhz=2407,
        peaks={
            "float64": 1.64,
            "float32": 104.8,
            "tf32": 104.8,
            "float16": 209.5,
            "bfloat16": 209.5,
            "float8_e4m3fn": 419,
        },
        half=104.8,
        half_half=419,
        main=_GB202,
        reported_as=("NVIDIA GeForce RTX 5090",),
    ),
    _make(
        "h100-pcie",
        "NVIDIA H100 PCIe",
        "9.0",
        memory_gib=80,
        memory_type="HBM2e",
        bandwidth=2000,
        l2=50,
        sms=114,
        boost_mhz=1755,
        tensor_mhz=1620,
        peaks={
            "float64": 25.6,
            "float32": 51.2,
            "tf32": 378,
            "float16": 756,
            "bfloat16": 756,
            "float8_e4m3fn": 1513,
        },
        half=102.4,
        main=_GH100,
        memory_bandwidth=_H100,
        reported_as=("NVIDIA H100 PCIe",),
    ),
    _make(
        "h100-sxm",
        "NVIDIA H100 SXM",
        "9.0",
        memory_gib=80,
        memory_type="HBM3",
        bandwidth=3350,
        l2=50,
        sms=132,
        boost_mhz=1980,
        tensor_mhz=1830,
        peaks=_GH100_PEAKS,
        half=133.8,
        main=_GH100,
        memory_bandwidth=_H100,
        reported_as=("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM5 80GB"),
    ),
    _make(
        "h200",
        "NVIDIA H200 SXM",
        "9.0",
        memory_gib=141,
        memory_type="HBM3e",
        bandwidth=4800,
        l2=60,
        sms=132,
        boost_mhz=1980,
        tensor_mhz=1830,
        peaks=_GH100_PEAKS,
        half=133.8,
        main=_H200,
        cuda_core_float16=_GH100,
        tensor_clock_hz=_GH100,
        sm_count=f"same SMs as the H100 SXM: {_GH100}",
        boost_clock_hz="nvidia-smi on H200s — https://github.com/awslabs/amazon-eks-ami/pull/1985",
        usable=150109880320,
        usable_bytes="cudaDeviceProp.totalGlobalMem, read on an H200 (records/nvidia-h200) — "
        "https://docs.nvidia.com/cuda/cuda-runtime-api/structcudaDeviceProp.html",
        l2_bytes=f"all of GH100's L2, its twelve memory controllers being in use: {_GH100}; "
        "torch.cuda.get_device_properties on an H200 reports the same",
        **{f"peak__{dtype}": _H200_PEAK for dtype in _GH100_PEAKS if dtype not in _CUDA_CORES},
        **{
            f"peak__{dtype}": f"67 and 34 rounded in the {_H200}; {_GH100}" for dtype in _CUDA_CORES
        },
        reported_as=("NVIDIA H200",),
    ),
    _make(
        "b200",
        "NVIDIA B200 SXM (HGX)",
        "10.0",
        memory_gib=180,
        memory_type="HBM3e",
        bandwidth=7700,
        l2=126.5,
        sms=148,
        boost_mhz=1980,
        tensor_mhz=1856,
        peaks={
            "float64": 37,
            "float32": 75,
            "tf32": 1100,
            "float16": 2250,
            "bfloat16": 2250,
            "float8_e4m3fn": 4500,
        },
        main=_B200,
        l2_bytes=f"{_B200_QUERY}; 126 MB in the {_B200_TUNING}",
        sm_count=_B200_QUERY,
        boost_clock_hz=f"not published; the one that makes 148 SMs give 75 TFLOP/s: {_B200}",
        tensor_clock_hz=f"not published; the one that makes 148 SMs give 2.25 PFLOP/s: {_B200}",
        **{
            f"peak__{dtype}": f"{_B200} (halved: it prints sparse rates)"
            for dtype in ("tf32", "float16", "bfloat16", "float8_e4m3fn")
        },
        usable=182642 * MIB,
        usable_bytes=_B200_QUERY,
        reported_as=("NVIDIA B200",),
    ),
)
#: key → card, oldest architecture first.
CARDS: dict[str, Card] = {row.key: row for row in _ROWS}

# Short names that mean exactly one row of the table.
_ALIASES = {
    "v100 16": "v100-sxm2-16",
    "v100 32": "v100-sxm2-32",
    "a100 40 sxm": "a100-sxm-40",
    "a100 40 pcie": "a100-pcie-40",
    "a100 80 sxm": "a100-sxm-80",
    "a100 80 pcie": "a100-pcie-80",
    "rtx 3060 12": "rtx3060",
    "h100 sxm5": "h100-sxm",
    "h100 80 hbm3": "h100-sxm",
    "h200 sxm": "h200",
    "b200 sxm": "b200",
}


def _words(name: str) -> frozenset[str]:
    """The words of a card's name that tell it from others: no vendor, no brand, no "GB"."""
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    text = re.sub(r"\brtx (?=\d)", "rtx", text)
    words = (re.sub(r"^(\d+)gb$", r"\1", word) for word in text.split())
    dull = {"nvidia", "geforce", "tesla", "gb", "gpu", "sxm2", "sxm4"}
    spelled = {"sxm2": "sxm", "sxm4": "sxm", "sxm5": "sxm"}
    return frozenset(spelled.get(w, w) for w in words if w not in dull or w in spelled)


_BY_WORDS: dict[frozenset[str], str] = {}
for _row in CARDS.values():
    for _name in (_row.key, _row.name, *_row.reported_as):
        _BY_WORDS.setdefault(_words(_name), _row.key)
for _name, _key in _ALIASES.items():
    _BY_WORDS.setdefault(_words(_name), _key)


def card(name: str | Card) -> Card:
    """The card of that key or name.

    Parameters
    ----------
    name : a key (``"h200"``), the name that torch or nvidia-smi reports (``"NVIDIA H200"``,
        ``"NVIDIA GeForce RTX 3060"``, ``"Tesla T4"``, ``"NVIDIA A100-SXM4-80GB"``) or the name
        people use (``"RTX 4090"``).  A name that fits several cards, such as ``"A100"``, is
        refused: their memories differ.

    Raises
    ------
    ArgumentError
        if the name is unknown or fits several cards; the message names the nearest.
    """
    if isinstance(name, Card):
        return name
    if not isinstance(name, str):
        raise ArgumentError("card", name, "is not a name.", f"Known: {', '.join(CARDS)}.")
    words = _words(name)
    if name in CARDS or words in _BY_WORDS:
        return CARDS[name] if name in CARDS else CARDS[_BY_WORDS[words]]
    # A shorter name than those in the table ("A100"): say which ones it could be.
    several = sorted({key for known, key in _BY_WORDS.items() if words and words < known})
    several = [key for key in CARDS if key in several]
    if len(several) > 1:
        raise ArgumentError(
            "card", name, "fits several cards.", f"Pass one of: {', '.join(several)}."
        )
    spelled = {" ".join(sorted(known)): key for known, key in _BY_WORDS.items()}
    near = get_close_matches(" ".join(sorted(words)), list(spelled), n=1)
    hint = f"Did you mean {spelled[near[0]]!r}? " if near else ""
    raise ArgumentError("card", name, "is not in the table.", f"{hint}Known: {', '.join(CARDS)}.")


# --- tables -----------------------------------------------------------------------------------

_FIELDS: dict[str, tuple[str, Any]] = {
    "card": ("card", lambda c: c.name),
    "arch": ("architecture", lambda c: c.arch),
    "compute_capability": ("compute capability", lambda c: c.compute_capability),
    "memory_bytes": ("memory", lambda c: format_bytes(c.memory_bytes)),
    "memory_type": ("type", lambda c: c.memory_type),
    "memory_bandwidth": ("bandwidth", lambda c: format_rate(c.memory_bandwidth, "B/s", 4)),
    "l2_bytes": ("L2", lambda c: format_bytes(c.l2_bytes, 4)),
    "sm_count": ("SMs", lambda c: str(c.sm_count)),
    "registers_per_sm": ("registers per SM", lambda c: format_bytes(c.registers_per_sm)),
    "register_bytes": ("registers", lambda c: format_bytes(c.register_bytes)),
    "smem_per_sm": ("shared per SM", lambda c: format_bytes(c.smem_per_sm)),
    "smem_per_block": ("shared per block", lambda c: format_bytes(c.smem_per_block)),
    "smem_bytes": ("shared memory", lambda c: format_bytes(c.smem_bytes)),
    "smem_bandwidth": ("shared bandwidth", lambda c: format_rate(c.smem_bandwidth, "B/s")),
    "boost_clock_hz": ("boost clock", lambda c: f"{significant(c.boost_clock_hz / 1e9, 4)} GHz"),
    "ridge": (
        "ridge (float16)",
        lambda c: f"{significant(c.ridge('float16'))} FLOP/byte",
    ),
} | {
    f"peak.{dtype}": (
        dtype,
        lambda c, dtype=dtype: format_rate(c.peak[dtype], "FLOP/s") if dtype in c.peak else "–",
    )
    for dtype in ("float64", "float32", "tf32", "float16", "bfloat16", "float8_e4m3fn")
}
#: ready-made choices of columns, five beside the name at most
_VIEWS = {
    "overview": "card memory_bytes memory_bandwidth l2_bytes peak.float16 ridge",
    "on_chip": "card sm_count registers_per_sm smem_per_sm smem_per_block l2_bytes",
    "totals": "card register_bytes smem_bytes l2_bytes smem_bandwidth memory_bandwidth",
    "compute": "card boost_clock_hz peak.float32 peak.tf32 peak.float16 peak.float8_e4m3fn",
}


@dataclass(frozen=True)
class CardTable:
    """Some columns of some cards; prints as text, shows as HTML.

    Sizes are binary, rates decimal, as everywhere in labkit.
    """

    cards: tuple[Card, ...]
    columns: tuple[str, ...]

    def rows(self) -> list[list[str]]:
        """The header, then one list of cells per card."""
        body = [[_FIELDS[name][1](row) for name in self.columns] for row in self.cards]
        return [[_FIELDS[name][0] for name in self.columns], *body]

    def to_dicts(self) -> list[dict[str, Any]]:
        """The same cards with every field as plain data (bytes, bytes/s, operations/s)."""
        return [row.to_dict() for row in self.cards]

    def sources(self) -> list[tuple[str, str, str]]:
        """(card, field, document) of each cell that was read from a document."""
        return [
            (row.name, name, row.sources[name])
            for row in self.cards
            for name in self.columns
            if name in row.sources
        ]

    def __str__(self) -> str:
        rows = self.rows()
        wide = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = []
        for row in rows:
            cells = [
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, wide, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "  ".join("─" * w for w in wide))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = self.rows()
        style = ' style="text-align:right"'
        out = ['<table class="labkit-table">', "<thead><tr>"]
        out += [
            f'<th scope="col"{style if i else ""}>{html.escape(cell)}</th>'
            for i, cell in enumerate(head)
        ]
        out.append("</tr></thead><tbody>")
        for card_, row in zip(self.cards, body, strict=True):
            out.append("<tr>")
            for i, (name, cell) in enumerate(zip(self.columns, row, strict=True)):
                text = html.escape(cell)
                if i == 0:
                    out.append(f'<th scope="row">{text}</th>')
                else:
                    title = html.escape(card_.sources.get(name, ""), quote=True)
                    tip = f' title="{title}"' if title else ""
                    out.append(f"<td{style}{tip}>{text}</td>")
            out.append("</tr>")
        out.append("</tbody></table>")
        return "\n".join(out)


def table(
    cards: Iterable[str | Card] | None = None, columns: str | Sequence[str] = "overview"
) -> CardTable:
    """A table of cards.

    Parameters
    ----------
    cards : keys, names or cards; None for all of :data:`CARDS`.
    columns : ``"overview"``, ``"on_chip"`` (per SM), ``"totals"`` (over the chip), ``"compute"``,
        or a list of fields (``"peak.tf32"``, ``"smem_bandwidth"`` …).

    Raises
    ------
    ArgumentError
        if a card or a column is unknown.
    """
    if isinstance(cards, str):
        cards = [cards]
    chosen = tuple(CARDS.values()) if cards is None else tuple(card(name) for name in cards)
    if isinstance(columns, str):
        columns = _VIEWS[check_choice("columns", columns, _VIEWS)].split()
    return CardTable(chosen, tuple(check_choice("columns", name, _FIELDS) for name in columns))


# --- this machine -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What this machine is, and what of labkit runs on it.

    Attributes
    ----------
    gpu : name of the first GPU, or None.
    card : its row of :data:`CARDS`, or None if it is not in the table.
    gpu_count : GPUs that torch (or nvidia-smi) sees.
    compute_capability : of that GPU, ``"9.0"``, or None.
    gpu_total_bytes, gpu_free_bytes : its memory, bytes, or None if it could not be asked.
    driver : driver version, or None.
    cuda : CUDA (or ROCm) version that torch was built with, or None.
    torch, triton : versions, or None where not installed.
    python, platform, cpu : of this process and host.
    cores : CPU cores this process may use.
    ram_bytes, ram_free_bytes : main memory, bytes, within this process's limit; None if unknown.
    interpreter : True if Triton's interpreter is switched on (``TRITON_INTERPRET=1``).
    can_run : ``"gpu"`` (Triton kernels on the GPU), ``"interpreter"`` (Triton kernels on the CPU,
        for correctness), ``"torch-only"`` (no Triton) or ``"no-torch"`` (tables and closed forms).
    problems : what was found broken while asking: part → reason.
    """

    gpu: str | None = None
    card: Card | None = None
    gpu_count: int = 0
    compute_capability: str | None = None
    gpu_total_bytes: int | None = None
    gpu_free_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None
    torch: str | None = None
    triton: str | None = None
    python: str = ""
    platform: str = ""
    cpu: str = ""
    cores: int = 1
    ram_bytes: int | None = None
    ram_free_bytes: int | None = None
    interpreter: bool = False
    can_run: str = "no-torch"
    problems: dict[str, str] = field(default_factory=dict)


def _version(package: str) -> str | None:
    """Version of an installed package that can be found, without importing it."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    except Exception:  # a broken finder or a blocked module counts as not installed
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return None


def _ram() -> tuple[int | None, int | None]:
    """(total, free) main memory in bytes; a container's limit counts as the total."""
    total = free = None
    with suppress(AttributeError, OSError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.M)
        free = int(found.group(1)) * KIB if found else None
    except OSError:
        pass
    limit = _read_int("/sys/fs/cgroup/memory.max")
    if limit is not None and total is not None and limit < total:
        used = _read_int("/sys/fs/cgroup/memory.current") or 0
        total = limit
        free = min(free, limit - used) if free is not None else limit - used
    return total, free


def _nvidia_smi() -> list[dict[str, str]]:
    """One dict per GPU as nvidia-smi sees it; empty without the tool or a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    wanted = "name,memory.total,memory.free,driver_version,compute_cap"
    done = subprocess.run(
        [tool, f"--query-gpu={wanted}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode != 0:
        return []
    keys = wanted.split(",")
    lines = [line.split(",") for line in done.stdout.strip().splitlines()]
    return [
        dict(zip(keys, (part.strip() for part in line), strict=True))
        for line in lines
        if len(line) == len(keys)
    ]


def _mib(text: str | None) -> int | None:
    return int(text) * MIB if text and text.isdigit() else None


def _card_of(name: str | None, sms: int | None, total: int | None) -> Card | None:
    """The row for that name, unless the GPU differs from it (a variant, a slice of a card)."""
    try:
        row = card(name) if name else None
    except ArgumentError:
        return None
    if row is None or (sms is not None and sms != row.sm_count):
        return None
    # One name covers several memories (RTX 3060: 8 and 12 GB).
    if total is not None and not 0.85 < total / row.memory_bytes < 1.05:
        return None
    return row


def _triton_interprets() -> bool:
    loaded = sys.modules.get("triton")
    try:
        if loaded is not None:
            return bool(loaded.knobs.runtime.interpret)
    except AttributeError:
        pass
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


def detect() -> Machine:
    """What this machine is.  Loads torch if it is installed; never raises.

    A GPU counts only if this torch can run on it: a driver that is too old, or a build without
    code for the GPU's compute capability, is told in ``problems`` and leaves the CPU.
    """
    problems: dict[str, str] = {}
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "triton": _version("triton"),
    }
    found["ram_bytes"], found["ram_free_bytes"] = _ram()

    smi: list[dict[str, str]] = []
    try:
        smi = _nvidia_smi()
    except Exception as error:
        problems["nvidia-smi"] = f"{type(error).__name__}: {error}"
    if smi:
        first = smi[0]
        found |= {
            "gpu": first["name"],
            "gpu_count": len(smi),
            "driver": first["driver_version"],
            "gpu_total_bytes": _mib(first["memory.total"]),
            "gpu_free_bytes": _mib(first["memory.free"]),
            "compute_capability": first["compute_cap"],
        }

    usable = False
    sms = None
    if _version("torch") is not None:
        try:
            import torch

            found["torch"] = str(torch.__version__)
            hip = getattr(torch.version, "hip", None)
            found["cuda"] = f"ROCm {hip}" if hip else torch.version.cuda
            if torch.cuda.is_available():
                about = torch.cuda.get_device_properties(0)
                sms = about.multi_processor_count
                found |= {
                    "gpu": about.name,
                    "gpu_count": torch.cuda.device_count(),
                    "gpu_total_bytes": int(about.total_memory),
                    "compute_capability": f"{about.major}.{about.minor}",
                }
                usable, why = _torch_has_code(torch)
                if why:
                    problems["gpu"] = why
                if usable:
                    found["gpu_free_bytes"] = int(torch.cuda.mem_get_info(0)[0])
            elif smi:
                problems["gpu"] = (
                    "nvidia-smi sees it, torch does not: this torch is built without CUDA."
                    if torch.version.cuda is None and hip is None
                    else "nvidia-smi sees it, torch cannot use it (driver older than torch's CUDA "
                    f"{torch.version.cuda}, or hidden by CUDA_VISIBLE_DEVICES)."
                )
        except Exception as error:  # an import that fails half-way is a machine without torch
            problems["torch"] = f"{type(error).__name__}: {error}"
            if "torch" not in sys.modules:
                found.pop("torch", None)
            usable = False

    found["interpreter"] = found["triton"] is not None and _triton_interprets()
    found["card"] = _card_of(found.get("gpu"), sms, found.get("gpu_total_bytes"))
    if found.get("torch") is None:
        found["can_run"] = "no-torch"
    elif found["triton"] is None:
        found["can_run"] = "torch-only"
    elif usable and not found["interpreter"]:
        found["can_run"] = "gpu"
    else:
        found["can_run"] = "interpreter"
    return Machine(**found, problems=problems)


def _torch_has_code(torch: Any) -> tuple[bool, str]:
    """Whether this build of torch can run on GPU 0, and why not."""
    if getattr(torch.version, "hip", None):
        return True, ""
    major, minor = torch.cuda.get_device_capability(0)
    built = torch.cuda.get_arch_list()
    # Binary code runs on the same major version from its own minor on; PTX on anything newer.
    for arch in built:
        kind, _, digits = arch.partition("_")
        digits = re.sub(r"\D", "", digits)
        if len(digits) < 2:
            continue
        has = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and has[0] == major and has[1] <= minor:
            if arch.endswith("a") and has[1] != minor:  # "sm_90a" runs on 9.0 alone
                continue
            return True, ""
        if kind == "compute" and has <= (major, minor):
            return True, ""
    return not built, (
        f"compute capability {major}.{minor}, and this torch has code for {', '.join(built)}."
        if built
        else ""
    )
