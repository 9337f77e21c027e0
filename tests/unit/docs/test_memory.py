"""Tables of docs/presets.md and docs/memory.md hold what `evac_jax.tools.memory` prints."""

import re
from pathlib import Path

import pytest

from evac_jax.memory import trainer
from evac_jax.memory.parts import GB, peak
from evac_jax.tools.memory import __main__ as memory
from evac_jax.tools.memory.layouts import layouts

DOCS = Path(__file__).parents[3] / "docs"


def _rows(page: str, first_cell: str) -> list[list[str]]:
    """Cells of the table rows of a page whose first cell begins with a pattern."""
    lines = (DOCS / page).read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if re.match(first_cell, row[0])]


PRESETS = _rows("presets.md", r"`(grpo|ppo)\.py:")
TRAINERS = _rows("memory.md", r"`--devices \d")


def _setup(file: str, flags=()):
    return memory.read_setup(memory.read_config(file, flags), "", "")


def test_pages_have_the_tables():
    assert len(PRESETS) == 6
    assert len(TRAINERS) == 2


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: row[0])
def test_page_of_presets_agrees_with_the_command(row):
    name, _, trains, hardware, device, host = row
    setup = _setup(f"configs/{name.strip('`')}")
    trained, _ = trainer.count(setup.sizes)
    count = f"all {trained / 1e9:.1f} B weights" if trained > 1e9 else f"{trained / 1e6:.0f} M"
    assert trains == count
    collocated = layouts(setup, int(hardware.split()[0]))[0]
    assert collocated.line == f"device {device}, host {host}"


@pytest.mark.slow
@pytest.mark.parametrize("row", TRAINERS, ids=lambda row: row[0])
def test_page_of_memory_agrees_with_the_command_about_the_trainer(row):
    options = row[0].split("`")[1].split()
    file = "configs/grpo.py:libero_spatial"
    setup = _setup(file, ["--config.policy.compute_dtype=float32", *options[2:]])
    devices = int(options[1])
    parts = trainer.trainer_parts(setup.config, setup.sizes, setup.episode, devices, "cpu")
    assert row[2] == f"{peak(parts)[0] / GB:.2f} GB"
