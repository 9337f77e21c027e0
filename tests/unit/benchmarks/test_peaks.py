"""Peaks of a command and of the simulators that it starts."""

import json
import subprocess
import sys

import pytest

from benchmarks import peaks

BLOCK = "import time; block = bytearray({size}); time.sleep({seconds})"
# Its child carries the name that marks a simulator.
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", {child!r}, "evac_jax.sim.worker"], check=True)
"""


def test_peaks_are_those_of_the_command_and_of_its_simulator():
    child = BLOCK.format(size=200_000_000, seconds=1.5)
    status, found = peaks.run(["-c", PARENT.format(child=child)])
    assert status == 0
    assert 200e6 < found[peaks.SIMULATOR] < 300e6
    assert 0 < found[peaks.COMMAND] < 100e6


@pytest.mark.parametrize("status", [0, 3])
def test_file_is_written_only_when_the_command_ends_well(status, tmp_path, repository):
    out = tmp_path / "told.json"
    command = ["-m", "benchmarks.peaks", "--out", str(out), "--"]
    command += ["-c", f"raise SystemExit({status})"]
    done = subprocess.run([sys.executable, *command], cwd=repository, check=False)
    assert done.returncode == status
    assert out.exists() is (status == 0)
    if not status:
        assert set(json.loads(out.read_text())) == {"seconds", "peak_bytes"}
