import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evac_jax import checkpoint
from evac_jax.config.build import default_config, to_dict
from evac_jax.errors import CheckpointError


def _state(seed: int):
    key = jax.random.key(seed)
    return {"params": {"w": jax.random.normal(key, (3, 4))}, "updates": jnp.asarray(seed)}


def test_restore_returns_what_was_saved_and_keeps_the_newest(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=2)
    for iteration in (1, 2, 3):
        checkpoints.save(iteration, _state(iteration), {"starts": {"calls": iteration}})
    assert checkpoints.latest() == 3
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["2", "3"]
    checkpoints.close()
    # As after a restart: a manager that has saved nothing itself.
    state, meta = checkpoint.Checkpoints(tmp_path / "c", keep=2).restore(3, _state(0))
    assert meta == {"starts": {"calls": 3}}
    jax.tree.map(np.testing.assert_array_equal, state, _state(3))


def test_restore_names_every_array_that_does_not_fit(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, _state(1), {})
    other = {"params": {"w": jnp.zeros((3, 5)), "b": jnp.zeros(2)}}
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, other)
    message = str(error.value)
    assert "missing in the checkpoint: params/b" in message
    assert "not wanted here: updates" in message
    assert "params/w: expected shape (3, 5), got (3, 4)" in message


def test_resuming_with_another_policy_is_refused():
    saved = to_dict(default_config("grpo"))
    current = json.loads(json.dumps(saved))
    current["policy"]["value_head"] = "chunk_level"
    current["train"]["iterations"] = 99
    with pytest.raises(CheckpointError, match="policy.value_head: the run has 'none'") as error:
        checkpoint.check_resumable(saved, current)
    assert "iterations" not in str(error.value)


def test_latest_finds_the_newest_run_of_its_own_algorithm(tmp_path):
    config = default_config("grpo")
    for name, algorithm in (("a", "grpo"), ("b", "ppo")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / checkpoint.CONFIG_FILE).write_text(json.dumps({"algorithm": algorithm}))
    config = dataclasses.replace(
        config,
        log=dataclasses.replace(config.log, dir=str(tmp_path)),
        checkpoint=dataclasses.replace(config.checkpoint, restore="latest"),
    )
    assert checkpoint.find_run(config).name == "a"


def test_missing_run_is_explained(tmp_path):
    config = default_config("grpo")
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, restore=str(tmp_path / "no"))
    )
    with pytest.raises(CheckpointError, match="is not a run folder"):
        checkpoint.find_run(config)
