"""Checks that what a training tool continues from is that of the same run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evac_jax.errors import CheckpointError, DataError


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


def check_folder(out: Path, *marks: str) -> None:
    """Refuse a folder of other files: a tool only continues what it began itself.

    Args:
        out: the folder; a missing or empty one is new.
        marks: names that the tool leaves there from its beginning on.

    Raises:
        DataError: `out` is a file, or holds files and none of `marks`.
    """
    if out.is_dir():
        names = {path.name for path in out.iterdir() if path.name[0] != "."}
        if not names or names & set(marks):
            return
    if out.exists():
        raise DataError(
            f"{out} exists and holds nothing to go on with (no {marks[0]}); choose another folder "
            "or remove it"
        )
