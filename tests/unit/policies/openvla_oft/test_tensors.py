import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evac_jax.devices import sharding
from policies.openvla_oft import tensors


@pytest.mark.parametrize("streamed", [False, True])
def test_one_layer_comes_back_when_it_is_fetched(monkeypatch, streamed):
    monkeypatch.setattr(tensors, "STREAMED_BYTES", 1 if streamed else 2**40)
    stack = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    array = tensors.place(iter(stack), stack.shape, jnp.float32, None, stacked=True)
    for layer in range(3):
        np.testing.assert_array_equal(tensors.fetch(array, layer), stack[layer])
    np.testing.assert_array_equal(tensors.fetch(array), stack)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 6), (8, 2, 6), (3, 5, 7)])
def test_stack_is_cut_over_devices_as_its_sharding_says(monkeypatch, streamed, shape):
    monkeypatch.setattr(tensors, "STREAMED_BYTES", 1 if streamed else 2**40)
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
    wanted = sharding.leaf_sharding(mesh, "llama/layers/q_proj/kernel", shape)
    stack = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    array = tensors.place(iter(stack), shape, jnp.float32, wanted, stacked=True)
    assert array.sharding == wanted
    np.testing.assert_array_equal(np.asarray(array), stack)
    for layer in range(shape[0]):
        np.testing.assert_array_equal(tensors.fetch(array, layer), stack[layer])
