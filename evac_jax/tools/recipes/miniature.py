"""Makes all shipped weights of the miniature from scratch, with public commands only.

    python -m evac_jax.tools.recipes.miniature            # all stages, weights in data/miniature
    python -m evac_jax.tools.recipes.miniature --ship     # the same, then replace the shipped ones
    python -m evac_jax.tools.recipes.miniature --verify   # are the shipped files those of the card?

The table below is the recipe. Two stages run at a time, on one core each, or one on both. Finished
stages are skipped (see `stages`), so an interrupted build continues. docs/miniature.md explains why
each stage is needed; the card of a build has the time of each.
"""

import argparse
import os
import platform
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from absl import logging

from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.config.world import CARD_FILE, PARTS
from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.files import cards
from evac_jax.files.atomic import whole_folder
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.recipes import commands
from evac_jax.tools.recipes.stages import WORK, Stage, Workshop

# These counts set the time and the quality of a build. `--scale` multiplies all of them.
COUNTS = {
    # recordings, episodes
    "base": 3000,
    "rollouts": 800,  # of each policy, half of them greedy
    # offline training, optimiser steps
    "autoencoder": 3000,
    "pose_model": 8000,
    "pretraining": 4000,
    "expert": 4000,
    "sloppy": 1000,
    "world_model": 7000,
    "imagined": 800,  # episodes for the classifiers, twice
    "reward": 2400,
    # reinforcement learning, iterations
    "rl": 8,
}
# Lower bounds of scaled counts (4 for all others); pretraining has 100 warm-up steps.
FLOORS = {"rl": 1, "base": 48, "rollouts": 16, "pretraining": 110}
MIX = "expert=0.12,noisy=0.18,near_miss=0.30,random_midway=0.14,random=0.06,sloppy=0.20"
CONFIG = "configs/grpo.py"
# Two processes with 4 windows each: for the same time, many small steps lower the held-out loss far
# more than few large ones. The model is only sampled in two steps and without dropped conditions,
# so only that is trained.
WORLD_MODEL = {
    "batch": 4,
    "lr": 1e-3,
    "dropout": 0,
    "ddim_steps": 2,
    "save_every": 1000,
    "cache": f"{WORK}/latents",
}

# What no part of the world tells. The policy was taught with wide targets, hence the temperature.
WORLD = {
    "starts": "miniature",
    "train_starts": "0,1000000",
    "eval_starts": "1000000,2000000",
    "ground_truth": "miniature",
    "horizon": 32,
    "temperature": 0.5,
    "prompt_length": 28,
}

# Folder of the shipped weights -> folder under `{work}` that it is a copy of.
SHIPPED = {
    "world_model": "world_model",
    "reward": "reward",
    "reward_second": "reward_second",
    "pose_model": "pose_model",
    "policy": "policy",
    "policy_trained": "policy_trained",
}
KEPT = (".json", ".safetensors")  # files to copy from such a folder; the rest is progress
MAX_BYTES = 12_000_000
CARD = "card.json"
RECORDINGS = ("base", "rollouts_expert", "rollouts_start")


