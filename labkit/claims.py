r"""The claims that the course tests: what was said, what is so, and every cell of it recomputed.

The course grew from a set of notes.  Each figure and rule they state is a claim with a verdict
here, and a function that computes what the claim says from the same closed forms, card table and
step costs as the chapters use.  The ledger page of the book is made from this file, and so is
``python -m labkit claims``.

Where a verdict rests on a measurement, its cells are read by key from the records of an H200 that
ship with the course, and the chapter that the claim names shows how they came about.  Sizes are
compared in binary units: the notes' "KB" are KiB.

Imports: records, layers.budget, nsa.model, memory, roofline, hardware, closed_form, units, errors.
No torch.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from labkit import records
from labkit.closed_form import Form, symbols
from labkit.errors import check_choice
from labkit.hardware import card
from labkit.layers.budget import layer_budget
from labkit.memory import (
    attention_forms,
    attention_memory,
    attention_peak,
    longest_seq_len,
    scores_buffer_bytes,
)
from labkit.nsa.model import Shape, claimed_flops, flops, naive_flops
from labkit.roofline import steps
from labkit.units import GIB, KIB, MIB, format_bytes, format_rate, significant

__all__ = [
    "CLAIMS",
    "VERDICTS",
    "Claim",
    "Comparison",
    "Row",
    "as_markdown",
    "claim",
    "comparisons",
]

#: verdict → what it means
VERDICTS = {
    "confirmed": "right as stated",
    "confirmed with a correction": "right once something is added or restated",
    "refuted": "wrong; the chapter shows what is right",
    "depends: measured": "true under conditions, which the chapter measures",
}


@dataclass(frozen=True)
class Claim:
    """One claim of the notes.

    Attributes
    ----------
    id : such as ``"C03"``.
    statement : what is claimed, in our words.
    verdict : one of :data:`VERDICTS`.
    reason : why, in one sentence.
    chapter : number of the chapter that shows it, ``"01"``.
    others : further chapters, in order.
    """

    id: str
    statement: str
    verdict: str
    reason: str
    chapter: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One cell: what was claimed and what is computed, or was recorded.

    Attributes
    ----------
    label : which cell.
    claimed, computed : both as text.
    agrees : whether the computed value is the claimed one, to the digits claimed.
    expected : what the verdict says of ``agrees``; False for the cells of a refuted claim.
    source : ``"experiment:key"`` of a cell that was recorded, else empty.
    """

    label: str
    claimed: str
    computed: str
    agrees: bool
    expected: bool = True
    source: str = ""


@dataclass(frozen=True)
class Comparison:
    """A table of the notes beside the same table computed or, for what was measured, recorded."""

    claim: str
    title: str
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def as_expected(self) -> bool:
        """Whether every cell comes out as the verdict says."""
        return all(row.agrees == row.expected for row in self.rows)

    @property
    def found(self) -> str:
        """Heading of what stands beside the claim: ``"computed"`` or ``"recorded"``."""
        return "recorded" if any(row.source for row in self.rows) else "computed"

    def __str__(self) -> str:
        cells = [("", "claimed", self.found, "")]
        cells += [(r.label, r.claimed, r.computed, _mark(r)) for r in self.rows]
        wide = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = [f"{self.claim}: {self.title}"]
        for label, claimed, computed, mark in cells:
            line = f"  {label:<{wide[0]}}  {claimed:>{wide[1]}}  {computed:>{wide[2]}}  {mark}"
            lines.append(line.rstrip())
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        right = ' style="text-align:right"'
        out = [
            '<table class="labkit-table">',
            f"<caption>{self.claim}: {html.escape(self.title)}</caption>",
            f'<thead><tr><th scope="col"></th><th scope="col"{right}>claimed</th>'
            f'<th scope="col"{right}>{self.found}</th><th scope="col"></th></tr></thead><tbody>',
        ]
        for row in self.rows:
            label, claimed, computed, mark = map(
                html.escape, (row.label, row.claimed, row.computed, _mark(row))
            )
            out.append(
                f'<tr><th scope="row">{label}</th><td{right}>{claimed}</td>'
                f"<td{right}>{computed}</td><td>{mark}</td></tr>"
            )
        out.append("</tbody>")
        if self.note:
            out.append(f'<tfoot><tr><td colspan="4">{html.escape(self.note)}</td></tr></tfoot>')
        return "\n".join([*out, "</table>"])


def _mark(row: Row) -> str:
    mark = "agrees" if row.agrees else "differs"
    return mark if row.agrees == row.expected else f"{mark}, against the verdict"


# -- what the notes say ------------------------------------------------------------------------

