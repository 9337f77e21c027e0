import json

import numpy as np
import pytest
import torch

from evac_jax.errors import DataError
from evac_jax.files.recordings import load
from evac_jax.tools.world_model import latent_cache
from tests.unit.evac import tiny
from tests.unit.tools import tiny_recording


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    return [
        tiny_recording.write(folder / name, seed=seed, count=24)
        for seed, name in enumerate(("a", "b"))
    ]


@pytest.fixture
def model():
    return tiny.tiny_model()


def _latents(cache, folders, model, **options):
    return latent_cache.cached_latents(
        cache, folders, model.first_stage_model, model.config, **options
    )


def _all(latents):
    rows = np.arange(len(latents.frames))
    return np.stack((latents.frames[rows], latents.maps[rows]))


def test_cache_refuses_another_autoencoder(recordings, model, tmp_path):
    _latents(tmp_path, recordings[:1], model)
    with torch.no_grad():
        next(model.first_stage_model.parameters()).mul_(1.01)
    with pytest.raises(DataError, match=r"another autoencoder.*--cache"):
        _latents(tmp_path, recordings[:1], model)


def test_cache_refuses_other_trajectory_maps(recordings, model, tmp_path):
    _latents(tmp_path, recordings[:1], model)
    model.config = model.config.replace(maps=model.config.maps.replace(radius=2))
    with pytest.raises(DataError, match="another maps"):
        _latents(tmp_path, recordings[:1], model)


def test_only_new_episodes_are_encoded_when_a_folder_is_added(
    recordings, model, tmp_path, monkeypatch
):
    first = _all(_latents(tmp_path, recordings[:1], model))
    encoded = []
    encode = latent_cache._encode

    def spy(place, folder, *rest):
        encoded.append(folder)
        encode(place, folder, *rest)

    monkeypatch.setattr(latent_cache, "_encode", spy)
    both = _latents(tmp_path, recordings, model)
    assert encoded == recordings[1:]
    assert len(both.frames) == len(load(*recordings).frames)
    np.testing.assert_array_equal(_all(both)[:, : first.shape[1]], first)
    alone = _all(_latents(tmp_path / "other", recordings[1:], model))
    np.testing.assert_array_equal(_all(both)[:, first.shape[1] :], alone)


def test_encoding_goes_on_where_it_was_killed(recordings, model, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "BLOCK", 64)
    whole = _all(_latents(tmp_path / "whole", recordings[:1], model))
    draw, calls = latent_cache.draw_pose_maps, []

    def killed_at_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(latent_cache, "draw_pose_maps", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        _latents(tmp_path / "killed", recordings[:1], model)
    resumed = _all(_latents(tmp_path / "killed", recordings[:1], model))
    np.testing.assert_array_equal(resumed, whole)
    blocks = -(-whole.shape[1] // 64)
    assert len(calls) == blocks + 1  # the two finished ones were not encoded again


@pytest.mark.slow
def test_several_processes_write_the_same_bits(recordings, model, tmp_path):
    one = _all(_latents(tmp_path / "one", recordings[:1], model))
    two = _all(_latents(tmp_path / "two", recordings[:1], model, processes=2))
    np.testing.assert_array_equal(one, two)


def test_damaged_cache_is_named(recordings, model, tmp_path):
    _latents(tmp_path, recordings[:1], model)
    (place,) = tmp_path.iterdir()
    assert json.loads((place / "card.json").read_text())["block"] == latent_cache.BLOCK
    (place / "frames.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"frames\.npy is damaged"):
        _latents(tmp_path, recordings[:1], model)