def scaled(scale: float) -> dict[str, int]:
    """Return `COUNTS` times `scale`, each at least its lower bound.

    Raises:
        ConfigError: the scale is not in (0, 1].
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale: expected above 0 and at most 1, got {scale}")
    return {name: max(round(n * scale), FLOORS.get(name, 4)) for name, n in COUNTS.items()}


def make_stages(scale: float = 1.0) -> list[Stage]:
    """Return the recipe: stages, ordered so that every input is made before its use.

    A stage has the name of the folder under `{work}` that it makes. It reads the folders of its
    inputs.
    """
    n = scaled(scale)
    stages: list[Stage] = []

    def add(name: str, command: tuple[str, ...], *inputs: str, cores=1, resumes=False) -> None:
        stages.append(Stage(name, command, inputs, name, cores, resumes))

    add("base", commands.record(at("base"), MIX, n["base"], seed=0))
    # This runs on the other core at the same time: supervised training draws its own scenes.
    supervised = {"batch": 16, "sd_bins": 6, "score_every": 1500}
    add(
        "policy_expert",
        commands.tool("policy.train", out=at("policy_expert"), labels="expert", lr=1e-3)
        + commands.options(pretrain_steps=n["pretraining"], steps=n["expert"], **supervised),
    )
    add(
        "policy_sloppy",
        commands.tool("policy.train", out=at("policy_sloppy"), start=at("policy_expert"))
        + commands.options(labels="sloppy", steps=n["sloppy"], lr=3e-4, seed=1, **supervised),
        "policy_expert",
    )
    # Half the bytes; all later stages use the weights that are shipped.
    add("policy", commands.store(at("policy_sloppy"), at("policy"), "bfloat16"), "policy_sloppy")
    add(
        "autoencoder",
        commands.tool("world_model.train_autoencoder", data=[at("base")], out=at("autoencoder"))
        + commands.options(steps=n["autoencoder"], batch=12, lr=1.5e-3),
        "base",
        resumes=True,
    )
    # A world model that has not seen a policy's mistakes imagines that they succeed.
    for seed, (name, policy) in enumerate((("expert", "policy_expert"), ("start", "policy")), 1):
        out = f"rollouts_{name}"
        command = commands.record_policy(CONFIG, {}, at(policy), at(out), n["rollouts"], seed)
        add(out, command, policy)
    recordings = [at(name) for name in RECORDINGS]
    # A pose model also cannot predict the motion for actions that it has not seen.
    command = commands.tool("world_model.train_pose_model", data=recordings, out=at("pose_model"))
    add("pose_model", (*command, *commands.options(steps=n["pose_model"])), *RECORDINGS)
    command = commands.tool("world_model.train", data=recordings, out=at("world_model_full"))
    command += commands.options(
        autoencoder=at("autoencoder"), steps=n["world_model"], **WORLD_MODEL
    )
    both = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    inputs = ("autoencoder", *RECORDINGS)
    add("world_model_full", (*both, *command, "--few_steps"), *inputs, cores=2, resumes=True)
    command = commands.store(at("world_model_full"), at("world_model"), "float16")
    add("world_model", command, "world_model_full")
    add_classifiers(add, n)
    add_trained_policy(add, n)
    command = commands.validate(CONFIG, SIMULATOR, recordings, at("trust"))
    add("trust", command, "world_model", "reward", "pose_model", *RECORDINGS)
    folders = {part: at(part) for part in PARTS}
    add("world", commands.tool("world.pack", **folders, **WORLD, out=at("world")), *PARTS)
    return stages


def at(name: str) -> str:
    """Return the folder of a stage's output as command lines name it."""
    return f"{WORK}/{name}"


# Fields of the configuration that name the weights of the simulator.
SIMULATOR = {
    "world_model.checkpoint": f"{WORK}/world_model",
    "reward.checkpoint": f"{WORK}/reward",
    "env.pose_model": f"{WORK}/pose_model",
}


def add_classifiers(add, n) -> None:
    """Two classifiers of different seeds, on real and imagined episodes; two stages at a time."""
    imagined = {"imagined_base": RECORDINGS[:1], "imagined_rollouts": RECORDINGS[1:]}
    for name, data in imagined.items():
        sources = [at(source) for source in data]
        command = commands.imagine(CONFIG, SIMULATOR, sources, at(name), n["imagined"])
        add(name, command, "world_model", *data)
    recordings, dreams = [at(name) for name in RECORDINGS], [at(name) for name in imagined]
    for seed, name in enumerate(("reward", "reward_second")):
        command = commands.train_reward(CONFIG, {}, at(name), recordings, dreams, n["reward"])
        add(name, (*command, *commands.options(seed=seed)), *imagined, *RECORDINGS)


def add_trained_policy(add, n) -> None:
    """Reinforcement learning in imagination; its best evaluation becomes a policy folder."""
    settings = SIMULATOR | {
        "policy.checkpoint": at("policy"),
        # Adapters take 2 % of the policy's bytes and learn as well at this learning rate.
        "policy.lora_rank": 2,
        "optim.lr": 2e-3,
        "train.iterations": n["rl"],
        "eval.episodes": 0,
    }
    inputs = ("policy", "world_model", "reward", "pose_model")
    add("rl", commands.train(CONFIG, WORK, "rl", settings, interval=4), *inputs, cores=2)
    add("adapter", (*commands.export(at("rl"), at("adapter")), "--adapter"), "rl")
    add("policy_trained", commands.store(at("adapter"), at("policy_trained"), "float16"), "adapter")


