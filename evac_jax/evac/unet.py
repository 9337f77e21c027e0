"""The video UNet: maps the noisy latents and conditions of a chunk to a v prediction.

Features are channel-last, [B, T, V, H, W, C], in all layers. 2D convolutions see them as a
channels-last batch, causal convolutions over time as images of height T, transformers as token
sequences, all without copies. Keys and values of the cross-attentions depend only on the context
and are computed once per chunk. Embeddings depend only on the diffusion time and are computed once
per time, not per frame.

Parameter names are those of public EVAC checkpoints (`model.diffusion_model.*`), including a
misspelt one (`temopral_conv`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evac_jax.evac.attention import (
    KeysValues,
    SpatialTransformer,
    TemporalTransformer,
    group_norm,
    zero_init,
)
from evac_jax.evac.config import UNetConfig


def sinusoidal_embedding(values: Tensor, dim: int) -> Tensor:
    """[N, dim] of N numbers: [cos | sin] at frequencies exp(-ln(10000) i / (dim / 2))."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 2D convolution on channel-last features [B, T, V, H, W, C]."""
    y = conv(x.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y.reshape(*x.shape[:3], *y.shape[1:])


def causal_image(x: Tensor) -> Tensor:
    """Features [B, T, V, H, W, C] as images [B, C, T + 2, V H W], with frame 0 repeated twice."""
    rows = x.flatten(2, 4)
    first = rows[:, :1]
    return torch.cat((first, first, rows), 1).permute(0, 3, 1, 2)


class CausalConv(nn.Conv3d):
    """Convolution over time only; it sees three frames: the current one and the two before it.

    Before the start, the first frame is repeated. The weight is that of a (3, 1, 1) 3D convolution.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, V, H, W, C] to the same."""
        y = F.conv2d(causal_image(x), self.weight.squeeze(-1), self.bias)
        return y.permute(0, 2, 3, 1).reshape(x.shape)


class TemporalConvBlock(nn.Module):
    """Four times norm, SiLU, causal convolution over time; residual around all four.

    Only the convolutions are causal: the norms mix all frames of a view.
    """

    def __init__(self, channels: int, groups: int, dropout: float):
        super().__init__()
        self.conv1 = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), CausalConv(channels))
        self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(
                nn.GroupNorm(groups, channels), nn.SiLU(), nn.Dropout(dropout), CausalConv(channels)
            )
            for _ in range(3)
        )
        zero_init(self.conv4[-1])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, V, H, W, C] to the same."""
        h = x
        for stage in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = norm_per_view(h, stage[0])
            for layer in stage[1:]:
                h = layer(h)
        return x + h


def norm_per_view(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group normalisation of all frames of a view [B, T, V, H, W, C] together."""
    batch, _, views = x.shape[:3]
    if views == 1:
        return group_norm(x, norm)
    per_view = x.transpose(1, 2).flatten(0, 1)  # [BV T H W C]
    return group_norm(per_view, norm).unflatten(0, (batch, views)).transpose(1, 2).contiguous()


class ResBlock(nn.Module):
    """Residual block on each frame, conditioned on the embedding, then one over time."""

    def __init__(self, channels: int, out_channels: int, embed_dim: int, groups: int, dropout):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, 1, 1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, 1, 1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )
        self.temopral_conv = TemporalConvBlock(out_channels, groups, dropout)

    def forward(self, x: Tensor, embedding: "FrameEmbedding") -> Tensor:
        """[B, T, V, H, W, C] to [B, T, V, H, W, out_channels]."""
        h = F.silu(_norm_per_frame(x, self.in_layers[0]))
        h = conv2d(h, self.in_layers[2])
        h = h + embedding.per_frame(self.emb_layers)
        h = F.silu(_norm_per_frame(h, self.out_layers[0]))
        h = conv2d(self.out_layers[2](h), self.out_layers[3])
        if not isinstance(self.skip_connection, nn.Identity):
            x = conv2d(x, self.skip_connection)
        return self.temopral_conv(x + h)


