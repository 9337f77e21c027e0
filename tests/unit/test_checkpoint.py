import dataclasses
import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evac_jax import checkpoint
from evac_jax.config.build import default_config, to_dict
from evac_jax.errors import CheckpointError, DamagedCheckpointError, StorageError


def _state(seed: int):
    key = jax.random.key(seed)
    return {"params": {"w": jax.random.normal(key, (3, 4))}, "updates": jnp.asarray(seed)}


def test_restore_returns_what_was_saved_and_keeps_the_newest(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=2)
    for iteration in (1, 2, 3):
        checkpoints.save(iteration, _state(iteration), {"starts": {"calls": iteration}})
    assert checkpoints.latest() == 3
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["2", "3"]
    checkpoints.close()
    # As after a restart: a manager that has saved nothing itself.
    state, meta = checkpoint.Checkpoints(tmp_path / "c", keep=2).restore(3, _state(0))
    assert meta == {"starts": {"calls": 3}}
    jax.tree.map(np.testing.assert_array_equal, state, _state(3))


def test_restore_names_every_array_that_does_not_fit(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, _state(1), {})
    other = {"params": {"w": jnp.zeros((3, 5)), "b": jnp.zeros(2)}}
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, other)
    message = str(error.value)
    assert "missing in the checkpoint: params/b" in message
    assert "not wanted here: updates" in message
    assert "params/w: expected shape (3, 5), got (3, 4)" in message


def test_resuming_with_another_policy_is_refused():
    saved = to_dict(default_config("grpo"))
    current = json.loads(json.dumps(saved))
    current["policy"]["value_head"] = "chunk_level"
    current["train"]["iterations"] = 99
    with pytest.raises(CheckpointError, match="policy.value_head: the run has 'none'") as error:
        checkpoint.check_resumable(saved, current)
    assert "iterations" not in str(error.value)


def test_commit_that_is_another_one_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/cache")
    first, second = "1" * 40, "2" * 40
    cached = f"/cache/models--me--policy/snapshots/{first}"
    for saved in (cached, f"hf://me/policy@{first}"):
        saved = {"policy": {"checkpoint": saved}}
        checkpoint.check_resumable(saved, {"policy": {"checkpoint": f"hf://me/policy@{first}"}})
        with pytest.raises(CheckpointError, match=f"now 'hf://me/policy@{second}'"):
            checkpoint.check_resumable(
                saved, {"policy": {"checkpoint": f"hf://me/policy@{second}"}}
            )


def _run(folder, algorithm, iterations=()):
    folder.mkdir()
    (folder / checkpoint.CONFIG_FILE).write_text(json.dumps({"algorithm": algorithm}))
    for iteration in iterations:
        (folder / "checkpoints" / str(iteration)).mkdir(parents=True)


def _restoring(folder, restore="latest"):
    config = default_config("grpo")
    return dataclasses.replace(
        config,
        log=dataclasses.replace(config.log, dir=str(folder)),
        checkpoint=dataclasses.replace(config.checkpoint, restore=str(restore)),
    )


def test_latest_passes_over_runs_when_they_have_no_checkpoint_or_another_algorithm(
    tmp_path, caplog
):
    _run(tmp_path / "a", "grpo", (1,))
    _run(tmp_path / "b", "ppo", (1,))
    _run(tmp_path / "c", "grpo")
    _run(tmp_path / "d", "grpo")
    (tmp_path / "d" / checkpoint.CONFIG_FILE).write_text("")  # its process was killed
    for age, name in enumerate("dcba"):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    with caplog.at_level("WARNING", logger="absl"):
        assert checkpoint.find_run(_restoring(tmp_path)).name == "a"
    assert str(tmp_path / "c") in caplog.text
    assert str(tmp_path / "d") in caplog.text
    (tmp_path / "a" / "checkpoints" / "1").rmdir()
    with pytest.raises(CheckpointError, match=f"without one: .*{tmp_path / 'c'}"):
        checkpoint.find_run(_restoring(tmp_path))


