from pathlib import Path

from tests.parity import report

GOLDENS = Path(__file__).parents[2] / "goldens" / "openvla_oft"


def test_reduced_golden_vectors_are_met_when_there_are_no_weights():
    results = list(report.run_folder(GOLDENS))
    assert len(results) > 15
    assert [result for result in results if not result.ok] == []
