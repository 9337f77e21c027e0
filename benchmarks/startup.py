"""Times a second start of the same run, which loads its compiled programs from disk.

    python -m benchmarks.startup [--envs 8] [--chunks 1] [--imports 0] [--out FILE]

It starts `launch.py` on the miniature twice in a new folder, for three short iterations without
evaluations. At the first start nothing is compiled yet. `first` and `second` are the seconds from
the start of the command to the end of its first iteration, including the start of processes,
imports and weights. The output also shows how many programs each iteration compiled or loaded; from
the third iteration on there are none.

With `--imports N` it times instead, in N turns, what a simulator imports for the world model: as it
is, and without the trick of `evac_jax/evac/lean_imports.py`. The last line is `lean_s= whole_s=`,
medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from evac_jax.tools.command_line import KINDS

ROOT = Path(__file__).parents[1]
ITERATIONS = 3


def start(folder: Path, run: str, envs: int, chunks: int) -> dict[str, Any]:
    """Run the command; return the seconds to its first iteration and its compilations.

    Raises:
        SystemExit: the command failed.
    """
    settings = {
        "log.dir": folder,
        "log.run": run,
        "train.iterations": ITERATIONS,
        "env.num_envs": envs,
        "env.max_episode_steps": 8 * chunks,
        "algo.group_size": min(envs, 8),
        "algo.global_batch": envs * chunks,
        "algo.micro_batch": envs * chunks,
        "simulator.processes": 1,
        "eval.episodes": 0,
        "eval.ground_truth": "none",
        "eval.twin_fraction": 0.0,
        "video.save": False,
        "checkpoint.interval": 1000,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]

    def iterations() -> list[dict[str, float]]:
        metrics = folder / run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [told for told in map(json.loads, lines) if told["iteration"]]

    began = time.perf_counter()
    with (folder / f"{run}.log").open("w") as log:
        command = [sys.executable, "launch.py", "--config=configs/grpo.py", *flags]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and not iterations():
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.wait():
            raise SystemExit((folder / f"{run}.log").read_text())
    return {"seconds": seconds, "compilations": [i["log/compilations"] for i in iterations()]}


def import_seconds(companions: str) -> float:
    """Return the seconds that a new process needs to import the world model.

    Args:
        companions: expression for the packages that are hidden meanwhile.
    """
    code = (
        "import time; from evac_jax.evac import lean_imports as lean; began = time.perf_counter();"
        f"lean.COMPANIONS = {companions}; import evac_jax.evac.model;"
        "print(time.perf_counter() - began)"
    )
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


def main() -> None:
    """Print both starts; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--envs", type=KINDS["count"], default=8)
    parser.add_argument("--chunks", type=KINDS["count"], default=1)
    parser.add_argument(
        "--imports", type=KINDS["natural"], default=0, help="turns; time imports instead"
    )
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, JSON")
    args = parser.parse_args()
    facts = machine.describe()
    machine.show(facts)
    if args.imports:
        turns = [
            [import_seconds(c) for c in ("lean.COMPANIONS", "()")] for _ in range(args.imports)
        ]
        lean, whole = map(statistics.median, zip(*turns, strict=True))
        print(f"lean_s={lean:.2f} whole_s={whole:.2f}")
        return
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # it takes precedence over the run's folder
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        for run in ("first", "second"):
            told[run] = start(Path(folder), run, args.envs, args.chunks)
            counts = ", ".join(f"{n:.0f}" for n in told[run]["compilations"])
            print(
                f"{run}: {told[run]['seconds']:.1f} s to the end of the first iteration; programs "
                f"compiled or loaded in iterations 1 to {ITERATIONS}: {counts}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps({"machine": facts} | told, indent=2) + "\n")
    ratio = told["second"]["seconds"] / told["first"]["seconds"]
    late = max(told[run]["compilations"][-1] for run in told)
    print(
        f"first_s={told['first']['seconds']:.1f} second_s={told['second']['seconds']:.1f} "
        f"ratio={ratio:.2f} late_compilations={late:.0f}"
    )


if __name__ == "__main__":
    main()
