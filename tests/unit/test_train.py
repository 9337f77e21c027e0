"""What an evaluation refuses before simulators and policy are loaded."""

import dataclasses

import pytest

from evac_jax import train
from evac_jax.config.build import default_config
from evac_jax.errors import CheckpointError
from evac_jax.run_folder import RunFolder


@pytest.mark.parametrize(
    ("iterations", "restore", "why"),
    [
        ((), "{run}", "has no checkpoint in"),
        ((), "latest", r"no grpo run under .* with a checkpoint"),
        ((), "auto", "has no checkpoint yet"),
        ((2, 4), "{run}", r"no checkpoint of iteration 99; there are \[2, 4\]"),
        ((2, 4), "latest", r"no checkpoint of iteration 99; there are \[2, 4\]"),
    ],
)
def test_evaluation_is_refused_when_there_is_nothing_to_restore(
    tmp_path, monkeypatch, iterations, restore, why
):
    monkeypatch.setattr(train, "_ready", None)  # nothing is loaded
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        log=dataclasses.replace(config.log, dir=str(tmp_path), run="one"),
        cluster=dataclasses.replace(config.cluster, compilation_cache=""),
    )
    run = RunFolder.choose(config)
    run.make()
    for iteration in iterations:
        (run.checkpoints / str(iteration)).mkdir(parents=True)
    restored = dataclasses.replace(config.checkpoint, restore=restore.format(run=run.path), step=99)
    with pytest.raises(CheckpointError, match=why):
        train.evaluate_only(dataclasses.replace(config, checkpoint=restored))
    assert list(tmp_path.iterdir()) == [run.path]
