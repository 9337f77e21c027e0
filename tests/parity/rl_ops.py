"""The ops of RL golden cases, each a few lines on top of the functions that training uses.

Every op takes (params, inputs, reference) and returns its outputs by name. Fixtures have time first
("transport layout": epochs one after another, [E*n, B, ...]); `algos` has the batch first.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from algos import advantages as adv
from algos import grpo, losses, metrics, optim, policy_gradient, ppo, update
from algos.types import RolloutBatch, Samples, WeightedMetric
from policies.types import PolicyEvaluation
from tests.parity import rewards, rl_reference

# Layouts.


def merge(x, epochs):
    """[E*k B ...] -> [E*B k ...]: epochs become episodes, batch axis first."""
    x = x.reshape(epochs, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def unmerge(x, epochs):
    """[E*B k ...] -> [E*k B ...]."""
    x = x.reshape(epochs, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def time_first(x):
    """[B T ...] -> [T B ...]."""
    return x.swapaxes(0, 1)


# Metrics.


def value_of(metric: WeightedMetric, empty=0.0):
    """Mean of a metric; `empty` where nothing counted."""
    return jnp.where(metric.weight > 0, metric.sum / jnp.maximum(metric.weight, 1e-30), empty)


def named(figures: dict[str, WeightedMetric], empty=0.0):
    """Metrics under the manifest's names."""
    return {f"metric:{name}": value_of(metric, empty) for name, metric in figures.items()}


def statistics_of(statistics: metrics.ValueStatistics):
    """Sufficient statistics and explained variance under the manifest's names."""
    prefix = "metric:hidden_critic_explained_variance"
    return {
        f"{prefix}/count": statistics.returns.count,
        f"{prefix}/returns_sum": statistics.returns.sum,
        f"{prefix}/returns_sq_sum": statistics.returns.square_sum,
        f"{prefix}/errors_sum": statistics.errors.sum,
        f"{prefix}/errors_sq_sum": statistics.errors.square_sum,
        **named({"critic/explained_variance": statistics.explained_variance()}, jnp.nan),
    }


# Advantages.


def gae_flat(params, x, reference):
    """Estimation on flat [T, B] arrays."""
    rewards_, dones = x["rewards"].T, x["dones"][1:].T
    valid = x["loss_mask"].T if "loss_mask" in x else None
    if params.get("critic_free") or "values" not in x:
        advantages, returns = adv.returns_to_go(rewards_, dones)
    else:
        advantages, returns = adv.gae(
            rewards_,
            x["values"].T,
            dones,
            gamma=params["gamma"],
            gae_lambda=params["gae_lambda"],
        )
    if params.get("normalize_advantages"):
        advantages = adv.normalize(advantages, valid)
    if params.get("normalize_returns"):
        returns = adv.normalize(returns, valid)
    return {"advantages": advantages.T, "returns": returns.T}


def grpo_flat(params, x, reference):
    """Group-relative advantages of given scores, spread over valid entries."""
    relative = adv.group_relative(x["scores"].reshape(-1), params["group_size"])
    return {"advantages": jnp.where(x["loss_mask"], relative[None], 0.0)}


def episode_scores(params, x, reference):
    """Undiscounted scores."""
    return {"scores": adv.episode_scores(x["rewards"].T, x["dones"][1:].T)}


def rollout_batch(params, x, tokens=None):
    """A `RolloutBatch` of a transport-layout fixture; token 0 of a chunk is its sample number."""
    epochs = params.get("rollout_epoch", 1)
    rewards_ = merge(x["rewards"], epochs)
    dones = merge(x["dones"], epochs)[:, 1:]
    B, T, K = rewards_.shape
    log_probs = jnp.zeros((B, T, K, 1), rewards_.dtype)
    if "prev_logprobs" in x:
        log_probs = merge(x["prev_logprobs"], epochs).reshape(B, T, K, -1)
    number = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T, 1, 1)
    return RolloutBatch(
        images=jnp.zeros((B, T, 1, 1, 1, 3), jnp.uint8),
        prompt_tokens=jnp.zeros((B, 1), jnp.int32),
        prompt_mask=jnp.ones((B, 1), bool),
        tokens=jnp.broadcast_to(number, log_probs.shape),
        log_probs=log_probs,
        values=merge(x["prev_values"], epochs) if "prev_values" in x else None,
        rewards=rewards_,
        # Fixtures do not tell the two kinds of end apart, and nothing checked here does either.
        terminated=jnp.zeros_like(dones),
        truncated=dones,
    )


