"""Parts that towers and Llama share: parameters, linear layers, norms, attention, the layer loop.

The parameters of equal layers are stacked, [depth ...], both when the loop is compiled once
(`lax.scan`) and when it is unrolled. So checkpoints and shardings do not depend on that choice.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from policies import activations
from policies.activations import held
from policies.openvla_oft import kernels
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.kernels import matmul

REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class UnusedParam(nnx.Variable):
    """A checkpoint tensor that no forward pass reads.

    It is kept so that an export contains every tensor of the import. It is not an `nnx.Param`, so
    it gets no gradient and no optimiser state.
    """


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the parameters of modules.

    Initial values are drawn on the host: XLA takes half a minute to compile a hundred random draws
    of different shapes. Models of full size are read from checkpoints and need no draws.

    Attributes:
        dtype: of the parameters.
        generator: source of initial values; None makes zeros, for use inside `nnx.eval_shape`,
            where only shapes are needed.
        stack: leading axes of every parameter, (depth,) for layers in a loop.
        variable: `nnx.Param`, `UnusedParam`, or `lora.FrozenParam` for a base under adapters.
    """

    dtype: jnp.dtype
    generator: np.random.Generator | None
    stack: tuple[int, ...] = ()
    variable: type[nnx.Variable] = nnx.Param

    @classmethod
    def create(cls, config: OpenVLAOFTConfig, rngs: nnx.Rngs | None) -> "Maker":
        """Return a maker in the config's dtype, seeded from `rngs.params`."""
        generator = None
        if rngs is not None:
            seed = np.asarray(jax.random.key_data(rngs.params()))
            generator = np.random.default_rng(seed)
        return cls(jnp.dtype(config.param_dtype), generator)

    def stacked(self, depth: int) -> "Maker":
        """Return a maker of `depth` layers at once."""
        return dataclasses.replace(self, stack=(depth,))

    def unused(self) -> "Maker":
        """Return a maker of `UnusedParam`s."""
        return dataclasses.replace(self, variable=UnusedParam)

    def normal(self, shape: tuple[int, ...], std: float) -> nnx.Variable:
        """Return a parameter drawn from N(0, std)."""
        shape = (*self.stack, *shape)
        if self.generator is None:
            return self.variable(jnp.zeros(shape, self.dtype))
        drawn = self.generator.standard_normal(shape, np.float32) * np.float32(std)
        return self.variable(jnp.asarray(drawn, self.dtype))

    def constant(self, shape: tuple[int, ...], value: float) -> nnx.Variable:
        """Return a parameter with one value everywhere."""
        return self.variable(jnp.full((*self.stack, *shape), value, self.dtype))


class Linear(nnx.Module):
    """x W + b, kernel [in.. out]. Fresh kernels are N(0, 1/in) unless `std` says otherwise.

    Attributes:
        lora: the adapter, whose output is added to x W; None = none. Set by `lora.attach`.
    """

    def __init__(
        self,
        make: Maker,
        shape_in: int | tuple[int, ...],
        width_out: int,
        *,
        use_bias: bool = True,
        std: float | None = None,
    ):
        self.shape_in = (shape_in,) if isinstance(shape_in, int) else shape_in
        self.width_out = width_out
        own = math.prod(self.shape_in) ** -0.5 if std is None else std
        self.kernel = make.normal((*self.shape_in, width_out), own)
        self.bias = make.constant((width_out,), 0.0) if use_bias else None
        self.lora: nnx.Module | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = matmul(x, self.kernel[...].reshape(-1, self.width_out).astype(x.dtype))
        if self.lora is not None:
            y = y + self.lora(x)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with eps 1e-6; statistics, scale and bias in float32."""

    def __init__(self, make: Maker, width: int):
        self.scale = make.constant((width,), 1.0)
        self.bias = make.constant((width,), 0.0)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + 1e-6)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: float32 statistics, cast back, then times the weight."""

    def __init__(self, make: Maker, width: int, eps: float):
        self.eps = eps
        self.scale = make.constant((width,), 1.0)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * normed.astype(x.dtype)


def attend(
    config: OpenVLAOFTConfig,
    queries: Float[Array, "B S Q D"],
    keys: Float[Array, "B S G D"],
    values: Float[Array, "B S G D"],
    seen: Bool[Array, "B S"] | Int[Array, " B"] | None = None,
) -> Float[Array, "B S QD"]:
    """Bidirectional attention with scale 1/sqrt(D).

    Args:
        seen: which keys all queries see; None = all. A mask or, where attention `is_fused`, how
            many of the first keys of each row.
    """
    if is_fused(config, queries.shape[-1]):
        attended = kernels.attend_fused(queries, keys, values, seen)
    else:
        mask = None if seen is None else seen[:, None, None, :]
        way = kernels.attend if config.attention == "auto" else jax.nn.dot_product_attention
        attended = way(queries, keys, values, mask=mask)
    return attended.reshape(*attended.shape[:2], -1)


def is_fused(config: OpenVLAOFTConfig, head_width: int) -> bool:
    """Return whether attention is cuDNN's fused kernel, which holds no scores in memory.

    "auto" takes it on the GPUs of a mesh, for what it accepts.

    Raises:
        ValueError: "cudnn" is configured, but the mesh has no GPUs.
    """
    platform = activations.platform()
    if config.attention == "cudnn" and platform not in (None, "gpu"):
        raise ValueError(
            f"policy.attention: 'cudnn' needs NVIDIA GPUs, the policy computes on {platform!r}; "
            "use 'auto' or 'xla'"
        )
    if config.attention == "auto" and platform == "gpu":
        return config.can_fuse(head_width)
    return config.attention == "cudnn"


def run_layers(
    config: OpenVLAOFTConfig,
    layers: nnx.Module,
    x: Array,
    *args,
    collect: bool = False,
    of_last: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Array, Array | None]:
    """Apply stacked layers one after another: x <- layer(x, *args); x [B ...] stays `held`.

    Args:
        collect: keep every layer's output.
        of_last: extra arguments for the last layer; only with an unrolled loop.

    Returns:
        the last output and, with `collect`, the outputs of all layers stacked along a leading axis,
        else None.
    """
    graphdef, stacked = nnx.split(layers)

    def apply(x, layer, **more):
        x = held(nnx.merge(graphdef, layer)(held(x), *args, **more))
        return x, (x if collect else None)

    def body(x, layer, more: Mapping[str, Any] = MappingProxyType({})):
        call = partial(apply, **more)
        if config.remat != "none":
            # Inside a scan the compiler cannot merge the recomputation with the forward pass, so
            # barriers against that would only cost time.
            barriers = not config.scan_layers
            call = jax.checkpoint(call, policy=REMAT[config.remat], prevent_cse=barriers)
        return call(x, layer)

    if config.scan_layers:
        return jax.lax.scan(body, x, stacked)
    outputs, depth = [], jax.tree.leaves(stacked)[0].shape[0]
    for index in range(depth):
        layer = jax.tree.map(lambda leaf, i=index: leaf[i], stacked)
        x, output = body(x, layer, of_last if index == depth - 1 else {})
        outputs.append(output)
    return x, (jnp.stack(outputs) if collect else None)