_CLAIMS = (
    Claim(
        "C01",
        "Attention takes three steps, S = QKᵀ/√d, P = softmax(S), O = PV; S and P are N × N, "
        "the other four N × d.",
        "confirmed",
        "Tracing the three steps finds these six tensors, with these shapes.",
        "01",
    ),
    Claim(
        "C02",
        "In float32, Q, K, V and O take 16Nd bytes and S and P 8N²; half of that in float16.",
        "confirmed with a correction",
        "That is per head and batch element, and it is the size of the tensors: an allocator "
        "holds more while a scale, a mask or a wider softmax makes copies, and less in place.",
        "01",
    ),
    Claim(
        "C03",
        "With d = 64 in float16, S and P are 80 % of all bytes at N = 512 and 99 % at N = 16 384.",
        "confirmed with a correction",
        "Every cell of the table is right when KB, MB and GB are read as KiB, MiB and GiB.",
        "01",
    ),
    Claim(
        "C04",
        "In float16 and for N ≫ d, QKᵀ and PV do about d operations per byte, softmax 1.25.",
        "confirmed with a correction",
        "They are limits: the products do d/(1 + 2d/N), a fifth less at N = 8d, and 1.25 counts "
        "softmax as five operations per score.",
        "04",
    ),
    Claim(
        "C05",
        "An A100 is balanced at 312/2.0 = 156 operations per byte and an H100 at 990/3.35 = 296, "
        "so standard attention is bound by memory.",
        "confirmed with a correction",
        "With the data sheets' own digits they are 153 and 295; the conclusion holds for S and P "
        "in memory; where they are not written, the operations per byte grow with N.",
        "04",
    ),
    Claim(
        "C06",
        "On-chip SRAM is about 20 MB at 19 TB/s and 20 cycles, HBM 40 to 80 GB at 2 TB/s and "
        "400 cycles: ten times the bandwidth.",
        "depends: measured",
        "Sizes and bandwidths are an A100's by data sheet, and each card has its own; latencies "
        "are in no data sheet: the chapter measures those of L1, L2 and HBM on an H200 and "
        "quotes others for shared memory.",
        "03",
    ),
    Claim(
        "C07",
        "Standard attention writes S, reads S, writes P and reads P through HBM.",
        "depends: measured",
        "Each of the four is N² elements of compulsory traffic, and eager PyTorch adds a pass for "
        "the scale; what a cache of tens of MiB still holds from the step before never reaches "
        "HBM.",
        "04",
    ),
    Claim(
        "C08",
        "S and P of h heads take 4hN² bytes in float16 for each batch element: 192 MB for 12 "
        "heads and N = 2048, 6 GB for batch 8 and N = 4096.",
        "confirmed with a correction",
        "Every row is right in MiB and GiB.",
        "01",
        ("05",),
    ),
    Claim(
        "C09",
        "The backward pass of softmax is dS = dP ⊙ P ⊙ (1 − P), and dQ and dK need the shape of S.",
        "refuted",
        "(1 − P) keeps the diagonal of the softmax Jacobian alone; dS = P ⊙ (dP − rowsum(dP ⊙ P)), "
        "and dQ = dS K/√d and dK = dSᵀQ/√d need dS, K and Q, not the shape of S.",
        "05",
        ("09",),
    ),
    Claim(
        "C10",
        "Training doubles the memory, because S and P are kept.",
        "depends: measured",
        "Autograd keeps P and not S, and the peak is reached in the backward pass, where P, dP "
        "and dS live at once; the factor depends on the form.",
        "05",
        ("09",),
    ),
    Claim(
        "C11",
        "Flash attention reads and writes O(N²d/M) elements of HBM, M being the size of SRAM, "
        "keeps O(N) instead of O(N²), and is 2 to 4 times faster.",
        "refuted",
        "The bound is Θ(N²d²/M), and standard attention's is Θ(Nd + N²): at M = Nd the claimed "
        "one would be less than reading Q once. Memory does fall from O(N²) to O(N); the "
        "speed-up of 2 to 4 depends on the baseline.",
        "06",
        ("04", "07", "08", "09"),
    ),
    Claim(
        "C12",
        "A float32 scores buffer has 4·B·H·N² bytes: 0.25 MB at N = 256, 16 MB at N = 2048.",
        "confirmed with a correction",
        "Every row is right in MiB; that is one buffer, and naive attention has two of them.",
        "01",
        ("02",),
    ),
    Claim(
        "C13",
        "Batch and heads grow the scores buffer linearly; head_dim leaves it as it is.",
        "confirmed",
        "The closed form has degree 1 in B and H, 2 in N and 0 in d.",
        "02",
    ),
    Claim(
        "C14",
        "From N = 256 to 2048 the time goes as t, 4t, 16t, 64t.",
        "depends: measured",
        "The operations do; the time follows only once the device is full, and before that "
        "launching the kernels takes longer than running them.",
        "02",
    ),
    Claim(
        "C15",
        "A tile of 64 × 64 in float32 takes 16 KB, the full matrix 1 MB.",
        "confirmed with a correction",
        "In KiB and MiB, and at N = 512: the tile stays 16 KiB whatever N is.",
        "01",
        ("06",),
    ),
    Claim(
        "C16",
        "Shared memory has 19 TB/s against 1.5 TB/s of HBM, so tiling makes attention 12 times "
        "faster.",
        "refuted",
        "The ratio of bandwidths is right for an A100 40 GB; the speed-up of attention follows "
        "from the bytes that disappear and from the arithmetic; it depends on N and on the "
        "baseline.",
        "03",
    ),
    Claim(
        "C17",
        "Flash attention is 2 times faster at N = 128, 5 times at 512, 15 times at 2048 and 40 "
        "times at 4096.",
        "depends: measured",
        "It depends on what it is compared with: float32 or half precision, a library's softmax "
        "or one's own, and how much of a short call is launching. The chapter compares with "
        "four baselines, and none of them gives 40.",
        "08",
    ),
    Claim(
        "C18",
        "On an RTX 3060 a layer with flash attention takes 2.6 ms at N = 128, 256 and 512, and is "
        "2.97, 4.44, 4.47, 2.70 and 2.91 times faster than the original from 128 to 2048: tensor "
        "cores work best from 256 to 512.",
        "refuted",
        "The quotients are right and the reason is not. Sixteen times the scores in the same time "
        "means that the GPU waits for its next kernel, on tensor cores or not. On an H200, where "
        "the curve is flat as well, no kernel runs for most of a call, a CUDA graph of the same "
        "kernels takes a fraction of the time, and tensor cores change nothing at these lengths.",
        "10",
        ("02",),
    ),
    Claim(
        "C19",
        "Training in float16 instead of float32 is 1.02, 0.86, 1.11 and 2.02 times as fast at "
        "N = 128, 256, 512 and 1024, and saves 0, 0, 11 and 50 % of the memory.",
        "depends: measured",
        "Where launching is what takes the time, half precision has nothing to make faster, and "
        "the casts of autocast are kernels to launch: on an H200 a small model gains next to "
        "nothing at these lengths, and loses by autocast; a larger one loses at 512 as well, and "
        "gains at 2048. Of the small model's memory pure float16 saves two fifths to a half at "
        "every length, and loses its gradients; autocast, which keeps float32 weights and adds "
        "copies, saves less than a quarter at these lengths. Neither goes from nothing to "
        "a half.",
        "10",
    ),
    Claim(
        "C20",
        "Use float32 up to N = 256 and float16 above; in the template, float16 above N = 512 and "
        "only in training.",
        "refuted",
        "These are two rules, and they contradict each other from 257 to 512. Where half precision "
        "begins to pay depends on the card, the size and the way to it; on one card alone it lies "
        "below both, or far above. Measure it there, and keep it with its evidence.",
        "10",
    ),
    Claim(
        "C21",
        "Speed-ups multiply: flash 2.7 times and float16 2.0 times make 5.4 times.",
        "refuted",
        "One factor is of a forward pass and the other of a training step. Even of the same call "
        "they multiply only if half precision speeds up everything alike, with flash and without. "
        "On an H200 it gains more where S is not written than where it is, so the product promises "
        "too little.",
        "10",
        ("08",),
    ),
    Claim(
        "C22",
        "At N = 2048 the original takes 750 MB as measured, flash 250 MB and flash in float16 "
        "125 MB by estimate: a third and a sixth.",
        "refuted",
        "The first fits a training step at batch 2, by the model and on an H200. The other two are "
        "no fixed shares of it: without S and P what is left is linear in N, here a quarter of a "
        "step and a fifth of a forward pass.",
        "10",
        ("01", "05"),
    ),
    Claim(
        "C23",
        "In 12 GB, the longest sequence is 2048 in float32, 4096 with flash attention and 8192 "
        "with float16 as well.",
        "depends: measured",
        "It depends on batch, heads and what else is held, which the notes do not say. The memory "
        "model gives the length for any of them, and bisection under a limit confirms it, less "
        "what the allocator’s pieces waste. Flash attention does not double it: with S and P the "
        "length grows as the square root of the memory, without them in proportion.",
        "05",
        ("10",),
    ),
    Claim(
        "C24",
        "At N = 1024 SDPA may change its kernel; sdp_kernel, of torch.backends.cuda, forces flash.",
        "refuted",
        "SDPA chooses by card, dtype, mask and width of a head. On an H200 neither the choice nor "
        "the kernel changes with the length; FlashAttention’s own kernels, forced, do, but not at "
        "1024. The function is deprecated for sdpa_kernel, of torch.nn.attention, and forces no "
        "flash: it leaves cuDNN allowed, which is what ran in float16, and in float32, which "
        "FlashAttention does not take, nothing could run.",
        "10",
    ),
    Claim(
        "C25",
        "The flash layer takes the place of the layer with a sparse (local window) pattern.",
        "refuted",
        "It is dense attention, which is another function. A sparse pattern given as a dense "
        "mask takes longer than dense attention, and N² bytes for the mask; what saves time, and "
        "needs no mask, is to skip blocks, where the pattern has blocks to skip.",
        "11",
    ),
    Claim(
        "C26",
        "The selected attention of NSA and its window cost T · (S·BS·HQ·D + S·BS·HQ·V + W·HQ·D) "
        "FLOPs: 17.2 GFLOP at T = 2048.",
        "confirmed with a correction",
        "That counts multiply-adds, so it is 34.4 GFLOP, and the window lacks its second product; "
        "useful is less, since early queries cannot fill their slots.",
        "12",
        ("13", "15"),
    ),
    Claim(
        "C27",
        "Computing even positions and copying them to odd ones halves the FLOPs to 8.6 GFLOP: "
        "2 times faster in theory, 1.8 to 1.9 times in practice.",
        "depends: measured",
        "The operations, as multiply-adds, halve.  So does nearly the time of a loop over "
        "positions; kernels that share what neighbours read gain much less, or lose.",
        "15",
    ),
    Claim(
        "C28",
        "It halves the peak of intermediate memory, from 200 to 120 MB, and lowers the total from "
        "250 to 170 MB.",
        "refuted",
        "A loop frees the temporaries of a position as it makes the next ones, so without "
        "autograd the peak stays; with autograd, what is saved for the backward pass halves.",
        "15",
    ),
    Claim(
        "C29",
        "The compression stage keeps its speed and memory; copying block_indices costs "
        "T/2 · H · S.",
        "depends: measured",
        "Operations and peak stay, and the copy moves that many numbers.  Alone, the stage is "
        "somewhat slower; beside a loop over positions that does not show.",
        "15",
    ),
    Claim(
        "C30",
        "Half rate makes training 1.7 to 1.8 times and inference 1.8 to 1.9 times faster, and "
        "saves 30 % and 35 % of the memory.",
        "depends: measured",
        "The speeds hold for a loop over positions, and not for kernels.  Of the memory nothing is "
        "saved in inference; in training, half of what autograd keeps of that loop.",
        "15",
    ),
    Claim(
        "C31",
        "The half-rate form is functionally correct, and gradients flow to the even positions.",
        "refuted",
        "It is another function: an odd position neither uses its own query nor sees itself.  The "
        "gradient is right for that function, and queries at odd positions get none.",
        "15",
    ),
    Claim(
        "C32",
        "Choosing the S best of C blocks costs O(B·H·T·C·log S).",
        "confirmed with a correction",
        "Right for a heap; torch.topk on a GPU finds the threshold digit by digit, without a "
        "log S.  What limits it is the table of T × C importances, which a fused choice "
        "never stores.",
        "12",
        ("13",),
    ),
    Claim(
        "C33",
        "NSA stands for Neural Sparse Attention.",
        "refuted",
        "It is Native Sparse Attention: sparse from the first step of training on.",
        "12",
    ),
    Claim(
        "C34",
        "With return_attn_weights=True come the LSE and block_indices of compression and "
        "selection, a note for the window, and the three gates.",
        "confirmed with a correction",
        "The structure is kept; the window's part is real here, with an LSE and a size.",
        "14",
    ),
    Claim(
        "C35",
        "The full weights can be made from the LSE, q, k, and block_size; their rows sum to 1.",
        "confirmed with a correction",
        "Compression scores pooled keys, so k is pooled first and a block's probability is spread "
        "evenly over its tokens; rows that see no block sum to 0.",
        "14",
    ),
    Claim(
        "C36",
        "The weights of selected attention are sparse: 0 outside the chosen blocks.",
        "confirmed",
        "And their product with v is the branch's output, which the chapter checks.",
        "14",
    ),
    Claim(
        "C37",
        "The gates are a softmax over the heads.",
        "refuted",
        "The paper has a sigmoid for each branch.  A softmax over the heads makes heads "
        "compete and shrinks the output with their number.",
        "12",
    ),
    Claim(
        "C38",
        "Returning weights costs memory and time, by a benchmark that has no warm-up and waits for "
        "the GPU once, at the end.",
        "depends: measured",
        "The LSE and the indices exist anyway: to return them takes no time, and memory that is "
        "linear in the length.  The full weights cost what the kernels avoid.  That benchmark "
        "reports the first call, or the host.",
        "14",
    ),
)
#: id → claim, in order
CLAIMS: dict[str, Claim] = {item.id: item for item in _CLAIMS}

