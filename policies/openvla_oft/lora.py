"""Low-rank adapters that train while the base stays frozen: y = x W + (alpha / r) (x A) B.

In a model with `config.lora_rank` > 0 the base weights are `FrozenParam`s and the adapters are
`LoraParam`s. A `LoraParam` is an `nnx.Param`, a `FrozenParam` is not. So code that trains, copies
or saves the `nnx.Param`s of a policy handles only the adapters and the value head.

Source: Hu et al. 2021, "LoRA" (arXiv:2106.09685); initial values and module names as PEFT's.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from policies.openvla_oft import hf_keys
from policies.openvla_oft.layers import Linear, Maker, UnusedParam
from policies.openvla_oft.tensors import fetch


class LoraParam(nnx.Param):
    """A factor of an adapter."""


class FrozenParam(nnx.Variable):
    """A weight of the base model under adapters: it is read, but gets no gradient and no update."""


class Adapter(nnx.Module):
    """The adapter (alpha / r) (x A) B of a kernel [.. in.. out]: A [.. in.. r], B [.. 1.. r out].

    A is drawn from N(0, 1/r) and B is 0, as in PEFT's "gaussian" initialisation. Both are float32
    whatever the dtype of the base: in bfloat16 small steps would be lost to rounding.
    """

    def __init__(self, make: Maker, kernel_shape: tuple[int, ...], rank: int, scale: float):
        *shape_in, width_out = kernel_shape
        self.scale = scale
        self.a = make.normal((*shape_in, rank), 1 / rank)
        self.b = make.constant((*(1,) * (len(shape_in) - 1), rank, width_out), 0.0)

    def __call__(self, x: Float[Array, "... i"], columns: slice | None = None) -> Array:
        """Return the term that is added to x W [... o], or to some columns of it."""
        a, b = (p[...].reshape(-1, p.shape[-1]).astype(x.dtype) for p in (self.a, self.b))
        return (x @ a) @ (b if columns is None else b[:, columns]) * self.scale


def attach(model: nnx.Module, make: Maker) -> None:
    """Add an adapter to every layer whose checkpoint module is named in `lora_targets`.

    Layers that no forward pass reads get one too, as in PEFT, but as `UnusedParam`s.

    Args:
        model: an `OpenVLAOFT` under construction.
    """
    config = model.config

    def adapter(module: str, kernel: nnx.Variable, shape: tuple[int, ...]) -> Adapter | None:
        key = hf_keys.source_of(module, config).keys[0].removesuffix(".weight")
        if key.rsplit(".", 1)[-1] not in config.lora_targets:
            return None
        own = dataclasses.replace(
            make,
            dtype=jnp.dtype("float32"),
            stack=tuple(kernel.shape[: -len(shape)]),
            variable=UnusedParam if isinstance(kernel, UnusedParam) else LoraParam,
        )
        return Adapter(own, shape, config.lora_rank, config.lora_scale)

    linears = [(p, m) for p, m in nnx.iter_graph(model) if isinstance(m, Linear)]
    for path, layer in linears:
        name = hf_keys.path_name((*path, "kernel"))
        layer.lora = nnx.data(adapter(name, layer.kernel, (*layer.shape_in, layer.width_out)))
    head = model.llama.lm_head
    model.llama.lm_head_lora = nnx.data(adapter(hf_keys.LM_HEAD, head, head.shape[::-1]))


def merged(
    model: nnx.Module, variables: dict[str, nnx.Variable], path: str, layer: int | None
) -> np.ndarray:
    """Return a weight with its adapter merged: W + (alpha / r) A B in float32.

    Args:
        variables: all parameters of the model, by path.
        path: a parameter that is not part of an adapter.
        layer: one layer of a stacked parameter; None = the whole parameter.

    Returns:
        an array on the host, in the parameter's own dtype.
    """
    weight = fetch(variables[path][...], layer)
    factors = [hf_keys.adapter_path(path, factor) for factor in "ab"]
    if factors[0] not in variables:
        return weight
    a, b = (fetch(variables[factor][...], layer) for factor in factors)
    change = model.config.lora_scale * (a @ b)
    # The output head has the layout of the checkpoint: one row per token.
    change = change.T if path == hf_keys.LM_HEAD else change
    return (weight.astype(np.float32) + change).astype(weight.dtype)
