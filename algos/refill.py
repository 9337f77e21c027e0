"""Dynamic sampling: groups without a learning signal are replaced by fresh ones.

If all members of a group succeed, or all fail, their advantages are zero. The reward filter drops
further groups. With a very good or a very bad policy most groups are like that, and what is left is
a small, noisy batch.

Source: Yu et al. 2025, "DAPO" (arXiv:2503.14476), which samples until a batch is full; here the
number of tries is bounded, and a batch that is not full keeps groups without a signal.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from algos import advantages
from algos.policy_gradient import PolicyGradientConfig, read_episodes
from algos.types import RolloutBatch

Record = TypeVar("Record")  # of the episodes that were played; passed on as it is
Collected = tuple[RolloutBatch, dict[str, float], Record]


def informative(batch: RolloutBatch, algo: PolicyGradientConfig) -> np.ndarray:
    """Return which groups have a learning signal, bool [episodes / group_size].

    Their members' returns differ, and `algo.filter_rewards`, if it is on, keeps them.
    """
    episodes = read_episodes(batch, algo)
    spread = ~advantages.has_no_spread(episodes.returns.reshape(-1, algo.group_size))[:, 0]
    return np.asarray(spread & episodes.kept)


def collect_informative(
    collect: Callable[[int], Collected], algo: PolicyGradientConfig, tries: int
) -> Collected:
    """Collect once, and up to `tries` times more until every group of a batch is informative.

    The batch keeps its size: informative groups in the order in which they came, then others.
    Figures and record are those of the first collection, which alone is a fair sample of the
    policy's success, with "rollout/refills" and "rollout/kept_groups" added.

    Args:
        collect: number of the try, 0 first, -> what was collected; always as many episodes.
        algo: of the run: groups, filter, and how returns are read.
        tries: 0 returns the first collection as it is.
    """
    batch, figures, played = collect(0)
    if not tries:
        return batch, figures, played
    good, refills = informative(batch, algo), 0
    while not good.all() and refills < tries:
        refills += 1
        more = collect(refills)[0]
        batch, good = _merge(batch, good, more, informative(more, algo))
    kept = {"rollout/refills": float(refills), "rollout/kept_groups": float(good.sum())}
    return batch, figures | kept, played


def _merge(
    batch: RolloutBatch, good: np.ndarray, more: RolloutBatch, more_good: np.ndarray
) -> tuple[RolloutBatch, np.ndarray]:
    """Return as many groups as `batch` has, informative ones first, and which those are.

    Two batches at a time: pictures of several collections would not fit beside each other.
    """
    size = len(batch.rewards) // len(good)
    both = np.concatenate((good, more_good))
    groups = np.argsort(~both, kind="stable")[: len(good)]
    rows = (groups[:, None] * size + np.arange(size)).reshape(-1)
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts)[rows], batch, more)
    return jax.device_put(joined, jax.tree.map(lambda leaf: leaf.sharding, batch)), both[groups]
