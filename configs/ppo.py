"""PPO with a value head, in imagination.

    python launch.py --config=configs/ppo.py                  # the miniature, on two CPU cores
    python launch.py --config=configs/ppo.py:own --config.world=DIR   # a world of your own
    python launch.py --config=configs/ppo.py:libero_small     # LIBERO at 64 pixels, two CPU cores
    python launch.py --config=configs/ppo.py:libero_spatial   # published sizes, your own weights
    python launch.py --config=configs/ppo.py:lora             # the same with LoRA
    python launch.py --config=configs/ppo.py:one_gpu_80gb     # LoRA, one GPU

No PPO configuration for a world model was ever published; the full-size presets are a careful start
(chunk level throughout, value head warmed up first), not a reproduced run. docs/presets.md
describes each preset.
"""

from configs import libero, miniature
from evac_jax.config.presets import base


def _small(config) -> None:
    libero.chunk_level(config)
    config.algo.global_batch = 256
    config.algo.micro_batch = 32
    config.algo.critic_warmup_updates = 4
    config.optim.lr = 3e-4
    config.optim.value_lr = 3e-3
    config.optim.weight_decay = 0.0


def _miniature(config) -> None:
    miniature.miniature(config)
    _small(config)


def _own(config) -> None:
    miniature.own(config)
    _small(config)


def _libero_small(config) -> None:
    miniature.libero_small(config)
    _small(config)


PRESETS = {
    "miniature": _miniature,
    "own": _own,
    "libero_small": _libero_small,
} | libero.presets(libero.full_size_ppo)


def get_config(preset: str = "miniature"):
    """Return the ConfigDict of a preset."""
    return base("ppo", preset, PRESETS)
