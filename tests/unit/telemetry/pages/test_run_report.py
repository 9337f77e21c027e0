import html
import json
import re

import pytest

from evac_jax.errors import DataError
from evac_jax.telemetry.pages import run_report
from tests.unit.telemetry.pages.run_folders import add_films, make_run, write_lines

EVIL = "<img src=x onerror=alert(1)>"


def _text(path) -> str:
    """What a reader sees of a page, in one line."""
    body = path.read_text().split("<body>")[1]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def _written(tmp_path, *runs) -> str:
    run_report.write(runs, tmp_path / "report.html")
    return _text(tmp_path / "report.html")


def test_report_shows_every_part_of_a_run(tmp_path):
    run = make_run(tmp_path / "one", iterations=4)
    launch = {
        "began": "2026-11-29 22:00:00 +0000",
        "iteration": 0,
        "command": ["python", "launch.py", "--config=configs/grpo.py", "--config.seed=1"],
        "folder": "/somewhere",
        "preset": "configs/grpo.py",
        "changed": {"algo.clip_high": [0.28, 0.3]},
    }
    again = launch | {"iteration": 2, "began": "later"}
    write_lines(run / "launches.jsonl", [launch, again])
    write_lines(run / "warnings.jsonl", [{"time": "then", "level": "warning", "text": "watch out"}])
    add_films(run, 0, {"imagined": [7], "ground_truth": [7]}, shared=True)
    text = _written(tmp_path, run)
    for part in (
        "one 4 of 4 iterations; seed 0 before after imagined 10.0 % [1.8, 40.4] n=10 50.0 %",
        "Falls slowly while the policy learns.",
        "lift 7 (start 7) imagined: success real: no success",
        "imagine 6.00 s, 60.0 %",
        "rest 1.00 s, 10.0 %",
        "Compared with configs/grpo.py",
        "algo.clip_high 0.28 0.3",
        "then watch out",
        "began, in /somewhere: python launch.py --config=configs/grpo.py --config.seed=1",
        "later, went on from iteration 2",
        f"Go on: python launch.py --config=configs/grpo.py --config.seed=1 "
        f"--config.checkpoint.restore={run} --config.train.iterations=8",
        "--mode=eval",
        "tools.policy.export",
        "--mode=serve",
        "tools.runs.report",
    ):
        assert part in text, part


def test_report_is_given_when_the_run_is_older_than_its_parts(tmp_path):
    run = make_run(tmp_path / "old", iterations=2, of=8)
    (run / "config.json").write_text('{"algorithm": "grpo", "train": {"iterations": 8}}')
    text = _written(tmp_path, run)
    assert "old 2 of 8 iterations, not finished; seed not known" in text
    assert "Not known of old" in text
    assert f"The command of {run} was not kept" in text
    assert "There are none: the run has no films" in text


def test_report_is_given_when_nothing_but_the_first_evaluation_is_there(tmp_path):
    text = _written(tmp_path, make_run(tmp_path / "new", iterations=0, of=8))
    assert "new 0 of 8 iterations, not finished; seed 0" in text
    assert text.count("No iteration is done yet.") == 2


def test_nothing_is_markup_when_names_and_instructions_hold_some(tmp_path):
    run = make_run(tmp_path / "run<b>", log__run=EVIL)
    add_films(run, 0, {"imagined": [1]}, shared=True)
    path = run / "videos" / "iteration_00000.json"
    films = json.loads(path.read_text())
    films["films"][0]["instruction"] = EVIL
    path.write_text(json.dumps(films))
    write_lines(run / "warnings.jsonl", [{"time": "", "level": "warning", "text": EVIL}])
    run_report.write([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert EVIL not in page
    assert "run<b>" not in page
    assert page.count(html.escape(EVIL)) == 2


def test_films_are_paired_by_their_start_only_when_both_mean_the_same_by_it(tmp_path):
    run = make_run(tmp_path / "one")
    add_films(run, 0, {"imagined": [5, 6], "ground_truth": [6, 5]}, shared=True)
    assert "lift 5 (start 5) imagined: success real: no success" in _written(tmp_path, run)
    add_films(run, 0, {"imagined": [5], "ground_truth": [5]}, shared=False)
    text = _written(tmp_path, run)
    assert "lift 5 (start 5) imagined: success lift 5 (start 5) real: no success" in text


def test_first_and_last_evaluation_are_shown_when_a_run_has_several(tmp_path):
    run = make_run(tmp_path / "one")
    for iteration in (0, 2, 4, 6):  # 6 is beyond what the run has: from before it was restored
        add_films(run, iteration, {"imagined": [1]}, shared=True)
    titles = re.findall(r"Iteration (\d+) lift", _written(tmp_path, run))
    assert titles == ["0", "4"]


def test_seeds_are_told_as_mean_and_range_beside_another_setting(tmp_path):
    runs = []
    for seed, rates in enumerate([(0.2, 0.6), (0.4, 0.8)]):
        run = make_run(tmp_path / f"a{seed}", iterations=2, seed=seed)
        lines = [
            {"iteration": i, "eval/ground_truth/success_rate": rate}
            for i, rate in zip((0, 2), rates, strict=True)
        ]
        write_lines(run / "metrics.jsonl", lines)
        runs.append(run)
    runs.append(make_run(tmp_path / "b", optim__lr=1e-3))
    said = run_report.write(runs, tmp_path / "report.html")
    assert said[0] == (
        "optim.lr=2e-05: 2 of 2 iterations, success: ground truth 30.0 % (mean of 2 runs, 20.0 to "
        "40.0) to 70.0 % (mean of 2 runs, 60.0 to 80.0)"
    )
    assert said[1].startswith("optim.lr=0.001: 4 of 4 iterations, success: imagined 10.0 %")
    page = (tmp_path / "report.html").read_text()
    assert "optim.lr=2e-05, iteration 2: 70.0 % (mean of 2 runs, 60.0 to 80.0)" in page
    assert "A curve of several runs is their mean" in page


def test_report_that_was_there_stays_when_a_folder_is_no_run(tmp_path):
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(DataError, match="expected the folder of a run"):
        run_report.write([make_run(tmp_path / "one"), tmp_path], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "before"
