"""Faster float32 imagination on a CPU: weights are stored once in the layout of oneDNN's kernels.

Without this, every call of a layer rearranges its weight or uses a slower kernel. `pack` replaces
such layers permanently: a packed network can imagine, but it cannot be trained, saved, copied or
moved to another device.

Simulators and `tools.world_model.imagine_dataset` use it through `accelerate`, with models of any
size. Only large models use `map_matrix` and `winograd`. The operations are those that torch's own
compiler emits for CPUs.
"""

import torch
from torch import Tensor, nn

from evac_jax.evac.attention import GEGLU, PointwiseConv
from evac_jax.evac.cpu.widened import is_slow, widen
from evac_jax.evac.cpu.winograd import WinogradConv2d
from evac_jax.evac.model import EvacModel
from evac_jax.evac.unet import CausalConv, TemporalConvBlock, causal_image, norm_per_view

_ops = torch.ops.mkldnn


class PackedLinear(nn.Module):
    """A linear layer, or a pointwise convolution of channel-last features."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = _ops._reorder_linear_weight(weight.contiguous(), None), bias

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """[..., in] to [..., out]; `activation` "none" or "gelu"."""
        return _ops._linear_pointwise(x, self.weight, self.bias, activation, [], "none")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The layer's output [..., out] times a factor of the same shape."""
        return _ops._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")


class PackedGEGLU(nn.Module):
    """`GEGLU` without separate passes over memory for the GELU and the product."""

    def __init__(self, source: GEGLU):
        super().__init__()
        weights, biases = (p.detach().chunk(2) for p in (source.proj.weight, source.proj.bias))
        self.values, self.gates = (
            PackedLinear(weight, bias.contiguous())
            for weight, bias in zip(weights, biases, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., hidden]."""
        return self.values.times(x, self.gates(x, "gelu"))


def map_matrix(weight: Tensor, height: int, width: int) -> Tensor:
    """A 3x3 convolution [out, in, 3, 3] of a tiny map as a matrix [h w out, h w in].

    On a map of at most 2 x 2 cells, padded by one, every output depends on every input. So the
    convolution is a full matrix; its axes are cells first, then channels. It does not multiply the
    zeros of the padding.

    It is used if a UNet halves its latents to at most 2 x 2 cells. With the default four levels
    this happens for images of at most 128 x 128 pixels (`benchmarks.world_model`). The two levels
    of the miniature end at 4 x 4.
    """
    cells = [(y, x) for y in range(height) for x in range(width)]
    rows = (
        torch.cat([weight[:, :, 1 + y - out_y, 1 + x - out_x] for y, x in cells], 1)
        for out_y, out_x in cells
    )
    return torch.cat(list(rows), 0)


class MapLinear(PackedLinear):
    """A 3x3 convolution of maps of one tiny size, as a linear layer (see `map_matrix`)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, height: int, width: int):
        bias = None if bias is None else bias.repeat(height * width)
        super().__init__(map_matrix(weight, height, width), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H, W], the latter in the channels-last memory format."""
        y = super().forward(x.permute(0, 2, 3, 1).flatten(1))
        return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


class PackedConv2d(nn.Module):
    """A 2D convolution; its output is in the channels-last memory format.

    A 3x3 convolution with stride 1 has faster forms for some maps: `MapLinear` for maps of at most
    2 x 2, where oneDNN would multiply the padding too, and `WinogradConv2d`. Each form has a copy
    of the weight in its own layout, which is made at the first input of such a size.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, padding, stride):
        super().__init__()
        self.options = (list(padding), list(stride), [1, 1], 1)
        packed = weight.contiguous().to_mkldnn()
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(packed, *self.options)
        self.bias = bias
        self._has_forms = (*weight.shape[2:], *padding, *stride) == (3, 3, 1, 1, 1, 1)
        self._forms: dict[torch.Size | None, nn.Module] = {}

    def _form(self, shape: torch.Size) -> nn.Module | None:
        """The faster form for inputs of this shape; None if there is none."""
        if not self._has_forms:
            return None
        size = shape[2:]
        if max(size) <= 2:
            if size not in self._forms:
                self._forms[size] = MapLinear(self.weight.to_dense(), self.bias, *size)
            return self._forms[size]
        if WinogradConv2d.pays(*self.weight.shape[1::-1], shape):
            if None not in self._forms:
                self._forms[None] = WinogradConv2d(self.weight.to_dense(), self.bias)
            return self._forms[None]
        return None

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H', W']."""
        form = self._form(x.shape)
        if form is not None:
            return form(x)
        x = x.contiguous(memory_format=torch.channels_last)
        return _ops._convolution_pointwise(
            x, self.weight, self.bias, *self.options, "none", [], None
        )


class PackedCausalConv(nn.Module):
    """`CausalConv`."""

    def __init__(self, source: CausalConv):
        super().__init__()
        weight = source.weight.detach().squeeze(-1)
        self.conv = PackedConv2d(weight, _bias(source), (0, 0), (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, V, H, W, C] to the same."""
        return self.conv(causal_image(x)).permute(0, 2, 3, 1).reshape(x.shape)


