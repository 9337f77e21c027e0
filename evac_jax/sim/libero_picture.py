"""Draws a part of LIBERO's picture, in the process that has LIBERO (`libero_worker`).

Only what will be seen is drawn: MuJoCo's camera is narrowed to the part, so nothing is drawn and
then cut off.
"""

from collections.abc import Sequence

import mujoco
import numpy as np


class Picture:
    """Draws square frames of one scene.

    Args:
        sim: robosuite's simulation; its off-screen buffers are made anew in the size needed.
        camera: its name.
        size: height and width of the frames, pixels.
        crop: left, right, top and bottom of the part, as shares of the picture turned by 180
            degrees; squeezed into the square.
        oversample: draw this many times as large without multisampling, and average; 0 = draw in
            the final size with MuJoCo's multisampling.
    """

    def __init__(self, sim, camera: str, size: int, crop: Sequence[float], oversample: int):
        # Not its parts: the old ones must be gone before the next scene's are made.
        self._sim, self._camera = sim, sim.model.camera_name2id(camera)
        self._size, self._crop, self._times = size, crop, max(oversample, 1)
        if oversample:
            sim.model.vis.quality.offsamples = 0  # read when the buffers are made
        pixels = size * self._times
        sim._render_context_offscreen.update_offscreen_size(pixels, pixels)

    def draw(self) -> np.ndarray:
        """Return the frame as MuJoCo gives it, bottom row first: uint8 [size size 3]."""
        context, pixels = self._sim._render_context_offscreen, self._size * self._times
        context.cam.type, context.cam.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self._camera
        mujoco.mjv_updateScene(
            *(self._sim.model._model, self._sim.data._data),
            *(context.vopt, context.pert, context.cam),
            *(mujoco.mjtCatBit.mjCAT_ALL, context.scn),
        )
        for eye in context.scn.camera:
            self._narrow(eye)
        viewport = mujoco.MjrRect(0, 0, pixels, pixels)
        mujoco.mjr_render(viewport, context.scn, context.con)
        drawn = np.empty((pixels, pixels, 3), np.uint8)
        mujoco.mjr_readPixels(drawn, None, viewport, context.con)
        if self._times == 1:
            return drawn
        parts = drawn.reshape(self._size, self._times, self._size, self._times, 3)
        area = self._times**2  # up to 64 x 255 fits into 16 bits
        return ((parts.sum((1, 3), dtype=np.uint16) + area // 2) // area).astype(np.uint8)

    def _narrow(self, eye: mujoco.MjvGLCamera) -> None:
        """Let a camera of the whole, square picture see the part only."""
        left, right, top, bottom = self._crop
        half = eye.frustum_top
        # Turned by 180 degrees and bottom row first is mirrored, not upside down.
        eye.frustum_center = half * (1 - left - right)
        eye.frustum_width = half * (right - left)  # half the width
        eye.frustum_top, eye.frustum_bottom = half * (1 - 2 * top), half * (1 - 2 * bottom)
