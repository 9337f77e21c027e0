"""PPO with a value head, in imagination.

    python launch.py --config=configs/ppo.py                  # the miniature, on two CPU cores
    python launch.py --config=configs/ppo.py:libero_spatial   # published sizes, your own weights

No PPO configuration for a world model was ever published; `libero_spatial` is a careful start
(chunk level throughout, value head warmed up first), not a reproduced run.
"""

from configs import common


def _chunk_level(config) -> None:
    config.policy.value_head = "chunk_level"
    config.algo.reward_type = "chunk_level"
    config.algo.logprob_type = "token_level"


def _miniature(config) -> None:
    common.miniature(config)
    _chunk_level(config)
    config.algo.global_batch = 256
    config.algo.micro_batch = 32
    config.algo.critic_warmup_updates = 4
    config.optim.lr = 3e-4
    config.optim.value_lr = 3e-3
    config.optim.weight_decay = 0.0


def _libero_spatial(config) -> None:
    common.libero(config)
    _chunk_level(config)
    config.policy.unnorm_key = "libero_spatial"
    config.env.num_envs = 64
    config.rollout.epochs = 4
    config.algo.global_batch = 1024
    config.algo.micro_batch = 16
    config.algo.critic_warmup_updates = 32
    config.optim.lr = 5e-6
    config.optim.value_lr = 3e-3
    config.eval.interval = 4
    config.checkpoint.interval = 4


PRESETS = {"miniature": _miniature, "libero_spatial": _libero_spatial}


def get_config(preset: str = "miniature"):
    """Return the ConfigDict of a preset."""
    return common.base("ppo", preset, PRESETS)
