"""The trainer's side of the bridge: a simulator process as an object, its frames as JAX arrays.

    client = SimulatorClient({"environment": "module:factory", "config": {...}})
    exchange = client.reset(starts, seed=0)
    actions = policy(exchange.frames)             # zero copy
    exchange.release(actions)                     # the simulator may write there again
    exchange = client.step(np.asarray(actions))

With two slots the simulator may imagine the next chunk (`send_step`) while this one is still read.
Imports JAX; torch only when frames stay on a GPU.
"""

import collections
import dataclasses
import itertools
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from evac_jax.bridge import protocol
from evac_jax.bridge.exchange import Exchange, SlotOwnershipError, shard_frames
from evac_jax.bridge.process import WorkerProcess
from evac_jax.bridge.slots import CudaSlots, SharedSlots, SlotLayout
from evac_jax.bridge.types import IDLE, KEYFRAMES, EnvSpec, StepResult
from evac_jax.errors import BridgeTimeoutError, ConfigError, SimulatorError

__all__ = ["Exchange", "SimulatorClient", "SlotOwnershipError", "shard_frames"]

CLOSE_TIMEOUT_S = 10.0


def _slot_kind(spec: dict) -> str:
    """Return where frames lie: on the GPU if the simulator and JAX have the same one."""
    device, kind = str(spec.get("device", "cpu")), spec.get("slots")
    if kind == "cuda_ipc" and not device.startswith("cuda"):
        raise ConfigError(f"worker spec: cuda_ipc slots need a cuda device, got {device!r}")
    if kind not in (None, "shared_memory", "cuda_ipc"):
        raise ConfigError(f'worker spec: slots are "shared_memory" or "cuda_ipc", got {kind!r}')
    if kind is None and device.startswith("cuda") and jax.default_backend() == "gpu":
        index = int(device.partition(":")[2] or 0)
        if any(d.local_hardware_id == index for d in jax.local_devices()):
            return "cuda_ipc"
    return kind or "shared_memory"


@dataclasses.dataclass(frozen=True)
class _Request:
    """A reset or step; `make` gives its message for a number and a slot."""

    number: int
    word: str
    part: int
    make: Callable[[int, int], Any]

    def message(self, slot: int) -> Any:
        return self.make(self.number, slot)


