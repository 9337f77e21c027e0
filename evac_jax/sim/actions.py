"""From a policy's delta actions to the window of arm poses that the world model imagines along.

Everything is batched on the world model's device; there is no loop over environments.
"""

from collections.abc import Callable

import torch
from torch import Tensor

POSE_DIM = 8
GRIPPER_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    # OpenVLA(-OFT) checkpoints say 1 = open, 0 = closed; LIBERO wants -1 = open, +1 = closed.
    "libero": lambda gripper: -torch.sign(2 * gripper - 1),
    "binary": lambda gripper: (gripper > 0.5).to(gripper.dtype),
    "none": lambda gripper: gripper,
}


def apply_gripper_rule(actions: Tensor, rule: str) -> Tensor:
    """Return actions [.. A] with the last entry mapped to what the environment understands.

    Args:
        actions: un-normalised policy actions, gripper last.
        rule: "libero": g -> -sign(2 g - 1), so 0.5 becomes 0; "binary": 1 above 0.5, else 0;
            "none": unchanged.

    Source: RLinf's env worker applies the first one to openvla and openvla_oft (revision
    c9f1d8471).
    """
    return torch.cat((actions[..., :-1], GRIPPER_RULES[rule](actions[..., -1:])), -1)


def integrate_poses(
    advance: Callable[[Tensor, Tensor, Tensor], Tensor], actions: Tensor, last: Tensor
) -> Tensor:
    """Return the pose after every action, [B K 8].

    Args:
        advance: (action [B A], pose [B 8], the pose one action earlier [B 8]) -> next pose [B 8].
        actions: [B K A].
        last: the last two poses before the first action, [B 2 8]; they are equal at rest.
    """
    poses = list(last.unbind(1))
    for action in actions.unbind(1):
        poses.append(advance(action, poses[-1], poses[-2]))
    return torch.stack(poses[2:], 1)


def both_arms(poses: Tensor) -> Tensor:
    """Return single-arm poses [.. 8] as the dual-arm vectors [.. 16] that EVAC was trained on."""
    return torch.cat((poses, poses), -1)


class PoseWindow:
    """The last `n_previous` poses and the poses of the current chunk, one row per environment.

    After `push` the window is what the world model reads: row n_previous - 1 is the pose before
    the first action and the last `chunk` rows are the poses after each action.

    Args:
        num_envs: environments, B.
        n_previous: history poses, at least 1.
        chunk: actions per decision, K.
        shifted: reproduce the reference's buffer, which writes the chunk's poses one row too
            early. Then the last row stays the reset pose for ever, a chunk starts from the FIRST
            pose of the previous chunk, and the state that is reported never changes. Existing
            results of the reference were obtained that way; leave it off otherwise.

    Source: RLinf `EvacEnv.policy_output_to_abs_action` (revision c9f1d8471); the difference is the
    shift above.
    """

    def __init__(
        self, num_envs: int, n_previous: int, chunk: int, device="cpu", *, shifted: bool = False
    ):
        self.poses = torch.zeros(num_envs, n_previous + chunk, POSE_DIM, device=device)
        self._chunk, self._shifted = chunk, shifted

    @property
    def current(self) -> Tensor:
        """Pose of each environment as observed, [B 8]."""
        return self.poses[:, -1]

    @property
    def before_next(self) -> Tensor:
        """The pose that the next action starts from, after the one before it: [B 2 8]."""
        pose = self.poses.shape[1] - 1 - self._chunk * self._shifted
        return self.poses[:, [max(pose - 1, 0), pose]]

    def reset(self, poses: Tensor, mask: Tensor) -> None:
        """Fill the windows of the environments in `mask` [B] with their start poses [B 8]."""
        self.poses = torch.where(mask[:, None, None], poses[:, None], self.poses)

    def push(self, poses: Tensor, mask: Tensor) -> None:
        """Append a chunk of poses [B K 8] to the windows of the environments in `mask` [B]."""
        if self._shifted:
            moved = torch.cat((self.poses[:, : -self._chunk - 1], poses, self.poses[:, -1:]), 1)
        else:
            moved = torch.cat((self.poses[:, self._chunk :], poses), 1)
        self.poses = torch.where(mask[:, None, None], moved, self.poses)
