"""Evaluates a policy on fixed start states, in imagination or in the ground truth alike."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from evac_jax.bridge.types import IDLE
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import sharding
from evac_jax.devices.malloc import give_back
from evac_jax.learner import Learner
from evac_jax.rollout import env_metrics, episode_figures, padded, play, whole
from evac_jax.simulators import Simulators
from evac_jax.starts import Range, ground_truth_range, noise_seed, range_of, source_of
from evac_jax.telemetry import video
from evac_jax.telemetry.progress import told
from evac_jax.telemetry.report import by_task
from evac_jax.telemetry.stopwatch import Stopwatch


@dataclasses.dataclass(frozen=True)
class Film:
    """One filmed episode: frames uint8 [T V H W 3], per-frame rewards [T], success reached [T]."""

    instruction: str
    start: int
    frames: np.ndarray
    rewards: np.ndarray
    success: np.ndarray

    @property
    def side_by_side(self) -> np.ndarray:
        """The frames of all cameras next to each other, uint8 [T H V*W 3]."""
        return np.concatenate(list(np.moveaxis(self.frames, 1, 0)), axis=2)

    @property
    def facts(self) -> video.Facts:
        """What tells one film from another: start, instruction, success and return."""
        return {
            "start": self.start,
            "instruction": self.instruction,
            "success": bool(self.success[-1]),
            "return": float(self.rewards.sum()),
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Outcome of an evaluation.

    Attributes:
        success: whether each episode succeeded, bool [n].
        by_task: instruction -> [successes, episodes], in the order of the environment's tasks.
        metrics: figures of `rollout.env_metrics`, without their "env/" prefix.
        films: episodes filmed, [] where the environment sends no clips.
    """

    success: np.ndarray
    by_task: dict[str, list[int]]
    metrics: dict[str, float]
    films: list[Film]

    @property
    def success_rate(self) -> float:
        """Share of successful episodes."""
        return float(self.success.mean())


def evaluate(
    learner: Learner,
    simulators: Simulators,
    starts: np.ndarray,
    *,
    seed: int,
    watch: Stopwatch,
    films: int = 0,
) -> Evaluation:
    """Play one episode from each of `starts` (int64 [n]) with the evaluation temperature.

    Hosts share the episodes; the outcome is of all of them, films are of this one.
    """
    figures: list[dict[str, np.ndarray]] = []
    filmed: list[Film] = []
    own = slice(simulators.first, simulators.first + simulators.num_envs)
    for index, whole_row in enumerate(padded(starts, simulators.num_envs * jax.process_count())):
        row = whole_row[own]
        parts: list[list] = [[] for _ in simulators.rows]
        clips = []
        first = None
        for chunk in play(
            learner,
            simulators,
            row,
            seed=noise_seed(seed, index),
            key=jax.random.fold_in(jax.random.key(seed), index),
            evaluation=True,
            watch=watch,
        ):
            parts[chunk.part].append(chunk.step.result)
            if index == 0 and films and chunk.part == 0:  # a film shows the first environments
                first = np.asarray(chunk.obs.images) if first is None else first
                clips.append(np.array(chunk.step.clips))
        if clips:
            filmed = _films(simulators, row[simulators.rows[0]], parts[0], first, clips, films)
        played = sharding.gather(whole([_figures(r) for r in parts], simulators.rows))
        figures.append({name: values[whole_row != IDLE] for name, values in played.items()})
    merged = {name: np.concatenate([f[name] for f in figures]) for name in figures[0]}
    success = merged["success_once"].astype(bool)
    return Evaluation(
        success=success,
        by_task=by_task(simulators.spec.instructions, merged["task"], success),
        metrics={k.removeprefix("env/"): v for k, v in env_metrics(merged).items()},
        films=filmed,
    )


