"""Plays episodes: the policy decides on a chunk, the simulator imagines it, and so on.

`play` drives every episode; `collect` records training episodes as a batch, and the `Collector`
decides when and from which starts an iteration's episodes are collected.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from algos.refill import collect_informative
from algos.types import RolloutBatch
from evac_jax import stopping
from evac_jax.bridge.types import IDLE
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import sharding
from evac_jax.errors import SimulatorError, TrainingError
from evac_jax.learner import Learner
from evac_jax.simulators import BatchStep, Simulators
from evac_jax.starts import StartSampler, noise_seed
from evac_jax.telemetry.stopwatch import Stopwatch
from policies.types import ObsBatch, PolicyOutput


@dataclasses.dataclass
class Chunk:
    """One decision for one part of the environments, and its result.

    Attributes:
        part: pipeline stage; `Simulators.rows[part]` names the environments.
        obs: what the policy saw; owns its frames.
        out: what it decided.
        step: the simulator's answer, released when the next chunk is asked for.
        last: whether the episodes end here.
    """

    part: int
    obs: ObsBatch
    out: PolicyOutput
    step: BatchStep
    last: bool


@dataclasses.dataclass(frozen=True)
class Played:
    """Record of n episodes with which they can be played again elsewhere.

    Attributes:
        starts: start ids, int64 [n].
        actions: as the policy gave them, float32 [n T K A]; those after an episode's end as well.
        success: whether the simulator saw a success, bool [n].
    """

    starts: np.ndarray
    actions: np.ndarray
    success: np.ndarray


def play(
    learner: Learner,
    simulators: Simulators,
    starts: np.ndarray,
    *,
    seed: int,
    key: jax.Array,
    evaluation: bool,
    watch: Stopwatch,
) -> Iterator[Chunk]:
    """Yield the chunks of one episode in every environment, T = max_episode_steps / K per part.

    With several parts one of them imagines while the policy decides for another. Draws and noise
    depend on environment and chunk only, so the numbers do not depend on the number of parts.

    Args:
        starts: int64 [B] initial states of this host's environments, `IDLE` where there is none
            to play.
        seed: of the simulator's noise.
        key: of the policy's sampling; folded with the chunk's number.
        evaluation: decide with the evaluation's temperature rather than the training's.
    """
    spec, parts = simulators.spec, range(len(simulators.rows))
    chunks = spec.max_episode_steps // spec.action.chunk
    for part in parts:
        simulators.send_reset(starts[simulators.rows[part]], seed, part)
    decided: list = [None] * len(parts)
    for t, part in itertools.product(range(chunks + 1), parts):
        stopping.place()
        with watch.timed("env"):
            step = simulators.receive()
        for phase, seconds in step.result.seconds.items():
            watch.add(f"env/{phase}", seconds)
        if t:
            yield Chunk(part, *decided[part], step, last=t == chunks)
        if t == chunks:
            step.release()
            continue
        with watch.timed("rollout"):
            obs = learner.observe(step)
            draw = jax.random.fold_in(key, t)
            names = simulators.first + simulators.rows[part]
            out = learner.sample(obs, draw, names, evaluation=evaluation)
            actions = np.asarray(out.actions)  # waits for everything computed from the frames
            step.release(obs.images)
        simulators.send_step(actions, part)
        decided[part] = (obs, out)


def collect(
    learner: Learner,
    simulators: Simulators,
    starts: np.ndarray,
    *,
    seed: int,
    key: jax.Array,
    watch: Stopwatch,
) -> tuple[RolloutBatch, dict[str, float], Played]:
    """Play training episodes; return them as a batch, the environment's figures, and a record.

    Args:
        starts: int64 [E, B] of this host's environments, one row per rollout epoch, groups
            contiguous within a row.

    Returns:
        The batch and the figures are of all hosts, the record is of this one.
    """
    epochs, figures, actions = [], [], []
    for epoch, row in enumerate(starts):
        parts: list[list[Chunk]] = [[] for _ in simulators.rows]
        results: list[list] = [[] for _ in simulators.rows]
        last: list[ObsBatch | None] = [None] * len(parts)
        for chunk in play(
            learner,
            simulators,
            row,
            seed=noise_seed(seed, epoch),
            key=jax.random.fold_in(key, epoch),
            evaluation=False,
            watch=watch,
        ):
            parts[chunk.part].append(chunk)
            results[chunk.part].append(chunk.step.result)
            if chunk.last and learner.has_value_head:
                last[chunk.part] = learner.observe(chunk.step)
        stacks = [_stack(learner, *part) for part in zip(parts, results, last, strict=True)]
        epochs.append(whole(stacks, simulators.rows, jnp))
        figures.append(whole([episode_figures(part) for part in results], simulators.rows))
        moves = [np.stack([np.asarray(c.out.actions) for c in chunks], axis=1) for chunks in parts]
        actions.append(whole(moves, simulators.rows))
    batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *epochs)
    _check(batch)
    merged = {name: np.concatenate([f[name] for f in figures]) for name in figures[0]}
    success = merged["success_once"].astype(bool)
    played = Played(starts.reshape(-1), np.concatenate(actions), success)
    return learner.put(batch), env_metrics(sharding.gather(merged)), played


def iteration_key(seed: int, iteration: int) -> jax.Array:
    """Return the key of all draws of an iteration; it depends on nothing before it."""
    return jax.random.fold_in(jax.random.key(seed), iteration)


class Collector:
    """Collects the episodes of one iteration after another.

    With `train.max_staleness` 1, `collect_ahead` collects the next iteration's episodes while an
    update is computed, and `take` returns them.

    Args:
        config: of the run.
        simulators: that imagine the episodes, ready.
        watch: counts the seconds of each phase.
    """

    def __init__(
        self, config: TrainConfig, learner: Learner, simulators: Simulators, watch: Stopwatch
    ):
        self._config, self._learner, self._simulators = config, learner, simulators
        self._watch = watch
        spec = simulators.spec
        self._starts = StartSampler.from_config(config, spec.num_starts, spec.num_keyframes)
        self._drawn, self._next = self._starts.state_dict(), 0
        self._ahead: tuple[RolloutBatch, dict[str, float], Played] | None = None

    def take(self, iteration: int) -> tuple[RolloutBatch, dict[str, float], Played]:
        """Return the episodes of `iteration`, see `collect`."""
        return self._ahead or self._collect(iteration)

    def begin(self, iteration: int) -> None:
        """Note that `iteration` comes next: a run saved from now on draws its starts again.

        Call it once the update of the iteration before is under way.
        """
        self._drawn, self._next, self._ahead = self._starts.state_dict(), iteration, None

    def collect_ahead(self) -> None:
        """Collect the episodes of the next iteration early, if the run has such an iteration."""
        if self._config.train.max_staleness and self._next < self._config.train.iterations:
            self._ahead = self._collect(self._next)

    def _collect(self, iteration: int) -> tuple[RolloutBatch, dict[str, float], Played]:
        config, simulators = self._config, self._simulators
        own = slice(simulators.first, simulators.first + simulators.num_envs)

        def once(number: int) -> tuple[RolloutBatch, dict[str, float], Played]:
            """Collect; `number` 1, 2 .. gives other episodes of the same iteration."""
            starts = self._starts.next(config.rollout.epochs, config.env.num_envs)[:, own]
            seed, key = self._starts.seed(iteration, number), iteration_key(config.seed, iteration)
            key = jax.random.fold_in(key, 2**30 + number) if number else key
            return collect(self._learner, simulators, starts, seed=seed, key=key, watch=self._watch)

        collected = collect_informative(once, config.algo, config.rollout.refill)
        if "simulator" in config.cluster.offload:
            simulators.park()
        return collected

    def state_dict(self) -> dict:
        """Return the state of the starts' sampler as of the last `begin`, plain values."""
        return self._drawn

    def ahead(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the episodes that were collected ahead, for a checkpoint; None if there are none.

        Returns:
            A tree of arrays, of all hosts, and plain values.
        """
        if self._ahead is None:
            return None
        batch, figures, played = self._ahead
        record = {
            # JAX has no integers of 64 bits here.
            "starts": played.starts.view(np.int32).reshape(-1, 2),
            "actions": played.actions,
            "success": played.success,
        }
        arrays = {"batch": batch, "played": self._learner.put(record)}
        return arrays, {"figures": figures, "starts": self._starts.state_dict()}

    def ahead_like(self) -> dict[str, Any] | None:
        """Return the shapes and places of the arrays of `ahead`; None if none can be used."""
        if not self._config.train.max_staleness:
            return None
        batch = self._learner.batch_shapes
        episodes, *actions = batch.tokens.shape
        played = {
            "starts": jax.ShapeDtypeStruct((episodes, 2), np.int32),
            "actions": jax.ShapeDtypeStruct((episodes, *actions), np.float32),
            "success": jax.ShapeDtypeStruct((episodes,), np.bool_),
        }
        return self._learner.rows_like({"batch": batch, "played": played})

    def load_ahead(self, arrays: dict[str, Any], facts: dict[str, Any]) -> None:
        """Take what `ahead` returned when the run was saved, after `load_state_dict`."""
        record = jax.tree.map(np.asarray, self._learner.own_rows(arrays["played"]))
        starts = np.ascontiguousarray(record["starts"]).view(np.int64).reshape(-1)
        played = Played(starts, record["actions"], record["success"])
        self._ahead = arrays["batch"], facts["figures"], played
        self._starts.load_state_dict(facts["starts"])

    def load_state_dict(self, state: dict) -> None:
        """Draw what an unbroken run would have drawn after `state`.

        Raises:
            ConfigError: the state belongs to other settings.
        """
        self._starts.load_state_dict(state)
        self._drawn = self._starts.state_dict()


def whole(parts: list, rows: list[np.ndarray], library=np):
    """Join trees of the pipeline's parts along their first axis, in the environments' order."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate(rows))
    return jax.tree.map(lambda *leaves: library.concatenate(leaves)[order], *parts)


def _stack(learner: Learner, chunks: list[Chunk], results: list, last: ObsBatch | None):
    """Stack the chunks of one part of an epoch to [B T ...]."""

    def stack(values):
        return jnp.stack(values, axis=1)

    def flag(name):
        # The simulator reports at chunk ends: the flag belongs to the chunk's last action.
        values = np.stack([getattr(result, name) for result in results], axis=1)
        flags = np.zeros((*values.shape, results[0].rewards.shape[1]), dtype=bool)
        flags[..., -1] = values
        return jnp.asarray(flags)

    values = None
    if last is not None:
        values = stack([c.out.values for c in chunks] + [learner.values(last)])
    return RolloutBatch(
        images=stack([c.obs.images for c in chunks]),
        prompt_tokens=chunks[0].obs.prompt_tokens,
        prompt_mask=chunks[0].obs.prompt_mask,
        tokens=stack([c.out.tokens for c in chunks]),
        log_probs=stack([c.out.log_probs for c in chunks]),
        values=values,
        rewards=jnp.asarray(np.stack([r.rewards for r in results], axis=1)),
        terminated=flag("terminated"),
        truncated=flag("truncated"),
    )


def _check(batch: RolloutBatch) -> None:
    """Check once, on the host, what the simulator and the policy produced.

    Raises:
        SimulatorError: rewards are not finite.
        TrainingError: what the policy produced is not.
    """
    for name in ("rewards", "log_probs", "values"):
        value = getattr(batch, name)
        if value is not None and not bool(jnp.isfinite(value).all()):
            bad = int((~jnp.isfinite(value)).sum())
            made = "the simulator" if name == "rewards" else "the policy"
            raise (SimulatorError if name == "rewards" else TrainingError)(
                f"{bad} of {value.size} {name} that {made} gave in the rollout are not finite"
            )


def episode_figures(results: list) -> dict[str, np.ndarray]:
    """Return each episode's figures, read at its last chunk; finished early or not."""
    final = results[-1].episode
    terminated = np.stack([result.terminated for result in results])
    return final | {"terminated": terminated.any(axis=0)}


def env_metrics(figures: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the environment's metrics under both of their names (docs/metrics.md)."""
    length = np.maximum(figures["length"], 1)
    success = float(np.mean(figures["success_once"]))
    return {
        "env/success_once": success,
        "env/success_rate": success,
        "env/return": float(np.mean(figures["return"])),
        "env/episode_len": float(np.mean(figures["length"])),
        "env/reward": float(np.mean(figures["return"] / length)),
        "env/step_reward": float(np.sum(figures["return"]) / np.sum(length)),
        "env/termination_rate": float(np.mean(figures["terminated"])),
        "env/num_trajectories": float(len(length)),
    }


def padded(starts: np.ndarray, num_envs: int) -> np.ndarray:
    """Return `starts` cut into rows of `num_envs`, the last filled up with `IDLE`."""
    rows = -(-len(starts) // num_envs)
    grid = np.full(rows * num_envs, IDLE, dtype=np.int64)
    grid[: len(starts)] = starts
    return grid.reshape(rows, num_envs)
