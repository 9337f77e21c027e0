"""Small settings for every algorithm: the tabletop, a small LIBERO, worlds of one's own."""

from ml_collections import config_dict

from evac_jax.config.schema import LIBERO_SMALL_WEIGHTS, MINIATURE_WEIGHTS


def small(config: config_dict.ConfigDict) -> None:
    """What suits networks as small as the miniature's, on two CPU cores or one GPU."""
    config.env.num_envs = 128
    config.simulator.processes = 2
    config.eval.interval = 4
    config.eval.episodes = 64
    config.train.iterations = 8
    config.checkpoint.interval = 1


def miniature(config: config_dict.ConfigDict) -> None:
    """Built-in tabletop: 64-pixel frames, shipped weights, two CPU cores, minutes.

    Scene ids are seeds: 0 .. 10^6 for training, the next 10^6 for choices, the next for reports.
    """
    small(config)
    config.world = MINIATURE_WEIGHTS
    config.policy.scan_layers = False
    config.eval.ground_truth_episodes = 256


def libero_small(config: config_dict.ConfigDict) -> None:
    """Four tasks of LIBERO-Spatial at 64 pixels and 10 Hz, two CPU cores.

    It is evaluated in initial states of which no training saw any.

    The world fills in how it is shown; `python -m evac_jax.tools.recipes.libero_small` makes it.
    """
    small(config)
    config.world = LIBERO_SMALL_WEIGHTS
    config.policy.scan_layers = False
    config.env.initial_states = "npy"
    config.libero.python = ".venv-libero/bin/python"
    config.libero.max_steps = 48
    config.eval.ground_truth_envs = 1  # 1.9 GB each
    # The held-out states of all tasks.
    config.eval.ground_truth_starts = (360, 400)
    config.eval.ground_truth_episodes = 40


def own(config: config_dict.ConfigDict) -> None:
    """A world of one's own, `--config.world=DIR`; without one, all its paths are missing."""
    small(config)
    config.env.initial_states = "npy"
    # Where the world's ground truth is LIBERO: a process for each task, ten episodes of each.
    config.eval.ground_truth_envs = 10
    config.eval.ground_truth_episodes = 100
