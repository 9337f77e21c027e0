"""Start scenes of the miniature as a source of initial states."""

import numpy as np

from evac_jax.miniature import render, scene, tasks
from evac_jax.sim.initial_states import Starts, checked_ids


class MiniatureStarts:
    """Start scenes of the miniature tabletop: the start id is the scene's seed.

    Args:
        num_starts: seeds to offer; any number up to 2**62 costs nothing.
        image_size: height and width of the pictures, pixels.
    """

    def __init__(self, num_starts: int = 3_000_000, image_size: int = 64):
        self._image_size = image_size
        self.num_starts = num_starts
        self.instructions = tasks.INSTRUCTIONS
        intrinsic, c2w = render.camera(image_size)
        self.camera = intrinsic[None], c2w[None]
        self.camera_size = (image_size, image_size)

    def load(self, ids: np.ndarray) -> Starts:
        """Return the scenes of `ids`, int64 [B]; each different id is drawn once."""
        ids, rows = np.unique(checked_ids(ids, self.num_starts), return_inverse=True)
        scenes = scene.sample_scenes(ids)
        images = render.render(scenes, self._image_size)[:, None]
        return Starts(images[rows], scenes.pose[rows], scenes.task[rows])
