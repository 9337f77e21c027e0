"""LIBERO as an environment, with a stand-in for the simulator (`libero_fakes`)."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

from evac_jax.bridge.types import IDLE
from evac_jax.errors import ConfigError, DataError, SimulatorError
from evac_jax.sim import libero
from evac_jax.sim.libero_pool import LiberoPool
from tests.unit.sim import libero_fakes
from tests.unit.sim.libero_fakes import SIZE, TASKS

CLOSE, OPEN = 0.0, 1.0  # gripper as OpenVLA says it


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """Return a function that makes an environment; all are closed afterwards."""
    for name, value in libero_fakes.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    made = []

    def make(num_envs=2, kind="", **settings):
        config = libero_fakes.write(tmp_path, kind=kind)
        settings |= {"libero": dataclasses.asdict(config), "num_envs": num_envs, "chunk": 8}
        made.append(libero.make(settings))
        return made[-1]

    yield make
    for env in made:
        env.close()


def play(env, starts, *chunks):
    """Reset and play; return the results, the last frames and clips of every exchange."""
    num_envs, clips = env.spec.num_envs, env.spec.clip_envs
    frames = torch.zeros(num_envs, *env.spec.image_shape, dtype=torch.uint8)
    clip = torch.zeros(clips, 8, *env.spec.image_shape, dtype=torch.uint8)
    results = [env.reset(np.array(starts), 0, frames, clip)]
    pictures, films = [frames.numpy().copy()], [clip.numpy().copy()]
    for chunk in chunks:
        results.append(env.step(chunk, frames, clip))
        pictures.append(frames.numpy().copy())
        films.append(clip.numpy().copy())
    return results, pictures, films


def chunk(x=0.0, gripper=OPEN, num_envs=2):
    """Return a chunk of actions that move along x."""
    actions = np.zeros((num_envs, 8, 7), np.float32)
    actions[..., 0], actions[..., 6] = x, gripper
    return actions


def test_facts_are_those_of_the_suite(setup):
    spec = setup().spec
    assert spec.instructions == ("pick up the bowl", "close the drawer")
    assert spec.num_starts == 4
    assert spec.image_shape == (1, SIZE, SIZE, 3)
    assert spec.max_episode_steps == 16  # 12 actions are one and a half chunks of 8


def test_start_ids_name_task_and_initial_state(setup):
    env = setup(num_envs=4)
    (result,), _, _ = play(env, [0, 1, 2, 3])
    assert result.task.tolist() == [0, 1, 0, 1]
    # By hand: x 0.0 and 0.2 are the initial states, y 0.3 and 0.6 the tasks.
    expected = [[0.0, 0.3], [0.0, 0.6], [0.2, 0.3], [0.2, 0.6]]
    np.testing.assert_allclose(result.proprio[:, :2], expected, atol=1e-6)
    np.testing.assert_allclose(result.proprio[:, 2:], [[0.5, 0.8, 0.6, 0, 0, 1]] * 4, atol=1e-6)
    with pytest.raises(DataError, match=r"0\.\.3"):
        play(env, [0, 1, 2, 4])


def test_frames_are_turned_by_180_degrees(setup):
    _, (first, last), _ = play(setup(), [0, 1], chunk(0.1))
    picture = first[0, 0]
    assert picture[-1, -1].tolist() == [255, 0, 0]
    assert picture[-2, -3].tolist() == [0, 30, 50]
    assert last[1, 0, -2, -3].tolist() == [8, 60, 50]  # 8 x 0.1 x 0.1 m
    assert not picture[0].any()


def test_policy_closes_the_gripper_with_0_and_the_simulator_with_1(setup, tmp_path):
    actions = chunk()
    actions[0, :, 6] = CLOSE
    results, _, _ = play(setup(), [0, 1], actions)
    assert results[1].proprio[:, 7].tolist() == [0.0, 1.0]
    played = libero_fakes.asked(tmp_path, "step")[-16:]
    assert {step[1][6] for step in played} == {1.0, -1.0}


def test_episode_begins_with_ten_motionless_steps_and_the_states_own_seed(setup, tmp_path):
    play(setup(), [0, 3])
    assert sorted(seed for _, seed in libero_fakes.asked(tmp_path, "seed")) == [0, 1]
    steps = libero_fakes.asked(tmp_path, "step")
    assert [action for _, action, _ in steps] == [[0, 0, 0, 0, 0, 0, -1]] * 20
    one = [shown for pid, _, shown in steps if pid == steps[0][0]]
    assert one == [False] * 9 + [True]  # only the last one is looked at


def test_success_ends_the_episode_and_pays_once(setup):
    env = setup()
    reach, rest = chunk(0.5), chunk()
    reach[0, :, 6] = CLOSE
    results, _, _ = play(env, [0, 1], reach, rest)
    # 0.05 m an action: beyond 0.25 m after the sixth.
    assert results[1].rewards[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert results[1].terminated.tolist() == [True, False]
    assert results[2].success.tolist() == [True, False]
    assert results[2].truncated.tolist() == [False, True]
    assert results[2].episode["length"].tolist() == [8, 12]
    assert results[2].episode["return"].tolist() == [1, 0]


def test_actions_beyond_the_suites_number_are_not_played(setup, tmp_path):
    late = chunk()
    late[:, 4:] = chunk(1.0, CLOSE)[:, 4:]  # would succeed
    results, _, _ = play(setup(), [0, 1], chunk(), late)
    assert results[2].truncated.all()
    assert not results[2].success.any()
    assert len(libero_fakes.asked(tmp_path, "step")) == 2 * (10 + 12)


def test_only_filmed_environments_render_every_frame(setup, tmp_path):
    _, last, films = play(setup(clip_envs=1), [0, 1], chunk(0.1), chunk(0.1))
    film = films[1][0, :, 0]
    assert [int(frame[-2, -3, 0]) for frame in film] == [1, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(films[2][0, 3:], np.repeat(last[2][:1], 5, axis=0))
    played = [step for step in libero_fakes.asked(tmp_path, "step") if step[1][0] > 0]
    assert sum(shown for _, _, shown in played) == 12 + 2


def test_idle_environment_starts_no_process(setup, tmp_path):
    env = setup()
    play(env, [IDLE, IDLE], chunk())
    assert not (tmp_path / "log").exists()
    results, _, _ = play(env, [IDLE, 2], chunk())
    assert len(libero_fakes.asked(tmp_path, "made")) == 1
    assert results[1].episode["length"].tolist() == [0, 8]


def test_environment_is_built_once_per_task_when_starts_change_places(setup, tmp_path):
    env = setup()
    play(env, [0, 1])
    results, _, _ = play(env, [3, 2])
    assert results[0].task.tolist() == [1, 0]
    np.testing.assert_allclose(results[0].proprio[:, 1], [0.6, 0.3], atol=1e-6)
    assert len(libero_fakes.asked(tmp_path, "made")) == 2


def test_finished_episode_is_restarted_when_asked_for(setup):
    env = setup(auto_reset=True)
    results, _, _ = play(env, [2, 3], chunk(0.5, CLOSE))
    assert results[1].terminated.all()
    assert results[1].episode["success_once"].tolist() == [1, 1]
    np.testing.assert_allclose(results[1].proprio[:, 0], 0.2, atol=1e-6)  # begun anew


def test_failure_names_the_task_and_carries_the_process_traceback(setup):
    with pytest.raises(SimulatorError, match="the scene is broken") as raised:
        play(setup(kind="broken"), [0, 1])
    assert f"libero_spatial/{TASKS[1]}" in str(raised.value)
    assert "set_init_state" in str(raised.value)


def test_dead_process_is_an_error_with_its_last_output(setup):
    with pytest.raises(SimulatorError, match="SIGKILL") as raised:
        play(setup(kind="deadly"), [0, 1], chunk(0.0, CLOSE))
    assert TASKS[1] in str(raised.value)
    assert "about to die" in str(raised.value)


def test_process_that_died_between_chunks_is_noticed(setup, tmp_path):
    env = setup()
    play(env, [0, 1])
    os.kill(libero_fakes.asked(tmp_path, "made")[0][0], signal.SIGKILL)
    with pytest.raises(SimulatorError, match="SIGKILL"):
        play(env, [0, 1])


def test_camera_sees_points_where_the_frames_show_them(tmp_path, monkeypatch):
    for name, value in libero_fakes.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    pool = LiberoPool(libero_fakes.write(tmp_path), 2)
    try:
        pool.start([0, 1], np.array([0, 1]))
        intrinsic, c2w = pool.camera
    finally:
        pool.close()
    assert pool.one_camera
    # The stand-in's camera is at x = 1 m, looks along -x, right is +y: with 90 degrees a point one
    # metre ahead and half a metre to the left is a quarter of the width left of the centre. The
    # frames are mirrored, so that it appears on the right.
    seen = np.linalg.inv(c2w[0]) @ [0.0, -0.5, 0.25, 1.0]
    pixel = intrinsic[0] @ seen[:3] / seen[2]
    np.testing.assert_allclose(pixel, [SIZE * 0.75, SIZE * 0.375, 1], atol=1e-5)


@pytest.fixture
def pool(tmp_path, monkeypatch):
    for name, value in libero_fakes.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    pool = LiberoPool(libero_fakes.write(tmp_path), 2)
    yield pool
    pool.close()


def test_places_have_the_names_of_the_task_and_quaternions_with_w_last(pool):
    pool.start([0, 1], np.array([0, 1]))
    places = pool.look([1, 0])[0]
    np.testing.assert_array_equal(
        places["akita_black_bowl_1"], [*libero_fakes.BOWL, 0.0, 0.0, 0.8, 0.6]
    )
    np.testing.assert_array_equal(places["cabinet_1_top_region"], [0, 0, 0.9, 0, 0, 0.8, 0.6])


def test_nothing_is_rendered_when_it_is_played_blind(pool, tmp_path):
    pool.start([0], np.array([0]))
    (played,) = pool.play([0], [np.zeros((3, 7))], [False], blind=True)
    assert len(played.frames) == 0
    assert len(played.poses) == 3
    assert [shown for _, _, shown in libero_fakes.asked(tmp_path, "step")[-3:]] == [False] * 3


def test_repeated_actions_count_once_and_only_their_end_is_rendered(tmp_path, monkeypatch):
    for name, value in libero_fakes.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    config = dataclasses.replace(libero_fakes.write(tmp_path), action_repeat=2)
    pool = LiberoPool(config, 1)
    try:
        pool.start([0], np.array([0]))
        moves = np.tile([0.5, 0, 0, 0, 0, 0, 1], (3, 1))  # 0.05 m a step, a success beyond 0.25
        (blind,) = pool.play([0], [moves], [True], blind=True)
        pool.start([0], np.array([0]))
        (filmed,) = pool.play([0], [moves], [True])
    finally:
        pool.close()
    np.testing.assert_allclose(filmed.poses[:, 0], [0.1, 0.2, 0.3], atol=1e-6)
    np.testing.assert_array_equal(blind.poses, filmed.poses)
    assert filmed.success.tolist() == blind.success.tolist() == [False, False, True]
    assert filmed.frames[:, 0, -2, -3, 0].tolist() == [10, 20, 30]
    assert len(blind.frames) == 0
    steps = [shown for _, action, shown in libero_fakes.asked(tmp_path, "step") if action[0]]
    assert steps == [False] * 6 + [False, True] * 3


def test_states_are_shown_as_they_are_with_fixtures_where_they_were(pool, tmp_path):
    states = np.array([[0, 0.1, 0.2, 0.3, 1], [0, 0.3, 0.2, 0.3, -1]])
    fixtures = {libero_fakes.FIXTURE: [0.5, 0.6, 0.7, 1, 0, 0, 0]}
    shown = pool.show(TASKS[0], states, fixtures)
    np.testing.assert_allclose(shown.poses[:, :3], states[:, 1:4], atol=1e-6)
    assert shown.success.tolist() == [False, True]
    assert shown.frames[:, 0, -2, -3].tolist() == [[10, 20, 30], [30, 20, 30]]
    assert shown.frames[:, 0, -3, -3].tolist() == [[50, 60, 70]] * 2
    assert len(libero_fakes.asked(tmp_path, "step")) == 10  # the wait at the start


def test_unknown_setting_is_refused(setup):
    with pytest.raises(ConfigError, match="num_env"):
        libero.make({"num_env": 1})
