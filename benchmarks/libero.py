r"""Measures whether a policy gets better in genuine LIBERO (MuJoCo) by imagined episodes alone.

    python -m benchmarks.libero --seeds 0 1 2
    python -m benchmarks.libero --world DIR                            # a build that is not shipped
    python -m benchmarks.libero --baselines --data data/libero_small/base_*

Each seed trains in the world model only. The iteration, which may be the start, is chosen on the
start ids 360..399. Success is reported on 0..199, all states of the benchmark. They are in no
recording, no training and no choice: the cards of the world and --data are checked for that. Then
the chosen policy is recorded on reported states, and its actions are played in imagination
(`tools.trust`). --baselines adds, as far as one seed shows it, the same RL in LIBERO itself,
and supervised training on --data for as long as a run of RL takes.

Finished runs, evaluations and recordings are kept under --work and found again by their settings
and the hashes of their weights, so an interrupted benchmark continues. docs/libero_small.md.
"""

import argparse
import dataclasses
import json
import math
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from benchmarks.libero_states import CHOICE, REPORT, TRAINING, check
from benchmarks.runs import GROUND_TRUTH, ROOT, Runs
from evac_jax.config import hub
from evac_jax.config.flags import read_preset
from evac_jax.config.schema import LIBERO_SMALL_WEIGHTS
from evac_jax.config.world import World, absent
from evac_jax.errors import ConfigError
from evac_jax.files import cards
from evac_jax.telemetry import report
from evac_jax.tools.command_line import KINDS, run_tool
from evac_jax.tools.recipes import commands
from evac_jax.tools.recipes.libero_small import BY_EXPERT, SUPERVISED, TASKS

PRESET = "configs/grpo.py:libero_small"
MODES = ("greedy", "sampled")
IMAGINED, REAL, TAUGHT = "imagination", "ground_truth", "supervised"
TRIALS = (100, 400)  # steps of supervised training whose difference tells the time of a step
Tasks = dict[str, tuple[int, int]]  # instruction -> (successes, episodes)
Share = tuple[int, int]  # (hits, of)


def total(tasks: Tasks) -> Share:
    """Return successes and episodes of all tasks together."""
    successes, episodes = zip(*tasks.values(), strict=True)
    return sum(successes), sum(episodes)


