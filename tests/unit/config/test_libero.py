"""What keeps LIBERO from being run is said before anything starts, in one message."""

import dataclasses
import shutil
import sys

import pytest

from evac_jax.config import libero
from evac_jax.config.build import default_config, from_config_dict, to_dict
from evac_jax.config.fields import value_problems
from evac_jax.config.libero import LiberoConfig
from evac_jax.config.libero_files import ASSET_PACKAGE
from evac_jax.errors import ConfigError
from evac_jax.tools.episodes import collect
from tests.unit.sim import libero_fakes


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The stand-in's settings; its packages are installed for processes that start now."""
    config = libero_fakes.write(tmp_path)
    for name, value in libero_fakes.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return config


def test_nothing_is_wrong_when_packages_and_files_are_there(package):
    assert libero.problems(package) == []
    assert "libero" not in sys.modules  # looked for, not imported


def test_files_of_the_installed_package_are_found_when_no_root_is_named(package, tmp_path):
    config = dataclasses.replace(package, root="")
    assert libero.problems(config) == []
    root = tmp_path / "packages/libero/libero"
    assert config.files.root == root
    assert config.files.assets == root / "assets"
    # Newer packages have code alone in that folder, and assets in a package of their own.
    (tmp_path / "packages" / ASSET_PACKAGE).mkdir()
    shutil.move(root / "assets", tmp_path / "packages" / ASSET_PACKAGE / "assets")
    (root / "assets").mkdir()
    (root / "assets/hope_objects.py").write_text("")
    assert libero.problems(config) == []
    (told,) = libero.problems(package)
    assert "bowl.xml" in told


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("assets/objects/bowl/visual/bowl.msh", "config.libero.root: assets: missing"),
        ("assets/textures/wood.png", "config.libero.root: assets: missing"),
        ("assets/objects/bowl/akita_black_bowl.xml", "config.libero.root: assets: missing"),
        (f"bddl_files/libero_spatial/{libero_fakes.TASKS[1]}.bddl", "config.libero.root: missing"),
        (
            f"init_files/libero_spatial/{libero_fakes.TASKS[0]}.pruned_init.npz",
            "config.libero.states: missing",
        ),
    ],
)
def test_missing_file_of_a_task_is_told_by_name(package, tmp_path, gone, told):
    (tmp_path / "packages/libero/libero" / gone).unlink()
    (problem,) = libero.problems(package)
    assert problem.startswith(told)
    assert problem.endswith(gone.rpartition("/")[2])


@pytest.mark.parametrize("tasks", [(0, 2), (1, 1)])
def test_tasks_that_the_suite_does_not_have_are_refused(package, tasks):
    assert libero.problems(dataclasses.replace(package, tasks=(1, 0))) == []
    (told,) = libero.problems(dataclasses.replace(package, tasks=tasks))
    assert "expected different numbers of libero_spatial's tasks, 0..1" in told


def test_missing_file_of_the_states_that_were_left_out_is_told(package):
    wanted = dataclasses.replace(package, extra_states=True)
    (told,) = libero.problems(wanted)
    assert told.startswith("config.libero.states: missing")
    assert f"{libero_fakes.TASKS[0]}.init.npz" in told


def test_reference_camera_has_no_crop(package):
    crop = {"crop": (0.0, 1.0, 0.1, 1.0)}
    assert libero.problems(dataclasses.replace(package, **crop)) == []
    (told,) = libero.problems(dataclasses.replace(package, camera="reference", **crop))
    assert told.startswith("config.libero.camera")


def test_suite_without_tasks_is_refused(package):
    (told,) = libero.problems(dataclasses.replace(package, suite="libero_goal"))
    assert "does not tell the tasks of libero_goal" in told


def test_everything_missing_is_told_at_once_when_libero_is_chosen(tmp_path):
    values = to_dict(default_config("grpo"))
    values["eval"]["ground_truth"] = "libero"
    values["libero"] |= {"root": str(tmp_path), "crop": (0.5, 0.5, 0.0, 1.0)}
    with pytest.raises(ConfigError) as raised:
        from_config_dict(values)
    told = str(raised.value)
    for text in (
        "config.libero.root:",
        "config.libero.crop: expected left < right",
        "no libero, robosuite, mujoco, bddl",
        "make libero",
    ):
        assert text in told


def test_nothing_is_asked_for_when_libero_is_not_chosen():
    with pytest.raises(ConfigError) as raised:
        from_config_dict(to_dict(default_config("grpo")))
    assert "libero" not in str(raised.value)


def test_who_cannot_play_libero_is_refused_before_it_starts():
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, ground_truth="libero"),
        collect=dataclasses.replace(config.collect, out="x", mix="perfect=1"),
    )
    with pytest.raises(ConfigError, match=r"config\.collect\.mix"):
        collect.run(config)


def test_another_interpreter_is_asked_for_its_packages(tmp_path):
    config = dataclasses.replace(libero_fakes.write(tmp_path), python=sys.executable)
    (told,) = libero.problems(config)
    assert sys.executable in told
    assert "robosuite" in told
    for root in (config.root, ""):
        gone = dataclasses.replace(config, python="/no/such/python", root=root)
        (told,) = libero.problems(gone)
        assert "cannot be run" in told


def test_episodes_are_as_long_as_the_suite_says():
    lengths = {suite: LiberoConfig(suite=suite).episode_steps for suite in libero.MAX_STEPS}
    assert [lengths[f"libero_{n}"] for n in ("spatial", "object", "goal", "10")] == [
        220, 280, 300, 520
    ]  # fmt: skip
    (told,) = value_problems(LiberoConfig(suite="libero_spacial"), "libero.")
    assert "config.libero.suite: expected one of" in told
    assert "Did you mean 'libero_spatial'?" in told


def test_settings_off_the_official_protocol_are_named():
    assert LiberoConfig(suite="libero_goal", root="x", python="y").departures == []
    config = LiberoConfig(action_repeat=2, crop=[0.03, 0.99, 0.06, 0.86])
    assert config.departures == [
        "crop (0.03, 0.99, 0.06, 0.86) instead of (0.0, 1.0, 0.0, 1.0)",
        "action_repeat 2 instead of 1",
    ]
    assert config.facts()["departures"] == config.departures
    assert config.episode_steps == 110
    assert dataclasses.replace(config, max_steps=64).episode_steps == 64


def test_bytes_that_are_no_text_hide_nothing_in_a_description(package, tmp_path):
    root = tmp_path / "packages/libero/libero"
    xml = root / "assets/objects/bowl/akita_black_bowl.xml"
    xml.write_bytes(xml.read_bytes() + b"<!-- \xff -->")
    task = root / f"bddl_files/libero_spatial/{libero_fakes.TASKS[1]}.bddl"
    task.write_bytes(task.read_bytes() + b"; \xff")
    assert libero.problems(package) == []
