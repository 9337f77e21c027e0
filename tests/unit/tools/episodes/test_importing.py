import json

import numpy as np
import pytest

from evac_jax.errors import ConfigError, DataError, EvacJaxError
from evac_jax.files.restricted_npy import load_objects
from evac_jax.tools.episodes import import_rlinf, importing
from tests.unit.tools.episodes.lerobot_folder import LENGTHS, TASKS, actions, frames, run

ZERO = ("--gripper", "zero_closes")  # as the actions here are


@pytest.fixture
def rlinf(tmp_path):
    folder = tmp_path / "rlinf"
    folder.mkdir()
    for n, length in enumerate(LENGTHS):
        pictures, moves = frames(length), actions(length)
        episode = np.empty(length, object)
        for t in range(length):
            pose = np.array([t, 0, 0, 0, 0, 0, 1, 0.5], np.float64)
            episode[t] = {"image": pictures[t], "state": pose, "delta_action": moves[t]}
            episode[t] |= {"instruction": TASKS[n], "done": t >= 3}
        np.save(folder / f"{n}.npy", episode, allow_pickle=True)
    return folder


def test_rlinf_episodes_become_a_recording(rlinf, tmp_path, camera):
    data = run(
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
    np.testing.assert_array_equal(data.frames[rows, 0], frames(7))
    np.testing.assert_array_equal(data.poses[rows, 0], np.arange(7))
    assert data.success[rows].tolist() == [False] * 3 + [True] * 4
    assert set(data.actions[rows[:-1], 6]) <= {-1.0, 1.0}
    assert data.instructions[data.task[n]] == TASKS[1]
    np.testing.assert_allclose(data.intrinsic[0, 0, 0], 16)  # given for twice the size
    assert (data.start == -1).all()


def test_nothing_is_left_when_an_episode_does_not_fit(rlinf, tmp_path, camera):
    with pytest.raises(EvacJaxError, match="no field 'is_done'"):
        run(import_rlinf, rlinf, tmp_path / "out", camera, *ZERO, "--success", "is_done")
    assert not list(tmp_path.glob("out*"))


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
        ("image", np.ones((16, 16, 3), np.uint8), "frame 2: the picture holds no value from 2"),
        ("state", np.zeros(8), "frame 2 .* quaternion's length is 0.000"),
        ("state", np.eye(8)[6] + 200 * np.eye(8)[7], "opening of -1..1 .* got 0.500..200.000"),
        ("state", np.eye(8)[6] - 2 * np.eye(8)[7], "opening of -1..1 .* got -2.000..0.500"),
    ],
)
def test_a_later_rlinf_frame_that_is_unlike_the_first_is_refused(
    rlinf, tmp_path, camera, field, value, message
):
    episode = load_objects(rlinf / "1.npy")
    episode[2][field] = value
    np.save(rlinf / "1.npy", episode, allow_pickle=True)
    with pytest.raises(EvacJaxError, match=message):
        run(import_rlinf, rlinf, tmp_path / "out", camera, "--gripper", "zero_closes")
    assert not list(tmp_path.glob("out*"))


def test_rlinf_files_of_two_picture_sizes_are_refused(rlinf, tmp_path, camera):
    episode = load_objects(rlinf / "1.npy")
    for t, frame in enumerate(episode):
        frame["image"] = frames(len(episode), 24)[t]
    np.save(rlinf / "1.npy", episode, allow_pickle=True)
    with pytest.raises(EvacJaxError, match="one camera cannot fit both"):
        run(import_rlinf, rlinf, tmp_path / "out", camera, *ZERO, "--image_size", 16)


def test_rlinf_instruction_that_changes_within_an_episode_is_refused(rlinf, tmp_path, camera):
    episode = load_objects(rlinf / "0.npy")
    episode[3]["instruction"] = TASKS[1]
    np.save(rlinf / "0.npy", episode, allow_pickle=True)
    with pytest.raises(EvacJaxError, match="'instruction' changes within the episode"):
        run(import_rlinf, rlinf, tmp_path / "out", camera)


def test_gripper_of_another_range_than_told_is_refused(rlinf, tmp_path, camera):
    with pytest.raises(EvacJaxError, match="is it --gripper=zero_closes"):
        run(import_rlinf, rlinf, tmp_path / "out", camera)


NEVER, END = [False] * 3, [False, False, True]


