import io

import numpy as np
import pytest
from PIL import Image

from policies.openvla_oft import preprocess
from tests.parity import jpeg
from tests.unit.policies.tiny import CONFIG


def _image(height=40, width=52):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [24, 64])
def test_fixed_point_resize_equals_pillow_when_shrinking_and_growing(size):
    image = _image()
    pillow = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(preprocess.resize_fixed_point(image, size), pillow)


def test_float_resize_equals_torch_when_antialiased():
    torch = pytest.importorskip("torch")
    image = _image()
    channels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(channels, (24, 24), mode="bicubic", antialias=True)
    resized = resized.clamp(0, 255).round()[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(
        np.asarray(preprocess.resize(image, 24)).astype(int), resized, atol=1
    )


def test_resize_does_nothing_when_the_size_fits():
    image = _image(24, 24)
    assert preprocess.resize(image, 24) is image


def test_crop_keeps_the_middle_when_edges_differ():
    image = np.zeros((100, 100, 3), np.uint8)
    image[2:-2, 2:-2] = 200  # 0.9 of the area leaves out 2.6 pixels on each side
    assert (np.asarray(preprocess.center_crop(image, 50)) == 200).all()


def test_channels_are_normalised_per_tower_when_stacked():
    images = np.full((1, 2, 16, 16, 3), 51, np.uint8)
    pixels = np.asarray(preprocess.pixel_values(images, CONFIG))
    assert pixels.shape == (1, 2, 16, 16, 6)
    np.testing.assert_allclose(pixels, (0.2 - 0.5) / 0.5, rtol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (40, 52)])
def test_jpeg_stays_within_the_transforms_difference_of_pillow_when_repeated(size):
    smooth = np.asarray(Image.fromarray(_image(9, 9)).resize(size[::-1], Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=jpeg.QUALITY, subsampling="4:2:0")
    pillow = np.asarray(Image.open(buffer)).astype(int)
    # The fast transform that TensorFlow decodes with is coarser than Pillow's.
    error = np.abs(jpeg.round_trip(smooth) - pillow)
    assert error.mean() < 3
    assert error.max() <= 20
