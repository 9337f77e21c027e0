import dataclasses
import json

import pytest

from evac_jax.config.build import default_config
from evac_jax.errors import CheckpointError
from evac_jax.run_folder import RunFolder
from evac_jax.telemetry import writers


def _config(folder, **log):
    config = default_config("grpo")
    return dataclasses.replace(
        config, log=dataclasses.replace(config.log, dir=str(folder), tensorboard=False, **log)
    )


def test_nothing_is_written_when_the_host_is_not_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    folder = RunFolder.choose(_config(tmp_path, run="wide"))
    folder.make()
    writer = folder.make_writer(finished=0)
    writer.write(1, {"a": 1.0})
    folder.finish_evaluation(0, {})
    assert isinstance(writer, writers.NullWriter)
    assert list(tmp_path.iterdir()) == []


def test_first_host_writes_configuration_and_metrics(tmp_path):
    folder = RunFolder.choose(_config(tmp_path, run="one"))
    folder.make()
    folder.make_writer(finished=0).close()
    assert json.loads((tmp_path / "one" / "config.json").read_text())["algorithm"] == "grpo"
    assert (tmp_path / "one" / "metrics.jsonl").is_file()


def test_folder_of_another_run_is_refused(tmp_path):
    config = _config(tmp_path, run="one")
    RunFolder.choose(config).make()
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunFolder.choose(config)


def test_parts_lie_where_the_configuration_says(tmp_path):
    config = _config(tmp_path, run="one")
    config = dataclasses.replace(
        config, video=dataclasses.replace(config.video, dir=str(tmp_path / "films"))
    )
    folder = RunFolder.choose(config)
    assert folder.videos == tmp_path / "films"
    assert folder.checkpoints == tmp_path / "one" / "checkpoints"
    assert not folder.resumed
