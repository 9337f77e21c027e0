"""One set of weights and one cache of compiled programs for all tests that start `launch.py`."""

import pytest

from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import load_preset
from tests.integration import tiny_weights
from tests.integration.launcher import Launcher, write_weights


@pytest.fixture(scope="session")
def launcher(repository, tmp_path_factory) -> Launcher:
    folder = tmp_path_factory.mktemp("launch")
    return Launcher(repository, write_weights(folder / "weights", repository), folder)


@pytest.fixture(scope="session")
def tiny_config(repository, tmp_path_factory):
    """PPO with random weights and noise in every denoising step, on two simulator processes."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_weights.write(folder)
    values = load_preset(str(repository / "configs/ppo.py"))
    values.policy.checkpoint = str(folder / "policy")
    values.world_model.checkpoint = str(folder / "world_model")
    values.world_model.eta = 1.0
    values.reward.checkpoint = str(folder / "reward")
    values.env.pose_model = str(folder / "pose_model")
    values.env.num_envs = 8
    values.env.max_episode_steps = 16
    values.algo.group_size = 4
    values.algo.global_batch = 16
    values.algo.micro_batch = 8
    values.eval.ground_truth = "none"
    values.video.episodes = 2
    return from_config_dict(values.to_dict())
