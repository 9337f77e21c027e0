"""Rewards, success, ends and figures of episodes from the success classifier's scores.

Tensors of one batch of environments on one device; no images, no networks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evac_jax.errors import ConfigError


@dataclass(frozen=True)
class EpisodeRules:
    """How scores become rewards and ends.

    Attributes:
        max_episode_steps: actions after which an episode is truncated; checked at chunk ends.
        coefficient: scale of the reward, in both reward modes.
        relative: reward the change of the success score instead of the score itself, so
            an episode's return is at most `coefficient` and its first success earns all of it.
        threshold: classifier probability in (0, 1] from which a frame counts as success.
        success_frames: consecutive such frames that make a success, across chunk borders.
        ignore_terminations: record success but let only the time limit end an episode.
        reference_compat: the reference's rules: score = probability rounded (0.5 to 0), not
            latched, one frame suffices; any non-zero score terminates; the coefficient is
            dropped without relative rewards; truncation follows the oldest environment;
            `ignore_terminations` has no effect; finished episodes go on.
    """

    max_episode_steps: int = 256
    coefficient: float = 5.0
    relative: bool = True
    threshold: float = 0.5
    success_frames: int = 1
    ignore_terminations: bool = False
    reference_compat: bool = False

    def __post_init__(self):
        problems = []
        if self.max_episode_steps < 1:
            problems.append(f"max_episode_steps: expected at least 1, got {self.max_episode_steps}")
        if not 0 < self.threshold <= 1:
            problems.append(f"threshold: expected a probability in (0, 1], got {self.threshold}")
        if self.success_frames < 1:
            problems.append(f"success_frames: expected at least 1, got {self.success_frames}")
        if problems:
            raise ConfigError("\n".join(problems))


@dataclass(frozen=True)
class ChunkOutcome:
    """One chunk as the trainer sees it: rewards [B K]; terminated, truncated and success [B]."""

    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor


class EpisodeStates:
    """Running state of a batch of episodes, one row per environment.

    An episode ends at the end of the chunk in which it succeeds, or in which its own step count
    reaches the limit; termination wins when both happen. Success is latched: a classifier that
    flickers cannot take a success or its reward back. Once over, an episode keeps its flags and
    figures and earns nothing until it is restarted. Idle environments have no episode: all zero.

    Source: RLinf `EvacEnv.chunk_step` (revision c9f1d8471) under `reference_compat`.
    """

    def __init__(self, num_envs: int, rules: EpisodeRules, device="cpu"):
        self._rules = rules
        self.steps = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.returns = torch.zeros(num_envs, device=device)
        self.success = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self.terminated = torch.zeros_like(self.success)
        self.truncated = torch.zeros_like(self.success)
        self.idle = torch.zeros_like(self.success)
        self._score = torch.zeros_like(self.returns)  # score of the last frame, unscaled
        self._streak = torch.zeros_like(self.steps)  # success frames in a row up to now

    @property
    def running(self) -> Tensor:
        """Environments whose next action counts, bool [B]."""
        if self._rules.reference_compat:
            return ~self.idle
        return ~(self.terminated | self.truncated | self.idle)

    def restart(self, mask: Tensor, idle: Tensor | None = None) -> None:
        """Begin new episodes where `mask` [B] is True; of these, `idle` [B] ones have none."""
        # New tensors instead of writes in place: an outcome handed out before keeps its values.
        for name in ("steps", "returns", "success", "terminated", "truncated", "_score", "_streak"):
            setattr(self, name, getattr(self, name).masked_fill(mask, 0))
        if idle is not None:
            self.idle = torch.where(mask, idle, self.idle)

    def advance(self, probabilities: Tensor) -> ChunkOutcome:
        """Account for one chunk; probabilities of success per frame [B K] in [0, 1].

        Rows of episodes that are over or idle are not read, so they may hold anything.
        """
        if self._rules.reference_compat:
            return self._reference(probabilities)
        return self._corrected(probabilities)

    def _corrected(self, probabilities: Tensor) -> ChunkOutcome:
        rules, running = self._rules, self.running
        latched, frames = self.success, []
        for hit in (probabilities >= rules.threshold).unbind(1):
            self._streak = torch.where(running, torch.where(hit, self._streak + 1, 0), self._streak)
            latched = latched | (running & (self._streak >= rules.success_frames))
            frames.append(latched)
        score = torch.stack(frames, 1).float()  # [B K]
        rewards = self._rewards(score, rules.coefficient) * running[:, None]
        self.steps = self.steps + probabilities.shape[1] * running
        self.returns = self.returns + rewards.sum(1)
        self.success = latched
        if not rules.ignore_terminations:
            self.terminated = self.terminated | (running & latched)
        out_of_time = running & (self.steps >= rules.max_episode_steps)
        self.truncated = self.truncated | (out_of_time & ~self.terminated)
        return ChunkOutcome(rewards, self.terminated, self.truncated, self.success)

    def _reference(self, probabilities: Tensor) -> ChunkOutcome:
        rules, running = self._rules, self.running
        score = torch.round(probabilities) * running[:, None]
        coef = rules.coefficient if rules.relative else 1.0
        rewards = self._rewards(score, coef)
        self.steps = self.steps + probabilities.shape[1] * running
        self.returns = self.returns + rewards.sum(1)
        self.terminated = (score != 0).any(1)
        self.success = self.success | self.terminated
        self.truncated = running & (self.steps.amax() >= rules.max_episode_steps)
        return ChunkOutcome(rewards, self.terminated, self.truncated, self.success)

    def _rewards(self, score: Tensor, coef: float) -> Tensor:
        scaled, before = coef * score, coef * self._score[:, None]
        self._score = score[:, -1]
        if not self._rules.relative:
            return scaled
        return scaled - torch.cat((before, scaled[:, :-1]), 1)

    def figures(self) -> dict[str, Tensor]:
        """Return "return", "length" (actions) and "success_once" of the episodes, float32 [B]."""
        return {
            "return": self.returns,
            "length": self.steps.float(),
            "success_once": self.success.float(),
        }
