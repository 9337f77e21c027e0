"""The update of one iteration as one traced function: epochs x global batches x micro-batches.

Frames stay uint8 and are not moved until a micro-batch gathers its own. There are no host callbacks
and no mesh axis names. Inputs may be sharded; `Placement` tells how the work lies on the devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from algos import metrics
from algos.optim import global_norm
from algos.policy_gradient import LossOutput, PolicyGradientConfig, loss_weights
from algos.types import RolloutBatch, Samples, Targets, TrainState, WeightedMetric
from policies.types import ObsBatch, PolicyEvaluation

Apply = Callable[[Any, ObsBatch, Array], PolicyEvaluation]
Metrics = dict[str, WeightedMetric]
Update = Callable[[TrainState, RolloutBatch, Array], tuple[TrainState, Metrics]]


def identity(tree: Any) -> Any:
    """Return the tree as it is."""
    return tree


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where an update computes.

    Every copy of the parameters accumulates the gradient of its own rows in float32. The copies
    are summed once per optimiser step.

    Attributes:
        copies: of the parameters; it divides a micro-batch.
        over_copies: `jax.vmap`, told that the axis is that of the copies.
        rows: gives a micro-batch, a tree with the batch axis first, its sharding.
        gradients: gives accumulated gradients, like the parameters with the copies as first axis,
            their sharding.
    """

    copies: int = 1
    over_copies: Callable[..., Callable] = jax.vmap
    rows: Callable[[Any], Any] = identity
    gradients: Callable[[Any], Any] = identity

    def each_copy(self, function: Callable, params: Any, rows: tuple) -> Any:
        """Return `function(params, *rows)` of each copy's rows, with the copies as first axis."""
        rows = self.rows(rows)
        if self.copies == 1:  # an axis more would make other programs, slower ones on a CPU
            return jax.tree.map(lambda x: x[None], function(params, *rows))
        rows = jax.tree.map(lambda x: x.reshape(self.copies, -1, *x.shape[1:]), rows)
        axes = (None, *[0] * len(rows))
        return self.over_copies(function, in_axes=axes)(params, *rows)


def init_state(
    params: Any, optimizer: optax.GradientTransformation, *, keep_reference: bool = False
) -> TrainState:
    """Return the state before the first update.

    Args:
        keep_reference: keep a copy of the parameters for the KL penalty.
    """
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        updates=zero,
        skipped=zero,
        ref_params=jax.tree.map(jnp.copy, params) if keep_reference else None,
    )


def make_samples(batch: RolloutBatch, targets: Targets) -> Samples:
    """Return the chunks of a rollout, [B T ...] flattened to [N ...]."""
    samples = Samples(
        tokens=batch.tokens,
        old_log_probs=batch.log_probs,
        advantages=targets.advantages,
        returns=targets.returns,
        old_values=targets.values,
        valid=targets.valid,
        num_valid=targets.num_valid,
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)


def observations(batch: RolloutBatch, indices: Int[Array, " b"]) -> ObsBatch:
    """Return what the policy saw before the chunks `indices` (b*T + t)."""
    num_chunks = batch.tokens.shape[1]
    episodes = indices // num_chunks
    return ObsBatch(
        images=batch.images[episodes, indices % num_chunks],
        prompt_tokens=batch.prompt_tokens[episodes],
        prompt_mask=batch.prompt_mask[episodes],
    )


@chex.dataclass(frozen=True)
class UpdateLog:
    """Results of the optimiser steps: U global batches of M micro-batches each.

    Attributes:
        outputs: of each micro-batch and copy of the parameters, leaves [U M C].
        metrics: of each global batch, leaves [U].
        finite: loss and gradient were finite.
        any_valid: at least one entry was valid.
    """

    outputs: LossOutput
    metrics: dict[str, WeightedMetric]
    finite: Bool[Array, " U"]
    any_valid: Bool[Array, " U"]


