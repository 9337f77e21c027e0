import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evac_jax.files import recordings
from evac_jax.files.restricted_npy import load_objects
from evac_jax.telemetry.video import write_mp4
from evac_jax.tools.episodes import import_lerobot, import_rlinf, importing

RNG = np.random.default_rng(0)
LENGTHS = (5, 7)
TASKS = ["open the drawer", "push the block"]


def _frames(count, size=16):
    """Smooth pictures, which survive a video codec."""
    base = np.linspace(0, 200, size)[:, None, None] + np.zeros((size, size, 3))
    return np.stack([np.uint8(base + 5 * t) for t in range(count)])


@pytest.fixture
def camera(tmp_path):
    path = tmp_path / "camera.json"
    intrinsic = [[[32, 0, 16], [0, 32, 16], [0, 0, 1]]]
    path.write_text(
        json.dumps({"intrinsic": intrinsic, "c2w": [np.eye(4).tolist()], "size": [32, 32]})
    )
    return path


def _actions(count):
    return np.concatenate((RNG.uniform(-1, 1, (count, 6)), RNG.integers(0, 2, (count, 1))), 1)


def _main(module, source, out, camera, *more):
    flags = ["--source", source, "--out", out, "--camera", camera, *more]
    module.main([str(flag) for flag in flags])
    return recordings.load(out)


@pytest.fixture
def rlinf(tmp_path):
    folder = tmp_path / "rlinf"
    folder.mkdir()
    for n, length in enumerate(LENGTHS):
        frames, actions = _frames(length), _actions(length)
        episode = np.empty(length, object)
        for t in range(length):
            pose = np.array([t, 0, 0, 0, 0, 0, 1, 0.5], np.float64)
            episode[t] = {"image": frames[t], "state": pose, "delta_action": actions[t]}
            episode[t] |= {"instruction": TASKS[n], "done": t >= 3}
        np.save(folder / f"{n}.npy", episode, allow_pickle=True)
    return folder


def test_rlinf_episodes_become_a_recording(rlinf, tmp_path, camera):
    data = _main(
        import_rlinf,
        rlinf,
        tmp_path / "out",
        camera,
        "--gripper",
        "zero_closes",
        "--success",
        "done",
    )
    assert data.num_episodes == 2
    assert sorted(data.length) == [4, 6]
    n = int(np.flatnonzero(data.length == 6)[0])
    rows = data.rows(n, np.arange(7))
    np.testing.assert_array_equal(data.frames[rows, 0], _frames(7))
    np.testing.assert_array_equal(data.poses[rows, 0], np.arange(7))
    assert data.success[rows].tolist() == [False] * 3 + [True] * 4
    assert set(data.actions[rows[:-1], 6]) <= {-1.0, 1.0}
    assert data.instructions[data.task[n]] == TASKS[1]
    np.testing.assert_allclose(data.intrinsic[0, 0, 0], 16)  # given for twice the size
    assert (data.start == -1).all()


def test_nothing_is_left_when_an_episode_does_not_fit(rlinf, tmp_path, camera):
    with pytest.raises(SystemExit, match="no field 'is_done'"):
        _main(import_rlinf, rlinf, tmp_path / "out", camera, "--success", "is_done")
    assert not list(tmp_path.glob("out*"))


def _lerobot(folder, version, *, video, scale=1.0):
    """A dataset of two episodes as the lerobot package would write it."""
    key, grouped = "observation.images.image", version == "v3.0"
    columns = {name: [] for name in (
        "observation.state", "action", "task_index", "episode_index", "frame_index", "next.success"
    )}  # fmt: skip
    films = []
    for n, length in enumerate(LENGTHS):
        films.append(_frames(length))
        aa = np.tile([0.1, 0.2, 0.3, 0, 0, np.pi / 2, 0.04, -0.04], (length, 1))
        columns["observation.state"] += aa.tolist()
        columns["action"] += (scale * (2 * _actions(length) - 1).clip(-1, 1)).tolist()
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


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("video", [False, True])
def test_lerobot_datasets_become_recordings(tmp_path, camera, version, video):
    source, flags = _lerobot(tmp_path / "lerobot", version, video=video)
    data = _main(import_lerobot, source, tmp_path / "out", camera, *flags)
    assert sorted(data.length) == [4, 6]
    n = int(np.flatnonzero(data.length == 6)[0])
    rows = data.rows(n, np.arange(7))
    shown = data.frames[rows, 0].astype(int)
    assert np.abs(shown - _frames(7)).max() <= (12 if video else 0)
    assert data.instructions[data.task[n]] == TASKS[1]
    assert data.success[rows].tolist() == [False] * 5 + [True] * 2
    half = np.sqrt(0.5)
    np.testing.assert_allclose(data.poses[rows[0]], [0.1, 0.2, 0.3, 0, 0, half, half, 1], rtol=1e-5)


