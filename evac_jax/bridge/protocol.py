"""What travels over the pipe between trainer and simulator: small messages, never frames.

A message is one block of bytes: a length, a JSON header, then the raw bytes of its NumPy arrays,
each at a multiple of 8, so that the receiver can use them where they lie. No pickle, so a message
can hold data but never code. Standard library and NumPy only, because both processes import this.

One exchange: `Start` -> `Hello` -> `Attach`, then any number of `Reset` or `Step` -> `Reply` and of
`Park`, and `Close`. At any moment the simulator may answer `Failure` instead, after which it exits.
"""

import dataclasses
import functools
import json
import struct
from typing import Any

import numpy as np

from evac_jax.bridge.types import EnvSpec, StepResult
from evac_jax.errors import SimulatorError
from policies.spec import ActionSpec

VERSION = 3  # of this format; both ends must agree
_LENGTH = struct.Struct("<4sI")  # mark, bytes of the JSON header
_MARK = b"EVJX"
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_ALIGN = 8  # bytes; also the size of _LENGTH


@dataclasses.dataclass(frozen=True)
class Start:
    """Trainer -> simulator, first: the worker spec (see `evac_jax.sim.worker`)."""

    spec: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Hello:
    """Simulator -> trainer: the environment is built, these are its facts."""

    env: EnvSpec


@dataclasses.dataclass(frozen=True)
class Attach:
    """Trainer -> simulator: the slots exist now, map them.

    Attributes:
        num_slots: how many there are.
        cuda: one CUDA IPC handle per slot, or empty when frames lie in the shared host memory.
    """

    num_slots: int
    cuda: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Reset:
    """Trainer -> simulator: start the episodes of `part`, write their first frames into `slot`."""

    request: int
    slot: int
    part: int
    starts: np.ndarray
    seed: int


@dataclasses.dataclass(frozen=True)
class Step:
    """Trainer -> simulator: play one chunk of `part` and write its frames into `slot`."""

    request: int
    slot: int
    part: int
    actions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Park:
    """Trainer -> simulator: no episode goes on; the next reset may come late. No answer."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """Simulator -> trainer: the frames of `request` are complete in `slot`."""

    request: int
    slot: int
    result: StepResult


@dataclasses.dataclass(frozen=True)
class Failure:
    """Simulator -> trainer, last: what went wrong, with the traceback; "" for a user's mistake."""

    error: str
    traceback: str


@dataclasses.dataclass(frozen=True)
class Close:
    """Trainer -> simulator: no more requests."""


_TYPES = {
    cls.__name__: cls
    for cls in (
        *(Start, Hello, Attach, Reset, Step, Park, Reply, Failure, Close),
        *(EnvSpec, ActionSpec, StepResult),
    )
}


_FIELDS = {cls: tuple(field.name for field in dataclasses.fields(cls)) for cls in _TYPES.values()}


def _pack(value: Any, arrays: list[np.ndarray]) -> Any:
    """Return `value` as JSON values; arrays go to the list and leave a reference behind."""
    kind = type(value)
    if kind in (int, float, str, bool) or value is None:
        return value
    if kind is np.ndarray:
        if value.dtype.hasobject:
            raise TypeError(f"arrays of Python objects cannot be sent, got dtype {value.dtype}")
        arrays.append(np.ascontiguousarray(value))
        return {"$array": [value.dtype.str, value.shape]}
    if kind in _FIELDS:
        fields = [_pack(getattr(value, name), arrays) for name in _FIELDS[kind]]
        return {"$type": kind.__name__, "fields": fields}
    if isinstance(value, np.generic):
        return value.item()
    if kind is tuple:  # JSON knows lists only
        return {"$tuple": [_pack(item, arrays) for item in value]}
    if kind is list:
        return [_pack(item, arrays) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) and not key.startswith("$") for key in value):
            raise TypeError(f"keys must be strings that do not start with '$', got {list(value)}")
        return {key: _pack(item, arrays) for key, item in value.items()}
    raise TypeError(f"cannot send {kind.__name__}: {value!r}")


def _padding(size: int) -> int:
    return -size % _ALIGN


@functools.lru_cache(64)
def _plain_dtype(name: str) -> np.dtype:
    kind = np.dtype(name)
    if kind.hasobject:
        raise ValueError(f"an array of Python objects, {name}")
    return kind


class _Reader:
    """Rebuilds values, taking the arrays' bytes in the order in which they were packed."""

    def __init__(self, data: bytearray, offset: int):
        self._data, self._offset = data, offset

    def _array(self, dtype: str, shape: list[int]) -> np.ndarray:
        kind = _plain_dtype(dtype)
        # Over the message's own memory, which lives as long as one of its arrays: writable. Raises
        # TypeError for what goes beyond the message's end.
        array = np.ndarray(shape, kind, self._data, self._offset)
        self._offset += array.nbytes + _padding(array.nbytes)
        return array

    def read(self, value: Any) -> Any:
        """Undo `_pack`."""
        if type(value) is list:
            return [self.read(item) for item in value]
        if type(value) is not dict:
            return value
        if "$array" in value:
            return self._array(*value["$array"])
        if "$type" in value:
            cls = _TYPES[value["$type"]]
            fields = [self.read(item) for item in value["fields"]]
            if len(fields) != len(_FIELDS[cls]):
                raise ValueError(f"{value['$type']} with {len(fields)} fields")
            return cls(*fields)
        if "$tuple" in value:
            return tuple(self.read(value["$tuple"]))
        return {key: self.read(item) for key, item in value.items()}


def encode(message: Any) -> bytes:
    """Return `message`, one of the dataclasses above, as bytes.

    Raises:
        TypeError: if a field holds something other than plain values, arrays and these dataclasses.
    """
    arrays: list[np.ndarray] = []
    header = {"version": VERSION, "message": _pack(message, arrays)}
    text = _to_json(header).encode()
    text += b" " * _padding(len(text))
    parts = [_LENGTH.pack(_MARK, len(text)), text]
    for array in arrays:
        parts += [array.data, bytes(_padding(array.nbytes))]
    return b"".join(parts)


def decode(data: bytes) -> Any:
    """Return the message that `encode` made these bytes from.

    Raises:
        SimulatorError: for other bytes, a damaged message or another version of the format.
    """
    try:
        mark, length = _LENGTH.unpack_from(data)
        if mark != _MARK:
            raise ValueError(f"starts with {mark!r}")
        end = _LENGTH.size + length
        header = json.loads(data[_LENGTH.size : end])
        version = header["version"]
        if version == VERSION:
            return _Reader(bytearray(data), end).read(header["message"])
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise SimulatorError(
            f"expected a bridge message (format {VERSION}), got {len(data)} other bytes: {error!r}"
        ) from error
    raise SimulatorError(
        f"expected bridge messages of format {VERSION}, got format {version}: trainer and "
        "simulator run different versions of evac_jax"
    )
