"""The backward kernels by hand for groups of 1, 2 and 4 query heads: their rows fill no box of TMA.

What the kernels compute is judged on a Hopper card; ``test_nsa_hopper_backward.py`` judges the
lists, lines and sums around them.  Here they are compiled, and the binary is read.
"""

from __future__ import annotations

import re

import pytest
import torch
from hopper_reasons import compiled_elsewhere
from nsa_cases import Case, call_of, check_backward, choose, gradients, make, truth
from test_nsa_hopper_backward import CHILD

from labkit.nsa import by_keys, hopper_backward, selection_backward
from labkit.nsa.call import Call

GROUPS = (1, 2, 4)

# -- cut for many short lists ----------------------------------------------------------------------


def turned(m, group, heads, workspace=2**30, slots=4):
    call = Call(scale=0.1, max_q=m, max_k=m)
    chosen = torch.zeros(1, m, heads, slots, dtype=torch.int32)
    return hopper_backward._turn(chosen, call, m, group, 64, workspace, hopper_backward.PIECE)


def test_a_piece_has_so_many_rows_and_so_many_entries_at_most():
    """Of a group of 1 a list of the average length would otherwise be the longest program."""
    sizes = [turned(64, group, 1).size for group in (1, 2, 4, 8, 16, 64)]
    assert sizes == [2048, 2048, 2048, 2048, 1024, 256]


