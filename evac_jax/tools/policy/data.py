"""Recorded episodes as training data of a policy: frames at each decision and the next actions.

Where a recording tells what its player intended, that is learned instead of what noise made of it.
Source: DART (Laskey et al. 2017): noise takes a demonstrator to states from which it returns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from evac_jax.errors import DataError
from evac_jax.files.recordings import ACTION_DIM, Episodes

GOAL_DIM = 6  # of the thing to take and of its place; the hand follows
# The policy's output for a recorded gripper entry (-1 opens .. +1 closes): the inverses of the
# rules of env.gripper. "binary" has no inverse: recordings do not contain its 0 and 1.
GRIPPER_RULES = {"libero": lambda gripper: (1 - gripper) / 2, "none": lambda gripper: gripper}


@dataclass(frozen=True)
class Batch:
    """B decisions with frames of V cameras, and the K actions after each.

    Attributes:
        frames: uint8 [B V H W 3].
        task: index into the recording's instructions, [B].
        actions: in the policy's form, normalised and clipped to [-1, 1], float32 [B K A].
        valid: which actions exist, bool [B K]; an episode may end within a chunk.
        goals: where the thing to take, its place and the hand are, float32 [B 9] in 10 cm from
            their means in the episodes; NaN where that is not known.
    """

    frames: np.ndarray
    task: np.ndarray
    actions: np.ndarray
    valid: np.ndarray
    goals: np.ndarray


def policy_actions(actions: np.ndarray, gripper: str) -> np.ndarray:
    """Return executed actions [.. A] in the policy's form, gripper last; float64."""
    actions = np.asarray(actions, np.float64)
    return np.concatenate((actions[..., :-1], GRIPPER_RULES[gripper](actions[..., -1:])), axis=-1)


def action_statistics(data: Episodes, gripper: str) -> dict[str, Any]:
    """Return an entry of `norm_stats` from all lessons of `data`; the gripper is not normalised."""
    steps = np.concatenate([f + np.arange(n) for f, n in zip(data.first, data.length, strict=True)])
    actions = policy_actions(data.lessons[steps], gripper)
    low, high = np.quantile(actions, (0.01, 0.99), axis=0)
    facts = {"q01": low, "q99": high, "min": actions.min(0), "max": actions.max(0)}
    facts |= {"mean": actions.mean(0), "std": actions.std(0)}
    return {
        "action": {name: values.tolist() for name, values in facts.items()}
        | {"mask": [True] * (ACTION_DIM - 1) + [False]},
        "num_transitions": len(actions),
        "num_trajectories": data.num_episodes,
    }


class Chunks:
    """The steps of some episodes at which a policy decides: 0, K, 2 K .., or all of them.

    Args:
        data: the episodes.
        chunk: actions per decision, K.
        statistics: the result of `action_statistics` for the training episodes.
        gripper: a key of `GRIPPER_RULES`.
        every_step: all steps. A new policy learns more from a recording so.

    Raises:
        DataError: there is no episode with an action.
    """

    def __init__(
        self,
        data: Episodes,
        chunk: int,
        statistics: dict[str, Any],
        gripper: str,
        *,
        every_step: bool = False,
    ):
        self._data, self._chunk, self._gripper = data, chunk, gripper
        self._lessons = data.lessons
        self._statistics = {name: np.array(x) for name, x in statistics["action"].items()}
        stride = 1 if every_step else chunk
        counts = -(-data.length // stride)
        self._episode = np.repeat(np.arange(data.num_episodes), counts)
        if not len(self._episode):
            raise DataError("the recording has no episode with an action; record some")
        self._step = stride * np.concatenate([np.arange(count) for count in counts])
        goals = self._places(data.rows(self._episode, self._step))
        known = np.isfinite(goals)
        self._middle = np.where(known, goals, 0).sum(0) / np.maximum(known.sum(0), 1)
        self.knows_goals = bool(known[:, :GOAL_DIM].any())

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Return the thing to take, its place and the hand in frames [B], metres [B 9]."""
        things = self._data.objects[rows, :2].reshape(len(rows), GOAL_DIM)
        return np.concatenate((things, self._data.poses[rows, :3]), axis=1)

    def __len__(self) -> int:
        """Total number of decisions."""
        return len(self._episode)

    def read(self, which: np.ndarray) -> Batch:
        """Return the decisions with the numbers [B]."""
        data, stats = self._data, self._statistics
        episode, step = self._episode[which], self._step[which]
        steps = step[:, None] + np.arange(self._chunk)
        # For an action that does not exist, the (zero) row of the episode's last frame is read.
        rows = data.rows(episode[:, None], np.minimum(steps, data.length[episode][:, None]))
        said = policy_actions(self._lessons[rows], self._gripper)
        # The inverse of `action_tokens.action_table`, also for a dimension that never changes.
        scaled = 2 * (said - stats["q01"]) / (stats["q99"] - stats["q01"] + 1e-8) - 1
        goals = 10 * (self._places(data.rows(episode, step)) - self._middle)
        return Batch(
            frames=np.asarray(data.frames[data.rows(episode, step)]),
            task=data.task[episode],
            actions=np.where(stats["mask"], scaled, said).clip(-1, 1).astype(np.float32),
            valid=steps < data.length[episode][:, None],
            goals=goals.astype(np.float32),
        )
