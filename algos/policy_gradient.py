"""Common parts of GRPO and PPO: configuration, masks and returns of episodes, and the policy loss.

`grpo` and `ppo` use them and add the estimate of advantages and, for PPO, the critic.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from algos import advantages as adv
from algos import losses, metrics
from algos.metrics import ValueStatistics
from algos.types import RolloutBatch, Samples, Targets, WeightedMetric
from policies.ranges import Count, CountOrZero, NotNegative, Positive, Range, Share
from policies.types import PolicyEvaluation


@dataclass(frozen=True)
class PolicyGradientConfig:
    """Clipped policy gradients on chunked actions.

    Attributes:
        group_size: number of episodes that share their start; they are consecutive in the batch.
        reward_type: "action_level" (one advantage per action) or "chunk_level" (the rewards of a
            chunk are summed; one advantage per chunk).
        logprob_type: what one probability ratio covers: "token_level", "action_level" (product over
            A tokens) or "chunk_level" (product over the chunk; needs chunk-level rewards).
        entropy_type: the same for the entropy bonus.
        clip_low: ratios below 1 - clip_low are clipped.
        clip_high: ratios above 1 + clip_high are clipped.
        clip_ratio_c: dual clip for negative advantages; None = off. RLinf configures 3.0, but
            its OpenVLA-OFT path ignores it.
        clip_log_ratio_min: lower bound of the log-ratio before exp; None = off.
        clip_log_ratio_max: upper bound of the log-ratio before exp; None = off.
        decoupled: for episodes of an older policy (train.max_staleness). The loss clips around the
            policy at the start of the update, which costs one more forward pass. Each entry is
            weighted by the probability under that policy over that under the policy that acted.
        behave_weight_threshold: entries with a larger weight of this kind are dropped; None = none.
        length_weighting: give every episode the same total weight, whatever its length. It has no
            effect with auto_reset or ignore_terminations, where episodes do not end.
        episode_steps: actions of a full-length episode, the unit of length_weighting; 0 = those of
            the rollout, T x K.
        loss_agg: how the policy loss is averaged without length weighting: "token_mean",
            "seq_mean_token_sum" or "seq_mean_token_mean" (a sequence is a chunk).
        filter_rewards: drop groups whose mean episode return is outside the bounds.
        filter_low: lowest mean return that is kept, in units of the return. If success is worth
            c = reward.coefficient, 0.1c keeps groups with at least 10 % success.
        filter_high: highest mean return that is kept.
        auto_reset: environments restart within a rollout, so nothing is masked.
        ignore_terminations: episodes continue after success, so nothing is masked.
        kl_beta: weight of the KL penalty towards the start policy; 0 = off, which saves a forward
            pass and a copy of the parameters.
        kl_kind: estimator; "kl", "mse" and "low_var_kl" are other names of "k1", "k2" and "k3".
        entropy_bonus: weight of the entropy in the loss.
        update_epochs: passes over the samples of an iteration.
        global_batch: samples (chunks) of one optimiser step, over all devices; it must divide the
            iteration's episodes x T.
        micro_batch: samples of one forward pass, over all devices; it must divide global_batch and
            be a multiple of the number of devices; None = global_batch.
        reference_micro_batch_mean: average within each micro-batch, then over micro-batches
            (RLinf), instead of over the global batch; gradients then depend on micro_batch.
        reference_mask_count: count masks before broadcasting (RLinf), which makes masked means of
            token-level losses A times too large; no effect with length weighting.
    """

    group_size: Count = 1
    reward_type: Literal["action_level", "chunk_level"] = "action_level"
    logprob_type: losses.Level = "token_level"
    entropy_type: losses.Level = "token_level"
    clip_low: Share = 0.2
    clip_high: NotNegative = 0.28
    clip_ratio_c: Annotated[float, Range(1, open="low")] | None = None
    clip_log_ratio_min: Annotated[float, Range(high=0)] | None = None
    clip_log_ratio_max: NotNegative | None = None
    decoupled: bool = False
    behave_weight_threshold: Positive | None = 5.0
    length_weighting: bool = True
    episode_steps: CountOrZero = 0
    loss_agg: losses.Aggregation = "token_mean"
    filter_rewards: bool = False
    filter_low: float = 0.1
    filter_high: float = 0.9
    auto_reset: bool = False
    ignore_terminations: bool = False
    kl_beta: NotNegative = 0.0
    kl_kind: losses.KlKind = "k3"
    entropy_bonus: NotNegative = 0.0
    update_epochs: Count = 1
    global_batch: Count = 256
    micro_batch: Count | None = None
    reference_micro_batch_mean: bool = False
    reference_mask_count: bool = False

    @property
    def num_warmup_updates(self) -> int:
        """Optimiser steps that train the value head alone."""
        return 0

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a global batch."""
        return self.global_batch // (self.micro_batch or self.global_batch)


