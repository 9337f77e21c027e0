import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evac_jax.errors import EvacJaxError
from evac_jax.telemetry.video import write_mp4
from evac_jax.tools.episodes import import_lerobot, lerobot_dataset
from tests.unit.tools.episodes.lerobot_folder import KEY, LENGTHS, TASKS, frames, run, write


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("video", [False, True])
def test_lerobot_datasets_become_recordings(tmp_path, camera, version, video):
    source, flags = write(tmp_path / "lerobot", version, video=video)
    data = run(import_lerobot, source, tmp_path / "out", camera, *flags)
    assert sorted(data.length) == [4, 6]
    n = int(np.flatnonzero(data.length == 6)[0])
    rows = data.rows(n, np.arange(7))
    shown = data.frames[rows, 0].astype(int)
    assert np.abs(shown - frames(7)).max() <= (12 if video else 0)
    assert data.instructions[data.task[n]] == TASKS[1]
    assert data.success[rows].tolist() == [False] * 5 + [True] * 2
    half = np.sqrt(0.5)
    np.testing.assert_allclose(data.poses[rows[0]], [0.1, 0.2, 0.3, 0, 0, half, half, 1], rtol=1e-5)


def test_other_versions_and_views_are_named(tmp_path, camera):
    source, _ = write(tmp_path / "lerobot", "v2.1", video=False)
    with pytest.raises(EvacJaxError, match="no \\['wrist'\\]; there are"):
        run(import_lerobot, source, tmp_path / "out", camera, "--images", "wrist")
    info = json.loads((source / "meta/info.json").read_text()) | {"codebase_version": "v1.6"}
    (source / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(EvacJaxError, match="version v1.6"):
        run(import_lerobot, source, tmp_path / "out", camera, "--images", "wrist")


def test_actions_that_are_no_deltas_are_refused(tmp_path, camera):
    source, flags = write(tmp_path / "lerobot", "v2.1", video=False, scale=3.0)
    with pytest.raises(EvacJaxError, match="actions reach 3.000"):
        run(import_lerobot, source, tmp_path / "out", camera, *flags)


def test_only_the_wanted_part_of_a_long_video_is_held(tmp_path, camera, monkeypatch):
    source, flags = write(tmp_path / "lerobot", "v3.0", video=True)
    decoded, decode = [], lerobot_dataset.decode_mp4
    monkeypatch.setattr(
        lerobot_dataset,
        "decode_mp4",
        lambda path: (decoded.append(len(decoded)) or frame for frame in decode(path)),
    )
    data = lerobot_dataset.LeRobotDataset(source, [flags[1]])
    episodes = data.episodes()
    assert data.frames(next(episodes)).shape[0] == len(decoded) == LENGTHS[0]
    assert data.frames(next(episodes)).shape[0] == LENGTHS[1]
    assert len(decoded) == sum(LENGTHS)  # forwards, no frame twice


def test_lerobot_videos_and_rows_of_two_lengths_are_refused(tmp_path, camera):
    source, flags = write(tmp_path / "lerobot", "v2.1", video=True)
    write_mp4(next(source.rglob("episode_000001.mp4")), frames(LENGTHS[1] + 1), fps=10)
    with pytest.raises(EvacJaxError, match="episode 1 has 7 rows .* more frames"):
        run(import_lerobot, source, tmp_path / "out", camera, *flags)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("info.json", "{", "not a JSON object"),
        ("info.json", '{"codebase_version": "v2.1"}', "lacks .*features"),
        ("tasks.jsonl", '{"task_index": 1, "task": "go"}', "expected task_index 0..N-1"),
        ("tasks.jsonl", '{"task_index": [0], "task": "go"}', "expected task_index 0..N-1"),
        ("tasks.jsonl", "\udcff", "cannot be read .*utf-8"),
    ],
)
def test_damaged_lerobot_metadata_is_named(tmp_path, camera, name, text, message):
    source, flags = write(tmp_path / "lerobot", "v2.1", video=False)
    (source / "meta" / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EvacJaxError, match=message):
        run(import_lerobot, source, tmp_path / "out", camera, *flags)


@pytest.fixture
def source(tmp_path):
    folder, _ = write(tmp_path / "lerobot", "v2.1", video=False)
    return folder


