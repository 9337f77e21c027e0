import json

import pytest
from absl import logging

from evac_jax.telemetry import warning_log


def _kept(folder) -> list[tuple[str, str]]:
    path = folder / warning_log.WARNINGS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line["level"], line["text"]) for line in map(json.loads, lines)]


def test_warnings_are_kept_from_the_moment_at_which_the_run_exists(tmp_path):
    with warning_log.kept_in(tmp_path, "config.json"):
        logging.warning("early %d", 1)
        assert _kept(tmp_path) == []
        (tmp_path / "config.json").touch()
        warning_log.flush()
        assert _kept(tmp_path) == [("warning", "early 1")]
        logging.info("not kept")
        logging.error("late")
    logging.warning("after")
    assert _kept(tmp_path) == [("warning", "early 1"), ("error", "late")]


def test_nothing_is_left_when_the_run_never_began(tmp_path):
    with warning_log.kept_in(tmp_path, "config.json"):
        logging.warning("lost")
    assert list(tmp_path.iterdir()) == []


def test_error_that_ends_the_run_is_kept(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError), warning_log.kept_in(tmp_path, "config.json"):  # noqa: PT011
        raise ValueError("diverged")
    assert _kept(tmp_path) == [("error", "ended by ValueError: diverged")]


def test_run_goes_on_when_a_warning_cannot_be_written(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / warning_log.WARNINGS_FILE).mkdir()
    with warning_log.kept_in(tmp_path, "config.json"):
        logging.warning("the disk is full")
