import pytest

from evac_jax.errors import ConfigError
from evac_jax.evac.config import (
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
