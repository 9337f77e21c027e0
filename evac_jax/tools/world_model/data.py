"""Training data of a world model: windows of episodes, and batches of them from a latent cache.

A window holds a history and the chunk that follows. The history has the frames that imagination
would use at that point (the history rule), not simply the last ones. Episodes may have any length
and any number of views. A batch depends only on the step, not on the number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evac_jax.errors import ConfigError, DataError
from evac_jax.evac.conditioning import delta_actions, window_deltas
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.diffusion_loss import TrainingBatch
from evac_jax.evac.model import history_places
from evac_jax.files.recordings import Episodes
from evac_jax.sim.actions import both_arms
from evac_jax.tools.world_model.imagine import to_images
from evac_jax.tools.world_model.latent_cache import Latents

# A latent cell that differs by this much from the last history frame (latents have unit standard
# deviation) shows the effect of the action. It gets a larger weight, because most cells show the
# unchanged table.
MOVED = 0.5
# Least standard deviation of a change of pose, m and radians: what never changes is not scaled up.
LEAST_MOVED, LEAST_TURNED = 1e-3, 1e-2
EPISODE_STARTS = 0.5  # share of windows that begin at the start of an episode, as rollouts do


@dataclass(frozen=True)
class Windows:
    """B windows, by steps of their episodes.

    Attributes:
        episodes: int64 [B].
        start: int64 [B] step at which the imagined episode begins.
        columns: int64 [B, n_previous + chunk] steps of the history and of the chunk.
    """

    episodes: np.ndarray
    start: np.ndarray
    columns: np.ndarray

    def __getitem__(self, which: slice) -> "Windows":
        return Windows(self.episodes[which], self.start[which], self.columns[which])

    def __len__(self) -> int:
        return len(self.episodes)


def window_columns(start: np.ndarray, number: np.ndarray, config: EvacConfig) -> np.ndarray:
    """Steps [B, n_previous + chunk] of the windows of chunk `number` [B] after `start` [B].

    They are the frames that `EvacModel.imagine` would use: its history first holds n_previous
    copies of the start frame, then start + 1, start + 2 and so on.
    """
    past, chunk = config.n_previous, config.chunk
    stored = np.where(number == 0, 0, past + number * chunk)
    places = history_places(torch.from_numpy(stored), past).numpy()
    history = start[:, None] + np.maximum(places - (past - 1), 0)
    ahead = (start + number * chunk)[:, None] + 1 + np.arange(chunk)
    return np.concatenate((history, ahead), axis=1)


class WindowSampler:
    """Draws windows: every chunk of the data equally often, times the weight of its source.

    Args:
        data: episodes; those shorter than a chunk are never drawn.
        config: chunk and history length.
        weights: source -> factor; 1 if not named. "policy" stands for all of "policy:start",
            "policy:7" and so on that are not named themselves.

    Raises:
        ConfigError: a weight is negative, or its source does not exist.
        DataError: there is nothing to draw.
    """

    def __init__(
        self, data: Episodes, config: EvacConfig, weights: Mapping[str, float] | None = None
    ):
        self._config = config
        self._length = np.asarray(data.length)
        share = source_weights(data.sources, weights or {})[data.source]
        share = share * (self._length // config.chunk)
        if not share.sum() > 0:
            raise DataError(
                f"no window to train on: {data.num_episodes} episodes, none of them with a weight "
                f"above 0 and at least {config.chunk} actions (one chunk)"
            )
        self._edges = np.cumsum(share)
        self._edges /= self._edges[-1]

    def draw(self, size: int, rng: np.random.Generator) -> Windows:
        """Return `size` windows."""
        chunk = self._config.chunk
        episodes = np.searchsorted(self._edges, rng.random(size), side="right")
        length = self._length[episodes]
        number = rng.integers(length // chunk)
        room = length - (number + 1) * chunk
        start = np.where(rng.random(size) < EPISODE_STARTS, 0, rng.integers(0, room + 1))
        return Windows(episodes, start, window_columns(start, number, self._config))


def source_weights(sources: tuple[str, ...], weights: Mapping[str, float]) -> np.ndarray:
    """Factor [sources] of each source; see `WindowSampler`."""
    families = {source.split(":")[0] for source in sources}
    if unknown := sorted(set(weights) - set(sources) - families):
        raise ConfigError(f"--weight: no such source {unknown}; the episodes have {list(sources)}")
    if wrong := {name: value for name, value in weights.items() if not value >= 0}:
        raise ConfigError(f"--weight: expected numbers >= 0, got {wrong}")
    family = [weights.get(source.split(":")[0], 1.0) for source in sources]
    return np.array([weights.get(s, f) for s, f in zip(sources, family, strict=True)], float)


@dataclass(frozen=True)
class Corpus:
    """Episodes with the latents of all their rows.

    Attributes:
        data: the episodes, or a selection of those from which `latents` was made.
        latents: with the same rows as `data.frames`.
        rays: [1, V, 6, T, h, w] of the fixed cameras, on the training device.
    """

    data: Episodes
    latents: Latents
    rays: Tensor

    def batch(self, windows: Windows, config: EvacConfig) -> TrainingBatch:
        """Gather windows on the device of the rays."""
        data, past, device = self.data, config.n_previous, self.rays.device
        rows = data.rows(windows.episodes[:, None], windows.columns)
        # The pose window is contiguous; before the episode's start its first pose is repeated.
        now = windows.columns[:, past] - 1
        steps = now[:, None] + np.arange(1 - past, config.chunk + 1)
        steps = np.maximum(steps, windows.start[:, None])
        poses = torch.from_numpy(np.array(data.poses[data.rows(windows.episodes[:, None], steps)]))
        start_frames = data.frames[data.rows(windows.episodes, windows.start)]
        return TrainingBatch(
            latents=_to_batch(self.latents.frames[rows], device),
            map_latents=_to_batch(self.latents.maps[rows[:, past:]], device),
            rays=self.rays,
            deltas=window_deltas(both_arms(poses), config).to(device),
            images=to_images(start_frames, device)[:, :, None],
        )


def fitted_deltas(config: EvacConfig, data: Episodes) -> EvacConfig:
    """Return `config` with the mean and the standard deviation of the episodes' pose deltas."""
    steps = [f + np.arange(n) for f, n in zip(data.first, data.length, strict=True)]
    rows = np.concatenate(steps)[:, None] + np.arange(2)
    poses = both_arms(torch.from_numpy(np.array(data.poses[rows])))
    deltas = delta_actions(poses, config, normalize=False)[:, 0].double()
    motion = deltas.unflatten(1, (2, 7))[:, :, :6].flatten(1)  # without the grippers
    least = motion.new_tensor(([LEAST_MOVED] * 3 + [LEAST_TURNED] * 3) * 2)
    return config.replace(
        delta_mean=tuple(motion.mean(0).tolist()),
        delta_std=tuple(motion.std(0).maximum(least).tolist()),
        delta_std_factor=1.0,
    )