def test_latest_passes_over_a_link_that_leads_nowhere_and_names_it(tmp_path, caplog):
    _run(tmp_path / "a", "grpo", (1,))
    os.utime(tmp_path / "a", (1000, 1000))
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    with caplog.at_level("WARNING", logger="absl"):
        assert checkpoint.find_run(_restoring(tmp_path)).name == "a"
    assert str(tmp_path / "b") in caplog.text


def test_named_run_is_refused_when_it_has_no_checkpoint(tmp_path):
    _run(tmp_path / "a", "grpo")
    with pytest.raises(CheckpointError, match="no checkpoint .* so nothing to go on from"):
        checkpoint.find_run(_restoring(tmp_path, tmp_path / "a"))
    (tmp_path / "a" / checkpoint.CONFIG_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"damaged config.json"):
        checkpoint.find_run(_restoring(tmp_path, tmp_path / "a" / "checkpoints"))


def test_saving_is_an_error_when_nothing_is_saved(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, _state(3), {})
    with pytest.raises(CheckpointError, match=r"iteration 2 was not written.*\[3\]"):
        checkpoints.save(2, _state(2), {})


def test_full_disk_is_told_when_a_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(StorageError, match="iteration 2 could not be written .*No space left"):
        checkpoints.save(2, _state(2), {})


def test_another_runs_checkpoint_is_refused(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, _state(1), {"run": "theirs"})
    with pytest.raises(CheckpointError, match="of another run"):
        checkpoints.go_back_to(-1, _state(0), "ours")
    assert checkpoints.restore(1, _state(0))[1] == {"run": "theirs"}


