"""All sizes of the miniature's networks.

The classes are those of the full-size system; only the numbers here differ.
"""

from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    ImageTowerConfig,
    MapConfig,
    ResamplerConfig,
    UNetConfig,
)
from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig

CONTEXT = 64

WORLD_MODEL = EvacConfig(
    image_size=(64, 64),
    chunk=8,
    n_previous=4,
    # One step moves at most 3 cm and 0.1 rad: these make a typical delta about 1.
    delta_mean=(0.0,) * 12,
    delta_std=(0.01, 0.01, 0.01, 0.03, 0.03, 0.03) * 2,
    delta_std_factor=1.0,
    gripper_scale=1.0,
    domain_id=0,
    consistent_scale=True,
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        # Attention at both resolutions: it copies a carried block from the history frames, and a
        # grid of 4 x 4 cells is too coarse for that.
        attention_resolutions=(1, 2),
        num_head_channels=16,
        init_heads=2,
        context_dim=CONTEXT,
        action_tokens=8,
        num_domains=1,
        norm_groups=8,  # 32 groups of one channel each would erase the time embedding
    ),
    autoencoder=AutoencoderConfig(
        channels=16, channel_mult=(1, 1, 2, 4), num_res_blocks=1, norm_groups=8
    ),
    action_resampler=ResamplerConfig(
        dim=64,
        depth=2,
        dim_head=16,
        heads=4,
        num_queries=8,
        ff_mult=2,
        embedding_dim=14,
        output_dim=CONTEXT,
    ),
    image_resampler=ResamplerConfig(
        dim=64,
        depth=1,
        dim_head=16,
        heads=4,
        num_queries=2,
        ff_mult=2,
        embedding_dim=64,
        output_dim=CONTEXT,
    ),
    image_tower=ImageTowerConfig(
        width=64, layers=2, head_width=16, patch_size=8, image_size=64, embed_dim=32
    ),
    # A 64-pixel picture: a disc of 4 pixels instead of 50, thin axes, one arm, tip = pose.
    maps=MapConfig(
        renderer="upstream",
        radius=3,
        thickness=1,
        axis_length=0.05,
        tool_offset=0.0,
        gripper_range=(0.0, 1.0),
        arms=1,
    ),
)

POLICY = OpenVLAOFTConfig(
    dinov2=VisionTowerConfig(
        width=128,
        depth=3,
        heads=4,
        mlp_width=256,
        class_token=True,
        register_tokens=1,
        layer_scale=True,
    ),
    siglip=VisionTowerConfig(width=128, depth=3, heads=4, mlp_width=256, attention_pool=True),
    image_size=64,
    patch_size=16,
    hidden_size=96,
    intermediate_size=256,
    num_layers=4,
    # Action slots differ only in their positions. For 100 tokens this base distinguishes them
    # better than 10000, which is meant for thousands of tokens.
    rope_theta=100.0,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=704,
    pad_token_id=640,
    max_prompt_length=28,
    scan_layers=False,  # with four layers, unrolling compiles almost as fast and runs faster
)