def config(params, reference, adv_type):
    """The configuration that a case's params stand for."""
    grouped = adv_type == "grpo" or params.get("filter_rewards")
    both = {
        "group_size": params.get("group_size", 1) if grouped else 1,
        "reward_type": params.get("reward_type", "action_level"),
        "logprob_type": params.get("logprob_type", "token_level"),
        "entropy_type": params.get("entropy_type") or "token_level",
        "clip_low": params.get("clip_ratio_low", 0.2),
        "clip_high": params.get("clip_ratio_high", 0.28),
        "clip_ratio_c": params.get("clip_ratio_c"),
        "clip_log_ratio_min": params.get("clip_log_ratio_min"),
        "clip_log_ratio_max": params.get("clip_log_ratio_max"),
        "length_weighting": params.get("max_episode_steps") is not None,
        "episode_steps": params.get("max_episode_steps") or 0,
        "filter_rewards": bool(params.get("filter_rewards")),
        "filter_low": params.get("rewards_lower_bound") or 0.0,
        "filter_high": params.get("rewards_upper_bound") or 0.0,
        "auto_reset": bool(params.get("auto_reset")),
        "ignore_terminations": bool(params.get("ignore_terminations")),
        "entropy_bonus": params.get("entropy_bonus") or 0.0,
        "update_epochs": params.get("update_epoch", 1),
        "global_batch": params.get("global_batch_size", 1),
        "micro_batch": params.get("micro_batch_size"),
        "reference_micro_batch_mean": True,
        "reference_mask_count": reference,
    }
    if adv_type == "grpo":
        return grpo.Config(**both)
    return ppo.Config(
        **both,
        gamma=params.get("gamma", 1.0),
        gae_lambda=params.get("gae_lambda", 1.0),
        normalize_advantages=params.get("normalize_advantages", True),
        value_clip=params.get("value_clip", 0.2),
        huber_delta=params.get("huber_delta", 10.0),
        critic_warmup_updates=10**9 if params.get("critic_warmup") else 0,
    )


ALGORITHM = {"grpo": grpo, "gae": ppo}


def target_outputs(targets, figures):
    """Targets and rollout metrics under the manifest's names, time first."""
    outputs = {
        "advantages": targets.advantages,
        "returns": targets.returns,
        "loss_mask": targets.valid,
        "loss_mask_sum": targets.num_valid,
    }
    outputs = {name: time_first(y) for name, y in outputs.items() if y is not None}
    return outputs | named(figures, empty=jnp.nan)


def embodied_advantages(params, x, reference):
    """Transport layout to targets, through an algorithm's `advantages`."""
    cfg = config(params, reference, params["adv_type"])
    return target_outputs(*ALGORITHM[params["adv_type"]].advantages(rollout_batch(params, x), cfg))


def masks_from_dones(params, x):
    """(valid, num_valid) [B n k] of a transport-layout `dones` with its bootstrap row."""
    dones = merge(x["dones"], params.get("rollout_epoch", 1))
    steps = dones[:, 1:]
    valid = adv.valid_until_done(adv.flatten_steps(steps), done_before=dones[:, 0, -1])
    lengths = adv.num_valid_actions(valid)
    valid = valid.reshape(steps.shape)
    if params["reward_type"] == "chunk_level":
        valid = valid.any(axis=-1, keepdims=True)
    return valid, jnp.broadcast_to(lengths[:, None, None], valid.shape)


def loss_mask_from_dones(params, x, reference):
    """Masks of episodes that may be done before they start."""
    valid, num_valid = masks_from_dones(params, x)
    return {"loss_mask": time_first(valid), "loss_mask_sum": time_first(num_valid)}


