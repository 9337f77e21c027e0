import io

from rich.console import Console

from evac_jax.telemetry.reading import LOG_EVERY_S, ReadProgress


def _read(console, steps, caplog):
    now = [0.0]
    caplog.set_level("INFO", logger="absl")
    with ReadProgress("weights", console, clock=lambda: now[0]) as progress:
        for done, now[0] in steps:
            progress(int(done * 1e9), 4 * 10**9)
    return [record.getMessage() for record in caplog.records]


def test_log_lines_come_now_and_then_where_there_is_no_terminal(caplog):
    console = Console(file=io.StringIO(), force_terminal=False)
    steps = [(1, 1.0), (2, LOG_EVERY_S + 1), (3, LOG_EVERY_S + 2), (4, 15.0)]
    lines = _read(console, steps, caplog)
    assert lines == [
        "weights: 2.00 of 4.00 GB in 11 s",
        "weights: 4.00 of 4.00 GB in 15 s",
    ]
    assert console.file.getvalue() == ""


def test_bar_is_drawn_on_a_terminal(caplog):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    lines = _read(console, [(1, 1.0), (2, 30.0), (4, 40.0)], caplog)
    assert lines == ["weights: 4.00 of 4.00 GB in 40 s"]
    assert "weights" in console.file.getvalue()
    assert "4.0/4.0 GB" in console.file.getvalue()
