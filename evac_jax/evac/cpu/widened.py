"""Half-precision imagination on a CPU that has no instructions for it.

Such a CPU multiplies bfloat16 numbers one by one: a 3x3 convolution of 320 channels takes nine
times as long as in float32, and seven times as long as with `widen` (torch 2.13, AVX2, one core).
`widen` lets the layers with large products convert their weights and inputs when they are called,
one layer at a time. So weights and features keep their two bytes, and only the products are
float32.
"""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from evac_jax.evac.attention import GEGLU, PointwiseConv
from evac_jax.evac.unet import CausalConv

# Each is called as a whole: what is inside of it may use its weights directly.
LAYERS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, GEGLU, PointwiseConv, CausalConv)


def is_slow(weight: Tensor) -> bool:
    """Whether this CPU has no instructions for products of the weight's type, where it is one."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(weight.dtype)
    return weight.device.type == "cpu" and supported is not None and not supported()


def widen(network: nn.Module) -> nn.Module:
    """Let every layer of `LAYERS` in `network` compute in float32 at each call; return it.

    Its results keep the type of its inputs. The weights stay as they are.
    """
    for parent in list(network.modules()):
        if type(parent) not in LAYERS:
            for layer in parent.children():
                if type(layer) in LAYERS:
                    _widen(layer)
    return network


def _widen(layer: nn.Module) -> None:
    as_it_was = copy.copy(layer)  # the same weights, with the forward pass of its class

    def forward(*args, **options):
        dtype = next(layer.parameters()).dtype
        wide = {name: weight.float() for name, weight in layer.named_parameters()}
        arguments = tree_map(_cast(dtype, torch.float32), (args, options))
        return tree_map(_cast(torch.float32, dtype), functional_call(as_it_was, wide, *arguments))

    layer.forward = forward


def _cast(source: torch.dtype, target: torch.dtype):
    def cast(value):
        return value.to(target) if isinstance(value, Tensor) and value.dtype == source else value

    return cast