def reward_filter(params, x, reference):
    """The filter on top of masks from dones."""
    rewards_ = merge(x["rewards"], params.get("rollout_epoch", 1))
    outputs, valid = {}, None
    if not (params.get("auto_reset") or params.get("ignore_terminations")):
        valid, num_valid = masks_from_dones(params, x)
        outputs["loss_mask_sum"] = time_first(num_valid)
    if params["reward_type"] == "chunk_level":
        rewards_ = rewards_.sum(axis=-1, keepdims=True)
    means, kept = adv.reward_filter(
        adv.trajectory_returns(rewards_, valid),
        params["group_size"],
        low=params["rewards_lower_bound"],
        high=params["rewards_upper_bound"],
    )
    member_kept = jnp.repeat(kept, params["group_size"])[:, None, None]
    if valid is None:
        valid = jnp.ones((*rewards_.shape[:2], 1), bool)
    outputs["loss_mask"] = time_first(valid & member_kept)
    return outputs | {"group_mean_return": means, "keep_group": kept}


def _ranks(params, x):
    """(advantages, masks) of each rank's block."""
    split = lambda y: jnp.split(y, params["num_ranks"], axis=params["rank_axis"])  # noqa: E731
    blocks = split(x["advantages"])
    masks = split(x["loss_mask"]) if "loss_mask" in x else [None] * len(blocks)
    return blocks, masks


def normalise_stats(params, x, reference):
    """Moments added over ranks, then population variance."""
    statistics = sum(rl_reference.moments(*rank) for rank in zip(*_ranks(params, x), strict=True))
    normalised = rl_reference.normalize_by_moments(x["advantages"], statistics)
    return {"advantages": normalised, "count_sum_sumsq": statistics}


def normalise_masked_normalization(params, x, reference):
    """Masked entries included, as RLinf's asynchronous PPO."""
    return {"advantages": rl_reference.normalize_masked(x["advantages"], x.get("loss_mask"))}


def normalise_safe_per_rank(params, x, reference):
    """Each rank for itself."""
    blocks = [adv.normalize(*rank) for rank in zip(*_ranks(params, x), strict=True)]
    return {"advantages": jnp.concatenate(blocks, axis=params["rank_axis"])}


# Losses on ready-shaped tensors.


def _weights(params, x, valid, shape, reference):
    """Ratio weighting where everything for it is there, else the named aggregation."""
    steps, num_valid = params.get("max_episode_steps"), x.get("loss_mask_sum")
    if steps is not None and num_valid is not None and valid is not None:
        return losses.length_weights(valid, num_valid / steps, shape, reference=reference)
    kind = (params.get("loss_agg_func") or "token_mean").replace("-", "_")
    if valid is None or kind == "masked_mean":
        kind = "token_mean"
    return losses.aggregation_weights(kind, valid, shape, reference=reference)


def _off_in_warmup(params, loss):
    return jnp.where(bool(params.get("critic_warmup")), 0.0, loss)


def ppo_actor_loss(params, x, reference):
    """The clipped surrogate, its gradient and metrics."""
    valid = x.get("loss_mask")
    weights = _weights(params, x, valid, x["logprobs"].shape, reference)

    def loss_of(log_probs):
        surrogate = losses.clipped_surrogate(
            log_probs,
            x["old_logprobs"],
            x["advantages"],
            valid,
            clip_low=params["clip_ratio_low"],
            clip_high=params["clip_ratio_high"],
            clip_ratio_c=params.get("clip_ratio_c"),
            log_ratio_bounds=(params.get("clip_log_ratio_min"), params.get("clip_log_ratio_max")),
        )
        loss = _off_in_warmup(params, losses.weighted_sum(surrogate.loss, weights))
        return loss, (surrogate, losses.weighted_sum(jnp.abs(surrogate.loss), weights))

    (loss, (surrogate, size)), gradient = jax.value_and_grad(loss_of, has_aux=True)(x["logprobs"])
    return {
        "loss": loss,
        "grad_logprobs": gradient,
        "metric:actor/policy_loss": loss,
        "metric:actor/policy_loss_abs": size,
    } | named(metrics.policy_metrics(surrogate, valid, reference=reference))


