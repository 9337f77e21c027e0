"""Advantages, returns, loss masks and group statistics: arrays in, arrays out.

The batch axis is first; the second axis has S = T*k steps. The functions know no model, no mesh and
no configuration object. Where RLinf's numbers are wrong, corrected ones are returned; docstrings
name the difference.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NORMALIZE_EPSILON = 1e-5
GROUP_EPSILON = 1e-6


def valid_until_done(
    dones: Bool[Array, "B S"], done_before: Bool[Array, " B"] | None = None
) -> Bool[Array, "B S"]:
    """Return True up to and including the step that ends the episode, False after it.

    Args:
        dones: the episode is done after this step.
        done_before: the episode was done before the first step, so nothing of that row is valid.
    """
    earlier = jnp.cumsum(dones, axis=1) - dones  # dones strictly before each step
    valid = earlier == 0
    return valid if done_before is None else valid & ~done_before[:, None]


def gae(
    rewards: Float[Array, "B S"],
    values: Float[Array, "B S+1"],
    dones: Bool[Array, "B S"],
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap: Bool[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Return (advantages, returns) of generalised advantage estimation.

    δₜ = rₜ + γ Vₜ₊₁ cₜ − Vₜ;  Aₜ = δₜ + γ λ (1 − dₜ) Aₜ₊₁;  returnₜ = Aₜ + Vₜ
    with cₜ = 1 − dₜ, or 1 where `bootstrap` says so.

    Args:
        values: estimates before each step and, last, after the final one.
        dones: the episode is done after this step; this ends the trace, and the bootstrap too.
        bootstrap: steps whose next value is used although the episode is done, because a time limit
            cut it off; None = no such steps, as in RLinf, which treats both kinds of end alike.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", eq. 16; RLinf `gae` with the same indices.
    """
    alive = 1.0 - dones.astype(rewards.dtype)
    next_counts = alive if bootstrap is None else jnp.where(bootstrap, 1.0, alive)
    deltas = rewards + gamma * values[:, 1:] * next_counts - values[:, :-1]

    def step(following, now):
        delta, discount = now
        advantage = delta + discount * following
        return advantage, advantage

    _, advantages = jax.lax.scan(
        step,
        jnp.zeros_like(deltas[:, 0]),
        (deltas.T, gamma * gae_lambda * alive.T),
        reverse=True,
    )
    advantages = advantages.T
    return advantages, advantages + values[:, :-1]


def returns_to_go(
    rewards: Float[Array, "B S"], dones: Bool[Array, "B S"]
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Return (advantages, returns) without a critic: both are the undiscounted rewards-to-go.

    Source: RLinf `gae` without values, which forces γ = λ = 1.
    """
    no_values = jnp.zeros((rewards.shape[0], rewards.shape[1] + 1), rewards.dtype)
    return gae(rewards, no_values, dones, gamma=1.0, gae_lambda=1.0)


def episode_scores(rewards: Float[Array, "B S"], dones: Bool[Array, "B S"]) -> Float[Array, " B"]:
    """Return the undiscounted sum of rewards up to and including the first done step."""
    return jnp.sum(jnp.where(valid_until_done(dones), rewards, 0.0), axis=1)


def group_relative(
    scores: Float[Array, " B"], group_size: int, *, epsilon: float = GROUP_EPSILON
) -> Float[Array, " B"]:
    """Return (score − group mean) / (group standard deviation + ε); groups are consecutive rows.

    The standard deviation has ddof = 1. A group with equal scores gets exactly 0.

    Source: Shao et al. 2024, "DeepSeekMath", section 4.1; RLinf `grpo`. Difference: 1. a group of
    one gets 0, not NaN (the checks of a configuration do not allow such a group).
    """
    groups = scores.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    variance = jnp.sum(centred**2, axis=1, keepdims=True) / max(group_size - 1, 1)
    # A rounding error in the mean of equal scores would be multiplied by 1 / epsilon.
    advantages = jnp.where(has_no_spread(groups), 0.0, centred / (jnp.sqrt(variance) + epsilon))
    return advantages.reshape(-1)


def has_no_spread(groups: Float[Array, "N G"]) -> Bool[Array, "N 1"]:
    """Return True for groups with equal scores; nothing can be learned from them."""
    return groups.max(axis=1, keepdims=True) == groups.min(axis=1, keepdims=True)


def trajectory_returns(
    rewards: Float[Array, "B T k"], valid: Bool[Array, "B T k"] | None
) -> Float[Array, " B"]:
    """Return the sum of each episode's valid rewards."""
    return jnp.sum(rewards if valid is None else jnp.where(valid, rewards, 0.0), axis=(1, 2))


def reward_filter(
    returns: Float[Array, " B"], group_size: int, *, low: float, high: float
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """Return (mean return, kept) of each group: kept when low <= mean <= high.

    Source: RLinf `filter_rewards`. The idea is DAPO's dynamic sampling (Yu et al. 2025), but no new
    groups are sampled here.
    """
    means = returns.reshape(-1, group_size).mean(axis=1)
    return means, (means >= low) & (means <= high)


def to_chunk_level(
    rewards: Float[Array, "B T K"], dones: Bool[Array, "B T K"]
) -> tuple[Float[Array, "B T 1"], Bool[Array, "B T 1"]]:
    """Return (rewards summed, any done) per chunk. Rewards after a done inside a chunk count."""
    return rewards.sum(axis=-1, keepdims=True), dones.any(axis=-1, keepdims=True)


def valid_mean_and_count(x: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    """Return (mean of valid entries, their number, entries − mean with 0 for invalid ones)."""
    weight = jnp.ones_like(x) if valid is None else jnp.broadcast_to(valid, x.shape).astype(x.dtype)
    count = weight.sum()
    mean = jnp.sum(jnp.where(weight > 0, x, 0.0)) / jnp.maximum(count, 1.0)
    return mean, count, jnp.where(weight > 0, x - mean, 0.0)


def normalize(
    x: Float[Array, "*shape"],
    valid: Bool[Array, "*shape"] | None = None,
    *,
    epsilon: float = NORMALIZE_EPSILON,
) -> Float[Array, "*shape"]:
    """Return (x − mean) / (std + ε) for all entries, with statistics of the valid ones, ddof = 1.

    With fewer than two valid entries there is no standard deviation, and x is returned unchanged.

    Source: RLinf `safe_normalize`. Differences: 1. with a single valid entry x remains finite;
    2. under jit the statistics are those of the whole sharded batch, not of the part of one rank.
    """
    mean, count, centred = valid_mean_and_count(x, valid)
    std = jnp.sqrt(jnp.sum(centred**2) / jnp.maximum(count - 1.0, 1.0))
    return jnp.where(count >= 2, (x - mean) / (std + epsilon), x)


def flatten_steps(x: Array) -> Array:
    """[B T k] -> [B T*k]."""
    return x.reshape(x.shape[0], -1)


def flatten_values(values: Float[Array, "B T+1 v"]) -> Float[Array, "B S+1"]:
    """Return the estimates before each step, then the first one of the row after the end."""
    steps = (values.shape[1] - 1) * values.shape[2]
    return values.reshape(values.shape[0], -1)[:, : steps + 1]


def num_valid_actions(valid: Bool[Array, "B S"]) -> Int[Array, " B"]:
    """Return how many actions of each episode count."""
    return valid.sum(axis=1, dtype=jnp.int32)
