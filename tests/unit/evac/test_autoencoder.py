import pytest
import torch
from torch import nn

from evac_jax.evac.autoencoder import Autoencoder, diffusers_to_ldm, ldm_to_diffusers
from evac_jax.evac.config import (
    AutoencoderConfig,
)

SMALL_VAE = AutoencoderConfig(channels=8, channel_mult=(1, 1, 2), num_res_blocks=1, norm_groups=4)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(SMALL_VAE).eval()


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
