"""What a damaged or foreign policy folder says, through the import that launch.py uses."""

import dataclasses
import json
import shutil
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from evac_jax import train
from evac_jax.config.build import default_config
from evac_jax.config.libero import LiberoConfig
from evac_jax.config.schema import PolicyConfig
from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.policy_import import (
    check_card,
    check_libero,
    check_policy,
    import_policy,
    known_tasks,
    read_sizes,
)
from evac_jax.tools.episodes.collect_libero import check_player
from policies.openvla_oft.checkpoint_files import INDEX
from tests.unit.policies.tiny import NORM_STATS
from tests.unit.policy_folder import load, rewrite, shards, told, write
from tests.unit.sim import libero_fakes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("policy") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "policy")


def test_a_run_tells_a_damaged_policy_before_it_makes_or_starts_anything(folder, tmp_path):
    shards(folder)[1].unlink()
    policy = PolicyConfig(checkpoint=str(folder), unnorm_key="tiny", max_prompt_length=24)
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        policy=policy,
        log=dataclasses.replace(config.log, dir=str(tmp_path / "runs")),
        cluster=dataclasses.replace(config.cluster, compilation_cache=""),
    )
    with pytest.raises(CheckpointError) as early:
        train.run(config)
    assert not (tmp_path / "runs").exists()
    assert str(early.value) == told(folder)


def test_checking_needs_no_chunk_and_accepts_a_sound_policy(folder):
    policy = PolicyConfig(checkpoint=str(folder), unnorm_key="tiny", max_prompt_length=24)
    check_policy(policy)
    check_policy(dataclasses.replace(policy, value_head="chunk_level"))
    with pytest.raises(CheckpointError, match="another_robot"):
        check_policy(dataclasses.replace(policy, unnorm_key="another_robot"))


def test_sound_checkpoint_is_imported(folder):
    assert len(shards(folder)) >= 3
    assert load(folder).notes == ()


