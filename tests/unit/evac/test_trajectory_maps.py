import numpy as np
import pytest
import torch

from evac_jax.evac import raster
from evac_jax.evac.config import MapConfig
from evac_jax.evac.trajectory_maps import (
    CANVAS,
    GREENS,
    RIGHT_AXES,
    color_table,
    draw_maps,
    gripper_rows,
    normalize_maps,
    pose_to_matrix,
    project,
    tool_yaw,
)

UPSTREAM = MapConfig(
    renderer="upstream", radius=3, thickness=2, tool_offset=0.0, gripper_range=(0.0, 1.0)
)
SIZE = (48, 64)
INTRINSIC = torch.tensor([[40.0, 0, 32], [0, 40, 24], [0, 0, 1]])[None, None]
W2C = torch.eye(4)[None, None, None]


def pose(x=0.0, y=0.0, z=1.0, gripper=0.5):
    return torch.tensor([[[x, y, z, 0, 0, 0, 1.0, gripper] * 2]])


def test_circle_rows_match_opencv_geometry_when_radius_is_two():
    mask = raster.covers(raster.circle(torch.tensor([[3, 3]]), 2, 7), 7)[0].int()
    rows = ["".join(map(str, row)) for row in mask.tolist()]
    assert rows == ["0000000", "0001000", "0011100", "0111110", "0011100", "0001000", "0000000"]


def test_line_is_bresenham_when_thickness_is_one():
    mask = raster.covers(raster.line(torch.tensor([[0, 0]]), torch.tensor([[5, 2]]), 1, 4, 6), 6)
    assert mask[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 2], [1, 3], [2, 4], [2, 5]]


def test_nothing_is_drawn_when_a_line_misses_the_canvas():
    far = torch.tensor([[raster.LIMIT, raster.LIMIT]])
    for thickness in (1, 8):
        shape = raster.line(far, far - 5, thickness, 32, 32)
        assert not raster.covers(shape, 32).any()


def test_line_refuses_a_thickness_below_one():
    with pytest.raises(ValueError, match="thickness"):
        raster.line(torch.zeros(1, 2).long(), torch.ones(1, 2).long(), 0, 4, 4)


@pytest.mark.parametrize("thickness", [1, 2, 3, 8])
@pytest.mark.parametrize("reach", [12, 90])
def test_shapes_equal_opencv_when_it_is_installed(thickness, reach):
    cv2 = pytest.importorskip("cv2")
    height, width = SIZE
    rng = np.random.default_rng(thickness * 100 + reach)
    start = np.stack((rng.integers(-8, width + 8, 150), rng.integers(-8, height + 8, 150)), 1)
    end = start + rng.integers(-reach, reach + 1, (150, 2))
    end[:5] = start[:5]
    shape = raster.line(torch.from_numpy(start), torch.from_numpy(end), thickness, height, width)
    lines = raster.covers(shape, width).numpy()
    discs = raster.covers(
        raster.circle(torch.from_numpy(start), 5 * thickness, height), width
    ).numpy()
    for p, q, line, disc in zip(start.tolist(), end.tolist(), lines, discs, strict=True):
        canvas = np.zeros(SIZE, np.uint8)
        cv2.line(canvas, p, q, 1, thickness)
        np.testing.assert_array_equal(line, canvas.astype(bool))
        canvas = np.zeros(SIZE, np.uint8)
        cv2.circle(canvas, p, 5 * thickness, 1, -1)
        np.testing.assert_array_equal(disc, canvas.astype(bool))


def test_color_table_holds_the_anchors_at_its_ends():
    table = color_table(GREENS)
    assert table.shape == (256, 3)
    assert table[0].tolist() == [247, 252, 245]
    assert table[255].tolist() == [0, 68, 27]


def test_gripper_row_is_clamped_when_reading_leaves_the_range():
    rows = gripper_rows(torch.tensor([-3.0, 0.0, 0.5, 1.0, 7.0, float("nan")]), UPSTREAM)
    assert rows.tolist() == [0, 0, 128, 255, 255, 0]


