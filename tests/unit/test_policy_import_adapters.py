"""What adapters and wrapped names say, through the import that launch.py uses."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from policies.openvla_oft import hf_keys, peft
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.import_hf import load_policy
from tests.unit.policies.tiny import NORM_STATS, TASKS, make_model
from tests.unit.policy_folder import load, rewrite, shards, told, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("policy") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "policy")


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
