"""GRPO: the advantage of an episode is its score relative to those of its group.

Source: Shao et al. 2024, "DeepSeekMath" (arXiv:2402.03300), section 4.1, as RLinf applies it to
chunked VLA policies. Differences, each with a field or function that names it:
1. means are over the global batch, and over the entries that masks cover after broadcasting;
2. episodes that do not end are used completely instead of causing an error;
3. a global batch without a valid entry is skipped;
4. the KL estimators put the policy first.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax.numpy as jnp

from algos import advantages as adv
from algos import policy_gradient, update
from algos.policy_gradient import PolicyGradientConfig
from algos.types import RolloutBatch, Targets, WeightedMetric
from policies.ranges import Range


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """Settings of GRPO, in addition to those of all policy gradients.

    Attributes:
        group_size: number of episodes that share their start and are compared with each other; they
            are consecutive in the batch.
    """

    group_size: Annotated[int, Range(2)] = 8


def problems(
    cfg: Config, *, num_samples: int | None = None, reward_coefficient: float | None = None
) -> list[str]:
    """Return every reason why these values do not work together, [] if there is none."""
    return policy_gradient.shared_problems(
        cfg, num_samples=num_samples, reward_coefficient=reward_coefficient
    )


def advantages(batch: RolloutBatch, cfg: Config) -> tuple[Targets, dict[str, WeightedMetric]]:
    """Return each episode's group-relative score at all its valid entries, and rollout metrics.

    Statistics use all members of a group, even if the filter drops the group.
    """
    episodes = policy_gradient.read_episodes(batch, cfg)
    scores = adv.episode_scores(
        adv.flatten_steps(episodes.rewards), adv.flatten_steps(episodes.dones)
    )
    relative = adv.group_relative(scores, cfg.group_size)[:, None, None]
    valid = True if episodes.valid is None else episodes.valid
    targets = Targets(
        advantages=jnp.where(valid, jnp.broadcast_to(relative, episodes.rewards.shape), 0.0),
        returns=None,
        values=None,
        valid=episodes.valid,
        num_valid=episodes.num_valid,
    )
    return targets, policy_gradient.rollout_metrics(batch, episodes, targets, cfg)


loss = policy_gradient.policy_loss


# (apply, optimizer, cfg, placement) -> Update
make_update = partial(update.make_update, advantages=advantages, loss=loss)
