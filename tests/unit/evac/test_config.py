import pytest

from evac_jax.errors import ConfigError
from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    UNetConfig,
)


def test_config_comes_back_when_sent_through_json():
    config = EvacConfig(chunk=5, unet=UNetConfig(model_channels=64, attention_resolutions=(1,)))
    assert EvacConfig.from_dict(config.to_dict()) == config


def test_config_is_refused_when_a_key_is_unknown():
    with pytest.raises(ConfigError, match="chunks"):
        EvacConfig.from_dict({"chunks": 8})


def test_config_names_every_problem_when_parts_do_not_fit():
    with pytest.raises(ConfigError) as error:
        EvacConfig(image_size=(250, 256), unet=UNetConfig(context_dim=7, action_tokens=3))
    for word in ("image_size", "context_dim", "action_tokens"):
        assert word in str(error.value)


def test_denoiser_of_other_latents_is_refused():
    with pytest.raises(ConfigError, match="must be 55 and 16, for latents of 16 channels"):
        EvacConfig(autoencoder=AutoencoderConfig(latent_channels=16))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"chunk": "8"}, "chunk"),
        ({"fps": float("nan")}, "fps"),
        ({"image_size": [256]}, "image_size"),
        ({"unet": None}, "UNetConfig: expected an object"),
        ({"maps": {"wrist_view": 1}}, "wrist_view"),
        ([], "EvacConfig: expected an object"),
    ],
)
def test_config_is_refused_when_a_value_is_of_another_type(values, told):
    with pytest.raises(ConfigError, match=told):
        EvacConfig.from_dict(values)
