"""Arrays that the trainer and the algorithms pass to each other.

The batch axis is always first. The letters are those of policies/types.py. k is K if rewards are
per action and 1 if they are per chunk. There are N = B*T samples; a sample is one chunk.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8


@chex.dataclass(frozen=True)
class RolloutBatch:
    """Episodes as they were played; members of a group are consecutive on the batch axis.

    The step after which an episode is done still counts. Later steps are ignored, unless
    environments reset themselves. No episode is done before its first action.

    Attributes:
        images: what the policy saw before each chunk, 0..255.
        prompt_tokens: tokenised instruction, one per episode.
        prompt_mask: True on real prompt tokens.
        tokens: sampled action tokens, absolute ids.
        log_probs: of the sampled tokens under the distribution they were drawn from, nats.
        values: estimates at each chunk, then one after the final chunk; v is 1 (chunk level) or K
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
    """The targets of the losses, derived from a `RolloutBatch`.

    Attributes:
        advantages: one per action or chunk; with GRPO 0 where they are masked.
        returns: targets of the value head; None without one.
        values: estimates at sampling time, the centre of the value clip; None without a head.
        valid: entries to train on; None = all (environments that restart by themselves).
        num_valid: actions up to the end of the entry's episode, before any filter; None if `valid`
            does not come from episode ends.
    """

    advantages: Float[Array, "B T k"]
    returns: Float[Array, "B T k"] | None
    values: Float[Array, "B T k"] | None
    valid: Bool[Array, "B T k"] | None
    num_valid: Int[Array, "B T k"] | None


@chex.dataclass(frozen=True)
class Samples:
    """`Targets` and sampled tokens divided into chunks, which are shuffled and batched.

    Sample b*T + t is chunk t of episode b. Attributes as in `Targets` and `RolloutBatch`, and:

        proximal_log_probs: of the tokens under the policy at the start of the update; None if that
            is the policy that drew them.
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
        step: finished iterations; the learning-rate schedule depends on it.
        params: trainable parameters, any pytree.
        opt_state: the optimiser's state.
        updates: optimiser steps taken, skipped ones not counted.
        skipped: global batches skipped, non-finite or without a valid entry.
        ref_params: frozen start parameters for the KL penalty; None without a penalty.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    updates: Int[Array, ""]
    skipped: Int[Array, ""]
    ref_params: Any = None


@chex.dataclass(frozen=True)
class WeightedMetric:
    """A mean, stored as sum and weight so that parts can be added; weight 0 = no data.

    Attributes:
        sum: of the entries.
        weight: number of entries, or the sum of their weights.
    """

    sum: Float[Array, "*parts"]
    weight: Float[Array, "*parts"]

    def mean(self) -> Float[Array, "*parts"]:
        """Return sum / weight; NaN if there was no data."""
        # Not `/`: fetched metrics are NumPy arrays, and NumPy warns about 0 / 0.
        return jnp.divide(self.sum, self.weight)


def path_name(path) -> str:
    """Path of a leaf as "a/b/0/kernel"; NNX states end in "/value", which is cut."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