def decoupled_ppo_actor_loss(params, x, reference):
    """The surrogate around a proximal policy."""
    valid = x.get("loss_mask")
    current = params.get("current_version")

    def loss_of(log_probs):
        if "proximal_logprobs" in x:
            proximal = x["proximal_logprobs"]
        else:
            proximal = rl_reference.interpolate_log_probs(
                log_probs, x["old_logprobs"], x["versions"], current
            )
        surrogate, log_weight, left = losses.decoupled_surrogate(
            log_probs,
            x["old_logprobs"],
            proximal,
            x["advantages"],
            valid,
            clip_low=params["clip_ratio_low"],
            clip_high=params["clip_ratio_high"],
            clip_ratio_c=params.get("clip_ratio_c"),
            behave_weight_threshold=params.get("behave_weight_threshold"),
        )
        weights = _weights(params, x, left, log_probs.shape, reference)
        loss = _off_in_warmup(params, losses.weighted_sum(surrogate.loss, weights))
        return loss, (surrogate, log_weight, left)

    (loss, (surrogate, log_weight, left)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
        x["logprobs"]
    )
    figures = metrics.decoupled_metrics(surrogate, log_weight, valid, left)
    if "versions" in x:
        figures["actor/average_version"] = metrics.masked(x["versions"], valid)
    if current is not None:
        figures["actor/current_version"] = metrics.once(jnp.asarray(current, loss.dtype))
    return {"loss": loss, "grad_logprobs": gradient, "metric:actor/policy_loss": loss} | named(
        figures
    )


def ppo_critic_loss(params, x, reference):
    """The clipped value loss, its gradient and metrics."""
    valid = x.get("loss_mask")
    weights = _weights(params, x, valid, x["values"].shape, reference)

    def loss_of(values):
        per_entry = losses.clipped_value_loss(
            values,
            x["returns"],
            x["prev_values"],
            value_clip=params["value_clip"],
            huber_delta=params["huber_delta"],
        )
        return losses.weighted_sum(per_entry, weights)

    loss, gradient = jax.value_and_grad(loss_of)(x["values"])
    moved = metrics.value_clip_ratio(x["values"], x["prev_values"], valid, params["value_clip"])
    return {
        "loss": loss,
        "grad_values": gradient,
        "metric:critic/value_loss": loss,
        **named({"critic/value_clip_ratio": moved}),
        **statistics_of(metrics.value_statistics(x["values"], x["returns"], valid)),
    }


# Losses on raw micro-batches, through the algorithms' own loss functions.


def _samples(params, x):
    A = params["single_action_dim"]
    old = x["old_logprobs"].reshape(x["old_logprobs"].shape[0], -1, A)
    return Samples(
        tokens=jnp.zeros(old.shape, jnp.int32),
        old_log_probs=old,
        advantages=x["advantages"],
        returns=x.get("returns"),
        old_values=x.get("prev_values"),
        valid=x.get("loss_mask"),
        num_valid=x.get("loss_mask_sum"),
    )


def embodied_loss_entry(params, x, reference):
    """Granularity, loss, gradient and metrics of one micro-batch."""
    if params["loss_type"].startswith("decoupled"):
        return _decoupled_entry(params, x, reference)
    with_critic = params["loss_type"] == "actor_critic"
    cfg = config(params, reference, "gae" if with_critic else "grpo")
    samples = _samples(params, x)
    weights = policy_gradient.loss_weights(samples, cfg, cfg.episode_steps or 1)
    inputs = {name: x[name] for name in ("logprobs", "values", "entropy") if name in x}

    def loss_of(inputs):
        shape = samples.old_log_probs.shape
        evaluation = PolicyEvaluation(
            log_probs=inputs["logprobs"].reshape(shape),
            entropy=inputs.get("entropy", jnp.zeros(shape)).reshape(shape),
            values=inputs.get("values"),
        )
        output = (ppo if with_critic else grpo).loss(
            evaluation, samples, weights, cfg, policy_on=not params.get("critic_warmup")
        )
        return output.loss, output

    (loss, output), gradient = jax.value_and_grad(loss_of, has_aux=True)(inputs)
    outputs = {f"grad_{name}": g for name, g in gradient.items()} | {"loss": loss}
    outputs |= {f"metric:{name}": term for name, term in output.terms.items()}
    outputs |= named(output.metrics)
    return outputs | (statistics_of(output.statistics) if output.statistics else {})


