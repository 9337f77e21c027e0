import pytest
import torch

from evac_jax.evac.config import (
    ImageTowerConfig,
)
from evac_jax.evac.image_tower import ImageTower, gaussian_kernel, resize_antialiased


@pytest.fixture(scope="module")
def tower() -> ImageTower:
    torch.manual_seed(0)
    config = ImageTowerConfig(
        width=16, layers=2, head_width=8, patch_size=4, image_size=8, embed_dim=6
    )
    return ImageTower(config).eval()


def test_tower_gives_class_token_and_patches_when_sizes_are_small(tower):
    assert tower(torch.zeros(2, 3, 20, 12)).shape == (2, 1 + 4, 16)
    assert all(key.startswith("model.visual.") for key in tower.state_dict())


@torch.no_grad()
def test_tower_is_the_same_when_blocks_are_sequence_first(tower):
    pixels = torch.randn(3, 3, 8, 8)
    expected = tower.tokens(pixels)
    blocks = tower.model["visual"].transformer.resblocks
    try:
        for block in blocks:
            block.attn.batch_first = False
        torch.testing.assert_close(tower.tokens(pixels), expected, atol=1e-5, rtol=1e-5)
    finally:
        for block in blocks:
            block.attn.batch_first = True


def test_tower_is_open_clips_own_when_its_head_is_added(tower):
    visual, frames = tower.model["visual"], torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        ours = visual.ln_post(tower(frames)[:, 0]) @ visual.proj
        torch.testing.assert_close(ours, visual(tower.preprocess(frames)), atol=1e-5, rtol=1e-5)


def test_resize_keeps_frames_when_size_is_the_same():
    frames = torch.rand(1, 3, 9, 11)
    torch.testing.assert_close(resize_antialiased(frames, (9, 11)), frames)


def test_resize_keeps_a_flat_frame_when_one_axis_shrinks():
    flat = torch.full((1, 3, 40, 8), 0.25)
    torch.testing.assert_close(resize_antialiased(flat, (10, 16)), torch.full((1, 3, 10, 16), 0.25))


def test_blur_kernel_is_odd_and_normalised_when_sigma_grows():
    like = torch.zeros(1)
    assert len(gaussian_kernel(0.0714, like)) == 3
    assert len(gaussian_kernel(1.5, like)) == 7
    assert float(gaussian_kernel(1.5, like).sum()) == pytest.approx(1.0)
