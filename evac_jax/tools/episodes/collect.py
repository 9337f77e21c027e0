r"""Records episodes in the ground truth, played by scripts or policies.

    python -m evac_jax.tools.episodes.collect --out DIR --episodes 2000 --seed 0 \
        --mix noisy=0.3,near_miss=0.4,random=0.1,policy:FOLDER@0.5=0.2
    python launch.py --mode=collect --config=configs/grpo.py --config.collect.out=DIR

The first records the tabletop, the second whatever `eval.ground_truth` names (`collect_libero`).
More than half of the default mixture fails: a world model that has only seen success imagines
success. The recording is a pure function of its arguments.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from evac_jax.config import hub
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import claim, recordings
from evac_jax.miniature import scene as world
from evac_jax.miniature.expert import KINDS, Expert, demonstrate
from evac_jax.miniature.render import camera, render
from evac_jax.miniature.scene import Scenes
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.tools.command_line import Parser, not_negative, refuse_existing, run_tool
from evac_jax.tools.episodes.successes import show_successes

if TYPE_CHECKING:
    from evac_jax.config.schema import PolicyConfig, TrainConfig

DEFAULT_MIX = {
    "noisy": 0.18,
    "near_miss": 0.37,
    "random_midway": 0.17,
    "random": 0.10,
    "sloppy": 0.18,
}
STEPS = 32  # an episode of the miniature: 4 chunks of 8
FIRST_SCENE = 10_000_000  # scene seeds of recordings, above all that RL trains or evaluates on
SCENES_PER_SEED = 1_000_000
POLICY = "policy:"
_BATCH = 64  # episodes played at once

# Scenes and a generator in, actions as executed [N T 7] and the T + 1 states out.
Player = Callable[[Scenes, np.random.Generator], tuple[np.ndarray, list[Scenes]]]


def collect(
    out: str | Path,
    num_episodes: int,
    mix: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    steps: int = STEPS,
    image_size: int = 64,
    policy: "PolicyConfig | None" = None,
) -> recordings.Episodes:
    """Record episodes into the new folder `out` and return them.

    Args:
        out: appears only when the recording is complete.
        num_episodes: of all kinds together; shares are rounded to whole episodes.
        mix: player -> share; shares are divided by their sum. A player is a kind of script (see
            `expert.KINDS`) or "policy:FOLDER@T", a policy folder sampled at temperature T (1 if
            left out, 0 = greedy).
        seed: recordings of different seeds share no scene.
        steps: actions per episode.
        image_size: pixels.
        policy: how policies are imported; its adapter is that of its own checkpoint. None = by
            the defaults.

    Raises:
        DataError: the folder exists, or the mixture is not one.
        CheckpointError: a policy cannot be imported.
    """
    out = Path(out)
    mix = dict(DEFAULT_MIX if mix is None else mix)
    if out.exists():
        raise DataError(f"{out} exists; choose another folder or remove it")
    unknown = sorted(k for k in mix if k not in KINDS and not k.startswith(POLICY))
    if unknown:
        raise DataError(f"mix: no such kind {unknown}; there are {KINDS} and {POLICY}FOLDER@T")
    if not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise DataError(f"mix: expected shares that are positive in sum, got {mix}")
    if not 1 <= num_episodes <= SCENES_PER_SEED:
        raise DataError(f"episodes: expected 1..{SCENES_PER_SEED}, got {num_episodes}")

    began = time.perf_counter()
    counts = _counts(mix, num_episodes)
    players = [_player(kind, steps, policy) for kind in counts]
    scene_seeds = FIRST_SCENE + seed * SCENES_PER_SEED + np.arange(num_episodes)
    intrinsic, c2w = camera(image_size)
    facts = {
        "command": "python -m evac_jax.tools.episodes.collect --out DIR "
        f"--episodes {num_episodes} --mix {_shown(mix)} --seed {seed} --steps {steps} "
        f"--image_size {image_size}"
        + (f" --unnorm_key {policy.unnorm_key}" if policy and policy.unnorm_key else ""),
        "pose": "xyz in metres, quaternion xyzw, gripper opening 0..1",
        "action": "delta_ee_7 in [-1, 1]; gripper -1 opens, +1 closes",
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
    }
    with recordings.EpisodeWriter(
        out,
        image_shape=(1, image_size, image_size, 3),
        instructions=INSTRUCTIONS,
        sources=[_named(kind) for kind in counts],
        intrinsic=intrinsic[None],
        c2w=c2w[None],
        facts=facts,
    ) as writer:
        first = 0
        for source, (count, play) in enumerate(zip(counts.values(), players, strict=True)):
            for low in range(first, first + count, _BATCH):
                seeds = scene_seeds[low : min(low + _BATCH, first + count)]
                scenes = world.sample_scenes(seeds)
                actions, states = play(scenes, np.random.default_rng([seed, source, low]))
                _write(writer, scenes, seeds, actions, states, source, image_size)
            first += count
    logging.info("%d episodes in %.0f s", num_episodes, time.perf_counter() - began)
    return recordings.load(out)


def _write(writer, scenes, seeds, actions, states, source: int, image_size: int) -> None:
    frames = np.stack([render(state, image_size) for state in states], 1)[:, :, None]
    poses = np.stack([state.pose for state in states], 1)
    success = np.stack([world.is_success(state) for state in states], 1)
    for n in range(len(scenes)):
        writer.add(
            frames=frames[n],
            actions=actions[n],
            poses=poses[n],
            success=success[n],
            task=int(scenes.task[n]),
            source=source,
            start=int(seeds[n]),
        )


def _player(kind: str, steps: int, policy: "PolicyConfig | None") -> Player:
    if not kind.startswith(POLICY):
        return lambda scenes, rng: demonstrate(scenes, Expert(kind, rng), steps)
    # JAX is only imported when a policy plays.
    from evac_jax.tools.episodes.policy_player import SETTINGS, PolicyPlayer

    player = PolicyPlayer(_asked(kind, policy or SETTINGS))
    return lambda scenes, rng: player.play(scenes, steps, seed=int(rng.integers(2**31)))


def _asked(kind: str, policy: "PolicyConfig") -> "PolicyConfig":
    """Return how "policy:FOLDER@T" is imported and sampled; an adapter belongs to its own base."""
    folder, temperature = _policy(kind)
    adapter = policy.lora_adapter if folder == policy.checkpoint else ""
    return dataclasses.replace(
        policy, checkpoint=folder, temperature=temperature, lora_adapter=adapter
    )


def _policy(kind: str) -> tuple[str, float]:
    folder, at, temperature = kind.removeprefix(POLICY).rpartition("@")
    try:
        return (folder, not_negative(temperature)) if at else (temperature, 1.0)
    except argparse.ArgumentTypeError as error:
        raise DataError(f"mix: expected policy:FOLDER@TEMPERATURE, got {kind!r}") from error


def _named(kind: str) -> str:
    """A policy's folder by its own name: where it lay on the machine is nobody's business."""
    if not kind.startswith(POLICY):
        return kind
    folder, temperature = _policy(kind)
    return f"{POLICY}{Path(hub.address_of(folder)).name}@{temperature:g}"


def _counts(mix: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole episodes per kind, `total` together, each within one of its share."""
    edges = np.rint(np.cumsum(list(mix.values())) / sum(mix.values()) * total).astype(int)
    return dict(zip(mix, np.diff(edges, prepend=0).tolist(), strict=True))


