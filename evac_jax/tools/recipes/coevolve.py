r"""Co-evolution: trains policy, world model and classifier in rounds, each with the others.

A round trains the policy in imagination, evaluates it in the ground truth, records a few real
episodes with it, and fine-tunes world model and classifier on the old and the new recordings. This
is needed because a better policy reaches states that the old recordings do not contain. Rounds end
when real success stops rising.

    python -m evac_jax.tools.recipes.coevolve --config=configs/grpo.py --rounds 3 \
        --data DIR --out DIR2

Rounds are compared on some scenes; the last line is measured on others. With a robot instead of
the miniature, record the episodes yourself: train a round, record episodes with the policy in
round_1/policy, run the command again with --real_data FOLDER, and so on. Finished stages are kept.
The last one packs the best policy and the newest simulator as a world, DIR2/world.
The share of successful episodes in a folder is then the real success of that round.
"""

import argparse
import dataclasses
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from evac_jax.config import hub
from evac_jax.errors import DataError
from evac_jax.files import cards
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.recipes import commands
from evac_jax.tools.recipes.stages import ROOT, WORK, Stage, Workshop

RECORDINGS = 50  # first seed of the recordings; no other recording has their scenes


@dataclasses.dataclass(frozen=True)
class Models:
    """The models with which a round starts, as paths for command lines."""

    policy: str
    world_model: str
    reward: str
    pose_model: str
    data: tuple[str, ...]

    def settings(self) -> dict[str, str]:
        """Return the fields of the configuration that name them."""
        return {
            "policy.checkpoint": self.policy,
            "world_model.checkpoint": self.world_model,
            "reward.checkpoint": self.reward,
            "env.pose_model": self.pose_model,
        }


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of every round; see the help of the command line."""

    config: str
    settings: Mapping[str, object]
    rounds: int = 3
    patience: int = 1
    iterations: int | None = None
    interval: int = 4
    real_episodes: int = 200
    real_data: tuple[str, ...] = ()
    world_model_steps: int = 1500
    world_model_lr: float = 5e-4
    world_model_batch: int = 6
    world_model_dropout: float = 0.0
    few_steps: bool = False
    imagined_episodes: int = 800
    reward_steps: int = 2000
    scenes: int = 512
    seed: int = 0
    ground_truth: bool = True


def rounds_to_go(success: Sequence[float], patience: int, rounds: int) -> int:
    """Return how many rounds may follow; 0 = stop.

    Args:
        success: of the start policy, then of each finished round.
        patience: number of consecutive rounds that may fail to beat the best one before them.
        rounds: largest number of rounds.
    """
    best = max(range(len(success)), key=lambda n: (success[n], -n))
    stale = len(success) - 1 - best >= patience
    return 0 if stale else rounds - (len(success) - 1)


def training_stages(number: int, models: Models, options: Options) -> list[Stage]:
    """Return the stages that train the policy of round `number` and measure its real success.

    Without a ground truth to simulate, the success is not measured.
    """
    folder = f"{WORK}/round_{number}"
    settings = dict(options.settings) | models.settings() | {"seed": options.seed + number - 1}
    if options.iterations is not None:
        settings["train.iterations"] = options.iterations
    before = (f"reward_{number - 1}", f"world_model_{number - 1}") if number > 1 else ()
    train = Stage(
        f"train_{number}",
        commands.train(options.config, folder, "run", settings, options.interval),
        before,
        f"round_{number}/run",
        cores=2,
        resumes=True,
    )
    out = f"round_{number}/policy"
    export = commands.export(f"{folder}/run", f"{WORK}/{out}", best=options.ground_truth)
    stages = [train, Stage(f"policy_{number}", export, (train.name,), out)]
    if options.ground_truth:
        stages.append(evaluation(f"choose_{number}", options, f"{WORK}/{out}", commands.SELECTION))
        stages[-1] = dataclasses.replace(stages[-1], inputs=(f"policy_{number}",))
    return stages


def evaluation(name: str, options: Options, policy: str, starts: tuple[int, int]) -> Stage:
    """Return the stage that measures a policy's greedy success on scenes `starts`."""
    settings = dict(options.settings) | {"policy.checkpoint": policy, "eval.starts": starts}
    command = commands.evaluate(options.config, f"{WORK}/success", name, settings, options.scenes)
    return Stage(name, command, output=f"success/{name}")


