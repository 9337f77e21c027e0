"""Memory of the trainer on each of its devices, from shapes alone; no weight is read or made.

Parameters, optimiser state, gradients and rollout are counted from the same trees that the learner
builds. What the backward pass keeps is counted from a trace of the policy: the residuals of
`jax.vjp`. Two factors are fitted to XLA's figures for compiled updates (docs/memory.md).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType

from algos.optim import make_optimizer
from algos.types import TrainState, path_name
from evac_jax import programs
from evac_jax.config.schema import PolicyConfig, TrainConfig
from evac_jax.devices import hosts, sharding
from evac_jax.errors import ConfigError
from evac_jax.shapes import EpisodeShapes, batch_shapes
from evac_jax.tools.memory.parts import Part
from policies.activations import activations_at
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.import_hf import abstract_model
from policies.openvla_oft.layers import Maker
from policies.openvla_oft.llama import LlamaLayer
from policies.types import ObsBatch

# Temporary arrays of a layer's backward pass, in units of what the layer would save for it.
WORKSPACE = 2.6
# A forward pass alone frees its arrays; it holds about as much as one layer would save.
# Share of Adam's moments that is held twice while the optimiser writes new ones. The old ones are
# needed to the end, because the step may be skipped.
MOMENTS_HELD_TWICE = 0.85
ROLLOUT, BACKWARD, OPTIMISER = "the rollout", "the backward pass", "the optimiser's step"


def policy_sizes(policy: PolicyConfig, published: OpenVLAOFTConfig, **more: Any):
    """Return `published` with the settings of a run, as after an import."""
    return dataclasses.replace(
        published,
        value_type=policy.value_head,
        param_dtype=policy.param_dtype,
        compute_dtype=policy.compute_dtype,
        max_prompt_length=policy.max_prompt_length,
        lora_rank=policy.lora_rank,
        lora_alpha=policy.lora_alpha,
        keep_stop_token=policy.keep_stop_token,
        remat=policy.remat,
        scan_layers=policy.scan_layers,
        attention=policy.attention,
        **more,
    )


def trainer_parts(
    config: TrainConfig, sizes: OpenVLAOFTConfig, episode: EpisodeShapes, devices: int
) -> list[Part]:
    """Return the memory of one device of a mesh over `devices`.

    Raises:
        ConfigError: the mesh does not have this number of devices.
    """
    mesh: Any = _abstract_mesh(config, devices)  # equivalent to a mesh where only shapes are needed
    _, params, rest = _split(sizes)
    state = _abstract_state(config, params)

    def held(tree) -> int:
        return _bytes(tree, sharding.tree_shardings(mesh, tree))

    trained = held(jax.tree.map(lambda p: _like(p, jnp.float32), params))
    micro = -(-(config.algo.micro_batch or config.algo.global_batch) // devices)
    envs = -(-config.env.num_envs // devices)
    batch = _bytes(batch_shapes(config, sizes, episode)) / devices
    layer = _layer_bytes(sizes)
    once_more = 2 if config.rollout.refill else 1
    moments = held(state.opt_state)
    parts = [
        Part("parameters that train", held(params)),
        Part("parameters that do not", held(rest)),
        Part("optimiser state (two float32 moments)", moments),
        Part("start policy for the KL penalty", held(state.ref_params)),
        Part("rollout: frames, tokens, log-probs; no KV cache", batch),
        Part("rollout while it is joined", batch * once_more, (ROLLOUT,)),
        Part(f"forward pass of {envs} environments", layer * envs, (ROLLOUT,)),
        Part("logits on the action slots", _logit_bytes(sizes) * envs, (ROLLOUT,)),
        Part("gradients, accumulated in float32", trained, (BACKWARD, OPTIMISER)),
        Part("gradient of a micro-batch", held(params), (BACKWARD,)),
        Part(
            f"activations saved, micro-batch {micro} (remat {sizes.remat})",
            _saved_bytes(sizes, micro, episode.image_shape),
            (BACKWARD,),
        ),
        Part("activations of the layer at work", layer * WORKSPACE * micro, (BACKWARD,)),
        Part("moments, old ones beside new ones", moments * MOMENTS_HELD_TWICE, (OPTIMISER,)),
    ]
    if mesh.shape[sharding.FSDP] > 1:
        parts.append(Part("weights gathered for a layer", _gathered_bytes(sizes), (BACKWARD,)))
    return parts


def import_bytes(sizes: OpenVLAOFTConfig) -> int:
    """Return the host's bytes during the import: the largest tensor as bfloat16, and its cast."""
    largest = max(math.prod(leaf.shape[-2:]) for leaf in jax.tree.leaves(_split(sizes)[1:]))
    return largest * (2 + jnp.dtype(sizes.param_dtype).itemsize)


def count(sizes: OpenVLAOFTConfig) -> tuple[int, int]:
    """Return (parameters that train, parameters that do not)."""
    _, params, rest = _split(sizes)
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, rest))
    return trained, frozen


def compiled_bytes(
    config: TrainConfig, sizes: OpenVLAOFTConfig, episode: EpisodeShapes
) -> tuple[int, int]:
    """Compile the learner's update for this process's devices; return (arguments, temporaries).

    Both are of one device, in bytes. Nothing is allocated, but XLA takes a minute of CPU time for a
    policy of 7 billion parameters. A CPU computes bfloat16 in float32.
    """
    mesh, _ = hosts.make_meshes(config)
    program, arguments = programs.abstract_update(config, mesh, sizes, episode)
    analysis: Any = program.lower(*arguments).compile().memory_analysis()
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