def _shown(mix: Mapping[str, float]) -> str:
    return ",".join(f"{_named(kind)}={share:g}" for kind, share in mix.items())


def parse_mix(text: str) -> dict[str, float]:
    """Return {"noisy": 0.3, ...} for "noisy=0.3,..."."""
    try:
        pairs = [entry.rsplit("=", 1) for entry in text.split(",")]
        return {kind.strip(): not_negative(share) for kind, share in pairs}
    except (ValueError, argparse.ArgumentTypeError) as error:
        told = f"expected kind=share,..., shares of 0 or more, got {text!r}"
        raise argparse.ArgumentTypeError(told) from error


def run(config: "TrainConfig") -> None:
    """Record what `config.collect` asks for; "policy" is the configured policy and temperature.

    Raises:
        ConfigError: no new folder, no mixture, or no ground truth to record in.
        StorageError: the folder cannot be written to.
    """
    wanted = config.collect
    if not wanted.out:
        raise ConfigError("config.collect.out: expected a new folder for the episodes, got nothing")
    out = Path(wanted.out)
    claim.check_writable(out, "set --config.collect.out to a folder that can")
    if os.path.lexists(out):
        raise ConfigError(f"config.collect.out: expected a new folder, got {wanted.out!r}")
    if config.eval.ground_truth == "none":
        raise ConfigError(
            "config.eval.ground_truth: episodes are recorded in a ground truth, got 'none'"
        )
    try:
        mix = parse_mix(wanted.mix)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"config.collect.mix: {error}") from error
    with claim.told_as_storage_error(out):
        _record(config, mix)


