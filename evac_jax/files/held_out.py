"""Which episodes no training sees, where their recorder does not say."""

import hashlib

import numpy as np

HELD_OUT = 0.1  # share of the scenes


def is_held_out(beginning: np.ndarray, instruction: str) -> bool:
    """Whether episodes that begin so are held out.

    Args:
        beginning: the first frame, or whatever else tells one scene from another.
    """
    digest = hashlib.sha256(np.ascontiguousarray(beginning).tobytes() + instruction.encode())
    return int.from_bytes(digest.digest()[:8], "big") < HELD_OUT * 2**64
