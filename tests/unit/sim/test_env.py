import numpy as np
import pytest
import torch

from evac_jax.bridge.environment import IDLE
from evac_jax.errors import ConfigError, DataError, SimulatorError
from evac_jax.sim.env import make
from evac_jax.sim.pixels import to_model_range, to_uint8
from tests.unit.sim.fakes import Driver


def shown(*starts):
    """The red channel in which the starts are observed."""
    images = torch.tensor([10 * start for start in starts], dtype=torch.uint8)
    images = images.reshape(-1, 1, 1, 1, 1).expand(-1, -1, -1, -1, 3)
    return to_uint8(to_model_range(images, (1, 1)))[:, 0, 0, 0, 0].tolist()


MOVED = to_uint8(torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1)).flatten().tolist()  # x to pixel


def test_a_group_shares_frame_pose_and_task_when_its_ids_are_equal():
    driver = Driver(num_envs=4)
    result = driver.reset(3, 3, 6, 6)
    assert driver.pixels[:, 0].tolist() == shown(3, 3, 6, 6)
    assert result.task.tolist() == [1, 1, 0, 0]
    assert result.rewards.shape == (4, 2)
    assert not (result.terminated | result.truncated | result.success).any()


def test_every_environment_is_conditioned_on_its_own_start():
    driver = Driver()
    driver.reset(0, 6, 12)
    driver.step(0.1, 0.1, 0.1)
    assert np.abs(driver.pixels[:, 2].astype(int) - [0, 60, 120]).max() <= 1


def test_the_first_start_conditions_all_when_shared():
    driver = Driver(shared_conditioning_image=True)
    driver.reset(6, 0, 12)
    driver.step(0.1, 0.1, 0.1)
    assert np.abs(driver.pixels[:, 2].astype(int) - 60).max() <= 1


def test_pose_advances_and_is_observed():
    driver = Driver()
    driver.reset(0, 0, 0)
    driver.step(0.125, 0, 0)
    result = driver.step(0.125, 0, 0)
    assert result.proprio.shape == (3, 8)
    assert result.proprio[:, 0].tolist() == [0.5, 0, 0]
    assert driver.pixels[0, 0] == MOVED[1]


def test_episodes_end_one_by_one_and_then_rest():
    driver = Driver(coefficient=4.0)
    driver.reset(0, 1, 2)
    first = driver.step(0.25, 0, 0.125)
    assert first.terminated.tolist() == [True, False, False]
    np.testing.assert_array_equal(first.rewards, [[0, 4], [0, 0], [0, 0]])
    seen = driver.pixels[0]
    second = driver.step(-1, 0, 0.125)
    assert second.terminated.tolist() == [True, False, True]
    np.testing.assert_array_equal(second.rewards, [[0, 0], [0, 0], [0, 4]])
    np.testing.assert_array_equal(driver.pixels[0], seen)
    assert second.proprio[0, 0] == 0.5
    assert second.episode["length"].tolist() == [2, 4, 4]
    assert second.episode["return"].tolist() == [4, 0, 4]
    assert driver.model.imagined == [3, 2]


def test_the_world_model_rests_when_every_episode_is_over():
    driver = Driver()
    driver.reset(0, 1, 2)
    driver.step(1, 1, 1)
    result = driver.step(1, 1, 1)
    assert driver.model.imagined == [3]
    assert not result.rewards.any()


def test_time_limit_truncates():
    driver = Driver(max_episode_steps=3)
    driver.reset(0, 1, 2)
    assert not driver.step(0, 0, 0).truncated.any()
    assert driver.step(0, 0, 1).truncated.tolist() == [True, True, False]


def test_success_is_recorded_but_does_not_end_the_episode_when_terminations_are_ignored():
    driver = Driver(ignore_terminations=True, coefficient=1.0)
    driver.reset(0, 1, 2)
    driver.step(1, 0, 0)
    result = driver.step(-1, 0, 0)
    assert driver.model.imagined == [3, 3]
    assert result.success.tolist() == [True, False, False]
    assert not result.terminated.any()
    assert result.episode["return"].tolist() == [1, 0, 0]