@functools.lru_cache
def _split(sizes: OpenVLAOFTConfig):
    return nnx.split(abstract_model(sizes), nnx.Param, ...)


def _abstract_mesh(config: TrainConfig, devices: int) -> AbstractMesh:
    data, fsdp = config.mesh.data, config.mesh.fsdp
    data = data if data != -1 else (devices // fsdp if fsdp != -1 else 1)
    fsdp = fsdp if fsdp != -1 else devices // data
    if data * fsdp != devices:
        raise ConfigError(f"mesh.data x mesh.fsdp: expected {devices}, got {data} x {fsdp}")
    return AbstractMesh((data, fsdp), sharding.BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def _abstract_state(config: TrainConfig, params) -> TrainState:
    return jax.eval_shape(programs.initial_state(config, make_optimizer(config.optim)), params)


def _like(leaf, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _bytes(tree, places=None) -> int:
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    if places is not None:
        shapes = [
            s.shard_shape(x.shape) for x, s in zip(leaves, jax.tree.leaves(places), strict=True)
        ]
    return sum(math.prod(s) * x.dtype.itemsize for s, x in zip(shapes, leaves, strict=True))


def _residual_bytes(function, *arguments) -> int:
    """Return what `function` saves beyond its inputs; it returns the second result of `jax.vjp`."""
    # The platform is set, as in the learner; otherwise a trace has the kernels of all platforms.
    with activations_at(jax.sharding.SingleDeviceSharding(jax.devices()[0])):
        traced = jax.make_jaxpr(function)(*arguments).jaxpr
    known = {*traced.invars, *traced.constvars}
    saved = {var for var in traced.outvars if not isinstance(var, Literal)} - known
    return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in saved)


def _saved_bytes(sizes: OpenVLAOFTConfig, batch: int, image_shape: tuple[int, ...]) -> int:
    """Return what a forward pass of `batch` samples keeps for the backward pass."""
    # An array grows with the batch or not; two traces show which, and their results are cached.
    one, two = (_traced_bytes(sizes, count, image_shape) for count in (1, 2))
    return one + (two - one) * (batch - 1)


@functools.lru_cache
def _traced_bytes(sizes: OpenVLAOFTConfig, batch: int, image_shape: tuple[int, ...]) -> int:
    # With an unrolled loop the weights of every layer would count as saved.
    graphdef, params, rest = _split(dataclasses.replace(sizes, scan_layers=True))
    shape = jax.ShapeDtypeStruct
    obs = ObsBatch(
        images=shape((batch, *image_shape), jnp.uint8),
        prompt_tokens=shape((batch, sizes.max_prompt_length), jnp.int32),
        prompt_mask=shape((batch, sizes.max_prompt_length), jnp.bool_),
    )
    tokens = shape((batch, sizes.chunk, sizes.action_dim), jnp.int32)

    def pull_back(params, rest, obs, tokens):
        def outputs(params):
            result = nnx.merge(graphdef, params, rest).evaluate(obs, tokens)
            return result.log_probs, result.values

        return jax.vjp(outputs, params)[1]

    return _residual_bytes(pull_back, params, rest, obs, tokens)


@functools.lru_cache
def _layer_bytes(sizes: OpenVLAOFTConfig) -> int:
    """Return what one Llama layer would save for one sample, the largest layer of the policy."""
    make = Maker(jnp.dtype(sizes.param_dtype), None)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: LlamaLayer(sizes, make)))
    length = _sequence_length(sizes)
    shape, dtype = jax.ShapeDtypeStruct, jnp.dtype(sizes.compute_dtype)
    angles = shape((1, length, 1, sizes.hidden_size // sizes.num_heads), dtype)

    def pull_back(params, x, cos, sin, mask):
        return jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x, cos, sin, mask), params, x)[1]

    x, mask = shape((1, length, sizes.hidden_size), dtype), shape((1, length), jnp.bool_)
    weights = 0
    if sizes.param_dtype != sizes.compute_dtype:  # casts of weights, which do not grow with samples
        weights = sum(leaf.size for leaf in jax.tree.leaves(params)) * dtype.itemsize
    return max(_residual_bytes(pull_back, params, x, angles, angles, mask) - weights, 0)


def _sequence_length(sizes: OpenVLAOFTConfig) -> int:
    patches = sizes.num_patches * sizes.num_images
    return sizes.max_prompt_length + patches + sizes.num_action_tokens + sizes.keep_stop_token


def _logit_bytes(sizes: OpenVLAOFTConfig) -> int:
    return sizes.num_action_tokens * sizes.num_bins * 4


def _gathered_bytes(sizes: OpenVLAOFTConfig) -> int:
    """Return the larger of two layers' whole weights (current and next) and the embedding."""
    _, params, rest = _split(sizes)
    layers = [
        math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path((params, rest))
        if "llama/layers/" in path_name(path)
    ]
    embedding = sizes.vocab_size * sizes.hidden_size * jnp.dtype(sizes.param_dtype).itemsize
    return max(2 * sum(layers), embedding)
