"""Noise schedule of EVAC: betas with zero terminal signal, per-step input scale, DDIM tables.

The tables are computed once in float64 on the host and then cast. The schedulers of diffusers are
not used, because they have no per-step input scale and another zero-SNR rounding.

Source: "Common diffusion noise schedules and sample steps are flawed" (Lin et al., 2023), section
3.1, for the rescaling; specification of EnerVerse-AC's buffers for the rest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evac_jax.evac.config import EvacConfig

LINEAR_START, LINEAR_END = 0.00085, 0.012  # of the betas, before the rescaling
MIN_VARIANCE = 1e-20  # floor before the logarithm of the posterior variance


def zero_snr_betas(num_timesteps: int) -> np.ndarray:
    """[num_timesteps] float64 betas; at the last step no signal is left."""
    betas = np.linspace(LINEAR_START**0.5, LINEAR_END**0.5, num_timesteps) ** 2
    signal = np.sqrt(np.cumprod(1.0 - betas))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    squared = signal**2
    return 1.0 - np.concatenate((squared[:1], squared[1:] / squared[:-1]))


def input_scale(config: EvacConfig) -> np.ndarray:
    """[num_timesteps + turning_step] float64 factors of clean latents, from 1 to base_scale."""
    ramp = np.linspace(1.0, config.base_scale, config.turning_step)
    return np.concatenate((ramp, np.full(config.num_timesteps, config.base_scale)))


def checkpoint_tables(config: EvacConfig) -> dict[str, np.ndarray]:
    """Every schedule buffer of the public checkpoints, float32, under its name there."""
    betas = zero_snr_betas(config.num_timesteps)
    kept = np.cumprod(1.0 - betas)
    previous = np.append(1.0, kept[:-1])
    with np.errstate(divide="ignore"):
        log_noise = np.log(1.0 - kept)
    variance = betas * (1.0 - previous) / (1.0 - kept)
    tables = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - kept),
        "log_one_minus_alphas_cumprod": log_noise,
        # Both are undefined at zero signal and unused under v prediction.
        "sqrt_recip_alphas_cumprod": np.zeros_like(kept),
        "sqrt_recipm1_alphas_cumprod": np.zeros_like(kept),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, MIN_VARIANCE)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - kept),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - kept),
        "scale_arr": input_scale(config),
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}


@dataclass(frozen=True)
class Schedule:
    """Tables of the forward process on one device, float32, indexed by timestep.

    Attributes:
        signal: [num_timesteps] sqrt(alpha_cumprod), factor of the clean latents.
        noise: [num_timesteps] sqrt(1 - alpha_cumprod), factor of the noise.
        scale: [num_timesteps] input scale of the clean latents.
    """

    signal: Tensor
    noise: Tensor
    scale: Tensor

    @classmethod
    def create(cls, config: EvacConfig, device=None) -> "Schedule":
        """Build the tables for `config`."""
        tables = checkpoint_tables(config)
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "scale_arr")
        columns = (torch.from_numpy(tables[n][: config.num_timesteps]).to(device) for n in names)
        return cls(*columns)

    def diffuse(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a_t) clean + sqrt(1 - a_t) noise, `timesteps` broadcast from the left."""
        return _left(self.signal[timesteps], clean) * clean + (
            _left(self.noise[timesteps], clean) * noise
        )

    def v_target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Training target sqrt(a_t) noise - sqrt(1 - a_t) clean."""
        return _left(self.signal[timesteps], clean) * noise - (
            _left(self.noise[timesteps], clean) * clean
        )


def _left(table: Tensor, like: Tensor) -> Tensor:
    return table.reshape(*table.shape, *(1,) * (like.dim() - table.dim()))


@dataclass(frozen=True)
class DdimTable:
    """Host-side tables of one sampler; index 0 is the smallest timestep.

    Attributes:
        timesteps: [steps] int64.
        alphas: [steps] float32 alpha_cumprod.
        alphas_prev: [steps] float64 alpha_cumprod of the next lower entry.
        sigmas: [steps] float64 standard deviation of the fresh noise.
        scale: [steps] float32 input scale.
        scale_prev: [steps] float32 input scale of the next lower entry.
    """

    timesteps: np.ndarray
    alphas: np.ndarray
    alphas_prev: np.ndarray
    sigmas: np.ndarray
    scale: np.ndarray
    scale_prev: np.ndarray


def ddim_table(config: EvacConfig, steps: int, eta: float) -> DdimTable:
    """Timesteps at equal distances down from the last one ("uniform trailing"), and their factors.

    Args:
        config: schedule constants.
        steps: denoising steps, 1..num_timesteps.
        eta: 0 deterministic, 1 ancestral.

    Raises:
        ValueError: for steps out of range or negative eta.
    """
    total = config.num_timesteps
    if not 1 <= steps <= total or eta < 0:
        raise ValueError(f"DDIM needs 1..{total} steps and eta >= 0, got {steps} and {eta}")
    spacing = total / steps
    timesteps = np.round(np.arange(total, 0, -spacing)).astype(np.int64)[::-1][-steps:] - 1
    tables = checkpoint_tables(config)
    kept, scale = tables["alphas_cumprod"], tables["scale_arr"]
    alphas = kept[timesteps]
    alphas_prev = np.append(kept[:1], kept[timesteps[:-1]]).astype(np.float64)
    a = alphas.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - a) * (1 - a / alphas_prev))
    scales = scale[timesteps]
    return DdimTable(
        timesteps=timesteps.copy(),
        alphas=alphas,
        alphas_prev=alphas_prev,
        sigmas=np.nan_to_num(sigmas),
        scale=scales,
        scale_prev=np.append(scales[:1], scales[:-1]),
    )
