"""What a damaged or foreign policy folder says, through the import that launch.py uses."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evac_jax import train
from evac_jax.config.build import default_config
from evac_jax.config.schema import PolicyConfig
from evac_jax.errors import CheckpointError
from evac_jax.policy_import import check_policy, import_policy
from policies.openvla_oft import hf_keys, peft
from policies.openvla_oft.checkpoint_files import INDEX
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.import_hf import load_policy
from tests.unit.policies.tiny import CONFIG, NORM_STATS, TASKS, make_model

POLICY = PolicyConfig(unnorm_key="tiny", max_prompt_length=24)
MORE = {"seed": 0, "chunk": CONFIG.chunk, "num_images": CONFIG.num_images}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A policy in three shards or more."""
    path = tmp_path_factory.mktemp("policy") / "whole"
    model = make_model(value_type="none")
    return create_policy_folder(
        model, path, tasks=TASKS, norm_stats=NORM_STATS, max_shard_bytes=100_000
    )


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "policy")


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


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def rewrite(shard, change):
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


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


def test_statistics_may_stand_in_the_config_and_the_file_wins(folder):
    config = json.loads((folder / "config.json").read_text())
    other = {"tiny": {"action": {"q01": [-9.0] * 3, "q99": [9.0] * 3}}}
    (folder / "config.json").write_text(json.dumps(config | {"norm_stats": other}))
    loaded = load(folder)
    assert loaded.model.statistics.high == (2.0, 1.0, 1.0)
    assert "dataset_statistics.json differs from config.json" in loaded.notes[0]
    (folder / "dataset_statistics.json").unlink()
    assert load(folder).model.statistics.high == (9.0, 9.0, 9.0)


@pytest.fixture
def foreign_adapter(tmp_path):
    wide = make_model(value_type="none", intermediate_size=48)
    base = create_policy_folder(wide, tmp_path / "wide", tasks=TASKS, norm_stats=NORM_STATS)
    model = load_policy(
        base, unnorm_key="tiny", lora_rank=2, chunk=2, num_images=2, lora_targets=("gate_proj",)
    ).model
    return peft.save_adapter(model, tmp_path / "adapter", base=base)


def test_adapter_for_another_base_is_refused_pair_by_pair(folder, foreign_adapter):
    message = told(folder, lora_adapter=str(foreign_adapter))
    assert "LoRA pairs that do not fit (3):" in message
    assert (
        "layers.0.mlp.gate_proj: A (2, 32) and B (48, 2) of rank 2 do not fit (40, 32)" in message
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_adapter_that_is_damaged_is_refused(whole, folder, tmp_path, rank):
    targets = {"lora_targets": ("proj", "gate_proj")}
    model = load_policy(whole, unnorm_key="", lora_rank=2, chunk=2, num_images=2, **targets).model
    adapter = peft.save_adapter(model, tmp_path / "adapter", base=whole)
    weights = adapter / peft.WEIGHTS
    key = "base_model.model.language_model.model.layers.0.mlp.gate_proj.lora_A.weight"
    sound = weights.read_bytes()

    def change(tensors):
        tensors[key][0, 0] = np.nan

    rewrite(weights, change)
    settings = {"lora_adapter": adapter, "lora_rank": rank, "unnorm_key": "", **targets}
    with pytest.raises(ValueError, match=f"tensor {key} has 1 entries"):
        load_policy(folder, **settings)
    weights.write_bytes(sound[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_policy(folder, **settings)
    (adapter / peft.CONFIG).write_text(json.dumps({"lora_alpha": 2}))
    with pytest.raises(ValueError, match="r: needed"):
        load_policy(folder, **settings)


@pytest.fixture
def adapter(whole, tmp_path):
    """An adapter of one matrix, as PEFT lays it out."""
    rng = np.random.default_rng(0)
    module = "base_model.model.language_model.model.layers.1.self_attn.q_proj"
    pair = {
        f"{module}.lora_A.weight": rng.normal(size=(2, 32)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(size=(32, 2)).astype(np.float32),
    }
    path = tmp_path / "peft"
    path.mkdir()
    save_file(pair, path / peft.WEIGHTS)
    (path / peft.CONFIG).write_text(
        json.dumps({"r": 2, "lora_alpha": 4, "base_model_name_or_path": "policy"})
    )
    return path


def describe(adapter, **changes):
    values = json.loads((adapter / peft.CONFIG).read_text()) | changes
    (adapter / peft.CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "eva"])
def test_adapter_whose_start_changed_its_base_is_refused(folder, adapter, start):
    describe(adapter, init_lora_weights=start)
    message = told(folder, lora_adapter=str(adapter))
    assert f"init_lora_weights = '{start}'" in message
    assert "Convert the adapter" in message
    describe(adapter, init_lora_weights=True)  # as PEFT's own conversion writes
    assert load(folder, lora_adapter=str(adapter)).notes == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "2"),
        ("r", True),
        ("lora_alpha", None),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("peft_type", "LOHA"),
        ("new_kind_of_scaling", 0.5),
    ],
)
def test_adapter_is_refused_by_the_field_that_cannot_be_taken(folder, adapter, field, value):
    describe(adapter, **{field: value})
    assert field in told(folder, lora_adapter=str(adapter))


