"""What travels over the pipe between trainer and simulator: small messages, never frames.

A message is one block of bytes: a mark, the version of this format, its kind and a body. `Reset`,
`Step` and `Reply`, which every exchange needs, are integers followed by the raw bytes of arrays,
whose sizes the integers give; the receiver uses the bytes in place. All other messages are rare and
are JSON, which would be too slow for an exchange. No pickle, so a message can hold data but never
code. Standard library and NumPy only, because both processes import this.

One exchange: `Start` -> `Hello` -> `Attach`, then any number of `Reset` or `Step` -> `Reply` and of
`Park`, and `Close`. At any moment the simulator may answer `Failure` instead, after which it exits.
"""

import dataclasses
import json
import struct
from typing import Any

import numpy as np

from evac_jax.bridge.types import EnvSpec, StepResult
from evac_jax.errors import SimulatorError
from policies.spec import ActionSpec

VERSION = 4  # of this format; both ends must agree
_HEAD = struct.Struct("<4sHH")  # mark, version, kind
_MARK = b"EVJX"
_JSON, _RESET, _STEP, _REPLY = range(4)
_NUMBERS = struct.Struct("<7q")  # eight bytes each, so that the arrays behind them are aligned
_to_json = json.JSONEncoder(separators=(",", ":")).encode


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
    cls.__name__: cls for cls in (Start, Hello, Attach, Park, Failure, Close, EnvSpec, ActionSpec)
}
_FIELDS = {cls: tuple(field.name for field in dataclasses.fields(cls)) for cls in _TYPES.values()}


def _pack(value: Any) -> Any:
    """Return `value` as JSON values."""
    kind = type(value)
    if kind in (int, float, str, bool) or value is None:
        return value
    if kind in _FIELDS:
        fields = [_pack(getattr(value, name)) for name in _FIELDS[kind]]
        return {"$type": kind.__name__, "fields": fields}
    if isinstance(value, np.generic):
        return value.item()
    if kind is tuple:  # JSON knows lists only
        return {"$tuple": [_pack(item) for item in value]}
    if kind is list:
        return [_pack(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) and not key.startswith("$") for key in value):
            raise TypeError(f"keys must be strings that do not start with '$', got {list(value)}")
        return {key: _pack(item) for key, item in value.items()}
    raise TypeError(f"cannot send {kind.__name__}: {value!r}")


def _unpack(value: Any) -> Any:
    """Undo `_pack`."""
    if type(value) is list:
        return [_unpack(item) for item in value]
    if type(value) is not dict:
        return value
    if "$type" in value:
        cls, fields = _TYPES[value["$type"]], _unpack(value["fields"])
        if len(fields) != len(_FIELDS[cls]):
            raise ValueError(f"{value['$type']} with {len(fields)} fields")
        return cls(*fields)
    if "$tuple" in value:
        return tuple(_unpack(value["$tuple"]))
    return {key: _unpack(item) for key, item in value.items()}


def _join(kind: int, numbers: tuple[int, ...], *parts) -> bytes:
    return b"".join((_HEAD.pack(_MARK, VERSION, kind), _NUMBERS.pack(*numbers), *parts))


def _encode_reset(message: Reset) -> bytes:
    starts = np.ascontiguousarray(message.starts, np.int64)
    numbers = (message.request, message.slot, message.part, message.seed, len(starts), 0, 0)
    return _join(_RESET, numbers, starts)


def _encode_step(message: Step) -> bytes:
    actions = np.ascontiguousarray(message.actions, np.float32)
    return _join(_STEP, (message.request, message.slot, message.part, 0, *actions.shape), actions)


