"""The choice of a configuration: what is never tried, what is timed, what is kept, what is read.

No GPU is needed: the problem says which card it is for, and the clock is a table.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from labkit.flash import tuning
from labkit.flash.tuning import KINDS, Config, Problem

#: compute capability → (KiB of shared memory for one block, multiprocessors)
CARDS = {
    80: (163, 108), 86: (99, 28), 89: (99, 76), 90: (227, 132), 100: (227, 148), 120: (99, 170)
}  # fmt: skip


def problem(kind="forward", arch=90, **changes) -> Problem:
    """A problem of ordinary size for a card of that compute capability."""
    shared, sms = CARDS[arch]
    values = dict(
        kind=kind, dtype="bfloat16", precision="ieee", head_dim=128, head_dim_v=128, rows=4096,
        cols=4096, heads=64, causal=False, windowed=False, descriptors=arch >= 90,
        by_hand="left out here", arch=arch, shared_limit=shared * 1024, sms=sms,
    )  # fmt: skip
    return Problem(**(values | changes))


EVERY = [
    problem(kind, arch, dtype=dtype, precision=precision, head_dim=d, head_dim_v=dv, rows=n, cols=n)
    for kind in KINDS for arch in CARDS
    for dtype, precision in (("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32x3"))
    for d, dv in ((16, 16), (64, 64), (128, 128), (192, 128), (256, 256))
    for n in (1, 64, 4096)
]  # fmt: skip


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Times by table instead of by GPU, and a cache of the test's own."""
    import triton.testing

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("LABKIT_TUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.testing, "do_bench", lambda launch, **how: launch())
    tuning.forget()
    yield tmp_path
    tuning.forget()


def timed(best: Config, log: list | None = None):
    """A ``ready`` under which ``best`` takes 1 ms and everything else 2."""

    def ready(config: Config):
        if log is not None:
            log.append(config)
        return lambda: 1.0 if config == best else 2.0

    return ready


@pytest.mark.parametrize("known", EVERY, ids=lambda p: f"{p.arch}-{p.key}")
def test_nothing_larger_than_the_cards_shared_memory_is_ever_tried(known):
    configs = [*tuning.space(known), tuning.default(known)]
    assert configs
    assert max(tuning.shared_bytes(c, known) for c in configs) <= known.shared_limit


def test_the_fastest_is_chosen_and_asked_for_once(clock):
    known, log = problem(), []
    best = tuning.space(known)[3]
    assert tuning.choose(known, 1e12, timed(best, log)) == best
    assert log == tuning.space(known)
    assert tuning.choose(known, 1e12, timed(best, log)) == best
    assert len(log) == len(tuning.space(known)), "it was timed again"


def test_the_choice_outlives_the_process(clock):
    known, log = problem("dq"), []
    best = tuning.space(known)[1]
    tuning.choose(known, 1e12, timed(best))
    tuning.forget()  # what a new process knows
    assert tuning.choose(known, 1e12, timed(tuning.space(known)[0], log)) == best
    assert log == []
    kept = json.loads(tuning.cache_file().read_text("utf-8"))
    assert len(kept[known.key]["ms"]) == len(tuning.space(known))


def test_two_kinds_of_problem_do_not_share_a_choice(clock):
    known = problem()
    others = [
        replace(known, **{name: value}) for name, value in (
            ("kind", "dq"), ("dtype", "float16"), ("head_dim", 64), ("head_dim_v", 64),
            ("causal", True), ("windowed", True), ("descriptors", False), ("heads", 1),
            ("by_hand", None),
        )
    ] + [replace(known, rows=128, cols=128)]  # fmt: skip
    keys = {p.key for p in [known, *others]}
    assert len(keys) == len(others) + 1


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": {"config": {"nonsense": 1}}}', "null"])
def test_a_damaged_file_costs_a_measurement_and_no_crash(clock, text):
    tuning.cache_file().parent.mkdir(parents=True, exist_ok=True)
    tuning.cache_file().write_text(text, "utf-8")
    known = problem()
    best = tuning.space(known)[2]
    assert tuning.choose(known, 1e12, timed(best)) == best
    assert json.loads(tuning.cache_file().read_text("utf-8"))[known.key]


def test_another_kernel_is_another_file(clock, monkeypatch):
    before = tuning.cache_file()
    monkeypatch.setattr(tuning, "_kernels_version", lambda: "changed")
    assert tuning.cache_file() != before


def test_what_cannot_run_is_left_out(clock):
    from triton.runtime.errors import OutOfResources

    known = problem()
    first, *rest = tuning.space(known)

    def ready(config):
        if config == first:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return lambda: 1.0 if config == rest[-1] else 2.0

    best, times = tuning.fastest([first, *rest], ready)
    assert best == rest[-1] and len(times) == len(rest)


@pytest.mark.parametrize(
    "flops, tune, capturing", [(1e6, "1", False), (1e12, "0", False), (1e12, "1", True)]
)
def test_small_work_a_switch_and_a_graph_take_the_rule(clock, monkeypatch, flops, tune, capturing):
    monkeypatch.setenv("LABKIT_TUNE", tune)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    log: list[Config] = []
    known = problem()
    assert tuning.choose(known, flops, timed(Config(16, 16), log)) == tuning.default(known)
    assert log == []


def test_a_smaller_configuration_exists_down_to_the_least():
    config, seen = Config(128, 128, 8, 3), []
    while config is not None:
        seen.append(config)
        config = tuning.smaller(config)
    assert seen[-1].block_m == seen[-1].block_n == 16 and seen[-1].num_stages == 1
    sizes = [c.block_m * c.block_n * c.num_stages for c in seen]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
