"""Memory of the trainer on each of its devices, from shapes alone; no weight is read or made.

Parameters, optimiser state, gradients and rollout are counted from the same trees that the learner
builds. What the backward pass keeps is counted from a trace of the policy: the residuals of
`jax.vjp`. What XLA adds differs between platforms; a few numbers are fitted to its accounts of
compiled updates (docs/memory.md).
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
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import hosts, sharding
from evac_jax.memory.parts import Part
from evac_jax.shapes import EpisodeShapes, batch_shapes
from policies.activations import activations_at
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.import_hf import abstract_model
from policies.openvla_oft.layers import Maker
from policies.openvla_oft.llama import LlamaLayer
from policies.types import ObsBatch


@dataclasses.dataclass(frozen=True)
class Habits:
    """How XLA's programs for a platform use memory, fitted to its accounts (docs/memory.md).

    Attributes:
        workspace: temporary arrays of a layer's backward pass, in units of what the layer saves.
        trained, frozen: layers whose whole weights are held if they are cut over devices. A frozen
            weight needs no cast, so its transfer begins earlier.
        in_place: whether an optimiser's step writes new moments over the old ones, array by array.
            If not, most of both exist at once, because the step may be skipped.
        casts_first: whether weights are gathered in the type of the arithmetic.
    """

    workspace: float
    trained: float
    frozen: float
    in_place: bool
    casts_first: bool


HABITS = {
    "cuda": Habits(workspace=1.24, trained=1, frozen=3, in_place=True, casts_first=True),
    "tpu": Habits(workspace=0.9, trained=1, frozen=1, in_place=True, casts_first=True),
    "cpu": Habits(workspace=2.6, trained=2, frozen=2, in_place=False, casts_first=False),
}
# Share of Adam's moments that exists twice where they are not written in place.
MOMENTS_HELD_TWICE = 0.85
ROLLOUT, BACKWARD, OPTIMISER = "the rollout", "the backward pass", "the optimiser's step"


def trainer_parts(
    config: TrainConfig,
    sizes: OpenVLAOFTConfig,
    episode: EpisodeShapes,
    devices: int,
    platform: str,
) -> list[Part]:
    """Return the memory of one device of a mesh over `devices`.

    Args:
        platform: of the devices, one of `HABITS`.

    Raises:
        ConfigError: the mesh does not have this number of devices.
    """
    mesh: Any = _abstract_mesh(config, devices)  # equivalent to a mesh where only shapes are needed
    _, params, rest = _split(sizes)
    state = _abstract_state(config, params)

    def held(tree) -> int:
        return _bytes(tree, sharding.tree_shardings(mesh, tree))

    gradients = jax.tree.map(lambda p: _like(p, jnp.float32), params)
    places = sharding.tree_shardings(mesh, gradients)
    of_each = jax.tree.leaves(jax.tree.map(lambda x, place: _bytes(x, place), gradients, places))
    micro = -(-(config.algo.micro_batch or config.algo.global_batch) // devices)
    envs = -(-config.env.num_envs // devices)
    batch = _bytes(batch_shapes(config, sizes, episode)) / devices
    layer = _layer_bytes(sizes)
    once_more = 2 if config.rollout.refill else 1
    moments, habits = held(state.opt_state), HABITS[platform]
    largest = max(of_each, default=0)
    parts = [
        Part("parameters that train", held(params)),
        Part("parameters that do not", held(rest)),
        Part("optimiser state (two float32 moments)", moments),
        Part("start policy for the KL penalty", held(state.ref_params)),
        Part("rollout: frames, tokens, log-probs; no KV cache", batch),
        Part("rollout while it is joined", batch * once_more, (ROLLOUT,)),
        Part(f"forward pass of {envs} environments", layer * envs, (ROLLOUT,)),
        Part("logits on the action slots", _logit_bytes(sizes) * envs, (ROLLOUT,)),
        Part("gradients, accumulated in float32", sum(of_each), (BACKWARD, OPTIMISER)),
        Part("gradient of a micro-batch", held(params), (BACKWARD,)),
        Part(
            f"activations saved, micro-batch {micro} (remat {sizes.remat})",
            _saved_bytes(sizes, micro, episode.image_shape),
            (BACKWARD,),
        ),
        Part("activations of the layer at work", layer * habits.workspace * micro, (BACKWARD,)),
    ]
    if habits.in_place:
        parts += [
            # Of the layers' gradients, in the order in which they are added up.
            Part("largest gradient in another order", largest, (BACKWARD,)),
            Part("moments of an array, old beside new", 2 * largest, (OPTIMISER,)),
        ]
    else:
        twice = moments * MOMENTS_HELD_TWICE
        parts.append(Part("moments, old ones beside new ones", twice, (OPTIMISER,)))
    if mesh.shape[sharding.FSDP] > 1:
        gathered = _gathered_bytes(sizes, habits)
        parts.append(Part("weights gathered for a layer", gathered, (BACKWARD,)))
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
    sizes = sharding.resolved(config.mesh.data, config.mesh.fsdp, devices)
    return AbstractMesh(sizes, sharding.BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


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


def _gathered_bytes(sizes: OpenVLAOFTConfig, habits: Habits) -> float:
    """Return the whole weights that a device holds for the layers at work."""
    _, params, rest = _split(sizes)

    def of_layer(tree) -> int:
        return sum(
            math.prod(leaf.shape[1:]) * (size if habits.casts_first else leaf.dtype.itemsize)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if "llama/layers/" in path_name(path)
        )

    size = jnp.dtype(sizes.compute_dtype).itemsize
    layers = habits.trained * of_layer(params) + habits.frozen * of_layer(rest)
    if habits.casts_first:
        return layers
    table = sizes.vocab_size * sizes.hidden_size * jnp.dtype(sizes.param_dtype).itemsize
    return max(layers, table)
