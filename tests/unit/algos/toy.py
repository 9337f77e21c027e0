"""A linear policy over a few pixels: the smallest thing that `algos.update` can train."""

from functools import partial

import jax
import jax.numpy as jnp

from algos.types import RolloutBatch
from policies.types import ObsBatch, PolicyEvaluation

B, T, K, A, BINS = 8, 2, 2, 3, 5


@partial(jax.jit, static_argnames=("with_value", "scale"))
def params(with_value=False, scale=0.3, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    tree = {"head": {"kernel": scale * jax.random.normal(keys[0], (12, K * A * BINS))}}
    if with_value:
        tree["value_head"] = {"kernel": scale * jax.random.normal(keys[1], (12, 1))}
    return tree


def apply(params, obs: ObsBatch, tokens) -> PolicyEvaluation:
    pixels = obs.images.reshape(obs.images.shape[0], -1) / 255.0
    logits = (pixels @ params["head"]["kernel"]).reshape(-1, K, A, BINS)
    all_log_probs = jax.nn.log_softmax(logits)
    values = pixels @ params["value_head"]["kernel"] if "value_head" in params else None
    return PolicyEvaluation(
        log_probs=jnp.take_along_axis(all_log_probs, tokens[..., None], -1)[..., 0],
        entropy=-jnp.sum(jnp.exp(all_log_probs) * all_log_probs, -1),
        values=values,
    )


@partial(jax.jit, static_argnames="on_policy")
def rollout(policy_params, seed=0, rewards=None, on_policy=True) -> RolloutBatch:
    keys = jax.random.split(jax.random.key(seed), 6)
    images = jax.random.randint(keys[0], (B, T, 1, 2, 2, 3), 0, 256).astype(jnp.uint8)
    tokens = jax.random.randint(keys[1], (B, T, K, A), 0, BINS)
    flat = ObsBatch(
        images=images.reshape(B * T, 1, 2, 2, 3),
        prompt_tokens=jnp.zeros((B * T, 1), jnp.int32),
        prompt_mask=jnp.ones((B * T, 1), bool),
    )
    seen = apply(policy_params, flat, tokens.reshape(B * T, K, A))
    log_probs = seen.log_probs.reshape(tokens.shape)
    if not on_policy:
        log_probs = log_probs + 0.3 * jax.random.normal(keys[2], log_probs.shape)
    values = None
    if seen.values is not None:
        estimates = seen.values.reshape(B, T, 1)
        values = jnp.concatenate([estimates, jnp.zeros((B, 1, 1))], axis=1)
    if rewards is None:
        rewards = jax.random.bernoulli(keys[3], 0.3, (B, T, K)) * 1.0
    terminated = jnp.zeros((B, T, K), bool).at[::3, 0, K - 1].set(True)
    truncated = jnp.zeros((B, T, K), bool).at[:, T - 1, K - 1].set(True)
    return RolloutBatch(
        images=images,
        prompt_tokens=jnp.zeros((B, 1), jnp.int32),
        prompt_mask=jnp.ones((B, 1), bool),
        tokens=tokens,
        log_probs=log_probs,
        values=values,
        rewards=rewards,
        terminated=terminated,
        truncated=truncated,
    )
