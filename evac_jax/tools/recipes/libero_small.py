"""Makes all weights of the small LIBERO from scratch, with public commands only.

    python -m evac_jax.tools.recipes.libero_small --list             # the commands, one per stage
    python -m evac_jax.tools.recipes.libero_small --until gate       # a part of them
    python -m evac_jax.tools.recipes.libero_small --ship             # all, then the shipped weights
    python -m evac_jax.tools.recipes.libero_small --pixels 128 --work DIR       # larger, on a GPU

It needs `make libero`, and hours. Two stages run at a time, on one core each, or one on both.
Finished stages are skipped, so an interrupted build continues; recordings are made in pieces and
long trainings go on in their middle. docs/libero_small.md explains the stages.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evac_jax.config.schema import LIBERO_SMALL_WEIGHTS
from evac_jax.config.world import PARTS
from evac_jax.tools.command_line import LIBERO_PYTHON, run_tool
from evac_jax.tools.recipes import commands
from evac_jax.tools.recipes.shipping import Recipe, run, scaled
from evac_jax.tools.recipes.stages import WORK, Stage

# These counts set the time and the quality of a build. `--scale` multiplies all of them.
COUNTS = {
    # recordings, episodes
    "base": 480,
    "lessons": 240,  # more of the expert, for the second round of the start policy
    "rollouts": 200,  # of the first round's policy, half of them greedy
    "attempts": 480,  # of the start policy, likewise
    "trials": 240,  # of the policy that was trained in the first world, likewise
    # offline training, optimiser steps
    "autoencoder": 6000,
    "gate": 1500,  # of each of its two networks
    "policy": 1500,  # of each of ROUNDS
    "pose_model": 8000,
    "world_model": 7000,
    "world_model_more": 3000,  # in each of the two worlds, with what was recorded for it
    "imagined": 480,  # episodes for the classifiers, at most, of each kind of recording
    "reward": 2000,
    "rl": 36,  # iterations in the first world
    "evaluated": 40,  # episodes of each policy: the held-out states of all tasks
}
# Lower bounds of scaled counts (4 for all others). Of fewer recordings none that is held out would
# show a bowl in the hand, of fewer imagined episodes none would succeed, and after fewer steps a
# classifier that knows nothing cannot be calibrated.
FLOORS = {
    "base": 100,
    "lessons": 20,
    "rollouts": 8,
    "attempts": 8,
    "trials": 8,
    "imagined": 60,
    "reward": 300,
    "evaluated": 2,
}
# Episodes that an interruption may cost; no divisor of the number of starts, so that each player
# gets other starts in every piece.
PIECE = 120
# Bowls between plate and ramekin, in the table's middle, on the cookie box and on the stove.
TASKS = (0, 2, 3, 7)
# Start ids, one of each task for every state. 0..199 are all of the benchmark's own states: for
# reports, and used nowhere here. 200..359 serve for training; 360..399 are held out of it, for
# choices.
FIRST, HELD_OUT, END = 200, 360, 400
MIX = "expert=0.3,noisy=0.3,near_miss=0.2,sloppy=0.08,midway=0.08,random=0.04"
CONFIG = "configs/grpo.py"
PRESET = f"{CONFIG}:libero_small"
SIZES = {64: "libero_small", 128: "libero_128"}  # by the side of the pictures
HORIZON = 48  # decisions of an episode
# How LIBERO is shown and played; it departs from the official protocol (docs/libero.md).
LIBERO = {
    "libero.python": LIBERO_PYTHON,
    "libero.tasks": ",".join(map(str, TASKS)),
    "libero.extra_states": True,
    "libero.image_size": 64,
    "libero.crop": "0.03,0.99,0.06,0.86",
    "libero.oversample": 3,
    "libero.reflections": False,
    "libero.action_repeat": 2,
    "libero.max_steps": HORIZON,
    "eval.ground_truth": "libero",
    "eval.ground_truth_envs": 1,  # a process of 1.9 GB for each
}
UNNORM_KEY = "libero_small"
# Policies are taught with wide targets, hence the temperature; see recipes.miniature.
POLICY = {
    "policy.unnorm_key": UNNORM_KEY,
    "policy.max_prompt_length": 32,
    "policy.temperature": 0.5,
}
SUPERVISED = {
    "unnorm_key": UNNORM_KEY,
    "batch": 32,
    "lr": 1e-3,
    "sd_bins": 6,
    "goal_weight": 1,
}
# A noisy player's actions answer pushes within a chunk, which no policy can foresee: a round of
# 240 such episodes succeeded in none of 40.
BY_EXPERT = ("--sources", "expert", "--successful")
ROUNDS = 2  # of supervised training; the last policy that does not succeed too often is taken
ENOUGH, TOO_MUCH = 0.15, 0.5
DDIM_STEPS = 1  # as good as two in a trial with base_scale 1, at half the cost
# How runs imagine and judge, as classifiers are calibrated for.
IMAGINED = {
    "world_model.steps": DDIM_STEPS,
    "world_model.eta": 0.0,
    "reward.success_frames": 2,
    "reward.judged_frames": 2,
    "reward.threshold": 0.5,
}
# Unmoved, and with 10 % of false claims allowed, it missed 74 % of the successes.
CLASSIFIER = {"width": 16, "shift": 3, "false_success": 0.15}
MARGIN = ("--margin", "3", "2")  # contact with the plate cannot be seen to the frame
WORLD_MODEL = {
    "batch": 4,
    "lr": 1e-3,
    "dropout": 0,
    "ddim_steps": DDIM_STEPS,
    "rollout_chunks": 6,
    "save_every": 1000,
    "cache": f"{WORK}/latents",
}
# In float32: without AVX-512 for bfloat16, `--dtype bfloat16` takes seven times as long.
AUTOENCODER = {
    "batch": 16,
    "lr": 1.5e-3,
    "foreground": 2,
    "object_weight": 8,
    "square_error": 5,
}

# Folder of the shipped weights -> folder under `{work}` that it is a copy of.
SHIPPED = {
    **{part: f"world/{part}" for part in (*PARTS, "starts")},
    "reward_second": "reward_second",
}
MAX_BYTES = 40_000_000

Add = Callable[..., None]


def make_stages(scale: float = 1.0, pixels: int = 64) -> list[Stage]:
    """Return the recipe: stages, ordered so that every input is made before its use.

    A stage has the name of the folder under `{work}` that it makes. It reads the folders of its
    inputs.
    """
    n = scaled(COUNTS, scale, FLOORS)
    libero = LIBERO | {"libero.image_size": pixels}
    stages: list[Stage] = []

    def add(name: str, command: Sequence[str], *inputs: str, cores=1, resumes=False) -> None:
        stages.append(Stage(name, tuple(command), inputs, name, cores, resumes))

    base = add_recordings(add, "base", n["base"], MIX, libero)
    command = commands.tool("world_model.train_autoencoder", data=at(*base), sizes=SIZES[pixels])
    command += commands.options(out=at("autoencoder")[0], steps=n["autoencoder"], **AUTOENCODER)
    add("autoencoder", command, *base, resumes=True)
    command = commands.tool("world_model.gate", data=at(*base), autoencoder=at("autoencoder")[0])
    command += commands.options(out=at("gate")[0], steps=n["gate"])
    add("gate", command, "autoencoder", *base)
    # A smoke test's policies succeed never, and its build should go on.
    between = (ENOUGH, TOO_MUCH) if scale == 1 else (0, 1)
    add_start_policy(add, n, base, between, libero, SIZES[pixels])
    rollouts = add_recordings(
        add, "rollouts", n["rollouts"], both_ways("policy_1"), libero, "policy_1"
    )
    attempts = add_recordings(add, "attempts", n["attempts"], both_ways("policy"), libero, "policy")
    data = {"base": base, "rollouts": rollouts}
    early = [*base, *rollouts]
    begin = {"autoencoder": at("autoencoder")[0], "sizes": SIZES[pixels]}
    add_world_model(add, "world_model_full", begin, "autoencoder", early, n["world_model"])
    data |= {"attempts": attempts}
    add_world(add, n, "_1", data, "world_model_full")
    add_trial(add, n)
    data |= {
        "trials": add_recordings(add, "trials", n["trials"], both_ways("tried"), libero, "tried")
    }
    add_world(add, n, "", data, "world_model_tuned_1", second="reward_second")
    return stages


def at(*names: str) -> list[str]:
    """Return the folders of stages' outputs as command lines name them."""
    return [f"{WORK}/{name}" for name in names]


