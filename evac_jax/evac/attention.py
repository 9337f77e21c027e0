"""Transformers of the video UNet, on channel-last features [B, T, V, H, W, C].

In this layout a spatial sequence (all views of a frame), the frames of a pixel and the input of a
linear layer need at most one copy. The reference is channel-first and copies between every
convolution and transformer.

Parameter names are those of public EVAC checkpoints.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
CACHED_VALUES = 2**19  # values of one hidden layer to keep in a CPU core's cache: 2 MB


@functools.lru_cache(maxsize=64)
def _averaging(rows: int, channels: int, groups: int) -> tuple[Tensor, Tensor]:
    """Ones [1, rows], and a matrix [C, C] that turns sums over `rows` into means of groups."""
    size = channels // groups
    with torch.inference_mode(False):  # so that a later training can use the cached tensors
        same_group = torch.eye(groups).repeat_interleave(size, 0).repeat_interleave(size, 1)
        return torch.ones(1, rows), same_group / (size * rows)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group normalisation of channel-last x [N, ..., C] over all but its first axis.

    It uses basic operations that keep the layout, with statistics in float32, because torch's own
    kernel transposes on CUDA. On a CPU torch's kernel is used where it is faster.
    """
    count, channels, groups = x.shape[0], x.shape[-1], norm.num_groups
    flat = x.reshape(count, -1, channels)
    cells, group_size = flat.shape[1], channels // groups
    if x.device.type == "cpu" and x.dtype == torch.float32:
        if group_size >= 8 or cells >= 1024 or cells <= 16:
            channels_last = flat[:, :, None].permute(0, 3, 1, 2)
            y = F.group_norm(channels_last, groups, norm.weight, norm.bias, norm.eps)
            return y.permute(0, 2, 3, 1).reshape(x.shape)
        # Products with ones, because sums over all but a short last axis are not vectorised.
        ones, mean_of_group = _averaging(cells, channels, groups)
        ones = ones.expand(count, -1, -1)
        sums = torch.cat((torch.bmm(ones, flat), torch.bmm(ones, flat * flat)), 1)  # [N 2 C]
        mean, square = (sums @ mean_of_group).unbind(1)
        variance = torch.addcmul(square, mean, mean, value=-1).clamp(min=0)
    else:
        grouped = flat.unflatten(-1, (groups, -1))
        moments = torch.var_mean(grouped.float(), dim=(1, 3), correction=0)
        variance, mean = (m.repeat_interleave(group_size, 1) for m in moments)
    scale = (variance + norm.eps).rsqrt() * norm.weight  # [N C]
    shift = torch.addcmul(norm.bias, mean, scale, value=-1)
    scale, shift = scale[:, None].to(x.dtype), shift[:, None].to(x.dtype)
    return torch.addcmul(shift, flat, scale).view(x.shape)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, L, heads * D] to [N, heads, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention without bias on queries, keys and values.

    Cross-attention (`context_dim` given) has three pairs of key and value maps: one for image
    tokens (`_ip`), one for action tokens (`_tp`), and one for text. No EVAC model uses the text
    pair, but all checkpoints contain it.
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
        query = split_heads(self.to_q(x), self.heads)
        keys, values = context or (split_heads(m(x), self.heads) for m in (self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(query, keys, values)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear map to two halves, the first times the GELU of the second."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., hidden]."""
        # Two products with contiguous results: halves of a single one are strided, slow to read.
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
        # On a CPU this is a third faster if the hidden layer stays in the cache.
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

        With a `context` of B <= N rows, N / B consecutive sequences share one row. The second
        attention treats them as one sequence, so keys and values are not repeated.
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


class PointwiseConv(nn.Conv1d):
    """A linear layer that holds the weight of a 1x1 convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] to [..., out_channels]."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class TemporalTransformer(nn.Module):
    """Attention among the frames of each cell, twice; no mask and no positions.

    Args (of the constructor):
        pointwise_conv: the projections are stored as 1x1 convolutions, as in `init_attn`.
    """

    def __init__(self, channels, heads, dim_head, groups=32, dropout=0.0, pointwise_conv=False):
        super().__init__()
        inner = heads * dim_head
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        make = PointwiseConv if pointwise_conv else nn.Linear
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
        h = self.proj_out(self.transformer_blocks[0](self.proj_in(h)))
        h = h.view(batch, *x.shape[2:5], frames, channels).movedim(4, 1)  # [B T V H W C], a view
        return x + h


def zero_init(module: nn.Module) -> nn.Module:
    """The module with all parameters set to zero, so that its residual branch starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
