"""The training loop, top to bottom: rollout in imagination, advantages, update, evaluate, save."""

import contextlib
import dataclasses
import importlib
import json
import os
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import logging

from algos import ALGORITHMS
from evac_jax import checkpoint, report
from evac_jax.checkpoint import Checkpoints
from evac_jax.config.build import to_dict
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import hosts
from evac_jax.errors import (
    BridgeTimeoutError,
    CheckpointError,
    ConfigError,
    EvacJaxError,
    SimulatorError,
)
from evac_jax.evaluate import Evaluation, evaluate, save_films
from evac_jax.learner import Learner
from evac_jax.policy_import import check_policy
from evac_jax.refill import collect_informative
from evac_jax.rollout import Stopwatch, collect
from evac_jax.shapes import Episode, expected_episode
from evac_jax.simulators import Simulators, ground_truth_specs, training_specs
from evac_jax.starts import StartSampler
from evac_jax.telemetry import progress, writers
from evac_jax.twin import Twin

COMPILATIONS = "log/compilations"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run leaves its files, and whether it continues an earlier one."""

    path: Path
    checkpoints: Path
    videos: Path
    resumed: bool


def choose_folder(config: TrainConfig) -> RunFolder:
    """Find the run to continue, or a place for a new one; nobody's old run is written into.

    Raises:
        CheckpointError: nothing to restore, another shape of run, or the folder is taken.
    """
    resumed = bool(config.checkpoint.restore)
    if resumed:
        path = checkpoint.find_run(config)
        saved = json.loads((path / checkpoint.CONFIG_FILE).read_text())
        checkpoint.check_resumable(saved, to_dict(config))
    else:
        name = config.log.run or time.strftime(f"{config.algorithm}-%Y%m%d-%H%M%S")
        path = Path(config.log.dir) / name
        if hosts.is_first_host() and (path / checkpoint.CONFIG_FILE).exists():
            raise CheckpointError(
                f"{str(path)!r} already holds a run; continue it with "
                f"--config.checkpoint.restore={path}, or choose another --config.log.run"
            )
    return RunFolder(
        path=path,
        checkpoints=Path(config.checkpoint.dir or path / "checkpoints"),
        videos=Path(config.video.dir or path / "videos"),
        resumed=resumed,
    )


def make_folder(folder: RunFolder, config: TrainConfig) -> None:
    """Write the configuration there: from now on this is a run that can be continued."""
    if hosts.is_first_host():
        folder.path.mkdir(parents=True, exist_ok=True)
        temporary = folder.path / f"{checkpoint.CONFIG_FILE}.tmp"
        temporary.write_text(json.dumps(to_dict(config), indent=2))
        os.replace(temporary, folder.path / checkpoint.CONFIG_FILE)
    hosts.wait_for_all("run folder")


class Evaluators:
    """Evaluation in imagination and, where there is one, in the ground truth; same start ids."""

    def __init__(self, config, learner, imagined, real, folder, writer):
        self.config, self.learner, self.writer = config, learner, writer
        self.imagined, self.real, self.folder = imagined, real, folder
        self.watch = Stopwatch()

    def _starts(self, count: int, available: int) -> np.ndarray:
        low, high = self.config.eval.starts
        high = available if high == -1 else min(high, available)
        return low + np.arange(count) % max(high - low, 1)

    def run(self, iteration: int) -> dict[str, Evaluation]:
        """Evaluate, log and film; return {"imagined": ..., "ground_truth": ...} of those asked."""
        config, outcome = self.config, {}
        if config.eval.episodes:
            starts = self._starts(config.eval.episodes, self.imagined.spec.num_starts)
            outcome["imagined"] = evaluate(
                self.learner,
                self.imagined,
                starts,
                seed=config.seed,
                watch=self.watch,
                films=config.video.episodes if config.video.save else 0,
            )
        if self.real is not None:
            starts = self._starts(config.eval.ground_truth_episodes, self.real.spec.num_starts)
            outcome["ground_truth"] = evaluate(
                self.learner,
                self.real,
                starts,
                seed=config.seed,
                watch=self.watch,
                films=self.real.spec.clip_envs,
            )
        scalars = {
            f"eval/{place}/{name}": value
            for place, result in outcome.items()
            for name, value in result.metrics.items()
        }
        self.writer.write(iteration, scalars)
        if not hosts.is_first_host():
            return outcome
        for place, result in outcome.items():
            # Names of imagined films carry no place: that is what most films are.
            mark = "" if place == "imagined" else f"{place}_"
            paths = save_films(
                result.films,
                self.folder.videos,
                f"{mark}iteration_{iteration:05d}",
                fps=config.video.fps,
                overlay=config.video.overlay,
            )
            for index, path in enumerate(paths):
                self.writer.video(f"{place}/{index}", path, iteration)
        return outcome


def _rates(outcome: dict[str, Evaluation]) -> dict[str, list[int]]:
    """Return {place: [successes, episodes]}, what the summary and a checkpoint keep."""
    return {p: [int(r.success.sum()), len(r.success)] for p, r in outcome.items()}


@contextlib.contextmanager
def _simulators(config: TrainConfig, mesh, *, learning: bool = True):
    """Start all simulator processes of this host, unawaited; end them whatever happens."""
    with contextlib.ExitStack() as stack:
        imagined = real = None
        host = jax.process_index()
        if learning or config.env.simulator == "world_model":
            imagined = Simulators(training_specs(config), mesh, config, host)
            stack.callback(imagined.close)
        if config.eval.ground_truth != "none":
            real = Simulators(ground_truth_specs(config), mesh, config, host)
            stack.callback(real.close)
        # Where nothing is learned in it, one pool of the ground truth is enough.
        yield imagined or real, real


def _introduce(learner: Learner, imagined: Simulators, real: Simulators | None) -> None:
    """Wait for the simulators; let the learner know those that it learns in."""
    for pool in filter(None, (real, imagined)):
        pool.wait_until_ready()
    learner.meet(imagined.spec)


def check_sizes(config: TrainConfig, mesh, rollout_mesh, episode: Episode) -> None:
    """Check what depends on the devices and on the world model's chunk.

    Raises:
        ConfigError: batches cannot be cut as configured; all reasons in one message.
    """
    problems = []
    if episode.max_steps % episode.chunk:
        problems.append(
            f"config.env.max_episode_steps: must be a multiple of the world model's chunk of "
            f"{episode.chunk} actions, got {episode.max_steps}"
        )
    samples = config.episodes_per_iteration * episode.chunks
    algorithm = importlib.import_module(ALGORITHMS[config.algorithm])
    problems += algorithm.problems(
        config.algo, num_samples=samples, reward_coefficient=config.reward.coefficient
    )
    micro_batch = config.algo.micro_batch or config.algo.global_batch
    part = config.env.num_envs // config.rollout.pipeline_stages
    for name, count, grid, what in (
        ("env.num_envs / rollout.pipeline_stages", part, rollout_mesh, "decide"),
        ("env.num_envs x rollout.epochs", config.episodes_per_iteration, mesh, "learn"),
        ("algo.micro_batch", micro_batch, mesh, "learn"),
    ):
        if count % grid.size:
            problems.append(
                f"config.{name}: must be a multiple of the {grid.size} devices that {what}, got "
                f"{count}"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def run(config: TrainConfig) -> None:
    """Train from the start, or from a checkpoint, to `train.iterations`; print the summary."""
    began = time.perf_counter()
    hosts.start(config)
    check_policy(config.policy)  # before simulators take minutes to start
    folder = choose_folder(config)
    mesh, rollout_mesh = hosts.make_meshes(config)
    episode = expected_episode(config)
    if episode:
        check_sizes(config, mesh, rollout_mesh, episode)
    with (
        _simulators(config, rollout_mesh) as (imagined, real),
        hosts.one_for_all(config, folder.checkpoints),
    ):
        if not episode:
            episode = Episode.of(imagined.wait_until_ready().spec)
            check_sizes(config, mesh, rollout_mesh, episode)
        learner = Learner(config, mesh, episode, rollout_mesh)
        learner.begin_to_compile()  # the simulators read their weights meanwhile
        _introduce(learner, imagined, real)
        make_folder(folder, config)  # not before all that a configuration can get wrong
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        starts = StartSampler.from_config(
            config, imagined.spec.num_starts, imagined.spec.num_keyframes
        )

        # Restore, or begin: 1. checkpoint.restore, 2. the imported weights in the learner.
        finished, before, seconds = 0, None, {}
        twin = Twin(config, real)
        if folder.resumed and (newest := checkpoints.latest()) is not None:
            learner.state, meta = checkpoints.restore(newest, learner.state)
            starts.load_state_dict(meta["starts"])
            twin.load_state_dict(meta.get("twin", ()))  # older checkpoints have none
            learner.sync()
            finished, before, seconds = newest, meta["before"], meta["seconds"]
            logging.info("restored %s at iteration %d", folder.path, finished)

        writer = writers.NullWriter()
        if hosts.is_first_host():
            writer = writers.make_writer(folder.path, config, resume_step=finished)
        evaluators = Evaluators(config, learner, imagined, real, folder, writer)
        watch, compiled = Stopwatch(), hosts.Compilations()
        if before is None:
            outcome = evaluators.run(0)
            before = _rates(outcome)
        else:
            outcome = {}
        after = dict(before)

        own = slice(imagined.first, imagined.first + imagined.num_envs)
        offload = config.cluster.offload

        def iteration_key(iteration: int) -> jax.Array:
            return jax.random.fold_in(jax.random.key(config.seed), iteration)

        def play(iteration: int, number: int):
            """Collect an iteration's episodes; again and others with `number` 1, 2 .."""
            drawn = starts.next(config.rollout.epochs, config.env.num_envs)[:, own]
            seed, key = starts.seed(iteration, number), iteration_key(iteration)
            key = jax.random.fold_in(key, 2**30 + number) if number else key
            return collect(learner, imagined, drawn, seed=seed, key=key, watch=watch)

        def rollout(iteration: int):
            """Collect an iteration's episodes and compare some with the ground truth."""
            collected = collect_informative(
                partial(play, iteration), config.algo, config.rollout.refill
            )
            if "simulator" in offload:
                imagined.park()
            return collected

        def save(done: int, drawn: dict) -> None:
            meta = {"starts": drawn, "before": before, "seconds": seconds}
            checkpoints.save(done, learner.state, meta | {"twin": twin.state_dict()})

        if "optimizer" in offload:
            learner.park_optimizer()
        drawn = starts.state_dict()
        ahead = None  # the next iteration's episodes, where they are collected during an update
        skipped_in_a_row = 0
        with progress.Progress(config.train.iterations, finished) as bar:
            bar.update(finished, success=report.rates(after))
            for iteration in range(finished, config.train.iterations):
                iteration_began, programs = time.perf_counter(), compiled.count
                try:
                    batch, env_figures, played = ahead or rollout(iteration)
                except (SimulatorError, BridgeTimeoutError):
                    if jax.process_count() == 1 and iteration not in (0, checkpoints.latest()):
                        save(iteration, drawn)  # else all since the last checkpoint is lost
                        checkpoints.close()
                    raise
                with watch.timed("twin"):
                    env_figures |= twin.check(iteration, played)
                with watch.timed("actor"):
                    update = learner.start_update(batch, iteration_key(iteration))
                drawn = starts.state_dict()
                ahead = None
                if config.train.max_staleness and iteration + 1 < config.train.iterations:
                    ahead = rollout(iteration + 1)
                with watch.timed("actor"):
                    metrics = learner.finish_update(update)

                phases = watch.take()
                phases["step"] = time.perf_counter() - iteration_began
                env_figures[COMPILATIONS] = float(compiled.count - programs)
                seconds = {k: seconds.get(k, 0.0) + phases.get(k, 0.0) for k in seconds | phases}
                done = iteration + 1
                writer.write(
                    done, metrics | env_figures | {f"time/{k}": v for k, v in phases.items()}
                )

                skipped_in_a_row = skipped_in_a_row + 1 if metrics["actor/skipped_updates"] else 0
                stuck = skipped_in_a_row >= config.train.max_skipped_updates
                last = done == config.train.iterations or stuck or twin.must_stop
                if last or (config.eval.interval and done % config.eval.interval == 0):
                    after = after | _rates(evaluators.run(done))
                if last or done % config.checkpoint.interval == 0:
                    save(done, drawn)
                bar.update(done, success=report.rates(after))
                if stuck:
                    raise EvacJaxError(
                        f"{skipped_in_a_row} iterations in a row had a non-finite loss or "
                        f"gradient; the run stopped at iteration {done} and was saved in "
                        f"{folder.checkpoints}. Lower --config.optim.lr, or look at the rewards"
                    )
                if twin.must_stop:
                    logging.warning(
                        "stopped at iteration %d for the alarm (config.eval.twin_action); the "
                        "policy is saved in %s",
                        done,
                        folder.checkpoints,
                    )
                    break
        checkpoints.close()
        writer.close()
    if not hosts.is_first_host():
        return
    report.finish(
        folder.path,
        before=before,
        after=after,
        seconds=seconds,
        wall_seconds=time.perf_counter() - began,
        places={
            "logs": folder.path,
            "videos": folder.videos if config.video.save else None,
            "checkpoints": folder.checkpoints,
        },
    )


