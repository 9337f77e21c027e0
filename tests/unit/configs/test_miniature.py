"""Presets of small settings."""

import pytest

from configs import grpo, ppo
from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import read_preset
from evac_jax.config.schema import LIBERO_SMALL_WEIGHTS
from evac_jax.config.world import absent
from evac_jax.errors import ConfigError
from tests.unit import world_folder


@pytest.mark.parametrize("file", [grpo, ppo])
def test_small_libero_names_the_command_that_makes_its_weights_and_nothing_else(file):
    if not absent(LIBERO_SMALL_WEIGHTS):
        pytest.skip("its weights are here")
    with pytest.raises(ConfigError) as error:
        from_config_dict(file.get_config("libero_small").to_dict())
    message = str(error.value)
    assert "evac_jax.tools.recipes.libero_small --ship" in message
    assert "policy.checkpoint" not in message


def test_small_libero_takes_a_world_of_a_flag_instead(tmp_path):
    folder = world_folder.write(tmp_path / "w", **world_folder.LIBERO)
    config = read_preset("configs/grpo.py:libero_small", [f"--config.world={folder}"])
    assert config.policy.checkpoint == f"{folder}/policy"
    assert config.libero.image_size == 64
    assert config.eval.ground_truth_starts == (360, 400)
