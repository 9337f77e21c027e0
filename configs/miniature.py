"""The built-in tabletop, for every algorithm."""

from ml_collections import config_dict

from evac_jax.config.schema import MINIATURE_WEIGHTS


def miniature(config: config_dict.ConfigDict) -> None:
    """Built-in tabletop: 64-pixel frames, shipped weights, two CPU cores, minutes.

    Scene ids are seeds: 0 .. 10^6 for training, the next 10^6 for choices, the next for reports.
    """
    weights = MINIATURE_WEIGHTS
    config.policy.checkpoint = f"{weights}/policy"
    config.policy.unnorm_key = "miniature"
    config.policy.max_prompt_length = 28
    config.policy.scan_layers = False
    config.policy.temperature = 0.5  # the start policy was taught with wide targets
    config.world_model.checkpoint = f"{weights}/world_model"
    config.world_model.steps = 2
    config.world_model.eta = 0.0
    config.reward.checkpoint = f"{weights}/reward"
    config.reward.success_frames = 2
    config.reward.judged_frames = 2
    config.env.pose_model = f"{weights}/pose_model"
    config.env.initial_states = "miniature"
    config.env.train_starts = (0, 1_000_000)
    config.env.num_envs = 128
    config.env.max_episode_steps = 32
    config.simulator.processes = 2
    config.eval.interval = 4
    config.eval.starts = (1_000_000, 2_000_000)
    config.eval.episodes = 64
    config.eval.ground_truth = "miniature"
    config.eval.ground_truth_episodes = 256
    config.train.iterations = 8
    config.checkpoint.interval = 1