def run_updates(
    state: TrainState,
    batch: RolloutBatch,
    samples: Samples,
    order: Int[Array, " N"],
    *,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    cfg: PolicyGradientConfig,
    loss: Callable[..., LossOutput],
    placement: Placement = Placement(),
) -> tuple[TrainState, UpdateLog]:
    """Take one optimiser step per global batch of `order`; repeat this `cfg.update_epochs` times.

    A batch with a non-finite loss or gradient, or without a valid entry, does not change parameters
    or optimiser. Gradients are accumulated in float32.

    Raises:
        ValueError: sizes are not divisible, or the KL penalty has no reference policy.
    """
    num_samples, num_micro = len(order), cfg.num_micro_batches
    if num_samples % cfg.global_batch or cfg.global_batch % num_micro:
        raise ValueError(
            f"config.algo.global_batch={cfg.global_batch} must divide the {num_samples} chunks of "
            f"an iteration, and config.algo.micro_batch={cfg.micro_batch} must divide it"
        )
    micro_size = cfg.global_batch // num_micro
    if micro_size % placement.copies:
        raise ValueError(
            f"config.algo.micro_batch: expected a multiple of the {placement.copies} copies of the "
            f"parameters (config.mesh.data), got {micro_size}"
        )
    if cfg.kl_beta > 0.0 and state.ref_params is None:
        raise ValueError("config.algo.kl_beta > 0 needs TrainState.ref_params")
    if cfg.decoupled:

        def log_probs_of(indices):
            seen = observations(batch, indices), samples.tokens[indices]
            return placement.each_copy(apply, state.params, seen).log_probs

        samples = samples.replace(
            proximal_log_probs=jax.lax.map(
                log_probs_of, jnp.arange(num_samples).reshape(-1, micro_size)
            ).reshape(samples.old_log_probs.shape)
        )
    optimizer = optax.with_extra_args_support(optimizer)
    episode_steps = cfg.episode_steps or batch.rewards[0].size
    warmup = cfg.num_warmup_updates

    def weights_of(part: Samples):
        if not cfg.reference_micro_batch_mean:
            return loss_weights(part, cfg, episode_steps)
        weights = jax.vmap(lambda s: loss_weights(s, cfg, episode_steps))(split(part))
        return jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]) / num_micro, weights)

    def split(tree):
        return jax.tree.map(lambda x: x.reshape(num_micro, -1, *x.shape[1:]), tree)

    def global_step(state: TrainState, indices: Int[Array, " G"]):
        part = jax.tree.map(lambda x: x[indices], samples)
        policy_on = state.updates >= warmup

        def gradient_of(params, obs, micro_samples, micro_weights):
            ref_log_probs = None
            if cfg.kl_beta > 0.0:
                ref_log_probs = apply(state.ref_params, obs, micro_samples.tokens).log_probs

            def objective(params):
                output = loss(
                    apply(params, obs, micro_samples.tokens),
                    micro_samples,
                    micro_weights,
                    cfg,
                    policy_on=policy_on,
                    ref_log_probs=ref_log_probs,
                )
                return output.loss, output

            return jax.grad(objective, has_aux=True)(params)

        def add_gradient(total, micro):
            micro_indices, *others = micro
            rows = (observations(batch, micro_indices), *others)
            gradients, outputs = placement.each_copy(gradient_of, state.params, rows)
            total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients)
            return placement.gradients(total), outputs

        zeros = jax.tree.map(
            lambda p: jnp.zeros((placement.copies, *p.shape), _at_least_float32(p)), state.params
        )
        gradients, outputs = jax.lax.scan(
            add_gradient,
            placement.gradients(zeros),
            (indices.reshape(num_micro, -1), split(part), split(weights_of(part))),
        )
        gradient = jax.tree.map(lambda g: g.sum(axis=0), gradients)
        any_valid = jnp.asarray(True) if part.valid is None else part.valid.any()
        return _step(state, gradient, outputs, any_valid, optimizer, warmup)

    global_batches = jnp.tile(order.reshape(-1, cfg.global_batch), (cfg.update_epochs, 1))
    return jax.lax.scan(global_step, state, global_batches)


