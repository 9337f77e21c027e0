"""Measures what learning in imagination gains: success in the ground truth before and after.

There are three arms, each with every seed: GRPO in imagination; the same number of GRPO iterations
in the ground truth itself, which is what a perfect world model would reach; PPO in imagination.

    python -m benchmarks.learning --seeds 0 1 2

The stopping point is chosen on some scenes: it is the best evaluation during training, including
the start. The reported figures are measured on other scenes. Finished runs are kept under --work
and found again by their settings and the hashes of their weights, so an interrupted benchmark
continues.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.runs import GROUND_TRUTH, Runs
from evac_jax.files.atomic import replacing
from evac_jax.telemetry import report
from evac_jax.tools.command_line import KINDS
from evac_jax.tools.recipes.commands import REPORT, SELECTION

# Arm -> preset and changed settings.
ARMS = {
    "grpo": ("configs/grpo.py", {}),
    "ceiling": ("configs/grpo.py", GROUND_TRUTH),
    "ppo": ("configs/ppo.py", {}),
}
MODES = ("greedy", "sampled")
LABELS = {
    "grpo": "GRPO in imagination",
    "ceiling": "GRPO in the ground truth (ceiling)",
    "ppo": "PPO in imagination",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One run: success rates in the ground truth, 0..1, by mode of acting.

    Attributes:
        start, after: {"greedy": rate, "sampled": rate} of the start policy and of the chosen one.
        iteration: the chosen one; 0 = no evaluation was better than the start policy.
        training_minutes: minutes of all iterations, without start-up and evaluations.
        minutes: minutes of the whole command.
    """

    start: Mapping[str, float]
    after: Mapping[str, float]
    iteration: int
    training_minutes: float
    minutes: float

    def gain(self, mode: str) -> float:
        """Return the gain by training, in percentage points."""
        return 100 * (self.after[mode] - self.start[mode])


def mean_gain(results: Mapping[int, Result], mode: str) -> float:
    """Return the mean gain over seeds in points; NaN without a run."""
    return statistics.fmean(r.gain(mode) for r in results.values()) if results else math.nan


def figures(arms: Mapping[str, Mapping[int, Result]]) -> dict[str, float]:
    """Return the figures of the last line: gains in points, the share 0..1, minutes.

    The share of the ceiling is the smaller of those for greedy and sampled; NaN if the ceiling
    gains nothing. The gain of PPO is also the smaller of the two.
    """
    grpo, ceiling, ppo = (arms.get(name, {}) for name in ("grpo", "ceiling", "ppo"))
    shares = [
        mean_gain(grpo, mode) / gain if (gain := mean_gain(ceiling, mode)) > 0 else math.nan
        for mode in MODES
    ]
    return {
        "greedy_gain_mean": mean_gain(grpo, "greedy"),
        "greedy_gain_min": min((r.gain("greedy") for r in grpo.values()), default=math.nan),
        "sampled_gain_mean": mean_gain(grpo, "sampled"),
        "ppo_gain_mean": min(mean_gain(ppo, mode) for mode in MODES),
        "ceiling_share": math.nan if any(map(math.isnan, shares)) else min(shares),
        "minutes_max": max((r.minutes for r in grpo.values()), default=math.nan),
    }


def table(arms: Mapping[str, Mapping[int, Result]]) -> str:
    """Return one line per run, and the mean of each arm."""
    lines = [
        f"{'':8}{'seed':>5}{'stop at':>9}{'start':>15}{'after':>15}{'gain (points)':>17}"
        f"{'minutes':>9}{'training':>10}",
        f"{'':22}" + f"{'greedy sampled':>15}" * 2 + f"{'greedy sampled':>17}",
    ]
    for arm, results in arms.items():
        for seed, r in results.items():
            rates = "".join(
                f"{100 * rate['greedy']:7.1f}{100 * rate['sampled']:8.1f}"
                for rate in (r.start, r.after)
            )
            lines.append(
                f"{arm:8}{seed:5d}{r.iteration:9d}{rates}{r.gain('greedy'):+9.1f}"
                f"{r.gain('sampled'):+8.1f}{r.minutes:9.1f}{r.training_minutes:10.1f}"
            )
        greedy, sampled = (mean_gain(results, mode) for mode in MODES)
        lines.append(f"{arm:8}{'mean':>5}{'':39}{greedy:+9.1f}{sampled:+8.1f}")
    return "\n".join(lines)


