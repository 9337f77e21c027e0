"""Writes a run's metrics: always JSON lines; TensorBoard and Weights & Biases if configured.

Only process 0 writes. Figures that are not finite are not written as numbers, because JSON cannot
represent them and viewers silently draw gaps. In the JSON lines they are null and their names are
listed; elsewhere they are left out. `log/non_finite` counts them.
"""

import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from absl import logging

from evac_jax.config.build import to_dict
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError
from evac_jax.files.atomic import replacing
from evac_jax.telemetry.json_lines import METRICS_FILE, read_metrics
from evac_jax.telemetry.tensorboard import TensorBoardWriter, finite
from evac_jax.telemetry.video import NOTHING, Facts

NON_FINITE = "log/non_finite"


class MetricWriter(Protocol):
    """The interface of a metric writer. Steps are finished iterations."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record figures of iteration `step`; several calls for one step complete each other."""
        ...

    def text(self, name: str, text: str) -> None:
        """Record a text that belongs to the whole run."""
        ...

    def page(self, name: str, path: Path) -> None:
        """Record an HTML file that belongs to the whole run."""
        ...

    def video(self, name: str, path: Path, step: int, facts: Facts = NOTHING) -> None:
        """Record the mp4 file at `path`, before the figures of the same step."""
        ...

    def checkpoint(self, path: Path, step: int) -> None:
        """Record the folder of a checkpoint."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class NullWriter:
    """Writes nothing; for processes other than the first, and for evaluation without a run."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Do nothing."""

    def text(self, name: str, text: str) -> None:
        """Do nothing."""

    def page(self, name: str, path: Path) -> None:
        """Do nothing."""

    def video(self, name: str, path: Path, step: int, facts: Facts = NOTHING) -> None:
        """Do nothing."""

    def checkpoint(self, path: Path, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class JsonlWriter:
    """One JSON object per iteration, on disk as soon as `write` returns.

    A line holds "iteration", the figures by name and, when some were not finite, their names under
    "non_finite". A second `write` for the same iteration completes its line.

    Args:
        path: the file; it is created, or continued.
        resume_step: finished iterations of the restored checkpoint. Lines of later iterations are
            moved to the end of <path>.later; the resumed run writes them again.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self._path = path
        found = read_metrics(path.parent)
        lines = [line for line in found if line["iteration"] <= resume_step]
        if later := [line for line in found if line["iteration"] > resume_step]:
            kept = path.with_name(f"{path.name}.later")
            with kept.open("a") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in later)
            ends = later[0]["iteration"], later[-1]["iteration"]
            logging.info("the metrics of iterations %d to %d are kept in %s", *ends, kept)
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        self._line: dict[str, Any] = lines[-1] if lines else {}
        self._file = path.open("r+b")
        self._file.seek(0, 2)
        last = len(json.dumps(self._line)) + 1 if lines else 0
        self._start = self._file.tell() - last

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append a line, or complete the last one if it belongs to the same iteration."""
        if self._line.get("iteration") != step:
            self._line = {"iteration": step}
            self._start = self._file.seek(0, 2)
        lost = set(self._line.pop("non_finite", ())) - set(scalars)
        for name, value in scalars.items():
            finite = math.isfinite(value)
            self._line[name] = float(value) if finite else None
            lost |= set() if finite else {name}
        if lost:
            self._line["non_finite"] = sorted(lost)
        # Overwrite the old text instead of truncating first: a kill in between must not lose it.
        self._file.seek(self._start)
        self._file.write(f"{json.dumps(self._line)}\n".encode())
        self._file.flush()
        self._file.truncate()

    def text(self, name: str, text: str) -> None:
        """Write <name>.txt beside the metrics."""
        with replacing(self._path.parent / f"{name}.txt") as temporary:
            temporary.write_text(text)

    def page(self, name: str, path: Path) -> None:
        """Do nothing: the page is a file already."""

    def video(self, name: str, path: Path, step: int, facts: Facts = NOTHING) -> None:
        """Do nothing: the video is a file already."""

    def checkpoint(self, path: Path, step: int) -> None:
        """Do nothing: the checkpoint is a folder already."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def last_iteration(folder: Path) -> int:
    """Return the last iteration that a run's metrics tell of; 0 where none trained."""
    return max((line["iteration"] for line in read_metrics(folder)), default=0)


class WandbWriter:
    """Weights & Biases; all its files are inside the run's folder.

    The run's id is stored in `wandb_id`, so that a resumed run continues its own page. The x axis
    is the figure "iteration", because W&B's own step can never go back.

    Args:
        more: of "report", "videos" and "checkpoint": pages, the films as a table that can be
            filtered, the last checkpoint as an artifact.

    Raises:
        ConfigError: W&B is not installed or does not start (no account, no network).
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        mode: Literal["offline", "online"],
        config: Mapping[str, Any],
        more: Sequence[str] = (),
    ):
        # Artifacts wait there until they are sent; by default in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"config.log.wandb={mode!r} needs the package wandb: {error}. Install "
                "requirements.txt, or set --config.log.wandb=disabled"
            ) from error
        self._wandb, self._more, self._name = wandb, more, folder.name
        self._films: Any = None  # the table of all films of this process, from the first one on
        self._unsent = False
        file = folder / "wandb_id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=file.read_text(),
                resume="allow" if mode == "online" else None,
                mode=mode,
                dir=str(folder),
                config=dict(config),
                # W&B must not write to the console, where the progress bar is.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"config.log.wandb={mode!r}, but Weights & Biases did not start: {error}. "
                "Log in with `wandb login`, or set --config.log.wandb=offline (or disabled)"
            ) from error
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the finite figures, and the films that came since."""
        figures: dict[str, Any] = {"iteration": step, **finite(scalars)}
        if self._unsent:
            figures["videos"], self._unsent = self._films, False
        self._run.log(figures)

    def text(self, name: str, text: str) -> None:
        """Keep the text in the run's summary."""
        self._run.summary[name] = text

    def page(self, name: str, path: Path) -> None:
        """Send the file, if that was asked for."""
        if "report" in self._more:
            self._run.log({name: self._wandb.Html(path.read_text(), inject=False)})

    def video(self, name: str, path: Path, step: int, facts: Facts = NOTHING) -> None:
        """Send the mp4 file as it is, or as a row of the table of films."""
        film = self._wandb.Video(str(path), format="mp4")
        if "videos" not in self._more:
            self._run.log({"iteration": step, name: film})
            return
        row = {"iteration": step, "name": name, **facts, "video": film}
        if self._films is None:
            self._films = self._wandb.Table(columns=list(row), log_mode="MUTABLE")
        self._films.add_data(*(row[column] for column in self._films.columns))
        self._unsent = True

    def checkpoint(self, path: Path, step: int) -> None:
        """Send the folder as an artifact, if that was asked for."""
        if "checkpoint" in self._more:
            name = re.sub(r"[^\w.-]", "-", f"{self._name}-checkpoint")  # what W&B allows
            artifact = self._wandb.Artifact(name, type="model", metadata={"iteration": step})
            artifact.add_dir(str(path), policy="immutable")  # not copied first
            self._run.log_artifact(artifact)

    def close(self) -> None:
        """Wait until everything is sent or, offline, written."""
        self._run.finish()


class FanOut:
    """Passes everything on to several writers and counts the figures that are not finite."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = writers
        self._step: int | None = None
        self._count = 0

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record figures, and in `log/non_finite` how many of this iteration are not finite."""
        lost = len(scalars) - len(finite(scalars))
        self._count = lost + (self._count if step == self._step else 0)
        self._step = step
        for writer in self._writers:
            writer.write(step, {**scalars, NON_FINITE: float(self._count)})

    def text(self, name: str, text: str) -> None:
        """Record a text."""
        for writer in self._writers:
            writer.text(name, text)

    def page(self, name: str, path: Path) -> None:
        """Record a page."""
        for writer in self._writers:
            writer.page(name, path)

    def video(self, name: str, path: Path, step: int, facts: Facts = NOTHING) -> None:
        """Record a video."""
        for writer in self._writers:
            writer.video(name, path, step, facts)

    def checkpoint(self, path: Path, step: int) -> None:
        """Record a checkpoint."""
        for writer in self._writers:
            writer.checkpoint(path, step)

    def close(self) -> None:
        """Close all writers."""
        for writer in self._writers:
            writer.close()


def make_writer(folder: Path, config: TrainConfig, *, resume_step: int = 0) -> MetricWriter:
    """Return the writer that `config.log` asks for.

    Args:
        folder: the run's own folder.
        config: of the run; W&B and TensorBoard show it.
        resume_step: finished iterations of a resumed run; what was logged after them is set aside.

    Raises:
        ConfigError: Weights & Biases cannot start.
    """
    writers: list[MetricWriter] = [JsonlWriter(folder / METRICS_FILE, resume_step)]
    if config.log.tensorboard:
        tensorboard = TensorBoardWriter(folder / "tensorboard", resume_step)
        tensorboard.text("config", json.dumps(to_dict(config), indent=2))
        writers.append(tensorboard)
    log = config.log
    if log.wandb != "disabled":
        writers.append(
            WandbWriter(folder, log.wandb_project, log.wandb, to_dict(config), log.wandb_more)
        )
    return FanOut(writers)
