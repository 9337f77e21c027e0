import json

import numpy as np
import pytest

from evac_jax.errors import DataError
from evac_jax.telemetry import report


def test_wilson_interval_reaches_the_end_when_all_or_none_succeed():
    # By hand: the other limit is z² / (n + z²) = 3.84146 / 13.84146 away.
    assert report.wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert report.wilson_interval(10, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-6)


def test_wilson_limits_solve_their_equation_when_substituted():
    for successes, n in [(1, 64), (20, 64), (63, 64), (100, 256)]:
        p = successes / n
        for limit in report.wilson_interval(successes, n):
            assert abs(p - limit) == pytest.approx(
                report.Z_95 * (limit * (1 - limit) / n) ** 0.5, rel=1e-9
            )


def test_success_is_told_by_text_in_the_order_of_the_tasks():
    task, success = np.array([1, 0, 1, 1]), np.array([True, False, False, True])
    assert report.by_task(("open", "close", "push"), task, success) == {
        "open": [0, 1],
        "close": [2, 3],
    }


def test_tasks_of_the_same_text_are_counted_together():
    task, success = np.array([0, 2, 2, 1]), np.array([True, False, True, False])
    assert report.by_task(("open", "close", "open"), task, success) == {
        "open": [2, 3],
        "close": [0, 1],
    }


@pytest.mark.parametrize(
    ("after", "before", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_interval_of_a_difference_is_the_published_one(after, before, low, high):
    """Newcombe 1998, Statistics in Medicine 17(8), table II, method 10."""
    assert report.newcombe_interval(after, before) == pytest.approx((low, high), abs=6e-5)
    assert report.newcombe_interval(before, after) == pytest.approx((-high, -low), abs=6e-5)


def test_difference_needs_trials_on_both_sides():
    with pytest.raises(ValueError, match="trials on both sides"):
        report.newcombe_interval((3, 4), (0, 0))


def test_wilson_interval_says_nothing_when_nothing_was_tried():
    assert report.wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 of 2"):
        report.wilson_interval(3, 2)


def test_summary_is_printed_and_saved_when_a_run_ends(tmp_path, capsys):
    report.finish(
        tmp_path,
        iteration=8,
        before={"imagined": [16, 64], "ground_truth": [60, 256]},
        after={"imagined": [40, 64], "ground_truth": [128, 256]},
        seconds={"step": 100.0, "env": 60.0, "env/denoise": 45.0, "rollout": 10.0, "actor": 25.0},
        wall_seconds=130.0,
        places={"logs": tmp_path, "videos": None, "checkpoints": tmp_path / "checkpoints"},
        notes=["not the official protocol"],
        alarms=["Iteration 7: updates were skipped."],
        commands={"evaluate": "python launch.py --mode=eval"},
    )
    out = capsys.readouterr().out
    assert out.endswith("\n\nevaluate:\n  python launch.py --mode=eval\n")
    for text in ("imagined", "ground truth", "25.0% [16.0%,  36.8%] n=64", "50.0%", "n=256"):
        assert text in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert lines["env"] == ["60.0", "60.0%"]
    assert lines["denoise"] == ["45.0", "45.0%"]
    assert lines["rest"] == ["5.0", "5.0%"]
    assert lines["checkpoints:"] == [str(tmp_path / "checkpoints")]
    assert "videos" not in out
    order = ("n=256", "not the official protocol", "Iteration 7: updates were skipped.", "Time")
    assert sorted(order, key=out.index) == list(order)
    saved = json.loads((tmp_path / report.SUMMARY_FILE).read_text())
    assert saved["success"]["after"]["imagined"]["rate"] == 0.625
    assert saved["success"]["before"]["ground_truth"]["episodes"] == 256
    assert saved["seconds"]["env/denoise"] == 45.0
    assert saved["notes"] == ["not the official protocol"]
    assert saved["alarms"] == ["Iteration 7: updates were skipped."]


def test_success_is_told_by_task_when_an_evaluation_ends(tmp_path, capsys):
    report.finish_evaluation(
        tmp_path,
        whose={"policy": "weights/start", "lora_adapter": "", "run": "runs/x", "iteration": 40},
        outcome={"ground_truth": [1, 10]},
        by_task={"ground_truth": {"push it": [0, 5], "lift it": [1, 5]}, "imagined": {}},
        settings={"seed": 3},
    )
    told = capsys.readouterr().out
    assert "iteration 40 of runs/x\nseed: 3\n" in told
    lines = [line.split() for line in told.splitlines() if line][3:]
    assert [line[:2] for line in lines[:3]] == [
        ["ground", "truth,"],
        ["push", "it"],
        ["lift", "it"],
    ]
    # By hand: with none of 5 the upper limit is 3.84146 / 8.84146.
    assert lines[1][2:] == ["0.0%", "[", "0.0%,", "43.4%]", "n=5"]
    saved = json.loads((tmp_path / report.EVALUATION_FILE).read_text())
    assert saved["by_task"]["ground_truth"]["lift it"]["rate"] == 0.2
    assert saved["seed"] == 3
    assert (saved["policy"], saved["run"], saved["iteration"]) == ("weights/start", "runs/x", 40)


def test_instruction_cannot_write_to_the_terminal_or_break_the_table():
    (table,) = report.task_tables({"ground_truth": {"lift\x1b[2J it\nall ü": [1, 5]}})
    assert [line.split("  ")[0] for line in table.splitlines()][1:] == [r"lift\x1b[2J it\nall ü"]


def test_imported_policy_is_named_when_no_run_was_restored(tmp_path, capsys):
    whose = {"policy": "weights/start", "lora_adapter": "mine", "run": "", "iteration": 0}
    report.finish_evaluation(tmp_path, whose=whose, outcome={}, by_task={}, settings={})
    assert "start policy weights/start with mine\n" in capsys.readouterr().out


def test_earlier_summary_is_kept_when_a_run_was_made_longer(tmp_path):
    for iteration in (3, 5, 9):
        report.finish(
            tmp_path,
            iteration=iteration,
            before={},
            after={},
            seconds={},
            wall_seconds=1.0,
            places={},
        )
    names = (report.SUMMARY_FILE, "summary_1.json", "summary_2.json")
    kept = [json.loads((tmp_path / name).read_text())["iteration"] for name in names]
    assert kept == [9, 3, 5]


def test_summary_is_complete_when_nothing_was_evaluated_or_trained(tmp_path):
    text = report.summary(before={}, after={}, seconds={}, wall_seconds=1.0, places={})
    assert "not evaluated" in text
    assert "Look at" not in text
    assert report.rates({"imagined": (0, 0)}) == {}
    assert report.rates({"imagined": (1, 4)}) == {"imagined": 0.25}


def test_best_iteration_is_the_earliest_among_equals(tmp_path):
    name = "eval/ground_truth/success_rate"
    lines = [{"iteration": 1, "env/return": 1.0}]
    (tmp_path / report.METRICS_FILE).write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="ground_truth"):
        report.best_iteration(tmp_path)
    lines += [{"iteration": i, name: rate} for i, rate in ((0, 0.4), (4, 0.6), (8, 0.6))]
    (tmp_path / report.METRICS_FILE).write_text("\n".join(map(json.dumps, lines)))
    assert report.best_iteration(tmp_path) == 4
