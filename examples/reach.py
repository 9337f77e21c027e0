"""A gymnasium environment, as you may have one: a hand reaches for a pad, seen from above.

It knows nothing of evac_jax; examples/gym_ground_truth.py makes a ground truth of it.
"""

import gymnasium
import numpy as np

SIZE = 64  # pixels of a frame's edge
STEP, NEAR = 0.1, 0.15  # largest move of one action, and distance that counts as reached


class Reach(gymnasium.Env):
    """The hand moves in [-1, 1]²; the episode ends when it reaches the pad.

    Observations are frames, uint8 [64 64 3]; actions are 7 numbers in [-1, 1], of which the first
    two move the hand to the right and up.
    """

    observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Put hand and pad anywhere; the same seed gives the same places."""
        super().reset(seed=seed)
        self.hand, self.pad = self.np_random.uniform(-0.9, 0.9, (2, 2))
        return self._frame(), {}

    def step(self, action: np.ndarray):
        """Move the hand; the reward is 1 when it reaches the pad."""
        move = np.clip(np.asarray(action, np.float64)[:2], -1, 1)
        self.hand = np.clip(self.hand + STEP * move, -1, 1)
        reached = bool(np.linalg.norm(self.hand - self.pad) < NEAR)
        return self._frame(), float(reached), reached, False, {}

    def _frame(self) -> np.ndarray:
        frame = np.full((SIZE, SIZE, 3), 160, np.uint8)
        for place, colour in ((self.pad, (40, 160, 80)), (self.hand, (200, 40, 40))):
            x, y = ((place * (1, -1) + 1) / 2 * (SIZE - 1)).round().astype(int)
            frame[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4] = colour
        return frame
