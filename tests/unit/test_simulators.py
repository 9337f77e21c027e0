import jax
import jax.numpy as jnp
import numpy as np

from evac_jax import simulators
from evac_jax.devices import sharding


def test_frames_of_processes_on_different_devices_are_joined_in_order():
    devices = jax.local_devices()
    place = sharding.batch_sharding(sharding.make_mesh(2, 1))
    parts = [
        jax.device_put(jnp.full((2, 1, 4, 4, 3), n, jnp.uint8), devices[d])
        for n, d in enumerate((0, 3, 1))
    ]
    frames = simulators._joined(parts, place)
    assert frames.sharding == place
    np.testing.assert_array_equal(np.asarray(frames)[:, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2])


def test_frames_of_one_process_are_not_touched():
    frames = jnp.zeros((2, 1, 4, 4, 3), jnp.uint8)
    assert simulators._joined([frames], sharding.batch_sharding(sharding.make_mesh(1, 1))) is frames
