"""Initial states and tasks as LIBERO's package and its repository have them."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from evac_jax.config.libero_files import TASK_MAP, LiberoFiles
from evac_jax.errors import ConfigError, DataError
from evac_jax.sim.libero_tasks import Suite, load_suite, read_states

SUITE = "libero_goal"
TENFOLD = Suite("s", tuple("abcdefghij"), (np.zeros((50, 5)),) * 10)


@pytest.fixture
def files(tmp_path):
    """A checkout with an empty table of tasks."""
    (tmp_path / "benchmark").mkdir()
    return LiberoFiles.find(str(tmp_path), "", "")


def write_states(files: LiberoFiles, task: str, content: object) -> Path:
    """Write what LIBERO's repository has for a task: a torch file."""
    path = files.states / SUITE / f"{task}.pruned_init"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
    return path


def write_map(files: LiberoFiles, *tasks: str) -> None:
    (files.root / TASK_MAP).write_text(
        f"libero_task_map = {{\n    {SUITE!r}: {list(tasks)!r}\n}}\n"
    )


def test_states_come_in_the_benchmarks_order_from_either_kind_of_file(files):
    write_map(files, "z_last_name_first", "a_task")
    states = {"z_last_name_first": np.full((2, 3), 0.1), "a_task": np.arange(8.0).reshape(2, 4)}
    write_states(files, "z_last_name_first", states["z_last_name_first"])
    np.savez(files.states / SUITE / "a_task.pruned_init.npz", states=states["a_task"])
    suite = load_suite(SUITE, files)
    assert suite.name == SUITE
    assert suite.tasks == ("z_last_name_first", "a_task")
    assert suite.instructions == ("z last name first", "a task")
    for stored, task in zip(suite.states, suite.tasks, strict=True):
        np.testing.assert_array_equal(stored, states[task])


def test_chosen_tasks_alone_are_numbered(files):
    write_map(files, "a", "b", "c")
    for number, task in enumerate("abc"):
        write_states(files, task, np.full((2, 3), float(number)))
    suite = load_suite(SUITE, files, (2, 0))
    assert suite.instructions == ("c", "a")
    tasks, states = suite.locate(np.arange(suite.num_starts))
    assert tasks.tolist() == [0, 1, 0, 1]
    assert suite.states[tasks[2]][states[2]].tolist() == [2, 2, 2]


def test_states_that_the_benchmark_left_out_come_behind_its_own(files):
    write_map(files, "a_task")
    every = np.arange(15.0).reshape(5, 3)
    write_states(files, "a_task", every[[1, 4]])
    with pytest.raises(DataError, match=r"a_task\.init\.npz"):
        load_suite(SUITE, files, extra_states=True)
    np.savez(files.states / SUITE / "a_task.init.npz", states=every)
    suite = load_suite(SUITE, files, extra_states=True)
    np.testing.assert_array_equal(suite.states[0], every[[1, 4, 0, 2, 3]])


class _Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickle_with_code_is_refused_and_not_run(files, capsys):
    path = write_states(files, "a_task", _Code())
    with pytest.raises(DataError, match="print"):
        read_states(path)
    assert "code ran" not in capsys.readouterr().out


def test_pickle_may_call_no_codec_but_latin1(files):
    path = files.root / "a_task.pruned_init"
    with zipfile.ZipFile(path, "w") as archive:
        text = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
        archive.writestr("archive/data.pkl", text)
    with pytest.raises(DataError, match="rot13"):
        read_states(path)


def test_damaged_files_are_told_by_name(files):
    with pytest.raises(ConfigError, match="libero_suite_task_map"):
        load_suite(SUITE, files)
    (files.root / TASK_MAP).write_text("a = 1\nb = 2\n")
    with pytest.raises(ConfigError, match="libero_suite_task_map"):
        load_suite(SUITE, files)
    write_map(files, "a_task")
    with pytest.raises(DataError, match=r"a_task\.pruned_init"):
        load_suite(SUITE, files)
    path = write_states(files, "a_task", {"no": "array"})
    with pytest.raises(DataError, match="expected an array"):
        load_suite(SUITE, files)
    write_states(files, "a_task", np.zeros((2, 3), np.float32))
    with pytest.raises(DataError, match="float32"):
        load_suite(SUITE, files)
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="a_task"):
        load_suite(SUITE, files)
    path.with_name("a_task.pruned_init.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="npz"):
        load_suite(SUITE, files)


def test_tasks_need_equally_many_states(files):
    write_map(files, "a_task", "b_task")
    write_states(files, "a_task", np.zeros((2, 3)))
    write_states(files, "b_task", np.zeros((1, 3)))
    with pytest.raises(DataError, match="as many initial states"):
        load_suite(SUITE, files)


def test_last_tenth_of_the_states_is_held_out_in_every_task():
    starts = np.arange(500)
    held_out = TENFOLD.is_held_out(starts)
    np.testing.assert_array_equal(held_out, starts >= 450)


def test_starts_are_spread_over_states_with_every_task_in_turn():
    order = TENFOLD.spread(np.arange(500))
    assert sorted(order) == list(range(500))
    np.testing.assert_array_equal(order % 10, np.arange(500) % 10)
    at = np.flatnonzero(TENFOLD.is_held_out(order[::10]))
    assert np.diff([-1, *at, 50]).max() <= 13  # no stretch is long without one
    np.testing.assert_array_equal(TENFOLD.spread(np.arange(3, 17)), [*range(3, 10), *range(10, 17)])
