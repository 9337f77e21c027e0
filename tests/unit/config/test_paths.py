import dataclasses
from pathlib import Path

from evac_jax.config import paths
from evac_jax.config.build import default_config


def config_of(**sections):
    config = default_config("grpo")
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in sections.items()
        },
    )


def test_home_is_found_when_a_path_begins_with_it():
    config = paths.with_home(
        config_of(
            log={"dir": "~/runs"},
            checkpoint={"restore": "latest", "dir": "~/checkpoints"},
            reward={"checkpoint": "~/one,two"},
        )
    )
    home = str(Path.home())
    assert config.log.dir == f"{home}/runs"
    assert (config.checkpoint.dir, config.checkpoint.restore) == (f"{home}/checkpoints", "latest")
    assert config.reward.checkpoint == f"{home}/one,two"
    assert config.video.dir == ""


def test_paths_mean_the_same_everywhere_when_they_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(
        log={"dir": "runs"}, checkpoint={"restore": "auto"}, policy={"checkpoint": "weights"}
    )
    config = paths.with_absolute(config, paths.RUN_PATHS)
    assert config.log.dir == str(tmp_path / "runs")
    assert config.checkpoint.restore == "auto"
    assert config.policy.checkpoint == "weights"
    config = paths.with_absolute(config, paths.INPUT_PATHS)
    assert config.policy.checkpoint == str(tmp_path / "weights")


def test_every_named_field_is_there():
    config = default_config("grpo")
    for name in paths.RUN_PATHS + paths.INPUT_PATHS:
        section, field = name.split(".")
        assert isinstance(getattr(getattr(config, section), field), str)
