"""Published files are recognised, imported and named in a command, from a hub on loopback."""

import json

import numpy as np
import pytest
import torch

from configs import grpo
from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import read_preset
from evac_jax.errors import CheckpointError, DataError
from evac_jax.evac import model_folders
from evac_jax.files import cards
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools.hub import fetch
from tests.unit import policy_folder
from tests.unit.evac.tiny import TINY, tiny_model
from tests.unit.hub_server import COMMIT, HubServer, Repository, point_client_to

TOWER = "embedder.model."
POLICY = "RLinf/RLinf-OpenVLAOFT-LIBERO-130-Base-Lora"
DATA, CLIP = "datasets/jzndd/evac_for_rlinf", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def write_start(path):
    frame = {"image": np.full((6, 8, 3), 9, np.uint8), "instruction": "open the drawer"}
    frame["init_ee_pose"] = np.array([0.1, 0, 0.2, 1, 0, 0, 0, 0.5])
    path.parent.mkdir(parents=True, exist_ok=True)
    episode = np.empty(1, object)
    episode[0] = frame
    np.save(path, episode, allow_pickle=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published repositories' layouts, tiny: {name: folder}."""
    root = tmp_path_factory.mktemp("published")
    data, clip = root / DATA, root / CLIP
    torch.manual_seed(0)
    state = dict(tiny_model().state_dict())
    rest = {key: value for key, value in state.items() if not key.startswith(TOWER)}
    (data / "model_ckpt").mkdir(parents=True)
    torch.save({"state_dict": rest, "epoch": 281}, data / "model_ckpt/epoch=281-step=34800.ckpt")
    torch.save(RewardNet(RewardConfig(width=4)).state_dict(), data / "model_ckpt/750.pth")
    poses = PoseModel(PoseModelConfig(hidden=6)).state_dict()
    network = {key: value for key, value in poses.items() if key.startswith("network.")}
    told = {key: torch.ones(1, 8) for key in ("abs_action_mean", "abs_action_std")}
    torch.save({"model_state_dict": network, **told}, data / "best_model.pth")
    for name in ("a", "b"):
        write_start(data / f"world_model_buffer/{name}.npy")
    (data / "README.md").write_text("data")
    clip.mkdir(parents=True)
    tower = {k.removeprefix(TOWER): v for k, v in state.items() if k.startswith(TOWER)}
    torch.save(tower, clip / "open_clip_pytorch_model.bin")
    (clip / "pytorch_model.bin").write_bytes(b"not needed")
    policy_folder.write(root / POLICY)
    return root


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    server = HubServer({name: Repository.of(published / name) for name in (DATA, CLIP, POLICY)})
    point_client_to(server.endpoint, tmp_path / "cache", monkeypatch)
    yield server
    server.close()


@pytest.fixture
def sizes(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(TINY.to_dict()))
    return path


def test_published_files_become_a_command_that_launch_accepts(
    server, tmp_path, sizes, monkeypatch, capsys
):
    out = tmp_path / "weights"
    fetch.main(["libero_spatial", f"--out={out}", f"--config={sizes}"])
    printed = capsys.readouterr().out
    flags = [line.strip(" \\") for line in printed.splitlines() if "--config." in line]
    values = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)
    data = f"hf://{DATA}@{COMMIT}"
    assert values == {
        "world_model.checkpoint": f"{tmp_path}/weights/world_model",
        "reward.checkpoint": f"{tmp_path}/weights/reward",
        "env.pose_model": f"{tmp_path}/weights/pose_model",
        "policy.checkpoint": f"hf://{POLICY}@{COMMIT}",
        "policy.unnorm_key": "tiny",
        "env.initial_states_path": f"{data}/world_model_buffer",
    }
    assert "--config=configs/grpo.py:libero_spatial" in printed
    assert not any("pytorch_model.bin" in p and "open_clip" not in p for _, p, _ in server.requests)

    loaded = model_folders.load_model(values["world_model.checkpoint"], kind="EvacModel")
    assert loaded.config == TINY
    sources = cards.read(tmp_path / "weights/world_model")["sources"]
    clip = f"hf://{CLIP}@{COMMIT}/open_clip_pytorch_model.bin"
    evac = f"{data}/model_ckpt/epoch=281-step=34800.ckpt"
    assert [source["address"] for source in sources] == [evac, clip]

    # launch.py finds all of it in the cache, without the hub.
    server.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = from_config_dict(read_preset("configs/grpo.py:libero_spatial", flags).to_dict())
    snapshot = f"models--{POLICY.replace('/', '--')}/snapshots/{COMMIT}"
    assert config.policy.checkpoint == f"{tmp_path}/cache/{snapshot}"


