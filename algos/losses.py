"""Losses per entry, and the weights that turn them into one number: arrays in, arrays out.

A loss is Σ loss·weight. The weights depend only on masks, so they are computed for a whole global
batch before it is divided into micro-batches. Gradients therefore do not depend on that division.
The functions know no model, no mesh and no configuration object. Arguments named `reference` switch
to RLinf's behaviour where it is wrong.

Entries that do not count never affect a gradient. Their log-ratios are set to zero before `exp`,
because 0 · inf inside a `where` would still give NaN in the backward pass.
"""

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Level = Literal["token_level", "action_level", "chunk_level"]
KlKind = Literal["k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl"]
Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"]


def clip(x: Array, low: float | None, high: float | None) -> Array:
    """Clip x; the gradient at the bounds themselves is 1, where `jnp.clip` has 1/2."""
    if low is not None:
        x = jnp.where(x < low, jnp.asarray(low, x.dtype), x)
    if high is not None:
        x = jnp.where(x > high, jnp.asarray(high, x.dtype), x)
    return x


# Granularity: log-probabilities of K actions of A tokens, as tokens, actions or whole chunks.


def reduce_to_level(x: Float[Array, "B K A"], level: str) -> Float[Array, "B ..."]:
    """Sum log-probabilities (or entropies) to [B K A], [B K] or [B], as `level` says."""
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {get_args(Level)}, got {level!r}")
    axes = {"token_level": (), "action_level": (2,), "chunk_level": (1, 2)}[level]
    return x.sum(axis=axes) if axes else x


def match_rank(x: Array, ndim: int) -> Array:
    """Reshape [B k]: drop k = 1 if `ndim` is 1, else append axes of size 1 up to `ndim`."""
    if ndim < x.ndim:
        if x.shape[1] != 1:
            raise ValueError(f"cannot bring {x.shape} to chunk level: it has one entry per action")
        return x[:, 0]
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


# Aggregation: weights w with loss = Σ w·L, broadcast against the loss.


