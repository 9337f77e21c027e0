"""The smallest OpenVLA-OFT with every part, and observations for it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from policies.openvla_oft.action_tokens import ActionStatistics
from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig
from policies.openvla_oft.model import OpenVLAOFT
from policies.types import ObsBatch

TASKS = ["push the red block left", "open the drawer"]
NORM_STATS = {
    "tiny": {"action": {"q01": [-2.0, 0.0, 0.0], "q99": [2.0, 1.0, 1.0], "mask": [1, 1, 0]}}
}
CONFIG = OpenVLAOFTConfig(
    dinov2=VisionTowerConfig(
        width=16,
        depth=3,
        heads=2,
        mlp_width=24,
        class_token=True,
        register_tokens=2,
        layer_scale=True,
    ),
    siglip=VisionTowerConfig(width=12, depth=3, heads=2, mlp_width=20, attention_pool=True),
    image_size=16,
    patch_size=8,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=640,
    vocab_padding=64,
    pad_token_id=576,
    action_dim=3,
    chunk=2,
    num_images=2,
    max_prompt_length=24,
    value_type="action_level",
)
STATISTICS = ActionStatistics.from_norm_stats(NORM_STATS, "tiny")


def make_model(**changes) -> OpenVLAOFT:
    """The same weights whatever the switches."""
    return OpenVLAOFT(dataclasses.replace(CONFIG, **changes), STATISTICS, rngs=nnx.Rngs(0))


def make_obs(padding: int = 3, words: int = 8, batch: int = 2) -> ObsBatch:
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 300, (batch, words))
    tokens = np.full((batch, 1 + padding + words), CONFIG.pad_token_id)
    mask = np.ones(tokens.shape, bool)
    tokens[:, 0], tokens[:, 1 + padding :] = 1, prompt
    mask[:, 1 : 1 + padding] = False
    images = rng.integers(0, 256, (batch, CONFIG.num_images, 20, 20, 3)).astype(np.uint8)
    return ObsBatch(
        images=jnp.asarray(images),
        prompt_tokens=jnp.asarray(tokens, jnp.int32),
        prompt_mask=jnp.asarray(mask),
    )
