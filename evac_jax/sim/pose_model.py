"""The pose model: a small network from action and last poses to the next pose."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from evac_jax.errors import DataError
from evac_jax.evac.config import JsonConfig

ACTION_DIM, POSE_DIM = 7, 8
# Standard deviations from the mean beyond which a pose is none of those that the network knows, and
# the least one that counts: some numbers hardly vary.
FAR, LEAST_STD = 10.0, 0.02
# Makes changes of pose about as large as the other inputs.
CHANGE_SCALE = 5.0
POSE_NAMES = ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper")
# What poses may be instead -> how to make them ours.
MISTAKEN = {
    "quaternions written w, x, y, z": lambda p: p[:, [0, 1, 2, 4, 5, 6, 3, 7]],
    "quaternions of the other sign, which mean the same but not to the network": lambda p: (
        p * np.repeat((1, -1, 1), (3, 4, 1))
    ),
}


@dataclass(frozen=True)
class PoseModelConfig(JsonConfig):
    """Sizes of the network.

    Attributes:
        hidden: width of both hidden layers; the public action predictor uses 64.
        linear_skip: add a linear map of the input to the output.
        velocity: read the last change of pose too, and predict the next one. An episode begins at
            rest, one from a keyframe too, though the arm may have moved there.
    """

    hidden: int = 64
    linear_skip: bool = False
    velocity: bool = False


class PoseModel(nn.Module):
    """Two-layer network on [action 7 | pose 8], with the statistics of the poses it was fitted to.

    A pose is [x y z (metres), quaternion x y z w, gripper].

    Differs from the reference: hidden width, a linear skip and the velocity are options. An arm
    with mass goes on for a while when its action ends, which a pose alone cannot tell.

    Source: RLinf/RLinf at c9f1d8471, the action predictor of its EVAC environment.
    """

    def __init__(self, config: PoseModelConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden
        inputs = ACTION_DIM + (2 if config.velocity else 1) * POSE_DIM
        self.network = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, POSE_DIM),
        )
        self.skip = nn.Linear(inputs, POSE_DIM, bias=False) if config.linear_skip else None
        self.register_buffer("abs_action_mean", torch.zeros(1, POSE_DIM))
        self.register_buffer("abs_action_std", torch.ones(1, POSE_DIM))

    def forward(self, action: Tensor, pose: Tensor, before: Tensor) -> Tensor:
        """[..., 8] network output for actions [..., 7] and poses [..., 8] as they are given.

        `before` is the pose one action earlier, equal to the pose at rest.
        """
        velocity = self.config.velocity
        x = (action, pose, CHANGE_SCALE * (pose - before)) if velocity else (action, pose)
        x = torch.cat(x, dim=-1)
        out = self.network(x)
        if self.skip is not None:
            out = out + self.skip(x)
        return pose + out if velocity else out

    def get_ee_pose(self, action: Tensor, pose: Tensor, before: Tensor) -> Tensor:
        """Next pose [..., 8]: poses are standardised on the way in, the output put back."""
        mean, std = self.abs_action_mean[0], self.abs_action_std[0]
        return self(action, (pose - mean) / std, (before - mean) / std) * std + mean

    def check_poses(self, poses: np.ndarray) -> None:
        """Refuse poses [N 8] if one lies far from all that the network was fitted to.

        Raises:
            DataError: names the numbers that are far, and what the poses may be instead.
        """
        mean, std = (x[0].cpu().numpy() for x in (self.abs_action_mean, self.abs_action_std))

        def far(values: np.ndarray) -> np.ndarray:
            return np.abs(values - mean) / np.maximum(std, LEAST_STD) > FAR

        if not (is_far := far(poses)).any():
            return
        names = [name for name, flag in zip(POSE_NAMES, is_far.any(0), strict=True) if flag]
        poses, count = poses[is_far.any(1)], len(poses)
        guesses = [what for what, ours in MISTAKEN.items() if not far(ours(poses)).any()]
        shown = "; ".join(
            f"{name} {poses[:, n].min():.3g} to {poses[:, n].max():.3g}, known {mean[n]:.3g} "
            f"+- {std[n]:.3g}"
            for n, name in enumerate(POSE_NAMES)
            if name in names
        )
        raise DataError(
            f"initial poses: the pose model was fitted to others than {len(poses)} of {count}: "
            f"{shown}. "
            + (f"Are they {guesses[0]}? " if guesses else "Other units, or another robot? ")
            + "Convert the poses, or train a pose model on such ones "
            "(tools.world_model.train_pose_model)"
        )
