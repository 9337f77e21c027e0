import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evac_jax.errors import ConfigError, DataError
from evac_jax.files import recordings

SHAPE = (2, 8, 6, 3)
SMALL = {
    "frames": np.zeros((3, 1, 4, 4, 3), np.uint8),
    "actions": np.full((2, 7), 0.25),
    "poses": np.tile(np.float32([0, 0, 0, 0, 0, 0, 1, 0]), (3, 1)),
    "success": np.zeros(3, bool),
    "task": 0,
    "source": 0,
}


def write(folder, lengths, *, instructions=("a", "b"), sources=("x",), shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    added = []
    with recordings.EpisodeWriter(
        folder,
        image_shape=shape,
        instructions=instructions,
        sources=sources,
        intrinsic=np.tile(np.eye(3), (2, 1, 1)),
        c2w=np.tile(np.eye(4), (2, 1, 1)),
        facts={"command": "test"},
    ) as writer:
        for index, steps in enumerate(lengths):
            episode = {
                "frames": rng.integers(0, 256, (steps + 1, *shape), dtype=np.uint8),
                "actions": rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
                "poses": poses_of(rng, steps + 1),
                "success": rng.random(steps + 1) < 0.3,
            }
            task = index % len(instructions)
            writer.add(**episode, task=task, source=index % len(sources), start=index)
            added.append(episode)
    return added


def small_writer(folder):
    """Return a writer for `SMALL`."""
    return recordings.EpisodeWriter(
        folder,
        image_shape=SMALL["frames"].shape[1:],
        instructions=("a",),
        sources=("x",),
        intrinsic=np.eye(3),
        c2w=np.eye(4),
        facts={},
    )


def poses_of(rng, count):
    poses = rng.normal(size=(count, 8)).astype(np.float32)
    poses[:, 3:7] /= np.linalg.norm(poses[:, 3:7], axis=1, keepdims=True)
    return poses


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_what_was_written_is_read(tmp_path_factory, lengths):
    folder = tmp_path_factory.mktemp("r") / "data"
    added = write(folder, lengths)
    data = recordings.load(folder)
    assert data.length.tolist() == lengths
    for n, episode in enumerate(added):
        rows = data.rows(n, np.arange(lengths[n] + 1))
        for name in ("frames", "poses", "success"):
            np.testing.assert_array_equal(getattr(data, name)[rows], episode[name])
        np.testing.assert_array_equal(data.actions[rows[:-1]], episode["actions"])
        assert not data.actions[rows[-1]].any()
    expected = [bool(e["success"].any()) for e in added]
    assert data.success_once().tolist() == expected
    recordings.verify(folder)


def test_objects_are_kept_where_they_are_known_and_nan_elsewhere(tmp_path):
    places = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    places[:, 2] = np.nan
    with small_writer(tmp_path / "told") as writer:
        writer.add(**SMALL, objects=places)
        writer.add(**SMALL)
        with pytest.raises(DataError, match=r"objects: expected \(3, 3, 3\), got \(3, 2, 3\)"):
            writer.add(**SMALL, objects=places[:, :2])
    told = recordings.load(tmp_path / "told")
    np.testing.assert_array_equal(
        told.objects, np.concatenate((places, np.full((3, 3, 3), np.nan)))
    )
    both = recordings.load(tmp_path / "told", tmp_path / "told")
    np.testing.assert_array_equal(both.objects, np.tile(told.objects, (2, 1, 1)))


def test_what_a_player_intended_is_the_lesson_where_it_is_known(tmp_path):
    intended = np.full((2, 7), 0.5, np.float32)
    with small_writer(tmp_path / "told") as writer:
        writer.add(**SMALL)
        writer.add(**SMALL, intended=intended)
        with pytest.raises(DataError, match=r"intended: expected \(2, 7\), got \(1, 7\)"):
            writer.add(**SMALL, intended=intended[:1])
    told = recordings.load(tmp_path / "told")
    assert told.actions[:, 0].tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0]
    assert told.lessons[:, 0].tolist() == [0.25, 0.25, 0, 0.5, 0.5, 0]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (90, r"expected changes of the pose scaled to \[-1, 1\].*degrees"),
        (np.nan, "expected finite numbers"),
    ],
)
def test_actions_that_no_environment_could_mean_are_neither_written_nor_read(value, told, tmp_path):
    actions = SMALL["actions"].copy()
    actions[1, 3] = value
    with small_writer(tmp_path / "d") as writer:
        writer.add(**SMALL)
        with pytest.raises(DataError, match=told):
            writer.add(**SMALL | {"actions": actions})
    path = tmp_path / "d" / "actions.npy"
    np.save(path, np.concatenate((actions, actions[:1])).astype(np.load(path).dtype))
    with pytest.raises(DataError, match=f"d: frame 1 .*{told}"):
        recordings.load(tmp_path / "d")


def test_a_recording_that_knows_no_objects_has_no_file_of_them(tmp_path):
    write(tmp_path / "data", [2])
    assert not (tmp_path / "data" / "objects.npy").exists()
    assert not (tmp_path / "data" / "intended.npy").exists()
    assert np.isnan(recordings.load(tmp_path / "data").objects).all()