def learning_stages(number: int, models: Models, options: Options) -> tuple[list[Stage], Models]:
    """Return the stages after a round's policy is trained, and the models for the next round."""
    folder = f"round_{number}"
    following = Models(
        policy=f"{WORK}/{folder}/policy",
        world_model=f"{WORK}/{folder}/world_model",
        reward=f"{WORK}/{folder}/reward",
        pose_model=models.pose_model,
        data=(*models.data, _recordings(number, options)),
    )
    new, imagined, stages = following.data[-1], f"{WORK}/{folder}/imagined", []

    def add(name: str, command: tuple[str, ...], *inputs: str, resumes: bool = False) -> str:
        output = f"{folder}/{name}"
        stages.append(Stage(f"{name}_{number}", command, inputs, output, resumes=resumes))
        return stages[-1].name

    made = f"policy_{number}"
    if not options.real_data:
        record = commands.record_policy(
            options.config,
            options.settings,
            following.policy,
            new,
            options.real_episodes,
            RECORDINGS + options.seed + number,
        )
        made = add("episodes", record, made)
    steps = commands.value_of(options.config, options.settings, "world_model.steps")
    world_model = add(
        "world_model",
        commands.fine_tune_world_model(
            models.world_model,
            following.world_model,
            following.data,
            options.world_model_steps,
            lr=options.world_model_lr,
            batch=options.world_model_batch,
            ddim_steps=steps,
            dropout=options.world_model_dropout,
            cache=f"{WORK}/latents",
        )
        + ("--few_steps",) * options.few_steps,
        *(made, *[f"world_model_{number - 1}"] * (number > 1)),
        resumes=True,
    )
    settings = dict(options.settings) | following.settings()
    seen = add(
        "imagined",
        commands.imagine(
            options.config, settings, following.data, imagined, options.imagined_episodes
        ),
        *(world_model, made),
    )
    reward = add(
        "reward",
        commands.train_reward(
            options.config,
            settings,
            following.reward,
            following.data,
            [imagined],
            options.reward_steps,
        ),
        seen,
    )
    trust = commands.validate(options.config, settings, following.data, f"{WORK}/{folder}/trust")
    add("trust", trust, world_model, reward)
    return stages, following


def _recordings(number: int, options: Options) -> str:
    """Return the folder of a round's real episodes, as written in command lines."""
    if options.real_data:
        return options.real_data[number - 1]
    return f"{WORK}/round_{number}/episodes"


def recorded_folder(number: int, options: Options) -> Path:
    """Return the given recordings of a round.

    Raises:
        DataError: there are none yet; the message says what to record.
    """
    if len(options.real_data) < number:
        raise DataError(
            f"round {number} needs recordings of its policy, the folder round_{number}/policy "
            f"under --out: record episodes with it and give {number} folder(s) to --real_data, "
            f"one per round; got {len(options.real_data)}"
        )
    return Path(options.real_data[number - 1])


def success_rate(workshop: Workshop, name: str) -> float:
    """Return the success rate that an evaluation stage measured, 0..1."""
    values = cards.read_json(workshop.work / "success" / name / report.EVALUATION_FILE)
    return values["success"]["ground_truth"]["rate"]


def real_success(workshop: Workshop, number: int, options: Options) -> float:
    """Return the real success of a round's policy: from its evaluation or from recordings."""
    if options.ground_truth:
        return success_rate(workshop, f"choose_{number}")
    from evac_jax.files import recordings  # used only here; recordings may be large

    return float(recordings.load(recorded_folder(number, options)).success_once().mean())


