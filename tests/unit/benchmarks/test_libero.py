"""The proof in LIBERO, with stand-ins for every command that it runs."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import libero, runs
from benchmarks.libero import Result, figures, last_line, table
from evac_jax.config import libero as libero_config
from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import read_preset
from evac_jax.config.world import GroundTruth
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import start_frames
from evac_jax.tools.policy import train
from evac_jax.tools.trust import __main__ as trust
from tests.unit import world_folder
from tests.unit.benchmarks.test_libero_states import record

TASKS = ("put it here", "put it there")


def _tasks(*successes):
    return dict(zip(TASKS, ((count, 100) for count in successes), strict=True))


def _result(greedy, *, start=(20, 40), agreement=(90, 100), false=(5, 50), minutes=10.0):
    return Result(
        start={"greedy": _tasks(*start), "sampled": _tasks(10, 20)},
        after={"greedy": _tasks(*greedy), "sampled": _tasks(20, 30)},
        iteration=4,
        minutes=minutes,
        agreement=agreement,
        false_success=false,
    )


RESULTS = {
    0: _result((50, 60)),  # 0.3 -> 0.55
    1: _result((40, 50), agreement=(80, 100), false=(10, 40), minutes=20.0),  # 0.3 -> 0.45
}


def test_last_line_is_told_from_known_counts():
    # Newcombe's lower ends: 0.55 - 0.3 - hypot(0.0692, 0.0668), 0.45 - 0.3 - hypot(0.0673, 0.0668)
    assert last_line(figures(RESULTS)) == (
        "start=0.300 after=0.500 gain=20.0 gain_low=5.5 agreement=0.850 false_success=0.167 "
        "episodes=200 seeds=2 minutes_per_seed=15.0"
    )


def test_share_without_an_imagined_success_is_no_number():
    numbers = figures({0: _result((50, 60), false=(0, 0))})
    assert math.isnan(numbers["false_success"])
    assert "false_success=nan" in last_line(numbers)


def test_table_has_intervals_of_both_rates_and_of_the_gain():
    line = table({"imagination": RESULTS}, "greedy").splitlines()[1]
    assert " ".join(line.split()) == (
        "imagination 0 4 30.0 [ 24.1, 36.7] 55.0 [ 48.1, 61.7] +25.0 [ +15.4, +34.0] 10.0"
    )
    shown = libero.by_task(RESULTS, "greedy")
    assert [line.split("  ")[0] for line in shown.splitlines()[1:]] == list(TASKS)
    assert "50.0%" in shown
    assert "n=100" in shown


PARSERS = {"trust": trust.parse, "policy.train": train._arguments}  # refuse unknown options
# Commands of one seed: training, success before and after, the chosen policy's own episodes.
WHOLE = ["train", "eval", "eval", "eval", "eval", "policy.export", "collect", "trust"]


class _Commands:
    """Stands for all commands: counts, checks their settings, leaves the files that they leave."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.fail_at = -1
        monkeypatch.setattr(runs.subprocess, "run", self._run)
        monkeypatch.setattr(libero_config, "problems", lambda config: [])

    @property
    def kinds(self):
        return [kind for kind, _ in self.calls]

    def _run(self, command, **_):
        assert command[0] == sys.executable
        if len(self.calls) == self.fail_at:
            self.fail_at = -1
            raise KeyboardInterrupt
        if command[1] == "launch.py":
            self._launch(command[2:])
        else:
            kind = command[2].removeprefix("evac_jax.tools.")
            PARSERS.get(kind, str)(command[3:])
            words = [part for word in command[3:] for part in word.split("=", 1)]
            flags = {n: v for n, v in zip(words, words[1:], strict=False) if n.startswith("--")}
            self.calls.append((kind, flags))
            out = Path(flags["--out"])
            out.mkdir()
            if kind == "policy.train":
                seconds = {100: 30, 400: 60}.get(int(flags["--steps"]), 600)
                (out / "card.json").write_text(json.dumps({"seconds": seconds}))
                (out / "model.safetensors").write_text(flags["--steps"])
            if kind == "trust":
                told = {"agreement": {"hits": 9, "of": 10}, "false_success": {"hits": 1, "of": 4}}
                (out / "report.json").write_text(json.dumps({"overall": told}))
        return subprocess.CompletedProcess(command, 0)

    def _launch(self, command):
        flags = dict(part.lstrip("-").split("=", 1) for part in command)
        mode, preset = flags.pop("mode", "train"), flags.pop("config")
        self.calls.append((mode, flags))
        overrides = [f"--{name}={value}" for name, value in flags.items()]
        config = from_config_dict(read_preset(preset, overrides).to_dict())
        if mode == "collect":
            Path(config.collect.out).mkdir()
            return
        folder = Path(config.log.dir, config.log.run)
        folder.mkdir()
        if mode == "eval":
            learned = config.checkpoint.restore or "supervised" in config.policy.checkpoint
            successes = 30 + 20 * bool(learned) - 10 * (config.policy.eval_temperature > 0)
            told = {text: {"successes": successes, "episodes": 100} for text in TASKS}
            (folder / "evaluation.json").write_text(json.dumps({"by_task": {"ground_truth": told}}))
            return
        name = "eval/ground_truth/success_rate"
        metrics = [{"iteration": 0, name: 0.3}, {"iteration": 4, name: 0.5}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))


