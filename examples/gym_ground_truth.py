"""A ground truth of your own: a gymnasium environment, in which the policy is evaluated.

    .venv/bin/pip install gymnasium
    python launch.py --config=configs/grpo.py \
        --config.eval.ground_truth=examples.gym_ground_truth:GymGroundTruth

With --config.env.simulator=ground_truth --config.eval.episodes=0 the policy learns in it as well.
Actions and chunk must be those of the policy: 7 numbers and 8 actions here.
"""

import numpy as np
import torch

from evac_jax.bridge.environment import IDLE, EnvSpec, StepResult, whole_part
from evac_jax.errors import ConfigError
from evac_jax.sim.episodes import EpisodeRules, EpisodeStates
from evac_jax.sim.ground_truth import nothing_yet, step_result
from examples.reach import Reach
from policies.spec import ActionSpec

CHUNK, RULES = 8, ("max_episode_steps", "coefficient", "relative")
REFUSED = ("auto_reset", "ignore_terminations", "keyframe_data")


class GymGroundTruth:
    """A batch of environments; a start id is the seed of a reset."""

    def __init__(self, settings: dict):
        if asked := [name for name in REFUSED if settings.get(name)]:
            raise ConfigError(f"examples.gym_ground_truth cannot do {', '.join(asked)}")
        self._settings, count = settings, settings["num_envs"]
        self._envs = [Reach() for _ in range(count)]
        self._episodes = EpisodeStates(count, EpisodeRules(**{n: settings[n] for n in RULES}))
        self.spec = EnvSpec(
            num_envs=count,
            image_shape=(1, *Reach.observation_space.shape),  # one camera
            proprio_dim=2,
            action=ActionSpec(dim=7, chunk=CHUNK),
            instructions=("reach for the pad",),
            num_starts=1_000_000,
            max_episode_steps=settings["max_episode_steps"],
        )
        self._frames = np.zeros((count, *self.spec.image_shape), np.uint8)

    def parts(self, count: int) -> "list[GymGroundTruth]":
        """Cut into environments of equal size."""
        share = self._settings | {"num_envs": whole_part(len(self._envs), count)}
        return [GymGroundTruth(share) for _ in range(count)]

    def reset(self, starts: np.ndarray, seed: int, frames: torch.Tensor, clip) -> StepResult:
        """Start an episode everywhere; an idle environment shows one that does not count."""
        idle = torch.from_numpy(starts == IDLE)
        self._episodes.restart(torch.ones_like(idle), idle)
        for row, start in enumerate(starts):
            self._frames[row, 0], _ = self._envs[row].reset(seed=max(int(start), 0))
        return self._result(nothing_yet(len(starts), CHUNK), frames)

    def step(self, actions: np.ndarray, frames: torch.Tensor, clip) -> StepResult:
        """Play a chunk [B K 7]; nothing moves after a success."""
        success = np.zeros(actions.shape[:2], np.float32)
        for row in np.flatnonzero(self._episodes.running.numpy()):
            for k in range(CHUNK):
                played = self._envs[row].step(actions[row, k])
                self._frames[row, 0], success[row, k] = played[0], played[2]
                if success[row, k]:
                    break
        return self._result(self._episodes.advance(torch.from_numpy(success)), frames)

    def _result(self, outcome, frames: torch.Tensor) -> StepResult:
        frames.copy_(torch.from_numpy(self._frames))  # no films: clip_envs is 0
        hands = np.stack([env.hand for env in self._envs]).astype(np.float32)
        task = np.zeros(len(hands), np.int32)
        return step_result(task, hands, outcome, self._episodes.figures(), {})

    def park(self) -> None:
        """Do nothing: no accelerator is used."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
