"""A small policy folder, and what its import by launch.py says."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from evac_jax.config.schema import PolicyConfig
from evac_jax.errors import CheckpointError
from evac_jax.policy_import import import_policy
from policies.openvla_oft.export_hf import create_policy_folder
from tests.unit.policies.tiny import CONFIG, NORM_STATS, TASKS, make_model

MORE = {"seed": 0, "chunk": CONFIG.chunk, "num_images": CONFIG.num_images}


def write(path: Path) -> Path:
    """Write a policy in three shards or more."""
    model = make_model(value_type="none")
    return create_policy_folder(
        model, path, tasks=TASKS, norm_stats=NORM_STATS, max_shard_bytes=100_000
    )


def load(folder, **changes):
    values = {"checkpoint": str(folder), "unnorm_key": "tiny", "max_prompt_length": 24} | changes
    return import_policy(PolicyConfig(**values), **MORE)


def told(folder, **changes) -> str:
    """The message of the import's failure, which must leave every file as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as error:
        load(folder, **changes)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before == after
    message = str(error.value)
    assert message.startswith("config.policy.checkpoint: cannot import")
    return message


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def rewrite(shard, change):
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
