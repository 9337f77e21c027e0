import errno
import os
import signal
import subprocess
import sys

import pytest

from evac_jax.errors import StorageError
from evac_jax.files import claim

HOLD = """
import sys, time
from pathlib import Path
from evac_jax.files import claim
with claim.claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_is_taken_over_when_its_process_was_killed(tmp_path, repository):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=repository, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(StorageError, match=f"another process .process {holder.pid} on "),
            claim.claimed(tmp_path),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with claim.claimed(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / claim.LOCK_FILE).read_text()


def test_folder_is_gone_when_nothing_was_written_and_stays_when_something_was(tmp_path):
    with claim.claimed(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    with claim.claimed(tmp_path / "a" / "b") as folder:
        (folder / "metrics").touch()
    assert (tmp_path / "a" / "b").is_dir()
    empty = tmp_path / "mine"
    empty.mkdir()
    with claim.claimed(empty):
        pass
    assert empty.is_dir()  # it was there before


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
def test_full_or_read_only_disk_is_told_with_the_file(tmp_path, reason):
    with (
        pytest.raises(StorageError, match=r"cannot write 'x/metrics': .*make room"),
        claim.told_as_storage_error(tmp_path),
    ):
        raise OSError(reason, os.strerror(reason), "x/metrics")
    with pytest.raises(FileNotFoundError), claim.told_as_storage_error(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone", "/elsewhere/weights")
    for file in (tmp_path / "metrics", tmp_path.with_name(f"{tmp_path.name}.partial") / "frames"):
        with pytest.raises(StorageError), claim.told_as_storage_error(tmp_path):
            raise FileNotFoundError(errno.ENOENT, "gone", str(file))


def test_place_is_refused_before_any_work_when_it_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is a file, where a folder is needed"):
        claim.check_writable(tmp_path / "file" / "run")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may do all
    with pytest.raises(StorageError, match="cannot be written to; set --config.log.dir"):
        claim.check_writable(tmp_path / "runs" / "one")


def test_name_that_no_folder_can_have_is_told_when_it_is_made(tmp_path):
    claim.check_writable(tmp_path / ("x" * 300))
    with (
        pytest.raises(StorageError, match="File name too long"),
        claim.claimed(tmp_path / ("x" * 300)),
    ):
        pass


def test_lock_is_told_when_its_text_is_damaged(tmp_path):
    with claim.claimed(tmp_path):
        (tmp_path / claim.LOCK_FILE).write_bytes(b"\xff")
        with pytest.raises(StorageError, match="another process"), claim.claimed(tmp_path):
            pass


def test_lock_that_its_holder_has_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    lock, opened = claim._lock, []

    def removed_at_first(file, what):
        lock(file, what)
        if not opened:
            os.unlink(file.name)
        opened.append(file.name)

    monkeypatch.setattr(claim, "_lock", removed_at_first)
    with claim.written_alone(tmp_path / "out"):
        assert len(opened) == 2
        assert f"process {os.getpid()} on" in (tmp_path / ".lock-out").read_text()
    assert not list(tmp_path.iterdir())
