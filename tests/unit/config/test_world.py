"""Worlds: what their card may say, which fields they fill, and what contradicts them."""

import dataclasses
import json
import shutil

import pytest

from evac_jax.config import hub
from evac_jax.config import world as worlds
from evac_jax.config.build import from_config_dict, to_dict
from evac_jax.config.flags import load_preset, read_preset
from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.config.world import GroundTruth, World
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import libero_facts
from tests.unit import world_folder
from tests.unit.hub_server import COMMIT, HubServer, Repository, point_client_to

OWN = "configs/grpo.py:own"


@pytest.fixture(autouse=True)
def _at_the_root(repository, monkeypatch):
    monkeypatch.chdir(repository)
    worlds._from_hub.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return world_folder.write(tmp_path / "world")


def config_of(*flags, preset=OWN):
    return from_config_dict(read_preset(preset, [f"--config.{flag}" for flag in flags]).to_dict())


def told(*flags, preset=OWN) -> str:
    with pytest.raises(ConfigError) as error:
        config_of(*flags, preset=preset)
    return str(error.value)


def test_world_fills_every_field_that_it_knows(folder):
    config = config_of(f"world={folder}")
    policy, reward, env = config.policy, config.reward, config.env
    assert policy.checkpoint == f"{folder}/policy"
    assert (policy.unnorm_key, policy.max_prompt_length) == ("robot", 17)
    assert (policy.temperature, policy.keep_stop_token) == (0.7, True)
    assert config.world_model.checkpoint == f"{folder}/world_model"
    assert (config.world_model.steps, config.world_model.eta) == (3, 0.5)
    assert reward.checkpoint == f"{folder}/reward"
    assert (reward.success_frames, reward.judged_frames, reward.threshold) == (2, 4, 0.4)
    assert (env.pose_model, env.gripper) == (f"{folder}/pose_model", "none")
    assert (env.initial_states, env.initial_states_path) == ("npy", f"{folder}/starts")
    assert (env.train_starts, config.eval.starts) == ((0, 80), (80, 90))
    assert (env.max_episode_steps, config.eval.ground_truth) == (24, "none")
    assert config.world == str(folder)


def test_fields_of_libero_are_those_that_cards_compare():
    assert worlds.ALIKE == libero_facts.ALIKE


def test_world_of_libero_says_what_its_frames_and_actions_are(tmp_path):
    world = World.read(str(world_folder.write(tmp_path / "w", **world_folder.LIBERO)))
    libero = {n.split(".")[1]: v for n, v in world.settings().items() if n.startswith("libero.")}
    assert libero == {
        "suite": "libero_goal",
        "tasks": (3,),
        "extra_states": True,
        "image_size": 64,
        "crop": (0.1, 0.9, 0.2, 1.0),
        "oversample": 2,
        "reflections": False,
        "action_repeat": 2,
    }
    assert world.settings()["eval.ground_truth"] == "libero"


def test_value_comes_from_the_default_the_preset_the_world_or_the_flag_in_this_order(folder):
    config = config_of(
        *(f"world={folder}", "env.max_episode_steps=16", "world_model.steps=9"),
        preset="configs/grpo.py:one_gpu_80gb",
    )
    assert config.world_model.solver == "ddim"  # default
    assert config.policy.lora_rank == 32  # preset
    assert config.policy.temperature == 0.7  # world; the preset says 1.6
    assert (config.env.max_episode_steps, config.world_model.steps) == (16, 9)  # flags


def test_flag_overrides_when_it_repeats_what_the_preset_says(folder):
    preset = load_preset(OWN).env.max_episode_steps
    config = config_of(f"world={folder}", f"env.max_episode_steps={preset}")
    assert config.env.max_episode_steps == preset != 24


def test_world_of_a_flag_replaces_all_that_the_presets_world_said(folder):
    config = config_of(f"world={folder}", preset="configs/grpo.py")
    values = to_dict(config)
    assert MINIATURE_WEIGHTS not in json.dumps(values)
    assert config.policy.unnorm_key == "robot"
    assert config.env.num_envs == 128  # of the preset itself


def test_contradictions_are_named_in_one_message(tmp_path):
    folder = world_folder.write(tmp_path / "w", **world_folder.LIBERO)
    values = read_preset(
        OWN,
        [
            f"--config.world={folder}",
            *("--config.env.gripper=libero", "--config.reward.judged_frames=0"),
            *("--config.libero.image_size=128", "--config.libero.action_repeat=1"),
            "--config.seed=-1",
        ],
    ).to_dict()
    with pytest.raises(ConfigError) as error:
        from_config_dict(values)
    message = str(error.value)
    assert f"config.env.gripper: policy of the world {folder} was made for 'none'" in message
    assert "config.reward.judged_frames: reward of the world" in message
    assert "was made for 64, got 128" in message
    assert "config.libero.action_repeat: world_model of the world" in message
    assert "config.seed" in message


