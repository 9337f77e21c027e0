import json
import shlex

import numpy as np
import pyarrow.parquet as pq
import pytest

from evac_jax.errors import DataError
from evac_jax.files import recordings
from evac_jax.files.recordings import EpisodeWriter
from evac_jax.telemetry.video import read_mp4
from evac_jax.tools.episodes import export_lerobot, import_lerobot
from evac_jax.tools.episodes.lerobot_statistics import Statistics
from tests.unit.tools.episodes.lerobot_folder import frames

LENGTHS = (3, 5, 2, 4)
TASKS = ("open the drawer", "push the block")


def record(folder, *, views=2, size=16, held_out=(False, True, False, True), tasks=TASKS):
    """Episodes of several lengths, tasks and cameras, of which the recorder held some out."""
    rng = np.random.default_rng(0)
    intrinsic = np.tile([[40.0, 0, size / 2], [0, 40, size / 2], [0, 0, 1]], (views, 1, 1))
    c2w = np.tile(np.eye(4), (views, 1, 1))
    c2w[:, :3, 3] = rng.normal(size=(views, 3))
    with EpisodeWriter(
        folder,
        image_shape=(views, size, size, 3),
        instructions=list(tasks),
        sources=["expert", "policy"],
        intrinsic=intrinsic,
        c2w=c2w,
        facts={"command": "a test"},
    ) as writer:
        for number, steps in enumerate(LENGTHS):
            turn = rng.normal(size=(steps + 1, 4))
            poses = rng.uniform(0, 0.5, (steps + 1, 8))
            poses[:, 3:7] = turn / np.linalg.norm(turn, axis=1, keepdims=True)
            # Smooth pictures, which survive a video codec; every camera shows another.
            shown = (
                frames(steps + 1, size)[:, None]
                + np.arange(views, dtype=np.uint8)[:, None, None, None]
            )
            writer.add(
                frames=shown + np.uint8(number),
                actions=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
                poses=poses,
                success=np.arange(steps + 1) >= steps - number,
                task=number % 2,
                source=number % 2,
                start=10 + number,
                held_out=held_out[number],
            )
    return folder


def export(folder, out, *more):
    flags = ["--data", str(folder), "--out", str(out), "--fps", "20", *more]
    export_lerobot.main(flags)
    return recordings.load(folder), out


def back(data, out, folder):
    """Import by the command that the export prints."""
    command = shlex.split(export_lerobot.import_command(data, out))
    assert command[:3] == ["python", "-m", "evac_jax.tools.episodes.import_lerobot"]
    import_lerobot.main([str(folder) if word == "RECORDING" else word for word in command[3:]])
    return recordings.load(folder)


def episodes(data):
    """{what tells an episode: its content}, so that the order does not matter."""
    found = {}
    for n in range(data.num_episodes):
        rows = data.rows(n, np.arange(data.length[n] + 1))
        content = {name: np.asarray(getattr(data, name)[rows]) for name in recordings.PER_FRAME}
        content["held_out"] = data.held_out[n]
        content["instruction"] = data.instructions[data.task[n]]
        found[int(data.length[n])] = content
    return found


@pytest.mark.parametrize("held_out", [(False, True, False, True), (False,) * 4, (True,) * 4])
def test_recording_comes_back_equal_when_its_dataset_is_imported(tmp_path, held_out):
    data, out = export(record(tmp_path / "first", held_out=held_out), tmp_path / "dataset")
    again = back(data, out, tmp_path / "second")
    for name in recordings.SHARED:
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    before, after = episodes(data), episodes(again)
    assert before.keys() == after.keys()
    for number, content in before.items():
        for name, value in content.items():
            np.testing.assert_array_equal(after[number][name], value, err_msg=name)
            assert np.asarray(after[number][name]).dtype == np.asarray(value).dtype


def test_frames_come_back_nearly_equal_when_a_video_is_asked_for(tmp_path):
    data, out = export(record(tmp_path / "first", size=32), tmp_path / "dataset", "--video")
    again = back(data, out, tmp_path / "second")
    assert again.frames.shape == data.frames.shape
    before, after = episodes(data), episodes(again)
    for number, content in before.items():
        shown, real = after[number]["frames"].astype(int), content["frames"].astype(int)
        assert np.abs(shown - real).max() <= 12
        np.testing.assert_array_equal(after[number]["actions"], content["actions"])
    film, fps = read_mp4(out / "videos/observation.images.view_1/chunk-000/file-000.mp4")
    assert (film.shape[1:3], fps) == ((32, 32), 20)
    assert "lossy" in (out / "README.md").read_text()


