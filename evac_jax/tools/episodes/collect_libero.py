r"""Records episodes of LIBERO, played by policies or at random; docs/episodes.md is the format.

    python launch.py --mode=collect --config=configs/grpo.py:libero_spatial \
        --config.eval.ground_truth=libero --config.collect.out=DIR --config.collect.mix=policy=1

Called by `evac_jax.tools.episodes.collect`. Start ids are those of the evaluation;
`env.train_starts` says which of them are recorded.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from evac_jax.devices import sharding
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import cards, recordings
from evac_jax.policy_import import check_libero, import_policy
from evac_jax.sim.libero import ACTION_DIM, LiberoEnvConfig, to_libero
from evac_jax.sim.libero_pool import LiberoPool
from evac_jax.starts import noise_seed, range_of
from policies.types import ObsBatch

if TYPE_CHECKING:
    from evac_jax.config.schema import PolicyConfig, TrainConfig

CHUNK = LiberoEnvConfig.chunk  # actions per decision
RANDOM = "random"

# Frames uint8 [B V H W 3], tasks [B] and a seed in, actions as a policy gives them [B K 7] out.
Player = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def play_random(frames: np.ndarray, tasks: np.ndarray, seed: int) -> np.ndarray:
    """Return one direction per chunk: directions drawn anew at every step would cancel out."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (len(frames), 1, ACTION_DIM)).astype(np.float32)
    actions[..., 6] = rng.integers(0, 2, (len(frames), 1))
    return actions.repeat(CHUNK, axis=1)


def policy_player(
    config: "TrainConfig", policy: "PolicyConfig", instructions: Sequence[str]
) -> Player:
    """Return a player that asks the policy as training would, on all of this process's devices.

    Raises:
        CheckpointError: the policy cannot be imported.
        ConfigError: it decides on another number of actions, or belongs to another LIBERO.
    """
    check_libero(dataclasses.replace(config, policy=policy))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    shardings = partial(sharding.leaf_sharding, mesh)
    loaded = import_policy(policy, seed=config.seed, chunk=CHUNK, num_images=1, shardings=shardings)
    if loaded.model.action_spec.chunk != CHUNK or loaded.model.action_spec.dim != ACTION_DIM:
        raise ConfigError(
            f"config.policy.checkpoint: expected {CHUNK} actions of {ACTION_DIM} numbers for "
            f"LIBERO, got {loaded.model.action_spec}"
        )
    prompts = [jnp.asarray(part) for part in loaded.tokenizer.encode(list(instructions))]
    graphdef, state = nnx.split(loaded.model)

    @jax.jit
    def act(state, obs, key):
        model = nnx.merge(graphdef, state)
        return model.sample(
            obs,
            key,
            temperature=policy.temperature or 1.0,
            top_k=policy.top_k,
            greedy=policy.temperature == 0,
        ).actions

    def play(frames: np.ndarray, tasks: np.ndarray, seed: int) -> np.ndarray:
        tokens, mask = (part[tasks] for part in prompts)
        obs = ObsBatch(images=jnp.asarray(frames), prompt_tokens=tokens, prompt_mask=mask)
        return np.asarray(act(state, obs, jax.random.key(seed)))

    return play


def play_batch(
    pool: LiberoPool,
    player: Player,
    starts: np.ndarray,
    *,
    batch: int,
    steps: int,
    gripper: str,
    seed: int,
) -> list[dict[str, np.ndarray]]:
    """Return the episodes from `starts` [n], as `EpisodeWriter.add` takes them.

    An episode ends with the chunk in which it succeeds, or after `steps` actions.

    Args:
        batch: what the player always sees, n or more; the rest is filled up with the first.
        gripper: rule that makes the policy's gripper LIBERO's.
    """
    tasks = pool.suite.locate(starts)[0]
    running = list(range(len(starts)))
    fill = np.concatenate((np.arange(len(starts)), np.zeros(batch - len(starts), int)))
    first, poses = pool.start(running, starts)
    parts = [
        {"frames": [f[None]], "poses": [p[None]], "success": [np.zeros(1, bool)], "actions": []}
        for f, p in zip(first, poses, strict=True)
    ]
    for t in range(0, steps, CHUNK):
        seen = np.stack([part["frames"][-1][-1] for part in parts])
        decided = player(seen[fill], tasks[fill], noise_seed(seed, t))
        moves = to_libero(decided, gripper)[:, : steps - t]
        played = pool.play(running, [moves[env] for env in running], [True] * len(running))
        for env, more in zip(running, played, strict=True):
            parts[env]["actions"].append(moves[env])
            for name in ("frames", "poses", "success"):
                parts[env][name].append(getattr(more, name))
        running = [env for env in running if not parts[env]["success"][-1].any()]
        if not running:
            break
    return [{name: np.concatenate(values) for name, values in part.items()} for part in parts]


