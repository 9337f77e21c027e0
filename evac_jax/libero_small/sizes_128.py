"""The small LIBERO's sizes for frames of 128 x 128 pixels, where there is a GPU.

Widths are those of `sizes`; there are four times as many latents, and of the policy's patches.
"""

import dataclasses

from evac_jax.libero_small import sizes

PIXELS = 128

WORLD_MODEL = sizes.WORLD_MODEL.replace(
    image_size=(PIXELS, PIXELS),
    image_tower=sizes.WORLD_MODEL.image_tower.replace(image_size=PIXELS, patch_size=16),
    maps=sizes.WORLD_MODEL.maps.replace(radius=6, thickness=2),  # as large a part of the picture
)

POLICY = dataclasses.replace(sizes.POLICY, image_size=PIXELS)