@pytest.fixture
def commands(monkeypatch):
    return _Commands(monkeypatch)


@pytest.fixture
def world(tmp_path):
    return _world(tmp_path / "world", [200, 359])


def _world(folder, states, **changes):
    truth = GroundTruth("libero", "libero_spatial", (0, 2, 3, 7), True, 2, False)
    facts = {"horizon": 48, "ground_truth": truth}
    world_folder.write(folder, **(world_folder.LIBERO | facts | changes))
    text = json.dumps({start_frames.STATES: states})
    (folder / "starts" / "card.json").write_text(text)
    card = json.loads((folder / "world.json").read_text())
    card["sha256"]["starts"]["card.json"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "world.json").write_text(json.dumps(card))
    return folder


def _argv(tmp_path, world, *more):
    python = f"libero.python={sys.executable}"
    return ["--world", world, "--work", tmp_path / "work", "--set", python, *more]


def _main(*argv):
    libero.main([str(word) for word in argv])


def test_seeds_are_trained_chosen_and_reported_on_states_apart(commands, world, tmp_path, capsys):
    _main(*_argv(tmp_path, world, "--seeds", 3, 5, "--json", tmp_path / "out.json"))
    assert commands.kinds == WHOLE + [kind for n, kind in enumerate(WHOLE) if n not in (1, 2)]
    told = [flags for kind, flags in commands.calls if kind == "train"]
    assert [flags["config.seed"] for flags in told] == ["3", "5"]
    assert {flags["config.eval.ground_truth_starts"] for flags in told} == {"(360, 400)"}
    assert not any("config.env.simulator" in flags for flags in told)
    told = [flags for kind, flags in commands.calls if kind == "eval"]
    assert {flags["config.eval.ground_truth_starts"] for flags in told} == {"(0, 200)"}
    assert {flags["config.eval.ground_truth_episodes"] for flags in told} == {"200"}
    assert [flags["config.policy.eval_temperature"] for flags in told] == ["0.0", "0.7"] * 3
    restored = [flags.get("config.checkpoint.step") for flags in told]
    assert restored == [None, None, "4", "4", "4", "4"]  # the start policy once for all seeds
    asked = dict(commands.calls)
    export, collect, judged = (asked[name] for name in ("policy.export", "collect", "trust"))
    assert (export["--step"], export["--dtype"]) == ("4", "float32")
    assert collect["config.env.train_starts"] == "(0, 100)"
    assert collect["config.collect.mix"] == f"policy:{export['--out']}@0=1"
    assert judged["--data"] == collect["config.collect.out"]
    assert (judged["--part"], judged["--episodes"], judged["--steps"]) == ("all", "0", "3")

    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"apart from the reported states: {world}/starts, 2 states"
    assert shown[-1].startswith(
        "start=0.300 after=0.500 gain=20.0 gain_low=10.4 agreement=0.900 false_success=0.250 "
        "episodes=200 seeds=2 minutes_per_seed="
    )
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["runs"]["imagination"]["5"]["after"]["greedy"][TASKS[0]] == [50, 100]


