"""Checking a world: files against their hashes, parts against each other and against the card."""

import json
import shutil

import pytest

from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.config.world import World
from evac_jax.errors import ConfigError
from evac_jax.tools.world import check, pack
from tests.unit.hub_server import HubServer, Repository, point_client_to
from tests.unit.tools.world import folders


@pytest.fixture(scope="module")
def packed(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    recording = folders.record(folder / "episodes")
    argv = [*folders.of(weights), "--starts", str(recording), *folders.TOLD]
    pack.main([*argv, "--out", str(folder / "world")])
    return folder / "world"


@pytest.fixture
def world(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "world")


def told(folder) -> str:
    with pytest.raises(ConfigError) as error:
        check.main([str(folder)])
    return str(error.value)


def change_card(folder, **changes) -> None:
    path = folder / "world.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(values))


def test_shipped_miniature_is_whole():
    assert check.problems(World.read(MINIATURE_WEIGHTS)) == []


def test_whole_world_is_told_so(world, capsys):
    check.main([str(world)])
    assert "are whole, its parts agree" in capsys.readouterr().out


def test_every_changed_file_is_named(world):
    for name in ("reward/model.safetensors", "starts/images.npy"):
        data = bytearray((world / name).read_bytes())
        data[-1] ^= 1
        (world / name).write_bytes(data)
    message = told(world)
    assert "reward/model.safetensors: changed since the world was packed" in message
    assert "starts/images.npy: changed" in message
    assert "policy/" not in message


def test_missing_and_foreign_files_are_refused(world):
    (world / "pose_model" / "config.json").unlink()
    (world / "policy" / "other.safetensors").write_bytes(b"")
    message = told(world)
    assert "pose_model/config.json: missing" in message
    assert "policy/other.safetensors: not in the card" in message


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"chunk": 4}, "chunk: world_model/config.json says 8, world.json says 4"),
        (
            {"cameras": [{"size": [32, 32]}]},
            "image_size: world_model/config.json says [64, 64], world.json says [32, 32]",
        ),
        ({"instructions": ["fly"]}, "instructions: starts says"),
        ({"policy": {"unnorm_key": "robot"}}, "unnorm_key: policy/dataset_statistics.json says"),
        ({"policy": {"prompt_length": 2}}, "prompt"),
        ({"starts": {"train": [0, 99]}}, "starts: there are 5, ranges go up to 99"),
    ],
)
def test_card_that_disagrees_with_a_part_is_refused(world, changes, why):
    change_card(world, **changes)
    assert why in told(world)


def test_world_on_the_hub_is_checked_in_the_cache(world, tmp_path, monkeypatch, capsys):
    server = HubServer({"me/checked": Repository.of(world)})
    point_client_to(server.endpoint, tmp_path / "cache", monkeypatch)
    try:
        check.main(["hf://me/checked"])
    finally:
        server.close()
    assert "its parts agree" in capsys.readouterr().out
