"""Makes a recording out of a LeRobot dataset (v2.0, v2.1 or v3.0), without the lerobot package.

    python -m evac_jax.tools.import_lerobot --source DIR --out DIR2 --camera CAMERA.json \
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
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from evac_jax.dataset import EpisodeWriter
from evac_jax.errors import DataError
from evac_jax.telemetry.video import read_mp4
from evac_jax.tools import cards, importing

VERSIONS = ("v2.0", "v2.1", "v3.0")
FINGER_TRAVEL = 0.04  # metres that each finger of LIBERO's gripper moves


@dataclass(frozen=True)
class Episode:
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
        self._info = json.loads(self._text("meta/info.json"))
        version = str(self._info.get("codebase_version"))
        if version not in VERSIONS:
            raise DataError(f"{folder}: LeRobot version {version}; known are {VERSIONS}")
        self._grouped = version.startswith("v3")
        features = self._info["features"]
        pictures = [n for n, f in features.items() if f["dtype"] in ("image", "video")]
        if unknown := [view for view in views if view not in pictures]:
            raise DataError(f"--images: the dataset has no {unknown}; there are {pictures}")
        self.views = tuple(views)
        self._is_video = {view: features[view]["dtype"] == "video" for view in views}
        self.tasks = self._tasks()

    def _text(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except OSError as error:
            raise DataError(f"{self._folder / name}: cannot be read ({error.strerror})") from error

    def _table(self, name: str) -> pa.Table:
        try:
            return pq.read_table(self._folder / name)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self._folder / name}: no readable parquet file ({error})") from error

    def _tasks(self) -> list[str]:
        if not self._grouped:
            lines = [json.loads(line) for line in self._text("meta/tasks.jsonl").splitlines()]
            found = {line["task_index"]: line["task"] for line in lines}
        else:
            columns = self._table("meta/tasks.parquet").to_pydict()
            # pandas keeps the texts as its index.
            text = columns.get("task", columns.get("__index_level_0__"))
            found = dict(zip(columns["task_index"], text, strict=True))
        return [found[n] for n in range(len(found))]

    def episodes(self) -> Iterator[Episode]:
        """Yield all episodes."""
        if self._grouped:
            yield from self._grouped_episodes()
            return
        size = self._info["chunks_size"]
        for n in range(self._info["total_episodes"]):
            place = {"episode_chunk": n // size, "episode_index": n}
            rows = self._table(self._info["data_path"].format(**place))
            yield Episode(rows, n, place, dict.fromkeys(self.views, (place, 0)))

    def _grouped_episodes(self) -> Iterator[Episode]:
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
                yield Episode(table.filter(mine), line["episode_index"], place, videos)

    def frames(self, episode: Episode) -> np.ndarray:
        """Return an episode's pictures, uint8 [T V H W 3].

        Raises:
            DataError: views of different sizes, or a video that is too short.
        """
        count, views = len(episode.rows), []
        for view in self.views:
            if self._is_video[view]:
                place, begin = episode.videos[view]
                path = self._info["video_path"].format(video_key=view, **place)
                film = _film(self._folder / path)[begin : begin + count]
                if len(film) < count:
                    raise DataError(
                        f"{path}: episode {episode.index} needs {count} frames from {begin} on, "
                        f"there are {len(film)}"
                    )
            else:
                stored = (entry["bytes"] for entry in episode.rows[view].to_pylist())
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


@lru_cache(maxsize=4)
def _film(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path}: the video is missing")
    return read_mp4(path)[0]


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
            if missing := {args.state_key, args.action_key} - set(rows.column_names):
                raise DataError(f"{where}: no {sorted(missing)}; there are {rows.column_names}")
            actions = np.array(rows[args.action_key].to_pylist(), np.float32)
            marks = None
            if args.success in rows.column_names:
                marks = np.array(rows[args.success].to_pylist(), float).reshape(-1)
            writer.add(
                frames=importing.resize(data.frames(episode), args.image_size),
                actions=importing.check_actions(actions, args.gripper, where)[:-1],
                poses=poses_of(rows[args.state_key].to_pylist(), args.state),
                success=importing.success_of(args.success, marks, len(rows), where),
                task=int(rows["task_index"][0].as_py()),
                source=0,
            )
            count += 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = importing.parser_of(__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, nargs="+", help="features that are the views")
    parser.add_argument("--state_key", default="observation.state")
    parser.add_argument("--action_key", default="action")
    parser.add_argument("--state", choices=("axis_angle", "quaternion"), default="axis_angle")
    importing.finish(run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