def _record(config: "TrainConfig", mix: Mapping[str, float]) -> None:
    from evac_jax.devices.found import check_devices

    own = f"{POLICY}{config.policy.checkpoint}@{config.policy.temperature}"
    mix = {own if kind == "policy" else kind: share for kind, share in mix.items()}
    for kind in mix:
        if kind.startswith(POLICY):
            check_devices(dataclasses.replace(config, policy=_asked(kind, config.policy)), ())
    if config.eval.ground_truth == "libero":
        _run_libero(config, mix)
        return
    if config.eval.ground_truth != "miniature":
        raise ConfigError(
            "config.eval.ground_truth: episodes are recorded in 'miniature' and 'libero', which "
            f"have players; got {config.eval.ground_truth!r}. Record your own by a script of your "
            "own: docs/episodes.md has a writer"
        )
    wanted, steps = config.collect, config.env.max_episode_steps
    data = collect(
        *(wanted.out, wanted.episodes, mix),
        seed=config.seed,
        steps=steps,
        policy=config.policy,
    )
    show_successes(data)


def _run_libero(config: "TrainConfig", mix: Mapping[str, float]) -> None:
    from evac_jax.tools.episodes import collect_libero

    players = collect_libero.PLAYERS
    unknown = [k for k in mix if k not in players and not k.startswith(POLICY)]
    if unknown or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise ConfigError(
            f"config.collect.mix: expected shares of {', '.join(players)}, policy and "
            f"{POLICY}FOLDER@T, which play LIBERO; got {config.collect.mix!r}"
        )
    kinds = {_named(k): _policy(k) if k.startswith(POLICY) else (k, 0.0) for k in mix}
    counts = list(_counts(mix, config.collect.episodes).values())
    collect_libero.run(config, kinds, counts)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("episodes.collect", __doc__)
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--episodes", type="count", default=2000, help="of all players together")
    parser.add_argument(
        "--mix", type=parse_mix, default=_shown(DEFAULT_MIX), help="player=share,..."
    )
    parser.add_seed("scenes and players; recordings of different seeds share no scene")
    parser.add_argument("--steps", type="count", default=STEPS, help="actions of an episode")
    parser.add_image_size(64)
    text = "action statistics of policies whose folders have several"
    parser.add_argument("--unnorm_key", default="", help=text)
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    refuse_existing(args.out)
    policy = None
    if args.unnorm_key:
        from evac_jax.tools.episodes.policy_player import SETTINGS

        policy = dataclasses.replace(SETTINGS, unnorm_key=args.unnorm_key)
    data = collect(
        args.out,
        args.episodes,
        args.mix,
        seed=args.seed,
        steps=args.steps,
        image_size=args.image_size,
        policy=policy,
    )
    show_successes(data)


if __name__ == "__main__":
    run_tool(main)
