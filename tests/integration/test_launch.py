"""The command a user types, on random weights of the smallest sizes: train, kill, resume, eval."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evac_jax.checkpoint import iterations_in
from evac_jax.telemetry import video
from tests.integration.launcher import TWO_SIMULATORS

PROMISED = (
    "actor/loss", "actor/value_loss", "actor/entropy", "actor/grad_norm", "actor/lr",
    "rollout/reward_mean", "rollout/reward_std", "rollout/episode_length", "rollout/success_rate",
    "env/success_rate", "env/step_reward", "env/termination_rate",
)  # fmt: skip

QUICK = (
    "--config.eval.ground_truth=none",
    "--config.eval.twin_fraction=0",
    "--config.eval.episodes=0",
)


def test_killed_run_goes_on_where_it_was_and_ends_like_an_unbroken_one(launcher, plain):
    assert "ground truth" in plain

    flags = ("--config.log.run=broken", "--config.checkpoint.interval=1", *TWO_SIMULATORS)
    process = launcher.start("--config.train.iterations=9", *flags)
    checkpoint = launcher.runs / "broken" / "checkpoints" / "1"
    deadline = time.monotonic() + 500
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = launcher.run(
        "--config.train.iterations=3",
        "--config.checkpoint.restore=latest",
        *flags,
    )
    assert "at iteration" in output

    whole = launcher.metrics("plain")
    assert sorted(launcher.metrics("broken")) == sorted(whole) == [0, 1, 2, 3]
    assert all(whole[n]["actor/grad_norm"] > 0 for n in (1, 2, 3))
    launcher.assert_same("plain", "broken", (1, 2, 3), rel=1e-5, abs=1e-7)


def test_console_tells_where_a_run_writes_what_it_does_and_what_comes_next(launcher, plain):
    folder = launcher.runs / "plain"
    told = (
        f"it writes below {launcher.runs}",
        "-m tensorboard.main --logdir=",
        f"the run writes to {folder}",
        "loading the policy",
        "compiling the update",
        "waiting for the simulators",
        "evaluating in imagination: 4 episodes",
        "iteration 1/3  ETA ",
        "its episodes: ",
        "last evaluation (iteration 0): imagined ",
        "Success rate [95 % Wilson interval]",
        "evaluate:\n",
        "go on:\n",
        "export:\n",
        "serve:\n",
        f"report:\n  {shlex.quote(sys.executable)} -m evac_jax.tools.runs.report {folder}",
    )
    place = 0
    for text in told:  # in this order
        place = plain.find(text, place)
        assert place != -1, (text, plain)
    report = (folder / "report.html").read_text()
    assert "3 of 3 iterations" in report
    assert "Twins: the same actions in both" in report


def test_ppo_run_leaves_every_promised_metric_and_a_video_that_plays(launcher):
    flags = ("--config.train.iterations=1", "--config.log.run=ppo", "--config.video.save=True")
    flags += ("--config.eval.ground_truth=none", "--config.eval.twin_fraction=0")
    launcher.run(*flags, config="configs/ppo.py")
    events = EventAccumulator(str(launcher.runs / "ppo" / "tensorboard")).Reload()
    for name in PROMISED:
        assert [e.value for e in events.Scalars(name)] == pytest.approx(
            [launcher.metrics("ppo")[1][name]]
        )
    frames, _ = video.read_mp4(launcher.runs / "ppo" / "videos" / "iteration_00001_0.mp4")
    assert frames.shape[0] == 1 + 16
    assert frames.std() > 0


def test_mistakes_end_with_one_message_and_no_run(launcher):
    output = launcher.run(
        "--config.algo.clip_hihg=0.3", "--config.group_size=4", "--config.log.run=no", status=2
    )
    assert "Did you mean 'algo.clip_high'?" in output
    assert "Did you mean 'algo.group_size'?" in output
    assert "Traceback" not in output
    assert not (launcher.runs / "no").exists()

    output = launcher.run(
        "--config.checkpoint.restore=latest", "--config.log.run=nothing", status=2
    )
    assert "no grpo run under" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_run_stops_with_a_checkpoint_when_a_bad_classifier_raises_the_alarm(launcher):
    output = launcher.run(
        "--config.log.run=fooled",
        "--config.reward.threshold=0.01",  # every imagined episode succeeds
        "--config.eval.twin_fraction=1.0",
        "--config.eval.twin_action=stop",
        "--config.train.iterations=3",
        "--config.eval.episodes=0",
    )
    metrics = launcher.metrics("fooled")
    assert list(metrics) == [0, 1]
    assert metrics[1]["eval/twin_alarm"] == 1
    assert metrics[1]["eval/imagined_success"] == 1
    assert metrics[1]["eval/false_success"] == 1 - metrics[1]["eval/real_success"]
    assert "the policy may be exploiting its simulator" in output
    assert (launcher.runs / "fooled" / "checkpoints" / "1").is_dir()


@pytest.mark.slow
def test_run_whose_simulator_dies_has_saved_what_it_had_learned(launcher):
    flags = ("--config.log.run=orphan", "--config.train.iterations=99")
    process = launcher.start(*flags, *QUICK)
    metrics = launcher.runs / "orphan" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    assert "SimulatorError" in output
    saved = iterations_in(launcher.runs / "orphan" / "checkpoints")
    assert saved == [max(launcher.metrics("orphan"))]


def resume(output: str) -> list[str]:
    """Return the command that a run's last message ends with."""
    return shlex.split(output.strip().splitlines()[-1])


