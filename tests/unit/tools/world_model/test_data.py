import numpy as np
import pytest
import torch

from evac_jax.errors import ConfigError, DataError
from evac_jax.evac.conditioning import window_deltas
from evac_jax.evac.model import history_places
from evac_jax.files import recordings
from evac_jax.sim.actions import both_arms
from evac_jax.tools.world_model import data as world_model_data
from evac_jax.tools.world_model.imagine import camera_of, to_images
from evac_jax.tools.world_model.latent_cache import cached_latents
from tests.unit.evac import tiny
from tests.unit.tools import tiny_recording

PAST, CHUNK = tiny.TINY.n_previous, tiny.TINY.chunk


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording") / "a"
    return tiny_recording.write(folder, views=2, sources=("expert", "policy:start", "policy:7"))


@pytest.fixture(scope="module")
def data(recording):
    return recordings.load(recording)


def _remembered(start: int, number: int) -> list[int]:
    """Steps that `imagine` conditions chunk `number` on, told from how it stores frames."""
    stored = [start] * PAST
    length = 0
    for k in range(number):
        stored += range(start + k * CHUNK + 1, start + (k + 1) * CHUNK + 1)
        length = len(stored)
    places = history_places(torch.tensor([length]), PAST)[0]
    return [stored[place] for place in places]


def test_windows_hold_what_imagination_would_remember_for_unequal_lengths(data):
    sampler = world_model_data.WindowSampler(data, tiny.TINY)
    windows = sampler.draw(400, np.random.default_rng(0))
    seen = set()
    for episode, start, columns in zip(
        windows.episodes, windows.start, windows.columns, strict=True
    ):
        number, rest = divmod(columns[PAST] - 1 - start, CHUNK)
        assert rest == 0
        assert columns[:PAST].tolist() == _remembered(start, number)
        assert columns[PAST:].tolist() == list(range(columns[PAST], columns[PAST] + CHUNK))
        assert start >= 0
        assert columns[-1] <= data.length[episode]
        seen.add((int(data.length[episode]), int(number)))
    assert seen == {(3, 0), (5, 0), (8, 0), (8, 1), (11, 0), (11, 1), (11, 2)}


def test_windows_are_drawn_as_often_as_chunks_and_weights_say(data):
    sampler = world_model_data.WindowSampler(data, tiny.TINY, {"policy": 0, "policy:7": 2})
    drawn = sampler.draw(6000, np.random.default_rng(0)).episodes
    chunks = data.length // CHUNK
    expected = np.array([chunks[data.source == s].sum() * w for s, w in ((0, 1), (1, 0), (2, 2))])
    counts = np.bincount(data.source[drawn], minlength=3)
    np.testing.assert_allclose(counts / 6000, expected / expected.sum(), atol=0.03)
    assert counts[1] == 0


def test_weights_are_refused_when_they_name_nothing_or_leave_nothing(data):
    with pytest.raises(ConfigError, match=r"no such source \['polcy'\].*expert"):
        world_model_data.WindowSampler(data, tiny.TINY, {"polcy": 2.0})
    with pytest.raises(ConfigError, match="numbers >= 0"):
        world_model_data.WindowSampler(data, tiny.TINY, {"policy": -1.0})
    with pytest.raises(DataError, match="no window to train on"):
        world_model_data.WindowSampler(data, tiny.TINY, {"policy": 0, "expert": 0})


def test_batch_holds_the_encoded_frames_and_poses_of_its_windows(recording, data, tmp_path):
    model = tiny.tiny_model(2)
    latents = cached_latents(tmp_path, [recording], model.first_stage_model, model.config)
    camera = camera_of(data)
    rays = model.rays(camera.intrinsic, camera.along(model.config.frames))
    part = data.select(np.flatnonzero(data.length == 11))  # rows are still those of the whole
    corpus = world_model_data.Corpus(part, latents, rays)
    start, number = np.array([2, 0]), np.array([1, 2])
    windows = world_model_data.Windows(
        np.array([3, 1]), start, world_model_data.window_columns(start, number, model.config)
    )
    batch = corpus.batch(windows, model.config)
    frames = part.stacked("frames")[windows.episodes]  # [2 12 V H W 3]
    poses = both_arms(torch.from_numpy(np.array(part.stacked("poses")[windows.episodes])))
    row = np.arange(2)[:, None]
    with torch.inference_mode():
        expected = model.encode(to_images(frames[row, windows.columns]).transpose(1, 2))
        window = torch.tensor([[3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9]])
        now = poses[torch.arange(2)[:, None], window]
        maps = model.encode_maps(now[:, PAST:], camera.intrinsic, camera.c2w[:, :, None])
    close = {"atol": 2e-3, "rtol": 2e-3}  # float16
    torch.testing.assert_close(batch.latents, expected.transpose(2, 3), **close)
    torch.testing.assert_close(batch.map_latents, maps, **close)
    torch.testing.assert_close(batch.deltas, window_deltas(now, model.config))
    images = to_images(np.stack((frames[0, 2], frames[1, 0])))
    torch.testing.assert_close(batch.images, images[:, :, None])


def test_moving_cells_weigh_more(recording, data, tmp_path):
    model = tiny.tiny_model(2)
    latents = cached_latents(tmp_path, [recording], model.first_stage_model, model.config)
    corpus = world_model_data.Corpus(data, latents, torch.zeros(1))
    windows = world_model_data.WindowSampler(data, model.config).draw(8, np.random.default_rng(0))
    batch = corpus.batch(windows, model.config)
    batch.latents[:] = 0
    batch.latents[:, :, 2, PAST + 1, 3, 4] = 0.6
    weight = world_model_data.moving_weight(batch, model.config, 5.0)
    assert (weight[:, :, 0, 1, 3, 4] == 5).all()
    assert weight.sum() == weight.numel() + 4 * 8 * 2
    plain = world_model_data.mean_moving_weight(corpus, model.config, 1.0, 20)
    assert plain == 1


def test_fitted_deltas_are_normal_and_what_never_changes_is_not_scaled_up(data):
    config = world_model_data.fitted_deltas(tiny.TINY, data)
    rows = np.concatenate([f + np.arange(n) for f, n in zip(data.first, data.length, strict=True)])
    moved = data.poses[rows + 1, :3] - data.poses[rows, :3]
    np.testing.assert_allclose(config.delta_mean[:3], moved.mean(0), atol=1e-6)
    np.testing.assert_allclose(config.delta_std[6:9], moved.std(0, ddof=1), rtol=1e-5)
    assert config.delta_std[3:6] == (world_model_data.LEAST_TURNED,) * 3
    assert config.delta_std_factor == 1.0
