"""Reads a LeRobot dataset's folder (v2.0, v2.1 or v3.0) episode by episode, without lerobot.

Source: the layouts that huggingface/lerobot writes (`meta/info.json` names the paths).
"""

import io
import itertools
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from absl import logging
from PIL import Image

from evac_jax.errors import DataError
from evac_jax.files import cards
from evac_jax.telemetry.video import decode_mp4
from evac_jax.tools.episodes.lerobot_spans import Span, separate

VERSIONS = ("v2.0", "v2.1", "v3.0")
LARGEST = 2**31  # no index, count or time in seconds of a dataset reaches it
PLACE = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")  # of an episode in a video


@dataclass(frozen=True)
class LeRobotEpisode:
    """One episode of a dataset.

    Attributes:
        rows: its parquet rows in order.
        index: its number in the dataset.
        videos: view -> (fields of the video's path, first frame in that file).
    """

    rows: pa.Table
    index: int
    videos: dict[str, tuple[dict, int]]

    def column(self, name: str) -> list:
        """Return a column's values, one per frame.

        Raises:
            DataError: there is no such column, or a frame has no value in it.
        """
        if name not in self.rows.column_names:
            raise DataError(
                f"episode {self.index}: no {name!r}; there are {self.rows.column_names}"
            )
        values = self.rows[name].to_pylist()
        if empty := [n for n, value in enumerate(values) if value is None]:
            raise DataError(f"episode {self.index}: frame {empty[0]}: {name!r} is empty (null)")
        return values

    def numbers(self, name: str) -> np.ndarray:
        """Return a column as float32 [T ..].

        Raises:
            DataError: there is no such column, or a frame lacks a number or has another count.
        """
        values = self.column(name)
        try:
            return np.array(values, np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"episode {self.index}: {name!r}: expected equally many numbers in every frame "
                f"({error})"
            ) from error


