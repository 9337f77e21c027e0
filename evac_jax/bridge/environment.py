"""The interface of all environments, imagined or ground truth, that simulator processes serve."""

from typing import TYPE_CHECKING, Protocol

import numpy as np

from evac_jax.bridge.types import IDLE, EnvSpec, StepResult
from evac_jax.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["IDLE", "EnvSpec", "Environment", "StepResult", "whole_part"]


def whole_part(num_envs: int, parts: int) -> int:
    """Return the environments of one of `parts` equal parts.

    Raises:
        ConfigError: `num_envs` is not a multiple of `parts`.
    """
    if parts < 1 or num_envs % parts:
        raise ConfigError(f"{num_envs} environments cannot be cut in {parts} equal parts")
    return num_envs // parts


class Environment(Protocol):
    """A batch of environments stepped together, one chunk of actions at a time."""

    spec: EnvSpec

    def parts(self, count: int) -> "list[Environment]":
        """Cut into `count` environments of equal size, contiguous blocks that share the weights.

        Each part is reset and stepped separately. Together they give the numbers of the whole,
        except that auto-reset draws starts from a separate cycle in each part. Do not use `self`
        afterwards.

        Raises:
            ConfigError: the simulator cannot be divided, or not into so many parts.
        """
        ...

    def reset(
        self, starts: np.ndarray, seed: int, frames: "torch.Tensor", clip: "torch.Tensor"
    ) -> StepResult:
        """Start every environment: `starts` int64 [B] names initial states, `seed` the noise.

        A start of `IDLE` leaves its environment out: it costs nothing, its frames are undefined,
        its rewards 0 and its flags False until the next reset.
        """
        ...

    def step(self, actions: np.ndarray, frames: "torch.Tensor", clip: "torch.Tensor") -> StepResult:
        """Play one chunk: `actions` float32 [B K A], un-normalised as the policy gave them."""
        ...

    def park(self) -> None:
        """Forget the episodes and leave the accelerator until the next reset."""
        ...

    def close(self) -> None:
        """Release what the environment holds."""
        ...