def coevolve(workshop: Workshop, start: Models, options: Options) -> dict:
    """Run rounds until real success stops rising; return what `main` prints.

    Returns:
        {"success": [start, round 1, ..] on the scenes for the choice, "best": number of the best
        round, "report": {number: success on other scenes}, "rounds": facts per round}. The success
        of the start policy is None if it cannot be measured.
    """
    models, stages, facts = start, [], []
    success = [-math.inf]
    if options.ground_truth:
        stages.append(evaluation("choose_0", options, start.policy, commands.SELECTION))
        workshop.run(stages)
        success = [success_rate(workshop, "choose_0")]
    policies = [start.policy]
    for number in range(1, options.rounds + 1):
        stages += training_stages(number, models, options)
        workshop.run(stages)
        if options.real_data or not options.ground_truth:
            recorded_folder(number, options)
        policies.append(f"{WORK}/round_{number}/policy")
        success.append(real_success(workshop, number, options))
        logging.info("round %d: real success %.3f", number, success[-1])
        facts.append(_facts(workshop, number))
        if not rounds_to_go(success, options.patience, options.rounds):
            break
        more, models = learning_stages(number, models, options)
        stages += more
        workshop.run(stages)
        facts[-1]["trust"] = commands.trust_figures(workshop.work / f"round_{number}" / "trust")
    best = max(range(len(success)), key=lambda n: (success[n], -n))
    _pack(workshop, stages, models, policies[best], options)
    told = _report(workshop, stages, policies, best, options) if options.ground_truth else {}
    return {
        "success": [None if math.isinf(rate) else rate for rate in success],
        "best": best,
        "report": told,
        "rounds": facts,
    }


def _pack(
    workshop: Workshop, stages: Sequence[Stage], models: Models, policy: str, options: Options
) -> None:
    """Pack the best policy and the newest simulator as {work}/world."""
    if "," in models.reward:
        logging.warning("no world is packed: it has one classifier, these are %s", models.reward)
        return
    settings = dict(options.settings) | models.settings() | {"policy.checkpoint": policy}
    command = commands.pack(options.config, settings, f"{WORK}/world")
    made = tuple(stage.name for stage in stages)
    workshop.run([*stages, Stage("world", command, made, "world")])


def _report(workshop, stages, policies, best, options) -> dict[int, float]:
    """Measure the start policy, one round of plain RL and the best round on separate scenes."""
    numbers = sorted({0, 1, best})
    names = {number: f"report_{number}" for number in numbers}
    more = [
        evaluation(name, options, policies[number], commands.REPORT)
        for number, name in names.items()
    ]
    workshop.run([*stages, *more])
    return {number: success_rate(workshop, name) for number, name in names.items()}


def _json(path: Path) -> dict:
    return cards.read_json(path) if path.is_file() else {}


def _facts(workshop: Workshop, number: int) -> dict:
    """Figures from the run of a round."""
    run = workshop.work / f"round_{number}" / "run"
    imagined = _json(run / report.SUMMARY_FILE).get("success", {}).get("after", {}).get("imagined")
    return {
        "round": number,
        "imagined_success": imagined["rate"] if imagined else None,
        "iteration": cards.read(workshop.work / f"round_{number}" / "policy").get("iteration"),
        "training_seconds": workshop.record(f"train_{number}").get("seconds"),
    }


