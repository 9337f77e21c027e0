"""The tabletop as an environment: the ground truth with which imagination is compared.

Its interface, rewards and ends of episodes are those of the world model's environment, but frames
and success are real. Torch is used because frames are passed in torch tensors.
"""

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evac_jax.bridge.environment import whole_part
from evac_jax.bridge.types import IDLE, KEYFRAMES, EnvSpec, StepResult
from evac_jax.errors import ConfigError, DataError
from evac_jax.files.recordings import Episodes
from evac_jax.miniature import scene as world
from evac_jax.miniature.render import render
from evac_jax.miniature.scene import ACTION_DIM, POSE_DIM, TABLETOP, Tabletop
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.sim.actions import apply_gripper_rule
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
from evac_jax.sim.recorded_starts import Keyframes
from policies.spec import ActionSpec


@dataclass(frozen=True)
class GroundTruthConfig:
    """Settings of `GroundTruthEnv`.

    Attributes:
        num_envs: number of scenes in the batch, B.
        image_size: height and width, pixels.
        max_episode_steps: actions of an episode; checked at the end of each chunk.
        chunk: actions per decision, K.
        coefficient, relative, ignore_terminations: see `EpisodeRules`.
        auto_reset: restart an environment as soon as its episode is over, from the next start in a
            seeded cycle over the starts that `reset` got.
        gripper: how the policy's gripper entry is converted for the scene, a key of
            `GRIPPER_RULES`. "libero": the policy outputs 0 = close .. 1 = open (0.5 = neither), as
            in OpenVLA's data, and the scene gets +1 = close, -1 = open.
        clip_envs: how many environments (the first ones) send all frames of a chunk, for videos.
        keyframe_data: folder of a recording of this tabletop. Episodes may begin in the middle of
            those recorded; the recorded actions are played to reach that scene. "" = none.
        start_seed_base: start id + this = seed of the scene.
        num_starts: number of starts to choose from; a large number costs nothing.
        device: ignored, because the tabletop is computed on the CPU; the worker process sets it.
    """

    num_envs: int = 1
    image_size: int = 64
    max_episode_steps: int = 32
    chunk: int = 8
    coefficient: float = 1.0
    relative: bool = True
    auto_reset: bool = False
    ignore_terminations: bool = False
    gripper: str = "libero"
    clip_envs: int = 0
    keyframe_data: str = ""
    start_seed_base: int = 0
    num_starts: int = 3_000_000
    device: str = "cpu"

    def __post_init__(self):
        least = {"num_envs": 1, "image_size": 8, "chunk": 1, "clip_envs": 0}
        check_settings("miniature", self, least | {"start_seed_base": 0, "num_starts": 1})


def make(spec: dict) -> "GroundTruthEnv":
    """Return the environment of a JSON object whose keys are `GroundTruthConfig`'s fields.

    Raises:
        ConfigError: for an unknown key or a value out of range.
    """
    check_fields("miniature", GroundTruthConfig, spec)
    return GroundTruthEnv(GroundTruthConfig(**spec))


def to_policy_actions(actions: np.ndarray) -> np.ndarray:
    """Return scene actions [.. 7] in the form that a policy learns: gripper 0 closes, 1 opens."""
    return np.concatenate((actions[..., :6], (1 - actions[..., 6:]) / 2), axis=-1)


