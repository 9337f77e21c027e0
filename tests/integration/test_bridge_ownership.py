"""Frames through a real simulator process: zero copies, and never a slot written while owned."""

import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evac_jax.bridge.client import SimulatorClient, SlotOwnershipError
from evac_jax.bridge.types import IDLE, KEYFRAMES
from tests.integration.fake_env import frame_value

SPEC = {"environment": "tests.integration.fake_env:make", "config": {"num_envs": 4}}
STARTS = np.array([1, 2, 3, 4])
ACTIONS = np.zeros((4, 2, 7), np.float32)


@pytest.fixture(scope="module")
def client():
    with SimulatorClient(SPEC, num_slots=3, timeout_s=30, start_timeout_s=120) as client:
        yield client


def _expected(seed, steps):
    return [frame_value(env, int(start), seed, steps) for env, start in enumerate(STARTS)]


def _check(frames, seed, steps):
    values = np.array(frames)
    np.testing.assert_array_equal(values.min(axis=(1, 2, 3, 4)), _expected(seed, steps))
    np.testing.assert_array_equal(values.max(axis=(1, 2, 3, 4)), _expected(seed, steps))


def test_frames_are_the_slot_when_exchanged(client):
    exchange = client.reset(STARTS, 5)
    address = client.slots.frames(exchange.slot).ctypes.data
    assert exchange.frames.unsafe_buffer_pointer() == address
    assert exchange.frames.shape == (4, 1, 64, 64, 3)
    assert exchange.frames.dtype == jnp.uint8
    _check(exchange.frames, 5, 0)
    assert exchange.clip.shape == (1, 2, 1, 64, 64, 3)
    np.testing.assert_array_equal(exchange.result.task, STARTS % 2)
    exchange.release()


def test_async_result_is_right_when_the_simulator_steps_on(client):
    @jax.jit
    def slow(frames):
        x = frames.astype(jnp.float32).reshape(4, -1)
        busy = jax.lax.fori_loop(0, 1500, lambda _, m: jnp.tanh(m @ m.T @ m), x[:, :512])
        return x.mean(axis=1) + 0 * busy.sum()

    slow(jnp.zeros((4, 1, 64, 64, 3), jnp.uint8)).block_until_ready()
    client.reset(STARTS, 2).release()
    results = []
    for _ in range(6):
        exchange = client.step(ACTIONS)
        results.append(slow(exchange.frames))
        exchange.release()
    for steps, means in enumerate(results, start=1):
        np.testing.assert_allclose(means, _expected(2, steps), atol=0.01)


def test_owned_slots_never_change_when_calls_interleave_at_random(client):
    rng = random.Random(0)
    client.reset(STARTS, 9).release()
    sent = received = 0
    held = {}
    for _ in range(300):
        action = rng.choice(["send", "send", "receive", "release", "own"])
        busy = len(held) + sent - received
        if action == "send":
            if busy < 3:
                client.send_step(ACTIONS)
                sent += 1
            else:
                with pytest.raises(SlotOwnershipError, match="expected a free slot"):
                    client.send_step(ACTIONS)
        elif action == "receive" and sent > received:
            received += 1
            held[received] = client.receive()
        elif held:
            steps = rng.choice(list(held))
            exchange = held.pop(steps)
            if action == "own":
                _check(exchange.owned(), 9, steps)
            else:
                exchange.release()
        for steps, exchange in held.items():
            _check(exchange.frames, 9, steps)
    while sent > received:
        received += 1
        client.receive().release()
    for exchange in held.values():
        exchange.release()
    assert sent > 40


def test_send_names_the_holders_when_no_slot_is_free(client):
    held = [client.reset(STARTS, 0), client.step(ACTIONS)]
    client.send_step(ACTIONS)
    message = rf"slot {held[0].slot} holds the answer to request {held[0].request} \(reset\)"
    with pytest.raises(SlotOwnershipError, match=message):
        client.send_step(ACTIONS)
    client.receive().release()
    with pytest.raises(SlotOwnershipError, match="no request is waiting"):
        client.receive()
    for exchange in held:
        exchange.release()


def test_send_raises_when_arguments_do_not_fit(client):
    with pytest.raises(ValueError, match=r"starts: expected shape \(4,\)"):
        client.send_reset(np.zeros(3), 0)
    with pytest.raises(ValueError, match=r"-1 .idle. to 9, .* got 1 others, the first 10$"):
        client.send_reset(np.array([0, 1, 2, 10]), 0)
    with pytest.raises(ValueError, match=rf"2 keyframes .* the first {KEYFRAMES + 2}$"):
        client.send_reset(np.array([0, IDLE, KEYFRAMES + 1, KEYFRAMES + 2]), 0)
    with pytest.raises(ValueError, match="seed: expected an integer of 64 bits"):
        client.send_reset(STARTS, 2**63)
    with pytest.raises(ValueError, match=r"actions: expected shape \(4, 2, 7\)"):
        client.send_step(np.zeros((4, 3, 7)))
    with pytest.raises(ValueError, match="finite"):
        client.send_step(np.full((4, 2, 7), np.nan))


def test_keyframes_cross_the_bridge_like_other_starts(client):
    starts = np.array([9, KEYFRAMES, KEYFRAMES + 1, 0])
    exchange = client.reset(starts, seed=3)
    grey = [frame_value(env, int(start), 3, 0) for env, start in enumerate(starts)]
    np.testing.assert_array_equal(np.asarray(exchange.frames)[:, 0, 0, 0, 0], grey)
    exchange.release()


def test_nothing_is_left_when_clients_come_and_go(client):
    del client  # the shared one stays open meanwhile

    def open_things():
        return len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))

    before = open_things()
    killed = SimulatorClient(SPEC, start_timeout_s=120)
    frames = killed.reset(STARTS, 1).frames
    os.kill(killed.pid, 9)
    killed.close()
    _check(frames, 1, 0)  # the trainer's memory outlives both
    del frames, killed
    unwanted = SimulatorClient(SPEC)
    unwanted.close()  # while it still loads
    assert open_things() == before
