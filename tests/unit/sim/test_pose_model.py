import torch

from evac_jax.sim.pose_model import PoseModel, PoseModelConfig


def test_pose_model_standardises_the_pose_when_asked_for_the_next_one():
    torch.manual_seed(0)
    model = PoseModel(PoseModelConfig(hidden=8, linear_skip=True))
    action, pose = torch.randn(2, 5, 7), torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.get_ee_pose(action, pose), model(action, pose))
        model.abs_action_mean.fill_(2.0)
        model.abs_action_std.fill_(4.0)
        expected = model(action, (pose - 2) / 4) * 4 + 2
        torch.testing.assert_close(model.get_ee_pose(action, pose), expected)
