"""The forward kernel written by hand for Hopper: compiled here without a card, right on one.

Only the compiler's log says whether it is worth having (products made to wait for each other,
registers spilled), so the binary is read.  What it computes is judged on a Hopper card.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hopper_reasons import (
    OnHopper,
    check_off_hopper,
    check_unreadable,
    compiled_elsewhere,
    pretend,
)
from nsa_cases import Case, call_of, check_forward, make

from labkit.nsa import hopper, selection
from labkit.nsa.call import Call

CALL = Call(scale=0.1, max_q=300, max_k=300)

# -- without a card ------------------------------------------------------------------------------

#: compiles what ``forward`` would launch, on empty CPU tensors: a plan, stopped after compiling
CHILD = """
import json, sys, torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from labkit.flash import _resources_child as child
from labkit.nsa import hopper
from labkit.nsa.call import Call
JITFunction.run = child._compile_only
child.wanted.add("forward_kernel")
driver.set_active(child.Elsewhere(90))
for d, index, group, block, varlen, more in json.load(sys.stdin):
    child.compiled.clear()
    q, k = (torch.empty(1, 300, h, d, dtype=torch.bfloat16) for h in (2 * group, 2))
    cu = torch.tensor([0, 100, 300], dtype=torch.int32) if varlen else None
    call = Call(scale=0.1, block_size=block, max_q=300, max_k=300, cu=cu)
    config = hopper.CONFIGS[d][index]
    union = [torch.empty(1, 2, 40, 5, dtype=torch.int32) for _ in range(3)]
    lse = torch.empty(1, 2 * group, 300)
    plan = hopper._Plan(q, k, k, q, call, 5, config, more)
    plan(q, k, k, q, (q, q), lse, lse, union, call)
    kernel = child.compiled[-1][1]
    usage, sass = child._read_binary(kernel.asm["cubin"], True)
    print(json.dumps([usage, sass, kernel.metadata.shared]))
