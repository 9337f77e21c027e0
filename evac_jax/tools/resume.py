"""The progress of a training tool: written whole or not at all, and continued by the same run."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evac_jax.errors import CheckpointError, DataError, StorageError
from evac_jax.files import claim
from evac_jax.files.atomic import replacing


@contextlib.contextmanager
def saving(path: Path, *errors: type[Exception]) -> Iterator[Path]:
    """Yield a temporary path for a progress file, see `replacing`; an earlier one stays till then.

    Args:
        path: of the progress.
        errors: what a writer raises instead of an OSError.

    Raises:
        StorageError: it cannot be written, such as to a full disk.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, *errors) as error:
        raise StorageError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}; make room, or "
            "let the folder be written to, and give the command again: it goes on from the last "
            "progress, if one was saved"
        ) from error


def damaged(path: Path, why: object) -> CheckpointError:
    """Return the error that a progress file is not whole."""
    return CheckpointError(f"{path} is damaged ({why}): remove it to begin anew")


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
        StorageError: nothing can be written there.
    """
    is_ours = not out.exists()
    if out.is_dir():
        names = {path.name for path in out.iterdir() if path.name[0] != "."}
        is_ours = not names or bool(names & set(marks))
    if not is_ours:
        raise DataError(
            f"{out} exists and holds nothing to go on with (no {marks[0]}); choose another folder "
            "or remove it"
        )
    claim.check_writable(out, "choose another folder")