def _decoupled_entry(params, x, reference):
    """Reduce to the levels asked for, then the decoupled loss, and the critic's if there is one."""
    reduced = logprob_reduction(params, x, reference)

    def total(inputs):
        y = logprob_reduction(params, x | inputs, reference)
        outputs = decoupled_ppo_actor_loss(params, y, reference)
        if params["loss_type"].endswith("critic"):
            critic = ppo_critic_loss(params, y, reference)
            outputs = critic | outputs | {"loss": outputs["loss"] + critic["loss"]}
        return outputs["loss"], outputs

    inputs = {name: x[name] for name in ("logprobs", "values") if name in reduced}
    gradient, outputs = jax.grad(total, has_aux=True)(inputs)
    return outputs | {f"grad_{name}": g for name, g in gradient.items()}


# Reductions.


def entropy_reduction(params, x, reference):
    """Entropy to a level, and its mean."""
    valid = x.get("loss_mask")
    b = x["entropy"].shape[0]

    def mean_of(entropy):
        tokens = entropy.reshape(b, -1, params["action_dim"])
        reduced = losses.reduce_to_level(tokens, params["entropy_type"])
        weights = losses.entropy_weights(
            valid, reduced.shape, reference=reference and _broadcasts(valid, reduced)
        )
        return losses.weighted_sum(reduced, weights), reduced

    (mean, reduced), gradient = jax.value_and_grad(mean_of, has_aux=True)(x["entropy"])
    if params["entropy_type"] == "token_level":
        reduced = reduced.reshape(b, -1)
    return {"reduced": reduced, "entropy_loss": mean, "grad_entropy": gradient}


def _broadcasts(valid, x):
    """Whether the reference's raw product exists at all."""
    try:
        np.broadcast_shapes((1,) if valid is None else valid.shape, x.shape)
    except ValueError:
        return x.ndim == 3
    return True


def logprob_reduction(params, x, reference):
    """Log-probabilities to their level, the rest to the same rank."""
    A = params["single_action_dim"]
    per_token = {"logprobs", "old_logprobs", "proximal_logprobs", "versions"} & set(x)
    outputs = {}
    for name in per_token:
        tokens = x[name].reshape(x[name].shape[0], -1, A)
        outputs[name] = losses.reduce_to_level(tokens, params["logprob_type"])
    ndim = outputs["logprobs"].ndim
    return outputs | {
        name: losses.match_rank(y, ndim) for name, y in x.items() if name not in per_token
    }


def aggregate(weights_of):
    """An op that sums values under weights, with its gradient."""

    def op(params, x, reference):
        weights = weights_of(x.get("mask"), x, reference)
        value, gradient = jax.value_and_grad(losses.weighted_sum)(x["values"], weights)
        return {"value": value, "grad_values": gradient}

    return op


def _by_kind(kind):
    return lambda mask, x, reference: losses.aggregation_weights(
        kind, mask, x["values"].shape, reference=reference
    )


def kl_penalty(params, x, reference):
    """A KL estimate with both gradients."""

    def weighted(first, second):
        kl = losses.kl_penalty(first, second, params["type"])
        return jnp.sum(x["weights"] * kl), kl

    gradients, kl = jax.grad(weighted, argnums=(0, 1), has_aux=True)(x["logprob"], x["ref_logprob"])
    return {
        "kl": kl,
        "grad_logprob_of_weighted_sum": gradients[0],
        "grad_second_arg_of_weighted_sum": gradients[1],
    }