_CHAPTERS = {
    "01": ("What does attention write to memory?", "/notebooks/01_standard_attention"),
    "02": ("Which knob hurts?", "/notebooks/02_what_grows"),
    "03": ("Where do the bytes live?", "/notebooks/03_memory_hierarchy"),
    "04": ("Is it the arithmetic or the bytes?", "/notebooks/04_roofline"),
    "05": ("What does the backward pass keep?", "/notebooks/05_training_memory"),
    "06": ("How few bytes could it take?", "/notebooks/06_io_and_tiling"),
    "07": ("Can softmax be computed early?", "/notebooks/07_online_softmax"),
    "08": ("What does the kernel look like?", "/notebooks/08_flash_forward"),
    "09": ("To keep P or to compute it again?", "/notebooks/09_flash_backward"),
    "10": ("Who decides, and how exact is it?", "/notebooks/10_precision_and_dispatch"),
    "11": ("Why does a mask save nothing?", "/notebooks/11_masks_are_not_sparsity"),
    "12": ("How does NSA choose what to read?", "/notebooks/12_nsa_reference"),
    "13": ("When is sparse faster than dense?", "/notebooks/13_nsa_kernels"),
    "14": ("What did it look at?", "/notebooks/14_nsa_inside"),
    "15": ("Is “twice as fast, same function” true?", "/notebooks/15_half_rate"),
}


def claim(name: str) -> Claim:
    """The claim of that id, such as ``"C03"`` or ``"c3"``.

    Raises
    ------
    ArgumentError
        if there is none; the message lists those there are.
    """
    digits = str(name).strip().lstrip("Cc")
    if digits.isdecimal():
        name = f"C{int(digits):02d}"
    return CLAIMS[check_choice("claim", name, CLAIMS)]


# -- helpers -----------------------------------------------------------------------------------

_UNITS = {"KB": KIB, "MB": MIB, "GB": GIB}


def _bytes_of(text: str) -> Fraction:
    """``"1.5 GB"`` as the notes write it, in bytes: their units are binary."""
    number, unit = text.split()
    return Fraction(number) * _UNITS[unit]


def _size(label: str, claimed: str, computed: int) -> Row:
    """A size: equal to the byte, no rounding."""
    return Row(label, claimed, format_bytes(computed), _bytes_of(claimed) == computed)


def _number(
    label: str, claimed: str, computed: float, unit: str = "", *, expected: bool = True
) -> Row:
    """A number: equal when rounded to the digits of the claim."""
    decimals = len(claimed.partition(".")[2])
    agrees = round(float(computed), decimals) == float(claimed)
    shown = f"{float(computed):.{max(decimals, 2)}f}".rstrip("0").rstrip(".")
    return Row(label, f"{claimed} {unit}".strip(), f"{shown} {unit}".strip(), agrees, expected)


def _about(
    label: str, claimed: str, value: float, computed: float, shown: str, within: float = 0.1
) -> Row:
    """A figure given as "about": within ``within`` of it."""
    return Row(label, f"≈ {claimed}", shown, abs(computed - value) <= within * value)


def _shipped() -> Path:
    """The folder of the course's own records; a reader's own cannot change a verdict."""
    return records.search_path()[-1]


def _found(
    label: str,
    claimed: str,
    key: str,
    like: str,
    low: float,
    high: float,
    *,
    expected: bool = False,
) -> Row:
    """A recorded figure: it agrees from ``low`` to ``high``, in the base unit of the record.

    ``key`` is ``"experiment:key"``, ``like`` the form to write it in, such as ``"0.00 ×"``.
    """
    text = records.requote(like, key, root=_shipped())
    value = records.check_quote(text, key, root=_shipped()).value(key.partition(":")[2])
    return Row(label, claimed, text, low <= value <= high, expected, key)


def _factor(label: str, claimed: str, key: str, *, expected: bool = False) -> Row:
    """A recorded factor: it agrees within a tenth."""
    said = float(claimed)
    return _found(label, f"{claimed} ×", key, "0.00 ×", 0.9 * said, 1.1 * said, expected=expected)


def _per_element(form: Form, itemsize: int) -> Form:
    """The form for one head of one batch element, in N and d."""
    n, d = symbols("N d")
    one = {"B": 1, "H": 1, "Hkv": 1, "Nq": n, "Nk": n, "d": d, "dv": d, "e": itemsize}
    return form.substitute(**one)


def _plain(form: Form) -> str:
    """``8N²`` and the like, as the notes write it."""
    parts = []
    for powers, coefficient in sorted(form.terms.items(), key=lambda t: t[0]):
        names = "".join(name + {1: "", 2: "²"}[power] for name, power in powers)
        parts.append(f"{coefficient}{names}")
    return " + ".join(parts) or "0"


# -- one function per claim --------------------------------------------------------------------


def _c02() -> Iterable[Comparison]:
    """The closed form of each tensor, and of the two sums."""
    n, d = symbols("N d")
    forms = attention_forms()
    rows = []
    for kind, size in (("float32", 4), ("float16", 2)):
        for name in ("Q", "K", "V", "S", "P", "O"):
            said = size * (n**2 if name in "SP" else n * d)
            found = _per_element(forms[name], size)
            rows.append(Row(f"{name}, {kind}", _plain(said), _plain(found), said == found))
        for names, said in (("QKVO", 4 * size * n * d), ("SP", 2 * size * n**2)):
            found = _per_element(sum((forms[x] for x in names), Form(0)), size)
            label = f"{', '.join(names)} together, {kind}"
            rows.append(Row(label, _plain(said), _plain(found), said == found))
    yield Comparison("C02", "bytes of each tensor, one head of one batch element", tuple(rows))


#: N → (Q, K, V and O; S and P; share of S and P in percent)
C03_TABLE = {
    512: ("256 KB", "1 MB", "80"),
    1024: ("512 KB", "4 MB", "89"),
    2048: ("1 MB", "16 MB", "94"),
    4096: ("2 MB", "64 MB", "97"),
    8192: ("4 MB", "256 MB", "98"),
    16384: ("8 MB", "1 GB", "99"),
}


def _c03() -> Iterable[Comparison]:
    """Every cell of the table at d = 64 in float16."""
    rows = []
    for n, (inputs, scores, share) in C03_TABLE.items():
        table = attention_memory(seq_len=n, head_dim=64, dtype="float16")
        rows.append(_size(f"N = {n}: Q, K, V, O", inputs, table.bytes_of("Q", "K", "V", "O")))
        rows.append(_size(f"N = {n}: S, P", scores, table.bytes_of("S", "P")))
        rows.append(_number(f"N = {n}: share of S, P", share, 100 * table.scores_share, "%"))
    yield Comparison("C03", "bytes at d = 64 in float16", tuple(rows))


