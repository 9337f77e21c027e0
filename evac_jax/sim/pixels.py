"""Frames as the world model has them, floats in [-1, 1], and as everything else does, uint8."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_model_range(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return uint8 images [B V H W 3] as float32 [B V 3 h w] in [-1, 1] at `size` (h, w).

    Resized bilinearly without antialiasing, as the world model's start frames were in training.
    """
    batch, views = images.shape[:2]
    flat = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    if tuple(flat.shape[-2:]) != tuple(size):
        flat = F.interpolate(flat, size=tuple(size), mode="bilinear", align_corners=False)
    return ((flat - 0.5) / 0.5).unflatten(0, (batch, views))


def to_uint8(frames: Tensor) -> Tensor:
    """Return frames [.. 3 H W] in [-1, 1] as uint8 [.. H W 3], truncated, not rounded.

    Truncation darkens by half a grey level on average. The public policies were trained on frames
    made this way, so it stays.
    """
    scaled = (frames.float() + 1) / 2 * 255
    return scaled.clamp(0, 255).to(torch.uint8).movedim(-3, -1)