def test_selected_episodes_keep_their_frames(tmp_path):
    added = write(tmp_path / "d", [3, 4, 3])
    chosen = recordings.load(tmp_path / "d").select(np.array([2, 0]))
    np.testing.assert_array_equal(chosen.stacked("frames")[0], added[2]["frames"])
    assert chosen.start.tolist() == [2, 0]


def test_stacked_refuses_unequal_lengths_unless_cut(tmp_path):
    write(tmp_path / "d", [3, 4])
    data = recordings.load(tmp_path / "d")
    with pytest.raises(DataError, match=r"3\.\.4"):
        data.stacked("poses")
    assert data.stacked("poses", 2).shape == (2, 3, 8)
    with pytest.raises(DataError, match="outside"):
        data.stacked("poses", 4)


def test_joined_folders_merge_texts(tmp_path):
    write(tmp_path / "one", [2, 2], instructions=("a", "b"), sources=("x",))
    added = write(tmp_path / "two", [3], instructions=("b", "c"), sources=("y",), seed=1)
    data = recordings.load(tmp_path / "one", tmp_path / "two")
    assert data.instructions == ("a", "b", "c")
    assert [data.instructions[t] for t in data.task] == ["a", "b", "b"]
    assert [data.sources[s] for s in data.source] == ["x", "x", "y"]
    np.testing.assert_array_equal(data.frames[data.rows(2, np.arange(4))], added[0]["frames"])


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(DataError, match="expected uint8"), recordings.EpisodeWriter(
        tmp_path / "d", image_shape=SHAPE, instructions=["a"], sources=["x"],
        intrinsic=np.tile(np.eye(3), (2, 1, 1)), c2w=np.tile(np.eye(4), (2, 1, 1)), facts={},
    ) as writer:  # fmt: skip
        writer.add(
            frames=np.zeros((2, *SHAPE)), actions=np.zeros((1, 7)), poses=np.zeros((2, 8)),
            success=np.zeros(2, bool), task=0, source=0,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path):
    write(tmp_path / "d", [2, 3])
    np.save(tmp_path / "d" / "poses.npy", np.zeros((3, 8), np.float32))
    (tmp_path / "d" / "task.npy").unlink()
    with pytest.raises(DataError, match=r"(?s)poses: expected float32 \[F 8\].*task"):
        recordings.load(tmp_path / "d")
    with pytest.raises(DataError, match=r"poses\.npy.*changed"):
        recordings.verify(tmp_path / "d")


def test_lengths_beyond_the_frames_are_refused(tmp_path):
    write(tmp_path / "d", [2, 3])
    np.save(tmp_path / "d" / "length.npy", np.array([2, 9]))
    with pytest.raises(DataError, match="first and length"):
        recordings.load(tmp_path / "d")


def test_a_pickle_is_not_opened(tmp_path):
    write(tmp_path / "d", [2])
    np.save(tmp_path / "d" / "start.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="start"):
        recordings.load(tmp_path / "d")


def test_a_folder_that_is_no_recording_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a recording"):
        recordings.load(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"sources": []}))
    with pytest.raises(DataError, match="instructions, sha256"):
        recordings.load(tmp_path)


@pytest.mark.parametrize("length", [0, 40])
def test_recording_with_an_array_that_was_cut_is_refused_without_asking_for_memory(
    tmp_path, length
):
    write(tmp_path / "d", [2, 3])
    path = tmp_path / "d" / "length.npy"
    header = b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i8', 'fortran_order': False, 'shape': (9%s,)}"
    path.write_bytes((header % (b"0" * 13)).ljust(80) if length else b"")
    with pytest.raises(DataError, match="length: "):
        recordings.load(tmp_path / "d")


def test_tasks_keep_their_texts_when_they_are_numbered_as_another_list(tmp_path):
    write(tmp_path / "d", [2, 3, 1], instructions=("a", "b", "a"))
    data = recordings.load(tmp_path / "d")
    assert data.asked == ("a", "b")
    turned = data.numbered_as(("c", "b", "a"))
    assert turned.instructions == ("c", "b", "a")
    assert turned.task.tolist() == [2, 1, 2]
    assert turned.select(turned.task == 1).asked == ("b",)
    with pytest.raises(ConfigError, match=r"unknown to it are\n  'b'"):
        data.numbered_as(("a", "c"))


def test_poses_that_are_none_are_refused_on_the_way_in_and_out(tmp_path):
    write(tmp_path / "d", [3, 4])
    poses = np.load(tmp_path / "d" / "poses.npy")
    poses[5, 3:8] = (3.1, 0, 0, 0.04, -0.04)
    np.save(tmp_path / "d" / "poses.npy", poses)
    with pytest.raises(DataError, match=r"d: poses: frame 5 .1 in all.: .*as LIBERO has it"):
        recordings.load(tmp_path / "d")
    with pytest.raises(DataError, match="0: .*no pose was recorded"), recordings.EpisodeWriter(
        tmp_path / "e", image_shape=SHAPE, instructions=["a"], sources=["x"],
        intrinsic=np.tile(np.eye(3), (2, 1, 1)), c2w=np.tile(np.eye(4), (2, 1, 1)), facts={},
    ) as writer:  # fmt: skip
        writer.add(
            frames=np.zeros((2, *SHAPE), np.uint8), actions=np.zeros((1, 7)),
            poses=np.zeros((2, 8)), success=np.zeros(2, bool), task=0, source=0,
        )  # fmt: skip
    assert not (tmp_path / "e").exists()
