"""What the two ground truths, tabletop and LIBERO, share: checks, and how results are made.

Everything lies on the CPU: only frames, success and poses come from a simulator.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evac_jax.bridge.types import StepResult
from evac_jax.errors import ConfigError, DataError
from evac_jax.sim.actions import GRIPPER_RULES
from evac_jax.sim.episodes import ChunkOutcome, EpisodeStates


def check_settings(name: str, config: Any, least: Mapping[str, int]) -> None:
    """Refuse settings that no ground truth can work with.

    Args:
        name: of the environment, for the message.
        config: its settings; has `num_envs`, `clip_envs` and `gripper`.
        least: field -> smallest value.

    Raises:
        ConfigError: names every field at fault.
    """
    problems = [
        f"{field}: expected at least {value}, got {getattr(config, field)}"
        for field, value in least.items()
        if getattr(config, field) < value
    ]
    if config.clip_envs > config.num_envs:
        problems.append(f"clip_envs: at most num_envs={config.num_envs}, got {config.clip_envs}")
    if config.gripper not in GRIPPER_RULES:
        problems.append(f"gripper: expected one of {sorted(GRIPPER_RULES)}, got {config.gripper!r}")
    if problems:
        raise ConfigError(f"{name} environment:\n" + "\n".join(problems))


def check_fields(name: str, kind: type, values: Mapping[str, Any]) -> None:
    """Refuse keys of `values` that are no field of the dataclass `kind`.

    Raises:
        ConfigError: names them and those that there are.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"{name} environment: unknown {unknown}; there are {sorted(known)}")


def check_starts(starts: np.ndarray, num_envs: int) -> np.ndarray:
    """Return start ids as int64 [B].

    Raises:
        DataError: not one for each environment.
    """
    starts = np.asarray(starts, np.int64)
    if starts.shape != (num_envs,):
        raise DataError(f"expected {num_envs} start ids, got shape {starts.shape}")
    return starts


def check_actions(actions: np.ndarray, expected: tuple[int, ...], started: bool) -> None:
    """Refuse actions of another shape, and any before the first reset.

    Raises:
        DataError: says which.
    """
    if actions.shape != expected or not started:
        got = actions.shape if started else "no reset yet"
        raise DataError(f"expected actions {expected} after a reset, got {got}")


def hand_over(pictures: np.ndarray, film: np.ndarray, frames: Tensor, clip: Tensor) -> None:
    """Copy frames [B V H W 3] and the filmed ones [b K V H W 3] to where the trainer reads them."""
    frames.copy_(torch.from_numpy(pictures))
    if len(clip):
        clip.copy_(torch.from_numpy(film))


def nothing_yet(num_envs: int, chunk: int) -> ChunkOutcome:
    """Return the outcome of a reset."""
    nothing = torch.zeros(num_envs, dtype=torch.bool)
    return ChunkOutcome(torch.zeros(num_envs, chunk), nothing, nothing, nothing)


def restart(episodes: EpisodeStates, rows: np.ndarray) -> None:
    """Begin new episodes in the environments `rows`."""
    episodes.restart(torch.zeros_like(episodes.idle).index_fill(0, torch.from_numpy(rows), True))


def step_result(
    task: np.ndarray,
    pose: np.ndarray,
    outcome: ChunkOutcome,
    figures: Mapping[str, Tensor],
    seconds: dict[str, float],
) -> StepResult:
    """Return what the trainer gets besides the frames."""
    return StepResult(
        task=task,
        proprio=pose,
        rewards=outcome.rewards.numpy(),
        terminated=outcome.terminated.numpy(),
        truncated=outcome.truncated.numpy(),
        success=outcome.success.numpy(),
        episode={name: values.numpy().copy() for name, values in figures.items()},
        seconds=seconds,
    )
