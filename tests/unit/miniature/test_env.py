import numpy as np
import pytest
import torch

from evac_jax.bridge.types import IDLE
from evac_jax.errors import ConfigError, DataError
from evac_jax.miniature import render, scene
from evac_jax.miniature.env import make, to_policy_actions
from evac_jax.miniature.expert import Expert, demonstrate


def build(count=4, **changes):
    env = make({"num_envs": count, "clip_envs": 2, "image_size": 32, **changes})
    frames = torch.zeros(count, *env.spec.image_shape, dtype=torch.uint8)
    clip = torch.zeros(2, env.spec.action.chunk, *env.spec.image_shape, dtype=torch.uint8)
    return env, frames, clip


def expert_chunks(starts, chunks=4):
    actions, states = demonstrate(scene.sample_scenes(starts), Expert(), 8 * chunks)
    return to_policy_actions(actions).reshape(len(starts), chunks, 8, 7), states


def test_reset_shows_the_scene_of_the_start_id():
    env, frames, clip = build(start_seed_base=100)
    result = env.reset(np.array([0, 1, 1, 2]), 0, frames, clip)
    scenes = scene.sample_scenes([100, 101, 101, 102])
    np.testing.assert_array_equal(frames[:, 0].numpy(), render.render(scenes, 32))
    np.testing.assert_array_equal(clip[1, -1].numpy(), frames[1].numpy())
    np.testing.assert_array_equal(result.task, scenes.task)
    np.testing.assert_array_equal(result.proprio, scenes.pose)


def test_expert_earns_the_coefficient_once_and_terminates():
    env, frames, clip = build(coefficient=5.0)
    starts = np.arange(4)
    chunks, states = expert_chunks(starts)
    env.reset(starts, 0, frames, clip)
    results = [env.step(chunks[:, t], frames, clip) for t in range(3)]
    assert not results[1].terminated.any()
    assert results[2].terminated.all()
    assert not results[2].truncated.any()
    assert results[2].rewards.sum() == 4 * 5.0
    assert results[2].episode["return"].tolist() == [5.0] * 4
    np.testing.assert_array_equal(
        clip[0, :, 0].numpy(), np.stack([render.render(s[:1], 32)[0] for s in states[17:25]])
    )


def test_finished_episode_stays_frozen_and_earns_nothing():
    env, frames, clip = build()
    starts = np.arange(4)
    chunks, _ = expert_chunks(starts)
    env.reset(starts, 0, frames, clip)
    for t in range(3):
        before = env.step(chunks[:, t], frames, clip)
    last = frames.clone()
    after = env.step(np.full((4, 8, 7), 1.0, np.float32), frames, clip)
    assert after.terminated.all()
    assert after.rewards.sum() == 0
    np.testing.assert_array_equal(frames.numpy(), last.numpy())
    np.testing.assert_array_equal(after.proprio, before.proprio)


def test_truncates_at_the_limit_when_nothing_succeeds():
    env, frames, clip = build(max_episode_steps=16)
    env.reset(np.arange(4), 0, frames, clip)
    still = np.zeros((4, 8, 7), np.float32)
    assert not env.step(still, frames, clip).truncated.any()
    result = env.step(still, frames, clip)
    assert result.truncated.all()
    assert not result.success.any()


def test_ignored_terminations_still_record_success():
    env, frames, clip = build(ignore_terminations=True)
    starts = np.arange(4)
    chunks, _ = expert_chunks(starts)
    env.reset(starts, 0, frames, clip)
    results = [env.step(chunks[:, t], frames, clip) for t in range(4)]
    assert not results[2].terminated.any()
    assert results[3].truncated.all()
    assert results[3].success.all()


def test_auto_reset_restarts_finished_environments_only():
    env, frames, clip = build(auto_reset=True)
    starts = np.array([7, 7, 8, 8])
    chunks, _ = expert_chunks(starts)
    chunks[2:] = 0
    chunks[2:, ..., 6] = 1
    env.reset(starts, 0, frames, clip)
    for t in range(3):
        result = env.step(chunks[:, t], frames, clip)
    assert result.terminated.tolist() == [True, True, False, False]
    assert result.episode["success_once"].tolist() == [1, 1, 0, 0]
    fresh = scene.sample_scenes([7, 8]).pose
    for pose in result.proprio[:2]:
        assert any((pose == start).all() for start in fresh)
    following = env.step(chunks[:, 3], frames, clip)
    assert not following.terminated.any()
    assert following.truncated.tolist() == [False, False, True, True]


def test_idle_environment_has_no_episode():
    env, frames, clip = build()
    env.reset(np.array([0, IDLE, 2, IDLE]), 0, frames, clip)
    for _ in range(4):
        result = env.step(np.zeros((4, 8, 7), np.float32), frames, clip)
    assert result.truncated.tolist() == [True, False, True, False]
    assert result.episode["length"].tolist() == [32, 0, 32, 0]


def test_gripper_opens_at_one_and_closes_at_zero():
    env, frames, clip = build()
    env.reset(np.arange(4), 0, frames, clip)
    actions = np.zeros((4, 8, 7), np.float32)
    closed = env.step(actions, frames, clip).proprio[:, 7]
    actions[..., 6] = 1
    opened = env.step(actions, frames, clip).proprio[:, 7]
    assert (closed == 0).all()
    assert (opened == 1).all()


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="unknown"):
        make({"envs": 3})
    with pytest.raises(ConfigError, match="clip_envs"):
        make({"num_envs": 1, "clip_envs": 2})
    env, frames, clip = build(num_starts=10)
    with pytest.raises(DataError, match="after a reset"):
        env.step(np.zeros((4, 8, 7), np.float32), frames, clip)
    with pytest.raises(DataError, match="start ids"):
        env.reset(np.array([0, 1, 2, 10]), 0, frames, clip)
