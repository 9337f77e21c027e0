"""Random weights have the keys, shapes and containers of the published files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.public_weights import (
    SIZES,
    UNNORM_KEY,
    evac_shapes,
    policy_config,
    policy_shapes,
    write_evac,
    write_policy,
)
from evac_jax.evac import model_folders
from evac_jax.sim.initial_states import NpyStarts
from evac_jax.tools.world_model import import_evac
from policies.openvla_oft.checkpoint_files import CheckpointFiles
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.import_hf import load_policy
from tests.unit.policies.tiny import CONFIG

GOLDENS = Path(__file__).parents[2] / "goldens" / "openvla_oft" / "real_7b"
KEYS = Path(__file__).parents[4] / "shared" / "fixtures" / "evac" / "full_model_keys.json"


def test_full_size_policy_has_the_982_tensors_and_the_config_of_the_published_one():
    golden = json.loads((GOLDENS / "keys.json").read_text())
    shapes = policy_shapes(SIZES["full"].policy)
    assert shapes == {key: tuple(told["shape"]) for key, told in golden["tensors"].items()}
    assert sum(map(math.prod, shapes.values())) == golden["total_parameters"]
    published = json.loads((GOLDENS / "config_values.json").read_text())["config_json_as_saved"]
    told = policy_config(SIZES["full"].policy)
    assert told["text_config"] == published["text_config"]
    assert {name: published.get(name) for name in told if name != "architectures"} == {
        name: value for name, value in told.items() if name != "architectures"
    }


@pytest.mark.parametrize("config", [SIZES["tiny"].policy, SIZES["full"].policy, CONFIG])
def test_config_is_read_back_to_the_same_sizes(config):
    told, read = policy_config(config), config.to_hf()
    assert OpenVLAOFTConfig.from_hf(told, param_dtype=config.param_dtype).to_hf() == read


@pytest.mark.skipif(not KEYS.is_file(), reason=f"there is no {KEYS}")
def test_full_size_world_model_has_the_2310_tensors_of_the_published_one():
    golden = json.loads(KEYS.read_text())["keys"]
    shapes = evac_shapes(SIZES["full"].world_model)
    assert len(shapes) == 2310
    assert shapes == {key: tuple(shape) for key, (shape, _) in golden.items()}


def test_policy_lies_in_three_shards_and_is_imported(tmp_path):
    config = SIZES["tiny"].policy
    told = write_policy(tmp_path / "policy", config)
    files = CheckpointFiles(tmp_path / "policy")
    assert len(list((tmp_path / "policy").glob("*.safetensors"))) == told["shards"] == 3
    assert len(files.keys) == told["tensors"]
    assert {entry.dtype for entry in files.entries.values()} == {"BF16"}
    loaded = load_policy(
        tmp_path / "policy", unnorm_key=UNNORM_KEY, max_prompt_length=128, param_dtype="bfloat16"
    )
    assert not loaded.notes
    table = np.asarray(loaded.model.llama.embed_tokens[...], np.float32)
    assert table.std() == pytest.approx(config.hidden_size**-0.5, rel=0.05)


def test_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    config, folders = SIZES["tiny"].policy, [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        write_policy(folder, config, seed)
    one, same, other = (sorted(f.glob("*.safetensors"))[0].read_bytes() for f in folders)
    assert one == same
    assert one != other


def test_world_model_classifier_pose_model_and_starts_are_imported(tmp_path):
    sizes, public = SIZES["tiny"], tmp_path / "public"
    told = write_evac(public, sizes)
    files = {
        "world_model": "evac.ckpt",
        "reward": "resnet_rm.pth",
        "pose_model": "action_predictor.pth",
    }
    for name, file in files.items():
        more = ["--config", str(public / "sizes.json")] * (name == "world_model")
        import_evac.main(["--weights", str(public / file), "--out", str(tmp_path / name), *more])
    model = model_folders.load_model(
        tmp_path / "world_model", kind="EvacModel", dtype=torch.bfloat16
    )
    assert model.config == sizes.world_model
    assert len(model.state_dict()) == told["tensors"] - 19
    weight = model.unet.out[2].weight.float()
    assert float(weight.detach().std()) == pytest.approx(weight[0].numel() ** -0.5, rel=0.1)
    starts = NpyStarts(str(public / "starts"))
    poses = model_folders.load_model(tmp_path / "pose_model", kind="PoseModel")
    poses.check_poses(starts.load(np.arange(starts.num_starts)).poses)
    assert model_folders.load_model(tmp_path / "reward", kind="RewardNet").config.width == 4
