"""What a simulator says: facts about itself, and the outcome of a reset or a chunk.

NumPy only: both processes read these, and the bridge carries them.
"""

from dataclasses import dataclass, field

import numpy as np

from policies.spec import ActionSpec

IDLE = -1  # start id of an environment that has nothing to do until the next reset
KEYFRAMES = 2**40  # start ids from here on name frames in the middle of recorded episodes


@dataclass(frozen=True)
class EnvSpec:
    """Fixed facts of an environment, sent to the trainer once.

    Attributes:
        num_envs: environments stepped as one batch, B.
        image_shape: (views, height, width, 3) of one observation, uint8.
        proprio_dim: entries of the pose that comes with an observation.
        action: shape and meaning of the actions it takes.
        instructions: all task instructions; results name them by index.
        num_starts: initial states to choose from; starts are named 0..num_starts-1, and
            IDLE asks for no episode at all.
        max_episode_steps: actions after which an episode is truncated.
        clip_envs: environments (the first ones) whose whole chunk of frames is sent for videos.
        num_keyframes: further starts, KEYFRAMES .. KEYFRAMES + num_keyframes - 1.
        notes: what a user should know about the environment, in sentences; the trainer warns
            with them.
    """

    num_envs: int
    image_shape: tuple[int, int, int, int]
    proprio_dim: int
    action: ActionSpec
    instructions: tuple[str, ...]
    num_starts: int
    max_episode_steps: int
    clip_envs: int = 0
    num_keyframes: int = 0
    notes: tuple[str, ...] = ()

    def offers(self, starts: np.ndarray) -> np.ndarray:
        """Return which ids, int64 [n], name a start, a keyframe or IDLE, bool [n]."""
        late = starts - KEYFRAMES
        plain = (starts >= 0) & (starts < self.num_starts)
        return (starts == IDLE) | plain | ((late >= 0) & (late < self.num_keyframes))


@dataclass
class StepResult:
    """What a reset or one chunk of actions gave, frames apart.

    The frames themselves are written into the tensors handed to `reset` and `step`:
    `frames` uint8 [B V H W 3], the last frame of the chunk, and `clip` uint8 [clip_envs K V H W 3],
    every frame of the chunk (on reset only its last entry is written).

    Attributes:
        task: index into `EnvSpec.instructions`, int32 [B].
        proprio: pose after the chunk, metres and quaternion xyzw, float32 [B P].
        rewards: per action, float32 [B K].
        terminated: episode ended by success, at the last action of the chunk, bool [B].
        truncated: episode ended by the time limit, bool [B].
        success: latched success of the episode so far, bool [B].
        episode: figures of the episodes so far, each float32 [B]: "return", "length",
            "success_once". With auto-reset these are the finished episode's, not the new one's.
        seconds: time spent by phase inside the simulator.
    """

    task: np.ndarray
    proprio: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    episode: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
