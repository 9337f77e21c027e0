"""Operations that have a separate implementation for CPUs: products, activations, attention.

Both implementations give the same numbers up to rounding; `by_platform` chooses between them.
docs/policy_speed.md says what each gains. The rest of this folder is the same on all devices.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from policies import activations


def by_platform(*args, cpu: Callable, default: Callable):
    """Return `cpu(*args)` if the result is computed on a CPU, else `default(*args)`.

    If the trainer has set a mesh (`policies/activations.py`), its platform decides, and only one of
    the two is traced. Without a mesh, and in a backward pass, both are traced, and the platform for
    which the program is lowered decides. That is right even if another machine runs the program.
    """
    platform = activations.platform()
    if platform is None:
        return jax.lax.platform_dependent(*args, cpu=cpu, default=default)
    return (cpu if platform == "cpu" else default)(*args)


def matmul(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """Return x @ kernel.

    On a CPU, x is first reshaped to a matrix. With more axes, XLA makes transposed copies of x and
    of its gradient before the backward pass multiplies them. For matrices it needs no such copies.
    """
    return by_platform(x, kernel, cpu=_matmul_on_cpu, default=jnp.matmul)


def _matmul_on_cpu(x, kernel):
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B L"], dtype) -> Float[Array, "B L D"]:
    """Return the rows `tokens` of `table` in `dtype`; tokens are 0 .. V - 1.

    Elsewhere than on a CPU it is the product with one-hot rows, which is exact and a thousandth of
    the policy's work. Of a table that is cut over devices XLA gathers the rounded weights for it.
    For indexed rows it would gather the table in float32, twice in every micro-batch.
    """
    return by_platform(
        table,
        tokens,
        cpu=lambda table, tokens: jnp.take(table, tokens, axis=0, mode="clip").astype(dtype),
        default=lambda table, tokens: jnp.matmul(
            jax.nn.one_hot(tokens, len(table), dtype=dtype),
            table.astype(dtype),
            precision=jax.lax.Precision.HIGHEST,  # in float32 an accelerator would round
        ),
    )


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Exact (erf) GELU, computed in float32 as in torch.

    Like `swiglu` it keeps only its input for the backward pass: to write and read an intermediate
    result of an MLP takes longer than to compute it again. XLA for CPUs would merge equal
    expressions and so keep the result. Therefore the backward pass on a CPU uses another form.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 * (1 + jax.lax.erf(wide * 0.5**0.5)))).astype(x.dtype)


def _gelu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    probability = by_platform(
        wide,
        cpu=lambda x: 0.5 * (1 - jax.lax.erf(x * -(0.5**0.5))),
        default=lambda x: 0.5 * (1 + jax.lax.erf(x * 0.5**0.5)),
    )
    density = jnp.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    return ((gradient * (probability + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """SiLU of the gate times the other half; both have the same shape."""
    return jax.nn.silu(gate) * up


def _sigmoid_on_cpu(x):
    grown = jnp.exp(jnp.minimum(x, 80.0))  # finite
    return grown / (1 + grown)


def _swiglu_backward(saved, gradient):
    gate, up = saved
    wide, gradient = gate.astype(jnp.float32), gradient.astype(jnp.float32)
    sigmoid = by_platform(wide, cpu=_sigmoid_on_cpu, default=jax.nn.sigmoid)
    silu = wide * sigmoid
    of_gate = gradient * up * (sigmoid + silu * (1 - sigmoid))
    return of_gate.astype(gate.dtype), (gradient * silu).astype(up.dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def attend(
    queries: Float[Array, "B S Q D"],
    keys: Float[Array, "B T G D"],
    values: Float[Array, "B T G D"],
    mask: Bool[Array, "B 1 1 T"] | None = None,
) -> Float[Array, "B S Q D"]:
    """Return attention with scale 1/sqrt(D), by head on a CPU and by XLA elsewhere."""
    return by_platform(
        queries,
        keys,
        values,
        mask,
        cpu=attend_on_cpu,
        default=lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m),
    )


def attend_fused(
    queries: Float[Array, "B S Q D"],
    keys: Float[Array, "B T G D"],
    values: Float[Array, "B T G D"],
    seen: Int[Array, " B"] | None = None,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B S Q D"]:
    """Attention in one kernel of cuDNN, forward and backward; no scores are held in memory.

    For the backward pass JAX 0.10.2 refuses odd lengths. They get one more position, which no query
    sees. Lengths instead of a mask: for a mask cuDNN would also compute a gradient.

    Args:
        seen: how many of the first keys of each row are seen; None = all.
        implementation: of `jax.nn.dot_product_attention`; "xla" gives the same numbers anywhere.
    """
    length, asked = queries.shape[1], None
    if seen is None and keys.shape[1] % 2:
        seen = _repeated(keys.shape[1], keys)
    queries, keys, values = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (queries, keys, values)
    )
    if seen is not None:
        asked = _repeated(queries.shape[1], queries)
    attended = jax.nn.dot_product_attention(
        *(queries, keys, values),
        query_seq_lengths=asked,
        key_value_seq_lengths=seen,
        implementation=implementation,
    )
    return attended[:, :length]


def _repeated(length: int, like: Float[Array, "B S Q D"]) -> Int[Array, " B"]:
    """Return `length` for every row, as an array that `jax.vmap` batches with `like`.

    JAX 0.10.2 cannot batch fused attention with lengths that are the same for the whole batch.
    """
    return jnp.where(jnp.isnan(like[:, 0, 0, 0]), length, length).astype(jnp.int32)


def attend_on_cpu(
    queries: Float[Array, "B S Q D"],
    keys: Float[Array, "B T G D"],
    values: Float[Array, "B T G D"],
    mask: Bool[Array, "B 1 1 T"] | None,
) -> Float[Array, "B S Q D"]:
    """`jax.nn.dot_product_attention` for a CPU.

    Heads are computed one after another, so only the scores of one head are in memory. The scores
    of all heads take tens of megabytes per layer: they do not stay in the cache between operations,
    and the system must clear their pages first. The loop is over heads and not over the batch,
    because the batch is sharded over devices. The head axis is placed before the positions, so that
    XLA's products read contiguous rows. The backward pass computes the scores again, as in
    FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
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
        of_scores = jnp.where(mask, of_scores, 0)  # fully masked rows have nonzero weights too
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
