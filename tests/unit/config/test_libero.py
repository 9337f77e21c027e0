"""What keeps LIBERO from being run is said before anything starts, in one message."""

import dataclasses
import io
import pickle
import sys
import zipfile

import numpy as np
import pytest

from evac_jax.config import libero
from evac_jax.config.build import default_config, from_config_dict, to_dict
from evac_jax.config.fields import value_problems
from evac_jax.config.libero import LiberoConfig
from evac_jax.errors import ConfigError, DataError
from evac_jax.sim.libero_tasks import load_suite
from evac_jax.tools.episodes import collect
from evac_jax.tools.episodes import import_libero_states as tool
from tests.unit.sim import libero_fakes


def test_nothing_is_wrong_when_packages_and_files_are_there(tmp_path, monkeypatch):
    config = libero_fakes.write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert libero.problems(config) == []
    assert "libero" not in sys.modules  # looked for, not imported


def test_everything_missing_is_told_at_once_when_libero_is_chosen(tmp_path):
    values = to_dict(default_config("grpo"))
    values["eval"]["ground_truth"] = "libero"
    values["libero"]["root"] = str(tmp_path)
    with pytest.raises(ConfigError) as raised:
        from_config_dict(values)
    told = str(raised.value)
    for text in (
        "'assets'",
        "bddl_files/libero_spatial",
        "config.libero.states: needed",
        "import_libero_states",
        "no libero, robosuite, mujoco, bddl",
        "requirements-libero.txt",
    ):
        assert text in told


def test_nothing_is_asked_for_when_libero_is_not_chosen():
    with pytest.raises(ConfigError) as raised:
        from_config_dict(to_dict(default_config("grpo")))
    assert "libero" not in str(raised.value)


def test_only_policies_and_random_play_libero():
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, ground_truth="libero"),
        collect=dataclasses.replace(config.collect, out="x", mix="expert=1"),
    )
    with pytest.raises(ConfigError, match=r"config\.collect\.mix"):
        collect.run(config)


def test_another_interpreter_is_asked_for_its_packages(tmp_path):
    config = dataclasses.replace(libero_fakes.write(tmp_path), python=sys.executable)
    (told,) = libero.problems(config)
    assert sys.executable in told
    assert "robosuite" in told
    (told,) = libero.problems(dataclasses.replace(config, python="/no/such/python"))
    assert "cannot be run" in told


def test_episodes_are_as_long_as_the_suite_says():
    lengths = {suite: LiberoConfig(suite=suite).episode_steps for suite in libero.MAX_STEPS}
    assert [lengths[f"libero_{n}"] for n in ("spatial", "object", "goal", "10")] == [
        220, 280, 300, 520
    ]  # fmt: skip
    (told,) = value_problems(LiberoConfig(suite="libero_spacial"), "libero.")
    assert "config.libero.suite: expected one of" in told
    assert "Did you mean 'libero_spatial'?" in told


def write_states(root, suite, task, content):
    folder = root / "init_files" / suite
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{task}.pruned_init", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")


def write_map(root, tasks):
    (root / "benchmark").mkdir()
    (root / tool.TASK_MAP).write_text(f"libero_task_map = {{\n    'libero_goal': {tasks!r}\n}}\n")


def test_states_are_converted_in_the_benchmarks_order(tmp_path):
    write_map(tmp_path, ["z_last_name_first", "a_task"])
    states = {"z_last_name_first": np.full((2, 3), 0.1), "a_task": np.arange(8.0).reshape(2, 4)}
    for task, array in states.items():
        write_states(tmp_path, "libero_goal", task, array)
    tool.main(["--root", str(tmp_path), "--out", str(tmp_path / "out"), "--suites", "libero_goal"])
    suite = load_suite(tmp_path / "out" / "libero_goal.npz")
    assert suite.tasks == ("z_last_name_first", "a_task")
    assert suite.instructions == ("z last name first", "a task")
    for stored, task in zip(suite.states, suite.tasks, strict=True):
        np.testing.assert_array_equal(stored, states[task])


class _Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    write_map(tmp_path, ["a_task"])
    write_states(tmp_path, "libero_goal", "a_task", _Code())
    with pytest.raises(DataError, match="print"):
        tool.convert(tmp_path, tmp_path / "out", ["libero_goal"])
    assert "code ran" not in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())


def test_pickle_may_call_no_codec_but_latin1():
    text = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    with pytest.raises(DataError, match="rot13"):
        tool.unpickle(io.BytesIO(text), "states")


def test_damaged_files_are_told_by_name(tmp_path):
    with pytest.raises(DataError, match="libero_suite_task_map"):
        tool.convert(tmp_path, tmp_path / "out", ["libero_goal"])
    write_map(tmp_path, ["a_task"])
    with pytest.raises(DataError, match=r"a_task\.pruned_init"):
        tool.convert(tmp_path, tmp_path / "out", ["libero_goal"])
    write_states(tmp_path, "libero_goal", "a_task", {"no": "array"})
    with pytest.raises(DataError, match="expected an array"):
        tool.convert(tmp_path, tmp_path / "out", ["libero_goal"])
    (tmp_path / "libero_goal.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="import_libero_states"):
        load_suite(tmp_path / "libero_goal.npz")


def test_tasks_need_equally_many_states(tmp_path):
    write_map(tmp_path, ["a_task", "b_task"])
    write_states(tmp_path, "libero_goal", "a_task", np.zeros((2, 3)))
    write_states(tmp_path, "libero_goal", "b_task", np.zeros((1, 3)))
    with pytest.raises(DataError, match="as many initial states"):
        tool.convert(tmp_path, tmp_path / "out", ["libero_goal"])
