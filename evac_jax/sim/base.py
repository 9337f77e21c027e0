"""What every simulator process offers: imagined or ground truth, the trainer cannot tell."""

from typing import TYPE_CHECKING, Protocol

import numpy as np

from evac_jax.bridge.types import IDLE, EnvSpec, StepResult

if TYPE_CHECKING:
    import torch

__all__ = ["IDLE", "EnvSpec", "Environment", "StepResult"]


class Environment(Protocol):
    """A batch of environments stepped together, one chunk of actions at a time."""

    spec: EnvSpec

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

    def close(self) -> None:
        """Release what the environment holds."""
        ...
