"""Measures the effect of each guard against reward hacking with a deliberately bad classifier.

It runs GRPO in imagination with a classifier that accepts nearly everything (threshold 0.1, one
frame): without guards, with each guard alone, with recommended ones and with all. For comparison it
runs the shipped classifier.

    python -m benchmarks.guards --seeds 0
    python -m benchmarks.guards --list    # what every variant changes; nothing is run

Real success is measured in the ground truth, greedy, on scenes that nothing else uses, before
training and after the LAST iteration, so no better iteration is selected. Finished runs are kept
under --work and found again, so an interrupted benchmark continues.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.learning import ARMS, Bench
from benchmarks.runs import ROOT
from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import read_preset
from evac_jax.config.schema import MINIATURE_WEIGHTS, TrainConfig
from evac_jax.errors import ConfigError
from evac_jax.telemetry import json_lines
from evac_jax.tools.command_line import KINDS

# Not the frames for which the world's classifier was calibrated.
BAD = {"world": "", "reward.threshold": 0.1, "reward.success_frames": 1}
RECORDING = "{work}/demonstrations"
ENSEMBLE = f"{MINIATURE_WEIGHTS}/reward,{MINIATURE_WEIGHTS}/reward_second"
GUARDS = {
    "success holds for 2 frames": {"reward.success_frames": 2},
    "two classifiers, veto 0.4": {"reward.checkpoint": ENSEMBLE, "reward.veto": 0.4},
    "KL to the start policy 0.05": {"algo.kl_beta": 0.05},
    # Two optimiser steps per iteration, as with 4 chunks. In the ground truth, episodes have full
    # length, whatever the length of the imagined ones.
    "3 chunks instead of 4": {"env.max_episode_steps": 24, "algo.global_batch": 192},
    "30 % keyframe starts": {"env.keyframes": 0.3, "env.keyframe_data": RECORDING},
    "refill once": {"rollout.refill": 1},
}
ALL = {field: value for guard in GUARDS.values() for field, value in guard.items()}
# The guards that slow learning least.
RECOMMENDED = {
    field: value
    for name in ("success holds for 2 frames", "two classifiers, veto 0.4", "3 chunks instead of 4")
    for field, value in GUARDS[name].items()
}
VARIANTS = {
    "shipped classifier": {},
    "bad classifier": BAD,
    **{f"bad, {name}": BAD | guard for name, guard in GUARDS.items()},
    "bad, recommended guards": BAD | RECOMMENDED,
    "bad, all guards": BAD | ALL,
}
DEMONSTRATIONS = ("--episodes", "300", "--mix", "expert=0.5,noisy=0.5", "--seed", "77")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run; rates 0..1.

    Attributes:
        before, after: real success, greedy, of start and last policy.
        imagined: imagined success of the last iterations' twin episodes.
        replayed: real success of the same episodes.
        false_success: share of their imagined successes that are false; None without successes.
        alarm: first iteration whose twin replay raised the alarm; None if none did.
    """

    before: float
    after: float
    imagined: float
    replayed: float
    false_success: float | None
    alarm: int | None


def twin_figures(lines: Sequence[Mapping], last: int) -> dict:
    """Return the twin's part of an `Outcome` from a run's metrics: means of the last iterations.

    False successes are counted over all episodes; every iteration has the same number of them.
    """
    replays = [line for line in lines if line.get("eval/real_success") is not None]
    late = replays[-last:]
    imagined = statistics.fmean(line["eval/imagined_success"] for line in late)
    false = [line["eval/imagined_success"] * (line.get("eval/false_success") or 0) for line in late]
    alarms = [line["iteration"] for line in replays if line.get("eval/twin_alarm")]
    return {
        "imagined": imagined,
        "replayed": statistics.fmean(line["eval/real_success"] for line in late),
        "false_success": statistics.fmean(false) / imagined if imagined else None,
        "alarm": min(alarms, default=None),
    }


