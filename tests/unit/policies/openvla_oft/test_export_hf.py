import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from policies.openvla_oft import hf_keys
from policies.openvla_oft.checkpoint_files import INDEX, SINGLE, VALUE_HEAD_FILE, CheckpointFiles
from policies.openvla_oft.export_hf import create_policy_folder, export_policy
from policies.openvla_oft.import_hf import load_policy
from tests.unit.policies.tiny import CONFIG, NORM_STATS, TASKS, make_model

SETTINGS = {
    "unnorm_key": "tiny",
    "value_type": "action_level",
    "max_prompt_length": 30,
    "chunk": CONFIG.chunk,
    "num_images": CONFIG.num_images,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "created"
    return create_policy_folder(make_model(), path, tasks=TASKS, norm_stats=NORM_STATS)


def arrays(model):
    return {path: np.array(variable[...]) for path, variable in hf_keys.parameters(model)}


def test_import_gives_the_same_bits_when_exported_in_shards(folder, tmp_path):
    created = load_policy(folder, **SETTINGS)
    assert created.notes == ()
    expected = arrays(make_model())
    export = export_policy(
        created.model, tmp_path / "export", source=folder, max_shard_bytes=100_000
    )
    assert len(list(export.glob("model-*-of-*.safetensors"))) > 2
    again = load_policy(export, **SETTINGS)
    ours = arrays(again.model)
    assert ours.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)
    assert again.model.config.to_hf() == CONFIG.to_hf()
    assert again.model.statistics == make_model().statistics
    with pytest.raises(FileExistsError):
        export_policy(created.model, tmp_path / "export", source=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


@pytest.fixture
def source(tmp_path):
    """A bfloat16 policy in shards with one float32 tensor, old buffers and remote code."""
    path = tmp_path / "source"
    model = make_model(value_type="none", param_dtype="bfloat16")
    create_policy_folder(model, path, tasks=TASKS, norm_stats=NORM_STATS, max_shard_bytes=50_000)
    (path / "modeling_prismatic.py").write_text("raise RuntimeError")
    (path / "pytorch_model.bin").write_bytes(b"left over")
    index = json.loads((path / INDEX).read_text())
    shard = path / index["weight_map"]["projector.fc1.bias"]
    tensors = load_file(shard)
    tensors["projector.fc1.bias"] = tensors["projector.fc1.bias"].astype(np.float32)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, shard)
    return path


def contents(folder):
    """Every tensor of a folder with the file it lies in."""
    return {
        key: (entry.file, entry.dtype, load_file(folder / entry.file)[key].tobytes())
        for key, entry in CheckpointFiles(folder).entries.items()
    }


def test_export_has_keys_files_and_dtypes_of_its_source(source, tmp_path):
    settings = SETTINGS | {"value_type": "none"}
    model = load_policy(source, **settings, param_dtype="float32").model
    out = export_policy(model, tmp_path / "out", source=source, like_source=True)
    assert contents(out) == contents(source)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert {path.name for path in source.iterdir()} - {path.name for path in out.iterdir()} == {
        "pytorch_model.bin"
    }
    assert not {path.name for path in out.iterdir()} - {path.name for path in source.iterdir()}
    weights = json.loads((out / INDEX).read_text())["weight_map"]
    assert weights == {key: entry.file for key, entry in CheckpointFiles(source).entries.items()}
    wide = export_policy(model, tmp_path / "wide", source=source, like_source=True, dtype="float32")
    assert {entry.dtype for entry in CheckpointFiles(wide).entries.values()} == {"F32"}


def test_export_with_new_statistics_no_longer_names_those_of_its_source(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"unnorm_key": "tiny"}))
    model = load_policy(source, **SETTINGS | {"value_type": "none"}).model
    named = {"like_source": True, "source": source}
    again = export_policy(model, tmp_path / "again", **named)
    assert json.loads((again / "config.json").read_text())["unnorm_key"] == "tiny"
    new = {"new": NORM_STATS["tiny"]}
    tuned = export_policy(model, tmp_path / "tuned", norm_stats=new, **named)
    assert load_policy(tuned, **SETTINGS | {"value_type": "none", "unnorm_key": "new"})


def test_trained_value_head_rides_in_its_own_file_and_comes_back(source, tmp_path):
    settings = SETTINGS | {"param_dtype": "bfloat16"}
    model = load_policy(source, **settings).model
    out = export_policy(model, tmp_path / "out", source=source, like_source=True)
    weights = json.loads((out / INDEX).read_text())["weight_map"]
    assert not any(key.startswith("value_head.") for key in weights)
    assert all(key.startswith("value_head.") for key in load_file(out / VALUE_HEAD_FILE))
    again = load_policy(out, **settings)
    assert not any("fresh" in note for note in again.notes)
    ours, expected = arrays(again.model), arrays(model)
    assert ours.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)
    # Who does not ask for it hands it on as it is.
    without = load_policy(out, **settings | {"value_type": "none"}).model
    handed_on = export_policy(without, tmp_path / "handed_on", source=out, like_source=True)
    assert contents(handed_on) == contents(out)


def test_value_head_among_the_weights_stays_there(folder, tmp_path):
    model = load_policy(folder, **SETTINGS | {"value_type": "none"}).model
    out = export_policy(model, tmp_path / "out", source=folder, like_source=True)
    assert contents(out) == contents(folder)
    assert {entry.file for entry in CheckpointFiles(out).entries.values()} == {SINGLE}


def test_failed_export_leaves_nothing(folder, source, tmp_path):
    model = make_model(value_type="none", num_layers=4)
    with pytest.raises(ValueError, match="not where this policy comes from"):
        export_policy(model, tmp_path / "out", source=source, like_source=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
