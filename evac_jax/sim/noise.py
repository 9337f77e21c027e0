"""Noise of an environment, independent of what else is imagined in the same call."""

import numpy as np
import torch
from torch import Tensor


class ChunkNoise:
    """Standard normal draws named by (seeds, chunk, draw).

    A draw always covers all environments and depends on nothing that happened before, so leaving
    out finished environments or splitting the batch changes no other noise.

    Args:
        seeds: non-negative integers.
        device: where the noise is drawn; devices differ in their numbers.
    """

    def __init__(self, seeds: tuple[int, ...], device: torch.device):
        self._seeds, self._chunk = tuple(int(seed) for seed in seeds), 0
        self._generator = torch.Generator(device)

    def __call__(self, draw: int, shape: tuple[int, ...]) -> Tensor:
        """Return draw number `draw` of the current chunk."""
        entropy = np.random.SeedSequence((*self._seeds, self._chunk, draw))
        self._generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return torch.randn(shape, generator=self._generator, device=self._generator.device)

    def next_chunk(self) -> None:
        """Go on to the draws of the next chunk."""
        self._chunk += 1
