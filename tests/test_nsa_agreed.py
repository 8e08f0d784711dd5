"""A choice cut in two: what a warpgroup agrees on, what is left, and both put together again."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hopper_reasons import compiled_elsewhere
from nsa_cases import Case, call_of, check_forward, choose, make
from test_nsa_selection_lists import counted, sequences

from labkit.nsa import by_keys, lists, selection
from labkit.nsa.agreed import SAMPLES, agreed, fits

# -- the cut ---------------------------------------------------------------------------------------

#: (queries, groups) of a tile, as hopper.py has them for groups of 1, 2, 4, 8 and 16 heads
TILES = [(64, 3), (32, 4), (16, 3), (8, 3), (4, 4)]
CASES = [
    Case(1, slots=1), Case(7, slots=3, heads=2), Case(64, 114, slots=4, pattern="messy"),
    Case(130, slots=3, block=32, batch=2, heads=2, pattern="messy"),
    Case(40, pattern="nothing"), Case(33, pattern="first", slots=2), Case(65, slots=16, block=4),
    Case(210, 500, slots=16, block=8, pattern="messy"), Case(200, slots=5, block=1, pattern="all"),
    Case(130, lengths=(5, 0, 60, 1, 64), slots=4, heads=2, pattern="messy"),
]  # fmt: skip


def samples(queries: int, groups: int, first: int, end: int) -> list[int]:
    """The queries of a tile whose choices are candidates: in the middle of equal shares."""
    share = [(2 * x + 1) * queries // (2 * SAMPLES) for x in range(groups * SAMPLES)]
    return [min(first + x, end - 1) for x in share] if first < end else []


def expected(case: Case, chosen, queries: int, groups: int, least: int):
    """Per batch, head and tile: {block: {group: queries that chose it}} of what they agree on."""
    call, tile = call_of(case), queries * groups
    out = []
    for picks in (head for batch in counted(case, chosen) for head in batch):
        for begin, end, _ in sequences(case):
            for first in range(begin, begin + call.max_q, tile):
                found = {}
                named = {c for i in samples(queries, groups, first, end) for c in picks[i]}
                for block in sorted(named):
                    who = [
                        [i for i in range(low, min(low + queries, end)) if block in picks[i]]
                        for low in range(first, first + tile, queries)
                    ]
                    yes = {g: rows for g, rows in enumerate(who) if len(rows) >= least}
                    if yes:
                        found[block] = yes
                out.append((first, found))
    return out


def check_cut(case: Case, chosen, queries: int, groups: int, least: int, device) -> None:
    """Blocks, members, counts and the rest against the lines above."""
    call, bits = call_of(case, device), min(queries, 32)
    union, rest = agreed(chosen.to(device), queries, groups, least, call)
    want = expected(case, chosen, queries, groups, least)
    blocks, members, counts = (x.flatten(0, 2).tolist() for x in union)
    assert union[0].shape[-1] == max(1, min(groups * SAMPLES * case.slots, call.blocks))
    assert len(counts) == len(want)
    gone = set()  # (batch and head, query, block)
    each = len(want) // (case.batch * case.heads)
    for x, (first, found) in enumerate(want):
        assert counts[x] == len(found)
        row = blocks[x][: counts[x]]
        assert [c % 2**24 for c in row] == list(found)
        assert [c >> 24 for c in row] == [sum(1 << g for g in who) for who in found.values()]
        if not found:
            assert blocks[x][0] == 0
        for words, (block, who) in zip(members[x], found.items(), strict=False):
            right = [0] * (groups * queries // bits)
            for i in (i for rows in who.values() for i in rows):
                word, bit = divmod(i - first, bits)
                right[word] |= 1 << bit
                gone.add((x // each, i, block))
            assert [word % 2**32 for word in words] == right
    left = torch.full_like(rest, -1, device="cpu")
    for b, picks in enumerate(counted(case, chosen)):
        for h, picks_h in enumerate(picks):
            for i, pick in enumerate(picks_h):
                row = [
                    block
                    for block in chosen[b, i, h].tolist()
                    if block in pick and (b * case.heads + h, i, block) not in gone
                ]
                left[b, i, h, : len(row)] = torch.tensor(row, dtype=torch.int32)
    assert rest.dtype == torch.int32 and rest.is_contiguous() and torch.equal(rest.cpu(), left)


@pytest.mark.parametrize("tile", range(len(TILES)))
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda x: str(CASES[x]))
def test_what_many_chose_goes_along_the_union_and_the_rest_stays(case, tile, device):
    torch.manual_seed(1)
    # every case and every tile with both
    (queries, groups), case, least = TILES[tile], CASES[case], (1, 3)[(case + tile) % 2]
    check_cut(case, choose(case), queries, groups, least, device)


def alike(case: Case, neighbours: int) -> torch.Tensor:
    """``neighbours`` queries choose the same, and those beside them something else."""
    picks = choose(replace(case, pattern="messy"))
    return picks[:, torch.arange(case.m) // neighbours * neighbours]


@pytest.mark.parametrize("least", [2, 33])
@pytest.mark.parametrize("neighbours", [1, 32, 1000])
@pytest.mark.parametrize(("queries", "groups"), [(64, 3), (16, 3)])
def test_neighbours_that_share_nothing_or_everything(queries, groups, neighbours, least, device):
    torch.manual_seed(2)
    case = Case(200, 1200, slots=6, block=4, batch=2)
    check_cut(case, alike(case, neighbours), queries, groups, least, device)


def test_forced_blocks_are_agreed_on_where_nothing_else_is(device):
    torch.manual_seed(3)
    case = Case(192, 64 * 400, slots=5, block=64)
    own = (torch.arange(case.m) + case.n - case.m) // case.block
    chosen = torch.rand(1, case.m, 1, case.n // case.block - 5).topk(case.slots).indices + 1
    chosen[..., 0], chosen[..., 1] = 0, own[None, :, None]
    chosen[..., 2] = own[None, :, None] - 1
    (blocks, _, counts), rest = agreed(chosen.to(device), 64, 3, 16, call_of(case, device))
    assert counts.tolist() == [[[5]]]
    assert [x % 2**24 for x in blocks[0, 0, 0, :5].tolist()] == [0, 396, 397, 398, 399]
    assert [x >> 24 for x in blocks[0, 0, 0, :5].tolist()] == [7, 1, 3, 6, 4]
    assert (rest[..., 2:] == -1).all() and torch.equal(rest[..., :2].cpu(), chosen[..., 3:].int())


@pytest.mark.parametrize(("queries", "groups"), TILES)
def test_where_one_is_enough_and_all_are_candidates_it_is_the_union(queries, groups, device):
    """Neighbours alike: what the samples chose is what all chose."""
    torch.manual_seed(4)
    case = Case(100, 500, slots=5, block=8, batch=2)
    chosen, call = alike(case, 1000).to(device), call_of(case, device)
    # the same choices count for all: no block begins after the first query
    chosen = torch.where(chosen > (case.n - case.m) // case.block, -1, chosen)
    (blocks, members, counts), rest = agreed(chosen, queries, groups, 1, call)
    want = lists.unions_by_group(chosen, queries, groups, call)
    assert torch.equal(counts, want[2]) and counts.max() > 1 and (rest == -1).all()
    there = torch.arange(blocks.shape[-1], device=device) < counts[..., None]
    for ours, theirs in ((blocks, want[0]), (members, want[1])):
        assert torch.equal(ours[there], theirs[:, :, :, : blocks.shape[-1]][there])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_choice_may_be_a_view_of_either_type(dtype, device):
    torch.manual_seed(5)
    case = Case(100, heads=2, slots=3, block=8, pattern="messy")
    chosen, call = choose(case, device), call_of(case, device)
    view = chosen.to(dtype).transpose(1, 3).contiguous().transpose(1, 3)
    one, two = (agreed(x, 32, 3, 4, call) for x in (chosen, view))
    there = torch.arange(one[0][0].shape[-1], device=device) < one[0][2][..., None]
    assert torch.equal(one[1], two[1]) and torch.equal(one[0][2], two[0][2])
    assert torch.equal(one[0][0][there], two[0][0][there])
    assert torch.equal(one[0][1][there], two[0][1][there])


def test_no_queries_or_no_slots(device):
    call = call_of(Case(5), device)
    (blocks, _, counts), rest = agreed(torch.zeros(2, 5, 3, 0).int(), 32, 3, 1, call)
    assert (counts == 0).all() and (blocks == 0).all() and rest.shape == (2, 5, 3, 0)
    (_, _, counts), rest = agreed(torch.zeros(0, 5, 3, 2).int(), 32, 3, 1, call)
    assert counts.numel() == rest.numel() == 0


def test_what_fits():
    assert fits(16, 64, 3) and fits(32, 64, 4) and fits(64, 32, 3)
    assert not fits(33, 64, 3) and not fits(1, 8, 8) and not fits(65, 16, 3)


# -- both together ---------------------------------------------------------------------------------


def without(chosen, rest):
    """The choices that are not among the rest."""
    return torch.where((chosen[..., None] == rest[..., None, :]).any(-1), -1, chosen)


def both(least: int, cut=None, queries: int = 16):
    """Attention to what is agreed on, then to the rest, as ``check_forward`` runs it.

    ``cut(chosen)`` instead says what is left to the second.
    """

    def run(q, k, v, chosen, call):
        rest = cut(chosen) if cut else agreed(chosen, queries, 3, least, call)[1]
        first = selection.by_queries(q, k, v, without(chosen, rest), call)
        o, lse = by_keys.forward(q, k, v, rest, call, base=first)
        assert o is first[0] and lse is first[1]
        return o, lse

    return run


@pytest.mark.parametrize(
    "case",
    [
        Case(70, group=2, slots=4, block=8), Case(70, group=4, heads=2, batch=2, block=8),
        Case(40, 90, group=1, slots=16, block=4, d=32, dtype="float16"),
        Case(100, group=1, slots=6, block=4, dtype="float16"), Case(33, pattern="nothing"),
        Case(50, group=2, pattern="first"), Case(60, group=2, slots=5, block=80, pattern="all"),
        Case(90, group=2, lengths=(5, 0, 60, 25), slots=4, block=8, d_v=24),
    ],
    ids=str,
)  # fmt: skip
def test_attention_to_both_is_attention_to_all(case, device):
    check_forward(case, both(2), device)


def halves(chosen):
    """By query: all in the first, all in the second, half in each."""
    i = torch.arange(chosen.shape[1], device=chosen.device)[None, :, None, None] % 3
    slot = torch.arange(chosen.shape[3], device=chosen.device)
    return torch.where((i == 1) | ((i == 2) & (slot % 2 == 1)), chosen, -1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_query_may_have_everything_in_one_and_nothing_in_the_other(dtype, device):
    for cut in (halves, lambda chosen: chosen, lambda chosen: torch.full_like(chosen, -1)):
        case = Case(80, group=2, slots=4, block=8, dtype=dtype, batch=2)
        check_forward(case, both(1, cut), device)


def test_groups_of_lists_and_ranges_of_queries(device, monkeypatch):
    monkeypatch.setattr(by_keys, "RANGE", 16)
    case = Case(90, block=8, slots=3, group=2, heads=2, dtype="float16")

    def run(q, k, v, chosen, call):
        rest = halves(chosen)
        first = selection.by_queries(q, k, v, without(chosen, rest), call)
        return by_keys.forward(q, k, v, rest, call, base=first, workspace=2000)

    check_forward(case, run, device)


def test_rows_with_nothing_left_stay_as_they_are_to_the_bit(device):
    torch.manual_seed(6)
    case = Case(256, group=1, slots=2, block=16)
    q, k, v, _, _, chosen = make(case, device)
    rest = chosen.clone()
    rest[:, :200] = -1
    o, lse = torch.randn_like(q), torch.randn(1, 1, 256, device=device)
    want = o.clone(), lse.clone()
    by_keys.forward(q, k, v, rest, call_of(case, device), base=(o, lse))
    # A program that has nothing to add is gone before it reads; others multiply by 1.
    assert torch.equal(o[:, :128], want[0][:, :128])
    assert torch.equal(lse[..., :128], want[1][..., :128])
    torch.testing.assert_close(o[:, :200], want[0][:, :200])
    assert not torch.equal(o[:, 200:], want[0][:, 200:])


def test_a_sum_in_place_is_not_timed_on_its_own_result(monkeypatch):
    """Timing runs it many times: on outputs of its own, without what is there."""
    timed, ran = [], []

    def fastest(configs, ready):
        for c in configs:
            ready(c)()
        return configs[0], {}

    monkeypatch.setattr(by_keys, "_chosen", {})
    monkeypatch.setattr(by_keys, "backend", lambda: "gpu")
    monkeypatch.setattr(by_keys.tuning, "fastest", fastest)
    monkeypatch.setattr(by_keys.torch.cuda, "is_current_stream_capturing", lambda: False)
    by_keys.best(("a",), ["one", "two"], 1e15, ran.append, timed.append)
    assert (timed, ran) == (["one", "two"], ["one"])


def test_its_result_is_that_of_a_configuration_that_is_known(device, monkeypatch):
    case = Case(64, group=2, slots=4, block=8)
    q, k, v, _, _, chosen = make(case, device)
    call, outs = call_of(case, device), []

    def best(key, configs, flops, run, trial):
        for _ in range(3):
            trial(configs[0])
        run(configs[0])

    for stand_in in (by_keys.best, best):
        monkeypatch.setattr(by_keys, "best", stand_in)
        first = selection.by_queries(q, k, v, chosen[..., :2], call)
        outs.append(by_keys.forward(q, k, v, chosen[..., 2:], call, base=first))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


# -- without a card --------------------------------------------------------------------------------

#: compiles what ``agreed`` would launch, on empty CPU tensors
CHILD = """
import json, sys, torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from labkit.flash import _resources_child as child
from labkit.nsa import agreed
from labkit.nsa.call import Call
JITFunction.run = child._compile_only
agreed.backend = lambda: "gpu"
child.wanted.add("agreed_kernel")
driver.set_active(child.Elsewhere(90))
for queries, groups, slots in json.load(sys.stdin):
    child.compiled.clear()
    chosen = torch.zeros(1, 8192, 2, slots, dtype=torch.int32)
    agreed.agreed(chosen, queries, groups, 8, Call(scale=0.1, max_q=8192, max_k=8192))
    [(_, kernel)] = child.compiled
    print(json.dumps((kernel.metadata.num_warps, *child._read_binary(kernel.asm["cubin"], False))))
