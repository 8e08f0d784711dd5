"""The card table is held to the architectures it describes; detect() is held to never raise."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from labkit import hardware
from labkit.errors import ArgumentError
from labkit.hardware import CARDS, Machine, card, detect, table
from labkit.units import GIB, KIB

ALL = list(CARDS.values())
IDS = [row.key for row in ALL]
every_card = pytest.mark.parametrize("row", ALL, ids=IDS)

# Written out here a second time, from the CUDA programming guide's table, so that a slip in one
# of the two shows: compute capability → KiB per SM, KiB per block, CUDA cores per SM.
GUIDE = {
    "7.0": (96, 96, 64),
    "7.5": (64, 64, 64),
    "8.0": (164, 163, 64),
    "8.6": (100, 99, 128),
    "8.9": (100, 99, 128),
    "9.0": (228, 227, 128),
    "10.0": (228, 227, 128),
    "12.0": (100, 99, 128),
}
# Tensor-core operations per clock and SM in float16 with float32 accumulation, dense: from the
# architecture documents.  GeForce runs at half the rate of the same SM in a data-centre card.
TENSOR_PER_CLOCK = {
    "7.0": 1024,
    "7.5": 1024,
    "8.0": 2048,
    "8.6": 1024,
    "8.9": 1024,
    "9.0": 4096,
    "10.0": 8192,
    "12.0": 1024,
}


def is_geforce(row):
    return row.name.startswith("GeForce")


def test_the_cards_that_the_course_names_are_there():
    wanted = (
        "v100-sxm2-16 v100-sxm2-32 t4 a100-pcie-40 a100-sxm-40 a100-sxm-80 a10 l4 l40s rtx3060 "
        "rtx3090 rtx4090 rtx5090 h100-pcie h100-sxm h200 b200"
    )
    assert set(wanted.split()) <= set(CARDS)


@every_card
def test_float32_peak_is_sms_times_cores_times_two_times_boost(row):
    cores = GUIDE[row.compute_capability][2]
    expected = row.sm_count * cores * 2 * row.boost_clock_hz
    assert row.peak["float32"] == pytest.approx(expected, rel=0.007)


@every_card
def test_float64_peak_matches_the_guides_throughput(row):
    units = {"7.0": 32, "8.0": 32, "9.0": 64, "10.0": 64}.get(row.compute_capability, 2)
    expected = row.sm_count * units * 2 * row.boost_clock_hz
    assert row.peak["float64"] == pytest.approx(expected, rel=0.03)


@every_card
def test_tensor_rate_per_sm_and_clock_is_the_architectures(row):
    per_clock = TENSOR_PER_CLOCK[row.compute_capability] / (2 if is_geforce(row) else 1)
    unit = row.sm_count * row.tensor_clock_hz
    assert row.peak["float16"] / unit == pytest.approx(per_clock, rel=0.03)
    if "tf32" in row.peak:
        assert row.peak["tf32"] == pytest.approx(row.peak["float16"] / 2, rel=0.03)
    if "bfloat16" in row.peak:
        assert row.peak["bfloat16"] == row.peak["float16"]
    if "float8_e4m3fn" in row.peak:
        assert row.peak["float8_e4m3fn"] == pytest.approx(2 * row.peak["float16"], rel=0.03)


@every_card
def test_dtypes_are_those_the_tensor_cores_of_that_generation_take(row):
    generation = float(row.compute_capability)
    assert ("tf32" in row.peak) == ("bfloat16" in row.peak) == (generation >= 8.0)
    assert ("float8_e4m3fn" in row.peak) == (generation >= 8.9)
    assert (row.float16_accumulate_float16 is not None) == is_geforce(row)
    if is_geforce(row):
        assert row.float16_accumulate_float16 == pytest.approx(2 * row.peak["float16"], rel=0.01)


@every_card
def test_on_chip_memory_is_the_guides(row):
    per_sm, per_block, _ = GUIDE[row.compute_capability]
    assert row.smem_per_sm == per_sm * KIB
    assert row.smem_per_block == per_block * KIB <= row.smem_per_sm <= row.l1_per_sm
    assert row.registers_per_sm == 65536 * 4
    assert row.smem_bytes == row.sm_count * row.smem_per_sm


@every_card
def test_memory_is_larger_and_slower_the_further_away_it_is(row):
    assert row.smem_per_sm < row.l2_bytes < row.memory_bytes
    assert row.smem_bandwidth > 3 * row.memory_bandwidth
    if row.usable_bytes is not None:
        # GDDR6 with ECC gives up 1/16 of its cells; nothing takes more than a tenth.
        assert 0.9 * row.memory_bytes < row.usable_bytes < row.memory_bytes


@every_card
def test_every_figure_names_its_document(row):
    figures = {
        "memory_bytes",
        "memory_type",
        "memory_bandwidth",
        "l2_bytes",
        "sm_count",
        "boost_clock_hz",
        "tensor_clock_hz",
        "compute_capability",
        "smem_per_sm",
        "smem_per_block",
        "l1_per_sm",
        "registers_per_sm",
        *(f"peak.{dtype}" for dtype in row.peak),
    }
    for optional in ("usable_bytes", "cuda_core_float16", "float16_accumulate_float16"):
        if getattr(row, optional) is not None:
            figures.add(optional)
    assert set(row.sources) == figures
    for item in figures:
        title, _, address = row.source(item).partition(" — ")
        assert len(title) > 5, item
        assert address.startswith("https://"), item


def test_source_of_an_unknown_field_is_refused():
    with pytest.raises(ArgumentError, match=r"peak\.float16"):
        card("h200").source("peak.fp16")


def test_ridge_points_of_claim_C05():
    a100, h100 = card("a100-sxm-80"), card("h100-sxm")
    assert (a100.peak["float16"], a100.memory_bandwidth) == (312e12, 2.039e12)
    assert a100.ridge("float16") == pytest.approx(312 / 2.039)
    assert round(h100.peak["float16"] / 1e12) == 989 and h100.memory_bandwidth == 3.35e12
    assert h100.ridge("bfloat16") == pytest.approx(989.4 / 3.35)
    # The claim rounds 2.039 to 2.0 and 989 to 990 first.
    assert a100.ridge("fp16") == pytest.approx(156, rel=0.02)
    assert h100.ridge("half") == pytest.approx(296, rel=0.003)


def test_shared_memory_bandwidth_of_an_a100_is_the_papers_19_terabytes():
    assert card("a100-sxm-40").smem_bandwidth == pytest.approx(19.5e12, rel=0.005)
    assert card("a100-sxm-40").l1_bytes == 108 * 192 * KIB  # the "20 MB of SRAM"


def test_ridge_of_a_dtype_without_tensor_cores_is_refused_with_what_there_is():
    with pytest.raises(ArgumentError, match=r"bfloat16.*V100.*float16"):
        card("v100-sxm2-16").ridge("bf16")
    assert card("rtx3090").ridge("tf32") == pytest.approx(35.6e12 / 936e9)


@every_card
def test_names_that_torch_reports_resolve(row):
    assert row.reported_as
    for name in (*row.reported_as, row.key, row.name, row.key.upper(), row.name.lower()):
        assert card(name) is row, name
    assert card(row) is row


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 3060", "rtx3060"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("A100 SXM 80GB", "a100-sxm-80"),
        ("RTX 4090", "rtx4090"),
        ("rtx-5090", "rtx5090"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("H100 PCIe", "h100-pcie"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32"),
        ("l40s", "l40s"),
    ],
)
def test_names_that_people_use_resolve(name, key):
    assert card(name).key == key


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",  # 80 SMs and other clocks than the A10
        "NVIDIA GeForce RTX 3060 Ti",
        "NVIDIA GeForce RTX 3060 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H200 NVL",
        "NVIDIA L40",
        "H20",
        "NVIDIA GeForce GTX 1080",
        "",
        None,
        200,
    ],
)
def test_other_cards_are_not_taken_for_their_neighbours(name):
    with pytest.raises(ArgumentError, match="h200"):
        card(name)


@pytest.mark.parametrize(
    ("name", "choices"),
    [("A100", ["a100-pcie-40", "a100-sxm-80"]), ("H100", ["h100-pcie", "h100-sxm"])],
)
def test_a_name_that_fits_several_cards_is_refused_with_all_of_them(name, choices):
    with pytest.raises(ArgumentError, match="fits several") as error:
        card(name)
    for key in choices:
        assert key in str(error.value)


def test_a_typing_error_names_the_nearest_card():
    with pytest.raises(ArgumentError, match="Did you mean 'rtx4090'"):
        card("RTX 4900")


# -- tables ------------------------------------------------------------------------------------


def test_tables_align_and_show_units():
    text = str(table(["h200", "RTX 3060"]))
    header, rule, *body = text.splitlines()
    assert len(body) == 2 and set(rule) <= {"─", " "}
    assert len({len(line) for line in (header, *body)}) == 1
    assert "141 GiB" in body[0] and "4.8 TB/s" in body[0] and "206 FLOP/byte" in body[0]
    assert "12 GiB" in body[1] and "360 GB/s" in body[1]


@pytest.mark.parametrize("view", ["overview", "on_chip", "totals", "compute"])
def test_ready_made_views_have_at_most_six_columns_and_every_card(view):
    shown = table(columns=view)
    assert len(shown.columns) <= 6 and len(shown.rows()) == len(CARDS) + 1
    markup = shown._repr_html_()
    assert markup.count("<tr>") == len(CARDS) + 1
    assert "<script" not in markup and 'scope="col"' in markup


def test_table_sources_cover_every_cell_read_from_a_document():
    shown = table(["h200"], columns=["card", "l2_bytes", "peak.float16", "ridge"])
    assert [(name, item) for name, item, _ in shown.sources()] == [
        ("NVIDIA H200 SXM", "l2_bytes"),
        ("NVIDIA H200 SXM", "peak.float16"),
    ]


def test_table_of_unknown_column_or_card_is_refused():
    with pytest.raises(ArgumentError, match="columns"):
        table(columns="everything")
    with pytest.raises(ArgumentError, match="columns"):
        table(columns=["card", "price"])
    with pytest.raises(ArgumentError, match="card"):
        table(["h300"])


def test_cards_export_as_json():
    data = json.loads(json.dumps([row.to_dict() for row in ALL]))
    h200 = next(row for row in data if row["key"] == "h200")
    assert h200["memory_bytes"] == 141 * GIB and h200["arch"] == "Hopper"
    assert h200["smem_per_block"] == 227 * KIB


def test_a_card_prints_each_source_once():
    text = str(card("h200"))
    notes = [line.split("] ", 1)[1] for line in text.splitlines() if line.startswith("  [")]
    assert len(notes) == len(set(notes)) > 3 and set(notes) <= set(card("h200").sources.values())
    assert "[1]" in text and "60 MiB" in text


# -- this machine ------------------------------------------------------------------------------


def test_importing_the_table_loads_no_torch():
    code = "import sys, labkit.hardware; print('torch' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_detect_describes_this_machine():
    here = detect()
    assert isinstance(here, Machine)
    assert here.can_run in {"gpu", "interpreter", "torch-only", "no-torch"}
    assert here.python and here.platform and here.cpu and here.cores >= 1
    assert here.ram_bytes is None or here.ram_bytes > here.ram_free_bytes > 0
    import torch

    assert here.torch == torch.__version__
    if not torch.cuda.is_available():
        assert here.can_run != "gpu" and here.gpu_free_bytes is None


@pytest.mark.gpu
def test_detect_agrees_with_the_driver_on_the_card():
    import torch

    here = detect()
    about = torch.cuda.get_device_properties(0)
    assert here.gpu == about.name and here.gpu_total_bytes == about.total_memory
    assert 0 < here.gpu_free_bytes <= here.gpu_total_bytes
    if here.card is not None:
        assert here.card.sm_count == about.multi_processor_count
        assert here.card.l2_bytes == about.L2_cache_size
        assert here.card.compute_capability == f"{about.major}.{about.minor}"
        assert here.card.smem_per_block == about.shared_memory_per_block_optin
        assert here.card.smem_per_sm == about.shared_memory_per_multiprocessor
        assert about.total_memory < here.card.memory_bytes


def test_without_torch_and_triton_only_tables_are_promised(monkeypatch):
    monkeypatch.setattr(hardware, "_version", lambda package: None)
    here = detect()
    assert here.torch is None and here.triton is None and here.can_run == "no-torch"


def test_without_triton_torch_still_counts(monkeypatch):
    real = hardware._version
    monkeypatch.setattr(hardware, "_version", lambda p: None if p == "triton" else real(p))
    assert detect().can_run == "torch-only"


def test_a_torch_that_fails_to_import_is_a_machine_without_torch(monkeypatch):
    # None in sys.modules makes ``import torch`` raise, as a wheel for another CUDA does.
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(hardware, "_version", lambda package: "1.0")
    here = detect()
    assert here.can_run == "no-torch" and "torch" in here.problems


def test_a_broken_nvidia_smi_is_told_not_raised(monkeypatch):
    def explode():
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(hardware, "_nvidia_smi", explode)
    assert "TimeoutExpired" in detect().problems["nvidia-smi"]


def fake_smi(monkeypatch, tmp_path, text, code=0):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{text}\nEOF\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: str(tool))


def test_nvidia_smi_without_torch_names_the_card(monkeypatch, tmp_path):
    fake_smi(monkeypatch, tmp_path, "NVIDIA H200, 143771, 143000, 570.86, 9.0")
    monkeypatch.setattr(hardware, "_version", lambda package: None)
    here = detect()
    assert here.card is card("h200") and here.driver == "570.86" and here.gpu_count == 1
    assert here.gpu_free_bytes == 143000 * 2**20 and here.can_run == "no-torch"


def test_the_rtx_3060_with_8_gb_is_not_taken_for_the_one_with_12(monkeypatch, tmp_path):
    fake_smi(monkeypatch, tmp_path, "NVIDIA GeForce RTX 3060, 8192, 8000, 550.1, 8.6")
    monkeypatch.setattr(hardware, "_version", lambda package: None)
    here = detect()
    assert here.gpu == "NVIDIA GeForce RTX 3060" and here.card is None


def test_nvidia_smi_that_fails_or_talks_nonsense_leaves_the_cpu(monkeypatch, tmp_path):
    fake_smi(monkeypatch, tmp_path, "NVIDIA-SMI has failed", code=9)
    assert hardware._nvidia_smi() == []
    fake_smi(monkeypatch, tmp_path, "No devices were found")
    assert hardware._nvidia_smi() == []


class FakeCuda:
    def __init__(self, capability, built):
        self.capability, self.built = capability, built

    def get_device_capability(self, index):
        return self.capability

    def get_arch_list(self):
        return self.built


class FakeTorch:
    class version:
        hip = None

    def __init__(self, capability, built):
        self.cuda = FakeCuda(capability, built)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_86"], True),  # code for 8.6 runs on 8.9
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),  # PTX is compiled on the spot
        ((10, 0), ["sm_100a"], True),
        ((10, 3), ["sm_100a"], False),  # "a": that capability and no other
        ((10, 3), ["sm_100f"], True),  # "f": the family
    ],
)
def test_a_torch_without_code_for_the_gpu_is_told(capability, built, runs):
    able, why = hardware._torch_has_code(FakeTorch(capability, built))
    assert able is runs
    assert bool(why) is not runs
