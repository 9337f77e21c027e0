import numpy as np
import pytest

from evac_jax.miniature import scene
from evac_jax.miniature.scene import DISTRACTOR, NOTHING, TABLETOP, TARGET

CLOSE, OPEN = 1.0, -1.0


@pytest.fixture
def scenes():
    return scene.sample_scenes(np.arange(8))


def act(count, xyz=(0.0, 0.0, 0.0), rotation=(0.0, 0.0, 0.0), gripper=0.0):
    return np.tile((*xyz, *rotation, gripper), (count, 1))


def at_target(scenes, offset=(0.0, 0.0, 0.0)):
    scenes.position = scenes.blocks[:, TARGET] + np.array(offset)
    return scenes


def grasped(scenes):
    scenes = at_target(scenes)
    for _ in range(2):
        scenes = scene.step(scenes, act(len(scenes), gripper=CLOSE))
    return scenes


def test_scene_depends_on_its_own_seed_only():
    alone, among = scene.sample_scenes([5]), scene.sample_scenes([9, 5, 2])
    np.testing.assert_array_equal(alone.pose[0], among.pose[1])
    np.testing.assert_array_equal(alone.blocks[0], among.blocks[1])


def test_start_scenes_keep_their_gaps_and_have_two_colours():
    scenes = scene.sample_scenes(np.arange(300))
    to_plate = np.linalg.norm(scenes.blocks[..., :2] - scenes.plate[:, None], axis=-1)
    assert to_plate.min() > TABLETOP.plate_gap
    assert (scenes.colors[:, 0] != scenes.colors[:, 1]).all()
    assert set(scenes.task.tolist()) == {0, 1}
    assert not scene.is_success(scenes).any()


def test_step_moves_three_centimetres_and_cuts_larger_actions(scenes):
    after = scene.step(scenes, act(8, xyz=(1.0, 0.0, -5.0)))
    np.testing.assert_allclose((after.position - scenes.position)[:, 0], 0.03)
    np.testing.assert_allclose((after.position - scenes.position)[:, 2], -0.03)


def test_tip_stays_in_the_workspace_when_pushed_out(scenes):
    for _ in range(20):
        scenes = scene.step(scenes, act(8, xyz=(1.0, 1.0, 1.0)))
    np.testing.assert_allclose(scenes.position, np.tile(TABLETOP.workspace_high, (8, 1)))


def test_rotation_adds_up_about_world_axes(scenes):
    for _ in range(5):
        scenes = scene.step(scenes, act(8, rotation=(0.0, 0.0, 1.0)))
    half = 0.25  # five steps of 0.1 rad, halved
    np.testing.assert_allclose(scenes.quaternion[0], (0, 0, np.sin(half), np.cos(half)))
    turn = scene.rotation_matrices(scenes.quaternion)[0]
    np.testing.assert_allclose(turn[:, 0], (np.cos(0.5), np.sin(0.5), 0), atol=1e-12)


def test_closed_gripper_holds_a_block_within_reach_and_carries_it(scenes):
    scenes = grasped(scenes)
    assert (scenes.held == TARGET).all()
    after = scene.step(scenes, act(8, xyz=(0.0, 0.0, 1.0)))
    np.testing.assert_allclose(after.blocks[:, TARGET], after.position)


def test_nothing_is_held_beyond_the_reach(scenes):
    scenes = at_target(scenes, (0, 0, TABLETOP.reach + 0.001))
    for _ in range(2):
        scenes = scene.step(scenes, act(8, gripper=CLOSE))
    assert (scenes.held == NOTHING).all()


def test_block_drops_only_when_the_gripper_is_open(scenes):
    scenes = scene.step(grasped(scenes), act(8, xyz=(0.0, 0.0, 1.0)))
    half_open = scene.step(scenes, act(8, gripper=OPEN))
    assert (half_open.held == TARGET).all()
    released = scene.step(half_open, act(8, gripper=OPEN))
    assert (released.held == NOTHING).all()
    np.testing.assert_allclose(released.blocks[:, TARGET, 2], TABLETOP.block_size / 2)


def test_success_needs_plate_open_gripper_and_clearance(scenes):
    scenes.blocks[:, TARGET, :2] = scenes.plate
    assert scene.is_success(scenes).all()
    assert not scene.is_success(at_target(scenes)).any()
    scenes.position = scenes.position + (0, 0, 0.06)
    scenes.opening[:] = 0.5
    assert not scene.is_success(scenes).any()


def test_distractor_on_the_plate_is_no_success(scenes):
    scenes.blocks[:, DISTRACTOR, :2] = scenes.plate
    assert not scene.is_success(scenes).any()


def test_step_leaves_its_argument_as_it_was(scenes):
    before = scenes[np.arange(8)]
    scene.step(grasped(scenes[np.arange(8)]), act(8, gripper=OPEN))
    for name in ("position", "opening", "blocks", "held"):
        np.testing.assert_array_equal(getattr(scenes, name), getattr(before, name))
