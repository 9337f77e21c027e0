"""Frames about which even the truth is in doubt: those just before and just after success.

A simulator calls contact success. One frame earlier the picture is nearly the same, and so it is
one frame later; which of the two a frame is cannot be seen in it.
"""

import numpy as np

from evac_jax.files.recordings import Episodes

NO_MARGIN = (0, 0)


def near_change(data: Episodes, before: int, after: int) -> np.ndarray:
    """Return which frames are near a change of `success` within an episode, bool [F].

    Args:
        before: how many frames are, up to the last one with the old label.
        after: how many frames are, from the first one with the new label on.
    """
    near = np.zeros(len(data.success), bool)
    for first, length in zip(data.first, data.length, strict=True):
        labels = np.asarray(data.success[first : first + length + 1])
        for change in np.flatnonzero(labels[1:] != labels[:-1]) + 1:
            low, high = max(change - before, 0), min(change + after, length + 1)
            near[first + low : first + high] = True
    return near