"""

#: (head_dim, number of the configuration, group, block_size, varlen, branches to add)
WANTED = [
    (d, i, 16, 64, False, 0) for d, known in hopper.CONFIGS.items() for i in range(len(known))
]
WANTED += [(128, 0, 16, 64, True, 0), (128, 0, 8, 128, False, 0)]
WANTED += [(128, 0, 16, 64, False, 1), (128, 0, 16, 64, False, 2)]
#: tiles of more than 32 queries
WANTED += [(128, 0, 1, 64, False, 0), (128, 0, 4, 64, True, 0), (128, 0, 2, 64, False, 2)]
#: bytes of a thread that may wait in memory, by branches to add: what the sum needs
SPILLS = {0: 0, 1: 32, 2: 64}
#: the same for a small group, whose words need more addresses
SMALL_SPILLS = {0: 0, 1: 64, 2: 96}


@pytest.fixture(scope="module")
def compiled():
    """{what was wanted: (usage, SASS, bytes of shared memory)}."""
    return compiled_elsewhere(CHILD, WANTED)


@pytest.mark.slow
def test_every_configuration_fits_the_card(compiled):
    for name, (usage, _, shared) in compiled.items():
        numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        config = hopper.CONFIGS[name[0]][name[1]]
        groups, registers, loader = hopper._GROUPS[config.by_hand]
        assert shared <= 227 * 1024, name
        spills = (SPILLS if name[2] >= 8 else SMALL_SPILLS)[name[5]]
        assert int(numbers["STACK"]) + int(numbers["LOCAL"]) <= spills, f"{name}: spills"
        # what every warp starts with; the groups then divide the multiprocessor among themselves
        assert int(numbers["REG"]) * 128 * (groups + 1) <= 65536, name
        assert 128 * (groups * registers + loader) <= 65536, name


@pytest.mark.slow
def test_the_loader_hands_its_registers_over(compiled):
    """``setmaxnreg`` is in the binary: the compiler leaves it out where it finds too few."""
    for name, (_, sass, _) in compiled.items():
        groups = hopper._GROUPS[hopper.CONFIGS[name[0]][name[1]].by_hand][0]
        assert sass.count("USETMAXREG") >= groups, name


@pytest.mark.slow
def test_products_take_no_detour(compiled):
    """wgmma, and not one wait per instruction: a serialised product would bring its own."""
    for name, (_, sass, _) in compiled.items():
        d, index, _, block, *_ = name
        config = hopper.CONFIGS[d][index]
        groups = hopper._GROUPS[config.by_hand][0]
        per_tile = d // 16 + config.block_n // 16
        products = sass.count("HGMMA.")
        assert products == groups * per_tile * (block // config.block_n), name
        assert sass.count("WARPGROUP.DEPBAR") <= 2 * products // per_tile, name
        assert not re.search(r"\bHMMA\.", sass), name


@pytest.mark.slow
def test_tiles_come_by_the_copy_engine_and_leave_by_it(compiled):
    for name, (_, sass, _) in compiled.items():
        assert "UTMALDG" in sass, name
        assert ("UTMASTG" in sass) == (not name[4]), name  # varlen: not into the next sequence


def test_without_a_hopper_card_there_is_a_reason(monkeypatch):
    q = torch.zeros(1, 300, 16, 128, dtype=torch.bfloat16)
    assert hopper.supports(q, q, q, CALL) is hopper.supports(None, q, q, CALL) is False
    check_off_hopper(monkeypatch, lambda *qkv: hopper.why_not(*qkv, CALL), q)


def test_reasons_name_what_is_wrong_with_the_tensors(monkeypatch):
    """What they say of tensors on a Hopper card, said here by pretending that this is one."""
    pretend(monkeypatch)

    def why(q, k=None, v=None, **call):
        k = q[:, :, :2] if k is None else k
        tensors = (x.as_subclass(OnHopper) for x in (q, k, k if v is None else v))
        return hopper.why_not(*tensors, replace(CALL, **call))

    good = torch.zeros(2, 33, 32, 64, dtype=torch.float16)
    check_unreadable(why, good, good[:, :, :2])
    assert why(good, block_size=128) is None
    assert why(torch.zeros(2, 32, 33, 128, dtype=torch.bfloat16).transpose(1, 2)) is None
    assert "head_dim" in why(good[..., :32]) and "head_dim" in why(good, v=good[:, :, :2, :32])
    assert "block_size" in why(good, block_size=32)
    for group in (3, 5, 12, 128):
        assert "group" in why(good[:, :, :1].repeat(1, 1, group, 1), good[:, :, :1])
    for group in (1, 2, 4, 8, 16, 32, 64):
        assert why(good[:, :, :1].repeat(1, 1, group, 1), good[:, :, :1]) is None


def test_a_tile_has_a_bit_for_each_of_its_queries():
    for d in hopper.CONFIGS:
        for group in (1, 2, 4, 8, 16, 32, 64):
            q = torch.zeros(1, 1, group, d)
            config = hopper.config_for(q, q[:, :, :1], CALL)
            assert hopper.tile_of(group, config) * group == config.block_m
            assert hopper.tile_of(group, config) <= 32 or group < 4
            q = q.expand(1, 1024, group, d)
            config = hopper.config_for(q, q[:, :, :1], CALL)
            assert (
                (hopper.tile_of(group, config) > 32)
                == (group < 8)
                == bool(hopper._words(group, config))
            )


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32, 64])
def test_a_union_has_as_many_words_as_the_kernel_reads(device, group):
    for d in hopper.CONFIGS:
        q = torch.zeros(1, 70, group, d, device=device, dtype=torch.bfloat16)
        k, call = q[:, :, :1], replace(CALL, max_q=70, max_k=70)
        config = hopper.config_for(q, k, call)
        chosen = torch.zeros(1, 70, 1, 2, dtype=torch.int32, device=device)
        plan = hopper._Plan(q, k, k, q, call, 2, config, 0)
        words = max(1, plan.launch.constants["WORDS"])
        blocks, members, counts = hopper.unions(chosen, group, config, call, 70)
        assert counts.tolist() == [[[1] * -(-70 // plan.tile)]]
        assert members.numel() == blocks.numel() * words
        found = members[:, :, :, 0].flatten().tolist()  # everybody chose block 0
        assert sum((x % 2**32).bit_count() for x in found) == 70


@pytest.mark.parametrize(("blocks", "road"), [(9 * 16, "hopper"), (9 * 16 + 1, "both")])
def test_a_small_group_goes_along_unions_where_there_are_few_blocks(monkeypatch, blocks, road):
    monkeypatch.setattr(selection, "card", lambda q: (90, 0, 0, 0))
    q, k = (torch.zeros(1, 1024, h, 64, dtype=torch.float16).as_subclass(OnHopper) for h in (4, 4))
    monkeypatch.setattr(hopper, "off_hopper", lambda *x: None)
    call = replace(CALL, max_q=1024, max_k=64 * blocks)
    assert selection._choose(q, k, k, 16, call) == road
    assert selection._choose(q, k[:, :, :1], k[:, :, :1], 16, call) == road
    # more slots than a program of agreed.py has registers for
    assert selection._choose(q, k, k, 65, replace(call, max_k=64 * (9 * 65 + 1))) == "keys"
    # nor with as many tiles for each of many short sequences as for the longest
    ragged = replace(call, max_k=64 * (9 * 16 + 1), cu=torch.tensor([0, 1000, 1024]))
    assert selection._choose(q, k, k, 16, ragged) == "keys"
    few = q[:, :1000]  # what they would share, a tile would mostly not have
    assert selection._choose(few, k, k, 16, call) == "queries"
    assert selection._choose(few, k[:, :, :1], k[:, :, :1], 16, call) == "hopper"
    q = q.repeat(1, 1, 2, 1)  # groups of 8
    assert selection._choose(q, k[:, :, :1], k[:, :, :1], 16, call) == "hopper"


def named(union, queries, groups, m):
    """``[B, M, H, cap]``: the blocks that a tile's warpgroups read for each query, else −1."""
    blocks, members, counts = union
    b, h, _, cap = blocks.shape
    bits, words = min(queries, 32), -(-queries // 32)
    i = torch.arange(m)
    tile, at = i // (queries * groups), i % (queries * groups)
    group, word, bit = at // queries, at // bits, at % bits
    entry, there = blocks[:, :, tile], torch.arange(cap) < counts[:, :, tile, None]
    mine = (entry >> (24 + group)[:, None]) & 1
    asked = members[:, :, tile, :, :].gather(-1, word.view(1, 1, m, 1, 1).expand(b, h, m, cap, 1))
    chose = (asked[..., 0] >> bit[:, None]) & 1
    assert members.shape[-1] == groups * words
    found = torch.where(there & (mine == 1) & (chose == 1), entry & 0xFFFFFF, -1)
    return found.transpose(1, 2).contiguous()


@pytest.mark.parametrize(
    ("group", "pattern"), [(1, "random"), (1, "messy"), (2, "all"), (4, "messy")]
)
def test_what_is_agreed_goes_by_hand_and_the_rest_by_keys(monkeypatch, group, pattern):
    """Where no card is, ``by_queries`` reads what the kernel by hand would be given."""
    if torch.cuda.is_available():
        pytest.skip("on a card the kernel itself is judged")
    case, given = Case(250, group=group, heads=2, d=64, block=8, slots=4, pattern=pattern), []

    def stand_in(q, k, v, block_indices, call, *, config, union):
        config_words = hopper._words(group, config)
        assert config_words and union[1].shape[-1] == config_words
        mine = named(union, 64 // group, hopper.groups_of(config), q.shape[1])
        given.append(mine)
        return selection.by_queries(q, k, v, mine, call)

    monkeypatch.setattr(hopper, "forward", stand_in)
    check_forward(case, lambda *a: selection.forward(*a, road="both"), "cpu")
    assert given and all((mine >= 0).any() for mine in given)


# -- the sum as its last step --------------------------------------------------------------------


def test_what_can_be_added():
    """Where Q's place is free and the copy engine finds the others where it finds O."""
    q = torch.zeros(2, 33, 32, 128, dtype=torch.bfloat16)
    assert hopper.can_add(q, [q], CALL) and hopper.can_add(q, [q, q], CALL)
    assert not hopper.can_add(q, [], CALL) and not hopper.can_add(q, [q] * 3, CALL)
    assert not hopper.can_add(q, [q.half()], CALL) and not hopper.can_add(q, [q[:, :-1]], CALL)
    assert not hopper.can_add(q, [q, q.transpose(0, 1).contiguous().transpose(0, 1)], CALL)
    assert not hopper.can_add(q[..., :64], [q[..., :64].contiguous()], CALL)
    shifted = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)  # not on 16 bytes
    assert not hopper.can_add(q, [q, shifted], CALL)
    cu = torch.tensor([0, 33], dtype=torch.int32)
    assert not hopper.can_add(q, [q], replace(CALL, cu=cu))


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def _whole(kind: str, n: int, off: str | None, gates: str, kv: int):
    """q, k, v in ``kind`` and gates, one of which may be off; 32 heads over ``kv``."""
    from labkit.dtypes import torch_dtype

    dtype = torch_dtype(kind)
    torch.manual_seed(n)
    q, k, v = (torch.randn(2, n, h, 128, device="cuda", dtype=dtype) for h in (32, kv, kv))
    g = {name: torch.rand(2, n, 32, 2, device="cuda")[..., 0] for name in ("cmp", "slc", "swa")}
    g = {name: x.to(dtype if gates == "same" or (gates == "mixed" and name == "slc") else x.dtype)
         for name, x in g.items()}  # fmt: skip
    return q, k, v, [None if name == off else x for name, x in g.items()]


#: tiles of 48 to 256 queries: more, fewer and exactly as many queries; all that a case can have
SMALL = [
    Case(m, group=group, heads=heads, d=d, block=block, slots=4, dtype=dtype, pattern=pattern)
    for group, heads in ((1, 3), (2, 2), (4, 1))
    for m, d, block, dtype, pattern in (
        (1, 128, 64, "bfloat16", "random"), (63, 64, 64, "float16", "messy"),
        (192, 128, 64, "bfloat16", "random"), (500, 64, 64, "bfloat16", "messy"),
        (500, 128, 128, "float16", "random"), (1025, 128, 64, "bfloat16", "random"),
        (1100, 64, 128, "float16", "messy"),
        (300, 128, 64, "bfloat16", "nothing"), (400, 64, 128, "float16", "all"),
    )
]  # fmt: skip
SMALL += [
    Case(500, group=group, d=128, block=64, slots=4, dtype="bfloat16", batch=2, n=900)
    for group in (1, 2, 4)
]
SMALL += [  # many more blocks than fit into a word
    Case(m, group=group, d=128, block=64, slots=4, dtype="bfloat16", pattern="messy", n=20_000)
    for m in (300, 1030) for group in (1, 2, 4)
]  # fmt: skip
SMALL += [
    Case(1300, group=group, d=d, block=64, slots=4, dtype="bfloat16", lengths=(5, 0, 1031, 64, 200))
    for group in (1, 2, 4) for d in (64, 128)
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_groups_are_within_the_bound(case):
    check_forward(case, lambda *a: selection.forward(*a, road="hopper"), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_what_is_agreed_and_the_rest_are_within_the_bound(case):
    check_forward(case, lambda *a: selection.forward(*a, road="both"), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("road", ["hopper", "both"])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_small_groups_give_equal_bits_each_time(group, road):
    case = Case(2000, group=group, heads=4, d=128, block=64, slots=16, dtype="bfloat16")
    q, k, v, _, _, chosen = make(case, "cuda")
    call = call_of(case, "cuda")
    first = selection.forward(q, k, v, chosen, call, road=road)
    for _ in range(50):
        again = selection.forward(q, k, v, chosen, call, road=road)
        assert all(map(torch.equal, first, again))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("kind", "n", "off", "gates", "kv"),
    [("bfloat16", 1, None, "same", 2), ("bfloat16", 65, None, "float32", 2),
     ("float16", 500, None, "same", 2),
     ("bfloat16", 1500, None, "mixed", 2), ("bfloat16", 500, "cmp", "same", 2),
     ("float16", 300, "swa", "float32", 2), ("bfloat16", 4097, None, "same", 2),
     ("bfloat16", 1500, None, "same", 8), ("float16", 1100, "cmp", "same", 16),
     ("bfloat16", 4097, None, "float32", 32)],
)  # fmt: skip
def test_the_sum_is_that_of_the_branches_but_for_rounding(monkeypatch, kind, n, off, gates, kv):
    """In one kernel and in four: the same branches, whose roundings are all that differs."""
    from labkit.nsa import nsa_func, ops

    q, k, v, g = _whole(kind, n, off, gates, kv)
    used, add = [], ops.add_selected
    monkeypatch.setattr(ops, "add_selected", lambda *a: used.append(add(*a)) or used[-1])
    with torch.no_grad():
        together, weights = nsa_func(q, k, v, *g, window_size=100, return_attn_weights=True)
        again = [nsa_func(q, k, v, *g, window_size=100) for _ in range(5)]
    assert all(x is not None for x in used) and len(used) == 6
    assert all(torch.equal(together, x) for x in again)
    apart, known = nsa_func(q.requires_grad_(), k, v, *g, window_size=100, return_attn_weights=True)
    assert torch.equal(weights["selection"]["lse"], known["selection"]["lse"])
    wide = [None if x is None else x.double() for x in g]
    alone = [nsa_func(q.detach(), k, v, *[
        None if x is None else torch.ones_like(x) if i == j else torch.zeros_like(x)
        for j, x in enumerate(g)
    ], window_size=100) for i in range(3) if g[i] is not None]  # fmt: skip
    wanted = sum(
        w[..., None] * o.double()
        for w, o in zip([w for w in wide if w is not None], alone, strict=True)
    )
    # These branches were rounded, as they are for the sum of its own, and not for the kernel's.
    ours = (together.double() - wanted).norm()
    theirs = (apart.detach().double() - wanted).norm()
    assert ours <= 2 * theirs + 1e-6 * wanted.norm(), (ours, theirs)