def table(outcome: Mapping, scenes: int) -> str:
    """Return one line per round: success on the selection scenes, in imagination, and trust."""

    def show(value: float | None) -> str:
        return f"{100 * value:9.1f}%" if value is not None else f"{'-':>10}"

    lines = [f"{'round':6}{'real':>10}{'imagined':>10}{'agreement':>11}{'false':>10}{'fresh':>10}"]
    rounds = [{"round": 0}, *outcome["rounds"]]
    for facts, rate in zip(rounds, outcome["success"], strict=True):
        trust = facts.get("trust", {})
        cells = (rate, facts.get("imagined_success"), trust.get("agreement"))
        fresh = outcome["report"].get(facts["round"])
        lines.append(
            f"{facts['round']:<6}{show(cells[0])}{show(cells[1])} {show(cells[2])}"
            f"{show(trust.get('false_success'))}{show(fresh)}"
        )
    lines.append(
        f"real: ground truth, {scenes} scenes, on which the best round is chosen; fresh: as many "
        "others.\nagreement, false: success in imagination against the replay of the same actions, "
        "after the\nround's fine-tuning; false is the share of imagined successes."
    )
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's values."""
    parser = Parser("recipes.coevolve", __doc__)
    add = parser.add_argument
    add("--config", default="configs/grpo.py", help="preset of every run")
    add("--out", required=True, help="folder for all rounds; goes on where it was")
    add("--data", nargs="+", required=True, help="recordings the world model was made from")
    add("--rounds", type="count", default=3, help="at most")
    add("--patience", type="count", default=1, help="rounds in a row that need not beat the best")
    add("--iterations", type="count", help="of RL per round; default: the preset's")
    add("--interval", type="count", default=4, help="iterations between evaluations")
    add("--real_episodes", type="count", default=200, help="recorded per round")
    add("--real_data", nargs="+", default=[], help="use these recordings instead, one per round")
    add("--world_model_steps", type="count", default=1500, help="fine-tuning per round")
    add("--world_model_lr", type="positive", default=5e-4, help="highest learning rate of it")
    add("--world_model_batch", type="count", default=6, help="its windows per step")
    add("--world_model_dropout", type="dropout", default=0.0, help="of its conditions")
    add(
        "--few_steps",
        action="store_true",
        help="fine-tune on the timesteps of world_model.steps alone, for one that was made so",
    )
    add("--imagined_episodes", type="natural", default=800, help="for the classifier, per round")
    add("--reward_steps", type="count", default=2000, help="of the classifier per round")
    add("--scenes", type="count", default=512, help="per ground-truth evaluation")
    add("--cores", type="count", help="default: up to 2")
    parser.add_seed("every training and recording")
    add("--set", nargs="+", default=[], metavar="SECTION.FIELD=VALUE", help="for every run")
    args = parser.parse_args(argv)
    if wrong := [entry for entry in args.set if "=" not in entry]:
        parser.error(f"--set: expected SECTION.FIELD=VALUE, got {wrong}")
    if missing := [f for f in (*args.data, *args.real_data) if not Path(f).is_dir()]:
        parser.error(f"--data, --real_data: expected folders of recordings; {missing} are none")
    return args


def options_of(args: argparse.Namespace) -> tuple[Models, Options]:
    """Return the models of the first round and the settings of every round."""
    settings = dict(entry.split("=", 1) for entry in args.set)
    if settings.get("world"):  # stages run elsewhere
        settings["world"] = hub.absolute(settings["world"])

    def value(name: str) -> str:
        return str(commands.value_of(args.config, settings, name))

    start = Models(
        policy=value("policy.checkpoint"),
        world_model=value("world_model.checkpoint"),
        reward=value("reward.checkpoint"),
        pose_model=value("env.pose_model"),
        data=tuple(str(Path(folder).absolute()) for folder in args.data),
    )
    options = Options(
        config=args.config,
        settings=settings,
        rounds=args.rounds,
        patience=args.patience,
        iterations=args.iterations,
        interval=args.interval,
        real_episodes=args.real_episodes,
        real_data=tuple(str(Path(folder).absolute()) for folder in args.real_data),
        world_model_steps=args.world_model_steps,
        world_model_lr=args.world_model_lr,
        world_model_batch=args.world_model_batch,
        world_model_dropout=args.world_model_dropout,
        few_steps=args.few_steps,
        imagined_episodes=args.imagined_episodes,
        reward_steps=args.reward_steps,
        scenes=args.scenes,
        seed=args.seed,
        ground_truth=value("eval.ground_truth") != "none",
    )
    return start, options


def main() -> None:
    """Command line; the last line is for programs."""
    args = parse(sys.argv[1:])
    logging.set_verbosity(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running stages as well
    start, options = options_of(args)
    from evac_jax.tools.recipes import given_data  # and PyTorch, for which --help need not wait

    given_data.check(
        ROOT / Path(start.world_model).expanduser(),
        (*start.data, *options.real_data),
        more_of_miniature=options.ground_truth and not options.real_data,
    )
    workshop = Workshop(args.out, args.cores)
    outcome = coevolve(workshop, start, options)
    facts = cards.card(**outcome, hours=workshop.clock() / 3600)
    cards.write_json(workshop.work / "coevolution.json", facts)
    best, told = outcome["best"], outcome["report"] or dict(enumerate(outcome["success"]))
    report.show(table(outcome, options.scenes))
    first = math.nan if told[0] is None else told[0]
    report.show(
        f"real_success_start={first:.3f} real_success_round_1={told.get(1, math.nan):.3f} "
        f"real_success_best={told[best]:.3f} round_best={best}"
    )


if __name__ == "__main__":
    run_tool(main)
