"""Datasets as the lerobot package would write them, and what tests of importers share."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from evac_jax.files import recordings
from evac_jax.telemetry.video import write_mp4

RNG = np.random.default_rng(0)
LENGTHS = (5, 7)
KEY = "observation.images.image"
TASKS = ["open the drawer", "push the block"]


def frames(count, size=16):
    """Smooth pictures, which survive a video codec."""
    base = np.linspace(0, 200, size)[:, None, None] + np.zeros((size, size, 3))
    return np.stack([np.uint8(base + 5 * t) for t in range(count)])


def actions(count):
    return np.concatenate((RNG.uniform(-1, 1, (count, 6)), RNG.integers(0, 2, (count, 1))), 1)


def run(module, source, out, camera, *more):
    flags = ["--source", source, "--out", out, "--camera", camera, *more]
    module.main([str(flag) for flag in flags])
    return recordings.load(out)


def write(folder, version, *, video, scale=1.0):
    """A dataset of two episodes as the lerobot package would write it."""
    key, grouped = KEY, version == "v3.0"
    columns = {name: [] for name in (
        "observation.state", "action", "task_index", "episode_index", "frame_index", "next.success"
    )}  # fmt: skip
    films = []
    for n, length in enumerate(LENGTHS):
        films.append(frames(length))
        aa = np.tile([0.1, 0.2, 0.3, 0, 0, np.pi / 2, 0.04, -0.04], (length, 1))
        columns["observation.state"] += aa.tolist()
        columns["action"] += (scale * (2 * actions(length) - 1).clip(-1, 1)).tolist()
        columns["task_index"] += [n] * length
        columns["episode_index"] += [n] * length
        columns["frame_index"] += list(range(length))
        columns["next.success"] += [False] * (length - 2) + [True] * 2
    if not video:
        columns[key] = []
        for frame in np.concatenate(films):
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, format="PNG")
            columns[key].append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table(columns)
    info = {
        "codebase_version": version,
        "fps": 10,
        "chunks_size": 1000,
        "total_episodes": 2,
        "features": {key: {"dtype": "video" if video else "image"}},
    }
    (folder / "meta").mkdir(parents=True)
    if grouped:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        (folder / "data/chunk-000").mkdir(parents=True)
        pq.write_table(table, folder / "data/chunk-000/file-000.parquet")
        tasks = {"task_index": [0, 1], "__index_level_0__": TASKS}
        pq.write_table(pa.table(tasks), folder / "meta/tasks.parquet")
        lines = {"episode_index": [0, 1], "data/chunk_index": [0, 0], "data/file_index": [0, 0]}
        if video:
            lines |= {f"videos/{key}/{name}": [0, 0] for name in ("chunk_index", "file_index")}
            lines[f"videos/{key}/from_timestamp"] = [0.0, LENGTHS[0] / 10]
            lines[f"videos/{key}/to_timestamp"] = [LENGTHS[0] / 10, sum(LENGTHS) / 10]
            path = folder / info["video_path"].format(video_key=key, chunk_index=0, file_index=0)
            write_mp4(path, np.concatenate(films), fps=10)
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.table(lines), folder / "meta/episodes/chunk-000/file-000.parquet")
    else:
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = (
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        )
        (folder / "data/chunk-000").mkdir(parents=True)
        for n, film in enumerate(films):
            place = {"episode_chunk": 0, "episode_index": n}
            mine = table.filter(pc.equal(table["episode_index"], n))
            pq.write_table(mine, folder / info["data_path"].format(**place))
            if video:
                path = folder / info["video_path"].format(video_key=key, **place)
                write_mp4(path, film, fps=10)
        lines = [json.dumps({"task_index": n, "task": text}) for n, text in enumerate(TASKS)]
        (folder / "meta/tasks.jsonl").write_text("\n".join(lines))
    (folder / "meta/info.json").write_text(json.dumps(info))
    # Our own videos are enlarged until a person can see something.
    return folder, ("--images", key, "--success", "next.success", "--image_size", 16)