def _step(
    state: TrainState,
    gradient: Any,
    outputs: LossOutput,
    any_valid: Bool[Array, ""],
    optimizer: optax.GradientTransformationExtraArgs,
    warmup: int,
) -> tuple[TrainState, UpdateLog]:
    """Take an optimiser step if loss and gradient are finite and anything is valid."""
    opt_state = state.opt_state
    if warmup > 0:  # the policy starts with a fresh optimiser and schedule
        restart = state.updates == warmup
        opt_state = _select(restart, optimizer.init(state.params), opt_state)
    steps, opt_state = optimizer.update(
        gradient,
        opt_state,
        state.params,
        iteration=state.step,
        only_value_head=state.updates < warmup,
    )
    norm = optax.tree.get(opt_state, "grad_norm")
    norm = global_norm(gradient) if norm is None else norm
    finite = jnp.isfinite(outputs.loss.sum()) & jnp.isfinite(norm)
    taken = finite & any_valid
    figures = {"actor/grad_norm": metrics.once(norm, finite)}
    for name, field in (("actor/lr", "lr"), ("critic/lr", "value_lr")):
        rate = optax.tree.get(opt_state, field)
        if rate is not None:
            figures[name] = metrics.once(rate)
    params = jax.tree.map(
        lambda p, s: (p.astype(_at_least_float32(p)) + s).astype(p.dtype), state.params, steps
    )
    state = state.replace(
        params=_select(taken, params, state.params),
        opt_state=_select(taken, opt_state, state.opt_state),
        updates=state.updates + taken,
        skipped=state.skipped + ~taken,
    )
    return state, UpdateLog(outputs=outputs, metrics=figures, finite=finite, any_valid=any_valid)


def summarise(log: UpdateLog, cfg: PolicyGradientConfig) -> Metrics:
    """Return the actor/* and critic/* metrics of an iteration, without non-finite batches."""
    outputs = jax.tree.map(
        lambda x: jnp.where(log.finite.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0), log.outputs
    )
    num_micro = cfg.num_micro_batches
    weight = jnp.sum(log.finite) * 1.0
    # The contributions of micro-batches sum to the loss of the global batch.
    terms = outputs.terms | {"actor/loss": outputs.loss}
    figures = {name: WeightedMetric(sum=x.sum(), weight=weight) for name, x in terms.items()}
    # Documented under this name; an algorithm without a critic reports 0.
    figures.setdefault("actor/value_loss", WeightedMetric(sum=jnp.zeros(()), weight=weight))
    divisor = num_micro if cfg.reference_micro_batch_mean else 1
    figures["actor/total_loss"] = WeightedMetric(
        sum=outputs.loss.sum() / divisor, weight=figures["actor/loss"].weight
    )
    figures |= jax.tree.map(jnp.sum, outputs.metrics | log.metrics)
    # With unchanged parameters the ratio must be 1. If it is not, sampler and learner disagree.
    figures["actor/ratio_abs_first"] = jax.tree.map(
        lambda x: x[0].sum(), outputs.metrics["actor/ratio_abs"]
    )
    if outputs.statistics is not None:
        figures["critic/explained_variance"] = outputs.statistics.explained_variance()
    figures["actor/skipped_updates"] = metrics.once(jnp.sum(~log.finite) * 1.0)
    figures["actor/empty_updates"] = metrics.once(jnp.sum(~log.any_valid) * 1.0)
    return figures


def make_update(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    cfg: PolicyGradientConfig,
    placement: Placement = Placement(),
    *,
    advantages: Callable[[RolloutBatch, Any], tuple[Targets, Metrics]],
    loss: Callable[..., LossOutput],
) -> Update:
    """Return `update(state, batch, key) -> (state, metrics)`, to be jitted by the caller.

    Args:
        apply: (params, obs, tokens [b K A]) -> evaluation of the tokens by the policy; may close
            over frozen parameters.
        optimizer: see `optim.make_optimizer`; any optax transformation works.
        placement: where it computes.
        advantages, loss: the algorithm's own.
    """

    def update(state: TrainState, batch: RolloutBatch, key: Array) -> tuple[TrainState, Metrics]:
        targets, figures = advantages(batch, cfg)
        samples = make_samples(batch, jax.lax.stop_gradient(targets))
        # One permutation per iteration; every epoch uses the same.
        order = jax.random.permutation(key, samples.tokens.shape[0])
        state, log = run_updates(
            state,
            batch,
            samples,
            order,
            apply=apply,
            optimizer=optimizer,
            cfg=cfg,
            loss=loss,
            placement=placement,
        )
        return state.replace(step=state.step + 1), figures | summarise(log, cfg)

    return update


def _at_least_float32(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _select(condition: Bool[Array, ""], then: Any, otherwise: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)