@pytest.mark.parametrize("keep", [0.5, 0.0, 10])
def test_truncated_shard_is_named(folder, keep):
    shard = shards(folder)[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    message = told(folder)
    assert shard.name in message
    assert "not a whole safetensors file" in message


def test_missing_shard_is_named(folder):
    shard = shards(folder)[1]
    shard.unlink()
    assert f"names files that are not there: {shard.name}" in told(folder)


def test_key_that_only_the_index_has_is_named(folder):
    index = json.loads((folder / INDEX).read_text())
    name = shards(folder)[0].name
    rewrite(folder / name, lambda tensors: tensors.pop("projector.fc1.bias", None))
    for shard in shards(folder):
        rewrite(shard, lambda tensors: tensors.pop("projector.fc1.bias", None))
    assert "projector.fc1.bias" in index["weight_map"]
    message = told(folder)
    assert "tensors that the index names and no file holds (1):\n    projector.fc1.bias" in message
    assert "missing tensors" not in message


def test_integer_tensor_is_named_with_its_dtype(folder):
    key = "language_model.model.norm.weight"

    def change(tensors):
        if key in tensors:
            tensors[key] = tensors[key].astype(np.int32)

    for shard in shards(folder):
        rewrite(shard, change)
    message = told(folder)
    assert f"tensors of another dtype than BF16, F16, F32 (1):\n    {key}: I32" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_named(folder, value, dtype):
    key = "vision_backbone.featurizer.blocks.1.mlp.fc1.weight"

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(jnp.dtype(dtype))
        if key in tensors:
            tensors[key][0, 0] = value

    for shard in shards(folder):
        rewrite(shard, change)
    assert f"tensor {key} has 1 entries of 384 that are NaN or infinite" in told(folder)


def test_statistics_without_the_key_say_which_there_are(folder):
    message = told(folder, unnorm_key="libero_spatial")
    assert "libero_spatial" in message
    assert "['tiny']" in message


def test_key_must_be_named_where_there_are_statistics(folder):
    unnamed = PolicyConfig(checkpoint=str(folder), max_prompt_length=24)
    for use in (check_policy, partial(import_policy, seed=0)):
        with pytest.raises(CheckpointError, match=r"unnorm_key: .* one of \['tiny'\], got ''"):
            use(unnamed)
    (folder / "dataset_statistics.json").write_text("{}")
    check_policy(unnamed)


def test_folder_of_another_model_is_refused_before_its_statistics_are_missed(folder):
    (folder / "config.json").write_text('{"model": "EvacModel", "config": {}}')
    assert "expected the configuration of an OpenVLA checkpoint" in told(folder)


def test_statistics_that_are_not_whole_are_told(folder):
    (folder / "dataset_statistics.json").write_text(json.dumps({"tiny": {"action": {"q01": [0]}}}))
    assert "statistics 'tiny' lack action.q01 or action.q99" in told(folder)
    nan = {"tiny": {"action": {"q01": [0.0, None], "q99": [1.0, 1.0]}}}
    (folder / "dataset_statistics.json").write_text(json.dumps(nan))
    assert "lists of finite numbers" in told(folder)


@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json", INDEX])
def test_json_that_is_cut_short_is_named(folder, name):
    (folder / name).write_text((folder / name).read_text()[:40])
    assert f"{name}: no valid JSON" in told(folder)


def test_index_cannot_name_files_elsewhere(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["projector.fc1.bias"] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert "expected plain file names, got ['../other.safetensors']" in told(folder)


def test_pickles_alone_are_explained(folder):
    for shard in [*shards(folder), folder / INDEX]:
        shard.unlink()
    assert "neither model.safetensors.index.json nor model.safetensors" in told(folder)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    message = told(folder)
    assert "unpickling runs code" in message
    assert "safe_serialization=True" in message


def test_adapter_in_the_place_of_a_policy_is_explained(folder, whole, tmp_path):
    for shard in [*shards(folder), folder / INDEX]:
        shard.unlink()
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / "adapter_config.json").write_text("{}")
    assert "as lora_adapter" in told(folder)


@pytest.mark.parametrize(
    "name",
    [
        "action_head--150000_checkpoint.pt",
        "action_head.safetensors",
        "noisy_action_projector--5_checkpoint.pt",
        "proprio_projector--150000_checkpoint.pt",
        "vision_backbone--150000_checkpoint.pt",
    ],
)
def test_checkpoint_that_acts_through_another_head_is_refused(folder, name):
    (folder / name).write_bytes(b"")
    message = told(folder)
    assert f"  {name}: " in message
    assert "does not act through its action tokens" in message


def test_head_among_the_tensors_is_listed(folder):
    rewrite(
        shards(folder)[0],
        lambda tensors: tensors.update({"action_head.fc1.weight": np.zeros((2, 2), np.float32)}),
    )
    assert "unexpected tensors (1):\n    action_head.fc1.weight" in told(folder)


def test_leftovers_beside_the_index_are_passed_over_and_noted(folder):
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    save_file({"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    (note,) = load(folder).notes
    assert "not read" in note
    assert "model.safetensors, pytorch_model.bin" in note


def test_key_of_statistics_is_found_with_and_without_its_suffix(folder):
    stats = {"libero_no_noops": NORM_STATS["tiny"], "plain": NORM_STATS["tiny"]}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    for asked, there in (("libero", "libero_no_noops"), ("plain_no_noops", "plain")):
        loaded = load(folder, unnorm_key=asked)
        assert loaded.model.statistics.high == (2.0, 1.0, 1.0)
        assert loaded.notes == (f"statistics '{there}' stand in for '{asked}'",)


def test_settings_that_the_config_tells_of_the_training_must_be_those_of_the_run(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())

    def tell(**settings):
        path.write_text(json.dumps(config | settings))

    tell(unnorm_key="tiny_no_noops", num_action_chunks=2, num_images_in_input=2, action_dim=3)
    load(folder)
    for settings, message in (
        ({"unnorm_key": "robot"}, "unnorm_key = 'robot': expected these statistics, got 'tiny'"),
        ({"num_action_chunks": 25}, "num_action_chunks = 25: expected chunk = 25, got 2"),
        ({"num_images_in_input": 1}, "num_images_in_input = 1: expected num_images = 1, got 2"),
        ({"action_dim": 7}, "action_dim = 7: expected action_dim = 7, got 3 by the action stat"),
    ):
        tell(**settings)
        assert message in told(folder)
    policy = PolicyConfig(checkpoint=str(folder), unnorm_key="tiny", max_prompt_length=24)
    tell(num_action_chunks=25)
    with pytest.raises(CheckpointError, match="num_action_chunks"):
        read_sizes(policy, chunk=8)


def test_statistics_may_stand_in_the_config_and_the_file_wins(folder):
    config = json.loads((folder / "config.json").read_text())
    other = {"tiny": {"action": {"q01": [-9.0] * 3, "q99": [9.0] * 3}}}
    (folder / "config.json").write_text(json.dumps(config | {"norm_stats": other}))
    loaded = load(folder)
    assert loaded.model.statistics.high == (2.0, 1.0, 1.0)
    assert "dataset_statistics.json differs from config.json" in loaded.notes[0]
    (folder / "dataset_statistics.json").unlink()
    assert load(folder).model.statistics.high == (9.0, 9.0, 9.0)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"q01": [2.0, 0, 0], "q99": [-2.0, 1, 1]}, "dimensions [0]"),
        ({"q01": [0.0] * 3, "q99": [1.0] * 3, "mask": None}, "got None"),
        ({"q01": [0.0] * 3, "q99": [1.0] * 3, "mask": [True]}, "expected 3 times true or false"),
        ({"q01": ["a"] * 3, "q99": [1.0] * 3}, "lists of finite numbers"),
    ],
)
def test_statistics_that_would_change_actions_are_refused(folder, action, message):
    (folder / "dataset_statistics.json").write_text(json.dumps({"tiny": {"action": action}}))
    assert message in told(folder)


