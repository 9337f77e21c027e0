import json

import pytest

from evac_jax.errors import ConfigError
from evac_jax.evac.autoencoder import Autoencoder
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import EvacModel
from evac_jax.files import cards
from evac_jax.libero_small.sizes import LATENT_CHANNELS
from evac_jax.tools import sizes
from tests.unit.evac import tiny


def test_every_named_setting_has_networks_that_fit_together():
    for name in sizes.NAMED:
        config = sizes.world_model(name)
        assert config.consistent_scale
        assert sizes.policy(name).image_size == config.image_size[0]
        assert sizes.policy(name).chunk == config.chunk
        assert Autoencoder(config.autoencoder).config.factor == 8


@pytest.mark.parametrize(("name", "pixels"), [("libero_small", 64), ("libero_128", 128)])
def test_small_libero_has_a_denoiser_of_its_latents(name, pixels):
    model = EvacModel(sizes.world_model(name)).eval()
    times = pixels // tiny.start_frames(1).shape[-1]
    state = model.start(tiny.start_frames(1).repeat(1, 1, 1, times, times), 1)
    assert state.latents.shape[3] == LATENT_CHANNELS
    state, frames = model.imagine(
        state, tiny.poses(1, model.config.frames), tiny.camera(), steps=1, eta=0.0
    )
    assert frames.shape == (1, 1, 8, 3, pixels, pixels)


def test_file_of_sizes_is_read_and_new_weights_are_sampled_as_they_are_trained(tmp_path):
    known = tiny.TINY.to_dict()
    del known["consistent_scale"]  # as older files
    cards.write_json(tmp_path / "sizes.json", known)
    cards.write_json(tmp_path / "config.json", {"model": "EvacModel", "config": known})
    for name in ("sizes.json", "config.json"):
        expected = tiny.TINY.replace(consistent_scale=True)
        assert sizes.world_model(str(tmp_path / name)) == expected
    cards.write_json(tmp_path / "sizes.json", known | {"consistent_scale": False})
    assert sizes.world_model(str(tmp_path / "sizes.json")) == tiny.TINY


def test_folder_of_before_keeps_its_scale():
    known = json.loads(json.dumps(tiny.TINY.to_dict()))
    del known["consistent_scale"]
    assert not EvacConfig.from_dict(known).consistent_scale


@pytest.mark.parametrize("read", [sizes.world_model, sizes.policy])
def test_unknown_name_and_file_that_is_no_configuration_are_refused(read, tmp_path):
    with pytest.raises(
        ConfigError, match="--sizes=libero: expected miniature, libero_small, libero_128"
    ):
        read("libero")
    cards.write_json(tmp_path / "other.json", {"steps": 3})
    with pytest.raises(ConfigError):
        read(str(tmp_path / "other.json"))
