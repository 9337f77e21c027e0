"""Episodes that begin at frames of recorded ones: at their first frames, or in their middle.

A keyframe is a frame in the middle of a recorded episode. A policy that never reaches the end of a
long task gets no reward to learn from; if it begins near the end, it does. Keyframes are named by
ids from `KEYFRAMES` on, so they can be mixed with the ordinary starts of any source.

Source: the idea after Salimans and Chen 2018, "Learning Montezuma's Revenge from a single
demonstration" (arXiv:1812.03381).
"""

import dataclasses

import numpy as np
from absl import logging

from evac_jax.bridge.types import KEYFRAMES
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import recordings
from evac_jax.files.instructions import numbers_in
from evac_jax.files.recordings import Episodes
from evac_jax.files.start_frames import keyframe_files
from evac_jax.sim.camera import Matrices
from evac_jax.sim.initial_states import InitialStates, NpyKeyframes, Starts


class RecordedStarts:
    """The first frames of recorded episodes as initial states; start n is episode n.

    Args:
        data: the recording; instructions of its card that do not occur in it are left out.
    """

    def __init__(self, data: Episodes):
        self.instructions = data.asked
        self.num_starts = data.num_episodes
        self.camera = np.array(data.intrinsic), np.array(data.c2w)
        self.camera_size = tuple(data.frames.shape[2:4])
        self._data = data
        self._task = data.numbered_as(self.instructions).task

    def load(self, ids: np.ndarray) -> Starts:
        """Return the first frames and poses of episodes `ids`, int64 [B]."""
        return self.frames(ids, np.zeros_like(ids))

    def frames(self, episodes: np.ndarray, steps: np.ndarray) -> Starts:
        """Return frames and poses at `steps` of `episodes`, both int64 [B]."""
        rows = self._data.rows(episodes, steps)
        images, poses = np.array(self._data.frames[rows]), np.array(self._data.poses[rows])
        return Starts(images, poses, self._task[episodes])


class FolderStarts(RecordedStarts):
    """`RecordedStarts` of the training part of a recording's folder."""

    def __init__(self, folder: str):
        super().__init__(recordings.load(folder).split()[0])


class Keyframes:
    """Frames between the first and the first successful (or last) one of training episodes.

    Args:
        folder: a recording, see docs/episodes.md.

    Attributes:
        count: keyframes; they are named KEYFRAMES .. KEYFRAMES + count - 1.
        instructions: of the episodes.
        camera: see `InitialStates`.
        data: the episodes.

    Raises:
        DataError: no episode has a frame in its middle.
    """

    def __init__(self, folder: str):
        self.data = data = recordings.load(folder).split()[0]
        ends = [int(data.length[n]) for n in range(data.num_episodes)]
        for n, length in enumerate(ends):
            success = np.asarray(data.success[data.rows(n, np.arange(length + 1))])
            ends[n] = int(success.argmax()) if success.any() else length
        self._episode = np.repeat(np.arange(data.num_episodes), np.maximum(np.array(ends) - 1, 0))
        self._step = np.concatenate([np.arange(1, end) for end in ends] or [np.zeros(0, np.int64)])
        self.count = len(self._step)
        self._recorded = RecordedStarts(data)
        self.instructions, self.camera = self._recorded.instructions, self._recorded.camera
        if not self.count:
            raise DataError(
                f"env.keyframe_data: {folder} has no training episode with a frame between its "
                "first and its first successful one; record longer episodes"
            )

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the episodes [B] and their steps [B] of keyframes `ids`, int64 [B].

        Raises:
            DataError: an id that names none.
        """
        places = np.asarray(ids, np.int64) - KEYFRAMES
        if len(places) and not (places.min() >= 0 and places.max() < self.count):
            raise DataError(
                f"keyframes: expected ids within {KEYFRAMES}..{KEYFRAMES + self.count - 1}, "
                f"got {ids}"
            )
        return self._episode[places], self._step[places]

    def load(self, ids: np.ndarray) -> Starts:
        """Return the keyframes named by `ids`, int64 [B]."""
        return self._recorded.frames(*self.find(ids))


def open_keyframes(folder: str) -> Keyframes | NpyKeyframes:
    """Return the keyframes of a recording, or of a folder with RLinf's keyframe files."""
    return NpyKeyframes(folder) if keyframe_files(folder) else Keyframes(folder)


class WithKeyframes:
    """Another source's starts, and keyframes behind them.

    Their instructions are matched by text; those of keyframes alone stand behind the source's.

    Raises:
        ConfigError: the keyframes' pictures or cameras are not like those of the source. A camera
            that they do not know is taken for the source's, and the log says so.
    """

    def __init__(self, source: InitialStates, keyframes: Keyframes | NpyKeyframes):
        self._source, self._keyframes = source, keyframes
        self.num_starts, self.num_keyframes = source.num_starts, keyframes.count
        self.instructions = tuple(dict.fromkeys((*source.instructions, *keyframes.instructions)))
        self._late_task = numbers_in(self.instructions, keyframes.instructions, "this source")
        self.camera, self.camera_size = source.camera, source.camera_size
        shapes = [self.load(np.array([n])).images.shape[1:] for n in (0, KEYFRAMES)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"env.keyframe_data: pictures of shape {shapes[1]} (views, height, width, RGB), "
                f"the other initial states have {shapes[0]}; record them alike"
            )
        if source.camera is not None:
            self._check_camera(source.camera)

    def _check_camera(self, ours: Matrices) -> None:
        theirs = self._keyframes.camera
        if theirs is None:
            logging.warning(
                "env.keyframe_data: its files do not tell their camera; it is taken for that of "
                "the other initial states"
            )
        # A world model is given one camera, and draws where the hand will be as that one sees it.
        elif not all(np.allclose(a, b, atol=1e-3) for a, b in zip(ours, theirs, strict=True)):
            told = [[np.round(m, 3).tolist() for m in camera] for camera in (ours, theirs)]
            raise ConfigError(
                "env.keyframe_data: expected the camera of the other initial states, intrinsic and "
                f"c2w {told[0]}, got {told[1]}; record keyframes with the same camera, or correct "
                "what is said of either (--camera of tools.episodes.import_starts, import_rlinf)"
            )

    def load(self, ids: np.ndarray) -> Starts:
        """Return the starts named by `ids`, int64 [B]."""
        ids = np.asarray(ids, np.int64)
        late = ids >= KEYFRAMES
        early_part = self._source.load(ids[~late])
        late_part = self._keyframes.load(ids[late])
        late_part = dataclasses.replace(late_part, task=self._late_task[late_part.task])
        if not late.any():
            return early_part
        if late.all():
            return late_part
        order = np.argsort(np.concatenate((np.flatnonzero(~late), np.flatnonzero(late))))
        pairs = zip(vars(early_part).values(), vars(late_part).values(), strict=True)
        return Starts(*(np.concatenate(pair)[order] for pair in pairs))
