"""What a run saves and restores beside its arrays."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from evac_jax.errors import CheckpointError, ConfigError, StorageError
from evac_jax.evaluate import Evaluation
from evac_jax.run import Run
from evac_jax.run_folder import RunFolder
from tests.unit.test_run_folder import _config, restoring


def _run(folder, restore="", starts=lambda _: None, threshold=0.5, **checkpoint) -> Run:
    config = restoring(_config(folder, run="one"), restore, **checkpoint)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, iterations=10),
        eval=dataclasses.replace(config.eval, interval=2),
        reward=dataclasses.replace(config.reward, threshold=threshold),
    )
    learner = SimpleNamespace(state={"w": jnp.zeros(3)}, is_sound=lambda: True, sync=lambda: None)
    collector = SimpleNamespace(
        state_dict=dict, load_state_dict=starts, ahead=lambda: None, ahead_like=lambda: None
    )
    twin = SimpleNamespace(state_dict=list, load_state_dict=lambda _: None)
    return Run(RunFolder.choose(config), learner, collector, twin, stopping=None)


def _outcome(successes: int) -> dict[str, Evaluation]:
    success = np.arange(8) < successes
    return {"imagined": Evaluation(metrics={}, success=success, films=[], by_task={})}


@pytest.mark.parametrize(("evaluated", "owes"), [([], True), ([2], True), ([2, 4], False)])
def test_resumed_run_owes_the_evaluation_that_was_cut_short(tmp_path, evaluated, owes):
    run = _run(tmp_path)
    assert run.owes_evaluation  # the one before training
    run.log_evaluation(0, _outcome(1))
    for iteration in evaluated:
        run.log_evaluation(iteration, _outcome(iteration))
    run.save(4)
    run.close()
    assert _run(tmp_path, tmp_path / "one").owes_evaluation == owes


def test_resumed_run_owes_nothing_when_no_evaluation_was_due(tmp_path):
    run = _run(tmp_path)
    run.log_evaluation(0, _outcome(1))
    run.save(3)
    run.close()
    assert not _run(tmp_path, tmp_path / "one").owes_evaluation


def test_later_checkpoints_stay_when_the_run_cannot_go_on(tmp_path):
    run = _run(tmp_path)
    for iteration in (2, 4):
        run.save(iteration)
    run.close()

    def refuse(_):
        raise ConfigError("cannot resume the start sampler with other settings")

    with pytest.raises(ConfigError, match="other settings"):
        _run(tmp_path, tmp_path / "one", refuse, step=2)
    assert _run(tmp_path, tmp_path / "one").finished == 4
    assert _run(tmp_path, tmp_path / "one", step=2).finished == 2
    assert (tmp_path / "one" / "checkpoints" / "4.later").is_dir()


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_summary_of_a_resumed_run_tells_when_evaluations_go_by_other_settings(
    tmp_path, threshold, capsys
):
    run = _run(tmp_path)
    run.log_evaluation(0, _outcome(1))
    run.save(4)
    run.close()
    run = _run(tmp_path, tmp_path / "one", threshold=threshold)
    run.log_evaluation(4, _outcome(4))
    run.summarise(3.0)
    told = "config.reward.threshold was 0.5, now 0.9"
    assert (told in capsys.readouterr().out) == (threshold == 0.9)
    assert (told in (tmp_path / "one" / "report.html").read_text()) == (threshold == 0.9)


def test_nothing_is_saved_when_another_run_began_to_save_in_the_same_folder(tmp_path):
    """As on a file system without locks."""
    one = _run(tmp_path / "a", dir=str(tmp_path / "shared"))
    other = _run(tmp_path / "b", dir=str(tmp_path / "shared"))
    with pytest.raises(CheckpointError, match=r"config.checkpoint.dir: another run .*a/one'"):
        one.save(4)
    other.save(4)


def test_nothing_is_saved_when_the_folder_of_a_run_was_deleted(tmp_path):
    run = _run(tmp_path)
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(StorageError, match="was deleted or moved .* iteration 3 was not saved"):
        run.save(3)
    assert not (tmp_path / "one").exists()


def test_run_shows_its_episodes_and_ends_with_report_and_commands(tmp_path, caplog, capsys):
    run = _run(tmp_path)
    run.log_evaluation(0, _outcome(2))
    page = tmp_path / "one" / "report.html"
    assert "0 of 10 iterations" in page.read_text()
    figures = {
        "actor/skipped_updates": 0.0,
        "env/success_rate": 0.375,
        "env/num_trajectories": 128.0,
    }
    run.log(1, figures, {"step": 2.0, "env": 1.0})
    with caplog.at_level("INFO", logger="absl"), run.progress():
        pass
    assert caplog.messages[-1].split("  |  ")[1:] == [
        "its episodes: 37.5% of 128 succeeded",
        "last evaluation (iteration 0): imagined 25.0%",
    ]
    run.log_evaluation(1, _outcome(4))
    run.close()
    run.summarise(3.0)
    told = capsys.readouterr().out
    assert f"--config.checkpoint.restore={tmp_path / 'one'} --mode=eval" in told
    assert f"evac_jax.tools.runs.report {tmp_path / 'one'}" in told
    text = page.read_text()
    assert "1 of 10 iterations, not finished" in text
    assert "50.0 %" in text
