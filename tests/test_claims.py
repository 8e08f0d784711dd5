"""Every table cell of the notes, recomputed or recorded; a wrong cell must be noticed."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from functools import cache

import pytest

from labkit import claims, records
from labkit.claims import CLAIMS, VERDICTS, as_markdown, claim, comparisons
from labkit.errors import ArgumentError, RecordError
from labkit.units import GIB, KIB, MIB

DONE = [f"C{n:02d}" for n in range(1, 39)]
#: about shapes, names and tests: nothing of them is a table
NO_TABLE = {"C01", *(f"C{n}" for n in range(32, 38))}


def cells(name, title=None):
    """label → row of one claim's tables."""
    tables = [t for t in comparisons(name) if title is None or title in t.title]
    return {row.label: row for table in tables for row in table.rows}


def test_the_chapters_there_are_have_a_verdict_on_each_of_their_claims():
    assert list(CLAIMS) == DONE
    for item in CLAIMS.values():
        assert item.verdict in VERDICTS
        assert item.chapter in {f"{n:02d}" for n in range(1, 16)}
        assert len(item.statement) > 30 and len(item.reason) > 30
        assert item.reason.endswith(".") and item.statement.endswith(".")


def test_the_known_errors_are_refuted():
    refuted = {item.id for item in CLAIMS.values() if item.verdict == "refuted"}
    assert refuted == {
        "C09", "C11", "C16", "C18", "C20", "C21", "C22", "C24", "C25", "C28", "C31", "C33", "C37",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in DONE if n not in NO_TABLE])
def test_every_cell_comes_out_as_the_verdict_says(name):
    tables = comparisons(name)
    assert tables and all(table.rows for table in tables)
    for table in tables:
        for row in table.rows:
            assert row.agrees == row.expected, f"{name}, {table.title}, {row}"


# -- cell by cell, against the notes typed a second time -------------------------------------------


@pytest.mark.parametrize(
    ("n", "inputs", "scores", "share"),
    [
        (512, 256 * KIB, 1 * MIB, 80),
        (1024, 512 * KIB, 4 * MIB, 89),
        (2048, 1 * MIB, 16 * MIB, 94),
        (4096, 2 * MIB, 64 * MIB, 97),
        (8192, 4 * MIB, 256 * MIB, 98),
        (16384, 8 * MIB, 1 * GIB, 99),
    ],
)
def test_C03_row(n, inputs, scores, share):
    rows = cells("C03")
    assert len(rows) == 18
    assert claims._bytes_of(rows[f"N = {n}: Q, K, V, O"].claimed) == inputs
    assert claims._bytes_of(rows[f"N = {n}: S, P"].claimed) == scores
    assert rows[f"N = {n}: share of S, P"].claimed == f"{share} %"
    # The same from first principles.
    assert inputs == 4 * n * 64 * 2 and scores == 2 * n * n * 2
    assert round(100 * scores / (scores + inputs)) == share
    assert all(rows[f"N = {n}: {what}"].agrees for what in ("Q, K, V, O", "S, P", "share of S, P"))


@pytest.mark.parametrize(
    ("batch", "heads", "n", "size"),
    [
        (1, 12, 2048, 192 * MIB),
        (1, 12, 4096, 768 * MIB),
        (1, 12, 8192, 3 * GIB),
        (8, 12, 2048, 1.5 * GIB),
        (8, 12, 4096, 6 * GIB),
    ],
)
def test_C08_row(batch, heads, n, size):
    rows = cells("C08")
    assert len(rows) == 5
    row = rows[f"batch {batch}, {heads} heads, N = {n}"]
    assert row.agrees and claims._bytes_of(row.claimed) == size == 4 * batch * heads * n * n


