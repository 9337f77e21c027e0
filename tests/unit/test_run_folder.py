import dataclasses
import errno
import json

import numpy as np
import pytest

from evac_jax.config.build import default_config
from evac_jax.errors import CheckpointError, ConfigError, StoppedError, StorageError
from evac_jax.evaluate import Evaluation, Film
from evac_jax.run_folder import RunFolder
from evac_jax.telemetry import writers
from evac_jax.telemetry.pages import record, run_report
from tests.unit import world_folder


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
    folder.finish_evaluation(0, {}, None)
    assert isinstance(writer, writers.NullWriter)
    assert list(tmp_path.iterdir()) == []


def test_first_host_writes_configuration_and_metrics(tmp_path):
    folder = RunFolder.choose(_config(tmp_path, run="one"))
    folder.make()
    folder.make_writer(finished=0).close()
    assert json.loads((tmp_path / "one" / "config.json").read_text())["algorithm"] == "grpo"
    assert (tmp_path / "one" / "metrics.jsonl").is_file()


def make_run(folder, name="one", iterations=(), **log):
    """A run's folder with checkpoints that hold nothing."""
    run = RunFolder.choose(_config(folder, run=name, **log))
    run.make()
    for iteration in iterations:
        (run.checkpoints / str(iteration)).mkdir(parents=True)
    return run


def restoring(config, restore, **checkpoint):
    changed = dataclasses.replace(config.checkpoint, restore=str(restore), **checkpoint)
    return dataclasses.replace(config, checkpoint=changed)


def test_folder_of_another_run_is_refused_when_it_has_trained(tmp_path):
    config = _config(tmp_path, run="one")
    make_run(tmp_path)
    assert not RunFolder.choose(config).resumed  # it has trained nothing: a retry begins in it
    (tmp_path / "one" / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 1}\n')
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunFolder.choose(config)
    (tmp_path / "one" / "metrics.jsonl").unlink()
    (tmp_path / "one" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunFolder.choose(config)


def test_checkpoint_dir_is_refused_when_it_holds_another_runs_checkpoints(tmp_path):
    config = _config(tmp_path, run="two")
    make_run(tmp_path, "one", (1, 2))
    theirs = str(tmp_path / "one" / "checkpoints")
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, dir=theirs)
    )
    with pytest.raises(
        CheckpointError, match=r"iterations \[1, 2\].*another --config.checkpoint.d"
    ):
        RunFolder.choose(config)


def test_run_is_continued_where_its_checkpoints_are_when_they_lie_elsewhere(tmp_path):
    config = _config(tmp_path, run="one")
    elsewhere = dataclasses.replace(config.checkpoint, dir=str(tmp_path / "elsewhere"))
    run = RunFolder.choose(dataclasses.replace(config, checkpoint=elsewhere))
    run.make()
    (tmp_path / "elsewhere" / "3").mkdir(parents=True)
    resumed = RunFolder.choose(restoring(config, tmp_path / "one"))
    assert resumed.checkpoints == tmp_path / "elsewhere"


def test_auto_starts_a_run_and_goes_on_with_it_when_it_has_a_checkpoint(tmp_path):
    config = restoring(_config(tmp_path, run="one"), "auto")
    assert not RunFolder.choose(config).resumed
    make_run(tmp_path)
    metrics = tmp_path / "one" / "metrics.jsonl"
    metrics.write_text('{"iteration": 1}\n')  # it ended before its first checkpoint
    begun = RunFolder.choose(config)
    assert not begun.resumed
    begun.make()
    assert (tmp_path / "one" / "metrics_1.jsonl").read_text() == '{"iteration": 1}\n'
    (tmp_path / "one" / "checkpoints" / "1").mkdir(parents=True)
    assert RunFolder.choose(config).resumed


def test_run_is_finished_when_it_has_all_iterations_and_a_summary(tmp_path):
    run = make_run(tmp_path, iterations=(50, 100))
    config = restoring(_config(tmp_path, run="one"), run.path)
    assert config.train.iterations == 100
    assert not RunFolder.choose(config).is_finished
    (run.path / "summary.json").write_text("{}")
    assert RunFolder.choose(config).is_finished
    assert not RunFolder.choose(restoring(config, run.path, step=50)).is_finished
    longer = dataclasses.replace(config.train, iterations=101)
    assert not RunFolder.choose(dataclasses.replace(config, train=longer)).is_finished
    with pytest.raises(CheckpointError, match=r"iteration 7; there are \[50, 100\]"):
        RunFolder.choose(restoring(config, run.path, step=7))


def test_two_runs_get_folders_of_their_own_when_they_start_in_one_second(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda text: text)
    config = _config(tmp_path)
    chosen = [RunFolder.choose(config) for _ in range(2)]
    with chosen[0].claimed() as one, chosen[1].claimed() as two:
        assert two.path == one.path.with_name(f"{one.path.name}-2")
        assert two.checkpoints == two.path / "checkpoints"
        two.make()
    assert not one.path.exists()  # it never became a run
    assert two.path.is_dir()


