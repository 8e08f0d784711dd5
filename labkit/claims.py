r"""The claims that the course tests: what was said, what is so, and every cell of it recomputed.

The course grew from a set of notes.  Each figure and rule they state is a claim with a verdict
here, and a function that computes what the claim says from the same closed forms, card table and
step costs as the chapters use.  The ledger page of the book is made from this file, and so is
``python -m labkit claims``.

Nothing here is measured: where a verdict depends on a measurement, the chapter that it names
shows the record.  Sizes are compared in binary units: the notes' "KB" are KiB.

Imports: layers.budget, nsa.model, memory, roofline, hardware, closed_form, units, errors.  No
torch.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

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
    """One cell: what was claimed and what is computed.

    Attributes
    ----------
    label : which cell.
    claimed, computed : both as text.
    agrees : whether the computed value is the claimed one, to the digits claimed.
    expected : what the verdict says of ``agrees``; False for the cells of a refuted claim.
    """

    label: str
    claimed: str
    computed: str
    agrees: bool
    expected: bool = True


@dataclass(frozen=True)
class Comparison:
    """A table of the notes beside the same table computed."""

    claim: str
    title: str
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def as_expected(self) -> bool:
        """Whether every cell comes out as the verdict says."""
        return all(row.agrees == row.expected for row in self.rows)

    def __str__(self) -> str:
        cells = [("", "claimed", "computed", "")]
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
            f'<th scope="col"{right}>computed</th><th scope="col"></th></tr></thead><tbody>',
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
        "or one's own, and how much of a short call is launching; the chapter measures three "
        "baselines.",
        "08",
    ),
    Claim(
        "C18",
        "On an RTX 3060 a layer with flash attention takes 2.6 ms at N = 128, 256 and 512, and is "
        "2.97, 4.44, 4.47, 2.70 and 2.91 times faster than the original from 128 to 2048: tensor "
        "cores work best from 256 to 512.",
        "refuted",
        "The quotients are right and the reason is not. Sixteen times the scores in the same time "
        "means that the GPU waits for its next kernel, on tensor cores or not; a CUDA graph of the "
        "same kernels, which launches them at once, shows it.",
        "10",
        ("02",),
    ),
    Claim(
        "C19",
        "Training in float16 instead of float32 is 1.02, 0.86, 1.11 and 2.02 times as fast at "
        "N = 128, 256, 512 and 1024, and saves 0, 0, 11 and 50 % of the memory.",
        "depends: measured",
        "Where launching is what takes the time, half precision has nothing to make faster, and "
        "the casts of autocast are kernels to launch. How much memory it saves depends on which "
        "half: by the model pure float16 saves two fifths of a step with a fused kernel; autocast, "
        "which keeps float32 weights and adds copies, less than a quarter.",
        "10",
    ),
    Claim(
        "C20",
        "Use float32 up to N = 256 and float16 above; in the template, float16 above N = 512 and "
        "only in training.",
        "refuted",
        "These are two rules, and they contradict each other from 257 to 512. Where half precision "
        "begins to pay depends on the card, the size and the way to it: measure it there, and keep "
        "it with its evidence.",
        "10",
    ),
    Claim(
        "C21",
        "Speed-ups multiply: flash 2.7 times and float16 2.0 times make 5.4 times.",
        "refuted",
        "One factor is of a forward pass and the other of a training step. Even of the same call "
        "they multiply only if half precision speeds up everything alike, with flash and without; "
        "what it gains where S is written is not what it gains where S is not.",
        "10",
        ("08",),
    ),
    Claim(
        "C22",
        "At N = 2048 the original takes 750 MB as measured, flash 250 MB and flash in float16 "
        "125 MB by estimate: a third and a sixth.",
        "refuted",
        "The first fits a training step at batch 2, by the model. The other two are no fixed "
        "shares of it: without S and P what is left is linear in N, here a quarter of a step and "
        "a fifth of a forward pass.",
        "10",
        ("01", "05"),
    ),
    Claim(
        "C23",
        "In 12 GB, the longest sequence is 2048 in float32, 4096 with flash attention and 8192 "
        "with float16 as well.",
        "depends: measured",
        "It depends on batch, heads and what else is held, which the notes do not say; the "
        "memory model gives the length for any of them, and bisection under a limit confirms it.",
        "05",
    ),
    Claim(
        "C24",
        "At N = 1024 SDPA may change its kernel; torch.backends.cuda.sdp_kernel forces flash.",
        "depends: measured",
        "Which kernel runs depends on card, dtype, shape and mask, and the profiler tells. The "
        "function is deprecated for torch.nn.attention.sdpa_kernel, forces nothing in float32, "
        "which FlashAttention does not take, and leaves cuDNN allowed.",
        "10",
    ),
    Claim(
        "C25",
        "The flash layer takes the place of the layer with a sparse (local window) pattern.",
        "refuted",
        "It is dense attention, which is another function. A sparse pattern given as a dense "
        "mask costs what dense attention costs, or more; only blocks that are skipped save time "
        "and bytes.",
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
        "Operations and peak stay, and the copy moves that many numbers.  Alone, the stage is a "
        "little slower; beside a loop over positions that does not show.",
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


def comparisons(name: str | None = None) -> list[Comparison]:
    """The tables of one claim recomputed, or of all claims.

    Parameters
    ----------
    name : id of a claim; None for all.  A claim about shapes alone (C01) has no table.

    Raises
    ------
    ArgumentError
        if there is no such claim.
    """
    ids = list(CLAIMS) if name is None else [claim(name).id]
    return [table for key in ids if key in _COMPUTE for table in _COMPUTE[key]()]


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
            lines += ["", "| | Claimed | Computed | |", "|---|--:|--:|---|"]
            for row in table.rows:
                cells = (row.label, row.claimed, row.computed, "✓" if row.agrees else "✗")
                lines.append("| " + " | ".join(map(_cell, cells)) + " |")
            if table.note:
                lines += ["", _cell(table.note)]
        lines += ["````"]
    return "\n".join(lines) + "\n"
