"""Seconds spent per phase of an iteration."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Seconds spent per phase, summed until `take`."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """Add `seconds` to a phase."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a phase."""
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def take(self) -> dict[str, float]:
        """Return the sums and start again from zero."""
        seconds, self._seconds = self._seconds, {}
        return seconds
