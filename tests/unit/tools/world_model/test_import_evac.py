import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evac_jax.errors import EvacJaxError
from evac_jax.evac import model_folders
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import EvacModel
from evac_jax.files import cards
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools.world_model import import_evac
from tests.unit.evac.tiny import TINY, tiny_model

KEYS = Path(__file__).parents[5] / "shared" / "fixtures" / "evac" / "full_model_keys.json"
TOWER = "embedder.model."
# What a public file has besides the model's own weights.
UNUSED = {
    "betas": (1000,),
    "scale_arr": (1400,),
    "posterior_mean_coef2": (1000,),
    f"{TOWER}logit_scale": (),
    f"{TOWER}ln_final.weight": (8,),
}


@pytest.fixture(scope="module")
def model() -> EvacModel:
    return tiny_model()


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("sizes") / "sizes.json"
    path.write_text(json.dumps(TINY.to_dict()))
    return str(path)


def public_state(model: EvacModel) -> dict[str, torch.Tensor]:
    return dict(model.state_dict()) | {key: torch.ones(shape) for key, shape in UNUSED.items()}


def run(*args: object) -> None:
    import_evac.main([str(arg) for arg in args])


def failure(*args: object) -> str:
    with pytest.raises(EvacJaxError) as refused:
        run(*args)
    return f"{type(refused.value).__name__}: {refused.value}"


def test_lightning_file_becomes_a_folder_with_a_card(tmp_path, model, sizes):
    source, out = tmp_path / "evac.ckpt", tmp_path / "out"
    torch.save({"state_dict": public_state(model), "global_step": 7, "loops": {"a": [1]}}, source)
    run("--weights", source, "--config", sizes, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == [
        "card.json",
        "config.json",
        "model.safetensors",
    ]
    loaded = model_folders.load_model(out, kind="EvacModel")
    assert loaded.config == TINY
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)
    card = cards.read(out)
    assert card["left_out"] == sorted(UNUSED)
    assert card["stored_as"] == "float32"
    assert card["sources"][0]["sha256"] == cards.sha256(source)
    assert card["sha256"] == cards.sha256(out / "model.safetensors")
    assert card["parameters"] == sum(v.numel() for v in model.state_dict().values())


def test_deepspeed_folder_is_found_and_its_precision_kept(tmp_path, model, sizes):
    state = {f"_forward_module.{k}": v.half() for k, v in public_state(model).items()}
    folder = tmp_path / "epoch=3.ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    torch.save({"module": state, "dp_world_size": 8}, folder / "mp_rank_00_model_states.pt")
    run("--weights", folder.parent, "--config", sizes, "--out", tmp_path / "out")
    assert cards.read(tmp_path / "out")["stored_as"] == "float16"
    loaded = model_folders.load_model(tmp_path / "out").state_dict()
    key = "model.diffusion_model.time_embed.0.weight"
    torch.testing.assert_close(loaded[key], model.state_dict()[key].half().float())


def test_image_tower_comes_from_the_open_clip_file(tmp_path, model, sizes):
    state = public_state(model)
    tower = {k.removeprefix(TOWER): v for k, v in state.items() if k.startswith(TOWER)}
    rest = {key: value for key, value in state.items() if not key.startswith(TOWER)}
    torch.save(rest, tmp_path / "evac.pt")
    save_file(tower | {"transformer.x": torch.ones(1)}, tmp_path / "clip.safetensors")
    told = failure("--weights", tmp_path / "evac.pt", "--config", sizes, "--out", "x")
    assert "image tower is not in the file: --open_clip" in told
    run(
        "--weights", tmp_path / "evac.pt", "--open_clip", tmp_path / "clip.safetensors",
        "--config", sizes, "--dtype", "bfloat16", "--out", tmp_path / "out",
    )  # fmt: skip
    key = f"{TOWER}visual.conv1.weight"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(stored[key], state[key].bfloat16(), rtol=0, atol=0)
    assert [s["file"] for s in cards.read(tmp_path / "out")["sources"]] == [
        "evac.pt",
        "clip.safetensors",
    ]
    save_file({"vision_model.x": torch.ones(1)}, tmp_path / "other.safetensors")
    args = ["--config", sizes, "--out", tmp_path / "new", "--weights"]
    clip = ["--open_clip", tmp_path / "other.safetensors"]
    assert "no visual.* weights" in failure(*args, tmp_path / "evac.pt", *clip)
    torch.save(state, tmp_path / "whole.pt")
    assert "omit --open_clip" in failure(*args, tmp_path / "whole.pt", *clip)


def full_state(frames: int) -> dict[str, torch.Tensor]:
    described = json.loads(KEYS.read_text())["keys"]
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in described.items()}
    state["image_proj_model.latents"] = torch.empty(1, 16 * frames, 1024, device="meta")
    return state


@pytest.mark.skipif(not KEYS.is_file(), reason=f"there is no {KEYS}")
def test_every_key_of_the_published_model_has_its_place():
    state = full_state(8)
    assert import_evac.kind_of(state, "file") == "evac"
    result = import_evac.fitted("evac", EvacConfig(), state, "file")
    assert len(result.unused) == 19
    assert len(state) == 2310
    assert import_evac.fitted("evac", import_evac.SIZES["upstream"], full_state(16), "file").ok


