"""The scripted expert in the real LIBERO, where `make libero` has installed it."""

import pytest

from benchmarks.libero_expert import expert_success
from evac_jax.config.libero import LiberoConfig, problems
from tests.house import ROOT

PYTHON = ROOT / ".venv-libero/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-libero; `make libero` installs it"),
]
CONFIG = LiberoConfig(python=str(PYTHON), image_size=64)


def test_expert_succeeds_in_libero(tmp_path):
    assert problems(CONFIG) == []
    found = expert_success(CONFIG, per_task=1, out=tmp_path / "episodes.jsonl")
    assert len(found) == 10
    # Each task's first state; of all 500 the expert fails in a few.
    assert sum(success for episodes in found.values() for _, success, _ in episodes) >= 9
