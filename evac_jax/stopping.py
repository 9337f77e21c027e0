"""Ends a run on SIGTERM, SIGHUP or Ctrl-C where nothing is lost, within a time that is promised.

The first signal raises `StoppedError`: at once while the run may be interrupted, else at the next
such place. Of several hosts each may get it; all stop at the same place. A second one, or
`train.stop_grace_s` after the first, ends the process where it is; its simulators end with it.
Schedulers such as Slurm and Kubernetes kill 30 s after their SIGTERM.

Python calls a handler only when the main thread is not within a long call of JAX or of the system.
So a thread hears of signals too, and starts the time that is left.
"""

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import jax

from evac_jax.checkpoint import iterations_in
from evac_jax.config import commands
from evac_jax.devices import together
from evac_jax.errors import HostError, StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LEAVE_S = 5.0  # that hosts wait for each other before they end
_running: "Stopping | None" = None  # signals are the process's, and so is this


def place() -> None:
    """End the run here if a signal came; hosts that compute together call this equally often.

    Raises:
        StoppedError: a signal came, and the run may be interrupted.
    """
    if _running is not None:
        _running.place()


class Stopping:
    """Context manager around a run. As it begins, the run may be interrupted.

    Args:
        grace_s: seconds from the first signal to the end of the process.
        how_to_go_on: makes the sentence that ends every message.
    """

    def __init__(self, grace_s: float, how_to_go_on: Callable[[], str]):
        self._grace_s, self._how_to_go_on = grace_s, how_to_go_on
        self._open, self._signal = True, 0
        self._timer: threading.Timer | None = None
        self._before: dict = {}
        self._lock = threading.RLock()  # a signal may come within its own handler
        self._ears: tuple[socket.socket, socket.socket] | None = None
        self._hosts: together.StopTogether | None = None

    def __enter__(self) -> "Stopping":
        global _running
        _running = self
        if jax.process_count() > 1:
            self._hosts = together.StopTogether(self._begin, self._lost)
        self._ears = heard, told = socket.socketpair()
        told.setblocking(False)  # as Python demands
        self._fd_before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=[heard], daemon=True).start()
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        global _running
        _running = None
        stopped = isinstance(error, StoppedError)
        if self._hosts:
            self._hosts.close()
        # What is left is the interpreter's own end: the timer watches over that too.
        if not stopped:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._fd_before)
            for end in self._ears or ():
                end.shutdown(socket.SHUT_RDWR)
                end.close()
            if self._timer is not None:
                self._timer.cancel()
        if stopped:
            if self._hosts:
                with contextlib.suppress(HostError):
                    together.wait_for_all("end", LEAVE_S)
                # JAX ends a host at once, without its message, when host 0 is gone.
                time.sleep(0 if jax.process_index() else 1)
            raise StoppedError(f"{error}. {self._how_to_go_on()}", self._signal) from None

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end the block at once; one that came before ends it as it begins.

        Raises:
            StoppedError: a signal came.
        """
        with self._set(open_=True):
            self._check()
            yield

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep signals for the next `interruptible` block while this one runs."""
        return self._set(open_=False)

    @contextlib.contextmanager
    def _set(self, *, open_: bool) -> Iterator[None]:
        before, self._open = self._open, open_
        try:
            yield
        finally:
            self._open = before

    def place(self) -> None:
        """See the function `place`."""
        if self._open:
            self._check()

    def _check(self) -> None:
        if self._hosts.is_here() if self._hosts else self._signal:
            raise StoppedError(f"stopped by {signal.Signals(self._signal).name}", self._signal)

    def _listen(self, heard: socket.socket) -> None:
        """Take the number of each signal as it comes, whatever the main thread does."""
        count = 0
        with contextlib.suppress(OSError):  # closed
            while numbers := heard.recv(1):
                if numbers[0] in SIGNALS:
                    count += 1
                    if count > 1:
                        name = signal.Signals(numbers[0]).name
                        self._end_now(f"a second signal, {name}, ended the run at once")
                    self._begin(numbers[0])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread: end an interruptible block."""
        self._begin(number)
        if not self._hosts:
            self.place()

    def _begin(self, number: int) -> None:
        """Start the time that is left; on every host, whichever got the signal."""
        with self._lock:
            if self._signal:
                return
            self._signal = number
        if self._hosts:
            self._hosts.ask(number)
        _say(
            f"{signal.Signals(number).name}: saving what is complete, at most "
            f"{self._grace_s:g} s (train.stop_grace_s); a second one ends the run at once"
        )
        late = f"the run did not end within {self._grace_s:g} s (train.stop_grace_s) and was ended"
        self._timer = threading.Timer(self._grace_s, self._end_now, [late])
        self._timer.daemon = True
        self._timer.start()

    def _lost(self, what: str) -> None:
        _say(f"{HostError.__name__}: {what}, and so the run ended. {self._how_to_go_on()}")
        os._exit(2)

    def _end_now(self, why: str) -> None:
        _say(f"{StoppedError.__name__}: {why}. {self._how_to_go_on()}")
        os._exit(128 + self._signal)  # simulators end as their pipe closes


def _say(text: str) -> None:
    # Not by logging or print: a signal may come while this very thread is within either.
    with contextlib.suppress(RuntimeError):  # it is
        sys.stdout.flush()
    os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


def how_to_go_on(run: Path, checkpoints: Path) -> str:
    """Return a sentence that names a run's last checkpoint, and the command that goes on."""
    if not (iterations := iterations_in(checkpoints)):
        return f"It had saved no checkpoint yet (config.checkpoint.interval). {begin_again()}"
    return (
        f"Its last checkpoint is that of iteration {iterations[-1]}; go on from there with\n"
        f"{shlex.join(commands.going_on(commands.given(), run))}"
    )


def begin_again() -> str:
    """Return a sentence with the command that was given."""
    return f"Begin again with\n{shlex.join(commands.given())}"
