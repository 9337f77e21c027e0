import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from policies.openvla_oft import hf_keys, tensors
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.import_hf import abstract_model, load_policy
from policies.openvla_oft.layers import UnusedParam
from tests.unit.policies.tiny import CONFIG, NORM_STATS, TASKS, make_model

GOLDENS = Path(__file__).parents[3] / "goldens" / "openvla_oft"
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
