import numpy as np

from evac_jax.files import start_frames
from tests.unit.files.test_recordings import write


def test_starts_of_a_recording_are_its_training_episodes(tmp_path):
    write(tmp_path / "d", [1] * 40)
    held_out = int(np.load(tmp_path / "d" / "held_out.npy").sum())
    assert 0 < held_out < 40
    assert start_frames.count("recording", str(tmp_path / "d")) == 40 - held_out


def test_starts_of_a_folder_are_its_episode_files_without_keyframes(tmp_path):
    for name in ("b.npy", "a.npy", "a_kir.npy", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in start_frames.episode_files(tmp_path)] == ["a.npy", "b.npy"]
    assert [path.name for path in start_frames.keyframe_files(tmp_path)] == ["a_kir.npy"]
    assert start_frames.count("npy", str(tmp_path)) == 2


def test_starts_of_a_packed_folder_are_its_tasks(tmp_path):
    (tmp_path / "images.npy").touch()
    assert start_frames.count("npy", str(tmp_path)) is None
    np.save(tmp_path / "tasks.npy", np.zeros(5, np.int32))
    assert start_frames.count("npy", str(tmp_path)) == 5


def test_source_without_a_folder_tells_its_starts_itself(tmp_path):
    assert start_frames.count("miniature", "") is None
    assert start_frames.count("npy", str(tmp_path)) is None
