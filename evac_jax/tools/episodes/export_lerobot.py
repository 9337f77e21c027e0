r"""Writes a recording as a LeRobot dataset (v3.0), without the lerobot package.

    python -m evac_jax.tools.episodes.export_lerobot --data EPISODES --out DATASET --fps 20
    hf upload OWNER/NAME DATASET --type dataset

Pictures are PNGs inside of the parquet files, so `import_lerobot` gives back the same frames,
actions, poses, success, instructions and split; the log prints the command. --video writes mp4
files instead: smaller, and no longer equal. Episodes are put in the order of the split: first those
for training, then those held out, which LeRobot knows as "test". Who played and the start ids are
kept in meta/episodes, where no importer reads them.
"""

import argparse
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from PIL import Image

from evac_jax.errors import DataError
from evac_jax.files import recordings
from evac_jax.files.atomic import whole_folder
from evac_jax.files.cards import write_json
from evac_jax.files.recordings import Episodes
from evac_jax.telemetry.video import write_mp4
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.episodes.lerobot_statistics import Statistics

CAMERA_FILE = "meta/camera.json"  # as import_lerobot --camera reads it
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA, VIDEO = f"data/{FILE}.parquet", f"videos/{{video_key}}/{FILE}.mp4"
PER_CHUNK = 1000  # files of a folder
FILE_BYTES = 100 * 2**20
STATE = ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper_opening")
ACTION = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper_closes")
# Column -> type of an entry and names of a vector's numbers; those of LeRobot come last.
COLUMNS: dict[str, tuple[pa.DataType, tuple[str, ...] | None]] = {
    "observation.state": (pa.float32(), STATE),
    "action": (pa.float32(), ACTION),
    "success": (pa.bool_(), None),
    "timestamp": (pa.float32(), None),
    "frame_index": (pa.int64(), None),
    "episode_index": (pa.int64(), None),
    "index": (pa.int64(), None),
    "task_index": (pa.int64(), None),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a recording does not tell.

    Attributes:
        fps: actions per second, whole.
        video: mp4 files in the place of PNGs.
        robot: name of the robot; "" = unknown.
        license: of the data, as the Hub knows it; "" = unknown.
    """

    fps: int
    video: bool = False
    robot: str = ""
    license: str = ""


def export(data: Episodes, out: Path, options: Options) -> None:
    """Write episodes to the new folder `out`, complete or not at all.

    Raises:
        DataError: `out` exists, there are no episodes, an instruction is empty, or frames have an
            odd size that a video cannot have.
    """
    if out.exists():
        raise DataError(f"{out} exists; choose another folder or remove it")
    if not data.num_episodes:
        raise DataError("there is no episode to export")
    if not all(data.asked):
        raise DataError("an episode's instruction is empty, which LeRobot cannot tell from none")
    height, width = data.frames.shape[2:4]
    if options.video and (height % 2 or width % 2):
        raise DataError(f"--video: expected frames of an even size, got {height} x {width}")
    order = np.argsort(data.held_out, kind="stable")
    data = data.select(order)
    with whole_folder(out) as folder:
        _Writer(data, folder, options).write()
    logging.info("%d episodes -> %s; back again:\n  %s", len(order), out, import_command(data, out))


def views_of(data: Episodes) -> list[str]:
    """Return the names of the cameras' features."""
    return [f"observation.images.view_{n}" for n in range(data.frames.shape[1])]


def import_command(data: Episodes, folder: Path) -> str:
    """Return the command that makes a recording of the dataset again."""
    return (
        f"python -m evac_jax.tools.episodes.import_lerobot --source {folder} --out RECORDING "
        f"--camera {folder / CAMERA_FILE} --state quaternion --images {' '.join(views_of(data))}"
    )


class _Writer:
    """Writes the files of a dataset whose episodes are in the order of the split."""

    def __init__(self, data: Episodes, folder: Path, options: Options):
        self._data, self._folder, self._options = data, folder, options
        self._views = views_of(data)
        self._tasks = list(dict.fromkeys(data.instructions))
        self._statistics = Statistics([*COLUMNS, *self._views])
        self._total = 0  # frames written

    def write(self) -> None:
        """Write everything."""
        lines = list(self._episodes())
        self._table("meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(lines))
        self._table("meta/tasks.parquet", _indexed_by_task(self._tasks))
        write_json(self._folder / "meta/info.json", self._info())
        write_json(self._folder / "meta/stats.json", self._statistics.as_json())
        shared = {name: getattr(self._data, name).tolist() for name in ("intrinsic", "c2w")}
        size = list(self._data.frames.shape[2:4])
        write_json(self._folder / CAMERA_FILE, shared | {"size": size})
        card = json.dumps({k: v for k, v in self._data.card.items() if k != "sha256"}, indent=2)
        (self._folder / "README.md").write_text(self._readme(card))

    def _table(self, name: str, table: pa.Table) -> None:
        (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self._folder / name)

    def _episodes(self) -> Iterator[dict[str, Any]]:
        """Write each episode's rows, one row group; yield its line of meta/episodes."""
        file, writer, schema = 0, None, self._schema()
        for number in range(self._data.num_episodes):
            place = {"chunk_index": file // PER_CHUNK, "file_index": file % PER_CHUNK}
            path = self._folder / DATA.format(**place)
            if writer is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = pq.ParquetWriter(path, schema)
            columns, frames = self._rows(number)
            writer.write_table(pa.table(columns, schema=schema))
            line = self._line(number, len(frames)) | {f"data/{k}": v for k, v in place.items()}
            if self._options.video:
                line |= self._videos(number, frames)
            self._statistics.add({name: np.array(columns[name]) for name in COLUMNS})
            # LeRobot counts pictures in 0..1 and by channel.
            self._statistics.add(
                {view: frames[:, v].reshape(-1, 3) / 255 for v, view in enumerate(self._views)}
            )
            self._total += len(frames)
            yield line
            if path.stat().st_size > FILE_BYTES or number == self._data.num_episodes - 1:
                writer.close()
                file, writer = file + 1, None

    def _rows(self, number: int) -> tuple[dict[str, list], np.ndarray]:
        """Return an episode's columns, and its frames uint8 [T V H W 3]."""
        data = self._data
        count = int(data.length[number]) + 1
        rows = data.rows(number, np.arange(count))
        frames, steps = np.asarray(data.frames[rows]), range(count)
        task = self._tasks.index(data.instructions[data.task[number]])
        columns = {
            "observation.state": list(data.poses[rows]),
            "action": list(data.actions[rows]),
            "success": data.success[rows].tolist(),
            "timestamp": [step / self._options.fps for step in steps],
            "frame_index": list(steps),
            "episode_index": [number] * count,
            "index": list(range(self._total, self._total + count)),
            "task_index": [task] * count,
        }
        if not self._options.video:
            for v, view in enumerate(self._views):
                columns[view] = [
                    {"bytes": _png(frame), "path": f"frame-{step:06d}.png"}
                    for step, frame in enumerate(frames[:, v])
                ]
        return columns, frames

    def _line(self, number: int, count: int) -> dict[str, Any]:
        data = self._data
        return {
            "episode_index": number,
            "tasks": [data.instructions[data.task[number]]],
            "length": count,
            "dataset_from_index": self._total,
            "dataset_to_index": self._total + count,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            "source": data.sources[data.source[number]],
            "start": int(data.start[number]),
        }

    def _videos(self, number: int, frames: np.ndarray) -> dict[str, Any]:
        """Write one mp4 file per camera; return where they are."""
        line: dict[str, Any] = {}
        place = {"chunk_index": number // PER_CHUNK, "file_index": number % PER_CHUNK}
        times = {"from_timestamp": 0.0, "to_timestamp": len(frames) / self._options.fps}
        for v, view in enumerate(self._views):
            path = self._folder / VIDEO.format(video_key=view, **place)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(path, frames[:, v], fps=self._options.fps, min_size=1)
            line |= {f"videos/{view}/{name}": value for name, value in (place | times).items()}
        return line

    def _schema(self) -> pa.Schema:
        kinds = {n: pa.list_(t, len(names)) if names else t for n, (t, names) in COLUMNS.items()}
        if not self._options.video:
            picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            kinds |= dict.fromkeys(self._views, picture)
        return pa.schema(kinds)

    def _info(self) -> dict[str, Any]:
        data, options = self._data, self._options
        training = int((~data.held_out).sum())
        height, width = data.frames.shape[2:4]
        picture: dict[str, Any] = {
            "dtype": "video" if options.video else "image",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if options.video:
            picture["info"] = {
                "video.height": height,
                "video.width": width,
                "video.channels": 3,
                "video.pix_fmt": "yuv420p",
                "video.fps": options.fps,
                "video.is_depth_map": False,
                "has_audio": False,
            }
        features: dict[str, Any] = dict.fromkeys(self._views, picture)
        for name, (kind, names) in COLUMNS.items():
            shape = [len(names)] if names else [1]
            dtype = {"float": "float32", "bool": "bool", "int64": "int64"}[str(kind)]
            features[name] = {"dtype": dtype, "shape": shape, "names": names and list(names)}
        return {
            "codebase_version": "v3.0",
            "robot_type": options.robot or None,
            "total_episodes": data.num_episodes,
            "total_frames": self._total,
            "total_tasks": len(self._tasks),
            "chunks_size": PER_CHUNK,
            "data_files_size_in_mb": FILE_BYTES // 2**20,
            "video_files_size_in_mb": 200,
            "fps": options.fps,
            "splits": {"train": f"0:{training}", "test": f"{training}:{data.num_episodes}"},
            "data_path": DATA,
            "video_path": VIDEO if options.video else None,
            "features": features,
        }

    def _readme(self, card: str) -> str:
        data, options = self._data, self._options
        lossy = "mp4 files, which are lossy" if options.video else "PNGs, the recorded pixels"
        return "\n".join(
            [
                "---",
                f"license: {json.dumps(options.license or 'unknown')}",
                "task_categories: [robotics]",
                "tags: [LeRobot]",
                "configs:",
                "- {config_name: default, data_files: data/*/*.parquet}",
                "---",
                "",
                "# Robot episodes",
                "",
                f"A LeRobot dataset (v3.0): {data.num_episodes} episodes, {self._total} frames at "
                f"{options.fps} per second, {len(self._views)} camera(s). Pictures are {lossy}.",
                "",
                f"* Licence: {options.license or 'unknown: ask whoever recorded the episodes'}",
                f"* Held out from training: {int(data.held_out.sum())} episodes (split `test`)",
                f"* Successful in at least one frame: {int(data.success_once().sum())} episodes",
                "* `observation.state`: xyz in metres, quaternion xyzw, gripper opening 0..1",
                "* `action`: position, rotation, gripper in [-1, 1]; gripper -1 opens, +1 closes; "
                "zero in an episode's last frame",
                "* `success`: the task is done in this frame",
                f"* `{CAMERA_FILE}`: intrinsics in pixels, camera to world",
                "",
                "Exported by evac_jax (`evac_jax.tools.episodes.export_lerobot`). The recording's "
                "card:",
                "",
                "```json",
                card,
                "```",
                "",
            ]
        )


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def _indexed_by_task(tasks: Sequence[str]) -> pa.Table:
    """Return the table of tasks; LeRobot reads it by pandas, with the texts as the index."""
    column = {"metadata": None}
    number = {"name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    text = {"name": "task", "pandas_type": "unicode", "numpy_type": "object"}
    about = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [c | column | {"field_name": c["name"]} for c in (number, text)],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": None,
    }
    table = pa.table({"task_index": np.arange(len(tasks)), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})


def _frames_per_second(text: str) -> int:
    value = float(text)
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("episodes.export_lerobot", __doc__)
    add = parser.add_argument
    add("--data", required=True, nargs="+", help="recordings, which become one dataset")
    add("--out", required=True, type=Path, help="new folder for the dataset")
    add(
        "--fps",
        required=True,
        type=_frames_per_second,
        help="actions per second, which a recording does not tell; LeRobot's time stamps need it",
    )
    add("--video", action="store_true", help="mp4 files in the place of PNGs; lossy")
    add("--robot", default="", help="LeRobot's robot_type")
    add("--license", default="", help='of the data, such as apache-2.0; "" = unknown')
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    options = Options(args.fps, args.video, args.robot, args.license)
    export(recordings.load(*args.data), args.out, options)


if __name__ == "__main__":
    run_tool(main)
