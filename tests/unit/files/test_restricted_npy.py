import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from evac_jax.errors import DataError
from evac_jax.files.restricted_npy import load_array, load_objects, unpickle


class Call:
    """Pickles to a call of `function`, followed by a state if there is one."""

    def __init__(self, function, arguments, *state):
        self._parts = function, arguments, *state

    def __reduce__(self):
        return self._parts


def read(value, protocol=4):
    return unpickle(io.BytesIO(pickle.dumps(value, protocol)), Path("file.npy"))


@pytest.mark.parametrize("protocol", [4, 5])
def test_what_numpy_pickles_is_read_back(protocol):
    value = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "swapped": np.arange(3, dtype=">i4"),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array(["go", "further"]),
        "bytes": np.array([b"go", b"further"]),
        "objects": np.array([{"a": np.float32(2.5)}, None], object),
        "scalars": [np.float64(0.1), np.bool_(True), np.str_("task")],
        "empty": np.zeros((0, 3)),
    }
    found = read(value, protocol)
    for name, array in value.items():
        if isinstance(array, np.ndarray):
            assert type(found[name]) is np.ndarray
            assert found[name].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found[name], array)
    assert found["scalars"] == value["scalars"]
    assert type(found["objects"][0]["a"]) is np.float32


@pytest.mark.parametrize(
    "state",
    [
        (1, (4,), np.dtype("f4"), False, b"\0" * 8),
        (1, (2,), np.dtype("O"), False, b"\1" * 16),  # addresses of objects that are none
        (1, (-1,), np.dtype("f4"), False, b""),
        (1, (2**40, 2**40), np.dtype("f4"), False, b"\0" * 8),
    ],
)
def test_array_whose_data_do_not_fit_its_type_and_shape_is_refused(state):
    reconstruct = np.zeros(1).__reduce__()[0]
    with pytest.raises(DataError, match="an array"):
        read(Call(reconstruct, (np.ndarray, (0,), b"b"), state))


def test_size_in_the_place_of_content_is_refused():
    with pytest.raises(DataError, match="bytearray of size 1000000000000"):
        read(Call(bytearray, (10**12,)))


def test_types_with_fields_or_times_are_refused():
    for array in (np.zeros(2, [("a", "f4")]), np.zeros(2, "M8[s]")):
        with pytest.raises(DataError, match="array type"):
            read(array)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00\x0a\x00{'descr': ("])
def test_damaged_file_of_plain_numbers_is_one_kind_of_error(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match="npy|header"):
        load_array(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a\.npy: not a readable npy file"):
        load_objects(tmp_path / "a.npy")