def rate(share: Share) -> float:
    """Return hits / of; NaN where there is nothing."""
    return share[0] / share[1] if share[1] else math.nan


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained policy.

    Attributes:
        start, after: success in LIBERO by mode of acting, of start policy and chosen policy.
        iteration: the chosen one, 0 = none was better than the start; steps if it was supervised.
        minutes: of its training, with the evaluations that the choice is made by.
        agreement: of its recorded episodes, those with the same outcome in imagination.
        false_success: of its imagined successes, those that really fail.
    """

    start: Mapping[str, Tasks]
    after: Mapping[str, Tasks]
    iteration: int
    minutes: float
    agreement: Share = (0, 0)
    false_success: Share = (0, 0)

    def gain(self, mode: str) -> tuple[float, float, float]:
        """Return the gain in percentage points, and the ends of its 95 % interval."""
        after, start = total(self.after[mode]), total(self.start[mode])
        ends = report.newcombe_interval(after, start)
        return 100 * (rate(after) - rate(start)), 100 * ends[0], 100 * ends[1]


class Proof:
    """Trains, evaluates and records, or finds what earlier calls did.

    Args:
        runs: with the world among their settings.
        world: its folder.
        episodes: of every reported figure.
        recorded: episodes of each chosen policy that are compared with imagination.
        chosen_by: episodes of each evaluation by which the iteration is chosen.
        iterations: of every run; None = the preset's.
        interval: iterations between the evaluations from which the best is chosen.
        envs: LIBERO processes at a time.

    Raises:
        ConfigError: a setting of the runs is none.
    """

    def __init__(
        self,
        runs: Runs,
        world: World,
        *,
        episodes: int,
        recorded: int,
        chosen_by: int,
        iterations: int | None,
        interval: int,
        envs: int,
    ):
        self._runs, self._world = runs, world
        flags = [f"--config.{name}={value}" for name, value in runs.settings.items()]
        self._config = read_preset(str(ROOT / PRESET), flags)
        self._episodes, self._recorded, self._envs = episodes, recorded, envs
        self._training = {
            "eval.ground_truth_starts": CHOICE,
            "eval.ground_truth_episodes": chosen_by,
            "eval.ground_truth_envs": envs,
            "eval.interval": interval,
            "checkpoint.interval": interval,
            "checkpoint.keep": 1_000_000,
        }
        if iterations is not None:
            self._training["train.iterations"] = iterations

    def success(self, run: Path | None = None, iteration: int = 0, policy: str = "") -> dict:
        """Return {mode: success by task} on reported states.

        Args:
            run, iteration: whose policy is evaluated; iteration 0 = the start policy.
            policy: folder of another start policy; "" = the world's.
        """
        temperatures = {"greedy": 0.0, "sampled": self._config.policy.temperature}
        found = {}
        for mode, temperature in temperatures.items():
            changes = {
                "eval.ground_truth_starts": REPORT,
                "eval.ground_truth_episodes": self._episodes,
                "eval.ground_truth_envs": self._envs,
                "policy.eval_temperature": temperature,
                **({"policy.checkpoint": policy} if policy else {}),
            }
            told = self._runs.evaluate(PRESET, changes, run, iteration)["by_task"]["ground_truth"]
            found[mode] = {text: (n["successes"], n["episodes"]) for text, n in told.items()}
        return found

    def learned(self, arm: str, seed: int) -> Result:
        """Return what reinforcement learning gained, in imagination or in LIBERO itself."""
        changes: dict[str, object] = {}
        if arm == REAL:
            group = self._config.algo.group_size
            changes = GROUND_TRUTH | {
                "env.train_starts": TRAINING,
                # A process of up to 1.9 GB for each member of one group.
                "env.num_envs": group,
                "rollout.epochs": self._config.env.num_envs // group,
                "simulator.processes": 1,
                "eval.ground_truth_envs": 1,
            }
        changes = self._training | changes | {"seed": seed}
        run = self._runs.train(f"{arm}-seed{seed}", PRESET, changes)
        iteration = report.best_iteration(run)
        start, after = self.success(), self.success(run, iteration)
        trust = self.trust(run, iteration) if arm == IMAGINED else ()
        return Result(start, after, iteration, self._runs.minutes(run), *trust)

    def trust(self, run: Path, iteration: int) -> tuple[Share, Share]:
        """Return agreement and false success of the chosen policy's own episodes in LIBERO."""
        call, count = self._runs.call, self._recorded
        settings = self._runs.settings | {
            "env.train_starts": (REPORT[0], REPORT[0] + count),
            "eval.ground_truth_envs": self._envs,
        }
        key = self._runs.key(PRESET, settings, [run.name, iteration])
        names = (f"{what}-{key}" for what in ("policy", "episodes", "trust"))
        policy, episodes, out = (self._runs.work / name for name in names)
        if not policy.is_dir():
            command = commands.export(str(run), str(policy), best=False, dtype="float32")
            call(policy.name, (*command, f"--step={iteration}"))
        if not episodes.is_dir():
            mix = f"policy:{policy}@0=1"
            call(
                episodes.name,
                commands.record_libero(PRESET, settings, str(episodes), mix, count, seed=0),
            )
        if not (out / commands.TRUST_FILE).is_file():
            imagined = {f: attrgetter(f)(self._config) for f in commands.IMAGINATION.values()}
            command = commands.validate(PRESET, imagined, [str(episodes)], str(out))
            whole = ("--part=all", "--episodes=0", f"--dtype={self._config.simulator.dtype}")
            call(out.name, (*command, *whole, "--threads=2"))
        told = json.loads((out / commands.TRUST_FILE).read_text())["overall"]
        agreement, false = told["agreement"], told["false_success"]
        return (agreement["hits"], agreement["of"]), (false["hits"], false["of"])

    def taught(self, minutes: float, data: Sequence[Path]) -> Result:
        """Return what supervised training of the start policy gains in as many minutes."""
        facts = [SUPERVISED, BY_EXPERT, [cards.sha256(folder / "card.json") for folder in data]]
        key = self._runs.key(PRESET, self._runs.settings, facts)

        def train(name: str, steps: int) -> Path:
            out = self._runs.work / f"{name}-{key}-{steps}"
            if not out.is_dir():
                start = self._world.part("policy")
                command = commands.tool(
                    "policy.train", data=list(map(str, data)), start=start, out=str(out)
                )
                command += commands.options(steps=steps, **SUPERVISED)
                self._runs.call(out.name, (*command, *BY_EXPERT, "--every_step"))
            return out

        # Both compile and are scored once, so the difference is of steps alone.
        short, long = (cards.read(train("trial", steps))["seconds"] for steps in TRIALS)
        if not short < long:
            sys.exit(
                f"{TRIALS} steps took {short:.0f} and {long:.0f} s, which tells no time of a step; "
                f"remove {self._runs.work}/trial-* and try again on an idle machine"
            )
        more = (60 * minutes - short) * (TRIALS[1] - TRIALS[0]) / (long - short)
        steps = max(TRIALS[0] + round(more), 1)
        policy = train("supervised", steps)
        spent = cards.read(policy)["seconds"] / 60
        return Result(self.success(), self.success(policy=str(policy)), steps, spent)