@pytest.mark.parametrize(
    ("n", "size"), [(256, MIB // 4), (512, MIB), (1024, 4 * MIB), (2048, 16 * MIB)]
)
def test_C12_row_by_length(n, size):
    row = cells("C12", "float32")[f"N = {n}"]
    assert row.agrees and claims._bytes_of(row.claimed) == size == 4 * n * n


@pytest.mark.parametrize(
    ("label", "size"),
    [
        ("batch 1, 1 head", 1),
        ("batch 2, 1 head", 2),
        ("batch 1, 2 heads", 2),
        ("batch 4, 1 head", 4),
    ],
)
def test_C12_row_by_batch_and_heads(label, size):
    row = cells("C12", "by batch")[label]
    assert row.agrees and claims._bytes_of(row.claimed) == size * MIB


def test_C02_covers_both_dtypes_of_all_six_tensors():
    rows = cells("C02")
    assert len(rows) == 16 and all(row.agrees for row in rows.values())
    assert rows["Q, float32"].computed == "4Nd" and rows["S, float16"].computed == "2N²"
    assert rows["Q, K, V, O together, float32"].computed == "16Nd"
    assert rows["S, P together, float32"].computed == "8N²"


def test_C04_limits_and_the_fifth_that_is_missing_at_8d():
    limits = cells("C04", "limit")
    assert limits["softmax"].computed == "1.25 FLOP/byte"
    assert limits["QKᵀ, d = 64, N → ∞"].computed == "64 FLOP/byte"
    assert "51.2" in cells("C04", "approaches")["N = 8d"].computed  # 64 / 1.25


def test_C05_quotients_and_ridge_points():
    rounded = cells("C05", "rounded")
    assert rounded["312/2.0"].claimed == "156 FLOP/byte" and rounded["312/2.0"].agrees
    assert rounded["990/3.35"].claimed == "296 FLOP/byte" and rounded["990/3.35"].agrees
    exact = list(cells("C05", "data sheets").values())
    assert [row.computed for row in exact] == ["153 FLOP/byte", "295.3 FLOP/byte"]


def test_C09_right_formula_is_the_one_autograd_uses():
    torch = pytest.importorskip("torch")
    scores = torch.tensor([0.5, 1 / 3, 1 / 6], dtype=torch.float64).log().requires_grad_()
    torch.softmax(scores, 0).backward(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    rows = cells("C09")
    for i, gradient in enumerate(scores.grad.tolist()):
        row = rows[f"dS[{i}]"]
        found = row.computed.partition("/")
        assert float(found[0]) / float(found[2] or 1) == pytest.approx(gradient)
        assert not row.agrees
    assert rows["sum of dS"].computed == "0"


def test_C11_claimed_bound_is_below_what_cannot_be_avoided():
    rows = cells("C11")
    assert not rows["N²d/M, as claimed"].agrees and rows["N²d²/M"].agrees


def test_C15_tile():
    rows = cells("C15")
    assert rows["a tile of 64 × 64, float32"].computed == "16 KiB"
    assert rows["S at N = 512, float32"].computed == "1 MiB"


# -- the comparison can fail -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "key", "cell"),
    [
        ("C03_TABLE", 512, ("256 KB", "1 MB", "81")),
        ("C03_TABLE", 4096, ("2 MB", "63 MB", "97")),
        ("C03_TABLE", 16384, ("8 KB", "1 GB", "99")),
        ("C08_TABLE", (8, 12, 2048), "1.6 GB"),
        ("C12_TABLE", 1024, "4 KB"),
        ("C12_LINEAR", (4, 1), "16 MB"),
        ("C05_TABLE", "a100-sxm-80", ("312", "2.0", "165")),
    ],
)
def test_a_wrong_cell_of_the_notes_is_noticed(monkeypatch, table, key, cell):
    monkeypatch.setitem(getattr(claims, table), key, cell)
    found = comparisons(table[:3])
    assert not all(t.as_expected for t in found)
    assert "against the verdict" in "\n".join(map(str, found))


def test_a_wrong_model_is_noticed(monkeypatch):
    real = claims.attention_memory

    def doubled(**problem):
        table = real(**problem)
        rows = tuple(dataclasses.replace(r, bytes=2 * r.bytes) for r in table.rows)
        return dataclasses.replace(table, rows=rows)

    monkeypatch.setattr(claims, "attention_memory", doubled)
    sizes = [row for row in cells("C03").values() if "share" not in row.label]
    assert not any(row.agrees for row in sizes)
    assert not any(row.agrees for row in cells("C08").values())


def test_a_wrong_scores_buffer_is_noticed(monkeypatch):
    real = claims.scores_buffer_bytes
    monkeypatch.setattr(claims, "scores_buffer_bytes", lambda n, **k: real(n, **k) + 1)
    assert not any(row.agrees for row in cells("C12").values())
    assert not any(row.agrees for row in cells("C15").values())


# -- what was recorded -----------------------------------------------------------------------------


def recorded(name=None):
    """``(claim, row)`` of every cell that comes from a record."""
    names = CLAIMS if name is None else [name]
    tables = [t for n in names for make in [claims._RECORDED.get(n)] if make for t in make()]
    return [(t.claim, row) for t in tables for row in t.rows if row.source]


@cache
def _record(experiment):
    return records.load(experiment, root=claims._shipped())


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """The course's records in a folder where one is spoilt: ``spoil(source, value)``."""
    own = claims._shipped() / records.DEFAULT_MACHINE
    folder = tmp_path / "records" / records.DEFAULT_MACHINE
    folder.mkdir(parents=True)
    for path in own.glob("*.json"):
        (folder / path.name).symlink_to(path)
    monkeypatch.setattr(claims, "_shipped", lambda: folder.parent)

    def spoil(source, value):
        experiment, _, key = source.partition(":")
        path = folder / f"{experiment}.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        data["rows"] = []
        if value is None:
            del data["results"][key]
        else:
            data["results"][key]["value"] = value
        path.unlink()
        path.write_text(json.dumps(data), encoding="utf-8")

    return spoil


def test_what_was_measured_has_a_recorded_table():
    depends = {i.id for i in CLAIMS.values() if i.verdict == "depends: measured"}
    chapters = {"10", "11", "15"}  # whose experiments were made for the claims
    wanted = {i.id for i in CLAIMS.values() if i.chapter in chapters} | {"C17", "C23", "C38"}
    assert {name for name, _ in recorded()} == wanted - {"C26"}
    # the others that depend were derived, and the chapter shows the record
    assert depends - wanted == {"C06", "C07", "C10", "C14"}


def test_a_recorded_cell_is_the_record_rounded_and_no_other_table_holds_one():
    for name, row in recorded():
        experiment, _, key = row.source.partition(":")
        assert row.computed == _record(experiment).quote(key, row.computed), (name, row)
    for table in comparisons():
        assert len({bool(row.source) for row in table.rows}) == 1, table.title
        assert table.found == ("recorded" if table.rows[0].source else "computed")
        assert table.found in str(table) and table.found in table._repr_html_()


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("flash_forward:c17_naive_float32_n4096", 40.0),
        ("layer_forward:busy.report.sdpa.n128", 0.97),
        ("layer_forward:speedup.report.sdpa.n256", 4.4),
        ("training_step:saved.report.sdpa.fp16.n1024", 0.5),
        ("training_step:speedup.report.sdpa.autocast_fp16.n1024", 2.0),
        ("layer_forward:pays.report.sdpa_half_over_sdpa", 256),
        ("products:direct.report.sdpa.n1024", 5.4),
        ("training_step:claim_training.original.b2", 500 * MIB),
        ("longest_sequence:found.report.sdpa.fp16.training.12", 8192),
        ("backend_map:switch_backends_float16", 2),
        ("backend_map:recipe_runs_flash_float16", 1),
        ("masks:difference_dense_n2048", 0.0),
        ("half_rate:speedup.loop.forward", 1.5),
        ("half_rate:peak.loop.forward.saving", 0.4),
        ("nsa_weights:naive.turned.overhead", -0.01),
    ],
)
def test_another_measurement_goes_against_the_verdict(copied, source, value):
    (name,) = {name for name, row in recorded() if row.source == source}
    copied(source, value)
    tables = claims._RECORDED[name]()
    wrong = [row.source for table in tables for row in table.rows if row.agrees != row.expected]
    assert wrong == [source]
    (shown,) = [str(table) for table in claims._RECORDED[name]() if not table.as_expected]
    assert "against the verdict" in shown


