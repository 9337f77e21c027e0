"""PPO with a value head: generalised advantages, clipped policy and value losses.

Source: Schulman et al. 2017, "Proximal Policy Optimization" (arXiv:1707.06347), as RLinf applies it
to chunked VLA policies. Differences, each with a field or function that names it:
1. means and advantage statistics are over the global batch, not over a rank or a micro-batch;
2. `normalize_advantages` has an effect, except with fewer than two valid entries;
3. values can be bootstrapped at truncated ends;
4. a global batch without a valid entry is skipped.
"""

from dataclasses import dataclass
from functools import partial

from algos import advantages as adv
from algos import losses, metrics, policy_gradient, update
from algos.policy_gradient import LossOutput, LossWeights, PolicyGradientConfig
from algos.types import RolloutBatch, Samples, Targets, WeightedMetric
from policies.ranges import CountOrZero, NotNegative, Positive, Share
from policies.types import PolicyEvaluation


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """Settings of PPO, in addition to those of all policy gradients.

    Attributes:
        gamma: discount per step (per action, or per chunk with chunk-level rewards).
        gae_lambda: trace decay of generalised advantage estimation.
        normalize_advantages: scale advantages to mean 0 and standard deviation 1 over the
            iteration's valid entries.
        bootstrap_truncated: use the value after a time limit as the estimate of later rewards;
            False treats the limit as an end, as RLinf does. Not with auto_reset, where that value
            belongs to the next episode.
        value_clip: bound of a value's change in the clipped value loss.
        huber_delta: error above which the value loss grows linearly.
        value_coefficient: weight of the value loss. It affects the parameters that policy and value
            head share; the head itself has optim.value_lr. RLinf has no such weight (1).
        critic_warmup_updates: number of first optimiser steps that train only the value head; then
            optimiser and schedule restart.
    """

    gamma: Share = 0.99
    gae_lambda: Share = 0.95
    normalize_advantages: bool = True
    bootstrap_truncated: bool = False
    value_clip: Positive = 0.2
    huber_delta: Positive = 10.0
    value_coefficient: NotNegative = 1.0
    critic_warmup_updates: CountOrZero = 0

    @property
    def num_warmup_updates(self) -> int:
        """Optimiser steps that train the value head alone."""
        return self.critic_warmup_updates


def problems(
    cfg: Config, *, num_samples: int | None = None, reward_coefficient: float | None = None
) -> list[str]:
    """Return every reason why these values do not work together, [] if there is none."""
    found = policy_gradient.shared_problems(
        cfg, num_samples=num_samples, reward_coefficient=reward_coefficient
    )
    if cfg.bootstrap_truncated and cfg.auto_reset:
        found.append(
            "config.algo.bootstrap_truncated: expected False with auto_reset, whose next value "
            "belongs to the next episode, got True"
        )
    return found


def advantages(batch: RolloutBatch, cfg: Config) -> tuple[Targets, dict[str, WeightedMetric]]:
    """Return generalised advantages with their returns, and rollout metrics.

    Without values in the batch, both are the undiscounted rewards-to-go.
    """
    episodes = policy_gradient.read_episodes(batch, cfg)
    shape = episodes.rewards.shape
    rewards = adv.flatten_steps(episodes.rewards)
    dones = adv.flatten_steps(episodes.dones)
    old_values = None
    if batch.values is None:
        estimates, returns = adv.returns_to_go(rewards, dones)
    else:
        if batch.values.shape[2] != shape[2]:
            raise ValueError(
                f"reward_type={cfg.reward_type!r} needs values of shape [B T+1 {shape[2]}], got "
                f"{batch.values.shape}; set config.policy.value_head to the level of "
                "config.algo.reward_type"
            )
        bootstrap = None
        if cfg.bootstrap_truncated:
            cut_off, ended = batch.truncated, batch.terminated & (not cfg.ignore_terminations)
            if cfg.reward_type == "chunk_level":
                cut_off, ended = (x.any(axis=-1, keepdims=True) for x in (cut_off, ended))
            bootstrap = adv.flatten_steps(cut_off & ~ended)
        estimates, returns = adv.gae(
            rewards,
            adv.flatten_values(batch.values),
            dones,
            gamma=cfg.gamma,
            gae_lambda=cfg.gae_lambda,
            bootstrap=bootstrap,
        )
        old_values = batch.values[:, :-1]
    estimates = estimates.reshape(shape)
    if cfg.normalize_advantages:
        estimates = adv.normalize(estimates, episodes.valid)
    targets = Targets(
        advantages=estimates,
        returns=returns.reshape(shape),
        values=old_values,
        valid=episodes.valid,
        num_valid=episodes.num_valid,
    )
    return targets, policy_gradient.rollout_metrics(batch, episodes, targets, cfg)


def loss(
    evaluation: PolicyEvaluation, samples: Samples, weights: LossWeights, cfg: Config, **options
) -> LossOutput:
    """Return policy loss + value_coefficient·value loss; options as in `policy_loss`."""
    policy = policy_gradient.policy_loss(evaluation, samples, weights, cfg, **options)
    if evaluation.values is None or samples.old_values is None or samples.returns is None:
        raise ValueError("PPO needs a policy with a value head; set config.policy.value_head")
    per_entry = losses.clipped_value_loss(
        evaluation.values,
        samples.returns,
        samples.old_values,
        value_clip=cfg.value_clip,
        huber_delta=cfg.huber_delta,
    )
    value_loss = losses.weighted_sum(per_entry, weights.value)
    return LossOutput(
        loss=policy.loss + cfg.value_coefficient * value_loss,
        terms=policy.terms | {"critic/value_loss": value_loss, "actor/value_loss": value_loss},
        metrics=policy.metrics
        | {
            "critic/value_clip_ratio": metrics.value_clip_ratio(
                evaluation.values, samples.old_values, samples.valid, cfg.value_clip
            )
        },
        statistics=metrics.value_statistics(evaluation.values, samples.returns, samples.valid),
    )


# (apply, optimizer, cfg, placement) -> Update
make_update = partial(update.make_update, advantages=advantages, loss=loss)