@pytest.fixture
def grouped(tmp_path):
    folder, _ = write(tmp_path / "lerobot", "v3.0", video=False)
    return folder


def told(source, camera, *flags):
    """The message of an import that fails, which leaves nothing."""
    out = source.parent / "out"
    with pytest.raises(EvacJaxError) as error:
        run(import_lerobot, source, out, camera, "--images", KEY, *flags)
    assert not list(source.parent.glob("out*"))
    return str(error.value)


def change(source, column, values, n=0):
    """Put other values (None: leave the column out) into an episode's file."""
    path = source / f"data/chunk-000/episode_{n:06d}.parquet"
    table = pq.read_table(path)
    columns = {name: table[name].to_pylist() for name in table.column_names} | {column: values}
    pq.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), path)


def column(source, name, n=0):
    return pq.read_table(source / f"data/chunk-000/episode_{n:06d}.parquet")[name].to_pylist()


def test_recorded_success_is_used_when_no_rule_is_given(source, camera):
    change(source, "next.success", [False] * LENGTHS[0])
    data = run(import_lerobot, source, source.parent / "out", camera, "--images", KEY)
    once = [data.success[data.rows(n, np.arange(data.length[n] + 1))].any() for n in range(2)]
    assert sorted(once) == [False, True]


def test_end_counts_as_success_when_no_field_tells(source, camera):
    for n in range(2):
        change(source, "next.success", None, n)
    data = run(import_lerobot, source, source.parent / "out", camera, "--images", KEY)
    assert data.success.sum() == 2


@pytest.mark.parametrize("column", ["next.success", "next.reward"])
def test_success_is_told_in_all_episodes_or_in_none(source, camera, column):
    for n in range(2):
        change(source, "next.success", None, n)
    change(source, column, [False] * LENGTHS[1], n=1)
    expected = rf"episode 1: fields that tell success: expected none .* got \['{column}'\]"
    assert re.search(expected, told(source, camera))


@pytest.mark.parametrize(
    ("column", "first", "then"),
    [("task_index", 0, 1), ("language_instruction", *TASKS), ("task", *TASKS)],
)
def test_instruction_that_changes_within_an_episode_is_refused(source, camera, column, first, then):
    change(source, column, [first] * 2 + [then] * 3)
    expected = f"the instruction changes at frame 2 ({column} {first!r} to {then!r})"
    assert expected in told(source, camera)


def name(source, feature, names):
    """Let the dataset name the numbers of a feature."""
    path = source / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][feature] = {"dtype": "float32", "names": names}
    path.write_text(json.dumps(info))


def test_numbers_are_put_into_our_order_by_their_names(source, camera):
    plain = run(import_lerobot, source, source.parent / "plain", camera, "--images", KEY)
    names = {"action": ["dx", "dy", "dz", "roll", "pitch", "yaw", "gripper"]}
    names["observation.state"] = ["x", "y", "z", "rx", "ry", "rz", "gripper", "gripper"]
    for feature, order in names.items():
        name(source, feature, {"motors": order[-1:] + order[:-1]})
        for n in range(2):
            change(source, feature, np.roll(column(source, feature, n), 1, axis=1).tolist(), n)
    data = run(import_lerobot, source, source.parent / "out", camera, "--images", KEY)
    np.testing.assert_array_equal(data.actions, plain.actions)
    # Which of the two fingers comes first makes no difference.
    np.testing.assert_array_equal(data.poses, plain.poses)


def test_numbers_with_names_of_another_state_are_refused(source, camera):
    name(source, "observation.state", ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper"])
    message = told(source, camera)
    assert "'observation.state', --state=axis_angle: expected the numbers x y z rx" in message
    assert "got 'qx' as number 3" in message


def test_picture_that_was_cast_without_scaling_is_refused_in_the_middle_of_an_episode(
    source, camera
):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (1, 0, 1)).save(buffer, format="PNG")
    cast = {"bytes": buffer.getvalue(), "path": None}
    change(source, KEY, [*column(source, KEY)[:3], cast, cast])
    assert "episode 0: frame 3: the picture holds no value from 2" in told(source, camera)


