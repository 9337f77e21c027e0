"""Times the parts of an iteration (imagining, deciding, learning) on the shipped miniature.

    python -m benchmarks.iteration [--config configs/grpo.py] [--iterations 5] [--out FILE] [FLAGS]

Runs `launch.py` without evaluations and videos and takes the medians of its `time/...` metrics
(docs/metrics.md) over the iterations after the second, when everything is compiled. Other flags,
such as --config.rollout.pipeline_stages=2, are passed to the run. The last line is for programs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from evac_jax.tools.command_line import KINDS

ROOT = Path(__file__).parents[1]
WARM_UP = 2
QUIET = {
    "eval.episodes": 0,
    "eval.ground_truth": "none",
    "eval.twin_fraction": 0.0,
    "video.save": False,
    "checkpoint.interval": 1000,
}
# The phases of an iteration, in order; parts of a phase are indented.
PHASES = {
    "step": "whole iteration",
    "env": "waiting for the simulators",
    "env/poses": "  actions to poses",
    "env/imagine": "  world model",
    "env/classify": "  success classifier",
    "env/frames": "  frames to the slots",
    "rollout": "decisions, frames in, actions out",
    "actor": "advantages and update",
}


def run(config: str, iterations: int, flags: list[str]) -> list[dict[str, Any]]:
    """Return the metrics of a run's iterations after the warm-up.

    Raises:
        SystemExit: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = QUIET | {"log.dir": folder, "log.run": "run", "train.iterations": iterations}
        command = [sys.executable, "launch.py", f"--config={config}", *flags]
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return [told for told in map(json.loads, lines) if told["iteration"] > WARM_UP]


def main() -> None:
    """Print a line per phase; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/grpo.py")
    parser.add_argument("--iterations", type=KINDS["count"], default=5)
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, JSON")
    args, flags = parser.parse_known_args()
    if args.iterations <= WARM_UP:
        parser.error(f"--iterations: expected more than the {WARM_UP} of the warm-up")
    facts = machine.describe()
    machine.show(facts)
    told = run(args.config, args.iterations, flags)
    seconds = {name: statistics.median(line[f"time/{name}"] for line in told) for name in PHASES}
    print(f"\n{args.config} {' '.join(flags)}; medians of {len(told)} iterations, seconds")
    for name, what in PHASES.items():
        share = seconds[name] / seconds["step"]
        print(f"{what:36}{seconds[name]:9.2f}{share:7.0%}")
    if args.out:
        args.out.write_text(json.dumps({"machine": facts, "seconds": seconds}, indent=2) + "\n")
    print(" ".join(f"{name.replace('/', '_')}_s={value:.2f}" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
