"""LIBERO in MuJoCo as an environment: the real benchmark as ground truth.

Same interface, rewards and ends as the world model's environment. Torch appears because frames are
handed over in torch tensors; LIBERO itself runs in processes of its own (`libero_pool`).
"""

import dataclasses
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evac_jax.bridge.environment import whole_part
from evac_jax.bridge.types import IDLE, EnvSpec, StepResult
from evac_jax.config.libero import LiberoConfig
from evac_jax.sim.actions import POSE_DIM, apply_gripper_rule
from evac_jax.sim.episodes import ChunkOutcome, EpisodeRules, EpisodeStates
from evac_jax.sim.ground_truth import (
    check_actions,
    check_fields,
    check_settings,
    check_starts,
    hand_over,
    nothing_yet,
    restart,
    step_result,
)
from evac_jax.sim.initial_states import StartCycle
from evac_jax.sim.libero_pool import LiberoPool
from policies.spec import ActionSpec

ACTION_DIM = 7


@dataclass(frozen=True)
class LiberoEnvConfig:
    """Settings of `LiberoEnv`.

    Attributes:
        libero: the suite, its files and its rendering.
        num_envs: environments stepped as one batch, B; each is a process of some 1.9 GB.
        chunk: actions per decision, K.
        coefficient, relative, ignore_terminations: see `EpisodeRules`.
        auto_reset: restart an environment as soon as its episode is over, from the next start of
            a seeded cycle over the starts handed to `reset`.
        gripper: how the policy's gripper entry becomes LIBERO's (+1 closes, -1 opens).
        clip_envs: environments (the first ones) that send whole chunks of frames, for videos.
        device: accepted for the sake of the worker.
    """

    libero: LiberoConfig = field(default_factory=LiberoConfig)
    num_envs: int = 1
    chunk: int = 8
    coefficient: float = 1.0
    relative: bool = True
    auto_reset: bool = False
    ignore_terminations: bool = False
    gripper: str = "libero"
    clip_envs: int = 0
    device: str = "cpu"

    def __post_init__(self):
        check_settings("LIBERO", self, {"num_envs": 1, "chunk": 1, "clip_envs": 0})


def make(spec: dict) -> "LiberoEnv":
    """Return the environment of a JSON object with the fields of `LiberoEnvConfig`.

    Raises:
        ConfigError: for an unknown key or a value out of range.
    """
    check_fields("LIBERO", LiberoEnvConfig, spec)
    libero = LiberoConfig(**spec.get("libero", {}))
    return LiberoEnv(LiberoEnvConfig(**(spec | {"libero": libero})))


def to_libero(actions: np.ndarray, gripper: str) -> np.ndarray:
    """Return a policy's actions [.. 7] as LIBERO takes them: deltas in [-1, 1], gripper +1 closes.

    LIBERO's controller clips in the same way; clipping here makes recordings show what it executes.
    """
    moves = torch.tensor(np.asarray(actions), dtype=torch.float32)
    return apply_gripper_rule(moves, gripper).numpy().clip(-1, 1)


