"""A run's folder: where it is, what is written into it and what a resumed run reads from it.

`RunFolder` is the only place that knows which host writes: the first one writes logs, videos and
reports, and every host writes its part of a checkpoint.
"""

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from absl import logging

from evac_jax import checkpoint, report
from evac_jax.checkpoint import Checkpoints
from evac_jax.config.build import to_dict
from evac_jax.config.schema import TrainConfig
from evac_jax.devices import hosts, together
from evac_jax.errors import (
    BridgeTimeoutError,
    CheckpointError,
    EvacJaxError,
    SimulatorError,
    StoppedError,
    StorageError,
    TrainingError,
)
from evac_jax.evaluate import Evaluation, save_films
from evac_jax.files import claim
from evac_jax.files.atomic import keep, replacing
from evac_jax.learner import Learner
from evac_jax.rollout import Collector
from evac_jax.starts import ground_truth_range
from evac_jax.stopping import Stopping
from evac_jax.telemetry import writers
from evac_jax.telemetry.progress import Progress
from evac_jax.twin import Twin

RUN_ID_FILE = "run_id"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files.

    Attributes:
        config: of the run.
        path: the run's own folder.
        checkpoints, videos: below it, unless the configuration says otherwise.
        resumed: whether the run continues an earlier one.
        unnamed: the folder is new, and its name gets a number where another one took it.
        writes: whether this host writes logs, videos and reports.
    """

    config: TrainConfig
    path: Path
    checkpoints: Path
    videos: Path
    resumed: bool
    unnamed: bool
    writes: bool

    @classmethod
    def at(cls, config: TrainConfig, path: Path, **what: bool) -> "RunFolder":
        """Return the folder `path` with its parts; `what` is `resumed` or `unnamed`."""
        own = Path(config.checkpoint.dir or path / "checkpoints")
        return cls(
            config=config,
            path=path,
            checkpoints=checkpoint.folder_of(config, path) if what.get("resumed") else own,
            videos=Path(config.video.dir or path / "videos"),
            writes=hosts.is_first_host(),
            **({"resumed": False, "unnamed": False} | what),
        )

    @classmethod
    def choose(cls, config: TrainConfig) -> "RunFolder":
        """Return the folder of the run to continue, or a new one.

        Raises:
            CheckpointError: there is nothing to restore, the run has arrays of other shapes, or a
                new run's folder, or its checkpoint.dir, holds a run already.
            StorageError: nothing can be written there.
        """
        run = checkpoint.resumable_run(config) if config.checkpoint.restore else None
        if run is not None:
            folder = cls.at(config, run, resumed=True)
            checkpoint.existing(folder.checkpoints, config.checkpoint.step)
        else:
            name = config.log.run or time.strftime(f"{config.algorithm}-%Y%m%d-%H%M%S")
            folder = cls.at(config, Path(config.log.dir, name), unnamed=not config.log.run)
            folder._refuse_what_is_there()
        claim.check_writable(folder.path)
        claim.check_writable(folder.checkpoints)
        return folder

    def _refuse_what_is_there(self) -> None:
        """Refuse to begin a run where one is. One that trained nothing is no reason to."""
        if found := checkpoint.iterations_in(self.checkpoints):
            what = f"{str(self.checkpoints)!r} holds a run's checkpoints (iterations {found})"
            if checkpoint.saved_config(self.path) is None:
                raise CheckpointError(f"{what}; choose another --config.checkpoint.dir")
        elif checkpoint.iterations_in(checkpoint.folder_of(self.config, self.path)):
            what = f"{str(self.path)!r} has checkpoints elsewhere"
        elif writers.last_iteration(self.path) and self.config.checkpoint.restore != "auto":
            what = f"{str(self.path)!r} holds the metrics of a run that saved no checkpoint"
        else:
            return
        raise CheckpointError(
            f"{what}, so {str(self.path)!r} already holds a run; continue it with "
            f"--config.checkpoint.restore={self.path}, or choose another --config.log.run"
        )

    @contextlib.contextmanager
    def claimed(self) -> Iterator["RunFolder"]:
        """Make the folder and keep other processes out of it; what wrote nothing leaves no folder.

        Raises:
            StorageError: another process is at work in it, or it cannot be made.
        """
        if not self.writes:
            yield self
            return
        with claim.claimed(self.path, numbered=self.unnamed) as path:
            folder = RunFolder.at(self.config, path, resumed=self.resumed)
            try:
                with claim.told_as_storage_error(path):
                    yield folder
            except StorageError as error:
                raise StorageError(f"{error}\n{folder.how_to_go_on()}") from error

    def make(self) -> None:
        """Write the configuration: from now on this is a run that can be continued."""
        if self.writes:
            with replacing(self.path / checkpoint.CONFIG_FILE) as temporary:
                temporary.write_text(json.dumps(to_dict(self.config), indent=2))
            if not (self.path / RUN_ID_FILE).exists():
                with replacing(self.path / RUN_ID_FILE) as temporary:
                    temporary.write_text(secrets.token_hex(8))
            if not self.resumed:
                keep(self.path / writers.METRICS_FILE)
        together.wait_for_all("run folder")

    @property
    def run_id(self) -> str:
        """What tells this run from any other, also after its folder was moved; "" = not told."""
        path = self.path / RUN_ID_FILE
        return path.read_text() if path.is_file() else ""

    @property
    def is_finished(self) -> bool:
        """Whether the run to continue has all its iterations and its summary already."""
        if not (self.resumed and (self.path / report.SUMMARY_FILE).is_file()):
            return False
        done = checkpoint.existing(self.checkpoints, self.config.checkpoint.step)
        return done >= self.config.train.iterations

    def how_to_go_on(self) -> str:
        """Return a sentence that names the last checkpoint, and the command that goes on."""
        return checkpoint.how_to_go_on(self.path, self.checkpoints)

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

    @classmethod
    def for_evaluation(cls, config: TrainConfig, restored: "RunFolder | None") -> "RunFolder":
        """Return the folder of an evaluation's result: log.run, or a new one with the date.

        Args:
            restored: the run that is evaluated; its own folder is never taken.

        Raises:
            CheckpointError: the folder named by log.run holds a run or an evaluation.
            StorageError: nothing can be written there.
        """
        folder = cls.at(config, Path(config.log.dir, config.log.run))
        same = restored and restored.path.absolute() == folder.path.absolute()
        if not config.log.run or same:
            name = time.strftime("eval-%Y%m%d-%H%M%S")
            folder = cls.at(config, Path(config.log.dir, name), unnamed=True)
        for file in (report.EVALUATION_FILE, checkpoint.CONFIG_FILE) if folder.writes else ():
            if (folder.path / file).exists():
                raise CheckpointError(
                    f"{str(folder.path)!r} holds {file} already; choose another --config.log.run "
                    "for this evaluation"
                )
        claim.check_writable(folder.path)
        return folder

    def finish_evaluation(
        self, iteration: int, outcome: Mapping[str, Evaluation], restored: "RunFolder | None"
    ) -> None:
        """Write videos and evaluation.json, and print whose success rates these are.

        Args:
            iteration: of the run whose policy was evaluated; 0 for the imported one.
            restored: that run; None for the imported policy.
        """
        self.write_films(iteration, outcome)
        if not self.writes:
            return
        config = self.config
        policy = config.policy
        whose = {"policy": policy.checkpoint, "lora_adapter": policy.lora_adapter}
        whose |= {"run": str(restored.path) if restored else "", "iteration": iteration}
        settings = {
            "temperature": config.policy.eval_temperature,
            "starts": config.eval.starts,
            "ground_truth_starts": ground_truth_range(config)[1],
            "seed": config.seed,
        }
        if config.eval.ground_truth == "libero":
            settings["libero"] = config.libero.facts()
        report.finish_evaluation(
            self.path,
            whose=whose,
            outcome=_counts(outcome),
            by_task={place: result.by_task for place, result in outcome.items()},
            settings=settings,
        )


def _counts(outcome: Mapping[str, Evaluation]) -> dict[str, list[int]]:
    """Return {place: [successes, episodes]}, what the summary and a checkpoint keep."""
    return {p: [int(r.success.sum()), len(r.success)] for p, r in outcome.items()}


class Run:
    """A training run on disk: restores it, logs its iterations, saves it, and sums it up.

    The constructor begins the run in its folder and restores what `checkpoint.restore` names. The
    order of precedence is: 1. the newest checkpoint of that run, or `checkpoint.step`, 2. the
    weights that the learner imported.

    Attributes:
        finished: iterations done by earlier processes of this run.
    """

    def __init__(
        self,
        folder: RunFolder,
        learner: Learner,
        collector: Collector,
        twin: Twin,
        stopping: Stopping,
    ):
        self._folder, self._config, self._stopping = folder, folder.config, stopping
        self._learner, self._collector, self._twin = learner, collector, twin
        self._checkpoints = Checkpoints(folder.checkpoints, self._config.checkpoint.keep)
        self.finished, self._seconds = 0, {}
        self._before: dict[str, list[int]] | None = None
        if folder.resumed:
            self._restore()
        folder.make()
        self._evaluated, self._after = 0, self._before or {}
        self._writer = folder.make_writer(finished=self.finished)
        self._done, self._skipped_in_a_row = self.finished, 0

    def _restore(self) -> None:
        iteration, self._learner.state, meta = self._checkpoints.go_back_to(
            self._config.checkpoint.step, self._learner.state, self._folder.run_id
        )
        self._learner.sync()
        self._collector.load_state_dict(meta["starts"])
        self._twin.load_state_dict(meta.get("twin", ()))  # older checkpoints have none
        self.finished, self._before, self._seconds = iteration, meta["before"], meta["seconds"]
        logging.info("restored %s at iteration %d", self._folder.path, iteration)

    @property
    def is_new(self) -> bool:
        """Whether the success before training is still to be measured."""
        return self._before is None

    @property
    def stuck(self) -> bool:
        """Whether the last `train.max_skipped_updates` updates were all skipped."""
        return self._skipped_in_a_row >= self._config.train.max_skipped_updates

    def save(self, done: int) -> None:
        """Write a checkpoint of all that a resumed run needs.

        Raises:
            TrainingError: the policy diverged; it is not saved.
            StorageError: it cannot be written.
        """
        if not self._learner.is_sound():
            raise self._diverged(
                f"the policy of iteration {done} diverged (its parameters or what it decides are "
                "not finite numbers) and was not saved"
            )
        meta = {
            "starts": self._collector.state_dict(),
            "before": self._before,
            "seconds": self._seconds,
            "twin": self._twin.state_dict(),
            "run": self._folder.run_id,
        }
        self._checkpoints.save(done, self._learner.state, meta)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what}. Lower --config.optim.lr (now {self._config.optim.lr:g}), or look at the "
            f"rewards. {self._folder.how_to_go_on()}"
        )

    @contextlib.contextmanager
    def saved_if_it_ends(self, done: int) -> Iterator[None]:
        """Save the `done` iterations when a signal or a failing simulator ends the block.

        A signal ends it at once. On several hosts no host can save without the others, so a
        simulator's failure saves nothing there.

        Raises:
            TrainingError: the policy's decisions in the block are not finite; says what to do.
        """
        try:
            with self._stopping.interruptible():
                yield
        except TrainingError as error:
            raise self._diverged(f"the policy of iteration {done} diverged: {error}") from error
        except (SimulatorError, BridgeTimeoutError, StoppedError) as ended:
            alone = jax.process_count() == 1 or isinstance(ended, StoppedError)
            if alone and done not in (0, self._checkpoints.latest()):
                try:
                    self.save(done)
                    self._checkpoints.close()
                except EvacJaxError as error:
                    logging.error("iteration %d was not saved: %s", done, error)
            raise

    def cut_short(self, work: Callable[[], None]) -> None:
        """Do what a signal may end at once; the run then stops at its next `saved_if_it_ends`."""
        with contextlib.suppress(StoppedError), self._stopping.interruptible():
            work()

    def log(self, done: int, figures: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Write an iteration's metrics and the seconds of its phases."""
        self._seconds = {
            phase: self._seconds.get(phase, 0.0) + seconds.get(phase, 0.0)
            for phase in self._seconds | seconds
        }
        self._done = done
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
        self._evaluated, self._after = done, _counts(outcome)
        if self._before is None:
            self._before = self._after

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show how far the run is."""
        with Progress(self._config.train.iterations, self.finished) as bar:
            self.show(bar)
            yield bar

    def show(self, bar: Progress) -> None:
        """Show how far the run is, and the last evaluation with its iteration."""
        bar.update(self._done, success=report.rates(self._after), evaluated=self._evaluated)

    def stop(self) -> None:
        """Say why the run ends, if it ends early; it is saved already.

        Raises:
            TrainingError: too many updates in a row were skipped.
        """
        if self.stuck:
            raise self._diverged(
                f"{self._skipped_in_a_row} iterations in a row had a non-finite loss or gradient, "
                f"and the run stopped at iteration {self._done}"
            )
        if self._twin.must_stop:
            logging.warning(
                "stopped at iteration %d for the alarm (config.eval.twin_action); the policy is "
                "saved in %s",
                self._done,
                self._folder.checkpoints,
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
            iteration=self._done,
            before=self._before,
            after=self._after,
            seconds=self._seconds,
            wall_seconds=wall_seconds,
            places={
                "logs": self._folder.path,
                "videos": self._folder.videos if self._config.video.save else None,
                "checkpoints": self._folder.checkpoints,
            },
            notes=self._config.libero.notes if self._config.eval.ground_truth == "libero" else (),
        )