def mean_weights(
    valid: Bool[Array, "..."] | None, shape: tuple[int, ...], *, reference: bool = False
) -> Float[Array, "..."]:
    """Return the weights of the mean over valid entries; all are 0 if no entry is valid.

    Args:
        valid: broadcastable to `shape`; None = all.
        reference: count the entries of the mask itself, not those it covers after broadcasting
            (RLinf). A [B K 1] mask over [B K A] losses then makes the mean A times too large.
    """
    if valid is None:
        return jnp.full((1,) * len(shape), 1.0 / _size(shape))
    count = valid.sum() if reference else valid.sum() * (_size(shape) // valid.size)
    return valid / jnp.maximum(count, 1)


def length_weights(
    valid: Bool[Array, "..."],
    length_share: Float[Array, "..."],
    shape: tuple[int, ...],
    *,
    reference: bool = False,
) -> Float[Array, "..."]:
    """Return valid / length_share / (number of ALL entries): each episode has the same weight.

    Masked entries, also those of filtered groups, count in the denominator, so the loss becomes
    smaller as more groups are filtered. Adam is invariant to a constant factor.

    Args:
        valid: broadcastable to `shape`.
        length_share: valid actions of the entry's episode / actions of a full-length episode.
        reference: divide before masking, which yields NaN for an episode without valid actions.

    Source: RLinf `masked_mean_ratio`.
    """
    weights = valid / jnp.where(valid, length_share, 1.0) / _size(shape)
    # Written with an explicit NaN, because XLA turns a mask divided by 0 into 0.
    return jnp.where(length_share == 0, jnp.nan, weights) if reference else weights


def sequence_weights(
    valid: Bool[Array, "..."] | None,
    shape: tuple[int, ...],
    *,
    mean: bool,
    reference: bool = False,
) -> Float[Array, "..."]:
    """Return weights of the mean over rows (first axis) of each row's masked sum or mean.

    Args:
        mean: True = mean within a row, False = sum.
        reference: an empty row makes the mean 0/0 (NaN); otherwise it is left out.
    """
    valid = jnp.broadcast_to(True if valid is None else valid, shape)
    if not mean:
        return valid / shape[0]
    counts = valid.sum(axis=tuple(range(1, len(shape))), keepdims=True)
    row_means = valid / jnp.maximum(counts, 1)
    if reference:
        return jnp.where(counts == 0, jnp.nan, row_means / shape[0])
    return row_means / jnp.maximum(jnp.sum(counts > 0), 1)


def aggregation_weights(
    kind: str, valid: Bool[Array, "..."] | None, shape: tuple[int, ...], *, reference: bool = False
) -> Float[Array, "..."]:
    """Return the weights of one `Aggregation`."""
    if kind == "token_mean":
        return mean_weights(valid, shape, reference=reference)
    if kind in get_args(Aggregation):
        return sequence_weights(
            valid, shape, mean=kind == "seq_mean_token_mean", reference=reference
        )
    raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, got {kind!r}")


def weighted_sum(x: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """Return Σ x·w; entries of weight 0 contribute no value and no gradient, even if NaN."""
    return jnp.sum(jnp.where(weights == 0, 0.0, x) * weights)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


# Policy losses.


@chex.dataclass(frozen=True)
class Surrogate:
    """A clipped surrogate for each entry, and the arrays that its metrics need.

    Attributes:
        loss: to be minimised.
        log_ratio: log of new over old probability, 0 where invalid.
        ratio: exp(log_ratio), 0 where invalid.
        clipped_ratio: ratio clipped to the trust region.
        clipped: the clip is active (the clipped term is the larger loss).
        dual_clipped: the second clip is active.
    """

    loss: Float[Array, "..."]
    log_ratio: Float[Array, "..."]
    ratio: Float[Array, "..."]
    clipped_ratio: Float[Array, "..."]
    clipped: Bool[Array, "..."]
    dual_clipped: Bool[Array, "..."]


def clipped_surrogate(
    log_probs: Float[Array, "..."],
    old_log_probs: Float[Array, "..."],
    advantages: Float[Array, "..."],
    valid: Bool[Array, "..."] | None = None,
    *,
    clip_low: float,
    clip_high: float,
    clip_ratio_c: float | None = None,
    log_ratio_bounds: tuple[float | None, float | None] = (None, None),
) -> Surrogate:
    """Return max(−A·ρ, −A·clip(ρ, 1 − low, 1 + high)), at most |A|·c, per entry.

    If both terms are equal, each gets half of the gradient, so ρ = 1 has the full gradient.

    Args:
        clip_ratio_c: second clip for A < 0 and ρ > c, c > 1; None = off.
        log_ratio_bounds: clip of the log-ratio before `exp`, gradient 0 outside; None = off.

    Source: Schulman et al. 2017, "Proximal Policy Optimization", eq. 7; asymmetric bounds: Yu et
    al. 2025, "DAPO"; dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5; RLinf `ppo` losses.
    """
    counts = jnp.asarray(True) if valid is None else valid
    log_ratio = clip(jnp.where(counts, log_probs - old_log_probs, 0.0), *log_ratio_bounds)
    ratio = jnp.where(counts, jnp.exp(log_ratio), 0.0)
    clipped_ratio = clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    advantages = jnp.where(counts, advantages, 0.0)
    unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
    loss = jnp.maximum(unclipped, clipped)
    dual_clipped = jnp.zeros(loss.shape, bool)
    if clip_ratio_c is not None:
        ceiling = jnp.abs(advantages) * clip_ratio_c
        dual_clipped = (ceiling < loss) & counts
        loss = jnp.minimum(loss, ceiling)
    return Surrogate(
        loss=loss,
        log_ratio=log_ratio,
        ratio=ratio,
        clipped_ratio=clipped_ratio,
        clipped=(unclipped < clipped) & counts,
        dual_clipped=dual_clipped,
    )


def decoupled_surrogate(
    log_probs: Float[Array, "..."],
    old_log_probs: Float[Array, "..."],
    proximal_log_probs: Float[Array, "..."],
    advantages: Float[Array, "..."],
    valid: Bool[Array, "..."] | None = None,
    *,
    clip_low: float,
    clip_high: float,
    clip_ratio_c: float | None = None,
    behave_weight_threshold: float | None = None,
) -> tuple[Surrogate, Float[Array, "..."], Bool[Array, "..."]]:
    """Return (surrogate around the proximal policy × w, log w, entries kept), w = p_prox / p_old.

    Args:
        behave_weight_threshold: entries with a larger w are dropped; None = none.

    Source: Hilton et al. 2022, "Batch size-invariance for policy optimization", section 3; RLinf.
    """
    valid = jnp.broadcast_to(True if valid is None else valid, log_probs.shape)
    log_weight = jnp.where(valid, proximal_log_probs - old_log_probs, 0.0)
    weight = jnp.exp(log_weight)
    left = valid
    if behave_weight_threshold is not None:
        left = valid & (weight <= behave_weight_threshold)
    surrogate = clipped_surrogate(
        log_probs,
        proximal_log_probs,
        advantages,
        valid,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_ratio_c=clip_ratio_c,
    )
    return surrogate.replace(loss=surrogate.loss * weight), log_weight, left


# Value loss, KL, entropy.


def huber(error: Float[Array, "..."], delta: float) -> Float[Array, "..."]:
    """Return e²/2 below `delta`, δ·(|e| − δ/2) from there on."""
    size = jnp.abs(error)
    return jnp.where(size < delta, 0.5 * error**2, delta * (size - 0.5 * delta))


def clipped_value_loss(
    values: Float[Array, "..."],
    returns: Float[Array, "..."],
    old_values: Float[Array, "..."],
    *,
    value_clip: float,
    huber_delta: float,
) -> Float[Array, "..."]:
    """Return max(huber(R − V), huber(R − V_clip)), V_clip = V_old + clip(V − V_old, ±value_clip).

    Source: OpenAI baselines' PPO2, with Huber instead of the square as in RLinf.
    """
    clipped = old_values + clip(values - old_values, -value_clip, value_clip)
    return jnp.maximum(huber(returns - values, huber_delta), huber(returns - clipped, huber_delta))


def kl_penalty(
    log_probs: Float[Array, "..."], ref_log_probs: Float[Array, "..."], kind: str
) -> Float[Array, "..."]:
    """Return a per-token estimate of KL(policy || reference) from tokens of the policy.

    With d = log_probs − ref_log_probs: k1 (kl) d; abs |d|; k2 (mse) d²/2; k3 (low_var_kl)
    exp(−d) + d − 1, with d clipped to ±20 and the result to ±10.

    Source: Schulman 2020, "Approximating KL Divergence". Difference from RLinf's language path:
    1. the policy comes first, so the gradient is that of this divergence, not of the reverse one.
    """
    if kind in ("k1", "kl"):
        return log_probs - ref_log_probs
    if kind == "abs":
        return jnp.abs(log_probs - ref_log_probs)
    if kind in ("k2", "mse"):
        return 0.5 * (log_probs - ref_log_probs) ** 2
    if kind in ("k3", "low_var_kl"):
        difference = clip(ref_log_probs - log_probs, -20.0, 20.0)
        return clip(jnp.exp(difference) - difference - 1.0, -10.0, 10.0)
    raise ValueError(f"KL kind must be one of {get_args(KlKind)}, got {kind!r}")


def entropy_weights(
    valid: Bool[Array, "B k"] | None, shape: tuple[int, ...], *, reference: bool = False
) -> Float[Array, "..."]:
    """Return the weights of the mean over valid entries of an entropy of `shape`.

    A chunk is valid if any of its actions is.

    Args:
        reference: multiply mask and entropy without matching their shapes, and count the mask alone
            (RLinf). A [B 1] mask over [B] entropies becomes [B B] and sums them all. Over [B K] it
            makes the mean K times too large, over tokens A or K·A times.
    """
    if valid is None:
        return mean_weights(None, shape)
    if reference:
        raw = valid if len(shape) < 3 else match_rank(valid, 3)
        return raw / jnp.maximum(valid.sum(), 1)
    valid = valid.any(axis=1) if len(shape) == 1 else match_rank(valid, len(shape))
    return mean_weights(valid, shape)
