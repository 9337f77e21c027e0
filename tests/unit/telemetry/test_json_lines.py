import pytest

from evac_jax.errors import DataError
from evac_jax.telemetry import json_lines


def test_run_without_figures_has_no_lines(tmp_path):
    assert json_lines.read_metrics(tmp_path) == []


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    (tmp_path / json_lines.METRICS_FILE).write_text('{"iteration": 1}\n{"iter')
    assert json_lines.read_metrics(tmp_path) == [{"iteration": 1}]


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"iteration": "2"}', "[2]"])
def test_line_without_an_iteration_is_refused_with_its_number(tmp_path, line):
    (tmp_path / json_lines.METRICS_FILE).write_text(f'{{"iteration": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: expected an object"):
        json_lines.read_metrics(tmp_path)


def test_line_of_bytes_that_are_no_text_is_dropped(tmp_path):
    (tmp_path / json_lines.METRICS_FILE).write_bytes(b'{"iteration": 1}\n{"a": "\xff"}\n\x00\n')
    assert json_lines.read_metrics(tmp_path) == [{"iteration": 1}]