def test_signal_ends_a_run_with_a_checkpoint_and_the_command_that_goes_on(launcher):
    folder = launcher.runs / "signal"
    flags = ("--config.log.run=signal", "--config.train.iterations=99", *QUICK)
    output = stop(launcher.start(*flags), folder, signal.SIGTERM)
    saved = iterations_in(folder / "checkpoints")
    assert saved == [max(launcher.metrics("signal"))]
    assert f"that of iteration {saved[0]}; go on from there with" in output
    assert f"--config.checkpoint.restore={folder}" in resume(output)


def stop(process, folder, number: int) -> str:
    """Send a signal after the first iteration; return what the run says, which ends in time."""
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(number)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 128 + number, output
    assert time.monotonic() - began < 30
    assert "Traceback" not in output
    assert f"StoppedError: stopped by {signal.Signals(number).name}. Its last checkpoint" in output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_goes_on_like_an_unbroken_one_when_a_signal_stopped_it(launcher, plain, number):
    run = f"stopped_{number.name}"
    flags = (f"--config.log.run={run}", "--config.checkpoint.interval=100", *TWO_SIMULATORS)
    process = launcher.start("--config.train.iterations=3", *flags)
    output = launcher.finish(launcher.again(resume(stop(process, launcher.runs / run, number))))
    assert "Success rate" in output
    assert sorted(launcher.metrics(run)) == [0, 1, 2, 3]
    launcher.assert_same("plain", run, (1, 2, 3), rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_finished_run_says_so_and_changes_nothing_when_it_is_resumed(launcher, plain):
    folder = launcher.runs / "plain"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    flags = ("--config.log.run=plain", "--config.train.iterations=3", *TWO_SIMULATORS)
    output = launcher.run("--config.checkpoint.restore=auto", *flags)
    assert "is done: it has its 3 iterations" in output
    assert "raise --config.train.iterations" in output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_diverged_policy_is_not_saved_and_the_last_good_one_is_named(launcher, plain):
    shutil.copytree(launcher.runs / "plain", launcher.runs / "wild")
    before = sorted(path.name for path in (launcher.runs / "wild" / "checkpoints").iterdir())
    output = launcher.run(
        f"--config.checkpoint.restore={launcher.runs / 'wild'}",
        "--config.train.iterations=6",
        "--config.checkpoint.interval=1",
        "--config.optim.lr=1e30",
        "--config.optim.clip_grad=1e30",
        *QUICK,
        *TWO_SIMULATORS,
        status=2,
    )
    assert "TrainingError: the policy of iteration 4 diverged" in output
    assert "Lower --config.optim.lr (now 1e+30)" in output
    assert "last checkpoint is that of iteration 3" in output
    assert "Traceback" not in output
    output = launcher.run(
        "--config.log.run=wilder",
        "--config.optim.lr=1e30",
        "--config.optim.clip_grad=1e30",
        "--config.train.iterations=3",
        *QUICK,
        status=2,
    )
    assert "TrainingError: the policy of iteration 1 diverged: " in output
    assert "log_probs that the policy gave in the rollout are not finite. Lower" in output
    assert "It had saved no checkpoint yet" in output
    after = sorted(path.name for path in (launcher.runs / "wild" / "checkpoints").iterdir())
    assert after == before


@pytest.mark.slow
def test_second_resume_is_refused_when_the_first_still_trains(launcher, plain):
    shutil.copytree(launcher.runs / "plain", launcher.runs / "twice")
    flags = (f"--config.checkpoint.restore={launcher.runs / 'twice'}", *QUICK, *TWO_SIMULATORS)
    first = launcher.start("--config.train.iterations=99", *flags)
    try:
        while not (launcher.runs / "twice" / ".lock").read_text():
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.05)
        output = launcher.run("--config.train.iterations=99", *flags, status=2)
        assert f"written to by another process (process {first.pid} on" in output
    finally:
        first.send_signal(signal.SIGTERM)
        first.send_signal(signal.SIGTERM)
        first.communicate()
