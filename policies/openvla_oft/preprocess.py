"""Prepares camera frames for the two towers, in JAX: resize, optional crop, normalise.

A resize is separable and linear along each axis. It is computed as two matrix products, with
weights that are made once on the host.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig

CROP_AREA = 0.9
# Pillow keeps 32 - 8 - 2 fractional bits in its 8-bit resampling.
FIXED_POINT_BITS = 22


def keys_cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -0.5; support 2."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def lanczos3(x: np.ndarray) -> np.ndarray:
    """Lanczos kernel with three lobes; support 3."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


KERNELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bicubic": (keys_cubic, 2.0),
    "lanczos3": (lanczos3, 3.0),
}


@functools.lru_cache(maxsize=64)
def resize_weights(
    size_in: int, size_out: int, kernel: str = "bicubic", dtype: type = np.float32
) -> np.ndarray:
    """Return the antialiased resize along one axis as a matrix; `dtype` [out in].

    With s = in/out and c = s (i + 0.5), pixel k has weight K((k - c + 0.5) / max(s, 1)), normalised
    to sum 1 over the taps within the support. All is computed in `dtype`: a pixel whose value lies
    exactly between two integers is rounded as in torch only if the weights are rounded as there.

    Source: torch `_upsample_bicubic2d_aa` (float32) and Pillow `precompute_coeffs` (float64).
    """
    function, support = KERNELS[kernel]
    half, scale = dtype(0.5), dtype(size_in) / dtype(size_out)
    stretch = max(scale, dtype(1))
    centres = scale * (np.arange(size_out, dtype=dtype) + half)[:, None]
    taps = np.arange(size_in, dtype=dtype)[None, :]
    first = np.trunc(np.maximum(centres - dtype(support) * stretch + half, dtype(0)))
    end = np.trunc(np.minimum(centres + dtype(support) * stretch + half, dtype(size_in)))
    places = (taps - centres + half) * (dtype(1) / stretch)
    weights = np.where((taps >= first) & (taps < end), function(places), dtype(0)).astype(dtype)
    return weights / weights.sum(axis=1, keepdims=True, dtype=dtype)


@functools.lru_cache(maxsize=64)
def crop_weights(size_in: int, size_out: int, area: float = CROP_AREA) -> np.ndarray:
    """Return centre crop and bilinear resize along one axis as a matrix; float32 [out in].

    Source: TensorFlow `crop_and_resize` as moojink/openvla-oft's evaluation calls it.
    """
    ratio = np.sqrt(np.float32(area), dtype=np.float32)
    offset = (np.float32(1) - ratio) / np.float32(2)
    extent = np.float32(size_in - 1)
    step = (offset + ratio - offset) * extent / np.float32(max(size_out - 1, 1))
    places = offset * extent + np.arange(size_out, dtype=np.float32) * step
    low = np.floor(places).astype(np.int64)
    fraction = (places - low).astype(np.float32)
    weights = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(weights, (rows, low), 1 - fraction)
    np.add.at(weights, (rows, np.minimum(low + 1, size_in - 1)), fraction)
    return weights


def _along_axes(images: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Apply a matrix to the columns, then one to the rows, of [.. H W C]."""
    exact = jax.lax.Precision.HIGHEST
    images = jnp.einsum("...hwc,ow->...hoc", images, columns, precision=exact)
    return jnp.einsum("...hwc,oh->...owc", images, rows, precision=exact)


def resize(
    images: UInt8[Array, "*batch H W C"], size: int, kernel: str = "bicubic"
) -> UInt8[Array, "*batch size size C"]:
    """Resize with antialiasing in float32; clamp and round half to even once, at the end.

    Frames that already have this size are returned unchanged.
    """
    height, width = images.shape[-3:-1]
    if (height, width) == (size, size):
        return images
    rows, columns = (resize_weights(m, size, kernel) for m in (height, width))
    resized = _along_axes(images.astype(jnp.float32), rows, columns)
    return jnp.round(jnp.clip(resized, 0, 255)).astype(jnp.uint8)


def resize_fixed_point(
    images: UInt8[Array, "*batch H W C"], size: int
) -> UInt8[Array, "*batch size size C"]:
    """Resize as Pillow does: 22-bit weights, integer sums, clipped to 8 bits after each axis.

    Source: Pillow `Resample.c` (ImagingResampleHorizontal_8bpc and its vertical twin).
    """
    for axis, letters in ((-2, "...hwc,ow->...hoc"), (-3, "...hwc,oh->...owc")):
        length = images.shape[axis]
        if length == size:
            continue
        weights = resize_weights(length, size, dtype=np.float64) * (1 << FIXED_POINT_BITS)
        weights = np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
        sums = jnp.einsum(letters, images.astype(jnp.int32), weights)
        sums = (sums + (1 << (FIXED_POINT_BITS - 1))) >> FIXED_POINT_BITS
        images = jnp.clip(sums, 0, 255).astype(jnp.uint8)
    return images


def center_crop(
    images: UInt8[Array, "*batch H W C"], size: int
) -> UInt8[Array, "*batch size size C"]:
    """Crop the centred 0.9 of the area and resize it to `size`, in one bilinear sampling.

    Source: moojink/openvla-oft, `center_crop_image` of its LIBERO evaluation.
    """
    rows, columns = (crop_weights(m, size) for m in images.shape[-3:-1])
    scaled = images.astype(jnp.float32) * np.float32(1 / 255)
    cropped = jnp.clip(_along_axes(scaled, rows, columns), 0, 1)
    return jnp.minimum(jnp.floor(cropped * 255.5), 255).astype(jnp.uint8)


def normalize(
    images: UInt8[Array, "*batch H W 3"], tower: VisionTowerConfig
) -> Float[Array, "*batch H W 3"]:
    """Return (pixel / 255 - mean) / std in float32."""
    mean, std = (np.asarray(x, np.float32) for x in (tower.mean, tower.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def pixel_values(
    images: UInt8[Array, "B V H W 3"], config: OpenVLAOFTConfig
) -> Float[Array, "B V size size 6"]:
    """Return the input of the towers: three channels for DINOv2, then three for SigLIP; float32.

    Source: RLinf's multi-image processor; with `resize_rule="fixed_point"` and `center_crop` that
    of moojink/openvla-oft. Difference: channels are last, and views have their own axis.
    """
    size = config.image_size
    if config.center_crop:
        images = center_crop(images, size)
    elif config.resize_rule == "fixed_point":
        images = resize_fixed_point(images, size)
    else:
        images = resize(images, size)
    return jnp.concatenate(
        [normalize(images, config.dinov2), normalize(images, config.siglip)], axis=-1
    )
