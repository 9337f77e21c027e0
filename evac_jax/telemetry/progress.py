"""Shows the progress of a run: a live bar in a terminal, one log line per iteration elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text


def format_duration(seconds: float | None) -> str:
    """Return "1:02:03", "2:03" or "-" for None."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_success(success: Mapping[str, float]) -> str:
    """Return "imagined 41.0%  ground truth 37.5%"."""
    return "  ".join(f"{place.replace('_', ' ')} {rate:.1%}" for place, rate in success.items())


@contextlib.contextmanager
def told(what: str, every_s: float = 20.0) -> Iterator[None]:
    """Log that something long begins, that it goes on, and how long it took.

    Args:
        what: such as "evaluating in imagination: 64 episodes".
        every_s: seconds between lines in between.
    """
    began = time.monotonic()
    logging.info("%s", what)
    with told_if_long(what, every_s):
        yield
    logging.info("%s: done in %.0f s", what, time.monotonic() - began)


@contextlib.contextmanager
def told_if_long(what: str, every_s: float = 20.0) -> Iterator[None]:
    """Log that something goes on, every so many seconds; nothing if it takes less.

    Args: see `told`.
    """
    began, over = time.monotonic(), threading.Event()

    def go_on() -> None:
        while not over.wait(every_s):
            logging.info("%s: going on for %.0f s", what, time.monotonic() - began)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def format_episodes(rate: float, count: float) -> str:
    """Return "37.5% of 128 succeeded"."""
    return f"{rate:.1%} of {count:.0f} succeeded"


class Estimate:
    """Remaining time, from the mean duration of the iterations since this process started.

    rich's own estimate covers only the last half minute, which is less than one iteration here.
    """

    def __init__(self, total: int, finished: int, clock: Callable[[], float] = time.monotonic):
        self._total, self._first, self._clock = total, finished, clock
        self._began = self._updated = clock()
        self._done = finished

    def update(self, done: int) -> None:
        """Note that `done` iterations are finished."""
        self._done, self._updated = done, self._clock()

    def remaining_s(self) -> float | None:
        """Return the seconds left, None before the first iteration of this process is done."""
        here = self._done - self._first
        if here <= 0:
            return None
        mean = (self._updated - self._began) / here
        return max(mean * (self._total - self._done) - (self._clock() - self._updated), 0.0)


class _EtaColumn(ProgressColumn):
    """Column with the remaining time, which counts down between updates."""

    max_refresh = 0.5

    def __init__(self, estimate: Estimate):
        super().__init__()
        self._estimate = estimate

    def render(self, task: Task) -> Text:
        return Text(f"ETA {format_duration(self._estimate.remaining_s())}", style="cyan")


class Progress:
    """Context manager around a run's iterations.

    Args:
        total: iterations of the whole run.
        finished: iterations that earlier processes of a resumed run have done.
        console: where to draw; the default is stderr, because the summary goes to stdout.
    """

    def __init__(self, total: int, finished: int = 0, console: Console | None = None):
        console = console or Console(stderr=True)
        self._total = total
        self._estimate = Estimate(total, finished)
        self._bar: RichProgress | None = None
        if console.is_terminal:
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("iteration {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                _EtaColumn(self._estimate),
                TextColumn("{task.fields[told]}"),
                console=console,
            )
            self._task = self._bar.add_task("train", total=total, completed=finished, told="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            # absl writes to the stderr of its start; the bar needs all lines to go through rich.
            self._absl = logging.get_absl_handler().python_handler
            self._stream = self._absl.setStream(sys.stderr)
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            if self._stream is not None:
                self._absl.setStream(self._stream)
            self._bar.stop()

    def update(
        self,
        done: int,
        *,
        episodes: tuple[float, float] | None,
        success: Mapping[str, float],
        evaluated: int,
    ) -> None:
        """Show that `done` iterations are finished, what they played, and the last evaluation.

        Args:
            done: finished iterations of the whole run.
            episodes: success rate 0..1 and number of the last iteration's own episodes; None =
                this process has played none yet.
            success: {"imagined": 0..1, "ground_truth": 0..1}, as far as they are evaluated.
            evaluated: iteration whose policy had that success.
        """
        self._estimate.update(done)
        parts = [f"its episodes: {format_episodes(*episodes)}"] if episodes else []
        if success:
            parts.append(f"last evaluation (iteration {evaluated}): {format_success(success)}")
        else:
            parts.append("not evaluated")
        text = "  |  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, told=text)
        else:
            eta = format_duration(self._estimate.remaining_s())
            logging.info("iteration %d/%d  ETA %s  |  %s", done, self._total, eta, text)
