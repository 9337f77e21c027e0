"""Inputs of the denoiser besides the noisy latents: rays, pose deltas, concatenated channels.

Imagination and training use them; trajectory maps are in `trajectory_maps`. The batch axis is
first, V views and T frames follow. Latents are `[B, V, 4, T, h, w]`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from evac_jax.evac.config import EvacConfig
from evac_jax.evac.trajectory_maps import quaternion_to_matrix


def scale_intrinsic(intrinsic: Tensor, size_from, size_to) -> Tensor:
    """Intrinsics [..., 3, 3] of an image of (height, width) `size_from`, for `size_to`."""
    height, width = size_to[0] / size_from[0], size_to[1] / size_from[1]
    factor = intrinsic.new_tensor(((width, 1, width), (1, height, height), (1, 1, 1)))
    return intrinsic * factor


def ray_maps(intrinsic: Tensor, c2w: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Viewing rays through the centres of the cells of a grid.

    d = R ((x - cx) / fx, (y - cy) / fy, 1) / |.|, o = t, for c2w = [R t]. The camera looks along
    +Z, even if the trajectory maps are drawn by the "fork" renderer, which assumes -Z.

    Args:
        intrinsic: [..., 3, 3] in units of the grid's cells.
        c2w: [..., 4, 4] camera to world, metres.
        size: (height, width) of the grid.

    Returns:
        direction (unit length) and origin, each [..., 3, height, width].
    """
    height, width = size
    y = torch.arange(height, device=c2w.device, dtype=c2w.dtype) + 0.5
    x = torch.arange(width, device=c2w.device, dtype=c2w.dtype) + 0.5
    fx, fy = intrinsic[..., 0, 0, None], intrinsic[..., 1, 1, None]
    cx, cy = intrinsic[..., 0, 2, None], intrinsic[..., 1, 2, None]
    across = ((x - cx) / fx)[..., None, :].expand(*fx.shape[:-1], height, width)
    along = ((y - cy) / fy)[..., None].expand(*fx.shape[:-1], height, width)
    camera = torch.stack((across, along, torch.ones_like(across)), -3)  # [... 3 h w]
    direction = torch.einsum("...ij,...jhw->...ihw", c2w[..., :3, :3], camera)
    direction = direction / direction.norm(dim=-3, keepdim=True)
    origin = c2w[..., :3, 3, None, None].expand_as(direction)
    return direction, origin


def ray_channels(intrinsic: Tensor, c2w: Tensor, image_size, latent_size) -> Tensor:
    """[B, V, 6, T, h, w]: ray directions, then origins, at latent resolution.

    Args:
        intrinsic: [B or 1, V, 3, 3] pixels of the image.
        c2w: [B or 1, V, T, 4, 4].
        image_size: (height, width) pixels.
        latent_size: (h, w) cells.
    """
    scaled = scale_intrinsic(intrinsic, image_size, latent_size)
    direction, origin = ray_maps(scaled[:, :, None], c2w, latent_size)
    return torch.cat((direction, origin), 3).transpose(2, 3)


def euler_xyz(quaternion: Tensor) -> Tensor:
    """Extrinsic x-y-z angles [..., 3] (radians) of quaternions [..., 4] (xyzw), any length.

    At +-90 degrees about y the third angle is set to zero, as scipy does.
    """
    m = quaternion_to_matrix(quaternion)
    cos_y = torch.hypot(m[..., 0, 0], m[..., 1, 0])
    locked = cos_y < 1e-7
    x = torch.where(
        locked,
        torch.atan2(-m[..., 1, 2], m[..., 1, 1]),
        torch.atan2(m[..., 2, 1], m[..., 2, 2]),
    )
    y = torch.atan2(-m[..., 2, 0], cos_y)
    z = torch.where(locked, 0.0, torch.atan2(m[..., 1, 0], m[..., 0, 0]))
    return torch.stack((x, y, z), -1)


def delta_actions(poses: Tensor, config: EvacConfig, *, normalize: bool = True) -> Tensor:
    """Change of pose from each frame to the next, and the gripper reading of the later frame.

    Args:
        poses: [B, n, 16]; left then right arm, each xyz (metres), quaternion xyzw, gripper.
        config: gives `delta_mean`, `delta_std`, `delta_std_factor` and `gripper_scale`.
        normalize: False returns metres and radians.

    Returns:
        [B, n - 1, 14]: left translation 3, rotation 3 (difference of Euler angles, wrapped to
        (-pi, pi]), gripper / `gripper_scale`; then the right arm.
    """
    arms = poses.double().unflatten(-1, (2, 8))
    moved = arms[:, 1:, :, :3] - arms[:, :-1, :, :3]
    angles = euler_xyz(arms[..., 3:7])
    turned = torch.remainder(angles[:, 1:] - angles[:, :-1], 2 * math.pi)
    turned = torch.where(turned > math.pi, turned - 2 * math.pi, turned)
    motion = torch.cat((moved, turned), -1)  # [B n-1 2 6]
    if normalize:
        factor = config.delta_std_factor
        mean = motion.new_tensor(config.delta_mean).unflatten(0, (2, 6))
        std = motion.new_tensor(config.delta_std).unflatten(0, (2, 6))
        motion = (motion - factor * mean) / (factor * std)
    gripper = arms[:, 1:, :, 7:] / config.gripper_scale
    return torch.cat((motion, gripper), -1).flatten(2).float()


def window_deltas(window: Tensor, config: EvacConfig) -> Tensor:
    """[B, chunk, 14] deltas of a pose window [B, n_previous + chunk, 16] (the fork's rule)."""
    return delta_actions(window[:, config.n_previous - 1 :], config)


def image_condition(history: Tensor, chunk: int) -> Tensor:
    """History latents [B, V, 4, n_previous, h, w], followed by `chunk` copies of the last one."""
    copies = history[:, :, :, -1:].expand(-1, -1, -1, chunk, -1, -1)
    return torch.cat((history, copies), 3)


def concat_channels(condition: Tensor, map_latents: Tensor, rays: Tensor, mask: Tensor) -> Tensor:
    """The 15 channels that are concatenated with the noisy latents at the denoiser's input.

    Args:
        condition: [B, V, 4, T, h, w] from `image_condition`.
        map_latents: [B, V, 4, chunk, h, w] encoded trajectory maps of the chunk; the history
            frames get exact zeros, not an encoded blank map.
        rays: [B or 1, V, 6, T, h, w].
        mask: [B or 1] 1 keeps the image condition on the chunk frames, 0 hides it.

    Returns:
        [B, V, 15, T, h, w]: image condition 4, mask 1, map latents 4, ray direction 3, origin 3.
    """
    batch, views, _, frames, height, width = condition.shape
    chunk = map_latents.shape[3]
    flag = condition.new_ones(batch, 1, 1, frames, 1, 1)
    flag[:, :, :, frames - chunk :] = mask.to(flag).reshape(-1, 1, 1, 1, 1, 1)
    maps = F.pad(map_latents, (0, 0, 0, 0, frames - chunk, 0))
    return torch.cat(
        (
            condition * flag,
            flag.expand(-1, views, -1, -1, height, width),
            maps,
            rays.expand(batch, -1, -1, -1, -1, -1),
        ),
        2,
    )