def test_dataset_has_the_layout_of_lerobot_3(tmp_path):
    data, out = export(record(tmp_path / "first"), tmp_path / "dataset")
    info = json.loads((out / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 18, 2)
    assert info["splits"] == {"train": "0:2", "test": "2:4"}
    assert info["features"]["observation.images.view_0"]["shape"] == [16, 16, 3]
    table = pq.read_table(out / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(table.column_names) == set(info["features"])
    assert table["index"].to_pylist() == list(range(18))
    assert table["timestamp"].to_pylist()[1] == pytest.approx(1 / 20)
    lines = pq.read_table(out / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    ends = [(line["dataset_from_index"], line["dataset_to_index"]) for line in lines]
    assert ends == [(0, 4), (4, 7), (7, 13), (13, 18)]  # training first: lengths 3, 2, 5, 4
    assert [line["tasks"] for line in lines] == [[TASKS[0]]] * 2 + [[TASKS[1]]] * 2
    assert [(line["source"], line["start"]) for line in lines][2] == ("policy", 11)
    schema = pq.read_schema(out / "meta/tasks.parquet")
    assert json.loads(schema.metadata[b"pandas"])["index_columns"] == ["task"]
    action = json.loads((out / "meta/stats.json").read_text())["action"]
    np.testing.assert_allclose(action["mean"], data.actions.mean(0), rtol=1e-5)
    np.testing.assert_allclose(action["std"], data.actions.std(0), rtol=1e-5)


def test_large_recording_is_divided_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(export_lerobot, "FILE_BYTES", 1)
    monkeypatch.setattr(export_lerobot, "PER_CHUNK", 3)
    data, out = export(record(tmp_path / "first"), tmp_path / "dataset")
    names = sorted(str(p.relative_to(out)) for p in out.glob("data/*/*"))
    assert names == [f"data/chunk-000/file-00{n}.parquet" for n in range(3)] + [
        "data/chunk-001/file-000.parquet"
    ]
    assert back(data, out, tmp_path / "second").num_episodes == 4


def test_statistics_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(1)
    numbers = rng.normal(3, 2, (50, 2))
    statistics = Statistics(["x", "observation.images.a"])
    for part in np.split(numbers, [7, 30]):
        statistics.add({"x": part, "observation.images.a": part})
    found = statistics.as_json()
    np.testing.assert_allclose(found["x"]["std"], numbers.std(0))
    np.testing.assert_allclose(found["x"]["min"], numbers.min(0))
    assert found["x"]["count"] == [50]
    assert np.shape(found["observation.images.a"]["max"]) == (2, 1, 1)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path):
    folder = record(tmp_path / "first", size=15, tasks=("open the drawer", ""))
    with pytest.raises(DataError, match="instruction is empty"):
        export(folder, tmp_path / "dataset")
    folder = record(tmp_path / "second", size=15)
    with pytest.raises(DataError, match="expected frames of an even size, got 15 x 15"):
        export(folder, tmp_path / "dataset", "--video")
    assert not list(tmp_path.glob("dataset*"))
    (tmp_path / "dataset").mkdir()
    with pytest.raises(DataError, match="exists; choose another folder"):
        export(folder, tmp_path / "dataset")


def test_frames_per_second_must_be_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export_lerobot.main(["--data", "x", "--out", str(tmp_path / "y"), "--fps", "0.5"])
    assert "expected a whole number from 1 on" in capsys.readouterr().err


def test_split_that_cannot_be_read_is_named(tmp_path):
    data, out = export(record(tmp_path / "first"), tmp_path / "dataset")
    info = json.loads((out / "meta/info.json").read_text())
    info["splits"] = {"train": "first", "test": "2:4"}
    (out / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="splits: expected \"FIRST:END\" for train, got 'first'"):
        back(data, out, tmp_path / "second")
