import gymnasium.utils.env_checker
import numpy as np
import pytest
import torch

from evac_jax.bridge.server import build_environments, check_result
from evac_jax.bridge.types import IDLE
from evac_jax.errors import ConfigError
from examples.reach import Reach

SETTINGS = {"num_envs": 4, "max_episode_steps": 32, "coefficient": 5.0, "relative": True}


def build(parts=1, **changes):
    spec = {"environment": "examples.gym_ground_truth:GymGroundTruth", "parts": parts}
    envs = build_environments(spec | {"config": SETTINGS | changes})
    shape = (envs[0].spec.num_envs, *envs[0].spec.image_shape)
    return envs, torch.zeros(shape, dtype=torch.uint8), torch.zeros(0, 8, *shape[1:])


def towards_the_pad(env):
    """Actions [B 8 7] that a player who sees where hand and pad are would take."""
    actions = np.zeros((len(env._envs), 8, 7), np.float32)
    for row, one in enumerate(env._envs):
        hand = one.hand.copy()
        for k in range(8):
            actions[row, k, :2] = np.clip((one.pad - hand) / 0.1, -1, 1)
            hand += 0.1 * actions[row, k, :2]
    return actions


def test_gymnasium_finds_no_fault_in_the_environment():
    gymnasium.utils.env_checker.check_env(Reach(), skip_render_check=True)


def test_reaching_the_pad_earns_the_coefficient_once_and_ends_the_episode():
    (env,), frames, clip = build()
    env.reset(np.arange(4), 0, frames, clip)
    total = np.zeros(4)
    for _ in range(4):
        result = env.step(towards_the_pad(env), frames, clip)
        check_result(env.spec, result)
        total += result.rewards.sum(1)
    assert total.tolist() == [5.0] * 4
    assert result.terminated.all()
    last = frames.clone()
    env.step(np.ones((4, 8, 7), np.float32), frames, clip)
    assert (frames == last).all()


def test_episode_is_cut_off_when_the_pad_is_not_reached():
    (env,), frames, clip = build(max_episode_steps=8)
    env.reset(np.array([0, IDLE, 2, 3]), 0, frames, clip)
    result = env.step(np.zeros((4, 8, 7), np.float32), frames, clip)
    assert result.truncated.tolist() == [True, False, True, True]
    assert result.episode["length"].tolist() == [8, 0, 8, 8]


def test_start_id_names_the_place_of_hand_and_pad():
    parts, frames, clip = build(parts=2)
    pictures = []
    for env in parts:
        result = env.reset(np.array([5, 6]), 0, frames, clip)
        pictures.append((frames.clone(), result.proprio))
    assert torch.equal(pictures[0][0], pictures[1][0])
    assert not torch.equal(pictures[0][0][0], pictures[0][0][1])
    np.testing.assert_array_equal(pictures[0][1], pictures[1][1])


def test_what_the_example_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="cannot do auto_reset"):
        build(auto_reset=True)
