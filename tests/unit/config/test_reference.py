"""docs/config.md is what the command makes, and holds every field."""

import subprocess
import sys

from algos import ALGORITHMS
from evac_jax.config.build import default_config
from evac_jax.config.fields import walk


def test_page_is_the_commands_output(repository):
    command = [sys.executable, "-m", "evac_jax.config.reference"]
    page = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    committed = (repository / "docs" / "config.md").read_text()
    assert page == committed, "run: python -m evac_jax.config.reference > docs/config.md"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    named = {row.split("`")[1] for row in rows}
    assert named == {field.name for name in ALGORITHMS for field in walk(default_config(name))}
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)


def test_reference_loads_no_torch(repository):
    code = "import sys, evac_jax.config.reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0
