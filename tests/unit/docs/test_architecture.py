"""docs/architecture.md names every package, and the layers in the order of `house.LAYERS`."""

import re

from tests import house

PAGE = (house.ROOT / "docs" / "architecture.md").read_text()


def _section(title: str) -> list[list[str]]:
    """Cells of the rows of a section's table, its header left out."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_page_names_every_package():
    named = {row[0].strip("`") for row in _section("Where things are")}
    folders = {file.rpartition("/")[0] for file in house.shipped_files()}
    assert named == folders - {""} | {"launch.py", "benchmarks", "docs", "examples", "tests"}


def test_page_lists_the_layers_in_the_order_of_the_table():
    for index, (number, files, _) in enumerate(rows := _section("Layers")):
        assert int(number) == index
        expected = {row.files for row in house.LAYERS if row.rank == index}
        assert set(re.findall(r"`([^`]+)`", files)) == expected
    assert len(rows) == house.LAYERS[-1].rank + 1
