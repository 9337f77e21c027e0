"""Reads pickled arrays, `.npy` files of objects too, without running what is hidden in them."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evac_jax.errors import DataError

# All that numpy writes when it pickles an object array of dicts, arrays and scalars. The dotted
# module moved from numpy.core to numpy._core in numpy 2.
_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    *(
        ("builtins", name)
        for name in ("bool", "int", "float", "complex", "str", "bytes", "bytearray")
    ),
    *(("builtins", name) for name in ("dict", "list", "tuple", "set", "frozenset")),
}


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


def load_array(path: Path) -> np.ndarray:
    """Return the array of an `.npy` file of plain numbers.

    The file is mapped first, so a header that promises more than there is asks for no memory.

    Raises:
        OSError, ValueError: the file is missing or damaged, or holds objects.
    """
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False))


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
    """A pickle asked for a name that is not admitted."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):
            return encode_latin1
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        # numpy 2 keeps the old module only as a shim that warns.
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)

    def persistent_load(self, pid):
        raise _RefusedError(f"persistent object {pid!r}")