def record(
    config: "TrainConfig",
    pool: LiberoPool,
    players: Mapping[str, Callable[[], Player]],
    counts: Sequence[int],
) -> recordings.Episodes:
    """Record `counts` episodes of the players into `config.collect.out`.

    Args:
        players: name -> what makes the player, one after another: policies are large.

    Raises:
        ConfigError: there are no such starts.
        DataError: the folder exists, or the tasks' cameras differ.
    """
    suite, batch = pool.suite, config.eval.ground_truth_envs
    ends = config.env.train_starts
    low, high = range_of("env.train_starts", ends, suite.num_starts, suite.name)
    starts = low + np.arange(sum(counts)) % (high - low)
    size = config.libero.image_size
    pool.start([0], starts[:1])  # the simulator knows where its camera is, nobody else
    with recordings.EpisodeWriter(
        config.collect.out,
        image_shape=(1, size, size, 3),
        instructions=suite.instructions,
        sources=list(players),
        intrinsic=pool.camera[0],
        c2w=pool.camera[1],
        facts=_facts(config),
    ) as writer:
        edges = np.cumsum([0, *counts])
        for source, make in enumerate(players.values()):
            player = make() if counts[source] else None
            for at in range(edges[source], edges[source + 1], batch):
                mine = starts[at : min(at + batch, edges[source + 1])]
                episodes = play_batch(
                    pool,
                    player,
                    mine,
                    batch=batch,
                    steps=config.libero.episode_steps,
                    gripper=config.env.gripper,
                    seed=noise_seed(config.seed, at),
                )
                tasks = suite.locate(mine)[0]
                for episode, task, start in zip(episodes, tasks, mine, strict=True):
                    writer.add(**episode, task=int(task), source=source, start=int(start))
                if not pool.one_camera:
                    raise DataError(
                        f"{suite.name}: its tasks have cameras in several places, a recording has "
                        "one; narrow config.env.train_starts, or set config.libero.camera to "
                        '"reference"'
                    )
    return recordings.load(config.collect.out)


def _facts(config: "TrainConfig") -> dict:
    libero = config.libero
    return cards.card(
        pose="xyz in metres, quaternion xyzw, gripper opening 0..1",
        action="delta_ee_7 in [-1, 1]; gripper -1 opens, +1 closes",
        camera=f"{libero.camera}; frames are turned by 180 degrees, hence mirrored",
        libero=libero.facts(),
        seed=config.seed,
    )


def run(config: "TrainConfig", mix: Mapping[str, tuple[str, float]], counts: Sequence[int]) -> None:
    """Record what `config.collect` asks for.

    Args:
        mix: shown name -> (policy folder, temperature), or ("random", 0).
        counts: episodes of each.
    """
    pool = LiberoPool(config.libero, config.eval.ground_truth_envs)
    try:
        players: dict[str, Callable[[], Player]] = {}
        for name, (folder, temperature) in mix.items():
            if folder == RANDOM:
                players[name] = lambda: play_random
                continue
            own = folder == config.policy.checkpoint
            policy = dataclasses.replace(
                config.policy,
                checkpoint=folder,
                temperature=temperature,
                lora_adapter=config.policy.lora_adapter if own else "",
            )
            players[name] = partial(policy_player, config, policy, pool.suite.instructions)
        data = record(config, pool, players, counts)
    finally:
        pool.close()
    logging.info("success by source: %s", data.card["success_once"])
