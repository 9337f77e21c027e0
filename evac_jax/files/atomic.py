"""Files and folders that are either whole or not there, whatever happens while they are written.

A rename is atomic only within one file system, so the temporary one lies beside its destination.
Its name is always the same: the next writer takes the place of what a killed one left. There must
be one writer of a file at a time; of a folder, a second one is refused.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from evac_jax.files.claim import written_alone


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` if the block ends well.

    It keeps the suffix, from which encoders choose the format. Folders above `path` are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a path to make a folder at, `<path>.partial`; rename it if the block ends well.

    Args:
        path: name of the whole folder; those above it are made.
        replace: a folder that is there already stays until the new one is whole. Without it, the
            rename fails where `path` is a folder with files in it; check that before any work.

    Raises:
        StorageError: another process writes it.
    """
    partial, old = (path.with_name(f"{path.name}.{end}") for end in ("partial", "old"))
    with written_alone(path):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
            if replace and path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if replace:
            shutil.rmtree(old, ignore_errors=True)


def keep(path: Path) -> None:
    """Rename what is in the way of a new file or folder: <stem>_<number><suffix>, the next free."""
    number, kept = 1, path
    while kept.exists():
        kept = path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
    if kept != path:
        os.replace(path, kept)
