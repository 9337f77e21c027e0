import subprocess
import sys

import pytest

from evac_jax.errors import ConfigError
from evac_jax.tools.runs import report
from tests.unit.telemetry.pages.run_folders import make_run


def test_report_lies_in_the_run_or_above_all_of_them(tmp_path, capsys):
    one, two = make_run(tmp_path / "a" / "one"), make_run(tmp_path / "b" / "two", seed=1)
    report.main([str(one)])
    assert (one / "report.html").is_file()
    report.main([str(one), str(two), str(one)])
    assert "2 runs" in (tmp_path / "report.html").read_text()
    report.main([str(one), "--out", str(tmp_path / "own" / "page.html")])
    assert (tmp_path / "own" / "page.html").is_file()
    assert "one: 4 of 4 iterations, success: imagined 10.0 %" in capsys.readouterr().out


def test_mistake_ends_with_one_message_and_status_2(tmp_path):
    command = [sys.executable, "-m", "evac_jax.tools.runs.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "DataError" in done.stderr
    assert "expected the folder of a run" in done.stderr
    assert "Traceback" not in done.stderr


def test_folder_is_refused_as_the_file_to_write(tmp_path):
    run = make_run(tmp_path / "one")
    with pytest.raises(ConfigError, match="--out: expected a file such as report.html"):
        report.main([str(run), "--out", str(tmp_path)])


@pytest.mark.parametrize("name", ["README.md", "one/config.json", "one/metrics.jsonl"])
def test_file_that_is_no_report_is_not_written_over(tmp_path, name):
    run = make_run(tmp_path / "one")
    (tmp_path / "README.md").write_text("<title>mine</title>")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ConfigError, match=r"--out: expected a new file or an earlier report"):
        report.main([str(run), "--out", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes() == before


def test_file_that_is_no_report_is_kept_when_no_place_is_named(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match="name another file, or remove it"):
        report.main([str(run) for run in runs])


def test_earlier_report_is_written_anew(tmp_path):
    run, page = make_run(tmp_path / "one"), tmp_path / "page.html"
    report.main([str(run), "--out", str(page)])
    run.rename(tmp_path / "two")
    report.main([str(tmp_path / "two"), "--out", str(page)])
    assert "<title>two</title>" in page.read_text()


def test_runs_own_report_is_written_anew_when_it_is_of_an_older_version(tmp_path):
    run = make_run(tmp_path / "one")
    (run / "report.html").write_text("<!doctype html>")
    report.main([str(run)])
    assert "<title>one</title>" in (run / "report.html").read_text()