class LiberoEnv:
    """A batch of LIBERO episodes; implements `evac_jax.bridge.environment.Environment`.

    The suite's number of actions need not be a multiple of the chunk: actions beyond it are not
    played. An episode that is over stays as it is until it is restarted; with auto-reset
    frames, task and pose of a result are the new episode's, the rest is the finished one's.
    """

    def __init__(self, config: LiberoEnvConfig):
        self._config = config
        self._pool = LiberoPool(config.libero, config.num_envs)
        self._limit = config.libero.episode_steps
        chunks = -(-self._limit // config.chunk)
        size = config.libero.image_size
        self.spec = EnvSpec(
            num_envs=config.num_envs,
            image_shape=(1, size, size, 3),
            proprio_dim=POSE_DIM,
            action=ActionSpec(dim=ACTION_DIM, chunk=config.chunk),
            instructions=self._pool.suite.instructions,
            num_starts=self._pool.suite.num_starts,
            max_episode_steps=chunks * config.chunk,
            clip_envs=config.clip_envs,
            notes=config.libero.notes,
        )
        rules = EpisodeRules(
            max_episode_steps=self.spec.max_episode_steps,
            coefficient=config.coefficient,
            relative=config.relative,
            ignore_terminations=config.ignore_terminations,
        )
        self._episodes = EpisodeStates(config.num_envs, rules)
        self._pictures = np.zeros((config.num_envs, *self.spec.image_shape), np.uint8)
        self._poses = np.zeros((config.num_envs, POSE_DIM), np.float32)
        self._task = np.zeros(config.num_envs, np.int32)
        self._started = False

    def parts(self, count: int) -> "list[LiberoEnv]":
        """Start again as environments with processes of their own; see `Environment.parts`."""
        share = whole_part(self._config.num_envs, count)
        self.close()
        return [LiberoEnv(dataclasses.replace(self._config, num_envs=share)) for _ in range(count)]

    def reset(self, starts: np.ndarray, seed: int, frames: Tensor, clip: Tensor) -> StepResult:
        """Start every environment; see `Environment.reset`. The seed orders auto-resets only.

        Raises:
            DataError: for the wrong number of starts or an unknown one.
            SimulatorError: a LIBERO process failed or died.
        """
        config, began = self._config, time.perf_counter()
        starts = check_starts(starts, config.num_envs)
        idle = starts == IDLE
        self._cycle = StartCycle(starts[~idle], (seed,))
        self._start(np.flatnonzero(~idle), starts[~idle])
        self._started = True
        self._episodes.restart(torch.ones(len(idle), dtype=torch.bool), torch.from_numpy(idle))
        frames.copy_(torch.from_numpy(self._pictures))
        if len(clip):
            clip[:, -1].copy_(torch.from_numpy(self._pictures[: len(clip)]))
        outcome = nothing_yet(config.num_envs, config.chunk)
        seconds = {"simulate": time.perf_counter() - began}
        return self._result(outcome, self._figures(), seconds)

    def step(self, actions: np.ndarray, frames: Tensor, clip: Tensor) -> StepResult:
        """Play one chunk of actions [B K 7]; see `Environment.step`.

        Raises:
            DataError: for actions of another shape, or before the first reset.
            SimulatorError: a LIBERO process failed or died.
        """
        config, began = self._config, time.perf_counter()
        expected = (config.num_envs, config.chunk, ACTION_DIM)
        check_actions(actions, expected, self._started)
        moves = to_libero(actions, config.gripper)
        running = np.flatnonzero(self._episodes.running.numpy())
        left = (self._limit - self._episodes.steps.numpy()).clip(max=config.chunk)
        played = self._pool.play(
            running, [moves[env, : left[env]] for env in running], running < len(clip)
        )
        success = np.zeros((config.num_envs, config.chunk), np.float32)
        film = np.repeat(self._pictures[: len(clip), None], config.chunk, axis=1)
        for env, part in zip(running, played, strict=True):
            success[env, : left[env]] = part.success
            self._pictures[env], self._poses[env] = part.frames[-1], part.poses[-1]
            if env < len(clip):
                film[env] = self._pictures[env]  # a last chunk may be shorter
                film[env, : left[env]] = part.frames
        outcome = self._episodes.advance(torch.from_numpy(success))
        figures = self._figures()
        over = (outcome.terminated | outcome.truncated).numpy()[running]
        if config.auto_reset and over.any():
            self._restart(running[over])
        hand_over(self._pictures, film, frames, clip)
        return self._result(outcome, figures, {"simulate": time.perf_counter() - began})

    def park(self) -> None:
        """Nothing lies on an accelerator."""

    def close(self) -> None:
        """End LIBERO's processes."""
        self._pool.close()

    def _start(self, envs: np.ndarray, starts: np.ndarray) -> None:
        if not len(envs):
            return
        self._task[envs] = self._pool.suite.locate(starts)[0]
        pictures, poses = self._pool.start(envs.tolist(), starts)
        self._pictures[envs], self._poses[envs] = pictures, poses

    def _restart(self, envs: np.ndarray) -> None:
        self._start(envs, self._cycle.next(len(envs)))
        restart(self._episodes, envs)

    def _figures(self) -> dict[str, Tensor]:
        figures = self._episodes.figures()
        return figures | {"length": figures["length"].clamp(max=self._limit)}

    def _result(
        self, outcome: ChunkOutcome, figures: dict[str, Tensor], seconds: dict[str, float]
    ) -> StepResult:
        return step_result(self._task.copy(), self._poses.copy(), outcome, figures, seconds)
