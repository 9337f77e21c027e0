r"""Makes a recording out of a LeRobot dataset (v2.0, v2.1 or v3.0), without the lerobot package.

    python -m evac_jax.tools.episodes.import_lerobot --source DIR --out DIR2 --camera CAMERA.json \
        --images observation.images.image --state axis_angle --gripper closes --image_size 256

Pictures come from mp4 files or from PNGs inside the parquet files. A dataset has as many actions as
frames; the last action of an episode leads to no frame and is left out.

Source: the layouts that huggingface/lerobot writes (`meta/info.json` names the paths).
"""

import argparse
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from evac_jax.errors import DataError
from evac_jax.files import cards
from evac_jax.files.recordings import EpisodeWriter
from evac_jax.telemetry.video import decode_mp4
from evac_jax.tools.episodes import importing

VERSIONS = ("v2.0", "v2.1", "v3.0")
FINGER_TRAVEL = 0.04  # metres that each finger of LIBERO's gripper moves


@dataclass(frozen=True)
class LeRobotEpisode:
    """One episode of a dataset.

    Attributes:
        rows: its parquet rows in order.
        index: its number in the dataset.
        place: where its files are; the fields of the path templates in info.json.
        videos: view -> (fields of the video's path, first frame in that file).
    """

    rows: pa.Table
    index: int
    place: dict
    videos: dict[str, tuple[dict, int]]


