import av
import numpy as np
import pytest
from PIL import Image

from evac_jax.telemetry import video


def _episode(length=6, height=64, width=64):
    frames = np.full((length, height, width, 3), (40, 90, 160), np.uint8)
    for t in range(length):
        frames[t, 24:40, 8 * t : 8 * t + 16] = (220, 80, 40)
    return frames


def _overlay(length=6, instruction="put the red block into the bowl"):
    return video.Overlay(instruction, np.linspace(0.0, 1.0, length), np.arange(length) >= 4)


def test_mp4_decodes_to_the_same_frames_when_written_with_an_overlay(tmp_path):
    path = tmp_path / "videos" / "episode.mp4"
    video.write_mp4(path, _episode(), fps=8, overlay=_overlay())
    expected = video.annotate(video.upscale(_episode()), _overlay())
    frames, fps = video.read_mp4(path)
    assert fps == 8
    assert len(frames) == 6
    height, width = expected.shape[1:3]
    assert np.abs(frames[:, :height, :width].astype(int) - expected).mean() < 4.0
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.name in ("h264", "mpeg4")
        assert min(stream.width, stream.height) >= video.MIN_SIZE


def test_mp4_is_written_when_sides_are_odd(tmp_path):
    video.write_mp4(tmp_path / "odd.mp4", _episode(height=259, width=257), fps=5)
    frames, _ = video.read_mp4(tmp_path / "odd.mp4")
    assert frames.shape == (6, 260, 258, 3)


def test_nothing_is_left_when_writing_fails(tmp_path):
    with pytest.raises(ValueError, match=r"reward_so_far: expected shape \(6,\), got \(5,\)"):
        video.write_mp4(tmp_path / "a.mp4", _episode(), fps=8, overlay=_overlay(length=5))
    with pytest.raises(ValueError, match="uint8"):
        video.write_mp4(tmp_path / "a.mp4", _episode().astype(np.float32), fps=8)
    assert list(tmp_path.iterdir()) == []


def test_border_turns_green_when_the_episode_succeeds():
    frames = video.annotate(_episode(), _overlay())
    corners = frames[:, 0, 0]
    assert (corners[:4] == video.RED).all()
    assert (corners[4:] == video.GREEN).all()
    band_before, band_after = frames[3, : -64 - video.BORDER], frames[4, : -64 - video.BORDER]
    assert (band_before != band_after).any()


def test_picture_is_kept_pixel_for_pixel_when_annotated():
    frames = video.annotate(_episode(), _overlay())
    edge = video.BORDER
    np.testing.assert_array_equal(frames[:, -64 - edge : -edge, edge:-edge], _episode())


def test_band_grows_when_the_instruction_is_long():
    short = video.annotate(video.upscale(_episode()), _overlay())
    long = video.annotate(video.upscale(_episode()), _overlay(instruction="put the block " * 8))
    assert long.shape[1] > short.shape[1]


@pytest.mark.parametrize(("size", "expected"), [(64, 256), (100, 300), (256, 256), (300, 300)])
def test_upscale_repeats_pixels_when_frames_are_small(size, expected):
    frames = _episode(length=1, height=size, width=size)
    large = video.upscale(frames)
    assert large.shape == (1, expected, expected, 3)
    factor = expected // size
    np.testing.assert_array_equal(large[:, ::factor, ::factor], frames)


def test_tile_holds_the_last_frame_when_an_episode_ends_early():
    episodes = [_episode(6), _episode(3), _episode(6)]
    grid = video.tile(episodes)
    assert grid.shape == (6, 128, 128, 3)
    np.testing.assert_array_equal(grid[5, :64, 64:], episodes[1][2])
    np.testing.assert_array_equal(grid[5, 64:, :64], episodes[2][5])
    assert not grid[:, 64:, 64:].any()
    with pytest.raises(ValueError, match="one frame size"):
        video.tile([_episode(), _episode(height=32)])


def test_filmstrip_shows_first_and_last_frame_when_frames_are_skipped():
    strip = np.asarray(video.filmstrip(_episode(), count=3, gap=2))
    assert strip.shape == (64, 3 * 64 + 2 * 2, 3)
    np.testing.assert_array_equal(strip[:, :64], _episode()[0])
    np.testing.assert_array_equal(strip[:, -64:], _episode()[-1])


def test_gif_moves_when_encoded():
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(video.encode_gif(_episode(), fps=8))) as image:
        assert image.n_frames == 6
        assert image.info["duration"] in (120, 125, 130)  # GIF counts in hundredths of a second


def test_strip_is_made_smaller_only_when_frames_are_larger(tmp_path):
    for size, height in ((64, 64), (256, video.STRIP_HEIGHT)):
        video.write_strip(tmp_path / "strip.png", _episode(height=size, width=size))
        with Image.open(tmp_path / "strip.png") as strip:
            assert strip.height == height
            assert strip.width == pytest.approx(6 * height, rel=0.05)
