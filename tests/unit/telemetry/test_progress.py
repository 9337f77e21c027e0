import contextlib
import io
import time

from rich.console import Console

from evac_jax.telemetry import progress


def test_estimate_is_the_mean_of_this_process_when_the_run_was_resumed():
    now = [100.0]
    estimate = progress.Estimate(total=10, finished=4, clock=lambda: now[0])
    assert estimate.remaining_s() is None
    now[0] = 140.0
    estimate.update(6)  # two iterations in 40 s; four are left
    assert estimate.remaining_s() == 80.0
    now[0] = 150.0
    assert estimate.remaining_s() == 70.0
    now[0] = 400.0
    assert estimate.remaining_s() == 0.0


def test_one_line_per_iteration_is_logged_when_there_is_no_terminal(caplog):
    console = Console(file=io.StringIO())
    with caplog.at_level("INFO", logger="absl"), progress.Progress(3, 0, console) as bar:
        bar.update(0, episodes=None, success={"imagined": 0.25, "ground_truth": 0.125}, evaluated=0)
        bar.update(1, episodes=(0.375, 128.0), success={}, evaluated=0)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == (
        "iteration 0/3  ETA -  |  last evaluation (iteration 0): imagined 25.0%  ground truth 12.5%"
    )
    assert lines[1].startswith("iteration 1/3  ETA 0:0")
    assert lines[1].endswith("|  its episodes: 37.5% of 128 succeeded  |  not evaluated")
    assert len(lines) == 2
    assert console.file.getvalue() == ""


def test_line_separates_its_own_episodes_from_the_last_evaluation(caplog):
    with (
        caplog.at_level("INFO", logger="absl"),
        progress.Progress(9, 0, Console(file=io.StringIO())) as bar,
    ):
        bar.update(7, episodes=(0.25, 16.0), success={"imagined": 0.5}, evaluated=4)
    (line,) = [record.getMessage() for record in caplog.records]
    own, evaluation = line.split("  |  ")[1:]
    assert own == "its episodes: 25.0% of 16 succeeded"
    assert evaluation == "last evaluation (iteration 4): imagined 50.0%"


def test_long_work_is_told_as_it_begins_goes_on_and_ends(caplog):
    with caplog.at_level("INFO", logger="absl"), progress.told("loading", every_s=0.05):
        deadline = time.monotonic() + 10
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "loading"
    assert lines[1] == "loading: going on for 0 s"
    assert lines[-1].startswith("loading: done in ")


def test_work_is_told_only_if_it_takes_long(caplog):
    with caplog.at_level("INFO", logger="absl"):
        with progress.told_if_long("updating"):
            pass
        assert not caplog.records
        with progress.told_if_long("updating", every_s=0.05):
            deadline = time.monotonic() + 10
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.01)
    assert caplog.records[0].getMessage() == "updating: going on for 0 s"


def test_nothing_is_told_as_done_when_it_failed(caplog):
    with (
        caplog.at_level("INFO", logger="absl"),
        contextlib.suppress(OSError),
        progress.told("loading"),
    ):
        raise OSError
    assert [record.getMessage() for record in caplog.records] == ["loading"]


def test_bar_shows_iteration_eta_and_success_when_in_a_terminal():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200)
    with progress.Progress(8, 2, console) as bar:
        bar.update(
            3,
            episodes=(0.25, 16.0),
            success={"imagined": 0.5, "ground_truth": 0.4},
            evaluated=3,
        )
    text = file.getvalue()
    assert "iteration 3/8" in text
    assert "ETA" in text
    assert "25.0% of 16 succeeded" in text
    assert "imagined 50.0%" in text
    assert "ground truth 40.0%" in text


def test_log_lines_pass_through_the_bar_when_it_is_live():
    from absl import logging

    handler = logging.get_absl_handler().python_handler
    before = handler.stream
    with progress.Progress(2, 0, Console(file=io.StringIO(), force_terminal=True)):
        assert handler.stream is not before
    assert handler.stream is before


def test_durations_are_readable_when_long_or_unknown():
    assert progress.format_duration(None) == "-"
    assert progress.format_duration(59.6) == "1:00"
    assert progress.format_duration(3723) == "1:02:03"