def test_statistics_that_are_null_count_as_none(folder):
    config = json.loads((folder / "config.json").read_text()) | {"norm_stats": None}
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)
    (folder / "dataset_statistics.json").unlink()
    assert "is not among the checkpoint's statistics []" in told(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-00003"])
def test_pointer_of_git_lfs_is_told(folder, name):
    path = next(path for path in sorted(folder.iterdir()) if path.name.startswith(name[:14]))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert f"{path.name}: a Git LFS pointer" in told(folder)


def test_tokenizer_that_is_cut_short_is_named(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:100])
    assert "tokenizer.json: not a whole tokenizer" in told(folder)


def test_prompt_that_is_too_long_is_told_before_anything_is_made_or_started(folder, tmp_path):
    packed = tmp_path / "starts"
    packed.mkdir()
    text = "push the red block " * 9
    (packed / "card.json").write_text(json.dumps({"instructions": [text]}))
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        policy=PolicyConfig(checkpoint=str(folder), unnorm_key="tiny", max_prompt_length=24),
        env=dataclasses.replace(config.env, initial_states="npy", initial_states_path=str(packed)),
    )
    assert known_tasks(config) == [text]
    with pytest.raises(CheckpointError, match="raise policy.max_prompt_length"):
        check_policy(config.policy, known_tasks(config))


@pytest.mark.parametrize("ground_truth", ["miniature", "libero"])
@pytest.mark.parametrize("starts", ["miniature", "npy"])
@pytest.mark.parametrize("simulator", ["world_model", "ground_truth"])
def test_instructions_are_known_before_anything_starts(tmp_path, ground_truth, starts, simulator):
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        libero=dataclasses.replace(libero_fakes.write(tmp_path), tasks=(1,)),
        env=dataclasses.replace(config.env, initial_states=starts, simulator=simulator),
        eval=dataclasses.replace(config.eval, ground_truth=ground_truth),
    )
    in_miniature = ground_truth == "miniature" or (starts, simulator) == (
        *("miniature", "world_model"),
    )
    expected = list(INSTRUCTIONS) * in_miniature + ["close the drawer"] * (ground_truth == "libero")
    assert known_tasks(config) == expected