def _encode_reply(message: Reply) -> bytes:
    result = message.result
    (B, K), P, text = result.rewards.shape, result.proprio.shape[1], b""
    if result.episode or result.seconds:
        text = _to_json([list(result.episode), _pack(result.seconds)]).encode()
    floats = (result.proprio, result.rewards, *result.episode.values())
    flags = (result.terminated, result.truncated, result.success)
    return _join(
        _REPLY,
        (message.request, message.slot, B, K, P, len(result.episode), len(text)),
        np.ascontiguousarray(result.task, np.int32),
        *(np.ascontiguousarray(values, np.float32) for values in floats),
        *(np.ascontiguousarray(values, np.bool_) for values in flags),
        text,
    )


_ENCODERS = {Reset: _encode_reset, Step: _encode_step, Reply: _encode_reply}


def encode(message: Any) -> bytes:
    """Return `message`, one of the dataclasses above, as bytes.

    Raises:
        TypeError: if a field holds something other than plain values, these dataclasses, and
            arrays of numbers where one is declared.
    """
    if encoder := _ENCODERS.get(type(message)):
        return encoder(message)
    return _HEAD.pack(_MARK, VERSION, _JSON) + _to_json(_pack(message)).encode()


def _decode_words(text: bytes) -> Any:
    message = _unpack(json.loads(text))
    if type(message) not in _FIELDS:
        raise ValueError(f"a {type(message).__name__}")
    return message


class _Reader:
    """Takes a message's body apart: integers, then arrays and text.

    Arrays lie in the message's own memory, which lives as long as one of them: writable.
    """

    def __init__(self, data: bytearray):
        self.numbers = _NUMBERS.unpack_from(data, _HEAD.size)
        self._data, self._offset = data, _HEAD.size + _NUMBERS.size

    def array(self, dtype: type, *shape: int) -> np.ndarray:
        """Return the next array. Raises TypeError for what goes beyond the message's end."""
        array = np.ndarray(shape, dtype, self._data, self._offset)
        self._offset += array.nbytes
        return array

    def json(self, size: int) -> Any:
        """Return the JSON value of the next `size` bytes."""
        self._offset += size
        return json.loads(self._data[self._offset - size : self._offset])

    def close(self) -> None:
        """Raise ValueError if something is left."""
        if self._offset != len(self._data):
            raise ValueError(f"{len(self._data) - self._offset} bytes too many")


def _decode_reply(reader: _Reader) -> Reply:
    request, slot, B, K, P, figures, size = reader.numbers
    task, proprio = reader.array(np.int32, B), reader.array(np.float32, B, P)
    rewards = reader.array(np.float32, B, K)
    episode = [reader.array(np.float32, B) for _ in range(figures)]
    flags = [reader.array(np.bool_, B) for _ in range(3)]
    names, seconds = reader.json(size) if size else ((), {})
    episode = dict(zip(names, episode, strict=True))
    return Reply(request, slot, StepResult(task, proprio, rewards, *flags, episode, seconds))


def _decode_exchange(kind: int, data: bytearray) -> Any:
    reader = _Reader(data)
    request, slot, part, seed, *shape = reader.numbers
    if kind == _STEP:
        message = Step(request, slot, part, reader.array(np.float32, *shape))
    elif kind == _REPLY:
        message = _decode_reply(reader)
    elif kind == _RESET:
        message = Reset(request, slot, part, reader.array(np.int64, shape[0]), seed)
    else:
        raise ValueError(f"kind {kind}")
    reader.close()
    return message


def decode(data: bytes) -> Any:
    """Return the message that `encode` made these bytes from.

    Raises:
        SimulatorError: for other bytes, a damaged message or another version of the format.
    """
    try:
        mark, version, kind = _HEAD.unpack_from(data)
        if mark != _MARK:
            raise ValueError(f"starts with {mark!r}")
        if version == VERSION and kind == _JSON:
            return _decode_words(data[_HEAD.size :])
        if version == VERSION:
            return _decode_exchange(kind, bytearray(data))
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise SimulatorError(
            f"expected a bridge message (format {VERSION}), got {len(data)} other bytes: {error!r}"
        ) from error
    raise SimulatorError(
        f"expected bridge messages of format {VERSION}, got format {version}: trainer and "
        "simulator run different versions of evac_jax"
    )
