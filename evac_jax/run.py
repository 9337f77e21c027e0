"""A training run: restores it, logs its iterations, saves it, and sums it up."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import jax
from absl import logging

from evac_jax.checkpoint import CONFIG_FILE, Checkpoints, iterations_in
from evac_jax.errors import (
    BridgeTimeoutError,
    EvacJaxError,
    SimulatorError,
    StoppedError,
    StorageError,
    TrainingError,
)
from evac_jax.evaluate import Evaluation, counts
from evac_jax.learner import Learner
from evac_jax.rollout import Collector
from evac_jax.run_folder import RunFolder
from evac_jax.stopping import Stopping
from evac_jax.telemetry import report
from evac_jax.telemetry.pages.run_report import REPORT_FILE
from evac_jax.telemetry.progress import Progress
from evac_jax.twin import Twin


def is_due(done: int, interval: int) -> bool:
    """Whether something happens after `done` iterations, every `interval` ones; 0 = never."""
    return interval > 0 and done % interval == 0


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
        self._evaluated, self._after = 0, {}
        self._episodes: tuple[float, float] | None = None
        if folder.resumed:
            self._restore()
        folder.make(self.finished)
        self._writer = folder.make_writer(finished=self.finished)
        self._done, self._skipped_in_a_row = self.finished, 0

    def _restore(self) -> None:
        collector = self._collector
        iteration, self._learner.state, meta, ahead = self._checkpoints.go_back_to(
            self._config.checkpoint.step,
            self._learner.state,
            self._folder.run_id,
            collector.ahead_like(),
        )
        self._learner.sync()
        collector.load_state_dict(meta["starts"])
        if ahead is not None:
            collector.load_ahead(ahead, meta["ahead"])
        self._twin.load_state_dict(meta.get("twin", ()))  # older checkpoints have none
        self.finished, self._before, self._seconds = iteration, meta["before"], meta["seconds"]
        # Older checkpoints do not tell the last evaluation.
        self._evaluated = meta.get("evaluated", 0)
        self._after = meta.get("after", self._before or {})
        self._checkpoints.set_aside_after(iteration)  # last: what is refused above loses nothing
        logging.info("restored %s at iteration %d", self._folder.path, iteration)

    @property
    def owes_evaluation(self) -> bool:
        """Whether an evaluation is due after `finished` iterations, and none was logged.

        Such as the one before training, or one that a signal or a failing simulator cut short.
        """
        last = self.finished >= self._config.train.iterations
        due = last or is_due(self.finished, self._config.eval.interval)
        return self._before is None or (due and self._evaluated < self.finished)

    @property
    def stuck(self) -> bool:
        """Whether the last `train.max_skipped_updates` updates were all skipped."""
        return self._skipped_in_a_row >= self._config.train.max_skipped_updates

    def save(self, done: int) -> None:
        """Write a checkpoint of all that a resumed run needs.

        Raises:
            TrainingError: the policy diverged; it is not saved.
            CheckpointError: another run saves where this one does.
            StorageError: it cannot be written, or the run's folder was deleted or moved.
        """
        folder = self._folder.path
        # A checkpoint would make the folder anew, and nothing could go on from it.
        if not (folder / CONFIG_FILE).exists():
            raise StorageError(
                f"{str(folder)!r} was deleted or moved while the run was at work: it has no "
                f"{CONFIG_FILE}, so iteration {done} was not saved"
            )
        self._folder.refuse_another_runs_checkpoints()
        if not self._learner.is_sound():
            raise self._diverged(
                f"the policy of iteration {done} diverged (its parameters or what it decides are "
                "not finite numbers) and was not saved"
            )
        meta = {
            "starts": self._collector.state_dict(),
            "before": self._before,
            "after": self._after,
            "evaluated": self._evaluated,
            "seconds": self._seconds,
            "twin": self._twin.state_dict(),
            "run": self._folder.run_id,
        }
        episodes = None
        if ahead := self._collector.ahead():
            episodes, meta["ahead"] = ahead
        self._checkpoints.save(done, self._learner.state, meta, episodes)

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
            for phase in {**self._seconds, **seconds}
        }
        self._done = done
        self._episodes = figures["env/success_rate"], figures["env/num_trajectories"]
        self._writer.write(done, {**figures, **{f"time/{k}": v for k, v in seconds.items()}})
        skipped = figures["actor/skipped_updates"] > 0
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0

    def log_evaluation(self, done: int, outcome: Mapping[str, Evaluation]) -> None:
        """Write an evaluation's metrics and films; the first one is the success before training."""
        for name, path, facts in self._folder.write_films(done, outcome):
            self._writer.video(name, path, done, facts)
        self._writer.write(
            done,
            {
                f"eval/{place}/{name}": value
                for place, result in outcome.items()
                for name, value in result.metrics.items()
            },
        )
        self._evaluated, self._after = done, counts(outcome)
        if self._before is None:
            self._before = self._after
        self._folder.write_report()

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show how far the run is."""
        with Progress(self._config.train.iterations, self.finished) as bar:
            self.show(bar)
            yield bar

    def show(self, bar: Progress) -> None:
        """Show how far the run is, its newest episodes, and the last evaluation."""
        bar.update(
            self._done,
            episodes=self._episodes,
            success=report.rates(self._after),
            evaluated=self._evaluated,
        )

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
        """Wait for checkpoints under way."""
        self._checkpoints.close()

    def summarise(self, wall_seconds: float) -> None:
        """Write summary.json, print the summary, and finish the logs.

        Args:
            wall_seconds: duration of this process.
        """
        if not self._folder.writes:
            return
        assert self._before is not None, "a run begins with an evaluation"
        text = report.finish(
            self._folder.path,
            iteration=self._done,
            before=self._before,
            after=self._after,
            seconds=self._seconds,
            wall_seconds=wall_seconds,
            places={
                "report": self._folder.path / REPORT_FILE,
                "logs": self._folder.path,
                "videos": self._folder.videos if self._config.video.save else None,
                "checkpoints": self._folder.checkpoints,
            },
            notes=self._config.libero.notes if self._config.eval.ground_truth == "libero" else (),
            alarms=self._folder.alarms(),
            commands=self._folder.next_commands(self._done),
        )
        self._folder.write_report()  # the run is finished now, and warnings may have come
        self._writer.text("summary", text)
        page = self._folder.path / REPORT_FILE
        if page.exists():
            self._writer.page("report", page)
        for newest in iterations_in(self._folder.checkpoints)[-1:]:
            self._writer.checkpoint(self._folder.checkpoints / str(newest), newest)
        self._writer.close()