def _to_batch(latents: np.ndarray, device: torch.device) -> Tensor:
    """float32 [B, V, 4, T, h, w] of float16 [B, T, V, 4, h, w]."""
    return torch.from_numpy(latents).to(device).float().permute(0, 2, 3, 1, 4, 5)


def moving_weight(batch: TrainingBatch, config: EvacConfig, moving: float) -> Tensor:
    """Weight [B, V, 1, chunk, h, w] of every latent cell: `moving` if it changed, else 1."""
    past = config.n_previous
    last = batch.latents[:, :, :, past - 1 : past]
    change = (batch.latents[:, :, :, past:] - last).abs().amax(2, keepdim=True)
    return 1 + (moving - 1) * (change > MOVED).float()


def mean_moving_weight(corpus: Corpus, config: EvacConfig, moving: float, count: int) -> float:
    """Mean of `moving_weight` over a fixed set of `count` windows.

    Weights are divided by it. With the mean of each batch instead, the loss would depend on how a
    batch is divided into processes and accumulation steps.
    """
    windows = WindowSampler(corpus.data, config).draw(count, np.random.default_rng(0))
    total = 0.0
    for first in range(0, count, 16):
        part = windows[first : first + 16]
        weight = moving_weight(corpus.batch(part, config), config, moving)
        total += float(weight.mean()) * len(part)
    return total / count
