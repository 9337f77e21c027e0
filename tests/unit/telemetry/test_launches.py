import json
import shutil
import sys

import pytest

from evac_jax.config.build import to_dict
from evac_jax.config.flags import load_preset, read_preset
from evac_jax.telemetry import launches


@pytest.fixture
def config(repository) -> dict:
    values = load_preset(str(repository / "configs/grpo.py")).to_dict()
    values["algo"]["clip_high"] = 0.3
    values["simulator"]["devices"] = list(values["simulator"]["devices"])
    return values


def _recorded(folder) -> list[dict]:
    lines = (folder / launches.LAUNCHES_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_launch_tells_command_preset_and_what_differs(tmp_path, monkeypatch, config):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--config=configs/grpo.py"])
    launches.record(tmp_path, config, 0, resumed=False)
    (line,) = _recorded(tmp_path)
    assert line["command"] == [sys.executable, "launch.py", "--config=configs/grpo.py"]
    assert (line["preset"], line["iteration"]) == ("configs/grpo.py", 0)
    assert line["changed"] == {"algo.clip_high": [0.28, 0.3]}
    told = {name: line["judged_by"][name] for name in ("eval.starts", "reward.threshold")}
    assert told == {
        "eval.starts": list(config["eval"]["starts"]),
        "reward.threshold": config["reward"]["threshold"],
    }


def test_only_the_name_of_another_world_and_own_settings_are_told(
    tmp_path, monkeypatch, repository
):
    shutil.copytree(repository / "evac_jax/miniature/weights", tmp_path / "other")
    world = f"--config.world={tmp_path / 'other'}"
    monkeypatch.setattr(sys, "argv", ["launch.py", "--config=configs/grpo.py:own", world])
    preset = str(repository / "configs/grpo.py:own")
    config = read_preset(preset, [world, "--config.env.num_envs=4"]).to_dict()
    launches.record(tmp_path, config, 0, resumed=False)
    assert set(_recorded(tmp_path)[0]["changed"]) == {"world", "env.num_envs"}


def test_launches_follow_one_another_until_the_run_begins_anew(tmp_path, config):
    for finished, resumed in ((0, False), (4, True), (0, False)):
        launches.record(tmp_path, config, finished, resumed=resumed)
        expected = [0, 4] if finished else [0]
        assert [line["iteration"] for line in _recorded(tmp_path)] == expected


def test_preset_is_not_known_when_its_file_is_gone(tmp_path, monkeypatch, config):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--config=mine/gone.py"])
    launches.record(tmp_path, config, 0, resumed=False)
    (line,) = _recorded(tmp_path)
    assert (line["preset"], line["changed"]) == ("", {})


def test_preset_of_the_repository_is_found_from_another_folder(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py", "--config", "configs/grpo.py:miniature"])
    launches.record(tmp_path, config, 0, resumed=False)
    assert _recorded(tmp_path)[0]["preset"] == "configs/grpo.py:miniature"


def test_whole_configuration_can_be_compared(tmp_path, monkeypatch):
    from evac_jax.config.build import default_config

    monkeypatch.setattr(sys, "argv", ["launch.py", "--config=configs/grpo.py"])
    launches.record(tmp_path, to_dict(default_config("grpo")), 0, resumed=False)
    assert _recorded(tmp_path)[0]["changed"]["optim.lr"] == [3e-4, 2e-5]