def figures(results: Mapping[int, Result]) -> dict[str, float]:
    """Return the figures of the last line from {seed: result of learning in imagination}.

    Shares are 0..1 and gains in percentage points, greedy; agreement and false success are of all
    recorded episodes together.
    """

    def pooled(shares: Sequence[Share]) -> float:
        return rate((sum(hits for hits, _ in shares), sum(of for _, of in shares)))

    runs = list(results.values())
    gains = [run.gain("greedy") for run in runs]
    return {
        "start": rate(total(runs[0].start["greedy"])),
        "after": statistics.fmean(rate(total(run.after["greedy"])) for run in runs),
        "gain": statistics.fmean(gain for gain, _, _ in gains),
        "gain_low": min(low for _, low, _ in gains),
        "agreement": pooled([run.agreement for run in runs]),
        "false_success": pooled([run.false_success for run in runs]),
        "episodes": total(runs[0].start["greedy"])[1],
        "seeds": len(runs),
        "minutes_per_seed": statistics.fmean(run.minutes for run in runs),
    }


def last_line(numbers: Mapping[str, float]) -> str:
    """Return the figures as a line for programs."""
    digits = dict.fromkeys(("start", "after", "agreement", "false_success"), 3)
    digits |= dict.fromkeys(("gain", "gain_low", "minutes_per_seed"), 1)
    return " ".join(f"{name}={value:.{digits.get(name, 0)}f}" for name, value in numbers.items())


def table(results: Mapping[str, Mapping[int, Result]], mode: str) -> str:
    """Return one line per policy: success before and after, and the gain, with 95 % intervals."""

    def cell(share: Share) -> str:
        low, high = report.wilson_interval(*share)
        return f"{100 * rate(share):7.1f} [{100 * low:5.1f}, {100 * high:5.1f}]"

    head = f"{'':13}{'seed':>5}{'stop at':>9}{'start':>23}{'after':>23}{'gain':>26}{'minutes':>9}"
    lines = [head]
    for arm, seeds in results.items():
        for seed, run in seeds.items():
            points, low, high = run.gain(mode)
            gain = f"{points:+10.1f} [{low:+6.1f}, {high:+6.1f}]"
            sides = "".join(f" {cell(total(side[mode]))}" for side in (run.start, run.after))
            lines.append(f"{arm:13}{seed:5}{run.iteration:9}{sides}{gain}{run.minutes:9.1f}")
    return "\n".join(lines)


def by_task(results: Mapping[int, Result], mode: str) -> str:
    """Return a table of success by task, of the start policy and of each seed's."""
    start = next(iter(results.values())).start[mode]
    columns = {"start": start} | {f"seed {n}": run.after[mode] for n, run in results.items()}
    return report.table(columns)


