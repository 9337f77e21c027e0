"""Do memory, open files and shared memory stay flat in a long run?

    python -m benchmarks.soak [--iterations 60] [--chunks 5] [--envs 8] [--out FILE]

Trains the miniature by `launch.py` in a folder of its own and looks at the trainer and at every
simulator process after each iteration: resident memory that is the process's own (`RssAnon`), its
shared memory (`RssShmem`, the slots), and open file handles. The miniature's evaluation in the
ground truth runs every tenth iteration; checkpoints and videos are as in its preset.

The first tenth of the iterations, in which programs are compiled and heaps fill, is left out.
Growth is the mean of the last quarter of the rest over that of its first quarter, minus one. The
last line is

    growth_trainer= growth_simulator= handles=

growth of the trainer's and of the worst simulator's memory (shares; goal below 0.02), and how
many more handles the worst process holds at the end than after the first tenth (0).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine
from evac_jax.tools.command_line import KINDS

ROOT = Path(__file__).parents[1]
Sample = dict[str, int]  # of one process at the end of one iteration


def sample(pid: int) -> Sample:
    """Return a process's own and shared resident memory (bytes) and its open handles."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in status if line.startswith("Rss")}
    return {
        "own": 1024 * sizes["RssAnon"],
        "shared": 1024 * sizes["RssShmem"],
        "handles": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def simulators(trainer: int) -> dict[str, int]:
    """Return the process ids of the trainer's simulators by the name in their command."""
    found = {}
    for path in Path(f"/proc/{trainer}/task").glob("*/children"):
        for pid in path.read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "evac_jax.sim.worker" in words:
                name = next(w for w in words if w.startswith("--name="))
                found[f"{name.removeprefix('--name=')} {len(found)}"] = int(pid)
    return dict(sorted(found.items()))


def watch(folder: Path, flags: list[str], iterations: int) -> dict[str, list[Sample]]:
    """Run `launch.py`; return the samples of every process, one per iteration.

    Raises:
        SystemExit: the run failed.
    """
    metrics, log = folder / "run" / "metrics.jsonl", folder / "run.log"
    command = [sys.executable, "launch.py", "--config=configs/grpo.py", *flags]
    found: dict[str, list[Sample]] = {}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        done = 0
        while process.poll() is None and done < iterations:
            time.sleep(0.05)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if len(lines) <= done:
                continue
            done = len(lines)
            for name, pid in {"trainer": process.pid, **simulators(process.pid)}.items():
                found.setdefault(name, []).append(sample(pid))
            if done % 10 == 0:
                print(f"iteration {done}: {found['trainer'][-1]['own'] / 1e6:.0f} MB", flush=True)
        if process.wait():
            raise SystemExit(log.read_text())
    return found


def growth(samples: list[Sample], field: str) -> float:
    """Return the mean of the last quarter behind the first tenth over the first quarter's, - 1."""
    values = [sample[field] for sample in samples[len(samples) // 10 :]]
    part = max(1, len(values) // 4)
    first, last = statistics.fmean(values[:part]), statistics.fmean(values[-part:])
    return last / first - 1 if first else float(last > 0)


def main() -> None:
    """Print every process's growth; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=KINDS["count"], default=60)
    parser.add_argument(
        "--chunks", type=KINDS["count"], default=5, help="per episode and iteration"
    )
    parser.add_argument("--envs", type=KINDS["count"], default=8)
    parser.add_argument("--out", type=Path, help="also write the samples to this file, JSON")
    args = parser.parse_args()
    facts = machine.describe()
    machine.show(facts)
    batch = args.envs * args.chunks
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "log.dir": folder,
            "log.run": "run",
            "train.iterations": args.iterations,
            "env.num_envs": args.envs,
            "env.max_episode_steps": 8 * args.chunks,
            "algo.group_size": args.envs // 2,  # a whole group in each of two simulators
            "algo.global_batch": batch,
            "algo.micro_batch": batch,
            "eval.interval": 10,
        }
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        found = watch(Path(folder), flags, args.iterations)
    if args.out:
        args.out.write_text(json.dumps({"machine": facts, "samples": found}, indent=2) + "\n")
    print(f"{'process':44} {'own MB':>7} {'growth':>8} {'shared':>8} {'handles':>8}")
    for name, samples in found.items():
        behind = samples[len(samples) // 10]
        print(
            f"{name:44} {samples[-1]['own'] / 1e6:7.0f} {growth(samples, 'own'):8.4f} "
            f"{growth(samples, 'shared'):8.4f} {samples[-1]['handles'] - behind['handles']:8}"
        )
    others = [growth(samples, "own") for name, samples in found.items() if name != "trainer"]
    shared = [growth(samples, "shared") for samples in found.values()]
    more = max(s[-1]["handles"] - s[len(s) // 10]["handles"] for s in found.values())
    print(
        f"growth_trainer={max(growth(found['trainer'], 'own'), *shared):.4f} "
        f"growth_simulator={max(*others, *shared):.4f} handles={more}"
    )


if __name__ == "__main__":
    main()
