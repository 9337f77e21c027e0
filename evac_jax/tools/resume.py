"""Checks that the saved progress of a training tool belongs to the run that continues from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evac_jax.errors import CheckpointError


def check_same_run(path: Path, saved: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
    """Raise if the progress was made with other arguments, because it would be another run.

    Args:
        path: of the progress, for the message.
        saved: arguments of the run that saved the progress.
        setup: arguments of this run.

    Raises:
        CheckpointError: names every argument that differs, with both values.
    """
    differing = [
        f"{name} was {saved.get(name)!r} and is {setup.get(name)!r}"
        for name in sorted({*saved, *setup})
        if saved.get(name) != setup.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differing)}. Run with the same arguments "
            "to go on, or remove the file to start anew"
        )
