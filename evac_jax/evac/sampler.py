"""Sampling of a chunk with EVAC's per-step input scale, and classifier-free guidance.

The sampler is DDIM, as in the public model, or a higher-order solver of diffusers that needs fewer
steps. Only the frames to imagine are updated in each step. The references restore the clean history
after each step, which has the same result.

Source: "Denoising Diffusion Implicit Models" (Song et al., 2020), eq. 12; v prediction from
"Progressive Distillation" (Salimans and Ho, 2022); guidance rescale from Lin et al. (2023), 3.4.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evac_jax.errors import ConfigError
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.lean_imports import lean_imports
from evac_jax.evac.schedule import DdimTable, checkpoint_tables, ddim_table

with lean_imports("diffusers"):
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

Denoiser = Callable[[Tensor, Tensor], Tensor]
Noise = torch.Generator | Callable[[int], Tensor] | None
SOLVERS = ("ddim", "dpm++", "unipc")
GUIDANCE_RESCALE = 0.7  # share of the rescaled prediction that upstream's inference uses


def ddim_update(
    x: Tensor, v: Tensor, index: int, table: DdimTable, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step from table entry `index` to the one below it.

    x0 = (sqrt(a) x - sqrt(1-a) v) scale_prev / scale
    x' = sqrt(a_prev) x0 + sqrt(max(1 - a_prev - sigma^2, 0)) eps + sigma noise

    Args:
        x: latents at timestep `table.timesteps[index]`.
        v: network output, shaped like `x`.
        index: position in the table, 0 = smallest timestep.
        table: factors of this sampler.
        noise: standard normal, shaped like `x`; required when `table.sigmas[index] > 0`.

    Returns:
        (x', x0), x0 with the step's scale applied.
    """
    alpha, alpha_prev = float(table.alphas[index]), float(table.alphas_prev[index])
    sigma = float(table.sigmas[index])
    signal, spread = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    clean = (signal * x - spread * v) * (float(table.scale_prev[index]) / float(table.scale[index]))
    eps = signal * v + spread * x
    # At zero signal and eta 1 the remainder is zero up to a rounding error of either sign. It is
    # float32, as in the references, because the square root of that error is visible (2e-4).
    remainder = np.float32(1) - np.float32(alpha_prev) - np.float32(sigma) ** 2
    toward = math.sqrt(max(float(remainder), 0.0))
    moved = math.sqrt(alpha_prev) * clean + toward * eps
    if sigma > 0:
        if noise is None:
            raise ValueError(f"step {index} has sigma {sigma:.4g} > 0 and needs noise")
        moved = moved + sigma * noise
    return moved, clean


def guide(v: Tensor, v_uncond: Tensor, scale: float, rescale: float = GUIDANCE_RESCALE) -> Tensor:
    """Guided prediction v_u + s (v_c - v_u), rescaled towards the standard deviation of v_c.

    Args:
        v: [N, ...] conditional prediction, history frames included.
        v_uncond: unconditional prediction, same shape.
        scale: guidance scale s; 1 returns `v` up to rounding.
        rescale: 0 keeps the plain guided prediction, 1 takes v_c's standard deviation.
    """
    guided = v_uncond + scale * (v - v_uncond)
    axes = tuple(range(1, v.dim()))
    ratio = v.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return rescale * guided * ratio + (1 - rescale) * guided


@torch.no_grad()
def sample(
    denoise: Denoiser,
    history: Tensor,
    noise: Tensor,
    table: DdimTable,
    generator: Noise = None,
    consistent_scale: bool = False,
) -> Tensor:
    """Imagine a chunk of latents by DDIM.

    Args:
        denoise: (x [N, 4, T, h, w], timesteps [N] int64) -> v, same shape as x.
        history: [N, 4, n_previous, h, w] clean latents.
        noise: [N, 4, chunk, h, w] standard normal start.
        table: timesteps and factors.
        generator: source of the fresh noise if eta > 0; None is torch's default one. It may be a
            function from a step's index in the table to noise, of any shape with the same number
            of entries.
        consistent_scale: as of `EvacConfig`.

    Returns:
        [N, 4, chunk, h, w]. With `consistent_scale` these are the clean latents of the last step.
        Else they are multiplied by the scale of the smallest timestep, and a little noise is left;
        the public model decodes and stores its latents in this form.
    """
    past = history.shape[2]
    x = noise
    for index in range(len(table.timesteps) - 1, -1, -1):
        timesteps = torch.full(
            (x.shape[0],), int(table.timesteps[index]), dtype=torch.long, device=x.device
        )
        scale = float(table.scale[index])
        seen = history * scale if consistent_scale else history
        v = denoise(torch.cat((seen, x), 2), timesteps)[:, :, past:]
        fresh = _fresh(generator, index, x) if table.sigmas[index] > 0 else None
        x, clean = ddim_update(x, v, index, table, fresh)
    # `clean` still has the scale of the smallest timestep, which has no step below it.
    return clean / scale if consistent_scale else x


