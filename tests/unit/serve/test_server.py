"""The server with policies that are made up; real sockets, real clients."""

import asyncio
import contextlib
import http.client
import os
import socket
import threading
import time

import numpy as np
import pytest
from absl import logging
from websockets.exceptions import ConnectionClosed, InvalidStatus

from benchmarks.policy_client import Client, encoded
from evac_jax.config.schema import ServeConfig
from evac_jax.serve.server import FAILED, PolicyServer

LONG_S = 30.0


def observation(value: int = 0) -> dict:
    return {"observation/image": np.full((2, 2, 3), value, np.uint8), "prompt": "go"}


def brightness(frames, prompt):
    """A policy whose actions say what it saw."""
    return np.full((2, 7), frames.max(), np.float32)


class Slow:
    """A policy that decides when it is told to, and counts."""

    def __init__(self):
        self.go, self.began = threading.Event(), threading.Event()
        self.seen, self._busy = [], threading.Lock()

    def __call__(self, frames, prompt):
        assert self._busy.acquire(blocking=False), "two decisions at once"
        self.seen.append(int(frames.max()))
        self.began.set()
        assert self.go.wait(LONG_S)
        self._busy.release()
        return brightness(frames, prompt)


@contextlib.contextmanager
def running(decide, **changes):
    """Yield the port of a server; it must end when it is told to."""
    settings = ServeConfig(**({"image_sizes": ("2x2",)} | changes))
    listener = socket.create_server(("127.0.0.1", 0))
    started, box = threading.Event(), []

    async def main():
        stop = asyncio.Event()
        box.extend((asyncio.get_running_loop(), stop))
        started.set()
        server = PolicyServer(decide, {"action_chunk": 2}, settings)
        await server.serve(listener, stop)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    started.wait()
    try:
        yield listener.getsockname()[1]
    finally:
        loop, stop = box
        loop.call_soon_threadsafe(stop.set)
        thread.join(LONG_S)
        assert not thread.is_alive()


def eventually(condition) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def arrived(port: int) -> Client | None:
    """Return a client of the server, None while all places are taken."""
    with contextlib.suppress(ConnectionClosed):
        return Client(port)
    return None


def health(port: int) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONG_S)
    with contextlib.closing(connection):
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_metadata_comes_first_and_every_observation_gets_actions_and_times():
    with running(brightness) as port:
        client = Client(port)
        assert client.metadata == {"action_chunk": 2}
        for value in (3, 200):
            answer = client.infer(observation(value))
            np.testing.assert_array_equal(answer["actions"], np.full((2, 7), value, np.float32))
            assert answer["actions"].dtype == np.float32
            timing = answer["server_timing"]
            assert 0 <= timing["wait_ms"] <= timing["infer_ms"]
            assert 0 <= answer["policy_timing"]["infer_ms"] <= timing["infer_ms"]


def test_connection_goes_on_when_input_is_bad():
    with running(brightness) as port:
        client = Client(port)
        rng = np.random.default_rng(0)
        bad = ["text", b"", b"\xc1", encoded({}), encoded(observation() | {"prompt": 5})]
        for message in (*bad, *(rng.bytes(int(n)) for n in rng.integers(1, 400, 20))):
            with pytest.raises(RuntimeError, match="expected") as error:
                client.exchange(message)
            assert "Traceback" not in str(error.value)
            assert "\n" not in str(error.value)
        assert client.infer(observation(7))["actions"].max() == 7


def test_client_is_cut_off_when_its_message_is_too_large_and_others_go_on():
    with running(brightness, max_message_mb=0.001) as port:
        large, small = Client(port), Client(port)
        with pytest.raises(ConnectionClosed, match="1009"):
            large.exchange(bytes(2000))
        assert small.infer(observation(7))["actions"].max() == 7


def test_slow_decision_blocks_no_handshake_no_health_and_no_refusal():
    slow = Slow()
    with running(slow) as port:
        first = Client(port)
        first.send(encoded(observation(1)))
        assert slow.began.wait(LONG_S)
        assert health(port) == (200, b"OK\n")
        second = Client(port)
        assert second.metadata == {"action_chunk": 2}
        with pytest.raises(RuntimeError, match="expected an observation in msgpack"):
            second.exchange(b"\xc1")
        slow.go.set()
        assert first.receive()
        assert second.infer(observation(2))["actions"].max() == 2


def test_clients_take_turns_when_they_ask_at_once():
    slow = Slow()
    with running(slow) as port:
        clients = [Client(port) for _ in range(3)]
        for value, client in enumerate(clients):
            client.send(encoded(observation(value)))
        assert slow.began.wait(LONG_S)
        slow.go.set()
        for client in clients:
            client.receive()
        assert sorted(slow.seen) == [0, 1, 2]


@pytest.mark.parametrize("waits", [True, False], ids=["in the queue", "while it is decided"])
def test_client_that_vanishes_frees_its_place(waits):
    slow = Slow()
    with running(slow, max_clients=2) as port:
        first, second = Client(port), Client(port)
        first.send(encoded(observation(1)))
        assert slow.began.wait(LONG_S)
        second.send(encoded(observation(2)))
        (second if waits else first).vanish()
        third = []
        eventually(lambda: third.append(arrived(port)) or third[-1])
        slow.go.set()
        assert third[-1].infer(observation(3))["actions"].max() == 3
        assert slow.seen == ([1, 3] if waits else [1, 2, 3])


def test_client_is_told_when_all_places_are_taken():
    with running(brightness, max_clients=1) as port:
        first = Client(port)
        with pytest.raises(ConnectionClosed, match=r"1013.*all 1 places are taken"):
            Client(port)
        assert health(port)[0] == 200
        assert first.infer(observation(7))["actions"].max() == 7
        first.close()
        eventually(lambda: arrived(port))


def test_client_that_stays_silent_is_ended():
    upgrade = (
        "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n\r\n"
    )
    with (
        running(brightness, client_timeout_s=0.2) as port,
        socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as silent,
    ):
        silent.sendall(upgrade.encode())
        while silent.recv(4096):  # the server's pings are never answered
            pass


def test_client_gets_one_sentence_and_the_log_the_traceback_when_a_decision_fails(monkeypatch):
    logged = []
    monkeypatch.setattr(logging, "exception", lambda *words: logged.append(words))

    def fails(frames, prompt):
        if frames.max() == 1:
            raise ZeroDivisionError("secret")
        return brightness(frames, prompt)

    with running(fails) as port:
        client = Client(port)
        with pytest.raises(RuntimeError) as error:
            client.infer(observation(1))
        assert str(error.value) == FAILED
        assert len(logged) == 1
        assert client.infer(observation(7))["actions"].max() == 7


def test_web_page_cannot_connect():
    with running(brightness) as port, pytest.raises(InvalidStatus, match="403"):
        Client(port, origin="http://example.com")


def test_connections_end_when_the_server_stops_and_no_decision_is_waited_for():
    slow = Slow()
    with running(slow) as port:
        client = Client(port)
        client.send(encoded(observation()))
        assert slow.began.wait(LONG_S)
    with pytest.raises(ConnectionClosed, match="1001"):
        client.receive()
    slow.go.set()


def test_no_descriptor_is_left_when_clients_come_and_vanish():
    with running(brightness) as port:
        Client(port).close()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            client = Client(port)
            client.infer(observation())
            client.vanish()
            client.close()
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)
