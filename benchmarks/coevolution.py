"""Measures whether co-evolution improves a poor simulator: two rounds against one of plain RL.

Both start with the shipped start policy in the same simulator. This simulator is made from a third
as many recordings as the shipped one, and none of them is by a policy that can do the tasks. The
first round is the plain RL. Co-evolution then records episodes with its policy, fine-tunes world
model and classifier on them, and trains a second round in the result. --long adds plain RL of two
rounds' length in the first simulator, to show the effect of longer training alone.

    python -m benchmarks.coevolution --build data/miniature --work data/coevolution

--build is the folder of `make miniature`; its autoencoder is used. Real success is greedy, in the
ground truth, on scenes on which nothing was chosen. Finished stages are kept under --work.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from absl import logging

from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.errors import EvacJaxError
from evac_jax.telemetry import report
from evac_jax.tools.recipes import commands, miniature
from evac_jax.tools.recipes.stages import WORK, Stage, Workshop

CONFIG = miniature.CONFIG
POLICY = f"{MINIATURE_WEIGHTS}/policy"
SIMULATED = miniature.SIMULATOR | {"policy.checkpoint": POLICY}
EPISODES = {"base": miniature.COUNTS["base"] // 3, "rollouts": 800 // 3}
STEPS = {"pose_model": 4000, "world_model": 2500, "reward": 1500}
IMAGINED, FINE_TUNING, ITERATIONS, SCENES = 1200, 1000, 8, 512
SEED = 100  # of the recordings; their scenes differ from those of the shipped weights


def make_stages(build: Path) -> list[Stage]:
    """Return the recipe of the poor simulator, a small version of `recipes.miniature`."""
    at, stages = miniature.at, []

    def add(name: str, command: tuple[str, ...], *inputs: str, cores=1, resumes=False) -> None:
        stages.append(Stage(name, command, inputs, name, cores, resumes))

    recordings = [at("base"), at("rollouts")]
    add("base", commands.record(at("base"), miniature.MIX, EPISODES["base"], SEED))
    more = commands.record_policy(
        CONFIG, {}, POLICY, at("rollouts"), EPISODES["rollouts"], SEED + 1
    )
    add("rollouts", more)
    command = commands.tool("world_model.train_pose_model", data=recordings, out=at("pose_model"))
    add("pose_model", (*command, "--steps", str(STEPS["pose_model"])), "base", "rollouts")
    command = commands.tool("world_model.train", data=recordings, out=at("world_model"))
    settings = {"autoencoder": build / "autoencoder", "steps": STEPS["world_model"]}
    command += commands.options(**miniature.WORLD_MODEL, **settings)
    command = commands.on_both_cores((*command, "--few_steps"))
    inputs = ("base", "rollouts")
    add("world_model", command, *inputs, cores=2, resumes=True)
    simulator = miniature.SIMULATOR
    dream = commands.imagine(CONFIG, simulator, recordings, at("imagined"), IMAGINED)
    add("imagined", dream, "world_model")
    reward = [at("imagined")]
    command = commands.train_reward(CONFIG, {}, at("reward"), recordings, reward, STEPS["reward"])
    add("reward", command, "imagined")
    return stages


def coevolve(work: Path) -> None:
    """Run two rounds; what is finished is kept."""
    settings = {name: str(path).replace(WORK, str(work)) for name, path in SIMULATED.items()}
    command = [
        "-m",
        "evac_jax.tools.recipes.coevolve",
        f"--config={CONFIG}",
        "--out",
        work / "rounds",
    ]
    command += ["--data", work / "base", work / "rollouts", "--rounds", 2, "--few_steps"]
    command += ["--patience", 2]  # the second round may improve a first round without success
    command += ["--iterations", ITERATIONS, "--world_model_steps", FINE_TUNING]
    command += ["--imagined_episodes", IMAGINED, "--reward_steps", STEPS["reward"]]
    command += ["--scenes", SCENES, "--set", *(f"{k}={v}" for k, v in settings.items())]
    subprocess.run([sys.executable, *map(str, command)], check=True)


def longer(stages: list[Stage]) -> list[Stage]:
    """Return the stages of plain RL with the length of both rounds, and of its evaluation."""
    settings = SIMULATED | {"train.iterations": 2 * ITERATIONS}
    inputs = ("pose_model", "world_model", "reward")
    command = commands.train(CONFIG, WORK, "long", settings, 4)
    run = Stage("long", command, inputs, "long", cores=2, resumes=True)
    best = commands.export(f"{WORK}/long", f"{WORK}/long_policy")
    judged = {"policy.checkpoint": f"{WORK}/long_policy", "eval.starts": commands.REPORT}
    command = commands.evaluate(CONFIG, f"{WORK}/success", "long_report", judged, SCENES)
    return [
        *stages,
        run,
        Stage("long_policy", best, ("long",), "long_policy"),
        Stage("long_report", command, ("long_policy",), "success/long_report"),
    ]


def main() -> None:
    """Print the rounds; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("data/miniature"))
    parser.add_argument("--work", type=Path, default=Path("data/coevolution"))
    parser.add_argument("--long", action="store_true", help="plain RL of two rounds' length too")
    args = parser.parse_args()
    logging.set_verbosity(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running stages as well
    work, stages = args.work.absolute(), make_stages(args.build.absolute())
    try:
        workshop = Workshop(work)
        workshop.run(stages)
        coevolve(work)
        if args.long:
            workshop.run(longer(stages))
    except EvacJaxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    told = json.loads((work / "rounds" / "coevolution.json").read_text())
    success = {int(number): rate for number, rate in told["report"].items()}
    best = max(success)
    line = f"start={success[0]:.3f} plain={success[1]:.3f} coevolved={success[best]:.3f}"
    if args.long:
        values = json.loads((work / "success/long_report" / report.EVALUATION_FILE).read_text())
        line += f" plain_long={values['success']['ground_truth']['rate']:.3f}"
    report.show(f"{line} gain={success[best] - success[1]:.3f} round_best={told['best']}")


if __name__ == "__main__":
    main()
