import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evac_jax.bridge import exchange as exchange_module
from evac_jax.bridge.exchange import Exchange, SlotOwnershipError, shard_frames

SIZE = 8 * 64 * 64 * 3


class _Slot:
    """Memory with the alignment of a slot, and a note of when it came back."""

    def __init__(self):
        raw = np.zeros(SIZE + 64, np.uint8)
        start = -raw.ctypes.data % 64
        self.memory = raw[start : start + SIZE]
        self.returned = 0

    def lend(self, sharding=None):
        view = np.frombuffer(self.memory, np.uint8).reshape(8, 1, 64, 64, 3)
        exchange = Exchange(
            view,
            lambda: self.memory[:6],
            slot=0,
            request=1,
            give_back=self._count,
            sharding=sharding,
        )
        return exchange.arrive(None)

    def _count(self):
        self.returned += 1


def _slow_sum(steps):
    @jax.jit
    def run(frames):
        x = frames.astype(jnp.float32)
        matrix = x.reshape(8, -1)[:, :512]
        busy = jax.lax.fori_loop(0, steps, lambda _, m: jnp.tanh(m @ m.T @ m), matrix)
        return x.sum() + 0 * busy.sum()

    return run


def test_frames_alias_the_slot_when_on_the_cpu():
    slot = _Slot()
    exchange = slot.lend()
    assert exchange.frames.unsafe_buffer_pointer() == slot.memory.ctypes.data
    assert exchange.frames.shape == (8, 1, 64, 64, 3)
    exchange.release()
    assert slot.returned == 1


def test_slot_comes_back_only_when_unnamed_computation_is_done():
    slot = _Slot()
    run = _slow_sum(2000)
    run(jnp.zeros((8, 1, 64, 64, 3), jnp.uint8)).block_until_ready()
    slot.memory[:] = 2
    exchange = slot.lend()
    total = run(exchange.frames)
    exchange.release()  # says nothing of `total`
    slot.memory[:] = 200
    assert float(total) == 2 * SIZE


def test_reading_raises_when_released():
    exchange = _Slot().lend()
    frames = exchange.frames
    exchange.release()
    with pytest.raises(SlotOwnershipError, match="frames of request 1 used after release"):
        _ = exchange.frames
    with pytest.raises(SlotOwnershipError, match="clip of request 1 used after release"):
        _ = exchange.clip
    with pytest.raises(RuntimeError, match="deleted"):
        frames.sum()


def test_slot_comes_back_once_when_released_twice():
    slot = _Slot()
    exchange = slot.lend()
    exchange.release()
    exchange.release()
    assert slot.returned == 1


def test_clip_is_a_copy_when_read_before_release():
    slot = _Slot()
    exchange = slot.lend()
    clip = exchange.clip
    exchange.release()
    slot.memory[:] = 9
    assert (exchange.clip == 0).all()
    assert exchange.clip is clip


def test_owned_frames_keep_their_values_when_the_slot_is_rewritten():
    slot = _Slot()
    slot.memory[:] = 3
    exchange = slot.lend()
    copy = exchange.owned()
    assert slot.returned == 1
    slot.memory[:] = 4
    assert (np.asarray(copy) == 3).all()


def test_release_raises_when_a_numpy_view_is_alive(monkeypatch):
    monkeypatch.setattr(exchange_module, "RELEASE_TIMEOUT_S", 0.05)
    slot = _Slot()
    exchange = slot.lend()
    view = np.asarray(exchange.frames)
    with pytest.raises(SlotOwnershipError, match="NumPy view"):
        exchange.release()
    assert slot.returned == 0
    assert view.sum() == 0
    del view
    exchange.release()
    assert slot.returned == 1


def test_each_device_reads_its_part_when_frames_are_sharded():
    devices = jax.devices()[:4] if len(jax.devices()) >= 4 else jax.devices()[:1]
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    slot = _Slot()
    slot.memory[:] = np.arange(SIZE) % 251
    exchange = slot.lend(sharding)
    frames = exchange.frames
    assert frames.sharding == sharding
    offsets = sorted(
        s.data.unsafe_buffer_pointer() - slot.memory.ctypes.data for s in frames.addressable_shards
    )
    assert offsets == [i * SIZE // len(devices) for i in range(len(devices))]
    total = _slow_sum(2)(frames)
    expected = slot.memory.astype(np.float32).sum()
    copy = exchange.owned()
    assert copy.sharding == sharding
    assert slot.returned == 1
    slot.memory[:] = 0
    assert float(total) == pytest.approx(expected)
    assert np.asarray(copy).astype(np.float32).sum() == expected


def test_values_are_right_when_parts_are_not_contiguous():
    view = np.arange(64, dtype=np.uint8).reshape(8, 8)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    array = shard_frames(view[:, ::2], NamedSharding(mesh, PartitionSpec(None, "data")))
    np.testing.assert_array_equal(np.asarray(array), view[:, ::2])