STATE = [0.1, 0.2, 0.3, 0, 0, 1.5, 0.04, -0.04]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("observation.state", [STATE] * 3 + [None, STATE], "frame 3: 'observation.state' is empty"),
        ("observation.state", [STATE] * 4 + [[np.nan] * 8], "frame 4 .*NaN or infinity"),
        ("observation.state", [STATE] * 4 + [[1.0]], "equally many numbers"),
        ("observation.state", [[0, 0, 0, 0, 0, 90.0, 0.04, 0]] * 5, "degrees"),
        ("action", None, "no 'action'; there are"),
        ("action", [[0.0] * 6 + [n % 2] for n in range(5)], "zero_closes"),
        ("action", [STATE[:3] + [0, 0, 0, 1]] * 5, "the poses' own positions"),
        ("task_index", [None] * 5, "'task_index' is empty"),
        ("next.success", [True, None, True, True, True], "'next.success' is empty"),
        (KEY, None, f"no '{KEY}'"),
        (KEY, [{"bytes": b"\x89PNG\r\n", "path": None}] * 5, f"frame 0 of {KEY} is damaged"),
        (KEY, [None] * 5, "is empty"),
    ],
)
def test_damaged_columns_are_named(source, camera, name, values, message):
    change(source, name, values)
    assert re.search(rf"episode 0: .*{message}", told(source, camera))


def picture(size):
    buffer = io.BytesIO()
    Image.fromarray(frames(1, size)[0]).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_pictures_of_several_sizes_are_refused(source, camera):
    whole = column(source, KEY)
    change(source, KEY, [*whole[:4], picture(15)])
    assert f"episode 0: frame 4 of {KEY} is (15, 15), the first (16, 16)" in told(source, camera)
    change(source, KEY, whole)
    change(source, KEY, [picture(15)] * LENGTHS[1], n=1)
    assert "episode 1: pictures (15, 15), the first episode's" in told(
        source, camera, "--image_size", "16"
    )


def test_episode_of_one_frame_is_refused(source, camera):
    path = source / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    assert "episode 1: 1 frame(s); an episode needs two at least" in told(source, camera)


def test_missing_and_damaged_parquet_are_told_apart(source, camera):
    path = source / "data/chunk-000/episode_000001.parquet"
    path.write_bytes(b"PAR1")
    assert "episode_000001.parquet: no readable parquet file" in told(source, camera)
    path.unlink()
    assert "episode_000001.parquet: the file is missing" in told(source, camera)


def test_damaged_video_is_named(tmp_path, camera):
    source, _ = write(tmp_path / "lerobot", "v2.1", video=True)
    next(source.rglob("episode_000000.mp4")).write_bytes(b"no video")
    assert "episode_000000.mp4: not a readable video" in told(source, camera)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": {KEY: {"shape": [16, 16, 3]}}}, "features without a dtype"),
        ({"data_path": "data/{chunk}.parquet"}, "data_path = .* cannot be filled"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(source, camera, change, message):
    info = json.loads((source / "meta/info.json").read_text()) | change
    (source / "meta/info.json").write_text(json.dumps(info))
    assert re.search(message, told(source, camera))


def test_task_without_a_text_is_named(source, camera):
    lines = [{"task_index": 0, "task": TASKS[0]}, {"task_index": 1, "task": None}]
    (source / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "no text for task_index [1]" in told(source, camera)


def move_second_episode(grouped, lengths):
    """Put episode 1 into a file of its own; meta/episodes goes on naming the first one."""
    data, meta = grouped / "data/chunk-000", grouped / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(data / "file-000.parquet")
    for n in range(2):
        mine = table.filter(pc.equal(table["episode_index"], n))
        pq.write_table(mine, data / f"file-00{n}.parquet")
    columns = pq.read_table(meta).to_pydict() | {"length": list(lengths)}
    pq.write_table(pa.table(columns), meta)


def test_rows_are_found_in_the_neighbouring_file_when_metadata_names_the_wrong_one(grouped, camera):
    move_second_episode(grouped, LENGTHS)
    data = run(import_lerobot, grouped, grouped.parent / "out", camera, "--images", KEY)
    assert sorted(data.length) == [4, 6]


def test_rows_that_no_file_holds_are_told_with_where_was_looked(grouped, camera):
    move_second_episode(grouped, (LENGTHS[0], 70))
    message = told(grouped, camera)
    assert "episode 1: meta/episodes says 70 rows are in data/chunk-000/file-000.parquet" in message
    assert "files with rows of it are ['data/chunk-000/file-001.parquet']" in message
