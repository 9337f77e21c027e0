"""What several files share: the starter of `launch.py`, one trained run, one configuration."""

from pathlib import Path

import pytest

from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import load_preset
from tests.integration.launcher import TWO_SIMULATORS, Launcher


@pytest.fixture(scope="session")
def launcher(repository, weights, made_once) -> Launcher:
    return Launcher(repository, weights, made_once("launch", Path.mkdir))


@pytest.fixture(scope="session")
def plain(launcher, made_once) -> str:
    """Output of a run of three iterations on one host, with two devices and two simulators."""

    def make(folder):
        flags = ("--config.train.iterations=3", "--config.log.run=plain", *TWO_SIMULATORS)
        folder.mkdir()
        (folder / "output").write_text(launcher.run(*flags))

    return (made_once("plain", make) / "output").read_text()


@pytest.fixture(scope="session")
def tiny_config(repository, weights):
    """PPO with random weights and noise in every denoising step, on two simulator processes."""
    values = load_preset(str(repository / "configs/ppo.py"))
    values.policy.checkpoint = str(weights / "policy")
    values.world_model.checkpoint = str(weights / "world_model")
    values.world_model.eta = 1.0
    values.reward.checkpoint = str(weights / "reward")
    values.env.pose_model = str(weights / "pose_model")
    values.env.num_envs = 8
    values.env.max_episode_steps = 16
    values.algo.group_size = 4
    values.algo.global_batch = 16
    values.algo.micro_batch = 8
    values.eval.ground_truth = "none"
    values.video.episodes = 2
    return from_config_dict(values.to_dict())
