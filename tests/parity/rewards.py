"""Rewards from success scores, as world models and simulators hand them out.

Definitions for the trainer's side and its tests; the simulator processes compute the same numbers
in torch and never import this package. Batch axis first.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def relative(
    values: Float[Array, "B S"], before: Float[Array, " B"] | None = None
) -> Float[Array, "B S"]:
    """Return vₛ − vₛ₋₁ along an episode: the sum up to any step is the value at that step.

    Args:
        values: reward level at each step, from the episode's start or from where `before` left off.
        before: level ahead of the first step; None = 0, as after a reset.
    """
    first = jnp.zeros_like(values[:, :1]) if before is None else before[:, None]
    return jnp.diff(values, axis=1, prepend=first)


def world_model_reward(
    scores: Float[Array, "B T K"],
    *,
    coefficient: float,
    use_relative: bool,
    success_threshold: float,
    reference: bool = False,
) -> tuple[Float[Array, "B T K"], Bool[Array, "B T"]]:
    """Return (rewards, success per chunk) of a classifier's scores since the reset.

    Args:
        scores: probability of success in each imagined frame, 0..1.
        coefficient: worth of a score of 1.
        use_relative: reward the change of the score instead of the score.
        success_threshold: a chunk succeeds when any score in it reaches this.
        reference: without `use_relative`, forget the coefficient as RLinf's world-model
            environments do.

    Source: RLinf world-model environments (Wan, OpenSora). Difference: 1. see `reference`.
    """
    success = scores.max(axis=-1) >= success_threshold
    if not use_relative:
        return (scores if reference else coefficient * scores), success
    levels = coefficient * scores.reshape(scores.shape[0], -1)
    return relative(levels).reshape(scores.shape), success


def simulator_reward(
    terminations: Bool[Array, "B S"],
    *,
    coefficient: float,
    use_relative: bool,
    step_penalty: bool,
    dtype=jnp.float32,
) -> Float[Array, "B S"]:
    """Return coefficient × success (− 1 per step), or its change from step to step.

    Success may flip back in simulators that go on after it; the relative reward is negative then.
    Under `use_relative` the penalty telescopes as well: only the first step after a reset pays it.

    Source: RLinf LIBERO environment.
    """
    levels = coefficient * terminations.astype(dtype) - float(step_penalty)
    return relative(levels) if use_relative else levels


def bootstrap_rewards(
    rewards: Float[Array, "B K"],
    terminated: Bool[Array, "B K"],
    truncated: Bool[Array, "B K"],
    values: Float[Array, "B v"],
    *,
    gamma: float,
    always: bool = False,
) -> Float[Array, "B K"]:
    """Add γ·V(final observation) to a chunk's last reward where its last action ended an episode.

    For environments that reset themselves: after the reset nobody sees the final observation again.

    Args:
        values: of the final observation before the reset; the first column counts.
        always: bootstrap terminated episodes too, not only truncated ones.

    Source: RLinf, `bootstrap_type` "standard" and "always".
    """
    ended = truncated[:, -1] | terminated[:, -1] if always else truncated[:, -1]
    return rewards.at[:, -1].add(jnp.where(ended, gamma * values[:, 0], 0.0))
