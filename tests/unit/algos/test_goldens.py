"""The vectors that are shipped with the repository, through the parity checker."""

from pathlib import Path

from tests.parity import report

FOLDER = Path(__file__).parents[2] / "goldens" / "rl"


def test_every_vector_is_met_when_the_shipped_goldens_run():
    results = list(report.run_folder(FOLDER))
    assert len(results) > 100
    assert [r for r in results if not r.ok] == []
