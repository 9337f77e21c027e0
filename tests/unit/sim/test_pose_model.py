import numpy as np
import pytest
import torch

from evac_jax.errors import DataError
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig


def test_pose_model_standardises_the_pose_when_asked_for_the_next_one():
    torch.manual_seed(0)
    model = PoseModel(PoseModelConfig(hidden=8, linear_skip=True))
    action, pose, before = torch.randn(2, 5, 7), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    poses = pose, before
    with torch.no_grad():
        torch.testing.assert_close(model.get_ee_pose(action, *poses), model(action, *poses))
        model.abs_action_mean.fill_(2.0)
        model.abs_action_std.fill_(4.0)
        expected = model(action, *((pose - 2) / 4 for pose in poses)) * 4 + 2
        torch.testing.assert_close(model.get_ee_pose(action, *poses), expected)


def test_only_a_pose_model_with_velocity_reads_the_pose_before():
    torch.manual_seed(0)
    action, pose = torch.randn(5, 7), torch.randn(5, 8)
    for velocity in (False, True):
        model = PoseModel(PoseModelConfig(hidden=8, velocity=velocity))
        with torch.no_grad():
            at_rest, moving = model(action, pose, pose), model(action, pose, pose - 1)
        assert torch.equal(at_rest, moving) is not velocity


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p[:, [0, 1, 2, 6, 3, 4, 5, 7]], "Are they quaternions written w, x, y, z"),
        (lambda p: p * np.repeat((1, -1, 1), (3, 4, 1)), "quaternions of the other sign"),
        (lambda p: p + np.array([0] * 7 + [60]), "gripper 60.*Other units"),
    ],
)
def test_poses_unlike_those_of_the_fit_are_refused_with_what_they_may_be(change, told):
    model = PoseModel(PoseModelConfig(hidden=4))
    known = np.array([0.4, 0, 0.2, 0.99, 0.1, 0, 0.1, 0.5], np.float32)
    model.abs_action_mean.copy_(torch.from_numpy(known)[None])
    model.abs_action_std.fill_(0.05)
    poses = known + 0.1 * np.random.default_rng(0).uniform(-1, 1, (5, 8)).astype(np.float32)
    model.check_poses(poses)
    with pytest.raises(DataError, match=f"others than 5 of 5: .*{told}"):
        model.check_poses(change(poses))
    with pytest.raises(DataError, match=f"others than 1 of 5: .*{told}"):
        model.check_poses(np.concatenate((poses[:4], change(poses[4:]))))