def test_only_finished_environments_restart_when_auto_reset():
    driver = Driver(auto_reset=True, coefficient=1.0)
    driver.reset(2, 2, 2)
    before = driver.step(0.125, 0.125, 0.125)
    result = driver.step(1, 0, 0)
    assert result.terminated.tolist() == [True, False, False]
    assert result.episode["return"].tolist() == [1, 0, 0]
    assert result.episode["length"].tolist() == [4, 4, 4]
    assert result.proprio[:, 0].tolist() == [0, 0.25, 0.25]
    assert driver.pixels[0].tolist() == shown(2, 2, 2)
    np.testing.assert_array_equal(before.proprio[1:], result.proprio[1:])
    again = driver.step(0, 0, 0)
    assert again.episode["length"].tolist() == [2, 6, 6]
    assert again.episode["success_once"].tolist() == [0, 0, 0]


def test_restarts_follow_a_seeded_cycle_over_the_ids_of_the_reset():
    def restarts(seed):
        driver = Driver(auto_reset=True)
        driver.reset(4, 7, 9, seed=seed)
        seen = []
        for _ in range(4):
            driver.step(1, 1, 1)
            seen.append(driver.pixels[:, 0].tolist())
        return seen

    rounds = restarts(0)
    assert all(sorted(row) == shown(4, 7, 9) for row in rounds)
    assert rounds == restarts(0)
    assert any(rounds != restarts(seed) for seed in range(1, 5))


def play(reset_seed=0, **settings):
    """Green channel (noise), rewards and flags of a run in which episodes end at odd times."""
    driver = Driver(num_envs=4, max_episode_steps=6, coefficient=1.0, **settings)
    driver.reset(1, 2, 3, 4, seed=reset_seed)
    noise, outcome = [], []
    for _ in range(3):
        active = driver.env.episodes.running.numpy()
        result = driver.step(0.0, 1.0, 0.125, 0.0)
        noise.append(np.where(active, driver.pixels[:, 1], 0))
        outcome += [result.rewards, result.terminated, result.truncated, result.episode["return"]]
    return np.array(noise), outcome


