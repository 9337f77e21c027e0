"""The server: websockets in, decisions out, one at a time and off the event loop.

Protocol, as openpi's clients speak it: metadata is the server's first message; then every binary
message is an observation and gets one answer. An answer in text is an error, and the connection
goes on. `GET /healthz` on the same port is answered with 200 once requests are accepted.

Source: openpi-client 0.1.2, `WebsocketClientPolicy`. Differences from openpi's own server: messages
are bounded; a decision blocks neither other clients nor the handshake nor /healthz; after an error
the connection is kept, and the traceback stays in the log; web pages cannot connect.
"""

import asyncio
import http
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from evac_jax.config.schema import ServeConfig
from evac_jax.errors import DataError
from evac_jax.serve import observations, wire

MIB = 2**20
TRY_AGAIN_LATER = 1013  # close code, of the registry that RFC 6455 began
CLOSE_S = 5.0  # that a client gets to answer the end of its connection
FAILED = "the decision failed; the server's log says why"


class PolicyServer:
    """Answers clients with the decisions of one policy.

    Args:
        decide: (frames uint8 [V H W 3], instruction) -> actions float32 [K A]. It is called in a
            thread of its own, never twice at once. Its `DataError`s are told to the client.
        metadata: plain values; what every client is told first.
        settings: keys, sizes and limits.
    """

    def __init__(
        self,
        decide: Callable[[np.ndarray, str], np.ndarray],
        metadata: dict[str, Any],
        settings: ServeConfig,
    ):
        self._decide, self._settings = decide, settings
        self._metadata = wire.pack(metadata)
        self._clients = 0
        self._worker = ThreadPoolExecutor(1, "decide")  # its queue is first come, first served

    async def serve(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Answer clients of a bound socket until `stop` is set, then end their connections.

        A request under way then gets no answer.
        """
        settings = self._settings
        async with serve(
            self._client,
            sock=listener,
            process_request=_health,
            origins=[None],  # a browser names one: no web page may reach a robot's policy
            compression=None,
            max_size=int(settings.max_message_mb * MIB),
            max_queue=1,  # messages that wait while one is answered
            ping_interval=settings.client_timeout_s / 2,
            ping_timeout=settings.client_timeout_s / 2,
            close_timeout=CLOSE_S,
        ):
            await stop.wait()
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _client(self, client: ServerConnection) -> None:
        """Serve one client until it leaves."""
        if self._clients >= self._settings.max_clients:
            reason = f"all {self._clients} places are taken (serve.max_clients)"
            await client.close(TRY_AGAIN_LATER, reason)
            return
        self._clients += 1
        gone = asyncio.ensure_future(client.wait_closed())
        logging.info("client %s came, %d connected", client.remote_address, self._clients)
        try:
            await client.send(self._metadata)
            async for message in client:
                answer = await self._answer(message, gone)
                await client.send(answer)
        except ConnectionClosed as end:
            logging.info("client %s: %s", client.remote_address, end)
        finally:
            gone.cancel()
            self._clients -= 1
            logging.info("client %s left, %d connected", client.remote_address, self._clients)

    async def _answer(self, message: bytes | str, gone: asyncio.Future) -> bytes | str:
        """Return the answer to one message: actions and times, or what was wrong in one sentence.

        A decision that nobody waits for any more is not begun.
        """
        began = time.perf_counter()
        try:
            if isinstance(message, str):
                raise DataError("a message: expected binary msgpack, got text")
            frames, instruction = observations.read(wire.unpack(message), self._settings)
            loop = asyncio.get_running_loop()
            deciding = loop.run_in_executor(self._worker, self._timed, frames, instruction)
            await asyncio.wait({deciding, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not deciding.done():
                deciding.cancel()
                return b""  # goes nowhere: sending to a closed connection raises
            actions, seconds = deciding.result()
        except DataError as error:
            return str(error)
        except Exception:  # whatever a policy raises, the other clients go on
            logging.exception("a decision failed")
            return FAILED
        whole = time.perf_counter() - began
        return wire.pack(
            {
                "actions": actions,
                "policy_timing": {"infer_ms": 1e3 * seconds},
                "server_timing": {"infer_ms": 1e3 * whole, "wait_ms": 1e3 * (whole - seconds)},
            }
        )

    def _timed(self, frames: np.ndarray, instruction: str) -> tuple[np.ndarray, float]:
        began = time.perf_counter()
        return self._decide(frames, instruction), time.perf_counter() - began


def _health(client: ServerConnection, request: Request) -> Response | None:
    """Answer /healthz; any other path is a client's."""
    return client.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None
