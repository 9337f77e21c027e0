"""Converts between tokens and actions: bins, statistics, and the distribution over 256 bins.

A larger token id means a smaller action. With a tokenizer vocabulary of size V, token t has bin
clip(V - t - 1, 0, 254). The 256 edges on [-1, 1] enclose 255 bins, so the two lowest ids decode to
the same action. They keep separate log-probs, as in the reference.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NORMALIZATIONS = {"quantiles": ("q01", "q99"), "min_max": ("min", "max")}


@dataclass(frozen=True)
class ActionStatistics:
    """Un-normalises actions: 0.5 (x + 1) (high - low + 1e-8) + low where the mask is True.

    Attributes:
        low, high: per dimension, in the units of the robot.
        mask: where it is False, the dimension keeps its value in -1..1 (the gripper of LIBERO).
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]

    def __post_init__(self):
        if not len(self.low) == len(self.high) == len(self.mask):
            raise ValueError(
                f"action statistics need equal lengths, got {len(self.low)} low, "
                f"{len(self.high)} high, {len(self.mask)} mask"
            )

    @classmethod
    def identity(cls, dim: int) -> "ActionStatistics":
        """Statistics that leave every action in -1..1."""
        return cls((-1.0,) * dim, (1.0,) * dim, (False,) * dim)

    @classmethod
    def from_norm_stats(
        cls, norm_stats: dict[str, Any], unnorm_key: str, normalization: str = "quantiles"
    ) -> "ActionStatistics":
        """Pick a dataset's action statistics.

        Args:
            norm_stats: dataset name -> {"action": {"q01": [..], "q99": [..], "mask": [..] ..}}.
            unnorm_key: dataset name; "<key>_no_noops" is tried too.
            normalization: "quantiles" (q01, q99) or "min_max" (OpenVLA-OFT's ALOHA constants).
                The reference infers it from the command line.

        Raises:
            KeyError: no such dataset.
        """
        for key in (unnorm_key, f"{unnorm_key}_no_noops"):
            if key in norm_stats:
                action = norm_stats[key]["action"]
                low, high = NORMALIZATIONS[normalization]
                mask = action.get("mask", [True] * len(action[low]))
                return cls(tuple(action[low]), tuple(action[high]), tuple(map(bool, mask)))
        raise KeyError(
            f"unnorm_key {unnorm_key!r} (or {unnorm_key}_no_noops) is not among the checkpoint's "
            f"statistics {sorted(norm_stats)}"
        )


def bin_centres(num_bins: int = 256) -> np.ndarray:
    """Return the normalised value of each action token, lowest id first; float64 [num_bins]."""
    edges = np.linspace(-1.0, 1.0, num_bins)
    centres = (edges[:-1] + edges[1:]) / 2.0
    return centres[np.clip(num_bins - 1 - np.arange(num_bins), 0, num_bins - 2)]


def action_table(statistics: ActionStatistics, num_bins: int = 256) -> np.ndarray:
    """Return the un-normalised action of each token and dimension; float64 [num_bins A]."""
    low, high, mask = (np.asarray(x) for x in (statistics.low, statistics.high, statistics.mask))
    centres = bin_centres(num_bins)[:, None]
    return np.where(mask, 0.5 * (centres + 1) * (high - low + 1e-8) + low, centres)


def keep_top_k(logits: Float[Array, "... n"], k: int) -> Float[Array, "... n"]:
    """Set logits strictly below the k-th largest to -inf; ties stay. k <= 0 or >= n: all stay."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def log_distribution(
    logits: Float[Array, "... n"], temperature: float | Array, top_k: int
) -> Float[Array, "... n"]:
    """Return log-probs of all bins: temperature, then top-k, then log-softmax; float32."""
    return jax.nn.log_softmax(keep_top_k(logits.astype(jnp.float32) / temperature, top_k))


def entropy(log_probs: Float[Array, "... n"]) -> Float[Array, "..."]:
    """Return -sum p log p in nats; bins with p = 0 contribute 0, also to the gradient.

    The reference sums over the whole vocabulary with -inf outside the bins, which makes the
    gradient of every parameter NaN.
    """
    possible = jnp.isfinite(log_probs)
    safe = jnp.where(possible, log_probs, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(safe) * safe, 0.0), axis=-1)
