"""The mesh that a run chooses where `mesh.data` is 0."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest

from evac_jax.config.build import default_config
from evac_jax.config.cluster import MeshConfig
from evac_jax.errors import CheckpointError
from evac_jax.memory import mesh
from evac_jax.memory.parts import peak
from evac_jax.memory.trainer import trainer_parts
from evac_jax.shapes import EpisodeShapes
from tests.unit.policies.tiny import CONFIG

EPISODE = EpisodeShapes((CONFIG.num_images, 16, 16, 3), CONFIG.chunk, 2 * CONFIG.chunk)
# Wide enough that parameters are cut at all.
SIZES = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=1024, value_type="none")
OPEN = dataclasses.replace(default_config("grpo"), mesh=MeshConfig(0, -1))
DEVICES = 8


def need(data, fsdp):
    """Return the estimate of a device, in bytes."""
    config = dataclasses.replace(OPEN, mesh=MeshConfig(data, fsdp))
    return peak(trainer_parts(config, SIZES, EPISODE, DEVICES, "cuda"))[0]


def chosen(limit):
    return mesh.fitting(OPEN, SIZES, EPISODE, DEVICES, "cuda", limit / mesh.FILLED)


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_a_copy_is_cut_over_as_few_devices_as_fit(fsdp):
    data = DEVICES // fsdp
    config, why = chosen(need(data, fsdp) * 1.001)
    assert config.mesh == MeshConfig(data, fsdp)
    assert f"{data} x {fsdp} devices" in why
    assert "the fewest over which a copy of the parameters fits" in why


def test_nothing_that_fits_is_said():
    config, why = chosen(1.0)
    assert config.mesh == MeshConfig(1, DEVICES)
    assert "NONE fits" in why
    assert f"{need(8, 1) / 1e9:.1f} GB over 1, " in why


def test_a_given_mesh_stays():
    given = dataclasses.replace(OPEN, mesh=MeshConfig(2, 4))
    assert mesh.fitting(given, SIZES, EPISODE, DEVICES, "cuda", 1.0) == (given, "")
    assert mesh.for_devices(given, EPISODE, []) is given


def device(stats):
    return SimpleNamespace(platform="gpu", process_index=0, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("stats", "episode", "said"),
    [
        (None, EPISODE, "the memory of a device is not known"),
        ({"bytes_limit": 1e12}, None, "the size of the frames is not known"),
    ],
)
def test_what_is_not_known_is_said_and_parameters_are_cut(stats, episode, said, caplog):
    caplog.set_level(logging.INFO)
    config = mesh.for_devices(OPEN, episode, [device(stats)] * DEVICES)
    assert config.mesh == MeshConfig(1, -1)
    assert said in caplog.text


def test_only_a_device_of_this_host_is_asked(monkeypatch):
    monkeypatch.setattr(mesh, "read_sizes", lambda policy, **more: SIZES)
    other = SimpleNamespace(process_index=1)  # has no statistics here
    config = mesh.for_devices(OPEN, EPISODE, [other] * 4 + [device({"bytes_limit": 1e12})] * 4)
    assert config.mesh == MeshConfig(8, 1)


def test_one_device_needs_no_estimate():
    assert mesh.for_devices(OPEN, EPISODE, [device(None)]).mesh == MeshConfig(1, 1)


def test_sizes_come_from_the_checkpoint(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(mesh, "read_sizes", lambda policy, **more: SIZES)
    limit = need(2, 4) * 1.001 / mesh.FILLED
    config = mesh.for_devices(OPEN, EPISODE, [device({"bytes_limit": limit})] * DEVICES)
    assert config.mesh == MeshConfig(2, 4)
    assert f"limit 90% of {limit / 1e9:.1f} GB" in caplog.text


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    policy = dataclasses.replace(OPEN.policy, checkpoint=str(tmp_path))
    config = dataclasses.replace(OPEN, policy=policy)
    with pytest.raises(CheckpointError, match=r"config.policy.checkpoint"):
        mesh.for_devices(config, EPISODE, [device({"bytes_limit": 1e9})] * DEVICES)
