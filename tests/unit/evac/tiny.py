"""The smallest EVAC model that still has every part, for unit tests."""

import torch
from torch import Tensor

from evac_jax.evac.conditioning import window_deltas
from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    ImageTowerConfig,
    MapConfig,
    ResamplerConfig,
    UNetConfig,
)
from evac_jax.evac.diffusion_loss import TrainingBatch
from evac_jax.evac.model import Camera, EvacModel

RESAMPLER = ResamplerConfig(
    dim=32, depth=1, dim_head=16, heads=2, num_queries=2, ff_mult=2, output_dim=16
)
TINY = EvacConfig(
    image_size=(32, 32),
    chunk=3,
    n_previous=3,
    delta_mean=(0.0,) * 12,
    delta_std=(0.1,) * 12,
    delta_std_factor=1.0,
    gripper_scale=1.0,
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(1,),
        num_head_channels=16,
        init_heads=2,
        context_dim=16,
        action_tokens=2,
    ),
    autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 1, 1), num_res_blocks=1),
    action_resampler=RESAMPLER.replace(embedding_dim=14),
    image_resampler=RESAMPLER.replace(embedding_dim=32),
    image_tower=ImageTowerConfig(
        width=32, layers=1, head_width=16, image_size=28, mlp_ratio=2.0, embed_dim=8
    ),
    maps=MapConfig(renderer="upstream", radius=4, thickness=2, tool_offset=0.0, arms=1),
)


def tiny_model(n_view: int = 1) -> EvacModel:
    """Random weights, none of them zero, so that every input matters."""
    torch.manual_seed(0)
    model = EvacModel(TINY.replace(n_view=n_view)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


def camera(n_view: int = 1) -> Camera:
    """Looks along +Z from one metre before the workspace."""
    intrinsic = torch.tensor([[30.0, 0, 16], [0, 30, 16], [0, 0, 1]]).expand(1, n_view, 3, 3)
    c2w = torch.eye(4).repeat(1, n_view, 1, 1)
    c2w[..., 2, 3] = -1.0
    return Camera(intrinsic, c2w)


def poses(batch: int, count: int) -> torch.Tensor:
    """Smooth random pose windows [batch, count, 16]."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(batch, count, 8, generator=generator) * 0.02
    arm = steps.cumsum(1) + torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 0.5])
    return arm.repeat(1, 1, 2)


def start_frames(batch: int, n_view: int = 1) -> torch.Tensor:
    """Random frames [batch, V, 3, 32, 32] in [-1, 1]."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, n_view, 3, 32, 32, generator=generator) * 2 - 1


@torch.no_grad()
def encode_batch(model: EvacModel, frames: Tensor, poses: Tensor, camera: Camera) -> TrainingBatch:
    """Run the frozen parts on raw data.

    Args:
        model: gives autoencoder and configuration.
        frames: [B, V, T, 3, H, W] in [-1, 1].
        poses: [B, T, 16] of the same frames.
        camera: `c2w` at rest or along the T frames.
    """
    config = model.config
    past = config.n_previous
    c2w = camera.along(config.frames)
    return TrainingBatch(
        latents=model.encode(frames).transpose(2, 3),
        map_latents=model.encode_maps(poses[:, past:], camera.intrinsic, c2w[:, :, past:]),
        rays=model.rays(camera.intrinsic, c2w),
        deltas=window_deltas(poses, config),
        images=frames[:, :, :past],
    )
