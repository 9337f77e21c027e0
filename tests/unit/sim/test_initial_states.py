import json
import os

import numpy as np
import pytest

from evac_jax.bridge.types import KEYFRAMES
from evac_jax.errors import ConfigError, DataError
from evac_jax.files.restricted_npy import load_objects
from evac_jax.miniature.starts import MiniatureStarts
from evac_jax.sim.initial_states import (
    NpyKeyframes,
    NpyStarts,
    StartCycle,
    make_initial_states,
    pack_starts,
)
from evac_jax.sim.recorded_starts import WithKeyframes, open_keyframes


class Payload:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pose(x=0.0):
    return np.array([x, 0, 0.2, 1, 0, 0, 0, 0.5], np.float64)


def frame(value=2, size=(6, 8), text="open the drawer", **extra):
    return {
        "image": np.full((*size, 3), value, np.uint8),
        "init_ee_pose": pose(value),
        "instruction": text,
        "abs_action": pose(),
        **extra,
    }


def write(path, *frames):
    episode = np.empty(len(frames), object)
    episode[:] = frames
    np.save(path, episode, allow_pickle=True)


def test_starts_are_loaded_by_id_in_name_order(tmp_path):
    write(tmp_path / "b.npy", frame(2, text=b"close it"), frame(9))
    write(tmp_path / "a.npy", frame(4), frame(9))
    write(tmp_path / "c.npy", frame(3, text=np.bytes_(b"close it ")))
    source = make_initial_states("npy", str(tmp_path))
    assert source.num_starts == 3
    assert source.instructions == ("open the drawer", "close it")
    starts = source.load(np.array([2, 0, 2]))
    assert starts.images.shape == (3, 1, 6, 8, 3)
    assert starts.images.dtype == np.uint8
    np.testing.assert_array_equal(starts.images[:, 0, 0, 0, 0], [3, 4, 3])
    np.testing.assert_array_equal(starts.poses[1], np.float32(pose(4)))
    np.testing.assert_array_equal(starts.task, [1, 0, 1])


@pytest.mark.parametrize("key", ["state", "abs_action"])
def test_pose_comes_from_the_fallbacks_when_init_ee_pose_is_missing(tmp_path, key):
    entry = frame()
    del entry["init_ee_pose"], entry["abs_action"]
    write(tmp_path / "a.npy", entry | {key: pose(4)})
    poses = NpyStarts(str(tmp_path)).load(np.array([0])).poses
    np.testing.assert_array_equal(poses, [np.float32(pose(4))])


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    write(tmp_path / "bad.npy", frame(extra=Payload(tmp_path / "made")))
    with pytest.raises(DataError, match=r"bad\.npy: refused, its pickle asks for .*mkdir"):
        NpyStarts(str(tmp_path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_dangerous_builtins_are_refused(tmp_path, name):
    class Call:
        def __reduce__(self):
            return __builtins__[name], ("1", "real")

    write(tmp_path / "bad.npy", Call())
    with pytest.raises(DataError, match="refused"):
        load_objects(tmp_path / "bad.npy")


def test_every_file_at_fault_is_named(tmp_path):
    write(tmp_path / "a.npy", frame(text=None))
    write(tmp_path / "b.npy", frame() | {"image": np.zeros((4, 4, 3))})
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    write(tmp_path / "d.npy", frame(init_ee_pose=np.zeros(1)))
    with pytest.raises(DataError) as caught:
        NpyStarts(str(tmp_path))
    for name in "abcd":
        assert f"{name}.npy" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.1, 0.2, 0.3, 3.1, 0, 0, 0.04, -0.04], "as LIBERO has it"),
        ([0.0] * 8, "Zeros: no pose was recorded"),
        ([0.1, 0.2, 0.3, 0.5, 0, 0, 0, 1], "before the quaternion"),
        ([0.1, 0.2, 0.3, 180, 0, 0, 0.5, 1], "in degrees"),
        ([0.1, 0.2, 0.3, 1.2, 0.1, 0, 0.5, 1], "Axis-angle or Euler"),
        ([400, 0, 200, 1, 0, 0, 0, 0.5], "millimetres"),
        ([0.1, np.nan, 0.3, 1, 0, 0, 0, 0.5], "holds NaN or infinity: .0.1, nan"),
    ],
)
def test_numbers_that_are_no_pose_are_refused_with_what_they_may_be(tmp_path, values, told):
    write(tmp_path / "a.npy", frame(init_ee_pose=np.array(values)))
    with pytest.raises(DataError, match=rf"a\.npy: frame 0: 'init_ee_pose': .*{told}"):
        NpyStarts(str(tmp_path))


