"""Files of JSON lines in a run's folder; `metrics.jsonl` is the one of its figures."""

import json
from pathlib import Path
from typing import Any

from absl import logging

from evac_jax.errors import DataError

METRICS_FILE = "metrics.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, [] if there is no file; warn of damaged lines.

    Raises:
        DataError: a line holds something else than an object.
    """
    return list(_numbered(path).values())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's figures, [] if it has none yet.

    Raises:
        DataError: a line is no object with the number of an iteration.
    """
    path = folder / METRICS_FILE
    lines = _numbered(path)
    for number, line in lines.items():
        if not isinstance(line.get("iteration"), int):
            raise DataError(
                f"{path}, line {number}: expected an object with an integer `iteration`, got "
                f"{json.dumps(line)[:80]}; restore the file or remove the line"
            )
    return list(lines.values())


def _numbered(path: Path) -> dict[int, dict[str, Any]]:
    """Return {number of the line, from 1: its object}."""
    lines: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), start=1):
        try:
            line = json.loads(text)
        except ValueError:  # no JSON, or bytes that are no text
            # A killed process may leave half a line. The run can continue without it.
            logging.warning("%s: line %d is damaged and was dropped", path, number)
            continue
        if not isinstance(line, dict):
            raise DataError(
                f"{path}, line {number}: expected an object, got {json.dumps(line)[:80]}"
            )
        lines[number] = line
    return lines
