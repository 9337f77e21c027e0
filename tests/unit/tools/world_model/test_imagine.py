import numpy as np
import pytest
import torch

from evac_jax.errors import DataError
from evac_jax.files import recordings
from evac_jax.sim.actions import both_arms
from evac_jax.sim.pixels import to_uint8
from evac_jax.tools.world_model import filmstrip
from evac_jax.tools.world_model.imagine import camera_of, chunk_psnr, imagine_episodes, to_images
from tests.unit.evac import tiny
from tests.unit.tools import tiny_recording

SAMPLING = {"steps": 2, "eta": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    tiny_recording.write(folder / "data", count=6, lengths=(8,), views=2)
    tiny_recording.write_model(folder / "model", views=2)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return recordings.load(folder / "data")


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(2)


def _imagine(model, data, **options):
    options = SAMPLING | {"generator": torch.Generator().manual_seed(0)} | options
    return imagine_episodes(model, data, **options)


def test_episodes_are_imagined_from_first_frame_and_poses(model, data):
    imagined = _imagine(model, data, length=6)
    assert imagined.shape == (6, 6, 2, 32, 32, 3)
    assert imagined.dtype == np.uint8
    poses = both_arms(torch.from_numpy(np.array(data.stacked("poses", 6))))
    state = model.start(to_images(data.frames[data.first]), 2)
    generator = torch.Generator().manual_seed(0)
    for k in range(2):
        steps = np.maximum(np.arange(-2, 4) + 3 * k, 0)
        state, frames = model.imagine(
            state, poses[:, steps], camera_of(data), generator=generator, **SAMPLING
        )
        expected = to_uint8(frames).transpose(1, 2).numpy()
        np.testing.assert_array_equal(imagined[:, 3 * k : 3 * k + 3], expected)


def test_last_chunk_is_cut_where_the_episode_ends(model, data):
    whole = _imagine(model, data)
    assert whole.shape[1] == 8
    np.testing.assert_array_equal(whole[:, :6], _imagine(model, data, length=6)[:, :6])


def test_batch_bounds_what_is_imagined_at_once(model, data, monkeypatch):
    sizes, start = [], type(model).start
    monkeypatch.setattr(type(model), "start", lambda *a: (sizes.append(len(a[1])), start(*a))[1])
    assert len(_imagine(model, data, batch=4, length=3)) == 6
    assert sizes == [4, 2]


def test_pictures_that_do_not_fit_are_refused(data):
    with pytest.raises(DataError, match=r"takes 1 view\(s\) of 32x32 pixels.*have 2 of 32x32"):
        _imagine(tiny.tiny_model(1), data)


def test_psnr_is_told_chunk_by_chunk():
    real = np.full((2, 5, 1, 2, 2, 3), 100, np.uint8)
    imagined = real.copy()
    imagined[:, :3] += 10
    imagined[:, 3:] -= 51
    first, second = chunk_psnr(imagined, real, 3)
    assert first == pytest.approx(20 * np.log10(25.5))
    assert second == pytest.approx(20 * np.log10(5))


def test_comparison_shows_imagined_above_real():
    real = np.zeros((1, 3, 2, 4, 5, 3), np.uint8)
    imagined = np.full((1, 2, 2, 4, 5, 3), 200, np.uint8)
    page = np.asarray(filmstrip.compare(real, imagined, count=3))
    assert page.shape == (4 + 1 + 4, 3 * 10 + 2 * 2, 3)  # two views side by side
    assert (page[:4, :10] == 0).all()  # both begin with the real first frame
    assert (page[:4, 12:22] == 200).all()
    assert (page[5:, 12:22] == 0).all()


def test_command_draws_held_out_episodes(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(type(data), "split", lambda self: (self, self))
    options = {"world_model": folder / "model", "data": folder / "data", "out": tmp_path / "a.png"}
    options |= {"frames": 3, "steps": 1, "scale": 1, "length": 3, "device": "cpu"}
    filmstrip.main([p for name, value in options.items() for p in (f"--{name}", str(value))])
    with filmstrip.Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 64 + 4, 3 * (32 + 1 + 32) + 2 * 6)
    with pytest.raises(DataError, match="a.png exists; choose another file"):
        filmstrip.main([p for name, value in options.items() for p in (f"--{name}", str(value))])
    options |= {"out": tmp_path / "b.png", "episodes": 99}
    with pytest.raises(DataError, match="--episodes: expected numbers below .*, got 99"):
        filmstrip.main([p for name, value in options.items() for p in (f"--{name}", str(value))])
