import signal
import subprocess
import sys

import pytest

from evac_jax.errors import StorageError
from evac_jax.files.atomic import keep, replacing, whole_folder

WRITE = """
import sys, time
from pathlib import Path
from evac_jax.files.atomic import whole_folder
with whole_folder(Path(sys.argv[1])) as partial:
    partial.mkdir()
    (partial / "file").write_text("content")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_old_file_stays_when_replacing_it_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "above" / "folder"
    with whole_folder(path) as partial:
        partial.mkdir()
        (partial / "file").write_text("content")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["file"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("replace", [False, True])
def test_nothing_is_left_when_filling_a_folder_fails(tmp_path, replace):
    path = tmp_path / "folder"

    def fail():
        with whole_folder(path, replace=replace) as partial:
            partial.mkdir()
            (partial / "file").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_gone_when_a_folder_is_written(tmp_path):
    left = tmp_path / "folder.partial"
    left.mkdir()
    (left / "half").write_text("half")
    with whole_folder(tmp_path / "folder") as partial:
        assert partial == left
        assert not left.exists()
        left.mkdir()
    assert not list((tmp_path / "folder").iterdir())


def test_old_folder_stays_when_it_is_not_to_be_replaced(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")

    def write(**options):
        with whole_folder(path, **options) as partial:
            partial.mkdir()
            (partial / "new").write_text("new")

    with pytest.raises(OSError, match="not empty"):
        write()
    assert [file.name for file in path.iterdir()] == ["old"]
    write(replace=True)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_second_writer_of_a_folder_is_refused_and_the_first_ends_well(tmp_path, repository):
    path = tmp_path / "folder"

    def begin():
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE, str(path)],
            cwd=repository,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert writer.stdout.readline() == b"writing\n"
        return writer

    killed = begin()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    first = begin()  # takes the place of the killed one
    try:
        with (
            pytest.raises(
                StorageError,
                match=f"folder' is written to by another process .process {first.pid} on",
            ),
            whole_folder(path),
        ):
            pytest.fail("two write")
    finally:
        first.communicate()
    assert (path / "file").read_text() == "content"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_in_the_way_is_kept_under_the_next_number(tmp_path):
    path = tmp_path / "out.aside"
    for name in ("one", "two"):
        keep(path)
        path.mkdir()
        (path / name).touch()
    assert {file.parent.name: file.name for file in tmp_path.glob("*/*")} == {
        "out_1.aside": "one",
        "out.aside": "two",
    }
