"""Presets for the published runs: whole but for the paths that only a user has."""

import importlib

import pytest

from configs import grpo, ppo
from evac_jax.config.build import from_config_dict
from evac_jax.errors import ConfigError

PATHS = {
    "policy": ("checkpoint",),
    "world_model": ("checkpoint",),
    "reward": ("checkpoint",),
    "env": ("pose_model", "initial_states_path"),
}
SMALL = ("miniature", "own", "libero_small")
CASES = [(f, name) for f in (grpo, ppo) for name in f.PRESETS if name not in SMALL]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_preset_names_every_missing_path_in_one_message(file, name):
    with pytest.raises(ConfigError) as error:
        from_config_dict(file.get_config(name).to_dict())
    lines = str(error.value).splitlines()[1:]
    expected = {f"config.{s}.{field}" for s, fields in PATHS.items() for field in fields}
    assert {line.strip().split(":")[0] for line in lines} == expected


def _filled(file, name, folder):
    values = file.get_config(name).to_dict()
    for section, fields in PATHS.items():
        for field in fields:
            values[section][field] = str(folder)
    return from_config_dict(values)


@pytest.mark.parametrize(("file", "name"), CASES)
def test_preset_is_valid_once_its_paths_are_given(file, name, tmp_path):
    config = _filled(file, name, tmp_path)
    chunks = config.episodes_per_iteration * config.env.max_episode_steps // 8
    assert chunks == 8192  # as published
    algorithm = importlib.import_module(f"algos.{config.algorithm}")
    problems = algorithm.problems(
        config.algo, num_samples=chunks, reward_coefficient=config.reward.coefficient
    )
    assert not problems
    devices = config.simulator.processes
    assert config.algo.micro_batch % devices == config.env.num_envs % devices == 0


def test_spatial_preset_holds_the_published_values(tmp_path):
    config = _filled(grpo, "libero_spatial", tmp_path)
    assert (config.algo.group_size, config.env.num_envs, config.rollout.epochs) == (2, 16, 16)
    assert (config.algo.global_batch, config.algo.micro_batch) == (256, 32)
    assert (config.algo.clip_low, config.algo.clip_high) == (0.2, 0.28)
    assert (config.algo.filter_rewards, config.algo.filter_low, config.algo.filter_high) == (
        *(True, 0.5),
        4.5,
    )
    assert (config.reward.coefficient, config.reward.relative) == (5.0, True)
    assert (config.policy.temperature, config.policy.eval_temperature) == (1.6, 1.6)
    assert (config.policy.top_k, config.policy.lora_rank) == (-1, 0)
    assert (config.world_model.steps, config.world_model.eta) == (50, 1.0)
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (2e-5, 1e-5, 0.01)
    assert config.seed == 1234


def test_small_presets_change_what_they_are_named_for(tmp_path):
    for file in (grpo, ppo):
        full, lora, one = (
            _filled(file, name, tmp_path) for name in ("libero_spatial", "lora", "one_gpu_80gb")
        )
        assert lora.algo == full.algo
        assert lora.policy.lora_rank == one.policy.lora_rank == 32
        assert one.simulator.processes == 1 < full.simulator.processes
        assert one.episodes_per_iteration == full.episodes_per_iteration
