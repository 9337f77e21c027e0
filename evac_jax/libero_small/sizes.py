"""All sizes of the small LIBERO's networks: the miniature's, but for what pictures of LIBERO need.

Frames are 64 x 64 and show the table (docs/libero_small.md). A bowl is 8 pixels wide there, and
3 cm, which decide success, are 2.5 pixels.
"""

import dataclasses

from evac_jax.evac.config import AutoencoderConfig
from evac_jax.miniature import sizes as miniature

LATENT_CHANNELS = 16  # with 4, a bowl in the gripper or on the plate is blurred
PROMPT_TOKENS = 32  # the longest instruction that is played has 29

WORLD_MODEL = miniature.WORLD_MODEL.replace(
    # Without a scale, two denoising steps, or one, begin and end with latents as they are.
    base_scale=1.0,
    # A decision moves the hand by at most 3 cm at 10 Hz, and the wrist turns slowly.
    # `world_model.train --fit_deltas` replaces these by the statistics of the recordings.
    delta_mean=(0.0,) * 12,
    delta_std=(0.01, 0.01, 0.01, 0.03, 0.03, 0.03) * 2,
    autoencoder=AutoencoderConfig(
        channels=16,
        channel_mult=(1, 1, 2, 4),
        num_res_blocks=1,
        norm_groups=8,
        latent_channels=LATENT_CHANNELS,
    ),
    unet=miniature.WORLD_MODEL.unet.replace(
        # Noisy latent, image condition and trajectory latent; mask; rays.
        in_channels=3 * LATENT_CHANNELS + 1 + 6,
        out_channels=LATENT_CHANNELS,
    ),
)

# A larger vocabulary holds the words of the instructions, so their prompts are shorter.
POLICY = dataclasses.replace(
    miniature.POLICY, vocab_size=1024, pad_token_id=960, max_prompt_length=PROMPT_TOKENS
)
