"""3x3 convolutions on a CPU with a quarter of the multiplications.

The method is Winograd's F(4x4, 3x3). Small constant matrices transform the 6 x 6 inputs of a tile,
and the kernel, to 36 numbers each. These are multiplied, and the products are transformed back to
4 x 4 outputs. Over all channels and tiles this is 36 matrix products.

`packed.PackedConv2d` uses it from 64 input channels, 96 output channels and 8 tiles on
(`WinogradConv2d.pays`): in the wide levels of large models (`benchmarks.world_model`, the full-size
model on a CPU). The miniature has at most 64 output channels.

Sources: Lavin and Gray, arXiv:1509.09308, for the algorithm; Alam et al., arXiv:2201.10369, for
points of the form 0, +-c, +-1/c. Their small rounding errors make it accurate enough for float32.
At c = 2/3 the error is 1.0e-6 of the norm of the result (128 channels). oneDNN's direct convolution
of channels-last maps has 5.9e-7; the usual points 0, +-1, +-2 have 2.4e-6.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

TILE, TAPS = 4, 3
INPUTS = TILE + TAPS - 1
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)  # and infinity
# Number of values in the transformed tiles of a band; 4 MB, so that they stay in a core's cache.
BAND_VALUES = 2**20


@functools.lru_cache(maxsize=1)
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Float64 matrices A [4, 6], G [6, 3], B [6, 6] of one axis: y = A ((G g) * (B d)).

    A polynomial of degree n - 1 is determined by its values at n points. A correlation is the
    transpose of the product of two polynomials.
    """

    def values(coefficients: int) -> Tensor:
        points = torch.tensor(POINTS, dtype=torch.float64)
        finite = points[:, None] ** torch.arange(coefficients)
        return torch.cat((finite, torch.eye(coefficients, dtype=torch.float64)[-1:]))

    of_inputs = torch.linalg.inv(values(INPUTS)).T
    # A scale can be moved from one factor to the other; this choice keeps the scale of the inputs.
    scale = of_inputs.abs().sum(1, keepdim=True)
    return values(TILE).T, values(TAPS) * scale, of_inputs / scale


class WinogradConv2d(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1 of maps whose sides are multiples of 4.

    Its transformed weight is four times as large as the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        outputs, kernels, inputs = transforms()
        self.to_tiles = torch.kron(inputs, inputs).to(weight)  # [36 36]
        self.from_tiles = torch.kron(outputs, outputs).to(weight)  # [16 36]
        products = torch.einsum("ya,xb,oiab->yxio", kernels, kernels, weight.double())
        self.weight = products.flatten(0, 1).to(weight, memory_format=torch.contiguous_format)
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias

    @staticmethod
    def pays(channels: int, out_channels: int, x_shape: torch.Size) -> bool:
        """Whether this is faster than oneDNN's direct convolution, as measured on one core."""
        count, height, width = x_shape[0], *x_shape[2:]
        fits = height % TILE == 0 and width % TILE == 0
        tiles = count * height * width // TILE**2
        return fits and channels >= 64 and out_channels >= 96 and tiles >= 8

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H, W], the latter in the channels-last memory format."""
        count, channels, height, width = x.shape
        out_channels = self.weight.shape[-1]
        across, down = width // TILE, height // TILE
        padded = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(1, INPUTS, TILE).unfold(2, INPUTS, TILE)  # [N down across C y x]
        windows = windows.permute(4, 5, 1, 0, 2, 3)  # [y x down N across C]
        image = x.new_empty(count, height, width, out_channels)
        tiles = image.view(count, down, TILE, across, TILE, out_channels)
        tiles = tiles.permute(2, 4, 1, 0, 3, 5)  # [y x down N across C]
        rows = BAND_VALUES // (INPUTS**2 * count * across * max(channels, out_channels))
        for first in range(0, down, max(rows, 1)):
            band = slice(first, first + max(rows, 1))
            inputs = torch.mm(self.to_tiles, windows[:, :, band].reshape(INPUTS**2, -1))
            products = torch.bmm(inputs.view(INPUTS**2, -1, channels), self.weight)
            outputs = torch.mm(self.from_tiles, products.flatten(1))
            target = tiles[:, :, band]
            torch.add(outputs.view(target.shape), self.bias, out=target)
        return image.permute(0, 3, 1, 2)