def successes(rule, episodes):
    """What one rule says of episodes of three frames, each {field: values}."""
    rule = importing.SuccessRule(rule)
    return [
        rule.of(episode, episode.__getitem__, 3, f"episode {n}").tolist()
        for n, episode in enumerate(episodes)
    ]


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ([{}, {"next.success": NEVER}], "episode 1: .* expected none .* got .'next.success'."),
        ([{"success": END}, {"done": END}], "episode 1: .* expected .'success'. .* got none"),
        (
            [{"next.success": END, "is_success": NEVER}],
            "episode 0: 'next.success' and 'is_success' contradict each other, True and False",
        ),
        ([{"next.reward": NEVER}], "'next.reward', need not mean success"),
    ],
)
def test_success_is_asked_for_when_fields_leave_it_in_doubt(episodes, message):
    with pytest.raises(DataError, match=message):
        successes("auto", episodes)
    assert successes("last", episodes) == [END] * len(episodes)


def test_reward_counts_as_success_when_it_is_named():
    assert successes("next.reward", [{"next.reward": [0, 0.5, 0]}]) == [[False, True, False]]


def test_fields_that_agree_tell_success_whatever_the_reward_is():
    told = {"success": END, "is_success": [True] * 3, "reward": [9, 9, 9]}
    assert successes("auto", [told, dict.fromkeys(told, NEVER)]) == [END, NEVER]


@pytest.mark.parametrize(
    ("without", "message"),
    [((0, 0), "0.npy: frame 0 .1 in all. has no 'success'"), ((1, None), "1.npy: fields that")],
)
def test_success_that_a_part_of_the_rlinf_frames_lacks_is_refused(
    rlinf, tmp_path, camera, without, message
):
    for n in range(2):
        episode = load_objects(rlinf / f"{n}.npy")
        for t, frame in enumerate(episode):
            if without not in ((n, t), (n, None)):
                frame["success"] = False
        np.save(rlinf / f"{n}.npy", episode, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        run(import_rlinf, rlinf, tmp_path / "out", camera, *ZERO)
    data = run(import_rlinf, rlinf, tmp_path / "out", camera, *ZERO, "--success", "never")
    assert not data.success.any()


@pytest.mark.parametrize("side", [200, 224, 240])
def test_intrinsics_of_256_pixels_need_their_size_when_the_pictures_are_smaller(
    tmp_path, camera, side
):
    matrices = json.loads(camera.read_text())
    matrices["intrinsic"] = [[[300, 0, 128], [0, 300, 123], [0, 0, 1]]]  # a lens, off by 2 %
    del matrices["size"]
    camera.write_text(json.dumps(matrices))
    importing.read_camera(str(camera), 1, (256, 256), 0)
    with pytest.raises(ConfigError, match=r'give "size"'):
        importing.read_camera(str(camera), 1, (side, side), 0)
    camera.write_text(json.dumps(matrices | {"size": [256, 256]}))
    intrinsic, _ = importing.read_camera(str(camera), 1, (side, side), 0)
    np.testing.assert_allclose(intrinsic[0, 0, 0], 300 * side / 256)


def test_size_is_asked_for_when_the_centre_is_not_that_of_the_pictures(tmp_path, camera):
    matrices = json.loads(camera.read_text())
    size = matrices.pop("size")
    camera.write_text(json.dumps(matrices))
    importing.read_camera(str(camera), 1, size, 0)
    with pytest.raises(ConfigError, match=r'give "size": \[H, W\]'):
        importing.read_camera(str(camera), 1, (64, 64), 0)
    camera.write_text(json.dumps(matrices | {"size": ["32", 32]}))
    with pytest.raises(ConfigError, match="expected .height, width."):
        importing.read_camera(str(camera), 1, (64, 64), 0)


@pytest.mark.parametrize("content", [{"fps": 10, "features": {"a": [0] * 999}}, ["x" * 9999]])
def test_file_that_is_no_camera_is_named_and_not_printed_whole(tmp_path, content):
    path = tmp_path / "info.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as told:
        importing.read_camera(str(path), 1, (16, 16), 0)
    text = str(told.value)
    assert text.startswith(f'--camera={path}: expected a JSON object of "intrinsic", "c2w"')
    assert "initial states" not in text
    assert len(text) < 300 + len(str(path))


def test_matrix_that_is_wrong_is_told_with_its_file(tmp_path, camera):
    matrices = json.loads(camera.read_text())
    camera.write_text(json.dumps(matrices | {"c2w": [[1]]}))
    with pytest.raises(ConfigError, match=f"--camera={camera}: camera.c2w: expected"):
        importing.read_camera(str(camera), 1, (16, 24), 0)
