import json
import os
import signal
import subprocess
import sys
import time

import pytest

from evac_jax.errors import CheckpointError, ConfigError, DataError, EvacJaxError
from evac_jax.tools.runs import sweep

# In place of launch.py: writes what a run leaves, and a line for each call.
TRAINER = """
import json, pathlib, sys, time
flags = dict(argument.removeprefix("--config.").split("=", 1) for argument in sys.argv[1:])
out = pathlib.Path(flags["log.dir"])
with (out / "calls").open("a") as file:
    file.write(flags["log.run"] + "\\n")
assert flags["checkpoint.restore"] == "auto"
if flags["seed"] in {fail}:
    sys.exit(2)
run = out / flags["log.run"]
run.mkdir()
config = {{"algorithm": "grpo", "seed": int(flags["seed"]), "train": {{"iterations": 1}}}}
config["algo"] = {{"clip_high": float(flags["algo.clip_high"])}}
(run / "config.json").write_text(json.dumps(config))
(run / "metrics.jsonl").write_text('{{"iteration": 1, "eval/imagined/success_rate": 0.5}}\\n')
time.sleep({sleep})
(run / "summary.json").write_text("{{}}")
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch, repository):
    """Return (fail, sleep) -> replaces launch.py by a script that writes a run's files."""
    monkeypatch.chdir(repository)

    def replace(fail=(), sleep=0):
        path = tmp_path / "trainer.py"
        path.write_text(TRAINER.format(fail=set(map(str, fail)) or [], sleep=sleep))
        monkeypatch.setattr(sweep, "LAUNCH", path)
        return path

    replace()
    return replace


def _sweep(out, *more):
    sweep.main(["--out", str(out), "--set", "algo.clip_high=0.2,0.3", *more])


def _calls(out) -> list[str]:
    return (out / "calls").read_text().split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("algo.clip_high=0.2,0.3", ("algo.clip_high", ["0.2", "0.3"])),
        ("config.eval.starts=(0, 8),(8, 16)", ("eval.starts", ["(0, 8)", "(8, 16)"])),
        ("env.gripper='none','binary'", ("env.gripper", ["'none'", "'binary'"])),
    ],
)
def test_values_are_separated_by_commas_outside_of_brackets(text, expected):
    assert sweep.split(text) == expected


@pytest.mark.parametrize("text", ["algo.clip_high", "=1", "algo.clip_high=", "optim.lr=1,", "a=(1"])
def test_setting_is_refused_when_it_has_no_field_or_value(text):
    with pytest.raises(ConfigError, match="FIELD=VALUE,VALUE"):
        sweep.split(text)


def test_every_combination_is_a_run_with_a_name_of_its_own():
    found = sweep.trials([0, 1], ["optim.lr=1e-4,3e-4", "policy.checkpoint=a/b"])
    assert [trial.name for trial in found] == [
        f"lr={lr}-checkpoint=a_b-seed={seed}" for lr in ("1e-4", "3e-4") for seed in (0, 1)
    ]
    assert found[1].flags == (
        "--config.optim.lr=1e-4",
        "--config.policy.checkpoint=a/b",
        "--config.seed=1",
    )


@pytest.mark.parametrize(
    ("seeds", "settings"),
    [
        ([0], ["seed=1,2"]),
        ([0], ["log.run=a"]),
        ([0], ["optim.lr=1", "optim.lr=2"]),
        ([0, 0], []),
        ([0], ["policy.checkpoint=a/b,a_b"]),
    ],
)
def test_runs_that_could_not_be_told_apart_are_refused(seeds, settings):
    with pytest.raises(ConfigError, match=r"--se(eds|t)"):
        sweep.trials(seeds, settings)