def test_packed_poses_are_checked_like_others(tmp_path):
    write(tmp_path / "a.npy", frame())
    pack_starts(NpyStarts(str(tmp_path)), np.array([0]), tmp_path / "packed")
    np.save(tmp_path / "packed" / "poses.npy", np.zeros((1, 8), np.float32))
    with pytest.raises(DataError, match="no pose was recorded"):
        NpyStarts(str(tmp_path / "packed"))
    np.save(tmp_path / "packed" / "tasks.npy", np.array([-1]))
    with pytest.raises(DataError, match="a task is negative"):
        NpyStarts(str(tmp_path / "packed"))


def test_frames_that_were_cast_without_scaling_are_refused(tmp_path):
    picture = np.random.default_rng(0).uniform(-1, 1, (6, 8, 3))
    write(tmp_path / "a.npy", frame() | {"image": picture.astype(np.int64).astype(np.uint8)})
    with pytest.raises(DataError, match="no value from 2 to 254"):
        NpyStarts(str(tmp_path))


def test_later_frame_of_a_packed_folder_that_was_cast_is_refused(tmp_path):
    write(tmp_path / "a.npy", frame(4))
    write(tmp_path / "b.npy", frame(2))
    packed = tmp_path / "packed"
    pack_starts(NpyStarts(str(tmp_path)), np.array([0, 1]), packed)
    images = np.load(packed / "images.npy")
    images[1] = 1
    np.save(packed / "images.npy", images)
    with pytest.raises(DataError, match="start 1: the picture holds no value from 2 to 254"):
        NpyStarts(str(packed))


def test_camera_that_no_file_tells_is_said_to_be_assumed(tmp_path, caplog):
    write(tmp_path / "a.npy", frame(4))
    write(tmp_path / "b.npy", frame(2))
    with caplog.at_level("WARNING", logger="absl"):
        source = NpyStarts(str(tmp_path))
        pack_starts(source, np.array([0]), tmp_path / "packed")
        NpyStarts(str(tmp_path / "packed"))  # knows its camera
    (line,) = caplog.messages
    assert "taken to be RLinf's fixed one for LIBERO" in line
    assert "import_starts" in line


def test_keyframe_of_another_instruction_than_its_episode_is_refused(tmp_path):
    keyframe_file(tmp_path / "a_kir.npy", 9, instruction="close it")
    with pytest.raises(DataError, match="'instruction' changes within the episode"):
        NpyKeyframes(str(tmp_path))


def test_frames_of_several_sizes_are_refused(tmp_path):
    write(tmp_path / "a.npy", frame())
    write(tmp_path / "b.npy", frame(size=(4, 4)))
    write(tmp_path / "c.npy", frame())
    with pytest.raises(DataError, match=r"b\.npy: frame \(1, 4, 4, 3\), most are \(1, 6, 8, 3\)"):
        NpyStarts(str(tmp_path))


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="found none"):
        NpyStarts(str(tmp_path))


def test_ids_outside_the_source_are_refused(tmp_path):
    write(tmp_path / "a.npy", frame())
    with pytest.raises(DataError, match=r"within 0\.\.0"):
        NpyStarts(str(tmp_path)).load(np.array([1]))


def keyframe_file(path, value, **extra):
    """As RLinf writes them: an episode that ends at the frame to begin at."""
    middle = {"image": np.full((6, 8, 3), 7, np.uint8), "delta_action": np.zeros(7)}
    last = {"image": np.full((6, 8, 3), value, np.uint8), "state": pose(value), **extra}
    write(path, frame(4), middle, last)


def test_keyframe_files_are_no_ordinary_starts(tmp_path):
    keyframe_file(tmp_path / "step_9_seed_0_traj_0_kir.npy", 9)
    with pytest.raises(DataError, match="1 keyframe files only"):
        NpyStarts(str(tmp_path))
    write(tmp_path / "seed_0_traj_0.npy", frame(4))
    source = NpyStarts(str(tmp_path))
    assert source.num_starts == 1
    assert source.load(np.array([0])).images.max() == 4