class PackedTemporalConvBlock(nn.Module):
    """`TemporalConvBlock` whose activations write directly into the convolutions' input."""

    def __init__(self, source: TemporalConvBlock):
        super().__init__()
        # The convolutions inside are replaced after this block, as in every other module.
        self.stages = nn.ModuleList((source.conv1, source.conv2, source.conv3, source.conv4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, V, H, W, C] to the same."""
        batch, frames, views, height, width, channels = x.shape
        image = x.new_empty(batch, 2 + frames, views * height * width, channels)
        rows, h = image[:, 2:], x
        for stage in self.stages:
            torch.ops.aten.silu.out(norm_per_view(h, stage[0]).flatten(2, 4), out=rows)
            image[:, :2] = rows[:, :1]
            h = stage[-1].conv(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).view(x.shape)
        return x + h


def _bias(layer: nn.Module) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def _packed(layer: nn.Module) -> nn.Module | None:
    """The replacement of a layer; None if it has none."""
    if type(layer) in (nn.Linear, PointwiseConv):
        return PackedLinear(layer.weight.detach().flatten(1), _bias(layer))
    if type(layer) is nn.Conv2d:
        return PackedConv2d(layer.weight.detach(), _bias(layer), layer.padding, layer.stride)
    if type(layer) is CausalConv:
        return PackedCausalConv(layer)
    if type(layer) is TemporalConvBlock:
        return PackedTemporalConvBlock(layer)
    return PackedGEGLU(layer) if type(layer) is GEGLU else None


@torch.no_grad()
def pack(network: nn.Module) -> nn.Module:
    """Replace the layers of a float32 `network` on a CPU that have a faster form; returns it.

    Results differ from the unpacked network's by rounding alone (1e-6 relative).

    Raises:
        ValueError: the network is on another device or has another type.
    """
    weight = next(network.parameters())
    if (weight.device.type, weight.dtype) != ("cpu", torch.float32):
        raise ValueError(
            f"pack: expected float32 weights on a CPU, got {weight.dtype} on {weight.device}"
        )
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            replacement = _packed(child)
            if replacement is not None:
                setattr(parent, name, replacement)
    return network


def accelerate(model: EvacModel, compiled: bool = False) -> EvacModel:
    """Prepare a model for fast imagination only, and return it.

    Args:
        model: with its final weights, type and device.
        compiled: compile the denoiser with `torch.compile`, at its first call for each batch size
            (this takes minutes; on a CPU it needs a C++ compiler).

    A float32 model on a CPU is packed; its denoiser only if it is not compiled. A half-precision
    model is widened where the CPU has no instructions for its type. Any other model stays as it is.
    """
    model.eval().requires_grad_(False)
    weight = next(model.parameters())
    packs = (weight.device.type, weight.dtype) == ("cpu", torch.float32)
    if is_slow(weight):
        widen(model)
    if compiled:
        model.unet.compile(dynamic=False)
    elif packs:
        pack(model.unet)
    if packs:
        pack(model.first_stage_model)
    return model
