"""Ends a run on SIGTERM, SIGHUP or Ctrl-C where nothing is lost, within a time that is promised.

The first signal raises `StoppedError`: at once while the run may be interrupted, else at the next
such place. A second one, or `train.stop_grace_s` after the first, ends the process where it is;
its simulators end with it. Schedulers such as Slurm and Kubernetes kill 30 s after their SIGTERM.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from evac_jax.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


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

    def __enter__(self) -> "Stopping":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        stopped = isinstance(error, StoppedError)
        # What is left is the interpreter's own end: the timer watches over that too.
        if not stopped:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            if self._timer is not None:
                self._timer.cancel()
        if stopped:
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

    def _check(self) -> None:
        if self._signal:
            raise StoppedError(f"stopped by {signal.Signals(self._signal).name}", self._signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            self._end_now(f"a second signal, {signal.Signals(number).name}, ended the run at once")
        self._signal = number
        _say(
            f"{signal.Signals(number).name}: saving what is complete, at most "
            f"{self._grace_s:g} s (train.stop_grace_s); a second one ends the run at once"
        )
        late = f"the run did not end within {self._grace_s:g} s (train.stop_grace_s) and was ended"
        self._timer = threading.Timer(self._grace_s, self._end_now, [late])
        self._timer.daemon = True
        self._timer.start()
        if self._open:
            self._check()

    def _end_now(self, why: str) -> None:
        _say(f"{StoppedError.__name__}: {why}. {self._how_to_go_on()}")
        os._exit(128 + self._signal)  # simulators end as their pipe closes


def _say(text: str) -> None:
    # Not by logging or print: a signal may come while this very thread is within either.
    sys.stdout.flush()
    os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
