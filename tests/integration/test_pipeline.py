"""Pipeline stages change when something is computed, not what."""

import dataclasses

import jax
import numpy as np
import pytest

from evac_jax import config as configuration
from evac_jax import overrides, sharding
from evac_jax.evaluate import evaluate
from evac_jax.learner import Learner
from evac_jax.rollout import Stopwatch, collect
from evac_jax.simulators import Simulators, training_specs
from tests.integration import tiny_weights


@pytest.fixture(scope="module")
def config(repository, tmp_path_factory):
    """A run with random weights and noise in every denoising step, on two simulator processes."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_weights.write(folder)
    values = overrides.load(str(repository / "configs/grpo.py"))
    values.policy.checkpoint = str(folder / "policy")
    values.world_model.checkpoint = str(folder / "world_model")
    values.world_model.eta = 1.0
    values.reward.checkpoint = str(folder / "reward")
    values.env.pose_model = str(folder / "pose_model")
    values.env.num_envs = 8
    values.env.max_episode_steps = 16
    values.algo.group_size = 4
    values.eval.ground_truth = "none"
    values.video.episodes = 2
    return configuration.from_config_dict(values.to_dict())


def play(config, stages: int):
    """Collect one iteration and evaluate, with so many stages."""
    rollout = dataclasses.replace(config.rollout, pipeline_stages=stages, epochs=2)
    config = dataclasses.replace(config, rollout=rollout)
    mesh = sharding.make_mesh(2, 2)
    simulators = Simulators(training_specs(config), mesh, config).wait_until_ready()
    try:
        learner = Learner(config, mesh, simulators.spec)
        starts = np.repeat(np.arange(4), 4).reshape(2, 8)
        settings = {"seed": 3, "watch": Stopwatch()}
        collected = collect(learner, simulators, starts, key=jax.random.key(1), **settings)
        return collected, evaluate(learner, simulators, np.arange(6), films=1, **settings)
    finally:
        simulators.close()


def test_two_stages_give_the_numbers_of_one(config):
    (one, figures, record), judged = play(config, 1)
    (two, same_figures, same_record), same_judged = play(config, 2)
    for name in ("images", "prompt_tokens", "tokens", "rewards", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-5)
    assert len(np.unique(np.asarray(one.tokens)[:4, 0], axis=0)) == 4  # a group's members differ
    assert figures == same_figures
    np.testing.assert_array_equal(record.starts, same_record.starts)
    np.testing.assert_array_equal(record.actions, same_record.actions)
    np.testing.assert_array_equal(judged.success, same_judged.success)
    np.testing.assert_array_equal(judged.films[0].frames, same_judged.films[0].frames)
    assert judged.by_task == same_judged.by_task


def test_stages_must_divide_the_environments_of_a_process(config):
    values = configuration.to_dict(config)
    values["rollout"]["pipeline_stages"] = 3
    with pytest.raises(configuration.ConfigError, match=r"pipeline_stages: must divide the 4"):
        configuration.from_config_dict(values)