def _c04() -> Iterable[Comparison]:
    """Limits of the intensities, and how far N = 8d is from them."""
    parts = {step.key: step for step in steps("naive")}
    rows = []
    for d in (64, 128):
        for key, name in (("scores", "QKᵀ"), ("output", "PV")):
            limit = parts[key].limit(head_dim=d, dtype="float16")
            rows.append(_number(f"{name}, d = {d}, N → ∞", str(d), limit, "FLOP/byte"))
    limit = parts["softmax"].limit(head_dim=64, dtype="float16")
    rows.append(_number("softmax", "1.25", limit, "FLOP/byte"))
    yield Comparison("C04", "operations per byte in float16, in the limit", tuple(rows))

    rows = []
    for factor in (2, 8, 32, 128):
        at = parts["scores"].intensity(seq_len=factor * 64, head_dim=64, dtype="float16")
        text = f"{significant(at)} FLOP/byte, {significant(100 * at / 64)} % of the limit"
        rows.append(Row(f"N = {factor}d", "≈ d", text, abs(at / 64 - 1) <= 0.1, factor >= 32))
    note = "At d = 64; agreement here means within a tenth of the limit."
    yield Comparison("C04", "how fast QKᵀ approaches d", tuple(rows), note)


#: card → (peak in TFLOP/s, bandwidth in TB/s, balance) as the notes round them
C05_TABLE = {"a100-sxm-80": ("312", "2.0", "156"), "h100-sxm": ("990", "3.35", "296")}


def _c05() -> Iterable[Comparison]:
    """The quotients of the rounded figures, then the data sheets' own."""
    rounded, exact = [], []
    for key, (peak, bandwidth, balance) in C05_TABLE.items():
        row = card(key)
        ratio = float(Fraction(peak) / Fraction(bandwidth))
        rounded.append(_number(f"{peak}/{bandwidth}", balance, ratio, "FLOP/byte"))
        ridge = row.ridge("float16")
        agrees = abs(ridge / float(balance) - 1) <= 0.025
        exact.append(
            Row(
                f"{row.name}: {format_rate(row.peak['float16'], 'FLOP/s', 4)} over "
                f"{format_rate(row.memory_bandwidth, 'B/s', 4)}",
                f"{balance} FLOP/byte",
                f"{significant(ridge, 4)} FLOP/byte",
                agrees,
            )
        )
    yield Comparison("C05", "balance, from the figures as rounded", tuple(rounded))
    note = "Agreement here means within 2.5 %, which is what the rounding costs."
    yield Comparison("C05", "balance, from the data sheets", tuple(exact), note)


def _c06() -> Iterable[Comparison]:
    """What the data sheet of an A100 says; latencies are measured in chapter 03."""
    a100, large = card("a100-sxm-40"), card("a100-sxm-80")
    ratio = large.smem_bandwidth / large.memory_bandwidth
    rows = (
        _size("registers per SM", "256 KB", a100.registers_per_sm),
        _size("shared memory per SM", "164 KB", a100.smem_per_sm),
        _about("L1 and shared memory, all SMs", "20 MB", 20 * MIB, a100.l1_bytes,
               format_bytes(a100.l1_bytes)),
        _about("their bandwidth", "19 TB/s", 19e12, a100.smem_bandwidth,
               format_rate(a100.smem_bandwidth, "B/s")),
        _size("HBM, small card", "40 GB", a100.memory_bytes),
        _size("HBM, large card", "80 GB", large.memory_bytes),
        _about("HBM bandwidth, large card", "2 TB/s", 2e12, large.memory_bandwidth,
               format_rate(large.memory_bandwidth, "B/s", 4)),
        _about("ratio of the bandwidths", "10 ×", 10, ratio, f"{significant(ratio)} ×"),
    )  # fmt: skip
    note = "Agreement of a figure given as ≈ means within a tenth."
    yield Comparison("C06", "an A100 by data sheet", rows, note)


def _c07() -> Iterable[Comparison]:
    """How often N² elements pass, by step, as compulsory traffic."""
    one = symbols("N")[0] ** 2
    rows = []
    passes = {
        "write S": ("scores", "writes", "S"),
        "read S": ("softmax", "reads", "S"),
        "write P": ("softmax", "writes", "P"),
        "read P": ("output", "reads", "P"),
    }
    parts = {step.key: step for step in steps("naive", scale_kernel=False)}
    for label, (key, side, name) in passes.items():
        moved = getattr(parts[key], side).get(name, Form(0))
        found = _per_element(moved, 2)
        said = 2 * one
        rows.append(Row(label, _plain(said), _plain(found), said == found))
    total = sum((s.bytes for s in parts.values()), Form(0))
    square = Form({p: c for p, c in _per_element(total, 2).terms.items() if dict(p).get("N") == 2})
    rows.append(Row("all passes over N²", "8N²", _plain(square), square == 8 * one))
    note = "Bytes in float16, one head; the scale folded into the product."
    yield Comparison("C07", "traffic that the steps cannot avoid", tuple(rows), note)


#: (batch, heads, N) → S and P in float16
C08_TABLE = {
    (1, 12, 2048): "192 MB",
    (1, 12, 4096): "768 MB",
    (1, 12, 8192): "3 GB",
    (8, 12, 2048): "1.5 GB",
    (8, 12, 4096): "6 GB",
}


def _c08() -> Iterable[Comparison]:
    """Every row of the multi-head table."""
    rows = []
    for (batch, heads, n), said in C08_TABLE.items():
        table = attention_memory(seq_len=n, heads=heads, batch=batch, dtype="float16")
        label = f"batch {batch}, {heads} heads, N = {n}"
        rows.append(_size(label, said, table.bytes_of("S", "P")))
    yield Comparison("C08", "S and P in float16", tuple(rows))


def _c09() -> Iterable[Comparison]:
    """Both formulas on one row of three scores, in exact fractions."""
    p = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 6))
    dp = (Fraction(1), Fraction(2), Fraction(3))
    mean = sum(a * b for a, b in zip(p, dp, strict=True))
    said = [b * a * (1 - a) for a, b in zip(p, dp, strict=True)]
    # The Jacobian in full: ∂P_j/∂S_i = P_j (δ_ij − P_i).
    found = [sum(dp[j] * p[j] * ((i == j) - p[i]) for j in range(3)) for i in range(3)]
    assert found == [a * (b - mean) for a, b in zip(p, dp, strict=True)]
    rows = [
        Row(f"dS[{i}]", str(a), str(b), a == b, expected=False)
        for i, (a, b) in enumerate(zip(said, found, strict=True))
    ]
    rows.append(Row("sum of dS", str(sum(said)), str(sum(found)), sum(said) == 0, expected=False))
    note = "P = (1/2, 1/3, 1/6), dP = (1, 2, 3). A row of dS sums to 0: P does not change when "
    note += "the same number is added to every score."
    yield Comparison("C09", "dS by the claimed formula and by the full Jacobian", tuple(rows), note)


def _c10() -> Iterable[Comparison]:
    """Peaks by the schedules, with and without the backward pass, in units of S."""
    sizes = {"seq_len": 4096, "heads": 8, "head_dim": 64, "dtype": "float32"}
    one = scores_buffer_bytes(4096, heads=8, dtype="float32")
    rows = []
    for variant in ("out_of_place", "in_place"):
        inference = attention_peak(**sizes, variant=variant, training=False)
        training = attention_peak(**sizes, variant=variant, training=True)
        ratio = training / inference
        text = f"{significant(ratio)} × ({significant(inference / one)} S to "
        text += f"{significant(training / one)} S)"
        rows.append(Row(variant, "2 ×", text, round(ratio, 1) == 2, expected=False))
    note = "Peak above the inputs at N = 4096, 8 heads, d = 64, float32, by the schedule of the "
    note += "allocations; chapter 05 measures it."
    yield Comparison("C10", "peak of training over peak of inference", tuple(rows), note)