def test_pose_matrix_ignores_the_length_of_the_quaternion():
    turned = torch.tensor([1.0, 2, 3, 0, 0, 3, 3])
    expected = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    torch.testing.assert_close(pose_to_matrix(turned), expected)


def test_projection_is_pinhole_when_renderer_is_upstream():
    uv = project(pose(0.1, -0.2, 2.0)[..., :8], INTRINSIC, W2C, UPSTREAM, SIZE)
    assert uv.shape == (1, 1, 1, 4, 2)
    expected = torch.tensor([32 + 40 * 0.05, 24 - 40 * 0.1], dtype=torch.float64)
    torch.testing.assert_close(uv[0, 0, 0, 0], expected, atol=1e-6, rtol=0)


def test_projection_looks_backward_and_mirrors_when_renderer_is_fork():
    config = UPSTREAM.replace(renderer="fork")
    uv = project(pose(0.1, -0.2, -2.0)[..., :8], INTRINSIC, W2C, config, SIZE)
    expected = torch.tensor([63 - 34.0, 47 - 20.0], dtype=torch.float64)
    torch.testing.assert_close(uv[0, 0, 0, 0], expected, atol=1e-6, rtol=0)


def test_second_view_ignores_the_pose_when_fork_draws_a_wrist_camera():
    config = UPSTREAM.replace(renderer="fork")
    intrinsic, w2c = INTRINSIC.expand(1, 2, 3, 3), W2C.expand(1, 2, 1, 4, 4)
    uv = [project(pose(x, 0, -1)[..., :8], intrinsic, w2c, config, SIZE) for x in (0.0, 0.3)]
    torch.testing.assert_close(uv[0][:, 1], uv[1][:, 1])
    assert not torch.allclose(uv[0][:, 0], uv[1][:, 0])


def test_map_is_blank_when_the_base_point_is_outside():
    maps = draw_maps(pose(x=5.0), INTRINSIC, W2C, UPSTREAM, SIZE)
    assert maps.shape == (1, 1, 1, 3, *SIZE)
    assert maps.dtype == torch.uint8
    assert (maps == CANVAS).all()
    torch.testing.assert_close(normalize_maps(maps)[0, 0, 0, 0, 0, 0], torch.tensor(50 / 127.5 - 1))


def test_map_shows_disc_below_axes_when_the_base_point_is_inside():
    config = UPSTREAM.replace(radius=9, arms=1)
    picture = draw_maps(pose(gripper=1.0), INTRINSIC, W2C, config, SIZE)[0, 0, 0]
    assert picture[:, 24 - 7, 32].tolist() == color_table(GREENS)[255].tolist()
    assert picture[:, 24, 32 + 3].tolist() == [0, 0, 255]  # x axis
    assert picture[:, 24 + 3, 32].tolist() == [255, 255, 0]  # y axis


def test_right_arm_hides_left_when_renderer_is_fork():
    config = UPSTREAM.replace(renderer="fork")
    picture = draw_maps(pose(z=-1.0), INTRINSIC, W2C, config, SIZE)[0, 0, 0]
    colors = {tuple(c) for c in picture.flatten(1).T.tolist()}
    assert set(RIGHT_AXES) - colors <= {RIGHT_AXES[2]}  # z points at the camera: a dot
    assert (0, 0, 255) not in colors


def test_batch_draws_the_same_as_one_by_one():
    windows = torch.cat([pose(x, 0.1, 1.0 + x, x) for x in (-0.2, 0.1, 0.3)])
    together = draw_maps(windows, INTRINSIC, W2C, UPSTREAM, SIZE)
    apart = [draw_maps(w[None], INTRINSIC, W2C, UPSTREAM, SIZE) for w in windows]
    assert torch.equal(together, torch.cat(apart))


def test_tool_yaw_turns_arms_in_opposite_senses():
    turned = tool_yaw(pose(), 0.5)[0, 0]
    expected = torch.tensor([0.0, 0, np.sin(-0.25), np.cos(0.25)], dtype=torch.float32)
    torch.testing.assert_close(turned[3:7], expected)
    torch.testing.assert_close(turned[11:15], expected * torch.tensor([1.0, 1, -1, 1]))