class LeRobotDataset:
    """Reads a dataset's folder episode by episode.

    Raises:
        DataError: no such dataset, another version, or views that it does not have.
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
        features = self._info["features"]
        pictures = [n for n, f in features.items() if f["dtype"] in ("image", "video")]
        if unknown := [view for view in views if view not in pictures]:
            raise DataError(f"--images: the dataset has no {unknown}; there are {pictures}")
        self.views = tuple(views)
        self._is_video = {view: features[view]["dtype"] == "video" for view in views}
        self._films: dict[str, _Film] = {}
        self.tasks = self._tasks()

    def _text(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except OSError as error:
            raise DataError(f"{self._folder / name}: cannot be read ({error.strerror})") from error

    def _json(self, name: str, text: str) -> dict:
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise DataError(f"{self._folder / name}: not a JSON object ({error})") from error

    def _table(self, name: str) -> pa.Table:
        try:
            return pq.read_table(self._folder / name)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self._folder / name}: no readable parquet file ({error})") from error

    def _tasks(self) -> list[str]:
        name = "meta/tasks.parquet" if self._grouped else "meta/tasks.jsonl"
        if self._grouped:
            columns = self._table(name).to_pydict()
            # pandas keeps the texts as its index.
            text = columns.get("task", columns.get("__index_level_0__", ()))
            found = dict(zip(columns.get("task_index", ()), text, strict=False))
        else:
            lines = [self._json(name, line) for line in self._text(name).splitlines()]
            found = {line.get("task_index"): line.get("task") for line in lines}
        if not found or set(found) != set(range(len(found))):
            raise DataError(
                f"{self._folder / name}: expected task_index 0..N-1, each with a text, "
                f"got {list(found)}"
            )
        return [found[n] for n in range(len(found))]

    def episodes(self) -> Iterator[LeRobotEpisode]:
        """Yield all episodes."""
        if self._grouped:
            yield from self._grouped_episodes()
            return
        size = self._info["chunks_size"]
        for n in range(self._info["total_episodes"]):
            place = {"episode_chunk": n // size, "episode_index": n}
            rows = self._table(self._info["data_path"].format(**place))
            yield LeRobotEpisode(rows, n, place, dict.fromkeys(self.views, (place, 0)))

    def _grouped_episodes(self) -> Iterator[LeRobotEpisode]:
        files = sorted((self._folder / "meta" / "episodes").glob("**/*.parquet"))
        fps, path, table = self._info["fps"], "", None
        for file in files:
            for line in self._table(str(file.relative_to(self._folder))).to_pylist():
                place = {"chunk_index": line["data/chunk_index"]}
                place["file_index"] = line["data/file_index"]
                if path != (path := self._info["data_path"].format(**place)):
                    table = self._table(path)
                mine = pc.equal(table["episode_index"], line["episode_index"])
                videos = {}
                for view in self.views:
                    if self._is_video[view]:
                        names = ("chunk_index", "file_index")
                        where = {name: line[f"videos/{view}/{name}"] for name in names}
                        begin = round(line[f"videos/{view}/from_timestamp"] * fps)
                        videos[view] = where, begin
                rows = table.filter(mine)
                if len(rows) != line.get("length", len(rows)):
                    raise DataError(
                        f"{path}: episode {line['episode_index']} has {len(rows)} rows, "
                        f"{file.name} of meta/episodes says {line['length']}"
                    )
                yield LeRobotEpisode(rows, line["episode_index"], place, videos)

    def frames(self, episode: LeRobotEpisode) -> np.ndarray:
        """Return an episode's pictures, uint8 [T V H W 3].

        Raises:
            DataError: views of different sizes, or a video that is too short.
        """
        count, views = len(episode.rows), []
        for view in self.views:
            if self._is_video[view]:
                place, begin = episode.videos[view]
                path = self._info["video_path"].format(video_key=view, **place)
                if view not in self._films or not self._films[view].can_give(path, begin):
                    self._films[view] = _Film(self._folder, path)
                film = self._films[view].take(begin, count)
                ended = self._grouped or self._films[view].ended()
                if len(film) < count or not ended:
                    raise DataError(
                        f"{path}: episode {episode.index} has {count} rows from frame {begin} on, "
                        f"the video {'more' if not ended else len(film)} frames"
                    )
            else:
                stored = [entry["bytes"] for entry in episode.rows[view].to_pylist()]
                if not all(stored):
                    raise DataError(
                        f"episode {episode.index}: {view} names picture files; only pictures "
                        "inside of the parquet file, or videos, are read"
                    )
                film = np.stack(
                    [np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in stored]
                )
            views.append(film)
        if len({film.shape for film in views}) > 1:
            raise DataError(
                f"episode {episode.index}: views of different sizes "
                f"{[film.shape[1:3] for film in views]}; import one, or resize them first"
            )
        return np.stack(views, 1)


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


def poses_of(state: np.ndarray, kind: str) -> np.ndarray:
    """Return poses [T 8]: xyz, quaternion xyzw, opening 0..1.

    Args:
        state: [T 8]; "quaternion": like the result; "axis_angle": xyz, rotation vector and the
            positions of two fingers, +-0.04 m when open, as LIBERO has it.
        kind: of --state.
    """
    state = np.asarray(state, np.float32)
    if state.ndim != 2 or state.shape[1] != 8 or not np.isfinite(state).all():
        raise DataError(f"--state={kind}: expected 8 finite numbers per frame, got {state.shape}")
    if kind == "quaternion":
        if (state[:, 7] < -0.001).any() or (state[:, 7] > 1.001).any():
            raise DataError(
                f"--state=quaternion: expected a gripper opening of 0..1, got "
                f"{state[:, 7].min():.3f}..{state[:, 7].max():.3f}"
            )
        return state
    vector, fingers = state[:, 3:6], state[:, 6:]
    angle = np.linalg.norm(vector, axis=1, keepdims=True)
    xyz = 0.5 * np.sinc(angle / (2 * np.pi)) * vector  # sin(angle / 2) * axis, also at 0
    opening = (np.abs(fingers).sum(1, keepdims=True) / (2 * FINGER_TRAVEL)).clip(0, 1)
    parts = (state[:, :3], xyz, np.cos(angle / 2), opening)
    return np.concatenate(parts, axis=1, dtype=np.float32)


def run(args: argparse.Namespace) -> int:
    """Import as told; return the number of episodes."""
    data, count = LeRobotDataset(args.source, args.images), 0
    episodes = data.episodes()
    first = next(episodes, None)
    if first is None:
        raise DataError(f"--source={args.source}: no episodes")
    views, *stored = data.frames(first).shape[1:4]
    intrinsic, c2w = importing.read_camera(args.camera, views, tuple(stored), args.image_size)
    size = (args.image_size, args.image_size) if args.image_size else stored
    with EpisodeWriter(
        args.out,
        image_shape=(views, *size, 3),
        instructions=data.tasks,
        sources=[args.name],
        intrinsic=intrinsic,
        c2w=c2w,
        facts=cards.card(dataset=args.source.name),
    ) as writer:
        for episode in itertools.chain([first], episodes):
            where, rows = f"episode {episode.index}", episode.rows
            needed = {args.state_key, args.action_key, "task_index", "frame_index"}
            if missing := needed - set(rows.column_names):
                raise DataError(f"{where}: no {sorted(missing)}; there are {rows.column_names}")
            if rows["frame_index"].to_pylist() != list(range(len(rows))):
                raise DataError(f"{where}: frame_index does not count 0..{len(rows) - 1}")
            actions = np.array(rows[args.action_key].to_pylist(), np.float32)
            marks = None
            if args.success in rows.column_names:
                marks = rows[args.success].to_pylist()
            writer.add(
                frames=importing.resize(data.frames(episode), args.image_size),
                actions=importing.check_actions(actions, args.gripper, where)[:-1],
                poses=importing.check_poses(
                    poses_of(rows[args.state_key].to_pylist(), args.state), where
                ),
                success=importing.success_of(args.success, marks, len(rows), where),
                task=int(rows["task_index"][0].as_py()),
                source=0,
            )
            count += 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = importing.parser_of("episodes.import_lerobot", __doc__)
    parser.add_argument("--images", required=True, nargs="+", help="features that are the views")
    parser.add_argument("--state_key", default="observation.state", help="feature of the poses")
    parser.add_argument("--action_key", default="action", help="feature of the actions")
    parser.add_argument(
        "--state",
        choices=("axis_angle", "quaternion"),
        default="axis_angle",
        help="how a pose is written: xyz, rotation vector, two fingers; or as ours",
    )
    importing.finish(run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
