import numpy as np
import pytest

from evac_jax.errors import DataError
from evac_jax.miniature import render, scene
from evac_jax.tools import collect, episodes

MIX = {"expert": 0.5, "near_miss": 0.25, "random": 0.25}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings") / "first"
    return folder, collect.collect(folder, 12, MIX, seed=3, image_size=32)


def test_recording_holds_what_the_dynamics_give(recording):
    _, data = recording
    scenes = scene.sample_scenes(collect.FIRST_SCENE + 3_000_000 + np.arange(12))
    np.testing.assert_array_equal(data.poses[:, 0], scenes.pose)
    np.testing.assert_array_equal(data.task, scenes.task)
    for t in range(32):
        scenes = scene.step(scenes, data.actions[:, t])
        np.testing.assert_array_equal(data.poses[:, t + 1], scenes.pose)
    np.testing.assert_array_equal(data.frames[:, -1], render.render(scenes, 32))
    np.testing.assert_array_equal(data.success[:, -1], scene.is_success(scenes))


def test_sources_have_their_shares_and_the_expert_succeeds(recording):
    _, data = recording
    assert np.bincount(data.source).tolist() == [6, 3, 3]
    assert data.meta["sources"] == list(MIX)
    assert data.success[data.source == 0].any(1).all()


def test_same_arguments_give_the_same_files(recording, tmp_path):
    _, data = recording
    again = collect.collect(tmp_path / "again", 12, MIX, seed=3, image_size=32)
    assert again.meta["sha256"] == data.meta["sha256"]


def test_folders_can_be_joined_and_split(recording, tmp_path):
    folder, _ = recording
    collect.collect(tmp_path / "second", 8, MIX, seed=4, image_size=32)
    joined = episodes.load(folder, tmp_path / "second")
    assert joined.num_episodes == 20
    train, held_out = joined.split(0.2)
    assert (train.num_episodes, held_out.num_episodes) == (16, 4)


def test_existing_folder_and_wrong_mixture_are_refused(recording, tmp_path):
    folder, _ = recording
    with pytest.raises(DataError, match="exists"):
        collect.collect(folder, 4, MIX)
    with pytest.raises(DataError, match="no such kind"):
        collect.collect(tmp_path / "x", 4, {"perfect": 1.0})
    with pytest.raises(DataError, match="collect"):
        episodes.load(tmp_path)