@pytest.mark.parametrize("settings", [{"skip_finished": False}, {"max_batch": 1}, {"max_batch": 3}])
def test_nothing_changes_when_the_batch_is_compacted_or_split(settings):
    noise, outcome = play()
    other_noise, other = play(**settings)
    np.testing.assert_array_equal(noise, other_noise)
    for ours, theirs in zip(outcome, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_imagination_repeats_with_the_seed_and_changes_without():
    np.testing.assert_array_equal(play(5)[0], play(5)[0])
    assert (play(5)[0] != play(6)[0]).any()
    assert (play(5)[0] != play(5, seed=1)[0]).any()


def test_idle_environments_cost_nothing_and_stay_silent():
    driver = Driver(auto_reset=True)
    driver.reset(IDLE, 5, IDLE)
    for _ in range(3):
        result = driver.step(1, 0, 1)
    assert driver.model.imagined == [1, 1, 1]
    assert not (result.terminated | result.truncated)[[0, 2]].any()
    assert result.episode["length"].tolist() == [0, 6, 0]
    driver.reset(IDLE, IDLE, IDLE)
    driver.step(1, 1, 1)
    assert driver.model.imagined == [1, 1, 1]


def test_clips_hold_the_whole_chunk_of_the_first_environments():
    driver = Driver(clip_envs=2)
    driver.reset(0, 5, 0)
    assert driver.clip[:, -1, 0, 0, 0, 0].tolist() == shown(0, 5)
    driver.step([0.5, 0.5], 0, 0)
    assert driver.clip[0, :, 0, 0, 0, 0].tolist() == [MOVED[1], MOVED[2]]
    driver.step(0, [0.25, 0.25], 0)  # environment 0 is over: its picture stands still
    assert driver.clip[:, :, 0, 0, 0, 0].tolist() == [[MOVED[2]] * 2, [159, MOVED[1]]]
    assert (driver.clip[:, -1] == driver.frames[:2]).all()


def test_only_the_last_frames_are_judged_when_asked_for():
    driver = Driver(judged_frames=1, clip_envs=2, coefficient=1.0)
    driver.reset(0, 0, 0)
    result = driver.step([1, -0.5], [0.5, 0], 0)
    assert result.success.tolist() == [True, True, False]
    np.testing.assert_array_equal(result.rewards, [[0, 1], [0, 1], [0, 0]])
    assert driver.clip[:, :, 0, 0, 0, 0].tolist() == [[MOVED[2], MOVED[1]], [MOVED[1]] * 2]
    with pytest.raises(ConfigError, match="never show"):
        Driver(judged_frames=1, success_frames=2)
    with pytest.raises(ConfigError, match="at most the chunk"):
        Driver(judged_frames=3)


def test_reference_numbers_come_back_when_asked_for():
    driver = Driver(reference_compat=True, auto_reset=True, max_episode_steps=100)
    driver.reset(1, 2, 3)
    result = driver.step(0.125, 0, 0)
    assert driver.env.window.poses[0, :, 0].tolist() == [0, 0, 0.25, 0.5, 0]  # raw, one place early
    assert not result.terminated.any()  # 0.5 rounds to 0, and the last frame shows the start pose
    assert result.proprio[0, 0] == 0
    result = driver.step(0.25, 0, 0)
    assert driver.env.window.poses[1, 0, 0] == 0
    assert result.terminated.tolist() == [True, False, False]
    assert driver.env.episodes.steps.tolist() == [0, 0, 0]  # all restart together


def test_images_are_resized_and_truncated_as_in_the_reference():
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    scaled = to_model_range(image, (16, 16))
    assert scaled.shape == (1, 1, 3, 16, 16)
    assert scaled.min() == -1
    assert scaled.max() == 1
    assert (to_uint8(scaled).int() - image.int()).abs().max() <= 1
    assert to_model_range(image, (8, 4)).shape == (1, 1, 3, 8, 4)
    assert to_uint8(torch.full((3, 1, 1), 9.0)).flatten().tolist() == [255] * 3


def test_steps_before_a_reset_or_of_another_shape_are_refused():
    driver = Driver()
    with pytest.raises(DataError, match="no reset"):
        driver.step(0, 0, 0)
    driver.reset(0, 0, 0)
    with pytest.raises(DataError, match=r"\(3, 2, 7\)"):
        driver.env.step(np.zeros((3, 1, 7), np.float32), driver.frames, driver.clip)
    with pytest.raises(DataError, match="3 start ids"):
        driver.reset(0, 0)


def test_poses_of_every_start_are_compared_with_those_that_the_pose_model_knows():
    driver, seen = Driver(auto_reset=True, max_episode_steps=2), []
    driver.env._pose_model.check_poses = lambda poses: seen.append(len(poses))
    driver.reset(1, 2, 3)
    driver.step(0, 0, 0)
    assert seen == [3, 3]


def test_frames_that_are_not_finite_stop_the_simulator():
    driver = Driver()
    driver.reset(0, 0, 0)
    with pytest.raises(SimulatorError, match="not finite"):
        driver.step(0, float("nan"), 0)


def test_unknown_settings_are_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean num_envs"):
        make({"num_env": 3})


def test_all_missing_files_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        make(
            {
                "world_model": "/nowhere/a",
                "initial_states": "npy",
                "initial_states_path": "/nowhere/b",
            }
        )
    for name in ("/nowhere/a", "reward: not set", "pose_model: not set", "/nowhere/b"):
        assert name in str(caught.value)


def test_impossible_settings_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        Driver(num_envs=0, eta=2.0, gripper="open", success_frames=0)
    for name in ("num_envs", "eta", "gripper", "success_frames"):
        assert name in str(caught.value)
