"""What the compiled programs of the learner hold."""

import dataclasses

import jax
import pytest

from evac_jax import programs
from evac_jax.config.build import default_config
from evac_jax.devices import sharding
from evac_jax.shapes import EpisodeShapes
from evac_jax.tools.memory.account import account
from tests.unit.policies.tiny import CONFIG

WIDTH, MLP, LAYERS = 256, 512, 12


def run(sizes, **algo):
    """Return (configuration, episode) of a run with so small a batch."""
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, compute_dtype=sizes.compute_dtype),
        algo=dataclasses.replace(config.algo, group_size=2, **algo),
        env=dataclasses.replace(
            config.env, num_envs=algo["global_batch"], max_episode_steps=sizes.chunk
        ),
    )
    episode = EpisodeShapes((sizes.num_images, 16, 16, 3), sizes.chunk, sizes.chunk)
    return config, episode


@pytest.mark.parametrize("make", [programs.abstract_sample, programs.abstract_update])
def test_casts_of_all_layers_do_not_leave_the_loop_on_a_cpu(make):
    sizes = dataclasses.replace(
        CONFIG,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_layers=LAYERS,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        remat="full",
        lora_rank=4,
        value_type="none",
    )
    config, episode = run(sizes, global_batch=2, micro_batch=1)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    program, arguments = make(config, mesh, sizes, episode)
    temporary = program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    layer = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)  # bytes in float32
    assert temporary < 3 * layer


def test_copies_of_the_parameters_sum_gradients_once_per_optimiser_step():
    sizes = dataclasses.replace(CONFIG, num_layers=2, value_type="none")
    config, episode = run(sizes, global_batch=8, micro_batch=2)
    mesh = sharding.make_mesh(2, 1, jax.devices()[:2])
    program, arguments = programs.abstract_update(config, mesh, sizes, episode)
    found = account(program.lower(*arguments).compile().as_text())
    gradient = 4 * sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params))
    # Between two devices a sum is received once; the rest are frames, tokens and metrics.
    assert gradient <= found.total_received < 1.5 * gradient
