"""Winograd's convolution is the convolution, about as exact as a direct one, for every map."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evac_jax.evac.cpu import winograd
from evac_jax.evac.cpu.packed import PackedConv2d
from evac_jax.evac.cpu.winograd import WinogradConv2d


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


@given(
    count=st.integers(1, 3),
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    channels=st.integers(1, 9),
    out_channels=st.integers(1, 9),
    bias=st.booleans(),
    band=st.sampled_from([1, 2**10, 2**20]),
)
@settings(max_examples=40, deadline=None)
def test_float64_convolution_of_any_map_of_whole_tiles(
    count, down, across, channels, out_channels, bias, band
):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, 4 * down, 4 * across, generator=generator).double()
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator).double()
    shift = torch.randn(out_channels, generator=generator).double() if bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "BAND_VALUES", band)
        found = WinogradConv2d(weight, shift)(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, F.conv2d(x, weight, shift, padding=1))


def test_float32_result_is_exact_to_a_millionth_of_its_norm():
    generator = torch.Generator().manual_seed(0)
    x = F.silu(torch.randn(2, 128, 16, 16, generator=generator))
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, generator=generator) / (9 * 128) ** 0.5
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    # 1.0e-6 as measured; the usual points give 2.4e-6, and a direct kernel 2e-7 to 6e-7.
    assert error(WinogradConv2d(weight, None)(x), exact) < 1.6e-6


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((2, 128, 16, 16), WinogradConv2d),
        ((2, 128, 16, 18), None),  # not whole tiles
        ((1, 128, 8, 8), None),  # too few tiles for a weight four times as large
    ],
)
@torch.no_grad()
def test_packed_convolution_takes_it_where_it_pays(shape, form):
    layer = torch.nn.Conv2d(128, 128, 3, padding=1)
    packed = PackedConv2d(layer.weight, layer.bias, layer.padding, layer.stride)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    assert [type(f) for f in packed._forms.values()] == ([form] if form else [])