def test_second_process_is_refused_when_a_run_lives(tmp_path):
    with make_run(tmp_path).claimed(), pytest.raises(StorageError, match=r"process \d+ on "):
        RunFolder.choose(_config(tmp_path, run="one")).claimed().__enter__()


@pytest.mark.parametrize("theirs", ["elsewhere", "runs/two/checkpoints"])
def test_second_run_is_refused_when_one_that_lives_saves_in_the_same_folder(tmp_path, theirs):
    def run(name, where):
        config = _config(tmp_path / "runs", run=name)
        own = dataclasses.replace(config.checkpoint, dir=where and str(tmp_path / where))
        return dataclasses.replace(config, checkpoint=own)

    first, second = run("one", theirs), run("two", "" if "two" in theirs else theirs)
    with RunFolder.choose(first).claimed():
        with pytest.raises(StorageError, match=r"config.checkpoint.dir: '.*process \d+ on "):
            RunFolder.choose(second).claimed().__enter__()
        with RunFolder.for_evaluation(second, None).claimed(saves=False):
            pass


def test_checkpoints_may_lie_in_the_runs_own_folder(tmp_path):
    config = _config(tmp_path, run="one")
    own = dataclasses.replace(config.checkpoint, dir=str(tmp_path / "one"))
    with RunFolder.choose(dataclasses.replace(config, checkpoint=own)).claimed() as run:
        run.make()
        assert run.run_id == (tmp_path / "one" / "run_id").read_text()