"""

WANTED = [(64, 3, 16), (16, 3, 16), (64, 4, 32)]


@pytest.mark.slow
def test_the_kernel_fits_the_card():
    """Nothing spilled, and at least two warps for each scheduler of a multiprocessor."""
    for name, (warps, usage, _) in compiled_elsewhere(CHILD, WANTED).items():
        numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        assert int(numbers["STACK"]) + int(numbers["LOCAL"]) == 0, name
        programs = 65536 // (int(numbers["REG"]) * warps * 32)
        assert programs * warps >= 8, name


# -- on a card -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 2, 4])
def test_both_on_a_card(group):
    case = Case(1024, group=group, heads=2, d=128, block=64, slots=8, dtype="bfloat16")
    check_forward(case, both(4, queries=64 // group), "cuda")
    check_forward(replace(case, lengths=(100, 0, 600, 324)), both(4, queries=64 // group), "cuda")


@pytest.mark.gpu
def test_it_never_waits_for_the_host_and_repeats_to_the_bit():
    case = Case(4096, heads=4, slots=16, block=64)
    chosen, call = choose(case, "cuda"), call_of(case, "cuda")
    (_, _, counts), first = agreed(chosen, 64, 3, 8, call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [agreed(chosen, 64, 3, 8, call) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(counts.max()) > 0 and int(first.max()) > 0
    for (_, _, n), rest in again:
        assert torch.equal(n, counts) and torch.equal(rest, first)