def test_a_record_that_lacks_a_figure_is_named(copied):
    copied("masks:speedup_local_flex_forward", None)
    with pytest.raises(RecordError, match="speedup_local_flex_forward"):
        comparisons("C25")


def test_a_readers_own_record_changes_no_verdict(copied, monkeypatch, tmp_path):
    before = comparisons("C24")
    monkeypatch.undo()
    copied("backend_map:switch_backends_float16", 2)
    monkeypatch.setenv("LABKIT_RECORDS", str(tmp_path / "records"))
    own = records.load("backend_map")
    assert own.value("switch_backends_float16") == 2 and comparisons("C24") == before


def _value(source):
    experiment, _, key = source.partition(":")
    return _record(experiment).value(key)


def test_C18_the_time_is_level_where_the_work_is_not():
    n = (128, 256, 512)
    for name in ("original", "sdpa"):
        times = [_value(f"layer_forward:time.report.{name}.n{i}") for i in n]
        work = [_value(f"layer_forward:gpu.report.{name}.n{i}") for i in n]
        assert times[-1] < times[0] and work[-1] > 1.5 * work[0]
        for i, time, alone in zip(n, times, work, strict=True):
            assert alone < time / 2, (name, i)
    for i in n:
        tensor_cores = _value(f"layer_forward:time.report.sdpa_tf32.n{i}")
        assert tensor_cores > 0.95 * _value(f"layer_forward:time.report.sdpa.n{i}")


