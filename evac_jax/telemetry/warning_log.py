"""Keeps a run's warnings and errors beside its metrics, for the report: `warnings.jsonl`.

A line holds "time", "level" and "text". Lines of a resumed run follow those before.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging as absl_logging

WARNINGS_FILE = "warnings.jsonl"


class WarningLog(logging.Handler):
    """Writes what is at least a warning into `folder`, once the run has the file `begun` in there.

    What comes before waits: a run that never began leaves no file.
    """

    def __init__(self, folder: Path, begun: str):
        super().__init__(logging.WARNING)
        self._folder, self._begun = folder, begun
        self._waiting: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record; a disk that takes no more loses it, but does not end the run."""
        line = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)),
            "level": record.levelname.lower(),
            "text": record.getMessage(),
        }
        self._waiting.append(f"{json.dumps(line)}\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits, if the run has begun."""
        if self._waiting and (self._folder / self._begun).exists():
            text, self._waiting = "".join(self._waiting), []
            with contextlib.suppress(OSError), (self._folder / WARNINGS_FILE).open("a") as file:
                file.write(text)


@contextlib.contextmanager
def kept_in(folder: Path, begun: str) -> Iterator[WarningLog]:
    """Keep what this process warns of inside the block, and the error that ends it.

    Arguments as `WarningLog`.
    """
    handler, logger = WarningLog(folder, begun), absl_logging.get_absl_logger()
    logger.addHandler(handler)
    try:
        yield handler
    except Exception as error:
        text = f"ended by {type(error).__name__}: {error}"
        handler.handle(logging.LogRecord("", logging.ERROR, "", 0, text, None, None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.flush()


def flush() -> None:
    """Write what warnings still wait."""
    for handler in absl_logging.get_absl_logger().handlers:
        if isinstance(handler, WarningLog):
            handler.flush()