def shared_problems(
    cfg: PolicyGradientConfig,
    *,
    num_samples: int | None = None,
    reward_coefficient: float | None = None,
) -> list[str]:
    """Return every reason why the shared fields do not work together, [] if there is none.

    Args:
        num_samples: chunks of one iteration, if known.
        reward_coefficient: return of a successful episode, if known.
    """
    found = []

    def need(condition: bool, name: str, expected: str) -> None:
        if not condition:
            found.append(f"config.algo.{name}: expected {expected}, got {getattr(cfg, name)!r}")

    need(
        (cfg.reward_type, cfg.logprob_type) != ("action_level", "chunk_level"),
        "logprob_type",
        "'token_level' or 'action_level' with action-level rewards (or reward_type='chunk_level')",
    )
    need(
        cfg.loss_agg == "token_mean" or not cfg.length_weighting,
        "loss_agg",
        "'token_mean' with length_weighting (or length_weighting=False)",
    )
    need(
        not cfg.decoupled or (cfg.clip_log_ratio_min is None and cfg.clip_log_ratio_max is None),
        "decoupled",
        "False with clip_log_ratio_min or clip_log_ratio_max (behave_weight_threshold takes their "
        "place)",
    )
    need(cfg.filter_low <= cfg.filter_high, "filter_low", f"at most filter_high={cfg.filter_high}")
    if cfg.filter_rewards and reward_coefficient is not None:
        need(
            cfg.filter_low < reward_coefficient,
            "filter_low",
            f"less than reward.coefficient = {reward_coefficient}, the return of a success",
        )
    micro = cfg.micro_batch
    need(
        micro is None or cfg.global_batch % micro == 0,
        "micro_batch",
        f"None or a divisor of global_batch={cfg.global_batch}",
    )
    if num_samples is not None:
        need(
            num_samples % cfg.global_batch == 0,
            "global_batch",
            f"a divisor of the {num_samples} chunks of an iteration",
        )
    return found


@chex.dataclass(frozen=True)
class MaskedRollout:
    """Rewards and ends at the granularity of `reward_type`, and the mask of entries to train on.

    Attributes:
        rewards: per action, or summed per chunk.
        dones: the episode is done after this action or within this chunk.
        valid: entries up to the episode's end in groups that pass the filter; None = all.
        num_valid: as in `Targets`.
        lengths: actions of each episode up to its end, before the filter.
        returns: masked, undiscounted, before the filter.
        kept: groups that pass the filter.
    """

    rewards: Float[Array, "B T k"]
    dones: Bool[Array, "B T k"]
    valid: Bool[Array, "B T k"] | None
    num_valid: Array | None
    lengths: Array
    returns: Float[Array, " B"]
    kept: Bool[Array, " N"]


