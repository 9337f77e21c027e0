"""GRPO in imagination.

    python launch.py --config=configs/grpo.py                  # the miniature, on two CPU cores
    python launch.py --config=configs/grpo.py:libero_spatial   # published sizes, your own weights

`libero_spatial` holds the hyper-parameters of RLinf's EVAC run (RLinf at commit c9f1d8471, config
of the EVAC LIBERO-spatial GRPO example). Hardware there: 8 GPUs. Time and score here: not measured,
because the weights are not public.
"""

from configs import common


def _miniature(config) -> None:
    common.miniature(config)
    config.algo.group_size = 8
    config.algo.global_batch = 256
    config.algo.micro_batch = 32
    config.optim.lr = 3e-4
    config.optim.weight_decay = 0.0


def _libero_spatial(config) -> None:
    common.libero(config)
    config.policy.unnorm_key = "libero_spatial"
    config.algo.group_size = 2
    config.algo.global_batch = 256
    config.algo.micro_batch = 32
    config.algo.filter_rewards = True
    config.algo.filter_low = 0.5
    config.algo.filter_high = 4.5
    config.optim.lr = 2e-5
    config.optim.value_lr = 3e-3
    config.eval.interval = 4
    config.checkpoint.interval = 4


PRESETS = {"miniature": _miniature, "libero_spatial": _libero_spatial}


def get_config(preset: str = "miniature"):
    """Return the ConfigDict of a preset."""
    return common.base("grpo", preset, PRESETS)
