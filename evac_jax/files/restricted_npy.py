"""Reads pickled arrays, `.npy` files of objects too, without running what is hidden in them."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from evac_jax.errors import DataError


def load_objects(path: Path) -> np.ndarray:
    """Return the array of an `.npy` file; object arrays only through the restricted unpickler.

    Raises:
        DataError: for a damaged file, or one whose pickle needs more than numpy and builtins.
    """
    formats = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version not in formats:
                raise DataError(f"{path}: npy format {version} is not supported")
            shape, _, dtype = formats[version](stream)
            if not dtype.hasobject:
                stream.seek(0)
                return np.load(stream, allow_pickle=False)
            array = unpickle(stream, path)
    except DataError:
        raise
    except Exception as error:  # damaged headers raise many exceptions, as damaged pickles do
        raise DataError(f"{path}: not a readable npy file: {error!r}") from error
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise DataError(f"{path}: expected an array of shape {shape} inside")
    return array


def map_array(path: Path) -> np.ndarray:
    """Return the array of an `.npy` file of plain numbers, mapped into memory.

    Raises:
        OSError, ValueError: the file is missing or damaged, or holds objects.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged header raises many exceptions
        raise ValueError(f"not a readable npy file: {error!r}") from error


def load_array(path: Path) -> np.ndarray:
    """Return the array of an `.npy` file of plain numbers.

    The file is mapped first, so a header that promises more than there is asks for no memory.

    Raises:
        OSError, ValueError: the file is missing or damaged, or holds objects.
    """
    return np.array(map_array(path))


def unpickle(stream: BinaryIO, path: Path) -> Any:
    """Return the object of a pickle that needs only numpy and plain builtins.

    Args:
        path: where the pickle comes from, for messages.

    Raises:
        DataError: for a damaged pickle, or one that needs more.
    """
    try:
        return _RestrictedUnpickler(stream).load()
    except _RefusedError as error:
        raise DataError(
            f"{path}: refused, its pickle asks for {error}; only numpy arrays and plain builtins "
            "are admitted, because loading anything else could run code. "
            "Save it again as dicts of arrays, numbers and strings"
        ) from error
    # A damaged pickle can raise any exception; all of them mean a bad file.
    except Exception as error:
        raise DataError(f"{path}: not a readable pickle: {error!r}") from error


def encode_latin1(text: str, encoding: str) -> bytes:
    """Replaces _codecs.encode for pickles of arrays, without its choice of codecs.

    Raises:
        UnpicklingError: another codec is asked for.
    """
    if encoding != "latin1":
        raise _RefusedError(f"_codecs.encode with {encoding!r}")
    return text.encode(encoding)


class _RefusedError(pickle.UnpicklingError):
    """A pickle asked for something that is not admitted."""


class _Kind:
    """Stands for a dtype while a pickle is read: NumPy's own takes any state that it is given."""

    def __init__(self, name: str, *_):
        self.dtype = np.dtype(name) if isinstance(name, str) else np.dtype("V1")
        if self.dtype.kind not in "biufcSUO":
            raise _RefusedError(f"the array type {name!r}")

    def __setstate__(self, state: tuple) -> None:
        _, order, *more = state
        # No fields, no parts, no other size: those of a plain type say nothing new.
        if more[:3] != [None] * 3 or more[3] not in (-1, self.dtype.itemsize):
            raise _RefusedError(f"an array type with {state!r}")
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


def _array_state(state: tuple) -> tuple:
    """Return an array's state for NumPy, which trusts the state that it is given.

    Raises:
        _RefusedError: shape, type and data do not belong together.
    """
    _, shape, kind, is_fortran, data = state
    count, has_objects = _count(shape), kind.dtype.hasobject
    fits = type(data) is list if has_objects else type(data) in (bytes, bytearray)
    if not fits or len(data) != (count if has_objects else count * kind.dtype.itemsize):
        raise _RefusedError(f"an array {shape} of {kind.dtype} with other data")
    return 1, shape, kind.dtype, bool(is_fortran), data


def _count(shape: tuple[int, ...]) -> int:
    if any(type(n) is not int or n < 0 for n in shape):
        raise _RefusedError(f"an array of shape {shape!r}")
    return math.prod(shape)


def _reconstruct(*_) -> np.ndarray:
    return np.empty(0, np.uint8)  # its state follows


def _scalar(kind: _Kind, data: bytes) -> Any:
    return _frombuffer(data, kind, (1,), "C")[0]


def _frombuffer(
    data: bytes, kind: _Kind, shape: tuple[int, ...], order: Literal["C", "F"], *_
) -> np.ndarray:
    if kind.dtype.hasobject or len(data) != _count(shape) * kind.dtype.itemsize:
        raise _RefusedError(f"an array {shape} of {kind.dtype} with other data")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _sized(kind: type) -> Callable[..., Any]:
    """Return bytes or bytearray without the form that makes as many zeros as it is told."""

    def make(*content):
        if content and isinstance(content[0], int):
            raise _RefusedError(f"{kind.__name__} of size {content[0]}")
        return kind(*content)

    return make


# All that numpy writes when it pickles an object array of dicts, arrays and scalars, and what
# stands for it here. The dotted module moved from numpy.core to numpy._core in numpy 2.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # only named, never called
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): encode_latin1,
    ("builtins", "bytes"): _sized(bytes),
    ("builtins", "bytearray"): _sized(bytearray),
    **{
        (f"numpy.{core}.{module}", name): stands
        for core in ("core", "_core")
        for module, name, stands in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
    **{
        ("builtins", kind.__name__): kind
        for kind in (bool, int, float, complex, str, dict, list, tuple, set, frozenset)
    },
}


class _RestrictedUnpickler(pickle._Unpickler):  # noqa: SLF001
    """In Python: the one in C crashes on some damaged files, and allocates what they ask for."""

    def load_build(self):
        if isinstance(self.stack[-2], np.ndarray):
            self.stack[-1] = _array_state(self.stack[-1])
        super().load_build()

    dispatch = {
        **pickle._Unpickler.dispatch,  # noqa: SLF001
        pickle.BUILD[0]: lambda unpickler: unpickler.load_build(),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, pid):
        raise _RefusedError(f"persistent object {pid!r}")
