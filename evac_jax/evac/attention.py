"""Transformers of the video UNet, on channel-last features [B, T, V, H, W, C].

In that layout a spatial sequence (all views of a frame), the frames of a pixel and the input of a
linear layer are views or one copy, where the channel-first layout of the reference copies at every
border between a convolution and a transformer.

Parameter names are those of public EVAC checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
CACHED_VALUES = 2**17  # values of one hidden layer to keep in a CPU core's cache: 0.5 MB


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group normalisation of channel-last x [N, ..., C] over all but its first axis."""
    count, channels = x.shape[0], x.shape[-1]
    if x.device.type == "cpu":  # its kernel knows the channels-last memory format
        image = x.reshape(count, -1, x.shape[-2], channels).permute(0, 3, 1, 2)
        y = F.group_norm(image, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return y.permute(0, 2, 3, 1).reshape(x.shape)
    # On CUDA the library kernel would transpose to channel-first and back.
    return channel_last_norm(x, norm)


def channel_last_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`group_norm` in plain operations that keep the layout; statistics in float32."""
    count, channels = x.shape[0], x.shape[-1]
    grouped = x.reshape(count, -1, norm.num_groups, channels // norm.num_groups)
    variance, mean = torch.var_mean(grouped.float(), dim=(1, 3), correction=0)
    rstd = (variance + norm.eps).rsqrt().repeat_interleave(grouped.shape[-1], 1)  # [N C]
    scale = rstd * norm.weight
    shift = norm.bias - mean.repeat_interleave(grouped.shape[-1], 1) * scale
    flat = x.reshape(count, -1, channels)
    return torch.addcmul(shift[:, None].to(x.dtype), flat, scale[:, None].to(x.dtype)).view(x.shape)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, L, heads * D] to [N, heads, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention without bias on queries, keys and values.

    Cross-attention (`context_dim` given) holds three pairs of key and value maps: one for image
    tokens (`_ip`), one for action tokens (`_tp`), and the text pair, which no EVAC model uses but
    all checkpoints carry.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        context_dim: int | None = None,
        dropout: float = 0,
    ):
        super().__init__()
        self.heads = heads
        inner, source = heads * dim_head, dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(source, inner, bias=False)
        self.to_v = nn.Linear(source, inner, bias=False)
        if context_dim is not None:
            for name in ("to_k_ip", "to_v_ip", "to_k_tp", "to_v_tp"):
                setattr(self, name, nn.Linear(source, inner, bias=False))
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def keys_values(self, tokens: Tensor, kind: str) -> KeysValues:
        """Keys and values, each [B, heads, L, D], of context tokens of `kind` "ip" or "tp"."""
        keys = getattr(self, f"to_k_{kind}")(tokens)
        values = getattr(self, f"to_v_{kind}")(tokens)
        return split_heads(keys, self.heads), split_heads(values, self.heads)

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        """Attend from x [N, L, dim] to itself, or to prepared keys and values."""
        if context is None:
            # One product instead of three; the weights are small against the activations.
            weight = torch.cat((self.to_q.weight, self.to_k.weight, self.to_v.weight))
            query, keys, values = (
                split_heads(part, self.heads) for part in F.linear(x, weight).chunk(3, -1)
            )
        else:
            query, (keys, values) = split_heads(self.to_q(x), self.heads), context
        out = F.scaled_dot_product_attention(query, keys, values)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear map to two halves, the first times the GELU of the second."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., hidden]."""
        # Two products with contiguous results: halves of one would be slow to read, strided.
        values, gates = (
            F.linear(x, weight, bias)
            for weight, bias in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        )
        return values * F.gelu(gates)


class FeedForward(nn.Module):
    """Gated feed-forward layer, hidden width four times `dim`."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim]."""
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.net(x)
        # On a CPU a hidden layer that stays in the cache is a third faster than one that does not.
        rows = x.reshape(-1, x.shape[-1])
        size = max(1, CACHED_VALUES // (4 * x.shape[-1]))
        return torch.cat([self.net(part) for part in rows.split(size)]).view(x.shape)


class TransformerBlock(nn.Module):
    """Self-attention, a second attention (cross- or self-), feed-forward; each pre-normed."""

    def __init__(self, dim, heads, dim_head, context_dim=None, dropout=0.0):
        super().__init__()
        self.attn1 = Attention(dim, heads, dim_head, dropout=dropout)
        self.attn2 = Attention(dim, heads, dim_head, context_dim, dropout)
        self.ff = FeedForward(dim, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        """Update sequences x [N, L, dim].

        With a `context` of B <= N rows, N / B consecutive sequences share one row: the second
        attention then runs on them joined, so that keys and values are never repeated.
        """
        x = x + self.attn1(self.norm1(x))
        if context is None:
            x = x + self.attn2(self.norm2(x))
        else:
            joined = x.reshape(context[0].shape[0], -1, x.shape[-1])
            x = (joined + self.attn2(self.norm2(joined), context)).view(x.shape)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention among the cells of all views of a frame, and from them to the context.

    Args (of the constructor):
        kind: "tp" to attend to action tokens, "ip" to image tokens; the UNet alternates them.
    """

    def __init__(self, channels, heads, dim_head, context_dim, kind: str, groups=32, dropout=0.0):
        super().__init__()
        self.kind = kind
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, heads * dim_head)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(heads * dim_head, heads, dim_head, context_dim, dropout)]
        )
        self.proj_out = zero_init(nn.Linear(heads * dim_head, channels))

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Keys and values of the context tokens [B, L, context_dim] that this block reads."""
        return self.transformer_blocks[0].attn2.keys_values(tokens, self.kind)

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        """[B, T, V, H, W, C] to the same; `context` from `keys_values`."""
        h = group_norm(x.flatten(0, 1), self.norm)  # [BT V H W C]
        h = self.proj_in(h.flatten(1, 3))  # [BT VHW C]
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h).view(x.shape)


class TemporalTransformer(nn.Module):
    """Attention among the frames of each cell, twice; no mask and no positions.

    Args (of the constructor):
        pointwise_conv: the projections are stored as 1x1 convolutions, as in `init_attn`.
    """

    def __init__(self, channels, heads, dim_head, groups=32, dropout=0.0, pointwise_conv=False):
        super().__init__()
        inner = heads * dim_head
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        make = (lambda i, o: nn.Conv1d(i, o, 1)) if pointwise_conv else nn.Linear
        self.proj_in = make(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(inner, heads, dim_head, dropout=dropout)]
        )
        self.proj_out = zero_init(make(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, V, H, W, C] to the same."""
        batch, frames, channels = x.shape[0], x.shape[1], x.shape[-1]
        h = group_norm(x, self.norm).view(batch, frames, -1, channels)
        h = h.transpose(1, 2).reshape(-1, frames, channels)  # [BVHW T C], the one copy
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        h = self.transformer_blocks[0](h)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        h = h.view(batch, *x.shape[2:5], frames, channels).movedim(4, 1)  # [B T V H W C], a view
        return x + h


def zero_init(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
