import pytest

from evac_jax.config.flags import check_flags
from evac_jax.errors import ConfigError

PRESET = "configs/grpo.py"


def test_mistyped_fields_are_listed_together_with_hints(repository, monkeypatch):
    monkeypatch.chdir(repository)
    flags = ["--config.algo.clip_hihg=0.3", "--config.group_size", "4", "--config.seed=1.5"]
    with pytest.raises(ConfigError) as error:
        check_flags(flags, PRESET)
    message = str(error.value)
    assert "--config.algo.clip_hihg: unknown field. Did you mean 'algo.clip_high'?" in message
    assert "--config.group_size: unknown field. Did you mean 'algo.group_size'?" in message
    assert "--config.seed: expected int, got '1.5'" in message


def test_valid_fields_pass(repository, monkeypatch):
    monkeypatch.chdir(repository)
    flags = ["--config.algo.group_size=4", "--config.eval.starts[0]=3", "--mode=eval"]
    check_flags(flags, PRESET)


def test_missing_preset_file_is_named():
    with pytest.raises(ConfigError, match="no file 'configs/nothing.py'"):
        check_flags(["--config=configs/nothing.py"], PRESET)
