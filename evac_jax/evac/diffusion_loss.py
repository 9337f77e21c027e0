"""The loss that trains an EVAC world model, as a pure function of model, batch and generator.

It takes latents, not pictures, so the output of the frozen parts can be cached.

Source: specification of EnerVerse-AC's `p_losses` and batch preparation. The released recipe
trains the UNet and the image resampler with AdamW 5e-5 and gradient norm 0.5. The caller chooses
which parameters train by `requires_grad`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evac_jax.evac.conditioning import (
    concat_channels,
    image_condition,
)
from evac_jax.evac.model import EvacModel
from evac_jax.evac.schedule import Schedule


@dataclass(frozen=True)
class TrainingBatch:
    """One batch of windows of n_previous history frames and `chunk` frames to predict (T in all).

    Attributes:
        latents: [B, V, 4, T, h, w] scaled latents of the real frames.
        map_latents: [B, V, 4, chunk, h, w] scaled latents of the chunk's trajectory maps.
        rays: [B or 1, V, 6, T, h, w] from `EvacModel.rays`.
        deltas: [B, n, 14] from `conditioning.window_deltas`.
        images: [B, V, F, 3, H, W] in [-1, 1], candidates for the image tower. One of them is drawn
            at random; in the released recipe they are the history frames (F = n_previous).
    """

    latents: Tensor
    map_latents: Tensor
    rays: Tensor
    deltas: Tensor
    images: Tensor


@dataclass(frozen=True)
class LossOptions:
    """Randomisation of the conditioning; the defaults are the released recipe.

    Attributes:
        dropout: p in [0, 0.25]. One uniform number u is drawn per sample. Actions are dropped for
            u < 2p, the tower image for p <= u < 3p, the image condition for u < p/2,
            p <= u < 1.5p and 2.5p <= u < 3.5p, trajectory maps for p/2 <= u < 1.5p.
        history_noise: add noise to the history latents, more to later frames, so that in a rollout
            the model tolerates its own earlier errors.
    """

    dropout: float = 0.1
    history_noise: bool = True


PLAIN = LossOptions(dropout=0.0, history_noise=False)


def training_loss(
    model: EvacModel,
    batch: TrainingBatch,
    *,
    options: LossOptions = LossOptions(),  # noqa: B008 - frozen
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    schedule: Schedule | None = None,
    share: tuple[int, int] | None = None,
) -> Tensor:
    """Scalar loss of one batch.

    Args:
        model: the world model; parameters with `requires_grad` get gradients.
        batch: see `TrainingBatch`.
        options: randomisation; `PLAIN` for none.
        generator: source of all randomness, on the host or the batch's device.
        weight: factors of the squared error, broadcastable to [B, V, 4, chunk, h, w]; None is 1.
        timesteps: [B] int64 instead of uniform draws.
        noise: shaped like `batch.latents`, instead of standard normal draws.
        schedule: tables, if they were built once outside the training loop.
        share: (first, total) if `batch` is samples first, first + 1, ... of a larger batch of
            `total`. They get the random numbers that they would have in the larger batch, so the
            mean of the losses of its parts is its loss.
    """
    config = model.config
    draw = _Random(generator, batch.latents, share)
    schedule = schedule or Schedule.create(config, batch.latents.device)
    size = batch.latents.shape[0]
    drop = condition_dropout(draw.uniform(size), options.dropout)
    if timesteps is None:
        timesteps = draw.integers(0, config.num_timesteps, size)

    past = config.n_previous
    latents = batch.latents
    if options.history_noise:
        noisy = noise_history(latents[:, :, :, :past], config.num_timesteps, schedule, draw)
        latents = torch.cat((noisy, latents[:, :, :, past:]), 3)
    concat = concat_channels(
        image_condition(latents[:, :, :, :past], config.chunk),
        _drop(batch.map_latents, drop["maps"]),
        batch.rays.to(latents),
        (~drop["condition"]).to(latents),
    )
    pick = draw.integers(0, batch.images.shape[2], size)
    image = batch.images[torch.arange(size, device=pick.device), :, pick]
    tokens = model.image_tokens(_drop(image, drop["image"]))
    context = model.join_context(tokens, _drop(batch.deltas, drop["actions"]))
    if noise is None:
        noise = draw.normal(latents.shape)
    return diffusion_loss(model, schedule, latents, concat, context, timesteps, noise, weight)


def diffusion_loss(
    model: EvacModel,
    schedule: Schedule,
    latents: Tensor,
    concat: Tensor,
    context: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
    **labels: Tensor,
) -> Tensor:
    """Mean squared error of v on the chunk frames, with given conditioning.

    All frames, history included, are multiplied by the input scale of the timestep. (Imagination
    uses unscaled history, unless the configuration says `consistent_scale`. This mismatch is in the
    public recipe and is kept, because the public weights were trained with it.)

    Args:
        model: the denoiser and its configuration.
        schedule: tables on the latents' device.
        latents: [B, V, 4, T, h, w] clean.
        concat: [B, V, 15, T, h, w].
        context: [B, V, tokens, width].
        timesteps: [B] int64, shared by the views.
        noise: of the shape of `latents`; its history frames are not used.
        weight: see `training_loss`.
        **labels: `fps` and `domain_id` for `EvacModel.velocity`.
    """
    past = model.config.n_previous
    scale = schedule.scale[timesteps].to(latents)
    clean = latents * scale[:, None, None, None, None, None]
    noisy = schedule.diffuse(clean, noise, timesteps)
    x = torch.cat((clean[:, :, :, :past], noisy[:, :, :, past:]), 3)
    views = latents.shape[1]
    v = model.velocity(
        x.flatten(0, 1),
        timesteps.repeat_interleave(views),
        concat.flatten(0, 1),
        context.flatten(0, 1),
        **labels,
    ).unflatten(0, latents.shape[:2])
    target = schedule.v_target(clean, noise, timesteps)
    error = (v - target)[:, :, :, past:].square()
    return (error if weight is None else error * weight).mean()


def condition_dropout(uniform: Tensor, p: float) -> dict[str, Tensor]:
    """Which parts of the conditioning are dropped, [B] bool each, for uniform draws in [0, 1)."""
    u = uniform
    return {
        "actions": u < 2 * p,
        "image": (u >= p) & (u < 3 * p),
        "condition": (u < p / 2) | ((u >= p) & (u < 1.5 * p)) | ((u >= 2.5 * p) & (u < 3.5 * p)),
        "maps": (u >= p / 2) & (u < 1.5 * p),
    }


def noise_history(history: Tensor, num_timesteps: int, schedule: Schedule, draw) -> Tensor:
    """History latents [B, V, 4, P, h, w] with noise of a random time per frame, ascending.

    Times are (N / d) (1 - cos a). a is uniform in (-pi/2, pi/2), and negative values are set to
    zero, so half of the frames get the smallest noise. d is one random integer in 3..20 per batch.
    """
    batch, _, _, past = history.shape[:4]
    divisor = draw.integers(3, 21, ())
    angle = ((draw.uniform((batch, past)) - 0.5) * math.pi).clamp(min=0)
    times = (num_timesteps / divisor * (1 - torch.cos(angle))).long().sort(1).values
    frames = history.permute(0, 3, 1, 2, 4, 5)  # [B P V 4 h w]
    return schedule.diffuse(frames, draw.normal(frames.shape), times).permute(0, 2, 3, 1, 4, 5)


def _drop(values: Tensor, drop: Tensor) -> Tensor:
    return values * (~drop).to(values).reshape(-1, *(1,) * (values.dim() - 1))


class _Random:
    """Draws on the generator's device and moves the results to that of the batch.

    The first axis is the batch; `share` (see `training_loss`) selects a part of it.
    """

    def __init__(
        self,
        generator: torch.Generator | None,
        like: Tensor,
        share: tuple[int, int] | None = None,
    ):
        self._like = like
        self._first, self._total = share or (0, len(like))
        self._given = {
            "generator": generator,
            "device": generator.device if generator is not None else like.device,
        }

    def uniform(self, shape) -> Tensor:
        return self._draw(torch.rand, shape).to(self._like.device)

    def normal(self, shape) -> Tensor:
        return self._draw(torch.randn, shape).to(self._like)

    def integers(self, low: int, high: int, shape) -> Tensor:
        return self._draw(functools.partial(torch.randint, low, high), shape).to(self._like.device)

    def _draw(self, draw: Callable[..., Tensor], shape) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not shape:  # one number for the whole batch
            return draw(shape, **self._given)
        whole = draw((self._total, *shape[1:]), **self._given)
        return whole[self._first : self._first + shape[0]]
