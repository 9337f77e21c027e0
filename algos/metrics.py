"""Training metrics as `WeightedMetric`s, with the names in RLinf's code and those in its guides.

Counts are the numbers of entries that a mask covers after broadcasting, so means are correct at
every granularity. docs/metrics.md has the definitions.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from algos.losses import Surrogate
from algos.types import WeightedMetric

# A centred sum of squares below this share of the sum of squares is rounding noise in float32.
NOISE_SHARE = 1e-12


def once(value: Float[Array, ""], defined: Bool[Array, ""] | bool = True) -> WeightedMetric:
    """Return a figure with weight 1, or with weight 0 if it is not defined."""
    return WeightedMetric(
        sum=jnp.where(defined, value, 0.0), weight=jnp.asarray(defined, jnp.float32)
    )


def masked(x: Array, valid: Bool[Array, "..."] | None) -> WeightedMetric:
    """Return the mean of x over valid entries."""
    valid = jnp.broadcast_to(True if valid is None else valid, x.shape)
    weight = valid.sum().astype(jnp.promote_types(x.dtype, jnp.float32))
    return WeightedMetric(sum=jnp.sum(jnp.where(valid, x, 0)).astype(weight.dtype), weight=weight)


def policy_metrics(
    surrogate: Surrogate, valid: Bool[Array, "..."] | None, *, reference: bool = False
) -> dict[str, WeightedMetric]:
    """Return the metrics of a clipped surrogate: ratios, clipping, distance.

    Args:
        reference: divide ratios per action by the count of a mask per chunk (RLinf, which expands
            masks over tokens only); the result is K times too large.
    """
    s = jax.lax.stop_gradient(surrogate)
    low = s.clipped & (s.ratio < s.clipped_ratio)
    ratios = {
        "actor/ratio": masked(s.ratio, valid),
        "actor/ratio_abs": masked(jnp.abs(s.ratio - 1.0), valid),
        "actor/clipped_ratio": masked(s.clipped_ratio, valid),
        "actor/dual_cliped_ratio": masked(jnp.where(s.dual_clipped, s.ratio, 0.0), valid),
    }
    if reference and valid is not None and s.ratio.ndim == 2:
        count = valid.sum() * 1.0
        ratios = {name: WeightedMetric(sum=m.sum, weight=count) for name, m in ratios.items()}
    return ratios | {
        "actor/approx_kl": masked(-s.log_ratio, valid),
        "actor/clip_fraction": masked(s.clipped, valid),
        "actor/clip_fraction_low": masked(low, valid),
        "actor/clip_fraction_high": masked(s.clipped & ~low, valid),
    }


def decoupled_metrics(
    surrogate: Surrogate,
    log_weight: Float[Array, "..."],
    valid: Bool[Array, "..."] | None,
    left: Bool[Array, "..."],
) -> dict[str, WeightedMetric]:
    """Return the metrics of a decoupled surrogate; `left` are the valid entries that are kept."""
    s = jax.lax.stop_gradient(surrogate)
    return {
        "actor/proximal_ratio": masked(s.ratio, valid),
        "actor/clipped_proximal_ratio": masked(s.clipped_ratio, valid),
        "actor/clip_fraction": masked(s.clipped, valid),
        "actor/dual_clip_fraction": masked(s.dual_clipped, valid),
        "actor/behav_clip_fraction": masked(~left, valid),
        "actor/proximal_approx_kl": masked(-s.log_ratio, valid),
        "actor/behav_approx_kl": masked(-jax.lax.stop_gradient(log_weight), left),
    }


@chex.dataclass(frozen=True)
class Moments:
    """Count, mean and centred sum of squares of a set of numbers; sets can be merged.

    Centred, because Σx² − (Σx)²/n loses all digits in float32 if the mean is large.
    """

    count: Float[Array, "*parts"]
    mean: Float[Array, "*parts"]
    centred_squares: Float[Array, "*parts"]

    def merge(self) -> "Moments":
        """Return the moments of the union of all parts. Source: Chan et al. 1979."""
        count = self.count.sum()
        mean = jnp.sum(self.count * self.mean) / jnp.maximum(count, 1.0)
        between = self.count * (self.mean - mean) ** 2
        return Moments(
            count=count, mean=mean, centred_squares=jnp.sum(self.centred_squares + between)
        )

    @property
    def sum(self) -> Float[Array, "*parts"]:
        """Sum of the numbers."""
        return self.count * self.mean

    @property
    def square_sum(self) -> Float[Array, "*parts"]:
        """Sum of their squares."""
        return self.centred_squares + self.count * self.mean**2


def moments(x: Float[Array, "..."], valid: Bool[Array, "..."] | None) -> Moments:
    """Return the moments of the valid entries of x."""
    metric = masked(x, valid)
    mean = metric.sum / jnp.maximum(metric.weight, 1.0)
    centred = jnp.where(True if valid is None else valid, x - mean, 0.0)
    return Moments(count=metric.weight, mean=mean, centred_squares=jnp.sum(centred**2))


@chex.dataclass(frozen=True)
class ValueStatistics:
    """Moments of returns R and of errors R − V, from which explained variance follows."""

    returns: Moments
    errors: Moments

    def explained_variance(self) -> WeightedMetric:
        """Return 1 − SS(R − V) / SS(R) over all parts; undefined for constant returns or n < 2."""
        returns, errors = self.returns.merge(), self.errors.merge()
        noise = NOISE_SHARE * returns.square_sum
        defined = (returns.count >= 2) & (returns.centred_squares > noise)
        spread = jnp.where(defined, returns.centred_squares, 1.0)
        return once(1.0 - errors.centred_squares / spread, defined)


def value_statistics(
    values: Float[Array, "B k"], returns: Float[Array, "B k"], valid: Bool[Array, "B k"] | None
) -> ValueStatistics:
    """Return the sufficient statistics of a batch."""
    errors = jax.lax.stop_gradient(returns - values)
    return ValueStatistics(returns=moments(returns, valid), errors=moments(errors, valid))


def value_clip_ratio(
    values: Float[Array, "B k"],
    old_values: Float[Array, "B k"],
    valid: Bool[Array, "B k"] | None,
    value_clip: float,
) -> WeightedMetric:
    """Return the share of valid entries whose value changed by more than the clip.

    Difference: 1. RLinf tests the change after clipping, which is rounding noise.
    """
    moved = jnp.abs(jax.lax.stop_gradient(values) - old_values)
    return masked(moved > value_clip, valid)


def extremes(
    name: str, x: Float[Array, "..."], valid: Bool[Array, "..."] | None
) -> dict[str, WeightedMetric]:
    """Return name_mean, name_max and name_min of the valid entries; undefined if there are none."""
    valid = jnp.broadcast_to(True if valid is None else valid, x.shape)
    any_valid = valid.any()
    return {
        f"{name}_mean": masked(x, valid),
        f"{name}_max": once(jnp.max(jnp.where(valid, x, -jnp.inf)), any_valid),
        f"{name}_min": once(jnp.min(jnp.where(valid, x, jnp.inf)), any_valid),
    }


def trajectory_metrics(
    returns: Float[Array, " B"],
    lengths: Int[Array, " B"],
    success: Bool[Array, " B"],
    groups_without_spread: Bool[Array, "..."],
    groups_kept: Bool[Array, "..."],
    share_valid: Float[Array, ""],
) -> dict[str, WeightedMetric]:
    """Return figures of whole episodes; all but the last two are taken before the filter."""
    return {
        "rollout/reward_mean": masked(returns, None),
        "rollout/reward_std": once(jnp.std(returns)),
        "rollout/episode_length": masked(lengths, None),
        "rollout/success_rate": masked(success, None),
        "rollout/group_std_zero_fraction": masked(groups_without_spread, None),
        "rollout/filtered_group_fraction": masked(~groups_kept, None),
        "rollout/valid_token_fraction": once(share_valid),
    }
