"""EVAC's video UNet, computed in the naive way on our modules, and so with our weights.

It does the work that our UNet avoids, in every denoising step. The context is repeated for every
frame, and its keys and values are projected again. Embeddings are computed frame by frame. Features
are channel-first and are copied between convolutions and transformers. Causal convolutions over
time are 3D convolutions. Attention is written as two products and a softmax.

Source: specification of EnerVerse-AC's UNet (section 7.1) and of its inefficiencies (12.10).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evac_jax.evac.attention import (
    Attention,
    SpatialTransformer,
    TemporalTransformer,
    TransformerBlock,
)
from evac_jax.evac.unet import Downsample, ResBlock, TemporalConvBlock, UNet, sinusoidal_embedding


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Attention of queries [N, L, heads * D] as separate operations; the result has that shape."""
    query, keys, values = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for x in (query, keys, values)
    )  # [N * heads, L, D]
    scores = torch.bmm(query, keys.mT) * query.shape[-1] ** -0.5
    out = torch.bmm(scores.softmax(-1), values)
    return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def attention(layer: Attention, x: Tensor, context: Tensor | None = None, kind: str = "") -> Tensor:
    """`layer` on x [N, L, dim]; `context` [N, tokens, dim] is projected here, each time."""
    if context is None:
        keys, values = layer.to_k(x), layer.to_v(x)
    else:
        keys = getattr(layer, f"to_k_{kind}")(context)
        values = getattr(layer, f"to_v_{kind}")(context)
    return layer.to_out(attend(layer.to_q(x), keys, values, layer.heads))


def transformer_block(block: TransformerBlock, x: Tensor, context=None, kind: str = "") -> Tensor:
    """Both attentions and the feed-forward layer on sequences x [N, L, dim]."""
    x = attention(block.attn1, block.norm1(x)) + x
    x = attention(block.attn2, block.norm2(x), context, kind) + x
    gate, out = block.ff.net[0].proj, block.ff.net[2]
    values, gates = gate(block.norm3(x)).chunk(2, dim=-1)
    return out(values * F.gelu(gates)) + x


def spatial_transformer(layer: SpatialTransformer, x: Tensor, context: Tensor) -> Tensor:
    """Channel-first frames x [B * T, C, h, w], context [B * T, tokens, width] of every frame."""
    h = layer.norm(x).permute(0, 2, 3, 1).contiguous()
    h = layer.proj_in(h.flatten(1, 2))
    h = transformer_block(layer.transformer_blocks[0], h, context, layer.kind)
    h = layer.proj_out(h).unflatten(1, x.shape[2:])
    return h.permute(0, 3, 1, 2).contiguous() + x


def temporal_transformer(layer: TemporalTransformer, x: Tensor, batch: int) -> Tensor:
    """Channel-first frames x [B * T, C, h, w]; sequences are the frames of a pixel."""
    video = x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()  # [B C T h w]
    h = layer.norm(video).permute(0, 3, 4, 2, 1).contiguous()  # [B h w T C]
    shape = h.shape
    h = h.flatten(0, 2)
    h = F.linear(h, layer.proj_in.weight.flatten(1), layer.proj_in.bias)
    h = transformer_block(layer.transformer_blocks[0], h)
    h = F.linear(h, layer.proj_out.weight.flatten(1), layer.proj_out.bias)
    h = h.view(shape).permute(0, 4, 3, 1, 2).contiguous() + video
    return h.transpose(1, 2).flatten(0, 1)


def temporal_convolutions(block: TemporalConvBlock, x: Tensor, batch: int) -> Tensor:
    """Channel-first frames x [B * T, C, h, w] through the four causal convolutions."""
    video = x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()  # [B C T h w]
    h = video
    for stage in (block.conv1, block.conv2, block.conv3, block.conv4):
        for layer in stage[:-1]:
            h = layer(h)
        first = h[:, :, :1]
        h = F.conv3d(torch.cat((first, first, h), 2), stage[-1].weight, stage[-1].bias)
    return (video + h).transpose(1, 2).flatten(0, 1)


def res_block(block: ResBlock, x: Tensor, embedding: Tensor, batch: int) -> Tensor:
    """Channel-first frames x [B * T, C, h, w] with an embedding [B * T, D] of every frame."""
    h = block.in_layers(x)
    h = h + block.emb_layers(embedding)[:, :, None, None]
    h = block.skip_connection(x) + block.out_layers(h)
    return temporal_convolutions(block.temopral_conv, h, batch)


def run_block(
    block: nn.ModuleList, h: Tensor, embedding: Tensor, context: dict[str, Tensor], batch: int
) -> Tensor:
    """One entry of the UNet's block lists on channel-first frames h [B * T, C, h, w]."""
    for layer in block:
        if isinstance(layer, ResBlock):
            h = res_block(layer, h, embedding, batch)
        elif isinstance(layer, SpatialTransformer):
            h = spatial_transformer(layer, h, context[layer.kind])
        elif isinstance(layer, TemporalTransformer):
            h = temporal_transformer(layer, h, batch)
        elif isinstance(layer, Downsample):
            h = layer.op(h)
        elif isinstance(layer, nn.Conv2d):
            h = layer(h)
        else:
            h = layer.conv(F.interpolate(h, scale_factor=2, mode="nearest"))
    return h


def unet_forward(
    unet: UNet, x: Tensor, timesteps: Tensor, context: Tensor, fps: Tensor, domain: Tensor
) -> Tensor:
    """Predict v, for one view.

    Args:
        unet: whose weights to use.
        x: [B, 19, T, h, w].
        timesteps: [B, T] int64, 0 on history frames.
        context: [B, tokens, width].
        fps, domain: [B, T] int64.

    Returns:
        [B, 4, T, h, w].
    """
    batch, frames = timesteps.shape
    width = unet.config.model_channels
    embedding = unet.time_embed(sinusoidal_embedding(timesteps.flatten(), width))
    embedding = embedding + unet.fps_embedding(sinusoidal_embedding(fps.flatten(), width))
    embedding = embedding + unet.domain_embedding(domain.flatten())
    tokens = context.repeat_interleave(frames, dim=0)
    split = tokens.shape[1] - unet.config.action_tokens
    kinds = {"ip": tokens[:, :split], "tp": tokens[:, split:]}
    h = x.transpose(1, 2).flatten(0, 1).contiguous()
    h = unet.input_blocks[0][0](h)
    h = temporal_transformer(unet.init_attn[0], h, batch)
    skips = [h]
    for block in unet.input_blocks[1:]:
        h = run_block(block, h, embedding, kinds, batch)
        skips.append(h)
    h = run_block(unet.middle_block, h, embedding, kinds, batch)
    for block in unet.output_blocks:
        h = torch.cat((h, skips.pop()), 1)
        h = run_block(block, h, embedding, kinds, batch)
    return unet.out(h).unflatten(0, (batch, frames)).transpose(1, 2)
