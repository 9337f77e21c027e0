"""Learning and evaluating in the ground truth: no world model, classifier or pose model at all."""

import json
import os
import subprocess
import sys

import pytest

from evac_jax import checkpoint
from tests import xla_flags


@pytest.fixture(scope="module")
def launch(repository, weights, tmp_path_factory):
    """Start launch.py with small settings and a policy of random weights."""
    folder = tmp_path_factory.mktemp("ground_truth")
    settings = {
        "policy.checkpoint": weights / "policy",
        "world_model.checkpoint": "",
        "reward.checkpoint": "",
        "env.pose_model": "",
        "env.simulator": "ground_truth",
        "env.num_envs": 8,
        "env.max_episode_steps": 16,
        "algo.group_size": 4,
        "algo.global_batch": 8,
        "algo.micro_batch": 8,
        "checkpoint.interval": 1,
        "eval.episodes": 0,
        "eval.ground_truth_episodes": 8,
        "eval.ground_truth_envs": 8,
        "log.dir": folder / "runs",
        "log.tensorboard": False,
    }
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices=1),
    }

    def run(mode="train", **changes):
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        flags = [f"--config.{name}={value}" for name, value in (settings | changes).items()]
        done = subprocess.run(
            [sys.executable, "launch.py", "--config=configs/grpo.py", f"--mode={mode}", *flags],
            cwd=repository,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run.runs = folder / "runs"
    return run


@pytest.mark.slow
def test_evaluation_takes_the_named_iteration_scenes_and_temperature(launch):
    launch(train__iterations=2, log__run="trained")
    trained = launch.runs / "trained"
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [0, 1, 2]
    assert metrics[1]["env/num_trajectories"] == 8

    config = (trained / checkpoint.CONFIG_FILE).read_text()
    launch(
        mode="eval",
        checkpoint__restore=trained,
        checkpoint__step=1,
        eval__starts=(2_000_000, 3_000_000),
        eval__ground_truth_episodes=5,
        policy__eval_temperature=0.5,
        log__run="one",
    )
    found = json.loads((launch.runs / "one" / "evaluation.json").read_text())
    assert (found["run"], found["iteration"]) == (str(trained), 1)
    assert {"policy", "seed"} <= set(found)
    assert found["temperature"] == 0.5
    assert found["starts"] == [2_000_000, 3_000_000]
    assert found["success"]["ground_truth"]["episodes"] == 5
    assert (trained / checkpoint.CONFIG_FILE).read_text() == config  # looked at, not changed
