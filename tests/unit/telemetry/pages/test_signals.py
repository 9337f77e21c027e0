import re

import pytest

from evac_jax.telemetry.pages import record, signals
from tests.unit.telemetry.pages.run_folders import make_run, write_lines


def test_page_of_metrics_says_what_to_look_for_in_the_same_words(repository):
    page = " ".join((repository / "docs" / "metrics.md").read_text().replace("\\|", "|").split())
    for signal in signals.SIGNALS:
        assert f"| {signal.title} | `{signal.metric}` | {signal.look} |" in page
        for field in re.findall(r"\b(?:optim|algo|rollout)\.\w+", signal.look):
            assert f"`{field}`" in (repository / "docs" / "config.md").read_text()


def test_iterations_in_a_row_are_told_as_a_range():
    assert signals.ranges([7, 1, 3, 2, 9, 10]) == "1 to 3, 7, 9 to 10"
    assert signals.ranges([]) == ""


def test_alarms_name_the_iterations_in_which_something_was_wrong(tmp_path):
    folder = make_run(tmp_path / "one")
    assert signals.alarms(record.read(folder)) == []
    lines = [
        {"iteration": i, "eval/twin_alarm": float(i > 1), "actor/skipped_updates": 2.0 * (i == 3)}
        for i in (1, 2, 3)
    ]
    lines[0]["rollout/group_std_zero_fraction"] = 0.99
    lines[1]["rollout/group_std_zero_fraction"] = None
    write_lines(folder / "metrics.jsonl", lines)
    twin, skipped = signals.alarms(record.read(folder))
    assert twin.startswith("Iteration 2 to 3: the twin's alarm")
    assert skipped.startswith("Iteration 3: updates were skipped")


A, B = {"eval.starts": [0, 8], "reward.threshold": 0.5}, {"eval.starts": [8, 16], "new": 1}
OTHERWISE = (
    "From iteration {} on evaluations go by other settings, so their success may not compare with "
    "that before: config.eval.starts was {}, now {}."
)


@pytest.mark.parametrize(
    ("launches", "expected"),
    [
        ([(0, A), (4, A)], []),
        ([(0, A), (2, B), (4, B)], [(2, "[0, 8]", "[8, 16]")]),
        ([(0, A), (2, B), (4, A)], [(2, "[0, 8]", "[8, 16]"), (4, "[8, 16]", "[0, 8]")]),
        ([(0, A), (4, B), (2, A)], []),  # it went back behind the change
        ([(0, None), (4, B)], []),  # an older version did not tell
    ],
)
def test_alarm_tells_that_evaluations_go_by_other_settings(tmp_path, launches, expected):
    folder = make_run(tmp_path / "one")
    lines = [{"iteration": i, **({"judged_by": told} if told else {})} for i, told in launches]
    write_lines(folder / "launches.jsonl", lines)
    found = signals.alarms(record.read(folder))
    assert found == [OTHERWISE.format(*values) for values in expected]
