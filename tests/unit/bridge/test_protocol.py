import struct
import subprocess
import sys

import numpy as np
import pytest

from evac_jax.bridge import protocol
from evac_jax.bridge.types import EnvSpec, StepResult
from evac_jax.errors import SimulatorError
from policies.spec import ActionSpec


def _result():
    return StepResult(
        task=np.array([1, 0], np.int32),
        proprio=np.arange(14, dtype=np.float32).reshape(2, 7),
        rewards=np.zeros((2, 3), np.float32),
        terminated=np.array([True, False]),
        truncated=np.array([False, False]),
        success=np.array([True, False]),
        episode={"return": np.array([5.0, 0.0], np.float32)},
        seconds={"imagine": np.float64(0.5)},
    )


def test_reply_survives_when_encoded():
    reply = protocol.decode(protocol.encode(protocol.Reply(7, 1, _result())))
    assert (reply.request, reply.slot) == (7, 1)
    expected = _result()
    for name in ("task", "proprio", "rewards", "terminated", "truncated", "success"):
        value = getattr(reply.result, name)
        assert value.dtype == getattr(expected, name).dtype
        np.testing.assert_array_equal(value, getattr(expected, name))
        assert value.flags.writeable
    np.testing.assert_array_equal(reply.result.episode["return"], expected.episode["return"])
    assert reply.result.seconds == {"imagine": 0.5}


def test_env_spec_is_equal_when_encoded():
    env = EnvSpec(4, (1, 8, 8, 3), 7, ActionSpec(7, 5), ("open the drawer", "übung"), 3, 20, 2)
    assert protocol.decode(protocol.encode(protocol.Hello(env))).env == env


def test_plain_values_keep_their_types_when_encoded():
    spec = {"config": {"list": [1, [2.5, None]], "tuple": (1, ("a",)), "flag": True}}
    assert protocol.decode(protocol.encode(protocol.Start(spec))).spec == spec


def test_reset_keeps_ids_of_keyframes_and_the_largest_seed():
    starts = np.array([-1, 2**40, 3])
    reset = protocol.decode(protocol.encode(protocol.Reset(1, 0, 1, starts, 2**32 - 1)))
    assert (reset.part, reset.seed) == (1, 2**32 - 1)
    np.testing.assert_array_equal(reset.starts, starts)


def test_arrays_keep_shape_when_empty_or_transposed():
    actions = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    step = protocol.decode(protocol.encode(protocol.Step(1, 0, 0, actions)))
    np.testing.assert_array_equal(step.actions, actions)
    nothing = protocol.Step(1, 0, 0, np.zeros((0, 3, 7), np.float32))
    assert protocol.decode(protocol.encode(nothing)).actions.shape == (0, 3, 7)


def test_encode_refuses_when_value_is_not_plain():
    with pytest.raises(TypeError, match="object"):
        protocol.encode(protocol.Step(1, 0, 0, np.full((1, 1, 1), object())))
    with pytest.raises(TypeError, match="cannot send set"):
        protocol.encode(protocol.Start({"environment": {1, 2}}))
    with pytest.raises(TypeError, match="must not|must be strings"):
        protocol.encode(protocol.Start({"$type": "Close"}))


def test_decode_explains_when_versions_differ():
    with pytest.raises(SimulatorError, match="format 99.*different versions"):
        protocol.decode(struct.pack("<4sHH", b"EVJX", 99, 0) + b"{}")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"hello world, this is not a message",
        lambda data: data[:-3],
        lambda data: data + b"more",
        lambda data: data[:6] + b"\x09" + data[7:],  # an unknown kind
        lambda data: data[:24] + struct.pack("<q", -1) + data[32:],  # a negative size
        lambda data: data[:24] + struct.pack("<q", 2**60) + data[32:],
    ],
)
def test_decode_raises_when_bytes_are_damaged(damage):
    with pytest.raises(SimulatorError, match="expected a bridge message"):
        protocol.decode(damage(protocol.encode(protocol.Reply(7, 1, _result()))))


@pytest.mark.parametrize("words", [b'{"$type":"Popen","fields":[]}', b"{}", b"[1]", b"\xff"])
def test_decode_raises_when_words_are_not_one_of_the_messages(words):
    head = protocol.encode(protocol.Close())[:8]
    assert protocol.decode(head + b'{"$type":"Close","fields":[]}') == protocol.Close()
    with pytest.raises(SimulatorError, match="expected a bridge message"):
        protocol.decode(head + words)


def test_protocol_imports_neither_jax_nor_torch_when_alone():
    code = (
        "import sys, evac_jax.bridge.protocol, evac_jax.bridge.slots, evac_jax.bridge.server;"
        "print({'jax', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
