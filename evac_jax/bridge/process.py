"""A simulator process as its trainer sees it: start, talk, notice every way it can end.

Standard library only. Every wait watches the pipe and the process at once, so that a death is seen
within milliseconds; what the worker printed is kept, and its tail is part of each error.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from evac_jax.bridge import protocol
from evac_jax.devices.malloc import KEEP_FREED_MEMORY
from evac_jax.errors import SimulatorError

TAIL_BYTES = 4000  # of the worker's output that an error quotes
_ROOT = Path(__file__).resolve().parents[2]  # holds the package that the worker imports
_MESSAGE_S = 60  # a message is some kilobytes; only a stopped process takes this long over one
_STACK_S = 0.5  # a healthy interpreter writes its stacks in milliseconds


def _end(process: subprocess.Popen, connection: Connection, exit_fd: int, log: BinaryIO) -> None:
    """Kill whatever is left of the worker and its children, and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
    os.close(exit_fd)
    log.close()


class WorkerProcess:
    """One running worker. Starting does not wait for it.

    Args:
        spec: worker spec (see `evac_jax.sim.worker`).
        slots_fd: file of the slots, inherited by the worker.
        log_path: file for what the worker prints; None for an unnamed temporary one.

    A worker that is not closed ends with this object or with the interpreter, by a kill.
    """

    def __init__(self, spec: dict[str, Any], slots_fd: int, log_path: str | None = None):
        log = open(log_path, "a+b") if log_path else tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _MESSAGE_S, 0))
        threads = str(spec.get("threads", 1))
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        keep = KEEP_FREED_MEMORY if str(spec.get("device", "cpu")) == "cpu" else {}
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "evac_jax.sim.worker"),
                    *(f"--connection={theirs.fileno()}", f"--slots={slots_fd}"),
                    f"--name={spec.get('environment')}",
                ],
                pass_fds=(theirs.fileno(), slots_fd),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Imports read these before the worker's own code can set its threads.
                env=keep | os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads},
                # A group of its own: Ctrl-C reaches the trainer only, and a kill reaches children.
                start_new_session=True,
            )
        self.pid = process.pid
        self._process, self._log = process, log
        self._connection = Connection(ours.detach())
        self._exit_fd = os.pidfd_open(process.pid)
        # Both at once, with one system call; the functions of `multiprocessing` make a selector
        # for every wait.
        self._events = select.poll()
        for fd in (self._connection.fileno(), self._exit_fd):
            self._events.register(fd, select.POLLIN)
        self._finalizer = weakref.finalize(
            self, _end, process, self._connection, self._exit_fd, log
        )
        self.send(protocol.Start(spec))

    def send(self, message: Any) -> None:
        """Send one message.

        Raises:
            SimulatorError: if the worker is gone.
        """
        try:
            self._connection.send_bytes(protocol.encode(message))
        except OSError:
            self._raise_last_words()

    def receive(self, timeout_s: float) -> Any:
        """Return the worker's next message.

        Raises:
            TimeoutError: if none came in time; the worker still runs.
            SimulatorError: if the worker failed or is gone; it is quoted and ended.
        """
        ready = [fd for fd, _ in self._events.poll(timeout_s * 1e3)]
        if not ready:
            raise TimeoutError
        # A message sent before death counts, so the pipe is read first.
        if self._connection.fileno() not in ready:
            raise self._death()
        try:
            message = protocol.decode(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, protocol.Failure):
            self.kill()
            trace = f"\n--- its traceback ---\n{message.traceback}" if message.traceback else ""
            raise SimulatorError(f"simulator process {self.pid}: {message.error}{trace}")
        return message

    def _raise_last_words(self) -> None:
        """Raise for a broken pipe: with the failure that the worker sent, if it sent one."""
        while True:  # replies to earlier requests may come before it
            try:
                self.receive(1.0)
            except TimeoutError:
                raise self._death() from None

    def _death(self) -> SimulatorError:
        """Return the error for a worker that ended without a message, and reap it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # the pipe closes a moment before the exit status is known
        status, tail = self._process.poll(), self.log_tail()
        self.kill()
        if status is None:
            how = "runs, but stopped in the middle of a message or closed its pipe"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"exited with status {status}"
        return SimulatorError(
            f"simulator process {self.pid} {how}; expected an answer\n"
            f"--- end of its output ---\n{tail}"
        )

    def log_tail(self) -> str:
        """Return the end of what the worker printed."""
        fd = self._log.fileno()
        size = os.fstat(fd).st_size
        tail = os.pread(fd, TAIL_BYTES, max(0, size - TAIL_BYTES))
        return tail.decode(errors="replace").strip() or "(it printed nothing)"

    def stacks(self) -> str:
        """Return where the worker's threads are, as it prints them itself."""
        start = os.fstat(self._log.fileno()).st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + _STACK_S
        size = 0
        while time.monotonic() < deadline:
            time.sleep(0.05)
            now = os.fstat(self._log.fileno()).st_size
            if now > start and now == size:
                break
            size = now
        return os.pread(self._log.fileno(), TAIL_BYTES, start).decode(errors="replace").strip()

    def kill(self) -> None:
        """End the worker and its children now; harmless when it has ended."""
        self._finalizer()

    def close(self, timeout_s: float) -> None:
        """Ask the worker to finish, wait for it, and kill it if it takes longer."""
        if not self._finalizer.alive:
            return
        with contextlib.suppress(OSError):
            self._connection.send_bytes(protocol.encode(protocol.Close()))
        exited = select.poll()
        exited.register(self._exit_fd, select.POLLIN)
        exited.poll(timeout_s * 1e3)
        self.kill()
