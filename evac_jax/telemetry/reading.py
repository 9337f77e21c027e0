"""Shows the progress of reading large files: a bar in a terminal, log lines elsewhere."""

import time
from collections.abc import Callable

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 10.0


class ReadProgress:
    """Context manager that is called as (bytes read so far, bytes to read).

    Args:
        what: what is read, such as "policy weights".
        console: where to draw; the default is stderr.
    """

    def __init__(
        self,
        what: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        console = console or Console(stderr=True)
        self._what, self._clock = what, clock
        self._began = self._told = clock()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(what),
                BarColumn(bar_width=24),
                DownloadColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> "ReadProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are read."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        now = self._clock()
        if done >= total or (self._bar is None and now - self._told >= LOG_EVERY_S):
            self._told = now
            seconds = now - self._began
            figures = (self._what, done / 1e9, total / 1e9, seconds)
            logging.info("%s: %.2f of %.2f GB in %.0f s", *figures)
