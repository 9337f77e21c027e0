"""The least client that speaks the protocol of openpi's; for the benchmark and the tests.

It writes the messages by itself, so that a mistake of `evac_jax.serve.wire` would show.
"""

import socket
from typing import Any

import msgpack
import numpy as np
from websockets.sync.client import connect

PATIENCE_S = 120.0


def encoded(message: dict[str, Any]) -> bytes:
    """Return a message as openpi's client packs it."""

    def array(value: np.ndarray) -> dict:
        data, dtype = value.tobytes(), value.dtype.str
        return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": value.shape}

    return msgpack.packb(message, default=array)


def decoded(data: bytes) -> dict[str, Any]:
    """Return a message as openpi's client reads it."""

    def array(entry: dict) -> Any:
        if b"__ndarray__" not in entry:
            return entry
        dtype = np.dtype(entry[b"dtype"])
        return np.ndarray(buffer=entry[b"data"], dtype=dtype, shape=entry[b"shape"])

    return msgpack.unpackb(data, object_hook=array)


class Client:
    """A connection to a policy server on this machine.

    Attributes:
        metadata: the server's first message.
    """

    def __init__(self, port: int, **options: Any):
        self._socket = connect(
            f"ws://127.0.0.1:{port}",
            compression=None,
            max_size=None,
            proxy=None,
            legacy=True,
            **options,
        )
        self.metadata = decoded(self._socket.recv(PATIENCE_S))

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to an observation.

        Raises:
            RuntimeError: the server answered with an error; its text.
        """
        return self.exchange(encoded(observation))

    def exchange(self, message: bytes | str) -> dict[str, Any]:
        """Send any message and return its answer; see `infer`."""
        self.send(message)
        return self.receive()

    def send(self, message: bytes | str) -> None:
        """Send without waiting for the answer."""
        self._socket.send(message)

    def receive(self) -> dict[str, Any]:
        """Return the next answer; see `infer`."""
        answer = self._socket.recv(PATIENCE_S)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return decoded(answer)

    def vanish(self) -> None:
        """End the connection without a word, as a machine does that loses power."""
        self._socket.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say goodbye."""
        self._socket.close()
