"""Moves tensors between host and sharded arrays, one layer of a stacked parameter at a time."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

# Smaller stacks are moved whole: compiling a program per shape costs more than the memory is worth.
STREAMED_BYTES = 2**26

# (path such as "llama/layers/q_proj/kernel", shape) -> sharding of the parameter.
Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def place(
    tensors: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding | None,
    *,
    stacked: bool,
) -> jax.Array:
    """Cast tensors and place them on their shards as one array.

    The host holds one tensor and its cast at a time; large stacks are filled on the devices. All
    processes of a cluster must place the same tensors in the same order.

    Args:
        tensors: one tensor, or the layers of a stack; each is read when it is needed.
        shape: of the whole array.
        sharding: None = the default device.
        stacked: whether the tensors are stacked along a leading axis.
    """
    if stacked and _streams(shape, dtype, sharding):
        array = _zeros(shape, dtype, sharding)()
        for index, tensor in enumerate(tensors):
            layer = _put(np.ascontiguousarray(tensor, dtype)[None], sharding)
            array = _writer(sharding)(array, layer, index)
            # Wait for each layer: otherwise queued layers would fill the host with the whole stack.
            array.block_until_ready()
        return array
    whole = np.empty(shape, dtype)
    for index, tensor in enumerate(tensors):
        whole[index if stacked else ...] = tensor
    return _put(whole, sharding)


def fetch(array: jax.Array, index: int | None = None) -> np.ndarray:
    """Return an array, or one entry of its first axis, on the host.

    JAX caches the host copy of an array that is fetched whole, but not the layers of large stacks.
    """
    if index is None:
        return np.asarray(array)
    if array.nbytes < STREAMED_BYTES:
        return np.asarray(array)[index]
    return np.asarray(_layer(array, index))


def _streams(shape: tuple[int, ...], dtype: jnp.dtype, sharding) -> bool:
    large = np.prod(shape, dtype=np.int64) * jnp.dtype(dtype).itemsize >= STREAMED_BYTES
    return bool(large) and (sharding is None or sharding.shard_shape(shape)[0] == shape[0])


def _put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    # Unlike device_put it does not compare the array between the processes of a cluster.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@functools.cache
def _zeros(shape, dtype, sharding):
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.cache
def _writer(sharding):
    def write(array, layer, index):
        return jax.lax.dynamic_update_slice_in_dim(array, layer, index, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


@jax.jit
def _layer(array, index):
    return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)
