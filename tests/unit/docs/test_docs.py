"""Links of the pages lead somewhere, and the commands that they name exist."""

import importlib.util
import re

import pytest

from tests import house
from tests.unit.docs.pages import FOREIGN, PAGES, name


def _anchors(text: str) -> set[str]:
    """Names by which GitHub links to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(file.read_text()), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_of_commands_exist(page):
    programs = r"(?:python|\$PY|PY|torchrun\b.*?) -m (?:-- )?([\w.]+\w)"
    for module in re.findall(programs, page.read_text()):
        if module not in FOREIGN:
            assert importlib.util.find_spec(module), f"{page.name}: python -m {module}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_backticks_exist(page):
    folders = "|".join((*house.SOURCES, "docs"))
    for path in re.findall(rf"`((?:{folders})/[\w/.]+)`", page.read_text()):
        assert (house.ROOT / path).exists(), f"{page.name}: {path}"
