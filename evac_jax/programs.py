"""The two programs of the trainer's devices: `sample` decides, `update` learns.

`Learner` runs them. They are made from configuration, policy structure and mesh alone, so that
others can compile the same programs from shapes, for devices that are not here:

    program, arguments = programs.abstract_update(config, mesh, sizes, episode)
    compiled = program.lower(*arguments).compile()
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from algos.optim import make_optimizer
from algos.types import RolloutBatch, TrainState
from algos.update import Placement, init_state
from evac_jax.config.algorithms import load_algorithm
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import sharding
from evac_jax.shapes import EpisodeShapes, batch_shapes
from policies.activations import activations_at
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.import_hf import abstract_model
from policies.types import ObsBatch

# XLA's options where GPUs exchange weights and gradients: sums of a layer move into the next trip
# of the loop over layers, and two exchanges may be under way. What they hide, and what else was
# tried: docs/full_size.md.
OVERLAP = {
    "xla_gpu_enable_pipelined_all_reduce": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}


def initial_state(
    config: TrainConfig, optimizer: optax.GradientTransformation
) -> Callable[[Any], TrainState]:
    """Return the function from parameters to the state before the first update."""
    keep_reference = config.algo.kl_beta > 0
    return partial(init_state, optimizer=optimizer, keep_reference=keep_reference)


def sample_program(config: TrainConfig, mesh: Mesh, graphdef: nnx.GraphDef):
    """Return the jitted `sample(params, rest, obs, key, rows, temperature, greedy)`.

    Args:
        mesh: devices that decide.
        graphdef: structure of the policy, from `nnx.split(policy, nnx.Param, ...)`.
    """
    top_k, on_batch = config.policy.top_k, sharding.batch_sharding(mesh)

    # `rest` does not train (under LoRA it is nearly everything). It is an argument because JAX
    # copies what a jitted function closes over into its program.
    def sample(params, rest, obs, key, rows, temperature, greedy):
        with activations_at(on_batch):
            return nnx.merge(graphdef, params, rest).sample(
                obs, key, rows=rows, temperature=temperature, top_k=top_k, greedy=greedy
            )

    # Static greedy: argmax and sampling are two programs, each compiled once.
    options = compiler_options(config, mesh)
    return jax.jit(sample, static_argnames="greedy", compiler_options=options)


def update_program(
    config: TrainConfig,
    mesh: Mesh,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    state: TrainState,
):
    """Return the jitted `update(state, rest, batch, key) -> (state, metrics)`.

    Args:
        mesh: devices that learn.
        graphdef: as for `sample_program`.
        state: arrays or shapes with the shardings that the state keeps; donated.
    """
    policy, of_copy = config.policy, sharding.copy_batch_sharding(mesh)
    module = load_algorithm(config.algorithm)

    def evaluate(rest, params, obs, tokens):
        with activations_at(of_copy):
            return nnx.merge(graphdef, params, rest).evaluate(
                obs, tokens, temperature=policy.temperature, top_k=policy.top_k
            )

    def rows(tree):
        return jax.lax.with_sharding_constraint(tree, sharding.batch_sharding(mesh))

    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    accumulated = jax.tree.map(sharding.of_each_copy, places.params)

    def gradients(tree):
        return jax.lax.with_sharding_constraint(tree, accumulated)

    placement = Placement(
        sharding.copies(mesh), sharding.over_copies, rows=rows, gradients=gradients
    )

    def update(state, rest, batch, key):
        step = module.make_update(partial(evaluate, rest), optimizer, config.algo, placement)
        return step(state, batch, key)

    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(mesh)),
        compiler_options=compiler_options(config, mesh),
    )


def placed(mesh: Mesh, tree: Any) -> Any:
    """Return the shapes of parameters or of a state with the shardings that the rules give."""
    places = sharding.tree_shardings(mesh, tree)
    return jax.tree.map(lambda x, place: _shape(x, place), tree, places)


def on_rows(mesh: Mesh, tree: Any) -> Any:
    """Return the shapes of a batch, cut over the mesh along the first axis."""
    place = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: _shape(x, place), tree)


def abstract_update(
    config: TrainConfig, mesh: Mesh, sizes: OpenVLAOFTConfig, episode: EpisodeShapes
) -> tuple[Any, tuple[TrainState, Any, RolloutBatch, Any]]:
    """Return the update and the shapes of its arguments; nothing is allocated.

    Args:
        mesh: devices that learn; may be those of a topology that is not here.
        sizes: of the policy, with the run's settings.
        episode: what the policy sees and does.
    """
    graphdef, params, rest = nnx.split(abstract_model(sizes), nnx.Param, ...)
    optimizer = make_optimizer(config.optim)
    state = placed(mesh, jax.eval_shape(initial_state(config, optimizer), params))
    program = update_program(config, mesh, graphdef, optimizer, state)
    batch = on_rows(mesh, batch_shapes(config, sizes, episode))
    return program, (state, placed(mesh, rest), batch, _key())


def abstract_sample(
    config: TrainConfig, mesh: Mesh, sizes: OpenVLAOFTConfig, episode: EpisodeShapes
) -> tuple[Any, tuple]:
    """Return the decision and the shapes of its arguments, as `abstract_update` does."""
    graphdef, params, rest = nnx.split(abstract_model(sizes), nnx.Param, ...)
    rows = config.env.num_envs // config.rollout.pipeline_stages

    def shape(*after, dtype):
        return jax.ShapeDtypeStruct((rows, *after), dtype)

    obs = ObsBatch(
        images=shape(*episode.image_shape, dtype=jnp.uint8),
        prompt_tokens=shape(sizes.max_prompt_length, dtype=jnp.int32),
        prompt_mask=shape(sizes.max_prompt_length, dtype=jnp.bool_),
    )
    obs, names = on_rows(mesh, (obs, shape(dtype=jnp.int32)))
    arguments = (placed(mesh, params), placed(mesh, rest), obs, _key(), names)
    program = sample_program(config, mesh, graphdef)
    return program, (*arguments, config.policy.temperature, False)


def compiler_options(config: TrainConfig, mesh: Mesh) -> dict[str, Any] | None:
    """Return XLA's options for the devices of a mesh, None for its defaults.

    A CPU that computes in bfloat16 multiplies in float32. XLA would cast the weights of all layers
    before the loop over layers: 29 GB for a policy of 7 billion parameters. An optimisation barrier
    on the weights changes nothing (jax 0.10.2).
    """
    platform = mesh.devices.flat[0].platform
    if platform == "gpu" and mesh.size > 1:
        return OVERLAP
    if platform == "cpu" and config.policy.compute_dtype == "bfloat16":
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return None


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def _shape(x, place) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
