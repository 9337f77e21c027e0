"""Perceiver resampler: maps any number of tokens to a fixed number of context tokens.

EVAC has two: one for the tokens of the image tower and one for the delta actions of a chunk.
Parameter names are those of public checkpoints (`image_proj_model.*`, `cond_stage_model.*`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evac_jax.evac.attention import split_heads
from evac_jax.evac.config import ResamplerConfig


class ResamplerAttention(nn.Module):
    """Latents attend to the input tokens and to themselves."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """[N, Q, dim] update of the latents from tokens x [N, L, dim]."""
        latents = self.norm2(latents)
        source = torch.cat((self.norm1(x), latents), dim=1)
        query = split_heads(self.to_q(latents), self.heads)
        keys, values = (split_heads(p, self.heads) for p in self.to_kv(source).chunk(2, dim=-1))
        out = F.scaled_dot_product_attention(query, keys, values)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Learned queries that attend to the input.

    The input has no positions, so the output does not depend on the order of a chunk's actions.

    Args (of the constructor):
        config: sizes.
        num_queries: output tokens; default `config.num_queries`. The image resampler needs that
            many per frame of a chunk, so the model passes the product.

    Source: AgibotTech/EnerVerse-AC `Resampler`, after Flamingo (arXiv:2204.14198, section 3.1).
    """

    def __init__(self, config: ResamplerConfig, num_queries: int | None = None):
        super().__init__()
        dim, hidden = config.dim, config.dim * config.ff_mult
        queries = config.num_queries if num_queries is None else num_queries
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(config.embedding_dim, dim)
        self.proj_out = nn.Linear(dim, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)

        def layer() -> nn.ModuleList:
            feed_forward = nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, hidden, bias=False),
                nn.GELU(),
                nn.Linear(hidden, dim, bias=False),
            )
            attention = ResamplerAttention(dim, config.heads, config.dim_head)
            return nn.ModuleList([attention, feed_forward])

        self.layers = nn.ModuleList([layer() for _ in range(config.depth)])

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, num_queries, output_dim] of tokens [N, L, embedding_dim], any L."""
        x = self.proj_in(tokens)
        latents = self.latents.expand(len(x), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))
