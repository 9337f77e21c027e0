import json
import math
from pathlib import Path

import numpy as np
import pytest

from evac_jax.errors import DataError
from evac_jax.files import recordings
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser
from evac_jax.tools.recipes import coevolve, commands, miniature
from evac_jax.tools.recipes.coevolve import Models, Options, rounds_to_go
from evac_jax.tools.recipes.stages import check
from evac_jax.tools.world.options import add_options
from tests.unit import world_folder

START = Models("start_policy", "start_wm", "start_reward", "pose", ("old",))


def test_rounds_go_on_while_real_success_rises():
    assert rounds_to_go([0.4], patience=1, rounds=3) == 3
    assert rounds_to_go([0.4, 0.5], patience=1, rounds=3) == 2
    assert rounds_to_go([0.4, 0.5, 0.5], patience=1, rounds=3) == 0  # equal is not better
    assert rounds_to_go([0.4, 0.3], patience=1, rounds=3) == 0
    assert rounds_to_go([0.4, 0.3], patience=2, rounds=3) == 2
    assert rounds_to_go([0.4, 0.5, 0.6, 0.7], patience=1, rounds=3) == 0
    assert rounds_to_go([-math.inf, 0.1], patience=1, rounds=2) == 1


class _Workshop:
    """Runs nothing; leaves the files that the stages would leave."""

    def __init__(self, work: Path, choice: list[float], fresh: dict[int, float]):
        self.work, self.ran = work, []
        self._rates = {f"choose_{n}": rate for n, rate in enumerate(choice)}
        self._rates |= {f"report_{n}": rate for n, rate in fresh.items()}

    def run(self, stages):
        check(stages)
        for stage in stages:
            if stage.name in self.ran:
                continue
            self.ran.append(stage.name)
            if stage.name in self._rates:
                folder = self.work / "success" / stage.name
                folder.mkdir(parents=True)
                outcome = {"ground_truth": {"rate": self._rates[stage.name]}}
                (folder / report.EVALUATION_FILE).write_text(json.dumps({"success": outcome}))

    def record(self, name):
        return {"seconds": 60.0}


@pytest.fixture(autouse=True)
def _trust(monkeypatch):
    monkeypatch.setattr(commands, "trust_figures", lambda folder: {"agreement": 0.9})


def test_loop_ends_when_success_stops_rising_and_tells_the_best_on_fresh_scenes(tmp_path):
    fresh = {0: 0.41, 1: 0.5, 2: 0.62}
    workshop = _Workshop(tmp_path, choice=[0.4, 0.5, 0.6, 0.55, 0.9], fresh=fresh)
    outcome = coevolve.coevolve(workshop, START, Options("configs/grpo.py", {}, rounds=4))
    assert outcome["success"] == [0.4, 0.5, 0.6, 0.55]
    assert outcome["best"] == 2
    assert outcome["report"] == fresh
    assert "train_4" not in workshop.ran
    assert "world_model_3" not in workshop.ran  # nobody would use it
    assert workshop.ran.count("train_3") == 1
    assert "world" in workshop.ran
    lines = coevolve.table(outcome, 512).splitlines()
    assert lines[3].split()[:2] == ["2", "60.0%"]
    assert "90.0%" in lines[3]


def test_every_round_starts_from_what_the_one_before_left_and_keeps_old_recordings():
    options = Options("configs/grpo.py", {"optim.lr": "1e-4"})
    _, second = coevolve.learning_stages(1, START, options)
    assert second.data == ("old", "{work}/round_1/episodes")
    train = coevolve.training_stages(2, second, options)[0]
    for part in ("policy", "world_model", "reward"):
        assert f"--config.{part}.checkpoint={{work}}/round_1/{part}" in train.command
    assert "--config.optim.lr=1e-4" in train.command
    assert "--config.env.pose_model=pose" in train.command
    stages, third = coevolve.learning_stages(2, second, options)
    fine_tuning = next(stage for stage in stages if stage.name == "world_model_2").command
    data = fine_tuning[fine_tuning.index("--data") + 1 :][:3]
    assert data == third.data == ("old", "{work}/round_1/episodes", "{work}/round_2/episodes")
    assert fine_tuning[fine_tuning.index("--start") + 1] == "{work}/round_1/world_model"


