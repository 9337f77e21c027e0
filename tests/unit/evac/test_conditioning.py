import math

import pytest
import torch

from evac_jax.evac import conditioning
from evac_jax.evac.trajectory_maps import quaternion_to_matrix
from tests.parity.evac_upstream import resize_memory, sequence_deltas, upstream_delta_slice
from tests.unit.evac.tiny import TINY, poses


def quaternion_about(axis: int, angle: float) -> torch.Tensor:
    q = torch.zeros(4, dtype=torch.float64)
    q[axis], q[3] = math.sin(angle / 2), math.cos(angle / 2)
    return q


def test_central_ray_points_forward_and_rays_have_unit_length():
    intrinsic = torch.tensor([[3.0, 0, 2.5], [0, 3, 1.5], [0, 0, 1]])
    direction, origin = conditioning.ray_maps(intrinsic, torch.eye(4), (3, 5))
    assert direction.shape == origin.shape == (3, 3, 5)
    torch.testing.assert_close(direction[:, 1, 2], torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(direction.norm(dim=0), torch.ones(3, 5))
    torch.testing.assert_close(direction[:, 1, 3], torch.tensor([1.0, 0, 3]) / math.sqrt(10))


def test_rays_turn_and_move_with_the_camera():
    c2w = torch.eye(4)
    c2w[:3, :3] = quaternion_to_matrix(quaternion_about(1, math.pi / 2)).float()
    c2w[:3, 3] = torch.tensor([1.0, 2, 3])
    intrinsic = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    direction, origin = conditioning.ray_maps(intrinsic, c2w, (1, 1))
    torch.testing.assert_close(direction[:, 0, 0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(origin[:, 0, 0], torch.tensor([1.0, 2, 3]))


def test_ray_channels_scale_intrinsics_to_latent_cells():
    intrinsic = torch.tensor([[24.0, 0, 16], [0, 16, 8], [0, 0, 1]])[None, None]
    c2w = torch.eye(4).expand(1, 1, 2, 4, 4)
    channels = conditioning.ray_channels(intrinsic, c2w, (16, 32), (2, 4))
    assert channels.shape == (1, 1, 6, 2, 2, 4)
    expected = torch.tensor([(0.5 - 2) / 3, (0.5 - 1) / 2, 1.0])
    torch.testing.assert_close(channels[0, 0, :3, 0, 0, 0], expected / expected.norm())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_euler_angles_name_the_axis_turned_about(axis):
    angles = conditioning.euler_xyz(3 * quaternion_about(axis, 0.7))
    expected = torch.zeros(3, dtype=torch.float64)
    expected[axis] = 0.7
    torch.testing.assert_close(angles, expected)


def test_euler_third_angle_is_zero_when_gimbal_is_locked():
    x, y, z = conditioning.euler_xyz(quaternion_about(1, math.pi / 2)).tolist()
    assert (x, y, z) == pytest.approx((0, math.pi / 2, 0), abs=1e-6)


def test_delta_wraps_when_an_angle_passes_pi():
    window = torch.zeros(1, 2, 16)
    window[:, :, 14] = 1.0  # right arm at rest
    for row, angle in enumerate((3.0, -3.0)):
        window[0, row, 3:7] = quaternion_about(2, angle).float()
    delta = conditioning.delta_actions(window, TINY, normalize=False)[0, 0]
    assert delta[5].item() == pytest.approx(2 * math.pi - 6.0, abs=1e-5)


def test_deltas_are_standardised_and_grippers_only_scaled():
    window = torch.zeros(1, 2, 16)
    window[..., 6] = window[..., 14] = 1.0
    window[0, 1, 0], window[0, 1, 7], window[0, 1, 15] = 0.3, 6.0, 3.0
    config = TINY.replace(delta_mean=(0.01,) * 12, delta_std_factor=3.0, gripper_scale=12.0)
    delta = conditioning.delta_actions(window, config)[0, 0]
    assert delta.shape == (14,)
    assert delta[0].item() == pytest.approx((0.3 - 0.03) / 0.3)
    assert delta[1].item() == pytest.approx(-0.03 / 0.3)
    assert delta[[6, 13]].tolist() == pytest.approx([0.5, 0.25])


def test_window_gives_one_delta_per_frame_of_the_chunk():
    window = poses(2, TINY.frames)
    deltas = conditioning.window_deltas(window, TINY)
    assert deltas.shape == (2, TINY.chunk, 14)
    torch.testing.assert_close(deltas, sequence_deltas(window, TINY)[:, -TINY.chunk :])


def test_upstream_slices_are_late_and_run_out():
    deltas = torch.arange(7.0)[None, :, None]  # chunk 3, n_previous 3
    rows = [upstream_delta_slice(deltas, k, TINY)[0, :, 0].tolist() for k in range(3)]
    assert rows == [[0, 1, 2], [5, 6], []]


def test_resized_memory_keeps_constants_and_averages_when_shrinking():
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(resize_memory(flat, (4, 4)), torch.full((1, 3, 4, 4), -0.5))
    checker = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().expand(1, 3, 16, 16)
    assert resize_memory(checker, (2, 2)).abs().max() < 0.05


def test_concat_channels_are_in_checkpoint_order():
    history = torch.arange(3.0).reshape(1, 1, 1, 3, 1, 1).expand(2, 1, 4, 3, 2, 2)
    condition = conditioning.image_condition(history, 2)
    assert condition[0, 0, 0, :, 0, 0].tolist() == [0, 1, 2, 2, 2]
    maps, rays = torch.full((2, 1, 4, 2, 2, 2), 7.0), torch.full((1, 1, 6, 5, 2, 2), 9.0)
    result = conditioning.concat_channels(condition, maps, rays, torch.tensor([1.0, 0.0]))
    assert result.shape == (2, 1, 15, 5, 2, 2)
    assert result[0, 0, 0, :, 0, 0].tolist() == [0, 1, 2, 2, 2]
    assert result[1, 0, 0, :, 0, 0].tolist() == [0, 1, 2, 0, 0]
    assert result[1, 0, 4, :, 0, 0].tolist() == [1, 1, 1, 0, 0]
    assert result[0, 0, 5, :, 0, 0].tolist() == [0, 0, 0, 7, 7]
    assert (result[:, :, 9:] == 9).all()