def test_keyframes_begin_at_the_last_frame_of_their_files(tmp_path):
    write(tmp_path / "seed_0_traj_0.npy", frame(4, text="close it"))
    write(tmp_path / "seed_0_traj_1.npy", frame(2))
    # init_ee_pose in a later frame is still the pose of the first one.
    keyframe_file(tmp_path / "step_9_seed_0_traj_0_kir.npy", 9, init_ee_pose=np.zeros(8))
    keyframe_file(tmp_path / "step_8_seed_0_traj_0_kir.npy", 8)
    plain = NpyStarts(str(tmp_path))
    source = WithKeyframes(plain, open_keyframes(str(tmp_path)))
    assert (source.num_starts, source.num_keyframes) == (2, 2)
    starts = source.load(np.array([KEYFRAMES + 1, 0, KEYFRAMES]))
    np.testing.assert_array_equal(starts.images[:, 0, 0, 0, 0], [9, 4, 8])
    np.testing.assert_array_equal(starts.poses[0], np.float32(pose(9)))
    assert [source.instructions[t] for t in starts.task] == [
        "open the drawer",
        "close it",
        "open the drawer",
    ]
    with pytest.raises(DataError, match=r"within 0\.\.1"):
        source.load(np.array([KEYFRAMES + 2]))


def test_keyframes_that_do_not_fit_are_named(tmp_path):
    keyframe_file(tmp_path / "a_kir.npy", 9)
    write(tmp_path / "b_kir.npy", frame(4), {"image": np.full((6, 8, 3), 9, np.uint8)})
    with pytest.raises(DataError, match=r"b_kir\.npy: frame 1 needs 'state' as 8"):
        NpyKeyframes(str(tmp_path))


def test_packed_folder_gives_back_what_was_packed(tmp_path):
    write(tmp_path / "a.npy", frame(4))
    write(tmp_path / "b.npy", frame(2, text="close it"))
    source, folder = NpyStarts(str(tmp_path)), tmp_path / "packed"
    pack_starts(source, np.array([1, 0]), folder)
    copy = make_initial_states("npy", str(folder))
    ours, theirs = copy.load(np.array([0, 1])), source.load(np.array([1, 0]))
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.poses, theirs.poses)
    np.testing.assert_array_equal(copy.camera[1], source.camera[1])
    assert copy.camera_size is None
    assert [copy.instructions[i] for i in ours.task] == ["close it", "open the drawer"]
    with pytest.raises(DataError, match="exists"):
        pack_starts(source, np.array([0]), folder)


def test_damaged_packed_folder_is_explained(tmp_path):
    write(tmp_path / "a.npy", frame(4))
    folder = tmp_path / "packed"
    pack_starts(NpyStarts(str(tmp_path)), np.array([0]), folder)
    np.save(folder / "poses.npy", np.full((1, 8), np.nan))
    with pytest.raises(DataError, match="holds NaN or infinity"):
        NpyStarts(str(folder))
    write(folder / "poses.npy", frame())  # a pickle in the place of plain numbers
    with pytest.raises(DataError, match="cannot read packed"):
        NpyStarts(str(folder))
    (folder / "card.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="cannot read packed"):
        NpyStarts(str(folder))


def test_miniature_starts_are_named_by_their_seed():
    source = MiniatureStarts(num_starts=50, image_size=32)
    starts = source.load(np.array([7, 3, 7]))
    assert starts.images.shape == (3, 1, 32, 32, 3)
    assert starts.poses.shape == (3, 8)
    np.testing.assert_array_equal(starts.images[0], starts.images[2])
    assert (starts.images[0] != starts.images[1]).any()
    alone = source.load(np.array([3]))
    np.testing.assert_array_equal(alone.images[0], starts.images[1])
    np.testing.assert_array_equal(alone.poses[0], starts.poses[1])
    assert source.camera[0].shape == (1, 3, 3)
    with pytest.raises(DataError, match=r"0\.\.49"):
        source.load(np.array([50]))


@pytest.mark.parametrize(
    ("kind", "path", "told"),
    [
        ("npz", "x", "initial_states: expected one of"),
        ("", "", "initial_states: expected one of"),
        ("npy", "", "initial_states_path: 'npy' expected the folder"),
        ("miniature", "x", "initial_states_path: 'miniature' expected none"),
    ],
)
def test_unknown_kinds_and_folders_that_do_not_fit_are_refused(kind, path, told):
    with pytest.raises(ConfigError, match=told):
        make_initial_states(kind, path)


def test_cycle_visits_every_start_each_round_in_a_seeded_order():
    ids = np.array([4, 4, 7, 9])
    one, other = StartCycle(ids, (3, 1)), StartCycle(ids, (3, 1))
    rounds = one.next(8).reshape(2, 4)
    assert (np.sort(rounds) == ids).all()
    np.testing.assert_array_equal(np.concatenate([other.next(3), other.next(5)]), rounds.ravel())
