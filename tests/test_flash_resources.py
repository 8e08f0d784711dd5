"""Kernels compiled for cards that are not here: within the limits, and as the tuner expects."""

from __future__ import annotations

import pytest

from labkit.errors import ArgumentError
from labkit.flash import resources
from labkit.flash.resources import ARCHS, CompileError, Resources, ResourceTable
from labkit.hardware import CAPABILITIES
from labkit.units import KIB

#: bytes per thread that a default configuration may spill: 64 registers, and each is a debt
SPILL_BOUND = 256
ALL = list(ARCHS)


KINDS = ("forward", "dkdv", "dq")
BIG = {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 3, "descriptors": True}


def asked(kernel, arch="sm_90", config=None, *, head_dim=128, disassemble=False):
    """A request as ``report`` makes it."""
    return resources._request(
        kernel, config, arch, "bfloat16", head_dim, 4096, False, 1, "ieee", disassemble
    )


@pytest.fixture(scope="module")
def production() -> ResourceTable:
    """The default configuration of each production kernel, d = 128, on every architecture."""
    others = [asked(kind, "sm_120", largest(kind, "sm_120")) for kind in KINDS]
    others += [asked(step, head_dim=64, disassemble=True) for step in ("v1", "v2")]
    others += [asked("forward", config=BIG), asked("v4"), asked("v4", "sm_80")]
    # All at once: a process takes long to load Triton.  The tests below then find theirs.
    resources.reports([*others, *(asked(kind, arch) for kind in KINDS for arch in ALL)])
    return resources.table(KINDS, ALL, head_dims=(128,))


def largest(kind: str, arch: str):
    """The candidate of the tuner that takes most shared memory there."""
    from labkit.flash import tuning

    problem = problem_for(kind, arch)
    return max(tuning.space(problem), key=lambda c: tuning.shared_bytes(c, problem))


def problem_for(kind: str, arch: str, head_dim: int = 128, dtype: str = "bfloat16"):
    from labkit.flash import tuning

    number, capability = int(arch.removeprefix("sm_")), CAPABILITIES[ARCHS[arch]]
    return tuning.Problem(
        kind=kind, dtype=dtype, precision="ieee", head_dim=head_dim, head_dim_v=head_dim,
        rows=4096, cols=4096, heads=64, causal=False, windowed=False, descriptors=number >= 90,
        by_hand="compiled without a card", arch=number, shared_limit=capability.smem_per_block,
        sms=132,
    )  # fmt: skip


