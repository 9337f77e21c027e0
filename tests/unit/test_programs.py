"""What the compiled programs of the learner hold."""

import dataclasses

import jax
import pytest

from evac_jax import programs
from evac_jax.config.build import default_config
from evac_jax.devices import sharding
from evac_jax.shapes import EpisodeShapes
from tests.unit.policies.tiny import CONFIG

WIDTH, MLP, LAYERS = 256, 512, 12


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
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, compute_dtype="bfloat16"),
        algo=dataclasses.replace(config.algo, group_size=2, global_batch=2, micro_batch=1),
        env=dataclasses.replace(config.env, num_envs=2, max_episode_steps=sizes.chunk),
    )
    episode = EpisodeShapes((sizes.num_images, 16, 16, 3), sizes.chunk, sizes.chunk)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    program, arguments = make(config, mesh, sizes, episode)
    temporary = program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    layer = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)  # bytes in float32
    assert temporary < 3 * layer
