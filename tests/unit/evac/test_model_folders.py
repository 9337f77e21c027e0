import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.evac import model_folders
from evac_jax.evac.model import EvacModel
from evac_jax.evac.weight_files import write_weights
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardNet
from tests.unit.evac.tiny import TINY, tiny_model


def make_pose_model() -> PoseModel:
    torch.manual_seed(0)
    return PoseModel(PoseModelConfig(hidden=4)).eval()


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def write(path: Path, container: str, state: dict) -> None:
    prefixed = {f"_forward_module.{key}": value for key, value in state.items()}
    statistics = {k: v for k, v in state.items() if k.startswith("abs_")}
    content = {
        "lightning": {"state_dict": state, "epoch": 3},
        "deepspeed": {"module": prefixed, "global_steps": 7},
        "prefixed": prefixed,
        "bare": state,
        "predictor": {
            "model_state_dict": {k: v for k, v in state.items() if k not in statistics},
            **statistics,
        },
    }
    if container == "safetensors":
        save_file(state, path)
    elif container == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(content[container], path)


@pytest.mark.parametrize(
    "container",
    ["lightning", "deepspeed", "prefixed", "bare", "predictor", "safetensors", "legacy"],
)
def test_weights_load_when_wrapped_in_any_container(tmp_path, container):
    model = make_pose_model()
    path = tmp_path / f"weights.{'safetensors' if container == 'safetensors' else 'pt'}"
    write(path, container, model.state_dict())
    other = PoseModel(PoseModelConfig(hidden=4))
    model_folders.load_weights(other, path)
    assert same_weights(model, other)


def test_model_is_read_in_another_precision_when_asked(tmp_path):
    model = RewardNet(RewardConfig(width=4)).eval()
    model_folders.save_model(tmp_path, model)
    half = model_folders.load_model(tmp_path, dtype=torch.bfloat16)
    assert same_weights(half, model.to(torch.bfloat16))
    integers = {k for k, v in half.state_dict().items() if not v.is_floating_point()}
    assert integers  # counters of the batch norms stay whole numbers
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


class Payload:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_file_is_refused_and_not_run_when_it_hides_code(tmp_path, zipped):
    path = tmp_path / "weights.ckpt"
    content = {"state_dict": {"w": torch.ones(1)}, "callbacks": Payload(tmp_path / "made")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"posix.mkdir"):
        model_folders.read_weights(path)
    assert not (tmp_path / "made").exists()


