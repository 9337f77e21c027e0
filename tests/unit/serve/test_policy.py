import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from absl import logging
from flax import nnx

from evac_jax import checkpoint
from evac_jax.config.build import default_config, to_dict
from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.devices import found
from evac_jax.errors import CheckpointError, ConfigError, DataError
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.policy_import import import_policy
from evac_jax.serve import run as serve_run
from evac_jax.serve.policy import GRIPPER_RULES, load
from evac_jax.sim.actions import GRIPPER_RULES as SIMULATORS
from evac_jax.sim.actions import apply_gripper_rule
from tests.integration.tiny_weights import SMALL_POLICY

FRAMES = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)


def config_of(folder, *, step=-1, gripper="none", restore="", serve=None, **policy):
    config = default_config("grpo")
    policy = {
        "checkpoint": str(folder),
        "unnorm_key": "miniature",
        "max_prompt_length": SMALL_POLICY.max_prompt_length,
        "scan_layers": False,
    } | policy
    return dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, **policy),
        env=dataclasses.replace(config.env, gripper=gripper),
        serve=dataclasses.replace(config.serve, **(serve or {})),
        checkpoint=dataclasses.replace(config.checkpoint, step=step, restore=str(restore)),
    )


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """A run whose checkpoints hold the start policy, and one whose last layer is turned round."""
    folder = tmp_path_factory.mktemp("run")
    config = config_of(weights / "policy", gripper="libero", value_head="chunk_level")
    world_model = dataclasses.replace(config.world_model, checkpoint=str(weights / "world_model"))
    config = dataclasses.replace(config, world_model=world_model)
    (folder / checkpoint.CONFIG_FILE).write_text(json.dumps(to_dict(config)))
    params = nnx.split(import_policy(config.policy, seed=0).model, nnx.Param, ...)[1]
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=None)
    for iteration, sign in ((1, 1), (2, -1)):
        checkpoints.save(iteration, {"params": jax.tree.map(lambda x, s=sign: s * x, params)}, {})
    checkpoints.close()
    return folder


@pytest.mark.parametrize("rule", list(SIMULATORS))
def test_gripper_rules_are_those_of_the_simulators(rule):
    actions = np.linspace(-1, 2, 31, dtype=np.float32)[:, None]
    expected = apply_gripper_rule(torch.from_numpy(actions), rule).numpy()
    np.testing.assert_array_equal(GRIPPER_RULES[rule](actions), expected)
    assert set(GRIPPER_RULES) == set(SIMULATORS)


def test_run_its_checkpoint_and_the_folder_that_it_began_from_are_served(run, weights, monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *words: warned.append(text % words))
    start = load(config_of(weights / "policy"))
    first = load(config_of(run / "checkpoints" / "1"))
    newest = load(config_of(run))
    assert (start.iteration, first.iteration, newest.iteration) == (None, 1, 2)
    assert len(warned) == 2
    assert "env.gripper: served with 'none', the run was evaluated with 'libero'" in warned[0]
    decisions = [policy.decide(FRAMES, INSTRUCTIONS[0]) for policy in (start, first, newest)]
    np.testing.assert_array_equal(decisions[0], decisions[1])
    assert (decisions[0] != decisions[2]).any()
    assert decisions[0].shape == (start.chunk, start.dim) == (8, 7)
    assert decisions[0].dtype == np.float32


def test_run_is_served_when_checkpoint_restore_names_it(run, weights):
    restored = config_of(weights / "policy", restore=run, step=1, value_head="chunk_level")
    policy = load(restored)
    assert policy.iteration == 1


@pytest.mark.parametrize(
    ("serve", "why"),
    [
        ({"chunk": 4}, "decides on 8 actions at once, expected the same, got 4"),
        ({"image_keys": ("a", "b")}, "has 1 cameras"),
    ],
)
def test_run_is_refused_when_it_had_another_chunk_or_other_cameras(run, serve, why):
    with pytest.raises(ConfigError, match=why):
        load(config_of(run, serve=serve))


