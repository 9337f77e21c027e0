import numpy as np
import pytest

from evac_jax.miniature import render, scene

BLOCK_RGB = {0: (208, 44, 40), 1: (40, 84, 208)}


def test_camera_axes_are_orthonormal_and_look_at_the_table():
    intrinsic, c2w = render.camera(64)
    np.testing.assert_allclose(c2w[:3, :3].T @ c2w[:3, :3], np.eye(3), atol=1e-6)
    np.testing.assert_allclose(render.project(np.array(render.LOOK_AT), 64), (32, 32), atol=1e-4)
    assert intrinsic[0, 2] == intrinsic[1, 2] == 32
    assert c2w[2, 1] < 0  # the image's y axis points down


@pytest.mark.parametrize("size", [64, 96])
def test_block_is_seen_where_its_centre_projects_to(size):
    scenes = scene.sample_scenes(np.arange(12))
    scenes.position = np.tile((0.15, 0.12, 0.16), (12, 1))  # out of the way
    pictures = render.render(scenes, size)
    top = scenes.blocks + (0, 0, 0.0275)
    cells = np.floor(render.project(top, size)).astype(int)
    for n in range(12):
        column, row = cells[n, 0]
        np.testing.assert_allclose(pictures[n, row, column], BLOCK_RGB[scenes.task[n]], atol=2)


def test_gripper_tip_coincides_with_the_projected_pose_within_a_pixel():
    scenes = scene.sample_scenes(np.arange(32))
    scenes.blocks[..., :2] = 0.5  # out of sight
    scenes.opening[:] = 0  # both fingers meet at the tip
    pictures = render.render(scenes, 64).astype(int)
    green = (pictures[..., 1] > pictures[..., 0] + 25) & (pictures[..., 1] > pictures[..., 2] + 10)
    tips = render.project(scenes.position, 64)
    for mask, (column, row) in zip(green, tips, strict=True):
        rows, columns = np.nonzero(mask)
        assert abs(columns.mean() + 0.5 - column) < 1
        assert abs(rows.max() + 0.5 - row) < 1.5  # fingers are 1.8 cm thick towards the camera


def test_opening_and_height_are_visible():
    scenes = scene.sample_scenes([3, 3, 3])
    scenes.opening[:] = (1, 0, 1)
    scenes.position[2, 2] += 0.02
    first, closed, higher = render.render(scenes, 64)
    assert (first != closed).any(-1).sum() > 8
    assert (first != higher).any(-1).sum() > 8


def test_picture_does_not_depend_on_the_batch():
    scenes = scene.sample_scenes(np.arange(40))
    pictures = render.render(scenes, 64)
    np.testing.assert_array_equal(pictures[37], render.render(scenes[37:38], 64)[0])


def test_objects_outside_the_picture_are_cut_off_when_drawn():
    scenes = scene.sample_scenes([0])
    scenes.position[:] = (0.4, 0.3, 0.15)
    assert render.render(scenes, 64).shape == (1, 64, 64, 3)
