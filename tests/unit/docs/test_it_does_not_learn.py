"""docs/it_does_not_learn.md names metrics and settings that there are."""

import re

from evac_jax.config.build import default_config
from evac_jax.config.fields import walk
from tests import house

TEXT = (house.ROOT / "docs" / "it_does_not_learn.md").read_text()
SPANS = set(re.findall(r"`([^`\s]+)`", TEXT))
FILES = {"report.html", "metrics.jsonl"}


def test_every_metric_of_the_page_exists():
    page = (house.ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE))
    named = {
        re.sub(r"^eval/(imagined|ground_truth)/", "env/", span) for span in SPANS if "/" in span
    }
    assert named
    assert named <= documented


def test_every_setting_of_the_page_exists():
    known = {field.name for kind in ("grpo", "ppo") for field in walk(default_config(kind))}
    named = {span for span in SPANS if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span)} - FILES
    assert named
    assert named <= known


def test_every_row_of_a_section_begins_with_a_metric():
    sections = TEXT.split("\n## ")[1:]
    rows = [line for text in sections for line in text.splitlines() if line.startswith("| ")]
    heads = ("| metric |", "| --- |")
    assert all(row.startswith("| `") for row in rows if not row.startswith(heads))