def test_limits_are_those_of_the_programming_guide():
    limits = [CAPABILITIES[ARCHS[arch]].smem_per_block // KIB for arch in ALL]
    assert ALL == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    assert limits == [163, 99, 99, 227, 227, 99]


def test_defaults_compile_everywhere_within_the_limits(production):
    assert len(production) == 18
    broken = [str(r) for r in production if isinstance(r, CompileError)]
    assert broken == []
    assert [f"{r.kernel} {r.arch}" for r in production if not r.fits] == []
    assert all(0 < r.registers <= 255 for r in production)


def test_defaults_spill_no_more_than_the_bound(production):
    spills = {f"{r.kernel} {r.arch}": r.spill_bytes for r in production}
    assert {name: s for name, s in spills.items() if s > SPILL_BOUND} == {}
    # Where the course is measured nothing spills at all.
    assert [r.spill_bytes for r in production if r.arch in ("sm_90", "sm_100")] == [0] * 6


def test_estimate_is_never_below_what_the_compiler_takes(production):
    low = {
        f"{r.kernel} {r.arch}": (r.estimate, r.shared_bytes)
        for r in production
        if r.estimate < r.shared_bytes
    }
    assert low == {}


def test_estimate_is_near_the_compilers_figure_where_tiles_go_through_the_copy_engine(production):
    """Not so high either that it would forbid what runs; pointer loads keep less in flight."""
    ratio = {r.kernel: r.estimate / r.shared_bytes for r in production if r.arch == "sm_90"}
    assert all(value < 1.05 for value in ratio.values()), ratio


@pytest.mark.parametrize("kind", KINDS)
def test_largest_candidate_of_the_smallest_card_fits_it(kind, production):
    from labkit.flash import tuning

    config, problem = largest(kind, "sm_120"), problem_for(kind, "sm_120")
    assert tuning.shared_bytes(config, problem) <= 99 * KIB
    found = resources.report(kind, config, "sm_120", disassemble=False)
    assert found.fits and found.shared_bytes <= found.estimate
    assert found.tiles["block_m"] == config.block_m and found.num_warps == config.num_warps


def test_what_exceeds_a_card_is_no_candidate_there(production):
    from labkit.flash import tuning

    config = tuning.Config(**BIG)
    wide, narrow = problem_for("forward", "sm_90"), problem_for("forward", "sm_120")
    assert tuning.shared_bytes(config, narrow) > narrow.shared_limit
    assert config in tuning.space(wide) and config not in tuning.space(narrow)
    found = resources.report("forward", BIG, "sm_90", disassemble=False)
    assert 99 * KIB < found.shared_bytes <= found.shared_limit and found.fits


def test_each_architecture_gets_the_instructions_that_it_has(production):
    counts = {r.arch: r.ptx_counts for r in production if r.kernel == "forward"}
    assert all(c["ex2.approx"] for c in counts.values())
    for arch in ("sm_80", "sm_86", "sm_89"):
        assert counts[arch]["mma.sync"] and counts[arch]["cp.async"]
        assert not counts[arch]["cp.async.bulk.tensor"]
    for arch, products in (("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")):
        assert counts[arch][products] and counts[arch]["cp.async.bulk.tensor"]
        assert not counts[arch]["mma.sync"]


def test_step_4_has_no_use_on_a_card_without_a_copy_engine(production):
    with_it = resources.report("v4", None, "sm_90", disassemble=False)
    without = resources.report("v4", None, "sm_80", disassemble=False)
    assert with_it.ptx_counts["cp.async.bulk.tensor"] and not with_it.spill_bytes
    assert not without.ptx_counts["cp.async.bulk.tensor"]
    assert not without.ptx_counts["cp.async"], "nothing is fetched ahead either"


def test_step_2_issues_a_quarter_less_than_step_1(production):
    first, second = (resources.report(key, head_dim=64) for key in ("v1", "v2"))
    assert first.loop["MUFU"] == second.loop["MUFU"]
    assert second.per_score < 0.75 * first.per_score
    clocks = first.clocks_per_score(l2_bytes_per_clock=32)
    assert clocks["exp"] == pytest.approx(1 / 16)
    assert clocks["product"] == pytest.approx(1 / 16, rel=0.01)
    assert clocks["issue"] == pytest.approx(first.per_score / 128)
    assert clocks["L2"] == pytest.approx(2 * 64 * 2 / 64 / 32)


# -- reading ------------------------------------------------------------------------------------

_SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x1 */
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x2 */
        /*0020*/                   FSEL R1, R2, R3, P0 ;
        /*0030*/              @!P0 MUFU.EX2 R3, R4 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   MUFU.EX2 R3, R4 ;
        /*0070*/               @P1 BRA 0x50 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x10 ;
        /*00a0*/                   BRA 0xa0 ;
"""


def test_hot_loop_is_the_shortest_with_products_and_exponentials():
    assert resources._hot_loop(_SASS) == {"HGMMA": 1, "MUFU": 1, "BRA": 1}
    assert resources._hot_loop("/*0000*/ EXIT ;") == {}


def made(**changes) -> Resources:
    values = {
        "kernel": "v1", "arch": "sm_90", "dtype": "bfloat16", "head_dim": 64, "causal": False,
        "tiles": {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2},
        "registers": 128, "spill_bytes": 0, "shared_bytes": 40 * KIB, "estimate": None,
        "counts": {}, "ptx_counts": {}, "loop": {"FFMA": 64}, "ptx": "", "sass": "",
    }  # fmt: skip
    return Resources(**{**values, **changes})


def test_programs_per_sm_are_limited_by_what_runs_out_first():
    assert made().programs_per_sm == 4  # 65,536 / (128 threads × 128 registers)
    assert made(registers=129).programs_per_sm == 3  # handed out in steps of 8 per thread
    assert made(registers=32).programs_per_sm == 5  # 228 KiB / (40 + 1)
    assert made(registers=32, shared_bytes=KIB).programs_per_sm == 16  # 2048 threads
    assert made(arch="sm_120", registers=32, shared_bytes=KIB).programs_per_sm == 12  # 1536


def test_per_score_divides_by_the_scores_of_a_thread():
    assert made().scores_per_thread == 32
    assert made().per_score == 2
    assert made(loop={}).per_score is None


def test_table_names_what_does_not_fit_or_compile():
    table = ResourceTable(
        [made(spill_bytes=16), made(arch="sm_86", shared_bytes=100 * KIB),
         CompileError("no such instruction", "v4", "sm_80")]
    )  # fmt: skip
    text, page = str(table), table._repr_html_()
    for words in ("16 B", "40 KiB of 227 KiB", "too large", "does not compile", "v4"):
        assert words in text and words in page
    assert page.count("<tr>") == 4


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"kernel": "v9"}, "kernel"),
        ({"arch": "sm_75"}, "arch"),
        ({"dtype": "float8"}, "dtype"),
        ({"head_dim": 0}, "head_dim"),
        ({"precision": "bf16"}, "precision"),
    ],
)
def test_unknown_arguments_are_named_before_anything_is_compiled(change, argument):
    with pytest.raises(ArgumentError) as caught:
        resources.report(**{"kernel": "v1", **change})
    assert caught.value.argument == argument


def test_the_compilers_own_words_reach_the_reader():
    tiles = {"BLOCK_M": 48, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    with pytest.raises(CompileError, match="power of 2"):
        resources.report("v1", tiles, disassemble=False)
