"""The golden vectors that are shipped with the repository, through the parity checkers."""

from pathlib import Path

import pytest

from tests.parity import report

GOLDENS = Path(__file__).parents[2] / "goldens"


@pytest.mark.parametrize(("folder", "at_least"), [("rl", 100), ("openvla_oft", 15)])
def test_every_vector_is_met_when_the_shipped_goldens_run(folder, at_least):
    results = list(report.run_folder(GOLDENS / folder))
    assert len(results) > at_least
    assert [r for r in results if not r.ok] == []