class LeRobotDataset:
    """Reads a dataset's folder episode by episode.

    Raises:
        DataError: no such dataset, another version, or views that it does not have. Whatever is
            read later and is missing or damaged is a DataError too.
    """

    def __init__(self, folder: Path, views: Sequence[str]):
        self._folder = folder
        self._info = self._json("meta/info.json", self._text("meta/info.json"))
        needed = {"features", "data_path"}
        version = str(self._info.get("codebase_version"))
        if version not in VERSIONS:
            raise DataError(f"{folder}: LeRobot version {version}; known are {VERSIONS}")
        self._grouped = version.startswith("v3")
        needed |= {"fps"} if self._grouped else {"chunks_size", "total_episodes"}
        if missing := sorted(needed - self._info.keys()):
            raise DataError(f"{folder}/meta/info.json lacks {missing}")
        numbers = {name: self._info[name] for name in needed - {"features", "data_path"}}
        if wrong := {
            name: value
            for name, value in numbers.items()
            if not isinstance(value, int | float) or not 0 < value < LARGEST
        }:
            raise DataError(
                f"{folder}/meta/info.json: expected numbers above 0 and below {LARGEST}, got "
                f"{reprlib.repr(wrong)}"
            )
        kinds = self._kinds_of_features()
        pictures = [name for name, kind in kinds.items() if kind in ("image", "video")]
        if unknown := [view for view in views if view not in pictures]:
            raise DataError(f"--images: the dataset has no {unknown}; there are {pictures}")
        self.views = tuple(views)
        self._is_video = {view: kinds[view] == "video" for view in views}
        self._films: dict[str, _Film] = {}
        self._last: tuple[str, pa.Table] | None = None  # files of version 3 hold many episodes
        self._elsewhere: dict[int, list[str]] | None = None
        self.tasks = self._tasks()
        self._training = self._training_part()

    def _kinds_of_features(self) -> dict[str, str]:
        features, kinds = self._info["features"], {}
        for name, feature in features.items() if isinstance(features, dict) else ():
            kinds[name] = feature.get("dtype") if isinstance(feature, dict) else None
        if without := [name for name, kind in kinds.items() if not isinstance(kind, str)]:
            raise DataError(f"{self._folder}/meta/info.json: features without a dtype: {without}")
        return kinds

    def names(self, feature: str) -> list[str]:
        """Return the names of a feature's numbers; [] where the dataset does not tell them."""
        found = self._info["features"].get(feature, {}).get("names")
        lists = list(found.values()) if isinstance(found, dict) else [found]  # {"motors": [..]}
        if not all(isinstance(part, list) for part in lists):
            return []
        names = [name for part in lists for name in part]
        return names if all(isinstance(name, str) for name in names) else []

    def _text(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self._folder / name}: cannot be read ({error})") from error

    def _json(self, name: str, text: str) -> dict:
        try:
            return cards.json_object(text)
        except ValueError as error:
            raise DataError(f"{self._folder / name}: not a JSON object ({error})") from error

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        if not (self._folder / name).is_file():
            raise DataError(f"{self._folder / name}: the file is missing; copy or download it")
        try:
            # Unlike pq.read_table, this passes over columns that are missing: _check names them.
            with pq.ParquetFile(self._folder / name) as file:
                return file.read(columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._folder / name}: no readable parquet file ({error})") from error

    def _check(
        self, name: str, table: pa.Table, needed: Sequence[str], optional: Sequence[str] = ()
    ) -> None:
        """Refuse columns of other values than whole numbers from 0 on; times may have fractions.

        Args:
            optional: columns that may be missing, or empty in some rows.
        """
        for column in [*needed, *(name for name in optional if name in table.column_names)]:
            is_time = column.endswith("_timestamp")
            if column not in table.column_names:
                wrong = ["no such column"]
            elif not _holds_numbers(table[column].type, is_time):
                wrong = [table[column].type]
            else:
                values = table[column] if column in needed else table[column].drop_null()
                wrong = [v for v in values.to_pylist() if v is None or not 0 <= v < LARGEST]
            if wrong:
                raise DataError(
                    f"{self._folder / name}: {column!r}: expected {'' if is_time else 'whole '}"
                    f"numbers in 0..{LARGEST - 1}, got {wrong[0]}"
                )

    def _path(self, template: str, **fields: object) -> str:
        """Return a path that info.json gives as a template."""
        told = f"{self._folder}/meta/info.json: {template} = "
        told += reprlib.repr(self._info.get(template))
        try:
            path = self._info[template].format(**fields)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(f"{told} cannot be filled with {fields} ({error!r})") from error
        parts = Path(path).parts
        if not parts or ".." in parts or Path(path).is_absolute():
            raise DataError(f"{told}: expected a path inside of the dataset, got {path!r}")
        return path

    def _tasks(self) -> list[str]:
        name = "meta/tasks.parquet" if self._grouped else "meta/tasks.jsonl"
        if self._grouped:
            columns = self._table(name).to_pydict()
            # pandas keeps the texts as its index.
            text = columns.get("task", columns.get("__index_level_0__", ()))
            pairs = list(zip(columns.get("task_index", ()), text, strict=False))
        else:
            lines = [self._json(name, line) for line in self._text(name).splitlines()]
            pairs = [(line.get("task_index"), line.get("task")) for line in lines]
        numbers = [number for number, _ in pairs]
        if (
            not pairs
            or any(type(number) is not int for number in numbers)
            or set(numbers) != set(range(len(pairs)))
        ):
            raise DataError(
                f"{self._folder / name}: expected task_index 0..N-1, each once and with a text, "
                f"got {reprlib.repr(numbers)}"
            )
        found = {n: text for n, text in pairs if isinstance(text, str) and text}
        if unnamed := [number for number in numbers if number not in found]:
            raise DataError(f"{self._folder / name}: no text for task_index {unnamed}")
        return [found[n] for n in range(len(found))]

    def _training_part(self) -> range | None:
        """Return the episodes of the split "train"; None where it is the only split."""
        splits = self._info.get("splits")
        if not isinstance(splits, dict) or not set(splits) - {"train"}:
            return None
        try:
            low, high = map(int, splits.get("train", "0:0").split(":"))
        except (ValueError, AttributeError) as error:
            raise DataError(
                f'{self._folder}/meta/info.json: splits: expected "FIRST:END" for train, got '
                f"{reprlib.repr(splits.get('train'))}"
            ) from error
        return range(low, high)

    def is_held_out(self, episode: LeRobotEpisode) -> bool | None:
        """Whether an episode is outside of the split "train"; None where there is no other."""
        return None if self._training is None else episode.index not in self._training

    def episodes(self) -> Iterator[LeRobotEpisode]:
        """Yield all episodes."""
        if self._grouped:
            yield from self._grouped_episodes()
            return
        size = self._info["chunks_size"]
        if type(size) is not int or type(self._info["total_episodes"]) is not int or size < 1:
            raise DataError(
                f"{self._folder}/meta/info.json: expected whole numbers for chunks_size and "
                f"total_episodes, got {reprlib.repr(size)} and "
                f"{reprlib.repr(self._info['total_episodes'])}"
            )
        for n in range(self._info["total_episodes"]):
            place = {"episode_chunk": n // size, "episode_index": n}
            name = self._path("data_path", **place)
            rows = self._table(name)
            if not len(rows):
                raise DataError(f"{self._folder / name}: expected rows of episode {n}, got none")
            self._check(name, rows, (), ("task_index",))
            yield LeRobotEpisode(rows, n, dict.fromkeys(self.views, (place, 0)))

    def _grouped_episodes(self) -> Iterator[LeRobotEpisode]:
        lines = self._lines()
        spans = {view: self._spans(view, lines) for view in self.views if self._is_video[view]}
        for n, line in enumerate(lines):
            rows, videos = self._grouped_rows(line), {}
            for view, mine in spans.items():
                count = mine[n].end - mine[n].begin
                if abs(count - len(rows)) > 1:  # by one, the times may be rounded
                    raise DataError(
                        f"{self._folder}/meta/episodes: episode {mine[n].episode}: "
                        f"'videos/{view}/from_timestamp' to '.../to_timestamp' are {count} frames "
                        f"at fps = {self._info['fps']}, expected those of its {len(rows)} rows"
                    )
                videos[view] = mine[n].file, mine[n].begin
            yield LeRobotEpisode(rows, line["episode_index"], videos)

    def _lines(self) -> list[dict]:
        """Return what meta/episodes tells of where each episode is."""
        columns = ["episode_index", "data/chunk_index", "data/file_index"]
        for view in self.views:
            columns += [f"videos/{view}/{name}" for name in PLACE if self._is_video[view]]
        files = sorted((self._folder / "meta" / "episodes").glob("**/*.parquet"))
        if not files:
            raise DataError(
                f"{self._folder}/meta/episodes: expected chunk-000/file-000.parquet and so on, got "
                "no parquet file; copy or download them"
            )
        lines = []
        for file in files:
            name = str(file.relative_to(self._folder))
            table = self._table(name, [*columns, "length"])
            self._check(name, table, columns, ["length"])
            lines += table.to_pylist()
        return lines

    def _spans(self, view: str, lines: Sequence[dict]) -> list[Span]:
        """Return where each episode is in the videos of a view, no two in the same frames."""
        spans = []
        for line in lines:
            chunk, number, *times = (line[f"videos/{view}/{name}"] for name in PLACE)
            begin, end = (round(time * self._info["fps"]) for time in times)
            file = {"chunk_index": chunk, "file_index": number}
            spans.append(Span(line["episode_index"], file, begin, end))
        separate(spans, self._folder, lambda file: self._path("video_path", video_key=view, **file))
        return spans

    def _grouped_rows(self, line: dict) -> pa.Table:
        """Return an episode's rows, from the file that its metadata names or from a neighbour.

        Some versions of lerobot wrote the number of the file before or after the right one.
        """
        index = line["episode_index"]
        fields = {name: line[f"data/{name}"] for name in ("chunk_index", "file_index")}
        named, count = self._path("data_path", **fields), line.get("length")
        others = (file for file in self._files_of(index) if file != named)
        for file in itertools.chain([named], others):
            if not (self._folder / file).is_file():
                continue
            rows = self._rows_in(file, index)
            if len(rows) and len(rows) == (count or len(rows)):
                if file != named:
                    told = "episode %s: meta/episodes names %s, its rows are in %s"
                    logging.warning(told, index, named, file)
                return rows
        missing = "" if (self._folder / named).is_file() else ", which is missing"
        raise DataError(
            f"{self._folder}: episode {index}: meta/episodes says {count or 'its'} rows are in "
            f"{named}{missing}; files with rows of it are {self._files_of(index)}, none of them "
            "has that many"
        )

    def _rows_in(self, path: str, episode: int) -> pa.Table:
        if self._last is None or self._last[0] != path:
            table = self._table(path)
            self._check(path, table, ["episode_index"], ["task_index"])
            self._last = path, table
        table = self._last[1]
        return table.filter(pc.equal(table["episode_index"], episode))

    def _files_of(self, episode: int) -> list[str]:
        """Return the data files that hold rows of an episode."""
        if self._elsewhere is None:
            self._elsewhere = {}
            top = self._folder / Path(self._info["data_path"]).parts[0]
            for file in sorted(top.glob("**/*.parquet")):
                name = str(file.relative_to(self._folder))
                table = self._table(name, ["episode_index"])
                self._check(name, table, ["episode_index"])
                for n in pc.unique(table["episode_index"]).to_pylist():
                    self._elsewhere.setdefault(n, []).append(name)
        return self._elsewhere.get(episode, [])

    def frames(self, episode: LeRobotEpisode) -> np.ndarray:
        """Return an episode's pictures, uint8 [T V H W 3].

        Raises:
            DataError: pictures of different sizes or damaged ones, or a video that is too short.
        """
        views = [
            self._video(episode, view) if self._is_video[view] else self._pictures(episode, view)
            for view in self.views
        ]
        if len({film.shape for film in views}) > 1:
            raise DataError(
                f"episode {episode.index}: views of different sizes "
                f"{[film.shape[1:3] for film in views]}; import one, or resize them first"
            )
        return np.stack(views, 1)

    def _video(self, episode: LeRobotEpisode, view: str) -> np.ndarray:
        place, begin = episode.videos[view]
        count, path = len(episode.rows), self._path("video_path", video_key=view, **place)
        if view not in self._films or not self._films[view].can_give(path, begin):
            self._films[view] = _Film(self._folder, path)
        film = self._films[view].take(begin, count)
        ended = self._grouped or self._films[view].ended()
        if len(film) < count or not ended:
            raise DataError(
                f"{path}: episode {episode.index} has {count} rows from frame {begin} on, "
                f"the video {'more' if not ended else len(film)} frames"
            )
        return film

    def _pictures(self, episode: LeRobotEpisode, view: str) -> np.ndarray:
        where, frames = f"episode {episode.index}", []
        for n, entry in enumerate(episode.column(view)):
            stored = entry.get("bytes") if isinstance(entry, dict) else entry
            if not isinstance(stored, bytes) or not stored:
                raise DataError(
                    f"{where}: frame {n} of {view} holds no picture; only pictures inside of the "
                    "parquet file, or videos, are read"
                )
            try:
                frames.append(np.asarray(Image.open(io.BytesIO(stored)).convert("RGB")))
            # A damaged picture raises many exceptions.
            except Exception as error:
                raise DataError(f"{where}: frame {n} of {view} is damaged ({error})") from error
            if frames[n].shape != frames[0].shape:
                raise DataError(
                    f"{where}: frame {n} of {view} is {frames[n].shape[:2]}, the first "
                    f"{frames[0].shape[:2]}; one camera cannot fit both"
                )
        return np.stack(frames)


def _holds_numbers(kind: pa.DataType, is_time: bool) -> bool:
    """Whether a column is of whole numbers, of any ones for a time, or has no value at all."""
    is_whole = pa.types.is_integer(kind) or pa.types.is_null(kind)
    return is_whole or (is_time and pa.types.is_floating(kind))


class _Film:
    """One video, decoded forwards: files of version 3 hold many episodes and fit no memory."""

    def __init__(self, folder: Path, path: str):
        if not (folder / path).is_file():
            raise DataError(f"{folder / path}: the video is missing")
        self._path, self._next, self._frames = path, 0, decode_mp4(folder / path)

    def can_give(self, path: str, begin: int) -> bool:
        """Whether frame `begin` of the video `path` still lies ahead."""
        return path == self._path and begin >= self._next

    def take(self, begin: int, count: int) -> np.ndarray:
        """Return up to `count` frames from `begin` on, uint8 [T H W 3]."""
        taken = list(itertools.islice(self._frames, begin - self._next, begin - self._next + count))
        self._next = begin + len(taken)
        return np.stack(taken) if taken else np.zeros((0, 0, 0, 3), np.uint8)

    def ended(self) -> bool:
        """Whether no frame is left; takes one if there is."""
        self._next += 1
        return next(self._frames, None) is None