def test_interrupted_training_goes_on_when_the_recipe_is_run_again():
    train = coevolve.training_stages(1, START, Options("configs/grpo.py", {}))[0]
    rl = next(stage for stage in miniature.make_stages() if stage.name == "rl")
    for stage in (train, rl):
        assert stage.resumes
        assert "--config.checkpoint.restore=auto" in stage.command


class _Recorded:
    def __init__(self, rate):
        self._rate = rate

    def success_once(self):
        return np.array([self._rate])


def test_given_recordings_stand_for_a_robot_and_missing_ones_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(
        recordings, "load", lambda folder: _Recorded({"r1": 0.3, "r2": 0.2}[str(folder)])
    )
    settings = {"rounds": 3, "ground_truth": False}
    options = Options("configs/grpo.py", {}, real_data=("r1",), **settings)
    workshop = _Workshop(tmp_path, [], {})
    with pytest.raises(DataError, match="round 2 needs recordings of its policy.*round_2/policy"):
        coevolve.coevolve(workshop, START, options)
    assert "train_2" in workshop.ran
    assert not [name for name in workshop.ran if name.startswith(("episodes", "choose"))]

    options = Options("configs/grpo.py", {}, real_data=("r1", "r2"), **settings)
    outcome = coevolve.coevolve(workshop, START, options)
    assert outcome["success"] == [None, 0.3, 0.2]
    assert outcome["best"] == 1


def test_missing_recordings_are_refused_before_anything_begins(tmp_path, capsys):
    with pytest.raises(SystemExit):
        coevolve.parse(["--out", str(tmp_path / "out"), "--data", str(tmp_path / "none")])
    assert f"'{tmp_path}/none'] are none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_takes_the_start_from_the_preset_unless_told(tmp_path):
    argv = [
        "--out",
        "o",
        "--data",
        str(tmp_path),
        "--set",
        "reward.checkpoint=mine",
        "optim.lr=1e-4",
    ]
    start, options = coevolve.options_of(coevolve.parse(argv))
    assert start.reward == "mine"
    assert start.policy.endswith("weights/policy")
    assert options.ground_truth
    assert options.settings == {"reward.checkpoint": "mine", "optim.lr": "1e-4"}


def _option(command, name):
    return command[command.index(f"--{name}") + 1]


def test_world_of_the_last_stage_has_the_values_that_the_rounds_were_run_with(repository):
    settings = {"world_model.steps": "3", "env.train_starts": "(0, 800)", "policy.checkpoint": "P"}
    command = commands.pack("configs/grpo.py", settings, "{work}/world")
    assert command[:2] == ("-m", "evac_jax.tools.world.pack")
    assert (_option(command, "policy"), _option(command, "starts")) == ("P", "miniature")
    assert (_option(command, "steps"), _option(command, "train_starts")) == ("3", "0,800")
    assert (_option(command, "horizon"), _option(command, "keep_stop_token")) == ("32", "no")
    assert "--suite" not in command
    parser = Parser("world.pack", "")
    add_options(parser)
    known = {f"--{action.dest}" for action in parser._actions}
    assert {word for word in command if word.startswith("--")} <= known


def test_rounds_in_a_world_take_its_values(tmp_path, repository, monkeypatch):
    monkeypatch.chdir(repository)
    world = world_folder.write(tmp_path / "w", **world_folder.LIBERO)
    argv = ["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--config"]
    args = coevolve.parse([*argv, "configs/grpo.py:own", "--set", f"world={world}"])
    start, options = coevolve.options_of(args)
    assert start.reward == f"{world}/reward"
    train = coevolve.training_stages(1, start, options)[0].command
    assert f"--config.world={world}" in train
    command = commands.pack(options.config, dict(options.settings), "out")
    assert _option(command, "starts") == f"{world}/starts"
    assert (_option(command, "suite"), _option(command, "crop")) == (
        "libero_goal",
        "0.1,0.9,0.2,1.0",
    )
