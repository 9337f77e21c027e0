"""Packed layers compute what the layers they replace compute."""

import copy

import pytest
import torch
from torch import nn

from evac_jax.evac.attention import GEGLU, PointwiseConv
from evac_jax.evac.cpu.packed import PackedConv2d, accelerate, pack
from evac_jax.evac.model import EvacModel
from evac_jax.evac.unet import CausalConv, TemporalConvBlock
from evac_jax.miniature.sizes import WORLD_MODEL
from tests.unit.evac.tiny import camera, poses


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(24, 40), (3, 5, 24)),
        (nn.Linear(24, 40, bias=False), (6, 24)),
        (PointwiseConv(24, 40), (3, 5, 24)),
        (GEGLU(24, 48), (3, 5, 24)),
        (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 7, 9)),
        (nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 8, 8)),
        (nn.Conv2d(16, 24, 1, bias=False), (2, 16, 8, 8)),
        (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 2, 2)),
        (nn.Conv2d(16, 24, 3, padding=1, bias=False), (2, 16, 1, 2)),
        (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 1, 1)),
        (nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 2, 2)),
        (CausalConv(16), (2, 5, 1, 4, 4, 16)),
        (TemporalConvBlock(16, 4, 0.0), (2, 5, 1, 4, 4, 16)),
        (TemporalConvBlock(16, 4, 0.0), (2, 5, 3, 4, 4, 16)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@torch.no_grad()
def test_packed_layer_gives_the_numbers_of_the_layer(layer, shape):
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)  # a block's last layer is zero when it is made
    parent = nn.Sequential(layer).eval()
    packed = pack(copy.deepcopy(parent))
    assert type(packed[0]) is not type(layer)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    close(packed(x), parent(x))
    if len(shape) == 4:  # and in the other memory format
        close(packed(x.contiguous(memory_format=torch.channels_last)), parent(x))


@torch.no_grad()
def test_accelerated_model_decodes_and_denoises_as_before(weights):
    from evac_jax.evac.model_folders import load_model

    plain = load_model(weights / "world_model", kind="EvacModel")
    fast = accelerate(load_model(weights / "world_model", kind="EvacModel"))
    latents = torch.randn(2, 4, *plain.config.latent_size)
    close(fast.first_stage_model.decode(latents), plain.first_stage_model.decode(latents))
    frames = torch.randn(2, 3, *plain.config.image_size)
    close(
        fast.first_stage_model.encode_mean_scaled(frames),
        plain.first_stage_model.encode_mean_scaled(frames),
    )
    with pytest.raises(ValueError, match="expected float32 weights on a CPU"):
        pack(copy.deepcopy(plain).to(torch.bfloat16))


@torch.no_grad()
def test_miniature_reaches_neither_form_for_large_models():
    model = accelerate(EvacModel(WORLD_MODEL))
    state = model.start(torch.zeros(1, 1, 3, *WORLD_MODEL.image_size), 1)
    noise = torch.randn(1, 1, 4, WORLD_MODEL.chunk, *WORLD_MODEL.latent_size)
    model.imagine(state, poses(1, WORLD_MODEL.frames), camera(), steps=1, eta=0.0, noise=noise)
    forms = [m._forms for m in model.modules() if isinstance(m, PackedConv2d) and m._has_forms]
    assert forms
    assert not any(forms)


def test_model_of_another_type_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    model.unet = model.first_stage_model = model[0]
    assert type(accelerate(model)[0]) is nn.Linear