def read_episodes(batch: RolloutBatch, cfg: PolicyGradientConfig) -> MaskedRollout:
    """Return the masks and lengths of a rollout, and which groups pass the filter."""
    rewards = batch.rewards
    dones = batch.truncated if cfg.ignore_terminations else batch.terminated | batch.truncated
    valid = num_valid = None
    lengths = jnp.full(rewards.shape[0], rewards[0].size, jnp.int32)
    if not (cfg.auto_reset or cfg.ignore_terminations):
        valid = adv.valid_until_done(adv.flatten_steps(dones)).reshape(dones.shape)
        lengths = adv.num_valid_actions(adv.flatten_steps(valid))
    if cfg.reward_type == "chunk_level":
        rewards, dones = adv.to_chunk_level(rewards, dones)
        valid = None if valid is None else valid.any(axis=-1, keepdims=True)
    if valid is not None:
        num_valid = jnp.broadcast_to(lengths[:, None, None], valid.shape)
    returns = adv.trajectory_returns(rewards, valid)
    kept = jnp.ones(returns.shape[0] // cfg.group_size, bool)
    if cfg.filter_rewards:
        _, kept = adv.reward_filter(
            returns, cfg.group_size, low=cfg.filter_low, high=cfg.filter_high
        )
        member_kept = jnp.repeat(kept, cfg.group_size)[:, None, None]
        valid = jnp.broadcast_to(member_kept, rewards.shape) & (True if valid is None else valid)
    return MaskedRollout(
        rewards=rewards,
        dones=dones,
        valid=valid,
        num_valid=num_valid,
        lengths=lengths,
        returns=returns,
        kept=kept,
    )


def rollout_metrics(
    batch: RolloutBatch, episodes: MaskedRollout, targets: Targets, cfg: PolicyGradientConfig
) -> dict[str, WeightedMetric]:
    """Return the rollout/* metrics, with RLinf's names of both lists."""
    valid = episodes.valid
    succeeded = batch.terminated
    if episodes.num_valid is not None:
        steps = jnp.arange(batch.rewards[0].size).reshape(batch.rewards.shape[1:])
        succeeded = succeeded & (steps < episodes.lengths[:, None, None])
    groups = episodes.returns.reshape(-1, cfg.group_size)
    figures = metrics.trajectory_metrics(
        episodes.returns,
        episodes.lengths,
        succeeded.any(axis=(1, 2)),
        adv.has_no_spread(groups),
        episodes.kept,
        jnp.ones(()) if valid is None else valid.mean(),
    )
    figures["rollout/rewards"] = metrics.masked(batch.rewards, valid)
    figures |= metrics.extremes("rollout/advantages", targets.advantages, valid)
    if targets.returns is not None:
        figures |= metrics.extremes("rollout/returns", targets.returns, valid)
    return figures


@chex.dataclass(frozen=True)
class LossWeights:
    """Loss weights of a set of samples; the first axis is the samples; see `losses`."""

    policy: Float[Array, "N ..."]
    value: Float[Array, "N ..."]
    entropy: Float[Array, "N ..."]


def loss_weights(samples: Samples, cfg: PolicyGradientConfig, episode_steps: int) -> LossWeights:
    """Return the weights that average each loss over `samples`.

    Args:
        episode_steps: actions of a full-length episode.
    """
    n, K, A = samples.tokens.shape
    shapes = {"token_level": (n, K, A), "action_level": (n, K), "chunk_level": (n,)}

    def average(shape: tuple[int, ...], kind: str) -> Array:
        if samples.valid is None:
            return losses.aggregation_weights(kind, None, shape)
        valid = losses.match_rank(samples.valid, len(shape))
        if cfg.length_weighting and samples.num_valid is not None:
            num_valid = losses.match_rank(samples.num_valid, len(shape))
            # An episode without valid actions has weight 0; avoid a division by zero.
            share = jnp.maximum(num_valid, 1) / episode_steps
            return losses.length_weights(valid, share, shape)
        return losses.aggregation_weights(kind, valid, shape, reference=cfg.reference_mask_count)

    weights = LossWeights(
        policy=average(shapes[cfg.logprob_type], cfg.loss_agg),
        value=average(samples.advantages.shape, "token_mean"),
        entropy=losses.entropy_weights(
            samples.valid, shapes[cfg.entropy_type], reference=cfg.reference_mask_count
        ),
    )
    return jax.tree.map(lambda w: jnp.broadcast_to(w, (n, *w.shape[1:])), weights)


@chex.dataclass(frozen=True)
class LossOutput:
    """The contribution of one micro-batch.

    Attributes:
        loss: to differentiate; its sum over micro-batches is the loss of the global batch.
        terms: parts of the loss, summed in the same way.
        metrics: means over entries.
        statistics: of values against returns; None without a critic.
    """

    loss: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]
    metrics: dict[str, WeightedMetric]
    statistics: ValueStatistics | None = None


