import pytest
import torch

from evac_jax.sim.actions import PoseWindow, apply_gripper_rule, both_arms, integrate_poses


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("libero", [1.0, 1.0, 0.0, -1.0]),
        ("binary", [0.0, 0.0, 0.0, 1.0]),
        ("none", [0.0, 0.25, 0.5, 1.0]),
    ],
)
def test_gripper_is_mapped_by_rule(rule, expected):
    actions = torch.zeros(1, 4, 7)
    actions[0, :, 6] = torch.tensor([0.0, 0.25, 0.5, 1.0])
    actions[..., 0] = 0.5
    mapped = apply_gripper_rule(actions, rule)
    assert mapped[0, :, 6].tolist() == expected
    assert (mapped[..., :6] == actions[..., :6]).all()


def add(action, pose, before):
    return pose + action[:, :1]


def test_poses_accumulate_over_a_chunk():
    actions = torch.arange(1.0, 4.0).reshape(1, 3, 1).expand(2, 3, 7)
    pose = torch.tensor([[0.0] * 8, [10.0] * 8])
    poses = integrate_poses(add, actions, pose[:, None].expand(2, 2, 8))
    assert poses.shape == (2, 3, 8)
    assert poses[:, :, 0].tolist() == [[1.0, 3.0, 6.0], [11.0, 13.0, 16.0]]
    assert both_arms(poses).shape == (2, 3, 16)


def test_next_pose_is_asked_for_with_the_two_before_it():
    asked = []

    def advance(action, pose, before):
        asked.append((float(before[0, 0]), float(pose[0, 0])))
        return pose + (pose - before) + action[:, :1]

    last = torch.tensor([[[1.0] * 8, [2.0] * 8]])
    poses = integrate_poses(advance, torch.ones(1, 3, 7), last)
    assert asked == [(1, 2), (2, 4), (4, 7)]
    assert poses[0, :, 0].tolist() == [4, 7, 11]


def test_window_goes_on_from_its_last_two_poses():
    everyone = torch.ones(1, dtype=torch.bool)
    window = PoseWindow(1, 2, 3)
    window.reset(torch.full((1, 8), 5.0), everyone)
    assert window.before_next[0, :, 0].tolist() == [5, 5]  # at rest
    window.push(torch.arange(1.0, 4.0)[None, :, None].expand(1, 3, 8), everyone)
    assert window.before_next[0, :, 0].tolist() == [2, 3]


def windows(shifted):
    """First entries of the window at reset and after each of two chunks of two +1 actions."""
    window = PoseWindow(1, 3, 2, shifted=shifted)
    everyone = torch.ones(1, dtype=torch.bool)
    window.reset(torch.zeros(1, 8), everyone)
    seen = [window.poses[0, :, 0].tolist()]
    for _ in range(2):
        window.push(integrate_poses(add, torch.ones(1, 2, 7), window.before_next), everyone)
        seen.append(window.poses[0, :, 0].tolist())
    return seen, float(window.current[0, 0])


def test_window_slides_when_corrected():
    seen, current = windows(shifted=False)
    assert seen == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert current == 4


def test_window_is_one_place_early_when_shifted():
    # The second chunk starts from the first pose of the first chunk; the last row never moves.
    seen, current = windows(shifted=True)
    assert seen == [[0, 0, 0, 0, 0], [0, 0, 1, 2, 0], [0, 0, 2, 3, 0]]
    assert current == 0


def test_other_environments_keep_their_window_when_masked():
    window = PoseWindow(2, 2, 1)
    mask = torch.tensor([True, False])
    window.push(torch.ones(2, 1, 8), mask)
    assert window.poses[:, -1, 0].tolist() == [1.0, 0.0]
    window.reset(torch.full((2, 8), 5.0), ~mask)
    assert window.poses[:, 0, 0].tolist() == [0.0, 5.0]