@pytest.mark.skipif(not KEYS.is_file(), reason=f"there is no {KEYS}")
def test_other_variant_is_named_when_its_file_is_imported():
    with pytest.raises(model_folders.CheckpointError) as error:
        import_evac.fitted("evac", EvacConfig(), full_state(16), "file.ckpt")
    for text in ("file.ckpt", "256 image tokens", "16-frame variant", "--size upstream"):
        assert text in str(error.value)


def test_classifier_and_pose_model_are_told_by_their_keys(tmp_path):
    torch.manual_seed(0)
    net, poses = RewardNet(RewardConfig(width=4)), PoseModel(PoseModelConfig(hidden=6))
    torch.save(net.state_dict(), tmp_path / "resnet_rm.pth")
    statistics = {"abs_action_mean": torch.ones(1, 8), "abs_action_std": torch.full((1, 8), 2.0)}
    network = {k: v for k, v in poses.state_dict().items() if k not in statistics}
    # The statistics may be numpy arrays there.
    told = {key: value.numpy() for key, value in statistics.items()}
    torch.save({"model_state_dict": network, **told, "epoch": 3}, tmp_path / "predictor.pth")
    run("--weights", tmp_path / "resnet_rm.pth", "--out", tmp_path / "reward")
    run("--weights", tmp_path / "predictor.pth", "--out", tmp_path / "pose_model")
    reward = model_folders.load_model(tmp_path / "reward", kind="RewardNet")
    assert reward.config == RewardConfig(width=4)
    frames = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(reward(frames), net.eval()(frames))
    loaded = model_folders.load_model(tmp_path / "pose_model", kind="PoseModel")
    assert loaded.abs_action_std.tolist() == [[2.0] * 8]
    torch.testing.assert_close(loaded.network[0].weight, poses.network[0].weight)


def test_pose_model_without_statistics_is_explained(tmp_path):
    state = PoseModel(PoseModelConfig(hidden=6)).state_dict()
    bare = {key: value for key, value in state.items() if key.startswith("network.")}
    torch.save(bare, tmp_path / "p.pth")
    told = failure("--weights", tmp_path / "p.pth", "--out", tmp_path / "out")
    assert "statistics are not in the file" in told


def with_nan(state):
    state["network.2.bias"] = torch.tensor([0.0, float("nan"), 1.0, 2.0])


def with_integers(state):
    state["network.2.bias"] = torch.arange(4)


def with_surplus(state):
    state["network.9.bias"] = torch.ones(4)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (with_nan, "network.2.bias holds NaN or infinity in 1 of 4 places"),
        (with_integers, "network.2.bias (file torch.int64, model torch.float32)"),
        (with_surplus, "1 unknown to the model: network.9.bias"),
    ],
)
def test_damaged_weights_leave_nothing_behind(tmp_path, damage, told):
    state = dict(PoseModel(PoseModelConfig(hidden=4)).state_dict())
    damage(state)
    save_file(state, tmp_path / "w.safetensors")
    assert told in failure("--weights", tmp_path / "w.safetensors", "--out", tmp_path / "o")
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_value_that_half_precision_cannot_hold_is_named(tmp_path):
    state = dict(PoseModel(PoseModelConfig(hidden=4)).state_dict())
    state["network.2.bias"] = torch.full((4,), 1e9)
    save_file(state, tmp_path / "w.safetensors")
    args = ["--weights", tmp_path / "w.safetensors", "--dtype", "float16", "--out", tmp_path / "o"]
    assert "network.2.bias is not finite as float16; take bfloat16" in failure(*args)


def test_existing_folder_is_never_written_to(tmp_path):
    save_file(PoseModel(PoseModelConfig(hidden=4)).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    told = failure("--weights", tmp_path / "w.safetensors", "--out", tmp_path / "out")
    assert "exists; choose another folder" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_wrong_arguments_are_explained(tmp_path, sizes):
    save_file({"weight": torch.ones(1)}, tmp_path / "odd.safetensors")
    save_file(PoseModel(PoseModelConfig(hidden=4)).state_dict(), tmp_path / "w.safetensors")
    out = ["--out", tmp_path / "out", "--weights"]
    assert "no model known here" in failure(*out, tmp_path / "odd.safetensors")
    assert "omit it" in failure(*out, tmp_path / "w.safetensors", "--config", sizes)
    assert "has no image tower" in failure(*out, tmp_path / "w.safetensors", "--open_clip", "x")
    with pytest.raises(import_evac.ConfigError, match="not a readable file of sizes"):
        import_evac.read_config(str(tmp_path / "none.json"))


class Payload:
    """Pickles as a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_command_ends_with_one_message_when_the_file_hides_code(tmp_path, repository):
    torch.save({"state_dict": {}, "x": Payload(tmp_path / "made")}, tmp_path / "w.ckpt")
    command = [sys.executable, "-m", "evac_jax.tools.world_model.import_evac", "--weights"]
    done = subprocess.run(
        [*command, str(tmp_path / "w.ckpt"), "--out", str(tmp_path / "out")],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "refused, its pickle asks for posix.mkdir" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.ckpt"]