def policy_loss(
    evaluation: PolicyEvaluation,
    samples: Samples,
    weights: LossWeights,
    cfg: PolicyGradientConfig,
    *,
    policy_on: Bool[Array, ""] | bool = True,
    ref_log_probs: Float[Array, "N K A"] | None = None,
) -> LossOutput:
    """Return clipped surrogate + kl_beta·KL − entropy_bonus·entropy.

    Args:
        policy_on: False in critic warm-up: every term is 0, metrics are still computed.
        ref_log_probs: of the same tokens under the reference policy; needed with kl_beta > 0.
    """
    log_probs = losses.reduce_to_level(evaluation.log_probs, cfg.logprob_type)
    old_log_probs = losses.reduce_to_level(samples.old_log_probs, cfg.logprob_type)
    valid = None
    if samples.valid is not None:
        valid = losses.match_rank(samples.valid, log_probs.ndim)
    advantages = losses.match_rank(samples.advantages, log_probs.ndim)
    clips = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high, "clip_ratio_c": cfg.clip_ratio_c}
    off_policy = {}
    if samples.proximal_log_probs is None:
        bounds = (cfg.clip_log_ratio_min, cfg.clip_log_ratio_max)
        surrogate = losses.clipped_surrogate(
            log_probs, old_log_probs, advantages, valid, log_ratio_bounds=bounds, **clips
        )
    else:
        proximal = losses.reduce_to_level(samples.proximal_log_probs, cfg.logprob_type)
        surrogate, log_weight, left = losses.decoupled_surrogate(
            log_probs,
            old_log_probs,
            proximal,
            advantages,
            valid,
            behave_weight_threshold=cfg.behave_weight_threshold,
            **clips,
        )
        surrogate = surrogate.replace(loss=jnp.where(left, surrogate.loss, 0.0))
        off_policy = metrics.decoupled_metrics(surrogate, log_weight, valid, left)
    on = jnp.asarray(policy_on)
    loss = jnp.where(on, losses.weighted_sum(surrogate.loss, weights.policy), 0.0)
    terms = {
        "actor/policy_loss": loss,
        "actor/policy_loss_abs": losses.weighted_sum(jnp.abs(surrogate.loss), weights.policy),
        "actor/entropy_loss": jnp.zeros_like(loss),
    }
    if cfg.entropy_bonus > 0.0:
        entropy = losses.reduce_to_level(evaluation.entropy, cfg.entropy_type)
        terms["actor/entropy_loss"] = jnp.where(
            on, losses.weighted_sum(entropy, weights.entropy), 0.0
        )
        loss = loss - cfg.entropy_bonus * terms["actor/entropy_loss"]
    if cfg.kl_beta > 0.0:
        if ref_log_probs is None:
            raise ValueError("kl_beta > 0 needs ref_params in the TrainState")
        reference = losses.reduce_to_level(ref_log_probs, cfg.logprob_type)
        kl = losses.kl_penalty(log_probs, reference, cfg.kl_kind)
        terms["actor/kl_loss"] = jnp.where(on, losses.weighted_sum(kl, weights.policy), 0.0)
        loss = loss + cfg.kl_beta * terms["actor/kl_loss"]
    figures = metrics.policy_metrics(surrogate, valid, reference=cfg.reference_mask_count)
    figures |= off_policy
    token_valid = None if samples.valid is None else losses.match_rank(samples.valid, 3)
    figures["actor/entropy"] = metrics.masked(
        jax.lax.stop_gradient(evaluation.entropy), token_valid
    )
    return LossOutput(loss=loss, terms=terms, metrics=figures)
