"""Published LIBERO runs and what a lab with less hardware can start from.

Values are those of RLinf's EVAC run on LIBERO-Spatial (RLinf at commit c9f1d8471, its example for
GRPO) unless a line says otherwise. Only the paths of weights and start frames are empty, because
the user brings them. docs/presets.md lists hardware, memory and command of each preset.
"""

from ml_collections import config_dict

GPUS = 8  # of the published run


def full_size(config: config_dict.ConfigDict) -> None:
    """The 7B policy and full-size EVAC on 8 GPUs, each of which trains and imagines."""
    config.policy.value_head = "none"
    config.policy.temperature = 1.6
    config.policy.eval_temperature = 1.6
    config.policy.param_dtype = "float32"
    config.policy.compute_dtype = "bfloat16"
    config.policy.remat = "full"
    config.world_model.steps = 50
    config.reward.coefficient = 5.0
    config.env.initial_states = "npy"
    config.env.max_episode_steps = 256
    config.env.num_envs = 16
    config.rollout.epochs = 16
    config.simulator.devices = ("cuda",)
    # Where eval.ground_truth is "libero": a process for each task (1.9 GB), ten episodes of each.
    config.eval.ground_truth_envs = 10
    config.eval.ground_truth_episodes = 100
    config.train.iterations = 1000
    config.seed = 1234
    config.policy.unnorm_key = "libero_spatial"
    config.policy.max_prompt_length = 128
    config.policy.top_k = -1
    config.world_model.eta = 1.0
    config.reward.threshold = 0.5
    config.reward.relative = True
    config.simulator.processes = GPUS
    config.simulator.devices = tuple(f"cuda:{i}" for i in range(GPUS))
    config.eval.interval = 4
    config.checkpoint.interval = 4


def full_size_grpo(config: config_dict.ConfigDict) -> None:
    """16 environments in groups of 2, 16 episodes each, 8192 chunks in 32 optimiser steps."""
    full_size(config)
    config.algo.group_size = 2
    config.algo.global_batch = 256
    config.algo.micro_batch = 32
    config.algo.clip_low = 0.2
    config.algo.clip_high = 0.28
    config.algo.filter_rewards = True
    config.algo.filter_low = 0.5
    config.algo.filter_high = 4.5
    config.optim.lr = 2e-5
    config.optim.value_lr = 3e-3


def full_size_ppo(config: config_dict.ConfigDict) -> None:
    """PPO's rates and batch of RLinf's LIBERO-10 run in the simulator, chunk level throughout.

    No PPO run in a world model was published. Ours: 256 episodes an iteration as for GRPO, 8
    optimiser steps on them, and four iterations of warm-up for the value head before the policy
    moves.
    """
    full_size(config)
    chunk_level(config)
    config.env.num_envs = 64
    config.rollout.epochs = 4
    config.algo.global_batch = 1024
    config.algo.micro_batch = 16
    config.algo.critic_warmup_updates = 32
    config.optim.lr = 5e-6
    config.optim.value_lr = 3e-3


def chunk_level(config: config_dict.ConfigDict) -> None:
    """PPO with one reward, one value and one advantage a chunk."""
    config.policy.value_head = "chunk_level"
    config.algo.reward_type = "chunk_level"
    config.algo.logprob_type = "token_level"


def lora(config: config_dict.ConfigDict) -> None:
    """Adapters of RLinf's LoRA runs, rank 32 at a scale of 1, over a frozen bfloat16 base."""
    config.policy.lora_rank = 32
    config.policy.lora_alpha = 32.0
    config.policy.param_dtype = "bfloat16"
    # Every GPU holds the frozen base whole if it fits. Cut over 8 GPUs it would be gathered for
    # every decision and micro-batch (docs/scaling.md).
    config.mesh.data = 0


def one_gpu_80gb(config: config_dict.ConfigDict) -> None:
    """LoRA and the world model side by side on one GPU; ours, not a published run.

    Same episodes and batch per iteration; 16 at a time, and the world model in bfloat16.
    """
    lora(config)
    episodes = config.env.num_envs * config.rollout.epochs
    config.env.num_envs = 16
    config.rollout.epochs = episodes // 16
    config.algo.micro_batch = 16
    config.simulator.processes = 1
    config.simulator.devices = ("cuda:0",)
    config.simulator.dtype = "bfloat16"


def presets(full) -> dict:
    """Return the presets of an algorithm whose full-size one is `full`."""

    def changed(change):
        def preset(config: config_dict.ConfigDict) -> None:
            full(config)
            change(config)

        return preset

    return {"libero_spatial": full, "lora": changed(lora), "one_gpu_80gb": changed(one_gpu_80gb)}