def test_class_that_is_not_known_is_named_and_refused(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": PoseModelConfig()}, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match=r"pose_model.PoseModelConfig.*to \.safetensors"):
        model_folders.read_weights(tmp_path / "w.ckpt")


def test_configurations_beside_the_weights_are_passed_over(tmp_path):
    counts = defaultdict(int)
    counts["a"] = 1
    beside = {"where": Path("x"), "counts": counts, "types": [dict, int]}
    torch.save({"state_dict": {"w": torch.ones(2)}, **beside}, tmp_path / "w.ckpt")
    assert model_folders.read_weights(tmp_path / "w.ckpt")["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["float64", "float16", "int64", "bool", "<U5"])
def test_scalars_of_numpy_beside_the_weights_are_passed_over(tmp_path, name):
    best = np.ones(1, name)[0]
    torch.save({"state_dict": {"w": torch.ones(2)}, "best": best}, tmp_path / "w.ckpt")
    assert model_folders.read_weights(tmp_path / "w.ckpt")["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(tmp_path, prefix):
    model = make_pose_model()
    save_file({prefix + k: v for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    other = PoseModel(PoseModelConfig(hidden=4))
    model_folders.load_weights(other, tmp_path / "w.safetensors")
    assert same_weights(model, other)


def test_two_names_of_one_weight_are_refused(tmp_path):
    save_file({"w": torch.ones(2), "module.w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="several keys mean one weight"):
        model_folders.read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("description", "error", "message"),
    [
        ({}, CheckpointError, "expected a model of kind PoseModel, got None"),
        ({"model": "PoseModel", "config": None}, ConfigError, "expected an object"),
        ({"model": "PoseModel", "config": {"hidden": "4"}}, ConfigError, "hidden: expected .*int"),
        ({"model": "PoseModel", "weights": "../w.pt"}, CheckpointError, "expected a file's name"),
        ({"model": "PoseModel", "weights": None}, CheckpointError, "expected a file's name"),
    ],
)
def test_description_that_cannot_be_used_is_told(tmp_path, description, error, message):
    model_folders.save_model(tmp_path, make_pose_model())
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(error, match=message):
        model_folders.load_model(tmp_path, kind="PoseModel")


def test_empty_description_is_told(tmp_path):
    model_folders.save_model(tmp_path, make_pose_model())
    (tmp_path / "config.json").write_text("")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        model_folders.load_model(tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("kept", [0, 11, -100])
def test_file_is_refused_when_cut_short(tmp_path, name, kept):
    path = tmp_path / name
    write(path, "safetensors" if "safe" in name else "bare", make_pose_model().state_dict())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{name}: (not a whole .* bytes|damaged)"):
        model_folders.read_weights(path)


def test_file_is_refused_when_damaged_or_a_pointer(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"weights\.pt: damaged"):
        model_folders.read_weights(tmp_path / "weights.pt")
    (tmp_path / "weights.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        model_folders.read_weights(tmp_path / "weights.ckpt")


def test_file_is_refused_when_missing_or_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no such weight file"):
        model_folders.read_weights(tmp_path / "nothing.pt")
    torch.save({"optimizer": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="optimizer"):
        model_folders.read_weights(tmp_path / "other.pt")


def test_folder_is_refused_when_its_weights_are_spread(tmp_path):
    with pytest.raises(CheckpointError, match="mp_rank_00_model_states.pt"):
        model_folders.read_weights(tmp_path)
    for rank in range(2):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"over 2 files .*zero_to_fp32"):
        model_folders.read_weights(tmp_path)


def test_weight_is_named_when_it_is_not_finite(tmp_path):
    model = make_pose_model()
    state = dict(model.state_dict())
    state["network.2.weight"] = torch.full((4, 4), float("inf"))
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"network\.2\.weight holds NaN or infinity in 16"):
        model_folders.load_weights(make_pose_model(), tmp_path / "w.safetensors")
    model.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"network\.2\.weight"):
        model_folders.save_model(tmp_path / "out", model)
    assert not list((tmp_path / "out").iterdir())


def test_every_type_and_shape_comes_back_when_written(tmp_path):
    tensors = {
        "a": torch.tensor(3),
        "b": torch.ones(2, 3).bfloat16().T,
        "c": torch.zeros(0, 2),
        "d": torch.tensor([True, False, True]),
        "e": torch.arange(5).double()[::2],
    }
    write_weights(tmp_path / "w.safetensors", tensors)
    back = load_file(tmp_path / "w.safetensors")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value)


def test_error_lists_every_difference_when_weights_do_not_fit(tmp_path):
    state = make_pose_model().state_dict()
    state["extra.weight"] = state.pop("network.0.bias")
    state["network.4.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError) as error:
        model_folders.load_weights(make_pose_model(), tmp_path / "weights.safetensors")
    for text in ("missing in the file: network.0.bias", "extra.weight", "file (3,), model (8,)"):
        assert text in str(error.value)


@pytest.fixture(scope="module")
def world_model() -> EvacModel:
    return tiny_model()


def test_unused_keys_are_left_out_when_a_public_file_has_them(world_model):
    shapes = {key: value.shape for key, value in world_model.state_dict().items()}
    public = {"betas": (1000,), "scale_arr": (1400,), "sqrt_recipm1_alphas_cumprod": (1000,)}
    public["embedder.model.token_embedding.weight"] = (32, 8)
    fit = model_folders.fit(world_model, shapes | public)
    assert fit.ok
    assert fit.unused == sorted(public)
    assert not model_folders.fit(world_model, shapes | {"embedder.model.transformer.x": (1,)}).ok


def test_error_names_the_variant_when_the_chunk_length_differs(world_model):
    shapes = {key: tuple(value.shape) for key, value in world_model.state_dict().items()}
    queries = TINY.image_resampler.num_queries
    _, ours, dim = shapes["image_proj_model.latents"]
    shapes["image_proj_model.latents"] = (1, 16 * queries, dim)
    report = model_folders.fit(world_model, shapes).describe()
    assert f"made for {16 * queries} image tokens, the model is sized for {ours}" in report
    assert "16-frame variant; set chunk=16" in report


def test_world_model_comes_back_when_saved_and_loaded(tmp_path, world_model):
    model_folders.save_model(tmp_path, world_model)
    loaded = model_folders.load_model(tmp_path, kind="EvacModel")
    assert loaded.config == TINY
    assert same_weights(world_model, loaded)
    assert not loaded.training
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))


def test_classifier_comes_back_when_saved_in_half_precision(tmp_path):
    torch.manual_seed(0)
    net = RewardNet(RewardConfig(width=4, num_instructions=3)).eval()
    model_folders.save_model(tmp_path, net, dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["net.7.weight"].dtype == torch.float16
    loaded = model_folders.load_model(tmp_path)
    assert loaded.config == net.config
    assert loaded.net[7].weight.dtype == torch.float32
    torch.testing.assert_close(loaded.net[7].weight, net.net[7].weight, atol=1e-3, rtol=1e-3)


def test_public_file_loads_when_a_config_beside_it_names_it(tmp_path):
    model = make_pose_model()
    write(tmp_path / "best.pth", "predictor", model.state_dict())
    description = {"model": "PoseModel", "config": {"hidden": 4}, "weights": "best.pth"}
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert same_weights(model_folders.load_model(tmp_path), model)
    assert model_folders.weights_file(tmp_path) == tmp_path / "best.pth"
    (tmp_path / "best.pth").unlink()
    with pytest.raises(CheckpointError, match="best.pth: no such weight file"):
        model_folders.weights_file(tmp_path)


def test_old_files_stay_when_saving_is_interrupted(tmp_path, monkeypatch):
    model = make_pose_model()
    model_folders.save_model(tmp_path, model)
    (tmp_path / "card.json").write_text("{}")

    def fail(path, *_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(model_folders, "write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        model_folders.save_model(tmp_path, PoseModel(PoseModelConfig(hidden=5)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "card.json",
        "config.json",
        "model.safetensors",
    ]
    assert same_weights(model_folders.load_model(tmp_path), model)


def test_folder_is_refused_when_it_is_not_the_expected_one(tmp_path):
    with pytest.raises(CheckpointError, match="not a model folder"):
        model_folders.load_model(tmp_path)
    model_folders.save_model(tmp_path, make_pose_model())
    with pytest.raises(CheckpointError, match="expected a model of kind RewardNet"):
        model_folders.load_model(tmp_path, kind="RewardNet")
    description = json.loads((tmp_path / "config.json").read_text())
    description["config"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="depth"):
        model_folders.load_model(tmp_path)
    description["config"] = {"hidden": -1}
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="no PoseModel has the sizes .*hidden=-1"):
        model_folders.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        model_folders.load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a model of kind .* got None"):
        model_folders.load_model(tmp_path)


def test_saving_is_refused_when_the_class_is_not_known(tmp_path):
    with pytest.raises(CheckpointError, match="cannot save a Linear"):
        model_folders.save_model(tmp_path, nn.Linear(1, 1))


def test_model_of_transformers_is_told_where_its_threshold_comes_from(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(CheckpointError, match=r"kind RewardNet.*'qwen3_vl'.*vlm_threshold --model"):
        model_folders.load_model(tmp_path, kind="RewardNet")
    with pytest.raises(CheckpointError, match=r"kind PoseModel, got None$"):
        model_folders.load_model(tmp_path, kind="PoseModel")
