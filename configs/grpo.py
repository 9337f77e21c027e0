"""GRPO in imagination.

    python launch.py --config=configs/grpo.py                  # the miniature, on two CPU cores
    python launch.py --config=configs/grpo.py:own --config.world=DIR   # a world of your own
    python launch.py --config=configs/grpo.py:libero_small     # LIBERO at 64 pixels, two CPU cores
    python launch.py --config=configs/grpo.py:libero_spatial   # published sizes, your own weights
    python launch.py --config=configs/grpo.py:lora             # the same with LoRA
    python launch.py --config=configs/grpo.py:one_gpu_80gb     # LoRA, one GPU

`libero_spatial` holds the hyper-parameters of RLinf's EVAC run (configs/libero.py). It used 8
GPUs. Time and score were not measured here, as neither the weights nor a GPU were at hand.
docs/presets.md describes each preset.
"""

from configs import libero, miniature
from evac_jax.config.presets import base


def _small(config) -> None:
    config.algo.group_size = 8
    config.algo.global_batch = 256
    config.algo.micro_batch = 32
    config.optim.lr = 3e-4
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
} | libero.presets(libero.full_size_grpo)


def get_config(preset: str = "miniature"):
    """Return the ConfigDict of a preset."""
    return base("grpo", preset, PRESETS)