@pytest.mark.parametrize("number", [0, 2, 6])
def test_interrupted_proof_goes_on_with_the_command_that_was_stopped(
    number, commands, world, tmp_path
):
    argv = _argv(tmp_path, world, "--seeds", 0)
    commands.fail_at = number
    with pytest.raises(KeyboardInterrupt):
        _main(*argv)
    assert len(commands.calls) == number
    _main(*argv)
    assert commands.kinds == WHOLE
    _main(*argv)
    assert commands.kinds == WHOLE


def test_reported_state_among_the_starts_is_refused_before_any_command(commands, tmp_path):
    with pytest.raises(DataError, match="has 1 of them, such as 199"):
        _main(*_argv(tmp_path, _world(tmp_path / "w", [199, 200])))
    data = record(tmp_path / "base", [5, 250])
    with pytest.raises(DataError, match="base: has 1 of them, such as 5"):
        _main(*_argv(tmp_path, _world(tmp_path / "w2", [200]), "--data", data))
    assert commands.calls == []
    assert not (tmp_path / "work").exists()


def test_missing_weights_and_libero_are_told_with_their_commands(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(libero, "ROOT", tmp_path)
    with pytest.raises(ConfigError) as error:
        _main("--world", tmp_path / "none", "--work", tmp_path / "work")
    assert "none' is no world's folder" in str(error.value)
    assert "there is no '.venv-libero/bin/python'; `make libero` makes it" in str(error.value)
    monkeypatch.setattr(libero, "absent", lambda world: "")
    with pytest.raises(ConfigError, match="make libero"):
        libero.refuse_what_is_missing(libero.LIBERO_SMALL_WEIGHTS, {})
    assert commands.calls == []


def test_setting_that_does_not_exist_is_refused_before_any_command(commands, world, tmp_path):
    with pytest.raises(ConfigError, match="optim.lrr"):
        _main(*_argv(tmp_path, world, "optim.lrr=1e-4"))
    assert commands.calls == []


def test_world_of_another_ground_truth_is_refused(commands, tmp_path):
    world = world_folder.write(tmp_path / "w")
    with pytest.raises(ConfigError, match="ground truth is LIBERO, got 'none'"):
        _main(*_argv(tmp_path, world))


def test_world_whose_start_ids_mean_other_states_is_refused(commands, tmp_path):
    truth = GroundTruth("libero", "libero_spatial", (), False, 2, False)
    world = _world(tmp_path / "w", [200], ground_truth=truth)
    with pytest.raises(ConfigError, match="4 tasks with libero.extra_states, got"):
        _main(*_argv(tmp_path, world))
    assert commands.calls == []


def test_baselines_learn_in_libero_itself_and_from_recordings_as_long(
    commands, world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(runs.Runs, "minutes", lambda self, run: 10.0)
    data = record(tmp_path / "base", [250, 251])
    argv = _argv(tmp_path, world, "--seeds", 0, 1, "--baselines", "--data", data)
    _main(*argv)
    real = [flags for kind, flags in commands.calls if kind == "train"][-1]
    assert real["config.env.simulator"] == "ground_truth"
    assert real["config.env.train_starts"] == "(200, 360)"
    assert (real["config.env.num_envs"], real["config.rollout.epochs"]) == ("8", "16")
    assert real["config.seed"] == "0"
    steps = [int(flags["--steps"]) for kind, flags in commands.calls if kind == "policy.train"]
    # 0.1 s a step and 20 s of start-up: 100 steps and (600 - 30) s more.
    assert steps == [100, 400, 100 + 5700]
    shown = capsys.readouterr().out
    assert "ground_truth     0        4" in shown
    assert "supervised       0     5800" in shown
    assert " seeds=2 " in shown.splitlines()[-1]  # baselines are no seeds
    count = len(commands.calls)
    _main(*argv)
    assert len(commands.calls) == count


def test_baselines_without_recordings_are_refused(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _main(*_argv(tmp_path, world, "--baselines"))
    assert "needs --data" in capsys.readouterr().err
