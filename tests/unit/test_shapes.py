import dataclasses
import json

import jax
import pytest

from evac_jax.config.build import default_config
from evac_jax.config.vlm import VlmConfig
from evac_jax.devices import sharding
from evac_jax.errors import ConfigError
from evac_jax.miniature.sizes import WORLD_MODEL
from evac_jax.shapes import EpisodeShapes, check_sizes, expected_episode


@pytest.fixture
def config(tmp_path):
    """A run whose world model is a config.json without weights."""
    config = default_config("grpo")
    described = {"model": "EvacModel", "config": WORLD_MODEL.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(described))
    world_model = dataclasses.replace(config.world_model, checkpoint=str(tmp_path))
    env = dataclasses.replace(config.env, max_episode_steps=32)
    return dataclasses.replace(config, world_model=world_model, env=env)


def test_episode_is_known_from_the_world_models_config(config):
    height, width = WORLD_MODEL.image_size
    frame = (WORLD_MODEL.n_view, height, width, 3)
    assert expected_episode(config) == EpisodeShapes(frame, WORLD_MODEL.chunk, max_steps=32)
    assert expected_episode(config).chunks == 4


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"config": {"chunk": "many"}}', None])
def test_nothing_is_expected_of_another_file(config, tmp_path, text):
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert expected_episode(config) is None


def test_nothing_is_expected_of_the_ground_truth(config):
    env = dataclasses.replace(config.env, simulator="ground_truth")
    assert expected_episode(dataclasses.replace(config, env=env)) is None


def test_episodes_too_short_for_a_verdict_are_refused(config):
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    reward = dataclasses.replace(config.reward, judge="vlm", vlm=VlmConfig(every=2, average=3))
    config = dataclasses.replace(config, reward=reward)
    with pytest.raises(ConfigError, match=r"every x average = 2 x 3 chunks, an episode has 4"):
        check_sizes(config, mesh, mesh, expected_episode(config))


def test_episodes_of_broken_chunks_are_refused(config):
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    episode = dataclasses.replace(expected_episode(config), max_steps=20)
    with pytest.raises(ConfigError, match="multiple of the world model's chunk of 8 actions, got"):
        check_sizes(config, mesh, mesh, episode)