def test_chunk_is_told_when_the_world_model_of_a_run_is_gone(run, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "warning", lambda text, *words: told.append(text % words))
    shutil.copytree(run, tmp_path / "moved")
    saved = json.loads((run / checkpoint.CONFIG_FILE).read_text())
    saved["world_model"]["checkpoint"] = "gone"
    (tmp_path / "moved" / checkpoint.CONFIG_FILE).write_text(json.dumps(saved))
    assert load(config_of(tmp_path / "moved", gripper="libero")).chunk == 8
    assert told == [
        "config.serve.chunk: taken to be 8; the run's world model is not at 'gone' any more"
    ]


def test_policy_folder_is_served_as_its_card_says(weights, tmp_path):
    folder = shutil.copytree(weights / "policy", tmp_path / "policy")
    (folder / "card.json").write_text('{"gripper": "none", "chunk": 8, "keep_stop_token": false}')
    assert load(config_of(folder)).chunk == 8
    for asked, field in (
        ({"gripper": "libero"}, r"env\.gripper"),
        ({"keep_stop_token": True}, r"policy\.keep_stop_token"),
        ({"serve": {"chunk": 4}}, r"serve\.chunk"),
    ):
        with pytest.raises(ConfigError, match=field):
            load(config_of(folder, **asked))


@pytest.mark.parametrize("restored", [False, True])
def test_large_policy_is_refused_when_it_would_leave_a_gpu_unused(
    run, weights, monkeypatch, restored
):
    unused = dataclasses.replace(found.look(), gpus=1, jax_platform="cpu")
    monkeypatch.setattr(found, "look", lambda: unused)
    monkeypatch.setattr(found, "LARGE", 10)
    config = config_of(run if restored else weights / "policy", serve={"port": 0})
    config = dataclasses.replace(
        config, cluster=dataclasses.replace(config.cluster, compilation_cache="")
    )
    with pytest.raises(ConfigError, match=r"policy\.checkpoint: .* computed on the CPU"):
        serve_run.run(config)


def test_what_is_neither_run_nor_policy_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected a run, a checkpoint of a run"):
        load(config_of(tmp_path))


def test_policy_without_units_is_refused(weights):
    with pytest.raises(CheckpointError, match=r"unnorm_key.*one of \['miniature'\], got ''"):
        load(config_of(weights / "policy", unnorm_key=""))


def test_instruction_that_the_world_does_not_have_is_warned_of_once(run, weights, monkeypatch):
    warned = []
    shutil.copy(f"{MINIATURE_WEIGHTS}/world.json", run)
    policy = load(config_of(run, gripper="libero"))
    monkeypatch.setattr(logging, "warning", lambda text, *words: warned.append(text % words))
    for instruction in (INSTRUCTIONS[0].upper(), "fly to the moon", "Fly to the moon"):
        policy.decide(FRAMES, instruction)
    assert len(warned) == 1
    assert warned[0].startswith("'fly to the moon' is none of the policy's world; that has (")
    assert INSTRUCTIONS[1] in warned[0]


def test_instruction_that_is_no_prompt_is_refused(weights):
    policy = load(config_of(weights / "policy"))
    with pytest.raises(DataError, match="^the server's policy: .*raise policy.max_prompt_length"):
        policy.decide(FRAMES, "put the red block on the plate " * 20)


def test_draws_repeat_with_the_seed_and_differ_from_decision_to_decision(weights):
    config = config_of(weights / "policy", eval_temperature=1.0)
    one, other = load(config), load(config)
    one.warm_up(1, ((64, 64),))
    drawn = [one.decide(FRAMES, INSTRUCTIONS[0]) for _ in range(2)]
    assert (drawn[0] != drawn[1]).any()
    np.testing.assert_array_equal(drawn[0], other.decide(FRAMES, INSTRUCTIONS[0]))
