"""An algorithm of your own: RLOO, REINFORCE with a leave-one-out baseline.

    python launch.py --config=configs/grpo.py --config.algorithm=examples.rloo:RLOO

An episode's advantage is its score minus the mean score of the other episodes of its group. It is
not divided by their standard deviation, as in GRPO, so groups of nearly equal scores weigh little.

Source: Ahmadian et al. 2024, "Back to Basics" (arXiv:2402.14740), section 2.
"""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from algos import advantages as adv
from algos import grpo, policy_gradient, update
from algos.types import RolloutBatch, Targets, WeightedMetric


def leave_one_out(scores: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Return score − mean score of the others in the group; groups are consecutive rows."""
    groups = scores.reshape(-1, group_size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


def advantages(batch: RolloutBatch, cfg: grpo.Config) -> tuple[Targets, dict[str, WeightedMetric]]:
    """Return each episode's advantage at all its valid entries, and rollout metrics."""
    episodes = policy_gradient.read_episodes(batch, cfg)
    scores = adv.episode_scores(
        adv.flatten_steps(episodes.rewards), adv.flatten_steps(episodes.dones)
    )
    relative = leave_one_out(scores, cfg.group_size)[:, None, None]
    valid = True if episodes.valid is None else episodes.valid
    targets = Targets(
        advantages=jnp.where(valid, jnp.broadcast_to(relative, episodes.rewards.shape), 0.0),
        returns=None,
        values=None,
        valid=episodes.valid,
        num_valid=episodes.num_valid,
    )
    return targets, policy_gradient.rollout_metrics(batch, episodes, targets, cfg)


class RLOO:
    """What the trainer asks of an algorithm; the settings and the loss are those of GRPO."""

    Config = grpo.Config
    problems = staticmethod(grpo.problems)
    make_update = staticmethod(
        partial(update.make_update, advantages=advantages, loss=policy_gradient.policy_loss)
    )
