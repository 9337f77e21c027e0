"""Faster float32 imagination on a CPU: weights laid out once as oneDNN's kernels read them.

A layer that is called as usual has its weight rearranged in every call, or takes a slower kernel.
`pack` replaces such layers, for good: a packed network imagines, but cannot be trained, saved,
copied or moved to another device.

The operations are those that torch's own compiler emits for CPUs.
"""

import torch
from torch import Tensor, nn

from evac_jax.evac.attention import GEGLU, PointwiseConv
from evac_jax.evac.model import EvacModel
from evac_jax.evac.unet import CausalConv, causal_image

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
        """The layer's output [..., out] times a factor of its shape."""
        return _ops._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")


class PackedGEGLU(nn.Module):
    """`GEGLU` without a pass over memory of its own for the GELU or the product."""

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


class PackedConv2d(nn.Module):
    """A 2D convolution; its output is in the channels-last memory format."""

    def __init__(self, weight: Tensor, bias: Tensor | None, padding, stride):
        super().__init__()
        self.options = (list(padding), list(stride), [1, 1], 1)
        packed = weight.contiguous().to_mkldnn()
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(packed, *self.options)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H', W']."""
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
    return PackedGEGLU(layer) if type(layer) is GEGLU else None


@torch.no_grad()
def pack(network: nn.Module) -> nn.Module:
    """Replace the layers of a float32 `network` on a CPU that have a faster form; returns it.

    Results differ from the unpacked network's by rounding alone (1e-6 relative).

    Raises:
        ValueError: the network is elsewhere, or of another type.
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
    """Make a model fit for fast imagination and nothing else; returns it.

    Args:
        model: with its final weights, type and device.
        compiled: let `torch.compile` make the denoiser's kernels, at its first call for each
            batch size (minutes; on a CPU it needs a C++ compiler).

    A float32 model on a CPU is packed, its denoiser where it is not compiled; any other stays as
    it is.
    """
    model.eval().requires_grad_(False)
    weight = next(model.parameters())
    packs = (weight.device.type, weight.dtype) == ("cpu", torch.float32)
    if compiled:
        model.unet.compile(dynamic=False)
    elif packs:
        pack(model.unet)
    if packs:
        pack(model.first_stage_model)
    return model
