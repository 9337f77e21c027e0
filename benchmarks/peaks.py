"""Runs a command of this Python and writes down the peak memory of it and of its simulators.

    python -m benchmarks.peaks --out FILE -- launch.py --config=configs/grpo.py

FILE gets {"seconds": .., "peak_bytes": {"command": .., "simulator": ..}} if the command ends well.
A peak is the largest resident size (`VmHWM`), weights that are mapped from a file included; those
of several simulators are added. They are looked at four times a second, so what a process needs
in its last quarter of a second alone is missed. The status is the command's.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evac_jax.files import cards

POLL_S = 0.25
COMMAND, SIMULATOR = "command", "simulator"


def peak_bytes(pid: int) -> int:
    """Return a process's largest resident size so far; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    _, found, rest = status.partition("VmHWM:")
    return 1024 * int(rest.split()[0]) if found else 0


def simulators(trainer: int) -> set[int]:
    """Return the process ids of a trainer's simulators."""
    found = set()
    for path in Path(f"/proc/{trainer}/task").glob("*/children"):
        try:
            for pid in path.read_text().split():
                if b"evac_jax.sim.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(int(pid))
        except OSError:  # it ended meanwhile
            continue
    return found


def run(command: Sequence[str]) -> tuple[int, dict[str, int]]:
    """Run a command to its end; return its status and the peaks."""
    process = subprocess.Popen([sys.executable, *command])
    peaks: dict[int, int] = {}
    try:
        while process.poll() is None:
            for pid in {process.pid, *simulators(process.pid)}:
                peaks[pid] = max(peaks.get(pid, 0), peak_bytes(pid))
            time.sleep(POLL_S)
    finally:
        process.terminate()
        process.wait()
    own = peaks.pop(process.pid, 0)
    return process.returncode, {COMMAND: own, SIMULATOR: sum(peaks.values())}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("command", nargs="+", help="arguments of Python, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the command as well
    began = time.perf_counter()
    status, peaks = run(args.command)
    if status:
        sys.exit(status if status > 0 else 128 - status)
    seconds = time.perf_counter() - began
    cards.write_json(args.out, {"seconds": seconds, "peak_bytes": peaks})


if __name__ == "__main__":
    main()
