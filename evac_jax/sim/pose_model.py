"""The pose model: a small network from action and pose to the next pose."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evac_jax.evac.config import JsonConfig

ACTION_DIM, POSE_DIM = 7, 8


@dataclass(frozen=True)
class PoseModelConfig(JsonConfig):
    """Sizes of the network.

    Attributes:
        hidden: width of both hidden layers; the public action predictor uses 64.
        linear_skip: add a linear map of the input to the output.
    """

    hidden: int = 64
    linear_skip: bool = False


class PoseModel(nn.Module):
    """Two-layer network on [action 7 | pose 8], with the statistics of the poses it was fitted to.

    A pose is [x y z (metres), quaternion x y z w, gripper].

    Differs from the reference: hidden width and a linear skip are options.

    Source: RLinf/RLinf at c9f1d8471, the action predictor of its EVAC environment.
    """

    def __init__(self, config: PoseModelConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.network = nn.Sequential(
            nn.Linear(ACTION_DIM + POSE_DIM, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, POSE_DIM),
        )
        self.skip = (
            nn.Linear(ACTION_DIM + POSE_DIM, POSE_DIM, bias=False) if config.linear_skip else None
        )
        self.register_buffer("abs_action_mean", torch.zeros(1, POSE_DIM))
        self.register_buffer("abs_action_std", torch.ones(1, POSE_DIM))

    def forward(self, action: Tensor, pose: Tensor) -> Tensor:
        """[..., 8] network output for actions [..., 7] and poses [..., 8] as they are given."""
        x = torch.cat((action, pose), dim=-1)
        out = self.network(x)
        return out if self.skip is None else out + self.skip(x)

    def get_ee_pose(self, action: Tensor, pose: Tensor) -> Tensor:
        """Next pose [..., 8]: the pose is standardised on the way in, the output put back."""
        mean, std = self.abs_action_mean[0], self.abs_action_std[0]
        return self(action, (pose - mean) / std) * std + mean
