"""Arrays that cross the border between the trainer and the algorithms.

Batch axis first everywhere. Letters: policies/types.py; k is K where rewards are counted per action
and 1 where they are counted per chunk; N = B*T samples, a sample being one chunk.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8


@chex.dataclass(frozen=True)
class RolloutBatch:
    """Episodes as they were played; members of a group are neighbours on the batch axis.

    The step after which an episode is done still counts; what follows it is ignored unless
    environments reset themselves. No episode is done before its first action.

    Attributes:
        images: what the policy saw before each chunk, 0..255.
        prompt_tokens: tokenised instruction, one per episode.
        prompt_mask: True on real prompt tokens.
        tokens: sampled action tokens, absolute ids.
        log_probs: of the sampled tokens under the distribution they were drawn from, nats.
        values: estimates at each chunk and, last, after the final one; v is 1 (chunk level) or K
            (action level); None without a value head.
        rewards: of each action.
        terminated: the episode ended by its own rules (success) after this action.
        truncated: the episode was cut off (time limit) after this action.
    """

    images: UInt8[Array, "B T V H W 3"]
    prompt_tokens: Int[Array, "B L"]
    prompt_mask: Bool[Array, "B L"]
    tokens: Int[Array, "B T K A"]
    log_probs: Float[Array, "B T K A"]
    values: Float[Array, "B T+1 v"] | None
    rewards: Float[Array, "B T K"]
    terminated: Bool[Array, "B T K"]
    truncated: Bool[Array, "B T K"]


@chex.dataclass(frozen=True)
class Targets:
    """What the losses are computed against, derived from a `RolloutBatch`.

    Attributes:
        advantages: one per action or chunk; 0 where a mask hides them under GRPO.
        returns: targets of the value head; None without one.
        values: estimates at sampling time, the centre of the value clip; None without a head.
        valid: entries that train; None = all (environments that restart by themselves).
        num_valid: actions up to the end of the entry's episode, before any filter; None where
            `valid` does not come from episode ends.
    """

    advantages: Float[Array, "B T k"]
    returns: Float[Array, "B T k"] | None
    values: Float[Array, "B T k"] | None
    valid: Bool[Array, "B T k"] | None
    num_valid: Int[Array, "B T k"] | None


@chex.dataclass(frozen=True)
class Samples:
    """`Targets` and sampled tokens cut into chunks; the unit that is shuffled and batched.

    Sample b*T + t is chunk t of episode b. Attributes as in `Targets` and `RolloutBatch`, and:

        proximal_log_probs: of the tokens under the policy at the start of the update, where that
            is not the policy that drew them; None where it is.
    """

    tokens: Int[Array, "N K A"]
    old_log_probs: Float[Array, "N K A"]
    advantages: Float[Array, "N k"]
    returns: Float[Array, "N k"] | None
    old_values: Float[Array, "N k"] | None
    valid: Bool[Array, "N k"] | None
    num_valid: Int[Array, "N k"] | None
    proximal_log_probs: Float[Array, "N K A"] | None = None


@chex.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes.

    Attributes:
        step: finished iterations; the learning-rate schedule's clock.
        params: trainable parameters, any pytree.
        opt_state: the optimiser's state.
        updates: optimiser steps taken, skipped ones not counted.
        skipped: global batches skipped, non-finite or without a valid entry.
        ref_params: frozen start parameters for the KL penalty; None when there is no penalty.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    updates: Int[Array, ""]
    skipped: Int[Array, ""]
    ref_params: Any = None


@chex.dataclass(frozen=True)
class WeightedMetric:
    """A mean kept as sum and weight, so that parts of any size add up; weight 0 = no data.

    Attributes:
        sum: of the entries.
        weight: number of entries, or the sum of their weights.
    """

    sum: Float[Array, "*parts"]
    weight: Float[Array, "*parts"]

    def mean(self) -> Float[Array, "*parts"]:
        """Return sum / weight; NaN where there was no data."""
        # Not `/`: fetched metrics are NumPy's, which warns of 0 / 0.
        return jnp.divide(self.sum, self.weight)


def path_name(path) -> str:
    """Path of a leaf as "a/b/0/kernel"; NNX states end in "/value", which is cut."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
