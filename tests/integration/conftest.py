"""One set of weights and one cache of compiled programs for all tests that start `launch.py`."""

import pytest

from tests.integration.launcher import Launcher, write_weights


@pytest.fixture(scope="session")
def launcher(repository, tmp_path_factory) -> Launcher:
    folder = tmp_path_factory.mktemp("launch")
    return Launcher(repository, write_weights(folder / "weights", repository), folder)
