"""The fused vision backbone: DINOv2 with registers and SigLIP, and the projector to the Llama.

The output of a tower is taken after its second-to-last block, without the final norm. The last
block, the final norm and SigLIP's attention pooling are kept as `UnusedParam`s, not computed.

Source: timm 0.9 `VisionTransformer` (vit_large_patch14_reg4_dinov2, vit_so400m_patch14_siglip_224)
as used by moojink/openvla-oft. Difference: the reference computes the last block and discards it.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig
from policies.openvla_oft.kernels import gelu
from policies.openvla_oft.layers import LayerNorm, Linear, Maker, attend, run_layers

# For a fresh model only; checkpoints have their own values. This is CaiT's value for shallow
# networks: with DINOv2's 1e-5 a small tower would stay close to the identity for a long time.
LAYER_SCALE_INIT = 0.1


class PatchEmbed(Linear):
    """Maps non-overlapping patches to vectors, row by row."""

    def __init__(self, make: Maker, patch: int, width: int):
        super().__init__(make, (patch, patch, 3), width)

    def __call__(self, pixels: Float[Array, "N H W 3"]) -> Float[Array, "N P D"]:
        n, height, width, channels = pixels.shape
        p = self.shape_in[0]
        patches = pixels.reshape(n, height // p, p, width // p, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, p * p * channels)
        return super().__call__(patches)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused qkv projection, split as [3, heads, head dim]."""

    def __init__(self, config: OpenVLAOFTConfig, tower: VisionTowerConfig, make: Maker):
        self.config, self.heads = config, tower.heads
        self.qkv = Linear(make, tower.width, 3 * tower.width)
        self.proj = Linear(make, tower.width, tower.width)

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        return self.proj(attend(self.config, qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))


class MLP(nnx.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, tower: VisionTowerConfig, make: Maker):
        self.fc1 = Linear(make, tower.width, tower.mlp_width)
        self.fc2 = Linear(make, tower.mlp_width, tower.width)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.fc2(gelu(self.fc1(x)))


class LayerScale(nnx.Module):
    """Learned scale per channel."""

    def __init__(self, make: Maker, width: int):
        self.scale_factor = make.constant((width,), LAYER_SCALE_INIT)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x * self.scale_factor[...].astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm ViT block."""

    def __init__(self, config: OpenVLAOFTConfig, tower: VisionTowerConfig, make: Maker):
        self.norm1 = LayerNorm(make, tower.width)
        self.attn = Attention(config, tower, make)
        self.norm2 = LayerNorm(make, tower.width)
        self.mlp = MLP(tower, make)
        self.ls1 = LayerScale(make, tower.width) if tower.layer_scale else None
        self.ls2 = LayerScale(make, tower.width) if tower.layer_scale else None

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        attended = self.attn(self.norm1(x))
        x = x + (attended if self.ls1 is None else self.ls1(attended))
        mixed = self.mlp(self.norm2(x))
        return x + (mixed if self.ls2 is None else self.ls2(mixed))


class AttentionPool(nnx.Module):
    """SigLIP's pooling head: kept for export, never computed."""

    def __init__(self, tower: VisionTowerConfig, make: Maker):
        width = tower.width
        self.latent = make.constant((1, 1, width), 0.0)
        self.q = Linear(make, width, width)
        self.kv = Linear(make, width, 2 * width)
        self.proj = Linear(make, width, width)
        self.norm = LayerNorm(make, width)
        self.mlp = MLP(tower, make)


class VisionTower(nnx.Module):
    """One ViT up to its second-to-last block."""

    def __init__(self, config: OpenVLAOFTConfig, tower: VisionTowerConfig, make: Maker):
        self.config, self.tower = config, tower
        width = tower.width
        self.cls_token = make.normal((1, 1, width), 0.02) if tower.class_token else None
        registers = (1, tower.register_tokens, width)
        self.reg_token = make.normal(registers, 0.02) if tower.register_tokens else None
        self.pos_embed = make.normal((1, config.num_patches, width), 0.02)
        self.patch_embed = PatchEmbed(make, config.patch_size, width)
        self.blocks = Block(config, tower, make.stacked(tower.depth - 1))
        self.last_block = Block(config, tower, make.unused())
        self.norm = LayerNorm(make.unused(), width)
        self.attn_pool = AttentionPool(tower, make.unused()) if tower.attention_pool else None

    def __call__(
        self, pixels: Float[Array, "N H W 3"], *, collect: bool = False
    ) -> tuple[Float[Array, "N P D"], Float[Array, "depth N S D"] | None]:
        """Return patch features and, with `collect`, each block's output, prefix included."""
        x = self.patch_embed(pixels)
        x = x + self.pos_embed[...].astype(x.dtype)
        prefix = [
            jnp.broadcast_to(token[...].astype(x.dtype), (x.shape[0], *token.shape[1:]))
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        x = jnp.concatenate([*prefix, x], axis=1)
        x, outputs = run_layers(self.config, self.blocks, x, collect=collect)
        return x[:, self.tower.prefix_tokens :], outputs


class Projector(nnx.Module):
    """Three linear layers with exact GELU between, from fused patch features to the Llama."""

    def __init__(self, config: OpenVLAOFTConfig, make: Maker):
        fused = config.dinov2.width + config.siglip.width
        self.fc1 = Linear(make, fused, 4 * fused)
        self.fc2 = Linear(make, 4 * fused, config.hidden_size)
        self.fc3 = Linear(make, config.hidden_size, config.hidden_size)

    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... D"]:
        return self.fc3(gelu(self.fc2(gelu(self.fc1(x)))))


class VisionBackbone(nnx.Module):
    """Applies both towers to every image; concatenates features, and images along the sequence."""

    def __init__(self, config: OpenVLAOFTConfig, make: Maker):
        self.dinov2 = VisionTower(config, config.dinov2, make)
        self.siglip = VisionTower(config, config.siglip, make)

    def __call__(
        self, pixels: Float[Array, "B V H W 6"], *, collect: bool = False
    ) -> tuple[Float[Array, "B VP F"], dict[str, jax.Array]]:
        """Return fused patch features and, with `collect`, the intermediate stages.

        Args:
            pixels: normalised for DINOv2 in the first three channels, for SigLIP in the others.
        """
        batch, views = pixels.shape[:2]
        flat = pixels.reshape(batch * views, *pixels.shape[2:])
        dino, dino_blocks = self.dinov2(flat[..., :3], collect=collect)
        siglip, _ = self.siglip(flat[..., 3:], collect=False)
        dino, siglip = (x.reshape(batch, -1, x.shape[-1]) for x in (dino, siglip))
        stages = {}
        if dino_blocks is not None:
            first = dino_blocks[0]
            stages = {
                "dino_block0": first.reshape(batch, views, *first.shape[1:]),
                "dino_patch_features": dino,
                "siglip_patch_features": siglip,
            }
        return jnp.concatenate([dino, siglip], axis=-1), stages
