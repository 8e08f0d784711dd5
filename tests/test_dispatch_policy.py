"""A policy: chosen from points whose answer is known, kept, and not believed elsewhere."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace

import oracle
import pytest
import torch
from click.testing import CliRunner

from labkit import dispatch
from labkit.__main__ import main
from labkit.dispatch import Policy, PolicyIgnored, load_policy, measure_policy
from labkit.dispatch import policy as module
from labkit.dispatch.measure import Shape, _inwards, race
from labkit.dispatch.policy import Point, crossing
from labkit.errors import ArgumentError, LabError

HERE = {
    "card": "NVIDIA H200", "device": "cuda", "driver": "580.1", "torch": "2.11.0",
    "triton": "3.6.0", "cuda": "13.0", "cudnn": "91900", "kernels": "abc",
}  # fmt: skip
#: ms as a power of the length: coefficient and exponent.  Between measured lengths a policy
#: interpolates by powers, so each border below is known in closed form.
LAWS = {
    ("flash", "float16"): (8e-3, 1.0), ("naive", "float32"): (1e-4, 2.0),
    ("efficient", "float32"): (1.6e-2, 1.0), ("naive", "tf32"): (1e-3, 1.5),
}  # fmt: skip
LENGTHS = (16, 32, 64, 128, 256)


def point(seq_len, backend, dtype, ms, **changes) -> Point:
    values = dict(
        seq_len=seq_len, batch=1, heads=8, kv_heads=8, head_dim=64, causal=False, training=False,
        backend=backend, dtype=dtype, ms=ms, spread_ms=0.0,
        error={"float32": 1e-7, "tf32": 1e-4, "float16": 1e-3}[dtype],
    )  # fmt: skip
    return Point(**(values | changes))


def made(**changes) -> Policy:
    points = [point(n, *who, a * n**b, **changes) for who, (a, b) in LAWS.items() for n in LENGTHS]
    return Policy(dict(HERE), tuple(points), ("a note",))


# -- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seq_len", "allowed", "winner"),
    [
        (16, None, ("naive", "float32")),  # 0.0256 ms; flash 0.128
        (64, None, ("naive", "float32")),  # 0.41 against 0.512: flash wins above 80
        (128, None, ("flash", "float16")),
        (128, ("float32",), ("naive", "float32")),  # 1.6384 against 2.048: efficient above 160
        (256, ("float32",), ("efficient", "float32")),
        (256, ("float32", "tf32"), ("naive", "tf32")),  # tf32 with its √n is below, until 256
    ],
)
def test_the_fastest_of_what_is_allowed_is_chosen(seq_len, allowed, winner):
    if winner == ("naive", "tf32"):
        laws = {who: a * seq_len**b for who, (a, b) in LAWS.items() if who[1] in allowed}
        winner = min(laws, key=laws.__getitem__)
    found = made().choose(seq_len, dtypes_allowed=allowed)
    assert (found.backend, found.dtype) == winner
    a, b = LAWS[winner]
    assert found.ms == pytest.approx(a * seq_len**b) and found.measured
    assert found.evidence[0].seq_len == seq_len and "measured" in found.why
    assert {(p.backend, p.dtype) for p in found.evidence} >= {winner}


def test_between_two_lengths_time_is_a_power_of_the_length():
    found = made().choose(90, dtypes_allowed="float32")
    assert found.backend == "naive" and found.ms == pytest.approx(1e-4 * 90**2)
    assert [p.seq_len for p in found.evidence[:2]] == [64, 128] and "between" in found.why
    assert made().choose(79).backend == "naive" and made().choose(81).backend == "flash"


def test_beyond_what_was_measured_the_last_choice_stays_and_says_so():
    found = made().choose(10_000)
    assert found.backend == "flash" and not found.measured and math.isnan(found.ms)
    assert "10,000 lies beyond the longest measured length" in found.why
    assert "below the shortest" in made().choose(2).why


def test_a_hole_between_two_that_share_no_length_is_answered_by_the_nearest_and_said():
    found = Policy(
        dict(HERE), (point(16, "naive", "float32", 1.0), point(1024, "flash", "float16", 1.0))
    )
    choice = found.choose(512)
    assert (choice.backend, choice.measured) == ("flash", False)
    assert "512 lies in a hole between measured lengths" in choice.why


def test_another_shape_is_answered_by_the_nearest_and_said():
    both = Policy(HERE, made().points + made(head_dim=128, heads=4).points)
    found = both.choose(64, head_dim=120, heads=5)
    assert "head_dim 128 in place of 120" in found.why and "heads 4 in place of 5" in found.why
    assert all(p.head_dim == 128 for p in found.evidence)
    assert "in place" not in both.choose(64, head_dim=64, heads=8).why
    assert len(both.kinds()) == 2 and both.kinds()[1]["head_dim"] == 128


def test_groups_of_another_size_are_another_shape():
    slow = made(kv_heads=2).points
    both = Policy(HERE, (*made().points, *(replace(p, ms=3 * p.ms) for p in slow)))
    assert both.choose(64).ms == made().choose(64).ms == both.choose(64, heads=8).ms
    grouped = both.choose(90, kv_heads=2)
    assert grouped.ms == pytest.approx(3 * made().choose(90).ms)
    assert {p.kv_heads for p in grouped.evidence} == {2} and "in place" not in grouped.why
    assert "kv_heads 2 in place of 1" in both.choose(64, kv_heads=1).why
    only = Policy(HERE, slow)
    assert "kv_heads 2 in place of 8" in only.choose(64, heads=8).why
    assert "in place" not in only.choose(64).why
    assert both.crossovers(kv_heads=2) == both.crossovers()
    assert both.crossing(kv_heads=2).seq_len == 80


def test_a_length_measured_twice_counts_once():
    again = tuple(replace(p, ms=2 * p.ms) for p in made().points)
    wider = tuple(replace(p, batch=4, ms=p.ms / 2) for p in made().points)
    for twice in (Policy(HERE, (*again, *made().points)), Policy(HERE, (*made().points, *wider))):
        assert twice.choose(64).ms == made().choose(64).ms
        assert twice.choose(90).ms == made().choose(90).ms
        assert twice.crossovers() == made().crossovers()


def test_an_error_that_is_too_large_is_left_out():
    assert made().choose(256, max_error=1e-2).dtype == "float16"
    assert made().choose(256, max_error=1e-3 / 2).dtype != "float16"
    with pytest.raises(ArgumentError, match=r"leaves nothing.*flash float16 \(error 1.0e-03\)"):
        made().choose(256, max_error=1e-9)
    assert made().choose(256, backends_allowed=["efficient"]).backend == "efficient"


def test_a_lead_within_the_noise_is_called_so():
    a, b = point(16, "flash", "float16", 1.0), point(16, "cudnn", "float16", 1.02)
    clear, noisy = Policy(HERE, (a, b)), Policy(HERE, (replace(a, spread_ms=0.1), b))
    assert "noise" not in clear.choose(16).why and "within the noise" in noisy.choose(16).why


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": 64, "heads": 0}, "heads"),
        ({"seq_len": 64, "causal": True}, "was not measured"),
        ({"seq_len": 64, "kv_heads": 0}, "kv_heads"),
        ({"seq_len": 64, "max_error": 0}, "max_error"),
        ({"seq_len": 64, "dtypes_allowed": torch.float16}, "dtypes_allowed.*a dtype"),
        ({"seq_len": 64, "dtypes_allowed": ("float8",)}, "dtypes_allowed"),
        ({"seq_len": 64, "dtypes_allowed": ("bfloat16",)}, "leaves nothing"),
    ],
)
def test_what_was_not_measured_is_not_answered(asked, named):
    with pytest.raises(ArgumentError, match=named):
        made().choose(**asked)


def test_borders_lie_where_the_lines_meet():
    segments = made().crossovers()
    assert [(s.start, s.end, s.backend) for s in segments] == [
        (16, 80, "naive"), (80, None, "flash")
    ]  # fmt: skip
    segments = made().crossovers(dtypes_allowed=("float32",))
    assert [(s.start, s.end, s.backend) for s in segments] == [
        (16, 160, "naive"), (160, None, "efficient")
    ]  # fmt: skip
    with pytest.raises(ArgumentError, match="seqlen"):
        made().crossovers(seqlen=3)


def test_a_backend_that_ends_hands_over_at_the_next_length():
    points = [point(n, "naive", "float32", n / 100) for n in (16, 32)]
    points += [point(n, "efficient", "float32", n / 10) for n in (16, 32, 64)]
    segments = Policy(HERE, tuple(points)).crossovers()
    assert [(s.start, s.backend) for s in segments] == [(16, "naive"), (64, "efficient")]


def test_a_crossing_takes_the_place_of_a_threshold():
    found = made().crossing("float32", "float16")
    assert (found.seq_len, found.after, found.by) == (80, 64, 128)
    assert found.gain_at_longest == pytest.approx(2.0)  # efficient takes over above 160
    never = made().crossing("float16", "float32")
    assert never.seq_len is None and never.after == 256 and never.gain_at_longest == 0.5
    with pytest.raises(ArgumentError, match="leaves nothing"):
        made().crossing(fast="bfloat16")


def test_a_crossing_is_for_good():
    found = crossing({128: 1.1, 256: 0.8, 512: 1.25, 1024: 2.0})
    assert found.seq_len == 362 and (found.after, found.by) == (256, 512)  # √(256 · 512)
    assert crossing({128: 1.1, 256: 1.2}) == module.Crossing(128, None, 128, 1.2)


def test_a_choice_can_be_run():
    best = dispatch.Choice("math", "bfloat16", 1.0, "", ())
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    out = best.attention(q, k, v, is_causal=True)
    exact = oracle.attention_f64(q, k, v, causal=True)[0]
    plain = oracle.attention(*(x.bfloat16() for x in (q, k, v)), causal=True)[0]
    assert out.dtype == torch.float32
    oracle.assert_within_low_precision_error(out.bfloat16(), exact, plain)
    assert (out.double() - exact).abs().max() > 1e-4, "computed in bfloat16, as chosen"
    seen = dispatch.ran(best.attention, q, k, v)
    assert seen.backend == "math"


# -- keeping ---------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A cache of the test's own, on a machine that is made up."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "machine", lambda: dict(HERE))
    return tmp_path


def ignored(path=None) -> str:
    """What is said of the file that is not used."""
    with pytest.warns(PolicyIgnored) as heard:
        assert load_policy(path) is None
    return " ".join(str(w.message) for w in heard)


def test_a_policy_is_kept_and_found_again(here):
    path = made().save()
    assert path.parent == here and path.name == "policy-nvidia-h200-torch2.11.0-triton3.6.0.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_policy() == made() == load_policy(path)
    assert list(here.iterdir()) == [path], "no draft is left"


def test_nothing_measured_is_no_warning(here):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_policy() is None
    assert "no such file" in ignored(here / "missing.json")


@pytest.mark.parametrize("name", ["card", "driver", "torch", "triton", "kernels"])
def test_a_policy_from_elsewhere_is_ignored_and_said(here, name):
    path = replace(made(), machine=HERE | {name: "another"}).save(here / "policy-other.json")
    before = path.read_text()
    for said in (ignored(path), ignored()):
        assert f"was measured with {name} another, here it is {HERE[name]}" in said
        assert str(path) in said and "--measure" in said
    assert path.read_text() == before, "somebody else's file is left alone"


def broken():
    whole = json.loads(json.dumps({
        "schema": module.SCHEMA, "machine": HERE, "launch": "included", "notes": [],
        "points": [vars(p) for p in made().points],
    }))  # fmt: skip
    first = whole["points"][0]
    yield "{half"
    yield "[]"
    yield json.dumps(whole | {"schema": "labkit-policy/0"})
    yield json.dumps(whole | {"points": []})
    yield json.dumps({k: v for k, v in whole.items() if k != "machine"})
    for name, value in (
        ("ms", float("nan")),
        ("ms", -1.0),
        ("ms", 0.0),
        ("ms", "1"),
        ("seq_len", 0),
        ("seq_len", "64"),
        ("error", None),
        ("extra", 1),
        ("backend", 7),
        ("dtype", "int9"),
        ("causal", "no"),
    ):
        yield json.dumps(whole | {"points": [first | {name: value}]})


@pytest.mark.parametrize("text", list(broken()), ids=lambda t: t[-40:])
def test_a_broken_policy_is_ignored_and_said(here, text):
    path = here / "policy-nvidia-h200-torch2.11.0-triton3.6.0.json"
    path.write_text(text)
    assert re.search("broken|not a policy|no measured point", ignored())
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="LABKIT_CACHE"):
        made().save(tmp_path / "file" / "policy.json")


# -- measuring -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    if torch.cuda.is_available():
        pytest.skip("a GPU's is measured below")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_policy(
            [8, 16, 32], heads=2, head_dim=16, causal=True, dtypes=["float32", "bfloat16"],
            device="cpu",
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def test_everybody_who_can_is_measured_and_right(measured):
    shapes = {(p.seq_len, p.training) for p in measured.points}
    assert shapes == {(n, t) for n in (8, 16, 32) for t in (False, True)}
    who = {(p.backend, p.dtype) for p in measured.points}
    assert who == {(b, d) for b in ("flash_cpu", "math", "naive") for d in ("float32", "bfloat16")}
    for p in measured.points:
        rounding = 2**-24 if p.dtype == "float32" else 2**-9
        assert 0 < p.error < 16 * rounding, p
        assert p.ms > 0 and p.spread_ms >= 0
    assert measured.machine["device"] == "cpu" and measured.launch == "included"
    assert measured.choose(16, causal=True).evidence and measured.notes == ()


def test_what_was_measured_here_is_believed_here(measured, tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    measured.save()
    assert load_policy() == measured


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_the_error_of_a_row_is_that_against_float64(training, kv_heads, masked, monkeypatch):
    import labkit.timing

    monkeypatch.setattr(labkit.timing, "time_many", lambda calls, **how: {
        who: labkit.timing.Timing([1.0], "", "cpu") for who in calls
    })  # fmt: skip
    shape = Shape(12, batch=2, heads=2, kv_heads=kv_heads, head_dim=16, causal=not masked,
                  training=training)  # fmt: skip
    mask = (lambda dtype: torch.ones(12, 12, dtype=torch.bool).tril()) if masked else None
    (row,), notes = race(shape, ["math"], ["bfloat16"], device="cpu", attn_mask=mask)
    assert notes == []
    q, k, v, dout = (x.detach() for x in shape.draw("bfloat16", "cpu"))
    if training:
        exact = oracle.gradients_f64(q, k, v, dout, causal=True)[0]
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dispatch.attention(*leaves, backend="math", is_causal=True)
        ours = torch.autograd.grad(out, leaves, dout)[0]
    else:
        exact = oracle.attention_f64(q, k, v, causal=True)[0]
        ours = dispatch.attention(q, k, v, backend="math", is_causal=True)
    a, b = ours[-1, -1].double(), exact[-1, -1]
    assert row["error"] == pytest.approx(((a - b).norm() / b.norm()).item(), rel=1e-6)
    assert 1e-4 < row["error"] < 2e-2


def test_one_that_fails_leaves_a_note_and_the_others(monkeypatch):
    from labkit.dispatch import measure

    def broken(backend, *args, **options):
        if backend == "math":
            raise RuntimeError("out of order")
        return real(backend, *args, **options)

    real = measure.function
    monkeypatch.setattr(measure, "function", broken)
    found = measure_policy([8], heads=1, head_dim=16, causal=False, training=False,
                           dtypes="float32", device="cpu")  # fmt: skip
    assert {p.backend for p in found.points} == {"flash_cpu", "naive"}
    assert found.notes == ("math float32: RuntimeError: out of order (d16 n8)",)
    with pytest.raises(LabError, match="out of order"):
        measure_policy([8], heads=1, head_dim=16, backends="math", dtypes="float32", device="cpu")


def test_one_that_cannot_be_timed_is_asked_twice_and_then_left_out(monkeypatch):
    from labkit.dispatch.measure import timed
    from labkit.timing import UnsynchronisedError

    seen = []

    def time_many(calls, **how):
        seen.append(list(calls))
        for name, call in calls.items():
            if call() == "busy" or (call() == "once" and len(seen) == 1):
                raise UnsynchronisedError(f"{name} leaves work on another CUDA stream: 22 µs")
        return {name: 1.0 for name in calls}

    monkeypatch.setattr("labkit.timing.time_many", time_many)
    calls = {("a", "b"): lambda: "once", "a": lambda: "busy", "c": lambda: "fine"}
    found, notes = timed(calls, rep_ms=1)
    assert found == {("a", "b"): 1.0, "c": 1.0}
    assert notes == ["a: UnsynchronisedError: a leaves work on another CUDA stream: 22 µs"]
    assert len(seen) == 4  # "a b" passes at its second, "a" fails at its first and second

    def no_memory(calls, **how):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("labkit.timing.time_many", no_memory)
    assert timed(calls) == ({}, ["timing: RuntimeError: out of memory"])


def test_when_time_is_up_what_was_measured_is_a_policy():
    found = measure_policy([8, 16, 24, 32], heads=1, head_dim=16, causal=False, training=False,
                           dtypes="float32", budget_s=1e-6, device="cpu",
                           backends="naive")  # fmt: skip
    assert [p.seq_len for p in found.points] == [32]
    (note,) = found.notes
    assert "Stopped after 1e-06 s" in note and "[8, 16, 24] tokens" in note


def test_the_clock_is_read_between_backends(monkeypatch):
    from labkit.dispatch import measure

    now, begun = [0.0], []

    class Clock:
        @staticmethod
        def perf_counter():
            return now[0]

    def function(backend, q, *rest, **options):
        begun.append((q.shape[2], backend))
        now[0] += 1.0
        return real(backend, q, *rest, **options)

    real = measure.function
    monkeypatch.setattr(measure, "function", function)
    monkeypatch.setattr(measure, "time", Clock)
    asked = dict(heads=1, head_dim=16, causal=False, training=False, dtypes="float32",
                 device="cpu", backends=("math", "naive", "flash_cpu"))  # fmt: skip
    # a shape that is not finished in time is left out whole, and nobody is begun after the end
    found = measure_policy([8, 16, 24, 32], budget_s=4.5, **asked)
    assert begun == [(32, b) for b in asked["backends"]] + [(8, "math"), (8, "naive")]
    assert {p.seq_len for p in found.points} == {32} and len(found.points) == 3
    assert found.notes == ("Stopped after 4.5 s; not or not fully measured: [8, 16, 24] tokens.",)
    # of the first shape those are timed that are ready
    now[0] = 0.0
    found = measure_policy([8, 16], budget_s=1.5, **asked)
    assert [(p.seq_len, p.backend) for p in found.points] == [(16, "math"), (16, "naive")]
    assert found.notes[0] == "flash_cpu float32: the time was up (d16 n16)"
    # and its timing in turns is no longer begun for another
    now[0] = 0.0
    found = measure_policy([8, 16], budget_s=5.5, **asked)
    assert {p.seq_len for p in found.points} == {16}


def test_lengths_are_taken_from_both_ends_inwards():
    assert _inwards([1, 2, 3, 4, 5]) == [5, 1, 3, 2, 4]
    assert _inwards([7]) == [7] and _inwards([1, 2]) == [2, 1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"backends": ["flush"]}, "backends.*flash"),
        ({"dtypes": ["fp8"]}, "dtypes"),
        ({"seq_lens": [0]}, "seq_lens"),
        ({"heads": 3, "kv_heads": 2}, "kv_heads"),
        ({"budget_s": 0}, "budget_s"),
        ({"launch": "sometimes"}, "launch"),
        ({"head_dim": -1}, "head_dim"),
        ({"head_dim": []}, "head_dim"),
        ({"seq_lens": []}, "seq_lens"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"seq_lens": 0}, "seq_lens = 0"),
        ({"seq_lens": 8.5}, "seq_lens = 8.5"),
        ({"backends": []}, "backends.*empty"),
        ({"dtypes": ()}, "dtypes.*empty"),
        ({"causal": []}, "causal.*empty"),
        ({"training": "no"}, "training = 'no'.*neither True nor False"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(options, named):
    with pytest.raises(ArgumentError, match=named):
        measure_policy(**{"seq_lens": [8], "device": "cpu", **options})


# -- the command -----------------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(main, ["policy", *arguments], env={"COLUMNS": "120"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command_without_a_policy_says_how_to_make_one(here):
    result = run()
    assert result.exit_code == 1 and "python -m labkit policy --measure" in result.stdout


def test_the_command_shows_winners_and_where_they_came_from(here):
    path = made().save()
    text = run().stdout
    assert "NVIDIA H200, driver 580.1, torch 2.11.0, Triton 3.6.0" in text and path.name in text
    lines = [line.split() for line in text.splitlines()]
    assert ["64", "8", "–", "forward", "float32", "16", "naive"] in lines
    assert ["64", "8", "–", "forward", "float32", "160", "efficient"] in lines
    assert "Note: a note" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--head-dim", "64"), "--head-dim: says what to measure"),
        (("--batch", "1", "--budget", "60"), "--budget, --batch: say"),
    ],
)
def test_the_command_refuses_what_it_would_not_heed(here, arguments, named):
    made().save()
    result = run(*arguments)
    assert result.exit_code == 2 and "without --measure" in result.stderr
    assert named in result.stderr.replace("\n", " ")


def test_the_command_says_what_it_ignores(here):
    replace(made(), machine=HERE | {"card": "NVIDIA A100"}).save(here / "policy-a100.json")
    result = run()
    assert result.exit_code == 1
    assert "card NVIDIA A100, here it is NVIDIA H200" in result.stderr


def test_the_command_measures_and_keeps(tmp_path, monkeypatch, measured):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    asked = {}

    def fake(**options):
        asked.update(options)
        options["progress"](1, 2, "8 tokens")
        return measured

    monkeypatch.setitem(vars(dispatch), "measure_policy", fake)
    result = run(
        "--measure", "--heads", "2", "--head-dim", "16", "--budget", "3", "--device", "cpu"
    )
    assert result.exit_code == 0 and "flash_cpu" in result.stdout
    assert (asked["heads"], asked["head_dim"], asked["budget_s"]) == (2, (16,), 3.0)
    assert load_policy() == measured


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_a_policy_is_measured_and_right(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("LABKIT_TUNE", "0")
    found = measure_policy([128, 512], heads=4, causal=True, training=(False, True), budget_s=60)
    who = {(p.backend, p.dtype) for p in found.points}
    assert who >= {("flash", "float16"), ("efficient", "float32"), ("naive", "tf32"),
                   ("ours", "bfloat16"), ("ours", "float32")}  # fmt: skip
    assert ("flash", "float32") not in who and ("efficient", "tf32") not in who
    bound = {"float32": 1e-5, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
    assert all(p.error < bound[p.dtype] for p in found.points)
    found.save()
    assert load_policy() == found
    best = found.choose(512, causal=True)
    q, k, v = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    assert dispatch.ran(best.attention, q, k, v, is_causal=True).backend == (
        "unfused" if best.backend == "naive" else best.backend
    )
