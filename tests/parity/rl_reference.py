"""Formulae of RLinf that golden vectors hold and that no algorithm here uses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from algos.advantages import NORMALIZE_EPSILON, valid_mean_and_count


def moments(
    x: Float[Array, "*shape"], valid: Bool[Array, "*shape"] | None = None
) -> Float[Array, " 3"]:
    """Return [count, sum, sum of squares] of the valid entries; moments of parts add up."""
    entries = x if valid is None else jnp.where(valid, x, 0.0)
    count = x.size if valid is None else jnp.broadcast_to(valid, x.shape).sum()
    return jnp.stack([jnp.asarray(count, x.dtype), entries.sum(), jnp.sum(entries**2)])


def normalize_by_moments(
    x: Float[Array, "*shape"], statistics: Float[Array, " 3"], *, epsilon: float = NORMALIZE_EPSILON
) -> Float[Array, "*shape"]:
    """Return (x − mean) / √(variance + ε), population variance, ε inside the root.

    Source: RLinf's pipelined trainer.
    """
    count = jnp.maximum(statistics[0], 1.0)
    mean = statistics[1] / count
    variance = jnp.maximum(statistics[2] / count - mean**2, 0.0)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


def normalize_masked(
    x: Float[Array, "*shape"],
    valid: Bool[Array, "*shape"] | None = None,
    *,
    epsilon: float = NORMALIZE_EPSILON,
) -> Float[Array, "*shape"]:
    """Return (x·valid − mean) / (std + ε), population deviation; invalid entries become −mean/std.

    Source: RLinf's asynchronous PPO.
    """
    mean, count, centred = valid_mean_and_count(x, valid)
    std = jnp.sqrt(jnp.sum(centred**2) / jnp.maximum(count, 1.0))
    masked = x if valid is None else jnp.where(valid, x, 0.0)
    return (masked - mean) / (std + epsilon)


def interpolate_log_probs(
    log_probs: Float[Array, "..."],
    old_log_probs: Float[Array, "..."],
    versions: Float[Array, "..."],
    current_version: float,
) -> Float[Array, "..."]:
    """Return proximal log-probabilities, one version behind the current policy, without gradient.

    old + α·(new − old), α = clip((current − 1 − version) / (current − version), 0, 1); α = 0 where
    the version is unknown (negative) or not older than the current one.

    Source: RLinf's decoupled PPO loss.
    """
    age = current_version - versions
    known = (age > 0) & (versions >= 0)
    alpha = jnp.where(known, jnp.clip((age - 1.0) / jnp.where(known, age, 1.0), 0.0, 1.0), 0.0)
    return jax.lax.stop_gradient(old_log_probs + alpha * (log_probs - old_log_probs))


def action_log_probs(
    logits: Float[Array, "... S"],
    tokens: Int[Array, "..."],
    *,
    first_token: int,
    end_token: int,
    temperature: float = 1.0,
    top_k: int = -1,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return (log-probability of the tokens, entropy), over the action tokens [first, end) only.

    Computed on the action window in float32 (or wider), so that no −inf enters: gradients are
    finite, and exactly 0 outside the window.

    Args:
        temperature: > 0; divides the logits.
        top_k: keep the k largest of ALL logits before restricting; k <= 0 = off.

    Source: RLinf's OpenVLA-OFT policy, which writes −inf over the other tokens; its entropy has NaN
    gradients. Differences: 1. the window; 2. float32 whatever the logits' dtype.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    window = logits[..., first_token:end_token]
    kept = jnp.ones(window.shape, bool)
    if 0 < top_k < logits.shape[-1]:
        kept = window >= jax.lax.top_k(logits, top_k)[0][..., -1:]
    all_log_probs = jax.nn.log_softmax(jnp.where(kept, window, -jnp.inf), axis=-1, where=kept)
    safe = jnp.where(kept, all_log_probs, 0.0)
    entropy = -jnp.sum(jnp.where(kept, jnp.exp(safe) * safe, 0.0), axis=-1)
    index = tokens[..., None] - first_token
    return jnp.take_along_axis(all_log_probs, index, axis=-1)[..., 0], entropy