def test_runs_are_trained_one_after_another_and_compared(tmp_path, trainer, capsys):
    out = tmp_path / "sweep"
    _sweep(out, "--seeds", "0", "1")
    names = [f"clip_high={clip}-seed={seed}" for clip in (0.2, 0.3) for seed in (0, 1)]
    assert _calls(out) == names
    told = capsys.readouterr().out
    assert "algo.clip_high=0.3: 1 of 1 iterations, success: imagined 50.0 %" in told
    assert str(out / "report.html") in told
    page = (out / "report.html").read_text()
    assert all(name in page for name in names)


def test_same_command_goes_on_and_more_seeds_may_be_added(tmp_path, trainer):
    out = tmp_path / "sweep"
    _sweep(out)
    _sweep(out)
    assert len(_calls(out)) == 2
    _sweep(out, "--seeds", "0", "5")
    assert _calls(out)[2:] == ["clip_high=0.2-seed=5", "clip_high=0.3-seed=5"]
    with pytest.raises(CheckpointError, match=r"flags was \[\] and is \['--config.optim.lr=1"):
        _sweep(out, "--config.optim.lr=1")


def test_flags_may_be_corrected_while_no_run_has_begun(tmp_path, trainer):
    out = tmp_path / "sweep"
    trainer(fail=[0])
    with pytest.raises(EvacJaxError, match="2 of 2 runs failed"):
        _sweep(out, "--config.optim.lr=1e-3")
    trainer()
    _sweep(out, "--config.optim.lr=1e-4")
    assert json.loads((out / "sweep.json").read_text())["flags"] == ["--config.optim.lr=1e-4"]
    assert len(list(out.glob("*/summary.json"))) == 2


def test_others_have_their_turn_when_a_run_fails(tmp_path, trainer):
    out = tmp_path / "sweep"
    trainer(fail=[0])
    with pytest.raises(EvacJaxError, match="2 of 4 runs failed: clip_high=0.2-seed=0, clip_high=0"):
        _sweep(out, "--seeds", "0", "1")
    assert len(_calls(out)) == 4
    assert "2 runs" in (out / "report.html").read_text()


@pytest.mark.parametrize("mistake", ["--config.optim.lr=-1", "--config.optim.rl=1"])
def test_mistake_is_told_before_anything_begins(tmp_path, trainer, mistake):
    out = tmp_path / "sweep"
    with pytest.raises(ConfigError, match=r"run clip_high=0\.2-seed=0: .*\n?.*optim"):
        _sweep(out, mistake)
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--config.seed=1", "--config.log.dir=runs"])
def test_flag_of_the_sweeps_own_is_refused(tmp_path, trainer, flag, capsys):
    with pytest.raises(SystemExit):
        _sweep(tmp_path / "sweep", flag)
    assert "the sweep sets" in capsys.readouterr().err


def test_field_is_refused_when_set_and_flag_both_give_it(tmp_path, trainer, capsys):
    with pytest.raises(SystemExit):
        _sweep(tmp_path / "sweep", "--config.algo.clip_high=0.1")
    assert "leave one of the two out" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--confg.optim.lr=1", "--config.optim.lr"])
def test_flag_is_refused_when_it_is_none_for_every_run(tmp_path, trainer, flag, capsys):
    with pytest.raises(SystemExit):
        _sweep(tmp_path / "sweep", flag)
    assert "expected --config.SECTION.FIELD=VALUE" in capsys.readouterr().err


def test_signal_stops_the_run_under_way_and_the_sweep(tmp_path, trainer, repository):
    out, path = tmp_path / "sweep", trainer(sleep=60)
    script = (
        "import pathlib; from evac_jax.tools.runs import sweep; "
        f"sweep.LAUNCH = pathlib.Path({str(path)!r}); "
        f"sweep.main(['--out', {str(out)!r}, '--set', 'algo.clip_high=0.2,0.3'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=repository, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in told
    assert len(_calls(out)) == 1
    assert json.loads((out / "sweep.json").read_text())["config"] == "configs/grpo.py"


def test_plan_of_bytes_that_are_no_text_is_refused_by_name(tmp_path, trainer):
    (tmp_path / sweep.PLAN_FILE).write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"sweep\.json: expected a JSON object"):
        _sweep(tmp_path)
