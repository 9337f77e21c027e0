"""Plays episodes: the policy decides on a chunk, the simulator imagines it, and so on.

`play` is the one driver; training rollouts record what it yields, evaluation only counts.
"""

import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from algos.types import RolloutBatch
from evac_jax.bridge.types import IDLE
from evac_jax.errors import SimulatorError
from evac_jax.learner import Learner
from evac_jax.simulators import BatchStep, Simulators
from evac_jax.starts import noise_seed
from policies.types import ObsBatch, PolicyOutput


@dataclasses.dataclass
class Chunk:
    """One decision and what came of it.

    Attributes:
        obs: what the policy saw; owns its frames.
        out: what it decided.
        step: the simulator's answer, released when the next chunk is asked for.
    """

    obs: ObsBatch
    out: PolicyOutput
    step: BatchStep


@dataclasses.dataclass(frozen=True)
class Played:
    """What n episodes were, so that they can be played again elsewhere.

    Attributes:
        starts: start ids, int64 [n].
        actions: as the policy gave them, float32 [n T K A]; those after an episode's end as well.
        success: whether the simulator saw a success, bool [n].
    """

    starts: np.ndarray
    actions: np.ndarray
    success: np.ndarray


class Stopwatch:
    """Seconds spent per phase, summed until `take`."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """Add `seconds` to a phase."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return the sums and start again from zero."""
        seconds, self._seconds = self._seconds, {}
        return seconds


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
    """Yield the chunks of one episode in every environment, T = max_episode_steps / K of them.

    Args:
        starts: int64 [B] initial states, `IDLE` where there is none to play.
        seed: of the simulator's noise.
        key: of the policy's sampling; folded with the chunk's number.
        evaluation: decide with the evaluation's temperature rather than the training's.
    """
    spec = simulators.spec
    began = time.perf_counter()
    step = simulators.reset(starts, seed)
    watch.add("env", time.perf_counter() - began)
    for t in range(spec.max_episode_steps // spec.action.chunk):
        began = time.perf_counter()
        obs = learner.observe(step)
        out = learner.sample(obs, jax.random.fold_in(key, t), evaluation=evaluation)
        actions = np.asarray(out.actions)  # waits for everything computed from the frames
        step.release(obs.images)
        watch.add("rollout", time.perf_counter() - began)
        began = time.perf_counter()
        step = simulators.step(actions)
        watch.add("env", time.perf_counter() - began)
        for phase, seconds in step.result.seconds.items():
            watch.add(f"env/{phase}", seconds)
        yield Chunk(obs, out, step)
    step.release()


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
        starts: int64 [E, B], one row per rollout epoch, groups contiguous within a row.
    """
    epochs, figures, actions = [], [], []
    for epoch, row in enumerate(starts):
        chunks: list[Chunk] = []
        results = []
        for chunk in play(
            learner,
            simulators,
            row,
            seed=noise_seed(seed, epoch),
            key=jax.random.fold_in(key, epoch),
            evaluation=False,
            watch=watch,
        ):
            results.append(chunk.step.result)
            chunks.append(chunk)
            last = learner.observe(chunk.step) if learner.has_value_head else None
        epochs.append(_stack(learner, chunks, results, last))
        figures.append(_episode_figures(results))
        actions.append(np.stack([np.asarray(chunk.out.actions) for chunk in chunks], axis=1))
    batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *epochs)
    _check(batch)
    merged = {name: np.concatenate([f[name] for f in figures]) for name in figures[0]}
    success = merged["success_once"].astype(bool)
    played = Played(starts.reshape(-1), np.concatenate(actions), success)
    return learner.put(batch), env_metrics(merged), played


def _stack(learner: Learner, chunks: list[Chunk], results: list, last: ObsBatch | None):
    """Stack the chunks of one epoch to [B T ...]."""

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
    """Check once, on the host, what the simulator and the policy produced."""
    for name in ("rewards", "log_probs", "values"):
        value = getattr(batch, name)
        if value is not None and not bool(jnp.isfinite(value).all()):
            bad = int((~jnp.isfinite(value)).sum())
            raise SimulatorError(
                f"rollout: {bad} of {value.size} entries of {name!r} are not finite; "
                "rewards come from the simulator, log_probs and values from the policy"
            )


def _episode_figures(results: list) -> dict[str, np.ndarray]:
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
