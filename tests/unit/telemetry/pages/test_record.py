import json

import pytest

from evac_jax.errors import DataError
from evac_jax.telemetry.pages import record
from tests.unit.telemetry.pages.run_folders import make_run, write_lines

IMAGINED, REAL = record.EVALUATIONS


def test_run_is_read_as_it_was_written(tmp_path):
    run = record.read(make_run(tmp_path / "one", iterations=4))
    assert (run.name, run.done, run.iterations, run.finished) == ("one", 4, 4, True)
    assert [(rate.iteration, rate.n) for rate in run.rates(IMAGINED)] == [(0, 10), (2, 10), (4, 10)]
    # Wilson's interval of 1 of 10, by hand: z² = 3.84146, centre 0.1 + 0.192073, scale 1.384146.
    assert run.rates(IMAGINED)[0].interval == pytest.approx((0.017876, 0.404150), abs=1e-6)
    assert run.rates(REAL) == []
    assert run.seconds() == {"step": 10.0, "env": 8.0, "env/imagine": 6.0, "actor": 1.0}


def test_run_under_way_is_read_and_not_finished(tmp_path):
    run = record.read(make_run(tmp_path / "one", iterations=1, of=9))
    assert (run.done, run.iterations, run.finished) == (1, 9, False)


def test_rate_has_no_interval_when_the_run_did_not_log_how_many(tmp_path):
    folder = make_run(tmp_path / "one")
    write_lines(folder / "metrics.jsonl", [{"iteration": 1, "eval/real_success": 0.25}])
    (rate,) = record.read(folder).rates(record.TWINS[1])
    assert (rate.interval, str(rate)) == (None, "25.0 %")


def test_older_run_is_read_when_files_and_fields_are_missing(tmp_path):
    folder = make_run(tmp_path / "old")
    (folder / "config.json").write_text('{"algorithm": "grpo"}')
    run = record.read(folder)
    assert (run.launches, run.warnings, run.films) == ([], [], [])
    assert run.iterations == run.done == 4
    assert run.setting("eval.episodes") is None


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_folder_is_refused_when_it_is_no_run(tmp_path, missing):
    (make_run(tmp_path / "one") / missing).unlink()
    with pytest.raises(DataError, match="expected the folder of a run"):
        record.read(tmp_path / "one")


@pytest.mark.parametrize("text", ["{", "[]", '[["seed", 0]]'])
def test_damaged_configuration_is_told(tmp_path, text):
    (make_run(tmp_path / "one") / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json: expected a JSON object"):
        record.read(tmp_path / "one")


def test_configuration_of_something_else_is_told(tmp_path):
    (make_run(tmp_path / "one") / "config.json").write_text("{}")
    with pytest.raises(DataError, match="expected the configuration of a run"):
        record.read(tmp_path / "one")


def test_runs_are_grouped_when_only_seed_and_places_differ(tmp_path):
    runs = [
        make_run(tmp_path / f"{clip}-{seed}", seed=seed, algo__clip_high=clip, log__run=f"{seed}")
        for clip in (0.2, 0.3)
        for seed in (0, 1)
    ]
    groups = record.grouped([record.read(run) for run in runs])
    assert [group.name for group in groups] == ["algo.clip_high=0.2", "algo.clip_high=0.3"]
    assert [[run.name for run in group.records] for group in groups] == [
        ["0.2-0", "0.2-1"],
        ["0.3-0", "0.3-1"],
    ]


def test_groups_are_named_by_their_runs_when_too_much_differs(tmp_path):
    one = make_run(tmp_path / "one")
    config = json.loads((one / "config.json").read_text())
    other = make_run(tmp_path / "other")
    config["env"] = dict.fromkeys(config["env"], "another")
    (other / "config.json").write_text(json.dumps(config))
    groups = record.grouped([record.read(run) for run in (one, other)])
    assert [group.name for group in groups] == ["one", "other"]


@pytest.mark.parametrize("text", [b'{"iteration": "\xff"}', b"[]", b"{"])
def test_damaged_list_of_films_is_told(tmp_path, text):
    run = make_run(tmp_path / "one")
    (run / "videos").mkdir()
    (run / "videos" / "iteration_00002.json").write_bytes(text)
    with pytest.raises(DataError, match=r"iteration_00002\.json: expected a JSON object"):
        record.read(run)
