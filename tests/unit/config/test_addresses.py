"""Addresses in a configuration: checked, replaced by paths, written down with their commit."""

import pytest

from configs import grpo
from evac_jax.config import addresses, hub
from evac_jax.config.build import from_config_dict, to_dict
from evac_jax.config.paths import INPUT_PATHS
from evac_jax.config.reference import default_config
from evac_jax.errors import ConfigError, DataError
from tests.unit.hub_server import COMMIT


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Stands for the client: {address: path}, and the addresses that were asked for."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    asked = []

    def local(text):
        if not hub.is_address(text):
            return text
        asked.append(text)
        address = hub.parse(text)
        if address.repo == "me/gone":
            raise DataError(f"{text}: no such repository")
        name = f"{address.kind}s--{address.repo.replace('/', '--')}"
        path = cache / name / "snapshots" / COMMIT / address.path
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    monkeypatch.setattr(hub, "local", local)
    return asked


def values(**changes):
    config = grpo.get_config().to_dict()
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    return config


def test_addresses_become_paths_and_the_commit_is_written_down(downloads):
    config = from_config_dict(
        values(
            policy__checkpoint="hf://me/policy@v1",
            reward__checkpoint="hf://me/one,hf://me/two/sub",
            collect__mix="policy=0.5,policy:hf://me/policy@v1@0.3=0.5",
        )
    )
    for path in (config.policy.checkpoint, *config.reward.checkpoint.split(",")):
        assert hub.Path(path).is_dir()
    written = to_dict(config)
    assert written["policy"]["checkpoint"] == f"hf://me/policy@{COMMIT}"
    assert written["reward"]["checkpoint"] == f"hf://me/one@{COMMIT},hf://me/two@{COMMIT}/sub"
    assert written["collect"]["mix"] == f"policy=0.5,policy:hf://me/policy@{COMMIT}@0.3=0.5"
    assert from_config_dict(written) == config


def test_last_at_in_a_mixture_is_the_temperature(downloads):
    mix = "policy:hf://me/policy@0.5=0.2,noisy=0.1"
    config = from_config_dict(values(collect__mix=mix))
    assert downloads == ["hf://me/policy"]
    assert config.collect.mix.split("@")[1] == "0.5=0.2,noisy=0.1"


def test_nothing_is_downloaded_when_anything_else_is_wrong(downloads):
    with pytest.raises(ConfigError, match="num_envs"):
        from_config_dict(values(policy__checkpoint="hf://me/policy", env__num_envs=3))
    with pytest.raises(ConfigError, match="config.policy.checkpoint: expected hf://OWNER/NAME"):
        from_config_dict(values(policy__checkpoint="hf://me"))
    assert not downloads


def test_all_addresses_that_cannot_be_had_are_told_at_once(downloads):
    gone = values(policy__checkpoint="hf://me/gone", env__pose_model="hf://me/gone/x")
    with pytest.raises(ConfigError) as error:
        from_config_dict(gone)
    for name in ("policy.checkpoint", "env.pose_model"):
        assert f"config.{name}: hf://me/gone" in str(error.value)


@pytest.mark.parametrize("name", addresses.OF_THIS_MACHINE)
def test_what_is_written_to_or_run_cannot_be_an_address(name, downloads):
    with pytest.raises(ConfigError, match=f"config.{name}: expected a path of this machine"):
        from_config_dict(values(**{name.replace(".", "__"): "hf://me/x"}))


def test_every_path_is_either_of_this_machine_or_can_be_an_address():
    config = default_config("grpo")
    assert set(INPUT_PATHS) <= set(addresses.FROM_HUB) | set(addresses.OF_THIS_MACHINE)
    assert not addresses.fields(config)
