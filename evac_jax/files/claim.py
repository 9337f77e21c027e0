"""A folder or a file that one process at a time writes to.

The lock is the kernel's (flock): it ends with its process, however that ends, so one that a killed
process left is taken over at once. The text of its file tells others who holds it.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from absl import logging

from evac_jax.errors import StorageError

LOCK_FILE = ".lock"
# Full, over quota, over the largest size of a file, read-only.
TAKES_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def claimed(path: Path, *, numbered: bool = False) -> Iterator[Path]:
    """Make a folder if it is not there, keep other processes out of it, and yield its path.

    Folders that were made here and hold nothing in the end are removed.

    Args:
        numbered: where `path` exists, make <path>-2, -3 .. instead.

    Raises:
        StorageError: another process holds it, or it cannot be made or, inside the block, written.
    """
    with told_as_storage_error(path):
        made = numbered or not path.exists()
        parents = [parent for parent in path.parents if not parent.exists()]
        if numbered:
            path = _make_new(path)
        else:
            path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            try:
                yield path
            finally:
                if made and [file.name for file in path.iterdir()] == [LOCK_FILE]:
                    (path / LOCK_FILE).unlink()
                    path.rmdir()
                    with contextlib.suppress(OSError):  # something else lies there
                        for parent in parents:
                            parent.rmdir()


def _make_new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    number, new = 1, path
    while True:
        try:
            new.mkdir()
            return new
        except FileExistsError:
            number += 1
            new = path.with_name(f"{path.name}-{number}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK_FILE).open("a+", errors="replace") as file:
        _lock(file, folder)
        yield
        # It stays: who opened it before a removal would lock a file that nobody else sees.
        file.truncate(0)


@contextlib.contextmanager
def written_alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path`, a file or folder that need not be there.

    The lock is a hidden file beside it, which is gone in the end.

    Raises:
        StorageError: another process writes it.
    """
    lock = path.with_name(f"{LOCK_FILE}-{path.name}")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(lock.open("a+", errors="replace"))
            _lock(file, path)
            # One that its holder has removed since it was opened locks nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    break
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _lock(file: TextIO, what: Path) -> None:
    """Lock an open file, until it is closed, and write into it who holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise StorageError(
            f"{str(what)!r} is written to by another process ({file.read().strip()}); wait for it "
            "or end it, or choose another folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logging.warning("%s: not locked against a second process: %s", what, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


# What can be set to another folder in a run.
RUN_FOLDERS = "set --config.log.dir (or checkpoint.dir, video.dir) to a folder that can"


def check_writable(path: Path, advice: str = RUN_FOLDERS) -> None:
    """Refuse a place in which nothing can be made, before any work is done.

    Args:
        path: a folder, or a file or folder that is yet to be made.
        advice: what the user can do.

    Raises:
        StorageError: names the part that exists and cannot be written to.
    """
    # `Path.exists` fails below a folder that this user may not look into.
    there = next(part for part in (path, *path.absolute().parents) if os.path.exists(part))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is a file, where a folder is needed"
        raise StorageError(f"{str(there)!r} {what}; {advice}")


@contextlib.contextmanager
def told_as_storage_error(path: Path) -> Iterator[None]:
    """Raise an OSError of a full or read-only disk as a message about the work in `path`.

    Raises:
        StorageError: names the file and the reason.
    """
    try:
        yield
    except OSError as error:
        # A new folder may be written as `atomic.whole_folder` does, under another name at first.
        written = (path.absolute(), path.absolute().with_name(f"{path.name}.partial"))
        file = error.filename and Path(error.filename).absolute()
        ours = file and any(file.is_relative_to(folder) for folder in written)
        if not (ours or error.errno in TAKES_NO_MORE):
            raise
        raise StorageError(
            f"{str(path)!r}: cannot write {str(error.filename or 'a file')!r}: {error.strerror}; "
            "make room, or let the folder be written to"
        ) from error