def action_token_logprobs_entropy(params, x, reference):
    """Log-probabilities and entropies of the action window, with gradients."""

    def outputs_of(logits):
        return rl_reference.action_log_probs(
            logits,
            x["tokens"],
            first_token=params["first_action_token"],
            end_token=params["end_action_token"],
            temperature=params.get("temperature", 1.0),
            top_k=params.get("top_k") or -1,
        )

    (log_probs, entropy), pull_back = jax.vjp(outputs_of, x["logits"])
    nothing = jnp.zeros_like(x["weights"])
    return {
        "logprobs": log_probs,
        "entropy": entropy,
        "grad_logits_of_weighted_logprobs": pull_back((x["weights"], nothing))[0],
        "grad_logits_of_weighted_entropy": pull_back((nothing, x["weights"]))[0],
    }


# Rewards.


def world_model_reward(params, x, reference):
    """Chunks of scores since a reset."""
    rewards_, success = rewards.world_model_reward(
        time_first(x["classifier_scores"]),
        coefficient=params["reward_coef"],
        use_relative=params["use_rel_reward"],
        success_threshold=params["success_threshold"],
        reference=reference,
    )
    return {"rewards": time_first(rewards_), "chunk_success": time_first(success)}


def simulator_reward(params, x, reference):
    """Steps of a simulator since a reset."""
    rewards_ = rewards.simulator_reward(
        x["terminations"].T,
        coefficient=params["reward_coef"],
        use_relative=params["use_rel_reward"],
        step_penalty=params["use_step_penalty"],
        dtype=jnp.result_type(float),
    )
    return {"rewards": rewards_.T}


def bootstrap_rewards(params, x, reference):
    """The value of the final observation, for environments that reset themselves."""
    if not params["auto_reset"]:
        return {"rewards": x["rewards"]}
    return {
        "rewards": rewards.bootstrap_rewards(
            x["rewards"],
            x["terminations"],
            x["truncations"],
            x["bootstrap_values"],
            gamma=params["gamma"],
            always=params["bootstrap_type"] != "standard",
        )
    }


# Optimiser.


def lr_schedule(params, x, reference):
    """The rate in force in each iteration."""
    cfg = optim.OptimizerConfig(
        lr=params["lr"],
        schedule=params["scheduler"],
        warmup_iterations=params.get("warmup_steps", 0),
        warmup_ratio=params.get("warmup_ratio", 0.0),
        total_iterations=params.get("total_steps", 0),
        min_lr=params.get("min_lr") or 0.0,
        min_lr_rate=params.get("min_lr_rate"),
        num_cycles=params.get("num_cycles", 0.5),
    )
    return {"lr": cfg.lr * optim.learning_rate_factor(cfg, x["step"])}


def global_norm_clip(params, x, reference):
    """Clipping over a whole tree."""
    clipped, norm = optim.clip_by_global_norm(x, params["clip_grad"])
    outputs = {name.replace("g", "clipped", 1): g for name, g in clipped.items()}
    return outputs | {"grad_norm": norm}


# End to end.


def recording_optimizer():
    """An optimiser that changes nothing and keeps the sum of all gradients."""

    def update_(gradients, total, params=None):
        return jax.tree.map(jnp.zeros_like, gradients), jax.tree.map(jnp.add, total, gradients)

    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), update_
    )