def test_other_versions_and_views_are_named(tmp_path, camera):
    source, _ = _lerobot(tmp_path / "lerobot", "v2.1", video=False)
    with pytest.raises(SystemExit, match="no \\['wrist'\\]; there are"):
        _main(import_lerobot, source, tmp_path / "out", camera, "--images", "wrist")
    info = json.loads((source / "meta/info.json").read_text()) | {"codebase_version": "v1.6"}
    (source / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(SystemExit, match="version v1.6"):
        _main(import_lerobot, source, tmp_path / "out", camera, "--images", "wrist")


def test_actions_that_are_no_deltas_are_refused(tmp_path, camera):
    source, flags = _lerobot(tmp_path / "lerobot", "v2.1", video=False, scale=3.0)
    with pytest.raises(SystemExit, match="actions reach 3.000"):
        _main(import_lerobot, source, tmp_path / "out", camera, *flags)


def test_frames_are_resized_and_intrinsics_with_them(camera):
    frames = np.zeros((2, 1, 16, 24, 3), np.uint8)
    assert importing.resize(frames, 8).shape == (2, 1, 8, 8, 3)
    intrinsic, _ = importing.read_camera(str(camera), 1, (16, 24), 8)
    np.testing.assert_allclose(intrinsic[0, :2], [[8, 0, 4], [0, 8, 4]])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image", np.full((16, 16, 3), 0.9), "frame 2 needs 'image' .* got float64"),
        ("image", np.zeros((3, 16, 16), np.uint8), r"frame 2 needs 'image' .* \(3, 16, 16\)"),
        ("state", np.zeros(8), "frame 2: expected .* quaternion's length is 0.000"),
    ],
)
def test_a_later_rlinf_frame_that_is_unlike_the_first_is_refused(
    rlinf, tmp_path, camera, field, value, message
):
    episode = load_objects(rlinf / "1.npy")
    episode[2][field] = value
    np.save(rlinf / "1.npy", episode, allow_pickle=True)
    with pytest.raises(SystemExit, match=message):
        _main(import_rlinf, rlinf, tmp_path / "out", camera, "--gripper", "zero_closes")
    assert not list(tmp_path.glob("out*"))


def test_rlinf_files_of_two_picture_sizes_are_refused(rlinf, tmp_path, camera):
    episode = load_objects(rlinf / "1.npy")
    for t, frame in enumerate(episode):
        frame["image"] = _frames(len(episode), 24)[t]
    np.save(rlinf / "1.npy", episode, allow_pickle=True)
    with pytest.raises(SystemExit, match="one camera cannot fit both"):
        _main(import_rlinf, rlinf, tmp_path / "out", camera, "--image_size", 16)


def test_only_the_wanted_part_of_a_long_video_is_held(tmp_path, camera, monkeypatch):
    source, flags = _lerobot(tmp_path / "lerobot", "v3.0", video=True)
    decoded, decode = [], import_lerobot.decode_mp4
    monkeypatch.setattr(
        import_lerobot,
        "decode_mp4",
        lambda path: (decoded.append(len(decoded)) or frame for frame in decode(path)),
    )
    data = import_lerobot.LeRobotDataset(source, [flags[1]])
    episodes = data.episodes()
    assert data.frames(next(episodes)).shape[0] == len(decoded) == LENGTHS[0]
    assert data.frames(next(episodes)).shape[0] == LENGTHS[1]
    assert len(decoded) == sum(LENGTHS)  # forwards, no frame twice


def test_lerobot_videos_and_rows_of_two_lengths_are_refused(tmp_path, camera):
    source, flags = _lerobot(tmp_path / "lerobot", "v2.1", video=True)
    write_mp4(next(source.rglob("episode_000001.mp4")), _frames(LENGTHS[1] + 1), fps=10)
    with pytest.raises(SystemExit, match="episode 1 has 7 rows .* more frames"):
        _main(import_lerobot, source, tmp_path / "out", camera, *flags)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("info.json", "{", "not a JSON object"),
        ("info.json", '{"codebase_version": "v2.1"}', "lacks .*features"),
        ("tasks.jsonl", '{"task_index": 1, "task": "go"}', "expected task_index 0..N-1"),
    ],
)
def test_damaged_lerobot_metadata_is_named(tmp_path, camera, name, text, message):
    source, flags = _lerobot(tmp_path / "lerobot", "v2.1", video=False)
    (source / "meta" / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        _main(import_lerobot, source, tmp_path / "out", camera, *flags)
