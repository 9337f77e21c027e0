"""The real LIBERO, where `make libero` has installed it: numbers, tasks and pictures."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from benchmarks import libero_env
from evac_jax.config.libero import MAX_STEPS, LiberoConfig, problems
from evac_jax.evac.config import MapConfig
from evac_jax.evac.trajectory_maps import project
from evac_jax.files import recordings
from evac_jax.sim.libero_pool import LiberoPool
from evac_jax.tools.episodes import import_libero_demos

PYTHON = libero_env.ROOT / ".venv-libero/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-libero; `make libero` installs it"),
]
OFFICIAL = LiberoConfig(python=str(PYTHON))
FAST = dataclasses.replace(OFFICIAL, **libero_env.FAST)
# All tasks of the small suites; of libero_90, one of every kind of room. All of them:
# `python -m benchmarks.libero_env --tasks 90`.
TASKS = {suite: range(10) for suite in MAX_STEPS} | {"libero_90": (0, 25, 45, 60, 75, 89)}
DRAWER, STOVE = 4, 7  # of libero_spatial (open at the start) and of libero_goal (lights up)


@pytest.fixture
def pool():
    """Return a function that makes a pool of one environment; it is closed afterwards."""
    made = []

    def make(config):
        made.append(LiberoPool(config, 1))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(("suite", "task"), [("libero_spatial", DRAWER), ("libero_goal", STOVE)])
def test_official_protocol_is_upstreams_environment_bit_for_bit(suite, task):
    config = dataclasses.replace(OFFICIAL, suite=suite)
    assert problems(config) == []
    assert libero_env.unlike(config, task, libero_env.wander(20, task)) == []


@pytest.mark.parametrize("suite", MAX_STEPS)
def test_every_suite_starts_moves_and_shows_something(suite):
    libero_env.starts(dataclasses.replace(FAST, suite=suite), TASKS[suite])


def test_instructions_are_upstreams():
    config = dataclasses.replace(OFFICIAL, suite="libero_90")
    one = LiberoPool(config, 1)
    theirs = libero_env.upstream(config, 45, np.zeros((1, 7)))
    assert str(theirs["language"]) == one.suite.instructions[45]
    one.close()


def test_crop_shows_the_same_part_of_the_picture(pool):
    size = 256
    (whole,), _ = pool(dataclasses.replace(OFFICIAL, oversample=1)).start([0], np.array([0]))
    half = dataclasses.replace(OFFICIAL, image_size=64, crop=(0.25, 0.75, 0.5, 1.0), oversample=2)
    (part,), _ = pool(half).start([0], np.array([0]))
    cut = whole[0, size // 2 :, size // 4 : 3 * size // 4].reshape(64, 2, 64, 2, 3)
    difference = np.abs(cut.mean((1, 3)) - part[0])
    assert difference.mean() < 0.5  # of 255; rounding, and other samples at edges
    assert np.abs(cut.mean((1, 3))[:, ::-1] - part[0]).mean() > 10


def test_without_reflections_only_the_mirror_looks_different(pool):
    two = (pool(dataclasses.replace(FAST, reflections=shown)) for shown in (True, False))
    first, second = (each.start([0], np.array([0]))[0][0, 0].astype(int) for each in two)
    changed = np.abs(first - second).max(-1) > 8
    assert 0.005 < changed.mean() < 0.03
    rows, columns = np.nonzero(changed)  # the stove's plate, in one place
    assert np.ptp(rows) < 12
    assert np.ptp(columns) < 16


def test_camera_of_a_crop_shows_the_hand_where_maps_are_drawn(pool):
    one = pool(FAST)
    (before,), poses = one.start([0], np.array([0]))
    moves = np.tile([0.0, 1, 0, 0, 0, 0, -1], (12, 1))
    (after,) = one.play([0], [moves], [False])
    intrinsic, c2w = (torch.from_numpy(part)[None] for part in one.camera)
    hands = torch.from_numpy(np.stack((poses[0], after.poses[-1])))[None]
    seen = project(
        *(hands, intrinsic, torch.linalg.inv(c2w)[:, :, None]),
        *(MapConfig(renderer="upstream", tool_offset=0.0), before.shape[1:3]),
    )[0, 0, :, 0].numpy()  # column and row of the hand, before and after
    changed = np.abs(before[0].astype(int) - after.frames[-1, 0]).sum(-1) > 60
    rows, columns = np.nonzero(changed)
    # What moved is the arm above the hand, from where it was to where it is.
    low, high = np.sort(seen[:, 0])
    assert high - low > 5
    assert columns.min() - 2 <= low
    assert high <= columns.max() + 2
    assert abs((columns.min() + columns.max()) / 2 - (low + high) / 2) < 3
    assert abs(rows.max() - seen[:, 1].mean()) < 5


@pytest.mark.parametrize("config", [OFFICIAL, FAST], ids=["official", "fast"])
def test_scene_is_the_same_when_another_one_was_there_before(pool, config):
    used, new = pool(config), pool(config)
    used.start([0], np.array([0]))
    moves = libero_env.wander(8, 0)
    for each in (used, new):
        each.start([0], np.array([1]))
    (theirs,), (ours,) = (each.play([0], [moves], [True]) for each in (new, used))
    np.testing.assert_array_equal(ours.frames, theirs.frames)
    np.testing.assert_array_equal(ours.poses, theirs.poses)


def test_repeated_actions_are_those_of_the_whole_pace(pool):
    one, two = pool(FAST), pool(dataclasses.replace(FAST, action_repeat=2))
    moves = libero_env.wander(4, 0)
    for each in (one, two):
        each.start([0], np.array([0]))
    (slow,) = one.play([0], [np.repeat(moves, 2, axis=0)], [True])
    (fast,) = two.play([0], [moves], [True])
    np.testing.assert_array_equal(fast.poses, slow.poses[1::2])
    np.testing.assert_array_equal(fast.frames, slow.frames[1::2])


def test_demonstration_of_upstreams_environment_is_rendered_again(tmp_path):
    """STOVE's scene moves its fixtures at every reset; only the demonstration tells where to."""
    suite, task, count = "libero_goal", STOVE, 12
    config = dataclasses.replace(OFFICIAL, suite=suite)
    actions = libero_env.wander(count, 0)
    theirs = libero_env.upstream(config, task, actions)
    name = config.files.tasks(suite)[task]
    path = tmp_path / "demos" / f"{name}_demo.hdf5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["macros_image_convention"] = "opengl"
        group = file["data"].create_group("demo_0")
        group.attrs["model_file"] = str(theirs["model"])
        group["actions"], group["states"] = actions, theirs["states"][:-1]
        group["rewards"] = group["dones"] = np.eye(count, dtype=np.uint8)[-1]
        group["obs/agentview_rgb"] = theirs["frames"][1:]
        group["obs/ee_pos"] = theirs["position"][1:]
        group["obs/ee_ori"] = Rotation.from_quat(theirs["quaternion"][1:]).as_rotvec()
        group["obs/gripper_states"] = theirs["fingers"][1:]
        group["obs/joint_states"] = theirs["joints"][1:]
    flags = ["--render", "--python", str(PYTHON), "--suite", suite]
    source, out = str(path.parent), str(tmp_path / "out")
    import_libero_demos.main(["--source", source, "--out", out, *flags])
    data = recordings.load(out)
    ours, whole = data.frames[:, 0].astype(int), theirs["frames"][:, ::-1, ::-1].astype(int)
    assert ours.shape == whole.shape == (count + 1, 256, 256, 3)
    # robosuite draws positions that are one substep, 2 ms, older than the state.
    assert np.abs(ours - whole).mean() < 0.2
    assert np.abs(ours[1:] - whole[:-1]).mean() > 2 * np.abs(ours - whole).mean()
    # A controller that was set into a state is not yet under way as the recorded one was.
    np.testing.assert_allclose(data.poses[:, :3], theirs["position"], atol=3e-3)
    np.testing.assert_allclose(data.actions[:count], actions, atol=1e-6)