class Evaluators:
    """Evaluates in imagination and, where there is one, in the ground truth.

    From the same starts where both share their source, see `starts.ground_truth_range`.

    Args:
        config: reads `eval`, `video` and `seed`.
        imagined: simulators that imagine; only asked where `eval.episodes` is above 0.
        real: the ground truth, or None.

    Raises:
        ConfigError: a range of starts does not exist.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        imagined: Simulators,
        real: Simulators | None,
    ):
        self._config, self._learner = config, learner
        self._imagined, self._real = imagined, real
        options = config.eval
        if options.episodes:
            ends = "eval.starts", options.starts
            self._dreamt = _starts(ends, options.episodes, imagined, source_of(config))
        if real is not None:
            source = f"eval.ground_truth={options.ground_truth!r}"
            ends = ground_truth_range(config)
            self._true = _starts(ends, options.ground_truth_episodes, real, source)
            if options.ground_truth == "libero":
                envs = real.num_envs * jax.process_count()
                self._true = task_by_task(self._true, len(real.spec.instructions), envs)

    def run(self) -> dict[str, Evaluation]:
        """Return {"imagined": ..., "ground_truth": ...}, those that the configuration asks for."""
        options, video_options = self._config.eval, self._config.video
        outcome = {}
        if options.episodes:
            films = video_options.episodes if video_options.save else 0
            with told(f"evaluating in imagination: {len(self._dreamt)} episodes"):
                outcome["imagined"] = self._evaluate(self._imagined, self._dreamt, films)
        if self._real is not None:
            films = self._real.spec.clip_envs
            with told(f"evaluating in the ground truth: {options.ground_truth_episodes} episodes"):
                outcome["ground_truth"] = self._evaluate(self._real, self._true, films)
        give_back()
        return outcome

    def _evaluate(self, simulators: Simulators, starts: np.ndarray, films: int) -> Evaluation:
        return evaluate(
            self._learner,
            simulators,
            starts,
            seed=self._config.seed,
            watch=Stopwatch(),  # an evaluation's time does not count for an iteration
            films=films,
        )


def _starts(
    field: tuple[str, Range], episodes: int, simulators: Simulators, source: str
) -> np.ndarray:
    """Return the start ids of `episodes`: those of a field's range, again and again, int64 [n]."""
    low, high = range_of(*field, simulators.spec.num_starts, source)
    return low + np.arange(episodes) % (high - low)


def task_by_task(starts: np.ndarray, tasks: int, envs: int) -> np.ndarray:
    """Return LIBERO's start ids in an order in which each environment changes its task rarely.

    To build a task's scene takes about as long as to play an episode, and the ids alternate between
    the tasks: id % tasks is the task. With as many environments as tasks nothing changes.

    Args:
        starts: int64 [n].
        tasks: of the suite.
        envs: that play side by side, of all hosts.

    Returns:
        Rows of `envs` ids, one behind the other, int64 [m envs]; `IDLE` where an environment has
        one episode less.
    """
    rows = -(-len(starts) // envs)
    dealt = np.full(rows * envs, IDLE, np.int64)
    dealt[: len(starts)] = starts[np.argsort(starts % tasks, kind="stable")]
    return dealt.reshape(envs, rows).T.ravel()


def _figures(results: list) -> dict[str, np.ndarray]:
    """Return each episode's figures and task, from the results of all its chunks."""
    return episode_figures(results) | {"task": results[-1].task}


def _films(simulators, starts, results, first, clips, count: int) -> list[Film]:
    """Join the chunks of the first `count` environments that play, the start frame in front."""
    films = []
    for env in range(min(count, clips[0].shape[0])):
        if starts[env] == IDLE:
            continue
        frames = np.concatenate([first[env][None], *(clip[env] for clip in clips)])
        rewards = np.concatenate([[0.0], *(result.rewards[env] for result in results)])
        chunk = results[0].rewards.shape[1]
        reached = np.concatenate(
            [[False], *(np.full(chunk, result.success[env]) for result in results)]
        )
        films.append(
            Film(
                instruction=simulators.spec.instructions[int(results[0].task[env])],
                start=int(starts[env]),
                frames=frames,
                rewards=rewards,
                success=reached,
            )
        )
    return films


def save_films(films: list[Film], directory: Path, name: str, *, fps: int, overlay: bool):
    """Write one mp4 per film, all cameras side by side; return the paths."""
    paths = []
    for index, film in enumerate(films):
        caption = None
        if overlay:
            caption = video.Overlay(film.instruction, np.cumsum(film.rewards), film.success)
        path = directory / f"{name}_{index}.mp4"
        video.write_mp4(path, film.side_by_side, fps=fps, overlay=caption)
        paths.append(path)
    return paths


def counts(outcome: Mapping[str, Evaluation]) -> dict[str, list[int]]:
    """Return {place: [successes, episodes]}, what the summary and a checkpoint keep."""
    return {p: [int(r.success.sum()), len(r.success)] for p, r in outcome.items()}