def evaluate_only(config: TrainConfig) -> None:
    """Evaluate the imported policy, or a restored run's, and print the success rates.

    What it finds goes to <log.dir>/<log.run or "eval">/evaluation.json; the run that is restored
    stays as it is.

    Raises:
        CheckpointError: there is no such run, or it lacks the iteration `checkpoint.step`.
    """
    hosts.start(config)
    check_policy(config.policy)
    path = Path(config.log.dir) / (config.log.run or "eval")
    mesh, rollout_mesh = hosts.make_meshes(config)
    with _simulators(config, rollout_mesh, learning=False) as (imagined, real):
        episode = expected_episode(config) or Episode.of(imagined.wait_until_ready().spec)
        learner = Learner(config, mesh, episode, rollout_mesh)
        _introduce(learner, imagined, real)
        iteration = 0
        if config.checkpoint.restore:
            run = checkpoint.find_run(config)
            saved = json.loads((run / checkpoint.CONFIG_FILE).read_text())
            checkpoint.check_resumable(saved, to_dict(config))
            checkpoints = Checkpoints(Path(config.checkpoint.dir or run / "checkpoints"), keep=None)
            iteration = checkpoints.existing(config.checkpoint.step)
            learner.state, _ = checkpoints.restore(iteration, learner.state)
            learner.sync()
        folder = RunFolder(path, Path(), Path(config.video.dir or path / "videos"), False)
        evaluators = Evaluators(config, learner, imagined, real, folder, writers.NullWriter())
        results = evaluators.run(iteration)
    settings = {
        "temperature": config.policy.eval_temperature,
        "starts": config.eval.starts,
        "seed": config.seed,
    }
    if config.eval.ground_truth == "libero":
        keys = ("suite", "episode_steps", "wait_steps", "seed", "image_size")
        settings["libero"] = {key: getattr(config.libero, key) for key in keys}
    if not hosts.is_first_host():
        return
    report.finish_evaluation(
        path,
        iteration=iteration,
        outcome=_rates(results),
        by_task={place: result.by_task for place, result in results.items()},
        settings=settings,
    )
