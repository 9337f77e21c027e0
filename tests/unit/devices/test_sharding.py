import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from evac_jax.devices import sharding
from evac_jax.errors import ConfigError


def test_largest_divisible_axis_is_cut_and_small_arrays_stay_whole():
    mesh = sharding.make_mesh(1, -1, jax.devices()[:4])
    tree = {
        "kernel": jnp.zeros((302, 1024)),
        "norm_scale": jnp.zeros((2**17,)),
        "small": jnp.zeros((8, 8)),
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.tree_shardings(mesh, tree))
    assert specs["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["norm_scale"] == PartitionSpec()
    assert specs["small"] == PartitionSpec()


def test_batches_are_cut_over_all_devices():
    mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
    batch = jax.device_put(jnp.arange(8), sharding.batch_sharding(mesh))
    assert len({str(shard.index) for shard in batch.addressable_shards}) == 4


def test_impossible_mesh_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"number of devices \(4\), got 3 x 1"):
        sharding.make_mesh(3, -1, jax.devices()[:4])


def test_parts_that_lie_on_different_devices_are_joined_in_order():
    devices = jax.devices()
    mesh = sharding.make_mesh(2, 1, devices[:2])
    parts = [jax.device_put(jnp.full((2, 3), n), devices[d]) for n, d in enumerate((0, 3, 1))]
    batch = sharding.joined(mesh, parts)
    assert batch.sharding == sharding.batch_sharding(mesh)
    assert batch[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert sharding.joined(mesh, parts[1:2]) is parts[1]