def draw(path: Path, curves: Mapping[str, Sequence[Mapping[int, float]]]) -> None:
    """Write a chart of success during training: thin lines for seeds, a thick one for the mean.

    Args:
        path: PNG file.
        curves: for every arm {iteration: success rate in the ground truth} of each run.
    """
    figure = Figure((6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (arm, runs) in enumerate(curves.items()):
        color, shared = f"C{number}", sorted(set.intersection(*(set(run) for run in runs)))
        for run in runs:
            axes.plot(list(run), [100 * rate for rate in run.values()], color, lw=0.7, alpha=0.5)
        means = [100 * statistics.fmean(run[at] for run in runs) for at in shared]
        axes.plot(shared, means, color, lw=2.2, marker="o", label=LABELS[arm])
    axes.set(xlabel="iteration", ylabel="success in the ground truth, %", ylim=(0, 100))
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


class Bench:
    """Runs launch.py and keeps the results.

    Args:
        work: folder of runs and evaluations.
        settings: {"section.field": value}, for every command.
        iterations: of every run; None = the preset's.
        scenes, selection_scenes: scenes per reported evaluation and per evaluation in training.
        interval: iterations between the evaluations from which the best is chosen.
    """

    def __init__(
        self,
        work: Path,
        settings: Mapping[str, object],
        *,
        iterations: int | None,
        scenes: int,
        selection_scenes: int,
        interval: int,
    ):
        self._runs = Runs(work, settings)
        self._training = {
            "eval.starts": SELECTION,
            "eval.ground_truth_episodes": selection_scenes,
            "eval.interval": interval,
            "checkpoint.interval": interval,
            "checkpoint.keep": 1_000_000,
        }
        if iterations is not None:
            self._training["train.iterations"] = iterations
        self._scenes = scenes

    def train(self, arm: str, seed: int) -> Path:
        """Return the folder of a finished run."""
        preset, changes = ARMS[arm]
        return self._runs.train(
            f"{arm}-seed{seed}", preset, self._training | changes | {"seed": seed}
        )

    def success(self, arm: str, run: Path | None, iteration: int, temperature: float) -> float:
        """Return a policy's success rate on the report's scenes; iteration 0 = the start policy."""
        changes = {
            "eval.starts": REPORT,
            "eval.ground_truth_episodes": self._scenes,
            "policy.eval_temperature": temperature,
        }
        told = self._runs.evaluate(ARMS[arm][0], changes, run, iteration)
        return told["success"]["ground_truth"]["rate"]

    def result(self, arm: str, seed: int) -> Result:
        """Train and evaluate, or find the results of earlier calls."""
        run = self.train(arm, seed)
        iteration = report.best_iteration(run)
        trained_at = json.loads((run / "config.json").read_text())["policy"]["temperature"]
        temperatures = {"greedy": 0.0, "sampled": trained_at}
        summary = json.loads((run / "summary.json").read_text())
        return Result(
            start={m: self.success(arm, None, 0, t) for m, t in temperatures.items()},
            after={m: self.success(arm, run, iteration, t) for m, t in temperatures.items()},
            iteration=iteration,
            training_minutes=summary["seconds"]["step"] / 60,
            minutes=self._runs.minutes(run),
        )


def main() -> None:
    """Print the table; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=KINDS["natural"], nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--iterations", type=KINDS["count"], help="of every run; default: the preset's"
    )
    parser.add_argument(
        "--interval", type=KINDS["count"], default=4, help="iterations between evaluations"
    )
    parser.add_argument(
        "--scenes", type=KINDS["count"], default=512, help="of every reported figure"
    )
    parser.add_argument("--selection_scenes", type=KINDS["count"], default=256)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SECTION.FIELD=VALUE", help="for every command"
    )
    parser.add_argument("--png", type=Path, help="also draw success over iterations")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if wrong := [entry for entry in args.set if "=" not in entry]:
        parser.error(f"--set: expected SECTION.FIELD=VALUE, got {wrong}")
    bench = Bench(
        args.work,
        dict(entry.split("=", 1) for entry in args.set),
        iterations=args.iterations,
        scenes=args.scenes,
        selection_scenes=args.selection_scenes,
        interval=args.interval,
    )
    arms: dict[str, dict[int, Result]] = {}
    for arm in args.arms:
        arms[arm] = {}
        for seed in args.seeds:
            arms[arm][seed] = bench.result(arm, seed)
            print(f"{arm} seed {seed}: {arms[arm][seed]}", flush=True)
    print(f"\nGround-truth success in %, {args.scenes} scenes that no choice was made on;")
    error = 196 * math.sqrt(0.25 / args.scenes)
    print(f"one rate is known to {error:.1f} points or better (95 %).\n")
    print(table(arms))
    if args.png:
        folders = {arm: [bench.train(arm, seed) for seed in args.seeds] for arm in args.arms}
        draw(
            args.png, {arm: list(map(report.success_curve, runs)) for arm, runs in folders.items()}
        )
    numbers = figures(arms)
    if args.json:
        runs = {
            arm: {seed: dataclasses.asdict(result) for seed, result in results.items()}
            for arm, results in arms.items()
        }
        args.json.write_text(json.dumps({"figures": numbers, "runs": runs}, indent=2) + "\n")
    print("\nGains in points, share of the ceiling 0..1, minutes of a whole run:")
    print(" ".join(f"{name}={value:.2f}" for name, value in numbers.items()))


if __name__ == "__main__":
    main()
