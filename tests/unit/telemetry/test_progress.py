import io

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
        bar.update(0, success={"imagined": 0.25, "ground_truth": 0.125}, evaluated=0)
        bar.update(1, success={}, evaluated=0)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "iteration 0/3  ETA -  success: imagined 25.0%  ground truth 12.5%"
    assert lines[1].startswith("iteration 1/3  ETA 0:0")
    assert lines[1].endswith("success: not evaluated")
    assert len(lines) == 2
    assert console.file.getvalue() == ""


def test_line_says_whose_success_it_is_when_the_iteration_was_not_evaluated(caplog):
    with (
        caplog.at_level("INFO", logger="absl"),
        progress.Progress(9, 0, Console(file=io.StringIO())) as bar,
    ):
        bar.update(7, success={"imagined": 0.5}, evaluated=4)
        bar.update(8, success={"imagined": 0.6}, evaluated=8)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].endswith("success: imagined 50.0% (at iteration 4)")
    assert lines[1].endswith("success: imagined 60.0%")


def test_bar_shows_iteration_eta_and_success_when_in_a_terminal():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with progress.Progress(8, 2, console) as bar:
        bar.update(3, success={"imagined": 0.5, "ground_truth": 0.4}, evaluated=3)
    text = file.getvalue()
    assert "iteration 3/8" in text
    assert "ETA" in text
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