class GroundTruthEnv:
    """A batch of tabletop scenes; implements `evac_jax.bridge.environment.Environment`.

    A finished episode does not change until it is restarted. With auto-reset, a result has frames,
    task and pose of the new episode, and rewards, flags and metrics of the finished one.
    """

    def __init__(self, config: GroundTruthConfig, table: Tabletop = TABLETOP):
        self._config, self._table = config, table
        self._keyframes = Keyframes(config.keyframe_data) if config.keyframe_data else None
        if self._keyframes:
            self._check_keyframes(self._keyframes.data)
        self.spec = EnvSpec(
            num_envs=config.num_envs,
            image_shape=(1, config.image_size, config.image_size, 3),
            proprio_dim=POSE_DIM,
            action=ActionSpec(dim=ACTION_DIM, chunk=config.chunk),
            instructions=INSTRUCTIONS,
            num_starts=config.num_starts,
            max_episode_steps=config.max_episode_steps,
            clip_envs=config.clip_envs,
            num_keyframes=self._keyframes.count if self._keyframes else 0,
        )
        self._episodes = EpisodeStates(
            config.num_envs,
            EpisodeRules(
                max_episode_steps=config.max_episode_steps,
                coefficient=config.coefficient,
                relative=config.relative,
                ignore_terminations=config.ignore_terminations,
            ),
        )
        self._started = False
        self._scenes: world.Scenes  # from the first reset on
        self._pictures = np.zeros((config.num_envs, *self.spec.image_shape), np.uint8)

    def parts(self, count: int) -> "list[GroundTruthEnv]":
        """Divide into independent environments; see `Environment.parts`."""
        share = whole_part(self._config.num_envs, count)
        config = dataclasses.replace(self._config, num_envs=share)
        return [GroundTruthEnv(config, self._table) for _ in range(count)]

    def reset(self, starts: np.ndarray, seed: int, frames: Tensor, clip: Tensor) -> StepResult:
        """Start every environment; see `Environment.reset`.

        Raises:
            DataError: for the wrong number of starts or an unknown one.
        """
        config, began = self._config, time.perf_counter()
        starts = check_starts(starts, config.num_envs)
        idle = starts == IDLE
        plain = starts[~idle & ~self._is_keyframe(starts)]
        if ((plain < 0) | (plain >= config.num_starts)).any():
            raise DataError(f"start ids: expected 0..{config.num_starts - 1} or IDLE, got {starts}")
        self._cycle = StartCycle(starts[~idle], (seed,))
        # An idle environment has an arbitrary scene, so that all arrays keep their shape.
        self._scenes, self._started = self._sample(np.where(idle, 0, starts)), True
        self._episodes.restart(torch.ones(len(idle), dtype=torch.bool), torch.from_numpy(idle))
        self._pictures[~idle] = self._render(np.flatnonzero(~idle))
        frames.copy_(torch.from_numpy(self._pictures))
        if len(clip):
            clip[:, -1].copy_(torch.from_numpy(self._pictures[: len(clip)]))
        outcome = nothing_yet(config.num_envs, config.chunk)
        seconds = {"render": time.perf_counter() - began}
        return self._result(outcome, self._episodes.figures(), seconds)

    def step(self, actions: np.ndarray, frames: Tensor, clip: Tensor) -> StepResult:
        """Play one chunk of actions [B K 7]; see `Environment.step`.

        Raises:
            DataError: for actions of another shape, or before the first reset.
        """
        config = self._config
        expected = (config.num_envs, config.chunk, ACTION_DIM)
        check_actions(actions, expected, started=self._started)
        seconds = {"simulate": 0.0, "render": 0.0}
        moves = torch.tensor(np.asarray(actions), dtype=torch.float32)
        moves = apply_gripper_rule(moves, config.gripper).numpy()
        running = self._episodes.running.numpy()
        filmed = np.flatnonzero(running[: len(clip)])
        film = np.repeat(self._pictures[: len(clip), None], config.chunk, axis=1)
        success = np.zeros((config.num_envs, config.chunk), np.float32)
        for k in range(config.chunk):
            began = time.perf_counter()
            after = world.step(self._scenes, moves[:, k], self._table)
            self._scenes = world.where(running, after, self._scenes)
            success[:, k] = world.is_success(self._scenes, self._table)
            simulated = time.perf_counter()
            if len(filmed):
                film[filmed, k] = self._render(filmed)
            seconds["simulate"] += simulated - began
            seconds["render"] += time.perf_counter() - simulated

        began = time.perf_counter()
        outcome = self._episodes.advance(torch.from_numpy(success))
        figures = self._episodes.figures()
        over = (outcome.terminated | outcome.truncated).numpy() & running
        if config.auto_reset and over.any():
            self._restart(np.flatnonzero(over))
        redraw = np.flatnonzero(running)
        self._pictures[redraw] = self._render(redraw)
        hand_over(self._pictures, film, frames, clip)
        seconds["render"] += time.perf_counter() - began
        return self._result(outcome, figures, seconds)

    def park(self) -> None:
        """Do nothing: no memory of an accelerator is used."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def _restart(self, rows: np.ndarray) -> None:
        scenes = self._sample(self._cycle.next(len(rows)))
        for field in dataclasses.fields(scenes):
            values = getattr(self._scenes, field.name).copy()
            values[rows] = getattr(scenes, field.name)
            setattr(self._scenes, field.name, values)
        restart(self._episodes, rows)

    def _check_keyframes(self, data: Episodes) -> None:
        """Refuse episodes whose start ids are not of this ground truth's scenes."""
        folder = self._config.keyframe_data
        if (data.start < 0).any():
            raise ConfigError(
                f"keyframe_data: {folder} has episodes without a start id, which the ground truth "
                "cannot repeat; use a recording made by --mode=collect"
            )
        told = np.array(data.instructions)[data.task]
        true = np.array(INSTRUCTIONS)[world.sample_scenes(data.start, self._table).task]
        if (wrong := np.flatnonzero(told != true)).size:
            n = wrong[0]
            raise ConfigError(
                f"keyframe_data: {folder} is no recording of this ground truth: episode {n} of its "
                f"training part says {str(told[n])!r}, start {data.start[n]} is {str(true[n])!r}"
            )

    def _is_keyframe(self, starts: np.ndarray) -> np.ndarray:
        return (starts >= KEYFRAMES) & (self._keyframes is not None)

    def _sample(self, starts: np.ndarray) -> world.Scenes:
        late = self._is_keyframe(starts)
        seeds = np.where(late, 0, starts + self._config.start_seed_base)
        if self._keyframes is None or not late.any():
            return world.sample_scenes(seeds, self._table)
        data = self._keyframes.data
        episodes, steps = (np.zeros(len(starts), np.int64) for _ in range(2))
        episodes[late], steps[late] = self._keyframes.find(starts[late])
        scenes = world.sample_scenes(np.where(late, data.start[episodes], seeds), self._table)
        for step in range(int(steps.max())):
            rows = data.rows(episodes, np.minimum(step, steps))
            after = world.step(scenes, data.actions[rows], self._table)
            scenes = world.where(step < steps, after, scenes)
        return scenes

    def _render(self, rows: np.ndarray) -> np.ndarray:
        return render(self._scenes[rows], self._config.image_size, self._table)[:, None]

    def _result(
        self, outcome: ChunkOutcome, figures: dict[str, Tensor], seconds: dict[str, float]
    ) -> StepResult:
        return step_result(self._scenes.task, self._scenes.pose, outcome, figures, seconds)