def machine() -> dict[str, object]:
    """Return a description of the machine of the build."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
    }


def digests(weights: Path) -> dict[str, str]:
    """Return {path: sha256} of every file of a weight folder, except for its card."""
    files = sorted(path for path in weights.rglob("*") if path.is_file())
    names = {str(path.relative_to(weights)): path for path in files}
    return {name: cards.sha256(path) for name, path in names.items() if name != CARD}


def verify(weights: Path) -> list[str]:
    """Return the differences between the files and their card, [] if there are none.

    Raises:
        CheckpointError: there is no card.
    """
    card = cards.read(weights)
    if "files" not in card:
        raise CheckpointError(f"{weights / CARD}: missing, or not a card of recipes.miniature")
    stated, found = card["files"], digests(weights)
    problems = [f"{name}: missing" for name in stated if name not in found]
    problems += [f"{name}: not in the card" for name in found if name not in stated]
    return problems + [
        f"{name}: changed" for name in stated if name in found and stated[name] != found[name]
    ]


def assemble(workshop: Workshop, stages: list[Stage], out: Path) -> dict:
    """Copy the shipped folders into the new folder `out` with their card; return the card.

    Raises:
        ConfigError: the folders together are too large to be shipped.
    """
    with whole_folder(out, replace=True) as partial:
        sizes = _copy_shipped(workshop.work, partial)
        shutil.copy2(workshop.work / "world" / CARD_FILE, partial)  # parts lie beside it alike
        facts = cards.card(
            machine=machine(),
            hours=round(workshop.clock() / 3600, 3),
            stages=[stage_facts(workshop, stage) for stage in stages],
            bytes=sizes,
            scores={name: scores(cards.read(partial / name)) for name in SHIPPED},
            trust=commands.trust_figures(workshop.work / "trust"),
            files=digests(partial),
        )
        cards.write_json(partial / CARD, facts)
    return facts


def _copy_shipped(work: Path, out: Path) -> dict[str, int]:
    """Copy the shipped files into the new folder `out`; return the bytes of each part."""
    for name, source in SHIPPED.items():
        (out / name).mkdir(parents=True)
        for file in sorted((work / source).iterdir()):
            if file.is_file() and file.suffix in KEPT:
                shutil.copy2(file, out / name)
    sizes = {name: sum(file.stat().st_size for file in (out / name).iterdir()) for name in SHIPPED}
    if sum(sizes.values()) > MAX_BYTES:
        raise ConfigError(
            f"the weights take {sum(sizes.values())} bytes, at most {MAX_BYTES} may be shipped: "
            f"{sizes}; see SHIPPED here and miniature/sizes.py"
        )
    return sizes


def stage_facts(workshop: Workshop, stage: Stage) -> dict:
    """Return a stage's line of the card."""
    return {
        "name": stage.name,
        "seconds": round(workshop.record(stage.name)["seconds"], 1),
        "command": stage.shown,
    }


def scores(card: Mapping) -> object:
    """Return the quality figures in a tool's own card: its scores, or the end of its history."""
    return card.get("scores") or (card.get("history") or [None])[-1]


def ship(built: Path, target: Path) -> None:
    """Replace `target` by `built`; if the copy is interrupted, the old weights remain complete."""
    with whole_folder(target, replace=True) as new:
        shutil.copytree(built, new)


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the command line's values."""
    parser = Parser("recipes.miniature", __doc__)
    parser.add_argument("--work", type=Path, default=Path("data/miniature"), help="all stages")
    parser.add_argument("--out", type=Path, help="weights; default: the folder weights in --work")
    parser.add_argument("--ship", action="store_true", help="replace the shipped weights by them")
    parser.add_argument("--scale", type=float, default=1.0, help="0.01 for a smoke test")
    parser.add_argument("--cores", type=int, help="default: up to 2")
    parser.add_argument("--list", action="store_true", help="show the stages and do nothing")
    parser.add_argument(
        "--verify", action="store_true", help="compare the shipped files with their card instead"
    )
    parser.add_argument("--weights", type=Path, default=Path(MINIATURE_WEIGHTS), help="of --verify")
    args = parser.parse_args(argv)
    if args.ship and args.scale != 1:
        parser.error("--ship: weights of a scaled-down build are no good; leave --scale out")
    return args


def main() -> None:
    """Command line."""
    args = parse(sys.argv[1:])
    logging.set_verbosity(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running stages as well
    if args.verify:
        if problems := verify(args.weights):
            sys.exit("\n".join([f"{args.weights} differs from its card:", *problems]))
        report.show(f"{args.weights}: every file is the one in its card")
        return
    stages = make_stages(args.scale)
    if args.list:
        report.show("\n".join(f"{stage.name}: {stage.shown}" for stage in stages))
        return
    workshop = Workshop(args.work, args.cores)
    workshop.run(stages)
    out = (args.out or workshop.work / "weights").absolute()
    facts = assemble(workshop, stages, out)
    if args.ship:
        ship(out, Path(MINIATURE_WEIGHTS))
    slowest = sorted(facts["stages"], key=lambda stage: -stage["seconds"])
    report.show("\n".join(f"{s['seconds'] / 60:8.1f} min  {s['name']}" for s in slowest))
    report.show(f"hours={facts['hours']:.2f} bytes={sum(facts['bytes'].values())} weights={out}")


if __name__ == "__main__":
    run_tool(main)
