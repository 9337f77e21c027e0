"""The site of the pages, `make docs`."""

import re
import runpy
import subprocess

import pytest

from tests import house
from tests.unit.docs.pages import PAGES, name

SETTINGS = runpy.run_path(str(house.ROOT / "docs" / "conf.py"))


def test_every_page_stands_in_the_navigation_once():
    entries = [entry for pages in SETTINGS["NAVIGATION"].values() for entry in pages]
    shown = [re.sub(r"^.*<(.*)>$", r"\1", entry) + ".md" for entry in entries]
    assert sorted([*shown, "README.md"]) == sorted(map(name, PAGES))


@pytest.mark.slow
def test_site_is_built_without_a_warning(repository, tmp_path):
    program = repository / ".venv-docs" / "bin" / "sphinx-build"
    if not program.exists():
        pytest.skip("no .venv-docs; `make docs` makes it")
    strict = ("--quiet", "--fresh-env", "--nitpicky", "--fail-on-warning")
    done = subprocess.run(
        [program, *strict, "--conf-dir", "docs", ".", tmp_path / "site"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "site" / "README.html").read_text()
    assert "Algorithm author" in start
    assert 'href="docs/config.html"' in start
    assert "README.html" in (tmp_path / "site" / "index.html").read_text()
