"""The simulator's side of the bridge: builds the environment and answers requests until the end.

Imports torch, never JAX. Whatever the environment raises is sent to the trainer before the process
ends, with its traceback unless it is the user's to act on; the process also ends, with its
children, when the trainer does.
"""

import contextlib
import faulthandler
import gc
import logging
import os
import select
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from evac_jax.bridge import protocol
from evac_jax.bridge.environment import Environment
from evac_jax.bridge.slots import CudaSlots, SharedSlots, SlotLayout
from evac_jax.bridge.types import EnvSpec, StepResult
from evac_jax.config import import_string
from evac_jax.errors import ConfigError, EvacJaxError, SimulatorError

# A busy simulator gets this long to notice that the trainer is gone before it is killed.
ORPHAN_GRACE_S = 2.0


def check_result(env: EnvSpec, result: StepResult) -> None:
    """Check what the environment's author promised: shapes, kinds and ranges of numbers.

    Raises:
        SimulatorError: naming the field, what was expected and what was found.
    """
    B, K = env.num_envs, env.action.chunk
    checks = [
        ("task", result.task, "i", (B,)),
        ("proprio", result.proprio, "f", (B, env.proprio_dim)),
        ("rewards", result.rewards, "f", (B, K)),
        ("terminated", result.terminated, "b", (B,)),
        ("truncated", result.truncated, "b", (B,)),
        ("success", result.success, "b", (B,)),
    ]
    checks += [(f"episode {name}", value, "f", (B,)) for name, value in result.episode.items()]
    for name, value, kind, shape in checks:
        if not isinstance(value, np.ndarray) or (value.dtype.kind, value.shape) != (kind, shape):
            got = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else repr(value)
            raise SimulatorError(
                f"simulator result {name!r}: expected kind {kind!r} with shape {shape}, got {got}; "
                "see evac_jax.bridge.types.StepResult"
            )
    if B and not -1 <= result.task.min() <= result.task.max() < len(env.instructions):
        raise SimulatorError(
            f"simulator result 'task': expected places in the {len(env.instructions)} instructions "
            f"of its spec, from 0 on (-1: idle), got {result.task.min()}..{result.task.max()}"
        )
    if not np.isfinite(result.rewards).all():
        bad = np.flatnonzero(~np.isfinite(result.rewards).all(axis=1)).tolist()
        raise SimulatorError(
            f"simulator rewards: expected finite numbers, not so in environments {bad}"
        )


def build_environments(spec: dict) -> list[Environment]:
    """Return the parts of the environment that a worker spec names (see `evac_jax.sim.worker`).

    Raises:
        ConfigError: if the spec names nothing that can be imported.
    """
    known = {"environment", "config", "device", "parts", "threads", "slots"}
    if unknown := sorted(spec.keys() - known):
        raise ConfigError(f"worker spec: expected keys {sorted(known)}, got also {unknown}")
    named = str(spec.get("environment", ""))
    try:
        factory = import_string.load(named, makes=import_string.ENVIRONMENT)
    except ConfigError as error:
        raise ConfigError(f"worker spec: environment: {error}") from error
    config = dict(spec.get("config", {}))
    if "device" in spec:
        config["device"] = spec["device"]
    environment, parts = factory(config), int(spec.get("parts", 1))
    import_string.require(environment, ("spec", *import_string.ENVIRONMENT), named)
    return [environment] if parts == 1 else environment.parts(parts)


def _watch(connection: Connection) -> None:
    """End this process and its children soon after the trainer, even in the middle of a chunk.

    A thread of its own, which sleeps until the socket's other end is closed. It reads nothing: the
    socket's buffer takes the trainer's next request while this one is computed, as long as the two
    are below 200 kB (900 environments per simulator process).
    """
    hangup = select.poll()
    hangup.register(connection.fileno(), select.POLLRDHUP)
    hangup.poll()
    time.sleep(ORPHAN_GRACE_S)
    # The client made this process the leader of its group: children end with it.
    os.killpg(0, signal.SIGKILL)


def _next(connection: Connection) -> Any:
    """Return the next message, `Close` once the trainer is gone."""
    try:
        return protocol.decode(connection.recv_bytes())
    except (EOFError, OSError):
        return protocol.Close()


def _attach(attach: protocol.Attach, spec: dict, layout: SlotLayout, slots_fd: int) -> SharedSlots:
    if attach.cuda:
        return CudaSlots(
            slots_fd, layout, attach.num_slots, device=spec["device"], handles=attach.cuda
        )
    return SharedSlots(slots_fd, layout, attach.num_slots)


def _serve(connection: Connection, slots_fd: int) -> None:
    # Imports make objects that stay, so collecting garbage meanwhile only costs time.
    gc.disable()
    import torch

    message = _next(connection)
    if isinstance(message, protocol.Close):
        return
    spec = message.spec
    torch.set_num_threads(int(spec.get("threads", 1)))
    parts = build_environments(spec)
    gc.freeze()
    gc.enable()
    layout = SlotLayout.of(parts[0].spec)
    try:
        connection.send_bytes(protocol.encode(protocol.Hello(parts[0].spec)))
        message = _next(connection)
        if isinstance(message, protocol.Close):
            return
        slots = _attach(message, spec, layout, slots_fd)
        tensors = [slots.tensors(slot) for slot in range(slots.num_slots)]
        while not isinstance(request := _next(connection), protocol.Close):
            if isinstance(request, protocol.Park):
                for environment in parts:
                    environment.park()
                continue
            environment, (frames, clip) = parts[request.part], tensors[request.slot]
            slots.begin(request.slot)
            if isinstance(request, protocol.Reset):
                result = environment.reset(request.starts, request.seed, frames, clip)
            else:
                result = environment.step(request.actions, frames, clip)
            check_result(environment.spec, result)
            slots.finish()
            slots.publish(request.slot, request.request)
            reply = protocol.Reply(request.request, request.slot, result)
            connection.send_bytes(protocol.encode(reply))
    finally:
        for environment in parts:
            environment.close()


def run(connection_fd: int, slots_fd: int) -> int:
    """Serve on inherited file descriptors; return the exit status of the process."""
    for fd in (connection_fd, slots_fd):
        os.set_inheritable(fd, False)  # a child that kept the socket would hide our end
    faulthandler.enable()
    # The trainer asks with this signal where a stuck simulator is.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connection = Connection(connection_fd)
    threading.Thread(target=_watch, args=(connection,), name="bridge-watch", daemon=True).start()
    try:
        _serve(connection, slots_fd)
    except BaseException as error:
        trace = "" if isinstance(error, EvacJaxError) else traceback.format_exc()
        failure = protocol.Failure(f"{type(error).__name__}: {error}", trace)
        logging.exception("simulator failed")
        with contextlib.suppress(OSError):  # the trainer may be what is gone
            connection.send_bytes(protocol.encode(failure))
        return 1
    return 0