def test_replaced_part_is_not_bound_to_the_worlds_values(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    config = config_of(
        *(f"world={folder}", f"policy.checkpoint={other}", "env.gripper=libero"),
        *(f"reward.checkpoint={other}", "reward.judged_frames=0"),
    )
    assert (config.env.gripper, config.reward.judged_frames) == ("libero", 0)
    assert "config.env.gripper" in told(f"world={folder}", "env.gripper=libero")


def test_nothing_is_bound_when_the_world_is_left_out():
    config = config_of("world=", "reward.judged_frames=4", preset="configs/grpo.py")
    assert config.reward.judged_frames == 4
    assert config.reward.checkpoint == f"{MINIATURE_WEIGHTS}/reward"


def test_configuration_with_a_world_is_written_and_read_again(folder):
    config = config_of(f"world={folder}", "env.max_episode_steps=16")
    assert from_config_dict(to_dict(config)) == config


def test_folder_without_a_card_is_no_world(tmp_path):
    assert "is no world's folder, as it has no world.json" in told(f"world={tmp_path}")


def test_card_of_a_world_is_no_folder(folder):
    assert "name the folder with it" in told(f"world={folder / 'world.json'}")


def test_address_of_no_repository_is_refused_without_the_network():
    with pytest.raises(DataError, match="expected hf://OWNER/NAME"):
        config_of("world=hf://x")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"horison": 3}, r"horison: unknown. Did you mean 'horizon'?"),
        ({"horizon": 20}, "horizon: expected a multiple of the chunk of 8, got 20"),
        ({"horizon": "24"}, "horizon: expected int, got '24'"),
        ({"gripper": "open"}, "gripper: expected one of"),
        ({"judging": {"success_frames": 2}}, "judging.judged_frames: missing"),
        ({"cameras": []}, "expected at least one of each"),
        ({"cameras": [{"size": [32]}]}, "cameras.size: expected 2 entries"),
        ({"sha256": {}}, "sha256: expected ['policy', 'pose_model', 'reward', 'starts'"),
    ],
)
def test_wrong_card_is_refused_with_the_reason(folder, changes, why):
    path = folder / "world.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert why in told(f"world={folder}")


def test_card_that_lacks_an_entry_or_is_no_json_is_refused(folder):
    path = folder / "world.json"
    values = json.loads(path.read_text())
    del values["horizon"]
    path.write_text(json.dumps(values))
    assert "horizon: missing" in told(f"world={folder}")
    for damaged in (b"{", b'{"name": "\xff"}'):
        path.write_bytes(damaged)
        assert f"{path}: expected JSON" in told(f"world={folder}")


def test_all_missing_and_foreign_files_are_named(folder):
    (folder / "reward" / "data.bin").unlink()
    (folder / "policy" / "more.bin").write_bytes(b"")
    message = told(f"world={folder}")
    assert "reward/data.bin: missing" in message
    assert "policy/more.bin: not in the card" in message


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", ""])
def test_file_outside_of_the_part_is_refused(folder, name):
    path = folder / "world.json"
    values = json.loads(path.read_text())
    values["sha256"]["policy"][name] = "0" * 64
    path.write_text(json.dumps(values))
    assert "sha256.policy: expected files and hashes" in told(f"world={folder}")


def test_link_out_of_the_folder_is_refused_and_one_within_is_not(folder, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(folder / "reward" / "data.bin", outside)
    link = folder / "reward" / "data.bin"
    link.symlink_to(outside)
    assert f"reward/data.bin: a link out of the folder, to {outside}" in told(f"world={folder}")
    link.unlink()
    shutil.move(outside, folder / "kept")
    link.symlink_to(folder / "kept")
    assert config_of(f"world={folder}")


def test_part_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    shutil.move(folder / "reward", tmp_path / "reward")
    (folder / "reward").symlink_to(tmp_path / "reward")
    assert "reward/data.bin: a link out of the folder" in told(f"world={folder}")


def test_other_ground_truth_is_written_without_liberos_settings():
    values = json.loads(world_folder.CARD.to_json())
    assert values["ground_truth"] == {"name": "none"}
    libero = dataclasses.replace(world_folder.CARD, ground_truth=GroundTruth("libero"))
    assert "suite" in json.loads(libero.to_json())["ground_truth"]


def test_world_on_the_hub_fills_addresses_with_the_commit(folder, tmp_path, monkeypatch):
    server = HubServer({"me/world": Repository.of(folder)})
    point_client_to(server.endpoint, tmp_path / "cache", monkeypatch)
    try:
        values = read_preset(OWN, ["--config.world=hf://me/world"]).to_dict()
        root = f"hf://me/world@{COMMIT}"
        assert values["world"] == root
        assert values["reward"]["checkpoint"] == f"{root}/reward"
        fetched = [path for _, path, _ in server.requests if "data.bin" in path]
        assert not fetched  # parts wait until all else is in order
        config = from_config_dict(values)
        assert (hub.Path(config.reward.checkpoint) / "data.bin").read_bytes() == b"reward"
        assert to_dict(config)["reward"]["checkpoint"] == f"{root}/reward"
        assert to_dict(config)["world"] == root
        # The cache keeps its files as links to its own folder of contents.
        assert World.read(hub.local(root)).card.horizon == 24
        bound = read_preset(OWN, ["--config.world=hf://me/world", "--config.env.gripper=libero"])
        with pytest.raises(ConfigError, match=r"config\.env\.gripper: policy of the world"):
            from_config_dict(bound.to_dict())
    finally:
        server.close()


def test_miniature_is_a_world_like_any_other():
    world = World.read(MINIATURE_WEIGHTS)
    config = config_of(preset="configs/grpo.py")
    values = to_dict(config)
    for name, value in world.settings().items():
        section, field = name.split(".")
        assert values[section][field] == value, name
    assert config_of(f"world={MINIATURE_WEIGHTS}").env == config.env
