import msgpack
import numpy as np
import pytest

from benchmarks.policy_client import decoded, encoded
from evac_jax.errors import DataError
from evac_jax.serve import wire

ARRAY = {b"__ndarray__": True, b"data": bytes(6), b"dtype": "|u1", b"shape": [2, 3]}


@pytest.mark.parametrize(
    "dtype", ["uint8", "int64", "float32", "float64", "float16", "bool", ">f4"]
)
def test_arrays_pass_both_ways_as_openpis_clients_write_them(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    for found in (wire.unpack(encoded({"x": array})), decoded(wire.pack({"x": array}))):
        assert found["x"].dtype == array.dtype
        np.testing.assert_array_equal(found["x"], array)


def test_plain_values_scalars_empty_arrays_and_one_nested_map_pass():
    scalar = {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f8"}
    empty = {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [0, 7]}
    message = {"text": "go", "none": None, "scalar": scalar, "empty": empty, "images": {"a": ARRAY}}
    found = wire.unpack(msgpack.packb(message))
    assert (found["text"], found["none"], found["scalar"]) == ("go", None, 1.5)
    assert found["empty"].shape == (0, 7)
    assert found["images"]["a"].shape == (2, 3)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({b"dtype": "O"}, "a dtype of numbers"),
        ({b"dtype": "V9"}, "a dtype of numbers"),
        ({b"dtype": "(3,)u1"}, "a dtype of numbers"),
        ({b"dtype": "c8"}, "a dtype of numbers"),
        ({b"dtype": 5}, "got 'int'"),
        ({b"shape": [2, 4]}, "expected 8 bytes, got 6"),
        ({b"shape": [-2, -3]}, r"shape \[-2, -3\]"),
        ({b"shape": [2**40, 2**40]}, "bytes, got 6"),
        ({b"shape": [0, 2**63], b"data": b""}, "expected an observation in msgpack"),
        ({b"shape": 6}, "its shape as a list"),
        ({b"shape": ["2", 3]}, "got a list"),
        ({b"shape": [1] * 9}, "max_array_len"),
        ({b"data": "text"}, "its data as bytes"),
    ],
)
def test_array_is_refused_when_its_bytes_are_not_what_it_says(entry, why):
    with pytest.raises(DataError, match=why):
        wire.unpack(msgpack.packb({"x": ARRAY | entry}))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "msgpack"),
        (b"\xc1", "msgpack"),
        (b"GET / HTTP/1.1\r\n\r\n", "msgpack"),
        (msgpack.packb({"x": 1}) + b"more", "msgpack"),
        (msgpack.packb({"x": 1})[:-1], "msgpack"),
        (msgpack.packb({5: 1}), "msgpack"),
        (msgpack.packb({"x": msgpack.ExtType(5, b"code")}), "max_ext_len"),
        (msgpack.packb({"prompt": "a" * 20_000}), "max_str_len"),
        (msgpack.packb({str(n): n for n in range(65)}), "max_map_len"),
        (msgpack.packb({"x": [[1, 2], [3, 4]]}), "got a list"),
        (msgpack.packb({"x": {"y": {"z": {"w": 1}}}}), "two deep"),
        (b"\x91" * 100_000, "msgpack"),
        (b"\x81\xa1x" * 100_000 + b"\xc0", "msgpack|two deep"),
        (msgpack.packb([1, 2]), "a map of observations, got list"),
        (msgpack.packb("text"), "a map of observations, got str"),
        (msgpack.packb(ARRAY), "a map of observations, got ndarray"),
    ],
)
def test_other_messages_are_refused_in_one_line(data, why):
    with pytest.raises(DataError, match=why) as error:
        wire.unpack(data)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 200


def test_what_is_no_number_is_not_sent():
    with pytest.raises(TypeError, match="arrays of numbers"):
        wire.pack({"x": np.array(["text"])})
