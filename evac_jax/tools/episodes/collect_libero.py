r"""Records episodes of LIBERO, played by policies, scripts or at random; docs/episodes.md is the
format.

    python launch.py --mode=collect --config=configs/grpo.py:libero_spatial \
        --config.eval.ground_truth=libero --config.collect.out=DIR --config.collect.mix=policy=1

Called by `evac_jax.tools.episodes.collect`. Start ids are those of the evaluation;
`env.train_starts` says which of them are recorded.
"""  # noqa: D205

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evac_jax.devices import sharding
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import cards, recordings
from evac_jax.policy_import import check_card, check_libero, check_policy, import_policy
from evac_jax.sim.libero import ACTION_DIM, LiberoEnvConfig, to_libero
from evac_jax.sim.libero_bddl import followed, read_problem
from evac_jax.sim.libero_players import KINDS, LiberoPlayer, PickAndPlace, scripted_tasks
from evac_jax.sim.libero_pool import LiberoPool
from evac_jax.sim.libero_tasks import Suite
from evac_jax.starts import noise_seed, range_of
from evac_jax.tools.episodes.successes import show_successes
from policies.openvla_oft.import_hf import read_statistics
from policies.types import ObsBatch

if TYPE_CHECKING:
    from evac_jax.config.schema import PolicyConfig, TrainConfig

CHUNK = LiberoEnvConfig.chunk  # actions per decision
RANDOM = "random"
PLAYERS = (*KINDS, RANDOM)  # that need no policy

# Frames uint8 [B V H W 3], tasks [B] and a seed in, actions as a policy gives them [B K 7] out.
Player = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
# An episode so far, in parts that are joined at its end: frames, poses, success and actions.
Parts = dict[str, list[np.ndarray]]
# Numbers of the episodes that go on, all episodes and the number of actions so far in; the next
# actions [k 7] of those that go on out, as LIBERO takes them; chunks are a multiple of k.
Decide = Callable[[list[int], list[Parts], int], list[np.ndarray]]


class Source(Protocol):
    """Who plays."""

    def begin(self, starts: np.ndarray, seed: int) -> Decide:
        """Return how the episodes from `starts` [n] are played."""
        ...


