import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evac_jax.devices import sharding
from policies.openvla_oft import hf_keys, tensors
from policies.openvla_oft.checkpoint_files import INDEX, SINGLE, VALUE_HEAD_FILE, CheckpointFiles
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.export_hf import create_policy_folder, export_policy
from policies.openvla_oft.import_hf import abstract_model, load_policy
from policies.openvla_oft.layers import UnusedParam
from tests.unit.policies.tiny import CONFIG, NORM_STATS, TASKS, make_model

GOLDENS = Path(__file__).parents[2] / "goldens" / "openvla_oft"
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


def rewritten(folder, target, change):
    """Copy a folder with changed tensors."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


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


@pytest.mark.parametrize("streamed", [False, True])
def test_every_parameter_lies_where_it_is_wanted(folder, monkeypatch, streamed):
    monkeypatch.setattr(tensors, "STREAMED_BYTES", 1 if streamed else 2**40)
    device = jax.devices()[0]
    asked = {}

    def shardings(path, shape):
        assert path not in asked
        asked[path] = shape
        return jax.sharding.SingleDeviceSharding(device)

    seen = []
    model = load_policy(
        folder,
        **SETTINGS,
        shardings=shardings,
        param_dtype="bfloat16",
        progress=lambda done, total: seen.append((done, total)),
    ).model
    expected = arrays(make_model())
    assert asked == {path: array.shape for path, array in expected.items()}
    assert asked["llama/layers/q_proj/kernel"] == (3, 32, 32)
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(array, expected[path].astype(jnp.bfloat16), err_msg=path)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(4 * array.size for array in expected.values())


@pytest.mark.parametrize("streamed", [False, True])
def test_one_layer_comes_back_when_it_is_fetched(monkeypatch, streamed):
    monkeypatch.setattr(tensors, "STREAMED_BYTES", 1 if streamed else 2**40)
    stack = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    array = tensors.place(iter(stack), stack.shape, jnp.float32, None, stacked=True)
    for layer in range(3):
        np.testing.assert_array_equal(tensors.fetch(array, layer), stack[layer])
    np.testing.assert_array_equal(tensors.fetch(array), stack)


def test_one_report_lists_everything_when_tensors_do_not_fit(folder, tmp_path):
    def change(tensors):
        del tensors["projector.fc1.bias"]
        tensors["projector.fc4.bias"] = np.zeros(3, np.float32)
        tensors["language_model.model.norm.weight"] = np.zeros(5, np.float32)

    broken = rewritten(folder, tmp_path / "broken", change)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_policy(broken, **SETTINGS)
    message = str(error.value)
    assert "missing tensors (1):\n    projector.fc1.bias" in message
    assert "unexpected tensors (1):\n    projector.fc4.bias" in message
    assert "language_model.model.norm.weight: expected (32,), got (5,)" in message


def test_value_head_starts_fresh_or_is_skipped_when_folder_and_request_differ(folder, tmp_path):
    def change(tensors):
        for key in [key for key in tensors if key.startswith("value_head.")]:
            del tensors[key]

    without = rewritten(folder, tmp_path / "without", change)
    loaded = load_policy(without, **SETTINGS | {"value_type": "chunk_level"})
    assert "starts fresh" in loaded.notes[0]
    head = loaded.model.value_head
    assert head.fc3.kernel.shape == (128, 1)
    assert np.std(head.fc1.kernel[...]) == pytest.approx(0.02, rel=0.05)
    assert not head.fc1.bias[...].any()
    loaded = load_policy(folder, **SETTINGS | {"value_type": "none"})
    assert loaded.model.value_head is None
    assert "skipped" in loaded.notes[0]


def test_adapter_is_added_when_given(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 32)).astype(np.float32), rng.normal(size=(32, 2)).astype(np.float32)
    module = "base_model.model.language_model.model.layers.1.self_attn.q_proj"
    head = "base_model.model.language_model.lm_head.base_layer.weight"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(
        tensors | {head: np.zeros((640, 32), np.float32)}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    merged = load_policy(folder, **SETTINGS, lora_adapter=adapter).model
    expected = arrays(make_model())
    expected["llama/layers/q_proj/kernel"][1] += 2 * (b @ a).T
    for path, array in arrays(merged).items():
        np.testing.assert_allclose(array, expected[path], atol=1e-6, err_msg=path)


def test_error_is_readable_when_the_folder_is_incomplete(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_policy(tmp_path, **SETTINGS | {"unnorm_key": ""})
    with pytest.raises(KeyError, match="tiny"):
        load_policy(folder, **SETTINGS | {"unnorm_key": "libero"})


def test_keys_and_shapes_are_the_7b_checkpoint_s_when_sizes_are_the_default():
    golden = json.loads((GOLDENS / "real_7b" / "keys.json").read_text())
    config = OpenVLAOFTConfig.from_hf({"model_type": "openvla"})
    tensors, parameters, unused = {}, 0, 0
    for path, variable in hf_keys.parameters(abstract_model(config)):
        source = hf_keys.source_of(path, config)
        tensors |= dict.fromkeys(source.keys, source.hf_shape(variable.shape))
        parameters += int(np.prod(variable.shape))
        unused += isinstance(variable, UnusedParam)
    assert tensors == {k: tuple(v["shape"]) for k, v in golden["tensors"].items()}
    assert len(tensors) == golden["n_tensors"] == 982
    assert parameters == golden["total_parameters"]
    assert unused > 0


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


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 6), (8, 2, 6), (3, 5, 7)])
def test_stack_is_cut_over_devices_as_its_sharding_says(monkeypatch, streamed, shape):
    monkeypatch.setattr(tensors, "STREAMED_BYTES", 1 if streamed else 2**40)
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
    wanted = sharding.leaf_sharding(mesh, "llama/layers/q_proj/kernel", shape)
    stack = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    array = tensors.place(iter(stack), shape, jnp.float32, wanted, stacked=True)
    assert array.sharding == wanted
    np.testing.assert_array_equal(np.asarray(array), stack)
    for layer in range(shape[0]):
        np.testing.assert_array_equal(tensors.fetch(array, layer), stack[layer])
