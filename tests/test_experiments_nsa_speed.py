"""The experiment of chapter 13: what it counts on a CPU, and what it makes of times."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from labkit import records
from labkit.errors import ArgumentError
from labkit.experiments import Result, nsa_speed
from labkit.nsa import model
from labkit.nsa.model import PATTERNS, Shape

SMALL = Shape(
    seq_len=128, heads=4, kv_heads=1, head_dim=16, block_size=16, count=4, window=32,
    dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_choices_are_causal_ascending_distinct_and_hold_the_forced_ones(pattern):
    shape = Shape(seq_len=1000, kv_heads=2, block_size=32, count=6)
    blocks = nsa_speed.choices(shape, pattern)
    assert blocks.shape == (1, 1000, 2, 6) and blocks.dtype == torch.int32
    for t in (0, 31, 32, 500, 999):
        own = t // 32
        for head in range(2):
            row = blocks[0, t, head].tolist()
            real = [c for c in row if c >= 0]
            assert row == real + [-1] * (6 - len(real))
            assert real == sorted(set(real)) and len(real) == min(6, own + 1)
            assert {0, own, max(0, own - 1)} <= set(real) and max(real) == own


def test_unions_counted_are_those_of_sets_and_near_the_model():
    shape = Shape(seq_len=2048, kv_heads=2)
    for pattern in PATTERNS:
        blocks = nsa_speed.choices(shape, pattern)
        counted = nsa_speed.counted_unions(blocks, 16)
        sets = [
            len({c for t in range(16 * x, 16 * x + 16) for c in blocks[0, t, h].tolist()} - {-1})
            for x in range(128) for h in range(2)
        ]  # fmt: skip
        assert counted == pytest.approx(sum(sets) / 256)
        assert counted == pytest.approx(model.union_blocks(shape, 16, pattern) / 128, rel=0.05)


def test_the_interpreter_counts_the_bytes_that_the_model_has():
    if torch.cuda.is_available():
        pytest.skip("bytes are counted in the interpreter")
    result = nsa_speed.run(quick=True, device="cpu", parts=["traffic"])
    assert result.notes == []
    for pattern in PATTERNS:
        blocks = nsa_speed.choices(SMALL, pattern)
        # G = 4: 16 queries share the 64 rows of a tile
        unions = nsa_speed.counted_unions(blocks, 16) * 128 / 16
        kv = unions * SMALL.block_size * SMALL.key_bytes
        assert result.value(f"counted.queries.{pattern}.kv") == kv
        assert result.value(f"counted.keys.{pattern}.kv") == model.by_keys_bytes(SMALL)["kv"]
    (row,) = result.select(part="traffic", road="keys", pattern="random")
    parts = model.slots(SMALL) * SMALL.group * SMALL.v * 4
    assert row["moved"]["parts.store"] == row["moved"]["parts.load"] == parts


def test_crossing_is_where_the_ratio_passes_one_for_good():
    cross = nsa_speed.crossing
    assert cross([1024, 4096], [0.5, 2.0]) == pytest.approx(2048)
    assert cross([4096, 1024], [2.0, 0.5]) == pytest.approx(2048), "in any order"
    assert cross([1, 2, 4, 8], [2.0, 0.5, 0.5, 2.0]) > 4, "the last time it rises"
    assert cross([1024, 2048], [1.5, 3.0]) == 1024
    assert cross([1024, 2048], [0.1, 0.2]) is None
    assert cross([], []) is None


def made() -> Result:
    """Times that a card might have: dense grows as T², every branch as T."""
    result = Result()
    for n in (2048, 8192, 32768):
        for what, factor in (("forward", 1.0), ("backward", 2.5)):
            dense = factor * (n / 8192) ** 2 * 2e-3
            result.add(f"dense.{what}.n{n}", dense, "s", "made up")
            times = {"dense": dense}
            for who, share in (("labkit", 0.25e-3), ("fla", 1e-3)):
                times[f"selection.{who}.random"] = factor * n / 8192 * share
                times[f"whole.{who}.random"] = factor * n / 8192 * 2 * share
            nsa_speed._ratios(result, times, what, n, "made up")
            for name, share in (("selection", 0.5), ("compression", 0.3), ("gates", 0.2)):
                seconds = factor * n / 8192 * 1e-3 * share
                result.add(f"branch.{name}.{what}.n{n}", seconds, "s", "made up")
    for group, seconds in ((16, 1e-3), (1, 1.5e-3)):
        key = f"group.labkit.random.forward.g{group}"
        result.add(key, seconds, "s", "made up")
        result.add(f"{key}.n32768", seconds**2, "s", "made up")
    for name, power in (("torch", 2), ("fused", 1)):
        for n in (4096, 8192, 16384):
            result.add(f"topk.{name}.n{n}", (n / 4096) ** power, "s", "made up")
        for s in (4, 64):
            result.add(f"topk.{name}.s{s}", 1.0, "s", "made up")
    nsa_speed._summarise(result)
    return result


def test_ratios_name_who_is_faster():
    result = made()
    assert result.value("selection.vs_fla.random.forward.n8192") == 0.25
    assert result.value("selection.speedup.random.forward.n8192") == pytest.approx(8)
    assert result.value("whole.speedup.random.backward.n2048") == pytest.approx(1)
    assert result.value("crossover.whole.random.forward") == pytest.approx(2048)
    assert "faster at 2048 already" in result.how("crossover.whole.random.forward")
    assert result.value("group.ratio.random.forward.g1") == pytest.approx(1.5)
    assert result.value("group.ratio.random.forward.g1.n32768") == pytest.approx(2.25)
    assert result.value("group.ratio.worst") == pytest.approx(1.5)
    assert result.value("topk.torch.exponent") == pytest.approx(2)
    assert result.value("topk.fused.exponent") == pytest.approx(1)
    assert result.value("topk.torch.s_ratio") == 1


def test_a_card_with_less_arithmetic_for_its_bandwidth_crosses_earlier():
    result = made()
    here = nsa_speed.crossover_on("h200", result)
    assert here == pytest.approx(4096)
    # the same bandwidth per SM and clock, a third of the tensor peak: dense suffers more
    assert nsa_speed.crossover_on("a100-sxm-80", result) < here
    with pytest.raises(ArgumentError, match="passes"):
        nsa_speed.crossover_on("h200", result, "sideways")


def test_profiled_kernels_become_bytes_beside_the_model():
    result = Result()
    kernel = {"kernel": "by_queries_kernel(x)", "dram_read": 5e8, "dram_write": 1e8,
              "l2": 2.5e10, "seconds": 5e-3}  # fmt: skip
    small = {**kernel, "kernel": "sort", "l2": 1e9, "seconds": 6e-3}
    problem = {"seq_len": 32768, "dtype": "bfloat16"}
    # two chunks of one kernel are one kernel, and longer than the sort together
    nsa_speed.add_counters(result, problem, [(("random", "queries"), [kernel, small, kernel])])
    assert result.value("l2.queries.random") == 5.1e10
    assert result.value("l2.queries.random.kernel") == 5e10
    assert result.value("l2.queries.random.rate") == pytest.approx(5e12)
    expected = sum(model.by_queries_bytes(Shape(seq_len=32768), 4).values())
    assert result.value("model.queries.random") == pytest.approx(expected)
    assert len(result.select(part="counters", step="queries")) == 3
    # a list that is cut into pieces loads its block once for each
    assert nsa_speed._predicted(Shape(seq_len=32768), "keys", "local") > sum(
        model.by_keys_bytes(Shape(seq_len=32768))[part] for part in ("kv", "rows")
    )
    assert nsa_speed._predicted(Shape(seq_len=32768), "unknown", "local") is None


def test_a_part_that_fails_leaves_a_note(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(nsa_speed, "_patterns", broken)
    result = nsa_speed.run(quick=True, device="cpu", parts=["patterns"])
    assert len(result.notes) == 2 and all("no such kernel" in note for note in result.notes)
    with pytest.raises(ArgumentError, match="part"):
        nsa_speed.run(quick=True, device="cpu", parts=["everything"])


def plan_of(*parts, **more):
    return {"dtype": "float32", "rep_ms": 1, "parts": parts, **more}


def on_a_gpu(monkeypatch, plan, **parts):
    """A full run on a card that is not there: its plan and its parts are made up."""
    monkeypatch.setattr(nsa_speed, "_plan", lambda quick, device: plan)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name, function in parts.items():
        monkeypatch.setattr(nsa_speed, f"_{name}", function)


def add_one(result, plan, device, item):
    result.add(f"branch.{item}", 1.0, "s", "made up")


@pytest.mark.parametrize("how", ["budget", "told"])
def test_a_run_whose_time_is_over_has_what_it_measured(monkeypatch, how):
    def slow(result, plan, device, item):
        result.add("dense.forward.n1", 1.0, "s", "made up")
        if how == "told":
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(30)
        except Exception:  # as parts do, for functions that cannot run
            pytest.fail("this is no failure of a function")

    plan = plan_of("branches", "sweep", "topk", branches=["a"], sweep=[1], topk=["b"])
    on_a_gpu(monkeypatch, plan, branches=add_one, sweep=slow, topk=add_one)
    monkeypatch.setattr(
        nsa_speed,
        "_LONG",
        {(part, x): 0.0 for part, x in (("branches", "a"), ("sweep", 1), ("topk", "b"))},
    )
    begin, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
    result = nsa_speed.run(quick=False, device="cuda", budget_s=0.5 if how == "budget" else 20)
    assert time.monotonic() - begin < 10
    assert {"branch.a", "dense.forward.n1"} <= set(result.results)
    why = "its budget" if how == "budget" else "it was told to end"
    assert [note.split(":")[0] for note in result.notes] == ["sweep 1", "topk b"]
    assert all(why in note for note in result.notes)
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    records.new_record("nsa_speed", result.results, result.rows, "test")


def test_what_needs_no_peer_comes_first_and_no_compiler_runs_beside_it(monkeypatch):
    done = []

    class Compilers(nsa_speed._Compilers):
        def start(self, jobs):
            done.append(f"start {'fla' if any('fla' in job for job in jobs) else 'ours'}")
            self.running["x"] = None

        def wait(self, jobs, seconds):
            assert 0 < seconds <= nsa_speed.BUDGET_S
            done.append("wait")

        def _signal(self, number):
            done.append(number.name)
            return False

        def __exit__(self, *error): ...

    def note(name):
        return lambda result, plan, device, item: done.append(f"{name} {item}")

    parts = ("sweep", "branches", "peers")
    plan = plan_of(*parts, warm=True, sweep=[131072, 2048], branches=[131072], peers=["p"])
    on_a_gpu(monkeypatch, plan, **{name: note(name) for name in parts})
    monkeypatch.setattr(nsa_speed, "_Compilers", Compilers)
    monkeypatch.setattr(nsa_speed, "_has_fla", lambda: True)
    result = nsa_speed.run(quick=False, device="cuda")
    assert result.notes == []
    assert done == [
        "start ours", "start fla", "wait", "SIGSTOP", "sweep 2048", "sweep 131072",
        "branches 131072", "SIGCONT", "peers p",
    ]  # fmt: skip
    done.clear()
    monkeypatch.setattr(nsa_speed, "_has_fla", lambda: False)
    result = nsa_speed.run(quick=False, device="cuda")
    assert "peers p" not in done and "not installed" in result.notes[0]


def test_a_full_run_measures_what_the_chapter_quotes_and_fla_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    plan = nsa_speed._plan(False, "cuda")
    assert plan["parts"][-1] == "peers" and {"sweep", "memory", "error"} < set(plan["parts"])
    assert set(plan["parts"]) <= set(nsa_speed.PARTS)
    assert {value for part, value in plan["peers"] if part == "sweep"} == {8192, 32768}
    assert set(plan["sweep"]) == set(plan["branches"])


def test_compilers_sleep_and_wake_and_leave_no_process(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(
        "import sys, time\n"
        "if sys.argv[-1] == 'bad': sys.exit('no such kernel')\n"
        "for _ in range(20 if sys.argv[-1] == 'good' else 999): time.sleep(0.05)\n"
    )
    popen = nsa_speed.subprocess.Popen
    monkeypatch.setattr(
        nsa_speed.subprocess, "Popen",
        lambda command, **how: popen([command[0], str(script), command[4]], **how),
    )  # fmt: skip
    result = Result()
    with nsa_speed._Compilers(result, "float32") as compilers:
        compilers.start(["bad", "good", "slow"])
        processes = {job: process for job, (process, _) in compilers.running.items()}
        compilers.wait(["bad"], 20)
        compilers.sleep()
        stopped = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        assert os.waitid(os.P_PID, processes["slow"].pid, stopped) is not None
        compilers.finish(3)
        assert processes["good"].returncode == 0
        assert processes["slow"].returncode == -signal.SIGKILL
        compilers.start(["slow"])
        last = compilers.running["slow"][0]
    assert last.returncode == -signal.SIGKILL
    assert result.notes[0] == "compiling bad failed: no such kernel"
    assert result.notes[1].startswith("compiling slow took longer than 3 s")
    assert [row["item"] for row in result.rows] == ["compiling", "compiling"]


def test_peers_add_their_figures_and_leave_those_that_are_there(monkeypatch):
    def sweep(result, plan, device, n, fla):
        assert fla
        result.add("dense.forward.n8", 2.0, "s", "beside fla")
        result.add("selection.fla.random.forward.n8", 4.0, "s", "made up")
        result.rows.append({"part": "peers"})
        raise RuntimeError("out of memory")

    monkeypatch.setattr(nsa_speed, "_sweep", sweep)
    result = Result()
    result.add("dense.forward.n8", 1.0, "s", "the sweep's")
    with pytest.raises(RuntimeError, match="memory"):
        nsa_speed._peers(result, {}, "cuda", ("sweep", 8))
    assert result.value("dense.forward.n8") == 1.0 and len(result.rows) == 1
    assert result.value("selection.fla.random.forward.n8") == 4.0


@pytest.mark.parametrize("fla", [False, True])
def test_fla_is_timed_beside_ours_and_dense_and_nowhere_else(monkeypatch, fla):
    tiny = Shape(seq_len=32, heads=4, kv_heads=1, head_dim=16, block_size=16, count=2,
                 dtype="float32")  # fmt: skip
    monkeypatch.setattr(nsa_speed, "Shape", lambda **how: tiny)
    monkeypatch.setattr(nsa_speed, "_dense_backend", lambda result, x: "any")
    monkeypatch.setattr(nsa_speed, "_dense", lambda x, backend: x["q"] * 1)
    monkeypatch.setattr(nsa_speed, "_chosen", lambda shape, x: None)
    for name in ("_selection", "_fla_selection", "_fla_whole"):
        monkeypatch.setattr(nsa_speed, name, lambda shape, x, *more: x["q"] * 2)
    monkeypatch.setattr(
        nsa_speed, "_whole",
        lambda shape, x, window=True: sum(x[n][..., None] * x["q"] for n in (
            ("g_cmp", "g_slc", "g_swa") if window else ("g_cmp", "g_slc"))) + x["k"].sum()
        + x["v"].sum(),
    )  # fmt: skip
    monkeypatch.setattr(nsa_speed, "_gradient", lambda out, wanted, dout: lambda: None)
    raced = []

    def race(result, plan, functions, labels, extra=None):
        for fn in functions.values():
            fn()
        raced.append((labels["part"], labels["pass"], set(functions)))
        return {name: 2.0 if ".fla." in name else 1.0 for name in functions}

    monkeypatch.setattr(nsa_speed, "_race", race)
    result, plan = Result(), {"dtype": "float32"}
    if fla:
        nsa_speed._peers(result, plan, "cpu", ("sweep", 32768))
    else:
        nsa_speed._sweep(result, plan, "cpu", 32768)
    assert result.notes == []
    ours = {"dense", "two.labkit.random", "selection.labkit.random", "selection.labkit.local"}
    theirs = {"two.fla.random", "selection.fla.random", "selection.fla.local"}
    wholes = {"whole.labkit.random", "whole.labkit.local"}
    assert raced == [
        ("peers" if fla else "sweep", what, ours | (theirs if fla else wholes))
        for what in nsa_speed.PASSES
    ]
    for kind in ("selection.vs_fla.random", "selection.vs_fla.local", "two.vs_fla.random"):
        for what in (*nsa_speed.PASSES, "both"):
            key = f"{kind}.{what}.n32768"
            assert (key in result) == fla and (not fla or result.value(key) == 0.5)
    assert ("whole.speedup.random.forward.n32768" in result) != fla


def test_flas_error_is_found_apart_from_ours(monkeypatch):
    monkeypatch.setattr(nsa_speed, "Shape", lambda **how: SMALL)
    monkeypatch.setattr(nsa_speed, "_fla_selection", lambda shape, x, blocks: x["q"] + 0 * (
        x["k"].sum() + x["v"].sum()))  # fmt: skip
    result = Result()
    nsa_speed._peers(result, {"dtype": "float32"}, "cpu", ("error", "gradients"))
    assert result.notes == []
    assert {key.split(".")[1] for key in result.results} == {"fla"}
    assert {row["tensor"] for row in result.rows} == {"o", "dq", "dk", "dv"}


def test_every_unit_is_one_that_records_know():
    assert {made().unit(key) for key in made().results} <= set(records._BASE)


class FakeCuda:
    """Every function takes 20 ms."""

    def __init__(self, flush, launch_included):
        assert flush and not launch_included
        self.spin_cycles = {}

    def _cycles(self, seconds):
        return 1

    def event_pair(self):
        class Event:
            def record(self): ...

            def synchronize(self): ...

            def elapsed_time(self, other):
                return 20.0

        return Event(), Event()

    def record(self, fn, before):
        assert self.spin_cycles[id(fn)] == 1
        fn()
        return self.event_pair()


def test_functions_are_timed_in_turns_every_other_round_backwards(monkeypatch):
    from labkit import timing

    ran: list[str] = []
    monkeypatch.setattr(timing, "_Cuda", FakeCuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    functions = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    result = Result()
    times = nsa_speed._race(result, {"rep_ms": 120}, functions, {"part": "sweep"})
    assert times == {"a": 0.02, "b": 0.02}
    # once to see that it runs, once for its length, and then in turns
    assert "".join(ran) == "abab" + "abba" * 3
    assert [len(row["samples_ms"]) for row in result.rows] == [6, 6]


def test_a_function_that_fails_is_left_out_of_the_race(monkeypatch):
    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(nsa_speed, "_in_turns", lambda f, ms: {name: [1.0] for name in f})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    result = Result()
    times = nsa_speed._race(
        result, {"rep_ms": 1}, {"good": lambda: 1, "bad": broken}, {"part": "sweep"}
    )
    assert times == {"good": 0.001} and "out of memory" in result.notes[0]
