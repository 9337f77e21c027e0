"""What a JPEG encode and decode does to an image, without the entropy coding, which loses nothing.

The public LIBERO checkpoints saw frames that TensorFlow had encoded (quality 95, chroma halved) and
decoded with libjpeg's fast integer transform. Pillow decodes with the accurate one: up to ten
levels apart. So the integer arithmetic of both transforms is spelt out here, on the host.

Source: libjpeg-turbo jccolor.c, jcsample.c, jfdctint.c, jcdctmgr.c, jidctfst.c, jdsample.c,
jdcolor.c; the quantisation tables are Annex K of the JPEG standard.
"""

import numpy as np
from jaxtyping import UInt8

QUALITY = 95
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# Scales of the fast transform (Arai, Agui, Nakajima), products in 14-bit fixed point.
AAN = (1.0, 1.387039845, 1.306562965, 1.175875602, 1.0, 0.785694958, 0.541196100, 0.275899379)
AAN_FIXED = np.floor(np.outer(AAN, AAN) * (1 << 14) + 0.5).astype(np.int64)


def round_trip(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image after JPEG encoding and decoding as TensorFlow does both."""
    height, width = image.shape[:2]
    # Blocks of 16 x 16 pixels: edges are repeated, as the encoder does.
    pads = ((0, -height % 16), (0, -width % 16), (0, 0))
    luma, *chroma = _to_ycc(np.pad(image, pads, mode="edge").astype(np.int64))
    luma = _plane(luma, LUMINANCE)[:height, :width]
    blue, red = (
        _upsample(_plane(_downsample(c), CHROMINANCE)[: -(-height // 2), : -(-width // 2)])[
            :height, :width
        ]
        for c in chroma
    )
    return _to_rgb(luma, blue - 128, red - 128)


def _fix(value: float) -> int:
    """16-bit fixed point."""
    return int(value * (1 << 16) + 0.5)


def _to_ycc(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r, g, b = np.moveaxis(rgb, -1, 0)
    half, centre = 1 << 15, (128 << 16) + (1 << 15) - 1
    luma = (_fix(0.299) * r + _fix(0.587) * g + _fix(0.114) * b + half) >> 16
    blue = (-_fix(0.168735892) * r - _fix(0.331264108) * g + _fix(0.5) * b + centre) >> 16
    red = (_fix(0.5) * r - _fix(0.418687589) * g - _fix(0.081312411) * b + centre) >> 16
    return luma, blue, red


def _to_rgb(luma: np.ndarray, blue: np.ndarray, red: np.ndarray) -> np.ndarray:
    half = 1 << 15
    r = luma + ((_fix(1.402) * red + half) >> 16)
    g = luma + ((-_fix(0.34414) * blue - _fix(0.71414) * red + half) >> 16)
    b = luma + ((_fix(1.772) * blue + half) >> 16)
    return np.clip(np.stack([r, g, b], -1), 0, 255).astype(np.uint8)


def _downsample(plane: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels; the rounding alternates from column to column."""
    sums = plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).sum((1, 3))
    return (sums + 1 + np.arange(sums.shape[1]) % 2) >> 2


def _upsample(plane: np.ndarray) -> np.ndarray:
    """Triangle filter: 3/4 of the nearer sample, 1/4 of the farther, in both directions."""
    above = np.concatenate([plane[:1], plane[:-1]])
    below = np.concatenate([plane[1:], plane[-1:]])
    rows = np.stack([3 * plane + above, 3 * plane + below], 1).reshape(-1, plane.shape[1])
    left = np.concatenate([rows[:, :1], rows[:, :-1]], 1)
    right = np.concatenate([rows[:, 1:], rows[:, -1:]], 1)
    columns = np.stack([(3 * rows + left + 8) >> 4, (3 * rows + right + 7) >> 4], -1)
    return columns.reshape(rows.shape[0], -1)


def _plane(plane: np.ndarray, table: tuple) -> np.ndarray:
    """Transform, quantise and restore one channel, blocks of 8 x 8."""
    scaled = (np.array(table) * (200 - 2 * QUALITY) + 50) // 100
    steps = np.clip(scaled, 1, 255)[:, :, None, None]
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(1, 3, 0, 2) - 128
    rows = _forward(blocks.swapaxes(0, 1), first=True).swapaxes(0, 1)
    coefficients = _forward(rows, first=False)  # 8 times too large
    divisors = 8 * steps
    quantised = np.sign(coefficients) * ((np.abs(coefficients) + divisors // 2) // divisors)
    multipliers = (steps * AAN_FIXED[:, :, None, None] + (1 << 11)) >> 12
    columns = _inverse_fast(quantised * multipliers)
    restored = _inverse_fast(columns.swapaxes(0, 1)).swapaxes(0, 1)
    restored = np.clip((restored >> 5) + 128, 0, 255)
    return restored.transpose(2, 0, 3, 1).reshape(height, width)


def _forward(x: np.ndarray, *, first: bool) -> np.ndarray:
    """Accurate forward transform along axis 0; constants in 13-bit fixed point.

    Source: Loeffler, Ligtenberg, Moschytz 1989, as in jfdctint.c. The first pass keeps two more
    fractional bits, the second removes them.
    """
    shift = 11 if first else 15

    def scaled(value: np.ndarray, bits: int = shift) -> np.ndarray:
        return (value + (1 << (bits - 1))) >> bits

    s0, s1, s2, s3 = (x[i] + x[7 - i] for i in range(4))
    d7, d6, d5, d4 = (x[i] - x[7 - i] for i in range(4))
    e0, e3, e1, e2 = s0 + s3, s0 - s3, s1 + s2, s1 - s2
    dc, mid = e0 + e1, e0 - e1
    dc, mid = (dc << 2, mid << 2) if first else (scaled(dc, 2), scaled(mid, 2))
    shared = (e2 + e3) * 4433
    z1, z2, z3, z4 = d4 + d7, d5 + d6, d4 + d6, d5 + d7
    z5 = (z3 + z4) * 9633
    z1, z2, z3, z4 = -7373 * z1, -20995 * z2, z5 - 16069 * z3, z5 - 3196 * z4
    return np.stack(
        [
            dc,
            scaled(12299 * d7 + z1 + z4),
            scaled(shared + 6270 * e3),
            scaled(25172 * d6 + z2 + z3),
            mid,
            scaled(16819 * d5 + z2 + z4),
            scaled(shared - 15137 * e2),
            scaled(2446 * d4 + z1 + z3),
        ]
    )


def _inverse_fast(x: np.ndarray) -> np.ndarray:
    """Fast inverse transform along axis 0; constants in 8-bit fixed point, products truncated."""

    def times(value: np.ndarray, constant: int) -> np.ndarray:
        return (value * constant) >> 8

    a, b, c = x[0] + x[4], x[0] - x[4], x[2] + x[6]
    d = times(x[2] - x[6], 362) - c
    even = (a + c, b + d, b - d, a - c)
    z13, z10, z11, z12 = x[5] + x[3], x[5] - x[3], x[1] + x[7], x[1] - x[7]
    z5 = times(z10 + z12, 473)
    o7 = z11 + z13
    o6 = times(z10, -669) + z5 - o7
    o5 = times(z11 - z13, 362) - o6
    o4 = times(z12, 277) - z5 + o5
    return np.stack(
        [
            even[0] + o7,
            even[1] + o6,
            even[2] + o5,
            even[3] - o4,
            even[3] + o4,
            even[2] - o5,
            even[1] - o6,
            even[0] - o7,
        ]
    )