def rollout_to_gradient(params, x, reference):
    """A rollout through advantages and update; the "policy" is a table of its outputs."""
    cfg = config(params, reference, params["adv_type"])
    algorithm = ppo if params["loss_type"] == "actor_critic" else grpo
    epochs = params["rollout_epoch"]
    batch = rollout_batch(params, x)
    B, T, K, A = batch.tokens.shape
    targets, figures = ALGORITHM[params["adv_type"]].advantages(batch, cfg)
    outputs = target_outputs(targets, figures)

    table = {
        name: merge(x[f"new_{name}"], epochs).reshape(B * T, *shape)
        for name, shape in {"logprobs": (K, A), "entropy": (K, A), "values": (-1,)}.items()
        if f"new_{name}" in x
    }

    def apply(table, obs, tokens):
        rows = {name: y[tokens[:, 0, 0]] for name, y in table.items()}
        return PolicyEvaluation(
            log_probs=rows["logprobs"],
            entropy=rows.get("entropy", jnp.zeros_like(rows["logprobs"])),
            values=rows.get("values"),
        )

    # The fixture numbers samples time first.
    order = (x["shuffle_id"] % B * T + x["shuffle_id"] // B).astype(jnp.int32)
    optimizer = recording_optimizer()
    state, log = update.run_updates(
        update.init_state(table, optimizer),
        batch,
        update.make_samples(batch, targets),
        order,
        apply=apply,
        optimizer=optimizer,
        cfg=cfg,
        loss=algorithm.loss,
    )
    num_micro = cfg.num_micro_batches
    outputs["micro_batch_losses"] = log.outputs.loss.reshape(-1) * num_micro
    outputs["metric:actor/total_loss"] = log.outputs.loss.mean()
    for name, term in log.outputs.terms.items():
        outputs[f"metric:{name}"] = term.mean() * num_micro
    for name, metric in log.outputs.metrics.items():
        outputs[f"metric:{name}"] = value_of(metric).mean()
    if log.outputs.statistics is not None:
        explained = log.outputs.statistics.explained_variance()
        outputs |= named({"critic/explained_variance": explained}, jnp.nan)

    # Every sample is in one global batch, so the summed gradient splits by membership.
    global_batches = order.reshape(-1, cfg.global_batch)
    member = jax.vmap(lambda rows: jnp.zeros(B * T).at[rows].set(1.0))(global_batches)
    for name, total in state.opt_state.items():
        slabs = member.reshape(*member.shape, *(1,) * (total.ndim - 1)) * total
        slabs = slabs.reshape(len(member), B, T, -1)
        outputs[f"grad_new_{name}_per_global_batch"] = jax.vmap(lambda s: unmerge(s, epochs))(slabs)
    return outputs


# Name -> (op, whether it is defined in float64 whatever the fixture's dtype).
OPS = {
    "gae_flat": (gae_flat, False),
    "grpo_flat": (grpo_flat, False),
    "episode_scores": (episode_scores, False),
    "embodied_advantages": (embodied_advantages, False),
    "loss_mask_from_dones": (loss_mask_from_dones, False),
    "reward_filter": (reward_filter, False),
    "normalise_stats": (normalise_stats, True),
    "normalise_masked_normalization": (normalise_masked_normalization, False),
    "normalise_safe_per_rank": (normalise_safe_per_rank, False),
    "ppo_actor_loss": (ppo_actor_loss, False),
    "decoupled_ppo_actor_loss": (decoupled_ppo_actor_loss, False),
    "ppo_critic_loss": (ppo_critic_loss, False),
    "embodied_loss_entry": (embodied_loss_entry, False),
    "entropy_reduction": (entropy_reduction, False),
    "logprob_reduction": (logprob_reduction, False),
    "aggregate_masked_mean": (aggregate(_by_kind("token_mean")), False),
    "aggregate_masked_sum": (aggregate(lambda mask, x, reference: mask * 1.0), False),
    "aggregate_seq_mean_token_sum": (aggregate(_by_kind("seq_mean_token_sum")), False),
    "aggregate_seq_mean_token_mean": (aggregate(_by_kind("seq_mean_token_mean")), False),
    "aggregate_masked_mean_ratio": (
        aggregate(
            lambda mask, x, reference: losses.length_weights(
                mask, x["ratio"], x["values"].shape, reference=reference
            )
        ),
        False,
    ),
    "kl_penalty": (kl_penalty, False),
    "action_token_logprobs_entropy": (action_token_logprobs_entropy, False),
    "world_model_reward": (world_model_reward, False),
    "simulator_reward": (simulator_reward, False),
    "bootstrap_rewards": (bootstrap_rewards, False),
    "lr_schedule": (lr_schedule, True),
    "global_norm_clip": (global_norm_clip, False),
    "rollout_to_gradient": (rollout_to_gradient, False),
}