def _c11() -> Iterable[Comparison]:
    """At M = Nd everything fits on chip, and reading Q, K, V and writing O is left."""
    n, d = 4096, 64
    m = n * d
    least = 4 * n * d
    rows = []
    for label, count, expected in (
        ("N²d/M, as claimed", n * n * d // m, False),
        ("N²d²/M", n * n * d * d // m, True),
    ):
        # Θ hides a constant: within a factor of ten of what cannot be avoided.
        agrees = Fraction(1, 10) <= Fraction(count, least) <= 10
        rows.append(
            Row(label, f"{count:,}".replace(",", " "), f"{least:,}".replace(",", " "), agrees,
                expected)
        )  # fmt: skip
    note = f"N = {n}, d = {d}, M = Nd elements of SRAM; computed: elements of Q, K, V and O. "
    note += "Agreement means within a factor of ten, which Θ may hide."
    yield Comparison("C11", "elements moved when all of Q fits on chip", tuple(rows), note)


#: N → one float32 scores buffer, one head of one batch element
C12_TABLE = {256: "0.25 MB", 512: "1 MB", 1024: "4 MB", 2048: "16 MB"}
#: (batch, heads) → one float32 scores buffer at N = 512
C12_LINEAR = {(1, 1): "1 MB", (2, 1): "2 MB", (1, 2): "2 MB", (4, 1): "4 MB"}


def _c12() -> Iterable[Comparison]:
    """Both tables of the scores buffer."""
    rows = [
        _size(f"N = {n}", said, scores_buffer_bytes(n, dtype="float32"))
        for n, said in C12_TABLE.items()
    ]
    yield Comparison("C12", "one scores buffer in float32", tuple(rows))
    rows = [
        _size(
            f"batch {batch}, {heads} {'head' if heads == 1 else 'heads'}",
            said,
            scores_buffer_bytes(512, batch=batch, heads=heads, dtype="float32"),
        )
        for (batch, heads), said in C12_LINEAR.items()
    ]
    yield Comparison("C12", "the same at N = 512, by batch and heads", tuple(rows))


def _c13() -> Iterable[Comparison]:
    """The powers in the closed form, and the notes' two values of head_dim."""
    form = attention_forms()["S"]
    square = form.substitute(Nq=symbols("N")[0], Nk=symbols("N")[0])
    rows = []
    for knob, symbol, power in (
        ("batch", "B", 1),
        ("heads", "H", 1),
        ("seq_len", "N", 2),
        ("head_dim", "d", 0),
    ):
        found = square.degree(symbol)
        rows.append(Row(f"power of {knob}", str(power), str(found), power == found))
    for d in (32, 128):
        table = attention_memory(seq_len=512, head_dim=d, dtype="float32")
        rows.append(_size(f"S at head_dim {d}", "1 MB", table.bytes_of("S")))
    yield Comparison("C13", "what the scores buffer grows with", tuple(rows))


def _c14() -> Iterable[Comparison]:
    """The growth of the work; the growth of the time is measured in chapter 02."""
    parts = steps("naive")

    def work(n: int) -> tuple[Fraction, Fraction]:
        costs = [s.at(seq_len=n, head_dim=64, dtype="float32") for s in parts]
        return Fraction(sum(c.flops for c in costs)), Fraction(sum(c.bytes for c in costs))

    flops, moved = work(256)
    rows = []
    for n, factor in ((512, 4), (1024, 16), (2048, 64)):
        here, bytes_here = work(n)
        rows.append(_number(f"operations, N = {n}", str(factor), float(here / flops), "×"))
        ratio = float(bytes_here / moved)
        text = f"{significant(ratio)} ×"
        agrees = abs(ratio / factor - 1) <= 0.05
        rows.append(Row(f"bytes, N = {n}", f"{factor} ×", text, agrees, expected=False))
    note = "Against N = 256, at d = 64 in float32. Q, K, V and O grow only linearly, so the bytes "
    note += "grow by less; agreement of bytes means within 5 %."
    yield Comparison("C14", "growth of the work", tuple(rows), note)


def _c15() -> Iterable[Comparison]:
    """The tile and the matrix that it is cut from."""
    rows = (
        _size("a tile of 64 × 64, float32", "16 KB", scores_buffer_bytes(64, dtype="float32")),
        _size("S at N = 512, float32", "1 MB", scores_buffer_bytes(512, dtype="float32")),
    )
    yield Comparison("C15", "a tile against the matrix", rows)


def _c16() -> Iterable[Comparison]:
    """The ratio of the bandwidths, by data sheet."""
    a100 = card("a100-sxm-40")
    ratio = a100.smem_bandwidth / a100.memory_bandwidth
    rows = (
        _about("shared memory", "19 TB/s", 19e12, a100.smem_bandwidth,
               format_rate(a100.smem_bandwidth, "B/s")),
        _about("HBM", "1.5 TB/s", 1.5e12, a100.memory_bandwidth,
               format_rate(a100.memory_bandwidth, "B/s", 4)),
        _about("ratio of the bandwidths", "12 ×", 12, ratio, f"{significant(ratio)} ×"),
    )  # fmt: skip
    note = "An A100 40 GB. The ratio holds; that it is a speed-up does not (chapter 03)."
    yield Comparison("C16", "bandwidths by data sheet", rows, note)


#: name → (claimed length, dtype, method)
C23_TABLE = {
    "original, float32": (2048, "float32", "naive"),
    "flash, float32": (4096, "float32", "fused"),
    "flash, float16": (8192, "float16", "fused"),
}


#: N → original and flash in ms, their quotient as stated
C18_TABLE = {
    128: ("7.73", "2.60", "2.97"),
    256: ("11.63", "2.62", "4.44"),
    512: ("11.60", "2.59", "4.47"),
    1024: ("16.23", "6.01", "2.70"),
    2048: ("43.73", "15.04", "2.91"),
}


def _c18() -> Iterable[Comparison]:
    """The quotients of its own figures; and its times against the work, from 128 to 512."""
    rows = []
    for n, (original, flash, said) in C18_TABLE.items():
        # the times are rounded to 10 µs: a quotient agrees that some times within that have
        low = (Fraction(original) - Fraction(1, 200)) / (Fraction(flash) + Fraction(1, 200))
        high = (Fraction(original) + Fraction(1, 200)) / (Fraction(flash) - Fraction(1, 200))
        text = f"{float(low):.2f} to {float(high):.2f} ×"
        agrees = low - Fraction(1, 200) <= Fraction(said) <= high + Fraction(1, 200)
        rows.append(Row(f"N = {n}", f"{said} ×", text, agrees))
    note = "Computed: what times that round to those stated can give."
    yield Comparison("C18", "original over flash, from the times as stated", tuple(rows), note)
    rows = []
    for name, place in (("original", 0), ("flash", 1)):
        grown = float(C18_TABLE[512][place]) / float(C18_TABLE[128][place])
        text = f"{significant(grown)} ×"
        rows.append(Row(f"time, {name}", "16 ×", text, round(grown) == 16, expected=False))
    note = "Claimed: what a time would grow by that follows the scores, from N = 128 to 512. "
    note += "A time that stays is not that of the arithmetic, on whatever cores."
    yield Comparison("C18", "growth of the time against growth of the scores", tuple(rows), note)


#: N → a training step in float32 and float16 in ms, their quotient and the share of memory saved
C19_TABLE = {
    128: ("11.35", "11.18", "1.02", 0.0),
    256: ("9.88", "11.54", "0.86", 0.0),
    512: ("16.45", "14.86", "1.11", 0.11),
    1024: ("41.66", "20.66", "2.02", 0.5),
}


def _c19() -> Iterable[Comparison]:
    """The quotients, and the share of memory that autocast and pure float16 save by the model."""
    rows = [
        _number(f"N = {n}", said, float(full) / float(half), "×")
        for n, (full, half, said, _) in C19_TABLE.items()
    ]
    yield Comparison("C19", "float32 over float16, from the times as stated", tuple(rows))
    rows = []
    sizes = {"dim": 256, "num_heads": 4, "num_layers": 2, "batch": 4}
    how = {"backend": "sdpa", "training": True, "causal": False}
    for precision, text in (("autocast_fp16", "autocast"), ("fp16", "pure float16")):
        for n, (*_, said) in C19_TABLE.items():
            full, half = (
                layer_budget(**sizes, seq_len=n, precision=p, **how).total
                for p in ("fp32", precision)
            )
            saved = 1 - half / full
            label, agrees = f"{text}, N = {n}", abs(saved - said) <= 0.05
            claimed = f"{100 * said:.0f} %"
            rows.append(Row(label, claimed, f"{100 * saved:.0f} %", agrees, expected=False))
    note = "Predicted for 2 layers of dim 256 with 4 heads, batch 4, AdamW, fused attention; the "
    note += "notes do not say how float16 was switched on. Agreement means within five points."
    yield Comparison("C19", "share of a training step’s memory that is saved", tuple(rows), note)


def _c20() -> Iterable[Comparison]:
    """What each of the two rules says of a length."""
    rows = []
    for n in (128, 256, 384, 512, 1024):
        rule, template = ("float16" if n > limit else "float32" for limit in (256, 512))
        rows.append(Row(f"N = {n}", rule, template, rule == template, n not in (384, 512)))
    note = "Claimed: by the rule. Computed: by the class template, in training."
    yield Comparison("C20", "two rules of one document", tuple(rows), note)


def _c21() -> Iterable[Comparison]:
    """The product, and what the same two factors make together by Amdahl's law."""
    a, b = Fraction("2.7"), Fraction("2.0")
    rows = [_number("2.7 × 2.0", "5.4", float(a * b), "×")]
    rows.append(_number("float16 speeds everything up alike", "5.4", float(a * b), "×"))
    for share in (Fraction(9, 10), Fraction(2, 3)):
        rest = 1 - share
        flash = 1 / a - rest  # what is left of attention, so that the whole is a times faster
        factor = share / (1 / b - rest)  # of attention, so that the whole is b times faster
        direct = float(1 / (flash / factor + rest))
        name = {Fraction(9, 10): "nine tenths", Fraction(2, 3): "two thirds"}[share]
        label = f"it speeds up attention alone, {name} of the time"
        rows.append(_number(label, "5.4", direct, "×", expected=False))
    note = "Flash speeds up attention alone; both factors are as stated."
    yield Comparison("C21", "both together, by Amdahl’s law", tuple(rows), note)


def _c22() -> Iterable[Comparison]:
    """Bytes at the peak by the model, for the batches that the notes do not state."""
    sizes = {"dim": 256, "num_heads": 4, "num_layers": 2, "seq_len": 2048, "causal": False}
    configs = (("original", "naive", "fp32", 750), ("flash", "sdpa", "fp32", 250),
               ("flash, float16", "sdpa", "fp16", 125))  # fmt: skip
    for training, text in ((False, "a forward pass"), (True, "a training step")):
        rows = []
        for batch in (1, 2, 4):
            for name, backend, precision, said in configs:
                found = layer_budget(**sizes, batch=batch, backend=backend, precision=precision,
                                     training=training).total  # fmt: skip
                agrees = abs(found / (said * MIB) - 1) <= 0.1
                row = Row(f"{name}, batch {batch}", f"≈ {said} MB", format_bytes(found), agrees,
                          expected=(training, batch, name) == (True, 2, "original"))  # fmt: skip
                rows.append(row)
        note = "Predicted for 2 layers of dim 256 with 4 heads, with AdamW in training; the notes "
        note += "name no batch. Agreement means within a tenth."
        yield Comparison("C22", f"bytes at the peak of {text}, N = 2048", tuple(rows), note)


def _c23() -> Iterable[Comparison]:
    """The longest sequence that one attention layer can train on in 12 GiB."""
    rows = []
    for label, (said, dtype, method) in C23_TABLE.items():
        found = longest_seq_len(
            12 * GIB,
            heads=8,
            head_dim=64,
            dtype=dtype,
            method=method,
            training=True,
            counting="peak",
        )
        text = f"{found:,}".replace(",", " ")
        agrees = abs(found / said - 1) <= 0.1
        rows.append(Row(label, f"≈ {said}", text, agrees, expected=False))
    note = "Predicted for one attention layer alone: batch 1, 8 heads, d = 64, training, by the "
    note += "schedule of the allocations. The notes name neither batch nor heads nor layers."
    yield Comparison("C23", "longest sequence in 12 GiB", tuple(rows), note)


C26_CLAIMED = 17.2e9
_C26_SIZES = {"seq_len": 2048, "count": 16, "block_size": 64, "heads": 32, "head_dim": 128}


def _c25() -> Iterable[Comparison]:
    """Scores of a causal window of 128 at N = 2048, and how many are computed for them."""
    n, w = 2048, 128
    seen = sum(min(i + 1, w) for i in range(n))
    blocks = sum(min(i + 1, 2) for i in range(n // w)) * w * w
    rows = [
        Row(label, f"{seen:,}", f"{count:,}", seen == count, expected=False)
        for label, count in (
            ("dense attention in its place", n * (n + 1) // 2),
            ("the window as a dense mask", n * n),
            (f"the window in blocks of {w}", blocks),
        )
    ]
    note = f"Claimed: the scores that a causal window of {w} keys has at N = {n}. Computed: those "
    note += "that are used, or computed and thrown away. Only the first is another function."
    yield Comparison("C25", "scores of a window, and of what takes its place", tuple(rows), note)


def _c26() -> Iterable[Comparison]:
    """Operations of the plain selected attention, with and without the two mistakes."""
    shape = Shape(kv_heads=8, window=0, **_C26_SIZES)
    windowed = Shape(kv_heads=8, window=512, **_C26_SIZES)
    adds, full = claimed_flops(**_C26_SIZES), naive_flops(shape)
    extra = claimed_flops(window=512, **_C26_SIZES) - adds
    rows = [
        _giga("multiply-adds", C26_CLAIMED, adds, expected=True),
        _giga("FLOPs", C26_CLAIMED, full, expected=False),
        _giga("a window of 512: FLOPs more", extra, naive_flops(windowed) - full, expected=False),
    ]
    note = "All slots full, as the plain code computes them. Of these a causal mask leaves "
    note += f"{significant(flops(shape)['selection'] / full * 100)} %."
    yield Comparison("C26", "operations at T = 2048", tuple(rows), note)


def _giga(label: str, claimed: float, computed: float, *, expected: bool) -> Row:
    agrees = abs(computed / claimed - 1) < 0.01
    said, found = (f"{x / 1e9:.1f} G" for x in (claimed, computed))
    return Row(label, said, found, agrees, expected)


def _c27() -> Iterable[Comparison]:
    """Operations of the half-rate form: ⌈T/2⌉ positions are computed."""
    sizes = {**_C26_SIZES, "seq_len": _C26_SIZES["seq_len"] // 2}
    rows = [
        _giga("multiply-adds", 8.6e9, claimed_flops(**sizes), expected=True),
        _giga("FLOPs", 8.6e9, 2 * claimed_flops(**sizes), expected=False),
    ]
    yield Comparison("C27", "operations at half rate", tuple(rows))


_COMPUTE: dict[str, Callable[[], Iterable[Comparison]]] = {
    "C02": _c02,
    "C03": _c03,
    "C04": _c04,
    "C05": _c05,
    "C06": _c06,
    "C07": _c07,
    "C08": _c08,
    "C09": _c09,
    "C10": _c10,
    "C11": _c11,
    "C12": _c12,
    "C13": _c13,
    "C14": _c14,
    "C15": _c15,
    "C16": _c16,
    "C18": _c18,
    "C19": _c19,
    "C20": _c20,
    "C21": _c21,
    "C22": _c22,
    "C23": _c23,
    "C25": _c25,
    "C26": _c26,
    "C27": _c27,
}


# -- what was recorded: one function per claim -------------------------------------------------


def _r17() -> Iterable[Comparison]:
    """Naive attention over ours, in the dtype of the notes and in ours."""
    rows = []
    for baseline, counted, key in (
        ("naive, float32", "the GPU alone", "naive_float32_n{}"),
        ("naive, float32", "with the launches", "naive_float32_n{}_host"),
        ("naive, bfloat16", "the GPU alone", "naive_bfloat16_n{}"),
    ):
        for n, said in ((128, "2"), (512, "5"), (2048, "15"), (4096, "40")):
            found = f"flash_forward:c17_{key.format(n)}"
            same = (baseline, n) == ("naive, bfloat16", 128)
            rows.append(_factor(f"{baseline}, N = {n}, {counted}", said, found, expected=same))
    note = "Ours in bfloat16; 8 heads of 64, no mask. Agreement means within a tenth."
    yield Comparison("C17", "naive attention over ours, on an H200", tuple(rows), note)


def _r18() -> Iterable[Comparison]:
    """The report's factors on another card, and who waits for whom up to 512 tokens."""
    rows = [
        _factor(f"N = {n}", said, f"layer_forward:speedup.report.sdpa.n{n}")
        for n, (_, _, said) in C18_TABLE.items()
    ]
    note = "Two layers of dim 256 with 4 heads, batch 4, float32, one call on an idle GPU, "
    note += "launches included. Agreement means within a tenth."
    yield Comparison("C18", "original over flash, on an H200", tuple(rows), note)
    rows = []
    for n in (128, 256, 512):
        key = f"layer_forward:busy.report.sdpa.n{n}"
        rows.append(_found(f"share of the time that a kernel runs, N = {n}", "≈ 100 %", key, "0 %",
                           0.9, 1.0))  # fmt: skip
    for n in (128, 256, 512):
        key = f"layer_forward:graph_gain.report.sdpa.n{n}"
        rows.append(_factor(f"time over that of a CUDA graph, N = {n}", "1.00", key))
    key = "layer_forward:pays.report.sdpa_tf32_over_sdpa"
    rows.append(_found("tensor cores (TF32) make it faster from", "≤ 256 tokens", key,
                       "0,000 tokens", 0, 256))  # fmt: skip
    note = "Claimed: what would be so if arithmetic took the time. The same layers with flash; a "
    note += "graph launches the same kernels at once. Faster: by 5 % or more, from there on."
    yield Comparison("C18", "does the arithmetic take the time, on an H200?", tuple(rows), note)


def _r19() -> Iterable[Comparison]:
    """A training step in half precision, in two ways: time and bytes."""
    near = {("fp16", 128), ("fp16", 512)}
    rows = [
        _factor(f"{text}, N = {n}", said, f"training_step:speedup.report.sdpa.{how}.n{n}",
                expected=(how, n) in near)
        for how, text in (("autocast_fp16", "autocast"), ("fp16", "pure float16"))
        for n, (_, _, said, _) in C19_TABLE.items()
    ]  # fmt: skip
    for n, said in ((512, "1.11"), (2048, "2.02")):
        key = f"training_step:speedup.realistic.sdpa.autocast_fp16.n{n}"
        rows.append(_factor(f"autocast, dim 1024, N = {n}", said, key, expected=n == 2048))
    note = "Two layers of dim 256 with 4 heads, batch 4, SDPA; the last two rows have dim 1024 and "
    note += "one sequence, and the last the factor claimed at 1024. Agreement means within a tenth."
    yield Comparison("C19", "float32 over float16, a step on an H200", tuple(rows), note)
    near = {("naive", "autocast_fp16", 512), ("naive", "fp16", 1024)}
    rows = []
    for attention, name in (("naive", "naive"), ("sdpa", "SDPA")):
        for how, text in (("autocast_fp16", "autocast"), ("fp16", "pure float16")):
            for n, (*_, said) in C19_TABLE.items():
                key = f"training_step:saved.report.{attention}.{how}.n{n}"
                rows.append(_found(f"{name}, {text}, N = {n}", f"{100 * said:.0f} %", key, "0 %",
                                   said - 0.05, said + 0.05,
                                   expected=(attention, how, n) in near))  # fmt: skip
    note = "Share of the peak in float32, by torch's allocator. Agreement means within five points."
    yield Comparison("C19", "share of a step’s memory that is saved, on an H200", tuple(rows), note)


def _r20() -> Iterable[Comparison]:
    """From which length on half precision pays, in six settings."""
    forward, step = "layer_forward:pays.{}.sdpa_{}_over_sdpa", "training_step:pays.{}.sdpa.{}"
    rows = [
        _found(label, "256 or 512 tokens", key, "0,000 tokens", 256, 512)
        for label, key in (
            ("forward, dim 256, pure float16", forward.format("report", "half")),
            ("forward, dim 256, autocast", forward.format("report", "autocast")),
            ("forward, dim 1024, pure float16", forward.format("realistic", "half")),
            ("forward, dim 1024, autocast", forward.format("realistic", "autocast")),
            ("training step, dim 256, pure float16", step.format("report", "fp16")),
            ("training step, dim 256, autocast", step.format("report", "autocast_fp16")),
        )
    ]
    note = (
        "The shortest length measured, of powers of two from 128 on, from which on it is at least "
    )
    note += "5 % faster than float32. Two layers, SDPA, launches included; batch 4, and 1 with "
    note += "dim 1024."
    yield Comparison("C20", "where float16 begins to pay, on an H200", tuple(rows), note)


def _r21() -> Iterable[Comparison]:
    """Both changes at once, and the product of each alone over that."""
    rows = [
        _factor(f"forward, N = {n}", "5.4", f"products:direct.report.sdpa.n{n}")
        for n in (512, 1024, 2048, 4096)
    ]
    rows.append(_factor("forward and backward, N = 1024", "5.4", "products:training.direct.n1024"))
    note = "Original in float32 over flash in half precision, launches included; with a backward "
    note += "pass half is autocast. Two layers of dim 256 with 4 heads, batch 4."
    yield Comparison("C21", "both at once, on an H200", tuple(rows), note)
    rows = [
        _factor(f"N = {n}", "1.00", f"products:product_over_direct_gpu.report.sdpa.n{n}")
        for n in (512, 1024, 2048, 4096)
    ]
    note = "The same layers forward, the GPU alone: flash’s factor in float32 times float16’s for "
    note += "the original, over both at once. Below 1 the product promises too little."
    yield Comparison("C21", "product over what is measured, on an H200", tuple(rows), note)


def _r22() -> Iterable[Comparison]:
    """Bytes at the peak at batch 2, where the stated figure has its fit."""
    rows = []
    for text, prefix in (("forward pass", "claim"), ("training step", "claim_training")):
        for name, key, said in (("original", "original", 750), ("flash", "flash", 250),
                                ("flash, float16", "flash_half", 125)):  # fmt: skip
            fits = (text, name) == ("training step", "original")
            rows.append(_found(f"{text}, {name}", f"≈ {said} MB",
                               f"training_step:{prefix}.{key}.b2", "0 MiB", 0.9 * said * MIB,
                               1.1 * said * MIB, expected=fits))  # fmt: skip
    note = "Batch 2, two layers of dim 256 with 4 heads, by torch’s allocator. Agreement means "
    note += "within a tenth."
    yield Comparison("C22", "bytes at the peak at N = 2048, on an H200", tuple(rows), note)


def _r23() -> Iterable[Comparison]:
    """The longest sequence of the report's layers in 12 GiB, found by bisection."""
    rows = []
    for mode, text in (("inference", "forward"), ("training", "training step")):
        for (name, (said, *_)), how in zip(
            C23_TABLE.items(), ("naive.fp32", "sdpa.fp32", "sdpa.fp16"), strict=True
        ):
            key = f"longest_sequence:found.report.{how}.{mode}.12"
            rows.append(_found(f"{text}, {name}", f"≈ {said} tokens", key, "0,000 tokens",
                               0.9 * said, 1.1 * said))  # fmt: skip
    note = "Two layers of dim 256 with 4 heads, batch 4; torch’s allocator was held to 12 GiB. "
    note += "Agreement means within a tenth."
    yield Comparison("C23", "longest sequence in 12 GiB, on an H200", tuple(rows), note)


def _r24() -> Iterable[Comparison]:
    """What SDPA picks and runs around 1024 tokens, and what the report's recipe runs."""
    rows = []
    for dtype in ("float16", "float32"):
        for text, key in (
            ("backends that SDPA picks", "backends"),
            ("kernels that run", "kernels_sdpa"),
        ):
            rows.append(_found(f"{text}, {dtype}", "≥ 2", f"backend_map:switch_{key}_{dtype}", "0",
                               2, 99))  # fmt: skip
    key = "backend_map:switch_kernels_flash_float16"
    rows.append(_found("FlashAttention forced: kernels that run, float16", "≥ 2", key, "0", 2, 99,
                       expected=True))  # fmt: skip
    for place, text in ((1, "others from"), (2, "the first ones again from")):
        key = f"backend_map:switch_change{place}_flash_float16"
        rows.append(_found(f"FlashAttention forced: {text}", "1024 tokens", key, "0,000 tokens",
                           1024, 1024))  # fmt: skip
    for dtype in ("float16", "float32"):
        rows.append(_found(f"calls under sdp_kernel that run FlashAttention, {dtype}", "1 of 1",
                           f"backend_map:recipe_runs_flash_{dtype}", "0", 1, 1))  # fmt: skip
    note = (
        "Batch 4, 4 heads of 64, no mask, 64 to 4096 tokens; kernels were watched at nine of the "
    )
    note += "lengths. Under sdp_kernel float16 ran cuDNN, and float32 found no kernel at all."
    yield Comparison("C24", "what SDPA picks and runs, on an H200", tuple(rows), note)


def _r25() -> Iterable[Comparison]:
    """The distance of the two functions, and the speed of a window in four ways."""
    rows = [
        _found(f"N = {n}", "0", f"masks:difference_dense_n{n}", "0.00", 0.0, 0.01)
        for n in (2048, 8192, 32768)
    ]
    note = "A causal window of 256, 16 heads of 64, bfloat16: ‖dense − local‖ / ‖local‖ of O, over "
    note += "64 rows of one head, the first row among them, where the two cannot differ."
    yield Comparison(
        "C25", "distance of dense attention from a window, on an H200", tuple(rows), note
    )
    rows = [
        _factor(label, "20", f"masks:speedup_{key}_forward")
        for label, key in (
            ("a window as a mask, naive", "local_naive"),
            ("a window as a mask, SDPA", "local_sdpa"),
            ("a window in blocks, FlexAttention", "local_flex"),
            ("a window, by two bounds", "local_window"),
            ("single scores at random in blocks, FlexAttention", "random_flex"),
        )
    ]
    note = "Claimed: what a twentieth of the scores promises. 16 heads of 64, N = 16 384, "
    note += "bfloat16, causal, forward; below 1 it is slower than dense FlashAttention of ours."
    yield Comparison(
        "C25", "dense attention’s time over the pattern’s, on an H200", tuple(rows), note
    )


def _r27() -> Iterable[Comparison]:
    """Full rate over half rate, for a loop and for kernels."""
    kernels = "half_rate:kernels.{}.n{}.{}.half.speedup"
    rows = [
        _found(label, "1.8 to 1.9 ×", key, "0.00 ×", 1.75, 1.95, expected="loop" in key)
        for label, key in (
            ("a loop over positions", "half_rate:speedup.loop.forward"),
            ("kernels, blocks at random, T = 8192", kernels.format("random", 8192, "forward")),
            ("kernels, blocks at random, T = 32 768", kernels.format("random", 32768, "forward")),
            ("kernels, neighbours alike, T = 8192", kernels.format("local", 8192, "forward")),
            ("kernels, neighbours alike, T = 32 768", kernels.format("local", 32768, "forward")),
        )
    ]
    yield Comparison("C27", "full rate over half rate, forward, on an H200", tuple(rows))


def _r28() -> Iterable[Comparison]:
    """Share of the peak that half rate saves, without and with autograd."""
    rows = []
    for text, mode in (("without autograd", "forward"), ("with autograd", "training")):
        for name, part, said in (("the loop", "loop", 40), ("in all", "whole", 32)):
            key = f"half_rate:peak.{part}.{mode}.saving"
            rows.append(_found(f"{name}, {text}", f"{said} %", key, "0 %", said / 100 - 0.05,
                               said / 100 + 0.05))  # fmt: skip
    note = (
        "Claimed: from 200 to 120 MB, and from 250 to 170 MB. Agreement means within five points."
    )
    yield Comparison("C28", "share of the peak that is saved, on an H200", tuple(rows), note)


def _r29() -> Iterable[Comparison]:
    """The compression stage beside a loop at half rate, and what is copied."""
    copied = 2048 // 2 * 8 * 16  # T/2 · H · S
    rows = [
        _found("peak saved, forward", "0 %", "half_rate:peak.compression.forward.saving", "0 %",
               -0.01, 0.01, expected=True),
        _found("peak saved, training", "0 %", "half_rate:peak.compression.training.saving", "0 %",
               -0.01, 0.01, expected=True),
        _factor("time, forward", "1.00", "half_rate:speedup.compression.forward", expected=True),
        _factor("time, training", "1.00", "half_rate:speedup.compression.training"),
        _found("numbers copied at T = 2048", "131,072", "half_rate:copied", "0,000", copied, copied,
               expected=True),
    ]  # fmt: skip
    note = "Full rate over half rate. Agreement of a time means within a tenth."
    yield Comparison("C29", "the compression stage, on an H200", tuple(rows), note)


def _r30() -> Iterable[Comparison]:
    """Speed and memory of the whole, in training and in inference."""
    rows = [
        _found("speed, training", "1.7 to 1.8 ×", "half_rate:speedup.whole.training", "0.00 ×",
               1.65, 1.85, expected=True),
        _found("speed, inference", "1.8 to 1.9 ×", "half_rate:speedup.whole.forward", "0.00 ×",
               1.75, 1.95, expected=True),
        _found("memory saved, training", "30 %", "half_rate:peak.whole.training.saving", "0 %",
               0.25, 0.35),
        _found("memory saved, inference", "35 %", "half_rate:peak.whole.forward.saving", "0 %",
               0.30, 0.40),
    ]  # fmt: skip
    note = "A loop over positions with what surrounds it."
    yield Comparison("C30", "full rate over half rate, on an H200", tuple(rows), note)


def _r31() -> Iterable[Comparison]:
    """How far odd rows are off, and what they still find."""
    rows = [
        _found("error of odd rows, neighbours unlike", "0", "half_rate:error.rho0.measured", "0.00",
               0.0, 0.01),
        _found("error of odd rows, neighbours alike to 0.9", "0", "half_rate:error.rho0.9.measured",
               "0.00", 0.0, 0.01),
        _found("odd queries that find their key", "100 %", "half_rate:lookup.half.odd", "0.0 %",
               0.95, 1.0),
    ]  # fmt: skip
    note = (
        "Claimed: what the same function would give. The error is relative, ‖half − full‖ / ‖full‖."
    )
    yield Comparison("C31", "is it the same function?, on an H200", tuple(rows), note)


def _r38() -> Iterable[Comparison]:
    """What returning weights costs, timed well and as the notes time it."""
    rows = [
        _found(f"time, N = {n}", "> 0", f"nsa_weights:well.record.n{n}.overhead.gpu", "0.0 %",
               0.01, 99.0)
        for n in (2048, 8192, 32768)
    ]  # fmt: skip
    note = "Time with the weights over without, minus 1; warmed up, on the GPU’s own clock."
    yield Comparison("C38", "what returning costs, timed well, on an H200", tuple(rows), note)
    rows = [
        _found("without the weights first", "> 0", "nsa_weights:naive.source.overhead", "0 %",
               0.01, 99.0),
        _found("with the weights first", "> 0", "nsa_weights:naive.turned.overhead", "0,000 %",
               0.01, 99.0, expected=True),
    ]  # fmt: skip
    note = (
        "The notes’ benchmark, and the same in the other order: who comes first pays for the start."
    )
    yield Comparison("C38", "the same, timed as the notes do", tuple(rows), note)


_RECORDED: dict[str, Callable[[], Iterable[Comparison]]] = {
    "C17": _r17,
    "C18": _r18,
    "C19": _r19,
    "C20": _r20,
    "C21": _r21,
    "C22": _r22,
    "C23": _r23,
    "C24": _r24,
    "C25": _r25,
    "C27": _r27,
    "C28": _r28,
    "C29": _r29,
    "C30": _r30,
    "C31": _r31,
    "C38": _r38,
}


def comparisons(name: str | None = None) -> list[Comparison]:
    """The tables of one claim, or of all: first what is recomputed, then what was recorded.

    Parameters
    ----------
    name : id of a claim; None for all.  A claim about shapes alone (C01) has no table.

    Raises
    ------
    ArgumentError
        if there is no such claim.
    RecordError
        if a record that a verdict rests on is missing or lacks the key.
    """
    ids = list(CLAIMS) if name is None else [claim(name).id]
    makers = [table[key] for key in ids for table in (_COMPUTE, _RECORDED) if key in table]
    return [comparison for make in makers for comparison in make()]


# -- the page ----------------------------------------------------------------------------------


def _cell(text: str) -> str:
    # A number stays on one line with its unit, its thousands and the sign before it.
    text = re.sub(r"(?<=[\d=≈]) (?=[\d%KMGT×])|(?<=\w) (?==)", "\N{NO-BREAK SPACE}", text)
    return text.replace("|", r"\|").replace("*", r"\*")


def _link(chapter: str, known: Iterable[str] | None) -> str:
    """A link to the chapter, or its number alone while the book lacks it."""
    path = _CHAPTERS[chapter][1]
    if known is not None and path.lstrip("/") not in set(known):
        return chapter
    return f"{{doc}}`{chapter} <{path}>`"


def as_markdown(pages: Iterable[str] | None = None) -> str:
    """The ledger as MyST Markdown: one table of verdicts, then each table recomputed.

    Parameters
    ----------
    pages : documents that the book has; links to others are left out.  None: link to all.
    """
    pages = None if pages is None else list(pages)
    lines = ["````{list-table}", ":header-rows: 1", ":widths: 8 36 15 33 8", ""]
    rows = [("Claim", "What is said", "Verdict", "Because", "Chapter")]
    for item in CLAIMS.values():
        chapters = ", ".join(_link(c, pages) for c in (item.chapter, *item.others))
        verdict = f"**{item.verdict}**" if item.verdict == "refuted" else item.verdict
        rows.append((item.id, _cell(item.statement), verdict, _cell(item.reason), chapters))
    for row in rows:
        lines += [f"{'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    lines.append("````")
    for name in CLAIMS:
        tables = comparisons(name)
        if not tables:
            continue
        rows = [row for table in tables for row in table.rows]
        agree = sum(row.agrees for row in rows)
        lines += ["", f"````{{dropdown}} {name}: {agree} of {len(rows)} cells agree"]
        for table in tables:
            lines += ["", f"**{_cell(table.title)}**"]
            lines += ["", f"| | Claimed | {table.found.capitalize()} | |", "|---|--:|--:|---|"]
            for row in table.rows:
                value = _cell(row.computed)
                if row.source:
                    value = f"{{rec}}`{value} <{row.source}>`"
                mark = "✓" if row.agrees else "✗"
                cells = (_cell(row.label), _cell(row.claimed), value, mark)
                lines.append("| " + " | ".join(cells) + " |")
            if table.note:
                lines += ["", _cell(table.note)]
        lines += ["````"]
    return "\n".join(lines) + "\n"