@pytest.mark.parametrize("fit", [1, 3, 4, 5, 7, 100])
def test_groups_of_lists_are_of_one_size(fit):
    """Every group ends with an idle card: no more of them than the workspace asks for."""
    one = turned(128, 1, 1)
    bytes_ = one.each * (2 * 64 + 12) + (one.each // one.size + one.rows) * 2 * 64 * 64 * 4
    cut = list(turned(128, 1, 7, workspace=fit * bytes_).groups())
    assert sum(number for _, number in cut) == 7
    assert max(number for _, number in cut) <= fit
    assert len(cut) == -(-7 // fit)


def test_a_group_of_lists_has_no_more_than_a_launch_can_hold():
    cut = turned(1, 8, 70_000, workspace=2**40, slots=1)
    assert max(number for _, number in cut.groups()) <= 65535
    chosen, call = (
        torch.zeros(1, 1, 70_000, 1, dtype=torch.int32),
        Call(scale=0.1, max_q=1, max_k=1),
    )
    config = by_keys._configs(torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 64))[0]
    cut = by_keys.turn(chosen, call, 1, 1, config, 256, 0, 2**40)
    assert max(number for _, number in cut.groups()) <= 65535


@pytest.mark.parametrize("group", GROUPS)
def test_where_members_do_not_fit_into_a_number_dq_is_made_of_shares(group):
    case = Case(130, group=group, block=64, slots=2, pattern="all")
    chosen, call = choose(case), call_of(case)
    cut = hopper_backward._turn(chosen, call, 130, group, 64, 2**30, 8192)
    union, flag = hopper_backward._split(chosen, cut, call, 130, group, "split")
    assert (union is None) == (group < 4) and flag.tolist() == [int(group == 4)]


# -- without a card ------------------------------------------------------------------------------

WANTED = [(128, 1), (128, 4)]


@pytest.fixture(scope="module")
def compiled():
    """{(head_dim, group): {kernel: (usage, SASS, bytes of shared memory)}}."""
    return compiled_elsewhere(CHILD, WANTED)


@pytest.mark.slow
def test_the_kernels_fit_the_card(compiled):
    for (d, group), kernels in compiled.items():
        assert ("dq_kernel" in kernels) == (group == 4)
        usage, sass, shared = kernels["dkdv_kernel"]
        numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        assert shared <= 227 * 1024
        assert int(numbers["REG"]) * 128 * 3 <= 65536
        # As for larger groups, and what copies is left with 24 registers.
        assert int(numbers["STACK"]) + int(numbers["LOCAL"]) <= (256 if d == 128 else 128)
        assert {"0xf0", "0x18"} <= set(re.findall(r"USETMAXREG\S+ (?:UP0, )?(0x\w+)", sass))


@pytest.mark.slow
def test_products_do_not_wait_for_each_other(compiled):
    """With fewer registers the compiler puts a wait behind each instruction, and only warns."""
    for (d, _), kernels in compiled.items():
        sass = kernels["dkdv_kernel"][1]
        split, fused = 2 * d // 16 + 2 * 4, 2 * d // 16 + 3 * 4
        assert sass.count("HGMMA.") == 2 * (split + fused)
        assert sass.count("WARPGROUP.DEPBAR") == 2 * (4 + 5)  # one wait for each product


@pytest.mark.slow
def test_rows_come_and_go_by_sixteen_bytes_and_the_rest_by_boxes(compiled):
    for (d, _), kernels in compiled.items():
        sass = kernels["dkdv_kernel"][1]
        a_tile = 64 * d * 2 // (32 * 16)  # instructions of one warp
        assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", sass)) == 2 * a_tile  # of Q and dO
        # LSE, position, δ: two numbers a lane, since a box begins at multiples of 16 bytes
        assert sass.count("LDGSTS") == 2 * a_tile + 2 * 3
        assert sass.count("STG.E.128") == a_tile  # a share of dQ
        assert sass.count("UTMALDG") == 2 * d // 64  # K and V
        assert "UTMASTG" not in sass


@pytest.mark.slow
def test_what_a_warp_copied_is_fenced_before_it_says_so(compiled):
    """Copied as a thread writes, read as the copy engine reads: a card may forgive a missing fence.

    Wait, fence, arrive: in the loop and behind it, for Q and for dO.
    """
    for kernels in compiled.values():
        steps = re.findall(
            r"LDGDEPBAR|(?<!WARPGROUP\.)DEPBAR\.LE SB0|FENCE\.VIEW\.ASYNC|SYNCS\.ARRIVE",
            kernels["dkdv_kernel"][1],
        )
        begin = [i for i, step in enumerate(steps) if step == "LDGDEPBAR"]
        assert len(begin) == 2
        for i in begin:
            assert steps[i + 1 : i + 7] == 2 * ["DEPBAR.LE SB0", "FENCE.VIEW.ASYNC", "SYNCS.ARRIVE"]


# -- on a card -------------------------------------------------------------------------------------

MATRIX = [
    Case(m, n, group=group, heads=heads, d=d, block=64, slots=slots, pattern=pattern, dtype=dtype)
    for m, n, heads, d, slots, pattern, dtype in (
        (1, 1, 2, 128, 3, "random", "bfloat16"), (63, 63, 3, 64, 5, "messy", "float16"),
        (65, 65, 2, 128, 3, "messy", "bfloat16"), (130, 900, 2, 128, 6, "messy", "float16"),
        (500, 500, 2, 128, 7, "random", "bfloat16"), (1024, 1024, 3, 64, 6, "all", "bfloat16"),
        (1024, 1024, 2, 128, 6, "random", "float16"),
    )
    for group in GROUPS
]  # fmt: skip
MATRIX += [
    case
    for group in GROUPS
    for case in (
        Case(300, group=group, heads=2, d=128, block=64, slots=3, lengths=(100, 0, 1, 199),
             dtype="bfloat16"),
        Case(300, group=group, d=64, block=64, slots=3, pattern="nothing", dtype="float16"),
        Case(300, group=group, d=128, block=64, slots=5, pattern="first", dtype="bfloat16"),
        Case(97, 333, group=group, heads=2, batch=2, d=64, block=64, slots=3, dtype="bfloat16"),
    )
]  # fmt: skip


def skip_off_hopper(case: Case) -> None:
    q, k, v, *_ = make(case, "cuda")
    why = hopper_backward.why_not(q, k, v, call_of(case, "cuda"))
    if why == "not a Hopper card":
        pytest.skip(why)
    assert why is None


@pytest.mark.gpu
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_gradients_on_a_hopper_card(case):
    skip_off_hopper(case)
    check_backward(case, hopper_backward.backward, "cuda")
    check_backward(case, hopper_backward.backward, "cuda", with_dlse=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [dict(workspace=1), dict(piece=64), dict(road="split")], ids=str
)
@pytest.mark.parametrize("group", GROUPS)
def test_gradients_in_parts_and_along_unions(group, options):
    """Many groups of lists, ranges of queries, pieces of a step; dQ of 4 heads along unions."""
    case = Case(700, group=group, heads=3, d=128, block=64, slots=6, pattern="messy",
                dtype="bfloat16")  # fmt: skip
    skip_off_hopper(case)
    check_backward(case, lambda *a: hopper_backward.backward(*a, **options), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_any_strides_of_sixteen_bytes_will_do(group):
    """Heads before positions, room after a row: the same numbers, but for the last bit of δ.

    Its sum over a row is compiled for the strides, and added up in another order.
    """
    case = Case(500, group=group, heads=2, batch=2, d=64, block=64, slots=6, dtype="bfloat16")
    skip_off_hopper(case)
    q, k, v, dout, dlse, chosen = make(case, "cuda")
    o, lse = (x.to(y) for x, y in zip(truth(case, q, k, v, chosen), (q.dtype, torch.float32),
                                      strict=True))  # fmt: skip
    call = call_of(case, "cuda")
    wanted = hopper_backward.backward(dout, dlse, q, k, v, o, lse, chosen, call)

    def heads_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def roomy(x):
        return torch.cat([x, torch.full_like(x[..., :8], torch.nan)], -1)[..., :64]

    for change in (heads_first, roomy, lambda x: roomy(heads_first(x))):
        ours = hopper_backward.backward(
            change(dout), dlse, *map(change, (q, k, v, o)), lse, chosen, call
        )
        for got, want in zip(ours, wanted, strict=True):
            assert (got.double() - want.double()).norm() <= 2**-9 * want.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_no_worse_than_the_kernels_of_triton(group):
    case = Case(1024, group=group, heads=2, d=128, block=64, slots=8, dtype="bfloat16")
    skip_off_hopper(case)
    q, k, v, dout, dlse, chosen = make(case, "cuda")
    o, lse = truth(case, q, k, v, chosen)
    tensors = (dout, dlse, q, k, v, o.to(q.dtype), lse.float(), chosen, call_of(case, "cuda"))
    wanted = gradients(case, q, k, v, dout, dlse, chosen)
    ours, theirs = hopper_backward.backward(*tensors), selection_backward.by_keys(*tensors)
    for a, b, exact in zip(ours, theirs, wanted, strict=True):
        assert (a.double() - exact).norm() <= 1.5 * (b.double() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_gradients_are_the_same_to_the_bit_each_time(group):
    case = Case(3000, group=group, heads=8, d=128, block=64, slots=16, dtype="bfloat16")
    skip_off_hopper(case)
    q, k, v, dout, dlse, chosen = make(case, "cuda")
    o = torch.randn_like(q)
    lse = torch.randn_like(dlse) + 5
    tensors = (dout, dlse, q, k, v, o, lse, chosen, call_of(case, "cuda"))
    first = hopper_backward.backward(*tensors)
    assert all(x.isfinite().all() for x in first)
    for _ in range(20):
        again = hopper_backward.backward(*tensors)
        assert all(map(torch.equal, again, first))