def test_full_disk_is_told_with_the_command_that_goes_on(tmp_path):
    run = make_run(tmp_path, iterations=(1, 2))
    with (
        pytest.raises(StorageError, match="No space left.*\n.*iteration 2; go on from there with"),
        run.claimed(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_evaluation_is_refused_when_its_folder_holds_one(tmp_path):
    config = _config(tmp_path, run="eval")
    folder = RunFolder.for_evaluation(config, None)
    with folder.claimed() as folder:
        folder.finish_evaluation(0, {}, None)
    with pytest.raises(CheckpointError, match=r"holds evaluation.json already"):
        RunFolder.for_evaluation(config, None)


def test_evaluation_gets_a_folder_of_its_own_when_log_run_names_the_evaluated_run(tmp_path):
    run = make_run(tmp_path, iterations=(1,))
    folder = RunFolder.for_evaluation(_config(tmp_path, run="one"), run)
    assert folder.path.name.startswith("eval-")
    with pytest.raises(CheckpointError, match=r"holds config.json already"):
        RunFolder.for_evaluation(_config(tmp_path, run="one"), None)


def test_parts_lie_where_the_configuration_says(tmp_path):
    config = _config(tmp_path, run="one")
    config = dataclasses.replace(
        config, video=dataclasses.replace(config.video, dir=str(tmp_path / "films"))
    )
    folder = RunFolder.choose(config)
    assert folder.videos == tmp_path / "films" / "one"
    assert folder.checkpoints == tmp_path / "one" / "checkpoints"
    assert not folder.resumed


def test_run_goes_on_only_in_the_world_that_it_began_in(tmp_path):
    def config(world):
        return dataclasses.replace(_config(tmp_path, run="one"), world=str(world))

    first = world_folder.write(tmp_path / "world")
    run = RunFolder.choose(config(first))
    run.make()
    (run.checkpoints / "1").mkdir(parents=True)
    moved = world_folder.write(tmp_path / "moved")  # the same one elsewhere
    assert RunFolder.choose(restoring(config(moved), run.path)).resumed
    other = world_folder.write(tmp_path / "other", horizon=32)
    with pytest.raises(CheckpointError, match=r"is not the world that .* they differ in horizon;"):
        RunFolder.choose(restoring(config(other), run.path))
    with pytest.raises(CheckpointError, match="trains in a world, now there is none"):
        RunFolder.choose(restoring(config(""), run.path))
    (run.path / "world.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"world\.json: expected JSON"):
        RunFolder.choose(restoring(config(first), run.path))


def test_run_without_a_world_takes_one_later(tmp_path):
    run = make_run(tmp_path, iterations=[1])
    world = world_folder.write(tmp_path / "world")
    config = dataclasses.replace(_config(tmp_path, run="one"), world=str(world))
    RunFolder.choose(restoring(config, run.path)).make()
    assert (run.path / "world.json").read_text() == (world / "world.json").read_text()


def test_report_is_written_and_only_by_the_first_host(tmp_path, monkeypatch):
    folder = RunFolder.choose(_config(tmp_path, run="one"))
    folder.make()
    folder.make_writer(finished=0).close()
    monkeypatch.setattr("jax.process_index", lambda: 1)
    RunFolder.choose(_config(tmp_path, run="one")).write_report()
    assert not (tmp_path / "one" / "report.html").exists()
    folder.write_report()
    assert "0 of 100 iterations" in (tmp_path / "one" / "report.html").read_text()


def test_training_goes_on_when_the_report_fails(tmp_path, caplog):
    folder = RunFolder.choose(_config(tmp_path, run="one"))
    folder.make()
    folder.make_writer(finished=0).close()
    (tmp_path / "one" / "metrics.jsonl").write_text("[1]\n")
    folder.write_report()
    assert "report.html was not written: DataError" in caplog.text


def test_signal_ends_the_run_when_it_comes_while_the_report_is_written(tmp_path, monkeypatch):
    folder = make_run(tmp_path)
    stopped = StoppedError("stopped", 15)
    monkeypatch.setattr(run_report, "write", raiser(stopped))
    with pytest.raises(StoppedError):
        folder.write_report()


def raiser(error: Exception):
    def fail(*_):
        raise error

    return fail


def evaluation():
    """An evaluation with one film."""
    frames = np.zeros((3, 2, 8, 8, 3), np.uint8)
    film = Film("lift it", 7, frames, np.zeros(3), np.array([False, False, True]))
    return Evaluation(success=np.ones(1, bool), by_task={}, metrics={}, films=[film])


def test_films_are_listed_with_what_they_show(tmp_path):
    folder, outcome = make_run(tmp_path), evaluation()
    written = folder.write_films(4, {"imagined": outcome, "ground_truth": outcome})
    assert [name for name, _, _ in written] == ["imagined/0", "ground_truth/0"]
    listed = json.loads((folder.videos / "iteration_00004.json").read_text())
    assert (listed["iteration"], listed["shared_starts"]) == (4, False)
    facts = {"start": 7, "instruction": "lift it", "success": True}
    assert [film["place"] for film in listed["films"]] == ["imagined", "ground_truth"]
    for film in listed["films"]:
        assert {name: film[name] for name in facts} == facts
        assert (folder.videos / film["video"]).is_file()
        assert (folder.videos / film["strip"]).is_file()


def filmed(config, folder, **video):
    """The configuration with its films in `folder`."""
    return dataclasses.replace(
        config, video=dataclasses.replace(config.video, dir=str(folder), **video)
    )


CHOICES = (RunFolder.choose, lambda config: RunFolder.for_evaluation(config, None))


@pytest.mark.parametrize("choose", CHOICES)
def test_folder_of_the_films_is_refused_when_it_cannot_be_written(tmp_path, choose):
    (tmp_path / "file").touch()
    config = filmed(_config(tmp_path, run="one"), tmp_path / "file" / "films")
    with pytest.raises(StorageError, match=r"file' is a file, .*video\.dir"):
        choose(config)
    choose(filmed(config, tmp_path / "file" / "films", save=False))


@pytest.mark.parametrize("choose", CHOICES)
def test_films_of_runs_with_one_folder_are_kept_apart(tmp_path, choose):
    films, outcome = tmp_path / "films", {"imagined": evaluation()}
    first = choose(filmed(_config(tmp_path / "here", run="one"), films))
    first.write_films(0, outcome)
    second = choose(filmed(_config(tmp_path / "here", run="two"), films))
    written = {path for folder in (first, second) for _, path, _ in folder.write_films(0, outcome)}
    assert written == {films / name / "iteration_00000_0.mp4" for name in ("one", "two")}
    elsewhere = filmed(_config(tmp_path / "there", run="one"), films)
    with pytest.raises(CheckpointError, match=r"films of another run .*another --config\.video\.d"):
        choose(elsewhere)


def test_films_are_found_and_written_again_by_a_run_with_a_folder_for_them(tmp_path):
    config = filmed(_config(tmp_path, run="one"), tmp_path / "films")
    for _ in range(2):  # the first saved no checkpoint
        run = RunFolder.choose(config)
        run.make()
        run.make_writer(finished=0).write(0, {"a": 1.0})
        run.write_films(0, {"imagined": evaluation()})
    (films,) = record.read(run.path).films
    assert (record.read(run.path).videos / films["films"][0]["video"]).is_file()


def test_film_that_cannot_be_written_is_told(tmp_path):
    run = RunFolder.choose(filmed(_config(tmp_path, run="one"), tmp_path / "films"))
    (tmp_path / "films").touch()  # since the run began
    with pytest.raises(StorageError, match="films/one.*cannot write"):
        run.write_films(0, {"imagined": evaluation()})


def test_what_comes_next_is_told_as_commands(tmp_path):
    follow = make_run(tmp_path).next_commands(100)
    assert list(follow) == ["evaluate", "go on", "export", "serve", "report"]
    assert follow["go on"].endswith("--config.train.iterations=200")


def test_runs_name_is_another_one_when_it_is_damaged(tmp_path):
    run = make_run(tmp_path)
    (run.path / "run_id").write_bytes(b"\xff")
    assert run.run_id == "\ufffd"