def add_recordings(
    add: Add, name: str, episodes: int, mix: str, libero: Mapping[str, object], *inputs: str
) -> list[str]:
    """Add a recording in pieces; return their names.

    A piece's seed is its number, so it begins with the starts behind those of the last one.
    """
    names = []
    low, high = starts_of(episodes)
    settings = {**libero, "env.train_starts": f"({low},{high})", **(POLICY if inputs else {})}
    for piece, begin in enumerate(range(0, episodes, PIECE)):
        names.append(f"{name}_{piece:02d}")
        count, out = min(PIECE, episodes - begin), at(names[-1])[0]
        command = commands.record_libero(CONFIG, settings, out, mix, count, seed=piece)
        add(names[-1], command, *inputs)
    return names


def starts_of(episodes: int) -> tuple[int, int]:
    """Return the range of start ids of a recording; of few episodes too a sixth is held out."""
    tasks = len(TASKS)
    states = min(max(episodes // tasks, 2), (END - FIRST) // tasks)
    held_out = max(states * (END - HELD_OUT) // (END - FIRST), 1)
    return HELD_OUT - tasks * (states - held_out), HELD_OUT + tasks * held_out


def add_start_policy(
    add: Add,
    n: Mapping[str, int],
    base: Sequence[str],
    between: tuple[float, float],
    libero: Mapping[str, object],
    sizes: str,
) -> None:
    """Supervised training in rounds, each evaluated on held-out states; one policy is chosen."""
    lessons = add_recordings(add, "lessons", n["lessons"], "expert=1", libero)
    policies = [f"policy_{number}" for number in range(1, ROUNDS + 1)]
    evaluations = [f"success_{number}" for number in range(1, ROUNDS + 1)]
    for number, (policy, evaluation) in enumerate(zip(policies, evaluations, strict=True)):
        before = policies[number - 1 : number]
        data = [*base, *lessons] if before else base
        command = commands.tool("policy.train", data=at(*data), out=at(policy)[0])
        command += commands.options(**({"start": at(*before)[0]} if before else {"sizes": sizes}))
        command += commands.options(seed=number, steps=n["policy"], **SUPERVISED)
        command += (*BY_EXPERT, "--every_step")
        add(policy, command, *data, *before, resumes=True)
        held_out = f"({HELD_OUT},{END})"
        settings = {**libero, **POLICY, "policy.checkpoint": at(policy)[0]}
        settings |= {"env.train_starts": f"({FIRST},{HELD_OUT})", "eval.starts": held_out}
        settings |= {"eval.ground_truth_starts": held_out}
        command = commands.evaluate(CONFIG, WORK, evaluation, settings, n["evaluated"])
        add(evaluation, command, policy)
    command = commands.tool("policy.choose", out=at("policy_start")[0])
    command += ("--between", *map(str, between), "--evaluations", *at(*evaluations[::-1]))
    add("policy_start", command, *evaluations)
    command = commands.store(*at("policy_start", "policy"), "bfloat16")
    add("policy", command, "policy_start")


def both_ways(policy: str) -> str:
    """Return the mix of a policy's recordings: half sampled as in training, half greedy."""
    player = f"policy:{WORK}/{policy}"
    return f"{player}@{POLICY['policy.temperature']}=0.5,{player}@0=0.5"


def add_world_model(
    add: Add,
    name: str,
    begin: Mapping[str, str],
    source: str,
    data: Sequence[str],
    steps: int,
    **changes,
) -> None:
    """A training of the world model, on both cores; `begin` says from where it starts."""
    command = commands.tool("world_model.train", data=at(*data), **begin)
    command += commands.options(out=at(name)[0], steps=steps, **WORLD_MODEL | changes)
    command += ("--few_steps", *["--fit_deltas"] * ("autoencoder" in begin))
    add(name, commands.on_both_cores(command), source, *data, cores=2, resumes=True)


def add_world(
    add: Add,
    n: Mapping[str, int],
    suffix: str,
    kinds: Mapping[str, Sequence[str]],
    before: str,
    second: str = "",
) -> None:
    """A world from all recordings so far; its parts' names end with `suffix`.

    Args:
        kinds: the pieces of each kind of recording.
        before: the world model that goes on.
        second: name of another classifier, of another seed; "" = none.
    """
    data = [piece for pieces in kinds.values() for piece in pieces]
    pose_model, tuned, world_model, reward, trust, world = (
        part + suffix
        for part in ("pose_model", "world_model_tuned", "world_model", "reward", "trust", "world")
    )
    command = commands.tool("world_model.train_pose_model", data=at(*data))
    command += commands.options(out=at(pose_model)[0], steps=n["pose_model"])
    add(pose_model, command, *data)
    begin = {"start": at(before)[0]}
    add_world_model(add, tuned, begin, before, data, n["world_model_more"], lr=5e-4)
    add(world_model, commands.store(*at(tuned, world_model), "float16"), tuned)
    for kind, pieces in kinds.items():
        name = f"imagined_{kind}{suffix}"
        command = commands.imagine(
            CONFIG, simulator(suffix), at(*pieces), at(name)[0], n["imagined"]
        )
        add(name, command, world_model, *pieces)
    for seed, name in enumerate(filter(None, (reward, second))):
        add_classifier(add, n, name, suffix, kinds, seed)
    command = commands.validate(CONFIG, simulator(suffix), at(*data), at(trust)[0])
    add(trust, command, world_model, reward, pose_model, *data)
    # The first pieces begin in every state of every task.
    first = kinds["base"][: -(-(END - FIRST) // PIECE)]
    parts = {part: part + suffix * (part != "policy") for part in PARTS}
    command = commands.tool("world.pack", **{part: at(name)[0] for part, name in parts.items()})
    command += commands.options(
        horizon=HORIZON,
        ground_truth="libero",
        temperature=POLICY["policy.temperature"],
        prompt_length=POLICY["policy.max_prompt_length"],
    )
    command += ("--out", *at(world), "--starts", *at(*first))
    add(world, command, *parts.values(), *first)


def add_classifier(
    add: Add,
    n: Mapping[str, int],
    name: str,
    suffix: str,
    kinds: Mapping[str, Sequence[str]],
    seed: int,
) -> None:
    """A success classifier, on real and imagined episodes."""
    data = [piece for pieces in kinds.values() for piece in pieces]
    imagined = [f"imagined_{kind}{suffix}" for kind in kinds]
    command = commands.train_reward(
        CONFIG, simulator(suffix), at(name)[0], at(*data), at(*imagined), n["reward"]
    )
    add(name, (*command, *commands.options(seed=seed, **CLASSIFIER), *MARGIN), *imagined, *data)


def add_trial(add: Add, n: Mapping[str, int]) -> None:
    """Reinforcement learning in the first world; what it exploits there is recorded in LIBERO."""
    settings = {
        "world": f"{WORK}/world_1",
        "train.iterations": n["rl"],
        "checkpoint.interval": 4,
        "eval.episodes": 0,
        "eval.ground_truth": "none",
    }
    command = commands.train(PRESET, WORK, "trial", settings, interval=n["rl"])
    add("trial", command, "world_1", cores=2, resumes=True)
    add("tried", commands.export(*at("trial", "tried"), best=False), "trial")


def simulator(suffix: str) -> dict[str, object]:
    """Return the settings of runs in the world of that suffix."""
    return {
        **IMAGINED,
        "world_model.checkpoint": f"{WORK}/world_model{suffix}",
        "reward.checkpoint": f"{WORK}/reward{suffix}",
        "env.pose_model": f"{WORK}/pose_model{suffix}",
    }


def recipe() -> Recipe:
    """Return the recipe of the small LIBERO."""
    return Recipe(
        name="recipes.libero_small",
        doc=__doc__,
        make_stages=make_stages,
        work=Path("data/libero_small"),
        weights=Path(LIBERO_SMALL_WEIGHTS),
        shipped=SHIPPED,
        max_bytes=MAX_BYTES,
        scored=("autoencoder", "gate"),
        pixels=tuple(SIZES),
    )


def main() -> None:
    """Command line."""
    run(recipe())


if __name__ == "__main__":
    run_tool(main)
