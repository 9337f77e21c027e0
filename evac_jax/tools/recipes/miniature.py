"""Makes all shipped weights of the miniature from scratch, with public commands only.

    python -m evac_jax.tools.recipes.miniature            # all stages, weights in data/miniature
    python -m evac_jax.tools.recipes.miniature --ship     # the same, then replace the shipped ones
    python -m evac_jax.tools.recipes.miniature --verify   # are the shipped files those of the card?

The table below is the recipe. Two stages run at a time, on one core each, or one on both. Finished
stages are skipped (see `stages`), so an interrupted build continues. docs/miniature.md explains why
each stage is needed; the card of a build has the time of each.
"""

from pathlib import Path

from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.config.world import PARTS
from evac_jax.tools.command_line import run_tool
from evac_jax.tools.recipes import commands
from evac_jax.tools.recipes.shipping import Recipe, run, scaled
from evac_jax.tools.recipes.stages import WORK, Stage

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
MAX_BYTES = 12_000_000
RECORDINGS = ("base", "rollouts_expert", "rollouts_start")


def make_stages(scale: float = 1.0) -> list[Stage]:
    """Return the recipe: stages, ordered so that every input is made before its use.

    A stage has the name of the folder under `{work}` that it makes. It reads the folders of its
    inputs.
    """
    n = scaled(COUNTS, scale, FLOORS)
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
    command = commands.on_both_cores((*command, "--few_steps"))
    inputs = ("autoencoder", *RECORDINGS)
    add("world_model_full", command, *inputs, cores=2, resumes=True)
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
    command = commands.train(CONFIG, WORK, "rl", settings, interval=4)
    add("rl", command, *inputs, cores=2, resumes=True)
    add("adapter", (*commands.export(at("rl"), at("adapter")), "--adapter"), "rl")
    add("policy_trained", commands.store(at("adapter"), at("policy_trained"), "float16"), "adapter")


def recipe() -> Recipe:
    """Return the recipe of the miniature."""
    return Recipe(
        name="recipes.miniature",
        doc=__doc__,
        make_stages=make_stages,
        work=Path("data/miniature"),
        weights=Path(MINIATURE_WEIGHTS),
        shipped=SHIPPED,
        max_bytes=MAX_BYTES,
    )


def main() -> None:
    """Command line."""
    run(recipe())


if __name__ == "__main__":
    run_tool(main)