def test_C19_what_half_precision_gains_and_saves():
    step = "training_step:{}.report.{}.{}.n{}".format
    for n in (128, 256, 512, 1024):
        assert abs(_value(step("speedup", "sdpa", "fp16", n)) - 1) < 0.1
        assert _value(step("speedup", "sdpa", "autocast_fp16", n)) < 0.9
        for attention in ("naive", "sdpa"):
            assert 0.4 < _value(step("saved", attention, "fp16", n)) < 0.5
            assert 0.0 < _value(step("saved", attention, "autocast_fp16", n)) < 0.25
            assert _value(step("error", attention, "fp16", n)) > 0.3
            assert _value(step("error", attention, "autocast_fp16", n)) < 0.01
    assert _value("training_step:speedup.realistic.sdpa.autocast_fp16.n2048") > 1.5
    casts, plain = (f"layer_forward:kernels.report.sdpa{x}.n512" for x in ("_autocast", ""))
    assert _value(casts) > 1.5 * _value(plain)


def test_C20_one_card_has_a_crossover_below_both_rules_and_one_above():
    found = [_value(row.source) for row in cells("C20", "H200").values()]
    assert min(found) < 256 and max(found) > 512


def test_C21_half_precision_gains_more_where_S_is_not_written():
    for n in (512, 1024, 2048, 4096):
        gain, with_flash = (_value(f"products:{b}_gpu.report.sdpa.n{n}") for b in ("b", "b_flash"))
        assert with_flash > 1.2 * gain


def test_C22_a_quarter_of_a_step_and_a_fifth_of_a_forward_pass():
    for prefix, share in (("claim_training", 1 / 4), ("claim", 1 / 5)):
        original, flash = (_value(f"training_step:{prefix}.{x}.b2") for x in ("original", "flash"))
        assert flash / original == pytest.approx(share, rel=0.1)
        predicted = _value(f"training_step:predicted_{prefix}.original.b2")
        assert predicted == pytest.approx(original, rel=0.01)


def test_C23_the_root_of_the_memory_against_the_memory():
    end = "longest_sequence:expandable_{}.report.{}.fp32.training.{}".format
    for limit, factor in ((24, 2), (80, 80 / 12)):
        grown = {
            kind: _value(end("found", kind, limit)) / _value(end("found", kind, 12))
            for kind in ("naive", "flash")
        }
        assert grown["naive"] == pytest.approx(factor**0.5, rel=0.05)
        assert grown["flash"] == pytest.approx(factor, rel=0.05)
        for kind in ("naive", "flash"):
            assert _value(end("ratio", kind, limit)) > 0.95


def test_C25_a_mask_is_slower_than_dense_attention_and_larger():
    dense = _value("masks:time_dense_sdpa_forward")
    assert _value("masks:time_local_sdpa_forward") > 2 * dense
    assert _value("masks:mask_bytes_local_sdpa") == 16_384**2
    assert _value("masks:peak_local_sdpa_forward") > 10 * _value("masks:peak_dense_sdpa_forward")
    for kernel in ("flex", "window"):
        assert _value(f"masks:time_local_{kernel}_forward") < dense / 2
    # scores at random leave no block to skip
    assert _value("masks:touched_random") == 1 and _value("masks:time_random_flex_forward") > dense


# -- looking things up, and the page ---------------------------------------------------------------


def test_claims_are_found_by_short_names():
    assert claim("c3") is claim("C03") is claim("3")
    with pytest.raises(ArgumentError, match="C23"):
        claim("C99")


def test_the_page_shows_every_claim_and_every_cell():
    page = as_markdown().replace("\N{NO-BREAK SPACE}", " ")
    for name, item in CLAIMS.items():
        assert page.count(f"* - {name}\n  - {item.statement}") == 1
        assert item.verdict in page
    rows = sum(len(t.rows) for t in comparisons())
    assert page.count("| ✓ |") + page.count("| ✗ |") == rows
    # Tables stay tables: the same number of cells in every row of a table.
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert page.count("````") == 2 * page.count("````{")


def test_the_page_binds_each_recorded_cell_to_its_record():
    quotes = list(records.find_quotes(as_markdown()))
    assert sorted(q.target for q in quotes) == sorted(row.source for _, row in recorded())
    for quote in quotes:
        records.check_quote(quote.text, quote.target, root=claims._shipped())


def test_the_page_links_only_to_chapters_that_the_book_has():
    page = as_markdown(pages=["notebooks/01_standard_attention"])
    assert "{doc}`01 </notebooks/01_standard_attention>`" in page
    assert "02_what_grows" not in page and "\n  - 02\n" in page


def test_comparisons_show_as_text_and_html():
    table = comparisons("C12")[0]
    assert "0.25 MB" in str(table) and "256 KiB" in str(table)
    markup = table._repr_html_()
    assert markup.count("<tr>") == len(table.rows) + 1 and "<caption>C12" in markup


def test_claims_need_no_torch():
    code = (
        "import sys; from labkit import claims; claims.as_markdown(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