def refuse_what_is_missing(world: str, settings: Mapping[str, object]) -> None:
    """Check that weights and LIBERO are there, before anything else.

    Raises:
        ConfigError: names each that is missing, and the command that makes it.
    """
    python = str(commands.value_of(PRESET, settings, "libero.python"))
    problems = [absent(world)]
    if not (ROOT / python).is_file():
        problems.append(
            f"config.libero.python: there is no {python!r}; `make libero` makes it, 2.1 GB "
            "(docs/libero.md)"
        )
    if problems := list(filter(None, problems)):
        raise ConfigError("\n".join(problems))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, most = parser.add_argument, REPORT[1] - REPORT[0]
    add("--seeds", type=KINDS["natural"], nargs="+", default=[0, 1, 2])
    add("--world", default=LIBERO_SMALL_WEIGHTS, metavar="DIR", help="default: as shipped")
    add("--data", type=Path, nargs="+", default=[], help="recordings that the world was made from")
    add("--baselines", action="store_true", help="hours more, and 16 GB of memory; needs --data")
    add("--iterations", type=KINDS["count"], help="of every run; default: the preset's")
    add("--interval", type=KINDS["count"], default=4, help="iterations between evaluations")
    add("--episodes", type=KINDS["count"], default=most, help=f"of every figure, up to {most}")
    add(
        "--recorded",
        type=KINDS["natural"],
        default=most // 2,
        help="of each seed, compared with imagination",
    )
    add(
        "--chosen_by",
        type=KINDS["count"],
        default=CHOICE[1] - CHOICE[0],
        help="episodes in each of these",
    )
    add(
        "--envs",
        type=KINDS["count"],
        default=2,
        help="LIBERO processes at a time, up to 1.9 GB each",
    )
    add("--work", type=Path, default=Path("runs/libero"))
    add("--set", nargs="+", default=[], metavar="SECTION.FIELD=VALUE", help="for every run")
    add("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if wrong := [entry for entry in args.set if "=" not in entry]:
        parser.error(f"--set: expected SECTION.FIELD=VALUE, got {wrong}")
    if not (1 <= args.episodes <= most and 1 <= args.recorded <= most):
        parser.error(f"--episodes, --recorded: expected 1 to {most}")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds: expected different ones, got {args.seeds}")
    if args.baselines and not args.data:
        parser.error("--baselines: supervised training needs --data, the recordings of the scripts")
    return args


def run(args: argparse.Namespace) -> dict[str, dict[int, Result]]:
    """Return {arm: {seed: result}} of a command line.

    Raises:
        ConfigError: weights or LIBERO are missing.
        DataError: a reported state is not kept apart.
    """
    settings: dict[str, object] = dict(entry.split("=", 1) for entry in args.set)
    refuse_what_is_missing(args.world, settings)
    folder = Path(hub.local(args.world)).expanduser().absolute()
    world = World.read(str(folder))
    if world.card.ground_truth.name != "libero":
        raise ConfigError(
            f"--world: expected one whose ground truth is LIBERO, got "
            f"{world.card.ground_truth.name!r} in {args.world!r}"
        )
    truth = world.card.ground_truth
    if (len(truth.tasks), truth.extra_states) != (len(TASKS), True):
        raise ConfigError(
            f"--world: start ids {REPORT[0]}..{REPORT[1] - 1} are the benchmark's states only of "
            f"{len(TASKS)} tasks with libero.extra_states, got libero.tasks {truth.tasks} and "
            f"extra_states {truth.extra_states}"
        )
    data = [recording.absolute() for recording in args.data]  # commands run elsewhere
    numbering = (truth.suite, list(truth.tasks), truth.extra_states)
    for where, states in check(folder, data, numbering).items():
        print(f"apart from the reported states: {where}, {len(states)} states")
    runs = Runs(args.work, settings | {"world": str(folder)})
    proof = Proof(
        runs,
        world,
        episodes=args.episodes,
        recorded=args.recorded,
        chosen_by=args.chosen_by,
        iterations=args.iterations,
        interval=args.interval,
        envs=args.envs,
    )
    results: dict[str, dict[int, Result]] = {IMAGINED: {}}
    for seed in args.seeds:
        results[IMAGINED][seed] = proof.learned(IMAGINED, seed)
        print(table({IMAGINED: {seed: results[IMAGINED][seed]}}, "greedy"), flush=True)
    if args.baselines:
        results[REAL] = {args.seeds[0]: proof.learned(REAL, args.seeds[0])}
        minutes = statistics.fmean(run.minutes for run in results[IMAGINED].values())
        results[TAUGHT] = {0: proof.taught(minutes, data)}
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables; the last line is for programs."""
    args = parse(argv)
    results = run(args)
    for mode in MODES:
        print(f"\n{mode} success in LIBERO, %, {args.episodes} episodes per figure [95 %: Wilson;")
        print("gains, in points: Newcombe, as if both sides were of different states]\n")
        print(table(results, mode))
        print(f"\n{mode}, by task\n{by_task(results[IMAGINED], mode)}")
    numbers = figures(results[IMAGINED])
    if args.json:
        told = {
            arm: {seed: dataclasses.asdict(result) for seed, result in seeds.items()}
            for arm, seeds in results.items()
        }
        known = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        cards.write_json(args.json, {"figures": known, "runs": told})
    print(f"\n{last_line(numbers)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the command under way as well
    run_tool(main)