def _fresh(generator: Noise, index: int, x: Tensor) -> Tensor:
    if callable(generator):
        return generator(index).reshape(x.shape).to(x)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def check_solver(solver: str, eta: float) -> None:
    """Check that a solver exists and supports eta.

    Raises:
        ConfigError: an unknown name, or an eta that the solver does not support.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"solver: expected one of {SOLVERS}, got {solver!r}")
    allowed = {"dpm++": (0.0, 1.0), "unipc": (0.0,)}.get(solver, (eta,))
    if eta not in allowed:
        choices = " or ".join(f"{value:g}" for value in allowed)
        raise ConfigError(f"solver {solver!r} needs eta {choices}, got {eta:g}; 'ddim' takes any")


def solve(
    solver: str,
    config: EvacConfig,
    denoise: Denoiser,
    history: Tensor,
    noise: Tensor,
    *,
    steps: int,
    eta: float,
    generator: Noise = None,
) -> Tensor:
    """Imagine a chunk of latents by the named solver.

    Args:
        solver: "ddim"; "dpm++", the second-order multistep DPM-Solver++ (eta 0: its ODE, eta 1: its
            SDE); "unipc", second-order, for eta 0.
        config: schedule constants.
        denoise, history, noise, generator: see `sample`.
        steps: calls of `denoise`; all solvers use the same timesteps.
        eta: 0 deterministic, 1 ancestral.

    Returns:
        As `sample`. Without `config.consistent_scale` all solvers end at timestep 0, where 3 % of
        noise is left.

    Raises:
        ConfigError: see `check_solver`.
        ValueError: for steps out of range or negative eta.
    """
    check_solver(solver, eta)
    table = ddim_table(config, steps, eta)
    if solver == "ddim":
        return sample(denoise, history, noise, table, generator, config.consistent_scale)
    return _multistep(solver, config, denoise, history, noise, table, eta, generator)


@torch.no_grad()
def _multistep(solver, config, denoise, history, noise, table, eta, generator) -> Tensor:
    """Sample by a solver of diffusers, for variance-preserving processes x = a x0 + s eps only.

    EVAC's process has signal a = scale * sqrt(alpha), so a^2 + s^2 < 1. The process of x / norm,
    norm = sqrt(a^2 + s^2), preserves the variance. So the solver works on x / norm, and on x0
    instead of v.
    """
    tables = checkpoint_tables(config)
    kept = tables["alphas_cumprod"].astype(np.float64)
    scale = tables["scale_arr"][: len(kept)].astype(np.float64)
    norm = np.sqrt(scale**2 * kept + 1 - kept)
    share = scale**2 * kept / norm**2
    options: dict = {
        "num_train_timesteps": len(kept),
        "trained_betas": 1 - np.append(share[:1], share[1:] / share[:-1]),
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
        "final_sigmas_type": "sigma_min",
        "rescale_betas_zero_snr": True,  # the betas are rescaled already; avoids an infinite ratio
    }
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(**options)
    else:
        kind = "sde-dpmsolver++" if eta else "dpmsolver++"
        scheduler = DPMSolverMultistepScheduler(algorithm_type=kind, **options)
    scheduler.set_timesteps(len(table.timesteps))
    past, x = history.shape[2], noise
    for index in range(len(table.timesteps) - 1, -1, -1):
        time = int(table.timesteps[index])
        y, x = x, x * float(norm[time])
        timesteps = torch.full((x.shape[0],), time, dtype=torch.long, device=x.device)
        seen = history * float(scale[time]) if config.consistent_scale else history
        v = denoise(torch.cat((seen, x), 2), timesteps)[:, :, past:]
        clean = (math.sqrt(kept[time]) * x - math.sqrt(1 - kept[time]) * v) / float(scale[time])
        fresh = {"variance_noise": _fresh(generator, index, x)} if eta else {}
        x = scheduler.step(clean, scheduler.timesteps[-1 - index], y, **fresh).prev_sample
    return clean if config.consistent_scale else x * float(table.scale[0])