def play_random(frames: np.ndarray, tasks: np.ndarray, seed: int) -> np.ndarray:
    """Return one direction per chunk: directions drawn anew at every step would cancel out."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (len(frames), 1, ACTION_DIM)).astype(np.float32)
    actions[..., 6] = rng.integers(0, 2, (len(frames), 1))
    return actions.repeat(CHUNK, axis=1)


def check_player(config: "TrainConfig", policy: "PolicyConfig") -> None:
    """Check that a policy can play LIBERO, as far as possible without reading weights.

    Raises:
        CheckpointError: it cannot be imported.
        ConfigError: its actions are others, or belong to another LIBERO.
    """
    check_policy(policy, config.libero.instructions)
    gripper = ("env.gripper", config.env.gripper)
    check_card(policy, gripper=gripper, chunk=("policy.checkpoint", CHUNK))
    check_libero(dataclasses.replace(config, policy=policy))
    if policy.unnorm_key:
        dim = len(read_statistics(policy.checkpoint, policy.unnorm_key)[0].low)
        if dim != ACTION_DIM:
            raise ConfigError(
                f"config.policy.unnorm_key: expected statistics of {ACTION_DIM} numbers, as LIBERO "
                f"is moved by, got {dim} of {policy.unnorm_key!r} in {policy.checkpoint!r}"
            )


def policy_player(
    config: "TrainConfig", policy: "PolicyConfig", instructions: Sequence[str]
) -> Player:
    """Return a player that asks the policy as training would, on all of this process's devices.

    Raises:
        CheckpointError: the policy cannot be imported.
        ConfigError: it decides on another number of actions.
    """
    mesh = sharding.make_mesh(config.mesh.data or 1, config.mesh.fsdp)
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


class AskPolicy:
    """Lets `player` decide a chunk at a time, on the last frames; see `Source`.

    Args:
        batch: what the player always sees; the rest is filled up with the first.
        gripper: rule that makes the policy's gripper LIBERO's.
    """

    def __init__(self, player: Player, suite: Suite, batch: int, gripper: str):
        self._player, self._suite, self._batch, self._gripper = player, suite, batch, gripper

    def begin(self, starts: np.ndarray, seed: int) -> Decide:
        """Return how the episodes from `starts` [n] are played, n <= batch."""
        tasks = self._suite.locate(starts)[0]
        fill = np.concatenate((np.arange(len(tasks)), np.zeros(self._batch - len(tasks), int)))

        def decide(running: list[int], parts: list[Parts], t: int) -> list[np.ndarray]:
            seen = np.stack([part["frames"][-1][-1] for part in parts])
            decided = self._player(seen[fill], tasks[fill], noise_seed(seed, t))
            moves = to_libero(decided, self._gripper)
            return [moves[n] for n in running]

        return decide


class AskScripts:
    """Lets one script per episode decide before every action; see `Source`.

    Args:
        kind: of `libero_players.KINDS`.
        known: task -> what to do in it.
        repeat: how often LIBERO plays each action.
    """

    def __init__(self, kind: str, pool: LiberoPool, known: Mapping[int, PickAndPlace], repeat: int):
        self._kind, self._pool, self._known, self._repeat = kind, pool, known, repeat

    def begin(self, starts: np.ndarray, seed: int) -> Decide:
        """Return how the episodes from `starts` [n] are played."""
        tasks = self._pool.suite.locate(starts)[0]
        rngs = [np.random.default_rng([seed, n]) for n in range(len(starts))]
        players = [
            LiberoPlayer(self._kind, self._known[int(task)], rng, repeat=self._repeat)
            for task, rng in zip(tasks, rngs, strict=True)
        ]

        def decide(running: list[int], parts: list[Parts], t: int) -> list[np.ndarray]:
            moves = []
            for n, places in zip(running, self._pool.look(running), strict=True):
                moves.append(players[n].act(parts[n]["poses"][-1][-1], places)[None])
                parts[n].setdefault("intended", []).append(players[n].intended[None])
            return moves

        return decide


def play_batch(
    pool: LiberoPool, decide: Decide, starts: np.ndarray, *, steps: int
) -> list[dict[str, np.ndarray]]:
    """Return the episodes from `starts` [n], as `EpisodeWriter.add` takes them.

    An episode ends with the chunk in which it succeeds, or after `steps` actions.
    """
    running = list(range(len(starts)))
    first, poses = pool.start(running, starts)
    named = [_objects(pool, task) for task in pool.suite.locate(starts)[0]]
    known = [[name for name in names if name] for names in named]
    parts: list[Parts] = []
    for n, places in enumerate(pool.look(running)):
        here = np.array([places[name][:3] for name in known[n]], np.float32).reshape(1, -1, 3)
        at_first = {"frames": first[n], "poses": poses[n], "success": np.zeros((), bool)}
        parts.append({name: [value[None]] for name, value in at_first.items()})
        parts[-1] |= {"objects": [here], "actions": []}
    t = 0
    while running and t < steps:
        moves = [decided[: steps - t] for decided in decide(running, parts, t)]
        follow = [known[n] for n in running]
        played = pool.play(running, moves, [True] * len(running), follow=follow)
        for env, mine, more in zip(running, moves, played, strict=True):
            parts[env]["actions"].append(mine)
            for name in ("frames", "poses", "success", "objects"):
                parts[env][name].append(getattr(more, name))
        t += len(moves[0])
        if t % CHUNK == 0:
            running = [n for n in running if not np.concatenate(parts[n]["success"]).any()]
    episodes = [{name: np.concatenate(values) for name, values in p.items()} for p in parts]
    for names, episode in zip(named, episodes, strict=True):
        objects = np.full((len(episode["objects"]), len(names), 3), np.nan, np.float32)
        objects[:, [bool(name) for name in names]] = episode["objects"]
        episode["objects"] = objects
    return episodes


def _objects(pool: LiberoPool, task: int) -> tuple[str, str, str]:
    """Return the names of `recordings.OBJECTS` in a task; "" where it has none."""
    suite = pool.suite
    return followed(read_problem(pool.bddl_files / suite.name / f"{suite.tasks[task]}.bddl"))


def record(
    config: "TrainConfig",
    pool: LiberoPool,
    sources: Mapping[str, tuple[Collection[int], Callable[[], Source]]],
    counts: Sequence[int],
) -> recordings.Episodes:
    """Record `counts` episodes of the sources into `config.collect.out`.

    Args:
        sources: name -> the tasks that it can do, and what makes it; one is made after another,
            because policies are large.

    Raises:
        ConfigError: there are no such starts, or a source can play none of them; told before any
            of them plays, as is what follows.
        DataError: the folder exists, or the tasks' cameras differ.
    """
    suite, batch = pool.suite, config.eval.ground_truth_envs
    ends = config.env.train_starts
    low, high = range_of("env.train_starts", ends, suite.num_starts, suite.name)
    order = suite.spread(np.arange(low, high))
    order = np.roll(order, -config.seed * sum(counts))  # the next seed goes on with other starts
    edges, chosen = np.cumsum([0, *counts]), {}
    for number, (name, (tasks, _)) in enumerate(sources.items()):
        if not counts[number]:
            continue
        able = order[np.isin(suite.locate(order)[0], list(tasks))]
        if not len(able):
            raise ConfigError(
                f"config.env.train_starts: {name} can do no task of the starts {low}..{high - 1}; "
                "choose others"
            )
        mine = able[np.arange(edges[number], edges[number + 1]) % len(able)]
        # Task by task: building a scene takes longer than a short episode.
        chosen[number] = mine[np.argsort(suite.locate(mine)[0], kind="stable")]
    _look_at_cameras(config, pool, np.concatenate(list(chosen.values())))
    size = config.libero.image_size
    with recordings.EpisodeWriter(
        config.collect.out,
        image_shape=(1, size, size, 3),
        instructions=suite.instructions,
        sources=list(sources),
        intrinsic=pool.camera[0],
        c2w=pool.camera[1],
        facts=_facts(config),
    ) as writer:
        for number, (_, make) in enumerate(sources.values()):
            if number not in chosen:
                continue
            source = make()
            for at in range(edges[number], edges[number + 1], batch):
                mine = chosen[number][at - edges[number] :][:batch]
                decide = source.begin(mine, noise_seed(config.seed, at))
                episodes = play_batch(pool, decide, mine, steps=config.libero.episode_steps)
                tasks, held_out = suite.locate(mine)[0].tolist(), suite.is_held_out(mine).tolist()
                for episode, task, start, held in zip(episodes, tasks, mine, held_out, strict=True):
                    facts = {"task": task, "start": int(start), "held_out": held}
                    writer.add(**episode, **facts, source=number)
    return recordings.load(config.collect.out)


def _look_at_cameras(config: "TrainConfig", pool: LiberoPool, starts: np.ndarray) -> None:
    """Begin an episode of every task of `starts` [n]: LIBERO alone knows where its camera is.

    Raises:
        DataError: the cameras differ.
    """
    first = starts[np.unique(pool.suite.locate(starts)[0], return_index=True)[1]]
    if config.libero.camera != "true":  # then it is one for all
        first = first[:1]
    for at in range(0, len(first), config.eval.ground_truth_envs):
        some = first[at:][: config.eval.ground_truth_envs]
        pool.start(list(range(len(some))), some)
    if not pool.one_camera:
        raise DataError(
            f"{pool.suite.name}: its tasks have cameras in several places, a recording has one; "
            'narrow config.env.train_starts, or set config.libero.camera to "reference"'
        )


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
        mix: shown name -> (policy folder, temperature), or (one of `PLAYERS`, 0).
        counts: episodes of each.

    Raises:
        CheckpointError: a policy cannot be imported; told before LIBERO starts.
        ConfigError: see `record`.
    """
    policies = {}
    for name, (folder, temperature) in mix.items():
        if name not in PLAYERS:
            own = folder == config.policy.checkpoint
            policies[name] = dataclasses.replace(
                config.policy,
                checkpoint=folder,
                temperature=temperature,
                lora_adapter=config.policy.lora_adapter if own else "",
            )
            check_player(config, policies[name])
    pool, gripper = LiberoPool(config.libero, config.eval.ground_truth_envs), config.env.gripper
    asked = partial(
        AskPolicy, suite=pool.suite, batch=config.eval.ground_truth_envs, gripper=gripper
    )
    try:
        scripts = [name for name in mix if name in KINDS]
        known = scripted_tasks(pool.bddl_files, pool.suite) if scripts else {}
        sources: dict[str, tuple[Collection[int], Callable[[], Source]]] = {}
        every = range(len(pool.suite.tasks))
        for name in mix:
            if name in scripts:
                make = partial(AskScripts, name, pool, known, config.libero.action_repeat)
                sources[name] = known, make
                continue
            if name == RANDOM:
                sources[name] = every, partial(asked, play_random)
                continue
            player = partial(policy_player, config, policies[name], pool.suite.instructions)
            sources[name] = every, lambda player=player: asked(player())
        data = record(config, pool, sources, counts)
    finally:
        pool.close()
    show_successes(data)
