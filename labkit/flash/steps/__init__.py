"""The forward kernel, grown in numbered steps that all run.

Each step is a file that reads from top to bottom and changes one idea of the step before.  All
have the signature ``forward(q, k, v, *, causal=False, scale=None) -> (o, lse)``.  The gain that
:class:`Step` names was *predicted* before the step was timed, from the instructions that the
compiler emits for one score and the bytes that it takes from L2 (``labkit.flash.resources``);
``experiments/flash_forward.py`` measures.

Importing this package loads neither torch nor Triton.

Taught in chapter 08 (what does the kernel look like?).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from labkit.kernels.runtime import require_triton

__all__ = ["STEPS", "Step"]


@dataclass(frozen=True)
class Step:
    """One step of the forward kernel.

    Attributes
    ----------
    number : 1, 2, …
    name : short, for axes and tables.
    change : what differs from the step before.
    low, high : predicted time of the step before over this one's, no mask, d = 64 to 128.
    low_causal, high_causal : the same under a causal mask.
    why : where the prediction comes from.
    file : module below ``labkit.flash`` that holds it.
    """

    number: int
    name: str
    change: str
    low: float
    high: float
    low_causal: float
    high_causal: float
    why: str
    file: str

    @property
    def key(self) -> str:
        """``"v1"`` …"""
        return f"v{self.number}"

    @property
    def module(self) -> ModuleType:
        """The module, imported now; needs Triton."""
        require_triton(f"step {self.number} of the forward kernel")
        return import_module(f"labkit.flash.{self.file}")

    def forward(self, q, k, v, *, causal: bool = False, scale: float | None = None):
        """O and LSE of attention, computed by this step.

        Parameters
        ----------
        q, k, v : [B, H, N, d] and twice [B, Hkv, N, d], contiguous, d a power of two.
        causal : query i sees keys 0 … i.
        scale : multiplies Q Kᵀ; None means 1/√d.

        Raises
        ------
        ArgumentError, NoGpuError, MissingDependencyError
            before anything is launched.
        """
        return self.module.forward(q, k, v, causal=causal, scale=scale)


STEPS: tuple[Step, ...] = (
    Step(
        1, "correct",
        "online softmax, one program per 64 queries, every block of keys masked",
        1.0, 1.0, 1.0, 1.0,
        "the start",
        "steps.v1_correct",
    ),
    Step(
        2, "exp2",
        "scale and change of base in one multiply-add, exp2 for exp",
        1.0, 1.2, 1.0, 1.2,
        "a third fewer instructions per score; but the tiles from L2 take as long",
        "steps.v2_exp2",
    ),
    Step(
        3, "two stages",
        "hidden blocks skipped, a mask only where it cuts, longest programs first",
        1.0, 1.1, 1.9, 2.2,
        "causal: half the blocks are gone; otherwise one select per score",
        "steps.v3_two_stage",
    ),
    Step(
        4, "descriptors",
        "tiles fetched by the copy engine, 128 queries per program",
        1.3, 1.75, 1.2, 1.75,
        "half the bytes from L2, and no instructions for addresses",
        "steps.v4_descriptors",
    ),
    Step(
        5, "tuned",
        "the production kernel: tiles, warps and stages tried on the card",
        1.0, 1.2, 1.0, 1.3,
        "step 4's loop; two programs per SM can overlap products and exponentials",
        "steps.v5_tuned",
    ),
    Step(
        6, "by hand",
        "Gluon: a warp that copies, warps that compute, products issued ahead",
        1.0, 1.3, 1.0, 1.3,
        "from the sum of products and softmax towards the longer of the two",
        "steps.v6_by_hand",
    ),
)  # fmt: skip
