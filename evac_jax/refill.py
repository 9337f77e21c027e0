"""Dynamic sampling: groups that teach nothing make room for fresh ones.

Where all members of a group succeed or all fail, their advantages are zero. As a policy becomes
good, or as long as it is bad, most groups are like that, and what is left is a small, noisy batch.

Source: Yu et al. 2025, "DAPO" (arXiv:2503.14476), which samples until a batch is full; here the
number of tries is bounded and a batch that is not full keeps groups that teach nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from algos.types import RolloutBatch
from evac_jax.rollout import Played

Collected = tuple[RolloutBatch, dict[str, float], Played]


def informative(success: np.ndarray, group_size: int) -> np.ndarray:
    """Return which groups have members of both kinds, bool [n / group_size].

    Args:
        success: of every episode, bool [n], members of a group side by side.
    """
    share = np.asarray(success, float).reshape(-1, group_size).mean(1)
    return (share > 0) & (share < 1)


def collect_informative(
    collect: Callable[[int], Collected], group_size: int, tries: int
) -> Collected:
    """Collect once, and up to `tries` times more until every group of a batch is informative.

    The batch keeps its size: informative groups in the order in which they came, then others.
    Figures and record are those of the first collection, which alone is a fair sample of how the
    policy does, with "env/refills" added.

    Args:
        collect: number of the try, 0 first, -> what was collected; always as many episodes.
        group_size: episodes of a group.
        tries: 0 returns the first collection as it is.
    """
    batch, figures, played = collect(0)
    if not tries:
        return batch, figures, played
    good, batches = informative(played.success, group_size), [batch]
    wanted = len(good)
    while good.sum() < wanted and len(batches) <= tries:
        more, _, record = collect(len(batches))
        batches.append(more)
        good = np.concatenate((good, informative(record.success, group_size)))
    figures = figures | {"env/refills": float(len(batches) - 1)}
    if len(batches) == 1:
        return batch, figures, played
    groups = np.argsort(~good, kind="stable")[:wanted]
    rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts)[rows], *batches)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, batch)
    return jax.device_put(joined, shardings), figures, played
