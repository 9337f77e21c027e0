"""Measures a world model on held-out episodes, always in the same way.

There are two figures, because each alone can mislead. One is the loss of fixed windows, timesteps
and noise, which follows training closely. The other is the PSNR of rollouts over several chunks,
where errors accumulate.
"""

import contextlib
import math

import numpy as np
import torch
from PIL import Image

from evac_jax.errors import DataError
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.diffusion_loss import PLAIN, training_loss
from evac_jax.evac.model import EvacModel
from evac_jax.evac.schedule import Schedule
from evac_jax.files.recordings import Episodes
from evac_jax.tools.world_model.data import Corpus, WindowSampler, moving_weight
from evac_jax.tools.world_model.filmstrip import compare
from evac_jax.tools.world_model.imagine import chunk_psnr, imagine_episodes

BATCH = 16  # windows per call; their timesteps cover the whole range
SHOWN = 3  # episodes in a film strip


def check_lengths(data: Episodes, config: EvacConfig) -> int:
    """Return how many chunks the longest of held-out episodes has.

    Raises:
        DataError: none has a whole one.
    """
    most = int(data.length.max(initial=0)) // config.chunk
    if most == 0:
        raise DataError(
            f"no held-out episode of at least {config.chunk} actions (one chunk) to validate on, "
            f"of {data.num_episodes}; record more episodes"
        )
    return most


class Validation:
    """Measures a model on a fixed choice of held-out episodes.

    Args:
        corpus: held-out episodes with their latents.
        model: its sizes and device are used.
        windows: number of windows for the loss.
        episodes: largest number of episodes for rollouts; only those that are long enough.
        chunks: chunks of a rollout, or as many as the longest episode has.
        steps: denoising steps of the rollouts.
        eta: eta of the rollouts.
        moving: weight of moving cells in the loss.
        mean_weight: weights are divided by this.
        timesteps: timesteps of the loss, int64, used in turn; None = the whole range.

    Raises:
        DataError: there is no held-out episode of at least a chunk.
    """

    def __init__(
        self,
        corpus: Corpus,
        model: EvacModel,
        *,
        windows: int,
        episodes: int,
        chunks: int,
        steps: int,
        eta: float,
        moving: float,
        mean_weight: float,
        timesteps: np.ndarray | None = None,
    ):
        config, data = model.config, corpus.data
        most = check_lengths(data, config)
        self._corpus, self._moving, self._mean_weight = corpus, moving, mean_weight
        self._timesteps = timesteps
        self._schedule = Schedule.create(config, model.device)
        sampler = WindowSampler(data, config)
        self._windows = sampler.draw(windows, np.random.default_rng(1))
        self._sampling = {"steps": steps, "eta": eta}
        self._length = min(chunks, most) * config.chunk
        enough = np.flatnonzero(data.length >= self._length)
        chosen = np.random.default_rng(0).permutation(enough)[:episodes]
        self._rollouts = data.select(np.sort(chosen))

    @torch.inference_mode()
    def loss(self, model: EvacModel, context: contextlib.AbstractContextManager) -> float:
        """Mean loss of the fixed windows.

        Args:
            model: in eval mode.
            context: for the forward passes, see `torch_training.autocast`.
        """
        config, total = model.config, 0.0
        generator = torch.Generator().manual_seed(5)
        for first in range(0, len(self._windows), BATCH):
            windows = self._windows[first : first + BATCH]
            batch = self._corpus.batch(windows, config)
            last = config.num_timesteps - 1
            timesteps = torch.linspace(0.02 * last, 0.99 * last, len(windows)).long()
            if self._timesteps is not None:
                timesteps = torch.from_numpy(np.resize(self._timesteps, len(windows)))
            with context:
                loss = training_loss(
                    model,
                    batch,
                    options=PLAIN,
                    generator=generator,
                    weight=moving_weight(batch, config, self._moving) / self._mean_weight,
                    timesteps=timesteps.to(model.device),
                    schedule=self._schedule,
                )
            total += float(loss) * len(windows)
        return total / len(self._windows)

    def rollouts(self, model: EvacModel) -> tuple[list[float], Image.Image]:
        """PSNR (dB) of each chunk, and a picture: imagined above, real below."""
        generator = torch.Generator(model.device).manual_seed(0)
        imagined = imagine_episodes(
            model, self._rollouts, generator=generator, length=self._length, **self._sampling
        )
        real = self._rollouts.stacked("frames", self._length)
        shown = slice(min(SHOWN, len(imagined)))
        picture = compare(real[shown], imagined[shown], count=9)
        return chunk_psnr(imagined, real[:, 1:], model.config.chunk), picture


class BestSoFar:
    """Remembers the best held-out loss and how many validations ago it was.

    Args:
        patience: training stops after this many validations without a better loss; 0 = never.
    """

    def __init__(self, patience: int):
        self._patience = patience
        self.loss, self.step, self._since = math.inf, 0, 0

    def update(self, loss: float, step: int) -> bool:
        """Record a held-out loss; return whether it is the best one."""
        better = loss < self.loss
        if better:
            self.loss, self.step = loss, step
        self._since = 0 if better else self._since + 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether training should stop."""
        return 0 < self._patience <= self._since

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` takes."""
        return {"loss": self.loss, "step": self.step, "since": self._since}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`'s output."""
        self.loss, self.step, self._since = state["loss"], state["step"], state["since"]