def test_adapter_without_a_pair_is_refused(folder, adapter):
    head = "base_model.model.language_model.lm_head.base_layer.weight"
    save_file({head: np.zeros((640, 32), np.float32)}, adapter / peft.WEIGHTS)
    assert "got none among 1 tensors" in told(folder, lora_adapter=str(adapter))


def test_adapter_as_a_pickle_or_in_a_sub_folder_is_explained(folder, adapter, tmp_path):
    upper = tmp_path / "run"
    upper.mkdir()
    shutil.copytree(adapter, upper / "checkpoint-9")
    assert f"give {upper / 'checkpoint-9'}" in told(folder, lora_adapter=str(upper))
    (adapter / peft.WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "safe_serialization=True" in told(folder, lora_adapter=str(adapter))


def test_adapter_given_as_the_policy_names_its_base(adapter):
    message = told(adapter)
    assert "is a LoRA adapter, no policy of its own" in message
    assert "(policy)" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"module.{key}",
        lambda key: f"base_model.model.{key}",
        lambda key: key.replace("language_model.", "language_model._orig_mod."),
        lambda key: (
            key.replace("language_model.model.", "model.language_model.")
            if "lm_head" not in key
            else "lm_head.weight"
        ),
    ],
)
def test_known_wrappers_of_names_are_left_out(whole, tmp_path, change):
    tensors = {k: v for shard in shards(whole) for k, v in load_file(shard).items()}
    folder = tmp_path / "renamed"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({change(key): value for key, value in tensors.items()}, folder / "model.safetensors")
    loaded = load(folder)
    assert "go by plainer names" in loaded.notes[0]
    for path, variable in hf_keys.parameters(loaded.model):
        expected = tensors[hf_keys.source_of(path, loaded.model.config).keys[0]]
        assert variable[...].size % expected.size == 0
        assert float(variable[...].ravel()[0]) == expected.ravel()[0]


def test_unknown_wrapper_of_names_is_named(whole, tmp_path):
    tensors = {k: v for shard in shards(whole) for k, v in load_file(shard).items()}
    folder = tmp_path / "renamed"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    renamed = {f"student.{key}": value for key, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    assert "names begin with ['student.'], which is not known here" in told(folder)


def test_pairs_among_the_weights_are_explained(folder):
    key = "projector.fc1.lora_A.default.weight"
    rewrite(shards(folder)[0], lambda tensors: tensors.update({key: np.zeros((2, 2), np.float32)}))
    assert "merge_and_unload" in told(folder)


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
