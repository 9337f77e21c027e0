"""A run's folder: where it is, and what is written into it beside the metrics.

`RunFolder` is the only place that knows which host writes: the first one writes logs, videos and
reports, and every host writes its part of a checkpoint.
"""

import contextlib
import dataclasses
import json
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import logging

from evac_jax import checkpoint, stopping
from evac_jax.config import commands, hub
from evac_jax.config.build import to_dict
from evac_jax.config.schema import TrainConfig
from evac_jax.config.world import CARD_FILE, Card, World
from evac_jax.devices import hosts, together
from evac_jax.errors import (
    CheckpointError,
    StoppedError,
    StorageError,
)
from evac_jax.evaluate import Evaluation, counts, save_films
from evac_jax.files import claim
from evac_jax.files.atomic import keep, replacing
from evac_jax.files.cards import write_json
from evac_jax.starts import ground_truth_range, share_starts
from evac_jax.telemetry import json_lines, launches, report, video, warning_log, writers
from evac_jax.telemetry.pages import record, run_report, signals

RUN_ID_FILE = "run_id"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files.

    Attributes:
        config: of the run.
        path: the run's own folder.
        checkpoints, videos: of this run, below its folder unless the configuration says otherwise.
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
            videos=record.videos_of(path, config.video.dir),
            writes=hosts.is_first_host(),
            **({"resumed": False, "unnamed": False} | what),
        )

    @classmethod
    def choose(cls, config: TrainConfig) -> "RunFolder":
        """Return the folder of the run to continue, or a new one.

        Raises:
            CheckpointError: there is nothing to restore, the run has arrays of other shapes or
                another world, or a new run's folder, or its checkpoint.dir, holds a run already,
                or its video.dir another one's films.
            StorageError: nothing can be written there.
        """
        run = checkpoint.resumable_run(config) if config.checkpoint.restore else None
        if run is not None:
            folder = cls.at(config, run, resumed=True)
            checkpoint.existing(folder.checkpoints, config.checkpoint.step)
            folder._refuse_another_world()
        else:
            algorithm = config.algorithm.rpartition(":")[2]  # a module's name is no folder's
            name = config.log.run or time.strftime(f"{algorithm}-%Y%m%d-%H%M%S")
            folder = cls.at(config, Path(config.log.dir, name), unnamed=not config.log.run)
            folder._refuse_what_is_there()
        claim.check_writable(folder.path)
        claim.check_writable(folder.checkpoints)
        folder._check_videos()
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

    def _check_videos(self) -> None:
        """Refuse a folder of films that cannot be written to, or holds those of another run."""
        if not (self.writes and self.config.video.save):
            return
        claim.check_writable(self.videos)
        began = self.resumed or checkpoint.saved_config(self.path) is not None
        if self.config.video.dir and not began and any(self.videos.glob("*.mp4")):
            raise CheckpointError(
                f"{str(self.videos)!r} holds the films of another run of this name; choose another "
                "--config.video.dir or --config.log.run"
            )

    def _refuse_another_world(self) -> None:
        """Refuse to go on where the world says anything else than when the run began."""
        path, named = self.path / CARD_FILE, self.config.world
        if not path.is_file():
            return
        how = "name the world that it began in, or start a new run from its exported policy"
        if not named:
            raise CheckpointError(
                f"config.world: {str(self.path)!r} trains in a world, now there is none; {how}"
            )
        before, now = Card.from_json(path.read_bytes(), str(path)), World.read(named).card
        if changed := [name for name in vars(now) if getattr(now, name) != getattr(before, name)]:
            raise CheckpointError(
                f"config.world: {named!r} is not the world that {str(self.path)!r} began in (its "
                f"{CARD_FILE}); they differ in {', '.join(changed)}; {how}"
            )

    @contextlib.contextmanager
    def claimed(self, *, saves: bool = True) -> Iterator["RunFolder"]:
        """Make the folder and that of the checkpoints, and keep other processes out of both.

        What wrote nothing leaves no folder.

        Args:
            saves: False if no checkpoint is written, so that a run may be at work on its own.

        Raises:
            StorageError: another process is at work in one of them, or it cannot be made.
        """
        if not self.writes:
            yield self
            return
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(claim.claimed(self.path, numbered=self.unnamed))
            folder = RunFolder.at(self.config, path, resumed=self.resumed)
            # Two runs with one checkpoint.dir would replace each other's checkpoints.
            if saves and folder.checkpoints.resolve() != path.resolve():
                try:
                    stack.enter_context(claim.claimed(folder.checkpoints))
                except StorageError as error:
                    raise StorageError(f"config.checkpoint.dir: {error}") from error
            try:
                with (
                    claim.told_as_storage_error(path),
                    warning_log.kept_in(path, checkpoint.CONFIG_FILE),
                ):
                    yield folder
            except StorageError as error:
                raise StorageError(f"{error}\n{folder.how_to_go_on()}") from error

    def make(self, finished: int = 0) -> None:
        """Write configuration and command: from now on this is a run that can be continued.

        Args:
            finished: iterations that it goes on from.
        """
        if self.writes:
            values = to_dict(self.config)
            with replacing(self.path / checkpoint.CONFIG_FILE) as temporary:
                temporary.write_text(json.dumps(values, indent=2))
            launches.record(self.path, values, finished, resumed=self.resumed)
            if not (self.path / RUN_ID_FILE).exists():
                with replacing(self.path / RUN_ID_FILE) as temporary:
                    temporary.write_text(secrets.token_hex(8))
            with replacing(self.checkpoints / RUN_ID_FILE) as temporary:
                temporary.write_text(self.run_id)
            (self.path / CARD_FILE).unlink(missing_ok=True)
            if self.config.world:
                with replacing(self.path / CARD_FILE) as temporary:
                    temporary.write_text(World.read(self.config.world).card.to_json())
            if not self.resumed:
                keep(self.path / json_lines.METRICS_FILE)
                keep(self.path / warning_log.WARNINGS_FILE)
        together.wait_for_all("run folder")

    @property
    def run_id(self) -> str:
        """What tells this run from any other, also after its folder was moved; "" = not told."""
        return _run_id_in(self.path)

    def refuse_another_runs_checkpoints(self) -> None:
        """Refuse to save where another run began to: some file systems have no locks.

        Raises:
            CheckpointError: the folder of the checkpoints is that run's now.
        """
        if _run_id_in(self.checkpoints) not in ("", self.run_id):
            raise CheckpointError(
                f"config.checkpoint.dir: another run began to save in {str(self.checkpoints)!r}, "
                f"which {str(self.path)!r} saves in; give each run a folder of its own"
            )

    @property
    def is_finished(self) -> bool:
        """Whether the run to continue has all its iterations and its summary already."""
        if not (self.resumed and (self.path / report.SUMMARY_FILE).is_file()):
            return False
        done = checkpoint.existing(self.checkpoints, self.config.checkpoint.step)
        return done >= self.config.train.iterations

    def how_to_go_on(self) -> str:
        """Return a sentence that names the last checkpoint, and the command that goes on."""
        return stopping.how_to_go_on(self.path, self.checkpoints)

    def announce(self) -> None:
        """Tell where the run writes."""
        if self.writes:
            logging.info(
                "the run writes to %s; its %s comes with the first evaluation",
                self.path.absolute(),
                run_report.REPORT_FILE,
            )

    def next_commands(self, done: int) -> dict[str, str]:
        """Return {what to do next: command} after `done` iterations."""
        wanted = self.config.train.iterations
        following = commands.following(
            commands.given(), self.path, done=done, iterations=wanted, finished=done >= wanted
        )
        return {what: shlex.join(command) for what, command in following.items()}

    def make_writer(self, *, finished: int) -> writers.MetricWriter:
        """Return where metrics go; what was logged after iteration `finished` is dropped."""
        if not self.writes:
            return writers.NullWriter()
        return writers.make_writer(self.path, self.config, resume_step=finished)

    def write_films(
        self, iteration: int, outcome: Mapping[str, Evaluation]
    ) -> list[tuple[str, Path, video.Facts]]:
        """Write the evaluations' films as mp4; return ("<place>/<number>", path, facts) of each.

        Beside each lies its film strip as PNG, and what they show is in iteration_<number>.json.

        Raises:
            StorageError: they cannot be written.
        """
        with claim.told_as_storage_error(self.videos):
            return self._write_films(iteration, outcome)

    def _write_films(
        self, iteration: int, outcome: Mapping[str, Evaluation]
    ) -> list[tuple[str, Path, video.Facts]]:
        options, written, listed = self.config.video, [], []
        for place, result in outcome.items() if self.writes else ():
            # The files of imagined episodes carry no place: most videos are of those.
            mark = "" if place == "imagined" else f"{place}_"
            name = f"{mark}iteration_{iteration:05d}"
            paths = save_films(
                result.films, self.videos, name, fps=options.fps, overlay=options.overlay
            )
            for index, (film, path) in enumerate(zip(result.films, paths, strict=True)):
                strip = path.with_suffix(".png")
                video.write_strip(strip, film.side_by_side)
                facts = {"place": place, **film.facts}
                written.append((f"{place}/{index}", path, facts))
                listed.append({"video": path.name, "strip": strip.name, **facts})
        if listed:
            same = {"shared_starts": share_starts(self.config)}
            list_of = self.videos / f"iteration_{iteration:05d}.json"
            write_json(list_of, {"iteration": iteration, **same, "films": listed})
        return written

    def alarms(self) -> list[str]:
        """Return what the metrics show to be wrong, one sentence each."""
        return signals.alarms(record.read(self.path))

    def write_report(self) -> None:
        """Write report.html anew; one that fails is told, and training goes on."""
        if not self.writes:
            return
        warning_log.flush()
        try:
            run_report.write([self.path], self.path / run_report.REPORT_FILE)
        except StoppedError:
            raise
        except Exception as error:  # whatever it is, it is no reason to lose a run
            logging.warning("%s was not written: %r", run_report.REPORT_FILE, error)

    @classmethod
    def for_evaluation(cls, config: TrainConfig, restored: "RunFolder | None") -> "RunFolder":
        """Return the folder of an evaluation's result: log.run, or a new one with the date.

        Args:
            restored: the run that is evaluated; its own folder is never taken.

        Raises:
            CheckpointError: the folder named by log.run holds a run or an evaluation, or that of
                its films those of another one.
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
        folder._check_videos()
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
        whose = {
            "policy": hub.address_of(policy.checkpoint),
            "lora_adapter": hub.address_of(policy.lora_adapter),
        }
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
            outcome=counts(outcome),
            by_task={place: result.by_task for place, result in outcome.items()},
            settings=settings,
        )


def _run_id_in(folder: Path) -> str:
    path = folder / RUN_ID_FILE
    return path.read_text(errors="replace") if path.is_file() else ""
