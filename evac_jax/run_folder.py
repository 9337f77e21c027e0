"""A run's folder: where it is, what is written into it and what a resumed run reads from it.

`RunFolder` is the only place that knows which host writes: the first one writes logs, videos and
reports, and every host writes its part of a checkpoint.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from absl import logging

from evac_jax import checkpoint, report
from evac_jax.checkpoint import Checkpoints
from evac_jax.config.build import to_dict
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import hosts
from evac_jax.errors import BridgeTimeoutError, CheckpointError, EvacJaxError, SimulatorError
from evac_jax.evaluate import Evaluation, save_films
from evac_jax.files.atomic import replacing
from evac_jax.learner import Learner
from evac_jax.rollout import Collector
from evac_jax.starts import ground_truth_range
from evac_jax.telemetry import writers
from evac_jax.telemetry.progress import Progress
from evac_jax.twin import Twin


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files.

    Attributes:
        config: of the run.
        path: the run's own folder.
        checkpoints, videos: below it, unless the configuration says otherwise.
        resumed: whether the run continues an earlier one.
        writes: whether this host writes logs, videos and reports.
    """

    config: TrainConfig
    path: Path
    checkpoints: Path
    videos: Path
    resumed: bool
    writes: bool

    @classmethod
    def at(cls, config: TrainConfig, path: Path, *, resumed: bool = False) -> "RunFolder":
        """Return the folder `path` with its parts."""
        return cls(
            config=config,
            path=path,
            checkpoints=Path(config.checkpoint.dir or path / "checkpoints"),
            videos=Path(config.video.dir or path / "videos"),
            resumed=resumed,
            writes=hosts.is_first_host(),
        )

    @classmethod
    def choose(cls, config: TrainConfig) -> "RunFolder":
        """Return the folder of the run to continue, or a new one.

        Raises:
            CheckpointError: there is nothing to restore, the run has arrays of other shapes, or a
                new run's folder holds a run already.
        """
        if config.checkpoint.restore:
            return cls.at(config, checkpoint.resumable_run(config), resumed=True)
        name = config.log.run or time.strftime(f"{config.algorithm}-%Y%m%d-%H%M%S")
        folder = cls.at(config, Path(config.log.dir) / name)
        if folder.writes and (folder.path / checkpoint.CONFIG_FILE).exists():
            path = folder.path
            raise CheckpointError(
                f"{str(path)!r} already holds a run; continue it with "
                f"--config.checkpoint.restore={path}, or choose another --config.log.run"
            )
        return folder

    def make(self) -> None:
        """Write the configuration: from now on this is a run that can be continued."""
        if self.writes:
            with replacing(self.path / checkpoint.CONFIG_FILE) as temporary:
                temporary.write_text(json.dumps(to_dict(self.config), indent=2))
        hosts.wait_for_all("run folder")

    def make_writer(self, *, finished: int) -> writers.MetricWriter:
        """Return where metrics go; what was logged after iteration `finished` is dropped."""
        if not self.writes:
            return writers.NullWriter()
        return writers.make_writer(self.path, self.config, resume_step=finished)

    def write_films(
        self, iteration: int, outcome: Mapping[str, Evaluation]
    ) -> list[tuple[str, Path]]:
        """Write the evaluations' films as mp4; return ("<place>/<number>", path) of each."""
        video, written = self.config.video, []
        for place, result in outcome.items() if self.writes else ():
            # The files of imagined episodes carry no place: most videos are of those.
            mark = "" if place == "imagined" else f"{place}_"
            name = f"{mark}iteration_{iteration:05d}"
            paths = save_films(
                result.films, self.videos, name, fps=video.fps, overlay=video.overlay
            )
            written += [(f"{place}/{index}", path) for index, path in enumerate(paths)]
        return written

    def finish_evaluation(self, iteration: int, outcome: Mapping[str, Evaluation]) -> None:
        """Write videos and evaluation.json, and print the success rates."""
        self.write_films(iteration, outcome)
        if not self.writes:
            return
        config = self.config
        settings = {
            "temperature": config.policy.eval_temperature,
            "starts": config.eval.starts,
            "ground_truth_starts": ground_truth_range(config)[1],
            "seed": config.seed,
        }
        if config.eval.ground_truth == "libero":
            keys = ("suite", "episode_steps", "wait_steps", "seed", "image_size")
            settings["libero"] = {key: getattr(config.libero, key) for key in keys}
        report.finish_evaluation(
            self.path,
            iteration=iteration,
            outcome=_counts(outcome),
            by_task={place: result.by_task for place, result in outcome.items()},
            settings=settings,
        )


def _counts(outcome: Mapping[str, Evaluation]) -> dict[str, list[int]]:
    """Return {place: [successes, episodes]}, what the summary and a checkpoint keep."""
    return {p: [int(r.success.sum()), len(r.success)] for p, r in outcome.items()}


