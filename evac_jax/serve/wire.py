"""Messages as openpi's clients write them: msgpack, with NumPy arrays as small maps.

An array is {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}, a NumPy
scalar {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f8"}.

Source: openpi-client 0.1.2, `msgpack_numpy`. Difference: what a client sends is checked while it is
read, and what no observation needs ends the reading: lists, types other than numbers, deep
nesting. So a message costs little more memory than its bytes.
"""

import math
import re
from typing import Any

import msgpack
import numpy as np

from evac_jax.errors import DataError

MAX_ENTRIES = 64  # of one map
MAX_DIMENSIONS = 8
MAX_TEXT = 10_000  # bytes of a key or an instruction
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


def pack(message: dict[str, Any]) -> bytes:
    """Return a message of plain values, NumPy arrays and nested maps as bytes."""
    packed = msgpack.packb(message, default=_packed)
    assert packed is not None  # as its types allow
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Return a client's message; arrays are read-only views of `data`.

    Raises:
        DataError: it is not a map of arrays, numbers and text, or holds too much of them.
    """
    try:
        message = msgpack.unpackb(
            data,
            object_hook=_unpacked,
            list_hook=_shape,
            max_array_len=MAX_DIMENSIONS,
            max_map_len=MAX_ENTRIES,
            max_str_len=MAX_TEXT,
            max_ext_len=0,
        )
    # msgpack's own errors are of the first two types.
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = f" ({error})" if str(error) else ""
        raise DataError(f"a message: expected an observation in msgpack{reason}") from error
    if not isinstance(message, dict):
        raise DataError(f"a message: expected a map of observations, got {type(message).__name__}")
    return message


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray) and _NUMBERS.fullmatch(value.dtype.str):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    raise TypeError(f"expected arrays of numbers and plain values, got {type(value).__name__}")


def _shape(entries: list) -> list:
    """Let only short lists of integers pass, which are shapes; any other ends the reading."""
    if not all(type(entry) is int for entry in entries):
        raise DataError("a message: expected arrays as NumPy arrays, got a list")
    return entries


def _unpacked(entry: dict) -> Any:
    """Return a map as the array or the number that it stands for, else as it is."""
    if b"__ndarray__" in entry:
        return _array(entry.get(b"data"), entry.get(b"dtype"), entry.get(b"shape"))
    if b"__npgeneric__" in entry:
        return entry.get(b"data")
    maps = [value for value in entry.values() if isinstance(value, dict)]
    if any(isinstance(inner, dict) for value in maps for inner in value.values()):
        raise DataError("a message: expected maps at most two deep, got more")
    return entry


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    if not isinstance(dtype, str) or not _NUMBERS.fullmatch(dtype):
        got = dtype[:40] if isinstance(dtype, str) else type(dtype).__name__
        raise DataError(f"an array: expected a dtype of numbers such as '|u1', got {got!r}")
    if not isinstance(shape, list) or not isinstance(data, bytes):
        raise DataError("an array: expected its shape as a list and its data as bytes")
    # In Python's integers, because NumPy's overflow.
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if min(shape, default=0) < 0 or expected != len(data):
        raise DataError(
            f"an array of shape {shape} and dtype {dtype}: expected {expected} bytes, got "
            f"{len(data)}"
        )
    return np.ndarray(tuple(shape), np.dtype(dtype), data)
