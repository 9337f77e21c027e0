import subprocess
import sys

import pytest
import torch
from torch import nn

from evac_jax.errors import ConfigError
from evac_jax.evac.autoencoder import Autoencoder, diffusers_to_ldm, ldm_to_diffusers
from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    ImageTowerConfig,
    ResamplerConfig,
    UNetConfig,
)
from evac_jax.evac.image_tower import ImageTower, gaussian_kernel, resize_antialiased
from evac_jax.evac.lean_imports import ensure_torchvision
from evac_jax.evac.resampler import Resampler
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardNet

SMALL_VAE = AutoencoderConfig(channels=8, channel_mult=(1, 1, 2), num_res_blocks=1, norm_groups=4)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(SMALL_VAE).eval()


def test_config_comes_back_when_sent_through_json():
    config = EvacConfig(chunk=5, unet=UNetConfig(model_channels=64, attention_resolutions=(1,)))
    assert EvacConfig.from_dict(config.to_dict()) == config


def test_config_is_refused_when_a_key_is_unknown():
    with pytest.raises(ConfigError, match="chunks"):
        EvacConfig.from_dict({"chunks": 8})


def test_config_names_every_problem_when_parts_do_not_fit():
    with pytest.raises(ConfigError) as error:
        EvacConfig(image_size=(250, 256), unet=UNetConfig(context_dim=7, action_tokens=3))
    for word in ("image_size", "context_dim", "action_tokens"):
        assert word in str(error.value)


def test_autoencoder_keys_are_public_ones_when_saved(autoencoder):
    keys = autoencoder.state_dict()
    assert "encoder.down.0.downsample.conv.weight" in keys
    assert "decoder.up.2.upsample.conv.weight" in keys
    assert "decoder.up.0.block.1.norm1.weight" in keys
    assert keys["encoder.mid.attn_1.q.weight"].dim() == 4
    assert not any("blocks" in key or key.startswith("kl.") for key in keys)


def test_autoencoder_names_map_back_when_mapped_there(autoencoder):
    levels = len(SMALL_VAE.channel_mult)
    theirs = autoencoder.kl.state_dict()
    back = ldm_to_diffusers(diffusers_to_ldm(theirs, levels), levels)
    assert back.keys() == theirs.keys()
    assert all(back[key].shape == theirs[key].shape for key in theirs)


@pytest.mark.parametrize("naming", ["public", "diffusers"])
def test_autoencoder_loads_strictly_when_named_either_way(autoencoder, naming):
    state = (autoencoder if naming == "public" else autoencoder.kl).state_dict()
    other = Autoencoder(SMALL_VAE).eval()
    other.load_state_dict(state)
    frames = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(other.encode(frames)[0], autoencoder.encode(frames)[0])


def test_autoencoder_loads_inside_a_parent_when_prefixed(autoencoder):
    parent, target = nn.ModuleDict({"a": autoencoder}), nn.ModuleDict({"a": Autoencoder(SMALL_VAE)})
    target.load_state_dict(parent.state_dict())
    incomplete = parent.state_dict()
    del incomplete["a.encoder.conv_in.weight"]
    with pytest.raises(RuntimeError, match="kl.encoder.conv_in.weight"):
        target.load_state_dict(incomplete)


def test_autoencoder_results_are_the_same_when_cut_in_parts(autoencoder):
    parts = Autoencoder(SMALL_VAE.replace(max_batch=2)).eval()
    parts.load_state_dict(autoencoder.state_dict())
    frames = torch.rand(5, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        latents = parts.encode_mean_scaled(frames)
        assert latents.shape == (5, 4, 4, 6)
        torch.testing.assert_close(
            latents, autoencoder.encode_mean_scaled(frames), atol=1e-5, rtol=1e-5
        )
        decoded = parts.decode_scaled(latents)
        assert decoded.shape == frames.shape


def test_autoencoder_sample_is_the_mean_when_noise_is_zero(autoencoder):
    frames = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mean = autoencoder.encode_mean_scaled(frames)
        quiet = autoencoder.encode_sample_scaled(frames, noise=torch.zeros_like(mean))
        seeded = [
            autoencoder.encode_sample_scaled(frames, generator=torch.Generator().manual_seed(3))
            for _ in range(2)
        ]
    torch.testing.assert_close(quiet, mean)
    torch.testing.assert_close(*seeded)
    assert not torch.allclose(seeded[0], mean)


def test_autoencoder_trains_when_run_forward(autoencoder):
    reconstruction, mean, logvar = autoencoder(torch.rand(1, 3, 16, 16))
    (reconstruction.square().mean() + mean.mean() + logvar.mean()).backward()
    assert all(p.grad is not None for p in autoencoder.parameters())
    autoencoder.zero_grad()


def test_resampler_ignores_order_when_actions_are_permuted():
    torch.manual_seed(0)
    config = ResamplerConfig(
        dim=8, depth=2, dim_head=4, heads=3, num_queries=2, embedding_dim=14, output_dim=6
    )
    resampler = Resampler(config)
    actions = torch.randn(3, 5, 14)
    tokens = resampler(actions)
    assert tokens.shape == (3, 2, 6)
    torch.testing.assert_close(resampler(actions.flip(1)), tokens, atol=1e-5, rtol=1e-5)
    assert resampler(actions[:, :1]).shape == tokens.shape
    assert Resampler(config, num_queries=7)(actions).shape == (3, 7, 6)


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


def test_reward_is_clamped_and_thresholded_when_frames_overshoot():
    torch.manual_seed(0)
    net, frames = RewardNet(RewardConfig(width=4)).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        probability = net.probability(3 * frames)
        torch.testing.assert_close(probability, net.probability((3 * frames).clamp(-1, 1)))
        between = float(probability.sort().values[:2].mean())
        assert net.predict(3 * frames, threshold=between).sum() == 2
        assert net.predict(3 * frames, threshold=1.0).sum() == 0


def test_reward_depends_on_the_instruction_when_there_are_several():
    torch.manual_seed(0)
    net = RewardNet(RewardConfig(width=4, num_instructions=2)).eval()
    for table in net.instruction:
        nn.init.normal_(table.weight)
    frames = torch.rand(1, 3, 32, 32).expand(2, -1, -1, -1)
    with torch.no_grad():
        first, second = net(frames, torch.tensor([0, 1]))
        assert not torch.isclose(first, second)
        torch.testing.assert_close(net(frames, torch.tensor([1, 1]))[0], second)
    with pytest.raises(ValueError, match="2 instructions"):
        net(frames)


def test_pose_model_standardises_the_pose_when_asked_for_the_next_one():
    torch.manual_seed(0)
    model = PoseModel(PoseModelConfig(hidden=8, linear_skip=True))
    action, pose = torch.randn(2, 5, 7), torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.get_ee_pose(action, pose), model(action, pose))
        model.abs_action_mean.fill_(2.0)
        model.abs_action_std.fill_(4.0)
        expected = model(action, (pose - 2) / 4) * 4 + 2
        torch.testing.assert_close(model.get_ee_pose(action, pose), expected)


def test_torchvision_imports_when_asked_for_twice():
    ensure_torchvision()
    ensure_torchvision()


@pytest.mark.parametrize("eager", [False, True])
def test_companions_are_left_out_only_when_nobody_imported_the_libraries_before(eager):
    code = "import sys; from evac_jax.evac import lean_imports; lean_imports.ensure_torchvision(); "
    code += "import diffusers, open_clip; " if eager else ""
    code += "import evac_jax.evac.model; print('timm' in sys.modules); import timm, scipy"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(eager)
