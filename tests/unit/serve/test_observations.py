import dataclasses

import numpy as np
import pytest

from evac_jax.config.schema import ServeConfig
from evac_jax.errors import DataError
from evac_jax.serve.observations import read

SETTINGS = ServeConfig(image_sizes=("4x6",))
FRAME = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
LIBERO = {
    "observation/image": FRAME,
    "observation/wrist_image": FRAME + 1,
    "observation/state": np.zeros(8),
    "prompt": "open the drawer",
}


def test_libero_clients_are_understood_as_they_are():
    frames, prompt = read(LIBERO, SETTINGS)
    np.testing.assert_array_equal(frames, FRAME[None])
    assert prompt == "open the drawer"


def test_cameras_stand_in_the_order_of_the_keys_and_may_be_nested():
    settings = dataclasses.replace(
        SETTINGS, image_keys=("images/low", "images/high"), prompt_key="task", unread_keys=()
    )
    message = {"images": {"high": FRAME + 1, "low": FRAME}, "task": "go"}
    frames, prompt = read(message, settings)
    np.testing.assert_array_equal(frames, [FRAME, FRAME + 1])
    assert prompt == "go"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt": None}, "prompt: expected an instruction as text, got NoneType"),
        ({"prompt": "  "}, "got an empty one"),
        ({"observation/image": "text"}, "expected a NumPy array, got str"),
        ({"observation/image": FRAME / 255}, r"uint8 \[height, width, 3\] of RGB, got float64"),
        ({"observation/image": FRAME[None]}, r"got uint8 \[1, 4, 6, 3\]"),
        ({"observation/image": FRAME[:2]}, "expected a frame of 4x6 pixels, got 2x6; resize it"),
        ({"observation/depth": FRAME}, r"nothing reads \['observation/depth'\]"),
        ({b"observation/depth": FRAME}, "expected keys of text, got bytes"),
        ({"observation": {"image": FRAME}}, "'observation/image' is there twice"),
    ],
)
def test_other_observations_are_refused(change, why):
    with pytest.raises(DataError, match=why):
        read(LIBERO | change, SETTINGS)


def test_missing_keys_are_named_when_an_observation_lacks_them():
    with pytest.raises(DataError, match=r"got none of \['observation/image', 'prompt'\]"):
        read({"observation/state": 1.0}, SETTINGS)


def test_frames_of_two_sizes_are_refused_when_both_are_served():
    settings = dataclasses.replace(
        SETTINGS, image_keys=("a", "b"), image_sizes=("4x6", "2x6"), unread_keys=()
    )
    with pytest.raises(DataError, match="expected one size of frames"):
        read({"a": FRAME, "b": FRAME[:2], "prompt": "go"}, settings)
