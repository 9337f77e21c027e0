"""README.zh.md is kept in step with README.md: headings, commands, code, links, figures."""

import re
from collections import Counter

import pytest

from tests import house

ENGLISH = (house.ROOT / "README.md").read_text()
CHINESE = (house.ROOT / "README.zh.md").read_text()
FENCED = r"^```.*?^```"


def levels(text: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(text), re.M)]


def prose(text: str) -> str:
    return re.sub(FENCED, "", text, flags=re.M | re.S)


def code(text: str) -> list[str]:
    """Blocks without comments, which are translated."""
    blocks = re.findall(FENCED, text, re.M | re.S)
    return [re.sub(r" *# .*", "", block) for block in blocks]


def spans(text: str) -> Counter:
    return Counter(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text)))


def links(text: str) -> Counter:
    """Links to other files than the two themselves."""
    targets = re.findall(r"\]\(([^)\s#][^)\s]*)\)", prose(text))
    return Counter(target for target in targets if not target.startswith("README"))


def figures(text: str) -> Counter:
    """Numbers outside of code and links."""
    text = re.sub(r"`[^`]+`|\]\([^)]*\)|^\d+\. ", "", prose(text), flags=re.M)
    return Counter(re.findall(r"\d+(?:\.\d+)?", text))


def rows(text: str) -> list[int]:
    """Cells of every row of the tables."""
    return [line.count(" |") for line in prose(text).splitlines() if line.startswith("|")]


@pytest.mark.parametrize("of", [levels, code, spans, links, figures, rows])
def test_translation_has_the_same(of):
    english, chinese = of(ENGLISH), of(CHINESE)
    if isinstance(english, Counter):
        assert english - chinese == chinese - english == Counter()
    assert english == chinese


def test_each_leads_to_the_other():
    assert "](README.zh.md)" in ENGLISH
    assert "](README.md)" in CHINESE