class SimulatorClient:
    """One simulator process. The constructor starts it and returns at once.

    Not for use by several threads at a time.

    Args:
        spec: worker spec, a JSON object (see `evac_jax.sim.worker`).
        num_slots: frame buffers, at least 2 and one per part.
        timeout_s: seconds that one request may take before the process counts as stuck.
        start_timeout_s: seconds that starting it and loading its weights may take.
        restarts: times that a process that failed, or is stuck, is started again, on the same
            slots. The new one plays the episodes under way again from their starts, so the caller
            sees the same answers, later; the log tells. Loading that fails is not tried again.
        sharding: where frames go, over this process's devices; None for JAX's default device.
        log_path: file for what the process prints; None keeps only what errors quote.

    Raises:
        ConfigError: for an impossible number of slots or spec.
    """

    def __init__(
        self,
        spec: dict,
        *,
        num_slots: int = 2,
        timeout_s: float = 600.0,
        start_timeout_s: float = 600.0,
        restarts: int = 0,
        sharding: jax.sharding.Sharding | None = None,
        log_path: str | None = None,
    ):
        if num_slots < (least := max(2, int(spec.get("parts", 1)))):
            raise ConfigError(f"simulator.slots: expected at least {least}, got {num_slots}")
        self._kind = _slot_kind(spec)
        if sharding is None and self._kind == "shared_memory" and jax.default_backend() != "cpu":
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        self._spec, self._sharding, self._log_path = spec, sharding, log_path
        self.parts = int(spec.get("parts", 1))
        self._num_slots, self._restarts_left = num_slots, restarts
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._memory = os.memfd_create("evac_jax-slots")
        self._close_memory = weakref.finalize(self, os.close, self._memory)
        self._slots: SharedSlots | None = None
        self._env: EnvSpec | None = None
        self._owners: dict[int, str] = {}  # slot -> who has it and why; the others are free
        self._pending: collections.deque[tuple[_Request, int]] = collections.deque()  # with slots
        self._played: dict[int, list[_Request]] = {}  # part -> what made its episodes, in order
        self._request = 0
        self._end: str | None = None  # why there is no process
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        self._ready = False
        self._process = WorkerProcess(self._spec, self._memory, self._log_path)

    def __enter__(self) -> "SimulatorClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def env_spec(self) -> EnvSpec:
        """Facts of the environment; waits for the process the first time."""
        if self._env is None:
            self.wait_until_ready()
            assert self._env is not None
        return self._env

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    @property
    def slots(self) -> SharedSlots:
        """The slots, once the process is ready."""
        self.wait_until_ready()
        assert self._slots is not None
        return self._slots

    def wait_until_ready(self) -> None:
        """Wait until the environment is built and the slots are shared; later calls return at once.

        Raises:
            SimulatorError: the process failed; never restarted, since loading again fails again.
            BridgeTimeoutError: it took longer than `start_timeout_s`.
            ConfigError: there is not enough memory for the slots.
        """
        self._check_open()
        if self._ready:
            return
        waited = time.monotonic() - self._started
        try:
            env = self._process.receive(max(0.0, self._start_timeout_s - waited)).env
            if self._env is not None and env != self._env:
                raise SimulatorError(f"restarted simulator: expected {self._env}, got {env}")
            self._env = env
            if self._slots is None:
                self._slots = self._make_slots(SlotLayout.of(env))
            self._process.send(protocol.Attach(self._num_slots, self._slots.handles()))
        except TimeoutError:
            error = BridgeTimeoutError(
                f"simulator process {self.pid}: expected it to be ready within "
                f"{self._start_timeout_s:g} s (simulator.start_timeout_s), got nothing\n"
                f"--- end of its output ---\n{self._process.log_tail()}"
            )
            raise self._fail(error) from None
        except (SimulatorError, ConfigError) as error:
            raise self._fail(error) from error.__cause__
        self._ready = True

    def _make_slots(self, layout: SlotLayout) -> SharedSlots:
        if self._kind == "cuda_ipc":
            device = self._spec["device"]
            return CudaSlots(self._memory, layout, self._num_slots, device=device)
        return SharedSlots(self._memory, layout, self._num_slots, create=True)

    def _check_open(self) -> None:
        if self._end is not None:
            raise SimulatorError(f"there is no simulator process: {self._end}")

    def _fail(self, error: Exception) -> Exception:
        """End the process for good, and return the error to raise."""
        self._process.kill()
        for _, slot in self._pending:
            del self._owners[slot]  # its writer is dead
        self._pending.clear()
        self._end = str(error).splitlines()[0]
        return error

    def _recover(self, error: Exception) -> None:
        """Start the process again, as often as is allowed, and bring it to where it was.

        Raises:
            SimulatorError, BridgeTimeoutError: `error`, or the one of the last try.
        """
        while self._restarts_left > 0:
            self._restarts_left -= 1
            self._process.kill()
            self._start()
            logging.warning(
                "%s\nStarted again as process %d, which plays the episodes under way again; "
                "restarts that are left: %d (simulator.restarts)",
                *(error, self.pid, self._restarts_left),
            )
            self.wait_until_ready()
            try:
                self._play_again()
            except (SimulatorError, BridgeTimeoutError) as again:
                error = again
            else:
                return
        raise self._fail(error)

    def _play_again(self) -> None:
        """Send a new process all requests that its episodes are made of; await the answered ones.

        Their answers go to the slot of the oldest one that is not answered: nobody reads there.
        """
        if not self._pending:  # parked: no episode is under way
            return
        waiting, slot = {request.number for request, _ in self._pending}, self._pending[0][1]
        requests = itertools.chain.from_iterable(self._played.values())
        for request in sorted(requests, key=lambda request: request.number):
            if request.number not in waiting:
                self._process.send(request.message(slot))
                self._answer(request, slot)
        for request, slot in self._pending:
            self._process.send(request.message(slot))

    def send_reset(self, starts: np.ndarray, seed: int, part: int = 0) -> None:
        """Ask to start an episode in every environment of a part, without waiting.

        Args:
            starts: int64 [B] initial states, `IDLE` to leave an environment out.
            seed: of the simulator's noise.
            part: pipeline stage, below the worker spec's "parts"; B counts its environments.

        Raises:
            SlotOwnershipError: every slot is taken; release one first.
            ValueError: wrong shape, unknown starts, or a seed beyond 64 bits.
            SimulatorError: the process failed.
        """
        env = self.env_spec
        starts = np.asarray(starts, np.int64)
        if starts.shape != (env.num_envs,):
            raise ValueError(f"starts: expected shape ({env.num_envs},), got {starts.shape}")
        if len(unknown := starts[~env.offers(starts)]):
            raise ValueError(
                f"starts: expected {IDLE} (idle) to {env.num_starts - 1}, or one of "
                f"{env.num_keyframes} keyframes from {KEYFRAMES} on, got {len(unknown)} others, "
                f"the first {unknown[0]}"
            )
        if not -(2**63) <= (seed := int(seed)) < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
        self._check_part(part)
        if all(request.part != part for request, _ in self._pending):
            self._played.pop(part, None)  # nothing needs its last episodes any more
        self._send(
            "reset", part, lambda number, slot: protocol.Reset(number, slot, part, starts, seed)
        )

    def send_step(self, actions: np.ndarray, part: int = 0) -> None:
        """Ask to play one chunk in every environment of a part, without waiting.

        Args:
            actions: float32 [B K A], as `ActionSpec` says.
            part: pipeline stage, as in `send_reset`.

        Raises:
            SlotOwnershipError: every slot is taken, or the simulator was never reset.
            ValueError: wrong shape, or numbers that are not finite.
            SimulatorError: the process failed.
        """
        env = self.env_spec
        actions = np.asarray(actions, np.float32)
        shape = (env.num_envs, env.action.chunk, env.action.dim)
        if actions.shape != shape:
            raise ValueError(f"actions: expected shape {shape}, got {actions.shape}")
        if not np.isfinite(actions).all():
            raise ValueError("actions: expected finite numbers, got NaN or infinity")
        self._check_open()
        self._check_part(part)
        if part not in self._played:
            raise SlotOwnershipError("step before reset: the simulator process has no episodes yet")
        self._send("step", part, lambda *where: protocol.Step(*where, part, actions))

    def send_park(self) -> None:
        """Let the simulator's weights leave its device until the next reset, without waiting.

        Raises:
            SlotOwnershipError: an answer is still awaited.
            SimulatorError: the process failed.
        """
        self._check_open()
        if self._pending:
            raise SlotOwnershipError("park: receive the answers that are under way first")
        self._played.clear()
        try:
            self._process.send(protocol.Park())
        except SimulatorError as error:
            self._recover(error)  # a new process holds nothing before its first reset

    def _check_part(self, part: int) -> None:
        if not 0 <= part < self.parts:
            raise ValueError(f"part: expected 0 to {self.parts - 1}, got {part}")

    def _send(self, word: str, part: int, make: Callable[[int, int], Any]) -> None:
        self.wait_until_ready()
        free = [slot for slot in range(self._num_slots) if slot not in self._owners]
        if not free:
            owners = "; ".join(f"slot {slot} {why}" for slot, why in sorted(self._owners.items()))
            raise SlotOwnershipError(
                f"{word}: expected a free slot, got none of {self._num_slots}: {owners}. Release "
                "an exchange, receive an answer, or raise simulator.slots"
            )
        slot = free[0]
        self._request += 1
        request = _Request(self._request, word, part, make)
        self._owners[slot] = f"is being written for request {request.number} ({word})"
        self._pending.append((request, slot))
        episodes = self._played.setdefault(part, [])
        if self._restarts_left > 0:
            episodes.append(request)
        try:
            self._process.send(request.message(slot))
        except SimulatorError as error:
            self._recover(error)

    def receive(self) -> Exchange:
        """Return the answer to the oldest request that has none yet.

        Raises:
            SimulatorError: the process failed or broke the protocol; carries its traceback.
            BridgeTimeoutError: no answer within `timeout_s`; the process is ended.
            SlotOwnershipError: nothing was asked.
        """
        self._check_open()
        if not self._pending:
            raise SlotOwnershipError("receive: no request is waiting for an answer")
        request, slot = self._pending[0]
        slots = self.slots
        exchange = Exchange(
            slots.frames(slot),
            lambda: slots.clip(slot),
            slot=slot,
            request=request.number,
            give_back=lambda: self._owners.pop(slot),
            sharding=self._sharding,
        )
        while True:
            try:
                result = self._answer(request, slot)
                break
            except (SimulatorError, BridgeTimeoutError) as error:
                self._recover(error)
        self._pending.popleft()
        self._owners[slot] = (
            f"holds the answer to request {request.number} ({request.word}), not released"
        )
        return exchange.arrive(result)

    def _answer(self, request: "_Request", slot: int) -> StepResult:
        """Wait for the answer to the oldest request that the process has."""
        began = time.monotonic()
        try:
            reply = self._process.receive(self._timeout_s)
        except TimeoutError:
            waited = time.monotonic() - began
            raise BridgeTimeoutError(
                f"simulator process {self.pid}: expected the answer to request {request.number} "
                f"({request.word}, slot {slot}) within {self._timeout_s:g} s "
                f"(simulator.timeout_s), got none after {waited:.1f} s\n"
                f"--- where it is ---\n{self._process.stacks()}"
            ) from None
        complete = self.slots.sequence(slot)
        if (reply.request, reply.slot, complete) != (request.number, slot, request.number):
            raise SimulatorError(
                f"simulator process {self.pid}: expected request {request.number} in slot {slot}, "
                f"got an answer to {reply.request} in slot {reply.slot}; the slot holds {complete}"
            )
        return reply.result

    def reset(self, starts: np.ndarray, seed: int) -> Exchange:
        """`send_reset`, then `receive`."""
        self.send_reset(starts, seed)
        return self.receive()

    def step(self, actions: np.ndarray) -> Exchange:
        """`send_step`, then `receive`."""
        self.send_step(actions)
        return self.receive()

    def close(self) -> None:
        """End the process; frames that were not released stay readable."""
        if self._end is None:
            self._end = "the client was closed"
            self._process.close(CLOSE_TIMEOUT_S)
        self._close_memory()
