"""Layers that compute in float32 although their weights are of half precision."""

import copy

import pytest
import torch
from torch import nn

from evac_jax.evac.attention import GEGLU, PointwiseConv
from evac_jax.evac.cpu import packed
from evac_jax.evac.cpu.widened import is_slow, widen
from evac_jax.evac.model import EvacModel
from evac_jax.evac.unet import CausalConv
from tests.unit.evac.tiny import TINY, camera, poses, start_frames, tiny_model


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (nn.Linear(24, 40), [(3, 5, 24)]),
        (nn.Conv2d(16, 24, 3, padding=1, bias=False), [(2, 16, 7, 9)]),
        (PointwiseConv(24, 40), [(3, 5, 24)]),
        (GEGLU(24, 48), [(3, 5, 24)]),
        (CausalConv(16), [(2, 5, 1, 4, 4, 16)]),
        (nn.MultiheadAttention(16, 2, batch_first=True), [(2, 5, 16)] * 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@torch.no_grad()
def test_layer_gives_the_rounded_numbers_of_float32(layer, shapes):
    parent = nn.Sequential(layer.to(torch.bfloat16)).eval()
    reference, wide = copy.deepcopy(layer).float(), widen(parent)[0]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    expected, found = reference(*(x.float() for x in given)), wide(*given)
    for exact, rounded in zip(*map(_tensors, (expected, found)), strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0)
    assert {weight.dtype for weight in wide.parameters()} == {torch.bfloat16}


def _tensors(result):
    return result if isinstance(result, tuple) else (result,)


@torch.no_grad()
def test_model_imagines_the_frames_of_float32_up_to_rounding(monkeypatch):
    monkeypatch.setattr(packed, "is_slow", lambda weight: weight.dtype == torch.bfloat16)
    exact, frames = tiny_model(), {}
    half = packed.accelerate(copy.deepcopy(exact).bfloat16())
    for name, model in {"exact": exact, "half": half}.items():
        start = start_frames(2).to(next(model.parameters()).dtype)
        noise = torch.randn(2, 1, 4, TINY.chunk, *TINY.latent_size, generator=_seeded())
        state = model.start(start, 1)
        _, frames[name] = model.imagine(
            state, poses(2, TINY.frames), camera(), steps=2, eta=0.0, noise=noise
        )
    assert frames["half"].dtype == torch.bfloat16
    difference = (frames["half"].float() - frames["exact"]).abs().mean()
    assert 0 < difference < 0.15 * frames["exact"].abs().mean()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_only_types_that_the_processor_cannot_multiply_are_slow(monkeypatch):
    for answer in (True, False):
        names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
        for name in names:
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda answer=answer: answer)
        for dtype in (torch.bfloat16, torch.float16):
            assert is_slow(torch.zeros(1, dtype=dtype)) is not answer
        assert not is_slow(torch.zeros(1))
        assert not is_slow(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_every_large_product_of_the_model_is_in_a_widened_layer():
    model = widen(EvacModel(TINY).bfloat16())
    wide = {m for m in model.modules() if "forward" in vars(m)}
    inside = {part for layer in wide for part in layer.modules()}
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    assert matrices
    assert set(matrices) <= inside
