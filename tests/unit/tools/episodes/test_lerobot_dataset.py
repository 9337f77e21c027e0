"""Tables and videos of LeRobot datasets that do not hold what their metadata says."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evac_jax.errors import DataError
from evac_jax.telemetry.video import write_mp4
from evac_jax.tools.episodes import import_lerobot
from evac_jax.tools.episodes.lerobot_dataset import LeRobotDataset
from tests.unit.tools.episodes.lerobot_folder import KEY, LENGTHS, run, write

META = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
VIDEOS = f"videos/{KEY}/chunk-000"
FIRST, SECOND = LENGTHS[0] / 10, LENGTHS[1] / 10  # seconds of the episodes


@pytest.fixture
def filmed(tmp_path):
    folder, _ = write(tmp_path / "lerobot", "v3.0", video=True)
    return folder


def change(path, **columns):
    """Put other values (None: leave the column out) into a parquet file."""
    changed = pq.read_table(path).to_pydict() | columns
    pq.write_table(pa.table({k: v for k, v in changed.items() if v is not None}), path)


def place(folder, **fields):
    """Put other places of the episodes in the videos into meta/episodes."""
    change(folder / META, **{f"videos/{KEY}/{name}": values for name, values in fields.items()})


def film(folder, file, *lengths):
    """Make a video of episodes, the frames of each as bright as its length says."""
    shown = [np.full((length, 16, 16, 3), 20 * length, np.uint8) for length in lengths]
    write_mp4(folder / VIDEOS / f"file-{file:03d}.mp4", np.concatenate(shown), fps=10)


def seen(folder):
    """The length that the pictures of each episode stand for."""
    data = LeRobotDataset(folder, [KEY])
    return [round(float(data.frames(episode).mean()) / 20) for episode in data.episodes()]


def told(folder):
    with pytest.raises(DataError) as error:
        seen(folder)
    return str(error.value)


@pytest.mark.parametrize("named", [0, 1])
def test_pictures_are_those_of_the_neighbouring_video_when_two_episodes_claim_one(filmed, named):
    for file, length in enumerate(LENGTHS):
        film(filmed, file, length)
    place(filmed, file_index=[named] * 2, from_timestamp=[0.0, 0.0], to_timestamp=[FIRST, SECOND])
    assert seen(filmed) == list(LENGTHS)


def test_episodes_in_the_same_frames_of_a_video_are_refused_when_no_neighbour_has_room(filmed):
    place(filmed, from_timestamp=[0.0, 0.2], to_timestamp=[FIRST, 0.2 + SECOND])
    message = told(filmed)
    assert f"episode 0 into frames 0..4 of {VIDEOS}/file-000.mp4, episode 1 into 2..8" in message
    assert "could hold one are []" in message


@pytest.mark.parametrize(("more", "fits"), [(0.1, True), (-0.1, True), (0.2, False), (-0.2, False)])
def test_time_in_a_video_is_compared_with_the_rows_within_a_frame(filmed, more, fits):
    place(filmed, to_timestamp=[FIRST, FIRST + SECOND + more])
    if fits:
        assert len(seen(filmed)) == 2
    else:
        expected = (
            rf"meta/episodes: episode 1: .*{KEY}.* are {7 + round(10 * more)} frames.* 7 rows"
        )
        assert re.search(expected, told(filmed))


TIME = "expected numbers in 0..2147483647"
WHOLE = TIME.replace("numbers", "whole numbers")


@pytest.mark.parametrize(
    ("file", "column", "values", "message"),
    [
        (META, "episode_index", ["0", "1"], f"{WHOLE}, got string"),
        (META, "episode_index", None, f"{WHOLE}, got no such column"),
        (META, "episode_index", [0, None], f"{WHOLE}, got None"),
        (META, "length", [5.0, 7.0], f"{WHOLE}, got double"),
        (META, "data/file_index", [0, -1], f"{WHOLE}, got -1"),
        (META, "data/chunk_index", ["a", "b"], f"{WHOLE}, got string"),
        (META, f"videos/{KEY}/file_index", [0, 2**40], f"{WHOLE}, got {2**40}"),
        (META, f"videos/{KEY}/from_timestamp", [0.0, np.nan], f"{TIME}, got nan"),
        (META, f"videos/{KEY}/from_timestamp", [0.0, -0.5], f"{TIME}, got -0.5"),
        (META, f"videos/{KEY}/from_timestamp", ["0", "1"], f"{TIME}, got string"),
        (META, f"videos/{KEY}/to_timestamp", [0.5, np.inf], f"{TIME}, got inf"),
        (META, f"videos/{KEY}/to_timestamp", None, f"{TIME}, got no such column"),
        (DATA, "episode_index", None, f"{WHOLE}, got no such column"),
        (DATA, "episode_index", ["0"] * 12, f"{WHOLE}, got string"),
        (DATA, "task_index", ["x"] * 12, f"{WHOLE}, got string"),
    ],
)
def test_column_of_wrong_numbers_is_told_with_its_file(filmed, file, column, values, message):
    change(filmed / file, **{column: values})
    assert f"{filmed / file}: {column!r}: {message}" in told(filmed)


def test_column_missing_from_a_file_that_is_searched_is_told_with_its_file(filmed):
    change(filmed / META, length=[5, 70])  # no file has that many rows, so all are searched
    other = filmed / "data/chunk-000/file-001.parquet"
    pq.write_table(pa.table({"action": [0.0]}), other)
    assert f"{other}: 'episode_index': {WHOLE}, got no such column" in told(filmed)


@pytest.mark.parametrize("values", [["x"] * 5, [0.5] * 5])
def test_task_index_that_is_no_whole_number_is_told_with_its_file(tmp_path, camera, values):
    source, flags = write(tmp_path / "lerobot", "v2.1", video=False)
    path = source / "data/chunk-000/episode_000000.parquet"
    change(path, task_index=values)
    with pytest.raises(DataError, match=rf"{path}: 'task_index': {WHOLE}"):
        run(import_lerobot, source, tmp_path / "out", camera, *flags)


@pytest.mark.parametrize("video", [False, True])
def test_episodes_file_without_rows_is_named(tmp_path, video):
    source, _ = write(tmp_path / "lerobot", "v2.1", video=video)
    path = source / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert f"{path}: expected rows of episode 1, got none" in told(source)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("path", ["", ".", "/data/x.parquet", "../data/x.parquet"])
def test_path_that_is_not_inside_of_the_dataset_is_refused(tmp_path, version, path):
    source, _ = write(tmp_path / "lerobot", version, video=False)
    info = json.loads((source / "meta/info.json").read_text()) | {"data_path": path}
    (source / "meta/info.json").write_text(json.dumps(info))
    assert f"data_path = {path!r}: expected a path inside of the dataset" in told(source)


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), 1e300])
def test_frames_per_second_that_no_video_has_are_refused(filmed, fps):
    info = json.loads((filmed / "meta/info.json").read_text()) | {"fps": fps}
    (filmed / "meta/info.json").write_text(json.dumps(info))
    assert "info.json: expected numbers above 0" in told(filmed)


def test_missing_list_of_episodes_is_named(filmed):
    (filmed / META).unlink()
    assert f"{filmed}/meta/episodes: expected" in told(filmed)
