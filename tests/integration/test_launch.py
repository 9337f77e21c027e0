"""The command a user types, on random weights of the smallest sizes: train, kill, resume, eval."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evac_jax.telemetry import video

PROMISED = (
    "actor/loss", "actor/value_loss", "actor/entropy", "actor/grad_norm", "actor/lr",
    "rollout/reward_mean", "rollout/reward_std", "rollout/episode_length", "rollout/success_rate",
    "env/success_rate", "env/step_reward", "env/termination_rate",
)  # fmt: skip
# Differ from run to run by nature.
CLOCKED = "time/"


@pytest.fixture(scope="module")
def weights(tmp_path_factory, repository) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    command = [sys.executable, "-m", "tests.integration.tiny_weights", str(folder)]
    subprocess.run(command, cwd=repository, check=True)
    return folder


class Launcher:
    """Starts launch.py on tiny weights; compiled programs are shared between the runs."""

    def __init__(self, repository: Path, weights: Path, folder: Path):
        self._repository, self.runs = repository, folder / "runs"
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        settings = {
            "policy.checkpoint": weights / "policy",
            "world_model.checkpoint": weights / "world_model",
            "reward.checkpoint": weights / "reward",
            "env.pose_model": weights / "pose_model",
            "world_model.steps": 1,
            "env.num_envs": 8,
            "env.max_episode_steps": 16,
            "algo.group_size": 4,
            "algo.global_batch": 8,
            "algo.micro_batch": 8,
            "eval.episodes": 4,
            "eval.ground_truth_episodes": 8,
            "eval.ground_truth_envs": 8,
            "eval.twin_fraction": 0.5,
            "eval.interval": 0,
            "video.episodes": 1,
            "log.dir": self.runs,
            # Random weights never succeed: a low bar makes rewards differ within groups.
            "reward.threshold": 0.5,
        }
        self._flags = [f"--config.{name}={value}" for name, value in settings.items()]

    def start(self, *flags: str, config: str = "configs/grpo.py") -> subprocess.Popen:
        command = [sys.executable, "launch.py", f"--config={config}", *self._flags, *flags]
        return subprocess.Popen(
            command,
            cwd=self._repository,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *flags: str, config: str = "configs/grpo.py", status: int = 0) -> str:
        process = self.start(*flags, config=config)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == status, output
        return output

    def metrics(self, run: str) -> dict[int, dict[str, float]]:
        lines = (self.runs / run / "metrics.jsonl").read_text().splitlines()
        return {line["iteration"]: line for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def launcher(repository, weights, tmp_path_factory) -> Launcher:
    return Launcher(repository, weights, tmp_path_factory.mktemp("launch"))


@pytest.mark.slow
def test_killed_run_goes_on_where_it_was_and_ends_like_an_unbroken_one(launcher):
    output = launcher.run("--config.train.iterations=2", "--config.log.run=unbroken")
    assert "ground truth" in output

    process = launcher.start("--config.train.iterations=9", "--config.log.run=broken")
    checkpoint = launcher.runs / "broken" / "checkpoints" / "1"
    deadline = time.monotonic() + 500
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = launcher.run(
        "--config.train.iterations=2",
        "--config.log.run=broken",
        "--config.checkpoint.restore=latest",
    )
    assert "at iteration" in output

    unbroken, broken = launcher.metrics("unbroken"), launcher.metrics("broken")
    assert sorted(broken) == sorted(unbroken) == [0, 1, 2]
    for iteration in (1, 2):
        for name, value in unbroken[iteration].items():
            if not name.startswith(CLOCKED):
                assert broken[iteration][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.slow
def test_ppo_run_leaves_every_promised_metric_and_a_video_that_plays(launcher):
    launcher.run("--config.train.iterations=1", "--config.log.run=ppo", config="configs/ppo.py")
    events = EventAccumulator(str(launcher.runs / "ppo" / "tensorboard")).Reload()
    for name in PROMISED:
        assert [e.value for e in events.Scalars(name)] == pytest.approx(
            [launcher.metrics("ppo")[1][name]]
        )
    frames, _ = video.read_mp4(launcher.runs / "ppo" / "videos" / "iteration_00001_0.mp4")
    assert frames.shape[0] == 1 + 16
    assert frames.std() > 0


@pytest.mark.slow
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
