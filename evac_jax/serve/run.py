"""`launch.py --mode=serve`: loads a policy, compiles it, and serves it until a signal comes."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import signal
import socket
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from evac_jax.config.schema import ServeConfig, TrainConfig
from evac_jax.devices import hosts
from evac_jax.devices.found import check_devices
from evac_jax.errors import ConfigError
from evac_jax.serve.policy import ServedPolicy, find, load
from evac_jax.serve.server import PolicyServer

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def run(config: TrainConfig) -> None:
    """Serve the configured policy; returns when a signal ends it.

    Connections are refused until everything is compiled.

    Raises:
        CheckpointError: the policy cannot be imported.
        ConfigError: the address cannot be listened on, or a large policy would leave a GPU unused;
            or see `load`.
    """
    settings = config.serve
    with contextlib.closing(_bound(settings)) as listener:
        hosts.keep_programs(config)
        _, trained = find(config)
        imported = dataclasses.replace(config, policy=trained.policy) if trained else config
        check_devices(imported, ())  # nothing is simulated
        logging.info("the policy decides on %s", jax.devices()[0])
        policy = load(config)
        policy.warm_up(len(settings.image_keys), settings.frame_shapes)
        server = PolicyServer(policy.decide, metadata(policy, config), settings)
        with _explained(settings):
            listener.listen()
        asyncio.run(_until_signal(server, listener, settings))


def metadata(policy: ServedPolicy, config: TrainConfig) -> dict[str, Any]:
    """Return what a client is told first: what to send, and what it will get."""
    settings = config.serve
    return {
        "iteration": policy.iteration,
        "action_chunk": policy.chunk,
        "action_dim": policy.dim,
        "image_keys": settings.image_keys,
        "image_sizes": settings.frame_shapes,
        "prompt_key": settings.prompt_key,
        "unread_keys": settings.unread_keys,
        "temperature": config.policy.eval_temperature,
        "gripper": config.env.gripper,
    }


async def _until_signal(
    server: PolicyServer, listener: socket.socket, settings: ServeConfig
) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def end(number: signal.Signals) -> None:
        logging.info("%s: the server ends; a second signal ends it at once", number.name)
        for other in SIGNALS:
            loop.remove_signal_handler(other)
        stop.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, end, number)
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        logging.warning("config.serve.host: whoever reaches %s can use the policy", host)
    if settings.unread_keys:
        logging.info("observations may have %s, which are not read", settings.unread_keys)
    logging.info("ready: ws://%s:%d, health at /healthz", host, port)
    await server.serve(listener, stop)


def _bound(settings: ServeConfig) -> socket.socket:
    """Return a socket that has the address already, and refuses connections until it listens."""
    with _explained(settings):
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, _, _, address = found[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    return listener


@contextlib.contextmanager
def _explained(settings: ServeConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"config.serve.host, config.serve.port: cannot listen on {settings.host!r}, port "
            f"{settings.port}: {error}; choose another address, or port 0 for a free one"
        ) from error
