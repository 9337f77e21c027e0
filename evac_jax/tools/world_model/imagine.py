"""Imagines recorded episodes again, using only their first frames and their poses.

Validation during training, the trust report and film strips use it to judge a world model. PyTorch
only.
"""

import numpy as np
import torch
from torch import Tensor

from evac_jax.errors import ConfigError, DataError
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import Camera, EvacModel
from evac_jax.files.recordings import Episodes
from evac_jax.sim.actions import both_arms
from evac_jax.sim.pixels import to_uint8


def camera_of(data: Episodes, device: torch.device | str = "cpu") -> Camera:
    """Return the fixed cameras of recorded episodes, which all of them share."""
    matrices = (torch.from_numpy(np.array(m))[None].to(device) for m in (data.intrinsic, data.c2w))
    return Camera(*matrices)


def to_images(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).to(device).movedim(-1, -3).float() / 127.5 - 1


def check_fits(config: EvacConfig, data: Episodes) -> None:
    """Check that the pictures of episodes fit the world model.

    Raises:
        DataError: they have another image size or number of views.
    """
    views, height, width = data.frames.shape[1:4]
    if (views, height, width) != (config.n_view, *config.image_size):
        raise DataError(
            f"the world model takes {config.n_view} view(s) of {config.image_size[0]}x"
            f"{config.image_size[1]} pixels, the episodes have {views} of {height}x{width}; "
            "record them at that size, or train a world model of theirs"
        )


def check_steps(config: EvacConfig, steps: int, flag: str) -> None:
    """Check that a world model can be sampled in so many denoising steps.

    Args:
        flag: that asks for them.

    Raises:
        ConfigError: it was trained with fewer.
    """
    if not 1 <= steps <= config.num_timesteps:
        raise ConfigError(
            f"{flag}: expected 1 to {config.num_timesteps}, the diffusion steps of the world "
            f"model, got {steps}"
        )


@torch.inference_mode()
def imagine_episodes(
    model: EvacModel,
    data: Episodes,
    *,
    steps: int,
    eta: float,
    generator: torch.Generator,
    batch: int = 32,
    length: int | None = None,
) -> np.ndarray:
    """Imagine episodes chunk by chunk, each chunk from the imagined ones before it.

    Args:
        model: in eval mode, on any device.
        data: episodes of equal length T, or longer than `length`. If the episode ends within the
            last chunk, the chunk is imagined with the last pose repeated, and then shortened.
        steps: denoising steps.
        eta: 0 = deterministic given the start noise, 1 = ancestral sampling.
        generator: on the model's device; used batch by batch, so the noise of an episode depends
            on its position and on `batch`.
        batch: episodes imagined at once; it limits the memory.
        length: number of actions T to imagine; None = whole episodes.

    Returns:
        uint8 [N T V H W 3]; frame t is the result of action t.

    Raises:
        DataError: the pictures do not fit the model, or the lengths differ.
    """
    check_fits(model.config, data)
    poses = data.stacked("poses", length)
    real = data.frames[data.first]
    actions = poses.shape[1] - 1
    out = np.empty((len(poses), actions, *real.shape[1:]), np.uint8)
    camera = camera_of(data, model.device)
    for first in range(0, len(poses), batch):
        rows = slice(first, first + batch)
        frames = _imagine(
            model,
            to_images(real[rows], model.device),
            torch.from_numpy(np.array(poses[rows])).to(model.device),
            camera,
            steps=steps,
            eta=eta,
            generator=generator,
        )
        out[rows] = frames[:, :actions]
    return out


def _imagine(
    model: EvacModel, start: Tensor, poses: Tensor, camera: Camera, **sampling
) -> np.ndarray:
    """uint8 [B, chunks * chunk, V, H, W, 3] from start [B, V, 3, H, W] and poses [B, T + 1, 8]."""
    past, chunk = model.config.n_previous, model.config.chunk
    chunks = -(-(poses.shape[1] - 1) // chunk)
    missing = chunks * chunk + 1 - poses.shape[1]
    poses = both_arms(poses)
    held = (poses[:, :1].expand(-1, past - 1, -1), poses, poses[:, -1:].expand(-1, missing, -1))
    poses = torch.cat(held, 1)
    state = model.start(start, chunks)
    frames = []
    for k in range(chunks):
        window = poses[:, k * chunk : k * chunk + past + chunk]
        state, imagined = model.imagine(state, window, camera, **sampling)
        frames.append(to_uint8(imagined).transpose(1, 2).cpu())
    return torch.cat(frames, 1).numpy()


def chunk_psnr(imagined: np.ndarray, real: np.ndarray, chunk: int) -> list[float]:
    """PSNR (dB) of each chunk, over all episodes and pixels together.

    Args:
        imagined: uint8 [N T V H W 3].
        real: of the same shape.
        chunk: actions of a chunk; the last chunk may be shorter.
    """
    values = []
    for first in range(0, imagined.shape[1], chunk):
        columns = slice(first, first + chunk)
        error = imagined[:, columns].astype(np.float32) - real[:, columns]
        values.append(float(10 * np.log10(255**2 / np.maximum(np.square(error).mean(), 1e-6))))
    return values