def test_policy_of_another_libero_is_refused_before_anything_starts(folder, monkeypatch):
    seen = LiberoConfig(image_size=64, action_repeat=2)
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        libero=seen,
        policy=PolicyConfig(checkpoint=str(folder)),
        eval=dataclasses.replace(config.eval, ground_truth="libero"),
    )
    check_libero(config)  # no card, as published policies
    (folder / "card.json").write_text(json.dumps({"start": {"libero": seen.facts()}}))
    check_libero(config)
    with pytest.raises(ConfigError, match=r"policy\.checkpoint.*action_repeat \(2 and 1\)"):
        check_libero(other := dataclasses.replace(config, libero=LiberoConfig(image_size=64)))
    monkeypatch.setattr(LiberoConfig, "instructions", ["close the drawer"])
    player = dataclasses.replace(config.policy, unnorm_key="tiny")
    with pytest.raises(ConfigError, match="action_repeat"):
        check_player(dataclasses.replace(other, policy=PolicyConfig()), player)


CARD = {"gripper": "none", "unnorm_key": "tiny_no_noops", "chunk": 2, "keep_stop_token": True}


def test_policy_is_asked_as_its_card_says(folder, tmp_path):
    policy = PolicyConfig(checkpoint=str(folder), unnorm_key="tiny", keep_stop_token=True)
    asked = {"gripper": ("env.gripper", "none"), "chunk": ("serve.chunk", 2)}
    others = {"gripper": ("env.gripper", "libero"), "chunk": ("serve.chunk", 8)}
    check_card(policy, **others)  # no card, as published policies
    for card in (CARD, {"start": CARD}, {"gripper": None, "chunk": 2, "start": CARD}):
        (folder / "card.json").write_text(json.dumps(card))
        check_card(policy, **asked)
        with pytest.raises(ConfigError) as error:
            check_card(PolicyConfig(checkpoint=str(folder), unnorm_key="robot"), **others)
        told = str(error.value).splitlines()
        assert sorted(line.partition(": expected ")[0] for line in told) == [
            "config.env.gripper",
            "config.policy.keep_stop_token",
            "config.policy.unnorm_key",
            "config.serve.chunk",
        ]
        assert "config.env.gripper: expected gripper 'none', with which" in str(error.value)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "card.json").write_text(json.dumps(CARD | {"gripper": "libero"}))
    adapted = dataclasses.replace(policy, lora_adapter=str(tmp_path / "adapter"))
    check_card(adapted, gripper=("env.gripper", "libero"))


@pytest.mark.parametrize("start", [train.run, train.evaluate_only])
def test_card_that_the_run_contradicts_is_told_before_anything_starts(folder, tmp_path, start):
    (folder / "card.json").write_text(json.dumps({"gripper": "none"}))
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        policy=PolicyConfig(checkpoint=str(folder), unnorm_key="tiny", max_prompt_length=128),
        log=dataclasses.replace(config.log, dir=str(tmp_path / "runs")),
        cluster=dataclasses.replace(config.cluster, compilation_cache=""),
    )
    with pytest.raises(ConfigError, match=r"env\.gripper: expected gripper 'none'.*got 'libero'"):
        start(config)


def test_tokenizer_of_another_model_is_refused(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    words = {word: n for word, n in content["model"]["vocab"].items() if n < 500}
    content["model"] |= {"vocab": words, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "expected 576 tokens" in told(folder)


def test_layers_that_the_weights_cannot_hold_are_told_before_anything_is_made_for_them(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 10**7
    path.write_text(json.dumps(config))
    assert "text_config.num_hidden_layers is 10000000" in told(folder)
