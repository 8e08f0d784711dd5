"""Free memory, and a refusal before it is exceeded.

A request that cannot fit is cheaper to refuse by arithmetic than by an out-of-memory
error: nothing has been allocated, nothing else on the machine has been pushed out.

Imports: errors, units.  Torch only to ask a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from labkit.errors import NotEnoughMemoryError
from labkit.units import format_bytes

__all__ = ["check_fits", "free_memory"]


def free_memory(device: Any = "cpu") -> int | None:
    """Bytes that can still be allocated on ``device``; None where nobody can tell.

    CUDA: what the driver reports free and what torch's caching allocator holds unused.
    CPU: what the kernel calls available (free, and caches it can drop), or less if a
    control group (a container) allows less.
    """
    if str(device).startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info(device if ":" in str(device) else None)
        return free + _held(device)
    if not str(device).startswith("cpu"):
        return None
    known = [n for n in (_available(), _cgroup_left()) if n is not None]
    return min(known) if known else None


def _held(device: Any) -> int:
    """Bytes that torch's CUDA allocator has taken and not handed out."""
    import torch

    # empty until the first allocation of the process
    stats = torch.cuda.memory_stats(device)
    return stats.get("reserved_bytes.all.current", 0) - stats.get("allocated_bytes.all.current", 0)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # macOS and others: physical memory is the only bound known without a package
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup_left() -> int | None:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            most = Path(limit).read_text().strip()
            if most != "max":
                return max(0, int(most) - int(Path(used).read_text()) + _droppable())
        except (OSError, ValueError):
            continue
    return None


def _droppable() -> int:
    """File cache charged to the control group: it counts as used, and goes when asked."""
    try:
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def check_fits(needed: int, what: str, *, device: Any = "cpu") -> None:
    """Raise before an allocation that is predicted not to fit.

    Parameters
    ----------
    needed : int
        predicted bytes.
    what : str
        what needs them, as a noun phrase.
    device : str or torch.device
        where.

    Raises
    ------
    NotEnoughMemoryError
        naming what is needed, what is free, and what would do.
    """
    if str(device).startswith("cuda") and needed <= _held(device):
        return  # asking the driver takes longer than many a kernel
    free = free_memory(device)
    if free is None or needed <= free:
        return
    raise NotEnoughMemoryError(
        f"{what} needs {format_bytes(needed)} at its peak, and {device} has "
        f"{format_bytes(free)} free. Nothing was allocated. Use a shorter sequence, a smaller "
        "batch, fewer heads, a narrower dtype, or a fused attention that never stores the scores "
        "(torch.nn.functional.scaled_dot_product_attention)."
    )
