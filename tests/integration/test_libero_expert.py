"""The scripted expert in the real LIBERO. Needs .venv-libero, LIBERO_ROOT and LIBERO_STATES."""

import os

import pytest

from benchmarks.libero_expert import expert_success
from evac_jax.config.libero import LiberoConfig, problems
from tests.house import ROOT

CONFIG = LiberoConfig(
    root=os.environ.get("LIBERO_ROOT", ""),
    states=os.environ.get("LIBERO_STATES", ""),
    python=str(ROOT / ".venv-libero/bin/python"),
    image_size=64,
)


@pytest.mark.slow
def test_expert_succeeds_in_libero(tmp_path):
    if missing := problems(CONFIG):
        pytest.skip("; ".join(missing))
    found = expert_success(CONFIG, per_task=1, out=tmp_path / "episodes.jsonl")
    assert len(found) == 10
    # Each task's first state; of all 500 the expert fails in a few.
    assert sum(success for episodes in found.values() for _, success, _ in episodes) >= 9