class Run:
    """A training run on disk: restores it, logs its iterations, saves it, and sums it up.

    The constructor creates the folder and restores what `checkpoint.restore` names. The order of
    precedence is: 1. the newest checkpoint of that run, 2. the weights that the learner imported.

    Attributes:
        finished: iterations done by earlier processes of this run.
    """

    def __init__(self, folder: RunFolder, learner: Learner, collector: Collector, twin: Twin):
        self._folder, self._config = folder, folder.config
        self._learner, self._collector, self._twin = learner, collector, twin
        folder.make()
        self._checkpoints = Checkpoints(folder.checkpoints, self._config.checkpoint.keep)
        self.finished, self._seconds = 0, {}
        self._before: dict[str, list[int]] | None = None
        if folder.resumed and (newest := self._checkpoints.latest()) is not None:
            self._restore(newest)
        self._after = dict(self._before or {})
        self._writer = folder.make_writer(finished=self.finished)
        self._skipped_in_a_row = 0

    def _restore(self, newest: int) -> None:
        self._learner.state, meta = self._checkpoints.restore(newest, self._learner.state)
        self._learner.sync()
        self._collector.load_state_dict(meta["starts"])
        self._twin.load_state_dict(meta.get("twin", ()))  # older checkpoints have none
        self.finished, self._before, self._seconds = newest, meta["before"], meta["seconds"]
        logging.info("restored %s at iteration %d", self._folder.path, newest)

    @property
    def is_new(self) -> bool:
        """Whether the success before training is still to be measured."""
        return self._before is None

    @property
    def stuck(self) -> bool:
        """Whether the last `train.max_skipped_updates` updates were all skipped."""
        return self._skipped_in_a_row >= self._config.train.max_skipped_updates

    def save(self, done: int) -> None:
        """Write a checkpoint of all that a resumed run needs."""
        meta = {
            "starts": self._collector.state_dict(),
            "before": self._before,
            "seconds": self._seconds,
            "twin": self._twin.state_dict(),
        }
        self._checkpoints.save(done, self._learner.state, meta)

    @contextlib.contextmanager
    def saved_if_simulators_fail(self, done: int) -> Iterator[None]:
        """Save the `done` iterations when a simulator fails in the block, then raise its error.

        On several hosts no host can save without the others, so nothing is saved.
        """
        try:
            yield
        except (SimulatorError, BridgeTimeoutError):
            if jax.process_count() == 1 and done not in (0, self._checkpoints.latest()):
                self.save(done)
                self._checkpoints.close()
            raise

    def log(self, done: int, figures: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Write an iteration's metrics and the seconds of its phases."""
        self._seconds = {
            phase: self._seconds.get(phase, 0.0) + seconds.get(phase, 0.0)
            for phase in self._seconds | seconds
        }
        self._writer.write(done, figures | {f"time/{k}": v for k, v in seconds.items()})
        skipped = figures["actor/skipped_updates"] > 0
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0

    def log_evaluation(self, done: int, outcome: Mapping[str, Evaluation]) -> None:
        """Write an evaluation's metrics and films; the first one is the success before training."""
        self._writer.write(
            done,
            {
                f"eval/{place}/{name}": value
                for place, result in outcome.items()
                for name, value in result.metrics.items()
            },
        )
        for name, path in self._folder.write_films(done, outcome):
            self._writer.video(name, path, done)
        if self._before is None:
            self._before = _counts(outcome)
        self._after = self._after | _counts(outcome)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show how far the run is."""
        with Progress(self._config.train.iterations, self.finished) as bar:
            bar.update(self.finished, success=self.success)
            yield bar

    @property
    def success(self) -> dict[str, float]:
        """Success rates of the last evaluation, 0..1, by place."""
        return report.rates(self._after)

    def stop(self, done: int) -> None:
        """Say why the run ends at iteration `done`, if it ends early; it is saved already.

        Raises:
            EvacJaxError: too many updates in a row were skipped.
        """
        where = self._folder.checkpoints
        if self.stuck:
            raise EvacJaxError(
                f"{self._skipped_in_a_row} iterations in a row had a non-finite loss or gradient; "
                f"the run stopped at iteration {done} and was saved in {where}. "
                "Lower --config.optim.lr, or look at the rewards"
            )
        if self._twin.must_stop:
            logging.warning(
                "stopped at iteration %d for the alarm (config.eval.twin_action); the policy is "
                "saved in %s",
                done,
                where,
            )

    def close(self) -> None:
        """Wait for writes under way."""
        self._checkpoints.close()
        self._writer.close()

    def summarise(self, wall_seconds: float) -> None:
        """Write summary.json and print the summary.

        Args:
            wall_seconds: duration of this process.
        """
        if not self._folder.writes:
            return
        report.finish(
            self._folder.path,
            before=self._before,
            after=self._after,
            seconds=self._seconds,
            wall_seconds=wall_seconds,
            places={
                "logs": self._folder.path,
                "videos": self._folder.videos if self._config.video.save else None,
                "checkpoints": self._folder.checkpoints,
            },
        )
