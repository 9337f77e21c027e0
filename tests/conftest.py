"""Settings that must hold before JAX starts, and what all of pytest's processes share.

Workers of pytest-xdist and the commands that tests start inherit the environment.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Four devices, so that sharding is real.
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=4))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tiny programs that run a few times: optimising them would take longest.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process; it clears up at its end
    _programs = tempfile.TemporaryDirectory(prefix="evac_jax_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

REPOSITORY = Path(__file__).parent.parent
LONG = tuple(str(REPOSITORY / "tests" / name) for name in ("integration", "unit/tools"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that all processes end at about the same time."""
    items.sort(key=lambda item: not str(item.path).startswith(LONG))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root, for tests that start commands."""
    return REPOSITORY


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return (name, make) -> folder that `make(folder)` wrote, for all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / name).exists():
                make(base / f"{name}.partial")
                (base / f"{name}.partial").rename(base / name)
        return base / name

    return folder_of


@pytest.fixture(scope="session")
def weights(made_once) -> Path:
    """Folder with world_model/, reward/, pose_model/ and policy/, the smallest that work."""
    from tests.integration import tiny_weights

    return made_once("weights", tiny_weights.write)
