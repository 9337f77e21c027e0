"""The rehearsal at full size, at the smallest sizes that work: every stage as it is."""

import subprocess
import sys

import pytest

from tests import xla_flags


@pytest.mark.slow
def test_both_iterations_run_and_a_second_call_finds_all_done(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags(devices=1))
    command = [sys.executable, "-m", "benchmarks.full_size", "--sizes", "tiny", "--work", tmp_path]

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *more], cwd=repository, capture_output=True, text=True, check=False
        )

    first = run()
    assert first.returncode == 0, first.stderr
    told = dict(word.split("=") for word in first.stdout.splitlines()[-1].split())
    assert list(told) == [
        *("policy_iteration", "world_model_iteration", "policy_peak_gb", "world_model_peak_gb"),
        *("grad_norm", "memory_ratio", "minutes"),
    ]
    assert told["policy_iteration"] == told["world_model_iteration"] == "ok"
    assert all(float(told[name]) > 0 for name in list(told)[2:])

    again = run()
    assert again.returncode == 0, again.stderr
    assert "10 of 10 stages are done already" in again.stderr
    assert again.stdout == first.stdout

    alone = run("--parts", "world_model").stdout.splitlines()[-1]
    assert alone.startswith("policy_iteration=skipped world_model_iteration=ok")
