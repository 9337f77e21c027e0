"""The errors a user meets. Each message says what was expected, what came, and where to change it.

They live apart from the code that raises them so that both processes can import them.
"""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ' Did you mean ...?', or '' when nothing in `valid` is close to `name`."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


class EvacJaxError(Exception):
    """Base of every error that is the user's to act on; launch.py prints it without a traceback."""


class ConfigError(EvacJaxError):
    """A configuration cannot work. Holds all problems found, one per line."""


class CheckpointError(EvacJaxError):
    """A checkpoint or weight file is missing, damaged or made for something else."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of a run cannot be read, whatever the configuration."""


class StorageError(EvacJaxError):
    """A folder cannot be written to: full, read-only, or another process writes there."""


class StoppedError(EvacJaxError):
    """A signal ended the run; what it had saved before is whole.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal

    def __reduce__(self):
        """Keep the signal when the error comes from another process, as Ray's trainers are."""
        return type(self), (str(self), self.signal)


class SimulatorError(EvacJaxError):
    """A simulator process failed; carries that process's own traceback."""


class BridgeTimeoutError(EvacJaxError):
    """A simulator process did not answer in time."""


class HostError(EvacJaxError):
    """A host of the run was lost, and so the run ended; what it had saved before is whole."""


class DataError(EvacJaxError):
    """Input data (start frames, episodes) is missing or malformed."""


class TrainingError(EvacJaxError):
    """A training diverged; what it had saved before is whole."""
