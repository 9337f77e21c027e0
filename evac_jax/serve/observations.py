"""Reads a robot's observation: which keys, which frames, which instruction."""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from evac_jax.config.schema import ServeConfig
from evac_jax.errors import DataError


def read(
    message: dict[str, Any], settings: ServeConfig
) -> tuple[UInt8[np.ndarray, "V H W 3"], str]:
    """Return the camera frames and the instruction of a message.

    Nothing is guessed: a key that is missing, or that `settings` does not name, is an error, and so
    is a frame of another type or size.

    Raises:
        DataError: one sentence for the client.
    """
    found = _flat(message)
    needed = (*settings.image_keys, settings.prompt_key)
    if missing := [key for key in needed if key not in found]:
        raise DataError(f"an observation: expected {list(needed)}, got none of {missing}")
    if unknown := sorted(set(found) - set(needed) - set(settings.unread_keys)):
        names = [key[:80] for key in unknown[:8]]
        raise DataError(
            f"an observation: nothing reads {names}; leave them out, or name them in the server's "
            "--config.serve.unread_keys"
        )
    prompt = found[settings.prompt_key]
    if not isinstance(prompt, str) or not prompt.strip():
        got = "an empty one" if isinstance(prompt, str) else type(prompt).__name__
        raise DataError(f"{settings.prompt_key}: expected an instruction as text, got {got}")
    frames = [_frame(key, found[key], settings) for key in settings.image_keys]
    if len({frame.shape for frame in frames}) > 1:
        shapes = [frame.shape[:2] for frame in frames]
        raise DataError(f"{list(settings.image_keys)}: expected one size of frames, got {shapes}")
    return np.stack(frames), prompt


def _flat(message: dict[Any, Any]) -> dict[str, Any]:
    """Return a message with the keys of nested maps joined by "/"."""
    flat: dict[str, Any] = {}
    for key, value in message.items():
        if not isinstance(key, str):
            raise DataError(f"an observation: expected keys of text, got {type(key).__name__}")
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        for name, entry in inner.items():
            path = f"{key}/{name}" if name else key
            if path in flat:
                raise DataError(f"an observation: the key {path!r:.80} is there twice")
            flat[path] = entry
    return flat


def _frame(key: str, frame: Any, settings: ServeConfig) -> UInt8[np.ndarray, "H W 3"]:
    if not isinstance(frame, np.ndarray):
        raise DataError(f"{key}: expected a NumPy array, got {type(frame).__name__}")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise DataError(
            f"{key}: expected a frame uint8 [height, width, 3] of RGB, got {frame.dtype} "
            f"{list(frame.shape)}"
        )
    if frame.shape[:2] not in settings.frame_shapes:
        raise DataError(
            f"{key}: expected a frame of {' or '.join(settings.image_sizes)} pixels, got "
            f"{frame.shape[0]}x{frame.shape[1]}; resize it, or start the server with this size in "
            "--config.serve.image_sizes"
        )
    return frame
