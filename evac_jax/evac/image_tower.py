"""CLIP image tower: maps frames in [-1, 1] to the tokens of all patches.

The network is open_clip's `VisionTransformer`; this module prepares the pixels. Parameter names
are those of public checkpoints (`embedder.model.visual.*`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evac_jax.evac.config import ImageTowerConfig
from evac_jax.evac.lean_imports import lean_imports

with lean_imports("open_clip"):
    from open_clip.transformer import VisionTransformer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def gaussian_kernel(sigma: float, like: Tensor) -> Tensor:
    """Normalised kernel of odd length, two standard deviations to each side, at least 3 taps."""
    size = max(int(4 * sigma), 3) | 1
    x = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    weight = torch.exp(-(x**2) / (2 * sigma**2))
    return weight / weight.sum()


def resize_antialiased(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames [N, C, H, W] at `size`: Gaussian blur if any axis shrinks, then bicubic.

    The standard deviation of the blur is (factor - 1) / 2 per axis. Borders are reflected and
    corners are aligned, as in kornia's `resize(antialias=True)`.
    """
    factors = [have / want for have, want in zip(frames.shape[-2:], size, strict=True)]
    if max(factors) > 1:
        channels = frames.shape[1]
        vertical, horizontal = (gaussian_kernel(max((f - 1) / 2, 0.001), frames) for f in factors)
        pad_y, pad_x = len(vertical) // 2, len(horizontal) // 2
        frames = F.pad(frames, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
        for kernel in (horizontal[None, :], vertical[:, None]):
            weight = kernel.expand(channels, 1, -1, -1)
            frames = F.conv2d(frames, weight, groups=channels)
    return F.interpolate(frames, size=size, mode="bicubic", align_corners=True)


class ImageTower(nn.Module):
    """All patch tokens, class token first, without the final norm and projection.

    Difference from the reference: it does not hold CLIP's text weights.

    Source: AgibotTech/EnerVerse-AC, its frozen OpenCLIP image embedder; open_clip 2.22 semantics.
    """

    def __init__(self, config: ImageTowerConfig):
        super().__init__()
        self.config = config
        visual = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.width // config.head_width,
            mlp_ratio=config.mlp_ratio,
            output_dim=config.embed_dim,
        )
        self.model = nn.ModuleDict({"visual": visual})

    def preprocess(self, frames: Tensor) -> Tensor:
        """Normalised pixels [N, 3, image_size, image_size] of frames [N, 3, H, W] in [-1, 1]."""
        frames = resize_antialiased(frames, (self.config.image_size,) * 2)
        mean, std = (torch.tensor(c).to(frames).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
        return ((frames + 1) / 2 - mean) / std

    def tokens(self, pixels: Tensor) -> Tensor:
        """[N, 1 + patches, width] of preprocessed pixels."""
        visual = self.model["visual"]
        patches = visual.conv1(pixels).flatten(2).mT
        first = visual.class_embedding.expand(len(patches), 1, -1)
        x = visual.ln_pre(torch.cat((first, patches), dim=1) + visual.positional_embedding)
        blocks = visual.transformer.resblocks
        # Old versions of open_clip are sequence-first, new ones batch-first; the blocks know which.
        batch_first = blocks[0].attn.batch_first
        x = x if batch_first else x.transpose(0, 1)
        for block in blocks:
            x = block(x)
        return x if batch_first else x.transpose(0, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """[N, 1 + patches, width] of frames [N, 3, H, W] in [-1, 1], any size."""
        return self.tokens(self.preprocess(frames))
