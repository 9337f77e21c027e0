"""The rows of `benchmarks.compiled`, its last line, and the table of docs/memory.md."""

import pytest

from benchmarks import compiled
from benchmarks.compiled import Found, Row
from evac_jax.memory import trainer
from evac_jax.memory.parts import GB, peak
from evac_jax.tools.memory.account import Account, Collective
from evac_jax.tools.memory.compile import Compiled
from evac_jax.tools.memory.topology import Topology
from tests import house

ROWS = {row.name: row for row in compiled.rows()}
PAGE = (house.ROOT / "docs/memory.md").read_text().splitlines()
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE
    if any(line.startswith(f"| {name} |") for name in ROWS)
]


def _found(name, *, fused=True, peak_bytes=10**9):
    sent = Collective("all-gather", 1, 2 * 10**12, 2, False, "main/g")
    told = Compiled(1.0, peak=peak_bytes, account=Account(1.0, (sent,), fused))
    return Found(ROWS[name], {"sample": told, "update": told}, 1.02e9)


def test_every_full_size_preset_has_a_row_and_names_are_unique():
    assert len(ROWS) == len(compiled.rows())
    files = {
        f"{file}.py:{preset}"
        for file in ("grpo", "ppo")
        for preset in ("libero_spatial", "lora", "one_gpu_80gb")
    }
    assert files == {row.config for row in ROWS.values()}


@pytest.mark.parametrize("name", ["spatial64", "spatial2", "lora8"])
def test_every_chip_gets_the_micro_batch_of_the_published_run(name):
    row = ROWS[name]
    config = row.request("update").setup().config
    assert config.algo.micro_batch == 4 * Topology.parse(row.topology).count
    assert config.algo.global_batch == 8 * config.algo.micro_batch


def test_last_line_tells_bare_numbers_of_the_rows_that_are_there():
    line = compiled.last_line({"lora8": _found("lora8")})
    assert line == "lora8_tb=1.000 memory_ratio_min=1.020 memory_ratio_max=1.020"
    found = {name: _found(name) for name in ("lora8", "spatial8", "spatial64")}
    assert compiled.last_line(found).split()[1:3] == ["spatial64_tb=1.000", "spatial8_peak_gb=1.00"]
    assert compiled.last_line(found).endswith("fused_attention=1")
    found["spatial8"].programs["sample"] = _found("spatial8", fused=False).programs["sample"]
    assert compiled.last_line(found).endswith("fused_attention=0")


def test_a_program_that_xla_refused_has_no_ratio():
    refused = Found(
        Row("x", "grpo.py:lora", "v5e:2x4"), {"update": Compiled(1.0, "too large")}, 1e9
    )
    assert refused.ratio == 0
    assert "memory_ratio" not in compiled.last_line({"x": refused})


def test_estimates_on_the_page_are_within_the_goal():
    assert {row[0] for row in TABLE} >= {
        "spatial8",
        "spatial64",
        "lora8",
        "one_gpu",
        "spatial8_v5p",
    }
    for row in TABLE:
        ratio = float(row[6]) / float(row[5])
        assert 0.95 <= ratio <= 1.10, row
        assert float(row[7]) == pytest.approx(ratio, abs=0.003)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_estimates_on_the_page_are_those_of_the_tool(row):
    found, topology = ROWS[row[0]], Topology.parse(row[2])
    setup = found.request("update").setup()
    parts = trainer.trainer_parts(
        setup.config, setup.sizes, setup.episode, topology.count, topology.platform
    )
    assert row[6] == f"{peak(parts)[0] / GB:.2f}"
