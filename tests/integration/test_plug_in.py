"""A user's algorithm, judge and ground truth, from a folder of the user's own."""

import json
import shutil

import pytest


@pytest.mark.slow  # tests/unit/examples covers each part
def test_run_with_own_algorithm_judge_and_ground_truth(launcher, repository, tmp_path):
    """The folder `mine` is only in the working directory, where the simulators must find it too."""
    shutil.copytree(repository / "examples", tmp_path / "mine")
    file = tmp_path / "mine" / "gym_ground_truth.py"
    file.write_text(file.read_text().replace("from examples.", "from mine."))
    own = {
        "algorithm": "mine.rloo:RLOO",
        "reward.judge": "mine.colour_judge:make",
        "eval.ground_truth": "mine.gym_ground_truth:GymGroundTruth",
    }
    launcher.run(
        *(f"--config.{name}={text}" for name, text in own.items()),
        "--config.reward.checkpoint=",
        "--config.eval.twin_fraction=0",
        "--config.train.iterations=1",
        f"--config.log.dir={tmp_path}/runs",
        cwd=tmp_path,
    )
    (run,) = (tmp_path / "runs").glob("RLOO-*")
    saved = json.loads((run / "config.json").read_text())
    assert saved["algorithm"] == own["algorithm"]
    assert saved["reward"]["judge"] == own["reward.judge"]
    assert saved["eval"]["ground_truth"] == own["eval.ground_truth"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1]
    assert "eval/ground_truth/success_rate" in lines[1]
    assert lines[1]["env/success_rate"] == 0  # random weights imagine no plate


def test_own_code_that_cannot_be_imported_ends_with_one_message(launcher, tmp_path):
    output = launcher.run("--config.eval.ground_truth=nowhere:make", status=2, cwd=tmp_path)
    assert "config.eval.ground_truth: cannot import 'nowhere:make'" in output
    assert "Traceback" not in output