def fetched(published, out, **changes):
    settings = {"policy": str(published / POLICY), "data": str(published / DATA), "given": {}}
    recipe = fetch.RECIPES["libero_spatial"]
    return fetch.fetch(recipe, out, **settings | changes)


def test_second_run_imports_nothing_again(published, tmp_path, sizes, monkeypatch):
    clip = str(published / CLIP / "open_clip_pytorch_model.bin")
    for file in ("best_model.pth", "model_ckpt/750.pth"):
        name = "reward" if "750" in file else "pose_model"
        fetch.import_weights(published / DATA / file, tmp_path / name)
    evac = published / DATA / "model_ckpt/epoch=281-step=34800.ckpt"
    fetch.import_weights(evac, tmp_path / "world_model", open_clip=clip, config_file=str(sizes))
    monkeypatch.setattr(fetch.import_evac, "convert", lambda *_, **__: pytest.fail("again"))
    assert f"--config.reward.checkpoint={tmp_path}/reward" in fetched(published, tmp_path)


def test_place_that_is_a_file_is_refused_before_anything_is_fetched(
    published, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(fetch.hub, "local", lambda _: pytest.fail("fetched"))
    with pytest.raises(DataError, match="--out: expected a folder, got the file"):
        fetched(published, tmp_path / "file")


def test_folder_of_other_weights_is_not_taken_for_imported(published, tmp_path):
    fetch.import_weights(published / DATA / "best_model.pth", tmp_path / "reward")
    with pytest.raises(CheckpointError, match=r"reward exists and was not made from .*750\.pth"):
        fetch.import_weights(published / DATA / "model_ckpt/750.pth", tmp_path / "reward")


def test_several_files_of_a_kind_are_told_apart_by_the_published_name_or_by_the_user(tmp_path):
    first, second = tmp_path / "a/1.pth", tmp_path / "b/2.pth"
    found = {"reward": [first, second], "starts": []}
    _, problems = fetch.chosen(found, tmp_path, {}, {})
    assert problems[0] == "--reward: 2 would do, ['a/1.pth', 'b/2.pth']; choose one"
    assert problems[1] == "--starts: none found"
    files, problems = fetch.chosen(found, tmp_path, {"reward": "2.pth"}, {})
    assert files == {"reward": second}
    files, _ = fetch.chosen(found, tmp_path, {"reward": "2.pth"}, {"reward": "a/1.pth"})
    assert files == {"reward": first}
    _, problems = fetch.chosen(found, tmp_path, {"reward": "2.pth"}, {"reward": "c.pth"})
    assert "got 'c.pth'" in problems[0]


def test_everything_that_is_missing_or_of_no_use_is_named_at_once(published, tmp_path):
    write_start(tmp_path / "data/frames/a.npy")
    (tmp_path / "data/evac.ckpt").write_bytes(b"version https://git-lfs")
    with pytest.raises(DataError) as error:
        fetched(published, tmp_path / "out", data=str(tmp_path / "data"))
    for text in ("--evac: none found", "--reward: none", "--pose_model: none", "evac.ckpt: "):
        assert text in str(error.value)
    assert "--starts" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        (["libero_130_no_noops_trajall"], "libero_130_no_noops_trajall"),
        (["bridge", "libero_spatial_no_noops"], "libero_spatial_no_noops"),
        (["libero_90_x", "libero_spatial"], "libero_spatial"),
        (["tiny"], "tiny"),
        (["bridge", "other"], None),
    ],
)
def test_statistics_of_the_suite_are_found(tmp_path, keys, key):
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": dict.fromkeys(keys, {})}))
    suites = fetch.RECIPES["libero_spatial"].suites
    if key is None:
        with pytest.raises(DataError, match=r"statistics of \['bridge', 'other'\]"):
            fetch.statistics_key(tmp_path, suites)
    else:
        assert fetch.statistics_key(tmp_path, suites) == key


def test_adapter_without_its_base_is_no_policy(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="a PEFT adapter without its base"):
        fetch.statistics_key(tmp_path, ())


def test_preset_of_every_recipe_exists():
    for recipe in fetch.RECIPES.values():
        assert recipe.preset.partition(":")[2] in grpo.PRESETS
