"""The values that RLinf itself can read, by key: another one is a mistake in the file.

What is copied to a field is of the field's type; `KINDS` has the other keys on which fields depend.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evac_jax.config.build import default_config
from evac_jax.config.fields import Kind, walk
from evac_jax.tools.hub.rlinf_keys import ROWS
from evac_jax.tools.hub.rlinf_row import To
from policies.ranges import Range

_INT, _COUNT, _NUMBER = Kind(int), Kind(int, range=Range(1)), Kind(float)
_FLAG, _TEXT = Kind(bool), Kind(str)
KINDS = {
    "cluster.num_nodes": _COUNT,
    "runner.logger.experiment_name": _TEXT,
    "runner.max_epochs": _COUNT,
    "runner.max_steps": _INT,
    "runner.val_check_interval": _INT,
    "runner.save_interval": _INT,
    "algorithm.group_size": _COUNT,
    "algorithm.n_chunk_steps": _COUNT,
    "algorithm.adv_type": _TEXT,
    "algorithm.sampling_params.temperature_eval": _NUMBER,
    "algorithm.sampling_params.top_k": _INT,
    "env.enable_offload": _FLAG,
    "env.train.use_rel_reward": _FLAG,
    "env.train.reward_coef": _NUMBER,
    "env.train.num_group": _COUNT,
    "env.train.group_size": _COUNT,
    "env.train.num_envs": _COUNT,
    "env.train.initial_image_path": _TEXT,
    "rollout.enable_offload": _FLAG,
    "actor.micro_batch_size": _COUNT,
    "actor.enable_offload": _FLAG,
    "actor.model.add_value_head": _FLAG,
    "actor.model.num_action_chunks": _COUNT,
    "actor.model.is_lora": _FLAG,
    "actor.model.lora_rank": _COUNT,
    "actor.model.lora_path": replace(_TEXT, optional=True),
    "actor.model.gradient_checkpointing": _FLAG,
    "actor.optim.adam_beta1": _NUMBER,
    "actor.optim.adam_beta2": _NUMBER,
    "actor.optim.critic_warmup_steps": replace(_INT, range=Range(0), optional=True),
    "actor.optim.lr_warmup_steps": _INT,
    "actor.fsdp_config.fsdp_size": _INT,
}


@functools.cache
def fields() -> dict[str, Kind]:
    """Return {field of our configuration: its values}."""
    return {f.name: f.kind for name in ("grpo", "ppo") for f in walk(default_config(name))}


def mistakes(values: Mapping[str, Any]) -> list[str]:
    """Return one line for every value that RLinf could not read, or only as something else."""
    found: list[str] = []
    for key, row in ROWS.items():
        kind = KINDS.get(key)
        copied = fields()[row.convert.field] if isinstance(row.convert, To) else None
        if key in values and (read := kind or copied):
            wrong: list[str] = []
            read.convert(values[key], key, wrong)
            found += wrong or (kind.problems(values[key], key) if kind else [])
    return [line.removeprefix("config.") for line in found]


def refused(values: Mapping[str, Any]) -> str:
    """Return why a field here cannot have its value, "" if all can."""
    for name, value in values.items():
        wrong: list[str] = []
        fields()[name].convert(value, name, wrong)
        for line in wrong or fields()[name].problems(value, name):
            return line.removeprefix(f"config.{name}: ")
    return ""