def _cut_largest(folder):
    largest = max(folder.rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    os.truncate(largest, largest.stat().st_size // 2)


DAMAGES = {
    "array": lambda folder: [_cut_largest(folder / "state")],
    "arrays gone": lambda folder: [shutil.rmtree(d) for d in (folder / "state").rglob("d")],
    "metadata": lambda folder: [
        file.write_text("{") for file in (folder / "state").glob("_METADATA")
    ],
    "metadata gone": lambda folder: [file.unlink() for file in (folder / "state").glob("_*")],
    "progress": lambda folder: [os.truncate(folder / "meta" / "metadata", 5)],
    "empty": lambda folder: [shutil.rmtree(part) for part in folder.iterdir() if part.is_dir()],
}


def _two_of_which_one_is_damaged(folder, damage):
    checkpoints = checkpoint.Checkpoints(folder, keep=3)
    for iteration in (1, 2):
        checkpoints.save(iteration, _state(iteration), {"run": "r"})
    checkpoints.close()
    assert DAMAGES[damage](folder / "2")
    return checkpoint.Checkpoints(folder, keep=3)


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoint_before_is_taken_when_the_newest_is_damaged(tmp_path, damage, caplog):
    checkpoints = _two_of_which_one_is_damaged(tmp_path, damage)
    with caplog.at_level("WARNING", logger="absl"):
        found, state, *_ = checkpoints.go_back_to(-1, _state(0), "r")
        checkpoints.set_aside_after(found)
    assert found == 1
    jax.tree.map(np.testing.assert_array_equal, state, _state(1))
    assert f"{tmp_path}/2 cannot be read" in caplog.text
    assert "choose one" not in caplog.text  # it was chosen
    assert (tmp_path / "2.damaged").is_dir()
    checkpoints.save(2, _state(2), {"run": "r"})
    assert checkpoints.iterations == [1, 2]


PARAMS = {"w": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
READS = {
    "whole": lambda checkpoints, iteration: checkpoints.restore(iteration, _state(0)),
    "part": lambda checkpoints, iteration: checkpoints.restore_part(iteration, "params", PARAMS),
}


@pytest.mark.parametrize(
    ("read", "damage"),
    # A part is read without the progress.
    [
        (read, damage)
        for read in READS
        for damage in DAMAGES
        if (read, damage) != ("part", "progress")
    ],
)
def test_damage_is_told_with_the_other_checkpoints_when_one_alone_is_read(tmp_path, read, damage):
    checkpoints = _two_of_which_one_is_damaged(tmp_path, damage)
    with pytest.raises(DamagedCheckpointError) as error:
        READS[read](checkpoints, 2)
    first, last = str(error.value).splitlines()
    assert first.startswith(f"checkpoint {tmp_path}/2 cannot be read: ")
    assert "tensorstore_spec" not in first
    assert last == (
        "Others that are there: [1]; choose one with --config.checkpoint.step, or a tool's --step"
    )
    READS[read](checkpoints, 1)


def test_array_that_was_cut_short_is_named_without_the_settings_of_its_reader(tmp_path):
    def state(seed):  # its array is the largest file by far
        return {"params": {"w": jax.random.normal(jax.random.key(seed), (100, 100))}}

    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, state(1), {})
    _cut_largest(tmp_path / "1")
    for read in (
        lambda: checkpoints.restore(1, state(0)),
        lambda: checkpoints.restore_part(1, "params", state(0)["params"]),
    ):
        with pytest.raises(DamagedCheckpointError) as error:
            read()
        assert "params/w" in str(error.value)
        assert str(error.value).endswith("\nOthers that are there: none")
        assert len(str(error.value)) < 500


def test_later_checkpoints_are_kept_aside_when_an_older_one_is_restored(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    for iteration in (1, 2, 3):
        checkpoints.save(iteration, _state(iteration), {})
    found, state, *_ = checkpoints.go_back_to(1, _state(0), "")
    jax.tree.map(np.testing.assert_array_equal, state, _state(1))
    assert (found, checkpoints.iterations) == (1, [1, 2, 3])  # the run may yet be refused
    checkpoints.set_aside_after(1)
    assert checkpoints.iterations == [1]
    assert (tmp_path / "2.later").is_dir()
    checkpoints.save(2, _state(5), {})
    checkpoints.set_aside_after(1)
    assert (tmp_path / "2.later2").is_dir()


def test_checkpoint_is_not_replaced_by_another_when_it_was_named(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    for iteration in (1, 2):
        checkpoints.save(iteration, _state(iteration), {})
    _cut_largest(tmp_path / "2" / "state")
    with pytest.raises(
        DamagedCheckpointError, match=r"that are there: \[1\]; choose one with --config"
    ):
        checkpoints.go_back_to(2, _state(0), "")
    assert (tmp_path / "2").is_dir()


def _episodes(n: int):
    return {"batch": {"tokens": jnp.arange(n)}, "played": jnp.ones((n, 2))}


def test_episodes_are_restored_with_the_run_and_left_out_when_they_are_of_other_settings(
    tmp_path, caplog
):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=None)
    checkpoints.save(1, _state(1), {"ahead": {}}, _episodes(4))
    *_, meta, episodes = checkpoints.go_back_to(-1, _state(0), "", _episodes(4))
    assert meta == {"ahead": {}}
    jax.tree.map(np.testing.assert_array_equal, episodes, _episodes(4))
    assert checkpoints.go_back_to(-1, _state(0), "")[-1] is None  # not wanted
    assert checkpoints.go_back_to(-1, _state(0), "", _episodes(6))[-1] is None
    assert "batch/tokens: expected shape (6,), got (4,)" in caplog.text


def test_checkpoint_without_episodes_has_none(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=None)
    checkpoints.save(1, _state(1), {})
    assert checkpoints.go_back_to(-1, _state(0), "", _episodes(4))[-1] is None


def test_earlier_checkpoint_is_taken_when_the_episodes_of_the_newest_are_damaged(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=None)
    for iteration in (1, 2):
        checkpoints.save(iteration, _state(iteration), {"ahead": {}}, _episodes(400))
    for data in (tmp_path / "2" / "episodes").rglob("d"):
        shutil.rmtree(data)
    assert checkpoints.go_back_to(-1, _state(0), "", _episodes(400))[0] == 1


def test_missing_run_is_explained(tmp_path):
    config = default_config("grpo")
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, restore=str(tmp_path / "no"))
    )
    with pytest.raises(CheckpointError, match="is not a run folder"):
        checkpoint.find_run(config)