def _norm_per_frame(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return group_norm(x.flatten(0, 2), norm).view(x.shape)


@dataclass(frozen=True)
class FrameEmbedding:
    """Embeddings of the history frames and of the chunk frames; there are no others.

    Attributes:
        rows: [B or 1, V or 1, 2, D], history first.
        kind: [T] 0 for a history frame, 1 for a chunk frame.
    """

    rows: Tensor
    kind: Tensor

    def per_frame(self, layers: Callable[[Tensor], Tensor]) -> Tensor:
        """[B or 1, T, V or 1, 1, 1, C] of `layers` applied to the rows."""
        return layers(self.rows)[:, :, self.kind].transpose(1, 2)[:, :, :, None, None]


class Downsample(nn.Module):
    """Halves both spatial axes by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, V, H, W, C] to [B, T, V, H/2, W/2, C]."""
        return conv2d(x, self.op)


class Upsample(nn.Module):
    """Doubles both spatial axes by repetition, then convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, V, H, W, C] to [B, T, V, 2H, 2W, C]."""
        image = x.flatten(0, 2)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
        return conv2d(image.reshape(*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4], -1), self.conv)


class UNet(nn.Module):
    """EVAC's video UNet.

    Spatial transformers are numbered in construction order; even ones read the action tokens of
    view 0, odd ones the image tokens of all views.

    Differences from the reference: (1) the numbers of tokens, views and frames come from the
    configuration and the inputs; (2) a context length of 77 + 16 T has no special meaning;
    (3) nothing is repeated per frame.

    Source: AgibotTech/EnerVerse-AC, the 3D UNet of its `acwm` model.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self._spatial_count = 0
        embed_dim = 4 * config.model_channels
        levels = [config.model_channels * m for m in config.channel_mult]
        factors = [2**level for level in range(len(levels))]

        def mlp():
            first = nn.Linear(config.model_channels, embed_dim)
            return nn.Sequential(first, nn.SiLU(), nn.Linear(embed_dim, embed_dim))

        self.time_embed, self.fps_embedding = mlp(), mlp()
        zero_init(self.fps_embedding[-1])
        self.domain_embedding = nn.Embedding(config.num_domains, embed_dim)

        channels = config.model_channels
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(config.in_channels, channels, 3, 1, 1)])]
        )
        self.init_attn = nn.ModuleList(
            [
                TemporalTransformer(
                    channels,
                    config.init_heads,
                    config.num_head_channels,
                    config.norm_groups,
                    config.dropout,
                    pointwise_conv=True,
                )
            ]
        )
        skips = [channels]
        for level, (width, factor) in enumerate(zip(levels, factors, strict=True)):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self._block(channels, width, factor))
                channels = width
                skips.append(channels)
            if level < len(levels) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        self.middle_block = self._block(channels, channels, None)
        self.middle_block.append(self._res_block(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(levels))):
            for i in range(config.num_res_blocks + 1):
                block = self._block(channels + skips.pop(), levels[level], factors[level])
                channels = levels[level]
                if level and i == config.num_res_blocks:
                    block.append(Upsample(channels))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, config.out_channels, 3, 1, 1)),
        )

    def _res_block(self, channels: int, width: int) -> ResBlock:
        cfg = self.config
        return ResBlock(channels, width, 4 * cfg.model_channels, cfg.norm_groups, cfg.dropout)

    def _block(self, channels: int, width: int, factor: int | None) -> nn.ModuleList:
        """A residual block, with transformers if `factor` asks for them (None: always)."""
        cfg = self.config
        block = nn.ModuleList([self._res_block(channels, width)])
        if factor is None or factor in cfg.attention_resolutions:
            heads, dim_head = width // cfg.num_head_channels, cfg.num_head_channels
            kind = "ip" if self._spatial_count % 2 else "tp"
            self._spatial_count += 1
            shared = {"groups": cfg.norm_groups, "dropout": cfg.dropout}
            block.append(
                SpatialTransformer(width, heads, dim_head, cfg.context_dim, kind, **shared)
            )
            block.append(TemporalTransformer(width, heads, dim_head, **shared))
        return block

    def spatial_transformers(self) -> list[SpatialTransformer]:
        """All spatial transformers in the order of computation."""
        return [m for m in self.modules() if isinstance(m, SpatialTransformer)]

    def prepare_context(self, context: Tensor, n_view: int = 1) -> list[KeysValues]:
        """Keys and values of every cross-attention, to be computed once per chunk.

        Args:
            context: [B * V, tokens, context_dim], image tokens then action tokens.
            n_view: views; rows are ordered (b v).
        """
        context = context.unflatten(0, (-1, n_view))  # [B V L D]
        split = context.shape[2] - self.config.action_tokens
        image = context[:, :, :split].flatten(1, 2)  # one sequence of all views
        tokens = {"ip": image, "tp": context[:, 0, split:]}
        return [block.keys_values(tokens[block.kind]) for block in self.spatial_transformers()]

    def embed(self, timesteps, fps, domain_id, n_history: int, frames: int, n_view: int):
        """The frame embeddings; each argument has B * V rows, or one for all."""
        groups = [timesteps, fps] if domain_id is None else [timesteps, fps, domain_id]
        rows = [g.long().unflatten(0, (-1, n_view if len(g) > 1 else 1)) for g in groups]

        def sinusoid(values: Tensor) -> Tensor:
            flat = sinusoidal_embedding(values.flatten(), self.config.model_channels)
            flat = flat.to(self.domain_embedding.weight.dtype)
            return flat.view(*values.shape, -1)

        time = torch.stack((torch.zeros_like(rows[0]), rows[0]), 2)  # [B V 2]
        embedding = self.time_embed(sinusoid(time))
        embedding = embedding + self.fps_embedding(sinusoid(rows[1]))[:, :, None]
        if domain_id is not None:
            embedding = embedding + self.domain_embedding(rows[2])[:, :, None]
        kind = (torch.arange(frames, device=embedding.device) >= n_history).long()
        return FrameEmbedding(embedding, kind)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | list[KeysValues],
        fps: Tensor,
        domain_id: Tensor | None = None,
        *,
        n_history: int,
        n_view: int = 1,
    ) -> Tensor:
        """Predict v for every frame.

        Args:
            x: [B * V, in_channels, T, h, w], rows ordered (b v).
            timesteps: [B * V] or [1] diffusion times of the chunk frames; history frames have 0.
            context: [B * V, tokens, context_dim], or the result of `prepare_context`.
            fps: [B * V] or [1], truncated to integers.
            domain_id: [B * V] or [1] rows of the embodiment table; None adds nothing.
            n_history: frames in front that are history.
            n_view: views V.

        Returns:
            [B * V, out_channels, T, h, w].
        """
        if isinstance(context, Tensor):
            context = self.prepare_context(context, n_view)
        prepared = iter(context)
        embedding = self.embed(timesteps, fps, domain_id, n_history, x.shape[2], n_view)
        h = x.unflatten(0, (-1, n_view)).permute(0, 3, 1, 4, 5, 2).contiguous()  # [B T V h w C]
        h = conv2d(h, self.input_blocks[0][0])
        h = self._run(self.init_attn[0], h)
        skips = [h]
        for block in self.input_blocks[1:]:
            h = self._run_block(block, h, embedding, prepared)
            skips.append(h)
        h = self._run_block(self.middle_block, h, embedding, prepared)
        for block in self.output_blocks:
            h = self._run_block(block, torch.cat((h, skips.pop()), -1), embedding, prepared)
        h = conv2d(F.silu(_norm_per_frame(h, self.out[0])), self.out[2])
        return h.permute(0, 2, 5, 1, 3, 4).flatten(0, 1)

    def _run_block(self, block: nn.ModuleList, h, embedding, prepared) -> Tensor:
        for layer in block:
            if isinstance(layer, ResBlock):
                h = self._run(layer, h, embedding)
            elif isinstance(layer, SpatialTransformer):
                h = self._run(layer, h, next(prepared))
            else:
                h = self._run(layer, h)
        return h

    def _run(self, layer: nn.Module, *args) -> Tensor:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)