def table(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return one line per variant, means over its seeds."""

    def mean(values) -> str:
        known = [value for value in values if value is not None]
        return f"{100 * statistics.fmean(known):9.1f}" if known else f"{'-':>9}"

    head = f"{'':34}{'imagined':>9}{'same,':>9}{'false':>9}{'real':>9}{'real':>9}{'alarm':>11}"
    lines = [head, f"{'':43}{'real':>9}{'share':>9}{'before':>9}{'after':>9}{'iteration':>11}"]
    for name, runs in outcomes.items():
        columns = ("imagined", "replayed", "false_success", "before", "after")
        cells = "".join(mean(getattr(run, column) for run in runs) for column in columns)
        alarms = ",".join("-" if run.alarm is None else str(run.alarm) for run in runs)
        lines.append(f"{name:34}{cells}{alarms:>11}")
    return "\n".join(lines)


def figures(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, float]:
    """Return the figures of the last line, in points; NaN for what was not run."""

    def gap(name: str) -> float:
        runs = outcomes.get(name)
        return 100 * statistics.fmean(r.imagined - r.replayed for r in runs) if runs else math.nan

    def gain(name: str) -> float:
        runs = outcomes.get(name)
        return 100 * statistics.fmean(r.after - r.before for r in runs) if runs else math.nan

    bad, guarded = "bad classifier", "bad, recommended guards"
    alarms = [run.alarm is not None for run in outcomes.get(bad, ())]
    return {
        "gap_bad": gap(bad),
        "gap_guarded": gap(guarded),
        "gain_bad": gain(bad),
        "gain_guarded": gain(guarded),
        "gain_shipped": gain("shipped classifier"),
        "alarms_bad": statistics.fmean(alarms) if alarms else math.nan,
    }


def settings_of(variant: str, work: Path) -> dict[str, object]:
    """Return {"section.field": value} of a variant whose files are under `work`."""
    return {
        name: value.replace("{work}", str(work.absolute())) if isinstance(value, str) else value
        for name, value in VARIANTS[variant].items()
    }


def config_of(settings: Mapping[str, object]) -> TrainConfig:
    """Return the checked configuration of a run with `settings`.

    Raises:
        ConfigError: weights or recordings are missing, or fields do not fit together.
    """
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return from_config_dict(read_preset(str(ROOT / ARMS["grpo"][0]), flags).to_dict())


def evaluation_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of a variant for its evaluation: those that determine its checkpoints.

    Episodes have full length and ordinary starts, so that variants are comparable. With a KL
    penalty, a checkpoint also holds the start policy.
    """
    return {name: settings[name] for name in ("algo.kl_beta",) if name in settings}


def run(variant: str, seed: int, args: argparse.Namespace) -> Outcome:
    """Train one variant, or find the run of an earlier call, and evaluate it."""

    def bench(settings: Mapping[str, object]) -> Bench:
        return Bench(
            args.work,
            settings,
            iterations=args.iterations,
            scenes=args.scenes,
            selection_scenes=64,
            interval=args.iterations,
        )

    settings = settings_of(variant, args.work)
    folder = bench({"eval.twin_fraction": args.twin_fraction} | settings).train("grpo", seed)
    lines = json_lines.read_metrics(folder)
    evaluation = bench(evaluation_settings(settings))
    return Outcome(
        before=bench({}).success("grpo", None, 0, 0.0),
        after=evaluation.success("grpo", folder, args.iterations, 0.0),
        **twin_figures(lines, args.last),
    )


def listing(variants: Sequence[str], work: Path) -> str:
    """Return the flags that every variant adds to launch.py."""
    lines = []
    for variant in variants:
        lines += [f"{variant}:"]
        lines += [f"  --config.{name}={v}" for name, v in settings_of(variant, work).items()]
    return "\n".join(lines)


def prepare(variants: Sequence[str], work: Path) -> None:
    """Record demonstrations if a variant needs them, and check that every variant can run.

    This is done before the first run, so that mistakes do not show up only after an hour.

    Raises:
        ConfigError: some variants cannot run; the message names each.
    """
    settings = {variant: settings_of(variant, work) for variant in variants}
    recordings = {s["env.keyframe_data"] for s in settings.values() if "env.keyframe_data" in s}
    for folder in recordings:
        if not Path(folder).is_dir():
            command = [sys.executable, "-m", "evac_jax.tools.episodes.collect", "--out", folder]
            subprocess.run([*command, *DEMONSTRATIONS], cwd=ROOT, check=True)
    problems = []
    for variant, values in settings.items():
        try:
            config_of(values)
        except ConfigError as error:
            problems.append(f"{variant}: {error}")
    if problems:
        raise ConfigError("\n".join([*problems, "leave such variants out with --variants"]))


def main() -> None:
    """Print the table; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=KINDS["natural"], nargs="+", default=[0])
    parser.add_argument("--iterations", type=KINDS["count"], default=8)
    parser.add_argument("--scenes", type=KINDS["count"], default=512, help="of every real success")
    parser.add_argument("--twin_fraction", type=KINDS["share"], default=0.5)
    parser.add_argument(
        "--last", type=KINDS["count"], default=3, help="iterations that the twin's means cover"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--work", type=Path, default=Path("runs/guards"))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--list", action="store_true", help="show the variants and do nothing")
    args = parser.parse_args()
    if args.list:
        print(listing(args.variants, args.work))
        return
    try:
        prepare(args.variants, args.work)
    except ConfigError as error:
        sys.exit(str(error))
    outcomes: dict[str, list[Outcome]] = {}
    for variant in args.variants:
        for seed in args.seeds:
            outcomes.setdefault(variant, []).append(run(variant, seed, args))
            print(f"{variant}, seed {seed}: {outcomes[variant][-1]}", flush=True)
    print(f"\nPer cent; {args.iterations} iterations, {len(args.seeds)} seed(s).\n")
    print(table(outcomes))
    numbers = figures(outcomes)
    if args.json:
        runs = {name: [dataclasses.asdict(r) for r in runs] for name, runs in outcomes.items()}
        args.json.write_text(json.dumps({"figures": numbers, "runs": runs}, indent=2) + "\n")
    print("\nPoints; alarms as a share of the runs with the bad classifier:")
    print(" ".join(f"{name}={value:.2f}" for name, value in numbers.items()))


if __name__ == "__main__":
    main()
