"""Attention on a CPU: one head after the other, forwards and backwards.

With all heads at once the scores of a layer are tens of megabytes, which leave the cache between
operations and whose pages the system clears first. It is heads, as devices share the batch.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def attend_on_cpu(
    queries: Float[Array, "B S Q D"],
    keys: Float[Array, "B T G D"],
    values: Float[Array, "B T G D"],
    mask: Bool[Array, "B 1 1 T"] | None,
) -> Float[Array, "B S Q D"]:
    """`jax.nn.dot_product_attention`, made for a CPU.

    One head after the other, so that the scores of one head are the only ones in memory, and
    heads before positions, so that XLA's products read rows. The backward pass computes the scores
    again, as FlashAttention does (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
    """
    groups = queries.shape[2] // keys.shape[2]
    queries, keys, values = (jnp.moveaxis(x, 2, 0) for x in (queries, keys, values))
    if groups > 1:
        keys, values = (jnp.repeat(x, groups, axis=0) for x in (keys, values))
    if mask is None:
        mask = jnp.ones((keys.shape[1], 1, 1, keys.shape[2]), bool)
    return jnp.moveaxis(_attend_by_head(queries, keys, values, mask[:, 0]), 0, 2)


def _scores(queries, keys, mask):
    """[B S T] of one head, float32."""
    scaled = queries * np.asarray(queries.shape[-1] ** -0.5, queries.dtype)
    scores = jnp.einsum("bsd,btd->bst", scaled, keys, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


@jax.custom_vjp
def _attend_by_head(
    queries: Float[Array, "H B S D"],
    keys: Float[Array, "H B T D"],
    values: Float[Array, "H B T D"],
    mask: Bool[Array, "B 1 T"],
) -> Float[Array, "H B S D"]:
    return _attend_forward(queries, keys, values, mask)[0]


def _attend_forward(queries, keys, values, mask):
    def head(parts):
        queries, keys, values = parts
        scores = _scores(queries, keys, mask)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        attended = jnp.einsum(
            "bst,btd->bsd",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return (attended / total).astype(values.dtype), top, total

    attended, top, total = jax.lax.map(head, (queries, keys, values))
    return attended, (queries, keys, values, mask, attended, top, total)


def _attend_backward(saved, gradient):
    queries, keys, values, mask, attended, top, total = saved

    def head(parts):
        queries, keys, values, attended, top, total, gradient = parts
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        weights = jnp.exp(_scores(queries, keys, mask) - top) / total
        through = jnp.sum((gradient * attended).astype(jnp.float32), axis=-1, keepdims=True)
        of_scores = weights * (product("bsd,btd->bst", gradient, values) - through)
        of_scores = jnp.where(mask, of_scores, 0)  # a row that sees nothing has weights, too
        of_scores = (of_scores * queries.shape[-1] ** -0.5).astype(queries.dtype)
        weights = weights.astype(values.dtype)
        return (
            product("bst,btd->bsd", of_scores, keys).astype(queries.dtype),
            product("bst,bsd->btd", of_scores, queries).astype(keys.dtype),
            product("bst,bsd->btd", weights, gradient).astype(values.dtype),
        )

    parts = (queries, keys, values, attended, top, total, gradient)
    return (*jax.lax.map(head, parts), None)


_attend_by_head.defvjp(_attend_forward, _attend_backward)
