"""Reads a run's folder into plain values: what `run_report` shows. Files of older runs may lack."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evac_jax.config.presets import differences
from evac_jax.errors import DataError
from evac_jax.files import cards
from evac_jax.telemetry import json_lines, launches, report, warning_log
from evac_jax.telemetry.report import wilson_interval

CONFIG_FILE = "config.json"
# Sections and fields that do not change what a run learns, but for chance.
APART = ("seed", "log", "checkpoint", "video", "collect", "serve", "train.iterations")
MOST_NAMED = 3  # settings that name a group of runs
LONGEST = 40  # letters of such a setting


def videos_of(run: Path, shared: str | None) -> Path:
    """Return where the films of the run in the folder `run` lie.

    Args:
        shared: `video.dir`, in which each run has a folder of its own name; "" = in its folder.
    """
    return Path(shared, run.absolute().name) if shared else run / "videos"


@dataclasses.dataclass(frozen=True)
class Measure:
    """A success rate that a run logs: its title and its metrics, rate and number of episodes."""

    title: str
    rate: str
    count: str


EVALUATIONS = (
    Measure("imagined", "eval/imagined/success_rate", "eval/imagined/num_trajectories"),
    Measure("ground truth", "eval/ground_truth/success_rate", "eval/ground_truth/num_trajectories"),
)
TRAINING = Measure("training episodes", "env/success_rate", "env/num_trajectories")
TWINS = (
    Measure("twin, imagined", "eval/imagined_success", "eval/twin_episodes"),
    Measure("twin, real", "eval/real_success", "eval/twin_episodes"),
)


@dataclasses.dataclass(frozen=True)
class Rate:
    """A success rate after some iterations; `interval` is None where n is not known."""

    iteration: int
    rate: float
    n: int | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval."""
        return wilson_interval(round(self.rate * self.n), self.n) if self.n else None

    @property
    def short(self) -> str:
        """The rate with its interval, in per cent."""
        ends = ", ".join(f"{100 * end:.1f}" for end in self.interval or ())
        return f"{100 * self.rate:.1f} %" + (f" [{ends}]" if ends else "")

    def __str__(self) -> str:
        return self.short + (f" n={self.n}" if self.n else "")


@dataclasses.dataclass(frozen=True)
class Record:
    """A run as its folder tells it.

    Attributes:
        path: the folder.
        config: its newest configuration.
        lines: metrics, one mapping per iteration, in order.
        launches: how it was started, and started again; () = not recorded.
        warnings: what it warned of.
        films: of its evaluations, in order; see `RunFolder.write_films`.
        summarised: whether it has its summary.
    """

    path: Path
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    launches: Sequence[Mapping[str, Any]]
    warnings: Sequence[Mapping[str, Any]]
    films: Sequence[Mapping[str, Any]]
    summarised: bool

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.absolute().name

    def setting(self, name: str, default: Any = None) -> Any:
        """Return the field "section.field" of the configuration."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part, default) if isinstance(value, Mapping) else default
        return value

    @property
    def iterations(self) -> int:
        """How many the run is to have."""
        return int(self.setting("train.iterations", self.done))

    @property
    def done(self) -> int:
        """How many it has."""
        return max((line["iteration"] for line in self.lines), default=0)

    @property
    def finished(self) -> bool:
        """Whether it has all of them and its summary."""
        return self.summarised and self.done >= self.iterations

    @property
    def videos(self) -> Path:
        """Folder of its films."""
        return videos_of(self.path, self.setting("video.dir"))

    def series(self, name: str) -> dict[int, float | None]:
        """Return {iteration: value} of a metric; None where it was not finite."""
        return {line["iteration"]: line[name] for line in self.lines if name in line}

    def rates(self, measure: Measure) -> list[Rate]:
        """Return the success rates of a measure, in order."""
        counts = self.series(measure.count)
        return [
            Rate(iteration, rate, int(count) if (count := counts.get(iteration)) else None)
            for iteration, rate in self.series(measure.rate).items()
            if rate is not None
        ]

    def seconds(self) -> dict[str, float]:
        """Return the mean seconds of an iteration by phase, "step" being all of it."""
        timed = [line for line in self.lines if line.get("time/step") is not None]
        names = dict.fromkeys(n for line in timed for n in line if n.startswith("time/"))
        return {
            name.removeprefix("time/"): sum(line.get(name) or 0.0 for line in timed) / len(timed)
            for name in names
        }


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ by chance only; `name` tells how they differ from other groups."""

    name: str
    records: Sequence[Record]


def read(folder: Path) -> Record:
    """Read a run's folder.

    Raises:
        DataError: it is no run, or its configuration or metrics are damaged.
    """
    path = folder / CONFIG_FILE
    if not (path.is_file() and (folder / json_lines.METRICS_FILE).is_file()):
        raise DataError(
            f"{str(folder)!r}: expected the folder of a run, with {CONFIG_FILE} and "
            f"{json_lines.METRICS_FILE}"
        )
    config = cards.read_json(path)
    if "algorithm" not in config:
        raise DataError(f"{path}: expected the configuration of a run, with its algorithm")
    record = Record(
        path=folder,
        config=config,
        lines=sorted(json_lines.read_metrics(folder), key=lambda line: line["iteration"]),
        launches=json_lines.read_lines(folder / launches.LAUNCHES_FILE),
        warnings=json_lines.read_lines(folder / warning_log.WARNINGS_FILE),
        films=(),
        summarised=(folder / report.SUMMARY_FILE).is_file(),
    )
    films = [cards.read_json(path) for path in sorted(record.videos.glob("iteration_*.json"))]
    return dataclasses.replace(record, films=[f for f in films if f["iteration"] <= record.done])


def grouped(records: Sequence[Record]) -> list[Group]:
    """Sort runs into groups that differ in their seed at most, in the order of their first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(_compared(record), sort_keys=True), []).append(record)
    members = list(groups.values())
    first = _compared(members[0][0]) if members else {}
    differing = dict.fromkeys(
        field for own in members for field in differences(first, _compared(own[0]))
    )
    return [Group(_name(own, differing, len(members)), own) for own in members]


def _name(records: Sequence[Record], differing: Mapping[str, Any], groups: int) -> str:
    if groups > 1 and len(differing) <= MOST_NAMED:
        values = {field: str(records[0].setting(field)) for field in differing}
        return ", ".join(
            # The end of a path tells more than its beginning.
            f"{field}={value if len(value) <= LONGEST else '..' + value[-LONGEST:]}"
            for field, value in values.items()
        )
    return ", ".join(record.name for record in records)


def _compared(record: Record) -> dict[str, Any]:
    """Return a configuration without what does not change what a run learns."""
    kept = {key: value for key, value in record.config.items() if key not in APART}
    train = kept.get("train", {})
    return kept | {"train": {k: v for k, v in train.items() if f"train.{k}" not in APART}}
