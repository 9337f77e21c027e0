"""Renders the dataclass defaults to a ConfigDict, and the presets that every algorithm shares.

A preset only overrides: the fields, their meaning and their ranges are in `evac_jax/config.py`.
"""

import dataclasses
import types
import typing

from ml_collections import config_dict

from evac_jax.config import MINIATURE_WEIGHTS, default_config
from evac_jax.config_checks import nearest
from evac_jax.errors import ConfigError


def render(value) -> config_dict.ConfigDict:
    """Return a dataclass as a ConfigDict; optional fields at None keep their type for the flags."""
    result = config_dict.ConfigDict()
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if dataclasses.is_dataclass(entry):
            result[field.name] = render(entry)
        elif isinstance(hints[field.name], types.UnionType):
            kind = next(t for t in typing.get_args(hints[field.name]) if t is not type(None))
            result[field.name] = config_dict.placeholder(kind)
            result[field.name] = entry
        else:
            result[field.name] = entry
    return result


def base(algorithm: str, preset: str, presets: dict) -> config_dict.ConfigDict:
    """Return the defaults of `algorithm` changed by the named preset.

    Raises:
        ConfigError: no such preset.
    """
    if preset not in presets:
        raise ConfigError(
            f"unknown preset {preset!r} for {algorithm}; there are {sorted(presets)}."
            f"{nearest(preset, presets)}"
        )
    config = render(default_config(algorithm))
    presets[preset](config)
    return config


def miniature(config: config_dict.ConfigDict) -> None:
    """Built-in tabletop: 64-pixel frames, shipped weights, two CPU cores, minutes.

    Scene ids are seeds: 0 .. 10^6 train, the two ranges above choose and report.
    """
    weights = MINIATURE_WEIGHTS
    config.policy.checkpoint = f"{weights}/policy"
    config.policy.unnorm_key = "miniature"
    config.policy.max_prompt_length = 28
    config.policy.scan_layers = False
    config.policy.merge_projections = True
    config.policy.temperature = 0.5  # the start policy was taught with wide targets
    config.world_model.checkpoint = f"{weights}/world_model"
    config.world_model.steps = 2
    config.world_model.eta = 0.0
    config.reward.checkpoint = f"{weights}/reward"
    config.reward.success_frames = 2
    config.reward.judged_frames = 2
    config.env.pose_model = f"{weights}/pose_model"
    config.env.initial_states = "miniature"
    config.env.train_starts = (0, 1_000_000)
    config.env.num_envs = 128
    config.env.max_episode_steps = 32
    config.simulator.processes = 2
    config.eval.interval = 4
    config.eval.starts = (1_000_000, 2_000_000)
    config.eval.episodes = 64
    config.eval.ground_truth = "miniature"
    config.eval.ground_truth_episodes = 256
    config.train.iterations = 8
    config.checkpoint.interval = 1


def libero(config: config_dict.ConfigDict) -> None:
    """What all LIBERO presets share: full sizes, and paths that only the user has."""
    config.policy.value_head = "none"
    config.policy.temperature = 1.6
    config.policy.eval_temperature = 1.6
    config.policy.param_dtype = "float32"
    config.policy.compute_dtype = "bfloat16"
    config.policy.remat = "full"
    config.world_model.steps = 50
    config.reward.coefficient = 5.0
    config.env.initial_states = "npy"
    config.env.max_episode_steps = 256
    config.env.num_envs = 16
    config.rollout.epochs = 16
    config.simulator.devices = ("cuda",)
    # Where eval.ground_truth is "libero": a process for each task (1.4 GB), ten episodes of each.
    config.eval.ground_truth_envs = 10
    config.eval.ground_truth_episodes = 100
    config.train.iterations = 1000
    config.seed = 1234
